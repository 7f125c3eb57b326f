"""Ray Data stages: predict scales and decide; detect; or both in one.

Each stage unpacks a row, calls the core and packs the results. Errors caused by the data (`TileError`) are
caught: the tile is completed as failed and passed on with its credit. Any other error is a bug and ends the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from scalenet_ray.core.detections import Failure, TileResult
from scalenet_ray.core.expansion import Expansion, expand
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.inference import ScaleResult, detect_tiles, needs_detector_first, predict_scales
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.engine.frontier import Completion, Decision, child_credit
from scalenet_ray.engine.metrics import BatchMetrics
from scalenet_ray.engine.quarantine import GuardedCalls
from scalenet_ray.engine.readers import cut_together
from scalenet_ray.engine.rows import (
    PackedTile,
    TileRow,
    pack,
    pack_results,
    unpack,
    with_seconds_column,
)
from scalenet_ray.runs.resources import DEFAULT_ADVANCED, AdvancedResources


class ScaleStage:
    """Predicts scales of the tiles of a row, completes them in the frontier, and emits tiles to detect.

    Args:
        frontier: the queue's actor.
        policy: the policy.
        networks: factories of the networks; only those that the policy needs are created.
        batch_size: maximum number of tiles of a call of the networks.
        advanced: timeout and tries of tiles that hang or crash the process.
    """

    def __init__(
        self,
        frontier: Any,
        policy: Policy,
        networks: NetworkFactories,
        batch_size: int = 8,
        advanced: AdvancedResources = DEFAULT_ADVANCED,
    ) -> None:
        self._frontier = frontier
        self._policy = policy
        self._batch_size = batch_size
        self._metrics = BatchMetrics(policy.name, "look", batch_size)
        self._calls = GuardedCalls("look", frontier, advanced)
        needs_map = policy.needs_predictor
        self._predict_scale = networks.predict_scale() if needs_map and networks.predict_scale else None
        self._detect = networks.detect() if needs_detector_first(policy, self._predict_scale) else None

    @with_seconds_column
    def __call__(self, table: pa.Table) -> pa.Table:
        """Process one packed row; the output is one packed row, even if it is empty."""
        (batch,) = unpack(table)
        return pack(self.process(batch))

    def process(self, batch: TileRow) -> TileRow:
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
            self._metrics.called(len(batch))
            return predict_scales(
                [pixels[wanted[i]] for i in batch],
                [tiles[wanted[i]] for i in batch],
                self._policy,
                detect=self._detect,
                predict_scale=self._predict_scale,
            )

        wanted = [i for i, tile in enumerate(tiles) if self._policy.needs_scales(tile)]
        detect = self._detect
        if detect is not None:
            wanted.sort(key=lambda i: detect.canvas_hw(pixels[i].shape[:2]))
        ids = [(tiles[i].image_id, tiles[i].path) for i in wanted]
        predicted = self._calls.in_batches(ids, call, lambda _, error: ScaleResult(failure=error), self._batch_size)
        results = [ScaleResult()] * len(tiles)
        for i, result in zip(wanted, predicted, strict=True):
            results[i] = result
        return results

    def _propose(self, packed: PackedTile, scale: ScaleResult) -> Decision:
        """The decision to propose to the frontier."""
        if scale.failure is not None:
            return Decision(Expansion(detect=False), Failure("look", scale.failure.reason))
        if not self._policy.uses_evidence and cut_together(packed.tile, self._policy):
            return Decision(expand(packed.tile, None, self._policy)._replace(children=()))
        return Decision(expand(packed.tile, scale.evidence, self._policy))

    def _apply(
        self, batch: TileRow, decisions: dict[int, tuple[ScaleResult, Decision]], read_failures: list[TileResult]
    ) -> TileRow:
        """Emit tiles and results by the recorded decisions, which on a retry may differ from the proposed ones."""
        out = TileRow([], [], read_failures)
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
    """Detects the tiles of rows, in batches that mix images and depths.

    Args:
        frontier: the queue's actor.
        policy: the policy.
        networks: factories of the networks.
        batch_size: tiles per call of the detector.
        advanced: timeout and tries of tiles that hang or crash the process.
    """

    def __init__(
        self,
        frontier: Any,
        policy: Policy,
        networks: NetworkFactories,
        batch_size: int,
        advanced: AdvancedResources = DEFAULT_ADVANCED,
    ) -> None:
        self._policy = policy
        self._calls = GuardedCalls("detect", frontier, advanced)
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

    def process(self, batches: Iterable[TileRow]) -> list[TileResult]:
        """Detect all tiles; return the results that the batches already hold, then the new ones."""
        results: list[TileResult] = []
        tiles: list[PackedTile] = []
        pixels: list[np.ndarray] = []
        for batch in batches:
            results += batch.results
            tiles += batch.tiles
            pixels += batch.pixels
        return results + self._detect_tiles(tiles, pixels)

    def _detect_tiles(self, tiles: list[PackedTile], pixels: list[np.ndarray]) -> list[TileResult]:
        def call(batch: Sequence[int]) -> list[TileResult]:
            """Detect the tiles at these indices."""
            self._metrics.called(len(batch))
            return detect_tiles(
                [_result(tiles[i]) for i in batch],
                [tiles[i].tile for i in batch],
                [pixels[i] for i in batch],
                [None] * len(batch),
                self._detect,
                self._policy.merging,
            )

        # Tiles of one canvas are detected in one batch.
        order = sorted(range(len(tiles)), key=lambda i: self._detect.canvas_hw(pixels[i].shape[:2]))
        tiles, pixels = [tiles[i] for i in order], [pixels[i] for i in order]
        ids = [(packed.tile.image_id, packed.tile.path) for packed in tiles]
        return self._calls.in_batches(
            ids, call, lambda i, error: _result(tiles[i], Failure("detect", error.reason)), self._batch_size
        )


class ScaleAndDetectStage:
    """Both stages in one actor, so that no tile is sent between actors; both use the same detector.

    Its arguments are theirs; each network is made once.
    """

    def __init__(
        self,
        frontier: Any,
        policy: Policy,
        networks: NetworkFactories,
        batch_size: int,
        advanced: AdvancedResources = DEFAULT_ADVANCED,
    ) -> None:
        detector = networks.detect()
        networks = replace(networks, detect=lambda: detector)
        self._scale_stage = ScaleStage(frontier, policy, networks, batch_size, advanced)
        self._detect_stage = DetectStage(frontier, policy, networks, batch_size, advanced)

    @with_seconds_column
    def __call__(self, table: pa.Table) -> pa.Table:
        """Process packed rows; the output is one row of tile results."""
        return pack_results(self._detect_stage.process(self._scale_stage.process(batch) for batch in unpack(table)))


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
