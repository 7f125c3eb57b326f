"""Rows that are made while a Ray Data stream runs: read tasks that are generators."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

__all__ = ["GeneratorSource"]


class GeneratorSource(Datasource):
    """One read task for each reader, whose tables are made as they are asked for; nobody knows how many.

    Ray Data replays a task that died *by position*: `read` must yield the same tables again.

    Args:
        readers: how many.
    """

    def __init__(self, readers: int = 1) -> None:
        super().__init__()
        self._readers = readers

    def read(self, reader: int) -> Iterator[pa.Table]:
        """The tables of one reader, numbered from 0."""
        raise NotImplementedError

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A task for each reader, whatever `parallelism` Ray Data would like."""
        del parallelism, per_task_row_limit, data_context
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(self.read, reader), metadata) for reader in range(self._readers)]
