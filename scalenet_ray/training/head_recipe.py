"""Training recipe of the scale head: a frozen detector's feature maps with scale class maps and gain maps."""

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
from scalenet_ray.models.checked_detector import MappedDetector
from scalenet_ray.models.scale_head import ScaleHead, save_scale_head
from scalenet_ray.models.scale_networks import HeadConfig
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

_SMOOTHING = 2.0
_EVALUATED_WINDOWS = 2


def read_scores(folder: str) -> dict[int, np.ndarray]:
    """Read measured object scores from a folder of Parquet files: image id -> [N, len(ZOOMS)] float32."""
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
    """Recipe of a scale head (preset head).

    Attributes:
        images: training and validation images.
        networks: specification of the frozen detector.
        scores: folder with the measured scores, see `read_scores`.
        config: configuration of the head.
        zoom: zoom factor whose gain is the target.
        window: W, the side of the windows for validation, as a share of the longer side.
        balance: exponent of the category weights: an object counts by its category's number of objects to the power
            of -balance, since AP is a mean over categories.
        seed: seed of the augmentation, which depends on it, the epoch and the index only.
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
        """Number of training and of validation images."""
        train, validation = self.images.examples()
        return len(train), len(validation)

    def example(self, index: int, epoch: int) -> Row:
        """Row with level0, level1, ... [C, h, w] float16, target [h, w] uint8, gain [h, w] float32, image_id [1]."""
        example = self.images.examples()[0][index]
        rng = np.random.default_rng([self.seed, epoch, index])
        return self._row(example, random_view(example, _load_sources(self).detector.input_side, rng))

    def validation_example(self, index: int) -> Row:
        """The whole image, without augmentation."""
        example = self.images.examples()[1][index]
        return self._row(example, whole_view(example, _load_sources(self).detector.input_side))

    def _row(self, example: Example, view: View) -> Row:
        sources = _load_sources(self)
        found = sources.detector.with_features([view.pixels])[0]
        if isinstance(found.detections, TileError):
            raise found.detections
        if example.image_id not in sources.scores:
            msg = f"image {example.image_id}, {example.uri}: its objects' scores were not measured"
            raise TileError(msg)
        hw = (self._side(), self._side())
        rows, columns = (-(-side // self.config.stride) for side in view.pixels.shape[:2])
        target, gain = np.full(hw, IGNORE, np.uint8), np.zeros(hw, np.float32)
        target[:rows, :columns] = class_map(example, view, (rows, columns))
        objects = example.objects
        weights = [sources.weights.get(label, sources.default_weight) for label in objects.labels.tolist()]
        scores = sources.scores[example.image_id] * np.array(weights, np.float64).reshape(-1, 1)
        values = gain_map(objects, scores, view.tile, (rows, columns), self.config.stride, self.zoom)
        gain[:rows, :columns] = values[:, ::-1] if view.mirrored else values
        return {
            "image_id": np.array([example.image_id]),
            # Zeros beside the canvas are what the head's own padding puts there.
            **{
                f"level{i}": _filled_up(level.astype(np.float16), (hw[0] >> i, hw[1] >> i))
                for i, level in enumerate(found.features)
            },
            "target": target,
            "gain": gain,
        }

    def _side(self) -> int:
        """Side of the square that holds the finest feature map of any image, in cells."""
        detector = _load_sources(self).detector
        return detector.canvas_hw((detector.input_side, detector.input_side))[0] // self.config.stride

    def blank(self) -> Row:
        """Zero features with every cell ignored."""
        side = self._side()
        channels = self.config.feature_channels
        return {
            "image_id": np.array([-1]),
            **{f"level{i}": np.zeros((c, side >> i, side >> i), np.float16) for i, c in enumerate(channels)},
            "target": np.full((side, side), IGNORE, np.uint8),
            "gain": np.zeros((side, side), np.float32),
        }

    def build(self) -> nn.Module:
        """The head with random weights."""
        return ScaleHead(self.config)

    def _output(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return model([batch[f"level{i}"] for i in range(len(self.config.feature_channels))])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Focal loss of the classes plus Poisson loss of the gain."""
        output = self._output(model, batch)
        counted = batch["target"] != IGNORE
        classes = focal_loss(output[:, :NUM_CLASSES], batch["target"], class_weights=torch.tensor(CLASS_WEIGHTS))
        return classes + poisson_loss(output[:, NUM_CLASSES], batch["gain"], counted)

    def count(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Pixel counts, and the gain inside the windows that the predicted gain chooses."""
        output = self._output(model, batch)
        counts = count_pixels(output[:, :NUM_CLASSES], batch["target"])
        captured = missed = 0.0
        # A copy: on a CPU the array shares memory with the batch and is changed below.
        predicted, true = output[:, NUM_CLASSES].exp().cpu().numpy(), batch["gain"].cpu().numpy().copy()
        counted = (batch["target"] != IGNORE).cpu().numpy()
        side = max(1, int(predicted.shape[-1] * self.window))
        for i in range(len(predicted)):
            for window in plan_windows(predicted[i] * counted[i], (side, side), limit=_EVALUATED_WINDOWS):
                captured += true[i][window.cells].sum()
                true[i][window.cells] = 0.0
            missed += true[i].sum()
        gains = {"captured": np.array(captured), "gain": np.array(captured + missed)}
        return counts | gains | {"loss": np.array(self.loss(model, batch).item()), "batches": np.array(1.0)}

    def figures(self, counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Metrics of `pixel_figures`, the mean loss, and "gain_captured": percentage of the gain in two windows."""
        captured = 100.0 * float(counts["captured"] / counts["gain"]) if counts["gain"] else float("nan")
        return pixel_figures(counts) | {"gain_captured": captured, "loss": float(counts["loss"] / counts["batches"])}

    def save(self, model: nn.Module, path: str) -> None:
        """Write a checkpoint that `load_predictor` reads."""
        save_scale_head(model, self.config, path)


def _filled_up(level: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """[C, h, w] -> [C, *hw] with zeros at the right and below."""
    return np.pad(level, ((0, 0), (0, hw[0] - level.shape[1]), (0, hw[1] - level.shape[2])))


@dataclass(frozen=True)
class _Sources:
    """Loaded detector, scores and category weights of a recipe; `default_weight` is for unseen categories."""

    detector: MappedDetector
    scores: dict[int, np.ndarray]
    weights: dict[int, float]
    default_weight: float


@functools.lru_cache(maxsize=1)
def _load_sources(recipe: HeadRecipe) -> _Sources:
    dataset = recipe.images.dataset()
    scores = read_scores(recipe.scores)
    detector = recipe.networks.load_detector(dataset.categories, dataset.unused_categories)
    return _Sources(detector, scores, *_category_weights(recipe, scores))


def _category_weights(recipe: HeadRecipe, scores: Mapping[int, np.ndarray]) -> tuple[dict[int, float], float]:
    """Weight of each category's gain, with a gain-weighted mean of 1, and of a category without small objects."""
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
    raw = {label: (number + _SMOOTHING) ** -recipe.balance for label, number in numbers.items()}
    weighted = sum(raw[label] * gain for label, gain in gains.items())
    factor = sum(gains.values()) / weighted if weighted else 1.0
    return {label: weight * factor for label, weight in raw.items()}, _SMOOTHING**-recipe.balance * factor
