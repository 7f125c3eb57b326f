"""How a scale head is trained: a frozen detector's feature maps of views, with maps of scale classes and of gains."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.scale import IGNORE, NUM_CLASSES, REFERENCE_AREA, UNIT_AREA
from scalenet_ray.core.windows import plan_windows
from scalenet_ray.data import storage
from scalenet_ray.data.coco import annotations_uri, read_annotations
from scalenet_ray.models.checked_detector import MappedDetector
from scalenet_ray.models.scale_head import HeadConfig, ScaleHead, save_scale_head
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.training.examples import Example, TrainingImages
from scalenet_ray.training.gain import ZOOMS, gain_map, gain_of_zoom
from scalenet_ray.training.losses import count_pixels, focal_loss, pixel_figures, poisson_loss
from scalenet_ray.training.recipe import Batch, Row
from scalenet_ray.training.scale_recipe import CLASS_WEIGHTS, View, class_map, random_view, whole_view

__all__ = [
    "HeadRecipe",
    "read_scores",
]

_RARE = 2.0


_JUDGED_WINDOWS = 2


def read_scores(folder: str) -> dict[int, np.ndarray]:
    """The scores of every image's objects, [N, len(ZOOMS)] each, that were measured into a folder of Parquet files."""
    scores: dict[int, np.ndarray] = {}
    for address in storage.list_files(folder, (".parquet",)):
        table = pq.read_table(pa.BufferReader(storage.read_bytes(address)), use_threads=False, pre_buffer=False)
        rows = zip(table.column("image_id").to_pylist(), table.column("scores").to_pylist(), strict=True)
        scores.update(
            (image_id, np.array(values, np.float32).reshape(len(values), len(ZOOMS))) for image_id, values in rows
        )
    return scores


