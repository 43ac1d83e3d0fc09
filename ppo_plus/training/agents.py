"""Tools, environments and `rollout_func` of a run: what is refused before weights are loaded, and who generates."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import PPOConfig
from ..data.padding import pad_id
from ..data.prompts import Row, column_names
from ..data.tool_templates import prepare_tool_tokenizer
from ..rollout.environments import EMPTY_PROMPT, EnvironmentPool, check_conversational
from ..rollout.rollout_function import RolloutFunction
from ..rollout.turns import TurnLoop, template_kwargs

if TYPE_CHECKING:
    from ..trainer import PPOTrainer


def _check_rollout_function(function: Callable) -> None:
    """Refuse a `rollout_func` that cannot be called with prompts and trainer."""
    if inspect.iscoroutinefunction(function):
        raise ValueError(
            "rollout_func is async, and it is called as rollout_func(prompts, trainer): let it run its coroutines with "
            "asyncio.run, and return the dict."
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # some callables written in C have none
        return
    try:
        signature.bind([], None)
    except TypeError as error:
        raise ValueError(f"rollout_func cannot be called as rollout_func(prompts, trainer): {error}.") from error


class AgentSetup:
    """Tools, environments and `rollout_func` of a run; without any, responses are one turn of text.

    Args:
        tools: functions that the model may call.
        rollout_func: generates responses in place of the trainer.
        environment_factory: makes an environment, or a dict of such factories.

    Attributes:
        tokenizer: tokenizes prompts and the answers of tools; None for the policy's own.
    """

    def __init__(
        self, tools: Sequence[Callable] | None, rollout_func: Callable | None,
        environment_factory: Callable | Mapping[str, Callable] | None,
    ) -> None:  # fmt: skip
        self.rollout_func, self.tokenizer = rollout_func, None
        if rollout_func is not None and not callable(rollout_func):
            raise ValueError(f"rollout_func is {rollout_func!r}; it must be a function of prompts and trainer.")
        if rollout_func is not None:
            _check_rollout_function(rollout_func)
        if rollout_func is not None and (tools or environment_factory):
            name = "tools" if tools else "environment_factory"
            raise ValueError(
                f"rollout_func generates whole responses, so {name} would not be used: call the tools in rollout_func, "
                f"or leave rollout_func out."
            )
        if tools is not None and not isinstance(tools, list | tuple):
            raise ValueError(f"tools is {tools!r}; it must be a list of functions.")
        uses_pool = bool(tools or environment_factory)
        self.environments = EnvironmentPool(environment_factory, tools or ()) if uses_pool else None
        # What reward functions receive besides the columns of the dataset; None: whatever `rollout_func` returns.
        arguments = ("environments",) if environment_factory else ()
        self.reward_arguments = None if rollout_func is not None else arguments

    @property
    def scores_need_rollout(self) -> bool:
        """Whether reward functions read more than prompts, completions and columns."""
        return self.reward_arguments != ()

    def add_rewards(self, reward_funcs: Any, reward_model: Any, tokenizers: Any) -> tuple[Any, Any, Any]:
        """Append the rewards that environments own, each with weight 1."""
        self._own_rewards = [] if self.environments is None else self.environments.rewards()
        if not self._own_rewards or (reward_funcs is not None and reward_model is not None):
            return reward_funcs, reward_model, tokenizers
        funcs = reward_funcs if reward_funcs is not None else reward_model
        funcs = [] if funcs is None else list(funcs) if isinstance(funcs, list | tuple) else [funcs]
        if tokenizers is not None:
            tokenizers = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers]
            tokenizers += [None] * len(self._own_rewards)
        return [*funcs, *self._own_rewards], None, tokenizers

    def add_weights(self, args: PPOConfig) -> PPOConfig:
        """Append the weights of the rewards that environments own to `reward_weights`, in place."""
        if args.reward_weights is not None:
            args.reward_weights = [*args.reward_weights, *[1.0] * len(self._own_rewards)]
        return args

    def default_dataset(self, args: Any, dataset: Any) -> Any:
        """Return the dataset, or one of empty prompts where a single environment writes the prompts."""
        if dataset is not None or self.environments is None or not isinstance(args, PPOConfig):
            return dataset
        pool = self.environments
        if not pool.factories:
            return dataset
        if pool.is_routed:
            raise ValueError(
                "train_dataset is None, but a dict of environments needs a column `environment` that selects one of "
                f"{list(pool.factories)} for each row."
            )
        if args.requested_max_steps <= 0:
            raise ValueError(
                f"train_dataset is None and max_steps={args.max_steps}: training on the prompts of an environment has "
                "no length. Set max_steps or total_episodes."
            )
        return Dataset.from_dict({"prompt": [EMPTY_PROMPT] * args.rollout_batch_size * args.world_size})

    def prepare(self, args: PPOConfig, tokenizer: PreTrainedTokenizerBase, datasets: dict[str, Any]) -> dict[str, Any]:
        """Refuse what could not run, and return the datasets, with prompts where environments write them."""
        if args.eval_win_rate and self.scores_need_rollout:
            name = "rollout_func" if self.rollout_func is not None else "environment_factory"
            raise ValueError(
                f"eval_win_rate=True lets the reference answer too, which {name} does not: set it to False."
            )
        pool = self.environments
        if self.rollout_func is None and not (pool and pool.has_tools):
            for option in ("max_tool_calling_iterations", "tool_timeout"):
                if (value := getattr(args, option)) is not None:
                    raise ValueError(f"{option}={value} has no effect without tools: pass tools, or remove it.")
        if pool is None:
            return datasets
        self.tokenizer = prepare_tool_tokenizer(tokenizer) if pool.has_tools else None
        return {name: self._check_dataset(dataset, name) for name, dataset in datasets.items()}

    def _check_dataset(self, dataset: Any, name: str) -> Any:
        pool, columns = self.environments, column_names(dataset)
        assert pool is not None
        if taken := [column for column in columns if column in (self.reward_arguments or ())]:
            raise ValueError(f"{name} has a column {taken[0]!r}, which is an argument of reward functions; rename it.")
        if pool.is_routed and "environment" not in columns:
            raise ValueError(f"{name} has no column `environment` that selects one of {list(pool.factories)}.")
        check_conversational(next(iter(dataset), {}), f"{name}[0]")
        if pool.has_tools and "tools" in columns:
            warnings.warn(
                f"{name} has a column 'tools', which has no effect here: prompts show the tools of the trainer's "
                "arguments, which are the ones that run. Remove the column.",
                stacklevel=2,
            )
        if not pool.factories:
            if "prompt" not in columns:
                raise ValueError(
                    f"{name} has no column `prompt` of messages, in which the model could read of its tools."
                )
            return dataset
        hidden = ("input_ids", "environment") if pool.is_routed else ("input_ids",)
        pool.check_reset([column for column in columns if column not in hidden], name)
        # `reset` writes the prompt, of which nothing is known yet.
        return dataset if "prompt" in columns else dataset.map(lambda row: {"input_ids": [0]})

    def schemas_of(self, row: Row) -> list[dict[str, Any]]:
        """Return the tools that a row's prompt shows, besides those in its own column."""
        return [] if self.environments is None else self.environments.schemas[self.environments.name_of(row)]

    def tokenize_kwargs(self, args: PPOConfig) -> dict[str, Any]:
        """Return the keyword arguments of prompt tokenization; arguments of the template depend on the row."""
        if self.environments is None:
            return args.tokenize_kwargs
        pool = self.environments

        def kwargs_of(row: Row) -> dict[str, Any]:
            check_conversational(row, "prompt")
            return template_kwargs(pool, args, row)

        return {**args.tokenize_kwargs, "chat_template_kwargs": kwargs_of}

    def responder(self, trainer: PPOTrainer) -> Callable | None:
        """Return who generates, called with rows, uniforms and a function that samples a turn; None: one turn."""
        args, limits = trainer.args, (trainer.model.context, trainer.model.num_embeddings)
        if self.rollout_func is not None:
            padding = pad_id(trainer.processing_class)
            call = RolloutFunction(self.rollout_func, trainer, args, trainer.stop_ids, limits, padding)
            return lambda rows, uniforms, generate: call(rows)
        if self.environments is None:
            return None
        tokenizer = self.tokenizer or trainer.processing_class
        return TurnLoop(self.environments, tokenizer, args, trainer.stop_ids, limits)
