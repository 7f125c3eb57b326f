"""Busy seconds of each stage of a run, added up while a tally is active."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = [
    "STAGES",
    "Tally",
    "add_seconds",
    "current_tally",
    "measured",
    "timed",
]

STAGES: tuple[str, ...] = ("decode", "cut", "look", "detect", "merge", "write")
"""What an image goes through."""


class Tally:
    """Seconds by stage.

    Attributes:
        seconds: stage -> seconds so far.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()

    def take(self) -> dict[str, float]:
        """Stage -> seconds since this was last asked; all stages, in order."""
        fresh = {stage: float(self.seconds[stage] - self._taken[stage]) for stage in STAGES}
        self._taken = self.seconds.copy()
        return fresh


_current: ContextVar[Tally | None] = ContextVar("tally", default=None)


def current_tally() -> Tally | None:
    """The tally that time is added to now, if any."""
    return _current.get()


@contextmanager
def measured() -> Iterator[Tally]:
    """Add up the time of all that is done within the block, on this thread, into a tally of its own."""
    tally = Tally()
    token = _current.set(tally)
    try:
        yield tally
    finally:
        _current.reset(token)


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """What the block takes is time of `stage`, one of `STAGES`; also as a decorator of a function."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        add_seconds({stage: time.perf_counter() - begun})


def add_seconds(seconds: Mapping[str, float]) -> None:
    """Add what was measured elsewhere, stage -> seconds."""
    tally = _current.get()
    if tally is not None:
        tally.seconds.update(seconds)
