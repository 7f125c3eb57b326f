"""Seconds that travel with the rows: what the stages before took, for whoever reads the last row.

A column beside the rest, so that a call that is lost takes its time with it, and what arrives counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import pyarrow as pa

from scalenet_ray.core.clock import STAGES, add_seconds, measured

__all__ = ["carries_seconds", "measure", "seconds_of"]

_COLUMN = "seconds"
_TYPE = pa.list_(pa.float64(), len(STAGES))


def measure(make: Callable[[], pa.Table]) -> pa.Table:
    """Make a table of one row, and note in it how long each stage was busy with it."""
    with measured() as tally:
        table = make()
    cell = [tally.seconds[stage] for stage in STAGES]
    return table.append_column(pa.field(_COLUMN, _TYPE), pa.array([cell], _TYPE))


def carries_seconds(call: Callable[[Any, pa.Table], pa.Table]) -> Callable[[Any, pa.Table], pa.Table]:
    """A stage's `__call__` whose row notes its own seconds and those that its input came with."""

    @wraps(call)
    def timed_call(stage: Any, table: pa.Table) -> pa.Table:
        """The call, with its seconds in a column."""

        def make() -> pa.Table:
            """The call, after what its input took has been added."""
            add_seconds(seconds_of(table))
            return call(stage, table)

        return measure(make)

    return timed_call


def seconds_of(table: pa.Table) -> Mapping[str, float]:
    """Stage -> seconds, the sum over a table's rows; nothing for a table whose rows carry none."""
    if _COLUMN not in table.column_names:
        return {}
    rows = table.column(_COLUMN).to_pylist()
    return {stage: sum(row[i] for row in rows) for i, stage in enumerate(STAGES)}
