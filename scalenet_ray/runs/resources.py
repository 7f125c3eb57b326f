"""Actor counts, batch sizes, GPU shares and timeouts of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from scalenet_ray.core.errors import UserError

__all__ = [
    "DEFAULT_RETRIES",
    "PoolSize",
    "Resources",
    "RetryPolicy",
    "limits",
]


@dataclass(frozen=True)
class RetryPolicy:
    """What is put up with.

    Attributes:
        call_seconds: a call that takes longer hangs: its process is ended, and the work begun again in a new one.
        max_tries: a tile that by itself has ended its process so often is given up.

    Raises:
        UserError: if a number leaves its range.
    """

    call_seconds: float = 300.0
    max_tries: int = 3

    def __post_init__(self) -> None:
        if self.call_seconds <= 0:
            msg = f"call_seconds must be above 0, got {self.call_seconds}"
            raise UserError(msg)
        if self.max_tries < 1:
            msg = f"max_tries must be 1 or more, got {self.max_tries}"
            raise UserError(msg)


DEFAULT_RETRIES = RetryPolicy()


PoolSize = int | tuple[int, int]
"""So many actors, or (fewest, most) of a pool that grows with the load."""


_DETECTORS_PER_PIPELINE = 4


def limits(size: PoolSize) -> tuple[int, int]:
    """(fewest, most) actors of a pool."""
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True)
class Resources:
    """Who works, with what, on how much at a time. The same on one node or on many.

    Attributes:
        readers: read tasks, which decode and cut.
        scale_actors: actors that look at tiles with Scale Net: so many, or (fewest, most). Where a policy asks no
            Scale Net, or one on the detector's features, they are detector actors, if they have the same GPUs.
        detector_actors: actors that detect: so many, or (fewest, most).
        gpus_per_scale_actor: GPUs of each look actor; fractions share one.
        gpus_per_detector_actor: GPUs of each detector actor.
        scale_batch_size: tiles of a micro-batch, the look stage's batch.
        detector_batch_size: tiles to a call of the detector.
        max_open_images: images in work at once; bounds memory. None: enough to keep every actor fed.
        pipelines: images, readers and actors are shared out among so many, each with a queue and a driver of its own.
            None: one for every 4 detectors, as far as there are readers and actors for each.
        call_seconds: a call to the networks, or the reading of a lease, that takes longer: its process is replaced.
        max_tries: a tile that by itself has ended its process so often is given up, and its image with it.
        no_progress_seconds: a run that finishes nothing for so long ends with an error.

    Raises:
        UserError: if a number leaves its range.
    """

    readers: int = 1
    scale_actors: PoolSize = 1
    detector_actors: PoolSize = 1
    gpus_per_scale_actor: float = 0.0
    gpus_per_detector_actor: float = 0.0
    scale_batch_size: int = 8
    detector_batch_size: int = 16
    max_open_images: int | None = None
    pipelines: int | None = None
    call_seconds: float = DEFAULT_RETRIES.call_seconds
    max_tries: int = DEFAULT_RETRIES.max_tries
    no_progress_seconds: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("scale_actors", "detector_actors"):
            fewest, most = limits(getattr(self, name))
            if not 1 <= fewest <= most:
                msg = f"{name} must be 1 or more, or (fewest, most), got {getattr(self, name)}"
                raise UserError(msg)
        for name in ("readers", "scale_batch_size", "detector_batch_size", "max_open_images", "pipelines"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                msg = f"{name} must be 1 or more, got {getattr(self, name)}"
                raise UserError(msg)
        if min(self.gpus_per_scale_actor, self.gpus_per_detector_actor) < 0:
            got = f"{self.gpus_per_scale_actor} and {self.gpus_per_detector_actor}"
            msg = f"GPUs per actor must be 0 or more, got {got}"
            raise UserError(msg)
        if self.no_progress_seconds <= 0:
            msg = f"no_progress_seconds must be above 0, got {self.no_progress_seconds}"
            raise UserError(msg)
        if self.pipelines is not None and self.pipelines > self._most_pipelines:
            msg = (
                f"pipelines must be at most {self._most_pipelines}, so that each has a reader and an actor of either "
                f"kind, got {self.pipelines}"
            )
            raise UserError(msg)
        _ = self.retries

    @property
    def retries(self) -> RetryPolicy:
        """With a call that hangs, and with a tile that kills its process."""
        return RetryPolicy(self.call_seconds, self.max_tries)

    @property
    def all_detectors(self) -> PoolSize:
        """Actors of a policy that has no use for a Scale Net of its own."""
        if self.gpus_per_scale_actor != self.gpus_per_detector_actor:
            return self.detector_actors
        fewest, most = (sum(pair) for pair in zip(limits(self.scale_actors), limits(self.detector_actors), strict=True))
        return (fewest, most)

    @property
    def rows_per_detect_call(self) -> int:
        """Micro-batches that a detector actor takes at once, so that its batches are full."""
        return math.ceil(self.detector_batch_size / self.scale_batch_size)

    @property
    def open_images(self) -> int:
        """Images in work at once: above everything that the stages can hold back, so that none runs dry."""
        if self.max_open_images is not None:
            return self.max_open_images
        # A row is of either size; of the detector's, where looking and detecting are one stage, fewer are on their way.
        return max(64, 8 * self.scale_batch_size * self.processes, 4 * self.detector_batch_size * self.processes)

    @property
    def processes(self) -> int:
        """Readers and actors that may be there at once."""
        return self.readers + limits(self.scale_actors)[1] + limits(self.detector_actors)[1]

    @property
    def _most_pipelines(self) -> int:
        """Each has a reader, and an actor of both kinds from the start."""
        return min(self.readers, limits(self.scale_actors)[0], limits(self.detector_actors)[0])

    @property
    def dealt(self) -> list[Resources]:
        """The share of each pipeline; these resources themselves where there is one."""
        enough = math.ceil(limits(self.detector_actors)[1] / _DETECTORS_PER_PIPELINE)
        count = self.pipelines or min(enough, self._most_pipelines)
        return [
            replace(
                self,
                readers=_part(self.readers, count, i),
                scale_actors=_part_of_pool(self.scale_actors, count, i),
                detector_actors=_part_of_pool(self.detector_actors, count, i),
                max_open_images=self.max_open_images and max(1, _part(self.max_open_images, count, i)),
                pipelines=1,
            )
            for i in range(count)
        ]


def _part(whole: int, count: int, which: int) -> int:
    return whole // count + (which < whole % count)


def _part_of_pool(size: PoolSize, count: int, which: int) -> PoolSize:
    if isinstance(size, int):
        return _part(size, count, which)
    return _part(size[0], count, which), _part(size[1], count, which)
