"""The folder in which the documentation's commands run: data, networks, S3 and Ray as the pages name them.

python -m tests.documented_world    starts a Ray in the current folder, prints its address, ends it with its input
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import boto3
import cv2
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from scalenet_ray.models.class_names import COCO_CATEGORIES, COCO_NUM_CLASSES
from scalenet_ray.models.torchvision_builders import build_detector
from tests.colour_exports import export
from tests.job_scripts import REPOSITORY
from tests.ray_fixture import RAY_ENVIRONMENT

_SHORTER_BY_COMMAND = {
    "eval": "--engine local --report-pictures 1",
    "detect": "--engine local --report-pictures 1 --limit 3",
    "train": "--epochs 1 --limit 2 --batch-size 2 --workers 1 --gpus-per-worker 0 --input-side 32",
    "finetune": "--epochs 1 --limit 1 --batch-size 1 --input-side 64",
    "tune": "--trials 2 --subsets 1",
}
"""Flags added to every call of a command, after its own flags: less work, no GPU, one process if that is enough."""

_JOBS = {
    "eval": "eval_coco",
    "detect": "detect",
    "train": "train_scalenet",
    "finetune": "finetune_detector",
    "tune": "tune_recursion",
}
SHORTER = {
    **_SHORTER_BY_COMMAND,
    **{f"jobs/{job}.py": _SHORTER_BY_COMMAND[command] for command, job in _JOBS.items()},
}
"""The same by a command's name, or by the path of its script."""

_CELL = 8
_SIDE = 64
_COLOURS = {1: (255, 0, 0), 2: (0, 255, 0), 3: (0, 0, 255)}
"""Category id (person, bicycle, car) -> the colour of its objects."""


