"""The paper's classifiers: shapes, layers against plain loops, losses against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from scalenet_ray.experiments.classifiers import (
    CapsNet,
    build_classifier,
    classifier_loss,
    margin_loss,
    route,
    squash,
)

SIDES = {"plain": 28, "deformable": 28, "capsnet": 28, "vgg11": 64}
WIDTHS = {"plain": 1.0, "deformable": 1.0, "capsnet": 0.125, "vgg11": 0.125}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def _small(kind: str, in_channels: int = 1, classes: int = 10) -> nn.Module:
    return build_classifier(kind, side=SIDES[kind], in_channels=in_channels, classes=classes, width=WIDTHS[kind])


def _same_weights() -> tuple[nn.Module, nn.Module]:
    """A plain and a deformable classifier; what moves the taps of the second is as it starts."""
    plain, deformable = _small("plain"), _small("deformable")
    state = {name.replace("3.", "3.conv.", 1): value for name, value in plain.state_dict().items()}
    left = deformable.load_state_dict(state, strict=False)
    assert left.missing_keys == ["3.offsets.weight", "3.offsets.bias"]
    assert left.unexpected_keys == []
    return plain, deformable


def _routed_slowly(predictions: torch.Tensor) -> list[list[list[float]]]:
    """Procedure 1 of Sabour et al. in numbers, one image, capsule, class and dimension at a time."""
    images, capsules, classes, dimensions = predictions.shape
    answer = []
    for image in range(images):
        u = predictions[image].tolist()
        logits = [[0.0] * classes for _ in range(capsules)]
        above: list[list[float]] = []
        for _ in range(3):
            shares = []
            for row in logits:
                total = sum(math.exp(value) for value in row)
                shares.append([math.exp(value) / total for value in row])
            above = []
            for j in range(classes):
                s = [sum(shares[i][j] * u[i][j][d] for i in range(capsules)) for d in range(dimensions)]
                squared = sum(value**2 for value in s)
                above.append([squared / (1 + squared) * value / math.sqrt(squared) for value in s])
            for i in range(capsules):
                for j in range(classes):
                    logits[i][j] += sum(u[i][j][d] * above[j][d] for d in range(dimensions))
        answer.append(above)
    return answer


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("kind", SIDES)
def test_every_kind_gives_a_score_a_class(kind: str, in_channels: int) -> None:
    scores = _small(kind, in_channels, classes=7)(torch.rand(2, in_channels, SIDES[kind], SIDES[kind]))
    assert scores.shape == (2, 7)
    assert scores.dtype == torch.float32


def test_a_fresh_deformable_one_answers_as_the_plain_one() -> None:
    plain, deformable = _same_weights()
    images = torch.rand(3, 1, 28, 28)
    # Answers are of some tenths: float32 leaves a hundredth of the 1e-5 that is allowed.
    torch.testing.assert_close(deformable(images), plain(images))


def test_what_moves_the_taps_is_learned() -> None:
    _, deformable = _same_weights()
    classifier_loss("deformable", deformable(torch.rand(3, 1, 28, 28)), torch.tensor([1, 2, 3])).backward()
    for name in ("3.offsets.weight", "3.offsets.bias"):
        grad = deformable.get_parameter(name).grad
        assert grad is not None
        assert grad.abs().max() > 0


def test_squash_keeps_the_direction_and_gives_the_paper_s_length() -> None:
    vectors = torch.tensor([[0.0, 3.0], [0.6, -0.8], [-30.0, 40.0]])
    wanted = torch.tensor([[0.0, 0.9], [0.3, -0.4], [-0.6 * 2500 / 2501, 0.8 * 2500 / 2501]])
    torch.testing.assert_close(squash(vectors), wanted)


def test_squash_has_a_finite_gradient_at_zero() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [3.0, 4.0]], requires_grad=True)
    squash(vectors).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()
    assert vectors.grad[0].tolist() == [0.0, 0.0]
    assert vectors.grad[2].abs().min() > 0


def test_routing_is_that_of_a_plain_loop() -> None:
    predictions = 2 * torch.randn(2, 5, 3, 4, dtype=torch.float64)
    wanted = torch.tensor(_routed_slowly(predictions), dtype=torch.float64)
    torch.testing.assert_close(route(predictions), wanted)


def test_primary_capsules_are_the_eight_channels_of_a_type_at_a_cell() -> None:
    model = CapsNet(side=20, in_channels=1, classes=3, width=0.0625).double()
    images = torch.rand(2, 1, 20, 20, dtype=torch.float64)
    maps = model.primary(model.features(images).relu())
    assert maps.shape == (2, 16, 2, 2)
    predictions = torch.stack(
        [
            squash(maps[:, 8 * kind : 8 * kind + 8, row, column]) @ model.transforms[4 * kind + 2 * row + column].mT
            for kind in range(2)
            for row in range(2)
            for column in range(2)
        ]
    )
    # [capsules, classes, B, dimensions] as the products come.
    wanted = route(predictions.permute(2, 0, 1, 3)).norm(dim=-1)
    torch.testing.assert_close(model(images), wanted)


@pytest.mark.parametrize(
    ("width", "wanted"),
    [
        (1.0, [64, 128, 256, 256, 512, 512, 512, 512]),
        (0.25, [16, 32, 64, 64, 128, 128, 128, 128]),
        (0.01, [8] * 8),
    ],
)
def test_vgg11_s_width_scales_its_channels(width: float, wanted: list[int]) -> None:
    model = build_classifier("vgg11", side=64, in_channels=3, width=width)
    assert [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)] == wanted
    assert [layer.num_features for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)] == wanted


def test_margin_loss_is_the_one_worked_out_by_hand() -> None:
    lengths = torch.tensor([[0.6, 0.3]])
    # Right is 0: (0.9 - 0.6)^2 + 0.5 (0.3 - 0.1)^2; right is 1: (0.9 - 0.3)^2 + 0.5 (0.6 - 0.1)^2.
    assert margin_loss(lengths, torch.tensor([0])).item() == pytest.approx(0.11, rel=1e-5)
    assert margin_loss(lengths, torch.tensor([1])).item() == pytest.approx(0.485, rel=1e-5)
    both = classifier_loss("capsnet", lengths.repeat(2, 1), torch.tensor([0, 1]))
    assert both.item() == pytest.approx((0.11 + 0.485) / 2, rel=1e-5)
