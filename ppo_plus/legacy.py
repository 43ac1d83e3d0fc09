"""What scripts and checkpoints of TRL's PPO bring along: fields of its `PPOConfig`, named adapters, `v_head.*` files.

TRL had two: the one with `AutoModelForCausalLMWithValueHead` (up to 0.11), whose checkpoints LLaMA-Factory writes too,
and `PPOTrainer(args=, processing_class=, model=, ...)` (0.12 to 1.12). docs/migration.md lists what differs.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from .adapters import weights_as
from .baseline import saved_reward_line
from .heads import HEAD_FILES, V_HEAD, find_shards, read_tensors

if TYPE_CHECKING:
    from .modeling import ActorCritic

Config = TypeVar("Config", bound=type)

# Sizes that TRL 1.12 computed, and overwrote where they were given.
DERIVED = (
    "world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size", "local_mini_batch_size",
    "mini_batch_size",
)  # fmt: skip
TO_OURS = dict(zip(V_HEAD, ("layers.0.weight", "layers.0.bias"), strict=True))


@dataclass(repr=False)
class TRLFields:
    """Fields of TRL 1.12's `PPOConfig` that `PPOConfig` would not have otherwise."""

    sft_model_path: str = field(
        default="EleutherAI/pythia-160m", metadata={"help": "For scripts: where they load policy and reference from."}
    )
    reward_model_path: str = field(
        default="EleutherAI/pythia-160m", metadata={"help": "For scripts: where they load the reward model from."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "For scripts: processes that they tokenize with."}
    )
    exp_name: str | None = field(default=None, metadata={"help": "Name of the run in reports; run_name goes before."})
    model_adapter_name: str | None = field(
        default=None, metadata={"help": "Which adapter of a PeftModel is trained; None means 'default'."}
    )
    ref_adapter_name: str | None = field(
        default=None, metadata={"help": "Which adapter of a PeftModel is the reference; None means a frozen copy."}
    )
    ds3_gather_for_generation: bool = field(
        default=True, metadata={"help": "Nothing is sharded, so nothing is gathered; False gives a warning."}
    )

    @property
    def local_batch_size(self) -> int:
        """Responses per process and rollout."""
        return self.rollout_batch_size  # type: ignore[attr-defined]

    @property
    def batch_size(self) -> int:
        """Responses per rollout, over all processes."""
        return self.local_batch_size * self.world_size  # type: ignore[attr-defined]

    @property
    def local_mini_batch_size(self) -> int:
        """Responses per process and optimizer step."""
        return self.local_batch_size // self.num_mini_batches  # type: ignore[attr-defined]

    @property
    def mini_batch_size(self) -> int:
        """Responses per optimizer step, over all processes."""
        return self.batch_size // self.num_mini_batches  # type: ignore[attr-defined]

    @property
    def micro_batch_size(self) -> int:
        """Responses per forward pass of learning, over all processes."""
        return self.per_device_train_batch_size * self.world_size  # type: ignore[attr-defined]

    @property
    def num_total_batches(self) -> int | None:
        """Rollouts of the whole training; None where `total_episodes` does not say it."""
        episodes: int | None = self.total_episodes  # type: ignore[attr-defined]
        return None if episodes is None else -(-episodes // self.batch_size)

    def _settle_trl_fields(self) -> None:
        if self.exp_name is not None and getattr(self, "run_name", None) is None:
            self.run_name = self.exp_name
        if not self.ds3_gather_for_generation:
            warnings.warn(
                "PPOConfig: ds3_gather_for_generation=False has no effect: ppo_plus does not shard weights "
                "(DeepSpeed ZeRO-3), so none are gathered. Remove it.",
                stacklevel=4,
            )


def takes_derived_sizes(config: Config) -> Config:
    """Let a configuration be made with the sizes that TRL computed itself, saying why they do nothing."""
    original: Any = config.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in DERIVED:
            if kwargs.pop(name, None) is not None:
                warnings.warn(
                    f"PPOConfig: {name} is derived from per_device_train_batch_size, gradient_accumulation_steps, "
                    "num_mini_batches, total_episodes and the number of processes; what is given is not used (TRL "
                    "overwrote it). Remove it.",
                    stacklevel=2,
                )
        original(self, *args, **kwargs)

    config.__init__ = init  # type: ignore[misc]
    return config


def with_named_adapters(model: Any, trained: str | None, reference: str | None) -> Any:
    """A `PeftModel` whose adapters have the names that ppo_plus uses: `default` is trained, `ref` the reference.

    Args:
        model: anything; only a `PeftModel` has adapters to choose from.
        trained: `PPOConfig.model_adapter_name`.
        reference: `PPOConfig.ref_adapter_name`.
    """
    wanted = {"default": ("model_adapter_name", trained), "ref": ("ref_adapter_name", reference)}
    for _, (option, name) in wanted.items():
        if name is None:
            continue
        if not isinstance(model, PeftModel):
            raise ValueError(f"{option}={name!r} names an adapter, but model has none: pass a PeftModel, or remove it.")
        if name not in model.peft_config:
            raise ValueError(f"{option}={name!r}, but model has the adapters {[*model.peft_config]}. Choose one.")
    sources = {target: name for target, (_, name) in wanted.items() if name is not None and name != target}
    copies = {target: (model.peft_config[name], weights_as(model, name, target)) for target, name in sources.items()}
    for target, (config, weights) in copies.items():
        if target in model.peft_config:
            model.delete_adapter(target)
        model.add_adapter(target, config)
        model.load_state_dict(weights, strict=False)
    if copies:
        model.set_adapter("default")
    return model


def load_value_head(model: ActorCritic, directory: str | Path) -> None:
    """Take the critic's head from a checkpoint of TRL (up to 0.11) or LLaMA-Factory, `v_head.*`, or from one of ours.

    Args:
        model: `trainer.model`, with `value_head="linear"`, which is the form of theirs.
        directory: holds `model.safetensors`, `pytorch_model.bin`, or either in shards, with `v_head.summary.*` among
            the tensors; or `value_head.safetensors` or `value_head.bin`.

    Raises:
        ValueError: there is no value head in it, or it is one of another model, or it was trained to be the value by
            itself and here a reward baseline would be added to it, or the reverse.
    """
    state = read_value_head(Path(directory))
    check_same_baseline(model, Path(directory))
    own = model.value_head.state_dict()
    found, needed = ({name: tuple(t.shape) for name, t in sorted(each.items())} for each in (state, own))
    if found != needed:
        raise ValueError(
            f"The value head in {directory} does not fit: it has {found}, this model needs {needed}. Use the same "
            "base, and value_head='linear' for checkpoints of TRL and LLaMA-Factory."
        )
    model.value_head.load_state_dict({name: tensor.float() for name, tensor in state.items()})


def check_same_baseline(model: ActorCritic, directory: Path) -> None:
    """Refuse a head whose output is the value where here it is what a reward baseline leaves over, and the reverse."""
    file = directory / HEAD_FILES[0]
    trained_with = file.is_file() and saved_reward_line(file) is not None
    if trained_with == model.adds_reward_baseline:
        return
    have, lack = ("with", "without") if trained_with else ("without", "with")
    raise ValueError(
        f"The value head in {directory} was trained {have} a reward baseline and this run is {lack} one, so its values "
        f"would be off by the baseline, about the mean return. Set reward_baseline={trained_with} in PPOConfig"
        + (", with the reward adapter that it was trained with." if trained_with else ".")
    )


def read_value_head(directory: Path) -> dict[str, Tensor]:
    """Read the tensors of a value head, by the names of `ValueHead`, from whichever file of a folder has them."""
    for name in HEAD_FILES:
        for file in find_shards(directory / name):
            head = {TO_OURS[key]: tensor for key, tensor in read_tensors(file, V_HEAD).items()}
            if head or name == "value_head.safetensors":
                return head or load_file(file)
    raise ValueError(
        f"{directory} has no value head: none of {', '.join(HEAD_FILES)} there holds v_head.summary.weight. Start "
        "without one: the critic learns from the first rollout on."
    )


def export_with_value_head(
    model: ActorCritic, directory: str | Path, form: Literal["trl", "llama_factory"] = "trl"
) -> None:
    """Write policy and critic the way older tools read them.

    Args:
        model: `trainer.model`, with `value_head="linear"`.
        directory: where to.
        form: "trl" is `AutoModelForCausalLMWithValueHead.from_pretrained` (`v_head.*` in `model.safetensors` beside
            the weights of a whole model, in `pytorch_model.bin` beside an adapter); "llama_factory" has them in
            `value_head.safetensors`.
    """
    if form not in ("trl", "llama_factory"):
        raise ValueError(f"form={form!r} is not known; choose 'trl' or 'llama_factory'.")
    if model.critic not in ("shared", "detached"):
        raise ValueError(
            "Only critic='shared' and 'detached' can be written as v_head.*, which reads the actor's hidden states; "
            "this critic has weights of its own."
        )
    if model.reward_line is not None:
        raise ValueError(
            "reward_baseline adds a line through the reward adapter's scores to the output of this value head, and "
            "v_head.* has no place for it, so the exported values would be off by about the mean return. Train with "
            "reward_baseline=False, or resume with it until the head has learned the whole value; save_model() saves "
            "the policy either way."
        )
    own = model.value_head.state_dict()
    if own.keys() != set(TO_OURS.values()):
        raise ValueError("Only value_head='linear' has the form of v_head.*; this critic has an 'mlp' head.")
    head = {theirs: own[ours].detach().cpu().contiguous() for theirs, ours in TO_OURS.items()}
    directory = Path(directory)
    model.save_pretrained(directory)
    own_file = directory / "value_head.safetensors"
    if form == "llama_factory":
        save_file(head, own_file, metadata={"format": "pt"})
        return
    own_file.unlink()
    if model.is_peft:
        torch.save(head, directory / "pytorch_model.bin")  # the one name under which it is looked for there
    else:
        file = directory / "model.safetensors"
        if not file.is_file():
            raise ValueError(
                "The model was written in shards, which this form does not take: use form='llama_factory'."
            )
        save_file({**load_file(file), **head}, file, metadata={"format": "pt"})
