"""Classification accuracy by image size, with and without rescaling, and the plots of a Scale Net's predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.ticker import FuncFormatter
from torch import nn

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.networks import ScalePredictor
from scalenet_ray.core.scale import ScaleMap
from scalenet_ray.experiments.config import CanvasRecipe, Domain
from scalenet_ray.experiments.data import Pictures, Resampling, centred, resized
from scalenet_ray.experiments.rescale import rescale_canvases
from scalenet_ray.experiments.train import as_input
from scalenet_ray.report.charts import ACCENT, MUTED, drawing, quiet, to_svg

_CHUNK = 500
"""Images that are scored at a time."""

_MIN_SCALE = np.float32(1e-6)
"""Scale of an object's pixel where the network predicts 0, which would mean background."""


class Score(NamedTuple):
    """Result on one test set: accuracy in percent, and of a recursion its mean steps.

    Attributes:
        capped: share of images that ended at the maximum depth, in percent.
        once: accuracy after the first step alone, in percent; None without a recursion.
    """

    accuracy: float
    steps: float = 0.0
    capped: float = 0.0
    once: float | None = None


class ObjectScales:
    """Scale predictor restricted to the object: black pixels are background and get scale 0.

    Pixels of the object where the network predicts 0 count in the mean, as in training. If it predicts 0 everywhere,
    the map is empty.
    """

    def __init__(self, predict: ScalePredictor) -> None:
        self._predict = predict
        self.input_pixels = predict.input_pixels

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        """Canvases, [h, w, 3] uint8 each -> scale maps, 0 at black pixels."""
        return [
            found
            if isinstance(found, TileError) or found.scale is None
            else ScaleMap(scale=_masked(found.scale, canvas.max(2) > 0))
            for found, canvas in zip(self._predict(pixels, tiles), pixels, strict=True)
        ]


def _masked(scale: np.ndarray, on_object: np.ndarray) -> np.ndarray:
    inside = np.where(on_object, scale, np.float32(0))
    return np.where(on_object, np.maximum(inside, _MIN_SCALE), inside) if inside.any() else inside


class TrueScales:
    """Oracle scale predictor for images of one size.

    `share` is the side of the object over the side of its first canvas, divided by the unit side.
    """

    input_pixels = 0

    def __init__(self, share: float) -> None:
        self._share = share

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        """Canvases, [h, w, 3] uint8 each -> scale maps, 0 at black pixels."""
        return [
            ScaleMap(scale=np.where(canvas.max(2) > 0, tile.height * self._share, 0.0).astype(np.float32))
            for canvas, tile in zip(pixels, tiles, strict=True)
        ]


def set_names(domain: Domain) -> list[str]:
    """Test sets of a domain: "validation" (the training sides on their canvas) and one per test side.

    Side 8 also without antialiasing ("8-bilinear-aliased", "8-nearest"), since the paper does not name its filter.
    """
    names = ["validation", *map(str, domain.test_sides)]
    return names + (["8-bilinear-aliased", "8-nearest"] if 8 in domain.test_sides else [])


def pictures_at(pictures: Pictures, name: str, domain: Domain) -> list[tuple[int, list[np.ndarray]]]:
    """Images of one of the domain's `set_names`, from images in their original size.

    Returns:
        (object side, images) for each side of the set: on a canvas for "validation", else unpadded.
    """
    if name == "validation":
        return [
            (side, [centred(resized(picture, side, "bilinear"), domain.canvas_side) for picture in pictures.pixels])
            for side in domain.train_sides
        ]
    side, _, method = name.partition("-")
    resampling: Resampling = method or "bilinear"  # type: ignore[assignment]
    return [(int(side), [resized(picture, int(side), resampling) for picture in pictures.pixels])]


def score_classifier(
    classifier: nn.Module, pictures: Pictures, name: str, domain: Domain, *, squeeze: bool = False
) -> Score:
    """Accuracy of a classifier on one of the domain's `set_names`, without rescaling.

    Images are resized to the canvas if `squeeze`, else cropped or padded.
    """
    correct = []
    for chunk in _chunks(pictures):
        for _, images in pictures_at(chunk, name, domain):
            canvases = [resized(image, domain.canvas_side, "bilinear") for image in images] if squeeze else images
            correct.append(_correct(classifier, canvases, chunk.labels, domain))
    return Score(_percent(correct))


