"""A tool and two turns: PPO with rewards per turn, PPO without, and GRPO of the installed TRL, at equal sampled tokens.

    python benchmarks/tools.py [--seeds 0 1 2] [--tokens 4200] [--warm_up_steps 11] [--keep out/tools_benchmark]

Tool, questions and reward are those of `recipes/tools/calculator.py`: SmolLM2-135M-Instruct calls a calculator, reads
its result and repeats it, after a few supervised conversations from which every run starts. A chat template of a few
lines shows the tool, because long prompts would take most of the time. The steps of the warm start were chosen on other
questions than the held-out ones. The reward is 1 for the right number in the last message and 0.5 for a call that the
calculator answers with that number. `ppo_turns` pays each at the end of its turn, `ppo` pays both at the end of the
response, and `grpo` sees their sum. Equal are LoRA, learning rate, KL coefficient, sampling, responses per generation
(32) and optimizer steps per generation (2 x 2); each side runs in a fresh process until it has sampled `--tokens`
tokens, answers of the tool not counted. PPO answers 32 questions once, GRPO 4 questions 8 times.

A run is kept as JSON when it ends, and is not repeated; `--collect` makes the result of the runs that are kept. It has,
by side, the share of held-out questions that are answered right before and after (likeliest token each time), the same
for right calls, by seed, and the curve of the training rewards over sampled tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "tools"))

from calculator import calculate, make_rows, right_answer, warm_up  # noqa: E402

SIDES = ("ppo_turns", "ppo", "grpo")
RESPONSES, MICRO, GROUP = 32, 16, 8
LENGTH, CALLS = 72, 1  # tokens of a response at most, and how often it may call
RIGHT_CALL = 0.5  # reward of a call whose result is the answer
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # PEFT wants names with layers
START = ("warm_up_steps", "held_out", "dtype")  # settings that decide the figures before training
SETTINGS = ("tokens", "learning_rate", "top_layers", "temperature", *START)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}{% if loop.first %}{% for t in tools or [] %}"
    "{{ '\\n' + t.function.name }}({{ t.function.parameters.properties | join(', ') }}){% endfor %}{% endif %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer of a warm-started model, which parses calls in the format of Qwen3."""
    from transformers import AutoTokenizer
    from trl.chat_template_utils import qwen3_template

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.response_template = qwen3_template
    return tokenizer


def turn_rewards(messages: Sequence[dict[str, Any]], answer: int) -> list[float]:
    """Return the reward of each turn of the policy: of a right call, once, and of the right answer at the end."""
    starts = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    results = [takewhile(lambda m: m["role"] == "tool", messages[start + 1 :]) for start in starts]
    called = [any(m["content"] == str(answer) for m in result) for result in results]
    rewards = [RIGHT_CALL * (right and not any(called[:i])) for i, right in enumerate(called)]
    rewards[-1] += right_answer([list(messages)], [answer])[0]
    return rewards


class Rewards:
    """The reward function of all sides. Keeps the curve over sampled tokens.

    What PPOTrainer asks before its first rollout has fewer completions than a generation, and is not counted.
    """

    __name__ = "right"

    def __init__(self, tokenizer: Any, per_turn: bool) -> None:
        self.tokenizer, self.per_turn = tokenizer, per_turn
        self.tokens, self.curve = 0, []

    def __call__(self, completions: list, completion_ids: list[list[int]], answer: list[int], **_: Any) -> list:
        rewards = [turn_rewards(messages, n) for messages, n in zip(completions, answer, strict=True)]
        if len(completions) == RESPONSES:
            self.tokens += sum(self.count_sampled(*row) for row in zip(completions, completion_ids, strict=True))
            right = statistics.fmean(right_answer(completions, answer))
            self.curve.append({"tokens": self.tokens, "reward": statistics.fmean(map(sum, rewards)), "right": right})
            print(self.curve[-1], file=sys.stderr, flush=True)
        return [{"turn": of} for of in rewards] if self.per_turn else [sum(of) for of in rewards]

    def count_sampled(self, messages: Sequence[dict[str, Any]], ids: Sequence[int]) -> int:
        """Return how many tokens of a response are the policy's."""
        from ppo_plus.data.tool_templates import tool_suffix_ids

        results = [message for message in messages if message["role"] == "tool"]
        # One call at most is allowed, so all results come after one turn.
        return len(ids) - (len(tool_suffix_ids(results, self.tokenizer, {})) if results else 0)


