"""Draws docs/images/look_first.png: one scene of the sample, what is seen, where is looked, what is found then.

Made again by `.venv/bin/python docs/draw_look_first.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from scalenet_ray.core.coco import objects_of, read_annotations
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.images import cut_tile, decode_image
from scalenet_ray.core.merge import iou_matrix
from scalenet_ray.core.policy import Policy, parse_policy
from scalenet_ray.core.recursion import expand, recursive_detect
from scalenet_ray.core.samples import ensure_sample
from scalenet_ray.core.scale import ScaleMap
from scalenet_ray.core.window import Tile
from scalenet_ray.models.networks import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkNames
from scalenet_ray.models.scale_net import ScaleNetPredictor

_SHOWN_SCORE = 0.4
_ZOOM = 1.5
_SCENES = 12
# Okabe and Ito's palette: apart for colour-blind readers too.
_SEEN, _NEW, _WINDOW = (86, 180, 233), (230, 159, 0), (255, 255, 255)


def _panel(image: np.ndarray) -> Image.Image:
    height, width = image.shape[:2]
    return Image.fromarray(image).resize((round(width * _ZOOM), round(height * _ZOOM)), Image.Resampling.BICUBIC)


def _draw(panel: Image.Image, boxes: np.ndarray, colour: tuple[int, int, int], width: int) -> None:
    draw = ImageDraw.Draw(panel)
    for box in boxes * _ZOOM:
        draw.rectangle(tuple(box.tolist()), outline=colour, width=width)


def _scale_panel(image: np.ndarray, scale_map: ScaleMap, windows: list[Tile]) -> Image.Image:
    """The photograph, darkened but where the map says class 1, with the windows."""
    assert scale_map.prob is not None
    panel = np.asarray(_panel(image), np.float32)
    hw = panel.shape[1::-1]
    small = np.asarray(Image.fromarray(scale_map.prob[1]).resize(hw, Image.Resampling.BILINEAR))[..., None]
    shown = Image.fromarray(np.clip(panel * 0.35 * (1 - small) + small * np.array(_NEW), 0, 255).astype(np.uint8))
    _draw(shown, np.array([tile.window.xyxy for tile in windows], float).reshape(-1, 4), _WINDOW, 4)
    return shown


def _confident(detections: Detections) -> Detections:
    return detections[detections.scores >= _SHOWN_SCORE]


def _truth_found(detections: Detections, boxes: np.ndarray) -> int:
    return int((iou_matrix(boxes, _confident(detections).boxes) > 0.5).any(axis=1).sum()) if len(detections) else 0


def main() -> None:
    """Draw, of the first scenes of the val split, the one in which the zoom finds most that was missed."""
    data = ensure_sample(Path("runs/sample"))
    dataset = read_annotations(data / "annotations" / "instances_val2017.json")
    names = NetworkNames(detector=SAMPLE_DETECTOR)
    info = names.describe_detector()
    detect, net = names.load_detector(dataset.categories), ScaleNetPredictor(SAMPLE_SCALE_NET)
    settings = {"input_side": info.input_side, "iou_threshold": info.iou_threshold}
    whole, zoomed = parse_policy("whole", **settings), parse_policy("scalenet", **settings)

    def run(image: np.ndarray, policy: Policy) -> Detections:
        return recursive_detect(image, 0, policy, detect=detect, predict_scale=net).detections

    gains = []
    for record in dataset.images[:_SCENES]:
        image = decode_image((data / "val2017" / record.file_name).read_bytes())
        boxes = objects_of(dataset, record.image_id).boxes
        before, after = run(image, whole), run(image, zoomed)
        gains.append((_truth_found(after, boxes) - _truth_found(before, boxes), record.image_id, image, before, after))
    gain, image_id, image, before, after = max(gains, key=lambda row: row[:2])

    tile = zoomed.root(image_id, image.shape[:2])
    scale_map = net([cut_tile(image, tile)], [tile])[0]
    assert isinstance(scale_map, ScaleMap)
    before, after = _confident(before), _confident(after)
    left, right = _panel(image), _panel(image)
    _draw(left, before.boxes, _SEEN, 3)
    new = iou_matrix(after.boxes, before.boxes).max(axis=1, initial=0.0) < 0.5
    _draw(right, after.boxes[~new], _SEEN, 3)
    _draw(right, after.boxes[new], _NEW, 3)
    panels = [left, _scale_panel(image, scale_map, list(expand(tile, scale_map, zoomed).children)), right]
    gap = 12
    sheet = Image.new("RGB", (sum(panel.width for panel in panels) + 2 * gap, left.height), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i * (left.width + gap), 0))
    path = Path(__file__).parent / "images" / "look_first.png"
    path.parent.mkdir(exist_ok=True)
    sheet.quantize(256).save(path, optimize=True)
    print(json.dumps({"image": image_id, "found before": len(before), "found after": len(after), "gain": gain}))


if __name__ == "__main__":
    main()
