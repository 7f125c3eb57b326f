"""Training Scale Net: examples, targets, steps, measures, and the job."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from scalenet_ray.core.coco import Objects
from scalenet_ray.core.samples import write_sample
from scalenet_ray.core.scale import IGNORE
from scalenet_ray.core.window import Window
from scalenet_ray.models.scale_net import PRESETS, build_scale_net, load_scale_net
from scalenet_ray.models.training import (
    Batch,
    ScaleDataset,
    batches,
    evaluate,
    read_examples,
    read_pixels,
    scale_net_loss,
    train,
    train_step,
    window_target,
)
from tests.job_scripts import load_job

LIGHT = replace(PRESETS["unet-light"], input_side=64)
WHOLE = Window(0, 0, 64, 64)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("sample") / "sample", train=8, val=2)


@pytest.fixture
def dataset(sample: Path) -> ScaleDataset:
    return ScaleDataset(read_examples(str(sample), "train2017"), LIGHT, augment=True)


def _objects(*boxes: tuple[int, int, int, int], crowd: bool = False, segmentations: tuple | None = None) -> Objects:
    array = np.array(boxes, np.float32).reshape(-1, 4)
    areas = np.prod(array[:, 2:] - array[:, :2], axis=1).astype(np.float64)
    count = len(array)
    return Objects(array, areas, np.ones(count, np.int64), np.full(count, crowd), segmentations or (None,) * count)


def test_a_box_stands_in_where_there_is_no_polygon() -> None:
    # 16 x 16 of 64 x 64 pixels are 16,384 of 512 x 512: class 2.
    target = window_target(_objects((16, 32, 32, 48)), (64, 64), WHOLE, (16, 16))
    wanted = np.zeros((16, 16), np.uint8)
    wanted[8:12, 4:8] = 2
    np.testing.assert_array_equal(target, wanted)


def test_polygons_and_run_lengths_give_the_same_target() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[32:48, 16:32] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    by_text = {"size": [64, 64], "counts": rle["counts"].decode("ascii")}
    by_list = {"size": [64, 64], "counts": [16 * 64 + 32, *([16, 48] * 15), 16, 64 * 32 + 16]}
    polygon = [[16, 32, 32, 32, 32, 48, 16, 48]]
    box = (16, 32, 32, 48)
    targets = [
        window_target(_objects(box, segmentations=(form,)), (64, 64), WHOLE, (16, 16))
        for form in (polygon, by_text, by_list, None)
    ]
    assert targets[0].any()
    for target in targets[1:]:
        np.testing.assert_array_equal(target, targets[0])


def test_classes_are_those_of_the_windows_own_frame() -> None:
    # 4 x 4 of 64 x 64 pixels are 1,024 of 512 x 512, class 1; in a window of half the side 4,096, class 2.
    objects = _objects((40, 40, 44, 44))
    whole = window_target(objects, (64, 64), WHOLE, (16, 16))
    zoomed = window_target(objects, (64, 64), Window(32, 32, 64, 64), (16, 16))
    assert whole[10, 10] == 1
    assert (whole > 0).sum() == 1
    assert zoomed[4, 4] == 2
    assert (zoomed > 0).sum() == 4


def test_an_object_smaller_than_a_cell_keeps_one() -> None:
    target = window_target(_objects((21, 21, 22, 22)), (64, 64), WHOLE, (16, 16))
    assert np.argwhere(target == 1).tolist() == [[5, 5]]


def test_an_object_that_the_window_cuts_keeps_the_class_of_the_whole() -> None:
    target = window_target(_objects((0, 0, 34, 64)), (64, 64), Window(32, 0, 64, 32), (16, 16))
    assert set(np.unique(target)) == {0, 5}


def test_crowds_are_ignored() -> None:
    target = window_target(_objects((16, 32, 32, 48), crowd=True), (64, 64), WHOLE, (16, 16))
    assert (target == IGNORE).sum() == 16
    assert set(np.unique(target)) == {0, IGNORE}


def test_an_image_without_objects_is_all_background() -> None:
    assert not window_target(_objects(), (64, 64), WHOLE, (16, 16)).any()


def test_a_few_steps_lower_the_loss(dataset: ScaleDataset) -> None:
    torch.manual_seed(0)
    model = build_scale_net(LIGHT)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    (batch,) = batches(dataset, 8, range(8))
    losses = [train_step(model, batch, optimizer, scale_net_loss(LIGHT), step=i) for i in range(4)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_same_seed_trains_the_same_weights(dataset: ScaleDataset) -> None:
    def trained(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = build_scale_net(LIGHT)
        dataset.seed = seed
        train(model, dataset, epochs=1, batch_size=4, learning_rate=1e-3, seed=seed)
        return model.get_submodule("head").weight.detach()  # type: ignore[union-attr, return-value]

    first = trained(1)
    assert torch.equal(first, trained(1))
    assert not torch.equal(first, trained(2))


def test_training_reports_each_epoch(dataset: ScaleDataset) -> None:
    seen: list[dict] = []
    rows = train(build_scale_net(LIGHT), dataset, epochs=2, batch_size=4, learning_rate=1e-3, report=seen.append)
    assert seen == rows
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[-1]["seconds_left"] == 0


def test_windows_change_from_epoch_to_epoch_and_not_in_validation(sample: Path) -> None:
    examples = read_examples(str(sample), "val2017")
    augmented, plain = (ScaleDataset(examples, LIGHT, augment=augment) for augment in (True, False))

    def targets(dataset: ScaleDataset) -> list[np.ndarray]:
        found = []
        for dataset.epoch in range(4):
            found += [dataset[0][1].numpy()]
        return found

    assert len({target.tobytes() for target in targets(augmented)}) > 1
    assert len({target.tobytes() for target in targets(plain)}) == 1


def test_a_nan_loss_stops_with_the_step_and_the_images(dataset: ScaleDataset) -> None:
    model = build_scale_net(LIGHT)
    before = {name: value.clone() for name, value in model.named_parameters()}
    batch = Batch(torch.full((2, 3, 64, 64), torch.nan), torch.zeros(2, 16, 16, dtype=torch.uint8), (17, 4))
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 12 \(images 17, 4\)"):
        train_step(model, batch, optimizer, scale_net_loss(LIGHT), step=12)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_lone_last_example_is_left_out(dataset: ScaleDataset) -> None:
    assert [len(batch.image_ids) for batch in batches(dataset, 3, range(7))] == [3, 3]
    assert [len(batch.image_ids) for batch in batches(dataset, 3, range(8))] == [3, 3, 2]
    assert [len(batch.image_ids) for batch in batches(dataset, 3, [5])] == [1]


class _Says(torch.nn.Module):
    """A network that always gives the same logits [6, h, w]."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), -1, -1, -1)


