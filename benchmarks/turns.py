"""Responses of several turns: keys and values kept between turns, against reading the conversation again in each turn.

    python benchmarks/turns.py [--rows 32] [--prompt 256] [--repeats 3] [--dtype bfloat16|float32]

Each response has 4 turns of 64 sampled tokens, each followed by 64 tokens of an observation, after a prompt that shows
two or three tools (256 tokens). SmolLM2-135M with LoRA decodes all rows as one batch, with the same noise on both
sides, and both continue with the tokens that were sampled first, so that they read the same conversations. The last
line is JSON: `ratio` is the seconds with the conversation read again over those with kept caches, of medians of
interleaved repeats; `tokens_read` are the tokens per response that pass through the model on each side, `gap` is the
largest difference of the log-probabilities of tokens that both sampled after the same tokens, nats.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import torch
from _utils import benchmark_parser, chosen_model, medians, report
from ppo_runs import lora
from torch import Tensor
from transformers import AutoModelForCausalLM

from ppo_plus import ActorCritic, ValueHead
from ppo_plus.data.seeding import sampling_uniforms
from ppo_plus.models.loading import load_policy
from ppo_plus.models.turn_cache import TurnCache, tokens_after

TURNS, SAMPLED, OBSERVED, PAD = 4, 64, 64, 0


@dataclass
class Conversation:
    """What was sampled in each turn, tokens and log-probabilities `(rows, SAMPLED)`, and tokens read per response."""

    tokens: list[Tensor]
    logprobs: list[Tensor]
    read: int


def converse(
    model: ActorCritic, prompts: Tensor, observations: Tensor, keep: bool, forced: Conversation | None = None
) -> Conversation:
    """Sample all turns; each is followed by its observation, and by the tokens of `forced` in place of its own."""
    conversations, found = [row.tolist() for row in prompts], Conversation([], [], 0)
    caches: list[TurnCache | None] | None = [None] * len(prompts) if keep else None
    for turn in range(TURNS):
        ids = torch.tensor(tokens_after(caches, conversations), device=model.device)
        uniforms = sampling_uniforms(turn, len(prompts), SAMPLED + 1)
        uniforms[:, SAMPLED] = torch.nan  # a turn ends here, and the response does not
        output = model.sample(
            ids, torch.ones_like(ids), uniforms, stop_ids=[], pad_token_id=PAD, turn_caches=caches
        )  # fmt: skip
        found.tokens.append(output.tokens[:, :SAMPLED].cpu())
        found.logprobs.append(output.logprobs[:, :SAMPLED].cpu())
        found.read += ids.shape[1] + SAMPLED - 1
        for row, conversation in enumerate(conversations):
            sampled = (forced or found).tokens[turn][row]
            conversation += sampled.tolist() + observations[row, turn].tolist()
    return found


def largest_gap(first: Conversation, second: Conversation) -> float:
    """Return the largest difference of log-probabilities up to the first token that differs in a turn of a row."""
    gaps = [
        ((a - b).abs() * (tokens == others).long().cumprod(1)).max().item()
        for a, b, tokens, others in zip(first.logprobs, second.logprobs, first.tokens, second.tokens, strict=True)
    ]
    return max(gaps)


def main() -> None:
    parser = benchmark_parser(__doc__, "counted turns of each side")
    parser.add_argument("--rows", type=int, default=32, help="responses decoded as one batch")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        name = chosen_model(args, folder)
        policy = load_policy(AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype), peft_config=lora())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ActorCritic(policy.to(device), ValueHead(policy.config.hidden_size)).eval()
    draw, highest = torch.Generator().manual_seed(1), min(policy.config.vocab_size, 40000)
    prompts = torch.randint(highest // 2, highest, (args.rows, args.prompt), generator=draw)
    observations = torch.randint(highest // 2, highest, (args.rows, TURNS, OBSERVED), generator=draw)
    found: dict[bool, Conversation] = {}

    def work(keep: bool) -> None:
        found[keep] = converse(model, prompts, observations, keep, found.get(True))

    spent = medians({"kept": lambda: work(True), "read_again": lambda: work(False)}, args.repeats)
    gap = largest_gap(found[True], found[False])
    if args.dtype == "float32" and gap > 1e-3:
        raise RuntimeError(f"The two sides score tokens differently: by up to {gap:.2g} nats.")
    result = {
        "ratio": spent["read_again"] / spent["kept"],
        "seconds": spent,
        "tokens_read": {"kept": found[True].read, "read_again": found[False].read},
        "gap": gap, "rows": args.rows, "prompt": args.prompt, "turns": TURNS, "sampled": SAMPLED,
        "observed": OBSERVED, "dtype": args.dtype,
    }  # fmt: skip
    report("turns", result, not args.tiny)


if __name__ == "__main__":
    main()
