"""Merge an adapter into its base: a folder of plain weights that transformers, vLLM and GGUF converters read."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, TaskType
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapter_files import (
    WEIGHTS_FILE,
    display_name,
    download,
    hub_name,
    load_reward_metadata,
    resolve_adapter_path,
)  # fmt: skip
from .adapters import CRITIC_ADAPTER
from .classifier import load_classifier
from .loading import base_name, check_adapter_kind, language_model_class, load_adapter_onto, load_config, load_tokenizer
from .saving import VALUE_MODEL, save_model
from .value_head import VALUE_HEAD_FILE

NOT_MERGED = {
    VALUE_HEAD_FILE: "the critic's head",
    "value_head.bin": "the value head",
    CRITIC_ADAPTER: "the critic's adapter",
    VALUE_MODEL: "the critic's model",
}
CARD_FILE, TOKENIZER_FILE = "README.md", "tokenizer_config.json"
TEMPLATE_TITLE = "# Model Card for Model ID"  # of the empty template that PEFT writes
MAX_ERROR = 0.5  # share of an adapter's effect that merging may lose without a warning
PROBE = "The quick brown fox jumps over the lazy dog. One, two, three."


@dataclass(frozen=True)
class Merged:
    """A merged model on disk.

    Attributes:
        directory: its folder.
        architecture: its class in transformers, as in `config.json`.
        left_out: files and folders of the adapter that belong to the critic and are not in a merged model.
        error: distance of the reloaded model's outputs on a short text from those of base and adapter, computed in
            fp32, as a share of what the adapter changes; NaN where the adapter changes nothing.
    """

    directory: Path
    architecture: str
    left_out: list[str]
    error: float


def merge_adapter(
    adapter: str | Path, directory: str | Path, *, base: str | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16", trust_remote_code: bool = False,
) -> Merged:  # fmt: skip
    """Add an adapter's weights to those of its base, save the sum with tokenizer and generation config, and reload it.

    The critic is not part of a merged model. The outputs of the saved folder are compared with those of base and
    adapter; a warning reports a sum that has lost the adapter, in rounding or in weights that layers share.

    Args:
        adapter: folder or name of an adapter of a language model or of a reward model.
        directory: where to save; a new or an empty folder.
        base: name of the base; by default the adapter's own. Needed where that one is quantized.
        dtype: of the merged weights.
        trust_remote_code: run the code of a base whose model is not in transformers.

    Raises:
        ValueError: there is no such adapter, its base is quantized or another one, or `directory` has files.
    """
    directory, folder = Path(directory), resolve_adapter_path(adapter)
    if folder is None:
        raise ValueError(f"adapter={str(adapter)!r} has no {WEIGHTS_FILE}: pass the folder or name of an adapter.")
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"directory={str(directory)!r} has files already: choose a new folder.")
    name, is_classifier = base or base_name(str(folder)), _is_classifier(folder)
    check_unquantized(name, trust_remote_code)
    has_tokenizer = (folder / TOKENIZER_FILE).is_file()  # of a name, its other files are not downloaded yet
    tokenizer = load_tokenizer(str(adapter) if has_tokenizer else name, trust_remote_code)
    model = load_adapter_onto(_load_base(name, is_classifier, dtype, trust_remote_code), folder).eval()
    if is_classifier:  # reads its score at the last token that is not padding
        pad_token_id = load_reward_metadata(folder).get("pad_token_id", tokenizer.pad_token_id)
        model.config.get_text_config().pad_token_id = pad_token_id
    with model.disable_adapter():
        plain = _outputs(model, tokenizer)
    adapted, merged = _outputs(model, tokenizer), model.merge_and_unload(safe_merge=True)
    save_model(merged, directory)
    tokenizer.save_pretrained(str(directory))
    del model, merged  # before a second model of this size
    reloaded = _load_base(str(directory), is_classifier, dtype, trust_remote_code)
    error = _relative_error(_outputs(reloaded, tokenizer), adapted, plain, dtype)
    left_out = [each for each in NOT_MERGED if (folder / each).exists()]
    result = Merged(directory, type(reloaded).__name__, left_out, error)
    card = folder / CARD_FILE if Path(adapter).exists() else download(str(adapter), CARD_FILE)
    _write_card(result, card, name, dtype, use_of_merged(result, tokenizer, is_classifier))
    return result


def check_unquantized(base: str, trust_remote_code: bool = False) -> None:
    """Refuse a base whose files are quantized: rounding the sum to a few bits would change the policy."""
    quantization: Any = getattr(
        load_config(base, {"trust_remote_code": trust_remote_code}), "quantization_config", None
    )
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    raise ValueError(
        f"base={base!r} is saved quantized ({getattr(method, 'value', method)}), and rounding the sum to a few bits "
        "again would change the policy. Pass base= (--base) with the model that was quantized, in bfloat16 or float32; "
        "its outputs differ from those of the quantized base by the quantization error."
    )


def _is_classifier(folder: Path) -> bool:
    config = PeftConfig.from_pretrained(str(folder))
    check_adapter_kind(config)
    return config.task_type == TaskType.SEQ_CLS


def _load_base(name: str, is_classifier: bool, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    if is_classifier:
        return load_classifier(name, dtype)[0].eval()
    options = {"trust_remote_code": trust_remote_code}
    return language_model_class(load_config(name, options)).from_pretrained(name, dtype=dtype, **options).eval()


@torch.no_grad()
def _outputs(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the logits of a short text, `(L, V)`, or its score, `(1,)`, float32."""
    with _compute_in_fp32(model):
        return model(**tokenizer(PROBE, return_tensors="pt", return_token_type_ids=False)).logits[0].float()


