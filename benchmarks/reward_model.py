"""A reward model by ppo_plus and by the installed TRL on the same pairs and seeds: accuracy, calibration, memory.

    python benchmarks/reward_model.py [--seeds 0 1 2] [--pairs 640] [--eval-pairs 300] [--keep out/reward_model]

SmolLM2-135M-Instruct, the Rotten Tomatoes pairs and hyperparameters of the demo's full run, in recipes/demo, the same
LoRA and score head, bf16 autocast and activation checkpointing (both are TRL's defaults). Four sides, each run in a
fresh process: `ours` and `trl` load the base as each does when it is given a name (as it was saved, bf16, and fp32;
`--dtype` sets both), `ours_4bit` and `trl_4bit` put its linear layers into the same NF4. Calibration is of
`sigmoid(chosen - rejected)` as the probability that the pair is in the right order (Bradley-Terry): both orders of each
pair are judged, so that a base rate of one half is built in.

The last line is JSON: `ratio` is our mean accuracy over TRL's, `accuracy_difference` that of a side less `trl`'s, and
`accuracy_difference_4bit` of the two on NF4, each the mean with its standard error over the pairs of all seeds. Memory
is of `ours_4bit` over TRL's: `memory_ratio` of the bytes of all tensors at the highest moment of the third optimizer
step (what a GPU's allocator would report; the batch is the same for all), `memory_ratio_1.7b` the same on a base of
SmolLM2-1.7B's shape with random weights, `weights_ratio` of the frozen weights alone (embeddings and norms are not
quantized), `resident_ratio` and `resident_ratio_1.7b` of the resident memory of training above what the imports take,
kernels and allocator included. By side the accuracy by seed, the expected calibration error (10 bins of equal width)
and the reliability curve.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIDES = ("ours", "trl", "ours_4bit", "trl_4bit")
BINS = 10
LARGER = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
    "num_key_value_heads": 32, "head_dim": 64,
}  # fmt: skip


def resident() -> float:
    """Resident memory now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Peak:
    """The most resident memory inside the block, in MB above a base, by looking 100 times a second."""

    def __init__(self, base: float) -> None:
        self.base, self.most = base, 0.0

    def __enter__(self) -> Peak:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, resident() - self.base)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def tensor_peak():
    """A callback that finds the most bytes of tensors in the third optimizer step, in `mb`.

    The first step makes Adam's moments, so the third has all there is. Only that one is watched: it is slower for it.
    """
    import torch
    from transformers import TrainerCallback

    from ppo_plus.memory import MemoryTracker

    class TensorPeak(TrainerCallback):
        mb = math.nan

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                self.tracker = MemoryTracker()
                self.tracker.track(found for found in gc.get_objects() if issubclass(type(found), torch.Tensor))
                self.tracker.__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                self.tracker.__exit__(None, None, None)
                self.mb = sum(self.tracker.peak.values()) / 2**20

    return TensorPeak()


