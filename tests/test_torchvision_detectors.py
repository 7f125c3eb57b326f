"""torchvision's detectors on tiles, with random weights: sizes, frames, batches, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import nn

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.models.class_names import COCO_CATEGORIES
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.torch_detector import tensors_in
from scalenet_ray.models.torchvision_builders import build_detector, detector_names, norm_eps
from scalenet_ray.models.torchvision_detectors import TorchvisionDetector, save_detector
from scalenet_ray.models.weights import load_weights, save_weights
from tests.float64 import in_float64
from tests.oracles import detections

SMALL_RCNN, SMALL_SSD = "fasterrcnn_mobilenet_v3_large_fpn", "ssdlite320_mobilenet_v3_large"
CATEGORIES = {1: "cat", 2: "dog"}
TWINS = {name for name in detector_names() if name.endswith(("_v2", "320_fpn"))}
"""Networks that differ from another one in their weights' training or their head alone."""


def lively_model(name: str) -> Any:
    """A detector with random weights, the same each time, whose answers depend on what it sees; evaluation mode.

    Fresh batch norms would pass next to nothing on: theirs are set by a batch of noise.
    """
    torch.manual_seed(0)
    model: Any = build_detector(name, 3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # type: ignore[assignment]
    side = 320 if name == SMALL_SSD else 64
    with torch.no_grad():
        features = model.backbone(torch.randn(4, 3, side, side))
        if name == SMALL_SSD:
            model.head(list(features.values()))
        else:
            # Sane boxes, and scores well within float32's noise.
            model.roi_heads.box_predictor.bbox_pred.weight *= 0.1
            model.roi_heads.box_predictor.cls_score.weight *= 0.2
            model.roi_heads.detections_per_img = 8
    return model.eval()


def exact(model: Any) -> Any:
    """A detector whose boxes do not depend on how a CPU rounds; images are still normalised in float32."""
    return in_float64(model, "backbone")


def make_tiles(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """Tiles of (height, width), of random coloured blocks."""
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3)) for height, width in sizes]
    large = [block.repeat(8, 0).repeat(8, 1).astype(np.uint8) for block in blocks]
    return [tile[:height, :width] for tile, (height, width) in zip(large, sizes, strict=True)]


def inputs_seen(model: nn.Module) -> list[torch.Tensor]:
    """What the backbone is given from now on."""
    seen: list[torch.Tensor] = []
    model.get_submodule("backbone").register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    return seen


def assert_same(one: Detections, other: Detections) -> None:
    """Equal but for the rounding to float32 of what was computed in float64: an ulp, at most 1.2e-7 of a value."""
    assert one.labels.tolist() == other.labels.tolist()
    np.testing.assert_allclose(one.boxes, other.boxes, rtol=2.4e-7, atol=1e-9)
    np.testing.assert_allclose(one.scores, other.scores, rtol=2.4e-7)
    assert one.masks == other.masks


@pytest.mark.parametrize("name", sorted({*detector_names()} - TWINS))
def test_every_network_sees_tiles_at_their_own_size_in_one_batch(name: str) -> None:
    detector = TorchvisionDetector(build_detector(name, 3), CATEGORIES, score_threshold=0.99)
    side = 320 if name.startswith("ssd") else 64
    seen = inputs_seen(detector.model)
    tiles = make_tiles((side, 40), (side - 31, side))
    found = detections(detector(tiles))
    assert [tuple(batch.shape) for batch in seen] == [(2, 3, side, side)]
    assert detector.canvas_hw((side, 40)) == (side, side)
    assert len(found) == 2
    mean, deviation = (
        np.array(values, np.float32)
        for values in (detector.model.transform.image_mean, detector.model.transform.image_std)
    )
    batch = seen[0].permute(0, 2, 3, 1).numpy() * deviation + mean
    np.testing.assert_allclose(batch[0, :, :40], tiles[0] / 255, atol=1e-5)
    np.testing.assert_allclose(batch[1, :-31], tiles[1] / 255, atol=1e-5)
    np.testing.assert_allclose(batch[1, -31:], np.broadcast_to(mean, batch[1, -31:].shape), atol=1e-5)


def test_canvases_are_rectangles_but_for_an_ssd_which_has_squares() -> None:
    rcnn, ssd = (TorchvisionDetector(build_detector(name, 3), CATEGORIES) for name in (SMALL_RCNN, SMALL_SSD))
    sizes = ((64, 20), (1, 64), (400, 300))
    assert [rcnn.canvas_hw(hw) for hw in sizes] == [(64, 32), (32, 64), (416, 320)]
    assert [ssd.canvas_hw(hw) for hw in sizes] == [(320, 320), (320, 320), (416, 416)]


