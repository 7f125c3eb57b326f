"""Reading of large images: what JPEG's reduced decode would save and cost, and windows of a large TIFF.

    SCALENET_RAY_DATA=DATA .venv/bin/python -m bench.reading jpeg
    .venv/bin/python -m bench.reading tiff FOLDER

The TIFF is 40,000 x 40,000 pixels of three bands, which compress well: 450 MB, and 700 MB with overviews.
"""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from scalenet_ray.core.geometry import Window
from scalenet_ray.core.policy import parse_policy
from scalenet_ray.core.recursion import Step, recursive_detect
from scalenet_ray.data.coco import read_annotations
from scalenet_ray.data.formats import to_results
from scalenet_ray.data.images import decode_image
from scalenet_ray.data.rasters import open_raster
from scalenet_ray.evaluation.ap import evaluate
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.spec import SAMPLE_DETECTOR, NetworkSpec

_ROUNDS = 9
_SIDE, _BLOCK = 40_000, 512


class _ReducedJpeg:
    """A JPEG whose coarse looks come from its reduced decode (libjpeg's, to 1/2, 1/4 or 1/8).

    Args:
        data: the file.
        extra: reduction beyond the one that leaves twice a tile's pixels: 1 or 2.
    """

    nbytes = 0

    def __init__(self, data: bytes, extra: int) -> None:
        self._data, self._extra = data, extra
        self._pixels = decode_image(data)
        self.reduced = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, _ = self._pixels.shape
        return (height, width, 3)

    def read(self, window: Window, reduction: int) -> np.ndarray:
        whole = window.xyxy == (0, 0, self.shape[1], self.shape[0])
        if whole and reduction > 1:
            self.reduced += 1
            return _reduced(self._data, min(8, reduction * self._extra))
        return self._pixels[window.y0 : window.y1, window.x0 : window.x1]


def _reduced(data: bytes, reduction: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (-(-image.width // reduction), -(-image.height // reduction)))
    return np.asarray(image.convert("RGB"))


def _median(values: list[float]) -> str:
    return f"{np.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def _jpeg_times(street: Path) -> None:
    photographs = [np.asarray(Image.open(path)) for path in sorted(street.glob("*.jpg"))[:2]]
    pixels = np.concatenate([np.concatenate(photographs, axis=1)] * 3)[:3000, :4000]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    data = stream.getvalue()
    ways: dict[str, Callable[[], object]] = {"full": lambda: decode_image(data)}
    ways |= {f"1/{k}": lambda k=k: _reduced(data, k) for k in (2, 4, 8)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, decode in ways.items():
            begun = time.perf_counter()
            decode()
            seconds[name].append(time.perf_counter() - begun)
    for name, values in seconds.items():
        ratios = [value / full for value, full in zip(values, seconds["full"], strict=True)]
        print(f"4000 x 3000 JPEG, {name}: {1e3 * np.median(values):.0f} ms; over full {_median(ratios)}")


def jpeg() -> None:
    """Print the time of each decode, and AP by policy with full and with reduced decode of coarse looks."""
    data = Path(os.environ["SCALENET_RAY_DATA"])
    _jpeg_times(data / "large" / "street" / "val")
    network = f"yolox-onnx:{data / 'models' / 'yolox_nano.onnx'}"
    declared = load_detector(network)
    for name, split in (("large/street", "val"), ("large/drone", "val"), ("coco", "val2017")):
        dataset = read_annotations(data / name / "annotations" / f"instances_{split}.json")
        detect = NetworkSpec(detector=network).load_detector(dataset.categories, dataset.unused_categories)
        files = {record: (data / name / split / record.file_name).read_bytes() for record in dataset.images}
        for policy_name in ("whole", "first-pass"):
            policy = parse_policy(policy_name, input_side=declared.input_side, iou_threshold=declared.iou_threshold)
            for extra in (0, 1, 2):
                rows, reduced, without_windows = [], 0, 0
                for record, file in files.items():
                    image = _ReducedJpeg(file, extra) if extra else decode_image(file)
                    steps: list[Step] = []
                    found = recursive_detect(image, record.image_id, policy, detect=detect, observe=steps.append)
                    rows += to_results(record.image_id, found.detections, found.image_hw)
                    is_reduced = isinstance(image, _ReducedJpeg) and image.reduced > 0
                    reduced += is_reduced
                    without_windows += is_reduced and len(steps) == 1
                ap = evaluate(dataset, rows)
                print(
                    f"{name} {policy_name} extra {extra}: AP {ap['AP']:.2f}, AP_small {ap['AP_small']:.2f}; "
                    f"{reduced} of {len(files)} reduced, {without_windows} of them without a window"
                )


def _write_tiff(path: Path, overviews: bool) -> None:
    import rasterio  # pyright: ignore[reportMissingImports]
    from rasterio.enums import Resampling  # pyright: ignore[reportMissingImports]

    if path.exists():
        return
    block = np.random.default_rng(0).integers(60, 200, (3, 64, 64), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    shape = {"height": _SIDE, "width": _SIDE, "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
    place = rasterio.Affine(0.1, 0, 500_000, 0, -0.1, 5_000_000)
    tiles = {"tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK, "compress": "deflate", "photometric": "rgb"}
    with (
        rasterio.Env(GDAL_CACHEMAX=64 * 2**20, COMPRESS_OVERVIEW="DEFLATE"),
        rasterio.open(path, "w", driver="GTiff", transform=place, BIGTIFF="YES", **shape, **tiles) as dataset,
    ):
        for y in range(0, _SIDE, _BLOCK):
            for x in range(0, _SIDE, _BLOCK):
                height, width = min(_BLOCK, _SIDE - y), min(_BLOCK, _SIDE - x)
                pixels = block[:, :height, :width] + np.uint8((x + y) // _BLOCK % 32)
                dataset.write(pixels, window=((y, y + height), (x, x + width)))
        if overviews:
            dataset.build_overviews([2, 4, 8, 16, 32, 64], Resampling.average)


def tiff(folder: Path) -> None:
    """Print the time of coarse and fine reads, and time and memory of a run, without and with overviews."""
    for kind in ("without", "with"):
        path = folder / f"{kind}_overviews.tif"
        _write_tiff(path, kind == "with")
        for name, window, reduction in (
            ("whole, 1/32", Window(0, 0, _SIDE, _SIDE), 32),
            ("10,000 x 10,000, 1/8", Window(5000, 6000, 15_000, 16_000), 8),
            ("640 x 640", Window(5000, 6000, 5640, 6640), 1),
        ):
            seconds = []
            for _ in range(3):
                raster = open_raster(path)
                assert raster is not None
                begun = time.perf_counter()
                raster.read(window, reduction)
                seconds.append(time.perf_counter() - begun)
            print(f"{kind} overviews, {name}: {_median(seconds)} s")
        run = folder / f"run_{kind}_{time.time_ns()}"
        flags = ["--engine", "local", "--policy", "grid-16", "--detector", SAMPLE_DETECTOR, "--output", str(run)]
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "scalenet_ray", "detect", "--images", str(path), *flags], check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
        print(f"{kind} overviews, detect: {time.perf_counter() - begun:.0f} s, peak so far {peak} MB")


if __name__ == "__main__":
    if sys.argv[1] == "jpeg":
        jpeg()
    else:
        tiff(Path(sys.argv[2]))