def give_back() -> None:
    """Return what loading has freed to the system, so that it does not count for training."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reliability(gaps: list[float]) -> tuple[float, list[dict]]:
    """Expected calibration error (Guo et al. 2017) and reliability curve of `sigmoid(chosen - rejected)`.

    Args:
        gaps: score of the chosen less that of the rejected, one per pair.

    Returns:
        The error, a probability, and by bin the mean `predicted` probability that the first of two is the better one,
        how often it was (`observed`), and `count`.
    """
    judged = []
    for gap in gaps:
        probability = 1 / (1 + math.exp(-gap)) if gap > -700 else 0.0
        judged += [(probability, 1), (1 - probability, 0)]
    bins: list[list[tuple[float, int]]] = [[] for _ in range(BINS)]
    for probability, right in judged:
        bins[min(int(probability * BINS), BINS - 1)].append((probability, right))
    curve = [
        {
            "predicted": statistics.fmean(p for p, _ in part),
            "observed": statistics.fmean(r for _, r in part),
            "count": len(part),
        }
        for part in bins
        if part
    ]
    return sum(abs(b["predicted"] - b["observed"]) * b["count"] for b in curve) / len(judged), curve


def config_of(side: str, seed: int, folder: str, cls: type):
    import torch
    import yaml

    given = yaml.safe_load((ROOT / "recipes" / "demo" / "rm_then_ppo_full.yaml").read_text())["reward"]
    set_here = {
        "bf16": True, "use_cpu": not torch.cuda.is_available(), "gradient_checkpointing": None,
        "activation_checkpointing": True, "disable_tqdm": True,
    }  # fmt: skip
    return cls(output_dir=f"{folder}/{side}", seed=seed, report_to="none", **(given | set_here))


def trainer_of(side: str, args: argparse.Namespace, folder: str, data: dict):
    """The trainer of a side; same seed, hence the same first weights, batches and order."""
    import torch
    import trl
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    import ppo_plus

    library = trl if side.startswith("trl") else ppo_plus
    config = config_of(side, args.seed, folder, library.RewardConfig)
    if args.dtype:
        config.model_init_kwargs = {"dtype": args.dtype}
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
    )  # fmt: skip
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return library.RewardTrainer(
        args.model, config, peft_config=lora, quantization_config=nf4 if side.endswith("4bit") else None, **data
    )


def score_gaps(trainer, pairs, tokenizer) -> list[float]:
    """Scores of chosen less rejected, by the same code for every side: the text and EOS, right-padded."""
    import torch

    model = trainer.model.eval()

    def scores(texts: list[str]) -> list[float]:
        inputs = tokenizer([t + tokenizer.eos_token for t in texts], return_tensors="pt", padding=True,
                           padding_side="right").to(model.device)  # fmt: skip
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
            return model(**inputs).logits[:, 0].float().tolist()

    gaps: list[float] = []
    for start in range(0, len(pairs), 25):
        rows = pairs[start : start + 25]
        gaps += [c - r for c, r in zip(scores(rows["chosen"]), scores(rows["rejected"]), strict=True)]
    return gaps


def run(side: str, args: argparse.Namespace) -> dict:
    """One side and seed, in this process."""
    sys.path.insert(0, str(ROOT / "recipes" / "demo"))
    from demo_assets import movie_reviews, preference_pairs, splits
    from transformers import AutoTokenizer

    import ppo_plus  # noqa: F401  (what both sides import counts for neither)

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    reviews = splits(movie_reviews().filter(lambda row: row["source"] == "rotten_tomatoes"), seed=args.seed)
    data = {
        "train_dataset": preference_pairs(reviews["rm_train"], tokenizer, args.pairs, args.tokens, args.seed),
        "eval_dataset": preference_pairs(reviews["rm_eval"], tokenizer, args.eval_pairs, args.tokens, args.seed),
    }
    give_back()
    base, tensors = resident(), tensor_peak()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(side, args, folder, {**data, "processing_class": tokenizer})
        trainer.add_callback(tensors)
        weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if not p.requires_grad)
        give_back()
        started = time.perf_counter()
        with Peak(base) as peak:
            trainer.train()
        seconds = time.perf_counter() - started
    gaps = score_gaps(trainer, data["eval_dataset"], tokenizer)
    error, curve = reliability(gaps)
    return {
        "accuracy": statistics.fmean(gap > 0 for gap in gaps), "expected_calibration_error": error,
        "reliability": curve, "tensor_peak_mb": tensors.mb, "resident_peak_mb": peak.most,
        "base_weights_mb": weights / 2**20, "seconds": seconds, "gaps": gaps,
    }  # fmt: skip


def child(side: str, seed: int, args: argparse.Namespace) -> dict:
    what = (Path(args.model).name, args.dtype, args.pairs, args.eval_pairs, args.tokens, side, seed)
    kept = args.keep and args.keep / f"{'-'.join(map(str, what))}.json"
    if kept and kept.is_file():
        return json.loads(kept.read_text())
    command = [sys.executable, __file__, "--child", side, "--seed", str(seed), "--model", args.model]
    for name in ("pairs", "eval_pairs", "tokens", "dtype"):
        if getattr(args, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    shown = {k: round(v, 4) for k, v in result.items() if isinstance(v, float)}
    print(f"{side}, seed {seed}: {shown}", file=sys.stderr, flush=True)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(result))
    return result


def larger_base(model: str, folder: str) -> str:
    """A base of SmolLM2-1.7B's shape with random weights and the tokenizer of `model`, saved in bf16."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(model)
    for name, value in LARGER.items():
        setattr(config, name, value)
    LlamaForCausalLM._from_config(config, dtype="bfloat16").save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def memory_of_larger(args: argparse.Namespace) -> dict[str, dict]:
    """Memory by side of three steps on the larger base; random weights have no accuracy worth a word."""
    names = ("tensor_peak_mb", "resident_peak_mb", "base_weights_mb")
    with tempfile.TemporaryDirectory() as folder:
        # A name of its own, by which the figures of its runs are kept and found.
        model = larger_base(args.model, str(Path(folder) / "SmolLM2-1.7B-shape"))
        given = {**vars(args), "model": model, "pairs": 24, "eval_pairs": 2}
        runs = {side: child(side, 0, argparse.Namespace(**given)) for side in SIDES}
    return {side: {name: run[name] for name in names} for side, run in runs.items()}


