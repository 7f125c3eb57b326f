"""What may go wrong with one image or one tile, and costs that image alone."""

from __future__ import annotations

__all__ = ["TileError"]


class TileError(ValueError):
    """One image or tile cannot be worked on: it is named, counted and left out; the run goes on.

    Raised for what data can cause (a truncated JPEG, NaN from a network), never for a bug: any
    other exception ends the run with its message.

    Attributes:
        reason: what was wanted, what came and what to do, in one line.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
