"""A policy over many images as one Ray Data pipeline with a feedback queue.

    Frontier  --lease-->  readers (generator read tasks: cut the tiles' pixels)
    ^                     |
    | complete(tile,      v
    |   children)      Scale Net actors --tiles to detect--> detector actors --> assembler
    +---------------------+

If Scale Net has no actors of its own, or the policy needs none, the two actor stages are one. A row, the work of a
lease, is several batches of the networks: its way through Ray Data costs nearly the same whatever it holds.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scalenet_ray.core.detections import ImageResult, TileResult
from scalenet_ray.core.errors import WorkerError
from scalenet_ray.core.merge import Merging, merge_image
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.timing import add_seconds, current_tally
from scalenet_ray.data.image_records import ImageRecord, ImageRecords, OpenImage
from scalenet_ray.engine.frontier import FrontierActor, FrontierStatus, LeaseLimits
from scalenet_ray.engine.metrics import RunMetrics
from scalenet_ray.engine.placement import cpu_share, store_share
from scalenet_ray.engine.readers import TileSource
from scalenet_ray.engine.rows import read_seconds, unpack_results
from scalenet_ray.engine.stages import DetectStage, ScaleAndDetectStage, ScaleStage
from scalenet_ray.engine.worker_errors import workers_errors
from scalenet_ray.runs.resources import ROW_TILES, PoolSize, Resources, limits

_SECONDS_BETWEEN_STATUS = 2.0

_ROW_BYTES = 64 * 2**20
_STORED_ROWS = 8
"""Number of rows of each process that the object store must hold."""

_SHARES_PER_ACTOR = 2


class ImageStream:
    """Stream of the image results of one policy, in the order in which they finish.

    Iterate over it once. Call `commit` after results are written, so that the queue can forget their images.

    Args:
        images: the images, in the order in which they are started.
        policy: the policy.
        networks: factories of the networks, called in the actors.
        open_image: opens an image, called in the readers.
        resources: readers, actors and batch sizes.
        processes: number of processes that share the cluster's CPUs; by default those of the resources.
    """

    def __init__(
        self,
        images: Sequence[ImageRecord],
        policy: Policy,
        networks: NetworkFactories,
        open_image: OpenImage,
        resources: Resources,
        processes: int | None = None,
    ) -> None:
        self._images = images = ImageRecords.of(images)
        self._policy = policy
        self._networks = networks
        self._open_image = open_image
        self._resources = resources
        self._processes = processes or resources.processes
        # On the driver's node, so that the loss of a worker node does not end the queue.
        actor: Any = FrontierActor.options(scheduling_strategy=on_this_node())
        self._together = resources.scale_actors is None or networks.one_actor_suffices(policy)
        first_actors = resources.all_detectors if self._together else resources.scale_actors
        self._frontier = actor.remote(
            images,
            resources.open_images,
            LeaseLimits(
                policy,
                shares=_SHARES_PER_ACTOR * limits(first_actors)[1],
                max_bytes=min(_ROW_BYTES, store_share(_STORED_ROWS * self._processes)),
            ),
        )
        self._metrics = RunMetrics(policy.name)
        self._reported: Counter[str] = Counter()
        self.queued = 0
        self._seconds_at_end = 0.0
        self._status_at_end: FrontierStatus | None = None

    def __iter__(self) -> Iterator[ImageResult]:
        """Yield the result of each image once; raises as `groups`."""
        return (result for results in self.groups() for result in results)

    def groups(self) -> Iterator[list[ImageResult]]:
        """Yield the results of images in the groups in which they finish, each image once.

        Raises:
            UserError: if a stage raised it.
            RuntimeError: if a stage raised another error or the frontier died (as `WorkerError`), or the run ended
                with images unfinished.
        """
        assembler = Assembler(self._policy.merging, self._images)
        count = 0
        reported = -_SECONDS_BETWEEN_STATUS
        try:
            with _data_context(self._resources.advanced.no_progress_seconds):
                for table in self._dataset().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                    add_seconds(read_seconds(table))
                    results = assembler.add(unpack_results(table))
                    count += len(results)
                    for result in results:
                        self._metrics.finished(result)
                    if time.monotonic() - reported > _SECONDS_BETWEEN_STATUS:
                        reported = time.monotonic()
                        status = self.status()
                        self.queued = status.outstanding
                        self._metrics.queue(status)
                        self._report_seconds()
                    yield results
        except Exception as error:
            if self._frontier_lives():
                with workers_errors():
                    raise
            msg = (
                "the frontier, the queue of tiles, died, and with it what was in work: images that are written are "
                "safe; run the same command with --resume to go on with the others"
            )
            raise WorkerError(msg, str(error)) from error
        finally:
            if count < len(self._images):
                self._stop()
        self._report_seconds()
        if count != len(self._images):
            started = assembler.unfinished
            msg = (
                f"the run ended with {len(self._images) - count} of {len(self._images)} images unfinished, "
                f"{len(started)} of them begun, e.g. ids {started[:5]}: add --resume to go on with them"
            )
            raise RuntimeError(msg)

    def commit(self, image_ids: Iterable[int]) -> None:
        """Acknowledge that the results of these images are written, so that the queue can forget them."""
        self._frontier.commit.remote(list(image_ids))

    def seconds_at_work(self) -> float:
        """Seconds from the first lease, until the stream was stopped or now; 0 before, or if the frontier died."""
        try:
            return ray.get(self._frontier.seconds_at_work.remote())
        except RayActorError:
            return self._seconds_at_end

    def status(self) -> FrontierStatus:
        """The state of the queue, or its last one if the stream ended early."""
        try:
            return ray.get(self._frontier.status.remote())
        except RayActorError:
            if self._status_at_end is None:
                raise
            return self._status_at_end

    def _stop(self) -> None:
        """Kill the frontier of a stream that ends early: a reader that misses its cancellation then ends, too."""
        if ray.is_initialized() and self._frontier_lives():
            self._seconds_at_end, self._status_at_end = self.seconds_at_work(), self.status()
            ray.kill(self._frontier)

    def _report_seconds(self) -> None:
        tally = current_tally()
        if tally is not None:
            self._metrics.took({stage: seconds - self._reported[stage] for stage, seconds in tally.seconds.items()})
            self._reported = Counter(tally.seconds)

    def _frontier_lives(self) -> bool:
        try:
            self.status()
        except RayActorError:
            return False
        return True

    def _dataset(self) -> Any:
        resources, policy = self._resources, self._policy
        batch_size = resources.detector_batch_size if self._together else resources.scale_batch_size
        # A policy without evidence has all tiles of an image cut at once.
        tiles_at_once = 1 + policy.fixed_windows
        source = TileSource(
            self._frontier,
            policy,
            self._open_image,
            readers=resources.readers,
            lease_size=max(1, batch_size // tiles_at_once),
            open_images=resources.open_images,
            max_lease_size=max(1, max(ROW_TILES, batch_size) // tiles_at_once),
            advanced=resources.advanced,
        )
        rows = ray.data.read_datasource(
            source, num_cpus=cpu_share(self._processes), override_num_blocks=resources.readers
        )
        gpus, detector_batch = resources.gpus_per_detector_actor, resources.detector_batch_size
        if self._together:
            return self._in_actors(rows, ScaleAndDetectStage, resources.all_detectors, gpus, detector_batch)
        scale_gpus, scale_batch = resources.gpus_per_scale_actor, resources.scale_batch_size
        rows = self._in_actors(rows, ScaleStage, resources.scale_actors, scale_gpus, scale_batch)
        return self._in_actors(rows, DetectStage, resources.detector_actors, gpus, detector_batch)

    def _in_actors(self, rows: Any, stage: type, size: PoolSize | None, gpus: float, batch_size: int) -> Any:
        """The rows after a stage, which runs in a pool of actors."""
        low, high = limits(size)
        return rows.map_batches(
            stage,
            fn_constructor_args=(self._frontier, self._policy, self._networks, batch_size, self._resources.advanced),
            batch_size=1,
            batch_format="pyarrow",
            # A row in work and one that waits: more would not be left for another actor at the end.
            compute=ActorPoolStrategy(min_size=low, max_size=high, max_tasks_in_flight_per_actor=2),
            num_cpus=cpu_share(self._processes),
            num_gpus=gpus or None,
        )


class Assembler:
    """Groups tile results by image, and merges an image when all of its tiles are there; duplicates are dropped.

    Args:
        merging: parameters of the merge.
        images: the images of the run.
    """

    def __init__(self, merging: Merging, images: ImageRecords) -> None:
        self._merging = merging
        self._images = images
        self._tiles: defaultdict[int, dict[tuple[int, ...], TileResult]] = defaultdict(dict)
        self._credits: defaultdict[int, Fraction] = defaultdict(Fraction)
        self._finished = np.zeros(len(images), bool)

    def add(self, results: Sequence[TileResult]) -> list[ImageResult]:
        """Add tile results.

        Returns:
            The results of the images that they complete.

        Raises:
            RuntimeError: if an image's credits exceed 1, which is a bug: a tile was created twice.
        """
        done = []
        rows = self._images.positions([result.image_id for result in results]).tolist()
        for row, result in zip(rows, results, strict=True):
            if self._finished[row]:
                continue
            tiles = self._tiles[result.image_id]
            if result.path in tiles:
                continue
            tiles[result.path] = result
            self._credits[result.image_id] += result.credit
            credit = self._credits[result.image_id]
            if credit > 1:
                msg = f"image {result.image_id} has tiles worth {credit} of it, more than 1: {sorted(tiles)}"
                raise RuntimeError(msg)
            if credit == 1:
                self._finished[row] = True
                del self._credits[result.image_id]
                done.append(merge_image(list(self._tiles.pop(result.image_id).values()), self._merging))
        return done

    @property
    def unfinished(self) -> list[int]:
        """Ids of images of which some tiles are missing."""
        return sorted(self._tiles)


@contextmanager
def _data_context(no_progress_seconds: float) -> Iterator[None]:
    """Set the Ray Data options that the feedback loop depends on, and restore the previous ones afterwards."""
    context = DataContext.get_current()
    wanted = {
        # Emit every block at once: a block that waits for more rows could wait for its own children.
        "target_max_block_size": 1,
        # Reserved shares of a small object store deadlock the loop: the reader never ends and uses up the shared part,
        # so the scale stage may not start the call that would complete a detector batch. Queues are bounded by the
        # ratio to the next stage's pending bytes, and by the limit of open images.
        "op_resource_reservation_enabled": False,
        "downstream_capacity_backpressure_ratio": 2.0,
        "execution_no_progress_timeout_s": no_progress_seconds,
        "enable_progress_bars": False,
        # Starts an unneeded thread in every call.
        "memory_usage_poll_interval_s": None,
        "print_on_execution_start": False,
        "max_errored_blocks": 0,
    }
    before = {name: getattr(context, name) for name in wanted}
    order = context.execution_options.preserve_order
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        # With order preserved, one slow tile would stop the loop.
        context.execution_options.preserve_order = False
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        context.execution_options.preserve_order = order


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Scheduling strategy for the node of this process."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
