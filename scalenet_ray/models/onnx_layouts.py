"""Layouts of the outputs of detectors in ONNX: how to recognise one, and how to read boxes out of it.

A layout is recognised on the outputs for a canvas of noise: by their number, shapes and types, and by whether the
boxes lie where the cells of their rows are. All boxes are xyxy in canvas pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from scalenet_ray.core.errors import UserError
from scalenet_ray.models.padding import STRIDE

HW = tuple[int, int]


class Found(NamedTuple):
    """Boxes of one tile: [N, 4] float32 xyxy in canvas pixels, [N] scores, [N] class indices."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


Decode = Callable[[Sequence[np.ndarray], HW, float], Found]
"""(outputs of one tile without the batch axis, (height, width) of the canvas, minimum score) -> boxes."""


@dataclass(frozen=True)
class Layout:
    """The outputs of a kind of network.

    Attributes:
        family: the networks that are exported so.
        shapes: the outputs, in words.
        outputs: positions of the outputs that `decode` takes, in its order.
        classes: number of classes; None if the outputs do not show it.
        on_cells: True if there is a row for each cell, so that boxes off their cells show a grid of another size.
        suppressed: True if the network's boxes need no NMS.
        iou_threshold: IoU threshold of NMS, of the tile's boxes unless `suppressed`, and between tiles.
        batched: False if the outputs have no batch axis.
        first_id: id of the first class, where a file lists the names.
        gives_ids: True if the network gives class ids, False if it gives their positions in ascending order.
        input_side: longer side of a whole image's tile, if the file does not say.
        least_side: side of the smallest canvas; None for that of the smallest on which the network was tried.
        bgr_bytes: True if it takes BGR in 0..255, False for RGB in 0..1.
    """

    family: str
    shapes: str
    outputs: tuple[int, ...]
    decode: Decode
    classes: int | None = None
    on_cells: bool = False
    suppressed: bool = False
    iou_threshold: float = 0.7
    batched: bool = True
    first_id: int = 0
    gives_ids: bool = False
    input_side: int = 640
    least_side: int | None = None
    bgr_bytes: bool = False


YOLOX = "YOLOX"
DECODED_YOLOX = "YOLOX with decoded boxes"

ANSWER_MAPS = 5
"""Maps of a level by `yolox_answer_maps`."""

_KNOWN = (
    "[batch, 4 + classes, cells] (YOLOv8, 11, 12), [batch, 3 x cells, 5 + classes] (YOLOv5, 7), "
    "[batch, cells, 5 + classes] (YOLOX, YOLOv6), [batch, boxes, 6] (end-to-end), [batch, queries, 4 + classes] with "
    "boxes in 0..1 (RT-DETR), logits and pred_boxes (RT-DETR, D-FINE), or boxes, labels and scores (torchvision, "
    "RT-DETR, D-FINE)"
)

_LEVELS = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32), (16, 32))
"""Strides of the levels of YOLO networks, the first those of YOLOX."""

_FOLLOWS = 0.25
"""Least slope of the boxes' centres over the cells' for boxes that are decoded. Of YOLO11n it is 0.68 on a canvas of
64 x 128, where boxes are as large as the canvas, and 0.99 on one of 640; of YOLOX's raw boxes it is within 0.02 of 0.
"""


def recognise(names: Sequence[str], outputs: Sequence[np.ndarray], canvas: HW) -> Layout:
    """Recognise a layout by the names of the outputs, and what they are for canvases (height, width) of noise.

    Raises:
        UserError: if the outputs are not of a known layout.
    """
    layout = None
    if len(outputs) == 1 and outputs[0].ndim == 3:
        layout = _of_rows(outputs[0], canvas)
    elif {"pred_boxes", "logits"} <= set(names):
        layout = _of_queries([names.index("logits"), names.index("pred_boxes")], outputs)
    elif len(outputs) == 3:
        layout = _of_boxes(names, outputs)
    if layout is None:
        got = ", ".join(f"{name} {list(output.shape)}" for name, output in zip(names, outputs, strict=True))
        what = "as of a classifier, " if [output.ndim for output in outputs] == [2] else ""
        msg = f"a detector's outputs must be {_KNOWN}, got {what}{got} for a canvas of {canvas[0]} x {canvas[1]}"
        raise UserError(f"{msg}: export a detector of one of these, or write a class around the file")
    return layout


