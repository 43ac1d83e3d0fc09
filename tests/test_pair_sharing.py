"""Preference pairs whose prompt is read once: the scores, gradients and weights of separate texts."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from conftest import lora, make_tokenizer
from datasets import Dataset
from peft import get_peft_model
from test_modeling import VOCABULARY, moved
from test_packing import Tokens
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    FalconH1Config,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import long_pairs

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.models.classifier import register_sequence_classifier
from ppo_plus.models.pair_sharing import PairSharing

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "num_labels": 1, "initializer_range": 0.2,
}  # fmt: skip


def classifier(kind="Llama"):
    torch.manual_seed(0)
    if kind == "GPT-2":
        return GPT2ForSequenceClassification(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, pad_token_id=0,
                       num_labels=1, initializer_range=0.2)
        ).eval()  # fmt: skip
    if kind == "Mistral":
        return MistralForSequenceClassification(MistralConfig(**SIZES, sliding_window=4)).eval()
    return LlamaForSequenceClassification(LlamaConfig(**SIZES)).eval()


def batch(left=False):
    """Four pairs, chosen before rejected, whose prompts have 12, 9, 3 and 1 tokens; ids and mask, right-padded."""
    generator = torch.Generator().manual_seed(1)
    prompts, sizes = (12, 9, 3, 1), ((4, 7), (5, 2), (6, 6), (5, 9))
    texts = [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in prompts]
    rows = [texts[i] + [10 + side, *torch.randint(4, VOCABULARY, (sizes[i][side],), generator=generator).tolist()]
            for side in (0, 1) for i in range(4)]  # fmt: skip
    width = max(map(len, rows))
    padding = [[0] * (width - len(row)) for row in rows]
    ids = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, padding, strict=True)])
    return ids, (ids != 0).long()


def scored(model, ids, mask, sharing=None):
    count = Tokens(model.get_base_model() if hasattr(model, "peft_config") else model)
    model.zero_grad()
    with sharing.apply() if sharing else torch.enable_grad():
        scores = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    (scores * torch.arange(len(scores)).cos()).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return scores.detach(), gradients, sum(count.seen)


@pytest.mark.parametrize("kind", ["Llama", "Llama with LoRA", "Mistral", "GPT-2"])
def test_scores_and_gradients_are_those_of_separate_texts(kind):
    model = classifier(kind.split()[0])
    if kind == "Llama with LoRA":
        model = moved(get_peft_model(model, lora(task_type="SEQ_CLS")))
    ids, mask = batch()
    sharing = PairSharing(model)
    assert sharing.supported
    found, expected = scored(model, ids, mask, sharing), scored(model, ids, mask)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert (found[1] - expected[1]).norm() < 1e-5 * expected[1].norm()
    # Of the pairs with prompts of 12 and 9 tokens, the prompt is at least half of each row.
    assert (found[2], expected[2]) == (int(mask.sum()) - 21, mask.numel())
    after = scored(model, ids, mask)
    assert after[2] == mask.numel() and torch.equal(after[0], expected[0])  # outside the block, as before


def test_what_cannot_share_runs_unchanged():
    """Left padding, whose positions depend on it; an encoder; a state-space model; and a batch that shares little."""
    model, (ids, mask) = classifier(), batch(left=True)
    sharing = PairSharing(model)
    assert scored(model, ids, mask, sharing)[2] == mask.numel()
    alone = batch()[0][:4], batch()[1][:4]
    assert scored(model, *alone, sharing)[2] == alone[1].numel()
    config = BertConfig(vocab_size=42, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    assert not PairSharing(BertForSequenceClassification(config)).supported
    hybrid = FalconH1Config(
        **SIZES, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=4, mamba_d_head=8, mamba_chunk_size=4
    )
    register_sequence_classifier(hybrid)
    assert not PairSharing(AutoModelForSequenceClassification.from_config(hybrid)).supported


def test_a_copy_of_the_model_runs_its_own_weights():
    model = classifier()
    ids, mask = batch()
    scored(model, ids, mask, PairSharing(model))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(2)
    assert (scored(twin, ids, mask)[0] - scored(model, ids, mask)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_reward_model_learns_the_same_from_fewer_tokens(base, tmp_path, monkeypatch, dtype):
    texts = ["she reads a long book by the sea and " + word for word in ("sleeps", "sings", "waits", "rests")] * 4
    pairs = Dataset.from_dict({"prompt": texts, "chosen": [" well"] * 16, "rejected": [" badly."] * 16})

    def train(name):
        args = RewardConfig(
            output_dir=str(tmp_path / name), per_device_train_batch_size=4, max_steps=4, learning_rate=1e-3,
            report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1,
            bf16=dtype == "bf16", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = RewardTrainer(
            str(base), args, peft_config=lora(), train_dataset=pairs, processing_class=make_tokenizer(),
        )  # fmt: skip
        count = Tokens(trainer.model.get_base_model())
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        return weights, [row["loss"] for row in trainer.state.log_history if "loss" in row], sum(count.seen)

    weights, losses, tokens = train("shared")
    monkeypatch.setattr("ppo_plus.reward_trainer.kernels_enabled", lambda requested: False)
    expected, expected_losses, more = train("separate")
    assert tokens < 0.75 * more
    tolerance = 1e-5 if dtype == "fp32" else 2e-2
    assert losses == pytest.approx(expected_losses, abs=tolerance)
    assert dtype == "bf16" or (weights - expected).abs().max() < 1e-5


def test_figures_of_the_benchmark():
    runs = {
        side: [{"seconds_per_pair": s, "accuracy": s / 10} for s in seconds]
        for side, seconds in {"shared": (1.0, 3.0, 2.0), "separate": (4.0, 3.0, 9.0), "trl": (6.0, 5.0, 7.0)}.items()
    }
    found = long_pairs.summarize(runs)
    assert (found["over_separate"], found["over_trl"]) == (2.0, 3.0)
    assert found["shared"] == {"seconds_per_pair": 2.0, "accuracy": [0.1, 0.3, 0.2]}
