"""Decoding of images: formats, orientation, limits, truncation. What is refused and why: tests/bad_files.py."""

from __future__ import annotations

import os
import struct
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile, Window, cut_tile
from scalenet_ray.data.coco import read_annotations
from scalenet_ray.data.images import MAX_PIXELS, decode_image, file_hw, read_image
from scalenet_ray.data.storage import read_bytes
from tests.bad_files import encoded

HW = (20, 30)
PIXELS = np.random.default_rng(0).integers(0, 256, (*HW, 3), dtype=np.uint8)
LOSSLESS = [
    ("PNG", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("BMP", {}),
    ("WEBP", {"lossless": True}),
]
EVERY_FORMAT = [
    *LOSSLESS,
    ("TIFF", {"compression": "jpeg"}),
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("GIF", {}),
]
EXIF_FORMATS = [case for case in LOSSLESS if case[0] != "BMP"]


def hw_of_file(data: bytes, folder: Path) -> tuple[int, int]:
    (folder / "image").write_bytes(data)
    return file_hw(folder / "image")


def with_orientation(orientation: int, kind: str = "PNG", **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(PIXELS, kind, exif=exif, **options)


def png_header(hw: tuple[int, int]) -> bytes:
    """A PNG that says how large it is, and ends there."""
    body = b"IHDR" + struct.pack(">IIBBBBB", hw[1], hw[0], 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + b"\x00\x01\x00\x00IDAT"
    )


# --- decoding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
def test_lossless_formats_give_back_their_pixels(kind: str, options: dict):
    data = encoded(PIXELS, kind, **options)
    assert np.array_equal(decode_image(data), PIXELS)


def test_decoded_pixels_cannot_be_changed_by_one_of_their_users():
    pixels = decode_image(encoded(PIXELS))
    assert (pixels.dtype, pixels.flags.c_contiguous) == (np.uint8, True)
    with pytest.raises(ValueError, match="read-only"):
        pixels[0, 0] = 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_one_pixel_is_an_image(kind: str, tmp_path: Path):
    data = encoded(np.full((1, 1, 3), 255, np.uint8), kind)
    assert decode_image(data).tolist() == [[[255, 255, 255]]]
    assert hw_of_file(data, tmp_path) == (1, 1)


@pytest.mark.parametrize(("kind", "options"), EVERY_FORMAT)
def test_a_file_cut_short_anywhere_is_an_error_or_whole(kind: str, options: dict):
    data = encoded(PIXELS, kind, **options)
    whole = decode_image(data)
    refused = 0
    for length in range(0, len(data), 7):
        try:
            pixels = decode_image(data[:length])
        except TileError:
            refused += 1
        else:
            assert np.array_equal(pixels, whole)
    assert refused > len(data) // 7 * 0.9


def test_a_truncated_jpeg_says_what_to_do():
    with pytest.raises(TileError, match=r"cannot be decoded .*truncated.*: it is damaged; fetch or export it again"):
        decode_image(encoded(PIXELS, "JPEG")[:-10])


SMOOTH = np.add.outer(np.arange(40.0), np.arange(56.0))[:, :, None] * [2.0, 1.0, 2.5] + PIXELS.repeat(2, 0)[:, :1] / 8
JPEGS: dict[str, dict] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True, "subsampling": 0},
    "restart markers": {"restart_marker_blocks": 2},
    "progressive, restart markers": {"progressive": True, "restart_marker_rows": 1},
    "grey": {"grey": True},
}


def jpeg(kind: str) -> bytes:
    options = dict(JPEGS[kind])
    image = Image.fromarray(SMOOTH.astype(np.uint8))
    return encoded(image.convert("L") if options.pop("grey", False) else image, "JPEG", quality=90, **options)


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("end", [b"", b"\xff", bytes(500), b"\xff" * 500], ids=["none", "half", "zeros", "ones"])
def test_a_jpeg_that_lacks_its_end_marker_alone_is_read(kind: str, end: bytes):
    whole = jpeg(kind)
    assert whole.endswith(b"\xff\xd9")
    assert np.array_equal(decode_image(whole[:-2] + end), decode_image(whole))


@pytest.mark.parametrize("kind", JPEGS)
def test_what_stands_behind_the_end_marker_of_a_jpeg_changes_nothing(kind: str):
    assert np.array_equal(decode_image(jpeg(kind) + b"rubbish \xff\xda \xff\xd3" * 9), decode_image(jpeg(kind)))


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("end", [b"", bytes(500), b"\xff" * 500], ids=["none", "zeros", "ones"])
def test_no_half_picture_passes_for_a_jpeg_without_its_end(kind: str, end: bytes):
    data = jpeg(kind)
    whole, refused = decode_image(data), 0
    lengths = [*range(data.index(b"\xff\xda"), len(data) - 2, 17), *range(len(data) - 12, len(data) - 2)]
    for length in lengths:
        try:
            pixels = decode_image(data[:length] + end)
        except TileError:
            refused += 1
        else:
            # The last byte of a scan may hold nothing but padding.
            assert np.array_equal(pixels, whole)
    assert refused >= len(lengths) - 2