@contextlib.contextmanager
def _compute_in_fp32(model: nn.Module) -> Iterator[None]:
    """Hold each module's weights in fp32 while it runs.

    Products in bf16 change logits by more than a small adapter does. A whole model in fp32 would take twice the memory.
    """

    def cast(dtypes: dict[nn.Parameter, torch.dtype], module: nn.Module, *args: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in dtypes:
                parameter.data = parameter.data.to(dtypes[parameter])

    saved = {p: p.dtype for p in model.parameters() if p.is_floating_point()}
    fp32, hooks = dict.fromkeys(saved, torch.float32), []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(partial(cast, fp32)))
        hooks.append(module.register_forward_hook(partial(cast, saved)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _relative_error(merged: Tensor, adapted: Tensor, plain: Tensor, dtype: str) -> float:
    """Return the distance of merged from adapted outputs as a share of the adapter's effect; warn if it is large."""
    effect, distance = (adapted - plain).norm().item(), (merged - adapted).norm().item()
    if effect == 0:
        return math.nan
    if distance > MAX_ERROR * effect:
        warnings.warn(
            f"The merged model is {distance / effect:.0%} of the adapter's effect away from base and adapter: the "
            f"adapter is lost in rounding to {dtype} (merge with dtype='float32'), or it is on weights that several "
            "layers share, which cannot be merged (keep the adapter).",
            stacklevel=3,
        )
    return distance / effect


def _write_card(merged: Merged, file: Path | None, base: str, dtype: str, use: list[str]) -> None:
    """Write the adapter's card with another section on use, or a short one where the adapter has none."""
    empty, name = "---\nlicense: unknown\n---\n", merged.directory.absolute().name
    text = file.read_text(encoding="utf-8") if file and file.is_file() else empty
    card = ModelCard(empty if TEMPLATE_TITLE in text else text, ignore_metadata_errors=True)
    data: Any = card.data
    data.library_name, data.base_model, data.model_name = "transformers", hub_name(base), name
    data.tags = [tag for tag in data.tags or [] if tag != "lora" and not tag.startswith("base_model:")]
    rest = re.sub(r"\n## Use\n.*?(?=\n## |\Z)", "", card.text, flags=re.DOTALL).partition("\n# ")[2].partition("\n")[2]
    note = f"Merged: `{display_name(base)}` plus an adapter, in {dtype}."
    if merged.left_out:
        note += f" Not in this folder: {describe_left_out(merged.left_out)}, which only further training needs."
    card.text = "\n".join([f"# {name}", "", note, "", *use, rest.strip(), ""])
    card.save(merged.directory / CARD_FILE)
    for picture in file.parent.glob("*.svg") if file else ():
        shutil.copy(picture, merged.directory)


def use_of_merged(merged: Merged, tokenizer: PreTrainedTokenizerBase, is_classifier: bool) -> list[str]:
    """Return the section of a card on how to use a merged model, in Markdown lines."""
    name = merged.directory.absolute().name
    task = '"text-classification", function_to_apply="none"' if is_classifier else '"text-generation"'
    lines = [
        "## Use", "", "```python", "from transformers import pipeline", "",
        f'pipe = pipeline({task}, model="{name}", dtype="auto")', *pipeline_example(tokenizer, is_classifier), "```",
        "",
    ]  # fmt: skip
    if not is_classifier:
        lines += ["As GGUF, with the converter of llama.cpp:", "", "```bash",
                  f"python convert_hf_to_gguf.py {name} --outtype bf16", "```", ""]  # fmt: skip
    return lines


def pipeline_example(tokenizer: PreTrainedTokenizerBase, is_classifier: bool) -> list[str]:
    """Return code that calls `pipe` with a chat if there is a template, else with plain text."""
    chat = '{"role": "user", "content": "Hello"}'
    if not is_classifier:
        prompt = f"[{chat}]" if tokenizer.chat_template else '"Hello"'
        return [f"print(pipe({prompt}, max_new_tokens=64))"]
    if not tokenizer.chat_template:
        return ['text = "prompt and answer" + pipe.tokenizer.eos_token', "print(pipe(text))"]
    return [
        f'messages = [{chat}, {{"role": "assistant", "content": "Hi!"}}]',
        "text = pipe.tokenizer.apply_chat_template(messages, tokenize=False)",
        "print(pipe(text, add_special_tokens=False))",
    ]


def describe_left_out(names: list[str]) -> str:
    """Return the critic's files and folders with what they are."""
    return ", ".join(f"`{name}` ({NOT_MERGED[name]})" for name in names)
