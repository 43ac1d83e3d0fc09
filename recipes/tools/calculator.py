"""Sums that a calculator solves: prompts, a warm start on a few conversations, then PPO with the tool.

    python recipes/tools/calculator.py [--config recipes/tools/ppo.yaml] [--base HuggingFaceTB/SmolLM2-135M-Instruct]
        [--warm_up_steps 60] [arguments of ppo-plus ppo]

The warm start writes a model to the folder `model_name_or_path` of the configuration, unless it is there: a small
model that has never seen a tool would not call one, and PPO learns from what it samples.
"""

from __future__ import annotations

import argparse
import ast
import operator
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import get_json_schema
from trl.chat_template_utils import qwen2_5_chat_template, qwen2_5_training_chat_template

from ppo_plus.cli.launch import run

OPERATIONS: dict[type, Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculate(expression: str) -> int:
    """Calculate a sum, a difference or a product of whole numbers.

    Args:
        expression: What to calculate, such as 12 * 3 + 4.
    """

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        return int(node.value)  # type: ignore[attr-defined]

    return value(ast.parse(expression, mode="eval").body)


def right_answer(completions: list, answer: list[int], **kwargs: Any) -> list[float]:
    """Reward: 1 if the last message ends with the result, and it is the policy's own.

    The end, because a question or a list of numbers may contain the result.
    """
    last = [messages[-1] for messages in completions]
    return [
        float(message["role"] == "assistant" and message["content"].split()[-1:] == [str(number)])
        for message, number in zip(last, answer, strict=True)
    ]


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return questions with two operations on numbers of two digits."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        a, b, c = (draw.randrange(10, 100) for _ in range(3))
        expression = f"{a} {draw.choice('+-*')} {b} {draw.choice('+-')} {c}"
        system = {"role": "system", "content": "Use the calculator."}
        prompt = [system, {"role": "user", "content": f"What is {expression}?"}]
        rows.append({"prompt": prompt, "expression": expression, "answer": calculate(expression)})
    return rows


def warm_up(
    base: str,
    folder: Path,
    steps: int,
    chat_template: str = qwen2_5_chat_template,
    training_template: str = qwen2_5_training_chat_template,
) -> None:
    """Train a base on conversations with one call each, and save it with a chat template that has tools.

    `training_template` is the same template with markers around what the model generates.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer, tools = torch.optim.AdamW(model.parameters(), lr=2e-5), [get_json_schema(calculate)]
    for step in range(steps):
        loss = torch.zeros(())
        for row in make_rows(4, seed=10_000 + step):
            call = {"name": "calculate", "arguments": {"expression": row["expression"]}}
            messages = [
                *row["prompt"],
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
                {"role": "tool", "name": "calculate", "content": str(row["answer"])},
                {"role": "assistant", "content": f"It is {row['answer']}"},
            ]
            batch = tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=training_template, return_dict=True,
                return_assistant_tokens_mask=True,
            )  # fmt: skip
            ids, sampled = torch.tensor([batch["input_ids"]]), torch.tensor([batch["assistant_masks"]])
            loss = loss + model(input_ids=ids, labels=ids.masked_fill(sampled == 0, -100)).loss / 4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.chat_template = chat_template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).with_name("ppo.yaml")))
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a model on the Hub, or a folder")
    parser.add_argument("--warm_up_steps", type=int, default=60)
    args, arguments = parser.parse_known_args()
    config = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    start, data = Path(config["model_name_or_path"]), Path(config["dataset_name"])
    for split, count, seed in (("train", 4096, 0), ("test", 64, 1)):
        if not data.is_dir() or not (data / f"{split}.jsonl").is_file():
            Dataset.from_list(make_rows(count, seed)).to_json(data / f"{split}.jsonl")
    if not start.is_dir():
        warm_up(args.base, start, args.warm_up_steps)
    run("ppo", ["--config", args.config, *arguments])


if __name__ == "__main__":
    main()
