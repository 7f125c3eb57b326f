"""The stages, as Ray Data callables: read and cut, look and decide, detect; the last two in one where they can be.

Each is thin: it unpacks a micro-batch, calls the core, and packs what comes. What data can cause (`TileError`)
is caught here, completed as failed, and travels on with its credit; a bug is let through and ends the run.
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
from scalenet_ray.core.geometry import Tile, cut_tile
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
    carries_seconds,
    measure,
    pack,
    pack_results,
    unpack,
)
from scalenet_ray.runs.resources import DEFAULT_RETRIES, RetryPolicy

__all__ = [
    "DetectStage",
    "ScaleAndDetectStage",
    "ScaleStage",
    "TileSource",
]

# Short beside a batch on an accelerator, and long beside a question, which costs both sides a millisecond.
_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.05, 0.2


_CACHE_BYTES = 512 * 2**20


class _DecodedImages:
    """The images decoded last, up to so many bytes: the windows of an image follow it closely."""

    def __init__(self, open_image: OpenImage) -> None:
        self._open_image = open_image
        self._images: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0

    def __call__(self, record: ImageRecord) -> np.ndarray:
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
    """Readers that lease work from the frontier, cut its pixels, and yield one packed row a lease.

    Args:
        frontier: the queue's actor.
        policy: the policy.
        open_image: how images are read.
        readers: how many.
        lease_size: how much work a lease asks for.
        retries: with an image that hangs or kills its reader.
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
        """The same leases again give the same tables again, byte for byte but for the seconds they took."""
        images = _DecodedImages(self._open_image)
        sequence = 0
        wait = _WAIT_SECONDS
        while True:
            lease: Lease | None = ray.get(self._frontier.lease.remote(reader, sequence, self._lease_size))
            if lease is None:
                return
            if not lease.work and not lease.forgotten:
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
                continue
            wait = _WAIT_SECONDS
            yield measure(partial(self._pack, lease, images))
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
            lambda i, error: MicroBatch([], [], [_unread(lease.work[i], error)]),
        )
        return MicroBatch(
            [packed for part in parts for packed in part.tiles],
            [pixels for part in parts for pixels in part.pixels],
            [result for part in parts for result in part.results],
        )


def cut_work(work: tuple[Work, ...], policy: Policy, open_image: OpenImage) -> MicroBatch:
    """Open the images of a lease and cut its tiles.

    A policy that needs to see nothing is expanded here, so that an image is decoded once for all its tiles.

    Args:
        work: what was leased.
        policy: the policy.
        open_image: how images are read.

    Returns:
        Tiles with pixels; images that cannot be read as failed results.
    """
    batch = MicroBatch([], [], [])
    for item in work:
        try:
            image = open_image(item.image)
            tile = item.tile or policy.root(item.image.image_id, (image.shape[0], image.shape[1]))
            expansion = Expansion(detect=True) if policy.uses_evidence else expand(tile, None, policy)
            cut = [cut_tile(image, each) for each in (tile, *expansion.children)]
        except TileError as error:
            batch.results.append(_unread(item, error))
            continue
        credit = child_credit(item.credit, expansion)
        batch.tiles.append(PackedTile(tile, credit))
        batch.tiles.extend(PackedTile(child, credit, settled=True) for child in expansion.children)
        batch.pixels.extend(cut)
    return batch


