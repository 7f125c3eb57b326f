"""Images that are read by window: their tiles, what engines make of them, and large TIFFs."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from s3fs.core import S3File

from scalenet_ray.api import get_scaled_prediction
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.geometry import Tile, Window, cut_tile, tile_pixels, whole_pixels
from scalenet_ray.core.recursion import recursive_detect
from scalenet_ray.data import storage
from scalenet_ray.data.image_records import ImageRecord
from scalenet_ray.data.images import decode_image
from scalenet_ray.data.rasters import Raster, georeference_of, open_image, open_raster, size_by_window
from scalenet_ray.models.spec import SAMPLE_DETECTOR
from scalenet_ray.runs.local import LocalStream
from tests.faults import Scenes, as_values, policy_of, random_networks, records_of, reference
from tests.in_process import InProcessEngine
from tests.job_scripts import run_command
from tests.oracles import RandomDetector

HW = (160, 240)
PIXELS = np.random.default_rng(0).integers(0, 256, (*HW, 3), dtype=np.uint8)


class Windows:
    """An image of an array, read by window.

    Args:
        pixels: the array.
        broken: a window that cannot be read.
    """

    nbytes = 1000

    def __init__(self, pixels: np.ndarray, broken: Window | None = None) -> None:
        self._pixels, self._broken = pixels, broken
        self.reads: list[tuple[Window, int]] = []

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, _ = self._pixels.shape
        return (height, width, 3)

    def read(self, window: Window, reduction: int) -> np.ndarray:
        self.reads.append((window, reduction))
        if window == self._broken:
            raise TileError(f"window {window.xyxy} is broken")
        part = self._pixels[window.y0 : window.y1, window.x0 : window.x1]
        size = -(-window.width // reduction), -(-window.height // reduction)
        return cv2.resize(part, size, interpolation=cv2.INTER_AREA)


# --- tiles --------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_tile_is_the_same_whether_the_image_is_an_array_or_read_by_window(data: st.DataObject) -> None:
    x0, y0 = data.draw(st.integers(0, 238)), data.draw(st.integers(0, 158))
    window = Window(x0, y0, data.draw(st.integers(x0 + 1, 240)), data.draw(st.integers(y0 + 1, 160)))
    tile = Tile(1, (), HW, window, data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90)))
    smooth = cv2.GaussianBlur(PIXELS, (0, 0), 6)
    source = Windows(smooth)
    pixels = tile_pixels(source, tile)
    ((read, reduction),) = source.reads
    assert read == window
    if reduction == 1:
        assert np.array_equal(pixels, cut_tile(smooth, tile))
    else:
        # It was read at twice the tile's size or more, and less than four times along one side.
        shrunk = (window.width / reduction / tile.width, window.height / reduction / tile.height)
        assert 2 < min(shrunk) <= 4.1
        assert np.abs(pixels.astype(int) - cut_tile(smooth, tile)).max() <= 2


def test_a_tile_of_another_image_size_is_refused() -> None:
    with pytest.raises(TileError, match=r"planned on an image of \(10, 10\) .* got \(160, 240\): the file changed"):
        tile_pixels(Windows(PIXELS), Tile(1, (), (10, 10), Window(0, 0, 10, 10), 5, 5))


@pytest.mark.parametrize(("side", "hw"), [(1000, HW), (240, HW), (120, (80, 120)), (100, (80, 120)), (1, (1, 1))])
def test_a_picture_of_the_whole_is_no_smaller_than_asked_for(side: int, hw: tuple[int, int]) -> None:
    assert whole_pixels(Windows(PIXELS), side).shape == (*hw, 3) if side > 1 else (2, 2, 3)
    assert whole_pixels(PIXELS, side) is PIXELS


# --- engines ------------------------------------------------------------------------------------------------


class WindowedScenes(Scenes):
    """Scenes that are read by window.

    Args:
        broken: a window of each image that cannot be read.
    """

    def __init__(self, broken: dict[int, Window] | None = None) -> None:
        super().__init__()
        self._broken = broken or {}

    def __call__(self, record: ImageRecord) -> Windows:  # type: ignore[override]
        return Windows(super().__call__(record), self._broken.get(record.image_id))


def broken_scenes(name: str) -> WindowedScenes:
    """Scenes of which one cannot be read to its end: the last window that a policy cuts of it is broken."""
    policy = policy_of(name)
    networks = random_networks(policy)
    predict_scale = networks.predict_scale and networks.predict_scale()
    for record in records_of(6):
        source = WindowedScenes()(record)
        recursive_detect(source, record.image_id, policy, detect=networks.detect(), predict_scale=predict_scale)
        if len(source.reads) > 2:
            return WindowedScenes({record.image_id: source.reads[-1][0]})
    raise AssertionError("no image has windows")


@pytest.mark.parametrize("name", ["grid-2", "random", "first-pass", "scalenet", "regions"])
@pytest.mark.parametrize("is_broken", [False, True])
def test_every_engine_reads_windows_as_the_reference_does(name: str, is_broken: bool, without_ray: None) -> None:
    policy, records = policy_of(name), records_of(6)
    open_image = broken_scenes(name) if is_broken else WindowedScenes()
    networks = random_networks(policy)
    expected = reference(records, policy, networks, open_image)
    assert sum(values["failure"] is not None for values in expected.values()) == is_broken
    for seed in range(3):
        results = InProcessEngine(records, policy, networks, open_image, seed=seed, rerun_rate=0.1).run()
        assert {result.image_id: as_values(result) for result in results} == expected
    assert {one.image_id: as_values(one) for one in LocalStream(records, policy, networks, open_image)} == expected


def test_a_window_that_cannot_be_read_costs_the_image_alone_and_none_of_its_costs_remain() -> None:
    policy = policy_of("grid-2")
    open_image = broken_scenes("grid-2")
    results = list(LocalStream(records_of(4), policy, random_networks(policy), open_image))
    assert [result.failure is not None for result in results] == [True, False, False, False]
    failure = results[0].failure
    assert failure is not None
    assert failure.stage == "read"
    assert failure.reason.endswith("is broken")
    assert (results[0].tiles, results[0].detector_pixels, len(results[0].detections)) == (0, 0, 0)


@pytest.mark.parametrize("name", ["grid-2", "random", "pyramid"])
@pytest.mark.parametrize("is_broken", [False, True])
def test_windows_too_many_for_a_row_are_leased_one_by_one(
    name: str, is_broken: bool, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalenet_ray.engine.readers._ROW_BYTES", 64 * 64)
    policy, records = policy_of(name), records_of(6)
    networks, open_image = random_networks(policy), broken_scenes(name) if is_broken else WindowedScenes()
    expected = reference(records, policy, networks, open_image)
    for seed in range(3):
        engine = InProcessEngine(records, policy, networks, open_image, seed=seed, lease_size=1, rerun_rate=0.1)
        assert {result.image_id: as_values(result) for result in engine.run()} == expected
        leases = sum(reader.sequence for reader in engine._readers)
        assert leases > 2 * len(records)


# --- large TIFFs --------------------------------------------------------------------------------------------


@pytest.fixture
def rasterio() -> Any:
    return pytest.importorskip("rasterio")


@pytest.fixture
def every_tiff_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalenet_ray.data.rasters.WINDOWED_PIXELS", 0)


BANDS = np.moveaxis(PIXELS, 2, 0)
TILED = {"tiled": True, "blockxsize": 64, "blockysize": 64}
RGB = {"photometric": "rgb"}


def write_tiff(path: Path, bands: np.ndarray, *, overviews: tuple[int, ...] = (), **options: Any) -> Path:
    """Write [bands, h, w] as a GeoTIFF, by default of uncompressed strips."""
    rasterio = pytest.importorskip("rasterio")
    count, height, width = bands.shape
    shape = {"height": height, "width": width, "count": count, "dtype": bands.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver="GTiff", **shape, **options) as dataset:
            dataset.write(bands)
            if overviews:
                dataset.build_overviews(overviews, rasterio.enums.Resampling.average)
    return path


WITH_FOURTH = np.concatenate([BANDS, BANDS[:1]])
AS_PILLOW = {
    "tiles": (BANDS, TILED | RGB),
    "deflate": (BANDS, TILED | RGB | {"compress": "deflate"}),
    "LZW, planes, predictor": (BANDS, TILED | RGB | {"compress": "lzw", "interleave": "band", "predictor": 2}),
    "strips": (BANDS, RGB),
    "BigTIFF": (BANDS, TILED | RGB | {"BIGTIFF": "YES"}),
    "grey": (BANDS[:1], TILED),
    "grey of 16 bits": (BANDS[:1].astype(np.uint16) * 257 + 100, TILED),
    "colours of 16 bits": (BANDS.astype(np.uint16) * 255, TILED | RGB),
    "a band of opacity": (WITH_FOURTH, TILED | RGB | {"alpha": "yes"}),
    "a fourth band": (WITH_FOURTH, TILED | RGB | {"alpha": "unspecified"}),
}


@pytest.mark.usefixtures("every_tiff_is_large")
@pytest.mark.parametrize("kind", AS_PILLOW)
def test_windows_have_the_pixels_that_the_decoded_image_has(kind: str, tmp_path: Path) -> None:
    bands, options = AS_PILLOW[kind]
    path = write_tiff(tmp_path / "image.tif", bands, **options)
    whole = decode_image(path.read_bytes())
    raster = open_image(path)
    assert isinstance(raster, Raster)
    assert raster.shape == whole.shape
    # Thousands of open files count, though none holds pixels.
    assert raster.nbytes > 10**6
    assert np.array_equal(raster.read(Window(0, 0, 240, 160), 1), whole)
    assert np.array_equal(raster.read(Window(17, 60, 150, 133), 1), whole[60:133, 17:150])


@pytest.mark.usefixtures("every_tiff_is_large")
def test_of_bands_without_colours_the_first_three_are_shown(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "image.tif", WITH_FOURTH.astype(np.uint16) * 256, photometric="minisblack", **TILED)
    raster = open_raster(path)
    assert raster is not None
    assert np.array_equal(raster.read(Window(0, 0, 240, 160), 1), PIXELS)


EIGHT = np.concatenate([BANDS, BANDS, BANDS[:2]])
OF_MANY_BANDS = {
    "8 bits, no colours": (BANDS, {"photometric": "minisblack"}),
    "16 bits, no colours": (WITH_FOURTH.astype(np.uint16) * 256, {"photometric": "minisblack"}),
    "two of 16 bits": (BANDS[:2].astype(np.uint16) * 257, {"photometric": "minisblack"}),
    "eight of 8 bits": (EIGHT, RGB | {"alpha": "unspecified"}),
    "eight of 16 bits": (EIGHT.astype(np.uint16) * 256, RGB | {"alpha": "unspecified"}),
}


@pytest.mark.parametrize("kind", OF_MANY_BANDS)
def test_a_small_tiff_of_bands_that_pillow_does_not_know_is_read_too(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bands, options = OF_MANY_BANDS[kind]
    path = write_tiff(tmp_path / "image.tif", bands, **options)
    image = open_image(path)
    assert isinstance(image, Raster)
    shown = PIXELS if len(bands) > 2 else np.repeat(PIXELS[:, :, :1], 3, axis=2)
    assert np.array_equal(image.read(Window(0, 0, 240, 160), 1), shown)
    assert size_by_window(path) == HW
    assert run_command("check", SAMPLE_DETECTOR, str(path)) in (0, 1)
    monkeypatch.setattr("scalenet_ray.data.rasters.find_spec", lambda name: None)
    with pytest.raises(TileError, match=rf"of {len(bands)} bands must be .* without rasterio, which reads it: pip"):
        open_image(path)


@pytest.mark.usefixtures("every_tiff_is_large")
@pytest.mark.parametrize("overviews", [(), (2, 4, 8)])
def test_a_reduced_window_covers_the_window_exactly(overviews: tuple[int, ...], tmp_path: Path) -> None:
    # A ramp's value is its place.
    rows, columns = np.mgrid[:1001, :1203]
    ramp = np.stack([columns, rows, rows * 0]).astype(np.uint16) * 40
    path = write_tiff(tmp_path / "image.tif", ramp, overviews=overviews, **TILED, **RGB)
    raster = open_raster(path)
    assert raster is not None
    for window, reduction in (
        (Window(0, 0, 1203, 1001), 8),
        (Window(103, 57, 903, 607), 4),
        (Window(3, 1, 603, 300), 2),
    ):
        pixels = raster.read(window, reduction)
        height, width = -(-window.height // reduction), -(-window.width // reduction)
        assert pixels.shape == (height, width, 3)
        x = window.x0 + (np.arange(width) + 0.5) * window.width / width - 0.5
        y = window.y0 + (np.arange(height) + 0.5) * window.height / height - 0.5
        # Upper bytes of 40 times the place: steps of 6.4.
        assert abs((pixels[:, :, 0] - (x * 40 - 127.5)[None] / 256).mean()) < 0.05
        assert abs((pixels[:, :, 1] - (y * 40 - 127.5)[:, None] / 256).mean()) < 0.05
        assert np.abs(pixels[:, :, 0] - (x * 40 - 127.5)[None] / 256).max() < 0.6 + reduction * 20 / 256


@pytest.mark.usefixtures("every_tiff_is_large")
def test_coarse_looks_read_the_overviews_and_windows_their_tiles_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (3, 1024, 1024), dtype=np.uint8)
    read: list[int] = []
    inner = storage.RangeFile.read

    def counted(self: storage.RangeFile, size: int = -1) -> bytes:
        data = inner(self, size)
        read.append(len(data))
        return data

    monkeypatch.setattr(storage.RangeFile, "read", counted)
    shares = {}
    for overviews in ((), (2, 4, 8, 16)):
        path = write_tiff(tmp_path / f"{len(overviews)}.tif", noise, overviews=overviews, **TILED, **RGB)
        raster = open_raster(path)
        assert raster is not None
        for name, window, reduction in (
            ("whole", Window(0, 0, 1024, 1024), 8),
            ("window", Window(100, 100, 200, 200), 1),
        ):
            read.clear()
            raster.read(window, reduction)
            shares[name, bool(overviews)] = sum(read) / noise.nbytes
    assert shares["whole", False] >= 1
    assert shares["whole", True] < 0.05
    assert shares["window", False] < 0.05
    assert shares["window", True] < 0.05


@pytest.mark.usefixtures("every_tiff_is_large")
def test_on_s3_the_bytes_of_a_window_are_fetched_alone(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (3, 2048, 2048), dtype=np.uint8)
    path = write_tiff(tmp_path / "image.tif", noise, tiled=True, blockxsize=256, blockysize=256, **RGB)
    uri = f"{s3_bucket}/an image.tif"
    storage.write_bytes_atomic(uri, path.read_bytes())
    fetched: list[int] = []
    inner = S3File._fetch_range

    def counted(self: S3File, start: int, end: int) -> bytes:
        fetched.append(end - start)
        return inner(self, start, end)

    monkeypatch.setattr(S3File, "_fetch_range", counted)
    raster = open_image(uri)
    assert isinstance(raster, Raster)
    assert np.array_equal(raster.read(Window(300, 300, 500, 500), 1), np.moveaxis(noise[:, 300:500, 300:500], 0, 2))
    assert 0 < sum(fetched) < noise.nbytes / 5


@pytest.mark.usefixtures("every_tiff_is_large")
def test_a_store_that_fails_while_a_window_is_read_says_so(
    rasterio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raster = open_raster(write_tiff(tmp_path / "image.tif", BANDS, **TILED, **RGB))
    assert raster is not None

    def lost(self: storage.RangeFile, size: int = -1) -> bytes:
        raise OSError("cannot read s3://b/k: the endpoint cannot be reached")

    monkeypatch.setattr(storage.RangeFile, "read", lost)
    with pytest.raises(
        TileError, match=r"window \(0, 0, 240, 160\) cannot be read \(cannot read s3://b/k: the endpoint"
    ):
        raster.read(Window(0, 0, 240, 160), 1)
    monkeypatch.undo()


@pytest.mark.usefixtures("every_tiff_is_large")
@pytest.mark.parametrize("compress", ["deflate", "lzw", "jpeg"])
def test_a_broken_tile_is_an_error_in_the_windows_that_need_it(compress: str, tmp_path: Path) -> None:
    path = write_tiff(
        tmp_path / "image.tif", BANDS, compress=compress, photometric="ycbcr" if compress == "jpeg" else "rgb", **TILED
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    raster = open_raster(path)
    assert raster is not None
    assert raster.read(Window(0, 0, 64, 64), 1).shape == (64, 64, 3)
    for window in (Window(100, 90, 240, 160), Window(0, 0, 240, 160)):
        with pytest.raises(TileError, match=r"cannot be read \(file, .*\): the file is damaged or out of reach;"):
            raster.read(window, 1)


@pytest.mark.usefixtures("every_tiff_is_large")
def test_a_jpeg_tile_that_ends_too_early_is_an_error_and_not_grey(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "image.tif", BANDS, compress="jpeg", photometric="ycbcr", **TILED)
    data = bytearray(path.read_bytes())
    scan = data.index(b"\xff\xda", data.index(b"\xff\xd8"))
    data[scan + 200 : scan + 202] = b"\xff\xd9"
    path.write_bytes(data)
    raster = open_raster(path)
    assert raster is not None
    with pytest.raises(TileError, match="cannot be read"):
        raster.read(Window(0, 0, 240, 160), 1)


# --- TIFFs that are not read by window ----------------------------------------------------------------------


def pillow_tiff(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, "TIFF", **options)
    return path


def turned_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


OBSTACLES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "palette": (lambda path: pillow_tiff(path, Image.fromarray(PIXELS).quantize(16)), "of RGB Palette colours"),
    "CMYK": (lambda path: pillow_tiff(path, Image.fromarray(PIXELS).convert("CMYK")), "of CMYK colours"),
    "one bit": (lambda path: pillow_tiff(path, Image.fromarray(PIXELS).convert("1")), "not 8- or 16-bit unsigned"),
    "floats": (lambda path: pillow_tiff(path, Image.new("F", (9, 9))), "not 8- or 16-bit unsigned"),
    "turned": (lambda path: pillow_tiff(path, Image.fromarray(PIXELS), exif=turned_exif()), "with orientation 6"),
    "premultiplied": (
        lambda path: write_tiff(path, WITH_FOURTH, photometric="rgb", alpha="premultiplied"),
        "with premultiplied opacity",
    ),
}


@pytest.mark.usefixtures("every_tiff_is_large")
@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_cannot_be_read_by_window_is_decoded_if_it_is_small_enough(kind: str, tmp_path: Path) -> None:
    write, reason = OBSTACLES[kind]
    path = write(tmp_path / "image.tif")
    assert open_raster(path) is None
    with pytest.raises(
        TileError, match=rf"of more than 80 pixels must be a TIFF that can be read by window, got .*{reason}"
    ):
        open_image(path, max_pixels=80)


@pytest.mark.usefixtures("every_tiff_is_large")
def test_strips_that_hold_the_whole_image_are_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalenet_ray.data.rasters._MAX_BLOCK_BYTES", 10_000)
    path = pillow_tiff(tmp_path / "image.tif", Image.fromarray(PIXELS), tiffinfo={278: 160})
    assert np.array_equal(open_image(path), PIXELS)
    with pytest.raises(
        TileError, match=r"in blocks of \d+ bytes: store it in tiles, e.g. with gdal_translate -co TILED"
    ):
        open_image(path, max_pixels=1000)


@pytest.mark.usefixtures("every_tiff_is_large")
def test_without_rasterio_a_large_tiff_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalenet_ray.data.rasters.find_spec", lambda name: None)
    path = pillow_tiff(tmp_path / "image.tif", Image.fromarray(PIXELS))
    assert np.array_equal(open_image(path), PIXELS)
    with pytest.raises(TileError, match=r"without rasterio, which reads it: pip install 'scalenet-ray\[geo\]'"):
        open_image(path, max_pixels=1000)
    with pytest.raises(UserError, match=r"must be read with rasterio, got none installed: pip install"):
        georeference_of(path)


def test_a_small_tiff_and_other_formats_are_decoded_as_ever(tmp_path: Path) -> None:
    path = pillow_tiff(tmp_path / "image.tif", Image.fromarray(PIXELS))
    assert np.array_equal(open_image(path), PIXELS)
    (tmp_path / "text.tif").write_text("no image")
    with pytest.raises(TileError, match="must be a JPEG, PNG, TIFF, BMP, WebP or GIF, got"):
        open_image(tmp_path / "text.tif")
    with pytest.raises(TileError, match="there is no such file"):
        open_image(tmp_path / "missing.tif")


@pytest.mark.usefixtures("every_tiff_is_large")
def test_another_size_than_annotated_is_refused(rasterio: Any, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "image.tif", BANDS, **TILED, **RGB)
    assert isinstance(open_image(path, expect_hw=HW), Raster)
    with pytest.raises(TileError, match=r"must be \(240, 160\) .* as annotated, got \(160, 240\)"):
        open_image(path, expect_hw=(240, 160))


@pytest.mark.usefixtures("every_tiff_is_large")
def test_a_tiff_cut_short_anywhere_is_an_error_or_whole(rasterio: Any, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "image.tif", BANDS[:, :100, :100], compress="deflate", **TILED, **RGB)
    data = path.read_bytes()
    refused = 0
    for length in range(0, len(data), len(data) // 150):
        path.write_bytes(data[:length])
        try:
            pixels = whole_pixels(open_image(path), 1000)
        except TileError:
            refused += 1
        else:
            assert np.array_equal(pixels, PIXELS[:100, :100])
    assert refused > 140


@pytest.mark.usefixtures("every_tiff_is_large")
# GDAL quotes damaged text, which rasterio's log cannot decode.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@given(data=st.data())
def test_damaged_bytes_give_pixels_or_a_tile_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    compress = data.draw(st.sampled_from(["none", "deflate", "lzw"]))
    path = write_tiff(folder / "image.tif", BANDS[:, :100, :100], compress=compress, **TILED, **RGB)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        # The first bytes hold the header and its tags.
        damaged[data.draw(st.integers(0, 400) | st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = open_image(path, max_pixels=100_000)
            pixels = whole_pixels(image, 100) if image.shape[0] * image.shape[1] <= 100_000 else None
        except TileError:
            return
    assert pixels is None or (pixels.dtype, pixels.shape[2]) == (np.uint8, 3)


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("every_tiff_is_large")
def test_a_run_over_large_tiffs_loses_the_broken_one_alone(rasterio: Any, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.tif", "b.tif", "c.jpg"):
        if name.endswith("jpg"):
            Image.fromarray(PIXELS).save(folder / name)
        else:
            write_tiff(folder / name, BANDS, compress="deflate", overviews=(2,), **TILED, **RGB)
    data = bytearray((folder / "b.tif").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    (folder / "b.tif").write_bytes(data)
    run = tmp_path / "run"
    arguments = ("detect", "--images", str(folder), "--engine", "local", "--policy", "grid-2", "--output", str(run))
    assert run_command(*arguments, "--max-failures", "1", "--detector", "tests.test_rasters:DeclaredDetector") == 0
    (failed,) = pq.read_table(run / "failures.parquet").to_pylist()
    assert (failed["file"].rpartition("/")[2], failed["stage"]) == ("b.tif", "read")
    assert "cannot be read" in failed["reason"]
    assert (run / "report.html").exists()


class DeclaredDetector(RandomDetector):
    """The random detector, as a user's own."""

    iou_threshold = 0.6


