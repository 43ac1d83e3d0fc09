"""A score per response: Python functions, sequence classifiers, and reward adapters on the actor's own backbone.

The contract of a reward function is that of TRL's GRPO and RLOO trainers, and one thing more: it may return a list
of numbers for a response, one per token, instead of one number. Those are paid at the tokens they belong to.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import inspect
import json
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from .adapters import WEIGHTS_FILE
from .data import is_conversational, left_pad, pad_id, right_pad, unpadded
from .modeling import CRITIC_ADAPTER, REFERENCE_ADAPTER, ActorCritic, at_last_token, place
from .out_of_memory import in_chunks
from .rollout import readable

REWARD_FILE = "reward_model.json"
REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass
class Completions:
    """What is scored: N prompts with their completions, and the other columns of the dataset.

    Attributes:
        prompts: text or messages, as in the dataset.
        completions: text, or one assistant message in a list where the prompt is messages.
        completion_ids: token ids, without padding.
        columns: further columns of the dataset, by name.
        context: `trainer_state`, `log_extra` and `log_metric`, handed to functions.
        prompt_ids: token ids, where that is what the dataset gave; `prompts` are then their text.
    """

    prompts: list
    completions: list
    completion_ids: list[list[int]]
    columns: dict[str, list] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    prompt_ids: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def texts(self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]) -> list[str]:
        """Prompt and completion as one text, through the chat template where they are messages."""
        return [
            cast(str, tokenizer.apply_chat_template(prompt + completion, tokenize=False, **chat_template_kwargs))
            if is_conversational(prompt)
            else prompt + completion
            for prompt, completion in zip(self.prompts, self.completions, strict=True)
        ]

    def pairs(self) -> list[tuple[str, str]]:
        """Question and answer as two texts; of a conversation, what was said before the answer, by lines."""
        return [
            ("\n".join(spoken(prompt)), "\n".join(spoken(completion)))
            if is_conversational(prompt)
            else (prompt, completion)
            for prompt, completion in zip(self.prompts, self.completions, strict=True)
        ]


def spoken(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The text of each message that has one; parts that are no text (images) are left out."""
    contents = [message.get("content") or "" for message in messages]
    parts = [[{"text": c}] if isinstance(c, str) else c for c in contents]
    return [" ".join(part.get("text") or "" for part in message) for message in parts]


# What a reward gives a response: a score, one number per token, or nothing.
Score = float | list[float] | None


class Reward(Protocol):
    """Scores completions; `None` where a reward does not apply."""

    name: str

    def __call__(self, batch: Completions) -> Sequence[Score]:
        """One score per completion, or a list of one per token of it; reward units."""
        ...


class FunctionReward:
    """A Python function, sync or async: `f(prompts=, completions=, completion_ids=, **columns, ...) -> list`.

    Args:
        function: what to call.
        name: what metrics and errors call it.
        timeout: seconds that it may take; None waits for ever.
    """

    def __init__(self, function: Callable, name: str, timeout: float | None = None) -> None:
        self.function, self.name, self.timeout = function, name, timeout

    def __call__(self, batch: Completions) -> Sequence[Score]:
        """Call the function; and wait for it if it is async."""
        result = self.begin(batch)
        if inspect.isawaitable(result):
            (result,) = gathered([(self, result)], batch)
        return self.finish(result, batch)

    def begin(self, batch: Completions) -> Any:
        """What the function returns: scores, or an awaitable of them where it is async."""
        call = functools.partial(
            self.function,
            prompts=batch.prompts,
            completions=batch.completions,
            completion_ids=batch.completion_ids,
            **{**batch.columns, **batch.context},
        )
        try:
            return call() if self.timeout is None else within(self.timeout, call)
        except Unanswered:
            return self.too_late(batch)
        except Exception as error:
            return error

    def finish(self, result: Any, batch: Completions) -> Sequence[Score]:
        """The scores, checked; an error that the function raised is raised here, with its name."""
        if isinstance(result, Exception):
            result.add_note(f"This was raised by the reward function {self.name!r}, given {len(batch)} completions.")
            raise result
        return checked(result, batch, self.name)

    def too_late(self, batch: Completions) -> TimeoutError:
        """The error of a function that did not answer in time."""
        prompts = ", ".join(repr(prompt)[:80] for prompt in batch.prompts[:3])
        return TimeoutError(
            f"The reward function {self.name!r} did not answer within reward_timeout={self.timeout} seconds; it was "
            f"given {len(batch)} completions, of the prompts {prompts}{', ...' if len(batch) > 3 else ''}. Python "
            "cannot stop a function, so it may go on in the background until the process ends."
        )


