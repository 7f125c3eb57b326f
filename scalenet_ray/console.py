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

_MOST_CLASSES = 20
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Job = TypeVar("Job")


def policy_table(document: Mapping[str, Any]) -> str:
    """Format the metrics of all policies as a table, without the columns that were not measured."""
    policies: Mapping[str, Mapping[str, Any]] = document["policies"]
    columns = [(title, key) for title, key in _COLUMNS if any(key in row for row in policies.values())]
    rows = [["policy", *(title for title, _ in columns)]]
    for name, row in policies.items():
        rows.append([name, *(_figure(row.get(key), key) for _, key in columns)])
    return _aligned(rows)


def found_lines(document: Mapping[str, Any]) -> str:
    """Summarise a run without ground truth: the classes and images with most boxes, and the boxes new by zooming.

    Args:
        document: contents of metrics.json, with "found" (`FoundCounts`) and "categories", id -> name.
    """
    found, done = document["found"], document["images"]["done"]
    names = {str(label): name for label, name in document["categories"].items()}
    classes, lines = found["by_class"], []
    if classes:
        rows = [["class", "boxes", "images", *(["new by zooming"] if found["compared"] else []), "median side"]]
        for row in classes[:_MOST_CLASSES]:
            name = names.get(str(row["label"]), f"category {row['label']}")
            new = [str(row["new"])] if found["compared"] else []
            rows.append([name, str(row["boxes"]), str(row["images"]), *new, f"{row['median_side']:.0f} px"])
        more = len(classes) - _MOST_CLASSES
        lines += [_aligned(rows), *([f"and {_counted(more, 'class', 'classes')} more"] if more > 0 else [])]
        listed = (f"{row['file'].rpartition('/')[2]} ({row['boxes']})" for row in found["most"])
        lines.append(f"most boxes: {', '.join(listed)}")
    lines.append(
        f"found {_counted(found['boxes'], 'box', 'boxes')} that score {SHOWN_SCORE:g} or more, in {found['images']} of "
        f"{_counted(done, 'image')}"
    )
    if found["compared"]:
        among = "" if found["compared"] == done else f"in {_counted(found['compared'], 'image')} with such a pass, "
        lines.append(among + closer_look_in_words(found))
    elif done:
        lines.append("nothing says which are new: there was no pass over the whole image alone to compare with")
    return "\n".join(lines)


def _counted(count: int, singular: str, plural: str = "") -> str:
    return f"{count} {singular if count == 1 else plural or singular + 's'}"


def accuracy_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Format accuracies by method and set, in percent: mean and standard deviation over seeds."""
    sets = list(dict.fromkeys(name for row in scores.values() for name in row))
    rows = [["method", *sets]]
    for method, row in scores.items():
        cells = (f"{row[name]['mean']:.2f} ({row[name]['std']:.2f})" if name in row else "-" for name in sets)
        rows.append([method, *cells])
    return _aligned(rows)


def trial_table(trials: Sequence[Mapping[str, Any]]) -> str:
    """Format the trials of a sweep: those on the Pareto front by cost, then the failed ones with their errors."""
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
    """Align rows of cells: the first column left, the others right."""
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
    """Format the differences of each policy to the baseline, with 95 % intervals of the paired bootstrap."""
    lines = [f"difference to {document['compared_with']}, and where 95 % of the paired bootstrap's lie:"]
    for name, figures in document["differences"].items():
        parts = (
            f"{figure} {f['difference']:+.1f} [{f['low']:+.1f}, {f['high']:+.1f}]" for figure, f in figures.items()
        )
        lines.append(f"{name}: {', '.join(parts)}")
    return "\n".join(lines)


def step_table(steps: Sequence[Step], policy: Policy) -> str:
    """Format the steps of a recursion: a row for each tile, with its windows and detections.

    Args:
        steps: in order.
        policy: the policy.
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
    """Format the failed images by stage and reason, a line each; "" if none failed."""
    return "".join(
        f"{row['count']} failed in {row['stage']}: {row['reason']} (e.g. {row['example']})\n"
        for row in document["failures"]
    )


def say(text: object) -> None:
    """Print a line on the standard output."""
    print(text)  # noqa: T201


def last_line(document: Mapping[str, Any], uri: str, max_failures: int) -> tuple[str, int]:
    """Return the last line of a batch job and its exit status.

    Args:
        document: contents of metrics.json.
        uri: the run folder.
        max_failures: number of images that may fail.

    Returns:
        The line, and status 1 if more images failed, else 0.
    """
    images = document["images"]
    line = f"{images['done']} of {images['total']} images done, results in {uri} (open its report.html)"
    if not images["failed"]:
        return line, 0
    line += f"; {images['failed']} FAILED: failures.parquet there names each, --resume --retry-failed tries them again"
    if images["failed"] <= max_failures:
        return line, 0
    return f"{line} (--max-failures {max_failures})", 1


def resolution_lines(document: Mapping[str, Any]) -> str:
    """Return a line for each policy that never looked closely at images, or whose first look at images saw nothing.

    Args:
        document: contents of metrics.json.
    """
    blind = "".join(
        f"{name}: the first look saw nothing in {row['guards']['nothing_seen']} images; all that is textured in them "
        "was looked at again\n"
        for name, row in document["policies"].items()
        if row.get("guards", {}).get("nothing_seen")
    )
    return blind + "".join(
        f"{name}: {row['images_reduced']} images were seen reduced only, down to 1 / {row['most_reduced']:.1f} of "
        "their own resolution: small objects in them are missed; policy regions looks closer, as far as "
        "--smallest-object says\n"
        for name, row in document["policies"].items()
        if row.get("images_reduced")
    )


def end_run(document: Mapping[str, Any], uri: str, max_failures: int) -> int:
    """Print the failures, what was never seen closely, and the last line of a batch job, as `last_line`.

    Returns:
        The exit status.
    """
    line, status = last_line(document, uri, max_failures)
    say(resolution_lines(document) + failure_lines(document) + line)
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
    """Raised in the main thread by a signal that asks the job to stop.

    Attributes:
        status: exit status by the convention of shells, 128 plus the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


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


def _lenient(stream: TextIO) -> TextIO:
    """A standard stream that fails neither for unknown characters nor for a closed pipe; others are returned as is."""
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
    """Log warnings of the package to the standard error, or from the level in SCALENET_RAY_LOG.

    Raises:
        UserError: if SCALENET_RAY_LOG is no level.
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
