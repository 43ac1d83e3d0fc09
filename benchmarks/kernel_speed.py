"""Each kernel of ppo_plus on and off: how much faster it is, and what it does to memory and precision.

    python benchmarks/kernel_speed.py [--repeats 5] [--dtype bfloat16|float32]

Layers of SmolLM2-135M's shape with random weights and LoRA (r 16, all linear layers). One kernel at a time is off, the
others are on; both sides take turns, and a number is the median over turns of off / on, above 1 where the kernel pays:

    learn    forward and backward pass of 8 rows with 64 prompt and 48 response tokens; for packing, of uneven rows
    score    the same rows without gradients
    decode   16 tokens of 32 rows, after 64 prompt tokens

Times are CPU seconds of the process on a CPU, which other processes disturb less, and else seconds. `memory` is the
same ratio of the largest sum of activations in `learn`, in bytes as the planner counts them. The fp32 score head costs
time and gives precision: how many of 1,000 texts have a score of their own, on and off. The last line is JSON;
`ratio` is all kernels off over all on, in `learn`.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from _utils import TINY, benchmark_parser, now, random_llama, report
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from ppo_plus import ActorCritic, ValueHead
from ppo_plus.data.seeding import sampling_uniforms
from ppo_plus.kernels.cpu_attention import SDPA
from ppo_plus.kernels.fp32_heads import compute_heads_in_fp32
from ppo_plus.memory import MemoryTracker

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
VOCABULARY, LAYERS, PROMPT, RESPONSE, STEPS = 4096, 2, 64, 48, 16
NORMS, ADAPTERS = "RMSNorm", "_cached_weights"


def build(sizes: dict, dtype: str, off: str | None) -> ActorCritic:
    """An actor-critic with one kernel off, or "all" of them."""
    model = random_llama(getattr(torch, dtype), **sizes, num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    policy = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    actor = ActorCritic(policy.to(DEVICE), ValueHead(sizes["hidden_size"]).to(DEVICE), use_kernels=off != "all")
    for module in policy.modules():
        is_norm, is_adapter = type(module).__name__.endswith(NORMS), ADAPTERS in vars(module)
        if (off == "rmsnorm" and is_norm) or (off == "lora" and is_adapter):
            for name in {"forward", ADAPTERS} & vars(module).keys():
                del vars(module)[name]
    if off == "attention":
        actor.runner.sdpa_models = []
        actor.config._attn_implementation = SDPA  # construction has tried the kernel and left it on
    if off == "packing":
        actor.runner.packable_models = []
    return actor


class Work:
    """The passes of one side over the same tokens."""

    def __init__(self, actor: ActorCritic, uneven: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        self.actor, self.uneven = actor, uneven
        self.ids = torch.randint(100, VOCABULARY, (8, PROMPT + RESPONSE), generator=draw).to(DEVICE)
        prompts = torch.linspace(8, PROMPT, 8).long() if uneven else torch.full((8,), PROMPT)
        self.seq_lens = [(int(p) + RESPONSE, RESPONSE) for p in prompts]
        columns = torch.arange(PROMPT + RESPONSE)
        self.mask = (columns >= PROMPT - prompts[:, None]).long().to(DEVICE)
        self.prompts = torch.randint(100, VOCABULARY, (32, PROMPT), generator=draw).to(DEVICE)
        self.uniforms = sampling_uniforms(0, 32, STEPS)

    def score(self) -> None:
        with torch.no_grad():
            self._forward()

    def learn(self) -> None:
        out = self._forward()
        (out.logprobs.sum() + out.values.sum()).backward()
        self.actor.zero_grad()

    def decode(self) -> None:
        mask = torch.ones_like(self.prompts)
        self.actor.sample(self.prompts, mask, self.uniforms, stop_ids=[0], pad_token_id=0)

    def _forward(self):
        known = {"response_mask": self.mask[:, -RESPONSE:].bool(), "seq_lens": self.seq_lens} if self.uneven else {}
        return self.actor(self.ids, self.mask, RESPONSE, **known)


def spent(work: Callable[[], object]) -> float:
    started = time.process_time() if DEVICE == "cpu" else now()
    work()
    return (time.process_time() if DEVICE == "cpu" else now()) - started


def ratio(on: Callable[[], object], off: Callable[[], object], repeats: int) -> float:
    """Median over turns of the time of `off` over that of `on`, after one turn that is not counted."""
    turns = []
    for turn in range(repeats + 1):
        first, second = (on, off) if turn % 2 else (off, on)
        times = {first: spent(first), second: spent(second)}
        if turn:
            turns.append(times[off] / times[on])
    return statistics.median(turns)


def activations(work: Work) -> int:
    """Bytes of the largest sum of activations and logits in `learn`."""
    gc.collect()
    tracker = MemoryTracker()
    with tracker:
        tracker.track([*work.actor.parameters(), *work.actor.buffers()])
        tracker.reset_peak()
        before = tracker.current.total()
        work.learn()
    return tracker.peak.total() - before


def distinct_scores(sizes: dict, fp32: bool) -> int:
    """How many of 1,000 texts have a score of their own, by a classifier in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=VOCABULARY, num_labels=1, pad_token_id=0)
    model = LlamaForSequenceClassification(config).to(DEVICE, torch.bfloat16).eval()
    if fp32:
        compute_heads_in_fp32(model)
    ids = torch.randint(100, VOCABULARY, (1000, 8), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        scores: Tensor = model(input_ids=ids).logits
    return len(scores.float().unique())


def main() -> None:
    args = benchmark_parser(__doc__, "counted turns of each side").parse_args()
    torch.set_num_threads(1)  # CPU seconds of several threads would count their waiting for each other
    sizes, repeats = (TINY, 1) if args.tiny else (SMOLLM2, args.repeats)
    sizes = {name: size for name, size in sizes.items() if name != "num_hidden_layers"}
    phases = {"lora": ("learn", "score", "decode"), "rmsnorm": ("learn",), "attention": ("learn", "score", "decode"),
              "packing": ("learn", "score"), "all": ("learn", "score", "decode")}  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for kernel, names in phases.items():
        on, off = (Work(build(sizes, args.dtype, side), uneven=kernel == "packing") for side in (None, kernel))
        found[kernel] = {name: ratio(getattr(on, name), getattr(off, name), repeats) for name in names}
        found[kernel]["memory"] = activations(off) / activations(on)
    heads = {"distinct_scores_on": distinct_scores(sizes, True), "distinct_scores_off": distinct_scores(sizes, False)}
    result = {"ratio": found["all"]["learn"], "dtype": args.dtype, "off_over_on": found, "fp32_heads": heads}
    report("kernel_speed" if args.dtype == "bfloat16" else f"kernel_speed_{args.dtype}", result, write=not args.tiny)


if __name__ == "__main__":
    main()
