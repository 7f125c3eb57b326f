"""How many pictures are told rightly at a side: by a classifier alone, and behind a recursion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.inference import ScalePredictor
from scalenet_ray.core.scale import ScaleMap
from scalenet_ray.experiments.config import CanvasRecipe, Domain
from scalenet_ray.experiments.data import Pictures, Resampling, centred, resized
from scalenet_ray.experiments.rescale import rescale_canvases
from scalenet_ray.experiments.train import as_input

__all__ = [
    "ObjectScales",
    "Score",
    "TrueScales",
    "pictures_at",
    "score_classifier",
    "score_recursion",
    "set_names",
]

_PICTURES = 500
"""Pictures that are worked through at a time."""


_LEAST_SCALE = np.float32(1e-6)
"""Of an object's pixel of which a net says nothing."""


class Score(NamedTuple):
    """What became of pictures at one side.

    Attributes:
        accuracy: the share that was told rightly, in percent.
        steps: how often a picture was rescaled, the mean.
        capped: the share that the limit of steps ended, in percent.
        once: the accuracy after the first step alone, in percent; None without a recursion.
    """

    accuracy: float
    steps: float = 0.0
    capped: float = 0.0
    once: float | None = None


class ObjectScales:
    """What a net says of the pixels of an object alone: black ones are background and have no scale.

    Where the net says 0 of an object's pixel, the pixel still counts, as the net was trained. Where it says 0 of all of
    them, it sees no object.

    Args:
        predict: the net.
    """

    def __init__(self, predict: ScalePredictor) -> None:
        self._predict = predict
        self.input_pixels = predict.input_pixels

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        """Canvases, [h, w, 3] uint8 each -> maps, 0 where they are black."""
        seen = self._predict(pixels, tiles)
        return [
            one
            if isinstance(one, TileError) or one.scale is None
            else ScaleMap(scale=_of_object(one.scale, canvas.max(2) > 0))
            for one, canvas in zip(seen, pixels, strict=True)
        ]


def _of_object(scale: np.ndarray, is_object: np.ndarray) -> np.ndarray:
    """[h, w] scales, 0 outside the object."""
    inside = np.where(is_object, scale, np.float32(0))
    return np.where(is_object, np.maximum(inside, _LEAST_SCALE), inside) if inside.any() else inside


class TrueScales:
    """What is known of pictures of one size: the oracle in a Scale Net's place.

    Args:
        share: of the side of its first canvas that a picture takes up, divided by the side whose scale is 1.
    """

    input_pixels = 0

    def __init__(self, share: float) -> None:
        self._share = share

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        """Canvases, [h, w, 3] uint8 each -> maps, 0 where they are black."""
        return [
            ScaleMap(scale=np.where(canvas.max(2) > 0, tile.height * self._share, 0.0).astype(np.float32))
            for canvas, tile in zip(pixels, tiles, strict=True)
        ]


def set_names(domain: Domain) -> list[str]:
    """The sets that are scored: "validation", the trained sides on their canvas, and each side that is met.

    8 pixels also without antialiasing ("8-bilinear-aliased", "8-nearest"): the paper does not say how it shrank.
    """
    names = ["validation", *map(str, domain.test_sides)]
    return names + (["8-bilinear-aliased", "8-nearest"] if 8 in domain.test_sides else [])


def pictures_at(pictures: Pictures, name: str, domain: Domain) -> list[tuple[int, list[np.ndarray]]]:
    """The pictures of a set.

    Args:
        pictures: as they are.
        name: see `set_names`.
        domain: of theirs.

    Returns:
        (side, pictures) for each side of the set: on a canvas for "validation", else as large as they are.
    """
    if name == "validation":
        return [
            (side, [centred(resized(one, side, "bilinear"), domain.canvas_side) for one in pictures.pixels])
            for side in domain.train_sides
        ]
    side, _, method = name.partition("-")
    resampling: Resampling = method or "bilinear"  # type: ignore[assignment]
    return [(int(side), [resized(one, int(side), resampling) for one in pictures.pixels])]


def score_classifier(
    classifier: nn.Module, pictures: Pictures, name: str, domain: Domain, *, squeeze: bool = False
) -> Score:
    """A classifier alone: what is larger than its canvas is cut to its middle, or squeezed.

    Args:
        classifier: of canvases.
        pictures: to test on.
        name: see `set_names`.
        domain: of theirs.
        squeeze: whether pictures of other sides are resized to the canvas; else they are cut or padded.
    """
    rights = []
    for part in _parts(pictures):
        for _, found in pictures_at(part, name, domain):
            canvases = [resized(one, domain.canvas_side, "bilinear") for one in found] if squeeze else found
            rights.append(_right(classifier, canvases, part.labels, domain))
    return Score(_percent(rights))


def score_recursion(
    classifier: nn.Module,
    predict: ScalePredictor | None,
    recipe: CanvasRecipe,
    pictures: Pictures,
    name: str,
    domain: Domain,
) -> Score:
    """A classifier of what a recursion settles on.

    Args:
        classifier: of canvases.
        predict: the Scale Net; None for the oracle.
        recipe: of the recursion.
        pictures: to test on.
        name: see `set_names`.
        domain: of theirs.
    """
    rights: list[np.ndarray] = []
    rights_once: list[np.ndarray] = []
    steps: list[int] = []
    capped: list[bool] = []
    for part in _parts(pictures):
        for side, found in pictures_at(part, name, domain):
            on_side = found[0].shape[0]
            look = TrueScales(side / (on_side * domain.unit_side)) if predict is None else ObjectScales(predict)
            some = rescale_canvases(found, recipe.recursion(on_side, domain.canvas_side), recipe.rules, look)
            rights.append(_right(classifier, [one.pixels for one in some], part.labels, domain))
            first = [
                resized(one, settled.sides[:2][-1], recipe.rules.resampling)
                for one, settled in zip(found, some, strict=True)
            ]
            rights_once.append(_right(classifier, first, part.labels, domain))
            steps += [len(one.sides) - 1 for one in some]
            capped += [one.capped for one in some]
    return Score(_percent(rights), float(np.mean(steps)), 100.0 * float(np.mean(capped)), _percent(rights_once))


def _parts(pictures: Pictures) -> Iterator[Pictures]:
    for start in range(0, len(pictures.labels), _PICTURES):
        yield pictures.part(slice(start, start + _PICTURES))


def _right(classifier: nn.Module, canvases: Sequence[np.ndarray], labels: np.ndarray, domain: Domain) -> np.ndarray:
    """[N] bool: which are told rightly."""
    device = next(classifier.parameters()).device
    batch = np.stack([centred(one, domain.canvas_side) for one in canvases])
    # The nets may be in bfloat16, whose scores of classes tie.
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        scores = classifier(as_input(batch, domain.in_channels).to(device))
    return scores.argmax(1).cpu().numpy() == labels


def _percent(rights: Sequence[np.ndarray]) -> float:
    return 100.0 * float(np.concatenate(rights).mean())
