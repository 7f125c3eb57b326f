"""Terminal output of the jobs: tables, progress, JSON logs, errors and exit codes."""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType
from typing import Any, TextIO, TypeVar

from scalenet_ray.core.detections import SHOWN_SCORE
from scalenet_ray.core.errors import UserError, WorkerError
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.recursion import Step, out_of_range
from scalenet_ray.evaluation.compare import closer_look_in_words, pareto_front

__all__ = [
    "JsonLines",
    "accuracy_table",
    "check_retry",
    "complain",
    "difference_table",
    "end_run",
    "failure_lines",
    "found_lines",
    "last_line",
    "log_to_stderr",
    "policy_table",
    "run_job",
    "say",
    "step_table",
    "trial_table",
]

_COLUMNS = (
    ("AP", "AP"),
    ("AP50", "AP50"),
    ("AP_small", "AP_small"),
    ("AP_medium", "AP_medium"),
    ("AP_large", "AP_large"),
    ("AR_small", "AR_small"),
    ("AR_medium", "AR_medium"),
    ("AR_large", "AR_large"),
    ("passes", "detector_passes_per_image"),
    ("det MP", "detector_megapixels_per_image"),
    ("net MP", "scalenet_megapixels_per_image"),
    ("images/s", "images_per_second"),
)


_MOST_CLASSES = 5


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


Job = TypeVar("Job")


def policy_table(document: Mapping[str, Any]) -> str:
    """The policies of a metrics.json as text: a row each; figures that were not measured are left out."""
    policies: Mapping[str, Mapping[str, Any]] = document["policies"]
    columns = [(title, key) for title, key in _COLUMNS if any(key in row for row in policies.values())]
    rows = [["policy", *(title for title, _ in columns)]]
    for name, row in policies.items():
        rows.append([name, *(_figure(row.get(key), key) for _, key in columns)])
    return _aligned(rows)


def found_lines(document: Mapping[str, Any]) -> str:
    """What a run without ground truth found, as lines: boxes, images, the most frequent classes, and what is new.

    Args:
        document: what metrics.json holds, with "found" (`analyse_detections`) and "categories", id -> name.
    """
    found, done = document["found"], document["images"]["done"]
    names = {str(label): name for label, name in document["categories"].items()}
    classes = [
        f"{names.get(str(row['label']), 'category ' + str(row['label']))} {row['boxes']}" for row in found["by_class"]
    ]
    more = f" and {len(classes) - _MOST_CLASSES} classes more" if len(classes) > _MOST_CLASSES else ""
    listed = f": {', '.join(classes[:_MOST_CLASSES])}{more}" if classes else ""
    lines = [
        f"found {_counted(found['boxes'], 'box', 'boxes')} that score {SHOWN_SCORE:g} or more, in {found['images']} of "
        f"{_counted(done, 'image')}{listed}"
    ]
    if found["compared"]:
        among = "" if found["compared"] == done else f"in {_counted(found['compared'], 'image')} with such a pass, "
        lines.append(among + closer_look_in_words(found))
    elif done:
        lines.append("nothing says which are new: there was no pass over the whole image alone to compare with")
    return "\n".join(lines)


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def accuracy_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Accuracies by method and set as text, in percent: the mean over seeds, and their standard deviation."""
    sets = list(dict.fromkeys(name for row in scores.values() for name in row))
    rows = [["method", *sets]]
    for method, row in scores.items():
        cells = (f"{row[name]['mean']:.2f} ({row[name]['std']:.2f})" if name in row else "-" for name in sets)
        rows.append([method, *cells])
    return _aligned(rows)


def trial_table(trials: Sequence[Mapping[str, Any]]) -> str:
    """A sweep's trials as text: those on the front, the cheapest first, then those that failed and why."""
    complete = [row for row in trials if row["complete"]]
    best = [complete[i] for i in pareto_front([(row["passes"], row["AP_small"]) for row in complete])]
    paths = list(dict.fromkeys(path for row in best for path in row["values"]))
    rows = [["trial", "passes", "AP_small", "AP", *(path.rpartition(".")[-1] for path in paths)]]
    for row in best:
        figures = (f"{row['passes']:.2f}", f"{row['AP_small']:.1f}", f"{row['AP']:.1f}")
        rows.append([row["trial"], *figures, *(_value(row["values"].get(path)) for path in paths)])
    lines = [f"the front of {len(complete)} trials that saw all images, of {len(trials)}:", _aligned(rows)]
    lines += [f"trial {row['trial']} failed: {row['error']}" for row in trials if row["error"]]
    return "\n".join(lines)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))])
        for name, *cells in rows
    )


