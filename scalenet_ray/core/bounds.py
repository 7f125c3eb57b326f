"""Ranges of numeric settings, as annotations of their fields: `limit: Annotated[int, ONE_OR_MORE]`."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """A range of numbers.

    Attributes:
        text: the range in words, for error messages.
        low: lower bound.
        high: upper bound, inclusive.
        includes_low: whether `low` is inclusive.
    """

    text: str
    low: float = 0.0
    high: float = math.inf
    includes_low: bool = True

    def __contains__(self, value: float) -> bool:
        """Return True if a number is finite and in the range."""
        above = value >= self.low if self.includes_low else value > self.low
        return above and value <= self.high and abs(value) != math.inf


ANY_NUMBER = Bounds("a number of 0 or more")
"""The range of settings without an annotation."""

ONE_OR_MORE = Bounds("1 or more", low=1.0)
ABOVE_ZERO = Bounds("a number above 0", includes_low=False)
SHARE = Bounds("a number from 0 to 1", high=1.0)
MEGAPIXELS = Bounds("a number above 0, at most 100000", high=1e5, includes_low=False)
