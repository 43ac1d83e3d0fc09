"""The model card of a run: base, data, rewards, settings, curves of reward and KL, and how to load it.

The card is written from named fields of the run and never from the environment, so it contains no token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from huggingface_hub import ModelCardData
from transformers import TrainingArguments

from ..config.trl_fields import TRLFields
from ..models.loading import language_model_class

if TYPE_CHECKING:
    from ..trainer import PPOTrainer

CURVES_FILE = "curves.svg"
# Trainer's settings that influence the trained weights.
TRAINER_SETTINGS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "optim", "bf16", "fp16", "seed",
)  # fmt: skip


class ModelCard:
    """The card of a trainer's run, in Markdown with a header in YAML.

    `name`, `base` and `dataset` override the values of the run; `metadata` goes into the header.
    """

    def __init__(
        self, trainer: PPOTrainer, *, name: str | None, base: str | None, dataset: str | list[str] | None,
        tags: str | list[str] | None, metadata: Mapping[str, Any],
    ) -> None:  # fmt: skip
        model = trainer.accelerator.unwrap_model(trainer.model)
        config = model.language_model.config
        self.trainer, self.folder = trainer, Path(str(trainer.args.output_dir))
        self.name = name or self.folder.absolute().name
        self.repo = trainer.hub_model_id or self.name
        self.base = base or config._name_or_path or "the base model"
        self.auto_class, self.adapter = language_model_class(config).__name__, model.is_peft
        self.dataset = dataset[0] if isinstance(dataset, list) else dataset
        self.tags = [*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])]
        self.metadata = {key: value for key, value in metadata.items() if value is not None}

    def write(self) -> None:
        """Write `README.md` and the curves into `output_dir`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = (self._header(), self._summary(), self._curves(), self._loading(), self._settings(), [""])
        text = "\n".join(line for part in parts for line in part)
        (self.folder / "README.md").write_text(text, encoding="utf-8")
        if rollouts(self.trainer.state.log_history):
            (self.folder / CURVES_FILE).write_text(curves_svg(self.trainer.state.log_history), encoding="utf-8")

    def _header(self) -> list[str]:
        library = {"library_name": "peft" if self.adapter else "transformers", "pipeline_tag": "text-generation"}
        header = {**library, "tags": list(dict.fromkeys(self.tags)), **self.metadata}
        if not Path(self.base).exists():  # the Hub accepts names of models, not folders of one machine
            header["base_model"] = self.base
        if self.dataset is not None and not Path(self.dataset).exists():
            header["datasets"] = [self.dataset]
        return ["---", ModelCardData(**header).to_yaml(), "---", ""]

    def _summary(self) -> list[str]:
        kind = "A LoRA adapter for" if self.adapter else "A fine-tuned version of"
        data = f"`{Path(self.dataset).name if Path(self.dataset).exists() else self.dataset}`" if self.dataset else ""
        rewards, prompts = self.trainer.collector.rewards, self.trainer.train_dataset
        weighted = zip(rewards.names, rewards.weights.tolist(), strict=True)
        processes = self.trainer.accelerator.num_processes
        number = len(prompts) if isinstance(prompts, Sized) else "a stream"
        return [
            f"# {self.name}", "",
            f"{kind} `{display_name(self.base)}`, trained by proximal policy optimization (PPO, Schulman et al. 2017) "
            f"with ppo_plus on {'one process' if processes == 1 else f'{processes} processes'}.", "",
            "| | |", "|---|---|",
            f"| prompts | {number}{' of ' + data if data else ''} |",
            "| reward | " + ", ".join(f"`{name}` (weight {weight:g})" for name, weight in weighted) + " |",
            "| reference | the model before training |", "",
        ]  # fmt: skip

    def _curves(self) -> list[str]:
        history = self.trainer.state.log_history
        rows = rollouts(history)
        if not rows:
            return []
        shown = sorted({round(i * (len(rows) - 1) / 11) for i in range(12)}) if len(rows) > 12 else range(len(rows))
        lines = [
            "## Training", "",
            f"![Reward and KL to the reference over training]({CURVES_FILE})", "",
            "| step | reward | KL to the reference, nats per response |", "|---|---|---|",
            *(f"| {int(rows[i]['step'])} | {rows[i]['reward']:.3f} | {rows[i]['kl']:.2f} |" for i in shown),
        ]  # fmt: skip
        if last := next((row for row in reversed(history) if "eval_reward" in row), None):
            lines += ["", f"Held-out prompts at step {int(last['step'])}: reward {last['eval_reward']:.3f}, KL "
                          f"{last['eval_kl']:.2f} nats."]  # fmt: skip
        return [*lines, ""]

    def _loading(self) -> list[str]:
        imports = f"from transformers import {self.auto_class}, AutoTokenizer"
        if self.adapter:
            imports = f"from peft import PeftModel\n{imports}"
            load = [
                f'base = {self.auto_class}.from_pretrained("{display_name(self.base)}")',
                f'model = PeftModel.from_pretrained(base, "{self.repo}")',
            ]
        else:
            load = [f'model = {self.auto_class}.from_pretrained("{self.repo}")']
        load.append(f'tokenizer = AutoTokenizer.from_pretrained("{self.repo}")')
        note = "`value_head.safetensors` is the critic's head, which only further training needs."
        return ["## Use", "", "```python", imports, "", *load, "```", "", note, ""]

    def _settings(self) -> list[str]:
        rows = [f"| {name} | {str(value).replace('|', ' ')} |" for name, value in settings(self.trainer.args).items()]
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
        return ["## Hyperparameters", "", "| | |", "|---|---|", *rows, "", versions]


