"""Ray Data stages: cut tiles; predict scales and decide; detect; or the last two in one.

Each stage unpacks a micro-batch, calls the core and packs the results. Errors caused by the data (`TileError`) are
caught: the tile is completed as failed and passed on with its credit. Any other error is a bug and ends the run.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from scalenet_ray.core.detections import Failure, TileResult
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import AnyImage, Tile, tile_pixels
from scalenet_ray.core.inference import (
    NetworkFactories,
    ScaleResult,
    detect_tiles,
    needs_detector_first,
    predict_scales,
)
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.recursion import Expansion, expand
from scalenet_ray.core.timing import timed
from scalenet_ray.data.coco import ImageRecord, OpenImage
from scalenet_ray.engine.frontier import Completion, Decision, Lease, Work, child_credit
from scalenet_ray.engine.metrics import BatchMetrics
from scalenet_ray.engine.quarantine import GuardedCalls
from scalenet_ray.engine.rows import (
    GeneratorSource,
    MicroBatch,
    PackedTile,
    pack,
    pack_results,
    timed_table,
    unpack,
    with_seconds_column,
)
from scalenet_ray.runs.resources import DEFAULT_RETRIES, RetryPolicy

__all__ = [
    "DetectStage",
    "ScaleAndDetectStage",
    "ScaleStage",
    "TileSource",
]

# Short compared with a batch on an accelerator, long compared with a request, which takes about a millisecond.
_WAIT_SECONDS, _MAX_WAIT_SECONDS = 0.05, 0.2


_CACHE_BYTES = 512 * 2**20

_ROW_BYTES = 128 * 2**20
"""Limit of the tiles that a reader cuts of one image at once; above, they are leased one by one."""


class _OpenedImages:
    """LRU cache of opened images, bounded in bytes: an image's windows are cut soon after the image itself."""

    def __init__(self, open_image: OpenImage) -> None:
        self._open_image = open_image
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
        while self._bytes > _CACHE_BYTES and len(self._images) > 1:
            self._bytes -= self._images.popitem(last=False)[1].nbytes
        return image


class TileSource(GeneratorSource):
    """Readers that lease work from the frontier, cut the tiles' pixels, and yield one packed row per lease.

    Args:
        frontier: the queue's actor.
        policy: the policy.
        open_image: opens an image.
        readers: number of readers.
        lease_size: pieces of work per lease.
        retries: timeout and retries for images that hang or crash their reader.
    """

    def __init__(
        self,
        frontier: Any,
        policy: Policy,
        open_image: OpenImage,
        *,
        readers: int,
        lease_size: int,
        retries: RetryPolicy = DEFAULT_RETRIES,
    ) -> None:
        super().__init__(readers)
        self._frontier = frontier
        self._policy = policy
        self._open_image = open_image
        self._lease_size = lease_size
        self._calls = GuardedCalls("read", frontier, retries)

    def read(self, reader: int) -> Iterator[pa.Table]:
        """Yield a table per lease; a replay yields the same tables, except for the seconds column."""
        images = _OpenedImages(self._open_image)
        sequence = 0
        wait = _WAIT_SECONDS
        while True:
            lease: Lease | None = ray.get(self._frontier.lease.remote(reader, sequence, self._lease_size))
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

    def _cut(self, lease: Lease, images: OpenImage) -> MicroBatch:
        if not lease.suspect:
            with self._calls.watched():
                return cut_work(lease.work, self._policy, images)
        parts = self._calls.one_by_one(
            [item.id for item in lease.work],
            lambda at: [cut_work((lease.work[i],), self._policy, images) for i in at],
            lambda i, error: MicroBatch([], [], [_read_failure(lease.work[i], error)]),
        )
        return MicroBatch(
            [packed for part in parts for packed in part.tiles],
            [pixels for part in parts for pixels in part.pixels],
            [result for part in parts for result in part.results],
        )


def cut_work(work: tuple[Work, ...], policy: Policy, open_image: OpenImage) -> MicroBatch:
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
    batch = MicroBatch([], [], [])
    for item in work:
        try:
            image = open_image(item.image)
            tile = item.tile or policy.root(item.image.image_id, (image.shape[0], image.shape[1]))
            expansion = Expansion(detect=True, children=_cut_together(tile, policy))
            pixels = [tile_pixels(image, part) for part in (tile, *expansion.children)]
        except TileError as error:
            batch.results.append(_read_failure(item, error))
            continue
        credit = child_credit(item.credit, expansion)
        batch.tiles.append(PackedTile(tile, credit))
        batch.tiles.extend(PackedTile(child, credit, settled=True) for child in expansion.children)
        batch.pixels.extend(pixels)
    return batch


