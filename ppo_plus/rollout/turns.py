"""The loop of turns: the policy answers, its tool calls are run, it reads their results and answers again.

The contract is that of TRL 1.16's GRPOTrainer. Token ids are concatenated and never tokenized again; an error of a tool
is its answer; a result that does not fit into `response_length` is rolled back, and the response ends.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import parse_response

from ..config import PPOConfig
from ..data.chat_templates import merge_template_kwargs
from ..data.padding import pad_id
from ..data.prompts import Row, check_ids, encode_prompt, truncate_prompt
from ..data.tool_templates import tool_suffix_ids
from ..models.generation import GenerateOutput
from ..models.turn_cache import TurnCache
from ..rewards.functions import (
    CallTimeout,
    call_with_timeout,
    event_loop,
    exit_error,
    poll,
    without_autocast,
    without_exit,
)
from ..utils.interrupt import interruptible, raise_if_interrupted
from .environments import EnvironmentPool, Tools, is_text
from .responses import Responses, Segments

# Samples one turn: prompts as token ids, and uniforms `(N, R)` float64, NaN where a row may not sample any more; with
# `turn_caches`, the caches of the rows' earlier turns, which it replaces, and `on_row_end`, which it may call with the
# index and the tokens of a row that ends before others.
Generate = Callable[..., GenerateOutput]


@dataclass
class Turn:
    """One turn of the policy: tokens, message, and the tool calls that were started: name, and result or future."""

    ids: list[int]
    message: dict[str, Any]
    started: list[tuple[str, Any]] | None = None


@dataclass
class Episode:
    """One response while it grows.

    Attributes:
        row: row of the dataset, with the prompt after `reset`.
        schemas: tools that the prompt shows.
        tools: what a call may name.
        response: its tokens.
        messages: its messages: the policy's, and those of tools.
        num_calls: tool calls.
        num_failures: tool calls that were answered by an error.
        cache: keys and values of all tokens but those after its last turn; None where they are not kept.
        turn: the last turn.
    """

    row: Row
    schemas: list[dict[str, Any]]
    tools: Tools
    response: Segments = field(default_factory=Segments)
    messages: list[dict[str, Any]] = field(default_factory=list)
    num_calls: int = 0
    num_failures: int = 0
    cache: TurnCache | None = None
    turn: Turn | None = None

    def start(self, turn: Turn, start: Callable[[Tools, Mapping[str, Any]], tuple[str, Any]]) -> None:
        """Start the tool calls of a turn."""
        self.turn, turn.started = turn, []
        for call in turn.message["tool_calls"]:
            turn.started.append(start(self.tools, call))

    def cancel(self) -> None:
        """Cancel the async tools that run."""
        for _, result in (self.turn and self.turn.started) or ():
            if isinstance(result, Future):
                result.cancel()


class TurnLoop:
    """Generates responses of several turns.

    Args:
        environments: environments and tools.
        tokenizer: renders prompts and results, and parses calls; from `prepare_tool_tokenizer`.
        args: lengths, the limit of turns, the time-out of tools.
        stop_ids: ids that end a turn.
        limits: most tokens of prompt and response together (None: no limit), and number of token embeddings.
    """

    def __init__(
        self, environments: EnvironmentPool, tokenizer: PreTrainedTokenizerBase, args: PPOConfig,
        stop_ids: Sequence[int], limits: tuple[int | None, int],
    ) -> None:  # fmt: skip
        self.environments, self.tokenizer, self.args, self.stop_ids = environments, tokenizer, args, list(stop_ids)
        self.context, self.num_embeddings = limits
        # A longer text cannot fit, whatever its tokens; tokenizing megabytes would take seconds.
        self.max_characters = args.response_length * max(map(len, tokenizer.get_vocab()))

    def __call__(self, rows: Sequence[Row], uniforms: Tensor, generate: Generate) -> Responses:
        """Answer the prompts of these rows; `uniforms` decide all tokens of a response, `(N, R)` float64."""
        pool = self.environments
        environments = pool.take(rows) if pool.factories else None
        episodes = [self._begin(row, environments and environments[i]) for i, row in enumerate(rows)]
        try:
            self._take_turns(episodes, uniforms, generate)
        except BaseException:  # a signal among them
            for episode in episodes:
                episode.cancel()
            raise
        counts = torch.tensor([[e.num_calls, e.num_failures] for e in episodes]) if pool.has_tools else None
        return Responses.from_segments(
            [e.row for e in episodes], [e.response for e in episodes], self.stop_ids, pad_id(self.tokenizer),
            train_on_eos=self.args.train_on_eos, environments=environments, tool_counts=counts,
            messages=[e.messages for e in episodes] if pool.has_tools else None,
            schemas=[e.schemas for e in episodes] if pool.has_tools else None,
        )  # fmt: skip

    def _take_turns(self, episodes: Sequence[Episode], uniforms: Tensor, generate: Generate) -> None:
        """Sample turns and run their tool calls until no response continues."""
        limit, iteration, active = self.args.max_tool_calling_iterations, 0, list(range(len(episodes)))
        while active:
            is_last = limit is not None and iteration >= limit
            self._take_turn(episodes, active, uniforms, generate, may_call=not is_last)
            calling = [i for i in active if episodes[i].messages[-1].get("tool_calls")]
            if is_last:
                break
            iteration += 1
            answers = self._answer([episodes[i] for i in calling])
            continues = [self._observe(episodes[i], answer) for i, answer in zip(calling, answers, strict=True)]
            # A response that the result fills ends with it.
            full = self.args.response_length
            active = [
                i for i, goes_on in zip(calling, continues, strict=True)
                if goes_on and len(episodes[i].response.ids) < full
            ]  # fmt: skip

    def _begin(self, row: Row, environment: Any) -> Episode:
        schemas = self.environments.schemas[self.environments.name_of(row)]
        tools = self.environments.tools(environment)
        if environment is None:
            return Episode(row, schemas, tools)
        try:
            with without_autocast(), interruptible():
                prompt = self.environments.reset(environment, row)
        except Exception as error:
            error.add_note(f"Raised by {type(environment).__name__}.reset, called with the columns {list(row)}.")
            raise
        where = f"The prompt after {type(environment).__name__}.reset"
        ids = encode_prompt(
            prompt,
            self.tokenizer,
            merge_template_kwargs(template_kwargs(self.environments, self.args, row), row),
            where,
        )
        ids = truncate_prompt(ids, self.args.max_prompt_length, self.tokenizer.bos_token_id)
        check_ids(ids, self.args.response_length, self.context, self.num_embeddings, where)
        return Episode({**row, "prompt": prompt, "input_ids": ids}, schemas, tools)

    def _take_turn(
        self, episodes: Sequence[Episode], active: Sequence[int], uniforms: Tensor, generate: Generate, *,
        may_call: bool,
    ) -> None:  # fmt: skip
        """Sample one turn of the active responses, and parse it; async tools of rows that end early start early."""
        prefixes = [episodes[i].row["input_ids"] + episodes[i].response.ids for i in active]
        used = [len(episodes[i].response.ids) for i in active]
        length = uniforms.shape[1]
        remaining = torch.full((len(active), length - min(used)), torch.nan, dtype=uniforms.dtype)
        for row, (i, start) in enumerate(zip(active, used, strict=True)):
            remaining[row, : length - start] = uniforms[i, start:]
        caches = [episodes[i].cache for i in active]

        def on_row_end(row: int, tokens: Tensor) -> None:
            self._start_async(episodes[active[row]], tokens.tolist(), prefixes[row])

        for i in active:
            episodes[i].turn = None
        tools = [tool for i in active for tool in episodes[i].tools.values()] if may_call else []
        starts_early = any(map(inspect.iscoroutinefunction, tools))
        output = generate(prefixes, remaining, turn_caches=caches, on_row_end=on_row_end if starts_early else None)
        for row, (i, start) in enumerate(zip(active, used, strict=True)):
            ids = output.tokens[row, : length - start].tolist()
            stops = [t + 1 for t, token in enumerate(ids) if token in self.stop_ids]
            ids = ids[: stops[0]] if stops else ids
            episode = episodes[i]
            episode.cache = caches[row]
            episode.response.add_turn(ids, output.logprobs[row, : len(ids)].tolist())
            if episode.turn is None or episode.turn.ids != ids:
                episode.cancel()
                episode.turn = Turn(ids, self._parse(ids, prefixes[row], episode.schemas))
            episode.messages.append(episode.turn.message)

    def _start_async(self, episode: Episode, ids: list[int], prefix: list[int]) -> None:
        """Start the tools that a turn calls if all are async.

        An async tool may rely on a sync one that is called before it.
        """
        turn = Turn(ids, self._parse(ids, prefix, episode.schemas))
        calls = turn.message.get("tool_calls") or ()
        tools = [episode.tools.get(call["function"]["name"]) for call in calls if call["type"] == "function"]
        if calls and len(tools) == len(calls) and all(map(inspect.iscoroutinefunction, tools)):
            episode.cancel()
            episode.start(turn, self._start)

    def _parse(self, ids: list[int], prefix: list[int], schemas: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.environments.has_tools:
            return {"role": "assistant", "content": ""}  # one turn, which `CompletionDecoder` decodes
        return parse_response(self.tokenizer, ids, prefix=prefix, tools=schemas)

    def _answer(self, episodes: Sequence[Episode]) -> list[list[dict[str, Any]]]:
        """Run the tool calls of the last turn of each response; async tools of all responses run side by side."""
        for episode in episodes:
            turn = cast(Turn, episode.turn)
            if turn.started is None:
                episode.start(turn, self._start)
        answers = []
        for episode in episodes:
            results = cast(list, cast(Turn, episode.turn).started)
            # As in TRL, the answers of async tools come after those of sync tools.
            in_order = sorted(results, key=lambda result: isinstance(result[1], Future))
            finished = [(name, _to_text(self._await(result))) for name, result in in_order]
            episode.num_calls += len(finished)
            episode.num_failures += sum(isinstance(result, Exception) for _, result in finished)
            answers.append([_to_message(name, result) for name, result in finished])
        return answers

    def _start(self, tools: Tools, call: Mapping[str, Any]) -> tuple[str, Any]:
        """Call a tool; return its name, and its result, its error, or the future of an async tool."""
        raise_if_interrupted()
        timeout = self.args.tool_timeout
        if call["type"] != "function":
            return call.get("name", "unknown"), ValueError(f"Unsupported tool call type: {call['type']}")
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        if name not in tools:
            return name, ValueError(f"Tool {name} not found.")
        try:
            run = functools.partial(tools[name], **arguments)
            if inspect.iscoroutinefunction(tools[name]):
                result = asyncio.wait_for(without_exit(run()), timeout)
                return name, asyncio.run_coroutine_threadsafe(result, event_loop())
            with without_autocast():
                if timeout is not None:
                    return name, call_with_timeout(timeout, run)
                with interruptible():
                    return name, run()
        except CallTimeout:
            return name, self._timeout_error()
        except SystemExit as error:  # code that the policy wrote may end in `exit()`
            return name, exit_error(error)
        except Exception as error:
            return name, error

    def _await(self, result: Any) -> Any:
        """Return a result, or the error of an async tool; a loop that an async tool blocks is abandoned."""
        if not isinstance(result, Future):
            return result
        max_wait = None if self.args.tool_timeout is None else self.args.tool_timeout + 1.0
        try:
            if not poll(lambda seconds: wait([result], seconds), result.done, max_wait):
                event_loop.cache_clear()
                return self._timeout_error()
            return result.result()
        except TimeoutError:
            return self._timeout_error()
        except Exception as error:
            return error

    def _timeout_error(self) -> TimeoutError:
        return TimeoutError(f"The tool did not answer within {self.args.tool_timeout} seconds.")

    def _observe(self, episode: Episode, answers: list[dict[str, Any]]) -> bool:
        """Append the answers of tools to a response; False if they do not fit, and nothing was appended."""
        if sum(len(str(answer["content"])) for answer in answers) > self.max_characters:
            return False
        kwargs = {"chat_template_kwargs": episode.row.get("chat_template_kwargs")}  # without tools, as in TRL
        run = cast(dict, self.args.chat_template_kwargs)
        ids = tool_suffix_ids(answers, self.tokenizer, merge_template_kwargs(run, kwargs))
        length = len(episode.response.ids) + len(ids)
        too_long = self.context is not None and len(episode.row["input_ids"]) + length >= self.context
        if length > self.args.response_length or too_long:
            return False
        episode.response.add_observation(ids)
        episode.messages += answers
        return True


def template_kwargs(environments: EnvironmentPool, args: PPOConfig, row: Row) -> dict[str, Any]:
    """Return the arguments of the chat template for a row: those of the run, and the row's tools."""
    schemas = environments.schemas[environments.name_of(row)]
    run: Any = args.chat_template_kwargs or {}
    return {**run, **({"tools": schemas} if schemas else {})}


def _to_text(result: Any) -> Any:
    """Convert a result to text or blocks of text, as TRL does; return an exception if it has no text."""
    if isinstance(result, Exception):
        return result
    if isinstance(result, list) and result and all(isinstance(part, Mapping) and "type" in part for part in result):
        error = str({"error": "The result has blocks that are not text."})
        return [_encodable(part) for part in result] if is_text(result) else error
    try:
        return _encodable(str(result))
    except Exception as error:  # of the result's own `__str__`
        return error


def _encodable(content: Any) -> Any:
    """Replace surrogates, which tokenizers refuse, in a text or in a block of text."""
    if isinstance(content, str):
        return content.encode("utf-8", "replace").decode("utf-8")
    return {**content, "text": _encodable(content["text"])}


def _to_message(name: str, result: Any) -> dict[str, Any]:
    """Return the message with the text of a result; an error becomes its text."""
    content = str({"error": str(result)}) if isinstance(result, Exception) else result
    return {"role": "tool", "name": name, "content": content}
