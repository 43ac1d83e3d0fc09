"""The model card of a run: what was trained on what, with which settings, how reward and KL went, how to load it.

The card is written from named pieces of the run and never from the environment, so no token can get into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
import transformers
from huggingface_hub import ModelCardData
from transformers import TrainingArguments

from ..config.trl_fields import TRLFields
from ..models.loading import language_model_class

CURVES_FILE = "curves.svg"
# Of Trainer's own settings, those that decide what was learned.
TRAINER_SETTINGS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "optim", "bf16", "fp16", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
        name: of the model.
        repo: where it is on the Hub, or its name.
        base: name or folder of the base model.
        loader: the class of transformers that loads the base.
        adapter: whether it is an adapter on that base.
        dataset: name of the prompts' data set, if it has one.
        prompts: how many prompts there were; None for a stream.
        rewards: names of the reward functions, each with its weight.
        settings: hyper-parameters by name.
        history: Trainer's log.
        processes: how many processes trained.
        tags: for the Hub.
        metadata: further entries of the card's header, such as `license`.
    """

    name: str
    repo: str
    base: str
    auto_class: str
    adapter: bool
    dataset: str | None
    prompts: int | None
    rewards: Mapping[str, float]
    settings: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]
    processes: int
    tags: Sequence[str]
    metadata: Mapping[str, Any]

    def text(self) -> str:
        """The card in Markdown, its header in YAML."""
        return "\n".join([*self._header(), *self._summary(), *self._curves(), *self._loading(), *self._settings(), ""])

    def _header(self) -> list[str]:
        library = {"library_name": "peft" if self.adapter else "transformers", "pipeline_tag": "text-generation"}
        header = {**library, "tags": list(dict.fromkeys(self.tags)), **self.metadata}
        if not Path(self.base).exists():  # the Hub takes names of models there, not folders of one machine
            header["base_model"] = self.base
        if self.dataset is not None and not Path(self.dataset).exists():
            header["datasets"] = [self.dataset]
        return ["---", ModelCardData(**header).to_yaml(), "---", ""]

    def _summary(self) -> list[str]:
        kind = "A LoRA adapter for" if self.adapter else "A fine-tuned version of"
        data = f"`{Path(self.dataset).name if Path(self.dataset).exists() else self.dataset}`" if self.dataset else ""
        rewards = ", ".join(f"`{name}` (weight {weight:g})" for name, weight in self.rewards.items())
        processes = "one process" if self.processes == 1 else f"{self.processes} processes"
        return [
            f"# {self.name}", "",
            f"{kind} `{display_name(self.base)}`, trained by proximal policy optimization (PPO, Schulman et al. 2017) "
            f"with ppo_plus on {processes}.", "",
            "| | |", "|---|---|",
            f"| prompts | {self.prompts or 'a stream'}{' of ' + data if data else ''} |",
            f"| reward | {rewards} |",
            "| reference | the model before training |", "",
        ]  # fmt: skip

    def _curves(self) -> list[str]:
        rows = rollouts(self.history)
        if not rows:
            return []
        picked = sorted({round(i * (len(rows) - 1) / 11) for i in range(12)}) if len(rows) > 12 else range(len(rows))
        lines = [
            "## Training", "",
            f"![Reward and KL to the reference over training]({CURVES_FILE})", "",
            "| step | reward | KL to the reference, nats per response |", "|---|---|---|",
            *(f"| {int(rows[i]['step'])} | {rows[i]['reward']:.3f} | {rows[i]['kl']:.2f} |" for i in picked),
        ]  # fmt: skip
        evaluations = [row for row in self.history if "eval_reward" in row]
        if evaluations:
            last = evaluations[-1]
            lines += ["", f"Held-out prompts at step {int(last['step'])}: reward {last['eval_reward']:.3f}, KL "
                          f"{last['eval_kl']:.2f} nats."]  # fmt: skip
        return [*lines, ""]

    def _loading(self) -> list[str]:
        lines = ["## Use", "", "```python"]
        if self.adapter:
            lines += [
                "from peft import PeftModel",
                f"from transformers import {self.auto_class}, AutoTokenizer", "",
                f'base = {self.auto_class}.from_pretrained("{display_name(self.base)}")',
                f'model = PeftModel.from_pretrained(base, "{self.repo}")',
            ]  # fmt: skip
        else:
            lines += [
                f"from transformers import {self.auto_class}, AutoTokenizer", "",
                f'model = {self.auto_class}.from_pretrained("{self.repo}")',
            ]  # fmt: skip
        lines += [f'tokenizer = AutoTokenizer.from_pretrained("{self.repo}")', "```", ""]
        return [*lines, "`value_head.safetensors` is the critic's head, which only further training needs.", ""]

    def _settings(self) -> list[str]:
        rows = [f"| {name} | {str(value).replace('|', ' ')} |" for name, value in self.settings.items()]
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
        return ["## Hyper-parameters", "", "| | |", "|---|---|", *rows, "", versions]


