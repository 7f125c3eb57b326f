"""Readers of the Ray pipeline: they lease work, open images, and cut the pixels of tiles."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from scalenet_ray.core.detections import Failure, TileResult
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.expansion import Expansion, expand
from scalenet_ray.core.geometry import AnyImage, Tile, tile_pixels
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.timing import timed
from scalenet_ray.data.image_records import ImageRecord, OpenImage
from scalenet_ray.engine.frontier import Lease, Work, child_credit
from scalenet_ray.engine.quarantine import GuardedCalls
from scalenet_ray.engine.rows import GeneratorSource, PackedTile, TileRow, pack, timed_table
from scalenet_ray.runs.resources import DEFAULT_ADVANCED, AdvancedResources

# Short compared with a batch on an accelerator, long compared with a request, which takes about a millisecond.
_WAIT_SECONDS, _MAX_WAIT_SECONDS = 0.05, 0.2


_DOUBLINGS = 10
"""Number of times that the size of a lease doubles at most."""

_CACHE_BYTES = 512 * 2**20

_ROW_BYTES = 128 * 2**20
"""Limit of the tiles that a reader cuts of one image at once; above, they are leased one by one."""


class _OpenedImages:
    """LRU cache of opened images: an image's windows are cut soon after the image itself.

    Args:
        open_image: opens an image.
        most: number of images kept; as many as may be in progress, so that finished ones do not stay.
    """

    def __init__(self, open_image: OpenImage, most: int) -> None:
        self._open_image = open_image
        self._most = most
        self._images: OrderedDict[int, AnyImage] = OrderedDict()
        self._bytes = 0

    def __call__(self, record: ImageRecord) -> AnyImage:
        if record.image_id in self._images:
            self._images.move_to_end(record.image_id)
            return self._images[record.image_id]
        with timed("decode"):
            image = self._open_image(record)
        self._images[record.image_id] = image
        self._bytes += image.nbytes
        while len(self._images) > 1 and (self._bytes > _CACHE_BYTES or len(self._images) > self._most):
            self._bytes -= self._images.popitem(last=False)[1].nbytes
        return image


class TileSource(GeneratorSource):
    """Readers that lease work from the frontier, cut the tiles' pixels, and yield one packed row per lease.

    Args:
        frontier: the queue's actor.
        policy: the policy.
        open_image: opens an image.
        readers: number of readers.
        lease_size: maximum pieces of work of a reader's first lease.
        open_images: maximum number of images in progress.
        max_lease_size: maximum pieces of work of a lease, which doubles from lease to lease; by default `lease_size`.
        advanced: timeout and tries of images that hang or crash their reader.
    """

    def __init__(
        self,
        frontier: Any,
        policy: Policy,
        open_image: OpenImage,
        *,
        readers: int,
        lease_size: int,
        open_images: int,
        max_lease_size: int | None = None,
        advanced: AdvancedResources = DEFAULT_ADVANCED,
    ) -> None:
        super().__init__(readers)
        self._frontier = frontier
        self._policy = policy
        self._open_image = open_image
        self._lease_size = lease_size
        self._max_lease_size = max_lease_size or lease_size
        self._open_images = open_images
        self._calls = GuardedCalls("read", frontier, advanced)

    def read(self, reader: int) -> Iterator[pa.Table]:
        """Yield a table per lease; a replay yields the same tables, except for the seconds column."""
        images = _OpenedImages(self._open_image, self._open_images)
        sequence = 0
        wait = _WAIT_SECONDS
        while True:
            count = min(self._lease_size << min(sequence, _DOUBLINGS), self._max_lease_size)
            lease: Lease | None = ray.get(self._frontier.lease.remote(reader, sequence, count))
            if lease is None:
                return
            if not lease.work and not lease.forgotten:
                time.sleep(wait)
                wait = min(2 * wait, _MAX_WAIT_SECONDS)
                continue
            wait = _WAIT_SECONDS
            yield timed_table(partial(self._pack, lease, images))
            sequence += 1

    def _pack(self, lease: Lease, images: OpenImage) -> pa.Table:
        return pack(self._cut(lease, images))

    def _cut(self, lease: Lease, images: OpenImage) -> TileRow:
        if not lease.suspect:
            with self._calls.watched():
                return cut_work(lease.work, self._policy, images)
        parts = self._calls.one_by_one(
            [item.id for item in lease.work],
            lambda at: [cut_work((lease.work[i],), self._policy, images) for i in at],
            lambda i, error: TileRow([], [], [_read_failure(lease.work[i], error)]),
        )
        return TileRow(
            [packed for part in parts for packed in part.tiles],
            [pixels for part in parts for pixels in part.pixels],
            [result for part in parts for result in part.results],
        )


def cut_work(work: tuple[Work, ...], policy: Policy, open_image: OpenImage) -> TileRow:
    """Open the images of a lease and cut its tiles.

    A policy that needs no scale predictions is expanded here, so that an image is decoded once for all of its tiles,
    unless these are too many for a row.

    Args:
        work: the work of the lease.
        policy: the policy.
        open_image: opens an image.

    Returns:
        Tiles with pixels; failed results for images that cannot be read.
    """
    batch = TileRow([], [], [])
    for item in work:
        try:
            image = open_image(item.image)
            tile = item.tile or policy.root(item.image.image_id, (image.shape[0], image.shape[1]))
            expansion = Expansion(detect=True, children=cut_together(tile, policy))
            pixels = [tile_pixels(image, part) for part in (tile, *expansion.children)]
        except TileError as error:
            batch.results.append(_read_failure(item, error))
            continue
        credit = child_credit(item.credit, expansion)
        batch.tiles.append(PackedTile(tile, credit))
        batch.tiles.extend(PackedTile(child, credit, settled=True) for child in expansion.children)
        batch.pixels.extend(pixels)
    return batch


def cut_together(tile: Tile, policy: Policy) -> tuple[Tile, ...]:
    """Child tiles that the reader cuts with a tile, and which the queue does not see."""
    if policy.uses_evidence:
        return ()
    children = expand(tile, None, policy).children
    return children if 3 * sum(child.height * child.width for child in children) <= _ROW_BYTES else ()


def _read_failure(item: Work, error: TileError) -> TileResult:
    image_id, path = item.id
    return TileResult(image_id, path, item.credit, failure=Failure("read", error.reason))