@dataclass(frozen=True)
class World:
    """A folder, and the environment of whoever works in it.

    Attributes:
        folder: where commands run.
        environment: the whole of it.
        made: what the folder held at first, by name.
    """

    folder: Path
    environment: dict[str, str]
    made: frozenset[str]

    def tidy(self) -> None:
        """Take away what commands left, here and in the bucket."""
        for path in self.folder.iterdir():
            if path.name not in self.made:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for each in _bucket(self.environment).objects.filter(Prefix="runs/"):
            each.delete()

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a shell block of a page, up to the first command that fails."""
        return self._done("bash", "-euo", "pipefail", "-c", script)

    def run_python(self, text: str) -> subprocess.CompletedProcess[str]:
        """Run a Python block of a page in a process of its own."""
        return self._done(sys.executable, "-c", text)

    def _done(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )


@contextmanager
def build_world(folder: Path, s3_endpoint: str) -> Iterator[World]:
    """Build the world in an empty folder; its Ray is shared by all commands, and ends with it."""
    environment = _environment(folder, s3_endpoint)
    (folder / "home").mkdir()
    for file in ("photograph.jpg", "photos/1.jpg", "photos/more/2.jpg"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_picture(len(file))[0]).save(folder / file)
    film = cv2.VideoWriter(str(folder / "film.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (160, 120))
    film.write(np.zeros((120, 160, 3), np.uint8))
    film.release()
    _write_coco(folder / "DIR")
    _write_yolo(folder / "yolo")
    _write_yolox(folder / "yolox_nano.onnx")
    export(folder / "yolo11n.onnx", "yolov8")
    (folder / "names.txt").write_text("\n".join(COCO_CATEGORIES.values()))
    _write_torchvision(folder / "torch")
    (folder / "DATA" / "models").mkdir(parents=True)
    (folder / "DATA" / "coco").symlink_to(folder / "DIR")
    (folder / "DATA" / "models" / "yolox_nano.onnx").symlink_to(folder / "yolox_nano.onnx")
    (folder / "jobs").symlink_to(REPOSITORY / "jobs")
    _write_programs(folder)
    _upload(folder, environment)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.documented_world"],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as ray:
        assert ray.stdout is not None
        # It may say other things first.
        address = next((line.removeprefix("at ").strip() for line in ray.stdout if line.startswith("at ")), "")
        assert address, "Ray has not started"
        yield World(folder, {**environment, "RAY_ADDRESS": address}, frozenset(path.name for path in folder.iterdir()))
        ray.communicate()


def _environment(folder: Path, s3_endpoint: str) -> dict[str, str]:
    """A newcomer's: a home of its own, no activated environment, and S3 as the pages say it is set."""
    kept = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TMPDIR") if name in os.environ}
    return {
        **kept,
        **RAY_ENVIRONMENT,
        "HOME": f"{folder}/home",
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
        "TORCH_HOME": f"{folder}/torch",
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "key-of-a-test",
        "AWS_SECRET_ACCESS_KEY": "word-of-a-test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _write_programs(folder: Path) -> None:
    """Write `scalenet-ray` and `.venv/bin/python`, which shorten runs, and a `make` that only prints its commands."""
    program = """\
        #!{python}
        import os, sys
        arguments = sys.argv[1:]
        shorter = {shorter!r}.get(arguments[0], "").split()
        os.execv({python!r}, [{python!r}, *{module!r}, *arguments, *shorter])
    """
    python = program.format(python=sys.executable, shorter=SHORTER, module=[])
    scalenet_ray = program.format(python=sys.executable, shorter=SHORTER, module=["-m", "scalenet_ray"])
    make = f"""\
        #!/bin/sh
        exec {shutil.which("make")} --dry-run --directory {REPOSITORY} "$@"
    """
    programs = {".venv/bin/python": python, "bin/scalenet-ray": scalenet_ray, "bin/make": make}
    for path, text in programs.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(dedent(text))
        (folder / path).chmod(stat.S_IRWXU)


def _picture(seed: int) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """[128, 128, 3] black with coloured rectangles, and (category id, x, y, side) of each."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((2 * _SIDE, 2 * _SIDE, 3), np.uint8)
    objects = []
    for i, side in enumerate((32, 8, 8, 8)):
        # A quarter of the picture to each, so that none hides another; a small one in the middle of a cell of the tile.
        x, y = (
            _SIDE * half + 2 * _CELL * int(at) + 4
            for at, half in zip(rng.integers(0, 2, 2), (i % 2, i // 2), strict=True)
        )
        category_id = int(rng.integers(1, 4))
        pixels[y : y + side, x : x + side] = _COLOURS[category_id]
        objects.append((category_id, x, y, side))
    return pixels, objects


def _write_coco(folder: Path) -> None:
    """Three pictures in train2017 and three in val2017, in COCO's layout."""
    (folder / "annotations").mkdir(parents=True)
    for split, ids in {"train2017": range(1, 4), "val2017": range(4, 7)}.items():
        (folder / split).mkdir()
        images, annotations = [], []
        for image_id in ids:
            pixels, objects = _picture(image_id)
            name = f"{image_id:012d}.jpg"
            Image.fromarray(pixels).save(folder / split / name, quality=95)
            images.append({"id": image_id, "file_name": name, "height": pixels.shape[0], "width": pixels.shape[1]})
            for category_id, x, y, side in objects:
                polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
                annotations.append(
                    {
                        "id": 10 * image_id + len(annotations),
                        "image_id": image_id,
                        "category_id": category_id,
                        "bbox": [x, y, side, side],
                        "area": side * side,
                        "iscrowd": 0,
                        "segmentation": [polygon],
                    }
                )
        categories = [{"id": category_id, "name": COCO_CATEGORIES[category_id]} for category_id in _COLOURS]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


def _write_yolo(folder: Path) -> None:
    """A picture for each of train and val, in YOLO's layout."""
    for split, seed in (("train", 1), ("val", 4)):
        pixels, objects = _picture(seed)
        for part in ("images", "labels"):
            (folder / part / split).mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "images" / split / "1.jpg", quality=95)
        height, width = pixels.shape[:2]
        lines = [
            f"{category_id - 1} {(x + side / 2) / width} {(y + side / 2) / height} {side / width} {side / height}\n"
            for category_id, x, y, side in objects
        ]
        (folder / "labels" / split / "1.txt").write_text("".join(lines))
    names = [COCO_CATEGORIES[category_id] for category_id in _COLOURS]
    content = {"train": "images/train", "val": "images/val", "names": names}
    (folder / "data.yaml").write_text(json.dumps(content))


