"""Frames of videos as images of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import scalenet_ray
from scalenet_ray.commands.detect import DetectImages, main
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.data.listings import find_images
from scalenet_ray.data.rasters import open_image
from scalenet_ray.models.spec import SAMPLE_DETECTOR, NetworkSpec
from scalenet_ray.runs.folder import RunFolder

FRAMES = 100


@pytest.fixture(params=["mp4v .mp4", "MJPG .avi"])
def film(tmp_path: Path, request: Any) -> Path:
    """A video in which frame i has the red value 2 i."""
    code, suffix = request.param.split()
    path = tmp_path / f"film{suffix}"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 10, (160, 120))
    for i in range(FRAMES):
        writer.write(np.full((120, 160, 3), (0, 50, 2 * i), np.uint8))
    writer.release()
    return path


def test_frames_are_read_in_any_order_with_their_colours(film: Path) -> None:
    names = [record.file_name for record in find_images(film).records]
    assert names == [f"{film}/{i:06d}.png" for i in range(FRAMES)]
    assert [record.file_name for record in find_images(film.parent).records] == names
    for number in (0, 1, 5, 99, 4, 80, 80):
        pixels = open_image(names[number])
        assert pixels.shape == (120, 160, 3)
        assert np.abs(np.asarray(pixels).mean((0, 1)) - (2 * number, 50, 0)).max() < 8
    with pytest.raises(TileError, match=f"frame {FRAMES} of .* cannot be decoded"):
        open_image(f"{film}/{FRAMES:06d}.png")
    with pytest.raises(TileError, match="may have 100 pixels, got 120 x 160"):
        open_image(names[0], max_pixels=100)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"film\.mp4 must be a video that OpenCV decodes, got one without frames"):
        find_images(tmp_path / "film.mp4")
    with pytest.raises(TileError, match="cannot be decoded"):
        open_image(f"{tmp_path}/film.mp4/000000.png")


def test_every_nth_frame_has_the_id_of_its_number(film: Path, tmp_path: Path) -> None:
    networks = NetworkSpec(detector=SAMPLE_DETECTOR, device="cpu")
    job = DetectImages(
        images=str(film), every=30, policy="whole", limit=2, output=str(tmp_path / "run"), engine="local",
        networks=networks,
    )  # fmt: skip
    assert main(job) == 0
    run = RunFolder(str(tmp_path / "run"))
    assert [(image.image_id, image.file_name) for image in run.finished("whole")] == [
        (1, f"{film}/000000.png"),
        (31, f"{film}/000030.png"),
    ]
    assert run.config()["settings"]["every"] == 30


def test_every_nth_frame_is_detected_from_python_and_read_again(film: Path) -> None:
    predictions = list(scalenet_ray.detect(str(film), SAMPLE_DETECTOR, every=30, policy="whole", engine="local"))
    assert [prediction.source for prediction in predictions] == [f"{film}/{i:06d}.png" for i in (0, 30, 60, 90)]
    assert [round(np.asarray(prediction.pixels)[:, :, 0].mean() / 20) for prediction in predictions] == [0, 3, 6, 9]
