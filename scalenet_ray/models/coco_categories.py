"""The 80 categories of COCO's detection task."""

from __future__ import annotations

__all__ = ["COCO_CATEGORIES", "COCO_NUM_CLASSES"]

COCO_NUM_CLASSES = 91
"""Number of outputs of a network whose class index is the category id: 0 is background, ids in gaps are unused."""

_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, "
    "laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, "
    "scissors, teddy bear, hair drier, toothbrush"
)

COCO_CATEGORIES: dict[int, str] = dict(
    zip((id_ for id_ in range(1, COCO_NUM_CLASSES) if id_ not in _UNUSED_IDS), _NAMES.split(", "), strict=True)
)