def display_name(name: str) -> str:
    """Return a model's name; of a folder only the last part, because its path exists on one machine only."""
    return Path(name).name if Path(name).exists() else name


def settings(args: TrainingArguments) -> dict[str, Any]:
    """Return the hyperparameters for a card: the fields of PPO and `TRAINER_SETTINGS`, without dicts."""
    inherited = {field.name for base in (TrainingArguments, TRLFields) for field in fields(base)}
    names = [field.name for field in fields(args) if field.name not in inherited]
    values = {name: getattr(args, name) for name in (*names, *TRAINER_SETTINGS)}
    plain = {name: getattr(value, "value", value) for name, value in values.items()}  # enumerations by their value
    return {name: value for name, value in plain.items() if value is not None and not isinstance(value, dict)}


def rollouts(history: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return the rows of Trainer's log that have a rollout's metrics."""
    return [row for row in history if "reward" in row and "kl" in row and "step" in row]


def curves_svg(history: Sequence[Mapping[str, float]], width: int = 640, height: int = 320) -> str:
    """Plot reward and KL over optimizer steps as SVG, with one y axis for each."""
    rows, margin = rollouts(history), 56
    right, bottom = width - margin, height - margin

    def scale(name: str, start: float, end: float) -> tuple[list[float], float, float]:
        values = [row[name] for row in rows]
        low, high = min(values), max(values)
        return [start + (end - start) * (v - low) / ((high - low) or 1.0) for v in values], low, high

    def text(x: float, y: float, anchor: str, color: str, label: str) -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}">{label}</text>'

    x, first, last = scale("step", margin, right)
    body = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for name, label, color, edge, outwards, anchors in (
        ("reward", "reward", "#1f77b4", margin, -6, ("end", "start")),
        ("kl", "KL, nats per response", "#d95f02", right, 6, ("start", "end")),
    ):
        y, low, high = scale(name, bottom, margin)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        body.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        for value, at in ((low, bottom), (high, margin)):
            body.append(text(edge + outwards, at, anchors[0], color, f"{value:.2f}"))
        body.append(text(edge, margin - 24, anchors[1], color, label))
    for step, at in ((first, margin), (last, right)):
        body.append(text(at, bottom + 22, "middle", "black", f"step {int(step)}"))
    view = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view}>\n' + "\n".join(body) + "\n</svg>\n"