def evaluate(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the shares of right answers and right calls, the likeliest token each time; the same for all sides."""
    from transformers.utils import get_json_schema
    from trl.chat_template_utils import parse_response

    from ppo_plus.data.tool_templates import tool_suffix_ids

    model.eval()
    tools, rewards = [get_json_schema(calculate)], []
    for start in range(0, len(rows), 50):
        batch = rows[start : start + 50]
        prompts = [
            tokenizer.apply_chat_template(row["prompt"], tools=tools, add_generation_prompt=True, return_dict=True)
            for row in batch
        ]
        prefixes = [prompt["input_ids"] for prompt in prompts]
        conversations: list[list[dict[str, Any]]] = [[] for _ in batch]
        for turn in range(CALLS + 1):
            active = [i for i, c in enumerate(conversations) if not turn or c[-1]["role"] == "tool"]
            if not active:
                break
            for i, ids in zip(active, greedy(model, tokenizer, [prefixes[i] for i in active]), strict=True):
                message = parse_response(tokenizer, ids, prefix=prefixes[i], tools=tools)
                conversations[i].append(message)
                if turn < CALLS and message.get("tool_calls"):
                    results = [call_tool(call) for call in message["tool_calls"]]
                    conversations[i] += results
                    prefixes[i] = prefixes[i] + ids + tool_suffix_ids(results, tokenizer, {})
        rewards += [turn_rewards(c, row["answer"]) for c, row in zip(conversations, batch, strict=True)]
    return {
        "right": statistics.fmean(of[-1] >= 1 for of in rewards),
        "right_call": statistics.fmean(sum(of) % 1 > 0 for of in rewards),
    }


def greedy(model: Any, tokenizer: Any, prefixes: list[list[int]]) -> list[list[int]]:
    """Return the likeliest continuation of each conversation, up to the end of a turn."""
    import torch

    inputs = tokenizer.pad({"input_ids": prefixes}, return_tensors="pt").to(model.device)
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=LENGTH - 16, do_sample=False, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    eos = tokenizer.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def call_tool(call: dict[str, Any]) -> dict[str, Any]:
    """Return the message with the result of a call; an error becomes its text, as in training."""
    function = call["function"]
    try:
        if function["name"] != "calculate":
            raise ValueError(f"Tool {function['name']} not found.")
        content = str(calculate(**function["arguments"]))
    except Exception as error:
        content = str({"error": str(error)})
    return {"role": "tool", "name": function["name"], "content": content}


def arguments(side: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What all sides share, and what each calls by another name."""
    shared = {
        "output_dir": folder, "seed": args.seed, "per_device_train_batch_size": MICRO, "bf16": False,
        "learning_rate": args.learning_rate, "gradient_accumulation_steps": RESPONSES // MICRO // 2,
        "lr_scheduler_type": "constant", "logging_steps": 4, "max_steps": 4 * -(-args.tokens // RESPONSES),
        "report_to": "none", "save_strategy": "no", "temperature": args.temperature, "disable_tqdm": True,
        "max_tool_calling_iterations": CALLS,
    }  # fmt: skip
    if side != "grpo":
        return shared | {
            "num_mini_batches": 2, "num_ppo_epochs": 2, "response_length": LENGTH, "kl_coef": 0.01,
            "missing_eos_penalty": None, "value_head_learning_rate": 1e-3, "num_sample_generations": 0,
            "html_report": False, "generation_batch_size": RESPONSES,
        }  # fmt: skip
    return shared | {
        "num_generations": GROUP, "steps_per_generation": RESPONSES // MICRO, "num_iterations": 2, "beta": 0.01,
        "max_completion_length": LENGTH, "gradient_checkpointing": None,
    }  # fmt: skip


def run(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """One side and seed, in this process."""
    import time

    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from verifiable import budget

    import ppo_plus

    ours, theirs = (ppo_plus.PPOTrainer, ppo_plus.PPOConfig), (trl.GRPOTrainer, trl.GRPOConfig)
    trainer_class, config_class = theirs if side == "grpo" else ours
    tokenizer = load_tokenizer(args.model)
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    held_out, rewards = make_rows(args.held_out, seed=2), Rewards(tokenizer, per_turn=side == "ppo_turns")
    if side == "start":
        return evaluate(policy, tokenizer, held_out)
    layers = policy.config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            policy, reward_funcs=rewards, args=config_class(**arguments(side, args, folder)),
            train_dataset=Dataset.from_list(make_rows(2048, seed=100 + args.seed)), processing_class=tokenizer,
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM",
                layers_to_transform=list(range(layers))[-args.top_layers :],
            ),
            callbacks=[budget(rewards, args.tokens)], tools=[calculate],
        )  # fmt: skip
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "after": evaluate(model if side == "grpo" else model.policy, tokenizer, held_out),
        "tokens": rewards.tokens, "steps": trainer.state.global_step, "cpu_seconds": seconds, "curve": rewards.curve,
    }  # fmt: skip