def test_a_perfect_map_measures_one_hundred(sample: Path) -> None:
    dataset = ScaleDataset(read_examples(str(sample), "val2017", 1), LIGHT)
    target = dataset[0][1].long()
    measured = evaluate(_Says(20.0 * torch.nn.functional.one_hot(target, 6).permute(2, 0, 1)), dataset)
    present = sorted(set(target.flatten().tolist()))
    assert len(present) > 2
    for c in range(6):
        if c in present:
            assert measured["iou"][c] == pytest.approx(100)
            assert measured["pixel_ap"][c] == pytest.approx(100)
        else:
            assert np.isnan(measured["pixel_ap"][c])


def test_a_map_of_background_measures_nothing_found(sample: Path) -> None:
    dataset = ScaleDataset(read_examples(str(sample), "val2017", 1), LIGHT)
    target = dataset[0][1]
    logits = torch.zeros(6, 16, 16)
    logits[0] = 5.0
    measured = evaluate(_Says(logits), dataset)
    share = 100 * (target == 0).float().mean().item()
    assert measured["iou"][0] == pytest.approx(share, rel=1e-5)
    assert measured["iou"][1] == 0
    # One probability everywhere ranks nothing: the precision is that of chance.
    assert measured["pixel_ap"][1] == pytest.approx(100 * (target == 1).float().mean().item(), rel=1e-5)