def _cut_together(tile: Tile, policy: Policy) -> tuple[Tile, ...]:
    """Child tiles that the reader cuts with a tile, and which the queue does not see."""
    if policy.uses_evidence:
        return ()
    children = expand(tile, None, policy).children
    return children if 3 * sum(child.height * child.width for child in children) <= _ROW_BYTES else ()


class ScaleStage:
    """Predicts scales of the tiles of a micro-batch, completes them in the frontier, and emits tiles to detect.

    Args:
        frontier: the queue's actor.
        policy: the policy.
        networks: factories of the networks; only those that the policy needs are created.
        retries: timeout and retries for tiles that hang or crash the process.
        batch_size: maximum number of tiles of a micro-batch.
    """

    def __init__(
        self,
        frontier: Any,
        policy: Policy,
        networks: NetworkFactories,
        retries: RetryPolicy = DEFAULT_RETRIES,
        batch_size: int = 1,
    ) -> None:
        self._frontier = frontier
        self._policy = policy
        self._metrics = BatchMetrics(policy.name, "look", batch_size)
        self._calls = GuardedCalls("look", frontier, retries)
        needs_map = policy.needs_predictor
        self._predict_scale = networks.predict_scale() if needs_map and networks.predict_scale else None
        self._detect = networks.detect() if needs_detector_first(policy, self._predict_scale) else None

    @with_seconds_column
    def __call__(self, table: pa.Table) -> pa.Table:
        """Process one packed row; the output is one packed row, even if it is empty."""
        (batch,) = unpack(table)
        return pack(self.process(batch))

    def process(self, batch: MicroBatch) -> MicroBatch:
        """Decide on the tiles of a batch; return the tiles to detect, and the results of the others."""
        indices = [i for i, packed in enumerate(batch.tiles) if not packed.settled]
        tiles, pixels = [batch.tiles[i].tile for i in indices], [batch.pixels[i] for i in indices]
        scales = self._predict(tiles, pixels)
        completions = [
            Completion(tile.image_id, tile.path, self._propose(batch.tiles[i], scale))
            for i, tile, scale in zip(indices, tiles, scales, strict=True)
        ]
        unreadable = [
            Completion(result.image_id, result.path, Decision(Expansion(detect=False), result.failure))
            for result in batch.results
        ]
        recorded: list[Decision] = ray.get(self._frontier.complete.remote([*completions, *unreadable]))
        decisions = dict(zip(indices, zip(scales, recorded[: len(indices)], strict=True), strict=True))
        read_failures = [
            replace(result, credit=child_credit(result.credit, decision.expansion))
            for result, decision in zip(batch.results, recorded[len(indices) :], strict=True)
        ]
        return self._apply(batch, decisions, read_failures)

    def _predict(self, tiles: list[Tile], pixels: list[np.ndarray]) -> list[ScaleResult]:
        """Predict the scales of the tiles that need them; the others get an empty result."""

        def call(batch: Sequence[int]) -> list[ScaleResult]:
            """Predict the scales of `wanted[i]` for each i of the batch."""
            return predict_scales(
                [pixels[wanted[i]] for i in batch],
                [tiles[wanted[i]] for i in batch],
                self._policy,
                detect=self._detect,
                predict_scale=self._predict_scale,
            )

        wanted = [i for i, tile in enumerate(tiles) if self._policy.needs_scales(tile)]
        ids = [(tiles[i].image_id, tiles[i].path) for i in wanted]
        self._metrics.called(len(wanted))
        predicted = self._calls.together(ids, call, lambda _, error: ScaleResult(failure=error))
        results = [ScaleResult()] * len(tiles)
        for i, result in zip(wanted, predicted, strict=True):
            results[i] = result
        return results

    def _propose(self, packed: PackedTile, scale: ScaleResult) -> Decision:
        """The decision to propose to the frontier."""
        if scale.failure is not None:
            return Decision(Expansion(detect=False), Failure("look", scale.failure.reason))
        if not self._policy.uses_evidence and _cut_together(packed.tile, self._policy):
            return Decision(expand(packed.tile, None, self._policy)._replace(children=()))
        return Decision(expand(packed.tile, scale.evidence, self._policy))

    def _apply(
        self, batch: MicroBatch, decisions: dict[int, tuple[ScaleResult, Decision]], read_failures: list[TileResult]
    ) -> MicroBatch:
        """Emit tiles and results by the recorded decisions, which on a retry may differ from the proposed ones."""
        out = MicroBatch([], [], read_failures)
        for i, (packed, pixels) in enumerate(zip(batch.tiles, batch.pixels, strict=True)):
            if i not in decisions:
                out.tiles.append(packed)
                out.pixels.append(pixels)
                continue
            scale, (expansion, failure) = decisions[i]
            credit = child_credit(packed.credit, expansion)
            look_pixels = self._predict_scale.input_pixels if scale.looked and self._predict_scale is not None else 0
            packed = PackedTile(
                packed.tile, credit, settled=True, look_pixels=look_pixels, guards=(*expansion.guards, *scale.guards)
            )
            result = _result(packed, failure)
            if failure is not None or not expansion.detect:
                out.results.append(result)
            elif scale.detections is not None and self._detect is not None:
                out.results.extend(
                    detect_tiles(
                        [result], [packed.tile], [pixels], [scale.detections], self._detect, self._policy.merging
                    )
                )
            else:
                out.tiles.append(packed)
                out.pixels.append(pixels)
        return out


