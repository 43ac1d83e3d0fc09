"""Python functions as rewards, sync or async, with a limit to their time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, cast

import torch

from ..utils.interrupt import Interrupted, interruptible, raise_if_interrupted
from .completions import Completions, Score, validate_scores

REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
POLL_SECONDS = 0.1  # between two looks at whether a signal came, while another thread works


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
            (result,) = await_all([(self, result)], batch)
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
            with without_autocast():
                if self.timeout is not None:
                    return call_with_timeout(self.timeout, call)
                with interruptible():  # in the main thread: `signal.alarm` and clients of one thread work there alone
                    return call()
        except _CallTimeout:
            return self.timeout_error(batch)
        except Exception as error:
            return error

    def finish(self, result: Any, batch: Completions) -> Sequence[Score]:
        """The scores, checked; an error that the function raised is raised here, with its name."""
        if isinstance(result, Exception):
            result.add_note(f"This was raised by the reward function {self.name!r}, given {len(batch)} completions.")
            raise result
        return validate_scores(result, batch, self.name)

    def timeout_error(self, batch: Completions) -> TimeoutError:
        """The error of a function that did not answer in time."""
        prompts = ", ".join(repr(prompt)[:80] for prompt in batch.prompts[:3])
        return TimeoutError(
            f"The reward function {self.name!r} did not answer within reward_timeout={self.timeout} seconds; it was "
            f"given {len(batch)} completions, of the prompts {prompts}{', ...' if len(batch) > 3 else ''}. Python "
            "cannot stop a function, so it may go on in the background until the process ends."
        )


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Let code of users compute in the precision that they wrote; threads of their own do so anyway."""
    accelerator = torch.accelerator.current_accelerator()
    with contextlib.ExitStack() as off:
        for kind in {"cpu"} if accelerator is None else {"cpu", accelerator.type}:
            off.enter_context(torch.autocast(kind, enabled=False))
        yield


class _CallTimeout(Exception):
    """A call that did not return in time."""


def call_with_timeout(seconds: float | None, call: Callable[[], Any]) -> Any:
    """Call in a thread of its own, and leave it to itself after some seconds.

    The thread is a daemon: one that never returns does not keep the process from ending.

    Raises:
        _CallTimeout: it did not return in time.
        Interrupted: a signal came first.
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
    if not _poll(thread.join, lambda: bool(outcome), seconds):
        raise _CallTimeout
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _poll(wait_for: Callable[[float], Any], is_done: Callable[[], bool], seconds: float | None) -> bool:
    """Wait for another thread up to some seconds; return whether it is done, or raise `Interrupted` if a signal came.

    The handler of a signal does not raise here: an exception in the midst of `join` may leave its lock taken.
    """
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        left = POLL_SECONDS if end is None else max(min(POLL_SECONDS, end - time.monotonic()), 0.0)
        wait_for(left)
        if is_done():
            return True
        raise_if_interrupted()
        if end is not None and time.monotonic() >= end:
            return False


def await_all(waiting: Sequence[tuple[FunctionReward, Any]], batch: Completions) -> list[Any]:
    """Await what async reward functions returned, all at once; errors stand in the place of results."""
    answers: dict[int, Any] = {}
    ended = threading.Event()

    async def wait_for(index: int, reward: FunctionReward, awaitable: Any) -> None:
        async def answer() -> Any:
            return await awaitable

        task = asyncio.ensure_future(answer())
        try:
            done, _ = await asyncio.wait([task], timeout=reward.timeout)
        finally:
            task.cancel()
        if done:
            answers[index] = task.exception() or task.result()

    async def wait_for_all() -> None:
        try:
            await asyncio.gather(*(wait_for(index, *pair) for index, pair in enumerate(waiting)))
        finally:
            ended.set()

    timeouts = [reward.timeout for reward, _ in waiting]
    # An async function may block its loop, or not let itself be cancelled; a second more than all were given is enough
    # to know, and the next rollout gets another loop.
    longest = None if None in timeouts else max(cast(list[float], timeouts)) + 1.0
    pending = asyncio.run_coroutine_threadsafe(wait_for_all(), event_loop())
    try:
        if not _poll(lambda seconds: wait([pending], seconds), pending.done, longest):
            event_loop.cache_clear()
    except Interrupted:
        _cancel(pending, ended)
        raise
    return [answers.get(index, reward.timeout_error(batch)) for index, (reward, _) in enumerate(waiting)]


def _cancel(pending: Future, ended: threading.Event) -> None:
    """Cancel async functions; a loop that does not answer within a second is left to itself."""
    pending.cancel()
    if not ended.wait(1.0):
        event_loop.cache_clear()


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