def _figure(value: float | None, key: str) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.1f}" if key.startswith("A") or key == "images_per_second" else f"{value:.2f}"


def difference_table(document: Mapping[str, Any]) -> str:
    """How each policy differs from the one compared with, with the middle 95 % of the paired bootstrap: a line each."""
    lines = [f"difference to {document['compared_with']}, and where 95 % of the paired bootstrap's lie:"]
    for name, figures in document["differences"].items():
        parts = (
            f"{figure} {f['difference']:+.1f} [{f['low']:+.1f}, {f['high']:+.1f}]" for figure, f in figures.items()
        )
        lines.append(f"{name}: {', '.join(parts)}")
    return "\n".join(lines)


def step_table(steps: Sequence[Step], policy: Policy) -> str:
    """The steps of a recursion as text: a row a tile, with what was seen in it and what came of it.

    Args:
        steps: in the order in which they were done.
        policy: what they followed.
    """
    rows = [["tile", "depth", "window", "pixels", "out of range", "asked", "found"]]
    for step in steps:
        tile, result = step.tile, step.result
        seen = "-" if step.scale_map is None else f"{out_of_range(tile, step.scale_map, policy).mean():.1%}"
        found = str(len(result.detections)) if result.detector_pixels else "not detected"
        x0, y0, x1, y1 = tile.window.xyxy
        rows.append(
            [
                ".".join(map(str, tile.path)) or "whole",
                str(tile.depth),
                f"{x0}-{x1} x {y0}-{y1}",
                f"{tile.width} x {tile.height}",
                seen,
                " ".join([str(len(step.children)), *(f"({guard})" for guard in result.guards)]),
                result.failure.reason if result.failure else found,
            ]
        )
    return _aligned(rows)


def check_retry(retry_failed: bool, *, resume: bool) -> None:
    """Refuse --retry-failed without --resume; raises `UserError`."""
    if retry_failed and not resume:
        msg = "--retry-failed tries the failed images of a run again, got no --resume: add it, and the run's --output"
        raise UserError(msg)


def failure_lines(document: Mapping[str, Any]) -> str:
    """The failed images of a metrics.json by stage and reason, a line each; "" if none failed."""
    return "".join(
        f"{row['count']} failed in {row['stage']}: {row['reason']} (e.g. {row['example']})\n"
        for row in document["failures"]
    )


def say(text: object) -> None:
    """Print a line on the standard output."""
    print(text)  # noqa: T201


def last_line(document: Mapping[str, Any], uri: str, max_failures: int) -> tuple[str, int]:
    """The last line of a batch job and its exit status.

    Args:
        document: what metrics.json holds.
        uri: the run folder.
        max_failures: images that may fail.

    Returns:
        The line, and 1 if more images failed than may, else 0.
    """
    images = document["images"]
    line = f"{images['done']} of {images['total']} images done, results in {uri} (open its report.html)"
    if not images["failed"]:
        return line, 0
    line += f"; {images['failed']} FAILED: failures.parquet there names each, --resume --retry-failed tries them again"
    if images["failed"] <= max_failures:
        return line, 0
    return f"{line} (--max-failures {max_failures})", 1


def end_run(document: Mapping[str, Any], uri: str, max_failures: int) -> int:
    """Print the failures and the last line of a batch job; takes the arguments of `last_line`.

    Returns:
        The exit status.
    """
    line, status = last_line(document, uri, max_failures)
    say(failure_lines(document) + line)
    return status


