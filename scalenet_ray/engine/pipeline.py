"""The main job as one Ray Data run: read -> look <-> frontier -> detect -> assemble.

Frontier  --lease-->  readers (generator read tasks: cut the tiles' pixels)
^                     |
| complete(tile,      v
|   children)      look actors --tiles to detect--> detector actors --> assembler
+---------------------+

Where the detector itself looks, or nobody does, looking and detecting are one stage.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scalenet_ray.core.detections import ImageResult, TileResult
from scalenet_ray.core.errors import WorkerError
from scalenet_ray.core.inference import NetworkFactories
from scalenet_ray.core.merge import Merging, merge_image
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.timing import add_seconds, current_tally
from scalenet_ray.data.coco import ImageRecord, OpenImage
from scalenet_ray.engine.frontier import FrontierActor, FrontierStatus
from scalenet_ray.engine.metrics import RunMetrics
from scalenet_ray.engine.placement import cpu_share
from scalenet_ray.engine.rows import seconds_of, unpack_results
from scalenet_ray.engine.stages import DetectStage, ScaleAndDetectStage, ScaleStage, TileSource
from scalenet_ray.engine.worker_errors import workers_errors
from scalenet_ray.runs.resources import PoolSize, Resources, limits

__all__ = [
    "Assembler",
    "ImageStream",
    "on_this_node",
]

_SECONDS_BETWEEN_STATUS = 2.0


@contextmanager
def _data_context(no_progress_seconds: float) -> Iterator[None]:
    """Ray Data's settings that the loop depends on; whatever held before holds again afterwards."""
    context = DataContext.get_current()
    wanted = {
        # Every block leaves as soon as it is made: one that waits for more could wait for its own children.
        "target_max_block_size": 1,
        # A share of the object store for each stage hangs a loop in a small one: the reader, which never ends, uses
        # up what is shared, and the look stage may not start a call that would let the detectors' batch leave.
        # What bounds the queues is this ratio of the next stage's bytes in hand, and the open images.
        "op_resource_reservation_enabled": False,
        "downstream_capacity_backpressure_ratio": 2.0,
        "execution_no_progress_timeout_s": no_progress_seconds,
        "enable_progress_bars": False,
        # A thread in every call, to no use here.
        "memory_usage_poll_interval_s": None,
        "print_on_execution_start": False,
        # An order would let one slow tile stop the loop.
        "max_errored_blocks": 0,
    }
    before = {name: getattr(context, name) for name in wanted}
    order = context.execution_options.preserve_order
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        context.execution_options.preserve_order = False
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        context.execution_options.preserve_order = order


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Where this very process is, and nowhere else."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _tiles_per_lease(policy: Policy) -> int:
    """Tiles cut from one image by the reader; 1 for a policy with evidence."""
    return 1 + policy.fixed_windows