def child(side: str, seed: int, args: argparse.Namespace) -> dict[str, Any] | None:
    """Run one side and seed in a fresh process, unless it is kept, and keep it; None if only kept runs are wanted."""
    from _utils import write_result

    settings = {name: getattr(args, name) for name in (START if side == "start" else SETTINGS)}
    file = args.keep / f"{side}-{seed}.json"
    if file.is_file() and (kept := json.loads(file.read_text()))["settings"] == settings:
        return kept
    if args.collect:
        return None
    command = [sys.executable, __file__, "--child", side, "--seed", str(seed), "--model", args.model]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    result = {**json.loads(done.stdout.splitlines()[-1]), "settings": settings}
    write_result(file, result)
    print(f"{side}, seed {seed}: { {k: v for k, v in result.items() if k != 'curve'} }", file=sys.stderr, flush=True)
    return result


def summary(runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return means over seeds, the figures of each seed, and the curves."""
    by_seed = {name: [run["after"][name] for run in runs.values()] for name in ("right", "right_call")}
    return {
        "seeds": list(runs), "after": {name: statistics.fmean(of) for name, of in by_seed.items()},
        "after_by_seed": by_seed, "curves": [run["curve"] for run in runs.values()],
        **{name: statistics.fmean(run[name] for run in runs.values()) for name in ("tokens", "cpu_seconds")},
    }  # fmt: skip


def make_start(args: argparse.Namespace) -> str:
    """Return the folder of the warm-started model, which is made once."""
    from _utils import smollm2

    folder = args.keep / f"start_{args.warm_up_steps}"
    if not folder.is_dir():
        aside = args.keep / ".start"
        warm_up(smollm2(), aside, args.warm_up_steps, TEMPLATE, TEMPLATE)
        aside.rename(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=4200, help="that each run samples")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--top_layers", type=int, default=8, help="layers that LoRA is on, from the last")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--warm_up_steps", type=int, default=11, help="supervised steps of 4 conversations")
    parser.add_argument("--held_out", type=int, default=50, help="questions")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--keep", type=Path, default=ROOT / "out" / "tools_benchmark", help="folder of runs")
    parser.add_argument("--model", help="a warm-started model; SmolLM2-135M-Instruct is warmed up by default")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    parser.add_argument("--child", choices=("start", *SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run(args.child, args)))
        return
    from _utils import report

    args.model = args.model or make_start(args)
    start = child("start", 0, args)
    runs: dict[str, dict[int, dict]] = {side: {} for side in SIDES}
    for seed in args.seeds:
        for side, done in runs.items():
            if found := child(side, seed, args):
                done[seed] = found
    if start is None or not all(runs.values()):
        parser.error(f"{args.keep} has no run of one side with these settings yet")
    settings = {name: getattr(args, name) for name in SETTINGS}
    sides = {side: summary(done) for side, done in runs.items()}
    from importlib.metadata import version

    report("tools", {"before": start, **sides, **settings}, trl=version("trl"))


if __name__ == "__main__":
    main()
