"""Which models fit which card, as the memory planner predicts it: no weight is read, nothing runs on a card.

    python benchmarks/cards.py

For the shapes of Qwen2.5 (Apache-2.0; sizes from their public configurations) with the base in NF4, LoRA of rank 16 on
all linear layers for the actor and for a reward adapter on the same base, prompts of 256 tokens and responses of 512,
rollouts of 64: the largest micro-batch of learning and the largest batch of decoding that fit, first without and then
with activation checkpointing. The prediction was never compared with a card; benchmarks/gpu_memory.py does that.

The last line is JSON; `models_by_card` counts what fits.
"""

from __future__ import annotations

from _utils import report
from transformers import Qwen2Config

from ppo_plus.memory import PlannerConfig, plan

CARDS = (8, 12, 16, 24)  # GiB
WORK = {"prompt_length": 256, "response_length": 512, "rollout_batch_size": 64}
# Hidden size, layers, query heads, key-value heads, feed-forward size, vocabulary, tied embeddings.
SHAPES = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "14B": (5120, 48, 40, 8, 13824, 152064, False),
}


def make_config(shape: tuple) -> Qwen2Config:
    """Return the configuration of a Qwen2.5 model by its sizes."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = shape
    return Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=32768,
    )  # fmt: skip


def predict(config: Qwen2Config, card: int) -> dict:
    """Plan one model on one card, with activation checkpointing only where nothing fits without it."""
    for checkpointing in (False, True):
        found = plan(config, PlannerConfig(**WORK, activation_checkpointing=checkpointing), card)
        if found.fits:
            break
    peak = max(phase.total for phase in found.phases)
    return {
        "fits": found.fits, "activation_checkpointing": checkpointing, "peak_gib": peak / 2**30, **found.batch_sizes,
    }  # fmt: skip


def main() -> None:
    cells = {name: {str(card): predict(make_config(shape), card) for card in CARDS} for name, shape in SHAPES.items()}
    fitting = {str(card): sum(row[str(card)]["fits"] for row in cells.values()) for card in CARDS}
    report("cards", {"models_by_card": fitting, "models": cells, **WORK})


if __name__ == "__main__":
    main()