def _write_yolox(path: Path) -> None:
    """A network built as YOLOX is, exported for 64 x 64: it sees a box of 4 pixels in each cell of 8 that isn't black.

    Its first three of COCO's classes score 0.9 times the cell's mean red, green and blue, over 255.
    """
    nodes, weights, levels = [], {"flat": np.array([1, 85, -1], np.int64)}, []
    for stride in (8, 16, 32):
        mean = np.zeros((3, 3, stride, stride), np.float32)
        mean[range(3), range(3)] = 1 / (255 * stride * stride)
        # BGR in, red, green and blue out.
        colours = np.zeros((80, 3, 1, 1), np.float32)
        colours[range(3), [2, 1, 0]] = 1
        found = np.array([0.5, 0.5, math.log(0.5), math.log(0.5), 0.9 if stride == 8 else 0], np.float32)
        weights |= {f"mean{stride}": mean, f"colours{stride}": colours, f"found{stride}": found}
        weights[f"none{stride}"] = np.zeros((5, 3, 1, 1), np.float32)
        sides = {"kernel_shape": [stride, stride], "strides": [stride, stride]}
        nodes += [
            helper.make_node("Conv", ["images", f"mean{stride}"], [f"map{stride}"], **sides),
            helper.make_node("Conv", [f"map{stride}", f"none{stride}", f"found{stride}"], [f"boxes{stride}"]),
            helper.make_node("Conv", [f"map{stride}", f"colours{stride}"], [f"classes{stride}"]),
            helper.make_node("Concat", [f"boxes{stride}", f"classes{stride}"], [f"level{stride}"], axis=1),
            helper.make_node("Reshape", [f"level{stride}", "flat"], [f"rows{stride}"]),
        ]
        levels.append(f"rows{stride}")
    nodes += [
        helper.make_node("Concat", levels, ["all"], axis=2),
        helper.make_node("Transpose", ["all"], ["output"], perm=[0, 2, 1]),
    ]
    rows = sum((_SIDE // stride) ** 2 for stride in (8, 16, 32))
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, _SIDE, _SIDE])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, rows, 85])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def _write_torchvision(home: Path) -> None:
    """Random weights of Faster R-CNN where torchvision looks for those that it fetched; it finds nothing."""
    model = build_detector("fasterrcnn_resnet50_fpn", COCO_NUM_CLASSES)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[0] = 100.0
    path = home / "hub" / "checkpoints" / FasterRCNN_ResNet50_FPN_Weights.DEFAULT.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(model.state_dict(), path)


def _bucket(environment: dict[str, str]) -> Any:
    client = boto3.resource(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_REGION"],
    )
    return client.Bucket("bucket")


def _upload(folder: Path, environment: dict[str, str]) -> None:
    """s3://bucket with the data set and the detector."""
    bucket = _bucket(environment)
    bucket.create()
    for part in ("val2017", "annotations"):
        for path in (folder / "DIR" / part).iterdir():
            bucket.upload_file(str(path), f"coco/{part}/{path.name}")
    bucket.upload_file(str(folder / "yolox_nano.onnx"), "yolox.onnx")


def _serve_ray() -> None:
    import ray

    # A cluster's address that an ended run left behind must not be joined: hence "local".
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    sys.stdout.write(f"at {ray.get_runtime_context().gcs_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _serve_ray()