class ScaleStage:
    """Looks at the tiles of one micro-batch, decides with the frontier, and passes on what is to be detected.

    Args:
        frontier: the queue's actor.
        policy: the policy.
        networks: how its networks are made; only those that the policy needs are.
        retries: with a tile that hangs or kills its process.
        batch_size: tiles that a micro-batch has room for.
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

    @carries_seconds
    def __call__(self, table: pa.Table) -> pa.Table:
        """One packed row -> one packed row, always."""
        (batch,) = unpack(table)
        return pack(self.looked_at(batch))

    def looked_at(self, batch: MicroBatch) -> MicroBatch:
        """The tiles that are to be detected yet, and results of the others."""
        at = [i for i, packed in enumerate(batch.tiles) if not packed.settled]
        tiles, pixels = [batch.tiles[i].tile for i in at], [batch.pixels[i] for i in at]
        seen = self._look(tiles, pixels)
        completions = [
            Completion(tile.image_id, tile.path, self._decide(batch.tiles[i], one))
            for i, tile, one in zip(at, tiles, seen, strict=True)
        ]
        unread = [Completion(r.image_id, r.path, Decision(Expansion(detect=False), r.failure)) for r in batch.results]
        recorded: list[Decision] = ray.get(self._frontier.complete.remote([*completions, *unread]))
        decided = dict(zip(at, zip(seen, recorded[: len(at)], strict=True), strict=True))
        read_failures = [
            replace(result, credit=child_credit(result.credit, decision.expansion))
            for result, decision in zip(batch.results, recorded[len(at) :], strict=True)
        ]
        return self._apply(batch, decided, read_failures)

    def _look(self, tiles: list[Tile], pixels: list[np.ndarray]) -> list[ScaleResult]:
        def call(some: Sequence[int]) -> list[ScaleResult]:
            """Look at the tiles at these places."""
            return predict_scales(
                [pixels[at[i]] for i in some],
                [tiles[at[i]] for i in some],
                self._policy,
                detect=self._detect,
                predict_scale=self._predict_scale,
            )

        at = [i for i, tile in enumerate(tiles) if self._policy.needs_scales(tile)]
        ids = [(tiles[i].image_id, tiles[i].path) for i in at]
        self._metrics.called(len(at))
        looked = self._calls.together(ids, call, lambda _, error: ScaleResult(failure=error))
        seen = [ScaleResult()] * len(tiles)
        for i, one in zip(at, looked, strict=True):
            seen[i] = one
        return seen

    def _decide(self, packed: PackedTile, seen: ScaleResult) -> Decision:
        if seen.failure is not None:
            return Decision(Expansion(detect=False), Failure("look", seen.failure.reason))
        # A policy that needs no look was expanded where its tiles were cut: they are in this very row.
        if not self._policy.uses_evidence:
            return Decision(expand(packed.tile, None, self._policy)._replace(children=()))
        return Decision(expand(packed.tile, seen.scale_map, self._policy))

    def _apply(
        self, batch: MicroBatch, decided: dict[int, tuple[ScaleResult, Decision]], read_failures: list[TileResult]
    ) -> MicroBatch:
        """Emit what was recorded, which on a retry may not be what this look would have decided."""
        out = MicroBatch([], [], read_failures)
        for i, (packed, pixels) in enumerate(zip(batch.tiles, batch.pixels, strict=True)):
            if i not in decided:
                out.tiles.append(packed)
                out.pixels.append(pixels)
                continue
            seen, (expansion, failure) = decided[i]
            credit = child_credit(packed.credit, expansion)
            looked = self._predict_scale.input_pixels if seen.looked and self._predict_scale is not None else 0
            packed = PackedTile(packed.tile, credit, True, looked, (*expansion.guards, *seen.guards))
            result = _begun(packed, failure)
            if failure is not None or not expansion.detect:
                out.results.append(result)
            elif seen.detections is not None and self._detect is not None:
                found = [seen.detections]
                out.results.extend(
                    detect_tiles([result], [packed.tile], [pixels], found, self._detect, self._policy.merging)
                )
            else:
                out.tiles.append(packed)
                out.pixels.append(pixels)
        return out


class DetectStage:
    """Detects the tiles of some micro-batches, in batches that mix images and depths.

    Args:
        frontier: the queue's actor.
        policy: the policy.
        networks: how the detector is made.
        batch_size: tiles to a call of the detector.
        retries: with a tile that hangs or kills its process.
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

    @carries_seconds
    def __call__(self, table: pa.Table) -> pa.Table:
        """Packed rows -> one row of tile results.

        One row is one block, all or nothing. With a row a tile Ray Data makes a block of each, and replays them by
        position after a death; by then tiles of written images may be gone from the input, and others would be
        thrown away in their place.
        """
        return pack_results(self.detected(unpack(table)))

    def detected(self, batches: Iterable[MicroBatch]) -> list[TileResult]:
        """Results of all tiles, those that came as results first."""
        results: list[TileResult] = []
        tiles: list[PackedTile] = []
        pixels: list[np.ndarray] = []
        for batch in batches:
            results += batch.results
            tiles += batch.tiles
            pixels += batch.pixels
        for start in range(0, len(tiles), self._batch_size):
            stop = start + self._batch_size
            results += self._detected(tiles[start:stop], pixels[start:stop])
        return results

    def _detected(self, tiles: list[PackedTile], pixels: list[np.ndarray]) -> list[TileResult]:
        def call(some: Sequence[int]) -> list[TileResult]:
            """Detect the tiles at these places."""
            return detect_tiles(
                [_begun(tiles[i]) for i in some],
                [tiles[i].tile for i in some],
                [pixels[i] for i in some],
                [None] * len(some),
                self._detect,
                self._policy.merging,
            )

        ids = [(packed.tile.image_id, packed.tile.path) for packed in tiles]
        self._metrics.called(len(tiles))
        return self._calls.together(ids, call, lambda i, error: _begun(tiles[i], Failure("detect", error.reason)))


class ScaleAndDetectStage:
    """Both stages in one actor, where the detector itself looks, or nobody does.

    One detector serves both, all actors share the work of either kind, and no tile is passed on between them.

    Args:
        frontier: the queue's actor.
        policy: the policy.
        networks: how its networks are made; each is made once.
        batch_size: tiles that a micro-batch has room for, and tiles to a call of the detector.
        retries: with a tile that hangs or kills its process.
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
        self._look = ScaleStage(frontier, policy, networks, retries, batch_size)
        self._detect = DetectStage(frontier, policy, networks, batch_size, retries)

    @carries_seconds
    def __call__(self, table: pa.Table) -> pa.Table:
        """One packed row -> one row of tile results."""
        return pack_results(self._detect.detected(self._look.looked_at(batch) for batch in unpack(table)))


def _unread(item: Work, error: TileError) -> TileResult:
    image_id, path = item.id
    return TileResult(image_id, path, item.credit, failure=Failure("read", error.reason))


def _begun(packed: PackedTile, failure: Failure | None = None) -> TileResult:
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
