"""The first step of a rollout learns from the pass that scored it: the same numbers, with one pass fewer."""

from __future__ import annotations

import pytest
import torch
from conftest import lora, make_model, make_trainer
from test_shared_prompts import Tokens

from ppo_plus import PPOCallback
from ppo_plus.training.rollouts import RolloutPhase

CONFIG = {"max_steps": 4, "num_ppo_epochs": 2, "num_mini_batches": 1}


class ChangeWeights(PPOCallback):
    """Changes the adapter between scoring and learning."""

    def on_rollout_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.actor_parameters()[0].mul_(1.5)


def train(folder, monkeypatch, keeps, *, config=None, **options):
    """Train; return the weights, the log of the second rollout's first step, and the number of tokens of all passes."""
    with monkeypatch.context() as patch:
        if not keeps:
            patch.setattr(RolloutPhase, "_can_keep_first_pass", lambda self: False)
        trainer = make_trainer(folder, config=CONFIG | (config or {}), **options)
        count = Tokens(trainer.model.language_model)
        trainer.train()
    weights = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    return weights, trainer.state.log_history[2], sum(count.seen)


@pytest.mark.parametrize(
    ("options", "saves"),
    [
        ({}, True),
        ({"config": {"entropy_coef": 0.01, "activation_checkpointing": True}}, True),
        ({"config": {"critic": "adapter", "gradient_accumulation_steps": 2}}, True),
        ({"config": {"bf16": True}}, True),
        ({"config": {"num_critic_updates": 2, "critic": "adapter"}}, False),
        ({"config": {"critic_warmup_steps": 2}}, True),
        ({"peft_config": lora(lora_dropout=0.1)}, False),
        ({"callbacks": [ChangeWeights()]}, False),
    ],
    ids=["plain", "entropy", "critic adapter", "bf16", "critic updates", "warmup", "dropout", "weights changed"],
)
def test_weights_and_metrics_are_those_of_a_pass_of_its_own(tmp_path, monkeypatch, options, saves):
    weights, log, tokens = train(tmp_path / "kept", monkeypatch, True, model=make_model(), **options)
    expected, expected_log, more = train(tmp_path / "again", monkeypatch, False, model=make_model(), **options)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    for name in ("loss", "grad_norm", "ppo/initial_ratio_error", "ppo/value_loss", "entropy"):
        assert log[name] == expected_log[name]
    assert (tokens < more) == saves


def test_a_pass_that_ran_out_of_memory_runs_again(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, config=CONFIG)
    attempts, real = [], trainer._accumulator._micro_step

    def short_of_memory(model, inputs, tokens):
        attempts.append((len(inputs["action_mask"]), inputs.get("first_pass") is not None))
        if len(attempts) == 1:
            raise torch.OutOfMemoryError
        return real(model, inputs, tokens)

    trainer._accumulator._micro_step = short_of_memory
    with pytest.warns(UserWarning, match="memory"):
        trainer.train()
    rows = attempts[0][0]
    assert attempts[:3] == [(rows, True), (rows // 2, False), (rows // 2, False)]