def _of_rows(output: np.ndarray, canvas: HW) -> Layout | None:
    """Layouts with one output of three axes."""
    first = output[0].astype(np.float64)
    rows, columns = first.shape
    if rows > 4 and (cells := _cells(columns, canvas, 1)) is not None and _slope(first[:2].T, cells) > _FOLLOWS:
        return _on_cells("YOLOv8, 11 or 12", f"[batch, {rows}, cells]", _decode_columns, rows - 4)
    if columns == 6 and (first[:, 5] == np.round(first[:, 5])).all():
        return _of_best(first)
    if columns > 5 and (cells := _cells(rows, canvas, 3)) is not None and _slope(first[:, :2], cells) > _FOLLOWS:
        return _on_cells("YOLOv5 or 7", f"[batch, 3 x cells, {columns}]", _decode_rows, columns - 5)
    if columns > 5 and (cells := _cells(rows, canvas, 1)) is not None and _slope(first[:, :2], cells) > _FOLLOWS:
        family = "YOLOv6" if (first[:, 4] == 1).all() else DECODED_YOLOX
        return _on_cells(family, f"[batch, cells, {columns}]", _decode_rows, columns - 5)
    if columns > 5 and _cells(rows, canvas, 1, _LEVELS[:1]) is not None:
        yolox = _on_cells(YOLOX, f"[batch, cells, {columns}]", _decode_cells, columns - 5)
        return replace(yolox, iou_threshold=0.65, input_side=416, least_side=STRIDE, bgr_bytes=True)
    if columns > 4 and (first >= 0).all() and (first <= 1).all():
        shapes = f"[batch, queries, {columns}]: cxcywh in 0..1, scores"
        return Layout("RT-DETR", shapes, (0,), _decode_query_rows, classes=columns - 4, suppressed=True)
    return None


def _on_cells(family: str, shapes: str, decode: Decode, classes: int) -> Layout:
    return Layout(family, shapes, (0,), decode, classes=classes, on_cells=True)


def _of_best(rows: np.ndarray) -> Layout:
    """Layouts with the best boxes alone, of which those of RT-DETR are shares of the canvas."""
    # Without any box all rows are 0, which no query is.
    if rows[:, :4].any() and rows[:, :4].max() <= 1:
        shapes = "[batch, queries, 6]: cxcywh in 0..1, score, class"
        return Layout("RT-DETR", shapes, (0,), _decode_best_shares, suppressed=True)
    shapes = "[batch, boxes, 6]: xyxy, score, class"
    return Layout("end-to-end YOLO (10, 26, or with NMS)", shapes, (0,), _decode_best, suppressed=True)


def _of_queries(positions: Sequence[int], outputs: Sequence[np.ndarray]) -> Layout | None:
    """Layouts with logits [B, Q, C] and pred_boxes [B, Q, 4]."""
    logits, boxes = (outputs[i] for i in positions)
    if logits.ndim != 3 or boxes.shape != (*logits.shape[:2], 4) or boxes.min() < 0 or boxes.max() > 1:
        return None
    shapes = f"logits [batch, queries, {logits.shape[2]}] and pred_boxes, cxcywh in 0..1"
    return Layout(
        "RT-DETR or D-FINE", shapes, tuple(positions), _decode_queries, classes=logits.shape[2], suppressed=True
    )