@pytest.mark.parametrize(("name", "side"), [(SMALL_RCNN, 64), (SMALL_SSD, 320)])
def test_boxes_are_torchvisions_own_where_its_resizing_does_nothing(name: str, side: int) -> None:
    model, (tile,) = exact(lively_model(name)), make_tiles((side, side))
    model.transform.min_size, model.transform.max_size = (side,), side
    with torch.inference_mode():
        expected = model([torch.from_numpy(tile.transpose(2, 0, 1).copy()) / 255])[0]
    own = Detections(**{key: values[expected["scores"] > 0.05].numpy() for key, values in expected.items()})
    detector = TorchvisionDetector(exact(lively_model(name)), CATEGORIES, score_threshold=0.05)
    (found,) = detections(detector([tile]))
    assert len(own) > 1
    assert_same(found, own)


def test_boxes_stay_inside_their_tile_and_not_only_its_canvas() -> None:
    detector = TorchvisionDetector(lively_model(SMALL_RCNN), CATEGORIES)
    for found, (height, width) in zip(
        detections(detector(make_tiles((40, 64), (64, 20)))), [(40, 64), (64, 20)], strict=True
    ):
        assert len(found)
        assert found.boxes.min() >= 0
        assert (found.boxes <= [width, height, width, height]).all()


def test_an_ssds_default_boxes_keep_their_size_in_pixels_on_a_larger_canvas() -> None:
    detector = TorchvisionDetector(lively_model(SMALL_SSD), CATEGORIES)
    sizes: list[list[float]] = []

    def note(_module: nn.Module, _inputs: Any, boxes: list[torch.Tensor]) -> None:
        sizes.append(sorted({round(float(side), 1) for side in (boxes[0][:, 2:] - boxes[0][:, :2]).flatten()}))

    detector.model.anchor_generator.register_forward_hook(note)
    detector(make_tiles((320, 320)))
    detector(make_tiles((400, 300)))
    assert detector.canvas_hw((400, 300)) == (416, 416)
    assert detector.canvas_hw((10, 10)) == (320, 320)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", [SMALL_RCNN, SMALL_SSD])
def test_tiles_of_one_canvas_are_one_call_and_equal_one_by_one(name: str) -> None:
    detector = TorchvisionDetector(exact(lively_model(name)), CATEGORIES)
    sizes = [(64, 64), (40, 64), (32, 32), (1, 1), (64, 33)]
    tiles = make_tiles(*sizes)
    alone = [detections(detector([tile]))[0] for tile in tiles]
    seen = inputs_seen(detector.model)
    together = detections(detector(tiles))
    assert [len(batch) for batch in seen] == ([5] if name == SMALL_SSD else [3, 2])
    assert sum(map(len, alone)) > 8
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other)


def test_no_tile_gives_nothing() -> None:
    assert TorchvisionDetector(lively_model(SMALL_SSD), CATEGORIES)([]) == []


def test_arrays_that_may_not_be_written_are_taken() -> None:
    (tile,) = make_tiles((32, 32))
    tile.flags.writeable = False
    assert len(TorchvisionDetector(lively_model(SMALL_RCNN), CATEGORIES)([tile])) == 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_masks_are_run_lengths_on_the_tile_inside_their_boxes() -> None:
    model = lively_model("maskrcnn_resnet50_fpn")
    # Masks that are full wherever they are looked at.
    nn.init.zeros_(model.roi_heads.mask_predictor.mask_fcn_logits.weight)
    nn.init.ones_(model.roi_heads.mask_predictor.mask_fcn_logits.bias)
    (found,) = detections(TorchvisionDetector(model, CATEGORIES)(make_tiles((40, 64))))
    assert found.masks is not None
    assert len(found.masks) == len(found) > 0
    for counts, box in zip(found.masks, found.boxes, strict=True):
        assert isinstance(counts, bytes)
        mask = coco_mask.decode({"size": [40, 64], "counts": counts})
        rows, columns = np.nonzero(mask)
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(extent, box, atol=2.0)


def test_a_detector_without_masks_gives_none() -> None:
    (found,) = detections(TorchvisionDetector(lively_model(SMALL_SSD), CATEGORIES)(make_tiles((32, 32))))
    assert found.masks is None


