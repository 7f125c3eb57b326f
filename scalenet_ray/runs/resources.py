"""Actor counts, batch sizes, GPU shares and timeouts of a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from scalenet_ray.core.errors import UserError

PoolSize = int | tuple[int, int]
"""Number of actors, or (minimum, maximum) of an autoscaling pool."""


_DETECTORS_PER_PIPELINE = 4


ROW_TILES = 128
"""Tiles that travel together through the pipeline where there are many: several batches of the networks."""


def _check_count(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        msg = f"{name} must be 1 or more, got {value}"
        raise UserError(msg)


@dataclass(frozen=True)
class AdvancedResources:
    """Limits and timeouts that rarely need a change.

    Attributes:
        max_open_images: maximum number of images in progress; bounds memory. None: enough to keep every actor busy.
        pipelines: number of parallel pipelines that share the images, readers and actors, each with a queue and a
            driver of its own. None: one per 4 detectors, if there are a reader and actors for each.
        call_seconds: timeout of a call to the networks, and of reading the images of a lease; the process is replaced.
        max_tries: an image fails if one of its tiles has ended its process this often while processed alone.
        no_progress_seconds: the run fails if no work finishes for this long.

    Raises:
        UserError: if a number is out of range.
    """

    max_open_images: int | None = None
    pipelines: int | None = None
    call_seconds: float = 300.0
    max_tries: int = 3
    no_progress_seconds: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("max_open_images", "pipelines", "max_tries"):
            _check_count(name, getattr(self, name))
        for name in ("call_seconds", "no_progress_seconds"):
            if getattr(self, name) <= 0:
                msg = f"{name} must be above 0, got {getattr(self, name)}"
                raise UserError(msg)


DEFAULT_ADVANCED = AdvancedResources()


@dataclass(frozen=True)
class Resources:
    """Actors, GPUs and batch sizes of a run: the fields of `ResourceChoice`, all chosen.

    For a policy without a Scale Net, or with one on the detector's features, Scale Net's actors are additional detector
    actors if both have the same GPUs. With None for them each detector actor also runs Scale Net.

    Raises:
        UserError: if a number is out of range.
    """

    readers: int = 1
    scale_actors: PoolSize | None = 1
    detector_actors: PoolSize = 1
    gpus_per_scale_actor: float = 0.0
    gpus_per_detector_actor: float = 0.0
    scale_batch_size: int = 8
    detector_batch_size: int = 16
    advanced: AdvancedResources = field(default_factory=AdvancedResources)

    def __post_init__(self) -> None:
        for name in ("scale_actors", "detector_actors"):
            size = getattr(self, name)
            if size is not None and not 1 <= limits(size)[0] <= limits(size)[1]:
                msg = f"{name} must be 1 or more, or (fewest, most), got {getattr(self, name)}"
                raise UserError(msg)
        for name in ("readers", "scale_batch_size", "detector_batch_size"):
            _check_count(name, getattr(self, name))
        if min(self.gpus_per_scale_actor, self.gpus_per_detector_actor) < 0:
            got = f"{self.gpus_per_scale_actor} and {self.gpus_per_detector_actor}"
            msg = f"GPUs per actor must be 0 or more, got {got}"
            raise UserError(msg)
        pipelines = self.advanced.pipelines
        if pipelines is not None and pipelines > self._max_pipelines:
            msg = (
                f"pipelines must be at most {self._max_pipelines}, so that each has a reader and an actor of either "
                f"kind, got {pipelines}"
            )
            raise UserError(msg)

    @property
    def all_detectors(self) -> PoolSize:
        """Detector actors of a policy that needs no separate Scale Net actors."""
        if self.gpus_per_scale_actor != self.gpus_per_detector_actor:
            return self.detector_actors
        minimum, maximum = (
            sum(pair) for pair in zip(limits(self.scale_actors), limits(self.detector_actors), strict=True)
        )
        return (minimum, maximum)

    @property
    def open_images(self) -> int:
        """Maximum number of images in progress: more than all stages can buffer, so that none of them starves."""
        if self.advanced.max_open_images is not None:
            return self.advanced.max_open_images
        return 4 * max(ROW_TILES, self.scale_batch_size, self.detector_batch_size) * self.processes

    @property
    def processes(self) -> int:
        """Maximum number of read tasks and actors."""
        return self.readers + limits(self.scale_actors)[1] + limits(self.detector_actors)[1]

    @property
    def _max_pipelines(self) -> int:
        """Each pipeline needs a reader and, from the start, an actor of each kind."""
        kinds = [self.detector_actors, *([] if self.scale_actors is None else [self.scale_actors])]
        return min(self.readers, *(limits(size)[0] for size in kinds))

    @property
    def per_pipeline(self) -> list[Resources]:
        """The resources of each pipeline."""
        wanted = math.ceil(limits(self.detector_actors)[1] / _DETECTORS_PER_PIPELINE)
        count = self.advanced.pipelines or min(wanted, self._max_pipelines)
        open_images = self.advanced.max_open_images
        return [
            replace(
                self,
                readers=_share(self.readers, count, i),
                scale_actors=None if self.scale_actors is None else _share_of_pool(self.scale_actors, count, i),
                detector_actors=_share_of_pool(self.detector_actors, count, i),
                advanced=replace(
                    self.advanced,
                    max_open_images=open_images and max(1, _share(open_images, count, i)),
                    pipelines=1,
                ),
            )
            for i in range(count)
        ]

    def as_settings(self) -> dict[str, Any]:
        """All values by the names of their flags."""
        values = asdict(self)
        advanced = values.pop("advanced")
        return values | advanced


@dataclass(frozen=True)
class ResourceChoice:
    """Actors, GPUs and batch sizes that a user has set; those left at auto follow from the cluster and a trial.

    Attributes:
        readers: number of read tasks, which decode images and cut tiles.
        scale_actors: number of Scale Net actors, or (minimum, maximum) of a pool. By default each detector actor also
            runs Scale Net.
        detector_actors: number of detector actors, or (minimum, maximum) of a pool.
        gpus_per_scale_actor: GPUs of each Scale Net actor; a fraction shares one.
        gpus_per_detector_actor: GPUs of each detector actor; a fraction shares one.
        scale_batch_size: tiles per call of Scale Net.
        detector_batch_size: tiles per call of the detector.
        advanced: limits and timeouts.

    Raises:
        UserError: if a number is out of range.
    """

    readers: int | None = None
    scale_actors: PoolSize | None = None
    detector_actors: PoolSize | None = None
    gpus_per_scale_actor: float | None = None
    gpus_per_detector_actor: float | None = None
    scale_batch_size: int | None = None
    detector_batch_size: int | None = None
    advanced: AdvancedResources = field(default_factory=AdvancedResources)

    def __post_init__(self) -> None:
        least = self.advanced.pipelines or 1
        self.completed(readers=least, detector_actors=least)

    @property
    def is_complete(self) -> bool:
        """True if the user has set all that a trial would tell."""
        return None not in (self.readers, self.detector_actors, self.scale_batch_size, self.detector_batch_size)

    def completed(self, **otherwise: Any) -> Resources:
        """The resources: the user's values, else those given, else the defaults of `Resources`.

        Raises:
            UserError: if a number is out of range.
        """
        names = [name for name in vars(self) if name != "scale_actors"]
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return Resources(**{**otherwise, **chosen, "scale_actors": self.scale_actors})


def limits(size: PoolSize | None) -> tuple[int, int]:
    """(minimum, maximum) number of actors of a pool; (0, 0) for None, no pool."""
    return (size or 0, size or 0) if isinstance(size, int | None) else size


def _share(total: int, count: int, index: int) -> int:
    return total // count + (index < total % count)


def _share_of_pool(size: PoolSize, count: int, index: int) -> PoolSize:
    if isinstance(size, int):
        return _share(size, count, index)
    return _share(size[0], count, index), _share(size[1], count, index)
