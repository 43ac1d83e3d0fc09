"""Progress and seconds of the phases of a rollout."""

from __future__ import annotations

import time
from collections.abc import Callable


class ProgressReporter:
    """Counts what a phase has done and reports it, from its begin on.

    Rows are added when their chunk is through, so a chunk that ran out of memory and starts again counts once.
    """

    def __init__(self, phase: str, total: int, report: Callable[[str, int, int, int], None]) -> None:
        self.phase, self.total, self.report = phase, total, report
        self.rows = self.tokens = 0
        self.add(0, 0)

    def add(self, rows: int, tokens: int) -> None:
        """These rows are through, with so many tokens."""
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens
        self.report(self.phase, self.rows, self.total, self.tokens)

    def decoding(self, rows: int) -> Callable[[int], None]:
        """For a chunk of rows: what to call at each decode step with the number of rows that are still going."""
        sampled = 0

        def step(alive: int) -> None:
            nonlocal sampled
            self.report(self.phase, self.rows + rows - alive, self.total, self.tokens + sampled)
            sampled += alive

        return step


class PhaseTimer:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def record(self, phase: str) -> None:
        """Book the time since the last lap to a phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