def score_recursion(
    classifier: nn.Module,
    predict: ScalePredictor | None,
    recipe: CanvasRecipe,
    pictures: Pictures,
    name: str,
    domain: Domain,
) -> Score:
    """Accuracy of a classifier on one of the domain's `set_names`, rescaled by a recipe's recursion.

    `predict` is Scale Net, or None for the oracle.
    """
    correct: list[np.ndarray] = []
    correct_once: list[np.ndarray] = []
    steps: list[int] = []
    capped: list[bool] = []
    for chunk in _chunks(pictures):
        for side, images in pictures_at(chunk, name, domain):
            image_side = images[0].shape[0]
            scales = TrueScales(side / (image_side * domain.unit_side)) if predict is None else ObjectScales(predict)
            recursion = recipe.recursion(image_side, domain.canvas_side)
            rescaled = rescale_canvases(images, recursion, recipe.rules, scales)
            once = [
                resized(image, result.sides[:2][-1], recipe.rules.resampling)
                for image, result in zip(images, rescaled, strict=True)
            ]
            correct.append(_correct(classifier, [result.pixels for result in rescaled], chunk.labels, domain))
            correct_once.append(_correct(classifier, once, chunk.labels, domain))
            steps += [len(result.sides) - 1 for result in rescaled]
            capped += [result.capped for result in rescaled]
    return Score(_percent(correct), float(np.mean(steps)), 100.0 * float(np.mean(capped)), _percent(correct_once))


def _chunks(pictures: Pictures) -> Iterator[Pictures]:
    for start in range(0, len(pictures.labels), _CHUNK):
        yield pictures.part(slice(start, start + _CHUNK))


def _correct(classifier: nn.Module, images: Sequence[np.ndarray], labels: np.ndarray, domain: Domain) -> np.ndarray:
    """[N] bool, whether each image is classified correctly."""
    device = next(classifier.parameters()).device
    batch = np.stack([centred(image, domain.canvas_side) for image in images])
    # In float32: scores tie in bfloat16.
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        scores = classifier(as_input(batch, domain.in_channels).to(device))
    return scores.argmax(1).cpu().numpy() == labels


def _percent(correct: Sequence[np.ndarray]) -> float:
    return 100.0 * float(np.concatenate(correct).mean())


def response_plot(response: Mapping[str, Any]) -> str:
    """Plot scales "predicted" against "true", lists in `response`, both logarithmic; returns an SVG element."""
    with drawing(4.4, 3.6) as figure:
        axes = figure.subplots()
        ends = [min(response["true"]), max(response["true"])]
        axes.plot(ends, ends, color=MUTED, linewidth=0.8, linestyle="--", label="right")
        axes.plot(response["true"], response["predicted"], "o-", color=ACCENT, markersize=4, label="Scale Net")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("true scale (1: the unit side)")
        axes.set_ylabel("predicted scale, mean of the object's pixels")
        quiet(axes, "both")
        axes.legend(frameon=False)
        return to_svg(figure)


def steps_plot(steps: Mapping[str, Any]) -> str:
    """Plot the canvases of one recursion with the scale map below each (Figure 2); returns an SVG element.

    Args:
        steps: "canvases", [side, side] grey levels each, and "maps", [side, side] scales, for the leading canvases.
    """
    canvases = [np.array(canvas) for canvas in steps["canvases"]]
    maps = [np.array(scale) for scale in steps["maps"]]
    vmax = max(float(scale.max()) for scale in maps)
    limit = max(len(canvas) for canvas in canvases) / 2
    with drawing(1.8 * len(canvases) + 0.8, 3.8) as figure:
        rows = figure.subplots(2, len(canvases), squeeze=False)
        shown = None
        for i, canvas in enumerate(canvases):
            half = len(canvas) / 2
            extent = (-half, half, half, -half)
            above, below = rows[0, i], rows[1, i]
            above.imshow(canvas, cmap="gray", vmin=0, vmax=255, extent=extent)
            above.set_title(f"{len(canvas)} px")
            if i < len(maps):
                shown = below.imshow(maps[i], cmap="viridis", vmin=0, vmax=vmax, extent=extent)
                on_object = maps[i][maps[i] > 0]
                below.set_title(f"scale {on_object.mean():.2f}" if on_object.size else "no object")
            for axes in (above, below):
                axes.set_xlim(-limit, limit)
                axes.set_ylim(limit, -limit)
                axes.set_axis_off()
        if shown is not None:
            figure.colorbar(shown, ax=rows[1, :].tolist(), shrink=0.8)
        return to_svg(figure)
