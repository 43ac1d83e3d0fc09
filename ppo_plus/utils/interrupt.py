"""Interrupts: a signal aborts a rollout or an evaluation at points where the state for resuming is consistent.

`Interrupt.allow` opens an interruptible block. Inside it, the package calls `raise_if_interrupted` between decoded
tokens, forward passes and reward calls. User functions are interrupted while they run (`interruptible`), as Ctrl-C
does in any Python program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar


class Interrupted(BaseException):
    """Raised in an interruptible block after a signal; the training state is that before the block.

    Not a subclass of `Exception`: `except Exception` in a reward function, and `on_reward_error="skip"`, must not
    catch it.
    """


class Interrupt:
    """Signal state of one run.

    Attributes:
        received: number of the received signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._raise_immediately = False

    @contextlib.contextmanager
    def allow(self) -> Iterator[None]:
        """Allow a signal to abort the block with `Interrupted`; state must be consistent at every check inside."""
        token = _allowed.set(self)
        try:
            raise_if_interrupted()
            yield
        finally:
            _allowed.reset(token)

    def receive(self, number: int) -> None:
        """Record a signal; called by its handler.

        Raises:
            Interrupted: a user function is running inside an interruptible block.
        """
        self.received = number
        if self._raise_immediately:
            self._raise_immediately = False
            raise Interrupted


# A new thread starts outside any block, and Python delivers signals to the main thread only.
_allowed: ContextVar[Interrupt | None] = ContextVar("allowed interrupt", default=None)


def raise_if_interrupted() -> None:
    """Raise `Interrupted` if a signal was received and the caller is in an interruptible block."""
    interrupt = _allowed.get()
    if interrupt is not None and interrupt.received is not None:
        raise Interrupted


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Allow the signal handler to raise `Interrupted` anywhere in this block, if an outer block permits it.

    For user functions only: the exception may be raised between any two instructions, so the block must not change
    state of the package.
    """
    interrupt = _allowed.get()
    if interrupt is None:
        yield
        return
    interrupt._raise_immediately = True
    try:
        raise_if_interrupted()  # the signal arrived just before the block
        yield
        raise_if_interrupted()  # a bare `except` in the block caught the exception
    finally:
        interrupt._raise_immediately = False
