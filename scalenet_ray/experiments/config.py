"""The experiments on canvases (sections 'MNIST' and 'CIFAR-10'): what is rescaled, and how it is learned and done."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from scalenet_ray.core.policy import Recursion
from scalenet_ray.core.scale import ScaleRange
from scalenet_ray.experiments.rescale import RescaleRules, canvas_recursion
from scalenet_ray.models.scale_net import Padding, ScaleNetConfig

__all__ = [
    "CIFAR10",
    "DIGITS",
    "DOMAINS",
    "MNIST",
    "CanvasRecipe",
    "ClassifierRecipe",
    "Domain",
    "NetRecipe",
]

_NEAR_UNIT = ScaleRange(0.95, 1.05)


@dataclass(frozen=True)
class Domain:
    """Pictures of one object each, and the scales at which they are learned and met.

    Attributes:
        name: of the data.
        in_channels: 1 for grey, 3 for RGB.
        unit_side: the side of a picture whose scale is 1, in pixels.
        train_sides: of the pictures that anything is trained on, in pixels.
        canvas_side: of the black square that they lie on, in pixels.
        test_sides: of those that are met, without a canvas round them.
        recipes: how they are rescaled, by name.
        classifiers: what classifies them, by name; the first one also behind the recipes.
        expensive_sides: test sides that are scored on the first 2,000 pictures: each look there costs as much as twenty
            at the canvas's own side.
    """

    name: Literal["mnist", "digits", "cifar10"]
    in_channels: int
    unit_side: int
    train_sides: tuple[int, ...]
    canvas_side: int
    test_sides: tuple[int, ...]
    recipes: dict[str, CanvasRecipe]
    classifiers: dict[str, ClassifierRecipe]
    expensive_sides: tuple[int, ...] = ()


@dataclass(frozen=True)
class NetRecipe:
    """How a Scale Net of Table 1 is trained.

    Attributes:
        padding: see `ScaleNetConfig`.
        loss: "pixels", the squared error of each pixel of the object (the paper's), or "mean", of their mean: what the
            recursion asks for.
        optimizer: "sgd", with momentum 0.9, or "adam".
        learning_rate: its highest.
        cosine: whether it falls to 0 along a cosine, after a short rise.
        epochs: passes over all pictures at all sides.
        batch_size: canvases a step.
    """

    padding: Padding = "input"
    loss: Literal["pixels", "mean"] = "mean"
    optimizer: Literal["sgd", "adam"] = "adam"
    learning_rate: float = 0.002
    cosine: bool = True
    epochs: float = 1.0
    batch_size: int = 64

    def config(self, in_channels: int) -> ScaleNetConfig:
        """The network's."""
        return ScaleNetConfig("fcn-digits", "fcn", "regression", None, in_channels, padding=self.padding)


@dataclass(frozen=True)
class ClassifierRecipe:
    """How a classifier is trained.

    Attributes:
        kind: see `build_classifier`.
        width: of its layers.
        optimizer: "sgd", with momentum 0.9, or "adam".
        learning_rate: its highest; it falls to 0 along a cosine.
        epochs: passes over all pictures at all sides.
        batch_size: canvases a step.
    """

    kind: Literal["plain", "deformable", "capsnet", "vgg11"] = "plain"
    width: float = 1.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.01
    epochs: float = 5.0
    batch_size: int = 64


@dataclass(frozen=True)
class CanvasRecipe:
    """How a picture is brought to the scale that the classifier knows.

    Attributes:
        net: how its Scale Net is trained.
        scale_range: [R_L, R_H].
        k: the share of scales that TopK averages; 1 is their mean.
        one_sided: what is met larger than the canvas may only be too large, what is met smaller too small (the paper's
            two settings); else one setting serves both.
        rules: how sizes are chosen.
        max_depth: the most steps.
    """

    net: NetRecipe = field(default_factory=NetRecipe)
    scale_range: ScaleRange = _NEAR_UNIT
    k: float = 1.0
    one_sided: bool = False
    rules: RescaleRules = field(default_factory=RescaleRules)
    max_depth: int = 20

    def recursion(self, side: int, canvas_side: int) -> Recursion:
        """Algorithm 1's parameters for pictures that come on `side` pixels."""
        low, high = self.scale_range
        if self.one_sided:
            low, high = (1e-6, high) if side >= canvas_side else (low, 1e6)
        return canvas_recursion(ScaleRange(low, high), k=self.k, max_depth=self.max_depth)


_LITERAL = RescaleRules(even=False, bisect=False, from_original=False, resampling="bilinear")


_PAPER_NET = NetRecipe("each", "pixels", "sgd", 0.01, cosine=False)


_TWO_SIDED = CanvasRecipe()


_PAPER = CanvasRecipe(_PAPER_NET, ScaleRange(0.99, 1.05), 0.15, one_sided=True, rules=_LITERAL)


MNIST = Domain(
    "mnist",
    in_channels=1,
    unit_side=16,
    train_sides=(14, 16, 18),
    canvas_side=28,
    test_sides=(28, 56, 84, 4, 5, 6, 7, 8, 112, 140),
    recipes={"scalenet": _TWO_SIDED, "scalenet_paper": _PAPER},
    classifiers={
        "classifier": ClassifierRecipe(),
        # An epoch costs thirty of the plain classifier's.
        "deformable": ClassifierRecipe("deformable", epochs=0.3),
        # The paper's size costs fifty times what the plain classifier does.
        "capsnet": ClassifierRecipe("capsnet", width=0.25, optimizer="adam", learning_rate=1e-3, epochs=1.0),
    },
    expensive_sides=(112, 140),
)
"""The paper's digits."""


DIGITS = replace(
    MNIST,
    name="digits",
    test_sides=(28, 56, 8),
    expensive_sides=(),
    # A thirtieth of MNIST's pictures: as many steps take more passes.
    recipes={"scalenet": replace(_TWO_SIDED, net=NetRecipe(epochs=6.0))},
    classifiers={"classifier": ClassifierRecipe(epochs=20.0)},
)
"""scikit-learn's 8 x 8 handwritten digits, enlarged to 28 x 28: small enough to run anywhere."""


_CIFAR_NET = NetRecipe(epochs=0.25)


_CIFAR_TWO_SIDED = CanvasRecipe(_CIFAR_NET, ScaleRange(0.9, 1.12))


CIFAR10 = Domain(
    "cifar10",
    in_channels=3,
    unit_side=38,
    train_sides=(32, 38, 44),
    canvas_side=64,
    test_sides=(96,),
    recipes={
        "scalenet": _CIFAR_TWO_SIDED,
        "scalenet_paper": CanvasRecipe(
            replace(_PAPER_NET, epochs=0.25), ScaleRange(0.99, 1.338), 0.1, one_sided=True, rules=_LITERAL
        ),
    },
    classifiers={"classifier": ClassifierRecipe("vgg11", width=0.25, epochs=2.0)},
)
"""The paper's photographs, VGG-11 at a quarter of its width."""


DOMAINS = {domain.name: domain for domain in (MNIST, DIGITS, CIFAR10)}
