"""One policy over many images into a run folder: what every batch job does, whatever its engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from scalenet_ray.core.answers import RaisedOn, fails_on_all
from scalenet_ray.core.detections import ImageResult
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.timing import measured
from scalenet_ray.data import storage
from scalenet_ray.data.coco import ImageRecord, safe_file_name
from scalenet_ray.data.images import read_image
from scalenet_ray.runs.folder import SECONDS_WORTH_A_RATE, RunFolder, ShardWriter

__all__ = [
    "Progress",
    "Stream",
    "image_opener",
    "run_policy",
]

_LOG = logging.getLogger(__name__)


_SECONDS_BETWEEN_LINES = 2.0


_SECONDS_BETWEEN_SHARDS = 30.0


class Stream(Protocol):
    """Finished images as they finish, and a way to say that they are written."""

    def __iter__(self) -> Iterator[ImageResult]:
        """Yields each image once."""
        ...

    def commit(self, image_ids: Iterable[int]) -> None:
        """These images are written."""
        ...

    def seconds_at_work(self) -> float:
        """Seconds since the first image was leased or begun to be read; 0 before."""
        ...


@dataclass(frozen=True)
class Progress:
    """How far a policy is.

    Attributes:
        policy: its name.
        done: images finished, those of an earlier, resumed run included.
        total: images in all.
        failed: images given up in this run.
        tiles: tiles worked on in this run.
        images: images finished in this run.
        seconds: from the first image that was begun in this run to the last that was finished: start-up is left out.
        elapsed: seconds since this run of the policy began, start-up included.
    """

    policy: str
    done: int
    total: int
    failed: int = 0
    tiles: int = 0
    images: int = 0
    seconds: float = 0.0
    elapsed: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Images of this run over the time that they took; 0 while there is none."""
        return self.images / self.seconds if self.seconds > 0 else 0.0

    def standing(self, more: int) -> str:
        """How far the policy is in words, with so many images more than are counted here."""
        return f"{self.policy}: {self.done + more} of {self.total} done"

    def __str__(self) -> str:
        """One line for the terminal."""
        rate = self.images_per_second if self.seconds >= SECONDS_WORTH_A_RATE else None
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate else "starting"
        if self.done == self.total:
            left = "done"
        speed = "-" if rate is None else f"{rate:.1f}"
        return (
            f"{self.policy}: {self.done}/{self.total} images, {speed} images/s, "
            f"{self.tiles / max(self.images, 1):.2f} tiles/image, {self.failed} failed, {left}"
        )


def _open(record: ImageRecord, folder: str | None, max_pixels: int) -> np.ndarray:
    name = record.file_name
    uri = name if folder is None else storage.join(folder, safe_file_name(name))
    return read_image(uri, expect_hw=record.hw, max_pixels=max_pixels)


def image_opener(folder: str | None, max_pixels: int) -> Callable[[ImageRecord], np.ndarray]:
    """How readers open an image.

    Args:
        folder: where `file_name`s are; None if they are whole addresses.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        A picklable function: record -> [h, w, 3] uint8 RGB, or `TileError`.
    """
    return partial(_open, folder=folder, max_pixels=max_pixels)


def _check_same_files(records: Sequence[ImageRecord], written: Mapping[int, str]) -> None:
    """An id that stands for another file by now would lend an image the results of another."""
    for record in records:
        before = written.get(record.image_id, record.file_name)
        if before != record.file_name:
            msg = (
                f"image {record.image_id} was {before} in the run to resume, is {record.file_name}: the images are "
                "other ones by now; use another --output"
            )
            raise UserError(msg)


def run_policy(
    records: Sequence[ImageRecord],
    policy: str,
    start: Callable[[Sequence[ImageRecord]], Stream],
    run: RunFolder,
    report: Callable[[Progress], None],
    *,
    retry_failed: bool = False,
) -> Progress:
    """Work through all images that the run folder does not have yet, and write them there.

    What ends it early, an interruption or an error, is raised once all finished images are written.

    Args:
        records: all images of the run.
        policy: the policy's name.
        start: the images left -> their stream.
        run: the run folder.
        report: called with the progress every few seconds.
        retry_failed: also try those again that failed before; what comes of it replaces the record of the failure.

    Returns:
        The progress at the end.

    Raises:
        UserError: if an image that is written already was another file, or a finished shard is damaged.
    """
    begun = time.monotonic()
    finished: dict[int, str] = {}
    if storage.exists(run.uri):
        run.check_shards(policy)
        finished = run.finished(policy)
        _check_same_files(records, finished)
        if retry_failed:
            for image_id in run.find_failures([policy]).column("image_id").to_pylist():
                del finished[image_id]
    left = [record for record in records if record.image_id not in finished]
    state = Progress(policy, len(records) - len(left), len(records))
    run.standing = state.standing(0)
    if not left:
        return state
    with measured():
        return _work_through(left, state, start, run, report, begun)


def _work_through(
    left: Sequence[ImageRecord],
    before: Progress,
    start: Callable[[Sequence[ImageRecord]], Stream],
    run: RunFolder,
    report: Callable[[Progress], None],
    begun: float,
) -> Progress:
    policy, at_work = before.policy, run.seconds_at_work(before.policy)
    state = before
    stream = start(left)
    records = {record.image_id: record for record in left}
    writer = ShardWriter(run, policy, records, stream.commit)
    failed = tiles = 0
    raised = RaisedOn()
    first = reported = written = time.monotonic()
    try:
        for images, result in enumerate(stream, start=1):
            now = time.monotonic()
            if images == 1:
                first = now - stream.seconds_at_work()
                writer.work_began(at_work + first - begun)
            writer.add(result, at_work + now - begun)
            _log(result, policy, records[result.image_id].file_name)
            failed += result.failure is not None
            tiles += result.tiles
            state = Progress(
                policy, before.done + images, before.total, failed, tiles, images, now - first, now - begun
            )
            if result.failure is None or result.failure.stage != "read":
                raised.add(result.failure and result.failure.reason)
            if raised.all_of_the_first(no_more=images == len(left)):
                writer.flush()
                _end_unless_some_are_done(raised, run, policy)
            if now - written > _SECONDS_BETWEEN_SHARDS:
                writer.flush()
                written = now
            if now - reported > _SECONDS_BETWEEN_LINES or images == len(left):
                report(state)
                reported = now
    finally:
        writer.flush()
        run.standing = before.standing(writer.taken)
    return state


def _end_unless_some_are_done(raised: RaisedOn, run: RunFolder, policy: str) -> None:
    """End a run whose detector raises on every image: on millions it would do the same."""
    stages = run.table("images", policy, ["image_id", "failure_stage"]).column("failure_stage")
    if not stages.null_count:
        raise fails_on_all(raised.reason, raised.images)


def _log(result: ImageResult, policy: str, file: str) -> None:
    """A warning for an image that was given up, and a note of the limits that acted on one, with what names it."""
    about = {"policy": policy, "image_id": result.image_id, "file": file}
    if result.failure is not None:
        stage, reason = result.failure
        _LOG.warning("image given up", extra={"fields": {**about, "stage": stage, "reason": reason}})
    if result.guards:
        _LOG.debug("limits acted", extra={"fields": {**about, "guards": result.guards}})