@pytest.mark.usefixtures("every_tiff_is_large")
def test_one_image_in_python_is_read_by_window_and_drawn_reduced(
    rasterio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalenet_ray.api.prediction.PICTURE_SIDE", 100)
    path = write_tiff(tmp_path / "image.tif", BANDS, overviews=(2,), **TILED, **RGB)
    result = get_scaled_prediction(path, DeclaredDetector(), policy="grid-2", verbose=0)
    assert isinstance(result.pixels, Raster)
    assert (result.image_height, result.image_width) == HW
    assert result.image.size == (120, 80)
    picture = Image.open(io.BytesIO(storage.read_bytes(result.export_visuals(str(tmp_path)))))
    assert picture.size == (120, 80)


@pytest.mark.usefixtures("every_tiff_is_large")
@pytest.mark.parametrize("policy", ["first-pass", "grid-2"])
def test_show_draws_a_large_tiff_as_it_draws_the_decoded_image(
    policy: str, rasterio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiff(tmp_path / "image.tif", BANDS, **TILED, **RGB)
    drawn = []
    for longest in (1200, 100):
        monkeypatch.setattr("scalenet_ray.report.recursion_figure._LONGEST_SIDE", longest)
        output = tmp_path / f"{longest}.png"
        arguments = ("show", str(path), "--policy", policy, "--detector", "tests.test_rasters:DeclaredDetector")
        assert run_command(*arguments, "--output", str(output)) == 0
        drawn.append(np.asarray(Image.open(output).convert("RGB")).astype(int))
    # At less than its size it is read reduced; windows and boxes stay where they are.
    assert drawn[0].shape == drawn[1].shape
    assert np.abs(drawn[0] - drawn[1]).mean() < 25


MEMORY = """
import resource, sys
import numpy as np
from scalenet_ray.core.geometry import Window
from scalenet_ray.data.rasters import open_image
image = open_image(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
height, width, _ = image.shape
image.read(Window(0, 0, width, height), 16)
for x in range(0, width - 640, 640):
    image.read(Window(x, x, x + 640, x + 640), 1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def write_large(path: Path, side: int) -> Path:
    """Write a square image that compresses well, tile by tile."""
    rasterio = pytest.importorskip("rasterio")
    size = 512
    block = np.kron(
        np.random.default_rng(0).integers(60, 200, (3, 64, 64), dtype=np.uint8), np.ones((1, 8, 8), np.uint8)
    )
    shape = {"height": side, "width": side, "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
    place = rasterio.Affine(0.1, 0, 500_000, 0, -0.1, 5_000_000)
    options = {"tiled": True, "blockxsize": size, "blockysize": size, "compress": "deflate", "zlevel": 1} | RGB
    with (
        rasterio.Env(GDAL_CACHEMAX=64 * 2**20),
        rasterio.open(path, "w", driver="GTiff", transform=place, BIGTIFF="IF_SAFER", **shape, **options) as dataset,
    ):
        for y in range(0, side, size):
            for x in range(0, side, size):
                height, width = min(size, side - y), min(size, side - x)
                window = ((y, y + height), (x, x + width))
                dataset.write(block[:, :height, :width] + np.uint8((x + y) // size % 32), window=window)
    return path


def test_a_large_tiff_takes_the_memory_of_its_windows(rasterio: Any, tmp_path: Path) -> None:
    path = write_large(tmp_path / "large.tif", 12_000)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    # Decoded, it takes 432 MB.
    assert int(done.stdout) < 150


RUN_AND_MEMORY = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, "-m", "scalenet_ray", *sys.argv[1:]]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
sys.exit(code)
"""


@pytest.mark.slow
def test_a_run_over_a_tiff_of_1200_megabytes_takes_less_than_a_gigabyte(rasterio: Any, tmp_path: Path) -> None:
    write_large(tmp_path / "large.tif", 20_000)
    arguments = ["detect", "--images", str(tmp_path / "*.tif"), "--engine", "local", "--policy", "grid-4"]
    named = ["--detector", SAMPLE_DETECTOR, "--report-pictures", "0", "--output", str(tmp_path / "run")]
    command = [sys.executable, "-c", RUN_AND_MEMORY, *arguments, *named]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 images done" in done.stdout
    assert int(done.stdout.split()[-1]) < 1000