class ImageStream:
    """Finished images, as they finish, of one policy over any number of images.

    Iterate over it once; after the results of some images are written, `commit` lets the queue forget them.

    Args:
        images: the images, in the order in which they are begun.
        policy: the policy.
        networks: how actors make their networks.
        open_image: how readers read an image.
        resources: who works.
        processes: readers and actors among which the cluster's CPUs are shared out; those of the resources by default.
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
        self._images = images
        self._policy = policy
        self._networks = networks
        self._open_image = open_image
        self._resources = resources
        self._processes = processes or resources.processes
        # On the driver's own node: a worker node that is lost must not take the queue with it.
        actor: Any = FrontierActor.options(scheduling_strategy=on_this_node())
        self._frontier = actor.remote(list(images), resources.open_images)
        self._metrics = RunMetrics(policy.name)
        self._told: Counter[str] = Counter()

    def __iter__(self) -> Iterator[ImageResult]:
        """Yields each image once.

        Raises:
            UserError: if a stage raised it.
            RuntimeError: if a stage raised another error or the frontier died (as `WorkerError`), or the run ended
                with images unfinished.
        """
        return (result for results in self.groups() for result in results)

    def groups(self) -> Iterator[list[ImageResult]]:
        """Yields images in the groups in which they finish, each image once.

        Raises:
            UserError: if a stage raised it.
            RuntimeError: if a stage raised another error or the frontier died (as `WorkerError`), or the run ended
                with images unfinished.
        """
        assembler = Assembler(self._policy.merging)
        count = 0
        told = -_SECONDS_BETWEEN_STATUS
        try:
            with _data_context(self._resources.advanced.no_progress_seconds):
                for table in self._dataset().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                    add_seconds(seconds_of(table))
                    results = assembler.add(unpack_results(table))
                    count += len(results)
                    for result in results:
                        self._metrics.finished(result)
                    yield results
                    if time.monotonic() - told > _SECONDS_BETWEEN_STATUS:
                        told = time.monotonic()
                        self._metrics.queue(self.status())
                        self._tell_seconds()
        except Exception as error:
            if self._frontier_lives():
                with workers_errors():
                    raise
            msg = (
                "the frontier, the queue of tiles, died, and with it what was in work: images that are written are "
                "safe; run the same command with --resume to go on with the others"
            )
            raise WorkerError(msg, str(error)) from error
        self._tell_seconds()
        if count != len(self._images):
            begun = assembler.unfinished
            msg = (
                f"the run ended with {len(self._images) - count} of {len(self._images)} images unfinished, "
                f"{len(begun)} of them begun, e.g. ids {begun[:5]}: add --resume to go on with them"
            )
            raise RuntimeError(msg)

    def commit(self, image_ids: Iterable[int]) -> None:
        """Say that the results of these images are written: the queue need not remember them."""
        self._frontier.commit.remote(list(image_ids))

    def seconds_at_work(self) -> float:
        """Seconds since the first lease; 0 before, and if the frontier died, which iterating says."""
        try:
            return ray.get(self._frontier.seconds_at_work.remote())
        except RayActorError:
            return 0.0

    def status(self) -> FrontierStatus:
        """How far the queue is."""
        return ray.get(self._frontier.status.remote())

    def _tell_seconds(self) -> None:
        tally = current_tally()
        if tally is not None:
            self._metrics.took({stage: seconds - self._told[stage] for stage, seconds in tally.seconds.items()})
            self._told = Counter(tally.seconds)

    def _frontier_lives(self) -> bool:
        try:
            self.status()
        except RayActorError:
            return False
        return True

    def _dataset(self) -> Any:
        resources, policy, networks = self._resources, self._policy, self._networks
        together = networks.one_actor_suffices(policy)
        batch_size = resources.detector_batch_size if together else resources.scale_batch_size
        cpus = cpu_share(self._processes)
        source = TileSource(
            self._frontier,
            policy,
            self._open_image,
            readers=resources.readers,
            lease_size=max(1, batch_size // _tiles_per_lease(policy)),
            retries=resources.advanced.retries,
        )
        rows = ray.data.read_datasource(source, num_cpus=cpus, override_num_blocks=resources.readers)
        detectors = {"batch_format": "pyarrow", "num_cpus": cpus, "num_gpus": resources.gpus_per_detector_actor or None}
        detector_args = (self._frontier, policy, networks, resources.detector_batch_size, resources.advanced.retries)
        if together:
            return rows.map_batches(
                ScaleAndDetectStage,
                fn_constructor_args=detector_args,
                batch_size=1,
                compute=_pool(resources.all_detectors),
                **detectors,
            )
        return rows.map_batches(
            ScaleStage,
            fn_constructor_args=(
                self._frontier,
                policy,
                networks,
                resources.advanced.retries,
                resources.scale_batch_size,
            ),
            batch_size=1,
            batch_format="pyarrow",
            compute=_pool(resources.scale_actors),
            num_cpus=cpus,
            num_gpus=resources.gpus_per_scale_actor or None,
        ).map_batches(
            DetectStage,
            fn_constructor_args=detector_args,
            batch_size=resources.rows_per_detect_call,
            compute=_pool(resources.detector_actors),
            **detectors,
        )


def _pool(size: PoolSize) -> ActorPoolStrategy:
    fewest, most = limits(size)
    return ActorPoolStrategy(size=fewest) if fewest == most else ActorPoolStrategy(min_size=fewest, max_size=most)


class Assembler:
    """Collects tile results by image; a tile that comes twice counts once.

    Args:
        merging: how an image's detections become one list.
    """

    def __init__(self, merging: Merging) -> None:
        self._merging = merging
        self._tiles: defaultdict[int, dict[tuple[int, ...], TileResult]] = defaultdict(dict)
        self._finished: set[int] = set()

    def add(self, results: Iterable[TileResult]) -> list[ImageResult]:
        """Take in tile results, and give the images that they finish.

        Raises:
            RuntimeError: if an image's credits exceed 1: a tile was made twice under two names, which is a bug.
        """
        done = []
        for result in results:
            if result.image_id in self._finished:
                continue
            tiles = self._tiles[result.image_id]
            tiles.setdefault(result.path, result)
            credit = sum((tile.credit for tile in tiles.values()), Fraction(0))
            if credit > 1:
                msg = f"image {result.image_id} has tiles worth {credit} of it, more than 1: {sorted(tiles)}"
                raise RuntimeError(msg)
            if credit == 1:
                self._finished.add(result.image_id)
                done.append(merge_image(list(self._tiles.pop(result.image_id).values()), self._merging))
        return done

    @property
    def unfinished(self) -> list[int]:
        """Ids of images with some of their tiles in, but not all."""
        return sorted(self._tiles)
