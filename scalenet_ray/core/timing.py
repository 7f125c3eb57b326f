"""Busy seconds of each stage of a run, added up while a tally is active."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

STAGES: tuple[str, ...] = ("decode", "cut", "look", "detect", "merge", "write")
"""Stages of the work on an image."""


class Tally:
    """Busy seconds by stage.

    Attributes:
        seconds: stage -> total seconds.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()

    def take(self) -> dict[str, float]:
        """Return stage -> seconds since the last call, for all stages in order."""
        fresh = {stage: float(self.seconds[stage] - self._taken[stage]) for stage in STAGES}
        self._taken = self.seconds.copy()
        return fresh


_current: ContextVar[Tally | None] = ContextVar("tally", default=None)


def current_tally() -> Tally | None:
    """Return the active tally, or None."""
    return _current.get()


@contextmanager
def measured(tally: Tally | None = None) -> Iterator[Tally]:
    """Collect the seconds of all stages that run within the block, on this thread, into a tally; None for a new one."""
    tally = tally or Tally()
    token = _current.set(tally)
    try:
        yield tally
    finally:
        _current.reset(token)


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Add the duration of the block to `stage`, one of `STAGES`; also usable as a decorator."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        add_seconds({stage: time.perf_counter() - begun})


def add_seconds(seconds: Mapping[str, float]) -> None:
    """Add seconds by stage, measured elsewhere, to the active tally."""
    tally = _current.get()
    if tally is not None:
        tally.seconds.update(seconds)
