"""Terminal output of the jobs: lines, the live progress, JSON logs, errors and exit codes."""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType
from typing import Any, TextIO, TypeVar

from scalenet_ray.core.detections import SHOWN_SCORE
from scalenet_ray.core.errors import UserError, WorkerError
from scalenet_ray.runs.batch import Progress

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_SECONDS_BETWEEN_LINES = 2.0
_TO_START_AND_ERASE = "\r\x1b[K"

Job = TypeVar("Job")


class LiveLine:
    """Progress on the standard output: one line that is written over on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._shown = False
        self._printed = -_SECONDS_BETWEEN_LINES

    def show(self, progress: Progress) -> None:
        """Show a progress. What begins or ends is always shown, and stays."""
        ends = progress.done == progress.total
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            # What stays may be wrapped; what is written over may not.
            room = None if ends else shutil.get_terminal_size().columns - 1
            sys.stdout.write(_TO_START_AND_ERASE + str(progress)[:room])
            sys.stdout.flush()
            self._shown = True
            if ends:
                self.keep()
            return
        now = time.monotonic()
        if ends or not progress.images or now - self._printed >= _SECONDS_BETWEEN_LINES:
            print(progress, flush=True)  # noqa: T201
            self._printed = now

    def keep(self) -> None:
        """Leave what is shown on the terminal, and go on below it."""
        if self._shown:
            print(flush=True)  # noqa: T201
            self._shown = False

    def clear(self) -> None:
        """Erase what is shown, for another line in its place."""
        if self._shown:
            sys.stdout.write(_TO_START_AND_ERASE)
            sys.stdout.flush()
            self._shown = False


LIVE = LiveLine()
"""The live line of this process; whatever else writes to the terminal clears it first."""


def say(text: object) -> None:
    """Print a line on the standard output; a `Progress` as the live line."""
    if isinstance(text, Progress):
        LIVE.show(text)
        return
    LIVE.clear()
    print(text)  # noqa: T201


class _Handler(logging.StreamHandler):
    """Log handler that clears the live line first."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        LIVE.clear()
        super().emit(record)


_WHY_REDUCED = {
    True: "all else in them is without texture, or smaller than --smallest-object says",
    False: "small objects in them are missed; policy regions looks closer, as far as --smallest-object says",
}
"""Whether a policy is one of regions -> what its reduced images mean."""


def _resolution_lines(document: Mapping[str, Any]) -> str:
    """Return a line for each policy that never looked closely, or that looked twice where it found nothing."""
    blind = "".join(
        f"{name}: {row['guards']['nothing_seen']} looks (an image, or a part of a large one) found nothing that scores "
        f"{SHOWN_SCORE} or more; all that is textured in them was looked at again\n"
        for name, row in document["policies"].items()
        if row.get("guards", {}).get("nothing_seen")
    )
    return blind + "".join(
        f"{name}: {row['images_reduced']} images were seen reduced only, down to 1 / {row['most_reduced']:.1f} of "
        f"their own resolution: {_WHY_REDUCED[name.startswith('regions')]}\n"
        for name, row in document["policies"].items()
        if row.get("images_reduced")
    )


def end_run(document: Mapping[str, Any], uri: str, max_failures: int) -> int:
    """Print what metrics.json says of closer looks and of failures by stage and reason, and where the results are.

    Returns:
        The exit status: 1 if more than `max_failures` images failed, else 0.
    """
    images = document["images"]
    failures = "".join(
        f"{row['count']} failed in {row['stage']}: {row['reason']} (e.g. {row['example']})\n"
        for row in document["failures"]
    )
    last = f"{images['done']} of {images['total']} images done, results in {uri} (open its report.html)"
    if images["failed"]:
        last += f"; {images['failed']} FAILED: failures.parquet there names each, "
        last += "--resume --retry-failed tries them again"
    status = int(images["failed"] > max(0, max_failures))
    say(f"{_resolution_lines(document)}{failures}{last}{f' (--max-failures {max_failures})' if status else ''}")
    return status


