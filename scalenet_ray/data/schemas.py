"""Arrow schemas of tile results, detections and images, and conversion to and from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa

from scalenet_ray.core.detections import Detections, Failure, ImageResult, TileResult
from scalenet_ray.core.geometry import AreaRange, Tile, Window

TILE_RESULTS = pa.schema(
    [
        ("image_id", pa.int64()),
        ("path", pa.list_(pa.int32())),
        ("credit", pa.string()),
        ("failure_stage", pa.string()),
        ("failure_reason", pa.string()),
        ("look_pixels", pa.int64()),
        ("detector_pixels", pa.int64()),
        ("detector_passes", pa.float64()),
        ("view", pa.list_(pa.int32(), 6)),
        ("valid_area", pa.list_(pa.float64(), 2)),
        ("guards", pa.list_(pa.string())),
        ("image_hw", pa.list_(pa.int32())),
        ("boxes", pa.list_(pa.float32())),
        ("scores", pa.list_(pa.float32())),
        ("labels", pa.list_(pa.int64())),
        ("depth", pa.list_(pa.int64())),
        ("windows", pa.list_(pa.int64())),
        ("masks", pa.list_(pa.binary())),
    ]
)
"""One row per tile; boxes and windows are flattened to [4N], xyxy in image pixels; masks is null without masks.

view is the window (x0, y0, x1, y1) in image pixels and the tile's height and width; null if the detector did not run.
"""


DETECTIONS = pa.schema(
    [
        ("image_id", pa.int64()),
        ("policy", pa.string()),
        ("category_id", pa.int64()),
        ("score", pa.float32()),
        ("x0", pa.float32()),
        ("y0", pa.float32()),
        ("x1", pa.float32()),
        ("y1", pa.float32()),
        ("depth", pa.int32()),
        ("window_x0", pa.int32()),
        ("window_y0", pa.int32()),
        ("window_x1", pa.int32()),
        ("window_y1", pa.int32()),
        ("mask", pa.large_binary()),
    ]
)
"""One row per detection, by descending score within an image; xyxy in image pixels; mask: run lengths on the window."""


IMAGES = pa.schema(
    [
        ("image_id", pa.int64()),
        ("policy", pa.string()),
        ("file", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("tiles", pa.int32()),
        ("detector_passes", pa.float64()),
        ("detector_pixels", pa.int64()),
        ("scalenet_pixels", pa.int64()),
        ("zoom", pa.float64()),
        ("guards", pa.string()),
        ("failure_stage", pa.string()),
        ("failure_reason", pa.string()),
        ("finished_at", pa.float64()),
        (
            "whole_pass",
            pa.list_(
                pa.struct(
                    [("category_id", pa.int64()), ("score", pa.float32())]
                    + [(name, pa.float32()) for name in ("x0", "y0", "x1", "y1")]
                )
            ),
        ),
    ]
)
"""One row per image, written after its detections as the record that it is finished.

