"""Several pipelines side by side, each with a part of the images, a queue and a driver of its own.

One driver spends some milliseconds on a tile's way through Ray Data, and one queue one or two: enough for a few
accelerators, and not for hundreds. An image goes through one pipeline from end to end, so that nothing is shared.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from scalenet_ray.core.detections import ImageResult
from scalenet_ray.core.errors import WorkerError
from scalenet_ray.core.inference import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.timing import add_seconds, measured
from scalenet_ray.data.coco import ImageRecord, OpenImage
from scalenet_ray.engine.pipeline import ImageStream, on_this_node
from scalenet_ray.engine.worker_errors import from_worker
from scalenet_ray.runs.batch import Stream
from scalenet_ray.runs.resources import Resources

__all__ = [
    "ShardedStream",
    "image_stream",
]

_GROUPS_IN_HAND = 8


@ray.remote(num_cpus=0, max_restarts=0)
class PipelineActor:
    """An `ImageStream` and its driver, in a process of their own."""

    def __init__(self, *args: Any) -> None:
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        self._stream = ImageStream(*args)

    def groups(self) -> Iterator[tuple[list[ImageResult], dict[str, float]]]:
        """Images in the groups in which they finish, and the seconds that each stage was busy since the last."""
        with measured() as tally:
            for results in self._stream.groups():
                yield results, tally.take()

    def commit(self, image_ids: list[int]) -> None:
        """These are written."""
        self._stream.commit(image_ids)

    def seconds_at_work(self) -> float:
        """Seconds since the first lease; 0 before."""
        return self._stream.seconds_at_work()


class ShardedStream:
    """`ImageStream` for more actors than one driver can feed.

    Args:
        images: the images, dealt out one by one.
        policy: the policy.
        networks: how actors make their networks.
        open_image: how readers read an image.
        resources: who works, in all pipelines together.
    """

    def __init__(
        self,
        images: Sequence[ImageRecord],
        policy: Policy,
        networks: NetworkFactories,
        open_image: OpenImage,
        resources: Resources,
    ) -> None:
        shares = resources.per_pipeline
        # On the driver's own node, as the queues are. Of two threads one works through the images, and one hears which
        # are written.
        actor: Any = PipelineActor.options(scheduling_strategy=on_this_node(), max_concurrency=2)
        parts = [images[i :: len(shares)] for i in range(len(shares))]
        self._pipelines = [
            actor.remote(part, policy, networks, open_image, share, resources.processes)
            for part, share in zip(parts, shares, strict=True)
        ]
        self._pipeline_of = {image.image_id: i for i, part in enumerate(parts) for image in part}

    def __iter__(self) -> Iterator[ImageResult]:
        """Yields each image once.

        Raises:
            UserError: if a stage raised it.
            WorkerError: if a stage raised another error, a pipeline or its queue died, or ended with images unfinished.
        """
        streaming = {"num_returns": "streaming", "_generator_backpressure_num_objects": _GROUPS_IN_HAND}
        left: list[Any] = [pipeline.groups.options(**streaming).remote() for pipeline in self._pipelines]
        while left:
            ready, left = ray.wait(left)
            first: Any = ready[0]
            try:
                results, seconds = ray.get(next(first))
            except StopIteration:
                continue
            except RayActorError as error:
                msg = (
                    "a pipeline's process died, and with it what was in work: images that are written are safe; run "
                    "the same command with --resume to go on with the others"
                )
                raise WorkerError(msg, str(error)) from error
            except RayError as error:
                raise from_worker(error) from None
            # The one that was asked last comes last, so that none waits for long.
            left.append(first)
            add_seconds(seconds)
            yield from results

    def commit(self, image_ids: Iterable[int]) -> None:
        """Say that the results of these images are written: the queues need not remember them."""
        of: defaultdict[int, list[int]] = defaultdict(list)
        for image_id in image_ids:
            of[self._pipeline_of[image_id]].append(image_id)
        for i, ids in of.items():
            self._pipelines[i].commit.remote(ids)

    def seconds_at_work(self) -> float:
        """Seconds since the earliest first lease of all pipelines; 0 before, and if one died, which iterating says."""
        try:
            return max(ray.get([pipeline.seconds_at_work.remote() for pipeline in self._pipelines]))
        except RayActorError:
            return 0.0


def image_stream(
    images: Sequence[ImageRecord],
    policy: Policy,
    networks: NetworkFactories,
    open_image: OpenImage,
    resources: Resources,
) -> Stream:
    """One pipeline, driven from this process, or several: as the resources have it."""
    stream = ImageStream if len(resources.per_pipeline) == 1 else ShardedStream
    return stream(images, policy, networks, open_image, resources)
