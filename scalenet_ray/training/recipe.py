"""What can be trained: a network, its examples, its loss and its figures; and one step down. Plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

__all__ = [
    "Batch",
    "Recipe",
    "Row",
    "clip_and_step",
    "forward_backward",
]

Row = dict[str, np.ndarray]
"""An example: arrays of fixed shapes by name, so that rows can be stacked."""


Batch = dict[str, torch.Tensor]
"""Stacked rows, [B, ...] each, on the device."""


class Recipe(Protocol):
    """What is trained, on what, and how it is judged; made of plain values, since workers elsewhere open it.

    Attributes:
        best_by: the figure, larger is better, by which checkpoints are kept.
        file_name: what the trained network is saved as.
    """

    best_by: str
    file_name: str

    @property
    def learning_rate(self) -> float:
        """What suits it, where none is asked for."""
        ...

    def sizes(self) -> tuple[int, int]:
        """How many examples there are to train on, and to validate on."""
        ...

    def example(self, index: int, epoch: int) -> Row:
        """A training example, augmented; the same for the same arguments.

        Raises:
            TileError: if its image cannot be used, named in the reason.
        """
        ...

    def validation_example(self, index: int) -> Row:
        """An example to validate on, as it is; raises as `example` does."""
        ...

    def blank(self) -> Row:
        """A row that counts for nothing, in the loss and in the figures."""
        ...

    def build(self) -> nn.Module:
        """The network before the first step."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch, a scalar."""
        ...

    def count(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """What the figures are made of: sums, which add up over batches and workers."""
        ...

    def figures(self, counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The sums over all that is validated on -> its figures, plain values."""
        ...

    def save(self, model: nn.Module, path: str) -> None:
        """Write the network, ready to be used."""
        ...


def forward_backward(
    model: nn.Module,
    batch: Batch,
    loss_of: Callable[[nn.Module, Batch], torch.Tensor],
    *,
    parts: int = 1,
    mixed_precision: bool = False,
) -> torch.Tensor:
    """Add the gradients of a batch's mean loss to the model's, `parts` of the batch one after the other.

    Args:
        model: plain, or wrapped for many workers: then only the last part's backward pass talks to the others.
        batch: [B, ...] each, B a multiple of `parts`.
        loss_of: a recipe's loss.
        parts: in how many the batch is worked through, so that a large one fits into memory.
        mixed_precision: compute in bfloat16 what bears it.

    Returns:
        The mean loss, detached.
    """
    size = len(next(iter(batch.values())))
    device = next(iter(batch.values())).device
    total = torch.zeros((), device=device)
    for part in range(parts):
        some = {name: values[part * size // parts : (part + 1) * size // parts] for name, values in batch.items()}
        if hasattr(model, "require_backward_grad_sync"):
            model.require_backward_grad_sync = part == parts - 1  # type: ignore[assignment]
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
            loss = loss_of(model, some) / parts
        loss.backward()
        total += loss.detach()
    return total


def clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, clip_norm: float) -> None:
    """One step down along the gradients, cut to a norm; the gradients are gone afterwards.

    Args:
        model: with gradients.
        optimizer: of the model.
        loss: that the gradients are of, a scalar.
        clip_norm: the most that the gradients' norm may be.

    Raises:
        FloatingPointError: if the loss or the norm is NaN or infinite; the weights are left as they were.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    if not torch.isfinite(loss + norm):
        optimizer.zero_grad(set_to_none=True)
        msg = f"the loss is {loss.item():.3g} with gradients of norm {norm.item():.3g}"
        raise FloatingPointError(msg)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
