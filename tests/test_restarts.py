"""A stream that begins again after Ray lost rows of a node."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator

import pytest

from scalenet_ray.core.detections import Detections, ImageResult
from scalenet_ray.core.errors import WorkerError
from scalenet_ray.data.image_records import ImageRecord, ImageRecords
from scalenet_ray.engine.parallel import RestartingStream
from scalenet_ray.engine.worker_errors import RowsLostError

IMAGES = ImageRecords.of(ImageRecord(i, f"{i}.jpg") for i in (2, 4, 6, 8))


class Stream:
    """Stream that yields the last of its images first, and ends with an error after some of them."""

    queued = 3

    def __init__(self, images: ImageRecords, until: int | None, error: Exception) -> None:
        self.images, self._until, self._error = images.ids.tolist(), until, error
        self.committed: list[int] = []

    def __iter__(self) -> Iterator[ImageResult]:
        for image_id in self.images[::-1][: self._until]:
            yield ImageResult(image_id, Detections.empty(), None, 1, 0, 0, 1.0, {}, (9, 9))
        if self._until is not None:
            raise self._error

    def commit(self, image_ids: Iterable[int]) -> None:
        self.committed += image_ids

    def seconds_at_work(self) -> float:
        return 1.5


def restarting(*until: int | None, error: Exception | None = None) -> tuple[RestartingStream, list[Stream]]:
    """A stream whose parts end with an error after so many images each; None for a part that ends well."""
    lost = error or RowsLostError("StreamingGeneratorReplayInconsistentError of Ray", "its trace")
    streams: list[Stream] = []

    def start(images: ImageRecords) -> Stream:
        streams.append(Stream(images, until[len(streams)], lost))
        return streams[-1]

    return RestartingStream(IMAGES, start), streams


def test_the_images_that_are_left_begin_anew_and_each_comes_once(caplog: pytest.LogCaptureFixture) -> None:
    stream, parts = restarting(1, 2, None)
    assert [result.image_id for result in stream] == [8, 6, 4, 2]
    assert [part.images for part in parts] == [[2, 4, 6, 8], [2, 4, 6], [2]]
    assert [(record.message, record.__dict__["fields"]["images_left"]) for record in caplog.records] == [
        ("rows lost with a node", 3),
        ("rows lost with a node", 1),
    ]


def test_rows_lost_after_the_last_image_are_nobodys() -> None:
    stream, parts = restarting(4)
    assert len(list(stream)) == 4
    assert len(parts) == 1


def test_a_stream_that_finishes_nothing_is_not_begun_for_ever() -> None:
    stream, parts = restarting(1, 0, None)
    with pytest.raises(RowsLostError):
        list(stream)
    assert len(parts) == 2


def test_another_error_ends_the_run() -> None:
    stream, parts = restarting(2, None, error=WorkerError("KeyError in a worker", "its trace"))
    with pytest.raises(WorkerError, match="KeyError"):
        list(stream)
    assert len(parts) == 1


def test_writing_and_progress_are_those_of_the_stream_at_work() -> None:
    stream, parts = restarting(2, None)
    for count, result in enumerate(stream):
        stream.commit([result.image_id])
        assert (stream.queued, stream.seconds_at_work()) == (3, 1.5)
        assert len(parts) == 1 + (count >= 2)
    assert [part.committed for part in parts] == [[8, 6], [4, 2]]


def test_the_error_comes_through_another_process_as_itself() -> None:
    error = pickle.loads(pickle.dumps(RowsLostError("of Ray", "its trace")))
    assert (type(error), str(error), error.trace) == (RowsLostError, "of Ray", "its trace")
