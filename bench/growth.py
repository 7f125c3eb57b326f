"""Growth: images a second and memory against the number of images, with networks that cost nothing.

    make bench
    .venv/bin/python -m bench.growth --sizes 500 5000 50000

Each size runs in a fresh process with a fresh Ray, into a run folder, with two windows to an image. The head is the
driver, the frontier, and Ray's own head processes (GCS, raylet, dashboard); the peaks of their resident memory,
together and some alone, and of the object store, are sampled from start to end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import ray
import tyro
from ray._private.internal_api import node_stats

from bench.fakes import fake_networks, grey_image, records_of, two_windows
from scalenet_ray.engine.session import RaySession
from scalenet_ray.runs.batch import PolicyRun
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.resources import ResourceChoice

__all__ = ["CpuClock", "cpu_clocks", "growth", "spent_by_role"]

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


_HEAD = ("gcs_server", "raylet", "ray::FrontierActor", "dashboard")
_ALONE = {"gcs_mb": "gcs_server", "frontier_mb": "ray::FrontierActor", "statistics_mb": "ray::_StatsActor"}


@dataclass(frozen=True)
class Growth:
    """Cost against the number of images.

    Attributes:
        sizes: how many images; more than one are compared with the first.
    """

    sizes: tuple[int, ...] = (500, 5000, 50_000)


class Peaks(threading.Thread):
    """Samples memory five times a second until stopped: object store, head, and some processes alone, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.store = self.head = 0
        self.alone: Counter[str] = Counter()
        self._stop_asked = threading.Event()

    def run(self) -> None:
        """Sample."""
        node = ray.nodes()[0]
        while not self._stop_asked.wait(0.2):
            # Looked up each time: the frontier starts after this does.
            below = _descendants(os.getpid())
            head = [os.getpid(), *(pid for pid in below if _is_one_of(pid, *_HEAD))]
            stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
            self.store = max(self.store, stats.object_store_bytes_used)
            self.head = max(self.head, sum(map(_resident_bytes, head)))
            self.alone |= {"driver_mb": _resident_bytes(os.getpid())}
            for figure, name in _ALONE.items():
                self.alone |= {figure: sum(_resident_bytes(pid) for pid in below if _is_one_of(pid, name))}

    def stop(self) -> None:
        """Stop and wait for the last sample."""
        self._stop_asked.set()
        self.join()


def _descendants(pid: int) -> list[int]:
    """The processes below one: Ray's are all below the driver that started it."""
    parents = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for ancestor in found:
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found[1:]


def _is_one_of(pid: int, *names: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:2]
    except OSError:
        return False
    return any(name.encode() in word for name in names for word in words)


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        # It ended since it was listed.
        return 0


def _measure(images: int) -> dict[str, float]:
    """One run."""
    session = RaySession(ResourceChoice())
    policy = two_windows()
    start = partial(session.start, policy=policy, networks=fake_networks(), open_image=grey_image)
    peaks = Peaks()
    with TemporaryDirectory() as output:
        peaks.start()
        progress = PolicyRun(records_of(images), policy.name, start, RunFolder(output), lambda _: None).finish()
        peaks.stop()
    ray.shutdown()
    return {
        "images_per_second": progress.images_per_second,
        "object_store_mb": peaks.store / 2**20,
        "head_mb": peaks.head / 2**20,
        **{figure: peak / 2**20 for figure, peak in peaks.alone.items()},
    }


def growth(sizes: tuple[int, ...]) -> dict[str, Any]:
    """Each size in a process of its own.

    Returns:
        Number of images -> images_per_second; peaks of object_store_mb, head_mb, and of some processes alone.
    """
    rows = {}
    for size in sizes:
        command = [sys.executable, "-m", "bench.growth", "--sizes", str(size)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows[str(size)] = json.loads(output.splitlines()[-1])
        print(f"{size} images: {rows[str(size)]}", flush=True)
    return rows


def main(job: Growth) -> None:
    """Measure one size here, or several, and print their ratios to the first."""
    if len(job.sizes) == 1:
        print(json.dumps(_measure(job.sizes[0])))
        return
    first, *others = growth(job.sizes).items()
    for size, row in others:
        ratios = {name: round(value / first[1][name], 3) for name, value in row.items()}
        print(f"{size} images over {first[0]}: {ratios}")


if __name__ == "__main__":
    main(tyro.cli(Growth))
