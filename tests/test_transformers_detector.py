"""`transformers:PATH` with random weights: transformers' own boxes, batches, frames, and refused folders."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.models.detectors import load_detector
from tests.devices import DEVICES
from tests.job_scripts import REPOSITORY
from tests.oracles import detections
from tests.test_torchvision_detectors import make_tiles

pytest.importorskip("transformers", reason="needs the extra transformers: pip install -e '.[transformers]'")

import transformers

from scalenet_ray.models.transformers_detector import TransformersDetector
from tests.transformers_models import KINDS, NAMES, SIDE, build, processor_of, save

MASKED = ("conditional_detr", "deformable_detr", "deformable_detr, two stages", "detr", "table-transformer")
SQUARE = ("d_fine", "rt_detr", "rt_detr_v2")


def loaded(folder: str, **settings: Any) -> Any:
    return load_detector(f"transformers:{folder}", **settings)


def exact(kind: str, **settings: Any) -> TransformersDetector:
    """A detector whose boxes do not depend on how a CPU rounds; pixels are still normalized in float32."""
    detector = TransformersDetector(build(kind), processor_of(kind), score_threshold=0.0, **settings)
    in_float64(detector.model)
    return detector


def in_float64(model: Any) -> Any:
    """The same network, computing in float64."""

    def widen(_module: Any, args: Any, inputs: dict[str, Any]) -> Any:
        return args, {**inputs, "pixel_values": inputs["pixel_values"].double()}

    model.double().register_forward_pre_hook(widen, with_kwargs=True)
    return model


def own_boxes(kind: str, pixels: list[np.ndarray], frames: list[tuple[int, int]], **settings: Any) -> list[Detections]:
    """What transformers itself finds on pictures, in frames of (height, width), clipped to the pictures."""
    model, processor = in_float64(build(kind)), processor_of(kind)
    with torch.inference_mode():
        inputs = processor(images=pixels, return_tensors="pt", **settings)
        given = {name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs}
        if kind not in MASKED:
            given.pop("pixel_mask", None)
        outputs = model(**given)
        found = processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=frames)
    clipped = []
    for picture, each in zip(pixels, found, strict=True):
        height, width = picture.shape[:2]
        boxes = each["boxes"].numpy().clip(0, [width, height, width, height])
        one = Detections(boxes, each["scores"].numpy(), each["labels"].numpy())
        clipped.append(one[one.areas > 0])
    return clipped


def assert_near(one: Detections, other: Detections) -> None:
    """Equal labels, boxes within 0.01 pixels and scores within 1e-5: normalized pixels are rounded to float32 twice."""
    assert one.labels.tolist() == other.labels.tolist()
    np.testing.assert_allclose(one.boxes, other.boxes, atol=0.01)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_transformers_own_on_a_tile_of_the_networks_size(kind: str, tmp_path: Path) -> None:
    (tile,) = make_tiles((SIDE, SIDE))
    (wanted,) = own_boxes(kind, [tile], [(SIDE, SIDE)])
    detector = loaded(save(tmp_path, kind), score_threshold=0.0)
    in_float64(detector.model)
    (found,) = detections(detector([tile]))
    assert detector.input_side == SIDE
    assert len(found) > 8
    assert_near(found, wanted)


@pytest.mark.parametrize("kind", MASKED)
def test_a_padded_tile_is_what_transformers_pads_and_masks(kind: str) -> None:
    tiles = make_tiles((64, 96), (40, 80))
    wanted = own_boxes(kind, tiles, [tile.shape[:2] for tile in tiles], do_resize=False)
    for found, own in zip(detections(exact(kind)(tiles)), wanted, strict=True):
        assert len(found) > 8
        assert_near(found, own)


@pytest.mark.parametrize("kind", [*SQUARE, "yolos"])
def test_without_a_mask_a_padded_tile_is_a_picture_of_its_canvas(kind: str) -> None:
    (tile,) = make_tiles((60, 90))
    detector = exact(kind)
    canvas = detector.canvas_hw((60, 90))
    # Zeros after normalization: black, or the mean colour.
    colour = np.array(processor_of(kind).image_mean if kind == "yolos" else (0, 0, 0)) * 255
    picture = np.tile(colour, (*canvas, 1)).astype(np.float32)
    picture[:60, :90] = tile
    (own,) = own_boxes(kind, [picture], [canvas], do_resize=False, input_data_format="channels_last")
    (found,) = detections(detector([tile]))
    inside = np.clip(own.boxes, 0, [90, 60, 90, 60])
    shown = (inside[:, 2:] > inside[:, :2]).all(axis=1)
    assert shown.any()
    assert_near(found, Detections(inside, own.scores, own.labels)[shown])


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_one_canvas_are_one_call_and_equal_one_by_one(kind: str) -> None:
    detector = exact(kind)
    tiles = make_tiles((64, 64), (40, 64), (96, 96), (1, 1), (64, 33))
    alone = [detections(detector([tile]))[0] for tile in tiles]
    seen: list[int] = []
    detector.model.register_forward_pre_hook(
        lambda _module, _args, inputs: seen.append(len(inputs["pixel_values"])), with_kwargs=True
    )
    together = detections(detector(tiles))
    assert sum(seen) == 5
    assert len(seen) < 5
    assert sum(map(len, alone)) > 8
    for one, other in zip(alone, together, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_finds_on_a_gpu_what_it_finds_on_the_cpu(kind: str, device: str) -> None:
    tiles = make_tiles((SIDE, SIDE), (40, 64))
    expected, found = (detections(exact(kind, device=where)(tiles)) for where in ("cpu", device))
    assert sum(map(len, expected)) > 8
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)


def test_canvases_are_rectangles_but_for_squares_of_the_size_of_the_training() -> None:
    detr, square = (TransformersDetector(build(kind), processor_of(kind)) for kind in ("detr", "rt_detr"))
    sizes = ((64, 20), (1, 64), (200, 150))
    assert [detr.canvas_hw(hw) for hw in sizes] == [(64, 32), (32, 64), (224, 160)]
    assert [square.canvas_hw(hw) for hw in sizes] == [(96, 96), (96, 96), (224, 224)]


def test_a_two_stage_models_canvas_has_a_cell_for_each_of_its_boxes() -> None:
    model = build("deformable_detr, two stages", two_stage_num_proposals=300, num_queries=300)
    detector = TransformersDetector(model, processor_of("deformable_detr"))
    assert detector.canvas_hw((8, 8)) == (160, 160)
    (found,) = detections(detector(make_tiles((8, 8))))
    assert len(found)


def test_anchors_of_a_fixed_size_are_computed_for_each_canvas(tmp_path: Path) -> None:
    folder = save(tmp_path, "rt_detr", anchor_image_size=[SIDE, SIDE])
    (found,) = detections(loaded(folder)(make_tiles((SIDE + 32, SIDE))))
    assert len(found)


def test_a_tile_with_nan_fails_alone() -> None:
    detector = TransformersDetector(build("detr"), processor_of("detr"))

    def poison(_module: Any, _args: Any, output: Any) -> None:
        output.pred_boxes[1] = float("nan")

    detector.model.register_forward_hook(poison)
    good, bad = detector(make_tiles((64, 64), (64, 60)))
    assert isinstance(good, Detections)
    assert isinstance(bad, TileError)
    assert "NaN or infinite" in bad.reason


def test_names_and_thresholds_are_the_models_and_the_users(tmp_path: Path) -> None:
    tiles = make_tiles((SIDE, SIDE))
    (all_,) = detections(loaded(save(tmp_path, "detr"), score_threshold=0.0)(tiles))
    middle = float(np.sort(all_.scores)[[9, 10]].mean())
    detector = loaded(str(tmp_path), score_threshold=middle, iou_threshold=0.4)
    (found,) = detections(detector(tiles))
    assert detector.categories == NAMES
    assert detector.iou_threshold == 0.4
    assert len(found) == len(all_) - 10


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_computes_in_bfloat16_and_answers_in_float32(kind: str) -> None:
    detector = TransformersDetector(build(kind), processor_of(kind), score_threshold=0.0, mixed_precision=True)
    seen: set[torch.dtype] = set()
    for module in detector.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    (found,) = detections(detector(make_tiles((64, 64))))
    assert torch.bfloat16 in seen
    assert found.boxes.dtype == found.scores.dtype == np.float32


def boxes_of_quiet_network(kind: str, *, mixed_precision: bool) -> torch.Tensor:
    """All boxes [queries, 4] xyxy, in shares of a tile, of a network in which features hardly move boxes."""
    model = build(kind)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            torch.nn.init.xavier_normal_(module.weight, gain=1.0 if isinstance(module, torch.nn.Conv2d) else 0.3)
            if len(module.weight) == 4 and module.bias is not None:
                torch.nn.init.normal_(module.bias)
    model = TransformersDetector(model, processor_of(kind), mixed_precision=mixed_precision).model
    pixels = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)) - 0.5
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
        boxes = model(pixel_values=pixels).pred_boxes[0].float()
    centres, halves = boxes[:, :2], boxes[:, 2:] / 2
    return torch.cat([centres - halves, centres + halves], dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_computed_in_float32_under_mixed_precision(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.Tensor] = []
    topk = torch.topk

    def the_same_again(values: torch.Tensor, count: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Which cells become boxes is a matter of scores, which nearly tie.
        chosen.append(chosen[-1] if chosen else topk(values, count, dim).indices)
        return values.gather(dim, chosen[-1]), chosen[-1]

    monkeypatch.setattr(torch, "topk", the_same_again)
    plain, mixed = (boxes_of_quiet_network(kind, mixed_precision=each) for each in (False, True))
    assert plain.std() > 0.01
    # 0.4 pixels of 640: in bfloat16 shares over a half are multiples of 1/256.
    assert (mixed - plain).abs().max() < 0.4 / 640


def test_a_folder_in_s3_is_loaded(tmp_path: Path, s3_bucket: str) -> None:
    from scalenet_ray.data.storage import write_bytes_atomic

    for file in Path(save(tmp_path, "detr")).iterdir():
        write_bytes_atomic(f"{s3_bucket}/net/{file.name}", file.read_bytes())
    assert loaded(f"{s3_bucket}/net").categories == NAMES


_LOADED = """
import sys
import transformers
from scalenet_ray.models.detectors import load_detector
log = transformers.utils.logging
log.set_verbosity_info()
load_detector(f"transformers:{sys.argv[1]}")
assert (log.get_verbosity(), log.is_progress_bar_enabled()) == (log.INFO, True)
"""


def test_transformers_prints_nothing_while_it_loads_and_keeps_the_users_settings(tmp_path: Path) -> None:
    save(tmp_path, "detr")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "left.over": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # In a process of its own: the stream of transformers' log is the first that it sees.
    command = [sys.executable, "-c", _LOADED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=240, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- what is refused -----------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        loaded(str(folder))
    return str(error.value)


def edit(folder: Path, name: str, **entries: Any) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", "must hold a detector that transformers .* loads, .*config.json"),
        ("preprocessor_config.json", "must be a folder of save_pretrained with a model, its weights and its image"),
        ("model.safetensors", "must be a folder of save_pretrained with a model, its weights and its image processor"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused(tmp_path: Path, name: str, said: str) -> None:
    save(tmp_path, "detr")
    (tmp_path / name).unlink()
    assert re.search(f"^{tmp_path} {said}", refusal(tmp_path))


def test_names_that_are_not_those_of_the_classes_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "detr")
    edit(tmp_path, "config.json", id2label={str(index): str(index) for index in range(7)})
    said = refusal(tmp_path)
    assert "must hold weights that fit its configuration, got 2 tensors of another shape, such as class_labels" in said
    assert ".bias, [4] and not [8]: name as many classes in its id2label as it has" in said


def test_weights_that_lack_tensors_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "detr")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bbox_predictor.layers.0.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "got 1 tensors too few, such as bbox_predictor.layers.0.weight: install the version" in refusal(tmp_path)


def test_a_type_of_model_that_this_version_does_not_know_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "detr")
    edit(tmp_path, "config.json", model_type="later_detr")
    assert f"must hold a detector that transformers {transformers.__version__} loads" in refusal(tmp_path)


def test_a_model_of_another_task_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "detr")
    transformers.ViTConfig().save_pretrained(tmp_path)
    assert "must hold a detector of transformers, got a vit: use one for object detection" in refusal(tmp_path)


def test_a_detector_of_an_untried_type_is_refused(tmp_path: Path) -> None:
    model = build("detr")
    model.config.model_type = "rf_detr"
    with pytest.raises(UserError, match=r"must be of type conditional_detr, .*, got rf_detr: write a class around it"):
        TransformersDetector(model, processor_of("detr"))


def test_a_model_that_is_nowhere_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere/detr"):
        loaded("./nowhere/detr")

    def unreachable(*_args: Any, **_settings: Any) -> None:
        raise OSError("We couldn't connect")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ConnectionError, match=r"the model nowhere/detr is no folder here, and .*couldn't connect"):
        loaded("nowhere/detr")
