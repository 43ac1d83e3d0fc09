"""Texts of completions: which special tokens they keep, and what the generation prompt began of them."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_config, make_tokenizer
from datasets import Dataset

from ppo_plus.data.prompts import tokenize_prompts
from ppo_plus.models.generation import GenerateOutput
from ppo_plus.rollout.decoding import CompletionDecoder
from ppo_plus.rollout.environments import EnvironmentPool
from ppo_plus.rollout.responses import Responses
from ppo_plus.rollout.turns import TurnLoop

ASK = [{"role": "user", "content": "why"}]
STOP = 39  # the letter >
OTHER_EOS = 37  # <, an EOS of the model's own generation_config


def special_tokenizer(chat_template=CHAT_TEMPLATE):
    """Three letters stand for special tokens: @ for <tool_call>, < and > for tokens that end a response."""
    tokenizer = make_tokenizer(chat_template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["s", "<", ">"]})
    return tokenizer


def completions_of(tmp_path, prompt, tokens, tokenizer=None, **config):
    """What rewards get for one prompt and these response ids."""
    tokenizer = tokenizer or special_tokenizer()
    args = make_config(tmp_path, **config)
    ids = [tokenizer.eos_token_id, OTHER_EOS, *([STOP] if args.stop_token_id else [])]
    decoder = CompletionDecoder(tokenizer, args, ids)
    rows = list(tokenize_prompts(Dataset.from_list([{"prompt": prompt}]), tokenizer))
    tokens = torch.tensor([tokens])
    return decoder.decode(one_turn(rows, tokens, ids), {})[0]


def one_turn(rows, tokens, ids):
    """Responses of one turn with these token ids."""
    return Responses.from_single_turn(rows, GenerateOutput(tokens, torch.zeros(tokens.shape)), ids, train_on_eos=True)


def text_of(completions) -> str:
    (completion,) = completions.completions
    return completion if isinstance(completion, str) else completion[0]["content"]


LETTER = {letter: 4 + index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz .,!?'\n<|>_:")}


@pytest.mark.parametrize("prompt", [ASK, "why"], ids=["messages", "text"])
@pytest.mark.parametrize(
    ("end", "stop", "kept"),
    [(2, None, "sos"), (OTHER_EOS, None, "sos"), (STOP, STOP, "sos>"), (LETTER["a"], None, "sosa")],
    ids=["EOS", "EOS of the model", "stop_token_id", "none"],
)
def test_special_tokens_stay_if_asked_and_only_the_eos_goes(tmp_path, prompt, end, stop, kept):
    tokens = [LETTER["s"], LETTER["o"], LETTER["s"], end]
    config = {} if stop is None else {"stop_token_id": stop}
    completions = completions_of(tmp_path, prompt, tokens, skip_special_tokens=False, **config)
    assert text_of(completions) == kept
    assert completions.completion_ids == [tokens]  # whatever the text keeps
    assert text_of(completions_of(tmp_path, prompt, tokens, **config)) == kept.replace("s", "").replace(">", "")


def test_a_reward_model_reads_the_special_tokens_that_stay_and_one_eos(tmp_path):
    tokenizer = special_tokenizer()
    completions = completions_of(tmp_path, ASK, [LETTER["s"], LETTER["o"], 2], skip_special_tokens=False)
    assert completions.texts(tokenizer, {}) == ["<|user|>why<eos><|assistant|>so<eos>"]


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [(ASK, "think:"), ([*ASK, {"role": "assistant", "content": "think:"}], ""), ("why", "")],
    ids=["messages", "a reply begun", "text"],
)
def test_what_the_generation_prompt_began_is_given_beside_the_completion(tmp_path, prompt, opening):
    tokenizer = make_tokenizer(CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>think:{% endif %}"))
    completions = completions_of(tmp_path, prompt, [LETTER["h"], LETTER["m"], 2], tokenizer)
    assert completions.openings == [opening]
    assert completions.opening_ids == [[LETTER[letter] for letter in opening]]
    assert text_of(completions) == "hm"


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [("<|assistant|>think:", "think:"), ("<|assistant|>", ""), ("<|assistant|>think:<eos>", "")],
    ids=["by the template", "without the opening", "closed again"],
)
def test_prompts_of_rollout_func_have_the_opening_that_they_end_with(tmp_path, prompt, opening):
    tokenizer = make_tokenizer(CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>think:{% endif %}"))
    row = {"prompt": ASK, "input_ids": tokenizer(f"<|user|>why<eos>{prompt}")["input_ids"]}
    decoder = CompletionDecoder(tokenizer, make_config(tmp_path), [2])
    completions = decoder.decode(one_turn([row], torch.tensor([[LETTER["h"], 2]]), [2]), {})[0]
    assert completions.openings == [opening]
    assert completions.texts(tokenizer, {}) == [f"<|user|>why<eos><|assistant|>{opening}h<eos>"]


class Room:
    """An environment without tools, whose response is one turn."""

    def reset(self, **row) -> str:
        return "so"

    def get_reward(self) -> float:
        return 1.0


@pytest.mark.parametrize("skip", [True, False])
def test_an_environment_without_tools_is_decoded_as_any_one_turn(tmp_path, skip):
    template = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>think:{% endif %}")
    tokenizer, args = special_tokenizer(template), make_config(tmp_path, skip_special_tokens=skip)
    tokens = torch.tensor([[LETTER["s"], LETTER["o"], 2]])

    def generate(prefixes, uniforms, **kwargs):
        return GenerateOutput(tokens, torch.zeros(tokens.shape))

    loop = TurnLoop(EnvironmentPool(Room), tokenizer, args, [2], (None, len(tokenizer)))
    responses = loop([{"prompt": ASK}], torch.zeros(tokens.shape, dtype=torch.float64), generate)
    completions = CompletionDecoder(tokenizer, args, [2]).decode(responses, {})[0]
    assert text_of(completions) == ("o" if skip else "so")
    assert completions.texts(tokenizer, {}) == [f"<|user|>whyso<eos><|assistant|>think:{text_of(completions)}<eos>"]


def test_template_arguments_decide_what_the_generation_prompt_begins(tmp_path):
    """`enable_thinking` of a row before that of the run."""
    ends = "<|assistant|>{% if thinking %}think:{% endif %}{% endif %}"
    tokenizer = make_tokenizer(CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", ends))
    for run, row, opening in ((True, None, "think:"), (True, False, ""), (False, True, "think:"), (False, None, "")):
        args = make_config(tmp_path, chat_template_kwargs={"thinking": run})
        own = {} if row is None else {"chat_template_kwargs": json.dumps({"thinking": row})}
        dataset = Dataset.from_list([{"prompt": ASK, **own}])
        rows = list(tokenize_prompts(dataset, tokenizer, chat_template_kwargs=args.chat_template_kwargs))
        tokens = torch.tensor([[LETTER["h"], 2]])
        responses = one_turn(rows, tokens, [2])
        assert CompletionDecoder(tokenizer, args, [2]).decode(responses, {})[0].openings == [opening]
        assert tokenizer.decode(rows[0]["input_ids"]).endswith("<|assistant|>" + opening)