def break_second_tile(module: nn.Module, rows_of_second: Any) -> None:
    """Make NaN of all that `module` answers for the second tile of a batch."""

    def poison(_module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in output.values() if isinstance(output, dict) else [output]:
            tensor[rows_of_second(inputs)] = torch.nan

    module.register_forward_hook(poison)


def _second(_inputs: Any) -> slice:
    return slice(1, 2)


def _regions_of_second(inputs: Any) -> slice:
    before, regions = len(inputs[1][0]), len(inputs[1][1])
    return slice(before, before + regions)


@pytest.mark.parametrize(
    ("name", "module", "rows"),
    [
        (SMALL_SSD, "backbone", _second),
        (SMALL_RCNN, "backbone", _second),
        (SMALL_RCNN, "roi_heads.box_roi_pool", _regions_of_second),
        ("maskrcnn_resnet50_fpn", "roi_heads.mask_roi_pool", _regions_of_second),
    ],
)
def test_a_network_that_breaks_on_a_tile_costs_that_tile_alone(name: str, module: str, rows: Any) -> None:
    tiles = make_tiles((64, 64), (60, 64), (64, 64))
    detector = TorchvisionDetector(exact(lively_model(name)), CATEGORIES)
    first, _, third = detections(detector(tiles))
    break_second_tile(detector.model.get_submodule(module), rows)
    found = detector(tiles)
    assert isinstance(found[1], TileError)
    assert "NaN or infinite: check its weights and precision" in found[1].reason
    kept = detections([found[0], found[2]])
    assert_same(kept[0], first)
    assert_same(kept[1], third)


def test_thresholds_are_the_models_own_unless_given() -> None:
    tiles = make_tiles((64, 64))
    own = TorchvisionDetector(exact(lively_model(SMALL_SSD)), CATEGORIES)
    assert own.iou_threshold == 0.55
    assert TorchvisionDetector(lively_model(SMALL_RCNN), CATEGORIES).iou_threshold == 0.5
    (found,) = detections(own(tiles))
    ranked = np.sort(found.scores)
    gap = np.diff(ranked).argmax()
    middle = float(ranked[gap : gap + 2].mean())
    sure = TorchvisionDetector(exact(lively_model(SMALL_SSD)), CATEGORIES, score_threshold=middle)
    assert detections(sure(tiles))[0].scores.tolist() == found.scores[found.scores > middle].tolist()
    apart = TorchvisionDetector(exact(lively_model(SMALL_SSD)), CATEGORIES, iou_threshold=0.05)
    assert apart.iou_threshold == 0.05
    assert len(detections(apart(tiles))[0]) < len(found)


def test_boxes_of_classes_without_a_name_are_dropped() -> None:
    tiles = make_tiles((64, 64))
    (found,) = detections(TorchvisionDetector(lively_model(SMALL_SSD), CATEGORIES)(tiles))
    (dogs,) = detections(TorchvisionDetector(lively_model(SMALL_SSD), {2: "dog"})(tiles))
    assert set(found.labels.tolist()) == {1, 2}
    assert dogs.boxes.tolist() == found.boxes[found.labels == 2].tolist()


@pytest.mark.parametrize(
    ("name", "side"), [("fasterrcnn_resnet50_fpn", 800), ("fasterrcnn_resnet101", 800), (SMALL_SSD, 320)]
)
def test_the_whole_image_is_looked_at_at_the_size_torchvision_would_take(name: str, side: int) -> None:
    assert TorchvisionDetector(build_detector(name, 3), CATEGORIES).input_side == side


@pytest.mark.parametrize("name", [SMALL_RCNN, SMALL_SSD])
def test_a_saved_detector_says_all_of_itself_and_finds_the_same(tmp_path: Path, name: str) -> None:
    path, tiles = str(tmp_path / "mine.safetensors"), make_tiles((64, 64))
    model = lively_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.05
    save_detector(model, name, CATEGORIES, path)
    expected = detections(TorchvisionDetector(model, CATEGORIES)(tiles))[0]
    for spec in (f"torchvision:{path}", f"torchvision:{name}@{path}"):
        loaded = load_detector(spec)
        assert loaded.categories == CATEGORIES
        (found,) = detections(loaded(tiles))
        assert_same(found[np.arange(len(expected))], expected)


def test_saving_what_could_not_be_loaded_is_refused(tmp_path: Path) -> None:
    path, model = str(tmp_path / "mine.safetensors"), build_detector(SMALL_SSD, 3)
    with pytest.raises(ValueError, match=f"the model must be a {SMALL_RCNN}, but they differ in"):
        save_detector(model, SMALL_RCNN, CATEGORIES, path)
    for categories, got in (({3: "cow"}, r"\[3\]"), ({0: "background"}, r"\[0\]"), ({}, "none at all")):
        with pytest.raises(ValueError, match=rf"category ids must be in 1\.\.2, the model's classes, got {got}"):
            save_detector(model, SMALL_SSD, categories, path)
    assert not list(tmp_path.iterdir())


def test_a_state_dict_of_coco_needs_its_name_alone(tmp_path: Path) -> None:
    torch.save(build_detector(SMALL_SSD, 91).state_dict(), tmp_path / "net.pth")
    assert load_detector(f"torchvision:{SMALL_SSD}@{tmp_path}/net.pth").categories == COCO_CATEGORIES
    with pytest.raises(ValueError, match=r"net\.pth doesn't say which detector it is: name it as torchvision:NAME@"):
        load_detector(f"torchvision:{tmp_path}/net.pth")


def test_torchvisions_own_files_are_known_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
    torch.save(build_detector("fasterrcnn_resnet50_fpn", 91).state_dict(), path)
    detector: Any = load_detector(f"torchvision:{path}")
    # What torchvision's own loading sets for these weights.
    assert set(norm_eps(detector.model).values()) == {0.0}


def test_weights_of_another_detector_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "net.safetensors")
    save_detector(build_detector(SMALL_SSD, 3), SMALL_SSD, CATEGORIES, path)
    with pytest.raises(ValueError, match=f"must hold a {SMALL_RCNN}, got a {SMALL_SSD}: load it as torchvision:"):
        load_detector(f"torchvision:{SMALL_RCNN}@{path}")
    tensors, metadata = load_weights(path)
    save_weights(tensors, {**metadata, "num_classes": "4"}, path)
    with pytest.raises(ValueError, match=f"are not those of a {SMALL_SSD} with 4 classes"):
        load_detector(f"torchvision:{path}")


