"""Responses of several turns: keys and values kept between turns, against reading the conversation again in each turn.

    python benchmarks/turns.py [--rows 32] [--prompt 256] [--repeats 3] [--dtype bfloat16|float32]

Each response has 4 turns of 64 sampled tokens, each followed by 64 tokens of an observation, after a prompt that shows
two or three tools (256 tokens). SmolLM2-135M with LoRA decodes all rows as one batch, with the same noise on both
sides; in fp32 both must sample the same tokens. The last line is JSON: `ratio` is the seconds with the conversation
read again over those with kept caches, of medians of interleaved repeats; `tokens_read` are the tokens per response
that pass through the model on each side.
"""

from __future__ import annotations

import tempfile

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


def converse(model: ActorCritic, prompts: Tensor, observations: Tensor, keep: bool) -> tuple[Tensor, int]:
    """Return the sampled tokens, `(rows, TURNS * SAMPLED)`, and how many tokens of a response were read."""
    conversations, read = [row.tolist() for row in prompts], 0
    caches: list[TurnCache | None] | None = [None] * len(prompts) if keep else None
    sampled = []
    for turn in range(TURNS):
        ids = torch.tensor(tokens_after(caches, conversations), device=model.device)
        uniforms = sampling_uniforms(turn, len(prompts), SAMPLED + 1)
        uniforms[:, SAMPLED] = torch.nan  # a turn ends here, and the response does not
        tokens = model.sample(
            ids, torch.ones_like(ids), uniforms, stop_ids=[], pad_token_id=PAD, turn_caches=caches
        ).tokens[:, :SAMPLED]  # fmt: skip
        sampled.append(tokens.cpu())
        read += ids.shape[1] + SAMPLED - 1
        for row, conversation in enumerate(conversations):
            conversation += tokens[row].tolist() + observations[row, turn].tolist()
    return torch.cat(sampled, 1), read


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
    found = {keep: converse(model, prompts, observations, keep) for keep in (True, False)}
    same = (found[True][0] == found[False][0]).float().mean().item()
    assert same == 1.0 or args.dtype != "float32", f"{same:.4f} of the tokens are the same"
    spent = medians(
        {side: lambda keep=keep: converse(model, prompts, observations, keep)  # type: ignore[misc]
         for side, keep in (("kept", True), ("read_again", False))},
        args.repeats,
    )  # fmt: skip
    result = {
        "ratio": spent["read_again"] / spent["kept"],
        "seconds": spent,
        "tokens_read": {"kept": found[True][1], "read_again": found[False][1]},
        "same_tokens": same, "rows": args.rows, "prompt": args.prompt, "turns": TURNS, "sampled": SAMPLED,
        "observed": OBSERVED, "dtype": args.dtype,
    }  # fmt: skip
    report("turns", result, not args.tiny)


if __name__ == "__main__":
    main()
