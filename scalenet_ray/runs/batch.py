"""Run one policy over many images and write the results to a run folder, with any engine."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np

from scalenet_ray.core.answers import RaisedOn, fails_on_all
from scalenet_ray.core.detections import ImageResult
from scalenet_ray.core.geometry import AnyImage
from scalenet_ray.core.timing import Tally, current_tally, measured, timed
from scalenet_ray.data import storage
from scalenet_ray.data.coco import safe_file_name
from scalenet_ray.data.image_records import ImageRecord, ImageRecords, OpenImage
from scalenet_ray.data.rasters import open_image
from scalenet_ray.data.schemas import detections_table, images_table
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.shards import MIN_RATE_SECONDS, STAGE_SECONDS, WORK_SECONDS
from scalenet_ray.runs.tables import parquet_bytes

_LOG = logging.getLogger(__name__)

_SECONDS_BETWEEN_REPORTS = 1.0
_SECONDS_BETWEEN_SHARDS = 30.0
_IMAGES_PER_SHARD = 256

_FIRST_SECONDS = 1.0
"""Images that come so soon after the first one were begun together with it, and say nothing of the pace."""


class Stream(Protocol):
    """Iterable over image results in the order in which they finish."""

    def __iter__(self) -> Iterator[ImageResult]:
        """Yield the result of each image once."""
        ...

    def commit(self, image_ids: Iterable[int]) -> None:
        """Acknowledge that the results of these images are written."""
        ...

    def seconds_at_work(self) -> float:
        """Seconds since work on the first image began; 0 before."""
        ...

    @property
    def queued(self) -> int:
        """Number of tiles that wait or are in work, as of a few seconds ago."""
        ...


@dataclass(frozen=True)
class Progress:
    """Progress of a policy.

    Attributes:
        policy: its name.
        done: images finished, those of an earlier, resumed run included.
        total: images in all.
        failed: images that failed in this run.
        tiles: tiles processed in this run, by their depth.
        images: images finished in this run.
        seconds: from the start of the first image of this run to the end of the last; start-up excluded.
        elapsed: seconds since this run of the policy began; start-up included.
        queued: tiles that wait or are in work.
        pace: images per second since the first results of this run came; 0 until more have come.
    """

    policy: str
    done: int
    total: int
    failed: int = 0
    tiles: Mapping[int, int] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    elapsed: float = 0.0
    queued: int = 0
    pace: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Images per second of this run; 0 before the first image."""
        return self.images / self.seconds if self.seconds > 0 else 0.0

    def standing(self, more: int) -> str:
        """The progress in words, with `more` finished images added."""
        return f"{self.policy}: {self.done + more} of {self.total} done"

    def __str__(self) -> str:
        """One line for the terminal."""
        speed = f"{self.images_per_second:.1f}" if self.seconds >= MIN_RATE_SECONDS else "-"
        left = f"{(self.total - self.done) / self.pace:.0f} s left" if self.pace else "starting"
        if self.done == self.total:
            left = "done"
        parts = [f"{self.policy}: {self.done}/{self.total} images"]
        if self.images:
            shares = [count / self.images for _, count in sorted(self.tiles.items())]
            depths = f" ({' + '.join(f'{share:.2f}' for share in shares)} by depth)" if len(shares) > 1 else ""
            parts += [f"{speed} images/s", f"{sum(shares):.2f} tiles/image{depths}"]
            parts += [f"{self.queued} tiles queued"] if self.done < self.total else []
            parts += [f"{self.failed} failed"]
        return ", ".join([*parts, left])


def _open(record: ImageRecord, folder: str | None, max_pixels: int) -> AnyImage:
    name = record.file_name
    uri = name if folder is None else storage.join(folder, safe_file_name(name))
    return open_image(uri, expect_hw=record.hw, max_pixels=max_pixels)


def image_opener(folder: str | None, max_pixels: int) -> OpenImage:
    """A picklable function that opens an image of a folder, None for addresses, see `data.rasters.open_image`."""
    return partial(_open, folder=folder, max_pixels=max_pixels)


