"""Training batches of a worker, made in order by Ray Data tasks.

The content of a batch depends on seed, epoch and rank alone. The data set is never materialized: readers prefetch a few
batches.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext
from safetensors.numpy import load, save

from scalenet_ray.core.errors import TileError
from scalenet_ray.engine.rows import GeneratorSource
from scalenet_ray.training.recipe import Recipe, Row
from scalenet_ray.training.schedule import Epochs, Pick

__all__ = [
    "BatchStream",
    "make_batch",
    "read_batch",
]


def make_batch(recipe: Recipe, picks: list[Pick | None]) -> pa.Table:
    """Make a batch, packed as one row: "batch" (its arrays, as safetensors) and "failed" (reasons, as JSON).

    An example whose image cannot be used is replaced by a blank one, with the reason in "failed".
    """
    rows: list[Row] = []
    failed: list[str] = []
    for pick in picks:
        try:
            if pick is None:
                rows.append(recipe.blank())
            elif pick.epoch is None:
                rows.append(recipe.validation_example(pick.example))
            else:
                rows.append(recipe.example(pick.example, pick.epoch))
        except TileError as error:
            rows.append(recipe.blank())
            failed.append(error.reason)
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return pa.table({"batch": pa.array([save(arrays)], pa.large_binary()), "failed": [json.dumps(failed)]})


def read_batch(table: pa.Table) -> tuple[dict[str, np.ndarray], list[str]]:
    """Unpack a batch of `make_batch`: arrays by name, [examples, ...] each, and the reasons of failed examples."""
    return load(table["batch"][0].as_py()), json.loads(table["failed"][0].as_py())


class _BatchSource(GeneratorSource):
    """Datasource of one reader, with a row per step of `steps`."""

    def __init__(self, recipe: Recipe, epochs: Epochs, rank: int, steps: range) -> None:
        super().__init__()
        self._recipe, self._epochs, self._rank, self._steps = recipe, epochs, rank, steps

    def read(self, reader: int) -> Iterator[pa.Table]:
        """Yield the batches; there is a single reader."""
        del reader
        for step in self._steps:
            yield make_batch(self._recipe, self._epochs.picks(step, self._rank))


@dataclass(frozen=True)
class BatchStream:
    """Batches of a worker, made by several readers in turn.

    Attributes:
        recipe: makes the examples.
        epochs: selects the examples of each batch.
        rank: the worker's rank.
        readers: number of read tasks.
        cpus: CPUs of each read task.
    """

    recipe: Recipe
    epochs: Epochs
    rank: int
    readers: int
    cpus: float

    def batches(self, first: int, last: int) -> Iterator[tuple[dict[str, np.ndarray], list[str]]]:
        """Iterate over the batches of the steps `first` to `last - 1`, as `read_batch` returns them."""
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # Emit every batch at once.
        context.target_max_block_size = 1
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # It warns about disabled progress bars.
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        streams = [self._stream(range(first + i, last, self.readers)) for i in range(min(self.readers, last - first))]
        for step in range(last - first):
            yield read_batch(next(streams[step % len(streams)]))

    def _stream(self, steps: range) -> Iterator[pa.Table]:
        source = _BatchSource(self.recipe, self.epochs, self.rank, steps)
        dataset = ray.data.read_datasource(source, num_cpus=self.cpus, override_num_blocks=1)
        return iter(dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1))