def _of_boxes(names: Sequence[str], outputs: Sequence[np.ndarray]) -> Layout | None:
    """Layouts with boxes, labels and scores, by name or else by type."""
    if set(names) == {"boxes", "labels", "scores"}:
        positions = [names.index(name) for name in ("boxes", "scores", "labels")]
    else:
        kinds = [
            "labels" if output.dtype.kind in "iu" else "boxes" if output.shape[-1:] == (4,) else "scores"
            for output in outputs
        ]
        if len(set(kinds)) != 3:
            return None
        positions = [kinds.index(kind) for kind in ("boxes", "scores", "labels")]
    boxes, scores, labels = (outputs[i] for i in positions)
    if boxes.shape != (*scores.shape, 4) or labels.shape != scores.shape:
        return None
    if boxes.ndim == 2:
        shapes = "boxes [boxes, 4], labels, scores"
        found = Layout("torchvision", shapes, tuple(positions), _decode_boxes, suppressed=True, batched=False)
        return replace(found, iou_threshold=0.5, first_id=1, gives_ids=True, input_side=800)
    if boxes.ndim == 3:
        shapes = "labels, boxes [batch, queries, 4], scores"
        return Layout("RT-DETR or D-FINE", shapes, tuple(positions), _decode_boxes, suppressed=True)
    return None


def _cells(count: int, canvas: HW, anchors: int, levels_of: Sequence[tuple[int, ...]] = _LEVELS) -> np.ndarray | None:
    """Centres of the cells of a canvas, [count, 2] xy in canvas pixels; None if no levels have so many rows."""
    for strides in levels_of:
        cells, sides = _grid(canvas, strides, anchors)
        if len(cells) == count:
            return (cells + 0.5) * sides
    return None


