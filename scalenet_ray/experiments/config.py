"""Settings of the experiments on MNIST, scikit-learn's digits and CIFAR-10 (sections 'MNIST' and 'CIFAR-10')."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from scalenet_ray.core.policy import Recursion
from scalenet_ray.core.scale import ScaleRange
from scalenet_ray.experiments.rescale import RescaleRules, canvas_recursion
from scalenet_ray.models.scale_networks import Padding, ScaleNetConfig

_DEFAULT_RANGE = ScaleRange(0.95, 1.05)


@dataclass(frozen=True)
class NetRecipe:
    """Training of the Scale Net of Table 1.

    Attributes:
        padding: see `ScaleNetConfig`.
        loss: "pixels", the squared error at each pixel of the object (the paper's), or "mean", the squared error of
            their mean, which is the value that the recursion uses.
        optimizer: "sgd" with momentum 0.9, or "adam".
        learning_rate: peak learning rate.
        cosine: decay the learning rate to 0 along a cosine, after a short warm-up; else it is constant.
        epochs: passes over all images at all sides.
        batch_size: canvases per step.
    """

    padding: Padding = "input"
    loss: Literal["pixels", "mean"] = "mean"
    optimizer: Literal["sgd", "adam"] = "adam"
    learning_rate: float = 0.002
    cosine: bool = True
    epochs: float = 1.0
    batch_size: int = 64

    def config(self, in_channels: int) -> ScaleNetConfig:
        """Configuration of the network."""
        return ScaleNetConfig("fcn-digits", "fcn", "regression", None, in_channels, padding=self.padding)


@dataclass(frozen=True)
class ClassifierRecipe:
    """Training of a classifier: its kind and width as for `build_classifier`, the rest as for `NetRecipe`."""

    kind: Literal["plain", "deformable", "capsnet", "vgg11"] = "plain"
    width: float = 1.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.01
    epochs: float = 5.0
    batch_size: int = 64

    cosine = True


@dataclass(frozen=True)
class CanvasRecipe:
    """Recursive rescaling of an image to the classifier's scale.

    Attributes:
        scale_range: [R_L, R_H].
        k: share of the scales that TopK averages; 1 is the mean.
        one_sided: images larger than the canvas are only shrunk, smaller ones only enlarged (the paper's two
            settings); else one setting serves both.
        max_depth: maximum number of steps.
    """

    net: NetRecipe = field(default_factory=NetRecipe)
    scale_range: ScaleRange = _DEFAULT_RANGE
    k: float = 1.0
    one_sided: bool = False
    rules: RescaleRules = field(default_factory=RescaleRules)
    max_depth: int = 20

    def recursion(self, side: int, canvas_side: int) -> Recursion:
        """Parameters of Algorithm 1 for images of `side` pixels."""
        low, high = self.scale_range
        if self.one_sided:
            low, high = (1e-6, high) if side >= canvas_side else (low, 1e6)
        return canvas_recursion(ScaleRange(low, high), k=self.k, max_depth=self.max_depth)


@dataclass(frozen=True)
class Domain:
    """A data set of single objects, with the sizes for training and testing.

    Attributes:
        name: name of the data set.
        in_channels: 1 for grey, 3 for RGB.
        unit_side: side of an object of scale 1 in pixels.
        train_sides: sides of the training images in pixels.
        canvas_side: side of the black square that they are padded to.
        test_sides: sides of the test images, which are not padded.
        recipes: methods of rescaling by name.
        classifiers: classifiers by name; the recipes use the first.
        expensive_sides: test sides that are scored on the first 2,000 images only: a network pass there costs twenty
            times one on the canvas.
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


_PAPER_NET = NetRecipe("each", "pixels", "sgd", 0.01, cosine=False)
_PAPER_RULES = RescaleRules(even=False, bisect=False, from_original=False, resampling="bilinear")

MNIST = Domain(
    "mnist",
    in_channels=1,
    unit_side=16,
    train_sides=(14, 16, 18),
    canvas_side=28,
    test_sides=(28, 56, 84, 4, 5, 6, 7, 8, 112, 140),
    recipes={
        "scalenet": CanvasRecipe(),
        "scalenet_paper": CanvasRecipe(_PAPER_NET, ScaleRange(0.99, 1.05), 0.15, one_sided=True, rules=_PAPER_RULES),
    },
    classifiers={
        "classifier": ClassifierRecipe(),
        # An epoch takes thirty times the plain classifier's.
        "deformable": ClassifierRecipe("deformable", epochs=0.3),
        # The paper's width takes fifty times the plain classifier's.
        "capsnet": ClassifierRecipe("capsnet", width=0.25, optimizer="adam", learning_rate=1e-3, epochs=1.0),
    },
    expensive_sides=(112, 140),
)
"""MNIST with the paper's sizes."""

DIGITS = replace(
    MNIST,
    name="digits",
    test_sides=(28, 56, 8),
    expensive_sides=(),
    # A thirtieth of MNIST's images: more epochs for as many steps.
    recipes={"scalenet": CanvasRecipe(NetRecipe(epochs=6.0))},
    classifiers={"classifier": ClassifierRecipe(epochs=20.0)},
)
"""scikit-learn's 8 x 8 handwritten digits, enlarged to 28 x 28; runs on a laptop."""

CIFAR10 = Domain(
    "cifar10",
    in_channels=3,
    unit_side=38,
    train_sides=(32, 38, 44),
    canvas_side=64,
    test_sides=(96,),
    recipes={
        "scalenet": CanvasRecipe(NetRecipe(epochs=0.25), ScaleRange(0.9, 1.12)),
        "scalenet_paper": CanvasRecipe(
            replace(_PAPER_NET, epochs=0.25), ScaleRange(0.99, 1.338), 0.1, one_sided=True, rules=_PAPER_RULES
        ),
    },
    classifiers={"classifier": ClassifierRecipe("vgg11", width=0.25, epochs=2.0)},
)
"""CIFAR-10 with the paper's sizes, and VGG-11 at a quarter of its width."""

DOMAINS = {domain.name: domain for domain in (MNIST, DIGITS, CIFAR10)}


def ablations(recipe: CanvasRecipe) -> dict[str, CanvasRecipe]:
    """A recipe and variants of it, each with one choice changed; "none_of_these" changes all."""
    rules, net = recipe.rules, recipe.net
    paper_net = replace(_PAPER_NET, epochs=net.epochs)
    return {
        "as_it_is": recipe,
        "each_convolution_padded": replace(recipe, net=replace(net, padding="each")),
        "error_of_each_pixel": replace(recipe, net=replace(net, loss="pixels")),
        "SGD_0.01,_not_annealed": replace(recipe, net=replace(net, optimizer="sgd", learning_rate=0.01, cosine=False)),
        "mean_of_the_top_15_%": replace(recipe, k=0.15),
        "in_range_.84_to_1.16": replace(recipe, scale_range=ScaleRange(0.84, 1.16)),
        "one-sided": replace(recipe, one_sided=True),
        "odd_sides_too": replace(recipe, rules=replace(rules, even=False)),
        "no_bisection": replace(recipe, rules=replace(rules, bisect=False)),
        "from_the_canvas_before": replace(recipe, rules=replace(rules, from_original=False)),
        "bilinear": replace(recipe, rules=replace(rules, resampling="bilinear")),
        "nearest": replace(recipe, rules=replace(rules, resampling="nearest")),
        "none_of_these": CanvasRecipe(paper_net, recipe.scale_range, 0.15, one_sided=True, rules=_PAPER_RULES),
    }
