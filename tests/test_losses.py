"""The losses against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch

from scalenet_ray.core.scale import IGNORE
from scalenet_ray.training.losses import focal_loss, masked_mse


def _logits(*rows: list[float]) -> torch.Tensor:
    """[1, classes, 1, pixels] whose softmax is `rows`, one row of probabilities a pixel."""
    return torch.tensor(rows).log().T[None, :, None, :]


def test_focal_loss_is_the_one_worked_out_by_hand() -> None:
    # p = 0.8 of the right class: -(0.2^2) ln 0.8; p = 0.5: -(0.5^2) ln 0.5.
    logits = _logits([0.8, 0.2], [0.5, 0.5])
    wanted = (0.04 * -math.log(0.8) + 0.25 * -math.log(0.5)) / 2
    assert focal_loss(logits, torch.tensor([[[0, 1]]])).item() == pytest.approx(wanted, rel=1e-5)


def test_without_gamma_focal_loss_is_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 6, 4, 5), torch.randint(0, 6, (2, 4, 5))
    wanted = torch.nn.functional.cross_entropy(logits, target)
    assert focal_loss(logits, target, gamma=0.0).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_class_weights_weigh_the_pixel_s_own_class() -> None:
    logits, target = _logits([0.8, 0.2], [0.5, 0.5]), torch.tensor([[[0, 1]]])
    wanted = (0.04 * -math.log(0.8) + 3 * 0.25 * -math.log(0.5)) / 2
    loss = focal_loss(logits, target, class_weights=torch.tensor([1.0, 3.0]))
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_ignored_pixels_neither_add_nor_count() -> None:
    logits = _logits([0.8, 0.2], [0.001, 0.999])
    loss = focal_loss(logits, torch.tensor([[[0, IGNORE]]]))
    assert loss.item() == pytest.approx(0.04 * -math.log(0.8), rel=1e-5)


def test_ignored_pixels_have_no_gradient() -> None:
    logits = torch.randn(1, 6, 2, 2, requires_grad=True)
    target = torch.tensor([[[1, IGNORE], [0, IGNORE]]])
    focal_loss(logits, target).backward()
    assert logits.grad is not None
    assert logits.grad[..., 1].abs().max() == 0
    assert logits.grad[..., 0].abs().min() > 0


def test_a_map_that_is_all_ignored_costs_nothing() -> None:
    logits = torch.randn(1, 6, 2, 2, requires_grad=True)
    loss = focal_loss(logits, torch.full((1, 2, 2), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_masked_mse_looks_at_objects_alone() -> None:
    target = torch.tensor([[[0.0, 2.0], [1.0, 0.0]]])
    scale = torch.tensor([[[9.0, 2.5], [0.0, -7.0]]])
    assert masked_mse(scale, target).item() == pytest.approx((0.5**2 + 1.0) / 2)


def test_masked_mse_of_no_object_is_zero() -> None:
    assert masked_mse(torch.ones(1, 2, 2), torch.zeros(1, 2, 2)).item() == 0
