"""The pieces of an experiment on canvases, each done by itself: train a net, train a classifier, score a method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from scalenet_ray.core.errors import UserError
from scalenet_ray.data.storage import join
from scalenet_ray.experiments.classifiers import build_classifier
from scalenet_ray.experiments.config import DOMAINS, CanvasRecipe, ClassifierRecipe, Domain, NetRecipe
from scalenet_ray.experiments.data import Pictures, load_pictures, resized
from scalenet_ray.experiments.evaluate import ObjectScales, pictures_at, score_classifier, score_recursion
from scalenet_ray.experiments.rescale import rescale_canvases
from scalenet_ray.experiments.train import train_classifier, train_net
from scalenet_ray.models.scale_net import ScaleNetPredictor, load_state, save_scale_net
from scalenet_ray.models.weights import load_weights, save_weights

__all__ = [
    "Experiment",
]

_RESPONSES = 100


_DEAR = 2000


@dataclass(frozen=True)
class Experiment:
    """Where the data comes from, and where the weights are left.

    Attributes:
        name: of the data: mnist, cifar10 or digits.
        data: its folder; None for digits.
        folder: of the weights, local or s3://.
        held_out: so many of the last training pictures are not trained on, and stand in for the test set: settings are
            chosen on them. 0: the test set itself.
        train_limit: only the first so many training pictures.
        test_limit: only the first so many to test on.
        width: of the first classifier's layers; the domain's own by default.
        device: a torch device.
        mixed_precision: compute in bfloat16 what bears it; twice as fast where the hardware knows it.
    """

    name: str
    data: str | None
    folder: str
    held_out: int = 0
    train_limit: int | None = None
    test_limit: int | None = None
    width: float | None = None
    device: str = "cpu"
    mixed_precision: bool = False

    @property
    def domain(self) -> Domain:
        """What is known of the data."""
        domain = DOMAINS[self.name]
        if self.width is None:
            return domain
        (name, first), *others = domain.classifiers.items()
        return replace(domain, classifiers={name: replace(first, width=self.width), **dict(others)})

    def learned(self) -> Pictures:
        """Those that are trained on.

        Raises:
            UserError: if none are left.
        """
        pictures = load_pictures(self.name, self.data, train=True)
        kept = len(pictures.labels) - self.held_out
        if kept < 1:
            msg = f"held_out must leave pictures to train on, got {self.held_out} of {len(pictures.labels)}"
            raise UserError(msg)
        return pictures.part(slice(0, min(kept, self.train_limit or kept)))

    def tested(self, tests: str = "") -> Pictures:
        """Those that are tested on: all, or those of one set."""
        pictures = load_pictures(self.name, self.data, train=bool(self.held_out))
        pictures = pictures.part(slice(-self.held_out, None)).part(slice(0, self.test_limit))
        return pictures.part(slice(0, _DEAR)) if tests in map(str, self.domain.expensive_sides) else pictures

    def train_net(self, recipe: NetRecipe, seed: int, name: str) -> dict[str, Any]:
        """Train a Scale Net and save it as `name`; returns its number of parameters."""
        model = train_net(
            self.learned(),
            self.domain,
            recipe,
            seed=seed,
            device=self.device,
            mixed_precision=self.mixed_precision,
        )
        save_scale_net(model, recipe.config(self.domain.in_channels), self._weights(name))
        return {"parameters": _parameters(model)}

    def train_classifier(self, recipe: ClassifierRecipe, seed: int, name: str) -> dict[str, Any]:
        """Train a classifier and save it as `name`; returns its number of parameters."""
        model = train_classifier(
            self.learned(),
            self.domain,
            recipe,
            seed=seed,
            device=self.device,
            mixed_precision=self.mixed_precision,
        )
        save_weights(model.state_dict(), {}, self._weights(name))
        return {"parameters": _parameters(model)}

    def score_classifier(self, recipe: ClassifierRecipe, name: str, tests: str, *, squeeze: bool) -> dict[str, Any]:
        """A classifier alone on a set."""
        classifier = self._classifier(recipe, name)
        return score_classifier(classifier, self.tested(tests), tests, self.domain, squeeze=squeeze)._asdict()

    def score_recursion(
        self, recipe: CanvasRecipe, net: str | None, classifier: tuple[ClassifierRecipe, str], tests: str
    ) -> dict[str, Any]:
        """A classifier behind a recursion on a set; without a net the oracle tells the scales."""
        predict = None if net is None else ScaleNetPredictor(self._weights(net), self.device)
        known = self._classifier(*classifier)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.mixed_precision):
            return score_recursion(known, predict, recipe, self.tested(tests), tests, self.domain)._asdict()

    def respond(self, net: str, sides: tuple[int, ...]) -> dict[str, Any]:
        """What a net says of the first pictures at some sides: the mean of the object's pixels, averaged."""
        predict = ObjectScales(ScaleNetPredictor(self._weights(net), self.device))
        means = []
        for side in sides:
            ((_, pictures),) = pictures_at(self.tested().part(slice(0, _RESPONSES)), str(side), self.domain)
            recursion = CanvasRecipe().recursion(side, self.domain.canvas_side)
            first = rescale_canvases(pictures, recursion, CanvasRecipe(max_depth=1).rules, predict)
            scales = [one.maps[0].scale for one in first]
            # A net may see no object in a picture far out of its range.
            told = [scale[scale > 0] for scale in scales if scale is not None and scale.any()]
            means.append(float(np.mean([scale.mean() for scale in told] or [np.nan])))
        return {"sides": list(sides), "true": [side / self.domain.unit_side for side in sides], "predicted": means}

    def steps(self, recipe: CanvasRecipe, net: str, side: int) -> dict[str, Any]:
        """The recursion of the first picture at a side: its canvases as nested lists, grey, and their scale maps."""
        predict = ObjectScales(ScaleNetPredictor(self._weights(net), self.device))
        ((_, (picture,)),) = pictures_at(self.tested().part(slice(0, 1)), str(side), self.domain)
        recursion = recipe.recursion(side, self.domain.canvas_side)
        (settled,) = rescale_canvases([picture], recursion, recipe.rules, predict)
        canvases = [resized(picture, each, recipe.rules.resampling) for each in settled.sides]
        maps = [one.scale for one in settled.maps]
        return {
            "canvases": [canvas[..., 0].tolist() for canvas in canvases],
            "maps": [scale.round(3).tolist() for scale in maps if scale is not None],
        }

    def _weights(self, name: str) -> str:
        return join(self.folder, f"{name}.safetensors")

    def _classifier(self, recipe: ClassifierRecipe, name: str) -> nn.Module:
        domain = self.domain
        model = build_classifier(
            recipe.kind, side=domain.canvas_side, in_channels=domain.in_channels, width=recipe.width
        )
        path = self._weights(name)
        load_state(model, load_weights(path)[0], path)
        return model.to(torch.device(self.device)).eval()


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
