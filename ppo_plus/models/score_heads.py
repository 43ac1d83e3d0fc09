"""Find and load score heads and value heads in files of ppo_plus, PEFT, TRL and LLaMA-Factory.

A score head maps the last hidden state of a text, `(H,)`, to its reward: a weight `(1, H)` and, where the head was
trained with one, a bias `(1,)`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..utils.files import read_json_object, reraise_as_corrupt_file

# Files that may have a value head, and its tensor names in those of TRL and LLaMA-Factory.
HEAD_FILES = ("value_head.safetensors", "value_head.bin", "model.safetensors", "pytorch_model.bin")
V_HEAD = ("v_head.summary.weight", "v_head.summary.bias")
# The head of a sequence classifier among an adapter's tensors; some tools keep PEFT's names of the copies it trains.
SCORE_KEY = re.compile(r"(?:^|\.)score(?:\.modules_to_save(?:\.\w+)?)?\.(weight|bias)$")
OTHER_HEAD_KEY = re.compile(r"(?:^|\.)(?:classifier|reward_head|value_head|regression_head)\.")
UNTRAINED_SCORE_KEY = re.compile(r"(?:^|\.)score\.original_module\.")


def find_score_keys(keys: Iterable[str]) -> dict[str, str]:
    """Find a sequence classifier's score head among tensor names: the name of its `weight` and of its `bias`."""
    return {match[1]: key for key in keys if (match := SCORE_KEY.search(key))}


def pop_score_head(weights: dict[str, Tensor], directory: Path) -> nn.Linear:
    """Remove a reward adapter's score head from its tensors and return it, or load the value head in its folder.

    Args:
        weights: tensors of the adapter, by name; those of the head are removed.
        directory: folder of the adapter.

    Returns:
        a frozen linear layer, H to 1.
    """
    keys = find_score_keys(weights)
    head = {part: weights.pop(key) for part, key in keys.items()} or read_v_head(directory)
    for key in [key for key in weights if UNTRAINED_SCORE_KEY.search(key)]:
        del weights[key]
    return make_score_head(head)


def make_score_head(head: Mapping[str, Tensor]) -> nn.Linear:
    """Make a frozen linear layer of a score head's `weight`, `(1, H)`, and its `bias`, `(1,)`, if it has one."""
    weight = head["weight"]
    layer = nn.Linear(weight.shape[1], 1, bias="bias" in head, dtype=weight.dtype)
    layer.load_state_dict(dict(head))
    return layer.requires_grad_(False)


def score_head_shapes(directory: Path, adapter_file: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a reward adapter's score head, by `weight` and `bias`; empty if the adapter has none."""
    with reraise_as_corrupt_file(adapter_file), safe_open(adapter_file, framework="pt") as tensors:
        keys = find_score_keys(tensors.keys())
        shapes = {part: tuple(tensors.get_slice(key).get_shape()) for part, key in keys.items()}
    return shapes or {part: tuple(tensor.shape) for part, tensor in read_v_head(directory).items()}


def find_other_heads(adapter_file: Path) -> list[str]:
    """Find a classification head of another name than `score` among an adapter's tensors."""
    with reraise_as_corrupt_file(adapter_file), safe_open(adapter_file, framework="pt") as tensors:
        return sorted(key for key in tensors.keys() if OTHER_HEAD_KEY.search(key))  # noqa: SIM118


def read_v_head(directory: Path | None) -> dict[str, Tensor]:
    """Load the value head that LLaMA-Factory and TRL (up to 0.11) write with a reward model's language model.

    Returns:
        its `weight`, `(1, H)`, and `bias`, `(1,)`; empty if no file has one. A critic of ppo_plus has other names.
    """
    for name in HEAD_FILES if directory is not None else ():
        for file in find_shards(cast(Path, directory) / name):
            if tensors := read_tensors(file, V_HEAD):
                return {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
    return {}


def read_tensors(file: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Load the tensors with these names from a file that may lack some; only tensors are unpickled."""
    if file.suffix != ".safetensors":
        state = torch.load(file, weights_only=True, map_location="cpu")
        return {name: state[name] for name in names if name in state}
    with reraise_as_corrupt_file(file), safe_open(file, framework="pt") as tensors:
        present = set(tensors.keys())
        return {name: tensors.get_tensor(name) for name in names if name in present}


def find_shards(file: Path) -> list[Path]:
    """Find a file, or those of its shards that have a value head; empty if there is neither."""
    index = file.with_name(f"{file.name}.index.json")
    if file.is_file():
        return [file]
    if not index.is_file():
        return []
    weight_map = read_json_object(index)["weight_map"]
    return sorted({file.with_name(weight_map[key]) for key in V_HEAD if key in weight_map})


def pool_last_token(
    scores: Tensor, input_ids: Tensor, attention_mask: Tensor, pad_token_id: int | None = None
) -> Tensor:
    """Gather the score at each row's last token, `(B, L)` to `(B,)`, with padding on either side.

    Args:
        scores: at every position.
        input_ids: `(B, L)` int64.
        attention_mask: 1 for real tokens, `(B, L)`.
        pad_token_id: padding token in the configuration of the reward model. A sequence classifier of transformers
            skips it at the end of a text, even if it is also EOS, a real token. None skips nothing.
    """
    real = attention_mask.bool()
    if pad_token_id is not None:
        real = real & (input_ids != pad_token_id)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (positions * real).argmax(-1, keepdim=True)
    return scores.gather(1, last).squeeze(1)
