"""Support for scripts and checkpoints of TRL's PPO: named adapters and `v_head.*` files.

TRL had two PPO trainers: one with `AutoModelForCausalLMWithValueHead` (up to 0.11), whose checkpoint format
LLaMA-Factory also uses, and `PPOTrainer(args=, processing_class=, model=, ...)` (0.12 to 1.12). docs/coming_from_trl.md
lists the differences.
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
    """Rename the adapters of a `PeftModel`: the trained one to `default`, the reference to `ref`.

    Args:
        model: any model; only a `PeftModel` has adapters to rename.
        trained: `PPOConfig.model_adapter_name`.
        reference: `PPOConfig.ref_adapter_name`.
    """
    choices = {"default": ("model_adapter_name", trained), "ref": ("ref_adapter_name", reference)}
    for option, name in choices.values():
        if name is None:
            continue
        if not isinstance(model, PeftModel):
            raise ValueError(f"{option}={name!r}, but model has no adapters: pass a PeftModel, or remove {option}.")
        if name not in model.peft_config:
            raise ValueError(f"{option}={name!r}, but model has the adapters {[*model.peft_config]}. Choose one.")
    sources = {target: name for target, (_, name) in choices.items() if name is not None and name != target}
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
    """Load the value head from a checkpoint of TRL (up to 0.11), LLaMA-Factory (`v_head.*`) or ppo_plus.

    Args:
        model: `trainer.model`; checkpoints of TRL and LLaMA-Factory require `value_head="linear"`.
        directory: contains `model.safetensors`, `pytorch_model.bin`, or either in shards, with `v_head.summary.*` among
            the tensors; or `value_head.safetensors` or `value_head.bin`.

    Raises:
        ValueError: the directory contains no value head, its shapes do not match, or it was trained with a prefix
            reward baseline and this run has none, or the reverse.
    """
    state = read_value_head(Path(directory))
    check_same_baseline(model, Path(directory))
    target = model.value_head.state_dict()
    shapes, target_shapes = ({name: tuple(t.shape) for name, t in sorted(each.items())} for each in (state, target))
    if shapes != target_shapes:
        raise ValueError(
            f"The value head in {directory} does not fit: it has {shapes}, this model needs {target_shapes}. Use the "
            "same base, and value_head='linear' for checkpoints of TRL and LLaMA-Factory."
        )
    model.value_head.load_state_dict({name: tensor.float() for name, tensor in state.items()})


def check_same_baseline(model: ActorCritic, directory: Path) -> None:
    """Refuse a value head that was trained with a prefix reward baseline if this run has none, and the reverse."""
    file = directory / HEAD_FILES[0]
    trained_with = file.is_file() and saved_reward_line(file) is not None
    if trained_with == model.uses_prefix_reward_baseline:
        return
    trained, current = ("with", "without") if trained_with else ("without", "with")
    raise ValueError(
        f"The value head in {directory} was trained {trained} a prefix reward baseline, but this run is {current} one, "
        "so its values would be wrong by the baseline, about the mean return. Set "
        f"prefix_reward_baseline={trained_with} in PPOConfig"
        + (", and use the reward adapter of its training." if trained_with else ".")
    )


def read_value_head(directory: Path) -> dict[str, Tensor]:
    """Read the tensors of a value head from the files of a folder, with the parameter names of `ValueHead`."""
    for name in HEAD_FILES:
        for file in find_shards(directory / name):
            head = {VALUE_HEAD_KEYS[key]: tensor for key, tensor in read_tensors(file, V_HEAD).items()}
            if head or name == "value_head.safetensors":
                return head or load_file(file)
    raise ValueError(
        f"{directory} has no value head: none of {', '.join(HEAD_FILES)} in it contains v_head.summary.weight. Start "
        "with a new value head: do not call load_value_head."
    )


def _collect_head(model: ActorCritic) -> dict[str, Tensor]:
    """Return the value head under the names of `v_head.*`, or refuse one that these cannot store."""
    if model.critic not in ("shared", "detached"):
        raise ValueError(
            f"critic={model.critic!r} cannot be saved as v_head.*, whose input is the actor's hidden states. Train "
            "with critic='shared' or 'detached'."
        )
    if model.reward_line is not None:
        raise ValueError(
            "prefix_reward_baseline adds a regression on the reward adapter's scores to the output of this value head. "
            "v_head.* cannot store it, so the exported values would be wrong by about the mean return. Train with "
            "prefix_reward_baseline=False, or resume with it until the head predicts the whole value; save_model() "
            "saves the policy in either case."
        )
    state = model.value_head.state_dict()
    if state.keys() != set(VALUE_HEAD_KEYS.values()):
        raise ValueError(
            "value_head='mlp' cannot be saved as v_head.*, which is linear. Train with value_head='linear'."
        )
    return {key: state[name].detach().cpu().contiguous() for key, name in VALUE_HEAD_KEYS.items()}


def export_with_value_head(
    model: ActorCritic, directory: str | Path, format: Literal["trl", "llama_factory"] = "trl"
) -> None:
    """Save policy and value head in the format of older TRL versions or LLaMA-Factory.

    Args:
        model: `trainer.model`, with `value_head="linear"`.
        directory: output folder.
        format: "trl" for `AutoModelForCausalLMWithValueHead.from_pretrained`, with `v_head.*` in `model.safetensors`
            for a full model, or in `pytorch_model.bin` next to an adapter; "llama_factory" with `v_head.*` in
            `value_head.safetensors`.
    """
    if format not in ("trl", "llama_factory"):
        raise ValueError(f"format={format!r} is not supported; choose 'trl' or 'llama_factory'.")
    head = _collect_head(model)
    directory = Path(directory)
    model.save_pretrained(directory)
    head_file = directory / "value_head.safetensors"
    if format == "llama_factory":
        save_file(head, head_file, metadata={"format": "pt"})
        return
    head_file.unlink()
    if model.is_peft:
        torch.save(head, directory / "pytorch_model.bin")  # the only file name that TRL looks for
    else:
        file = directory / "model.safetensors"
        if not file.is_file():
            raise ValueError(
                "The model was saved in shards, which format='trl' does not support: use format='llama_factory'."
            )
        save_file({**load_file(file), **head}, file, metadata={"format": "pt"})
