"""Scale Net: networks, checkpoints and the predictor."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.geometry import Tile, Window
from scalenet_ray.core.policy import parse_policy
from scalenet_ray.core.scale import ScaleMap
from scalenet_ray.models.scale_net import build_scale_net, load_scale_net, normalised, save_scale_net
from scalenet_ray.models.scale_networks import PRESETS, ScaleNetConfig, load_predictor, squashed
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET_WEIGHTS, NetworkSpec
from scalenet_ray.models.weights import save_weights
from scalenet_ray.sample.scenes import SAMPLE_CATEGORIES, make_scene
from scalenet_ray.training.scale_recipe import load_encoder_weights
from tests.float64 import in_float64

LIGHT = replace(PRESETS["unet-light"], input_side=64)


def _tiles(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*hw, 3), dtype=np.uint8) for hw in sizes]


def _input(pixels: list[np.ndarray], config: ScaleNetConfig) -> torch.Tensor:
    return normalised(torch.from_numpy(np.stack([squashed(tile, config) for tile in pixels])), config)


def _recipes(pixels: list[np.ndarray]) -> list[Tile]:
    return [Tile(i, (), p.shape[:2], Window(0, 0, p.shape[1], p.shape[0]), *p.shape[:2]) for i, p in enumerate(pixels)]


def _look(predictor: Any, pixels: list[np.ndarray]) -> list[ScaleMap | TileError]:
    return predictor(pixels, _recipes(pixels))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_scale_net(build_scale_net(LIGHT), LIGHT, tmp_path / "light.safetensors")
    return tmp_path / "light.safetensors"


@pytest.mark.parametrize(
    ("preset", "side", "wanted"), [("unet-light", 64, 16), ("unet-lite0", 64, 16), ("unet-vgg16", 32, 32)]
)
def test_class_nets_answer_with_six_classes_on_their_grid(preset: str, side: int, wanted: int) -> None:
    config = replace(PRESETS[preset], input_side=side)
    with torch.inference_mode():
        logits = build_scale_net(config).eval()(_input(_tiles((40, 60)), config))
    assert logits.shape == (1, 6, wanted, wanted)
    assert config.output_hw == (wanted, wanted)


def test_the_papers_networks_are_the_papers() -> None:
    assert PRESETS["unet-vgg16"].encoder == "vgg16"
    assert PRESETS["unet-vgg16"].output_hw == (512, 512)
    convolutions = [m for m in build_scale_net(PRESETS["fcn-digits"]).modules() if isinstance(m, torch.nn.Conv2d)]
    # Table 1.
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in convolutions] == [
        (1, 16, (7, 7)),
        (16, 32, (7, 7)),
        (32, 1, (5, 5)),
    ]


def test_the_digits_net_takes_tiles_of_any_size_and_starts_alive(tmp_path: Path) -> None:
    config = PRESETS["fcn-digits"]
    save_scale_net(build_scale_net(config), config, tmp_path / "fcn.safetensors")
    predictor = load_predictor(tmp_path / "fcn.safetensors")
    maps = _look(predictor, _tiles((28, 28), (14, 20), (28, 28)))
    assert [m.hw for m in maps if isinstance(m, ScaleMap)] == [(28, 28), (14, 20), (28, 28)]
    assert all(isinstance(m, ScaleMap) and m.scale is not None and (m.scale > 0).mean() > 0.5 for m in maps)
    assert predictor.input_pixels == 0


def test_a_checkpoint_carries_its_configuration_and_weights(checkpoint: Path) -> None:
    torch.manual_seed(0)
    wanted = build_scale_net(LIGHT).state_dict()
    model, config = load_scale_net(checkpoint)
    assert config == LIGHT
    assert not model.training
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_a_batch_gives_what_tiles_give_one_by_one(checkpoint: Path) -> None:
    predictor = load_predictor(checkpoint)
    in_float64(predictor.model, "model")
    pixels = _tiles((64, 64), (30, 64), (90, 41))
    together = _look(predictor, pixels)
    for tile, found in zip(pixels, together, strict=True):
        (alone,) = _look(predictor, [tile])
        assert isinstance(found, ScaleMap)
        assert isinstance(alone, ScaleMap)
        # An ulp of float32, to which the answers are rounded, is at most 1.2e-7 of a value.
        np.testing.assert_allclose(found.prob, alone.prob, rtol=2.4e-7)
    assert predictor.input_pixels == 64 * 64


def test_probabilities_sum_to_one(checkpoint: Path) -> None:
    (found,) = _look(load_predictor(checkpoint), _tiles((50, 50)))
    assert isinstance(found, ScaleMap)
    assert found.prob is not None
    np.testing.assert_allclose(found.prob.sum(axis=0), 1.0, atol=1e-5)


def test_no_tiles_give_no_maps(checkpoint: Path) -> None:
    assert _look(load_predictor(checkpoint), []) == []


def test_a_tile_that_comes_out_as_nan_costs_that_tile_alone(checkpoint: Path) -> None:
    predictor = load_predictor(checkpoint)

    class BreaksOnSecond(torch.nn.Module):
        def __init__(self, net: torch.nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = self.net(images)
            logits[1, 0, 0, 0] = torch.nan
            return logits

    predictor.model = BreaksOnSecond(predictor.model)
    first, second, third = _look(predictor, _tiles((64, 64), (64, 64), (64, 64)))
    assert isinstance(first, ScaleMap)
    assert isinstance(second, TileError)
    assert "NaN" in second.reason
    assert isinstance(third, ScaleMap)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "fcn"}, "do not fit the network that its own header describes"),
        ({"classes": 4}, "must have 6 classes, got 4"),
        ({"architecture": "vit"}, "architecture and kind must be of fcn"),
        ({"colour": "blue"}, "can't build"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    path = str(tmp_path / "other.safetensors")
    header = {"scale_net": json.dumps({**asdict(LIGHT), **changes})}
    save_weights(build_scale_net(LIGHT).state_dict(), header, path)
    with pytest.raises(ValueError, match=message):
        load_scale_net(path)


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "detector.safetensors")
    save_weights({"w": torch.zeros(2)}, {"detector": "{}"}, path)
    with pytest.raises(ValueError, match=r"must have 'scale_net' in its header, got \['detector'\]"):
        load_scale_net(path)


@pytest.mark.parametrize("side", [None, 100])
def test_a_side_that_a_u_net_cannot_halve_five_times_is_refused(side: int | None) -> None:
    with pytest.raises(ValueError, match=f"must be a multiple of 32, got {side}"):
        replace(LIGHT, input_side=side)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_an_encoder_starts_from_a_classifiers_weights(tmp_path: Path, ending: str) -> None:
    config = replace(PRESETS["unet-lite0"], input_side=64)
    source, target = build_scale_net(config), build_scale_net(config)
    weights = source.get_submodule("encoder.model").state_dict() | {"classifier.weight": torch.zeros(1000, 2)}
    path = str(tmp_path / f"lite0.{ending}")
    if ending == "pth":
        torch.save(weights, path)
    else:
        save_weights(weights, {}, path)
    decoder = target.get_submodule("decoder").state_dict()["0.0.weight"].clone()
    load_encoder_weights(target, config.encoder, path)
    got = target.get_submodule("encoder.model").state_dict()
    assert all(torch.equal(got[name], value) for name, value in weights.items() if name in got)
    assert torch.equal(target.get_submodule("decoder").state_dict()["0.0.weight"], decoder)


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "vgg.safetensors")
    save_weights({"features.0.weight": torch.zeros(64, 3, 3, 3)}, {}, path)
    model = build_scale_net(replace(PRESETS["unet-lite0"], input_side=64))
    with pytest.raises(ValueError, match=r"lacks \d+ of the encoder's \d+ weights .* e\.g\. conv_stem\.weight"):
        load_encoder_weights(model, "tu-tf_efficientnet_lite0", path)


def test_grey_input_is_one_channel_of_zero_to_one() -> None:
    config = ScaleNetConfig("grey", "fcn", "regression", input_side=None, in_channels=1)
    images = _input([np.full((8, 8, 3), 255, np.uint8)], config)
    assert images.shape == (1, 1, 8, 8)
    torch.testing.assert_close(images, torch.ones(1, 1, 8, 8))
    tiles = _tiles((8, 8))
    by_pillow = np.asarray(Image.fromarray(tiles[0]).convert("L"), np.float32) / 255
    np.testing.assert_allclose(_input(tiles, config)[0, 0].numpy(), by_pillow, atol=1.01 / 255)


def test_colours_lose_imagenets_mean_and_deviation() -> None:
    tile = np.array([124, 116, 104], np.uint8) * np.ones((64, 64, 1), np.uint8)
    images = _input([tile], LIGHT)
    assert images.shape == (1, 3, 64, 64)
    # ImageNet's mean colour is 123.7, 116.3, 103.5.
    assert images.abs().max() < 0.01
    red = _input([tile + np.array([58, 0, 0], np.uint8)], LIGHT)
    # And the deviation of its reds 58.4.
    torch.testing.assert_close(red[0, :, 0, 0] - images[0, :, 0, 0], torch.tensor([58 / 58.395, 0.0, 0.0]))


def test_tiles_are_squashed_to_the_nets_square_or_taken_as_they_are() -> None:
    (tile,) = _tiles((40, 60))
    assert squashed(tile, LIGHT).shape == (64, 64, 3)
    assert squashed(tile, LIGHT).dtype == np.uint8
    assert squashed(tile, PRESETS["fcn-digits"]) is tile


def test_the_shipped_net_tells_small_objects_from_background() -> None:
    predictor = load_predictor(SAMPLE_SCALE_NET_WEIGHTS)
    on_small, on_background = [], []
    for seed in range(6):
        scene = make_scene(np.random.default_rng([99, seed]))
        (found,) = _look(predictor, [scene.pixels])
        assert isinstance(found, ScaleMap)
        assert found.prob is not None
        height, width = scene.masks.shape[1:]
        h, w = found.hw
        for mask in scene.masks:
            if 12**2 < mask.sum() < 20**2:
                y, x = np.argwhere(mask).mean(axis=0)
                on_small.append(found.prob[1, int(y * h / height), int(x * w / width)])
        background = ~scene.masks.any(axis=0)[:: height // h, :: width // w][:h, :w]
        on_background.append(found.prob[1][: background.shape[0], : background.shape[1]][background].mean())
    assert np.mean(on_small) > 0.4
    assert np.mean(on_background) < 0.1


def test_a_net_that_pads_its_input_says_the_same_of_an_object_in_a_wider_black_border() -> None:
    config = ScaleNetConfig("fcn-digits", "fcn", "regression", None, 1, padding="input")
    net = in_float64(build_scale_net(config).eval())
    picture = np.random.default_rng(0).integers(1, 255, (1, 6, 6, 3), np.uint8)
    narrow, wide = (np.pad(picture, ((0, 0), (m, m), (m, m), (0, 0))) for m in (1, 7))
    with torch.inference_mode():
        seen = net(normalised(torch.from_numpy(narrow), config))[0, 1:7, 1:7]
        seen_in_wide = net(normalised(torch.from_numpy(wide), config))[0, 7:13, 7:13]
    torch.testing.assert_close(seen, seen_in_wide)


def test_a_regression_is_refused_by_a_policy_that_reads_classes(tmp_path: Path) -> None:
    path, config = tmp_path / "net.safetensors", PRESETS["fcn-digits"]
    save_scale_net(build_scale_net(config), config, path)
    networks = NetworkSpec(SAMPLE_DETECTOR, str(path))
    networks.check([parse_policy("scalenet", input_side=192, iou_threshold=0.6)], dict(SAMPLE_CATEGORIES))
    policy = parse_policy("regions-scalenet", input_side=192, iou_threshold=0.6)
    message = f"policy regions-scalenet plans regions from class maps, got {path} with regression maps: give another"
    with pytest.raises(UserError, match=message):
        networks.check([policy], dict(SAMPLE_CATEGORIES))
