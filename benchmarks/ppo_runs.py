"""One machine, two trainers: a PPO run by ppo_plus and the same by the last PPO of TRL (1.12), each in a fresh process.

Same packages, model, prompts, lengths (nothing that ends a response is ever sampled), LoRA, episodes (32 x 48 tokens),
4 PPO epochs x 2 minibatches of 16, a reward model of the same size. TRL is installed into a folder of its own. TRL
holds policy, value model and reward model; ppo_plus holds one backbone. `vs_trl.py` and `memory.py` say what comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRL_VERSION = "1.12.0"
TRL = ROOT / "build" / f"trl-{TRL_VERSION}"
EPISODES, PROMPT, RESPONSE, EPOCHS, MINIBATCHES = 32, 14, 48, 4, 2
MICRO = EPISODES // MINIBATCHES
NEVER = 49151  # a token id that is never sampled, as the one that ends a response


def resident() -> float:
    """Resident memory now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory_above(baseline: float) -> dict[str, float]:
    """Peaks of this process, in MB: resident above the baseline; on a GPU, of torch's allocator too."""
    import resource

    import torch

    found = {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - baseline}
    if torch.cuda.is_available():
        found["gpu_allocated"] = torch.cuda.max_memory_allocated() / 2**20
        found["gpu_reserved"] = torch.cuda.max_memory_reserved() / 2**20
    return found


def lora(task: str = "CAUSAL_LM"):
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task)


def shared_pieces(model: str, dtype: str, rows: int):
    """Policy, tokenizer and prompts, the same for both sides."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    policy.generation_config.eos_token_id = NEVER
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(NEVER)
    ids = torch.randint(100, 40000, (rows, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    return policy, tokenizer, Dataset.from_dict({"input_ids": ids})


def our_trainer(model: str, dtype: str, updates: int, folder: str, callback, compiled: bool = False):
    """The update that is compared, `updates` times and once before that is not counted."""
    from ppo_plus import PPOConfig, PPOTrainer

    policy, tokenizer, prompts = shared_pieces(model, dtype, EPISODES * (updates + 1))
    config = PPOConfig(
        output_dir=folder, total_episodes=EPISODES * (updates + 1), per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=EPISODES // MINIBATCHES // MICRO, num_mini_batches=MINIBATCHES,
        num_ppo_epochs=EPOCHS, response_length=RESPONSE, missing_eos_penalty=None, report_to="none",
        save_strategy="no", num_sample_generations=0, html_report=False, disable_tqdm=True, torch_compile=compiled,
        bf16=None if dtype == "bfloat16" else False,
    )  # fmt: skip
    return PPOTrainer(
        policy, reward_adapter(model, dtype, folder), config, train_dataset=prompts, processing_class=tokenizer,
        peft_config=lora(), callbacks=[callback],
    )  # fmt: skip


def ours(model: str, dtype: str, updates: int, folder: str, compiled: bool) -> dict:
    from _utils import PhaseClock

    baseline, clock = resident(), PhaseClock()
    our_trainer(model, dtype, updates, folder, clock, compiled).train()
    return {"rows": clock.rows[1:], "first": clock.rows[0]["total"], **memory_above(baseline), "tokens": clock.tokens}


def reward_adapter(model: str, dtype: str, folder: str) -> str:
    """A reward adapter on that base, made in a process of its own so that its memory does not count."""
    code = f"""
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({model!r}, num_labels=1, dtype={dtype!r})
config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
get_peft_model(model, config).save_pretrained({folder + "/reward"!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return folder + "/reward"


def trls(model: str, dtype: str, updates: int, folder: str, compiled: bool) -> dict:
    import torch
    import trl.experimental.ppo.ppo_trainer as module
    from transformers import AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    baseline, spent, lengths = resident(), {"generate": 0.0, "score": 0.0}, []

    def timed(name: str, phase: str) -> None:
        function = getattr(module, name)

        def wrapper(*args, **kwargs):
            if torch.is_grad_enabled() and phase == "score":
                return function(*args, **kwargs)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[phase] += time.perf_counter() - started
            if phase == "generate":
                lengths.append(result[0][:, PROMPT:].numel())
            return result

        setattr(module, name, wrapper)

    for name, phase in (("batch_generation", "generate"), ("forward", "score"), ("get_reward", "score")):
        timed(name, phase)

    class Clock(TrainerCallback):
        def __init__(self):
            self.rows, self.last = [], time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            now = time.perf_counter()
            self.rows.append({**spent, "total": now - self.last})
            spent.update(generate=0.0, score=0.0)
            self.last = now

    policy, tokenizer, prompts = shared_pieces(model, dtype, EPISODES * (updates + 1))
    value_model, reward_model = (
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=dtype) for _ in range(2)
    )
    config = PPOConfig(
        output_dir=folder, total_episodes=EPISODES * (updates + 1), per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=EPISODES // MICRO, num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS,
        response_length=RESPONSE, stop_token_id=NEVER, report_to="none", save_strategy="no", num_sample_generations=0,
        bf16=False, gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        torch_compile=compiled,
    )  # fmt: skip
    clock = Clock()
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward_model,
        train_dataset=prompts, eval_dataset=prompts, value_model=value_model, peft_config=lora(), callbacks=[clock],
    )  # fmt: skip
    clock.last = time.perf_counter()
    trainer.train()
    return {"rows": clock.rows[1:], "first": clock.rows[0]["total"], **memory_above(baseline), "tokens": lengths}


def run(side: str, model: str, dtype: str, updates: int, compiled: bool = False) -> dict:
    """A run of one side in a process of its own.

    `rows` are the seconds of each update by phase; the first update is not among them, `first` is all its seconds.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    if side == "trl":
        environment["PYTHONPATH"] = str(TRL)
    command = [sys.executable, __file__, "--child", side, "--model", model, "--dtype", dtype]
    command += ["--updates", str(updates), *(["--compile"] if compiled else [])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{side}: {done.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def install_trl() -> None:
    if not TRL.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(TRL), f"trl=={TRL_VERSION}"], check=True)


def child() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", choices=["ours", "trl"], required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        side = ours if args.child == "ours" else trls
        print(json.dumps(side(args.model, args.dtype, args.updates, folder, args.compile)))


if __name__ == "__main__":
    child()
