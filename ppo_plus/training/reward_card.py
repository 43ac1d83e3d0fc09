"""The sections of a reward model's card: pairs, accuracy and calibration on held-out pairs, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..models.merging import pipeline_example
from .model_card import ModelCard, table

MEASURES = {
    "accuracy": "accuracy (pairs in the right order, of those with different scores)",
    "calibration_error": "expected calibration error of sigmoid(margin), from 0 (calibrated) to 1",
    "pairs": "pairs",
    "ties": "pairs with equal scores",
    "reward_mean": "mean reward",
    "reward_std": "standard deviation of rewards",
    "step": "optimizer step",
}


class RewardModelCard(ModelCard):
    """The card of a `RewardTrainer`'s run."""

    pipeline_tag = "text-classification"
    curves: ClassVar[Mapping[str, str]] = {"loss": "pairwise loss", "accuracy": "accuracy"}
    method = "the pairwise loss on preferences ([Ouyang et al. 2022](https://arxiv.org/abs/2203.02155), equation 1)"
    citation = """
@article{ouyang2022training,
  title   = {{Training language models to follow instructions with human feedback}},
  author  = {Ouyang, Long and Wu, Jeff and Jiang, Xu and Almeida, Diogo and Wainwright, Carroll L. and others},
  year    = {2022},
  journal = {arXiv preprint arXiv:2203.02155}
}
@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and others},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}
"""

    def _parts(self) -> dict[str, str]:
        return {"preference pairs": self._data(self.trainer.train_dataset)}

    def _evaluation(self) -> list[str]:
        measured = self.trainer._calibration
        if not measured:  # the last evaluation during training
            measured = next((row for row in reversed(self.history) if "eval_accuracy" in row), {})
            measured = {key.removeprefix("eval_"): value for key, value in measured.items()}
        rows = {label: f"{measured[key]:.4g}" for key, label in MEASURES.items() if key in measured}
        if not rows:
            return []
        return [
            "## Evaluation", "", "On held-out pairs:", "", *table(rows), "",
            "sigmoid(margin), with the margin between the scores of two answers, predicts how often the first is "
            "preferred. The calibration error is the mean distance of that prediction from the share of pairs in that "
            "order ([Guo et al. 2017](https://arxiv.org/abs/1706.04599), equation 3).", "",
        ]  # fmt: skip

    def _use(self) -> list[str]:
        source, auto = self._source(), "AutoModelForSequenceClassification"
        pad_token_id = self.config.get_text_config().pad_token_id
        return [
            *self._loading(auto, source, ", num_labels=1"),
            f"model.config.pad_token_id = {pad_token_id}  # the score is read at the last token that is not padding",
            'pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, function_to_apply="none")',
            *pipeline_example(self.trainer.processing_class, is_classifier=True), "```", "", *self._merging(source),
        ]  # fmt: skip
