"""Responses of very uneven length: rollouts against transformers' own, and learning with and without padding.

    python benchmarks/variable_length.py [--repeats 3] [--dtype bfloat16|float32]

All decode the same 64 prompts as one batch, with the same model (SmolLM2-135M, LoRA on) and the same lengths: 60
responses of 8 to 16 tokens and 4 of 256. A length is forced by forcing the last id of the vocabulary, which is never
sampled otherwise and ends a response: on our side by the noise that decides each token, in `generate` by a logits
processor; continuous batching (`generate_batch`) is told the length of each. The last line is JSON: `ratio` is the
seconds of `generate` over ours, `ratio_to_generate_batch` those of continuous batching over ours, of medians of
interleaved repeats.

`passes` is about what comes after: in minibatches of 16, each one micro-batch, the responses are scored (a forward
pass) and learned from (forward and backward), as the trainer does it, without padding, and with the same padded passes
that a model gets which cannot be packed. Once for the lengths above (`few_long`), and once for lengths from 16 to 128
(`uniform`). `padding` is its share of the padded tokens, `score` and `learn` are seconds with padding over seconds
without.
"""

from __future__ import annotations

import tempfile
from functools import partial

import torch
from _utils import answer_continuously, benchmark_parser, chosen_model, medians, report
from ppo_runs import lora
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from ppo_plus import ActorCritic, ValueHead
from ppo_plus.data.batching import micro_batch_indices, minibatch_indices
from ppo_plus.data.seeding import sampling_uniforms
from ppo_plus.models.loading import load_policy
from ppo_plus.rollout.buffer import Rollout, response_mask

PROMPT, PAD, MINIBATCH = 14, 0, 16


def drawn_lengths(rows: int, few: int, longest: int) -> Tensor:
    """Most 8 to 16 tokens, `few` of them the longest, in random order; `(rows,)`."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 17, (rows,), generator=draw)
    lengths[torch.randperm(rows, generator=draw)[:few]] = longest
    return lengths


class EndAt(LogitsProcessor):
    """Forces the end id at each row's last step and forbids it before."""

    def __init__(self, lengths: Tensor, end: int) -> None:
        self.lengths, self.end = lengths, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ends = self.lengths == input_ids.shape[1] - PROMPT + 1
        only_end = torch.full_like(scores, -torch.inf)
        only_end[:, self.end] = 0.0
        scores[:, self.end] = -torch.inf
        return torch.where(ends[:, None], only_end, scores)


def noise_that_ends(lengths: Tensor) -> Tensor:
    """Uniform noise that never reaches the last id, and is 1, which selects it, at each row's last step."""
    noise = sampling_uniforms(0, len(lengths), int(lengths.max())) * 0.99
    noise[torch.arange(len(lengths)), lengths - 1] = 1.0
    return noise


def micro_batches(lengths: Tensor) -> list[dict]:
    """Minibatches of 16 rows as the trainer makes them, from prompts of one length and responses of these."""
    draw, longest = torch.Generator().manual_seed(1), int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]
    ids = torch.randint(100, 40000, (len(lengths), PROMPT + longest), generator=draw)
    attended = torch.cat([torch.ones(len(lengths), PROMPT, dtype=torch.int64), mask.long()], 1)
    none = torch.zeros(mask.shape)
    one = none[:, 0]
    rollout = Rollout(ids, attended, mask, none, none, none, none, none, none, one, one)
    minibatches = minibatch_indices(len(lengths), len(lengths) // MINIBATCH, seed=0, rollout_index=0, ppo_epoch=0)
    return [
        rollout.micro_batch(part)
        for rows in minibatches
        for part in micro_batch_indices(rows, rollout.lengths(), MINIBATCH)
    ]


def passes(model: ActorCritic, lengths: Tensor, repeats: int) -> dict[str, float]:
    """How much longer padded passes over such rows take, and how much padding that is."""
    batches = [
        {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        for batch in micro_batches(lengths)
    ]

    def run(learn: bool, packed: bool) -> None:
        for batch in batches:
            known = {name: batch[name] for name in ("response_mask", "seq_lens")} if packed else {}
            with torch.set_grad_enabled(learn):
                out = model(batch["input_ids"], batch["attention_mask"], batch["action_mask"].shape[1], **known)
                if learn:
                    ((out.logprobs + out.values) * batch["action_mask"]).sum().backward()
        model.zero_grad()

    works = {f"{name} {kind}": partial(run, name == "learn", kind == "packed")
             for name in ("score", "learn") for kind in ("packed", "padded")}  # fmt: skip
    spent = medians(works, repeats)
    padded = sum(batch["attention_mask"].numel() for batch in batches)
    return {
        "padding": 1 - sum(int(batch["attention_mask"].sum()) for batch in batches) / padded,
        **{name: spent[f"{name} padded"] / spent[f"{name} packed"] for name in ("score", "learn")},
    }


def main() -> None:
    args = benchmark_parser(__doc__, "counted turns of each side").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        name = chosen_model(args, folder)
        policy = load_policy(AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype), peft_config=lora())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ActorCritic(policy.to(device), ValueHead(policy.config.hidden_size)).eval()
    lengths = drawn_lengths(64, 4, 64 if args.tiny else 256)
    end, noise = policy.config.vocab_size - 1, noise_that_ends(lengths)
    ids = torch.randint(100, 40000, (64, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)
    processors = LogitsProcessorList([EndAt(lengths.to(device), end)])

    def ours() -> Tensor:
        return model.sample(ids, torch.ones_like(ids), noise, stop_ids=[end], pad_token_id=PAD).tokens

    def plain() -> Tensor:
        return policy.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(lengths.max()), do_sample=True,
            top_k=0, top_p=1.0, temperature=1.0, logits_processor=processors, eos_token_id=end, pad_token_id=PAD,
        )[:, PROMPT:]  # fmt: skip

    def continuous() -> list[list[int]]:
        return answer_continuously(model.language_model, ids.tolist(), lengths.tolist())

    for side in (ours, plain):
        found = response_mask(side(), [end]).sum(1).cpu()
        assert torch.equal(found, lengths), f"{side.__name__} made responses of {found.tolist()} tokens"
    assert [len(answer) for answer in continuous()] == lengths.tolist()
    spent = medians({"ours": ours, "generate": plain, "generate_batch": continuous}, args.repeats)
    tokens = int(lengths.sum())
    result = {
        "ratio": spent["generate"] / spent["ours"],
        "ratio_to_generate_batch": spent["generate_batch"] / spent["ours"],
        "dtype": args.dtype,
        "responses": len(lengths),
        "tokens": tokens,
        "longest": int(lengths.max()),
        **{f"{side}_seconds": value for side, value in spent.items()},
        **{f"{side}_tokens_per_second": tokens / value for side, value in spent.items()},
    }
    generator = torch.Generator().manual_seed(2)
    for name, drawn in (("few_long", lengths), ("uniform", torch.randint(16, 129, (64,), generator=generator))):
        result.setdefault("passes", {})[name] = passes(model, drawn, args.repeats)
    report("variable_length", result, write=not args.tiny)


if __name__ == "__main__":
    main()
