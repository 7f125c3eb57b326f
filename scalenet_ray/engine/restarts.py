"""Stream that begins again with the images that are left where Ray could not make rows of a lost node again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from scalenet_ray.core.detections import ImageResult
from scalenet_ray.data.image_records import ImageRecords
from scalenet_ray.engine.worker_errors import RowsLostError
from scalenet_ray.runs.batch import Stream

__all__ = ["RestartingStream"]

_LOG = logging.getLogger(__name__)


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
