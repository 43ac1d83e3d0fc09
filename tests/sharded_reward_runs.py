"""Reward models trained with a sharded base and with whole copies, on the processes that start this script.

torchrun --nproc_per_node 2 tests/sharded_reward_runs.py FOLDER; see test_fsdp_rewards.py
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from conftest import lora, make_tokenizer
from datasets import Dataset
from sharded_runs import base_bytes, watch_base_bytes
from transformers import BitsAndBytesConfig

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.models.backbone import unwrap_peft

# Fields of the configuration, and further arguments of the trainer.
RUNS = {
    "a reward model": ({}, {}),
    "a reward model on nf4": (
        {}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}),
    "a reward model on int8, recomputed activations, pairs with prompts": (
        {"activation_checkpointing": True}, {"load_in_8bit": True, "prompt": "the film was very "}),
}  # fmt: skip


def pairs(n: int, prompt: str | None = None) -> Dataset:
    """Texts of uneven length; the chosen one has more of the letter e."""
    words = ["abcdfgh"[i % 7] * (1 + i % 5) for i in range(n)]
    rows = {"chosen": [f"{word}{'e' * (1 + i % 3)}" for i, word in enumerate(words)], "rejected": words}
    return Dataset.from_dict(rows | ({} if prompt is None else {"prompt": [prompt] * n}))


def trainer_of(name: str, base: Path, folder: Path, **config) -> RewardTrainer:
    """The trainer of a run: 6 steps, evaluated and saved after 3 of them."""
    fields, more = RUNS[name]
    quantization = {k: v for k, v in more.items() if k != "prompt"}
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 3,
        "eval_strategy": "steps", "eval_steps": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return RewardTrainer(
        str(base), RewardConfig(**{**defaults, **fields, **config}), peft_config=lora(task_type="SEQ_CLS"),
        train_dataset=pairs(40, more.get("prompt")), eval_dataset=pairs(7, more.get("prompt")),
        processing_class=make_tokenizer(),
        quantization_config=BitsAndBytesConfig(**quantization) if quantization else None,
    )  # fmt: skip


def trained(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def run(name: str, folder: Path, fsdp: bool, resume: str | None = None, out: Path | None = None) -> dict:
    out = out or folder / name / str(fsdp)
    trainer = trainer_of(name, folder / "base", out, fsdp=fsdp, ddp_backend="gloo")
    most = watch_base_bytes(trainer, unwrap_peft(trainer.model).base_model)
    trainer.train(resume_from_checkpoint=resume)
    weights = trained(trainer)
    everywhere = trainer.accelerator.gather(weights[None])
    assert all(torch.equal(row, weights) for row in everywhere), "the processes do not hold the same weights"
    trainer.save_model(str(out / "final"))
    if trainer.accelerator.is_main_process:
        torch.save(weights, out / "weights.pt")
    # transformers counts the numbers of a 4-bit weight twice, but not those of a share of it.
    varies = ("time", "per_second", "total_flos")
    history = [{k: v for k, v in row.items() if not any(word in k for word in varies)}
               for row in trainer.state.log_history]  # fmt: skip
    return {"bytes": base_bytes(trainer.model), "log": history, "wrapper": type(trainer.model_wrapped).__name__, **most}


def main(folder: Path) -> None:
    results = {f"{name}/{fsdp}": run(name, folder, fsdp) for name in RUNS for fsdp in (True, False)}
    checkpoint = str(folder / "a reward model" / "True" / "checkpoint-3")
    for fsdp in (True, False):
        run("a reward model", folder, fsdp, checkpoint, folder / "resumed" / str(fsdp))
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