def test_a_jpeg_that_ends_between_two_scans_is_refused():
    data = jpeg("progressive")
    scans = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xda"]
    assert len(scans) > 3
    for start in scans[1:]:
        # A table of codes may stand before a scan.
        end = data.rindex(b"\xff\xc4", 0, start) if b"\xff\xc4" in data[start - 60 : start] else start
        with pytest.raises(TileError, match="truncated"):
            decode_image(data[:end])


@given(st.sampled_from(EVERY_FORMAT), st.data())
def test_damaged_bytes_give_pixels_or_a_tile_error_and_no_warning(case: tuple[str, dict], data: st.DataObject):
    damaged = bytearray(encoded(PIXELS, case[0], **case[1]))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            pixels = decode_image(bytes(damaged), max_pixels=10_000)
        except TileError:
            return
        with tempfile.TemporaryDirectory() as folder:
            assert pixels.shape == (*hw_of_file(bytes(damaged), Path(folder)), 3)


# --- the limit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("hw", [(20_000, 20_000), (2**31 - 1, 2**31 - 1), (1, MAX_PIXELS + 1)])
def test_a_bomb_is_refused_by_its_header_alone(hw: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(TileError, match=f"may have 200000000 pixels, got {hw[0]} x {hw[1]} = .*: split or shrink it"):
        decode_image(png_header(hw))


def test_a_phone_s_200_megapixels_are_within_the_limit():
    assert MAX_PIXELS >= 12_240 * 16_320


def test_the_limit_is_the_callers():
    data = encoded(PIXELS)
    assert decode_image(data, max_pixels=600).shape == (*HW, 3)
    with pytest.raises(TileError, match="may have 599 pixels, got 20 x 30 = 600"):
        decode_image(data, max_pixels=599)


# --- orientation ------------------------------------------------------------------------------------


def turned(orientation: int) -> np.ndarray:
    """What a viewer shows of PIXELS with an EXIF orientation (the eight cases of the EXIF standard)."""
    return {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: np.rot90(PIXELS, 2).transpose(1, 0, 2),
        8: np.rot90(PIXELS, 1),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "options"), EXIF_FORMATS)
def test_exif_orientation_is_obeyed(kind: str, options: dict, orientation: int, tmp_path: Path):
    data = with_orientation(orientation, kind, **options)
    upright = decode_image(data)
    assert np.array_equal(upright, turned(orientation))
    assert hw_of_file(data, tmp_path) == upright.shape[:2]
    assert np.array_equal(decode_image(data, apply_exif=False), PIXELS)


@pytest.mark.parametrize(("kind", "options"), EXIF_FORMATS)
def test_the_annotated_size_decides_whether_a_picture_is_turned(kind: str, options: dict):
    data = with_orientation(6, kind, **options)
    assert np.array_equal(decode_image(data, expect_hw=(30, 20)), turned(6))
    assert np.array_equal(decode_image(data, expect_hw=(20, 30)), PIXELS)


def test_a_mirrored_picture_of_the_annotated_size_is_set_right():
    assert np.array_equal(decode_image(with_orientation(3), expect_hw=HW), turned(3))


def test_another_size_than_annotated_is_refused_with_both_sizes():
    with pytest.raises(TileError, match=r"must be \(40, 50\) .* as annotated, got \(20, 30\): use the file that was"):
        decode_image(encoded(PIXELS), expect_hw=(40, 50))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int):
    assert np.array_equal(decode_image(with_orientation(orientation)), PIXELS)


# --- modes ------------------------------------------------------------------------------------------


def test_grey_becomes_rgb():
    grey = PIXELS[:, :, 0]
    assert np.array_equal(decode_image(encoded(grey)), np.repeat(grey[:, :, None], 3, axis=2))


def test_one_bit_is_black_and_white():
    image = Image.fromarray(PIXELS[:, :, 0]).convert("1")
    assert np.array_equal(decode_image(encoded(image))[:, :, 1] > 0, np.asarray(image))
    assert set(np.unique(decode_image(encoded(image)))) == {0, 255}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str):
    values = np.array([[0, 128, 129, 257, 32768, 65279, 65406, 65535]], np.uint16)
    wanted = [0, 0, 1, 1, 128, 254, 254, 255]
    assert decode_image(encoded(values, kind))[0, :, 0].tolist() == wanted


def test_big_endian_16_bit_grey_is_the_same():
    values = np.array([[0, 257, 65535]], ">u2")
    image = Image.frombytes("I;16B", (3, 1), values.tobytes())
    assert decode_image(encoded(image, "TIFF"))[0, :, 0].tolist() == [0, 1, 255]


def test_cmyk_becomes_rgb():
    pixels = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 8