def test_an_empty_training_set_says_what_to_do(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one image, got a limit of 0"):
        read_examples(str(sample), "train2017", 0)
    (tmp_path / "annotations").mkdir()
    empty = {"images": [], "annotations": [], "categories": []}
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(empty))
    with pytest.raises(ValueError, match="at least one image, got none"):
        read_examples(str(tmp_path), "train2017")


def test_a_bad_picture_is_named(sample: Path) -> None:
    example = read_examples(str(sample), "train2017", 1)[0]
    with pytest.raises(ValueError, match=r"image 1, .*000000000001\.jpg: the image must be \(5, 7\)"):
        read_pixels(replace(example, hw=(5, 7)))


def test_the_net_learns_from_tiles_of_the_detectors_side(sample: Path) -> None:
    examples = read_examples(str(sample), "val2017", 1)
    coarse, fine = (ScaleDataset(examples, LIGHT, tile_side=side)[0][0] for side in (16, 256))
    roughness = [(image[:, 1:] - image[:, :-1]).abs().mean().item() for image in (coarse, fine)]
    assert roughness[0] < roughness[1]


def test_the_job_trains_and_writes_its_run_folder(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load_job("train_scalenet")
    output = tmp_path / "run"
    job = module.TrainScaleNet(data=str(sample), output=str(output), epochs=2, batch_size=4, input_side=64, limit=4)
    assert module.main(job) == 0
    model, config = load_scale_net(output / "scale_net.safetensors")
    assert config == LIGHT
    assert not model.training
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["train_images"] == 4
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2]
    assert len(metrics["epochs"][-1]["val"]["iou"]) == 6
    assert "input_side: 64" in (output / "config.yaml").read_text()
    lines = capsys.readouterr().out.splitlines()
    assert "IoU of class 1" in lines[0]
    assert lines[-1] == f"2 epochs done, weights in {output}/scale_net.safetensors"


def test_the_job_refuses_an_unknown_preset(sample: Path, tmp_path: Path) -> None:
    module = load_job("train_scalenet")
    job = module.TrainScaleNet(data=str(sample), output=str(tmp_path / "run"), preset="fcn-digits")
    with pytest.raises(
        ValueError, match="--preset must be one of unet-vgg16, unet-light, unet-lite0, got 'fcn-digits'"
    ):
        module.main(job)
    assert not (tmp_path / "run").exists()


def test_a_grey_picture_is_trained_on(sample: Path, tmp_path: Path) -> None:
    example = read_examples(str(sample), "train2017", 1)[0]
    grey = tmp_path / "grey.png"
    Image.new("L", (example.hw[1], example.hw[0]), 90).save(grey)  # type: ignore[index]
    image, _, _ = ScaleDataset([replace(example, uri=str(grey))], LIGHT)[0]
    assert image.shape == (3, 64, 64)


def test_real_annotations_make_targets(real_data: Path) -> None:
    examples = read_examples(str(real_data / "coco"), "val2017")
    by_crowd = sorted(examples, key=lambda example: -int(example.objects.crowd.sum()))[:2]
    by_number = sorted(examples, key=lambda example: len(example.objects.boxes))
    dataset = ScaleDataset([*by_crowd, by_number[0], by_number[-1]], LIGHT, augment=True)
    targets = [dataset[i][1] for i in range(len(dataset))]
    assert any((target == IGNORE).any() for target in targets)
    assert not targets[2].any()
    assert (targets[3] == 1).any()
