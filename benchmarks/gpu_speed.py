"""Tokens per second on a GPU, as shares of what the card can do, for 0.5B, 1.5B and 8B shapes in bf16 and NF4.

    python benchmarks/gpu_speed.py [--shapes 0.5B 1.5B 8B] [--precisions bf16 nf4] [--no-trl] [--card-gb 12]
    python benchmarks/gpu_speed.py --tiny      the logic, in a minute on a CPU; nothing is written

Models have random weights: Qwen2.5's shapes at 0.5B and 1.5B, Llama 3.1's at 8B, with LoRA on all linear layers. Each
shape and precision is a process of its own. The limits are measured in it: copy bandwidth (1 GiB, bytes read and
written) and the rate of bf16 matrix products (8192 cubed). Shares:

    decode   a step reads all weights once and the keys and values so far; its limit is these bytes over the bandwidth
    learn    per token 4 operations per frozen weight (forward, activation gradients), 6 per LoRA weight, 4 per weight
             of the head on response tokens, and causal attention three times; its limit is these over the rate

Decode paths side by side: ours, `generate` with dynamic and with static cache (which transformers compiles on CUDA),
and continuous batching (`generate_batch`); one that does not run says why. torch.profiler tables of the two largest
costs, decoding and a learning micro-batch, go to gpu_profile_<shape>_<precision>.txt beside the result. Against TRL
1.12: the update of vs_trl.py, in bf16, where four times the weights fit. `--card-gb` caps the memory of each process as
a card of so many GB would. The result is written after each shape and precision; one that fails is an error in it. The
last line is JSON; `ratio` is the smallest share of its limit that an update's learning reached.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from _utils import (
    RESULTS,
    ROOT,
    PhaseClock,
    answer_continuously,
    by_phase,
    cap_memory,
    describe_machine,
    medians,
    peak_mb,
    report,
    seconds,
    word_tokenizer,
    write_result,
)
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen2Config

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def qwen(hidden: int, layers: int, heads: int, inner: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=151936, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=2, intermediate_size=inner, tie_word_embeddings=True,
    )  # fmt: skip


SHAPES: dict[str, Callable[[], LlamaConfig | Qwen2Config]] = {
    "0.5B": lambda: qwen(896, 24, 14, 4864),
    "1.5B": lambda: qwen(1536, 28, 12, 8960),
    "8B": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, tie_word_embeddings=False, max_position_embeddings=8192,
    ),
    "tiny": lambda: LlamaConfig(
        vocab_size=1024, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, tie_word_embeddings=False, max_position_embeddings=1024,
    ),
}  # fmt: skip
FULL = {"rows": 64, "prompt": 128, "response": 128, "micro": 8, "repeats": 3, "copy": 2**30, "matmul": 8192}
SMALL = {"rows": 8, "prompt": 8, "response": 8, "micro": 2, "repeats": 1, "copy": 2**20, "matmul": 256}


def limits(size: dict) -> dict[str, float]:
    """Bytes per second of a copy, reading and writing counted, and operations per second of a bf16 product."""
    source = torch.empty(size["copy"], dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    n = size["matmul"]
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    spent = medians({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, 10)
    return {"bytes_per_second": 2 * size["copy"] / spent["copy"], "flops_per_second": 2 * n**3 / spent["matmul"]}


def make_folder(shape: str, folder: str) -> None:
    """The shape with random bf16 weights on disk, and a tokenizer whose EOS is the last of its ids."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=torch.bfloat16)
    vocabulary = model.config.vocab_size
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    word_tokenizer(vocabulary).save_pretrained(folder)


def load(folder: str, precision: str):
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    options = {"quantization_config": nf4} if precision == "nf4" else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=DEVICE, **options)


def make_trainer(policy, size: dict, folder: str, clock: PhaseClock):
    from datasets import Dataset
    from ppo_runs import lora

    from ppo_plus import PPOConfig, PPOTrainer

    vocabulary, rows = policy.config.vocab_size, size["rows"]
    tokenizer = word_tokenizer(vocabulary)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (rows * (size["repeats"] + 1), size["prompt"]), generator=draw).tolist()
    config = PPOConfig(
        output_dir=folder, total_episodes=len(ids), per_device_train_batch_size=size["micro"],
        gradient_accumulation_steps=rows // 2 // size["micro"], num_mini_batches=2, num_ppo_epochs=2,
        response_length=size["response"], missing_eos_penalty=None, report_to="none", save_strategy="no",
        num_sample_generations=0, html_report=False, disable_tqdm=True, bf16=True,
    )  # fmt: skip
    return PPOTrainer(
        policy, different_words, config, train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=tokenizer, peft_config=lora(), callbacks=[clock],
    )  # fmt: skip


