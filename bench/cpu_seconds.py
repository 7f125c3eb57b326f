"""CPU seconds of this process and those that it started, by what they do."""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["CpuClock", "cpu_clocks", "spent_by_role"]

_ROLES = (
    "ReadTileSource",
    "ScaleStage",
    "DetectStage",
    "FrontierActor",
    "PipelineActor",
    "raylet",
    "gcs_server",
    "dashboard",
)
_TICKS = os.sysconf("SC_CLK_TCK")


class CpuClock(NamedTuple):
    """A process's.

    Attributes:
        role: what it does now; "other" if that is none of ours.
        seconds: of CPU so far.
    """

    role: str
    seconds: float


def cpu_clocks() -> dict[int, CpuClock]:
    """The clock of this process and of each below it, by process id."""
    parents, clocks = {}, {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                command = (path / "cmdline").read_text(errors="replace")
                parents[int(path.name)] = int(fields[1])
                role = next((role for role in _ROLES if role in command), "other")
                clocks[int(path.name)] = CpuClock(role, (int(fields[11]) + int(fields[12])) / _TICKS)
    ours = [os.getpid()]
    for process in ours:
        ours += [child for child, parent in parents.items() if parent == process]
    clocks[os.getpid()] = clocks[os.getpid()]._replace(role="driver")
    return {process: clocks[process] for process in ours}


def spent_by_role(before: dict[int, CpuClock], after: dict[int, CpuClock]) -> dict[str, float]:
    """CPU seconds between two readings, the most first; a process that was idle at the second counts by the first."""
    spent: dict[str, float] = defaultdict(float)
    for process, (role, seconds) in after.items():
        earlier = before.get(process, CpuClock(role, 0.0))
        spent[earlier.role if role == "other" else role] += seconds - earlier.seconds
    return dict(sorted(spent.items(), key=lambda item: -item[1]))
