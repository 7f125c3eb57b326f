"""Parallel pipelines, each with a share of the images and with a queue and a driver of its own.

A driver spends a few milliseconds per tile in Ray Data, and a queue one or two, which limits one pipeline to a few
accelerators. Each image is processed by one pipeline, so pipelines share no state.

A stream begins again with the images that are left where Ray lost rows with a node and could not make them again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError

from scalenet_ray.core.detections import ImageResult
from scalenet_ray.core.errors import WorkerError
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.timing import add_seconds, measured
from scalenet_ray.data.image_records import ImageRecord, ImageRecords, OpenImage
from scalenet_ray.engine.pipeline import ImageStream, on_this_node
from scalenet_ray.engine.worker_errors import RowsLostError, from_worker
from scalenet_ray.runs.batch import Stream
from scalenet_ray.runs.resources import Resources

_LOG = logging.getLogger(__name__)

_BUFFERED_GROUPS = 8


@ray.remote(num_cpus=0, max_restarts=0)
class PipelineActor:
    """Actor that drives an `ImageStream` in a process of its own."""

    def __init__(self, *args: Any) -> None:
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        self._stream = ImageStream(*args)

    def groups(self) -> Iterator[tuple[list[ImageResult], dict[str, float], int]]:
        """Yield groups of finished images, the stages' busy seconds since the group before, and the queued tiles."""
        with measured() as tally:
            for results in self._stream.groups():
                yield results, tally.take(), self._stream.queued

    def commit(self, image_ids: list[int]) -> None:
        """Acknowledge that the results of these images are written."""
        self._stream.commit(image_ids)

    def seconds_at_work(self) -> float:
        """Seconds since the first lease; 0 before."""
        return self._stream.seconds_at_work()


class ParallelStream:
    """Stream of image results from several `ImageStream`s, for more actors than one driver can feed.

    Its arguments are those of `ImageStream`; the images are assigned to the pipelines in turn.
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
        images = ImageRecords.of(images)
        # On the driver's node, like the queues. One thread runs the pipeline, the other one receives commits.
        actor: Any = PipelineActor.options(scheduling_strategy=on_this_node(), max_concurrency=2)
        parts = [images[i :: len(shares)] for i in range(len(shares))]
        self._pipelines = [
            actor.remote(part, policy, networks, open_image, share, resources.processes)
            for part, share in zip(parts, shares, strict=True)
        ]
        self._queued = [0] * len(shares)
        self._images = images

    def __iter__(self) -> Iterator[ImageResult]:
        """Yield the result of each image once.

        Raises:
            UserError: if a stage raised it.
            WorkerError: if a stage raised another error, a pipeline or its queue died, or ended with images unfinished.
        """
        streaming = {"num_returns": "streaming", "_generator_backpressure_num_objects": _BUFFERED_GROUPS}
        running: list[Any] = [pipeline.groups.options(**streaming).remote() for pipeline in self._pipelines]
        number_of = {generator: i for i, generator in enumerate(running)}
        while running:
            ready, running = ray.wait(running)
            first: Any = ready[0]
            try:
                results, seconds, self._queued[number_of[first]] = ray.get(next(first))
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
            # At the end of the list, so that all pipelines are served in turn.
            running.append(first)
            add_seconds(seconds)
            yield from results

    @property
    def queued(self) -> int:
        """Number of tiles that wait or are in work, as of a few seconds ago."""
        return sum(self._queued)

    def commit(self, image_ids: Iterable[int]) -> None:
        """Acknowledge that the results of these images are written, so that the queues can forget them."""
        ids = np.array(list(image_ids), np.int64)
        pipelines = self._images.positions(ids) % len(self._pipelines)
        for i in np.unique(pipelines).tolist():
            self._pipelines[i].commit.remote(ids[pipelines == i].tolist())

    def seconds_at_work(self) -> float:
        """Seconds since the first lease of any pipeline; 0 before, or if one died, which iteration reports."""
        try:
            return max(ray.get([pipeline.seconds_at_work.remote() for pipeline in self._pipelines]))
        except RayActorError:
            return 0.0


class RestartingStream:
    """Stream of image results that survives `RowsLostError`.

    The images whose results have been yielded are not processed again; those that were in work are.

    Args:
        images: the images.
        start: starts a stream over some of them.
    """

    def __init__(self, images: ImageRecords, start: Callable[[ImageRecords], Stream]) -> None:
        self._images, self._start = images, start
        self._stream = start(images)

    def __iter__(self) -> Iterator[ImageResult]:
        """Yield the result of each image once.

        Raises:
            RowsLostError: if it ended a stream that has not finished any image.
        """
        left = np.ones(len(self._images), bool)
        while left.any():
            before = np.count_nonzero(left)
            try:
                for result in self._stream:
                    left[self._images.positions([result.image_id])] = False
                    yield result
            except RowsLostError as error:
                more = np.count_nonzero(left)
                if more == before:
                    raise
                _LOG.warning(
                    "rows lost with a node", extra={"fields": {"reason": str(error), "images_left": int(more)}}
                )
                if more:
                    self._stream = self._start(self._images.take(left))

    def commit(self, image_ids: Iterable[int]) -> None:
        """Acknowledge that the results of these images are written."""
        self._stream.commit(image_ids)

    def seconds_at_work(self) -> float:
        """Seconds since work began, on the first of the images that were left if it began again; 0 before."""
        return self._stream.seconds_at_work()

    @property
    def queued(self) -> int:
        """Number of tiles that wait or are in work, as of a few seconds ago."""
        return self._stream.queued


def image_stream(
    images: Sequence[ImageRecord],
    policy: Policy,
    networks: NetworkFactories,
    open_image: OpenImage,
    resources: Resources,
) -> Stream:
    """Create the stream for the resources: one pipeline driven by this process, or several in actors."""
    stream = ImageStream if len(resources.per_pipeline) == 1 else ParallelStream
    return stream(images, policy, networks, open_image, resources)