@dataclass(frozen=True)
class HeadRecipe:
    """Trains a scale head (the preset head).

    Attributes:
        images: what is learned from.
        networks: names the frozen detector.
        scores: folder of what `read_scores` reads.
        config: the head's.
        zoom: the factor of the closer look whose gain is learned.
        window: W, the side of the windows that the head is judged by, as a share of the longer side.
        balance: how much more an object of a rare category counts: by the number of its kind to the power of minus
            this. AP is a mean over categories, so that the gain of a rare one moves it more.
        seed: an example's randomness depends on this, the epoch and its index alone.
    """

    images: TrainingImages
    networks: NetworkSpec
    scores: str
    config: HeadConfig
    zoom: float = 2.5
    window: float = 0.4
    balance: float = 0.5
    seed: int = 0

    best_by = "gain_captured"
    file_name = "scale_net.safetensors"
    learning_rate = 2e-3

    def sizes(self) -> tuple[int, int]:
        """How many images there are to train on, and to validate on."""
        learned, held_out = self.images.examples()
        return len(learned), len(held_out)

    def example(self, index: int, epoch: int) -> Row:
        """level0, level1 ...: [C, h, w] float16; target: [h, w] uint8; gain: [h, w] float32; image_id: [1]."""
        example = self.images.examples()[0][index]
        rng = np.random.default_rng([self.seed, epoch, index])
        return self._row(example, random_view(example, _opened(self).detector.input_side, rng))

    def validation_example(self, index: int) -> Row:
        """The whole image, as it is."""
        example = self.images.examples()[1][index]
        return self._row(example, whole_view(example, _opened(self).detector.input_side))

    def _row(self, example: Example, view: View) -> Row:
        opened = _opened(self)
        glimpse = opened.detector.with_features([view.pixels])[0]
        if isinstance(glimpse.detections, TileError):
            raise glimpse.detections
        if example.image_id not in opened.scores:
            msg = f"image {example.image_id}, {example.uri}: its objects' scores were not measured"
            raise TileError(msg)
        hw = glimpse.features[0].shape[1:]
        rows, columns = (-(-side // self.config.stride) for side in view.pixels.shape[:2])
        target, gain = np.full(hw, IGNORE, np.uint8), np.zeros(hw, np.float32)
        target[:rows, :columns] = class_map(example, view, (rows, columns))
        objects = example.objects
        weights = np.array([opened.weights.get(label, opened.rarest) for label in objects.labels.tolist()], np.float64)
        scores = opened.scores[example.image_id] * weights.reshape(-1, 1)
        values = gain_map(objects, scores, view.tile, (rows, columns), self.config.stride, self.zoom)
        gain[:rows, :columns] = values[:, ::-1] if view.mirrored else values
        return {
            "image_id": np.array([example.image_id]),
            **{f"level{i}": level.astype(np.float16) for i, level in enumerate(glimpse.features)},
            "target": target,
            "gain": gain,
        }

    def blank(self) -> Row:
        """No features, with every cell ignored."""
        detector = _opened(self).detector
        side = detector.canvas_hw((detector.input_side, detector.input_side))[0] // self.config.stride
        channels = self.config.feature_channels
        return {
            "image_id": np.array([-1]),
            **{f"level{i}": np.zeros((c, side >> i, side >> i), np.float16) for i, c in enumerate(channels)},
            "target": np.full((side, side), IGNORE, np.uint8),
            "gain": np.zeros((side, side), np.float32),
        }

    def build(self) -> nn.Module:
        """A fresh head."""
        return ScaleHead(self.config)

    def _answer(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return model([batch[f"level{i}"] for i in range(len(self.config.feature_channels))])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Focal for the classes, Poisson for the gain."""
        answer = self._answer(model, batch)
        counted = batch["target"] != IGNORE
        classes = focal_loss(answer[:, :NUM_CLASSES], batch["target"], class_weights=torch.tensor(CLASS_WEIGHTS))
        return classes + poisson_loss(answer[:, NUM_CLASSES], batch["gain"], counted)

    def count(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Sums over pixels, and how much of each image's gain lies in the windows that the head would choose."""
        answer = self._answer(model, batch)
        counts = count_pixels(answer[:, :NUM_CLASSES], batch["target"])
        captured = total = 0.0
        # A copy: on a CPU the array is the batch itself, and what is captured is taken away from it below.
        said, true = answer[:, NUM_CLASSES].exp().cpu().numpy(), batch["gain"].cpu().numpy().copy()
        counted = (batch["target"] != IGNORE).cpu().numpy()
        side = max(1, int(said.shape[-1] * self.window))
        for i in range(len(said)):
            for window in plan_windows(said[i] * counted[i], (side, side), limit=_JUDGED_WINDOWS):
                captured += true[i][window.cells].sum()
                true[i][window.cells] = 0.0
            total += true[i].sum()
        gains = {"captured": np.array(captured), "gain": np.array(captured + total)}
        return counts | gains | {"loss": np.array(self.loss(model, batch).item()), "batches": np.array(1.0)}

    def figures(self, counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """pixel_figures; the mean loss; "gain_captured": the share of all gain, in percent, in two windows an image."""
        captured = 100.0 * float(counts["captured"] / counts["gain"]) if counts["gain"] else float("nan")
        return pixel_figures(counts) | {"gain_captured": captured, "loss": float(counts["loss"] / counts["batches"])}

    def save(self, model: nn.Module, path: str) -> None:
        """A checkpoint that `load_predictor` reads."""
        save_scale_head(model, self.config, path)


@dataclass(frozen=True)
class _Opened:
    """What a recipe names: the detector, the scores, and what each category counts, and one without small objects."""

    detector: MappedDetector
    scores: dict[int, np.ndarray]
    weights: dict[int, float]
    rarest: float


@functools.lru_cache(maxsize=1)
def _opened(recipe: HeadRecipe) -> _Opened:
    images = recipe.images
    dataset = read_annotations(annotations_uri(images.data, images.split))
    scores = read_scores(recipe.scores)
    detector = recipe.networks.load_detector(dataset.categories, dataset.unused_categories)
    return _Opened(detector, scores, *_category_weights(recipe, scores))


def _category_weights(recipe: HeadRecipe, scores: Mapping[int, np.ndarray]) -> tuple[dict[int, float], float]:
    """What the gain of each category counts, 1 in the mean over all gain; and of one that has no small objects."""
    numbers: Counter[int] = Counter()
    gains: defaultdict[int, float] = defaultdict(float)
    for example in recipe.images.examples()[0]:
        objects = example.objects
        if example.hw is None or example.image_id not in scores or not len(objects.boxes):
            continue
        small = ~objects.crowd & (objects.areas * REFERENCE_AREA / (example.hw[0] * example.hw[1]) < UNIT_AREA)
        gained = gain_of_zoom(scores[example.image_id], 1.0, recipe.zoom)
        for label, gain in zip(objects.labels[small].tolist(), gained[small].tolist(), strict=True):
            numbers[label] += 1
            gains[label] += gain
    raw = {label: (number + _RARE) ** -recipe.balance for label, number in numbers.items()}
    weighted = sum(raw[label] * gain for label, gain in gains.items())
    factor = sum(gains.values()) / weighted if weighted else 1.0
    return {label: weight * factor for label, weight in raw.items()}, _RARE**-recipe.balance * factor
