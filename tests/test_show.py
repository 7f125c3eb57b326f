"""`python -m scalenet_ray`: its help, and the picture and the steps of one recursion."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scalenet_ray.core.detections import Detections
from scalenet_ray.evaluation.compare import are_new
from scalenet_ray.report.charts import drawing
from scalenet_ray.report.recursion_figure import picture_bytes
from scalenet_ray.sample.scenes import sample_scene
from tests.job_scripts import run_command


@pytest.fixture
def photograph(tmp_path: Path) -> str:
    path = tmp_path / "photograph.png"
    Image.fromarray(sample_scene("val2017", 7).pixels).save(path)
    return str(path)


def test_show_prints_each_step_and_what_came_of_it(
    photograph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("show", photograph, "--output", str(tmp_path / "steps.png")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "embedded sample's networks" in lines[0]
    assert lines[1].split()[:4] == ["tile", "depth", "window", "pixels"]
    tiles = [line.split()[0] for line in lines[2:-2]]
    assert tiles[0] == "whole"
    # A window of a window, as the photograph's Scale Net asks for one.
    assert {len(tile.split(".")) for tile in tiles[1:]} == {1, 2}
    merged = re.fullmatch(r"merged: (\d+) objects that score 0.4 or more, (\d+) in the whole image alone", lines[-2])
    assert merged is not None
    assert int(merged[1]) > int(merged[2]) > 0
    assert re.fullmatch(rf"\d\.\d\d detector passes, picture in {re.escape(str(tmp_path / 'steps.png'))}", lines[-1])


def test_the_picture_has_a_panel_for_each_depth(photograph: str, tmp_path: Path) -> None:
    assert run_command("show", photograph, "--output", str(tmp_path / "steps.svg")) == 0
    text = (tmp_path / "steps.svg").read_text()
    for title in ("336 x 448 pixels", "depth 0: 2 windows asked for", "depth 1: 1 window asked for", "alone: 3 found"):
        assert title in text
    assert re.search(r"with scalenet: 10 found, 7 new", text)


@pytest.mark.parametrize("policy", ["whole", "pyramid", "regions-scalenet"])
def test_every_policy_can_be_shown(policy: str, photograph: str, tmp_path: Path) -> None:
    assert run_command("show", photograph, "--policy", policy, "--output", str(tmp_path / "steps.png")) == 0
    with Image.open(tmp_path / "steps.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize("hw", [(6000, 1), (1, 6000)])
def test_a_strip_of_one_pixel_is_shown(hw: tuple[int, int], tmp_path: Path) -> None:
    Image.fromarray(np.full((*hw, 3), 90, np.uint8)).save(tmp_path / "strip.png")
    assert run_command("show", str(tmp_path / "strip.png"), "--output", str(tmp_path / "steps.png")) == 0
    with Image.open(tmp_path / "steps.png") as picture:
        assert max(picture.size) < 4000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # Before the detector is loaded.
        (
            ("--output", "steps.bmp", "--detector", "tiny:nowhere.safetensors"),
            "a picture is written as .png, .svg or .pdf, got '.bmp'",
        ),
        (("--policy", "oracle"), "policy oracle reads the ground truth"),
        (("--detector", "tiny:nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_what_cannot_be_shown_says_why_in_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("show", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_new_is_what_no_box_of_its_category_overlaps_by_half() -> None:
    before = Detections([[0, 0, 10, 10], [20, 0, 30, 10]], [0.9, 0.9], [1, 2])
    after = Detections([[1, 0, 11, 10], [20, 0, 30, 10], [50, 50, 60, 60]], [0.9, 0.9, 0.9], [1, 1, 1])
    assert are_new(after, before).tolist() == [False, True, True]
    assert are_new(after, Detections.empty()).tolist() == [True] * 3


def test_a_picture_is_the_same_bytes_for_the_same_figure() -> None:
    def drawn() -> bytes:
        with drawing(1, 1) as figure:
            figure.subplots().imshow(np.zeros((4, 4)))
            return picture_bytes(figure, ".pdf")

    assert drawn() == drawn()
