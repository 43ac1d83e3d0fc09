"""Environments of tool calls: pooled instances, their tools, and rewards that they own, as in TRL's GRPOTrainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..data.chat_templates import is_conversational
from ..data.prompts import Row
from ..data.tool_templates import tool_schema

EMPTY_PROMPT = [{"role": "user", "content": ""}]  # of rows whose environment writes the prompt
NOT_TOOLS = ("reset", "get_reward")
Tools = dict[str, Callable]


class EnvironmentPool:
    """Instances of environments by name, one per response of a rollout; they are created once and reset often.

    Args:
        factory: makes an environment, or a dict of such factories by the name in the column `environment`.
        tools: functions that every response may call.

    Raises:
        ValueError: an environment without `reset`, or a tool that cannot be described to the model.
    """

    def __init__(self, factory: Callable | Mapping[str, Callable] | None, tools: Sequence[Callable] = ()) -> None:
        self.is_routed = isinstance(factory, Mapping)
        self.factories = dict(factory) if isinstance(factory, Mapping) else {} if factory is None else {None: factory}
        self._tools = list(tools)
        self._instances: dict[Any, list[Any]] = {}
        self.schemas: dict[Any, list[dict[str, Any]]] = {}
        if not self.factories:
            self.schemas[None] = self._describe(None)
        for name, make in self.factories.items():
            if not callable(make):
                raise ValueError(
                    f"environment_factory is {make!r}; it must be a class or a function without arguments."
                )
            instance = make()
            self._check(instance)
            self._instances[name] = [instance]
            self.schemas[name] = self._describe(instance)

    @property
    def has_tools(self) -> bool:
        """Whether any response may call a tool."""
        return any(self.schemas.values())

    def rewards(self) -> list[Callable]:
        """Return one reward function for each class of environments with `get_reward`, named like the class."""
        classes = dict.fromkeys(type(pool[0]) for pool in self._instances.values())
        return [_own_reward(each) for each in classes if inspect.isfunction(getattr(each, "get_reward", None))]

    def name_of(self, row: Row) -> Any:
        """Return which environment a row selects; None if all rows have the same one."""
        if not self.is_routed:
            return None
        name = row.get("environment")
        if name not in self.factories:
            raise ValueError(
                f"environment={name!r} is not among the environments of environment_factory, {list(self.factories)}."
            )
        return name

    def take(self, rows: Sequence[Row]) -> list[Any]:
        """Return an instance for each row; the pool grows if one rollout needs more of them than before."""
        taken: dict[Any, int] = {}
        instances = []
        for name in map(self.name_of, rows):
            pool, index = self._instances[name], taken.get(name, 0)
            if index == len(pool):
                pool.append(self.factories[name]())
            instances.append(pool[index])
            taken[name] = index + 1
        return instances

    def reset(self, environment: Any, row: Row) -> list[dict[str, Any]]:
        """Reset an environment with the columns of a row; return the prompt with its observation appended."""
        hidden = ("input_ids", "environment") if self.is_routed else ("input_ids",)
        prompt = row.get("prompt", EMPTY_PROMPT)
        observation = environment.reset(**{name: value for name, value in row.items() if name not in hidden})
        if observation is None:
            return prompt
        if not is_text(observation):
            raise ValueError(
                f"{type(environment).__name__}.reset returned {str(observation)[:80]!r}; it must return text, blocks "
                "of type 'text', or None."
            )
        content = prompt[-1]["content"]
        if isinstance(observation, list) and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if isinstance(observation, str) and isinstance(content, list):
            observation = [{"type": "text", "text": observation}]
        return [*prompt[:-1], {**prompt[-1], "content": content + observation}]

    def check_reset(self, columns: Sequence[str], dataset: str) -> None:
        """Refuse environments whose `reset` cannot be called with these columns of a dataset."""
        for environment in (pool[0] for pool in self._instances.values()):
            try:
                inspect.signature(environment.reset).bind(**dict.fromkeys(columns))
            except TypeError as error:
                raise ValueError(
                    f"{type(environment).__name__}.reset cannot be called with the columns of {dataset}, "
                    f"{list(columns)}: {error}. End its signature with **kwargs."
                ) from error

    def tools(self, environment: Any) -> Tools:
        """Return what a response in this environment may call, by name."""
        return {tool.__name__: tool for tool in [*self._tools, *_methods(environment)]}

    def _describe(self, environment: Any) -> list[dict[str, Any]]:
        tools = [*self._tools, *_methods(environment)]
        where = "tools" if environment is None else f"tools and {type(environment).__name__}"
        schemas = [tool_schema(tool, where) for tool in tools]
        names = [tool.__name__ for tool in tools]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{where}: several tools have the name {repeated[0]!r}; give each its own.")
        return schemas

    @staticmethod
    def _check(environment: Any) -> None:
        kind = type(environment)
        reset = getattr(kind, "reset", None)
        if not inspect.isfunction(reset) or inspect.iscoroutinefunction(reset):
            raise ValueError(
                f"environment_factory returned a {kind.__name__} without `reset`: define `def reset(self, **row)`, not "
                "async, which returns None or the text of an observation."
            )


def check_conversational(row: Row, where: str) -> None:
    """Refuse a prompt that is not messages, because only a chat template can show tools to a model."""
    if "prompt" in row and not is_conversational(row["prompt"]):
        raise ValueError(
            f"{where} is not a list of messages, and only a chat template can show tools to the model: "
            "dataset.map(lambda row: {'prompt': [{'role': 'user', 'content': row['prompt']}]})."
        )


def is_text(content: Any) -> bool:
    """Return whether an observation is text or a list of blocks of text."""
    return isinstance(content, str) or (
        isinstance(content, list)
        and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content)
        and all(part.get("type") == "text" for part in content)
    )


def _methods(environment: Any) -> list[Callable]:
    # Listed on the class, because listing on the instance would evaluate properties.
    names = [name for name, _ in inspect.getmembers(type(environment), inspect.isfunction)]
    public = [name for name in names if not name.startswith("_") and name not in NOT_TOOLS]
    return [] if environment is None else [getattr(environment, name) for name in public]


def _own_reward(kind: Any) -> Callable:
    """Return the reward function of one class of environments: None for the responses in other environments."""
    if inspect.iscoroutinefunction(kind.get_reward):

        async def get_reward(environments: list, **kwargs: Any) -> list:
            return [await e.get_reward() if type(e) is kind else None for e in environments]

    else:

        def get_reward(environments: list, **kwargs: Any) -> list:  # type: ignore[misc]
            return [e.get_reward() if type(e) is kind else None for e in environments]

    get_reward.__name__ = kind.__name__
    return get_reward