def display_name(name: str) -> str:
    """A model's name; of a folder only the last part, which is all that means something elsewhere."""
    return Path(name).name if Path(name).exists() else name


def settings(args: TrainingArguments) -> dict[str, Any]:
    """The hyper-parameters that a card shows: the trainer's own fields and `TRAINER_SETTINGS`; no dicts."""
    inherited = {field.name for base in (TrainingArguments, TRLFields) for field in fields(base)}
    names = [field.name for field in fields(args) if field.name not in inherited]
    values = {name: getattr(args, name) for name in (*names, *TRAINER_SETTINGS)}
    plain = {name: getattr(value, "value", value) for name, value in values.items()}  # enumerations by their value
    return {name: value for name, value in plain.items() if value is not None and not isinstance(value, dict)}


def rollouts(history: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The rows of Trainer's log that tell of a rollout."""
    return [row for row in history if "reward" in row and "kl" in row and "step" in row]


def curves_svg(history: Sequence[Mapping[str, float]], width: int = 640, height: int = 320) -> str:
    """Reward and KL over optimizer steps, as a drawing with an axis for each."""
    rows, margin = rollouts(history), 56
    steps = [row["step"] for row in rows]

    def scaled(values: Sequence[float], low: float, high: float, start: float, end: float) -> list[float]:
        return [start + (end - start) * (v - low) / ((high - low) or 1.0) for v in values]

    x = scaled(steps, min(steps), max(steps), margin, width - margin)
    parts = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for name, label, color, side in (
        ("reward", "reward", "#1f77b4", margin - 6), ("kl", "KL, nats per response", "#d95f02", width - margin + 6),
    ):  # fmt: skip
        values = [row[name] for row in rows]
        low, high = min(values), max(values)
        y = scaled(values, low, high, height - margin, margin)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        anchor = "end" if name == "reward" else "start"
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        for value, at in ((low, height - margin), (high, margin)):
            parts.append(f'<text x="{side}" y="{at}" text-anchor="{anchor}" fill="{color}">{value:.2f}</text>')
        edge, anchor = (margin, "start") if name == "reward" else (width - margin, "end")
        parts.append(f'<text x="{edge}" y="{margin - 24}" text-anchor="{anchor}" fill="{color}">{label}</text>')
    for step, at in ((steps[0], margin), (steps[-1], width - margin)):
        parts.append(f'<text x="{at}" y="{height - margin + 22}" text-anchor="middle">step {int(step)}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="13">\n{body}\n</svg>\n'
    )


class CardMixin:
    """`create_model_card` for `PPOTrainer`."""

    args: Any
    state: Any
    accelerator: Any
    collector: Any
    train_dataset: Any
    hub_model_id: Any
    _tag_names: ClassVar[list[str]]

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """Write `README.md` and the curves into `output_dir`; arguments are Trainer's, and TRL's `dataset_name`.

        Args:
            language: of the model, for the card's header.
            license: of the model, for the card's header.
            tags: besides those of this trainer.
            model_name: title of the card.
            finetuned_from: the base model, if its configuration does not know where it came from.
            tasks: not used: a language model generates text.
            dataset_tags: name of the data set on the Hub, as Trainer calls it.
            dataset: name of the data set.
            dataset_args: not used.
            dataset_name: name of the data set, as TRL calls it.
        """
        if not self.accelerator.is_main_process:
            return
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        folder = Path(self.args.output_dir)
        name = model_name or folder.absolute().name
        data = dataset_name or dataset_tags or dataset
        rewards = self.collector.rewards
        card = Card(
            name=name,
            repo=self.hub_model_id or name,
            base=finetuned_from or model.language_model.config._name_or_path or "the base model",
            auto_class=language_model_class(model.language_model.config).__name__,
            adapter=model.is_peft,
            dataset=data[0] if isinstance(data, list) else data,
            prompts=len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
            rewards=dict(zip(rewards.names, rewards.weights.tolist(), strict=True)),
            settings=settings(self.args),
            history=self.state.log_history,
            processes=self.accelerator.num_processes,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            metadata={k: v for k, v in {"language": language, "license": license}.items() if v is not None},
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(card.text(), encoding="utf-8")
        if rollouts(card.history):
            (folder / CURVES_FILE).write_text(curves_svg(card.history), encoding="utf-8")