def different_words(completions, **kwargs) -> list[float]:
    return [float(len(set(text))) for text in completions]


def decode_paths(trainer, size: dict) -> dict[str, Callable[[], int]]:
    """Ways to answer the same prompts; each returns how many tokens it made."""
    model, policy = trainer.model.eval(), trainer.model.policy
    vocabulary, rows, response = policy.config.vocab_size, size["rows"], size["response"]
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, vocabulary, (rows, size["prompt"]), generator=draw).to(DEVICE)
    noise = torch.rand(rows, response, generator=draw, dtype=torch.float64)
    policy.generation_config.eos_token_id = None
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": response, "pad_token_id": 0}

    def ours() -> int:
        attended = torch.ones_like(ids)
        return model.sample(ids, attended, noise, stop_ids=[vocabulary], pad_token_id=0).tokens.numel()

    def generate(**options) -> int:
        out = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **sampling, **options)
        return out[:, ids.shape[1] :].numel()

    def continuous() -> int:
        return sum(map(len, answer_continuously(model.language_model, ids.tolist(), [response] * rows)))

    return {
        "ours": ours,
        "generate": generate,
        "generate, static cache": lambda: generate(cache_implementation="static"),
        "generate_batch": continuous,
    }


def decode_speed(paths: dict[str, Callable[[], int]], size: dict, limit: float) -> dict[str, dict]:
    """Tokens per second of each path and its share of the limit; the error of one that does not run."""
    expected, found = size["rows"] * size["response"], {}
    for name, path in paths.items():
        try:
            made = path()
            if made != expected:
                raise RuntimeError(f"it made {made} tokens instead of {expected}")
            speed = expected / medians({name: path}, size["repeats"])[name]
            found[name] = {"tokens_per_second": speed, "share_of_limit": speed / limit}
        except Exception as error:  # a path that this card or version lacks is a finding, not the end
            found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return found


def weights_of(model: nn.Module) -> dict[str, float]:
    """Bytes that a decode step reads, and numbers of weights by kind; packed 4-bit weights count unpacked."""
    language_model = model.language_model
    head, embedding = language_model.get_output_embeddings().weight, language_model.get_input_embeddings().weight
    tied = head is embedding
    read = linear = adapter = 0
    for name, p in model.policy.named_parameters():
        if p is embedding and not tied:
            continue
        read += p.numel() * p.element_size()
        if "lora_" in name:
            adapter += p.numel()
        elif p is not head and p.ndim == 2:
            linear += 2 * p.numel() if p.dtype == torch.uint8 else p.numel()
    return {"bytes": read, "linear": linear, "adapter": adapter, "head": head.numel()}


def decode_limit(model: nn.Module, size: dict, bandwidth: float) -> float:
    """Tokens per second if a step took no longer than reading weights, keys and values once."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    per_token = 2 * 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads)
    cached = size["rows"] * (size["prompt"] + size["response"] / 2) * per_token
    return size["rows"] * bandwidth / (weights_of(model)["bytes"] + cached)


def learning_flops(model: nn.Module, size: dict, epochs: int = 2) -> float:
    """Operations of one update's forward and backward passes."""
    weights, config = weights_of(model), model.config
    length = size["prompt"] + size["response"]
    attention = 3 * 4 * (length / 2) * config.hidden_size * config.num_hidden_layers
    per_token = 4 * weights["linear"] + 6 * weights["adapter"] + attention
    return epochs * size["rows"] * (length * per_token + size["response"] * 4 * weights["head"])


