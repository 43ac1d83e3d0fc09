"""The model card of a run: base, data, settings, curves, evaluation, and how to load it.

The card is written from named fields of the run and never from the environment, so it contains no token; it names
models as the Hub does, and folders by their last part.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Mapping, Sized
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub import ModelCard as HubCard
from huggingface_hub import ModelCardData, try_to_load_from_cache
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..config.trl_fields import TRLFields
from ..models.adapter_files import display_name, hub_name, is_hub_name
from ..models.merging import CARD_FILE, TEMPLATE_TITLE
from ..utils.versions import installed_version
from .card_curves import curves_svg, curves_table

if TYPE_CHECKING:
    from .hub import HubMixin

CURVES_FILE = "curves.svg"
MARK = "<!-- Written by ppo_plus at each save. Remove this line to keep the file as you edit it. -->"
LIBRARIES = ("ppo-plus", "transformers", "trl", "peft", "torch", "datasets", "tokenizers", "bitsandbytes")
# Trainer's settings that influence the trained weights.
TRAINER_SETTINGS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "optim", "bf16", "fp16", "seed",
)  # fmt: skip


class ModelCard(abc.ABC):
    """The card of a run, in Markdown with a header in YAML; subclasses add the sections of their method.

    Args:
        trainer: the run.
        directory: where the model is saved.
        arguments: those of `create_model_card`, which override the values of the run.
    """

    pipeline_tag: ClassVar[str]
    curves: ClassVar[Mapping[str, str]]  # two metrics with their labels
    method: ClassVar[str]
    citation: ClassVar[str]

    def __init__(self, trainer: HubMixin, directory: Path, arguments: Mapping[str, Any]) -> None:
        self.trainer, self.directory, self.arguments = trainer, directory, arguments
        self.model = trainer.accelerator.unwrap_model(trainer.model)
        self.policy = getattr(self.model, "policy", self.model)
        self.adapter = getattr(self.policy, "peft_config", {}).get("default")
        self.config, self.history = self.model.config, trainer.state.log_history
        self.base = arguments.get("finetuned_from") or self.config._name_or_path or "the base model"
        self.name = arguments.get("model_name") or Path(str(trainer.args.output_dir)).absolute().name
        keys = ("dataset_name", "dataset_tags", "dataset")
        names: str | list[str] = next((arguments[key] for key in keys if arguments.get(key)), [])
        self.datasets = [names] if isinstance(names, str) else list(names)

    def write(self) -> None:
        """Write `README.md` and the curves, unless the file there was edited by the user."""
        file = self.directory / CARD_FILE
        if file.is_file() and not is_generated(file.read_text(encoding="utf-8")):
            warnings.warn(f"{file} is left unchanged, because it was not written by ppo_plus.", stacklevel=3)
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        parts = (
            self._header(), self._summary(), self._evaluation(), self._curves(), self._use(), self._settings(),
            self._versions(), self._citation(),
        )  # fmt: skip
        file.write_text("\n".join(line for part in parts for line in part), encoding="utf-8")
        if curves_table(self.history, self.curves):
            (self.directory / CURVES_FILE).write_text(curves_svg(self.history, self.curves), encoding="utf-8")

    # Sections

    def _header(self) -> list[str]:
        tags = self.arguments.get("tags") or []
        tags = [*self.trainer._tag_names, "generated_from_trainer", *([tags] if isinstance(tags, str) else tags)]
        header = {
            "library_name": "transformers" if self.adapter is None else "peft",
            "pipeline_tag": self.pipeline_tag,
            "model_name": self.name,
            "base_model": hub_name(self.base),
            "datasets": [name for name in self.datasets if is_hub_name(name) and not Path(name).exists()] or None,
            "language": self.arguments.get("language"),
            "tags": list(dict.fromkeys(tags + ["lora"] * (getattr(self.adapter, "r", None) is not None))),
            **({"license": chosen} if (chosen := self.arguments.get("license")) else base_license(self.base)),
        }
        header = {key: value for key, value in header.items() if value is not None}
        return ["---", ModelCardData(**header).to_yaml(), "---", MARK, ""]

    def _summary(self) -> list[str]:
        kind = "A fine-tuned version of" if self.adapter is None else "An adapter for"
        processes = self.trainer.accelerator.num_processes
        rows = {"base": f"{link(self.base)}, loaded in {precision(self.config)}", "adapter": describe(self.adapter)}
        return [
            f"# {self.name}", "",
            f"{kind} {link(self.base)}, trained by {self.method} with ppo_plus on "
            f"{'one process' if processes == 1 else f'{processes} processes'}.", "",
            *table(rows | self._parts()), "",
        ]  # fmt: skip

    @abc.abstractmethod
    def _parts(self) -> dict[str, str]:
        """Return the rows of the summary that belong to the method."""

    @abc.abstractmethod
    def _evaluation(self) -> list[str]:
        """Return the section on held-out data; empty if nothing was evaluated."""

    @abc.abstractmethod
    def _use(self) -> list[str]:
        """Return the section on how to load what was saved."""

    def _curves(self) -> list[str]:
        lines = curves_table(self.history, self.curves)
        return ["## Training", "", f"![Curves of training]({CURVES_FILE})", "", *lines, ""] if lines else []

    def _settings(self) -> list[str]:
        rows = {name: cell(display(value)) for name, value in settings(self.trainer.args).items()}
        return ["## Hyperparameters", "", *table(rows), ""]

    def _versions(self) -> list[str]:
        versions = [f"- {name} {number}" for name in LIBRARIES if (number := installed_version(name))]
        return ["## Versions", "", *versions, ""]

    def _citation(self) -> list[str]:
        return ["## Citation", "", "```bibtex", self.citation.strip(), OURS.strip(), "```", ""]

    # Parts of sections

    def _loading(self, auto: str, source: str, base_options: str = "") -> list[str]:
        """Return the code that loads the model by a class of transformers, and its tokenizer."""
        imports, calls = [], [f'model = {auto}.from_pretrained("{source}")']
        if self.adapter is not None:
            imports = ["from peft import PeftModel"]
            calls = [
                f'base = {auto}.from_pretrained("{display_name(self.base)}"{base_options})',
                f'model = PeftModel.from_pretrained(base, "{source}")',
            ]
        imports += [f"from transformers import {auto}, AutoTokenizer, pipeline", ""]
        tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{source}")'
        return ["## Use", "", *self._unsaved(), "```python", *imports, *calls, tokenizer]

    def _merging(self, source: str) -> list[str]:
        if self.adapter is None:
            return []
        merged = f"{Path(source).name}-merged"
        lines = [
            "Without PEFT, from weights in bf16 (the base must not be quantized):", "",
            "```bash", f"ppo-plus merge {source} {merged}",
        ]  # fmt: skip
        if self.pipeline_tag == "text-generation":
            lines += [f"python convert_hf_to_gguf.py {merged} --outtype bf16  # of llama.cpp"]
        return [*lines, "```", ""]

    def _data(self, dataset: Any) -> str:
        """Return the number of rows of the training data, and what the data is called."""
        number = str(len(dataset)) if isinstance(dataset, Sized) else "a stream"
        info = getattr(dataset, "info", None)
        builder, name = getattr(info, "builder_name", None), getattr(info, "dataset_name", None)
        names = self.datasets or ([name] if name and name != builder else [])  # of files, both are the format
        return number + (" of " + ", ".join(f"`{display_name(name)}`" for name in names) if names else "")

    def _source(self) -> str:
        """Return the name to load the model from: that on the Hub, or the folder's, or of its newest checkpoint."""
        output = Path(str(self.trainer.args.output_dir)).absolute()
        if not self.directory.absolute().is_relative_to(output):
            return self.directory.absolute().name
        directory = self.directory.absolute()
        if not has_weights(directory) and (newest := self._newest_checkpoint(output)):
            directory = newest
        name = self.trainer.hub_model_id or output.name
        return "/".join([name, *directory.relative_to(output).parts])

    def _newest_checkpoint(self, output: Path) -> Path | None:
        best = self.trainer.state.best_model_checkpoint if self.trainer.args.load_best_model_at_end else None
        newest = best or (get_last_checkpoint(str(output)) if output.is_dir() else None)
        return Path(newest).absolute() if newest and Path(newest).absolute().is_relative_to(output) else None

    def _unsaved(self) -> list[str]:
        if has_weights(self.directory) or self._newest_checkpoint(self.directory.absolute()):
            return []
        return ["The weights are not in this folder yet: `trainer.save_model()` writes them.", ""]


