"""What a training run says as it goes: a line an epoch, metrics.json, and TensorBoard's events in the run folder."""

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

__all__ = [
    "TrainingLog",
]


class TrainingLog:
    """Takes in each epoch's row of `train`; a run that is taken up keeps the epochs it has.

    Args:
        run: the run folder; gets metrics.json and tensorboard/, both after each epoch.
        facts: what metrics.json says besides the epochs.
        epochs: how many there will be.
        say: takes a line for the person who waits.
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
        self._stands()

    @property
    def failed(self) -> list[str]:
        """Why images could not be used, one reason each."""
        return sorted(self._failed)

    @property
    def document(self) -> dict[str, Any]:
        """What metrics.json holds."""
        rows = [self._rows[epoch] for epoch in sorted(self._rows)]
        return {**self._facts, "failed": self.failed, "epochs": rows}

    def __call__(self, row: dict[str, Any]) -> None:
        """An epoch is over."""
        self._failed.update(row["failed"])
        self._rows[row["epoch"]] = {name: value for name, value in row.items() if name != "failed"}
        rows = [self._rows[epoch] for epoch in sorted(self._rows)]
        self._stands()
        self._run.write_json("metrics.json", self.document)
        self._write_events(self._rows[row["epoch"]])
        seconds = sorted(other["seconds"] for other in rows)[len(rows) // 2]
        self._say(
            f"epoch {row['epoch']}/{self._epochs}: loss {row['loss']:.4f}, {_in_words(row['val'])}"
            f"{row['images_per_second']:.1f} images/s, {_time(seconds * (self._epochs - row['epoch']))} left"
        )

    def _stands(self) -> None:
        self._run.standing = f"{len(self._rows)} of {self._epochs} epochs done"

    def _write_events(self, row: dict[str, Any]) -> None:
        """A file of its own for each epoch: S3 cannot append, and a writer has written all only once it is closed."""
        with tempfile.TemporaryDirectory() as folder:
            with SummaryWriter(folder, filename_suffix=f".{row['epoch']:05d}") as writer:
                for name, value in _scalars(row):
                    writer.add_scalar(name, value, row["epoch"])
            (path,) = Path(folder).iterdir()
            storage.write_bytes_atomic(storage.join(self._run.uri, "tensorboard", path.name), path.read_bytes())


def _scalars(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row, lists by position: ("val/iou/1", 40.2)."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from _scalars({str(i): each for i, each in enumerate(value)}, f"{prefix}{name}/")
        elif name != "epoch" and math.isfinite(value):
            yield prefix + name, value


def _in_words(figures: dict[str, Any]) -> str:
    return "".join(f"val {name} {value:.3g}, " for name, value in figures.items() if not isinstance(value, list))


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