class ShardWriter:
    """Writes finished images in shards: first their detections, then the record that commits them.

    `committed` is called with the ids of a shard's images once it is written.
    """

    def __init__(
        self,
        run: RunFolder,
        policy: str,
        records: ImageRecords,
        committed: Callable[[list[int]], None],
    ) -> None:
        self._run = run
        self._policy = policy
        self._records = records
        self._committed = committed
        self._pending: list[tuple[ImageResult, float]] = []
        self._written = 0
        self._worked_until: float | None = None
        # One more than the last number, not the number of shards: damaged shards may have been deleted.
        shards = run.shards("images", policy)
        self._next = int(re.findall(r"\d+", shards[-1])[-1]) + 1 if shards else 0

    def work_began(self, at: float) -> None:
        """Count the time of work from when the first image was started, in seconds since the run began."""
        self._worked_until = at

    @property
    def taken(self) -> int:
        """Number of images added, written or pending."""
        return self._written + len(self._pending)

    def add(self, result: ImageResult, finished_at: float) -> None:
        """Add an image that finished so many seconds after the run began; write a shard if enough are pending."""
        self._pending.append((result, finished_at))
        if len(self._pending) >= _IMAGES_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write the pending images as a shard; raises `RuntimeError` if another driver has taken over the run."""
        if not self._pending:
            return
        self._run.check_lock()
        results, finished_at = [result for result, _ in self._pending], [at for _, at in self._pending]
        name = f"{self._policy}-{self._next:05d}.parquet"
        with timed("write"):
            detections = detections_table(results, self._policy)
            storage.write_bytes_atomic(storage.join(self._run.uri, "detections", name), parquet_bytes(detections))
        # The time to write `images` itself is not known yet: it counts with the next shard.
        tally = current_tally()
        metadata = {STAGE_SECONDS: json.dumps(tally.take() if tally else {}).encode()}
        if self._worked_until is not None:
            metadata[WORK_SECONDS] = repr(finished_at[-1] - self._worked_until).encode()
            self._worked_until = finished_at[-1]
        with timed("write"):
            rows = self._records.positions([result.image_id for result in results])
            files = self._records.take(rows).files.to_pylist()
            images = images_table(results, self._policy, files, finished_at).replace_schema_metadata(metadata)
            storage.write_bytes_atomic(storage.join(self._run.uri, "images", name), parquet_bytes(images))
        self._pending, self._written, self._next = [], self._written + len(results), self._next + 1
        self._committed([result.image_id for result in results])


class PolicyRun:
    """Work of one policy on all images that are not in the run folder yet.

    Iterating processes the images, writes their results, and yields each result, in the order in which they finish. If
    an error, an interrupt or the end of the iteration stops it early, all finished images are written before.

    Args:
        records: all images of the run.
        policy: the policy's name.
        start: starts a stream over the remaining images.
        run: the run folder.
        report: called with `progress` every few seconds, at the end with that of the whole run.
        retry_failed: also process images again that failed before; the new result replaces the failure.

    Raises:
        UserError: if a finished shard is damaged.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        policy: str,
        start: Callable[[Sequence[ImageRecord]], Stream],
        run: RunFolder,
        report: Callable[[Progress], None],
        *,
        retry_failed: bool = False,
    ) -> None:
        self._begun = time.monotonic()
        self._left = records = ImageRecords.of(records)
        if storage.exists(run.uri):
            run.check_shards(policy)
            done = run.finished(policy).ids
            if retry_failed:
                done = np.setdiff1d(done, run.find_failures([policy]).column("image_id").to_numpy())
            self._left = records.take(np.isin(records.ids, done, invert=True))
        self._start, self._run, self._report = start, run, report
        self.progress = Progress(policy, done=len(records) - len(self._left), total=len(records))
        run.standing = self.progress.standing(0)

    def __iter__(self) -> Iterator[ImageResult]:
        """Process the remaining images and yield their results."""
        if not self._left:
            return
        # The tally is active during the work alone, and not in the caller's code between two results.
        tally, work = Tally(), self._process()
        try:
            while True:
                with measured(tally):
                    result = next(work, None)
                if result is None:
                    return
                yield result
        finally:
            with measured(tally):
                work.close()

    def finish(self) -> Progress:
        """Process all remaining images; returns the progress at the end."""
        for _ in self:
            pass
        return self.progress

    def _process(self) -> Generator[ImageResult, None, None]:
        before, run, left = self.progress, self._run, self._left
        policy, at_work = before.policy, run.seconds_at_work(before.policy)
        self._report(replace(before, elapsed=time.monotonic() - self._begun))
        stream = self._start(left)
        writer = ShardWriter(run, policy, left, stream.commit)
        failed = came = 0
        tiles: Counter[int] = Counter()
        raised = RaisedOn()
        first = first_came = reported = written = time.monotonic()
        try:
            for images, result in enumerate(stream, start=1):
                now = time.monotonic()
                if images == 1:
                    first, first_came = now - stream.seconds_at_work(), now
                    writer.work_began(at_work + first - self._begun)
                writer.add(result, at_work + now - self._begun)
                _log(result, policy, left)
                failed += result.failure is not None
                tiles.update(result.tiles_by_depth)
                if now - first_came < _FIRST_SECONDS:
                    came = images
                self.progress = replace(
                    before,
                    done=before.done + images,
                    failed=failed,
                    tiles=dict(tiles),
                    images=images,
                    seconds=now - first,
                    elapsed=now - self._begun,
                    queued=stream.queued,
                    pace=(images - came) / (now - first_came) if images > came else 0.0,
                )
                if result.failure is None or result.failure.stage != "read":
                    raised.add(result.failure and result.failure.reason)
                if raised.all_of_the_first(no_more=images == len(left)):
                    writer.flush()
                    _stop_if_all_failed(raised, run, policy)
                if now - written > _SECONDS_BETWEEN_SHARDS:
                    writer.flush()
                    written = now
                if now - reported > _SECONDS_BETWEEN_REPORTS or images == len(left):
                    self._report(self.progress)
                    reported = now
                yield result
        finally:
            writer.flush()
            run.standing = before.standing(writer.taken)


def _stop_if_all_failed(raised: RaisedOn, run: RunFolder, policy: str) -> None:
    """Raise if the detector has raised on every image so far, and would on all others."""
    stages = run.table("images", policy, ["image_id", "failure_stage"]).column("failure_stage")
    if not stages.null_count:
        raise fails_on_all(raised.reason, raised.images)


def _log(result: ImageResult, policy: str, records: ImageRecords) -> None:
    """Log a failed image as a warning, and the limits that were hit at debug level."""
    if result.failure is None and not result.guards:
        return
    file = records.by_id(result.image_id).file_name
    about = {"policy": policy, "image_id": result.image_id, "file": file}
    if result.failure is not None:
        stage, reason = result.failure
        _LOG.warning(
            "image given up: %s: %s", file, reason, extra={"fields": {**about, "stage": stage, "reason": reason}}
        )
    if result.guards:
        _LOG.debug("limits acted", extra={"fields": {**about, "guards": result.guards}})