@functools.lru_cache(maxsize=16)
def _grid(canvas: HW, strides: tuple[int, ...], anchors: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Cells (x, y) [rows, 2] and strides [rows, 1] of a canvas's rows, float32."""
    cells, sides = [], []
    for stride in strides:
        y, x = np.mgrid[: -(-canvas[0] // stride), : -(-canvas[1] // stride)]
        cells += [np.stack([x.ravel(), y.ravel()], axis=1)] * anchors
        sides += [np.full((x.size, 1), stride)] * anchors
    return np.concatenate(cells).astype(np.float32), np.concatenate(sides).astype(np.float32)


def _slope(centres: np.ndarray, cells: np.ndarray) -> float:
    """Slope of the boxes' centres over the cells' centres, [N, 2] each; least squares over both axes."""
    cells = cells - cells.mean(axis=0)
    return float((centres * cells).sum() / (cells**2).sum())


# --- outputs of one tile, without the batch axis ------------------------------------------------------


def _corners(boxes: np.ndarray) -> np.ndarray:
    """[N, 4] cxcywh -> xyxy."""
    halves = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - halves, boxes[:, :2] + halves], axis=1)


def _from_shares(boxes: np.ndarray, canvas: HW) -> np.ndarray:
    """[N, 4] cxcywh as shares of the canvas -> xyxy."""
    height, width = canvas
    return _corners(boxes) * np.array([width, height, width, height], np.float32)


def _decode_columns(outputs: Sequence[np.ndarray], canvas: HW, threshold: float) -> Found:
    """[4 + C, N]: cxcywh, class scores; the best class of each column."""
    (columns,) = outputs
    scores = columns[4:].max(axis=0)
    kept = np.flatnonzero(scores >= threshold)
    chosen = columns[:, kept]
    return Found(_corners(chosen[:4].T), scores[kept], chosen[4:].argmax(axis=0))


def _decode_rows(outputs: Sequence[np.ndarray], canvas: HW, threshold: float) -> Found:
    """[N, 5 + C]: cxcywh, objectness, class scores; the best class of each row."""
    (rows,) = outputs
    kept, scores, classes = _best_rows(rows, threshold)
    return Found(_corners(rows[kept, :4]), scores, classes)


def _decode_cells(outputs: Sequence[np.ndarray], canvas: HW, threshold: float) -> Found:
    """[N, 5 + C]: centre in its cell, logarithms of width and height in cells, objectness, class scores."""
    (rows,) = outputs
    cells, strides = _grid(canvas, _LEVELS[0])
    kept, scores, classes = _best_rows(rows, threshold)
    with np.errstate(over="ignore"):
        boxes = np.concatenate([rows[kept, :2] + cells[kept], np.exp(rows[kept, 2:4])], axis=1) * strides[kept]
    return Found(_corners(boxes), scores, classes)


def _best_rows(rows: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[N, 5 + C]: box, objectness, class scores -> indices, scores and best classes of the rows over the threshold."""
    # Class scores are at most 1: rows with a low objectness can't reach the threshold.
    likely = np.flatnonzero(rows[:, 4] >= threshold)
    rows = rows[likely]
    classes = rows[:, 5:].argmax(axis=1)
    scores = rows[:, 4] * rows[np.arange(len(rows)), 5 + classes]
    kept = scores >= threshold
    return likely[kept], scores[kept], classes[kept]


def yolox_answer_maps(rows: np.ndarray, canvas: HW) -> list[np.ndarray]:
    """Output of YOLOX for a tile, [N, 5 + C] as `_decode_cells` takes it, as maps of its levels for a scale head.

    Returns:
        [`ANSWER_MAPS`, h, w] float32 each, finest first: logits of the objectness, of the best class and of their
        product, and the logarithms of width and height in cells.
    """
    found, best = rows[:, 4], rows[:, 5:].max(axis=1)
    chances = np.clip(np.stack([found, best, found * best]), 1e-4, 1 - 1e-4)
    maps = np.concatenate([np.log(chances / (1 - chances)), rows[:, 2:4].T])
    sides = [(canvas[0] // stride, canvas[1] // stride) for stride in _LEVELS[0]]
    ends = np.cumsum([h * w for h, w in sides])[:-1]
    return [level.reshape(ANSWER_MAPS, *hw) for level, hw in zip(np.split(maps, ends, axis=1), sides, strict=True)]


def _decode_best(outputs: Sequence[np.ndarray], canvas: HW, threshold: float) -> Found:
    """[N, 6]: xyxy, score, class."""
    (rows,) = outputs
    rows = rows[rows[:, 4] >= threshold]
    return Found(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64))


def _decode_best_shares(outputs: Sequence[np.ndarray], canvas: HW, threshold: float) -> Found:
    """[Q, 6]: cxcywh as shares of the canvas, score, class."""
    shares, scores, classes = _decode_best(outputs, canvas, threshold)
    return Found(_from_shares(shares, canvas), scores, classes)


def _decode_query_rows(outputs: Sequence[np.ndarray], canvas: HW, threshold: float) -> Found:
    """[Q, 4 + C]: cxcywh as shares of the canvas, class scores."""
    (rows,) = outputs
    return _best_pairs(rows[:, :4], rows[:, 4:], canvas, threshold)


def _decode_queries(outputs: Sequence[np.ndarray], canvas: HW, threshold: float) -> Found:
    """Logits [Q, C] and boxes [Q, 4], cxcywh as shares of the canvas."""
    logits, boxes = outputs
    with np.errstate(over="ignore"):
        scores = 1 / (1 + np.exp(-logits))
    return _best_pairs(boxes, scores, canvas, threshold)


def _best_pairs(shares: np.ndarray, scores: np.ndarray, canvas: HW, threshold: float) -> Found:
    """The best pairs of a query and a class, at most as many as queries; a query may have several classes."""
    queries, classes = np.nonzero(scores >= threshold)
    values = scores[queries, classes]
    best = np.argsort(-values, kind="stable")[: len(scores)]
    return Found(_from_shares(shares[queries[best]], canvas), values[best], classes[best])


def _decode_boxes(outputs: Sequence[np.ndarray], canvas: HW, threshold: float) -> Found:
    """Boxes [N, 4] xyxy, scores [N] and labels [N]."""
    boxes, scores, labels = outputs
    kept = scores >= threshold
    return Found(boxes[kept], scores[kept], labels[kept].astype(np.int64))
