"""The uses of tools, environments and rollout_func in TRL's documentation, with the name of the trainer changed.

Each example is a function of a trainer and its configuration. It runs with TRL's GRPOTrainer, which is the oracle of
what the example means, and with PPOTrainer.
"""

from __future__ import annotations

import asyncio
import math
import random
from typing import ClassVar

import pytest
from agents import add, add_slowly, make_tool_model, questions, right_sum, tool_tokenizer
from conftest import lora
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from ppo_plus import PPOConfig, PPOTrainer

SIDES = {"GRPO": (GRPOTrainer, GRPOConfig), "PPO": (PPOTrainer, PPOConfig)}


@pytest.fixture(params=SIDES)
def make(request, tmp_path):
    """Make a trainer of either side with a tiny model that calls `add`; `options` are of its configuration."""
    trainer_class, config_class = SIDES[request.param]
    is_ppo = request.param == "PPO"

    def make(options=None, **arguments):
        shared = {
            "output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 8, "temperature": 0.5,
            "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no",
            "logging_steps": 1,
        }  # fmt: skip
        own = (
            {"response_length": 120, "html_report": False, "num_mini_batches": 1}
            if is_ppo
            else {"max_completion_length": 120, "num_generations": 4, "gradient_checkpointing": None}
        )
        trainer = trainer_class(
            model=make_tool_model(), processing_class=tool_tokenizer(), peft_config=lora(),
            args=config_class(**shared, **own, **(options or {})), **arguments,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == 1
        return trainer

    return make


class Seen:
    """A reward function that keeps what it was given, for the rollout of 8 responses."""

    __name__ = "seen"

    def __init__(self, of=None):
        self.of, self.calls = of or (lambda completions, **_: [0.0] * len(completions)), []

    def __call__(self, completions, **kwargs):
        self.calls.append({"completions": completions, **kwargs})
        return self.of(completions=completions, **kwargs)

    @property
    def last(self):
        return next(call for call in reversed(self.calls) if len(call["completions"]) == 8)


def roles(completions):
    return [[message["role"] for message in messages] for messages in completions]


CALLED = ["assistant", "tool", "assistant"]


@pytest.mark.parametrize("tool", [add, add_slowly], ids=["sync", "async"])
def test_tools_are_functions_sync_or_async(make, tool):
    seen = Seen(right_sum)
    renamed = type(tool)(tool.__code__, tool.__globals__, "add")  # the tiny model calls `add`
    renamed.__doc__, renamed.__annotations__ = tool.__doc__, {"a": int, "b": int, "return": int}
    make(tools=[renamed], train_dataset=questions(), reward_funcs=seen)
    assert roles(seen.last["completions"]) == [CALLED] * 8
    for messages in seen.last["completions"]:
        arguments = messages[0]["tool_calls"][0]["function"]["arguments"]
        assert messages[1] == {"role": "tool", "name": "add", "content": str(arguments["a"] + arguments["b"])}


class Sampled:
    """Samples its own task, which is the prompt, and scores itself."""

    scored: ClassVar[list] = []
    started: ClassVar[list] = []

    def reset(self, **kwargs) -> str | None:
        self.a, self.b, self.result = random.randint(1, 3), random.randint(4, 5), None
        self.started.append(self)
        return f"{self.a}+{self.b}"

    def get_reward(self) -> float:
        self.scored.append(self.result)
        return float(self.result == self.a + self.b)

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.

        Returns:
            Their sum.
        """
        self.result = a + b
        return self.result


class SampledAsync(Sampled):
    """Its own judge takes a while."""

    async def get_reward(self) -> float:  # type: ignore[override]
        await asyncio.sleep(0.001)
        return Sampled.get_reward(self)


@pytest.mark.parametrize("environment", [Sampled, SampledAsync])
def test_an_environment_that_samples_its_task_and_owns_its_reward(make, environment):
    Sampled.scored.clear()
    Sampled.started.clear()
    trainer = make(environment_factory=environment, options={"chat_template_kwargs": {"enable_thinking": False}})
    assert len(Sampled.scored) == 8 and sum(result is not None for result in Sampled.scored) >= 4
    assert len(Sampled.started) == 8 == len({id(environment) for environment in Sampled.started})
    assert f"rewards/{environment.__name__}/mean" in trainer.state.log_history[0]


class Asked(Sampled):
    """Takes its task from the row of the dataset."""

    def reset(self, target, **kwargs) -> None:  # type: ignore[override]
        self.target, self.result, self.row = target, None, kwargs

    def get_reward(self) -> float:
        return float(self.result == self.target)


def test_a_row_of_the_dataset_is_handed_to_reset(make):
    rows = questions().rename_column("sum", "target")
    seen = Seen()
    make(environment_factory=Asked, train_dataset=rows, reward_funcs=seen)
    environments = seen.last["environments"]
    assert [e.target for e in environments] == seen.last["target"]
    assert all(set(e.row) == {"prompt"} for e in environments)
    answers = [messages[1]["content"] if len(messages) > 1 else "None" for messages in seen.last["completions"]]
    assert [str(e.result) for e in environments] == answers and roles(seen.last["completions"]).count(CALLED) >= 4


def test_a_reward_function_reads_the_state_of_its_environment(make, capsys):
    """With `log_completions`, as the first example of environments has it."""
    seen = Seen(lambda environments, **_: [float(e.result is not None) for e in environments])

    class Echo(Sampled):
        get_reward = None  # type: ignore[assignment]

        def reset(self, **kwargs) -> str | None:
            self.result = None
            return None

    make(environment_factory=Echo, train_dataset=questions().remove_columns("sum"), reward_funcs=seen,
         options={"log_completions": True})  # fmt: skip
    assert len(seen.last["environments"]) == 8 and {type(e) for e in seen.last["environments"]} == {Echo}


class Game:
    """Ends after one move, says what it saw before, and then raises."""

    def reset(self, **kwargs) -> str | None:
        self.moves, self.reward = 0, 0.0
        return "+4"

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.

        Returns:
            The feedback.
        """
        self.moves += 1
        raise ValueError("Game over.")


def test_an_error_ends_a_game_and_is_read_by_the_model(make):
    seen = Seen(lambda environments, **_: [e.reward for e in environments])
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": str(i % 3 + 1)}]} for i in range(16)])
    make(environment_factory=Game, train_dataset=rows, reward_funcs=seen, options={"max_tool_calling_iterations": 1})
    over = [m["content"] for messages in seen.last["completions"] for m in messages if m["role"] == "tool"]
    assert over and set(over) == {"{'error': 'Game over.'}"}
    assert len(over) == sum(e.moves for e in seen.last["environments"])
    assert all("+4" in prompt[-1]["content"] for prompt in seen.last["prompts"])


class Several:
    """Two games behind one class, chosen by a column; all tools are shown."""

    def reset(self, **kwargs) -> str | None:
        self.active, self.result = kwargs.get("env", "sums"), None
        return None

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.

        Returns:
            Their sum.
        """
        if self.active != "sums":
            raise ValueError(f"add is no move of {self.active}.")
        self.result = a + b
        return self.result

    def stay(self) -> str:
        """Do nothing.

        Returns:
            What is seen.
        """
        return "nothing"


def test_a_column_routes_inside_one_environment_and_rewards_skip_the_others(make):
    def sums(environments, **kwargs):
        return [float(e.result is not None) if e.active == "sums" else None for e in environments]

    def other(environments, **kwargs):
        return [0.5 if e.active == "other" else None for e in environments]

    rows = questions().remove_columns("sum").add_column("env", ["sums", "other"] * 8)
    seen = Seen()
    trainer = make(environment_factory=Several, train_dataset=rows, reward_funcs=[sums, other, seen])
    assert [e.active for e in seen.last["environments"]] == seen.last["env"]
    played = seen.last["env"].count("other")  # a shuffled rollout may have none of a game
    logged = trainer.state.log_history[0].get("rewards/other/mean", math.nan)
    assert logged == pytest.approx(0.5) if played else math.isnan(logged)


class Sums(Sampled):
    """One of two environments of a dict."""

    def reset(self, **kwargs) -> str:
        assert "environment" not in kwargs
        super().reset()
        return f"{self.a}+{self.b}"


class Quiet:
    """The other one."""

    def reset(self, **kwargs) -> str:
        assert "environment" not in kwargs
        return "1+4"

    def listen(self) -> str:
        """Listen.

        Returns:
            What is heard.
        """
        return "nothing"


def test_a_dict_of_environments_needs_no_more_than_the_column_that_selects_one(make):
    rows = Dataset.from_dict({"environment": ["sums", "quiet"] * 8})
    seen = Seen(lambda environments, **_: [float(isinstance(e, Sums)) for e in environments])
    make(environment_factory={"sums": Sums, "quiet": Quiet}, train_dataset=rows, reward_funcs=seen)
    kinds = {"sums": Sums, "quiet": Quiet}
    assert [type(e) for e in seen.last["environments"]] == [kinds[name] for name in seen.last["environment"]]


def test_rollout_func_plays_outside_and_its_other_keys_reach_the_rewards(make):
    """An agent's server owns the loop: token ids, log-probabilities, a mask of its environment, and its reward."""

    def rollout_func(prompts, trainer):
        tokenizer = trainer.processing_class
        ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True) for p in prompts]
        answers = [tokenizer("ab c" + tokenizer.eos_token)["input_ids"] for _ in prompts]
        return {
            "prompt_ids": [of["input_ids"] for of in ids],
            "completion_ids": answers,
            "logprobs": [[-1.0] * len(answer) for answer in answers],
            "env_mask": [[1, 1, 0, 1, 1]] * len(answers),
            "env_reward": [float(i) for i in range(len(answers))],
        }

    seen = Seen(lambda env_reward, **_: env_reward)
    make(rollout_func=rollout_func, train_dataset=questions(), reward_funcs=seen)
    assert seen.last["env_reward"] == [float(i) for i in range(8)]
    assert [messages[0]["content"] for messages in seen.last["completions"]] == ["ab c"] * 8
    assert {len(ids) for ids in seen.last["completion_ids"]} == {5}