zoom is `ImageResult.zoom`; null in runs of older versions. guards is JSON, name -> count. finished_at is in seconds
since the run began. whole_pass is `ImageResult.whole_pass`; null without such a pass, and in runs of older versions.
"""

_CORNERS = ("x0", "y0", "x1", "y1")

_NUMBERS = {"boxes": 4, "scores": 1, "labels": 1, "depth": 1, "windows": 4}
"""Columns of `TILE_RESULTS` with numbers for each detection: name -> how many."""


def tile_results_table(results: Sequence[TileResult]) -> pa.Table:
    """Convert tile results to an Arrow table of schema `TILE_RESULTS`."""
    found, views = [result.detections for result in results], [result.view for result in results]
    columns = {
        "image_id": [result.image_id for result in results],
        "path": [list(result.path) for result in results],
        "credit": [str(result.credit) for result in results],
        "failure_stage": [result.failure.stage if result.failure else None for result in results],
        "failure_reason": [result.failure.reason if result.failure else None for result in results],
        "look_pixels": [result.look_pixels for result in results],
        "detector_pixels": [result.detector_pixels for result in results],
        "detector_passes": [result.detector_passes for result in results],
        "view": [tile and (*tile.window.xyxy, tile.height, tile.width) for tile in views],
        "valid_area": [tile and tile.valid_area for tile in views],
        "guards": [list(result.guards) for result in results],
        "image_hw": [result.image_hw for result in results],
        "masks": [None if detections.masks is None else list(detections.masks) for detections in found],
    }
    arrays = {name: pa.array(values, TILE_RESULTS.field(name).type) for name, values in columns.items()}
    offsets = np.concatenate([[0], np.cumsum([len(detections) for detections in found])]).astype(np.int32)
    for name, width in _NUMBERS.items():
        parts = [getattr(detections, name).ravel() for detections in found]
        values = pa.array(np.concatenate(parts) if parts else [], TILE_RESULTS.field(name).type.value_type)
        arrays[name] = pa.ListArray.from_arrays(pa.array(width * offsets), values)
    return pa.table([arrays[name] for name in TILE_RESULTS.names], schema=TILE_RESULTS)


def tile_results_from_table(table: pa.Table) -> list[TileResult]:
    """Inverse of `tile_results_table`."""
    table = table.combine_chunks()
    rest = table.drop_columns(list(_NUMBERS)).to_pylist()
    if not rest:
        return []
    lists = {name: table.column(name).chunk(0) for name in _NUMBERS}
    offsets = lists["scores"].offsets.to_numpy()
    numbers = {
        name: lists[name].values.to_numpy() if width == 1 else lists[name].values.to_numpy().reshape(-1, width)
        for name, width in _NUMBERS.items()
    }
    results = []
    for i, row in enumerate(rest):
        masks = row["masks"]
        found = {name: values[offsets[i] : offsets[i + 1]] for name, values in numbers.items()}
        detections = Detections.of_columns(**found, masks=None if masks is None else tuple(masks))
        failed = row["failure_stage"] is not None
        results.append(
            TileResult(
                row["image_id"],
                tuple(row["path"]),
                Fraction(row["credit"]),
                detections,
                Failure(row["failure_stage"], row["failure_reason"]) if failed else None,
                row["look_pixels"],
                row["detector_pixels"],
                row["detector_passes"],
                _view(row),
                tuple(row["guards"]),
                tuple(row["image_hw"]) if row["image_hw"] else None,
            )
        )
    return results


def _view(row: Mapping[str, Any]) -> Tile | None:
    """The tile of a row of schema `TILE_RESULTS`, if the detector ran on it."""
    if row["view"] is None:
        return None
    *window, height, width = row["view"]
    valid_area = AreaRange(*row["valid_area"])
    return Tile(row["image_id"], tuple(row["path"]), tuple(row["image_hw"]), Window(*window), height, width, valid_area)


def detections_table(results: Sequence[ImageResult], policy: str) -> pa.Table:
    """Convert the detections of finished images to an Arrow table of schema `DETECTIONS`."""
    counts = [len(result.detections) for result in results]
    found = Detections.concatenate([result.detections for result in results])
    masks = [mask for result in results for mask in result.detections.masks or [None] * len(result.detections)]
    columns = {
        "image_id": np.repeat(np.array([result.image_id for result in results], np.int64), counts),
        "policy": [policy] * len(found),
        "category_id": found.labels,
        "score": found.scores,
        **{name: found.boxes[:, i] for i, name in enumerate(_CORNERS)},
        "depth": found.depth.astype(np.int32),
        **{f"window_{name}": found.windows[:, i].astype(np.int32) for i, name in enumerate(_CORNERS)},
        "mask": masks,
    }
    return pa.table({name: pa.array(columns[name], DETECTIONS.field(name).type) for name in DETECTIONS.names})


def detections_from_rows(table: pa.Table) -> Detections:
    """Convert rows of schema `DETECTIONS` to the detections of one image."""
    masks = table.column("mask").to_pylist()
    return Detections(
        np.stack([table.column(name).to_numpy() for name in _CORNERS], axis=1),
        table.column("score").to_numpy(),
        table.column("category_id").to_numpy(),
        table.column("depth").to_numpy(),
        np.stack([table.column(f"window_{name}").to_numpy() for name in _CORNERS], axis=1),
        tuple(masks) if masks and all(mask is not None for mask in masks) else None,
    )


def images_table(
    results: Sequence[ImageResult], policy: str, files: Sequence[str], finished_at: Sequence[float | None]
) -> pa.Table:
    """Convert finished images to an Arrow table of schema `IMAGES`; `finished_at` is in seconds since the run began."""
    rows = [
        {
            "image_id": result.image_id,
            "policy": policy,
            "file": file,
            "height": result.image_hw[0] if result.image_hw else None,
            "width": result.image_hw[1] if result.image_hw else None,
            "tiles": result.tiles,
            "detector_passes": result.detector_passes,
            "detector_pixels": result.detector_pixels,
            "scalenet_pixels": result.look_pixels,
            "zoom": result.zoom,
            "guards": json.dumps(result.guards, sort_keys=True),
            "failure_stage": result.failure.stage if result.failure else None,
            "failure_reason": result.failure.reason if result.failure else None,
            "finished_at": at,
            "whole_pass": None if result.whole_pass is None else _box_structs(result.whole_pass),
        }
        for result, file, at in zip(results, files, finished_at, strict=True)
    ]
    return pa.Table.from_pylist(rows, IMAGES)


def _box_structs(found: Detections) -> list[dict[str, float]]:
    """Convert detections to a value of the column `whole_pass` of `IMAGES`."""
    rows = zip(found.labels.tolist(), found.scores.tolist(), *found.boxes.T.tolist(), strict=True)
    names = ("category_id", "score", *_CORNERS)
    return [dict(zip(names, row, strict=True)) for row in rows]


def detections_from_structs(boxes: Sequence[Mapping[str, float]]) -> Detections:
    """Convert a value of the column `whole_pass` of `IMAGES` to detections."""
    corners = [[box[name] for name in _CORNERS] for box in boxes]
    return Detections(
        np.array(corners, np.float32).reshape(-1, 4),
        np.array([box["score"] for box in boxes]),
        np.array([box["category_id"] for box in boxes]),
    )


def to_ipc(table: pa.Table) -> bytes:
    """Serialise a table to the bytes of an Arrow stream, to fit in one cell."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_ipc(data: bytes | pa.Buffer) -> pa.Table:
    """Inverse of `to_ipc`."""
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()