def run_job(main: Callable[[Job], int], job: Job) -> None:
    """Run a job and exit with its status; what ends it early is said in one line on the standard error.

    The status is 2 for what the user can correct, 1 for a bug in a worker, whose trace goes to a file that the line
    names, and 130 and 143 for SIGINT and SIGTERM, which let the job write what is finished; the second one ends the
    process at once. A bug in this process keeps its trace. Output that the terminal's encoding does not know is
    escaped, and output that nobody reads any more is dropped.
    """
    sys.stdout, sys.stderr = _lenient(sys.stdout), _lenient(sys.stderr)
    # While the interpreter ends (Ray takes seconds to) a signal finds no work to save.
    atexit.register(_end_at_next_signal)
    try:
        with _stopped_by_signals():
            log_to_stderr()
            status = main(job)
    except _StopSignal as stop:
        status = complain("stopped: " + _with_notes(stop, "nothing done yet"), stop.status)
    except KeyboardInterrupt as stop:
        status = complain("stopped: " + _with_notes(stop, "nothing done yet"), 128 + signal.SIGINT)
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
    """A signal that asks the job to stop.

    Attributes:
        status: the exit status that shells give a process which ended of it.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `_StopSignal` in the block, once; one that is ignored stays so (nohup)."""

    def stop(number: int, frame: FrameType | None) -> None:
        """Raise `_StopSignal`; the next signal ends the process at once."""
        del frame
        _end_at_next_signal()
        raise _StopSignal(number)

    before = {each: signal.getsignal(each) for each in _SIGNALS if signal.getsignal(each) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            # After a stop the process is about to end, and the next signal may end it at once.
            if signal.getsignal(each) is stop:
                signal.signal(each, handler)


def _end_at_next_signal() -> None:
    for each in _SIGNALS:
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, signal.SIG_DFL)


class _Output(io.FileIO):
    """A file whose reader may leave (`| head`) or whose disk may be full: what can't be written is dropped."""

    def write(self, data: Any) -> int:
        """Write bytes; says that all were written where none can be."""
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def _lenient(stream: TextIO) -> TextIO:
    """A standard stream that neither a character nor a reader that leaves makes fail; others than files stay."""
    try:
        file = _Output(stream.fileno(), "w", closefd=False)
    except (AttributeError, OSError):
        return stream
    stream.flush()
    # An unbuffered stream (PYTHONUNBUFFERED, as Ray's jobs have it) writes through its text layer.
    by_lines = bool(stream.line_buffering) or getattr(stream, "write_through", False)
    return io.TextIOWrapper(io.BufferedWriter(file), stream.encoding, "backslashreplace", line_buffering=by_lines)


def _in_words(error: UserError | OSError) -> str:
    """The message of an error; of one that the system raised with a number, what it is about and what to check."""
    if isinstance(error, OSError) and error.errno and error.strerror:
        about = f"{error.filename}: " if error.filename else ""
        return f"{about}{error.strerror}: check the path, its permissions, and the room on its disk"
    return str(error)


def _with_notes(error: BaseException, otherwise: str = "") -> str:
    """The message and the notes of an error in one line."""
    return "; ".join(part for part in (str(error), *getattr(error, "__notes__", [])) if part) or otherwise


def complain(line: str, status: int) -> int:
    """Print an error on the standard error, in one line; gives the status back, for the job to end with."""
    print(" ".join(line.split("\n")), file=sys.stderr)  # noqa: T201
    return status


class JsonLines(logging.Formatter):
    """A record as a JSON object: time (UTC), level, logger, message, and what `extra={"fields": ...}` held."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
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
    """Have the package log to the standard error: warnings, or from the level that SCALENET_RAY_LOG names.

    Raises:
        UserError: if it names none.
    """
    level = os.environ.get("SCALENET_RAY_LOG", "WARNING").upper()
    if level not in logging.getLevelNamesMapping():
        msg = f"SCALENET_RAY_LOG must be DEBUG, INFO, WARNING or ERROR, got {level}"
        raise UserError(msg)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("scalenet_ray")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level)
