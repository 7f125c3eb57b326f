"""The embedded sample: reproducible, in COCO's layout, with objects of every scale."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from scalenet_ray.core.errors import UserError
from scalenet_ray.data.images import read_image
from scalenet_ray.data.storage import list_files, read_bytes, write_bytes_atomic
from scalenet_ray.runs.local import LocalSession
from scalenet_ray.sample import scenes
from scalenet_ray.sample.scenes import SAMPLE_CATEGORIES, ensure_sample, make_scene, write_sample
from scalenet_ray.training import examples
from scalenet_ray.training.recipe import Recipe, Row
from tests.job_scripts import run_command


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("sample") / "sample", train=40, val=4)


@pytest.fixture(scope="module")
def train(sample: Path) -> dict:
    return json.loads((sample / "annotations" / "instances_train2017.json").read_text())


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first = _bytes(write_sample(tmp_path / "a", train=3, val=2, seed=5))
    again = _bytes(write_sample(tmp_path / "b", train=3, val=2, seed=5))
    other = _bytes(write_sample(tmp_path / "c", train=3, val=2, seed=6))
    assert first == again
    name = "train2017/000000000001.jpg"
    assert first[name] != other[name]


def test_a_scene_does_not_depend_on_how_many_are_made(tmp_path: Path, sample: Path) -> None:
    fewer = write_sample(tmp_path / "fewer", train=2, val=1)
    for name in ("train2017/000000000002.jpg", "val2017/000001000001.jpg"):
        assert (fewer / name).read_bytes() == (sample / name).read_bytes()


def test_every_category_occurs_and_ids_have_gaps(train: dict) -> None:
    declared = {row["id"]: row["name"] for row in train["categories"]}
    assert declared == SAMPLE_CATEGORIES
    assert {row["category_id"] for row in train["annotations"]} == set(declared)
    assert len(declared) >= 8
    assert max(declared) > len(declared)


def test_sizes_span_the_scales_and_most_objects_are_small(train: dict) -> None:
    sides = np.array([max(row["bbox"][2:]) for row in train["annotations"]])
    areas = np.array([row["area"] for row in train["annotations"]])
    assert 5 <= sides.min() <= 8
    assert 200 <= sides.max() <= 250
    assert 0.5 < (areas < 32**2).mean() < 0.75
    assert (areas > 96**2).mean() > 0.05


def test_box_and_area_are_those_of_the_mask(train: dict) -> None:
    for row in train["annotations"][:50]:
        mask = coco_mask.decode(row["segmentation"])
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        wanted = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
        assert row["bbox"] == wanted
        assert row["area"] == mask.sum()


def test_images_are_as_declared_and_ids_are_unique(sample: Path, train: dict) -> None:
    for row in train["images"]:
        with Image.open(sample / "train2017" / row["file_name"]) as image:
            assert (image.height, image.width) == (row["height"], row["width"])
    assert len({(row["height"], row["width"]) for row in train["images"]}) > 2
    ids = [row["id"] for row in train["annotations"]]
    assert len(set(ids)) == len(ids)


def test_masks_of_a_scene_do_not_overlap_and_stand_out() -> None:
    scene = make_scene(np.random.default_rng(3))
    assert scene.masks.sum(axis=0).max() == 1
    background = ~scene.masks.any(axis=0)
    largest = scene.masks[scene.masks.sum(axis=(1, 2)).argmax()]
    contrast = np.abs(scene.pixels[largest].mean(axis=0) - scene.pixels[background].mean(axis=0)).max()
    assert contrast > 25


def _nearest(points: np.ndarray) -> float:
    """Mean distance of [N, 2] points to their nearest neighbour."""
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    return float((distances + 9 * np.eye(len(points))).min(axis=1).mean())


def test_small_objects_come_in_clusters() -> None:
    found, chance = [], []
    for i in range(40):
        scene = make_scene(np.random.default_rng(i))
        small = scene.masks[scene.masks.sum(axis=(1, 2)) < 24**2]
        centres = np.array([np.argwhere(mask).mean(axis=0) / scene.masks.shape[1:] for mask in small])
        if len(centres) >= 3:
            found.append(_nearest(centres))
            chance.append(_nearest(np.random.default_rng(i).uniform(0.05, 0.95, centres.shape)))
    assert np.mean(found) < 0.75 * np.mean(chance)


_STAMP = {"train": 600, "val": 100, "large": 8, "seed": 0, "version": 1}


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Make `ensure_sample` write one scene a split, and list the folders it wrote."""
    written: list[Path] = []

    def write_few(folder: Path, *, large: int) -> Path:
        written.append(folder)
        write_sample(folder, train=1, val=1)
        (folder / "sample.json").write_text(json.dumps(_STAMP | {"large": large}))
        return folder

    monkeypatch.setattr(scenes, "write_sample", write_few)
    return written


