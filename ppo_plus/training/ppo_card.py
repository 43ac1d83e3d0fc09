"""The sections of a policy's model card: rewards, reference and critic, held-out reward, and how to load each part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from ..models.adapters import REFERENCE_ADAPTER
from ..models.loading import language_model_class
from ..models.merging import pipeline_example
from .model_card import ModelCard, cell

EVAL_COLUMNS = {
    "reward": "reward", "kl": "KL, nats per response", "completions/mean_length": "length, tokens",
    "win_rate": "win rate against the reference",
}  # fmt: skip
CRITICS = {
    "shared": "a value head on the policy's hidden states",
    "detached": "a value head on the policy's hidden states, without a gradient into them",
    "adapter": "a value head on an adapter of its own (folder `critic`)",
    "separate": "a value head on a model of its own (folder `value_model`)",
}


class PPOModelCard(ModelCard):
    """The card of a `PPOTrainer`'s run."""

    pipeline_tag = "text-generation"
    curves: ClassVar[Mapping[str, str]] = {"reward": "reward", "kl": "KL to the reference, nats per response"}
    method = "proximal policy optimization (PPO, [Schulman et al. 2017](https://arxiv.org/abs/1707.06347))"
    citation = """
@article{schulman2017proximal,
  title   = {{Proximal Policy Optimization Algorithms}},
  author  = {Schulman, John and Wolski, Filip and Dhariwal, Prafulla and Radford, Alec and Klimov, Oleg},
  year    = {2017},
  journal = {arXiv preprint arXiv:1707.06347}
}
"""

    def _parts(self) -> dict[str, str]:
        rewards = self.trainer.collector.rewards
        weighted = zip(rewards.names, rewards.weights.tolist(), strict=True)
        copied = REFERENCE_ADAPTER in getattr(self.policy, "peft_config", {})
        reference = "the adapter before training" if copied else "the model before training"
        return {
            "prompts": self._data(self.trainer.train_dataset),
            "reward": ", ".join(f"`{cell(name)}` (weight {weight:g})" for name, weight in weighted),
            "reference": reference,
            "critic": CRITICS[self.model.critic],
        }

    def _evaluation(self) -> list[str]:
        latest: dict[str, dict[str, Any]] = {}
        for row in self.history:
            for key in row:
                if match := re.fullmatch(r"eval_(?:(.+)_)?reward", key):
                    latest[match[1] or ""] = row
        if not latest:
            return []
        lines = [f"| {' | '.join(['held-out prompts', 'step', *EVAL_COLUMNS.values()])} |", "|---" * 6 + "|"]
        for name, row in latest.items():
            values = [row.get("_".join(filter(None, ("eval", name, key)))) for key in EVAL_COLUMNS]
            numbers = ["" if value is None else f"{value:.3f}" for value in values]
            lines.append(f"| {' | '.join([cell(name), str(int(row['step'])), *numbers])} |")
        return ["## Evaluation", "", *lines, ""]

    def _use(self) -> list[str]:
        auto, source = language_model_class(self.model.language_model.config).__name__, self._source()
        return [
            *self._loading(auto, source), 'pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)',
            *pipeline_example(self.trainer.processing_class, is_classifier=False), "```", "",
            *self._merging(source), *self._critic(source),
        ]  # fmt: skip

    def _critic(self, source: str) -> list[str]:
        lines = [
            "The critic, which only further training needs, is not loaded above. A `PPOTrainer` with the same base and "
            f'adapter loads both by `trainer.model.load_weights("{source}")`.', "",
        ]  # fmt: skip
        if self.trainer.args.value_head == "linear" and self.model.critic in ("shared", "detached"):
            lines += [
                "Its values, without ppo_plus:", "", "```python",
                "from safetensors.torch import load_file", "from transformers.utils import cached_file", "",
                f'head = load_file(cached_file("{source}", "value_head.safetensors"))',
                'inputs = tokenizer("Hello", return_tensors="pt").to(model.device)',
                "states = model(**inputs, output_hidden_states=True).hidden_states[-1].float()  # (1, L, H)",
                'values = states @ head["layers.0.weight"].to(states).T + head["layers.0.bias"].to(states)',
                "```", "",
            ]  # fmt: skip
        if self.model.reward_line is not None:
            lines += ["To these values, training added a line through the reward adapter's scores of the text so far; "
                      "its slope and intercept are in the file's header, `reward_line`.", ""]  # fmt: skip
        return lines
