"""The paper's classifiers: shapes, layers against plain loops, losses against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from scalenet_ray.experiments.classifiers import (
    KINDS,
    ROUTING_ITERATIONS,
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
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_a_score_a_class(kind: str, in_channels: int) -> None:
    scores = _small(kind, in_channels, classes=7)(torch.rand(2, in_channels, SIDES[kind], SIDES[kind]))
    assert scores.shape == (2, 7)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize(("kind", "side"), [("plain", 4), ("deformable", 30), ("capsnet", 17), ("capsnet", 20)])
def test_sides_other_than_the_paper_s_work(kind: str, side: int) -> None:
    model = build_classifier(kind, side=side, in_channels=1, width=WIDTHS[kind])
    assert model(torch.rand(2, 1, side, side)).shape == (2, 10)


def test_the_plain_one_has_the_paper_s_layers() -> None:
    shapes = [tuple(value.shape) for value in _small("plain").parameters() if value.ndim > 1]
    assert shapes == [(16, 1, 5, 5), (32, 16, 5, 5), (128, 32 * 7 * 7), (10, 128)]


def test_a_fresh_deformable_one_answers_as_the_plain_one() -> None:
    plain, deformable = _same_weights()
    images = torch.rand(3, 1, 28, 28)
    # Answers are of some tenths: float32 leaves a hundredth of the 1e-5 that is allowed.
    torch.testing.assert_close(deformable(images), plain(images))


def test_moved_taps_change_the_answer() -> None:
    plain, deformable = _same_weights()
    nn.init.constant_(deformable.get_parameter("3.offsets.bias"), 0.5)
    images = torch.rand(3, 1, 28, 28)
    assert (deformable(images) - plain(images)).abs().max() > 1e-3


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


def test_only_the_last_round_of_routing_has_a_gradient() -> None:
    predictions = torch.randn(1, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(1, 3, 4, dtype=torch.float64)
    (route(predictions) * direction).sum().backward()
    assert predictions.grad is not None
    with torch.no_grad():
        logits = torch.zeros(1, 5, 3, dtype=torch.float64)
        for _ in range(ROUTING_ITERATIONS - 1):
            above = squash((logits.softmax(dim=2)[..., None] * predictions).sum(dim=1))
            logits += (predictions * above[:, None]).sum(dim=-1)
    same = predictions.detach().clone().requires_grad_()
    (squash((logits.softmax(dim=2)[..., None] * same).sum(dim=1)) * direction).sum().backward()
    torch.testing.assert_close(predictions.grad, same.grad)


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


def test_lengths_of_capsules_lie_between_0_and_1() -> None:
    model = _small("capsnet")
    for images in (torch.zeros(2, 1, 28, 28), torch.rand(2, 1, 28, 28), 50 * torch.randn(2, 1, 28, 28)):
        lengths = model(images)
        assert lengths.min() >= 0
        assert lengths.max() < 1


def test_a_capsnet_without_bias_survives_a_black_picture() -> None:
    model = _small("capsnet")
    for name in ("features.bias", "primary.bias"):
        nn.init.zeros_(model.get_parameter(name))
    classifier_loss("capsnet", model(torch.zeros(2, 1, 28, 28)), torch.tensor([0, 1])).backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize(("width", "channels", "types"), [(1.0, 256, 32), (0.25, 64, 8)])
def test_a_capsnet_s_width_scales_its_channels_and_types(width: float, channels: int, types: int) -> None:
    model = CapsNet(side=28, in_channels=1, width=width)
    assert model.features.weight.shape == (channels, 1, 9, 9)
    assert model.primary.weight.shape == (types * 8, channels, 9, 9)
    assert model.transforms.shape == (types * 36, 10, 16, 8)


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


def test_beyond_the_margins_nothing_is_lost() -> None:
    assert margin_loss(torch.tensor([[0.95, 0.05]]), torch.tensor([0])).item() == 0


@pytest.mark.parametrize("kind", ["plain", "deformable", "vgg11"])
def test_the_others_loss_is_the_cross_entropy(kind: str) -> None:
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]).log()
    wanted = -(math.log(0.7) + math.log(0.25)) / 2
    assert classifier_loss(kind, scores, torch.tensor([0, 2])).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_lower_the_loss(kind: str) -> None:
    model = _small(kind)
    images, labels = torch.rand(16, 1, SIDES[kind], SIDES[kind]), torch.arange(16) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = classifier_loss(kind, model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]


def test_an_unknown_kind_says_which_there_are() -> None:
    with pytest.raises(ValueError, match="plain, deformable, capsnet, vgg11, got resnet: name one"):
        build_classifier("resnet", side=28, in_channels=1)
    with pytest.raises(ValueError, match="plain, deformable, capsnet, vgg11, got resnet: name one"):
        classifier_loss("resnet", torch.zeros(1, 2), torch.tensor([0]))


@pytest.mark.parametrize(
    ("kind", "side", "says"),
    [
        ("plain", 3, "at least 4, got 3: use a larger canvas"),
        ("deformable", 0, "at least 4, got 0: use a larger canvas"),
        ("capsnet", 16, "at least 17, got 16: use a larger canvas"),
        ("vgg11", 48, "a multiple of 32, got 48: use a canvas of such a side"),
        ("vgg11", 0, "a multiple of 32, got 0: use a canvas of such a side"),
    ],
)
def test_an_impossible_side_says_what_to_do(kind: str, side: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build_classifier(kind, side=side, in_channels=1)


@pytest.mark.parametrize(("kind", "width"), [("plain", 0.5), ("deformable", 2.0), ("capsnet", 0.0), ("vgg11", -1.0)])
def test_a_width_that_a_kind_does_not_have_says_what_to_do(kind: str, width: float) -> None:
    with pytest.raises(ValueError, match=f"got {width} for {kind}: leave it out"):
        build_classifier(kind, side=64, in_channels=1, width=width)


def test_labels_that_do_not_fit_the_scores_are_told() -> None:
    with pytest.raises(ValueError, match=r"labels \[B\], got shapes \[2, 3\] and \[3\]"):
        classifier_loss("plain", torch.zeros(2, 3), torch.tensor([0, 1, 2]))
