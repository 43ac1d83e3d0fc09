"""A whole rollout and update of large models in NF4 under a hard cap of 12, 16 and 24 GB, and the planner beside it.

    python benchmarks/gpu_memory.py [--models qwen2.5-7b ...] [--caps 12 16 24] [--output benchmarks/results] [--tiny]

Weights are random, in the shapes below, quantized one layer at a time on the GPU, so the bf16 model never exists. LoRA
r=16 on all linear layers, a reward adapter of the same rank mounted, 64 prompts of 256 tokens, responses of 512; batch
sizes are the planner's. Each run is a process of its own, whose allocator is capped at the card less what the planner
sets aside for CUDA (`torch.cuda.set_per_process_memory_fraction`). `--tiny` shrinks the shapes to a second's work and
counts storages where there is no GPU: it shows that the script runs, and nothing about memory.

The result is written after each run. The last line is JSON; `ratio` is the largest share of its cap that one of the
claimed runs (7B in 12, 14B in 16, 32B in 24 GB) held at its peak, or null where one of them did not run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
QWEN2 = {"model_type": "qwen2", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
SHAPES = {
    "qwen2.5-1.5b": {
        **QWEN2, "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **QWEN2, "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    },
    "qwen3-14b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 17408,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": False, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    },
    "qwen2.5-32b": {
        **QWEN2, "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
CLAIMS = (("qwen2.5-7b", 12), ("qwen3-14b", 16), ("qwen2.5-32b", 24))


def config_of(name: str, tiny: bool):
    from transformers import AutoConfig

    shape = {**SHAPES[name], **(TINY if tiny else {})}
    if tiny and "head_dim" in shape:
        shape["head_dim"] = 16
    return AutoConfig.for_model(**shape, eos_token_id=shape["vocab_size"] - 1, pad_token_id=shape["vocab_size"] - 2)


def setup_of(tiny: bool, checkpointing: bool):
    from ppo_plus.memory import PlannerConfig

    sizes = {"prompt_length": 6, "response_length": 8, "rollout_batch_size": 4, "lora_r": 4} if tiny else {}
    return PlannerConfig(**sizes, activation_checkpointing=checkpointing)


def planned(config, tiny: bool, cap: int):
    """The plan without activation checkpointing where that fits, else with it."""
    from ppo_plus.memory import plan

    found = plan(config, setup_of(tiny, False), cap)
    return found if found.fits else plan(config, setup_of(tiny, True), cap)


def random_nf4(config, device):
    """The model in NF4 on the device, as `from_pretrained` with a BitsAndBytesConfig leaves it, from random weights."""
    import bitsandbytes as bnb
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import QuantizationMethod

    def random(shape):
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)

    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):  # has buffers that are computed, and no weights
            model.set_submodule(name, type(module)(config).to(device))
        elif isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            linear = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, torch.bfloat16,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            linear.weight = bnb.nn.Params4bit(
                random(module.weight.shape), requires_grad=False, compress_statistics=True, quant_type="nf4"
            ).to(device)
            if module.bias is not None:
                linear.bias = nn.Parameter(random(module.bias.shape), requires_grad=False)
            model.set_submodule(name, linear)
        else:
            for key, parameter in module.named_parameters(recurse=False):
                value = random(parameter.shape) if parameter.ndim > 1 else torch.ones_like(parameter, device=device)
                setattr(module, key, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    model.is_quantized = model.is_loaded_in_4bit = True
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    return model


def random_reward_adapter(config, rank: int, folder: Path) -> str:
    """A reward adapter for that base with random weights, as `RewardTrainer` writes one."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoModelForSequenceClassification

    one_label = type(config).from_dict({**config.to_dict(), "num_labels": 1})
    with torch.device("meta"):
        base = AutoModelForSequenceClassification.from_config(one_label)
        lora = LoraConfig(r=rank, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
        model = get_peft_model(base, lora)
    shapes = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    generator = torch.Generator().manual_seed(1)
    folder.mkdir()
    model.peft_config["default"].save_pretrained(folder)
    weights = {name: torch.randn(shape, generator=generator) * 0.01 for name, shape in shapes.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(folder)


def word_tokenizer(config):
    """A word per token id, so that texts of sampled tokens are as long for the reward model as for the actor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", eos_token=f"w{config.eos_token_id}",
        pad_token=f"w{config.pad_token_id}", padding_side="left",
    )  # fmt: skip


class Peaks:
    """Peak bytes of tensors, by phase: of the allocator on a GPU, else of a tracker of storages."""

    def __init__(self, cap: int) -> None:
        import torch
        from _utils import cap_memory

        from ppo_plus.memory import MemoryTracker

        self.cuda, self.tracker, self.phases = torch.cuda.is_available(), MemoryTracker(), {}
        cap_memory(cap)

    def counting(self):
        return contextlib.nullcontext() if self.cuda else self.tracker

    def book(self, phase: str) -> None:
        import torch

        allocated = torch.cuda.max_memory_allocated() if self.cuda else sum(self.tracker.peak.values())
        reserved = torch.cuda.max_memory_reserved() if self.cuda else None
        self.phases[phase] = {"allocated": allocated, "reserved": reserved}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.tracker.reset_peak()


def trainer_of(config, found, folder: Path, device, peaks: Peaks):
    import torch
    from datasets import Dataset
    from peft import LoraConfig

    from ppo_plus import PPOCallback, PPOConfig, PPOTrainer

    class Phases(PPOCallback):
        def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
            peaks.book("collect")
            self.response_tokens = int(rollout.action_mask.sum())

    setup, phases = found.setup, Phases()
    shape = (setup.rollout_batch_size, setup.prompt_length)
    ids = torch.randint(1, config.vocab_size - 2, shape, generator=torch.Generator().manual_seed(2))
    args = PPOConfig(
        output_dir=str(folder / "out"), total_episodes=len(ids), response_length=setup.response_length,
        activation_checkpointing=setup.activation_checkpointing, temperature=1.0, save_strategy="no", report_to="none",
        num_sample_generations=0, html_report=False, disable_tqdm=True, use_cpu=device.type == "cpu",
        bf16=True, **found.batch_sizes,
    )  # fmt: skip
    lora = LoraConfig(r=setup.lora_r, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    reward = random_reward_adapter(config, setup.lora_r, folder / "reward")
    trainer = PPOTrainer(
        random_nf4(config, device), reward, args, train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        processing_class=word_tokenizer(config), peft_config=lora, callbacks=[phases],
    )  # fmt: skip
    return trainer, phases


def child(name: str, cap: int, tiny: bool) -> dict:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config_of(name, tiny)
    found = planned(config, tiny, cap)
    result = {
        "model": name, "cap_gib": cap, "planner_says_it_fits": found.fits, "sizes": found.batch_sizes,
        "activation_checkpointing": found.setup.activation_checkpointing,
    }  # fmt: skip
    peaks = Peaks(cap)
    try:
        with tempfile.TemporaryDirectory() as folder, peaks.counting():
            trainer, phases = trainer_of(config, found, Path(folder), device, peaks)
            peaks.book("load")
            trainer.train()
            peaks.book("learn")
    except torch.OutOfMemoryError as error:
        return {**result, "ran": False, "error": str(error).splitlines()[0], "measured_bytes": peaks.phases}
    generate, score, learn = found.phases
    # This run's one rollout comes before the optimizer has moments; a later one has them in memory.
    collect = max(phase.total - phase.parts["optimizer"] for phase in (generate, score))
    plans = {"collect": collect, "learn": learn.total}
    errors = {phase: size / peaks.phases[phase]["allocated"] - 1 for phase, size in plans.items()}
    return {
        **result, "ran": True, "response_tokens": phases.response_tokens, "measured_bytes": peaks.phases,
        "planned_bytes": plans, "planner_error": errors,
        "decode_rows": [found.batch_sizes["generation_batch_size"], trainer.collector.generation_batch_size.rows],
        "forward_rows": [
            found.batch_sizes["local_rollout_forward_batch_size"], trainer.collector.forward_batch_size.rows,
        ],
    }  # fmt: skip


def share_of_cap(row: dict) -> float | None:
    """The largest part of its cap that a run held; None where it did not run, or not on a GPU."""
    held = [phase["reserved"] for phase in row.get("measured_bytes", {}).values()]
    return max(held) / (row["cap_gib"] * 2**30) if row["ran"] and None not in held else None


def run_child(name: str, cap: int, tiny: bool) -> dict:
    """Run one model under one cap in a process of its own; a process that fails is a row with its error."""
    command = [sys.executable, __file__, "--child", name, str(cap), *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        return {"model": name, "cap_gib": cap, "ran": False, "error": lines[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def summarize(rows: list[dict]) -> dict:
    """Return the result of the runs so far, with machine and versions."""
    from _utils import describe_machine

    shares = {(row["model"], row["cap_gib"]): share_of_cap(row) for row in rows}
    claimed = [shares.get(claim) for claim in CLAIMS]
    return {"ratio": None if None in claimed else max(claimed), "runs": rows, **describe_machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--caps", nargs="+", type=int, default=[12, 16, 24], help="GiB")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that the script runs; writes nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "CAP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], int(args.child[1]), args.tiny)))
        return
    import torch
    from _utils import write_result

    if not args.tiny and not torch.cuda.is_available():
        parser.error("this measures a CUDA GPU, and there is none; --tiny shows on the CPU that the script runs")
    rows: list[dict] = []
    for name in args.models:
        for cap in args.caps:
            rows.append(run_child(name, cap, args.tiny))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if not args.tiny:
                write_result(args.output / "gpu_memory.json", summarize(rows))
    print(json.dumps(summarize(rows)))


if __name__ == "__main__":
    main()
