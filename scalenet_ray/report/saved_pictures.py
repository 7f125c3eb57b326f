"""Pictures of each image of a detection run, and its objects cut out, written while the run goes on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from PIL import Image

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import whole_pixels
from scalenet_ray.data import storage
from scalenet_ray.data.image_records import ImageRecord, OpenImage
from scalenet_ray.report.pictures import PICTURE_SIDE, crop, draw_objects, encoded

_THREADS = 2
_MOST_WAITING = 32
_QUALITY = 90


class SavedPictures:
    """Writer of pictures/ID-NAME.jpg, the image with its boxes, and crops/CLASS/ID-NAME-NUMBER.jpg, each object.

    A context manager: threads of this process read the images again, draw and write; the block ends when all is
    written. What is there already is not written again.

    Args:
        run_uri: the run folder.
        open_image: reads an image.
        categories: category id -> name.
        pictures: write the images with boxes.
        crops: write the objects.
        min_score: boxes that score less are left out.

    Attributes:
        failed: (file, reason) of the images whose pictures could not be written.
    """

    def __init__(
        self,
        run_uri: str,
        open_image: OpenImage,
        categories: Mapping[int, str],
        *,
        pictures: bool,
        crops: bool,
        min_score: float,
    ) -> None:
        self._run_uri, self._open_image, self._categories = run_uri, open_image, categories
        self._pictures, self._crops, self._min_score = pictures, crops, min_score
        self._pool = ThreadPoolExecutor(_THREADS, "pictures")
        self._waiting: list[tuple[str, Future[None]]] = []
        self.failed: list[tuple[str, str]] = []

    def __enter__(self) -> SavedPictures:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what waits; after an error in the block, drop it."""
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            self._collect(0)

    def add(self, record: ImageRecord, detections: Detections) -> None:
        """Write the pictures of an image; waits while many others wait.

        Args:
            record: the image.
            detections: its detections, in image pixels.
        """
        if not (self._pictures or self._crops):
            return
        self._collect(_MOST_WAITING)
        found = detections[detections.scores >= self._min_score]
        self._waiting.append((record.file_name, self._pool.submit(self._write, record, found)))

    def _collect(self, most: int) -> None:
        """Wait until at most so many images wait."""
        while len(self._waiting) > most:
            file, future = self._waiting.pop(0)
            try:
                future.result()
            except (TileError, OSError) as error:
                self.failed.append((file, error.reason if isinstance(error, TileError) else str(error)))

    def _write(self, record: ImageRecord, found: Detections) -> None:
        stem = record.file_name.rpartition("/")[2].rpartition(".")[0] or record.file_name
        name = f"{record.image_id:06d}-{stem}"
        picture = storage.join(self._run_uri, "pictures", f"{name}.jpg")
        crops = [
            storage.join(self._run_uri, "crops", _folder_of(self._categories[label]), f"{name}-{i}.jpg")
            for i, label in enumerate(found.labels.tolist())
        ]
        draws = self._pictures and not storage.exists(picture)
        # Crops are written in order: if the last is there, all are.
        cuts = self._crops and bool(crops) and not storage.exists(crops[-1])
        if not (draws or cuts):
            return
        image = self._open_image(record)
        if cuts:
            for uri, box in zip(crops, found.boxes.tolist(), strict=True):
                _write_jpeg(uri, Image.fromarray(crop(image, box)))
        if draws:
            shown = Image.fromarray(whole_pixels(image, PICTURE_SIDE))
            _write_jpeg(picture, draw_objects(shown, image.shape[1], found, self._categories))


def _folder_of(category: str) -> str:
    """A folder's name for a category: without slashes, and without the dots that would hide it or lead out."""
    return re.sub(r"^\.+|[/\0]", "_", category)


def _write_jpeg(uri: str, picture: Image.Image) -> None:
    storage.write_bytes_atomic(uri, encoded(picture, "JPEG", quality=_QUALITY))
