"""Write finished images to a run folder in shards: first their detections, then the record that commits them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from scalenet_ray.core.detections import ImageResult
from scalenet_ray.core.timing import current_tally, timed
from scalenet_ray.data import storage
from scalenet_ray.data.image_records import ImageRecords
from scalenet_ray.data.schemas import detections_table, images_table
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.shards import STAGE_SECONDS, WORK_SECONDS
from scalenet_ray.runs.tables import parquet_bytes

_IMAGES_PER_SHARD = 256


class ShardWriter:
    """Writes finished images in shards.

    Args:
        run: the run folder.
        policy: the policy's name.
        records: the images of the run.
        committed: called with the ids of a shard's images once it is written.
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
        """Count the time of work from here.

        Args:
            at: when the first image was started, in seconds since the run began.
        """
        self._worked_until = at

    @property
    def taken(self) -> int:
        """Number of images added, written or pending."""
        return self._written + len(self._pending)

    def add(self, result: ImageResult, finished_at: float) -> None:
        """Add a finished image; write a shard if enough are pending.

        Args:
            result: the image's result.
            finished_at: when it finished, in seconds since the run began.
        """
        self._pending.append((result, finished_at))
        if len(self._pending) >= _IMAGES_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write the pending images as a shard, if there are any.

        Raises:
            RuntimeError: if another driver has taken over the run folder.
        """
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
