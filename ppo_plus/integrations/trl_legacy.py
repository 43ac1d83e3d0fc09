"""What scripts and checkpoints of TRL's PPO bring along: fields of its `PPOConfig`, named adapters, `v_head.*` files.

TRL had two: the one with `AutoModelForCausalLMWithValueHead` (up to 0.11), whose checkpoints LLaMA-Factory writes too,
and `PPOTrainer(args=, processing_class=, model=, ...)` (0.12 to 1.12). docs/coming_from_trl.md lists what differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..algo.prefix_reward_baseline import saved_reward_line
from ..models.adapters import copy_adapter_state_dict
from ..models.score_heads import HEAD_FILES, V_HEAD, find_shards, read_tensors

if TYPE_CHECKING:
    from ..models.actor_critic import ActorCritic


VALUE_HEAD_KEYS = dict(zip(V_HEAD, ("layers.0.weight", "layers.0.bias"), strict=True))


def rename_adapters(model: Any, trained: str | None, reference: str | None) -> Any:
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
    copies = {
        target: (model.peft_config[name], copy_adapter_state_dict(model, name, target))
        for target, name in sources.items()
    }
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
    if trained_with == model.uses_prefix_reward_baseline:
        return
    have, lack = ("with", "without") if trained_with else ("without", "with")
    raise ValueError(
        f"The value head in {directory} was trained {have} a reward baseline and this run is {lack} one, so its values "
        f"would be off by the baseline, about the mean return. Set prefix_reward_baseline={trained_with} in PPOConfig"
        + (", with the reward adapter that it was trained with." if trained_with else ".")
    )


def read_value_head(directory: Path) -> dict[str, Tensor]:
    """Read the tensors of a value head, by the names of `ValueHead`, from whichever file of a folder has them."""
    for name in HEAD_FILES:
        for file in find_shards(directory / name):
            head = {VALUE_HEAD_KEYS[key]: tensor for key, tensor in read_tensors(file, V_HEAD).items()}
            if head or name == "value_head.safetensors":
                return head or load_file(file)
    raise ValueError(
        f"{directory} has no value head: none of {', '.join(HEAD_FILES)} there holds v_head.summary.weight. Start "
        "without one: the critic learns from the first rollout on."
    )


def export_with_value_head(
    model: ActorCritic, directory: str | Path, format: Literal["trl", "llama_factory"] = "trl"
) -> None:
    """Write policy and critic the way older tools read them.

    Args:
        model: `trainer.model`, with `value_head="linear"`.
        directory: where to.
        format: "trl" is `AutoModelForCausalLMWithValueHead.from_pretrained` (`v_head.*` in `model.safetensors` beside
            the weights of a whole model, in `pytorch_model.bin` beside an adapter); "llama_factory" has them in
            `value_head.safetensors`.
    """
    if format not in ("trl", "llama_factory"):
        raise ValueError(f"format={format!r} is not known; choose 'trl' or 'llama_factory'.")
    if model.critic not in ("shared", "detached"):
        raise ValueError(
            "Only critic='shared' and 'detached' can be written as v_head.*, which reads the actor's hidden states; "
            "this critic has weights of its own."
        )
    if model.reward_line is not None:
        raise ValueError(
            "prefix_reward_baseline adds a line through the reward adapter's scores to the output of this value head, "
            "and v_head.* has no place for it, so the exported values would be off by about the mean return. Train "
            "with prefix_reward_baseline=False, or resume with it until the head has learned the whole value; "
            "save_model() saves the policy either way."
        )
    own = model.value_head.state_dict()
    if own.keys() != set(VALUE_HEAD_KEYS.values()):
        raise ValueError("Only value_head='linear' has the form of v_head.*; this critic has an 'mlp' head.")
    head = {theirs: own[ours].detach().cpu().contiguous() for theirs, ours in VALUE_HEAD_KEYS.items()}
    directory = Path(directory)
    model.save_pretrained(directory)
    own_file = directory / "value_head.safetensors"
    if format == "llama_factory":
        save_file(head, own_file, metadata={"format": "pt"})
        return
    own_file.unlink()
    if model.is_peft:
        torch.save(head, directory / "pytorch_model.bin")  # the one name under which it is looked for there
    else:
        file = directory / "model.safetensors"
        if not file.is_file():
            raise ValueError(
                "The model was written in shards, which this form does not take: use format='llama_factory'."
            )
        save_file({**load_file(file), **head}, file, metadata={"format": "pt"})