def summary(runs: list[dict]) -> dict:
    """Of one side: means over seeds (of the seconds the median), and the reliability of all seeds' pairs together."""
    error, curve = reliability([gap for run in runs for gap in run["gaps"]])
    names = ("accuracy", "expected_calibration_error", "tensor_peak_mb", "resident_peak_mb", "base_weights_mb")
    return {
        **{name: statistics.fmean(run[name] for run in runs) for name in names},
        "seconds": statistics.median(run["seconds"] for run in runs),
        "accuracy_by_seed": [run["accuracy"] for run in runs],
        "pooled_calibration_error": error,
        "reliability": curve,
    }


def difference(runs: list[dict], others: list[dict]) -> dict[str, float]:
    """Accuracy above another side's on the same pairs: the mean and its standard error, by pair."""
    apart = [
        (gap > 0) - (other_gap > 0)
        for run, other in zip(runs, others, strict=True)
        for gap, other_gap in zip(run["gaps"], other["gaps"], strict=True)
    ]
    return {"mean": statistics.fmean(apart), "standard_error": statistics.stdev(apart) / math.sqrt(len(apart))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=640)
    parser.add_argument("--eval-pairs", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=32, help="longest piece of a pair")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="of the base; each side's own choice by default"
    )
    parser.add_argument("--model", help="a local folder; SmolLM2-135M-Instruct from its package by default")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "reward_model.json")
    parser.add_argument("--keep", type=Path, help="a folder for the figures of each run; one that is there is kept")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run(args.child, args)))
        return
    from _utils import describe_machine, smollm2

    args.model = args.model or smollm2()
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    for seed in args.seeds:
        for side, done in runs.items():
            done.append(child(side, seed, args))
    larger = memory_of_larger(args)
    sides = {side: summary(done) for side, done in runs.items()}
    result = {
        "ratio": sides["ours"]["accuracy"] / sides["trl"]["accuracy"],
        **{
            name: sides["ours_4bit"][of] / sides["trl"][of]
            for name, of in (
                ("memory_ratio", "tensor_peak_mb"),
                ("weights_ratio", "base_weights_mb"),
                ("resident_ratio", "resident_peak_mb"),
            )
        },
        **{
            f"{name}_1.7b": larger["ours_4bit"][of] / larger["trl"][of]
            for name, of in (("memory_ratio", "tensor_peak_mb"), ("resident_ratio", "resident_peak_mb"))
        },
        "accuracy_difference": {side: difference(runs[side], runs["trl"]) for side in SIDES if side != "trl"},
        "accuracy_difference_4bit": difference(runs["ours_4bit"], runs["trl_4bit"]),
        "seeds": args.seeds, "pairs": args.pairs, "eval_pairs": args.eval_pairs, "dtype": args.dtype,
        **sides, "memory_1.7b": larger, **describe_machine(),
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