def test_ensure_sample_writes_once(tmp_path: Path, few_scenes: list[Path]) -> None:
    folder = tmp_path / "runs" / "sample"
    assert ensure_sample(folder) == folder
    assert ensure_sample(folder) == folder
    assert len(few_scenes) == 1
    assert (folder / "annotations" / "instances_val2017.json").is_file()
    assert [path.name for path in folder.parent.iterdir()] == ["sample"]


def test_of_those_who_want_the_sample_at_once_one_writes_it(tmp_path: Path, few_scenes: list[Path]) -> None:
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(ensure_sample, [tmp_path / "sample"] * 4)) == {tmp_path / "sample"}
    assert len(few_scenes) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]


def test_ensure_sample_replaces_another_version(tmp_path: Path, few_scenes: list[Path]) -> None:
    folder = ensure_sample(tmp_path / "sample")
    (folder / "sample.json").write_text(json.dumps(_STAMP | {"version": 0}))
    (folder / "old.txt").write_text("old")
    ensure_sample(folder)
    assert len(few_scenes) == 2
    assert not (folder / "old.txt").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="hold"):
        ensure_sample(tmp_path)
    with pytest.raises(FileExistsError, match="new or empty folder"):
        write_sample(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


# --- the sample's address ---------------------------------------------------------------------------


@pytest.fixture
def other_node(tmp_path: Path, few_scenes: list[Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Work in a driver's folder; the function goes on in another node's, where no file of the driver's is."""
    driver, node = tmp_path / "driver", tmp_path / "node"
    for folder in (driver, node):
        folder.mkdir()
    monkeypatch.chdir(driver)

    def go() -> None:
        shutil.rmtree(driver / "runs")
        monkeypatch.chdir(node)

    return go


@pytest.mark.parametrize("arguments", [("eval", "--policies", "regions-oracle"), ("detect",)])
def test_an_engine_on_another_node_reads_a_sample_of_its_own(
    arguments: tuple[str, ...], other_node: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = LocalSession.start

    def start_there(*images: Any, **others: Any) -> Any:
        if Path.cwd().name == "driver":
            other_node()
        return start(*images, **others)

    monkeypatch.setattr(LocalSession, "start", start_there)
    assert run_command(*arguments, "--engine", "local", "--output", str(tmp_path / "run")) == 0
    assert Path("runs/sample/val2017").is_dir()
    assert Path.cwd().name == "node"
    document = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert document["images"] == {"total": 1, "done": 1, "failed": 0}


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_a_training_worker_on_another_node_reads_a_sample_of_its_own(
    command: str, other_node: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Row] = []

    def train_there(recipe: Recipe, *others: Any) -> None:
        sent = pickle.dumps(recipe)
        other_node()
        examples._read.cache_clear()
        there = pickle.loads(sent)
        read.extend([there.example(0, 0), there.validation_example(0)])

    monkeypatch.setattr(f"scalenet_ray.commands.{command}.train", train_there)
    assert run_command(command, "--output", str(tmp_path / "run")) == 0
    assert [int(row["image_id"].item()) for row in read] == [1, 1_000_001]


def test_the_samples_files_are_listed_by_their_address(other_node: Callable[[], None]) -> None:
    wanted = "embedded://sample/val2017/000001000001.jpg"
    assert list_files("embedded://sample/val2017") == list_files("embedded://sample/*/*1000001.jpg") == [wanted]
    other_node()
    assert read_image(wanted).shape == (384, 384, 3)


def test_no_other_file_has_an_address_like_the_samples(
    few_scenes: list[Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for address in ("embedded://", "embedded://first/config.yaml"):
        with pytest.raises(UserError, match=rf"must start with embedded://sample, got {address}: write"):
            read_bytes(address)
    with pytest.raises(UserError, match="cannot write embedded://sample/a: it is read only"):
        write_bytes_atomic("embedded://sample/a", b"")


def test_a_folder_of_the_samples_name_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sample").mkdir(parents=True)
    (tmp_path / "runs" / "sample" / "thesis.txt").write_text("mine")
    assert run_command("detect", "--engine", "local") == 2
    assert "runs/sample holds files that are no sample" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*.*")] == ["thesis.txt"]
