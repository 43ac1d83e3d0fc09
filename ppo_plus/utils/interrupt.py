"""Interrupts: a signal ends a rollout or an evaluation early, where nothing that a resumed run needs is half done.

`Interrupt.allow` opens a block that may be left. Inside, our own code calls `raise_if_interrupted` between two decoded
tokens, two forward passes and two reward calls. A function of the user is interrupted while it runs (`interruptible`),
as Ctrl-C would interrupt it in any Python program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar


class Interrupted(BaseException):
    """A signal came in a block that may be left; training is in the state that it had before the block.

    No `Exception`: `except Exception` in a reward function, and `on_reward_error="skip"`, must not swallow it.
    """


class Interrupt:
    """The signal of one run.

    Attributes:
        received: number of the signal; None while none came.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._at_once = False

    @contextlib.contextmanager
    def allow(self) -> Iterator[None]:
        """Let a signal end the block with `Interrupted`; the block must leave nothing half done wherever it checks."""
        token = _allowed.set(self)
        try:
            raise_if_interrupted()
            yield
        finally:
            _allowed.reset(token)

    def receive(self, number: int) -> None:
        """Note a signal; called by its handler.

        Raises:
            Interrupted: a function of the user runs, and may be left where it is.
        """
        self.received = number
        if self._at_once:
            self._at_once = False
            raise Interrupted


# A thread begins with no block of its own, and signals reach the main thread alone.
_allowed: ContextVar[Interrupt | None] = ContextVar("allowed interrupt", default=None)


def raise_if_interrupted() -> None:
    """Raise `Interrupted` if a signal came and the caller is in a block that may be left."""
    interrupt = _allowed.get()
    if interrupt is not None and interrupt.received is not None:
        raise Interrupted


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let the handler of a signal raise `Interrupted` in the block itself, if it is in one that may be left.

    For functions of users only: the exception may come between any two instructions, so none of our own state may be
    changed inside.
    """
    interrupt = _allowed.get()
    if interrupt is None:
        yield
        return
    interrupt._at_once = True
    try:
        raise_if_interrupted()  # it came just before
        yield
        raise_if_interrupted()  # a bare `except` has swallowed it
    finally:
        interrupt._at_once = False
