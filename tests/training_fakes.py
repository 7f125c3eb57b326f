"""A small training recipe with faults, importable by Ray's workers."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from scalenet_ray.core.errors import TileError
from scalenet_ray.training.recipe import Batch, Recipe, Row


@dataclass(frozen=True)
class SmallRecipe:
    """Fits y = x0 + 2 x1 + 3 x2 + 4 x3; example i is image 100 + i.

    Attributes:
        train: how many examples.
        validation: how many to validate on.
        noisy: the network has batch norm and dropout, so that there is more to a run than its weights.
        unreadable: training examples that cannot be used.
    """

    train: int = 12
    validation: int = 5
    noisy: bool = False
    unreadable: tuple[int, ...] = ()

    best_by = "minus_loss"
    file_name = "small.safetensors"
    learning_rate = 0.03

    def sizes(self) -> tuple[int, int]:
        return self.train, self.validation

    def _row(self, image_id: int, seed: list[int]) -> Row:
        x = np.random.default_rng(seed).normal(size=4).astype(np.float32)
        y = x @ np.arange(1, 5, dtype=np.float32)
        return {"image_id": np.array([image_id], np.int64), "x": x, "y": y[None], "counts": np.ones(1, np.float32)}

    def example(self, index: int, epoch: int) -> Row:
        if index in self.unreadable:
            msg = f"image {100 + index} cannot be read"
            raise TileError(msg)
        return self._row(100 + index, [1, index, epoch])

    def validation_example(self, index: int) -> Row:
        return self._row(500 + index, [2, index])

    def blank(self) -> Row:
        return {name: np.zeros_like(values) for name, values in self._row(-1, [3]).items()}

    def build(self) -> nn.Module:
        noise = [nn.BatchNorm1d(16), nn.Dropout(0.2)] if self.noisy else []
        return nn.Sequential(nn.Linear(4, 16), *noise, nn.Tanh(), nn.Linear(16, 1))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        squared = batch["counts"] * (model(batch["x"]) - batch["y"]) ** 2
        return squared.sum() / batch["counts"].sum().clamp(min=1)

    def count(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        counts = batch["counts"]
        squared = float((counts * (model(batch["x"]) - batch["y"]) ** 2).sum())
        seen = np.zeros(self.validation)
        np.add.at(seen, batch["image_id"][counts > 0].numpy() - 500, 1)
        return {"squared": np.array(squared), "seen": seen}

    def figures(self, counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        loss = float(counts["squared"] / counts["seen"].sum())
        return {"minus_loss": -loss, "loss": loss, "seen": counts["seen"].tolist(), "folder": os.getcwd()}

    def save(self, model: nn.Module, path: str) -> None:
        save_file(model.state_dict(), path)


class Faulty:
    """A recipe to which something happens in a step, counted from 0 in each process that trains.

    Its process gets SIGKILL at step `killed_at`, once, if the file `marker` is not there, and not before the file
    `after` is: what a checkpoint is registered by. The loss is NaN from step `nan_at` on; the disk is full after
    `full_after` networks.
    """

    def __init__(
        self,
        inner: Recipe,
        *,
        killed_at: int | None = None,
        marker: Path | None = None,
        after: Path | None = None,
        nan_at: int | None = None,
        full_after: int | None = None,
    ) -> None:
        self._inner = inner
        self._killed_at, self._marker, self._after = killed_at, marker, after
        self._nan_at, self._full_after = nan_at, full_after
        self._steps = self._saved = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        step, self._steps = self._steps, self._steps + 1
        if self._killed_at is not None and step >= self._killed_at:
            self._die_once()
        loss = self._inner.loss(model, batch)
        return loss * torch.nan if self._nan_at is not None and step >= self._nan_at else loss

    def _die_once(self) -> None:
        assert self._marker is not None
        while self._after is not None and not self._after.exists():
            time.sleep(0.05)
        try:
            os.close(os.open(self._marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def save(self, model: nn.Module, path: str) -> None:
        if self._full_after is not None and self._saved >= self._full_after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        self._saved += 1
        self._inner.save(model, path)