def is_generated(text: str) -> bool:
    """Return whether a card is ours or PEFT's template without a name."""
    return MARK in text or TEMPLATE_TITLE in text


def has_weights(directory: Path) -> bool:
    """Return whether a folder holds an adapter or a model."""
    return any(directory.glob("adapter_model.*")) or any(directory.glob("model*.safetensors"))


def link(base: str) -> str:
    """Return a model's name as a link to the Hub; of a folder only the last part."""
    return f"[{name}](https://huggingface.co/{name})" if (name := hub_name(base)) else f"`{display_name(base)}`"


def cell(text: Any) -> str:
    """Return a text that does not end a table's cell."""
    return str(text).replace("|", " ").replace("\n", " ")


def display(value: Any) -> Any:
    """Return a setting, of a path only the last part."""
    return display_name(value) if isinstance(value, str) and ("/" in value or "\\" in value) else value


def table(rows: Mapping[str, str]) -> list[str]:
    """Return a Markdown table of two columns, without empty rows."""
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value)]


def precision(config: Any) -> str:
    """Return how a base's weights were loaded: their bits where they are quantized, else their dtype."""
    quantization = getattr(config, "quantization_config", None)
    values = quantization if isinstance(quantization, dict) else vars(quantization) if quantization else {}
    four, eight = (values.get(key) or values.get(f"_{key}") for key in ("load_in_4bit", "load_in_8bit"))
    if four:
        return f"4 bit ({values.get('bnb_4bit_quant_type', 'fp4')})"
    method = values.get("quant_method")
    return "8 bit" if eight else str(getattr(method, "value", method) or config.dtype or "float32").rpartition(".")[2]