def profiled(works: dict[str, Callable[[], object]]) -> str:
    """A table of operators for each, longest first."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    by, parts = f"self_{'device' if CUDA else 'cpu'}_time_total", []
    for name, work in works.items():
        with profile(activities=activities) as record:
            seconds(work)
        parts.append(f"{name}\n{record.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=70)}")
    return "\n".join(parts)


def one_micro_batch(trainer) -> Callable[[], object]:
    rollout = trainer._progress.rollout
    batch = rollout.micro_batch(torch.arange(trainer.args.per_device_train_batch_size))
    tokens = batch["action_mask"].sum().to(DEVICE)
    return lambda: trainer.training_step(trainer.model, dict(batch), tokens)


def measure(shape: str, precision: str, size: dict, folder: str, output: Path) -> dict:
    """Everything about one shape and precision, in this process."""
    bounds, clock = limits(size), PhaseClock()
    trainer = make_trainer(load(folder, precision), size, f"{folder}/out", clock)
    trainer.train()
    update, peak = by_phase(clock.rows[1:]), peak_mb()
    paths = decode_paths(trainer, size)
    with torch.no_grad():
        decode = decode_speed(paths, size, decode_limit(trainer.model, size, bounds["bytes_per_second"]))
    tables = profiled({"decode": paths["ours"], "learning micro-batch": one_micro_batch(trainer)})
    if shape != "tiny":
        output.mkdir(parents=True, exist_ok=True)
        (output / f"gpu_profile_{shape}_{precision}.txt").write_text(tables, encoding="utf-8")
    responses = size["rows"] * size["response"]
    reached = learning_flops(trainer.model, size) / update["learn"]
    return {
        "limits": bounds,
        "update_seconds": update,
        "peak_mb": peak,
        "generated_tokens_per_second": responses / update["generate"],
        "learned_tokens_per_second": 2 * responses / update["learn"],
        "learn_share_of_limit": reached / bounds["flops_per_second"],
        "decode": decode,
    }


def against_trl(folder: str) -> dict | None:
    """Median seconds of vs_trl.py's update on both sides; None where four times the weights do not fit."""
    from ppo_runs import install_trl, run
    from vs_trl import summary

    weights = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    if 4 * weights > torch.cuda.get_device_properties(0).total_memory:
        return None
    install_trl()
    sides = {side: summary([run(side, folder, "bfloat16", 3)]) for side in ("trl", "ours")}
    return {"ratio": sides["trl"]["total_seconds"] / sides["ours"]["total_seconds"], **sides}


def run_child(shape: str, precision: str, folder: str, flags: list[str]) -> dict:
    """Measure one shape and precision in a process of its own; returns the error of one that fails."""
    command = [sys.executable, __file__, "--child", shape, precision, folder, *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        return {"error": lines[-1][:300]}
    print(f"{shape} {precision}: {done.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def smallest_share(found: dict[str, dict]) -> float | None:
    """Return the smallest share of its limit that learning reached; None where nothing was measured."""
    rows = [row for by in found.values() for row in by.values() if row]
    return min((row["learn_share_of_limit"] for row in rows if "learn_share_of_limit" in row), default=None)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["0.5B", "1.5B", "8B"], choices=[s for s in SHAPES if s != "tiny"]
    )
    parser.add_argument("--precisions", nargs="+", default=["bf16", "nf4"], choices=["bf16", "nf4"])
    parser.add_argument("--no-trl", action="store_true", help="leave TRL 1.12 out")
    parser.add_argument("--card-gb", type=float, help="cap each process as a card of so many GB would")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, without TRL; nothing is written")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (CUDA or args.tiny or args.child):
        sys.exit("gpu_speed.py measures a CUDA device and finds none; --tiny tries its logic on a CPU.")
    return args


def main() -> None:
    args = parse_arguments()
    if args.card_gb is not None:
        cap_memory(args.card_gb)
    if args.child:
        shape, precision, folder = args.child
        print(json.dumps(measure(shape, precision, SMALL if shape == "tiny" else FULL, folder, args.output)))
        return
    flags = ["--output", str(args.output), *(["--card-gb", str(args.card_gb)] if args.card_gb is not None else [])]
    found: dict[str, dict] = {}

    def result() -> dict:
        return {"ratio": smallest_share(found), "sizes": SMALL if args.tiny else FULL, **found}

    for shape in ["tiny"] if args.tiny else args.shapes:
        found[shape] = {}
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-c", MAKE, shape, folder], check=True, cwd=ROOT / "benchmarks")
            for precision in args.precisions:
                found[shape][precision] = run_child(shape, precision, folder, flags)
                if not args.tiny:
                    write_result(args.output / "gpu_speed.json", {**result(), **describe_machine()})
            if not (args.tiny or args.no_trl) and "bf16" in args.precisions:
                found[shape]["against_trl"] = against_trl(folder)
    report("gpu_speed", result(), write=not args.tiny, folder=args.output)


# In a process of its own, so that the memory of making the weights is given back.
MAKE = "import sys; from gpu_speed import make_folder; make_folder(*sys.argv[1:])"

if __name__ == "__main__":
    main()
