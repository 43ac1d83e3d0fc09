"""Shared by the benchmarks: clocks, medians of interleaved repeats, models with random weights, machine, results."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ppo_plus import PPOCallback

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
VOCABULARY = 49152  # as SmolLM2's
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "ppo-plus")


def cpu_capability() -> str:
    """Vector instructions, and AMX where there is one: bf16 products are several times faster with it."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.backends.cpu.get_cpu_capability() + (" with AMX" if known.get("amx_bf16") else "")


def describe_machine(**instead: str) -> dict:
    """Machine, versions and date; `instead` names versions that were measured in place of the installed ones."""
    return {
        "machine": {
            "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "cpu_capability": cpu_capability(),
            "architecture": platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            **describe_card(),
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES} | instead,
        "date": date.today().isoformat(),
    }


def describe_card() -> dict:
    """Return memory, compute capability, CUDA and driver version of the first card; empty where there is none."""
    if not torch.cuda.is_available():
        return {}
    card, driver = torch.cuda.get_device_properties(0), None
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        driver = lines[0].strip() if lines else None
    return {
        "gpu_memory_gb": round(card.total_memory / 2**30, 1),
        "gpu_capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
        "driver": driver,
    }


def smollm2() -> str:
    """The folder of SmolLM2-135M-Instruct, from its package."""
    sys.path.insert(0, str(ROOT / "recipes" / "demo"))
    from demo_assets import load_smollm2

    return str(load_smollm2())


def now() -> float:
    """Seconds, when everything that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    started = now()
    work()
    return now() - started


def medians(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, called in turn `repeats` times after one call that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            spent = seconds(work)
            if repeat:
                found[name].append(spent)
    return {name: statistics.median(values) for name, values in found.items()}


def peak_mb() -> float:
    """Most memory that this process has held: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def cap_memory(card_gb: float) -> None:
    """Leave this process's CUDA allocator the memory that a card of so many GB has for tensors."""
    from ppo_plus.memory.planning import CUDA_CONTEXT, GIB

    if not torch.cuda.is_available():
        return
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min((card_gb * GIB - CUDA_CONTEXT) / whole, 1.0))


def answer_continuously(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], lengths: Sequence[int], do_sample: bool = True
) -> list[list[int]]:
    """Answers of these lengths by transformers' continuous batching (`generate_batch`), in the order of the prompts.

    Its manager is kept for the next call with this model, and with it what it has compiled and captured. Its cache has
    room for these answers; left to itself it takes most of the memory that is free.
    """
    block = 256  # tokens, its default
    blocks = sum(math.ceil((len(p) + length) / block) for p, length in zip(prompts, lengths, strict=True))
    config = ContinuousBatchingConfig(num_blocks=blocks + 1, max_batch_tokens=max(map(len, prompts)) * len(prompts))
    generation = GenerationConfig(do_sample=do_sample, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=-1)
    found: dict[str, list[int]] = {}
    with (
        attention_of(model, "sdpa"),  # it asks for a kernel that it knows, and takes the paged form of it
        model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config, persistent_manager=True
        ) as manager,
    ):
        names = [
            manager.add_request(list(prompt), max_new_tokens=length)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        while len(found) < len(names):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("continuous batching ended before its answers did")
            if result is not None and result.is_finished():
                found[result.request_id] = result.generated_tokens
    return [found[name] for name in names]


@contextlib.contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """That implementation of attention inside the block, and whatever was set before after it."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class PhaseClock(PPOCallback):
    """Seconds of each update by phase, in `rows`; what `between` does after an update is not part of any.

    `score` is everything after generation that needs no gradients: rewards, log-probabilities, reference.
    """

    def __init__(self, between: Callable[[], object] = lambda: None) -> None:
        self.rows: list[dict[str, float]] = []
        self.tokens: list[int] = []
        self.between, self._started = between, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = now()

    def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
        self.tokens.append(int(rollout.action_mask.sum()))
        spent = samples.seconds
        self.rows.append({"generate": spent["generate"], "score": sum(spent.values()) - spent["generate"]})

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.steps_per_rollout == 0:
            row = self.rows[-1]
            row["total"] = now() - self._started
            row["learn"] = row["total"] - row["generate"] - row["score"]
            self.between()
            self._started = now()


def by_phase(rows: list[dict[str, float]]) -> dict[str, float]:
    """Median of each column."""
    return {phase: statistics.median(row[phase] for row in rows) for phase in rows[0]}


def random_llama(dtype: torch.dtype = torch.float32, **sizes) -> LlamaForCausalLM:
    """A Llama with random weights; `sizes` are those of LlamaConfig."""
    given = {"vocab_size": VOCABULARY, "tie_word_embeddings": True, "max_position_embeddings": 8192, **TINY, **sizes}
    given.setdefault("num_key_value_heads", given["num_attention_heads"])
    torch.manual_seed(0)
    config = LlamaConfig(**given, bos_token_id=1, eos_token_id=given["vocab_size"] - 1, pad_token_id=0)
    return LlamaForCausalLM(config).to(dtype)


def word_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """One word per token id: `w17` is 17. The last id ends a response."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w1"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=f"w{vocabulary - 1}", pad_token="w0", padding_side="left"
    )


def tiny_model(folder: str | Path, vocabulary: int = VOCABULARY) -> str:
    """A folder with a tiny random model and its tokenizer, to try a benchmark's logic in seconds."""
    random_llama(vocab_size=vocabulary).save_pretrained(folder)
    word_tokenizer(vocabulary).save_pretrained(folder)
    return str(folder)


def benchmark_parser(description: str | None, repeats: str) -> argparse.ArgumentParser:
    """The arguments of a benchmark on one model; `repeats` says what is repeated."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help=repeats)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--model", help="a local folder; SmolLM2-135M-Instruct from its package by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, to try the script; writes nothing")
    return parser


def chosen_model(args: argparse.Namespace, folder: str) -> str:
    """The model that `benchmark_parser` was told to take; a tiny one is made in `folder`."""
    return tiny_model(folder) if args.tiny else args.model or smollm2()


def report(name: str, result: dict, write: bool = True, folder: Path = RESULTS, **instead: str) -> None:
    """Write `<name>.json` into a folder with what `describe_machine` says, and print the same as the last line."""
    result = {**result, **describe_machine(**instead)}
    if write:
        write_result(folder / f"{name}.json", result)
    print(json.dumps(result))


def write_result(file: Path, result: dict) -> None:
    """Write a result as JSON, whole or not at all: a benchmark that writes as it goes may be stopped at any moment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}")
    aside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    aside.replace(file)
