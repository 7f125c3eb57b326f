"""Arrow schemas: results survive the way through bytes."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalenet_ray.core.detections import Detections, Failure, ImageResult, TileResult
from scalenet_ray.core.geometry import AreaRange, Tile, Window
from scalenet_ray.data.schemas import (
    DETECTIONS,
    IMAGES,
    TILE_RESULTS,
    detections_from_rows,
    detections_from_structs,
    detections_table,
    from_ipc,
    images_table,
    tile_results_from_table,
    tile_results_table,
    to_ipc,
)

FLOATS = st.floats(-1e4, 1e4, width=32)


@st.composite
def detections(draw: st.DrawFn) -> Detections:
    count = draw(st.integers(0, 4))

    def rows(values: st.SearchStrategy, width: int = 1) -> list:
        return draw(st.lists(values, min_size=count * width, max_size=count * width))

    return Detections(
        np.array(rows(FLOATS, 4), np.float32).reshape(-1, 4),
        np.array(rows(st.floats(0, 1, width=32)), np.float32),
        np.array(rows(st.integers(1, 90)), np.int64),
        np.array(rows(st.integers(0, 9)), np.int64),
        np.array(rows(st.integers(0, 10_000), 4), np.int64).reshape(-1, 4),
        tuple(rows(st.binary(max_size=8))) if draw(st.booleans()) else None,
    )


failures = st.none() | st.builds(Failure, st.sampled_from(["read", "look", "detect"]), st.text(max_size=20))
sizes = st.none() | st.tuples(st.integers(1, 9999), st.integers(1, 9999))
image_ids = st.integers(-(2**63), 2**63 - 1)


@st.composite
def results_of_tiles(draw: st.DrawFn) -> TileResult:
    result = draw(_bare_results)
    if result.image_hw is None or not draw(st.booleans()):
        return result
    height, width = result.image_hw
    window = Window(width // 3, height // 3, width, height)
    hw = draw(st.tuples(st.integers(1, 999), st.integers(1, 999)))
    valid_area = AreaRange(draw(st.floats(0, 100)), draw(st.floats(100, math.inf)))
    return replace(result, view=Tile(result.image_id, result.path, result.image_hw, window, *hw, valid_area))


_bare_results = st.builds(
    TileResult,
    image_ids,
    st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple),
    st.fractions(min_value=0, max_value=1),
    detections(),
    failures,
    st.integers(0, 2**62),
    st.integers(0, 2**62),
    st.floats(0, 1e6),
    st.none(),
    st.lists(st.sampled_from(["max_depth", "no_change"]), max_size=3).map(tuple),
    sizes,
)


def same_detections(one: Detections, other: Detections) -> bool:
    arrays = ("boxes", "scores", "labels", "depth", "windows")
    same = (np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
    dtypes = (getattr(one, name).dtype == getattr(other, name).dtype for name in arrays)
    return all(same) and all(dtypes) and one.masks == other.masks


def same_result(one: TileResult, other: TileResult) -> bool:
    names = [field.name for field in fields(TileResult) if field.name != "detections"]
    values = all(getattr(one, name) == getattr(other, name) for name in names)
    return values and same_detections(one.detections, other.detections)


@given(st.lists(results_of_tiles(), max_size=4))
def test_tile_results_survive_the_way_through_bytes(results: list[TileResult]) -> None:
    table = tile_results_table(results)
    assert table.schema == TILE_RESULTS
    back = tile_results_from_table(from_ipc(to_ipc(table)))
    assert len(back) == len(results)
    assert all(same_result(one, other) for one, other in zip(results, back, strict=True))


def test_tile_results_are_read_from_slices_and_chunks() -> None:
    boxes = np.arange(12, dtype=np.float32).reshape(3, 4)
    results = [
        TileResult(i, (i,), Fraction(1, 3), Detections(boxes[:i], np.ones(i), np.full(i, 7))) for i in range(1, 4)
    ]
    table = pa.concat_tables([tile_results_table(results[:1]), tile_results_table(results[1:])])
    back = tile_results_from_table(table.slice(1, 2))
    assert [one.image_id for one in back] == [2, 3]
    assert all(same_result(one, other) for one, other in zip(results[1:], back, strict=True))


image_results = st.builds(
    ImageResult,
    image_ids,
    detections(),
    failures,
    st.integers(0, 1000),
    st.integers(0, 2**62),
    st.integers(0, 2**62),
    st.floats(0, 1e6),
    st.dictionaries(st.sampled_from(["max_depth", "max_windows"]), st.integers(1, 99)),
    sizes,
)


@given(st.lists(image_results, max_size=4, unique_by=lambda result: result.image_id))
def test_detections_of_images_survive_the_way_through_a_shard(results: list[ImageResult]) -> None:
    table = from_ipc(to_ipc(detections_table(results, "grid-2")))
    assert table.schema == DETECTIONS
    assert table.num_rows == sum(len(result.detections) for result in results)
    assert set(table.column("policy").to_pylist()) <= {"grid-2"}
    for result in results:
        mine = table.filter(pc.field("image_id") == result.image_id)
        back = detections_from_rows(mine)
        expected = result.detections
        if not len(expected):
            # A shard has no row that could say whether masks were looked for.
            expected = replace(expected, masks=None)
        assert same_detections(back, expected)


@given(st.lists(image_results, max_size=4))
def test_what_an_image_cost_and_why_it_failed_is_written(results: list[ImageResult]) -> None:
    table = images_table(
        results, "scalenet", [f"{i}.jpg" for i in range(len(results))], [0.5 * i for i in range(len(results))]
    )
    assert table.schema == IMAGES
    for i, (row, result) in enumerate(zip(table.to_pylist(), results, strict=True)):
        assert (row["file"], row["finished_at"]) == (f"{i}.jpg", 0.5 * i)
        assert json.loads(row["guards"]) == result.guards
        assert (row["height"], row["width"]) == (result.image_hw or (None, None))
        failure = (row["failure_stage"], row["failure_reason"])
        assert failure == (tuple(result.failure) if result.failure else (None, None))
        assert (row["tiles"], row["detector_pixels"]) == (result.tiles, result.detector_pixels)
        assert (row["scalenet_pixels"], row["detector_passes"]) == (result.look_pixels, result.detector_passes)


@pytest.mark.parametrize("alone", [None, Detections.empty(), Detections([[1, 2, 3, 4.5]], [0.5], [7])])
def test_what_the_whole_image_alone_gave_is_written_or_null(alone: Detections | None) -> None:
    result = ImageResult(1, Detections.empty(), None, 1, 0, 1, 1.0, {}, (4, 4), whole_pass=alone)
    (row,) = images_table([result], "whole", ["1.jpg"], [0.0]).to_pylist()
    if alone is None:
        assert row["whole_pass"] is None
    else:
        assert same_detections(detections_from_structs(row["whole_pass"]), alone)
