"""Exceptions: user errors, failures of one image, out of memory, and bugs in a worker."""

from __future__ import annotations

__all__ = ["OutOfMemoryError", "TileError", "UserError", "WorkerError"]


class UserError(ValueError):
    """An error in an argument, a setting, a file or a detector that the user can correct.

    Jobs print it in one line without a traceback. The message states what was expected, what was given, and what to do.
    Any other exception is a bug and keeps its traceback.
    """


class TileError(UserError):
    """A failure of one image or tile: it is recorded and skipped, and the run goes on.

    Raised for causes in the data (a truncated JPEG, NaN from a network), never for a bug: any other exception ends the
    run.

    Attributes:
        reason: what was expected, what was given and what to do, in one line.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class OutOfMemoryError(Exception):
    """A batch did not fit into the device's memory; raised by networks of any library."""


class WorkerError(RuntimeError):
    """A bug in a worker process.

    The message is the exception in one line, e.g. `KeyError: 'x' in a worker`.

    Attributes:
        trace: the worker's traceback.
    """

    def __init__(self, message: str, trace: str) -> None:
        # Pickling passes `args` to the constructor.
        super().__init__(message, trace)
        self.trace = trace

    def __str__(self) -> str:
        """The message, without the traceback."""
        return self.args[0]
