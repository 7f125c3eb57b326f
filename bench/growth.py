"""Growth: images a second and memory against the number of images, with a detector that costs nothing.

    make bench
    .venv/bin/python -m bench.growth --sizes 5000 50000 200000

Each size is a whole `detect` on files of 64 pixels, in a fresh process with a fresh Ray: listing, a first pass and two
windows, shards, results, analysis, report. The peaks of each process's own memory, without code and the object store,
are sampled five times a second from start to end: of the driver, the frontier, GCS and Ray Data's statistics actor
each, of the largest other worker of Ray, of the head (driver, frontier, GCS, raylet, dashboard) together, and of the
object store.
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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import ray
import tyro
from PIL import Image
from ray._private.internal_api import node_stats

from bench.fakes import grey_image
from scalenet_ray.commands.detect import DetectImages
from scalenet_ray.commands.detect import main as detect_images
from scalenet_ray.data.image_records import ImageRecord
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.report.pictures import encoded

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
    """CPU time of a process.

    Attributes:
        role: what it does now; "other" if that is none of ours.
        seconds: of CPU so far.
    """

    role: str
    seconds: float


def cpu_clocks() -> dict[int, CpuClock]:
    """CPU time of this process and of each one below it, by process id."""
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
    """CPU seconds of each role between two readings, in descending order.

    A process that was idle at the second reading counts for its role at the first.
    """
    spent: dict[str, float] = defaultdict(float)
    for process, (role, seconds) in after.items():
        earlier = before.get(process, CpuClock(role, 0.0))
        spent[earlier.role if role == "other" else role] += seconds - earlier.seconds
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


_HEAD = ("gcs_server", "raylet", "ray::FrontierActor", "dashboard")
_ALONE = {"gcs": "gcs_server", "frontier": "ray::FrontierActor", "statistics": "ray::_StatsActor"}
_FILES_PER_FOLDER = 1000


@dataclass(frozen=True)
class Growth:
    """Cost against the number of images.

    Attributes:
        sizes: how many images, 1,000 or more for a rate; more than one are compared with the first.
    """

    sizes: tuple[int, ...] = (5000, 50_000, 200_000)


class Peaks(threading.Thread):
    """Samples memory five times a second until stopped: object store, head, and some processes alone, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.store = self.head = 0
        self.alone: Counter[str] = Counter()
        self._stop_asked = threading.Event()

    def run(self) -> None:
        """Sample until `stop` is called."""
        while not self._stop_asked.wait(0.2):
            # Looked up each time: processes start and end.
            below = _descendants(os.getpid())
            head = [os.getpid(), *(pid for pid in below if _is_one_of(pid, *_HEAD))]
            self.head = max(self.head, sum(map(_own_bytes, head)))
            named = {name: [pid for pid in below if _is_one_of(pid, command)] for name, command in _ALONE.items()}
            known = {*head, *(pid for pids in named.values() for pid in pids)}
            workers = [pid for pid in below if pid not in known and _is_one_of(pid, "ray::")]
            named |= {"driver": [os.getpid()], "worker": workers}
            for name, pids in named.items():
                self.alone |= {name: max(map(_own_bytes, pids), default=0)}
            if ray.is_initialized() and (nodes := ray.nodes()):
                stats = node_stats(nodes[0]["NodeManagerAddress"], nodes[0]["NodeManagerPort"]).store_stats
                self.store = max(self.store, stats.object_store_bytes_used)

    def stop(self) -> None:
        """Stop and wait for the last sample."""
        self._stop_asked.set()
        self.join()


def _descendants(pid: int) -> list[int]:
    """Ids of the processes below one: Ray's are all below the driver that started it."""
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
    """True if one of the first two words of a process's command line contains one of the names."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:2]
    except OSError:
        return False
    return any(name.encode() in word for name in names for word in words)


def _own_bytes(pid: int) -> int:
    """Resident memory of a process, without what it shares: code, and the object store, which is counted once."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        # It ended since it was listed.
        return 0


def _write_images(folder: Path, count: int) -> None:
    """Write `count` image files in subfolders: hard links to one file of each, since a file takes a limited number."""
    content = encoded(Image.fromarray(grey_image(ImageRecord(1, ""))), "PNG")
    for start in range(0, count, _FILES_PER_FOLDER):
        part = folder / f"{start:07d}"
        part.mkdir(parents=True)
        first = part / "0000.png"
        first.write_bytes(content)
        for i in range(1, min(_FILES_PER_FOLDER, count - start)):
            (part / f"{i:04d}.png").hardlink_to(first)


def _measure(images: int) -> dict[str, float]:
    """Rate and peaks of memory of one run."""
    peaks = Peaks()
    with TemporaryDirectory() as folder:
        _write_images(Path(folder, "images"), images)
        run = Path(folder, "run")
        networks = NetworkSpec(detector="bench.fakes:SmallObjects")
        peaks.start()
        detect_images(DetectImages(images=f"{folder}/images", output=str(run), policy="first-pass", networks=networks))
        peaks.stop()
        metrics = json.loads((run / "metrics.json").read_text())
    ray.shutdown()
    (policy,) = metrics["policies"].values()
    return {
        "images_per_second": policy["images_per_second"],
        "tiles_per_image": policy["tiles_per_image"],
        "object_store_mb": peaks.store / 2**20,
        "head_mb": peaks.head / 2**20,
        **{f"{name}_mb": peak / 2**20 for name, peak in peaks.alone.items()},
    }


def growth(sizes: tuple[int, ...]) -> dict[str, Any]:
    """Measure each size in a process of its own.

    Returns:
        Number of images -> images_per_second, tiles_per_image; peaks of object_store_mb, head_mb and of processes.
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
        more = int(size) - int(first[0])
        grown = {name: round((row[name] - first[1][name]) * 2**20 / more) for name in row if name.endswith("_mb")}
        print(f"{size} images over {first[0]}: {ratios}; bytes for each further image: {grown}")


if __name__ == "__main__":
    main(tyro.cli(Growth))
