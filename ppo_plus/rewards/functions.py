"""Python functions as rewards, synchronous or async, with an optional timeout."""

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
POLL_SECONDS = 0.1  # interval between checks for a signal while another thread works


class FunctionReward:
    """Score with a Python function, sync or async.

    Its signature is `f(prompts=, completions=, completion_ids=, **columns, ...) -> list`.

    Args:
        function: the reward function.
        name: name in metrics and errors.
        timeout: maximum seconds per call; None means no limit.
    """

    def __init__(self, function: Callable, name: str, timeout: float | None = None) -> None:
        self.function, self.name, self.timeout = function, name, timeout

    def __call__(self, batch: Completions) -> Sequence[Score]:
        """Call the function, and await its result if it is async."""
        result = self.start(batch)
        if inspect.isawaitable(result):
            (result,) = await_all([(self, result)], batch)
        return self.result(result, batch)

    def start(self, batch: Completions) -> Any:
        """Call the function; returns its scores, an awaitable of them, or the exception it raised."""
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
                with interruptible():  # `signal.alarm` and single-threaded clients work only in the main thread
                    return call()
        except CallTimeout:
            return self.timeout_error(batch)
        except SystemExit as error:  # code that the policy wrote, and that the function runs, may end in `exit()`
            return exit_error(error)
        except Exception as error:
            return error

    def result(self, result: Any, batch: Completions) -> Sequence[Score]:
        """Validate the scores; raise an exception of the function here, with a note that names it."""
        if isinstance(result, Exception):
            result.add_note(f"Raised by the reward function {self.name!r}, called with {len(batch)} completions.")
            raise result
        return validate_scores(result, batch, self.name)

    def timeout_error(self, batch: Completions) -> TimeoutError:
        """Create the error of a function that exceeded its timeout."""
        prompts = ", ".join(repr(prompt)[:80] for prompt in batch.prompts[:3])
        return TimeoutError(
            f"The reward function {self.name!r} did not return within reward_timeout={self.timeout} seconds; it was "
            f"called with {len(batch)} completions, of the prompts {prompts}{', ...' if len(batch) > 3 else ''}. "
            "Python cannot stop a thread, so the function may continue in the background. Raise reward_timeout, or "
            "make the function faster."
        )


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Disable autocast inside the block, so that user code computes in the dtypes it was written for."""
    accelerator = torch.accelerator.current_accelerator()
    with contextlib.ExitStack() as stack:
        for device_type in {"cpu"} if accelerator is None else {"cpu", accelerator.type}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def exit_error(error: SystemExit) -> RuntimeError:
    """Return the error of a user function that called `exit()`, which would end training without a word."""
    return RuntimeError(f"The function called sys.exit({error.code!r}).")


async def without_exit(awaitable: Any) -> Any:
    """Await a user function; `exit()` in it becomes an error, because it would stop the event loop."""
    try:
        return await awaitable
    except SystemExit as error:
        raise exit_error(error) from error


class CallTimeout(Exception):
    """Raised if a call does not return within its timeout."""


def call_with_timeout(seconds: float | None, call: Callable[[], Any]) -> Any:
    """Call a function in a daemon thread, and abandon the thread after the timeout.

    A daemon thread that never returns does not prevent the process from exiting.

    Raises:
        CallTimeout: the call did not return in time.
        Interrupted: a signal was received first.
    """
    outcome: list[tuple[Any, BaseException | None]] = []
    grad_enabled = torch.is_grad_enabled()  # a thread-local setting of torch

    def run() -> None:
        try:
            with torch.set_grad_enabled(grad_enabled):
                outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="reward function")
    thread.start()
    if not poll(thread.join, lambda: bool(outcome), seconds):
        raise CallTimeout
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def poll(wait_for: Callable[[float], Any], is_done: Callable[[], bool], seconds: float | None) -> bool:
    """Wait for another thread up to `seconds`; return whether it is done, or raise `Interrupted` after a signal.

    The signal handler does not raise here, because an exception inside `join` may leave its lock acquired.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        interval = POLL_SECONDS if deadline is None else max(min(POLL_SECONDS, deadline - time.monotonic()), 0.0)
        wait_for(interval)
        if is_done():
            return True
        raise_if_interrupted()
        if deadline is not None and time.monotonic() >= deadline:
            return False


def await_all(awaitables: Sequence[tuple[FunctionReward, Any]], batch: Completions) -> list[Any]:
    """Await async reward functions concurrently; returns results, or exceptions in their place."""
    results: dict[int, Any] = {}
    all_done = threading.Event()

    async def wait_for(index: int, reward: FunctionReward, awaitable: Any) -> None:
        async def await_result() -> Any:
            return await without_exit(awaitable)

        task = asyncio.ensure_future(await_result())
        try:
            done, _ = await asyncio.wait([task], timeout=reward.timeout)
        finally:
            task.cancel()
        if done:
            results[index] = task.exception() or task.result()

    async def wait_for_all() -> None:
        try:
            await asyncio.gather(*(wait_for(index, *pair) for index, pair in enumerate(awaitables)))
        finally:
            all_done.set()

    timeouts = [reward.timeout for reward, _ in awaitables]
    # An async function may block the event loop or ignore its cancellation. After all timeouts and one more second the
    # loop is abandoned, and the next rollout uses a new one.
    max_wait = None if None in timeouts else max(cast(list[float], timeouts)) + 1.0
    pending = asyncio.run_coroutine_threadsafe(wait_for_all(), event_loop())
    try:
        if not poll(lambda seconds: wait([pending], seconds), pending.done, max_wait):
            event_loop.cache_clear()
    except Interrupted:
        _cancel(pending, all_done)
        raise
    return [results.get(index, reward.timeout_error(batch)) for index, (reward, _) in enumerate(awaitables)]


def _cancel(pending: Future, all_done: threading.Event) -> None:
    """Cancel async functions; abandon the event loop if it does not react within a second."""
    pending.cancel()
    if not all_done.wait(1.0):
        event_loop.cache_clear()


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all async reward functions, which runs in its own thread.

    The main thread may already run a loop, as in notebooks. The loop lives as long as the process, so that a client
    opened by a function in one rollout can be reused in the next.
    """
    loop = asyncio.new_event_loop()

    def run() -> None:
        with torch.no_grad():  # a thread-local setting of torch; rewards are never differentiated
            loop.run_forever()

    threading.Thread(target=run, daemon=True, name="async reward functions").start()
    return loop
