"""Rectangles of an image with a zoom and an expected gain: their cost, joining, and splitting into tiles.

Rectangles are rows of a float64 array [N, 6]: x0, y0, x1, y1 in image pixels, zoom, gain. Tiles lie on canvases whose
sides are multiples of the detector's stride.
"""

from __future__ import annotations

import math

import numpy as np

STRIDE = 32
"""Sides of a canvas are multiples of this: the coarsest stride of the networks in tile pixels."""

_ZOOM_BINS = 2
"""Bins of zoom to a factor of two: rectangles are joined within a bin first."""

_EXACT = 160
"""Up to so many rectangles the best pair of all is joined, one after the other."""


def costs(rows: np.ndarray) -> np.ndarray:
    """[N] float64 detector pixels of the rectangles' canvases."""
    # 1e-6: a side of four strides must not become five by a rounding error.
    width = np.ceil((rows[:, 2] - rows[:, 0]) * rows[:, 4] / STRIDE - 1e-6)
    height = np.ceil((rows[:, 3] - rows[:, 1]) * rows[:, 4] / STRIDE - 1e-6)
    return width * height * STRIDE**2


def _union(rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Unions of the groups of sorted rows that begin at `starts`: bounding box, largest zoom, sum of gains."""
    return np.column_stack(
        [
            np.minimum.reduceat(rows[:, :2], starts),
            np.maximum.reduceat(rows[:, 2:5], starts),
            np.add.reduceat(rows[:, 5], starts),
        ]
    )


def joined(rows: np.ndarray, frame: tuple[int, int, int, int], least_side: float) -> np.ndarray:
    """Join rectangles wherever the joint one costs no more: on grids of growing cells, then pair by pair.

    Args:
        rows: the rectangles.
        frame: what they lie in: x0, y0, x1, y1 in image pixels.
        least_side: least side of a rectangle, in tile pixels.
    """
    if not len(rows):
        return rows
    extent = max(frame[2] - frame[0], frame[3] - frame[1])
    cell = least_side / 2 / rows[:, 4].max()
    while len(rows) > 1 and cell < 2 * extent:
        for shift in (0.0, 0.5):
            rows = _joined_in_cells(rows, cell, shift, frame)
        cell *= 2.0
    return _joined_in_pairs(rows) if len(rows) <= _EXACT else rows


def _joined_in_cells(rows: np.ndarray, cell: float, shift: float, frame: tuple[int, int, int, int]) -> np.ndarray:
    """Rectangles of one zoom bin whose centres lie in one cell become one, where that costs no more."""
    centres = (rows[:, :2] + rows[:, 2:4]) / 2 - np.array(frame[:2], float)
    places = np.floor(centres / cell + shift).astype(np.int64)
    bins = np.floor(np.log2(rows[:, 4]) * _ZOOM_BINS).astype(np.int64)
    order = np.lexsort((rows[:, 1], rows[:, 0], places[:, 0], places[:, 1], bins))
    rows, keys = rows[order], np.column_stack([bins, places])[order]
    starts = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)])
    if len(starts) == len(rows):
        return rows
    unions = _union(rows, starts)
    cheaper = costs(unions) <= np.add.reduceat(costs(rows), starts)
    groups = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(rows)]))
    return np.concatenate([unions[cheaper], rows[~cheaper[groups]]])


def _joined_in_pairs(rows: np.ndarray) -> np.ndarray:
    """Rectangles of any zoom, the pair that saves most joined first."""
    rows = rows.copy()
    alive = np.ones(len(rows), bool)
    own = costs(rows)
    ratios = np.full((len(rows), len(rows)), np.inf)

    def compare(i: int) -> None:
        """Update the ratios of a rectangle with all others: cost of the joint one over that of the two."""
        others = np.flatnonzero(alive)
        others = others[others != i]
        if not len(others):
            return
        unions = np.column_stack(
            [np.minimum(rows[i, :2], rows[others, :2]), np.maximum(rows[i, 2:5], rows[others, 2:5])]
        )
        ratios[i, others] = ratios[others, i] = costs(unions) / (own[others] + own[i])

    for i in range(len(rows)):
        compare(i)
    while True:
        i, j = np.unravel_index(int(ratios.argmin()), ratios.shape)
        if not ratios[i, j] <= 1.0:
            return rows[alive]
        rows[i] = [
            *np.minimum(rows[i, :2], rows[j, :2]),
            *np.maximum(rows[i, 2:5], rows[j, 2:5]),
            rows[i, 5] + rows[j, 5],
        ]
        own[i] = costs(rows[i][None])[0]
        alive[j] = False
        ratios[j, :] = ratios[:, j] = np.inf
        ratios[i, :] = ratios[:, i] = np.inf
        compare(int(i))


def split_into_tiles(
    rows: np.ndarray, frame: tuple[int, int, int, int], overlap: int, canvas: int
) -> dict[tuple[int, int, int, int, int, int], float]:
    """Windows of whole pixels for rectangles, split where a tile would exceed the canvas, grown to fill theirs.

    Args:
        rows: the rectangles.
        frame: what they lie in: x0, y0, x1, y1 in image pixels.
        overlap: of the parts of one that is split, in tile pixels.
        canvas: longest side of a tile.

    Returns:
        (x0, y0, x1, y1, tile height, tile width) -> gain, in the order of the rectangles.
    """
    corners = np.concatenate([np.floor(rows[:, :2]), np.minimum(np.ceil(rows[:, 2:4]), frame[2:])], axis=1)
    sizes = corners[:, 2:] - corners[:, :2]
    too_large = (sizes > canvas / rows[:, 4:5] + 1).any(axis=1)
    parts = np.column_stack([corners, rows[:, 4:]])[~too_large]
    order = np.flatnonzero(~too_large)
    if too_large.any():
        split = [_split(corners[i], rows[i, 4], rows[i, 5], overlap, canvas) for i in np.flatnonzero(too_large)]
        parts = np.concatenate([parts, *split])
        order = np.concatenate([order, np.repeat(np.flatnonzero(too_large), [len(part) for part in split])])
    parts = parts[np.argsort(order, kind="stable")]
    left, right, width = _filled(parts[:, 0], parts[:, 2], parts[:, 4], frame[0], frame[2], canvas)
    top, bottom, height = _filled(parts[:, 1], parts[:, 3], parts[:, 4], frame[1], frame[3], canvas)
    columns = np.column_stack([left, top, right, bottom, height, width]).astype(np.int64).tolist()
    # Small ones grow to the same least side: equal ones are one.
    return {
        (x0, y0, x1, y1, tile_height, tile_width): gain
        for (x0, y0, x1, y1, tile_height, tile_width), gain in zip(columns, parts[:, 5].tolist(), strict=True)
    }


def _split(corners: np.ndarray, zoom: float, gain: float, overlap: int, canvas: int) -> np.ndarray:
    """Parts [N, 6] of a rectangle (x0, y0, x1, y1, zoom, gain) whose tiles fit the canvas."""
    x0, y0, x1, y1 = (int(corner) for corner in corners)
    columns, rows = (_splits(*ends, math.ceil(overlap / zoom), canvas / zoom) for ends in ((x0, x1), (y0, y1)))
    share = gain / (len(columns) * len(rows))
    return np.array([[left, top, right, bottom, zoom, share] for top, bottom in rows for left, right in columns])


def _filled(
    starts: np.ndarray, ends: np.ndarray, zooms: np.ndarray, low: int, high: int, canvas: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[start, end) grown within [low, high) to what each canvas holds, and the sides in tile pixels; [N] each."""
    sides = np.minimum(np.ceil(np.maximum(1, np.round((ends - starts) * zooms)) / STRIDE) * STRIDE, canvas)
    lengths = np.minimum(np.maximum(ends - starts, np.floor(sides / zooms)), high - low)
    starts = np.minimum(np.maximum(starts - (lengths - ends + starts) // 2, low), high - lengths)
    return starts, starts + lengths, np.minimum(sides, np.maximum(1, np.round(lengths * zooms)))


def _splits(start: int, end: int, overlap: int, longest: float) -> list[tuple[int, int]]:
    """Parts of [start, end) of equal length, each at most `longest` long, that overlap by `overlap`."""
    if end - start <= longest + 1:
        return [(start, end)]
    overlap = min(overlap, int(longest / 2))
    count = math.ceil((end - start - overlap) / (longest - overlap))
    length = math.ceil((end - start + (count - 1) * overlap) / count)
    return [
        (begin, begin + length) for begin in (start + (end - start - length) * i // (count - 1) for i in range(count))
    ]
