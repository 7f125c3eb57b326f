"""Random kills of readers, actors, the frontier, nodes and the driver during a run on a cluster of its own.

    python -m tests.chaos FOLDER --images 200 --seed 1

One driver after the other works on the same run folder; each begins where the one before was killed. What was killed
is in FOLDER/faults.jsonl, what was opened, looked at and detected in FOLDER/work, and what it came to in
FOLDER/outcome.json. Readers and actors kill themselves, at random moments by their own clocks: from outside a worker
cannot be told from one that idles.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.scale import ScaleMap
from scalenet_ray.data.image_records import ImageRecord, ImageRecords
from scalenet_ray.engine.parallel import RestartingStream
from scalenet_ray.engine.pipeline import ImageStream
from scalenet_ray.runs.batch import PolicyRun, Progress
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.local import LocalStream
from scalenet_ray.runs.resources import AdvancedResources, Resources
from tests.faults import Given, Scenes, WorkLog, policy_of, random_networks, records_of
from tests.oracles import RandomDetector, RandomScale

_STORE_BYTES = 80 * 2**20
_NOTICE_LOSSES_SOON = {"health_check_period_ms": 1000, "health_check_failure_threshold": 4}
_POLICY = policy_of("scalenet")
_UNREADABLE = 7
_SCENES = Scenes(unreadable={_UNREADABLE})
_RESOURCES = Resources(
    readers=2,
    scale_actors=2,
    detector_actors=2,
    scale_batch_size=4,
    detector_batch_size=8,
    advanced=AdvancedResources(max_open_images=24),
)
_IMAGES_PER_SHARD = 16


class Mortal:
    """Ends its process at random calls: every `seconds` on average, and no more than `most` deaths of a kind in all."""

    def __init__(self, folder: Path, kind: str, seconds: float, most: int) -> None:
        self._folder, self._kind, self._seconds, self._most = folder, kind, seconds, most
        self._dies_at = 0.0

    def turn(self) -> None:
        """Die, if it is time."""
        now = time.monotonic()
        if not self._dies_at:
            self._dies_at = now + Random(f"{self._kind} {os.getpid()}").uniform(0.5, 2 * self._seconds)
        if now < self._dies_at:
            return
        for nth in range(self._most):
            try:
                os.close(os.open(self._folder / f"{self._kind} {nth}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            _note(self._folder, self._kind)
            os._exit(1)
        self._dies_at = float("inf")


def _note(folder: Path, kind: str) -> None:
    handle = os.open(folder / "faults.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(handle, (json.dumps({"kind": kind, "time": time.time()}) + "\n").encode())
    os.close(handle)


class _Open:
    def __init__(self, mortal: Mortal) -> None:
        self._mortal = mortal

    def __call__(self, record: ImageRecord) -> np.ndarray:
        self._mortal.turn()
        return _SCENES(record)


class _Scale(RandomScale):
    def __init__(self, mortal: Mortal, log: WorkLog) -> None:
        super().__init__()
        self._mortal, self._log = mortal, log

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        for tile in tiles:
            if not tile.path:
                self._log.write(str(tile.image_id))
        time.sleep(0.01 * len(tiles))
        maps = super().__call__(pixels, tiles)
        self._mortal.turn()
        return maps


class _Detector(RandomDetector):
    def __init__(self, mortal: Mortal) -> None:
        super().__init__()
        self._mortal = mortal

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        time.sleep(0.01 * len(pixels))
        found = super().__call__(pixels)
        self._mortal.turn()
        return found


# --- one driver ---------------------------------------------------------------------------------------------


def _drive(folder: Path, images: int, deaths: int, address: str) -> None:
    """Begin, or go on, and live as long as one may."""
    from scalenet_ray.runs import batch

    batch._IMAGES_PER_SHARD = _IMAGES_PER_SHARD
    ray.init(address=address, log_to_driver=False, configure_logging=False)
    kinds = {kind: Mortal(folder, kind, 6.0, deaths) for kind in ("reader", "scale actor", "detector actor")}
    log = WorkLog(folder / "work")
    networks = NetworkFactories(Given(_Detector(kinds["detector actor"])), Given(_Scale(kinds["scale actor"], log)))
    run = RunFolder(str(folder / "run"))
    streams: list[ImageStream] = []

    def start_part(records: ImageRecords) -> ImageStream:
        streams.append(ImageStream(records, _POLICY, networks, _Open(kinds["reader"]), _RESOURCES))
        return streams[-1]

    def start(records: Sequence[ImageRecord]) -> RestartingStream:
        return RestartingStream(ImageRecords.of(records), start_part)

    def report(progress: Progress) -> None:
        (folder / "done").write_text(str(progress.done))
        if (folder / "kill the frontier").exists():
            (folder / "kill the frontier").unlink()
            _note(folder, "frontier")
            ray.kill(streams[-1]._frontier)

    import scalenet_ray.runs.batch as batch

    batch._SECONDS_BETWEEN_REPORTS = 0.1
    with run.begin({"images": images}, resume=True):
        PolicyRun(records_of(images), _POLICY.name, start, run, report).finish()
    ray.shutdown()


# --- the whole ----------------------------------------------------------------------------------------------


def run_chaos(folder: Path, images: int, seed: int, *, deaths: int = 4, node_losses: int = 2) -> dict[str, Any]:
    """Run to the end through all faults, and compare with the plain reference.

    Readers, scale actors and detector actors die at most `deaths` times each; the frontier and the driver are
    killed once. The outcome has `faults` by kind, `images`, `lost`, `doubled`, `wrong`, and `done_twice`: images
    looked at again.
    """
    (folder / "work").mkdir(parents=True)
    random = Random(seed)
    # The head has no CPUs: whatever reads, looks or detects is on a node that may be lost.
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": _STORE_BYTES,
            "include_dashboard": False,
            "_system_config": _NOTICE_LOSSES_SOON,
        },
    )
    nodes = [cluster.add_node(num_cpus=4, object_store_memory=_STORE_BYTES) for _ in range(2)]
    kinds = ["node"] * node_losses + ["frontier", "driver"]
    random.shuffle(kinds)
    share = images // (len(kinds) + 2)
    moments = [share * (i + 1) + random.randrange(share) for i in range(len(kinds))]
    command = [sys.executable, "-m", "tests.chaos", str(folder), "--drive", cluster.address]
    command += ["--images", str(images), "--deaths", str(deaths)]
    driver = subprocess.Popen(command)
    try:
        for kind, moment in zip(kinds, moments, strict=True):
            while _done(folder) < moment and driver.poll() is None:
                time.sleep(0.05)
            if driver.poll() is not None:
                break
            if kind == "node":
                _note(folder, "node")
                cluster.remove_node(nodes.pop(0), allow_graceful=False)
                nodes.append(cluster.add_node(num_cpus=4, object_store_memory=_STORE_BYTES))
                continue
            if kind == "driver":
                _note(folder, "driver")
                driver.kill()
            else:
                (folder / "kill the frontier").touch()
            driver.wait(timeout=120)
            driver = subprocess.Popen(command)
        code = driver.wait(timeout=300)
    finally:
        driver.kill()
        driver.wait()
        cluster.shutdown()
    if code != 0:
        msg = f"the last driver ended with {code}"
        raise RuntimeError(msg)
    return _outcome(folder, images)


def _done(folder: Path) -> int:
    text = (folder / "done").read_text() if (folder / "done").exists() else ""
    return int(text or 0)


def _outcome(folder: Path, images: int) -> dict[str, Any]:
    run, plain = RunFolder(str(folder / "run")), RunFolder(str(folder / "plain"))
    networks = random_networks(_POLICY)
    PolicyRun(
        records_of(images),
        _POLICY.name,
        lambda records: LocalStream(records, _POLICY, networks, _SCENES),
        plain,
        lambda progress: None,
    ).finish()
    ids = run.table("images", _POLICY.name, ["image_id"]).column("image_id").to_pylist()
    counts = Counter(ids)
    found, expected = _by_image(run), _by_image(plain)
    wrong = [image_id for image_id, rows in expected.items() if counts[image_id] == 1 and found[image_id] != rows]
    looked = Counter(int(line) for line in WorkLog(folder / "work").lines())
    faults = Counter(json.loads(line)["kind"] for line in (folder / "faults.jsonl").read_text().splitlines())
    return {
        "faults": dict(sorted(faults.items())),
        "images": images,
        "lost": images - len(counts),
        "doubled": len(ids) - len(counts),
        "wrong": len(wrong),
        "done_twice": sum(times > 1 for times in looked.values()),
    }


def _by_image(run: RunFolder) -> dict[int, list[dict[str, Any]]]:
    """Image id -> all that is written of it, its detections included."""
    rows: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for kind in ("images", "detections"):
        for row in run.table(kind, _POLICY.name).to_pylist():
            # When it was finished is no part of what was found.
            row.pop("finished_at", None)
            rows[row["image_id"]].append(row)
    return rows


def main() -> None:
    """Be one driver, or run everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--deaths", type=int, default=4)
    parser.add_argument("--node-losses", type=int, default=2)
    parser.add_argument("--drive")
    job = parser.parse_args()
    if job.drive:
        _drive(job.folder, job.images, job.deaths, job.drive)
        return
    outcome = run_chaos(job.folder, job.images, job.seed, deaths=job.deaths, node_losses=job.node_losses)
    (job.folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
