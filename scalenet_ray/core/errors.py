"""Errors: what a user can correct, what costs one image alone, a batch that is too large, and a worker's bug."""

from __future__ import annotations

__all__ = ["OutOfMemoryError", "TileError", "UserError", "WorkerError"]


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


class WorkerError(RuntimeError):
    """A bug that showed in a worker process, whose own trace is of more use than the driver's.

    The message is the exception in one line, e.g. `KeyError: 'x' in a worker`.

    Attributes:
        trace: the worker's, as text of many lines.
    """

    def __init__(self, message: str, trace: str) -> None:
        # Both as arguments, so that it can be pickled.
        super().__init__(message, trace)
        self.trace = trace

    def __str__(self) -> str:
        """The message alone."""
        return self.args[0]
