"""What may go wrong with one image or one tile, and costs that image alone; and with a batch, which is made smaller."""

from __future__ import annotations

__all__ = ["OutOfMemoryError", "TileError"]


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


class OutOfMemoryError(Exception):
    """A batch did not fit its device's memory; a smaller one may. Networks raise it, whatever library they are of."""
