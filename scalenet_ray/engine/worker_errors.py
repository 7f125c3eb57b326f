"""Convert errors that workers raised through Ray: user errors are raised again, bugs as `WorkerError`."""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayError, RayTaskError, StreamingGeneratorReplayInconsistentError

from scalenet_ray.core.errors import UserError, WorkerError

_CHAINED = re.compile(
    r"^(?:The above exception was the direct cause of the following exception|"
    r"During handling of the above exception, another exception occurred):$",
    re.MULTILINE,
)
_LAST_LINE = re.compile(r"^(?P<name>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?$")
_COLOUR = re.compile(r"\x1b\[\d*m")
_USER_ERRORS = {f"{UserError.__module__}.{name}" for name in ("UserError", "TileError")}


class RowsLostError(WorkerError):
    """Rows were lost with a node, and Ray failed to make them again."""


@contextmanager
def workers_errors() -> Iterator[None]:
    """Convert a Ray error that leaves the block with `from_worker`."""
    try:
        yield
    except RayError as error:
        raise from_worker(error) from None


def from_worker(error: Exception) -> Exception:
    """Convert the error of a worker.

    Args:
        error: the error that Ray raised.

    Returns:
        The `UserError` or `OSError` that the worker raised, else a `WorkerError` with its traceback: a `RowsLostError`
        if Ray failed, and no worker.
    """
    cause = error
    while isinstance(cause, RayTaskError) and isinstance(cause.cause, Exception):
        cause = cause.cause
    if isinstance(cause, (UserError, OSError, WorkerError)) and not isinstance(cause, RayError):
        return cause
    trace = _COLOUR.sub("", str(error)).strip()
    if isinstance(cause, StreamingGeneratorReplayInconsistentError):
        return RowsLostError(f"{type(cause).__name__} of Ray", trace)
    raised = _raised(trace)
    if raised is None:
        return WorkerError(f"{type(error).__name__}: {trace.splitlines()[-1] if trace else ''}", trace)
    name, message = raised
    if name in _USER_ERRORS:
        return UserError(message)
    builtin = getattr(builtins, name, None)
    if isinstance(builtin, type) and issubclass(builtin, OSError):
        return OSError(message)
    short = name.rpartition(".")[-1]
    return WorkerError(f"{short}: {message} in a worker" if message else f"{short} in a worker", trace)


def with_message(error: Exception, message: str) -> Exception:
    """An error of `from_worker` with another message; a `WorkerError` keeps its traceback."""
    return WorkerError(message, error.trace) if isinstance(error, WorkerError) else UserError(message)


def _raised(trace: str) -> tuple[str, str] | None:
    """(name, one-line message) of the last exception in a traceback that is not one of Ray's wrappers."""
    exceptions = [_last_line(block) for block in _CHAINED.split(trace)]
    return next((raised for raised in reversed(exceptions) if raised and not raised[0].startswith("ray.")), None)


def _last_line(block: str) -> tuple[str, str] | None:
    """(name, message) from the lines after the last frame; messages may have several lines."""
    lines = block.strip().splitlines()
    last_frame = max((i for i, line in enumerate(lines) if line.startswith("  File ")), default=-1)
    for i, line in enumerate(lines[last_frame + 1 :], start=last_frame + 1):
        match = _LAST_LINE.match(line)
        if match and (last_frame >= 0 or match["message"] is not None):
            message = [match["message"] or "", *(line.strip() for line in lines[i + 1 :])]
            return match["name"], " ".join(part for part in message if part)
    return None
