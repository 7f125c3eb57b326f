"""Merging of tiles: edge filter, NMS, votes of the tiles, and independence of the order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from scalenet_ray.core.detections import Detections, TileResult
from scalenet_ray.core.geometry import AreaRange, Tile, Window, boxes_to_tile, iou_matrix
from scalenet_ray.core.merge import Merging, carry_to_image, merge_detections, nms, soft_nms
from tests.oracles import equal_detections, iou_of_boxes

MERGING = Merging(iou_threshold=0.65, score_threshold=0.01, edge_margin=2.0)
HARD = dataclasses.replace(MERGING, method="nms")
LINEAR = Merging(method="soft-nms-linear", iou_threshold=0.3, score_threshold=0.0)
GAUSSIAN = Merging(method="soft-nms-gaussian", sigma=0.5, score_threshold=0.0)


def _found(boxes: Any, scores: Any = None, labels: Any = None, **more: Any) -> Detections:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    count = len(boxes)
    return Detections(
        boxes, np.full(count, 0.9) if scores is None else scores, np.ones(count) if labels is None else labels, **more
    )


def _spans(*spans: tuple[float, float]) -> np.ndarray:
    """Boxes of height 1 whose overlaps are those of their spans along x."""
    return np.array([[x0, 0, x1, 1] for x0, x1 in spans], np.float32)


IMAGE_HW = (40, 40)
VIEWS = (
    Tile(5, (), IMAGE_HW, Window(0, 0, 40, 40), 40, 40),
    Tile(5, (0,), IMAGE_HW, Window(0, 0, 20, 20), 60, 60, valid_area=AreaRange(0.0, 80.0)),
    Tile(5, (1,), IMAGE_HW, Window(3, 0, 33, 30), 60, 60),
)
"""The whole image, a part enlarged threefold for boxes up to 80 pixels, and a part enlarged twofold."""


def _merged(found: Detections, merging: Merging) -> Detections:
    """The detections of one tile, merged."""
    return merge_detections([_result(found, VIEWS[0])], merging)


def _result(found: Detections, view: Tile) -> TileResult:
    return TileResult(view.image_id, view.path, Fraction(0), found, view=view)


@st.composite
def heaps(draw: st.DrawFn, most: int = 25) -> Detections:
    """Boxes that overlap a lot, with ties in scores and places, some of them empty."""
    count = draw(st.integers(0, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    corners = rng.integers(0, 12, (count, 2))
    boxes = np.hstack([corners, corners + rng.integers(0, 9, (count, 2))])
    windows = np.array([[0, 0, 22, 22], [0, 0, 30, 30]])[rng.integers(0, 2, count)]
    return _found(boxes, rng.integers(0, 6, count) / 5, rng.integers(1, 4, count), windows=windows)


# --- overlap ----------------------------------------------------------------------------------------


@given(heaps(), st.sampled_from([MERGING, HARD, LINEAR]), st.integers(1, 9))
def test_max_detections_keeps_the_best(found: Detections, merging: Merging, most: int) -> None:
    everything = _merged(found, merging)
    kept = _merged(found, dataclasses.replace(merging, max_detections=most))
    assert equal_detections(kept, everything[np.arange(min(most, len(everything)))])


@given(heaps(), heaps())
def test_iou_equals_the_formula_written_out(one: Detections, other: Detections) -> None:
    matrix = iou_matrix(one.boxes, other.boxes)
    assert matrix.shape == (len(one), len(other))
    for i, a in enumerate(one.boxes.tolist()):
        for j, b in enumerate(other.boxes.tolist()):
            assert matrix[i, j] == pytest.approx(iou_of_boxes(a, b))


def test_empty_and_inverted_boxes_overlap_nothing() -> None:
    boxes = np.array([[2, 2, 2, 2], [5, 5, 3, 3], [0, 0, 9, 9]], np.float32)
    assert iou_matrix(boxes, boxes).tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]


# --- hard NMS ---------------------------------------------------------------------------------------


def _brute_nms(found: Detections, threshold: float) -> list[int]:
    """The definition: the best first, each kept unless one kept before it overlaps it by more."""
    kept: list[int] = []
    for i in sorted(range(len(found)), key=lambda i: (-found.scores[i], i)):
        rivals = [j for j in kept if found.labels[j] == found.labels[i]]
        if all(iou_of_boxes(found.boxes[i].tolist(), found.boxes[j].tolist()) <= threshold for j in rivals):
            kept.append(i)
    return kept


@given(heaps(), st.sampled_from([0.0, 0.35, 0.65, 1.0]))
def test_nms_equals_its_definition(found: Detections, threshold: float) -> None:
    kept = nms(found.boxes, found.scores, found.labels, threshold)
    assert kept.dtype == np.int64
    assert kept.tolist() == _brute_nms(found, threshold)


# --- soft-NMS ---------------------------------------------------------------------------------------


def _brute_soft_nms(found: Detections, merging: Merging) -> np.ndarray:
    """Bodla et al., Figure 2: take the best of what is left, decay the rest, and so on."""
    scores, left = found.scores.astype(np.float64), list(range(len(found)))
    while left:
        best = max(left, key=lambda i: (scores[i], -i))
        left.remove(best)
        for i in left:
            if found.labels[i] != found.labels[best]:
                continue
            overlap = iou_of_boxes(found.boxes[i].tolist(), found.boxes[best].tolist())
            if merging.method == "soft-nms-gaussian":
                scores[i] *= math.exp(-(overlap**2) / merging.sigma)
            elif overlap > merging.iou_threshold:
                scores[i] *= 1 - overlap
    return scores


@given(heaps(15), st.sampled_from([LINEAR, GAUSSIAN]), st.sampled_from([0.0, 0.05, 0.3]))
def test_soft_nms_equals_its_definition(found: Detections, merging: Merging, threshold: float) -> None:
    merging = dataclasses.replace(merging, score_threshold=threshold)
    got, wanted = soft_nms(found.boxes, found.scores, found.labels, merging), _brute_soft_nms(found, merging)
    assert got.dtype == np.float32
    # Nothing that ends under the threshold is decayed to the end: it will be dropped as it is.
    certain = np.abs(wanted - threshold) > 1e-6
    np.testing.assert_array_equal((got >= threshold)[certain], (wanted >= threshold)[certain])
    kept = (wanted >= threshold) & certain
    np.testing.assert_allclose(got[kept], wanted[kept], rtol=1e-5)


def test_a_score_of_just_the_threshold_is_decayed_like_any_other() -> None:
    # float32 holds .01 as .0099999998; it must not fall out of the race and be kept whole in the end.
    merging = Merging(method="soft-nms-linear", iou_threshold=0.3, score_threshold=0.01)
    found = _found(_spans((0, 10), (50, 60), (50, 60)), [0.9, 0.01, 0.01])
    assert _merged(found, merging).boxes.tolist() == [[0, 0, 10, 1], [50, 0, 60, 1]]


# --- merging ----------------------------------------------------------------------------------------


@given(heaps(), st.sampled_from([MERGING, HARD, LINEAR, GAUSSIAN]), st.randoms(use_true_random=False))
def test_no_order_of_tiles_or_of_rows_matters(found: Detections, merging: Merging, random: Any) -> None:
    parts = [found[np.arange(i, len(found), 3)] for i in range(3)]
    wanted = merge_detections([_result(part, view) for part, view in zip(parts, VIEWS, strict=True)], merging)
    shuffled = [part[np.array(random.sample(range(len(part)), len(part)), np.int64)] for part in parts]
    results = [_result(part, view) for part, view in zip(shuffled, VIEWS, strict=True)]
    random.shuffle(results)
    assert equal_detections(merge_detections(results, merging), wanted)
    assert (np.diff(wanted.scores) <= 0).all()


# --- votes of the tiles -----------------------------------------------------------------------------


def _written_out(parts: Sequence[Detections], merging: Merging) -> list[tuple[float, list[float]]]:
    """The definition of a consensus, box by box: (score, box) by descending score."""
    rows = [(float(s), i, box, int(label), tuple(window)) for i, part in enumerate(parts)
            for s, box, label, window in zip(part.scores, part.boxes.tolist(), part.labels, part.windows.tolist(),
                                             strict=True)]  # fmt: skip
    rows.sort(key=lambda row: (-row[0], row[3], row[2][::-1], row[4][::-1], row[1]))
    groups: list[list] = []
    for row in rows:
        rivals = (group for group in groups if group[0][3] == row[3])
        group = next((g for g in rivals if iou_of_boxes(g[0][2], row[2]) > merging.iou_threshold), None)
        groups.append([row]) if group is None else group.append(row)
    merged = []
    for group in groups:
        score, _, box, _, window = group[0]
        area = max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
        votes: dict[int, float] = {}
        pulls, sums = 0.0, np.zeros(4)
        for i, view in enumerate(VIEWS):
            clear = min(max(math.sqrt(area) * max(view.zoom_xy) / 64, 1e-6), 1.0)
            mine = next((row for row in group if row[1] == i), None)
            if mine is not None:
                pulls, sums = pulls + mine[0] * clear**2, sums + mine[0] * clear**2 * np.array(mine[2])
            x0, y0, x1, y1 = boxes_to_tile(np.array([box]), view)[0].tolist()
            m, (height, width) = merging.edge_margin, IMAGE_HW
            cut = (
                (view.window.x0 > 0 and x0 < m) or (view.window.x1 < width and x1 > view.width - m)
                or (view.window.y0 > 0 and y0 < m) or (view.window.y1 < height and y1 > view.height - m)
            )  # fmt: skip
            if mine is not None or (not cut and view.valid_area.low <= area < view.valid_area.high):
                votes[i] = clear
        scores = {i: next((row[0] for row in group if row[1] == i), 0.0) for i in votes}
        if len(votes) > 1:
            mean = sum(votes[i] * scores[i] for i in votes) / sum(votes.values())
            score = ((score + mean) / 2) ** (7 / 8)
        corners = np.clip(sums / pulls, [*window[:2]] * 2, [*window[2:]] * 2)
        merged.append((score, corners.tolist()))
    return sorted(merged, key=lambda row: -row[0])


@given(heaps())
def test_a_consensus_equals_its_definition(found: Detections) -> None:
    found = found[found.scores > 0]
    parts = [found[np.arange(i, len(found), 3)] for i in range(3)]
    merged = merge_detections([_result(part, view) for part, view in zip(parts, VIEWS, strict=True)], MERGING)
    wanted = _written_out(parts, MERGING)
    assert merged.scores.tolist() == pytest.approx([score for score, _ in wanted], rel=1e-5)
    distances = np.abs(merged.boxes[:, None] - np.array([box for _, box in wanted]).reshape(1, -1, 4)).max(axis=2)
    assert (distances.min(axis=0, initial=9) < 1e-3).all()
    assert (distances.min(axis=1, initial=9) < 1e-3).all()


def _votes(*spans_and_scores: tuple[Any, float | None], views: Sequence[Tile] = VIEWS) -> Detections:
    """A box in each tile, or none, merged: all are 8 pixels high."""
    results = [
        _result(_found([]) if score is None else _found([[span[0], 4, span[1], 12]], [score],
                windows=[view.window.xyxy]), view)
        for (span, score), view in zip(spans_and_scores, views, strict=False)
    ]  # fmt: skip
    return merge_detections(results, MERGING)


def test_tiles_that_agree_raise_a_score_and_one_that_finds_nothing_lowers_it() -> None:
    span = (5, 13)
    alone, agreed, doubted = (_votes((span, 0.5), (span, other)) for other in (None, 0.5, 0.1))
    clear, coarse = 8 * 3 / 64, 8 / 64
    assert agreed.scores.tolist() == pytest.approx([0.5 ** (7 / 8)])
    assert alone.scores.tolist() == pytest.approx([((0.5 + 0.5 * coarse / (clear + coarse)) / 2) ** (7 / 8)])
    assert alone.scores[0] < doubted.scores[0] < 0.5 < agreed.scores[0]


@given(heaps())
def test_what_one_tile_alone_shows_is_merged_as_by_nms(found: Detections) -> None:
    assert equal_detections(_merged(found, MERGING), _merged(found, HARD))
    elsewhere = _result(Detections.empty(), Tile(5, (3,), IMAGE_HW, Window(39, 39, 40, 40), 64, 64))
    merged = merge_detections([_result(found, VIEWS[0]), elsewhere], MERGING)
    assert equal_detections(merged, _merged(found, HARD))


def test_soft_nms_ranks_by_the_decayed_scores_and_drops_what_falls_under_the_threshold() -> None:
    merging = dataclasses.replace(LINEAR, score_threshold=0.1)
    merged = _merged(_found(_spans((0, 10), (0, 8), (4, 10)), [0.9, 0.8, 0.7]), merging)
    assert merged.scores.tolist() == pytest.approx([0.9, 0.28])
    assert merged.boxes[:, 0].tolist() == [0, 4]


@pytest.mark.parametrize("merging", [MERGING, HARD, LINEAR, GAUSSIAN])
@pytest.mark.parametrize("parts", [[], [Detections.empty()], [Detections.empty()] * 3])
def test_nothing_merged_is_nothing_of_four_columns(merging: Merging, parts: list) -> None:
    merged = merge_detections([_result(part, view) for part, view in zip(parts, VIEWS, strict=False)], merging)
    assert merged.boxes.shape == (0, 4)
    assert merged.windows.shape == (0, 4)
    assert merged.labels.dtype == np.int64


def test_masks_stay_with_their_boxes() -> None:
    found = _found(_spans((0, 10), (0, 9), (20, 30)), [0.5, 0.9, 0.7], masks=(b"a", b"b", b"c"))
    assert _merged(found, MERGING).masks == (b"b", b"c")


# --- carrying back ----------------------------------------------------------------------------------

TILE = Tile(5, (1,), (100, 100), Window(20, 40, 60, 60), 40, 80, valid_area=AreaRange(4.0, 100.0))
"""Two tile pixels for one of the image; every edge lies inside the image."""


def _carried(boxes: Any, tile: Tile = TILE, merging: Merging | None = None, **more: Any) -> Detections:
    return carry_to_image(_found(boxes, **more), tile, merging or MERGING)


def test_boxes_are_carried_with_their_depth_and_window() -> None:
    carried = _carried([[10, 10, 20, 14]], labels=[7])
    assert carried.boxes.tolist() == [[25, 45, 30, 47]]
    assert (carried.depth.tolist(), carried.labels.tolist()) == ([1], [7])
    assert carried.windows.tolist() == [[20, 40, 60, 60]]


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ((2, 10, 12, 20), True),
        ((1.9, 10, 12, 20), False),
        ((10, 2, 20, 12), True),
        ((10, 1.9, 20, 12), False),
        ((68, 10, 78, 20), True),
        ((68, 10, 78.1, 20), False),
        ((10, 28, 20, 38), True),
        ((10, 28, 20, 38.1), False),
        # A box that leaves the tile touches its edge.
        ((-8, 10, 4, 20), False),
        ((70, 10, 90, 20), False),
    ],
)
def test_a_box_nearer_to_a_cut_edge_than_the_margin_is_dropped(box: tuple[float, ...], kept: bool) -> None:
    assert len(_carried([box])) == kept
    is_inside = box[0] >= 0 and box[2] <= TILE.width
    assert len(_carried([box], merging=dataclasses.replace(MERGING, edge_margin=0.0))) == is_inside


def test_the_images_own_border_cuts_nothing() -> None:
    whole = Tile(5, (), (20, 40), Window(0, 0, 40, 20), 40, 80)
    boxes = [[0, 0, 12, 10], [70, 30, 80, 40], [-3, -3, 9, 9]]
    assert len(_carried(boxes, whole)) == 3
    corner = dataclasses.replace(whole, window=Window(20, 0, 40, 20), width=40)
    # Its left edge alone lies inside the image.
    assert _carried([[0, 0, 9, 9], [30, 0, 40, 9]], corner).boxes.tolist() == [[35, 0, 40, 4.5]]


def test_what_leaves_the_image_is_clipped_to_it() -> None:
    whole = Tile(5, (), (20, 40), Window(0, 0, 40, 20), 40, 80)
    # A detector's padded canvas is larger than the tile.
    assert _carried([[-4, -6, 20, 20], [70, 30, 96, 96]], whole).boxes.tolist() == [[0, 0, 10, 10], [35, 15, 40, 20]]


def test_a_box_with_nothing_inside_the_image_is_dropped() -> None:
    whole = Tile(5, (), (20, 40), Window(0, 0, 40, 20), 40, 80)
    nothing = [[84, 4, 96, 30], [4, 44, 30, 60], [-9, -9, -1, -1], [5, 5, 5, 9], [9, 5, 5, 9]]
    for merging in (MERGING, dataclasses.replace(MERGING, match_size=False)):
        assert len(_carried(nothing, whole, merging)) == 0


def test_a_box_of_another_size_than_the_window_was_cut_for_is_dropped() -> None:
    # Areas in image pixels: 2 * 1.9 = 3.8, 2 * 2 = 4, 10 * 9.9 = 99, 10 * 10 = 100; kept from 4 up to under 100.
    boxes = [[10, 10, 14, 13.8], [10, 10, 14, 14], [10, 10, 30, 29.8], [10, 10, 30, 30]]
    np.testing.assert_allclose(_carried(boxes).areas, [4, 99], rtol=1e-6)
    assert len(_carried(boxes, merging=dataclasses.replace(MERGING, match_size=False))) == 4


def test_the_size_is_that_of_the_part_inside_the_image() -> None:
    whole = Tile(5, (), (20, 40), Window(0, 0, 40, 20), 40, 80, valid_area=AreaRange(0.0, 30.0))
    # 10 x 10 image pixels, of which 5 x 5 are inside.
    assert _carried([[-10, -10, 10, 10]], whole).areas.tolist() == [25]


def test_unsure_boxes_are_dropped_before_they_are_merged() -> None:
    carried = _carried([[10, 10, 20, 20]] * 3, scores=[0.009, 0.01, 0.5])
    assert carried.scores.tolist() == pytest.approx([0.01, 0.5])


def test_masks_are_carried_to_the_window_and_only_those_of_what_is_kept() -> None:
    def mask(*box: int) -> bytes:
        pixels = np.zeros((TILE.height, TILE.width), np.uint8, order="F")
        pixels[box[1] : box[3], box[0] : box[2]] = 1
        return bytes(coco_mask.encode(pixels)["counts"])  # type: ignore[arg-type]

    boxes = [(0, 10, 10, 20), (10, 10, 20, 14)]
    carried = _carried(boxes, masks=tuple(mask(*box) for box in boxes))
    assert carried.masks is not None
    (counts,) = carried.masks
    pixels = coco_mask.decode({"size": [20, 40], "counts": counts})
    rows, columns = np.nonzero(pixels)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (5, 5, 10, 7)
    assert pixels.sum() == 10


def test_nothing_found_is_carried_as_nothing() -> None:
    assert _carried([]).boxes.shape == (0, 4)
    assert carry_to_image(dataclasses.replace(Detections.empty(), masks=()), TILE, MERGING).masks == ()
