"""Log of a training run: progress lines, metrics.json and TensorBoard events in the run folder."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from scalenet_ray.data import storage
from scalenet_ray.runs.folder import RunFolder


class TrainingLog:
    """Callback that logs the result of each epoch; a resumed run keeps the epochs it has.

    Args:
        run: run folder; metrics.json and tensorboard/ are written after each epoch.
        facts: further entries of metrics.json.
        epochs: number of epochs of the run.
        say: called with each line of progress.
    """

    def __init__(self, run: RunFolder, facts: Mapping[str, Any], epochs: int, say: Callable[[str], None]) -> None:
        self._run = run
        self._facts = facts
        self._epochs = epochs
        self._say = say
        self._failed: set[str] = set()
        self._rows: dict[int, dict[str, Any]] = {}
        before = storage.join(run.uri, "metrics.json")
        if storage.exists(before):
            document = json.loads(storage.read_bytes(before))
            self._rows = {row["epoch"]: row for row in document["epochs"]}
            self._failed = set(document["failed"])
        self._set_standing()

    @property
    def failed(self) -> list[str]:
        """Errors of images that could not be used, sorted and unique."""
        return sorted(self._failed)

    @property
    def document(self) -> dict[str, Any]:
        """Content of metrics.json."""
        rows = [self._rows[epoch] for epoch in sorted(self._rows)]
        return {**self._facts, "failed": self.failed, "epochs": rows}

    def __call__(self, row: dict[str, Any]) -> None:
        """Log a finished epoch."""
        self._failed.update(row["failed"])
        self._rows[row["epoch"]] = {name: value for name, value in row.items() if name != "failed"}
        self._set_standing()
        self._run.write_json("metrics.json", self.document)
        self._write_events(self._rows[row["epoch"]])
        seconds = sorted(logged["seconds"] for logged in self._rows.values())[len(self._rows) // 2]
        self._say(
            f"epoch {row['epoch']}/{self._epochs}: loss {row['loss']:.4f}, {_in_words(row['val'])}"
            f"{row['images_per_second']:.1f} images/s, {_time(seconds * (self._epochs - row['epoch']))} left"
        )

    def _set_standing(self) -> None:
        self._run.standing = f"{len(self._rows)} of {self._epochs} epochs done"

    def _write_events(self, row: dict[str, Any]) -> None:
        """Write one event file per epoch: S3 cannot append, and a writer is flushed only when it is closed."""
        with tempfile.TemporaryDirectory() as folder:
            with SummaryWriter(folder, filename_suffix=f".{row['epoch']:05d}") as writer:
                for name, value in _scalars(row):
                    writer.add_scalar(name, value, row["epoch"])
            (path,) = Path(folder).iterdir()
            storage.write_bytes_atomic(storage.join(self._run.uri, "tensorboard", path.name), path.read_bytes())


def _scalars(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Names and values of a row's finite numbers; list elements are named by position: ("val/iou/1", 40.2)."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from _scalars({str(i): element for i, element in enumerate(value)}, f"{prefix}{name}/")
        elif name != "epoch" and math.isfinite(value):
            yield prefix + name, value


def _in_words(figures: dict[str, Any]) -> str:
    return "".join(f"val {name} {value:.3g}, " for name, value in figures.items() if not isinstance(value, list))


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
