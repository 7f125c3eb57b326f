"""The front of a comparison: what nothing else beats in both price and worth."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["front"]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other one is at least as cheap and as good as, and better in one of the two.

    Args:
        points: (price, worth) each.

    Returns:
        Their positions, the cheapest first; of equal points the first one alone.
    """
    best = float("-inf")
    kept = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[i][1] > best:
            best = points[i][1]
            kept.append(i)
    return kept