@pytest.mark.parametrize("spec", ["torchvision:yolo", "torchvision:keypointrcnn_resnet50_fpn", "torchvision:yolo@{}"])
def test_an_unknown_name_is_told_the_known_ones(tmp_path: Path, spec: str) -> None:
    torch.save({}, tmp_path / "net.pth")
    known = "must be one of fasterrcnn_mobilenet_v3_large_320_fpn, .*maskrcnn_resnet101_fpn.*, got"
    with pytest.raises(ValueError, match=known):
        load_detector(spec.format(tmp_path / "net.pth"))


def test_weights_that_torchvision_lacks_must_be_given() -> None:
    with pytest.raises(ValueError, match="torchvision has no weights for fasterrcnn_resnet101: give a file, as"):
        load_detector("torchvision:fasterrcnn_resnet101")


def test_without_a_network_a_path_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_args: Any, **_settings: Any) -> None:
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(ConnectionError, match=f"can't fetch .* without a network, use torchvision:{SMALL_SSD}@PATH"):
        load_detector(f"torchvision:{SMALL_SSD}")


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_torch_lacks_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"device .*{device}"):
        TorchvisionDetector(build_detector(SMALL_SSD, 3), CATEGORIES, device=device)


@pytest.mark.parametrize("name", [SMALL_RCNN, SMALL_SSD])
def test_in_mixed_precision_anchors_and_boxes_are_computed_in_float32(name: str) -> None:
    anchors: dict[bool, torch.Tensor] = {}
    dtypes: set[torch.dtype] = set()
    for mixed in (False, True):
        torch.manual_seed(0)
        detector = TorchvisionDetector(build_detector(name, 3), CATEGORIES, mixed_precision=mixed)
        model = detector.model
        stage, head = (model.rpn, model.roi_heads.box_predictor) if hasattr(model, "rpn") else (model, model.head)
        stage.anchor_generator.register_forward_hook(
            lambda _module, _inputs, output, at=mixed: anchors.update({at: output[0]})
        )
        head.register_forward_hook(
            lambda _module, _inputs, output: dtypes.update(each.dtype for each in tensors_in(output))
        )
        detector(make_tiles((200, 620)))
    assert anchors[False].max() > 512
    assert torch.equal(anchors[True], anchors[False])
    assert dtypes == {torch.float32}