class DetectStage:
    """Detects the tiles of several micro-batches, in batches that mix images and depths.

    Args:
        frontier: the queue's actor.
        policy: the policy.
        networks: factories of the networks.
        batch_size: tiles per call of the detector.
        retries: timeout and retries for tiles that hang or crash the process.
    """

    def __init__(
        self,
        frontier: Any,
        policy: Policy,
        networks: NetworkFactories,
        batch_size: int,
        retries: RetryPolicy = DEFAULT_RETRIES,
    ) -> None:
        self._policy = policy
        self._calls = GuardedCalls("detect", frontier, retries)
        self._metrics = BatchMetrics(policy.name, "detect", batch_size)
        self._detect = networks.detect()
        self._batch_size = batch_size

    @with_seconds_column
    def __call__(self, table: pa.Table) -> pa.Table:
        """Process packed rows; the output is one row of tile results.

        One row is one block, emitted as a whole. With one row per tile, Ray Data would emit a block per tile and
        discard blocks by position after a failure; tiles of written images may be missing in the retry's input, so
        that results of other tiles would be discarded in their place.
        """
        return pack_results(self.process(unpack(table)))

    def process(self, batches: Iterable[MicroBatch]) -> list[TileResult]:
        """Detect all tiles; return the results that the batches already hold, then the new ones."""
        results: list[TileResult] = []
        tiles: list[PackedTile] = []
        pixels: list[np.ndarray] = []
        for batch in batches:
            results += batch.results
            tiles += batch.tiles
            pixels += batch.pixels
        for start in range(0, len(tiles), self._batch_size):
            stop = start + self._batch_size
            results += self._detect_batch(tiles[start:stop], pixels[start:stop])
        return results

    def _detect_batch(self, tiles: list[PackedTile], pixels: list[np.ndarray]) -> list[TileResult]:
        def call(batch: Sequence[int]) -> list[TileResult]:
            """Detect the tiles at these indices."""
            return detect_tiles(
                [_result(tiles[i]) for i in batch],
                [tiles[i].tile for i in batch],
                [pixels[i] for i in batch],
                [None] * len(batch),
                self._detect,
                self._policy.merging,
            )

        ids = [(packed.tile.image_id, packed.tile.path) for packed in tiles]
        self._metrics.called(len(tiles))
        return self._calls.together(ids, call, lambda i, error: _result(tiles[i], Failure("detect", error.reason)))


class ScaleAndDetectStage:
    """Both stages in one actor, for policies that use the detector's own outputs or no scale predictions.

    Both use the same detector, and no tile is sent between actors.

    Args:
        frontier: the queue's actor.
        policy: the policy.
        networks: factories of the networks; each is called once.
        batch_size: maximum number of tiles of a micro-batch, and tiles per call of the detector.
        retries: timeout and retries for tiles that hang or crash the process.
    """

    def __init__(
        self,
        frontier: Any,
        policy: Policy,
        networks: NetworkFactories,
        batch_size: int,
        retries: RetryPolicy = DEFAULT_RETRIES,
    ) -> None:
        detector = networks.detect()
        networks = replace(networks, detect=lambda: detector)
        self._scale_stage = ScaleStage(frontier, policy, networks, retries, batch_size)
        self._detect_stage = DetectStage(frontier, policy, networks, batch_size, retries)

    @with_seconds_column
    def __call__(self, table: pa.Table) -> pa.Table:
        """Process packed rows; the output is one row of tile results."""
        return pack_results(self._detect_stage.process(self._scale_stage.process(batch) for batch in unpack(table)))


def _read_failure(item: Work, error: TileError) -> TileResult:
    image_id, path = item.id
    return TileResult(image_id, path, item.credit, failure=Failure("read", error.reason))


def _result(packed: PackedTile, failure: Failure | None = None) -> TileResult:
    """A result without detections."""
    tile = packed.tile
    return TileResult(
        tile.image_id,
        tile.path,
        packed.credit,
        failure=failure,
        look_pixels=packed.look_pixels,
        guards=packed.guards,
        image_hw=tile.image_hw,
    )