def run_job(main: Callable[[Job], int], job: Job) -> None:
    """Run a job and exit with its status; errors are printed in one line on the standard error.

    The status is 2 for a `UserError`, 1 for a bug in a worker, whose traceback goes to a file that the line names, and
    130 or 143 for SIGINT or SIGTERM, after which the job writes what is finished; a second signal ends the process at
    once. A bug in this process keeps its traceback. Characters unknown to the terminal's encoding are escaped; output
    to a closed pipe is dropped.
    """
    sys.stdout, sys.stderr = _lenient(sys.stdout), _lenient(sys.stderr)
    # While the interpreter exits, which takes Ray seconds, there is no work to save.
    atexit.register(_end_at_next_signal)
    try:
        with _stopped_by_signals():
            log_to_stderr()
            status = main(job)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, _StopSignal) else signal.SIGINT
        # The convention of shells.
        status = complain("stopped: " + _with_notes(stop, "nothing done yet"), 128 + number)
    except (UserError, OSError) as error:
        status = complain(f"error: {_in_words(error)}", 2)
    except WorkerError as error:
        if not hasattr(error, "__notes__"):
            with tempfile.NamedTemporaryFile("w", prefix="scalenet-ray-", suffix=".txt", delete=False) as file:
                file.write(error.trace)
            error.add_note(f"its trace: {file.name}")
        status = complain(f"error: {_with_notes(error)}", 1)
    sys.exit(status)


class _StopSignal(KeyboardInterrupt):
    """Raised in the main thread by a signal that asks the job to stop; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise `_StopSignal` in the block at the first SIGINT or SIGTERM; an ignored signal stays ignored (nohup)."""

    def stop(number: int, frame: FrameType | None) -> None:
        """Raise `_StopSignal`; the next signal ends the process at once."""
        del frame
        _end_at_next_signal()
        raise _StopSignal(number)

    before = {number: signal.getsignal(number) for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            # After a stop the process is about to exit, and the next signal may end it at once.
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)


def _end_at_next_signal() -> None:
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


class _Output(io.FileIO):
    """Output file that drops what cannot be written: the reader has exited (`| head`), or the disk is full."""

    def write(self, data: Any) -> int:
        """Write bytes; returns their number also if they were dropped."""
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def _lenient(stream: TextIO | None) -> TextIO:
    """A standard stream that fails neither for unknown characters nor for a closed pipe; others are returned as is."""
    if stream is None:
        # Closed by the shell (`>&-`).
        return open(os.devnull, "w", encoding="utf-8")
    try:
        file = _Output(stream.fileno(), "w", closefd=False)
    except (AttributeError, OSError):
        return stream
    stream.flush()
    # An unbuffered stream (PYTHONUNBUFFERED, as Ray's jobs have it) writes through its text layer.
    by_lines = bool(stream.line_buffering) or getattr(stream, "write_through", False)
    return io.TextIOWrapper(io.BufferedWriter(file), stream.encoding, "backslashreplace", line_buffering=by_lines)


def _in_words(error: UserError | OSError) -> str:
    """The message of an error; of an `OSError` of the system, its file, its reason and what to check."""
    if isinstance(error, OSError) and error.errno and error.strerror:
        about = f"{error.filename}: " if error.filename else ""
        return f"{about}{error.strerror}: check the path, its permissions, and the room on its disk"
    return str(error)


def _with_notes(error: BaseException, otherwise: str = "") -> str:
    """The message and the notes of an error in one line."""
    return "; ".join(part for part in (str(error), *getattr(error, "__notes__", [])) if part) or otherwise


def complain(line: str, status: int) -> int:
    """Print an error in one line on the standard error, and return the exit status."""
    LIVE.clear()
    print(" ".join(line.split("\n")), file=sys.stderr)  # noqa: T201
    return status


class JsonLines(logging.Formatter):
    """Log formatter: JSON with time (UTC), level, logger, message, and the fields of `extra={"fields": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr() -> None:
    """Log warnings of the package, or from the level in SCALENET_RAY_LOG; raises `UserError` if that is no level."""
    level = os.environ.get("SCALENET_RAY_LOG", "WARNING").upper()
    if level not in logging.getLevelNamesMapping():
        msg = f"SCALENET_RAY_LOG must be DEBUG, INFO, WARNING or ERROR, got {level}"
        raise UserError(msg)
    handler = _Handler()
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("scalenet_ray")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level)