def describe(adapter: Any) -> str:
    """Return kind and size of an adapter; empty for None."""
    if adapter is None:
        return ""
    sizes = {"rank": getattr(adapter, "r", None), "alpha": getattr(adapter, "lora_alpha", None)}
    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    return ", ".join([kind, *(f"{name} {size}" for name, size in sizes.items() if size is not None)])


def base_license(base: str) -> dict[str, str]:
    """Return the license fields of the base's card, if that is on this machine, else an unknown license."""
    name = hub_name(base)
    file = try_to_load_from_cache(name, CARD_FILE) if name else Path(base) / CARD_FILE
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return {"license": "unknown"}
    data, names = HubCard.load(file, ignore_metadata_errors=True).data, ("license", "license_name", "license_link")
    return {"license": "unknown", **{name: data[name] for name in names if isinstance(data.get(name), str)}}


def settings(args: TrainingArguments) -> dict[str, Any]:
    """Return the hyperparameters for a card: the fields of the method and `TRAINER_SETTINGS`, without dicts."""
    inherited = {field.name for base in (TrainingArguments, TRLFields) for field in fields(base)}
    names = [field.name for field in fields(args) if field.name not in inherited]
    values = {name: getattr(args, name) for name in (*names, *TRAINER_SETTINGS)}
    plain = {name: getattr(value, "value", value) for name, value in values.items()}  # enumerations by their value
    return {name: value for name, value in plain.items() if value is not None and not isinstance(value, dict)}


OURS = """
@software{ppo_plus,
  title   = {{ppo\\_plus: proximal policy optimization as a transformers Trainer}},
  license = {Apache-2.0}
}
"""
