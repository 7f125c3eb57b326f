"""One optimizer step, in one part or several."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scalenet_ray.training.recipe import Batch, clip_and_step, forward_backward

BATCH = {"x": torch.linspace(-1, 1, 24).reshape(8, 3), "y": torch.linspace(2, 5, 8)[:, None]}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return ((model(batch["x"]) - batch["y"]) ** 2).mean()


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    return [value.grad.clone() for value in model.parameters() if value.grad is not None]


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_give_the_gradient_of_the_whole(parts: int) -> None:
    whole, apart = _model().double(), _model().double()
    batch = {name: values.double() for name, values in BATCH.items()}
    loss = forward_backward(whole, batch, _loss)
    torch.testing.assert_close(forward_backward(apart, batch, _loss, parts=parts), loss)
    assert len(_gradients(whole)) == 4
    torch.testing.assert_close(_gradients(apart), _gradients(whole))
    assert not loss.requires_grad


def test_workers_talk_after_the_last_part_alone() -> None:
    model = _model()
    model.require_backward_grad_sync = True  # type: ignore[assignment]
    seen = []

    def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
        seen.append(model.require_backward_grad_sync)
        return _loss(model, batch)

    forward_backward(model, BATCH, loss_of, parts=4)
    assert seen == [False, False, False, True]


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    seen = []

    def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
        out = model(batch["x"])
        seen.append(out.dtype)
        return ((out.float() - batch["y"]) ** 2).mean()

    model, plain = _model(), _model()
    loss = forward_backward(model, BATCH, loss_of, mixed_precision=True)
    torch.testing.assert_close(loss, forward_backward(plain, BATCH, _loss), rtol=0.02, atol=0.02)
    assert seen == [torch.bfloat16]
    assert {value.dtype for value in _gradients(model)} == {torch.float32}


def test_gradients_are_cut_to_the_norm_and_gone_afterwards() -> None:
    model = _model()
    before = [value.detach().clone() for value in model.parameters()]
    loss = forward_backward(model, BATCH, _loss)
    clip_and_step(model, torch.optim.SGD(model.parameters(), lr=1.0), loss, clip_norm=0.5)
    moved = torch.cat([(new - old).flatten() for new, old in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert _gradients(model) == []


@pytest.mark.parametrize(
    ("factor", "message"),
    [(torch.nan, "the loss is nan with gradients of norm nan"), (torch.inf, "the loss is inf with gradients of norm ")],
)
def test_a_loss_that_is_no_number_leaves_the_weights_as_they_were(factor: float, message: str) -> None:
    model = _model()
    before = [value.detach().clone() for value in model.parameters()]
    loss = forward_backward(model, BATCH, lambda model, batch: factor * _loss(model, batch))
    with pytest.raises(FloatingPointError, match=message):
        clip_and_step(model, torch.optim.Adam(model.parameters()), loss, clip_norm=10.0)
    assert all(torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))
    assert _gradients(model) == []


def test_gradients_that_are_no_numbers_stop_even_if_the_loss_is_one() -> None:
    model = _model()
    loss = forward_backward(model, BATCH, _loss)
    next(model.parameters()).grad.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(FloatingPointError, match=r"the loss is \d+\.?\d* with gradients of norm nan"):
        clip_and_step(model, torch.optim.Adam(model.parameters()), loss, clip_norm=10.0)
