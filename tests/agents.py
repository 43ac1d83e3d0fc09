"""A tiny model that has learned to call a tool, its tokenizer, and a tool; for the tests of turns."""

from __future__ import annotations

import functools
import string

import torch
from conftest import SIZES
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.chat_template_utils import qwen3_template

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<|im_end|>", "<unk>", "<|im_start|>", "<tool_call>", "</tool_call>", "<think>"]
CHARACTERS = string.printable[:95] + "\n"


def tool_tokenizer(chat_template=TEMPLATE, **attributes) -> PreTrainedTokenizerFast:
    """One token per character; <|im_end|> is EOS, with the id of the tiny models."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in SPECIAL[5:]])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<|im_end|>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"], padding_side="left", chat_template=chat_template,
    )  # fmt: skip
    fast.response_template = qwen3_template
    for name, value in attributes.items():
        setattr(fast, name, value)
    return fast


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


async def add_slowly(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def question(a: int, b: int) -> list[dict]:
    return [{"role": "user", "content": f"{a}+{b}"}]


def call(a: int, b: int, name: str = "add") -> str:
    """What the model writes to call the tool."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"a": {a}, "b": {b}}}}}\n</tool_call><|im_end|>'


def questions(n: int = 16) -> Dataset:
    sums = [(i % 3 + 1, i % 2 + 4) for i in range(n)]
    return Dataset.from_list([{"prompt": question(a, b), "sum": a + b} for a, b in sums])


def right_sum(prompts, completions, sum, **kwargs) -> list[float]:  # the column's name
    """Reward: whether the last message is the sum."""
    return [float(c[-1]["content"] == str(s)) for c, s in zip(completions, sum, strict=True)]


@functools.cache
def trained_weights() -> dict[str, torch.Tensor]:
    """Supervised steps on whole conversations, until the model calls the tool and repeats its answer."""
    tokenizer, model = tool_tokenizer(), make_tool_model(trained=False)
    tokenizer.padding_side = "right"
    texts = []
    for a, b in [(x, y) for x in (1, 2, 3) for y in (4, 5)]:
        tool = [{"type": "function", "function": {"name": "add"}}]
        prompt = tokenizer.apply_chat_template(question(a, b), tools=tool, add_generation_prompt=True, tokenize=False)
        answer = f"\n<|im_start|>tool\n{a + b}<|im_end|>\n<|im_start|>assistant\n{a + b}<|im_end|>"
        texts.append(prompt + call(a, b) + answer)
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
    return model.state_dict()


def make_tool_model(trained: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(SPECIAL) + len(CHARACTERS), "max_position_embeddings": 512}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, "hidden_size": 64}))
    if trained:
        model.load_state_dict(trained_weights())
    return model
