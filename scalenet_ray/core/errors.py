"""Errors that are not bugs: what a user can correct, what costs one image alone, and a batch that is too large."""

from __future__ import annotations

__all__ = ["OutOfMemoryError", "TileError", "UserError"]


class UserError(ValueError):
    """An argument, a setting, a file or a detector that the user can correct; jobs print it in one line, no trace.

    The message says what was wanted, what was given, and what to do. Any other exception is a bug and keeps its trace.
    """


class TileError(UserError):
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
