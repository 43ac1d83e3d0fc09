"""HTTP client of a vLLM server: adapters at run time, and completions as token ids.

The trainer needs no package of vLLM's, whose releases require other versions of transformers than this package.
"""

from __future__ import annotations

import asyncio
import json
import time
import warnings
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from huggingface_hub.utils import httpx

from ..rewards.functions import event_loop, poll

RETRY_SECONDS = 1.0  # between two attempts to reach a server that is starting
FULL = (429, 503)  # HTTP states of a server that takes no more requests
T = TypeVar("T")


class EngineError(RuntimeError):
    """The engine did not answer a request; a run can resume from its checkpoint when the engine is up again."""


class RefusedError(EngineError):
    """The engine understood a request and refused it (HTTP 4xx)."""


@dataclass(frozen=True)
class Completion:
    """Token ids of one response, with its stop token, and their log-probabilities, nats."""

    ids: list[int]
    logprobs: list[float]


class VLLMClient:
    """Sends requests to one server; a signal to the trainer interrupts the wait for its answers.

    Args:
        url: address of the server, without a slash at its end.
        timeout: seconds to wait for each answer.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url, timeout

    def wait_until_up(self) -> None:
        """Wait until the server answers, for `timeout` seconds.

        Raises:
            EngineError: the server did not answer in that time.
        """
        deadline, warned = time.monotonic() + self.timeout, False
        while True:
            try:
                self.request("GET", "/health")
                return
            except EngineError as error:
                if time.monotonic() + RETRY_SECONDS > deadline:
                    raise
                if not warned:
                    text = f"{error} It is waited for up to vllm_server_timeout={self.timeout} seconds."
                    warnings.warn(text, stacklevel=3)
                    warned = True
            time.sleep(RETRY_SECONDS)

    def request(self, method: str, path: str, payload: dict[str, Any] | None = None) -> Any:
        """Send one request; return the JSON of its answer, or its text if it is none.

        Raises:
            RefusedError: the server refused the request.
            EngineError: there was no answer, or a server error.
        """

        async def send() -> Any:
            async with self._session(1) as session:
                return await self._send(session, method, path, payload)

        return _run(send(), lambda: None)

    def complete(
        self, requests: Sequence[dict[str, Any]], parallel: int, on_complete: Callable[[int, Completion], None]
    ) -> list[Completion]:
        """Send a request for each response, `parallel` at a time; return the completions in the same order.

        Args:
            requests: payloads of `/v1/completions`, each with one prompt.
            parallel: number of requests that wait for an answer at a time.
            on_complete: called with the index of a request and its completion, while others are awaited.
        """
        arrived: SimpleQueue[tuple[int, Completion]] = SimpleQueue()
        completions: dict[int, Completion] = {}

        async def complete_one(session: httpx.AsyncClient, index: int) -> None:
            body = await self._send(session, "POST", "/v1/completions", requests[index])
            arrived.put((index, self._read(body)))

        async def complete_all() -> None:
            async with self._session(parallel) as session, asyncio.TaskGroup() as group:
                for index in range(len(requests)):
                    group.create_task(complete_one(session, index))

        def pass_on() -> None:  # in the caller's thread
            while not arrived.empty():
                index, completion = arrived.get()
                completions[index] = completion
                on_complete(index, completion)

        try:
            _run(complete_all(), pass_on)
        except ExceptionGroup as group:  # the other requests were canceled
            raise group.exceptions[0] from None
        pass_on()
        return [completions[index] for index in range(len(requests))]

    def _session(self, parallel: int) -> httpx.AsyncClient:
        # A new one for each call: the server closes idle connections, and a request on a closed one would fail.
        limits = httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel)
        timeout = httpx.Timeout(self.timeout, pool=None)
        return httpx.AsyncClient(base_url=self.url, timeout=timeout, limits=limits)

    async def _send(self, session: httpx.AsyncClient, method: str, path: str, payload: dict[str, Any] | None) -> Any:
        where = f"The vLLM server at {self.url}"
        try:
            answer = await session.request(method, path, json=payload)
        except httpx.TimeoutException:
            raise EngineError(
                f"{where} did not answer {path} within vllm_server_timeout={self.timeout} seconds. Raise it if the "
                "responses are long, or restart the server."
            ) from None
        except httpx.HTTPError as error:
            raise EngineError(f"{where} cannot be reached ({path}: {str(error) or type(error).__name__}).") from None
        if answer.status_code in FULL:
            raise EngineError(
                f"{where} takes no more requests ({path}: {answer.status_code} {_message(answer)}). Lower "
                "generation_batch_size, or stop its other clients."
            )
        if answer.is_client_error:
            raise RefusedError(f"{where} refused {path}: {_message(answer)}")
        if answer.is_error:
            raise EngineError(f"{where} failed ({path}: {answer.status_code} {_message(answer)}).")
        try:
            return answer.json()
        except ValueError:
            return answer.text

    def _read(self, body: Any) -> Completion:
        try:
            (choice,) = body["choices"]
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            if len(ids) != len(logprobs) or not ids:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise EngineError(
                f"The vLLM server at {self.url} returned no token ids with log-probabilities: it is no vLLM server, or "
                f"an old one. Its answer begins with {json.dumps(body)[:200]}"
            ) from None
        return Completion(ids, logprobs)


def _message(answer: httpx.Response) -> str:
    try:
        body = answer.json()
        return str(body["error"]["message"] if "error" in body else body.get("detail") or body)
    except (ValueError, TypeError, KeyError, AttributeError):
        return answer.text[:500]


def _run(coroutine: Coroutine[Any, Any, T], on_wait: Callable[[], None]) -> T:
    """Run a coroutine in the thread of the event loop; call `on_wait` while it runs, which may raise."""
    future = asyncio.run_coroutine_threadsafe(coroutine, event_loop())

    def wait_for(seconds: float) -> None:
        wait([future], seconds)
        on_wait()

    try:
        poll(wait_for, future.done, None)
    except BaseException:
        future.cancel()
        raise
    return future.result()
