"""Progress and seconds of the phases of a rollout."""

from __future__ import annotations

import time
from collections.abc import Callable


class ProgressReporter:
    """Counts the rows and tokens that a phase has processed, and reports them from its start on.

    Rows are added when their chunk is complete, so a chunk that ran out of memory and starts again counts once.
    """

    def __init__(self, phase: str, total: int, report: Callable[[str, int, int, int], None]) -> None:
        self.phase, self.total, self.report = phase, total, report
        self.rows = self.tokens = 0
        self.add(0, 0)

    def add(self, rows: int, tokens: int) -> None:
        """Add complete rows and their tokens."""
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens
        self.report(self.phase, self.rows, self.total, self.tokens)

    def decode_step_callback(self, rows: int) -> Callable[[int], None]:
        """Return a callback for one chunk of rows; each decode step calls it with the number of unfinished rows."""
        sampled = 0

        def step(unfinished: int) -> None:
            nonlocal sampled
            self.report(self.phase, self.rows + rows - unfinished, self.total, self.tokens + sampled)
            sampled += unfinished

        return step


class PhaseTimer:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def record(self, phase: str) -> None:
        """Add the time since the last call to a phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
