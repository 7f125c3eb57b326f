"""Memory against the number of images: the object store's peak, and the head's, over a run of each size.

    make bench
    .venv/bin/python bench/engine_memory.py --sizes 500 5000

Each size runs in a fresh process with a fresh Ray, on scenes of the embedded sample with its own
networks and the policy `scalenet`. The head is the driver, the frontier, and Ray's own head processes (GCS,
raylet, dashboard); the peak of their resident memory is sampled from start to end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
import tyro
from ray._private.internal_api import node_stats

from scalenet_ray.core.coco import images_and_categories
from scalenet_ray.core.policy import parse_policy
from scalenet_ray.core.samples import write_sample
from scalenet_ray.engine.batch import image_opener, run_policy
from scalenet_ray.engine.pipeline import Resources
from scalenet_ray.engine.runs import RunFolder
from scalenet_ray.engine.session import Session
from scalenet_ray.engine.stages import Networks
from scalenet_ray.models.networks import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkNames

_HEAD = ("gcs_server", "raylet", "ray::FrontierActor", "dashboard")


@dataclass(frozen=True)
class EngineMemory:
    """Peak memory at several numbers of images.

    Attributes:
        sizes: how many images; more than one are compared with the first.
        folder: where the scenes are written; they are reused if they are there.
    """

    sizes: tuple[int, ...] = (500, 5000)
    folder: Path = Path("runs/bench")


class Peaks(threading.Thread):
    """Samples memory ten times a second until stopped: object store, head, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.store = self.head = 0
        self._stop_asked = threading.Event()

    def run(self) -> None:
        """Sample."""
        node = ray.nodes()[0]
        while not self._stop_asked.wait(0.2):
            # Looked up each time: the frontier starts after this does.
            head = [os.getpid(), *(pid for pid in _descendants(os.getpid()) if _is_head(pid))]
            stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
            self.store = max(self.store, stats.object_store_bytes_used)
            self.head = max(self.head, sum(map(_resident_bytes, head)))

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


def _is_head(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:2]
    except OSError:
        return False
    return any(name.encode() in word for name in _HEAD for word in words)


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(images: int, folder: Path) -> dict[str, float]:
    """One run: peaks in MB, tiles and images a second."""
    data = folder / f"sample-{images}"
    if not data.exists():
        write_sample(data, train=1, val=images)
    session = Session("ray", Resources())
    annotations = str(data / "annotations" / "instances_val2017.json")
    records, categories = session.call(images_and_categories, annotations)
    names = NetworkNames(detector=SAMPLE_DETECTOR, scale_net=SAMPLE_SCALE_NET)
    info = session.call(names.describe_detector)
    policy = parse_policy("scalenet", input_side=info.input_side, iou_threshold=info.iou_threshold)
    networks = Networks(partial(names.load_detector, categories), names.load_scale_net)
    start = partial(session.start, policy=policy, networks=networks, open_image=image_opener(f"{data}/val2017", 10**8))
    peaks = Peaks()
    with TemporaryDirectory() as output:
        peaks.start()
        progress = run_policy(records, "scalenet", start, RunFolder(output), lambda _: None)
        peaks.stop()
    return {
        "images": images,
        "object_store_mb": peaks.store / 2**20,
        "head_mb": peaks.head / 2**20,
        "tiles_per_image": progress.tiles / images,
        "images_per_second": progress.images_per_second,
    }


def main(job: EngineMemory) -> None:
    """Measure one size here, or each of several in a process of its own, and print the ratios."""
    if len(job.sizes) == 1:
        print(json.dumps(measure(job.sizes[0], job.folder)))
        ray.shutdown()
        return
    rows = []
    for size in job.sizes:
        command = [sys.executable, __file__, "--sizes", str(size), "--folder", str(job.folder)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print({key: round(value, 2) for key, value in rows[-1].items()}, flush=True)
        time.sleep(2)
    for key in ("object_store_mb", "head_mb", "images_per_second"):
        ratios = ", ".join(f"{row['images']}: {row[key] / rows[0][key]:.3f}" for row in rows[1:])
        print(f"{key} over that of {rows[0]['images']} images: {ratios}")


if __name__ == "__main__":
    main(tyro.cli(EngineMemory))
