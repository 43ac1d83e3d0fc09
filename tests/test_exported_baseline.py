"""A value head that was trained beside a reward baseline is never taken for the whole value."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_model, make_trainer
from safetensors import safe_open

from ppo_plus import PPOCallback
from ppo_plus.integrations.trl_legacy import export_with_value_head, load_value_head

STEPS = {"max_steps": 4, "missing_eos_penalty": None}


class Keep(PPOCallback):
    def on_rollout_end(self, args, state, control, rollout, samples, **kwargs):
        self.rollout, self.prefix_scores = rollout, samples.prefix_scores


def trained(folder, base, reward_adapter, **config):
    keep = Keep()
    trainer = make_trainer(
        folder, model=str(base), reward_funcs=str(reward_adapter), callbacks=[keep], config={**STEPS, **config}
    )
    trainer.train(resume_from_checkpoint=config.get("resume_from_checkpoint"))
    return trainer, keep


def line_in(folder):
    with safe_open(folder / "value_head.safetensors", framework="pt") as file:
        return json.loads((file.metadata() or {}).get("reward_line", "null"))


@pytest.mark.parametrize("form", ["trl", "llama_factory"])
def test_an_export_that_would_lack_the_baseline_is_refused(tmp_path, base, reward_adapter, form):
    trainer, keep = trained(tmp_path, base, reward_adapter)
    returns = keep.rollout.returns[keep.rollout.action_mask]
    with torch.no_grad():
        out = trainer.model.eval()(keep.rollout.input_ids, keep.rollout.attention_mask, keep.rollout.response_length)
    gap = returns.mean() - out.values[keep.rollout.action_mask].mean()
    assert gap.abs() > 0.5 * returns.mean().abs()  # what the exported head would have been off by
    with pytest.raises(ValueError, match="prefix_reward_baseline"):
        export_with_value_head(trainer.model, tmp_path / "exported", form)
    assert not (tmp_path / "exported").exists()


def test_the_saved_head_says_which_line_was_added_to_it(tmp_path, base, reward_adapter):
    trainer, _ = trained(tmp_path, base, reward_adapter)
    trainer.save_model()
    assert line_in(tmp_path) == pytest.approx(trainer._progress.baseline.line()) and line_in(tmp_path)[1] != 0
    with_line = make_trainer(tmp_path / "2", model=str(base), reward_funcs=str(reward_adapter))
    load_value_head(with_line.model, tmp_path)
    own = trainer.model.value_head.layers[0].weight
    assert own.any() and torch.equal(with_line.model.value_head.layers[0].weight, own)
    for without in (
        make_trainer(tmp_path / "3", model=str(base)),
        make_trainer(
            tmp_path / "4", model=str(base), reward_funcs=str(reward_adapter), config={"prefix_reward_baseline": False}
        ),
    ):
        with pytest.raises(ValueError, match="prefix_reward_baseline=True"):
            load_value_head(without.model, tmp_path)
        assert not without.model.value_head.layers[0].weight.any()


def test_a_head_that_is_the_whole_value_gets_no_baseline_added(tmp_path, base, reward_adapter):
    """Otherwise the first values are about twice the returns."""
    trainer, _ = trained(tmp_path, base, reward_adapter, prefix_reward_baseline=False)
    export_with_value_head(trainer.model, tmp_path / "exported")
    trainer.save_model()
    assert line_in(tmp_path) is None
    second = make_trainer(tmp_path / "2", model=str(base), reward_funcs=str(reward_adapter))
    for folder in (tmp_path, tmp_path / "exported"):
        with pytest.raises(ValueError, match="prefix_reward_baseline=False"):
            load_value_head(second.model, folder)


def test_a_run_resumed_without_the_baseline_can_be_exported(tmp_path, base, reward_adapter):
    first, _ = trained(tmp_path, base, reward_adapter, save_strategy="steps", save_steps=4)
    assert first.model.reward_line is not None
    config = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "resume_from_checkpoint": None}
    options = {"model": str(base), "reward_funcs": str(reward_adapter)}
    again = make_trainer(tmp_path, config={**STEPS, **config}, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.model.reward_line is not None
    later = make_trainer(tmp_path, config={**STEPS, **config, "prefix_reward_baseline": False}, **options)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    export_with_value_head(later.model, tmp_path / "exported")
    assert (tmp_path / "exported" / "pytorch_model.bin").is_file()


def test_weights_that_are_read_back_bring_their_line(tmp_path, base, reward_adapter):
    trainer, _ = trained(tmp_path, base, reward_adapter)
    trainer.save_model()
    line, trainer.model.reward_line = trainer.model.reward_line, None
    trainer.model.load_weights(tmp_path)
    assert trainer.model.reward_line == line


def test_without_a_reward_adapter_everything_is_exported(tmp_path):
    """Control."""
    trainer = make_trainer(tmp_path, model=make_model(), config={"max_steps": 4})
    trainer.train()
    export_with_value_head(trainer.model, tmp_path / "exported")
    assert not trainer.model.uses_prefix_reward_baseline