def test_a_palette_becomes_its_colours():
    image = Image.fromarray(PIXELS).quantize(16)
    assert np.array_equal(decode_image(encoded(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_parts_show_white(kind: str):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)
    assert decode_image(encoded(rgba, kind, **options)).tolist() == [[[10, 20, 30], [255] * 3, [204] * 3]]


def test_transparent_grey_shows_white():
    assert decode_image(encoded(np.array([[[9, 255], [9, 0]]], np.uint8))).tolist() == [[[9] * 3, [255] * 3]]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_a_transparent_palette_entry_shows_white(transparency: int | bytes):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    pixels = decode_image(encoded(image, "PNG", transparency=transparency))
    assert pixels.tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_the_first_frame_of_a_moving_picture_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode_image(data)[0, 0].tolist() == [255, 0, 0], kind


# --- tiles ------------------------------------------------------------------------------------------


def tile_of(window: Window, hw: tuple[int, int], image_hw: tuple[int, int] = HW) -> Tile:
    return Tile(1, (), image_hw, window, *hw)


def test_a_window_at_its_own_size_is_copied():
    tile = cut_tile(PIXELS, tile_of(Window(3, 4, 19, 15), (11, 16)))
    assert np.array_equal(tile, PIXELS[4:15, 3:19])
    tile[:] = 0


@given(st.data())
def test_a_tile_has_the_size_it_was_planned_with(data: st.DataObject):
    x0, y0 = data.draw(st.integers(0, 29)), data.draw(st.integers(0, 19))
    window = Window(x0, y0, data.draw(st.integers(x0 + 1, 30)), data.draw(st.integers(y0 + 1, 20)))
    hw = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    tile = cut_tile(PIXELS, tile_of(window, hw))
    inside = PIXELS[window.y0 : window.y1, window.x0 : window.x1]
    assert (tile.shape, tile.dtype) == ((*hw, 3), np.uint8)
    assert tile.min() >= inside.min()
    assert tile.max() <= inside.max()


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 90), st.integers(1, 90))
def test_pixels_and_boxes_go_the_same_way(window_height: int, window_width: int, height: int, width: int):
    # A ramp's value is its place: reading it in the tile gives the image's place back.
    image_hw = (64, 64)
    ramp = np.zeros((*image_hw, 3), np.uint8)
    ramp[:, :, 0] = np.arange(64)[None, :] * 4
    ramp[:, :, 1] = np.arange(64)[:, None] * 4
    tile = tile_of(Window(7, 9, 7 + window_width, 9 + window_height), (height, width), image_hw)
    pixels = cut_tile(ramp, tile)
    centres = np.clip((np.arange(width) + 0.5) * window_width / width - 0.5, 0, window_width - 1) + 7
    assert np.abs(pixels[0, :, 0] - 4.0 * centres).max() <= 1.0
    centres = np.clip((np.arange(height) + 0.5) * window_height / height - 0.5, 0, window_height - 1) + 9
    assert np.abs(pixels[:, 0, 1] - 4.0 * centres).max() <= 1.0


def test_shrinking_up_to_2_is_bilinear_and_not_antialiased():
    # One bright column in four, seen by every second pair of samples: antialiasing would spread it over both.
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 2::4] = 255
    tile = cut_tile(image, tile_of(Window(0, 0, 32, 32), (20, 20), (32, 32)))
    # Sample 1 lies at 1.5 * 1.6 - 0.5 = 1.9 and sees column 2 by 0.9; sample 2 lies at 3.5 and sees none of it.
    assert tile[0, 1, 0] == pytest.approx(0.9 * 255, abs=2)
    assert tile[0, 2, 0] == 0


def test_shrinking_past_2_averages_what_a_pixel_covers():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 3::8] = 255
    tile = cut_tile(image, tile_of(Window(0, 0, 32, 32), (4, 4), (32, 32)))
    assert np.abs(tile.astype(int) - 255 // 8).max() <= 1


def test_nothing_outside_the_window_is_seen():
    image = np.full((64, 64, 3), 255, np.uint8)
    image[16:48, 16:48] = 0
    assert cut_tile(image, tile_of(Window(16, 16, 48, 48), (100, 100), (64, 64))).max() == 0


def test_a_file_that_changed_since_it_was_planned_is_refused():
    with pytest.raises(TileError, match=r"planned on an image of \(20, 30\) .*, got \(20, 20\): the file changed"):
        cut_tile(PIXELS[:, :20], tile_of(Window(0, 0, 10, 10), (5, 5)))


# --- real photographs -------------------------------------------------------------------------------


def test_every_real_photograph_decodes_to_its_annotated_size(real_data: Path):
    for split in ("train2017", "val2017"):
        for record in read_annotations(real_data / f"coco/annotations/instances_{split}.json").images:
            path = real_data / "coco" / split / record.file_name
            assert file_hw(path) == record.hw
            assert decode_image(read_bytes(path), expect_hw=record.hw).shape == (record.height, record.width, 3)


def test_a_pipe_among_pictures_costs_itself_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(TileError, match="it is a pipe, a socket or a device, not a file; leave it out"):
        read_image(tmp_path / "x.jpg")