class Unanswered(Exception):
    """A call that did not return in time."""


def within(seconds: float | None, call: Callable[[], Any]) -> Any:
    """Call in a thread of its own, and leave it to itself after some seconds.

    The thread is a daemon: one that never returns does not keep the process from ending.

    Raises:
        Unanswered: it did not return in time.
    """
    outcome: list[tuple[Any, BaseException | None]] = []
    gradients = torch.is_grad_enabled()  # torch keeps this by thread

    def run() -> None:
        try:
            with torch.set_grad_enabled(gradients):
                outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="reward function")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise Unanswered
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def gathered(waiting: Sequence[tuple[FunctionReward, Any]], batch: Completions) -> list[Any]:
    """Await what async reward functions returned, all at once; errors stand in the place of results."""
    answers: dict[int, Any] = {}

    async def wait_for(index: int, reward: FunctionReward, awaitable: Any) -> None:
        async def answer() -> Any:
            return await awaitable

        task = asyncio.ensure_future(answer())
        done, _ = await asyncio.wait([task], timeout=reward.timeout)
        task.cancel()
        if done:
            answers[index] = task.exception() or task.result()

    async def wait_for_all() -> None:
        await asyncio.gather(*(wait_for(index, *pair) for index, pair in enumerate(waiting)))

    timeouts = [reward.timeout for reward, _ in waiting]
    # An async function may block its loop, or not let itself be cancelled; a second more than all were given is enough
    # to know, and the next rollout gets another loop.
    longest = None if None in timeouts else max(cast(list[float], timeouts)) + 1.0
    pending = asyncio.run_coroutine_threadsafe(wait_for_all(), event_loop())
    if not wait([pending], longest).done:
        event_loop.cache_clear()
    return [answers.get(index, reward.too_late(batch)) for index, (reward, _) in enumerate(waiting)]


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The loop of all async reward functions, in a thread of its own: a notebook's own loop is running already.

    It lives as long as the process, so that a client which a function opened in one rollout serves the next too.
    """
    loop = asyncio.new_event_loop()

    def run() -> None:
        with torch.no_grad():  # torch keeps this by thread, and rewards are never differentiated
            loop.run_forever()

    threading.Thread(target=run, daemon=True, name="async reward functions").start()
    return loop


class ClassifierReward:
    """A sequence classifier with one label and its own tokenizer.

    An encoder (BERT, DeBERTa) whose tokenizer has no chat template reads question and answer as a pair of texts, the
    way such reward models are trained. Every other classifier reads one text: through its own chat template where
    prompts are messages. `Reader` says what happens to a text that is longer than the model reads.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        batch_size: int,
        chat_template_kwargs: dict[str, Any],
    ) -> None:
        config = getattr(model, "config", None)
        labels = getattr(config, "num_labels", 1)
        if labels != 1:
            raise ValueError(f"The reward model {name!r} has num_labels={labels}; a reward model needs num_labels=1.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if config is not None:  # sequence classifiers read the score at the last token that is not padding
            config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.batch_size, self.chat_template_kwargs = batch_size, chat_template_kwargs
        self.read = Reader(tokenizer, name, most_tokens(model, tokenizer))
        self.reads_pairs = type(config) in MODEL_FOR_MASKED_LM_MAPPING and tokenizer.chat_template is None

    def __call__(self, batch: Completions) -> Sequence[Score]:
        """Score prompt and completion, rendered with this model's own template and tokenizer."""
        texts = batch.pairs() if self.reads_pairs else batch.texts(self.tokenizer, self.chat_template_kwargs)
        device = next(self.model.parameters()).device

        def score(texts: list) -> Tensor:
            inputs = self.read(texts, batch).to(device)
            self._check_vocabulary(int(inputs["input_ids"].max()))
            return self.model(**inputs).logits[:, 0].float()

        scores, self.batch_size = in_batches(texts, self.batch_size, score)
        return checked(scores, batch, self.name)

    def _check_vocabulary(self, largest: int) -> None:
        known = getattr(getattr(self.model, "config", None), "vocab_size", None)
        if known is not None and largest >= known:
            raise ValueError(
                f"The reward model {self.name!r} has embeddings for {known} tokens, but its tokenizer gave the id "
                f"{largest}. Pass the reward model's own tokenizer in reward_processing_classes."
            )


class AdapterReward:
    """A reward adapter mounted on the actor's backbone: a reward model for the memory of its LoRA weights."""

    def __init__(
        self,
        path: Path,
        model: ActorCritic,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        batch_size: int,
        chat_template_kwargs: dict[str, Any],
    ) -> None:
        self.info = reward_description(path)
        check_same_template(path, self.info, tokenizer)
        self.head = model.mount_reward(name, path)
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.batch_size, self.chat_template_kwargs = batch_size, chat_template_kwargs
        self.read = Reader(tokenizer, name, model.context)
        self._seen: dict[tuple[int, ...], Tensor] = {}  # of the last batch: scores at its tokens, by the tokens

    def __call__(self, batch: Completions) -> Sequence[Score]:
        """Score prompt and completion as the stand-alone reward model would.

        Prompts that are token ids are read as they are, and so are the tokens that were sampled after them.
        """
        texts: list = self._texts(batch) if batch.prompt_ids is None else self._sequences(batch.prompt_ids, batch)
        self._seen.clear()

        def score(texts: list) -> Tensor:
            inputs = self.read(texts, batch)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            scores = self._token_scores(ids, mask)
            for row, at_tokens in zip(unpadded(ids, mask), scores, strict=True):
                self._seen[self._before_eos(row)] = at_tokens
            return at_last_token(scores, ids, pad_id(self.tokenizer))

        scores, self.batch_size = in_batches(texts, self.batch_size, score)
        return checked(scores, batch, self.name)

    # The reward model was trained on texts that end in EOS.

    def _texts(self, batch: Completions) -> list[str]:
        texts, eos = batch.texts(self.tokenizer, self.chat_template_kwargs), cast(str, self.tokenizer.eos_token)
        if is_conversational(batch.prompts[0]):
            return texts
        return [text if text.endswith(eos) else text + eos for text in texts]

    def _sequences(self, prompt_ids: list[list[int]], batch: Completions) -> list[list[int]]:
        eos = cast(int, self.tokenizer.eos_token_id)
        sequences = [prompt + completion for prompt, completion in zip(prompt_ids, batch.completion_ids, strict=True)]
        return [ids if ids[-1] == eos else [*ids, eos] for ids in sequences]

    @torch.no_grad()
    def prefix_scores(self, sequences: Sequence[list[int]]) -> list[Tensor]:
        """Scores of each sequence as far as each of its tokens, but for an EOS at its end; float32, reward units.

        Costs nothing where the last texts scored have just these tokens; others are read here.
        """
        ends = self.tokenizer.eos_token_id
        keys = [tuple(s[:-1] if s[-1] == ends else s) for s in sequences]
        missing = [key for key in keys if key not in self._seen]

        def score_rows(rows: Tensor) -> None:
            chosen = [missing[int(i)] for i in rows]
            scores = self._token_scores(*left_pad(chosen, pad_id(self.tokenizer)))
            self._seen.update((key, at_tokens[-len(key) :]) for key, at_tokens in zip(chosen, scores, strict=True))

        order = torch.tensor([len(key) for key in missing], dtype=torch.int64).argsort(stable=True)
        self.batch_size = in_chunks(order, self.batch_size, score_rows)
        return [self._seen[key][: len(key)] for key in keys]

    def _token_scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        device, lengths = self.model.device, attention_mask.sum(1).tolist()
        inputs = input_ids.to(device), attention_mask.to(device)
        return self.model.token_scores(self.name, self.head, *inputs, lengths).cpu()

    def _before_eos(self, ids: list[int]) -> tuple[int, ...]:
        # The last EOS and what a chat template puts behind it were not sampled, or end what was.
        ends = [i for i, token in enumerate(ids) if token == self.tokenizer.eos_token_id]
        return tuple(ids[: ends[-1]] if ends else ids)


class Reader:
    """Makes right-padded inputs of texts, pairs of texts or token ids, and says once where there are too many tokens.

    One text keeps its end, where the response is, and its first token if that is a special one (BOS, CLS). Of a pair
    the longer text is cut.

    Args:
        tokenizer: of the reward model.
        name: of the reward model.
        longest: most tokens that it reads; None where there is no limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, longest: int | None) -> None:
        self.tokenizer, self.name, self.longest = tokenizer, name, longest
        self._said = False

    def __call__(self, texts: list, batch: Completions) -> BatchEncoding:
        """Inputs of the reward model, `(B, T)` each; a chat template has put its special tokens in already."""
        options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "padding_side": "right", "verbose": False}
        pairs, tokenized = isinstance(texts[0], tuple), isinstance(texts[0], list)
        if pairs:
            questions, answers = map(list, zip(*texts, strict=True))
            options |= {"text": questions, "text_pair": answers}
        else:
            options |= {"text": texts, "add_special_tokens": not is_conversational(batch.prompts[0])}
        if tokenized:
            input_ids, attention_mask = right_pad(texts, pad_id(self.tokenizer))
            inputs = BatchEncoding({"input_ids": input_ids, "attention_mask": attention_mask})
        else:
            inputs = self.tokenizer(**options)
        tokens = inputs["input_ids"].shape[1]
        if self.longest is None or tokens <= self.longest:
            return inputs
        if not self._said:
            self._said = True
            warnings.warn(
                f"The reward model {self.name!r} reads {self.longest} tokens, but prompt and response have up to "
                f"{tokens}: {'the longer of the two is cut' if pairs else 'the beginning of the prompt is left out'}. "
                "Lower max_prompt_length or response_length, or take a reward model that reads more.",
                stacklevel=2,
            )
        if pairs:
            return self.tokenizer(**options, truncation=True, max_length=self.longest)
        return self._ends(inputs, self.longest)

    def _ends(self, inputs: BatchEncoding, longest: int) -> BatchEncoding:
        kept = {name: tensor[:, :longest].clone() for name, tensor in inputs.items()}
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            if length > longest:
                first = int(inputs["input_ids"][row, 0].item() in self.tokenizer.all_special_ids)
                for name, tensor in inputs.items():
                    kept[name][row, first:] = tensor[row, length - longest + first : length]
        return BatchEncoding(kept)


def most_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens a classifier reads: what its tokenizer says, and no more than it has positions for."""
    config = getattr(model, "config", None)
    positions = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = module.num_embeddings - module.padding_idx - 1  # RoBERTa counts on from its padding id
    limits = (tokenizer.model_max_length, positions)
    return min((n for n in limits if n is not None and 0 < n < VERY_LARGE_INTEGER), default=None)


@torch.no_grad()
def in_batches(texts: list, batch_size: int, score: Callable[[list], Tensor]) -> tuple[list[float], int]:
    """Score texts (or pairs of them, or token ids) of similar length together.

    Returns:
        the scores in the order of the texts, and the batch size that fitted into memory.
    """
    sizes = [len("".join(text)) if isinstance(text, str | tuple) else len(text) for text in texts]
    order = torch.tensor(sizes).argsort(stable=True)
    scores = torch.zeros(len(texts))

    def score_rows(rows: Tensor) -> None:
        scores[rows] = score([texts[int(i)] for i in rows]).cpu()

    batch_size = in_chunks(order, batch_size, score_rows)
    return scores.tolist(), batch_size


def checked(scores: Any, batch: Completions, name: str) -> list[Score]:
    """Scores as a list of finite floats, lists of them, or None; anything else is named with its prompt."""
    if isinstance(scores, Tensor):
        scores = scores.tolist()
    listed = hasattr(scores, "__len__") and getattr(scores, "ndim", 1) > 0
    if not listed or isinstance(scores, str | bytes | Mapping | Set):
        raise ValueError(
            f"The reward function {name!r} returned {scores!r}; it must return a list with one number each."
        )
    if len(scores) != len(batch):
        raise ValueError(f"The reward function {name!r} returned {len(scores)} rewards for {len(batch)} completions.")
    result: list[Score] = []
    for row, value in enumerate(scores):
        per_token = isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0
        if per_token and len(value) != len(batch.completion_ids[row]):
            raise ValueError(
                f"The reward function {name!r} returned {len(value)} numbers for prompt {batch.prompts[row]!r}, whose "
                f"completion has {len(batch.completion_ids[row])} tokens; return one number, or one per token of "
                "completion_ids."
            )
        numbers = [_finite(v) for v in (value if per_token else [0.0 if value is None else value])]
        if None in numbers:
            raise ValueError(
                f"The reward function {name!r} returned {value!r} for prompt {batch.prompts[row]!r} with completion "
                f"{batch.completions[row]!r}; return a finite number, or None where the reward does not apply."
            )
        finite = cast(list[float], numbers)
        result.append(None if value is None else finite if per_token else finite[0])
    return result


def _finite(value: Any) -> float | None:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Scores:
    """What all rewards of a run say of N completions of at most R tokens, in reward units.

    Attributes:
        by_function: `(N, F)` float32; the sum where a function scored tokens, NaN where it returned None.
        per_token: the weighted sum of token-level rewards, `(N, R)` float32.
        total: weighted sum over functions and tokens, `(N,)` float32; NaN for rows that no function scored.
    """

    by_function: Tensor
    per_token: Tensor
    total: Tensor


class RewardSet:
    """All rewards of a run, weighted.

    Args:
        rewards: at least one.
        weights: one each; `None` means 1.
        on_error: "raise", or "skip" to go on without a reward function that failed, as if it had returned None.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None, on_error: str = "raise") -> None:
        check_weights(weights, len(rewards))
        self.on_error = on_error
        self.rewards = list(rewards)
        self.weights = torch.tensor(list(weights) if weights is not None else [1.0] * len(rewards))

    @property
    def names(self) -> list[str]:
        """Names for metrics, one per reward, distinct."""
        return [reward.name for reward in self.rewards]

    def __call__(self, batch: Completions) -> Scores:
        """Score completions: functions in their order, then async ones, which run side by side."""
        by_reward = self._all_scores(batch)
        by_function = torch.tensor([[_sum(s) for s in scores] for scores in by_reward], dtype=torch.float32).T
        per_token = torch.zeros(len(batch), max(map(len, batch.completion_ids), default=0))
        for weight, scores in zip(self.weights, by_reward, strict=True):
            for row, score in enumerate(scores):
                if isinstance(score, list):
                    per_token[row, : len(score)] += weight * torch.tensor(score)
        unscored = by_function.isnan().all(1)
        if unscored.any():
            row = int(unscored.nonzero()[0])
            warnings.warn(
                f"Every reward function returned None for {int(unscored.sum())} of {len(batch)} responses, which "
                f"are left out of learning; the first has prompt {batch.prompts[row]!r}.",
                stacklevel=2,
            )
        total = torch.where(unscored, torch.nan, (by_function * self.weights).nansum(1))
        return Scores(by_function, per_token, total)

    def prefix_scores(self, sequences: Sequence[list[int]]) -> list[Tensor] | None:
        """The weighted sum of what reward adapters say of each sequence as far as each of its tokens.

        None where there is no reward adapter. Other rewards can only be asked at the end.
        """
        adapters = [
            (weight, r) for weight, r in zip(self.weights, self.rewards, strict=True) if isinstance(r, AdapterReward)
        ]
        by_adapter = [[weight * scores for scores in r.prefix_scores(sequences)] for weight, r in adapters]
        return [sum(scores[1:], scores[0]) for scores in zip(*by_adapter, strict=True)] if adapters else None

    def _all_scores(self, batch: Completions) -> list[Sequence[Score]]:
        functions = [reward for reward in self.rewards if isinstance(reward, FunctionReward)]
        begun = {reward.name: reward.begin(batch) for reward in functions}
        waiting = [(reward, begun[reward.name]) for reward in functions if inspect.isawaitable(begun[reward.name])]
        if waiting:  # together: what they wait for, they wait for at the same time
            answers = gathered(waiting, batch)
            begun |= {reward.name: answer for (reward, _), answer in zip(waiting, answers, strict=True)}
        return [self._scores(reward, batch, begun) for reward in self.rewards]

    def _scores(self, reward: Reward, batch: Completions, begun: dict[str, Any]) -> Sequence[Score]:
        try:
            return reward.finish(begun[reward.name], batch) if isinstance(reward, FunctionReward) else reward(batch)
        except Exception as error:
            if self.on_error == "raise":
                raise
            warnings.warn(f"{reward.name!r} is left out of this rollout: {type(error).__name__}: {error}", stacklevel=3)
            return [None] * len(batch)


def _sum(score: Score) -> float:
    if score is None:
        return math.nan
    return math.fsum(score) if isinstance(score, list) else score


def check_weights(weights: Sequence[float] | None, count: int) -> None:
    """Refuse weights that are not one per reward function."""
    if weights is not None and len(weights) != count:
        raise ValueError(f"reward_weights has {len(weights)} numbers for {count} reward functions; give one each.")


def listed_rewards(reward_funcs: Any, tokenizers: Any) -> tuple[list, list]:
    """Reward functions and their tokenizers, as two lists of the same length."""
    funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    own = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(funcs)
    if not funcs or any(f is None for f in funcs):
        raise ValueError("PPOTrainer needs reward_funcs: a function, a reward model, an adapter folder, or a list.")
    if len(own) != len(funcs):
        raise ValueError(
            f"reward_processing_classes has {len(own)} entries for {len(funcs)} reward functions; give one each, None "
            "for a function."
        )
    for func in funcs:
        if not callable(func) and not isinstance(func, str | Path):
            raise TypeError(f"A reward function is a function, a model, or a name; got {func!r}.")
    return funcs, own


def check_call(function: Callable, columns: Sequence[str]) -> None:
    """Refuse a reward function that could not be called with these columns of the dataset."""
    name, taken = reward_name(function), [c for c in columns if c in REWARD_ARGUMENTS]
    if taken:
        raise ValueError(
            f"train_dataset has a column {taken[0]!r}, but reward functions get something else by that name: use "
            f"dataset.rename_column({taken[0]!r}, '...')."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have none
        return
    try:
        signature.bind(**dict.fromkeys([*REWARD_ARGUMENTS, *columns]))
    except TypeError as error:
        raise ValueError(
            f"The reward function {name!r} cannot be called: {error}. It gets {', '.join(REWARD_ARGUMENTS)} and the "
            f"further columns that train_dataset has, {list(columns)}; end its signature in **kwargs."
        ) from error


def build_rewards(
    reward_funcs: Any,
    tokenizers: Any,
    model: ActorCritic,
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: Sequence[float] | None,
    batch_size: int,
    chat_template_kwargs: dict[str, Any],
    on_error: str = "raise",
    timeout: float | None = None,
) -> RewardSet:
    """Turn what the user passed (functions, models, names, adapter folders, lists of these) into rewards."""
    funcs, own = listed_rewards(reward_funcs, tokenizers)
    options: dict[str, Any] = {"batch_size": batch_size, "chat_template_kwargs": chat_template_kwargs}
    rewards: list[Reward] = []
    for func, its_tokenizer in zip(funcs, own, strict=True):
        taken = ["default", REFERENCE_ADAPTER, CRITIC_ADAPTER, *(r.name for r in rewards)]
        if adapter_folder(func) is not None:
            # An adapter's weights are told from others by its name among the parts of theirs.
            taken += {part for weight, _ in model.policy.named_parameters() for part in weight.split(".")}
        name = unique_name(reward_name(func), taken)
        rewards.append(_build_reward(func, its_tokenizer, name, model, tokenizer, options, timeout))
    return RewardSet(rewards, weights, on_error)


def _build_reward(
    func: Any,
    own: Any,
    name: str,
    model: ActorCritic,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
    timeout: float | None,
) -> Reward:
    adapter, reward = adapter_folder(func), func
    if adapter is not None:
        return AdapterReward(adapter, model, tokenizer, name, **options)
    if isinstance(func, str | Path):
        own = own or own_tokenizer(func)
        func, missing = load_classifier(str(func), dtype="auto")
        if missing:
            raise ValueError(
                f"{str(reward)!r} is no trained reward model: its files lack {', '.join(missing[:3])}, which would be "
                "drawn at random, and so would rewards. Pass what RewardTrainer wrote, or a classifier with one label."
            )
    if isinstance(func, nn.Module):
        place(func, model.device)
        return ClassifierReward(func, own or own_tokenizer(func) or tokenizer, name, **options)
    return FunctionReward(func, name, timeout)


def load_classifier(name: str, dtype: torch.dtype | str) -> tuple[PreTrainedModel, list[str]]:
    """A sequence classifier with one label, and the names of those of its weights that its files do not hold.

    Raises:
        ValueError: it was trained with another number of labels.
    """
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=1, dtype=dtype, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True
    )
    if info["mismatched_keys"]:
        raise ValueError(
            f"{name!r} was trained with more than one label, so its outputs are classes. A reward model or critic "
            "gives one number: train one with num_labels=1."
        )
    return model, sorted(info["missing_keys"])


def own_tokenizer(reward: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a reward model was saved with; None for an instance that does not say where it came from.

    Raises:
        ValueError: there is none, or it knows no text: for a folder that has only a model, transformers may make one
            up that turns every text into unknown tokens.
    """
    named = isinstance(reward, str | Path)
    source = str(reward) if named else getattr(getattr(reward, "config", None), "_name_or_path", "")
    if not source:
        return None
    fix = "Pass the reward model's tokenizer in reward_processing_classes, or save it beside the model"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The tokenizer of the reward model {source!r} cannot be loaded: {reason} {fix}.") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"The reward model {source!r} was saved without a tokenizer, so it could read no text. {fix}.")
    return tokenizer


def reward_name(func: Any) -> str:
    """What metrics call a reward: the function's name, or the last part of the model's."""
    if isinstance(func, nn.Module):
        func = getattr(getattr(func, "config", None), "_name_or_path", "") or type(func).__name__
    if isinstance(func, str | Path):
        return Path(str(func).rstrip("/")).name
    return getattr(func, "__name__", type(func).__name__)


def unique_name(name: str, taken: Sequence[str]) -> str:
    """The name, numbered if it is taken (and never a dotted one: PEFT uses it as the name of a module)."""
    name = name.replace(".", "_")
    numbered = (f"{name}_{i}" for i in range(2, 1000))
    return name if name not in taken else next(n for n in numbered if n not in taken)


def adapter_folder(model: Any) -> Path | None:
    """The local folder of a PEFT adapter, downloaded if it is on the Hub; None for whatever is no adapter's name."""
    if not isinstance(model, str | Path):
        return None
    local = Path(model)
    if (local / CONFIG_NAME).is_file():
        if not (local / WEIGHTS_FILE).is_file():
            raise ValueError(f"{model} has an {CONFIG_NAME} but no {WEIGHTS_FILE}: no weights.")
        return local
    if local.exists():
        return None
    try:
        for file in (CONFIG_NAME, WEIGHTS_FILE):
            found = hf_hub_download(str(model), file)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return None
    with contextlib.suppress(HfHubHTTPError, LocalEntryNotFoundError):
        hf_hub_download(str(model), REWARD_FILE)  # an adapter that was trained elsewhere says nothing about itself
    return Path(found).parent


def check_same_base(path: Path, base: str) -> None:
    """Refuse an adapter that was trained on another base than the actor's."""
    config = PeftConfig.from_pretrained(str(path))
    theirs = reward_description(path).get("base_model") or config.base_model_name_or_path or ""
    names = [Path(name).name.lower().removesuffix("-bnb-4bit").removesuffix("-unsloth") for name in (theirs, base)]
    if all(names) and names[0] != names[1]:
        raise ValueError(
            f"The reward adapter in {path} was trained on {theirs!r}, the actor's base is {base!r}: its numbers mean "
            "nothing there. Train one on the actor's base (or, if this is the same base under another name, put that "
            f"name into {REWARD_FILE} and {CONFIG_NAME})."
        )


def reward_description(path: Path) -> dict[str, Any]:
    """What `RewardTrainer` wrote about a reward model; empty where it was trained by something else."""
    file = path / REWARD_FILE
    if not file.is_file():
        return {}
    with readable(file):
        return cast(dict, json.loads(file.read_text()))


def check_same_template(path: Path, info: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Name both sides where a reward adapter was trained with another chat template than the actor's."""
    template = info.get("chat_template_sha256")
    if "chat_template_sha256" in info and template != template_hash(tokenizer):
        warnings.warn(
            f"The reward adapter in {path} was trained with the chat template {str(template)[:12]}, the actor's "
            f"tokenizer has {str(template_hash(tokenizer))[:12]}; conversations would be scored in another form.",
            stacklevel=2,
        )


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the chat template, or None where there is none."""
    template = tokenizer.chat_template
    return None if template is None else hashlib.sha256(json.dumps(template).encode()).hexdigest()
