"""Interface of a training recipe (network, examples, loss, metrics), and one optimizer step. Plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

Row = dict[str, np.ndarray]
"""An example: named arrays of fixed shapes."""

Batch = dict[str, torch.Tensor]
"""Stacked rows, [B, ...] each, on the device."""


class Recipe(Protocol):
    """A network with its data set, loss and metrics. Implementations hold plain values and pickle to other machines.

    Attributes:
        best_by: validation metric by which checkpoints are ranked; larger is better.
        file_name: file name of the trained network.
    """

    best_by: str
    file_name: str

    @property
    def learning_rate(self) -> float:
        """Default learning rate."""
        ...

    def sizes(self) -> tuple[int, int]:
        """Number of training and of validation examples."""
        ...

    def example(self, index: int, epoch: int) -> Row:
        """An augmented training example, deterministic in its arguments.

        Raises:
            TileError: if its image cannot be used; the message names the image.
        """
        ...

    def validation_example(self, index: int) -> Row:
        """A validation example, without augmentation; raises as `example` does."""
        ...

    def blank(self) -> Row:
        """A padding row, excluded from the loss and the metrics."""
        ...

    def build(self) -> nn.Module:
        """The network with its initial weights."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Mean loss of a batch, a scalar."""
        ...

    def count(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Counts of a batch from which the metrics are computed; they are summed over batches and workers."""
        ...

    def figures(self, counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Metrics from the summed counts of the validation set, as plain values."""
        ...

    def save(self, model: nn.Module, path: str) -> None:
        """Write the network in the format that inference loads."""
        ...


def forward_backward(
    model: nn.Module,
    batch: Batch,
    loss_of: Callable[[nn.Module, Batch], torch.Tensor],
    *,
    parts: int = 1,
    mixed_precision: bool = False,
) -> torch.Tensor:
    """Accumulate the gradients of a batch's mean loss, over `parts` micro-batches; returns that loss, detached.

    Args:
        model: the model, plain or wrapped by DistributedDataParallel; gradients are synchronized in the last part.
        batch: [B, ...] each, B a multiple of `parts`.
        loss_of: loss of the recipe.
        parts: number of micro-batches.
        mixed_precision: run under bfloat16 autocast.
    """
    size = len(next(iter(batch.values())))
    device = next(iter(batch.values())).device
    total = torch.zeros((), device=device)
    for part in range(parts):
        micro = {name: values[part * size // parts : (part + 1) * size // parts] for name, values in batch.items()}
        if hasattr(model, "require_backward_grad_sync"):
            model.require_backward_grad_sync = part == parts - 1  # type: ignore[assignment]
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
            loss = loss_of(model, micro) / parts
        loss.backward()
        total += loss.detach()
    return total


def clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, clip_norm: float) -> None:
    """Clip the norm of the gradients, take one optimizer step and clear the gradients; `loss` is that of the gradients.

    Raises:
        FloatingPointError: if the loss or the norm is NaN or infinite; the weights are unchanged.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    if not torch.isfinite(loss + norm):
        optimizer.zero_grad(set_to_none=True)
        msg = f"the loss is {loss.item():.3g} with gradients of norm {norm.item():.3g}"
        raise FloatingPointError(msg)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
