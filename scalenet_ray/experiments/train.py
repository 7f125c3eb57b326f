"""Training Scale Net and classifiers on canvases: pictures at a few sides, made as they are asked for. Plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn

from scalenet_ray.experiments.classifiers import build_classifier, classifier_loss
from scalenet_ray.experiments.config import ClassifierRecipe, Domain, NetRecipe
from scalenet_ray.experiments.data import Pictures, centred, resized
from scalenet_ray.models.scale_net import build_scale_net, normalised
from scalenet_ray.training.losses import masked_mse

__all__ = [
    "as_input",
    "train_classifier",
    "train_net",
]

_MOMENTUM = 0.9


_RISE = 0.05


def as_input(canvases: np.ndarray, in_channels: int) -> torch.Tensor:
    """[B, h, w, 3] uint8 -> [B, in_channels, h, w] float32 in 0..1; grey is the first channel.

    The brightest value of each canvas becomes 1: thin strokes that were shrunk and enlarged again are pale.
    """
    values = torch.from_numpy(canvases[..., :in_channels]).permute(0, 3, 1, 2).float()
    return values / values.amax((1, 2, 3), keepdim=True).clamp(min=1.0)


def train_net(
    pictures: Pictures,
    domain: Domain,
    recipe: NetRecipe,
    *,
    seed: int,
    device: str = "cpu",
    mixed_precision: bool = False,
) -> nn.Module:
    """A Scale Net that tells the scale of what lies on a canvas (section 'MNIST').

    Args:
        pictures: to learn from.
        domain: the sides at which they are shown, and the unit.
        recipe: how.
        seed: of the weights and of the order.
        device: a torch device.
        mixed_precision: compute in bfloat16 what bears it; twice as fast where the hardware knows it.

    Raises:
        FloatingPointError: if the loss is NaN or infinite.
    """
    torch.manual_seed(seed)
    config = recipe.config(domain.in_channels)
    model = _for_convolutions(build_scale_net(config), device)
    # A net that pads its input with zeros sees no more in a wider black border.
    canvas_side = max(domain.train_sides) if recipe.padding == "input" else domain.canvas_side

    def loss_of(canvases: np.ndarray, sides: np.ndarray, labels: np.ndarray) -> torch.Tensor:
        """Of the scale at each pixel of the object, or of their mean."""
        del labels
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed_precision):
            found = model(normalised(torch.from_numpy(canvases).to(device), config)).float()
        on_object = torch.from_numpy(canvases.max(axis=3) > 0).to(device)
        scales = torch.from_numpy((sides / domain.unit_side).astype(np.float32)).to(device)
        if recipe.loss == "pixels":
            return masked_mse(found, on_object * scales[:, None, None])
        pixels = on_object.sum((1, 2)).clamp(min=1)
        return (((found * on_object).sum((1, 2)) / pixels - scales) ** 2).mean()

    batches = _batches(pictures, domain.train_sides, canvas_side, recipe.batch_size, np.random.default_rng(seed))
    _fit(model, batches, _steps(pictures, domain, recipe), recipe, loss_of, cosine=recipe.cosine)
    return model.eval()


def train_classifier(
    pictures: Pictures,
    domain: Domain,
    recipe: ClassifierRecipe,
    *,
    seed: int,
    device: str = "cpu",
    mixed_precision: bool = False,
) -> nn.Module:
    """A classifier of canvases, which never sees a scale out of its range.

    Args:
        pictures: to learn from.
        domain: the sides at which they are shown.
        recipe: how.
        seed: of the weights and of the order.
        device: a torch device.
        mixed_precision: compute in bfloat16 what bears it; twice as fast where the hardware knows it.

    Raises:
        FloatingPointError: if the loss is NaN or infinite.
    """
    torch.manual_seed(seed)
    model = _for_convolutions(
        build_classifier(recipe.kind, side=domain.canvas_side, in_channels=domain.in_channels, width=recipe.width),
        device,
    )

    def loss_of(canvases: np.ndarray, sides: np.ndarray, labels: np.ndarray) -> torch.Tensor:
        """Of the classes."""
        del sides
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed_precision):
            scores = model(as_input(canvases, domain.in_channels).to(device)).float()
        return classifier_loss(recipe.kind, scores, torch.from_numpy(labels).to(device))

    sides, rng = domain.train_sides, np.random.default_rng(seed)
    batches = _batches(pictures, sides, domain.canvas_side, recipe.batch_size, rng)
    _fit(model, batches, _steps(pictures, domain, recipe), recipe, loss_of, cosine=True)
    return model.eval()


def _for_convolutions(model: nn.Module, device: str) -> nn.Module:
    """The model on its device, channels last: convolutions are faster for it, by 1.2 to 1.5 times on CPUs."""
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _steps(pictures: Pictures, domain: Domain, recipe: NetRecipe | ClassifierRecipe) -> int:
    return max(1, int(recipe.epochs * len(pictures.labels) * len(domain.train_sides) / recipe.batch_size))


def _fit(
    model: nn.Module,
    batches: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]],
    steps: int,
    recipe: NetRecipe | ClassifierRecipe,
    loss_of: Callable[[np.ndarray, np.ndarray, np.ndarray], torch.Tensor],
    *,
    cosine: bool,
) -> None:
    """Go down along the loss of a batch: canvases, their pictures' sides, their labels."""
    optimizer = _optimizer(model, recipe.optimizer, recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps) if cosine else 1.0)
    model.train()
    for step in range(steps):
        loss = loss_of(*next(batches))
        if not torch.isfinite(loss):
            msg = f"the loss is {loss.item():.3g} at step {step} of {steps}: lower the learning rate"
            raise FloatingPointError(msg)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def _optimizer(model: nn.Module, name: Literal["sgd", "adam"], learning_rate: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=_MOMENTUM)
    return torch.optim.Adam(model.parameters(), lr=learning_rate)


def _rate(step: int, steps: int) -> float:
    """A rise over the first twentieth, then down to 0 along a cosine."""
    rise = max(1, round(_RISE * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + float(np.cos(np.pi * (step - rise) / max(1, steps - rise))))


def _batches(
    pictures: Pictures, train_sides: Sequence[int], canvas_side: int, size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches without end: every picture at every side, in an order of its own each time."""
    sides = np.array(train_sides)
    count = len(pictures.labels)
    order = rng.permutation(count * len(sides))
    while True:
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(count * len(sides))])
        some, order = order[:size], order[size:]
        which, side = some % count, sides[some // count]
        canvases = [
            centred(resized(pictures.pixels[i], int(s), "bilinear"), canvas_side)
            for i, s in zip(which, side, strict=True)
        ]
        yield np.stack(canvases), side, pictures.labels[which]
