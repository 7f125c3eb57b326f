"""Large images: AP against the pixels that the detector computes, ours against sliced inference.

    SCALENET_RAY_DATA=DATA PYTHONPATH=.venv/peers .venv/bin/python -m bench.large
    .venv/bin/python -m bench.large --table runs/bench/large/results.json

Each contender runs in one process of one thread; rates are of rounds that alternate. Classes of which a set holds under
20 objects are left out. The detectors are DATA/models/yolo11n.onnx at 640 and yolox_nano.onnx at 416.
"""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.ticker import LogLocator, NullLocator

from bench.contenders import race
from bench.workloads import Workload, data_folder, mosaics, ratio, tiled, wall
from scalenet_ray.core.detections import SHOWN_SCORE, Detections
from scalenet_ray.core.geometry import iou_matrix
from scalenet_ray.data.coco import objects_of
from scalenet_ray.data.formats import to_results
from scalenet_ray.evaluation.ap import summarize
from scalenet_ray.evaluation.compare import paired_intervals
from scalenet_ray.evaluation.matching import Matches, match_results
from scalenet_ray.evaluation.tide import FOREGROUND_IOU
from scalenet_ray.report.charts import drawing, quiet

_DETECTORS = {"yolo11n": "onnx:{models}/yolo11n.onnx", "yolox_nano": "yolox-onnx:{models}/yolox_nano.onnx"}
_LEAST_OBJECTS = 20
_OURS, _SLICES = "regions", "slices"
_METRICS = ("AP", "AP_small")
_CONTENDERS = (
    "whole",
    _SLICES,
    "slices x1.5",
    "first-pass",
    _OURS,
    "regions-oracle",
    "sahi",
    "sahi nms",
    "supervision",
)
_COLOURS = (
    "#888888", "#0072b2", "#56b4e9", "#cc79a7", "#d55e00", "#bbbbbb", "#009e73", "#66c2a5", "#f0e442",
)  # fmt: skip
_TIMED = (_OURS, _SLICES, "sahi", "sahi nms", "supervision")


@dataclass(frozen=True)
class LargeImages:
    """AP, pixels and rates of policies and peers on large images.

    Attributes:
        sets: which: street, road, drone, mosaic-100, mosaic-30, mosaic-10, coco, coco_boxes; street-tiled, road-tiled,
            drone-tiled, the set's images side by side in pictures of up to 7,680 x 4,320 pixels; and wall, a hundred
            photographs as one picture, whose objects are those that the detector finds in them one by one.
        detectors: yolo11n, yolox_nano.
        contenders: whole, slices (of the input side, at native), slices x1.5, first-pass, regions, regions-oracle, sahi
            (its default merging), sahi nms, supervision.
        rounds: rounds of the rates; 0 measures none.
        folder: where mosaics and results.json are written.
        table: a results.json to print as a table, in place of measuring.
        plot: with `table`: an SVG of AP against megapixels to write.
    """

    sets: tuple[str, ...] = ("street", "road", "drone", "mosaic-100", "mosaic-30", "mosaic-10", "coco", "coco_boxes")
    detectors: tuple[str, ...] = tuple(_DETECTORS)
    contenders: tuple[str, ...] = _CONTENDERS
    rounds: int = 0
    folder: Path = Path("runs/bench/large")
    table: Path | None = None
    plot: Path | None = None


def workload_of(name: str, detector: str, folder: Path) -> Workload:
    """The images of a set, see `LargeImages.sets`; mosaics and the like are written into the folder."""
    data = data_folder()
    kind = _DETECTORS[detector].format(models=data / "models")
    if name.startswith("mosaic-"):
        return mosaics(folder / name, kind, fill=int(name.removeprefix("mosaic-")) / 100)
    if name.endswith("-tiled"):
        return tiled(folder / name, workload_of(name.removesuffix("-tiled"), detector, folder))
    if name == "wall":
        return wall(folder / f"wall-{detector}", kind)
    if name == "coco":
        annotations = data / "coco" / "annotations" / "instances_val2017.json"
        return Workload(data / "coco" / "val2017", annotations, kind)
    if name == "coco_boxes":
        return Workload(data / name / "val", data / name / "annotations" / "instances_val.json", kind)
    root = data / "large" / name
    return Workload(root / "val", root / "annotations" / "instances_val.json", kind, least_objects=_LEAST_OBJECTS)


def compare_large(job: LargeImages, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure all sets and write results.json after each.

    Returns:
        "set detector" -> contender -> AP, AP_small with intervals over `slices`, megapixels, and rates over ours.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    file = job.folder / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in job.sets:
        for detector in job.detectors:
            workload = workload_of(name, detector, job.folder)
            rows = _compare(workload, job, f"{name} {detector}", say)
            results[f"{name} {detector}"] = results.get(f"{name} {detector}", {}) | rows
            file.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _named(contender: str, input_side: int) -> str:
    """The policy or peer of a contender, by its name in `bench.contenders`."""
    return {
        _SLICES: f"slices@{input_side}",
        "slices x1.5": f"slices@{math.ceil(input_side / 1.5)}",
        "sahi": "sahi_native",
        "sahi nms": "sahi_native_nms",
        "supervision": "supervision_native",
    }.get(contender, contender)


def _compare(workload: Workload, job: LargeImages, title: str, say: Callable[[str], None]) -> dict[str, Any]:
    side = workload.policy("whole").input_side
    dataset = workload.dataset
    rates: dict[str, list[float]] = defaultdict(list)
    rows: dict[str, Any] = {}
    matched = {}
    for round_ in range(max(1, job.rounds)):
        for contender in job.contenders:
            if round_ and contender not in _TIMED:
                continue
            raced = race(_named(contender, side), workload, workload.records, 1)
            rates[contender].append(raced.images_per_second)
            if round_:
                continue
            hws = {record.image_id: record.hw for record in workload.records}
            found = [
                row
                for image_id, each in sorted(raced.found.items())
                for row in to_results(image_id, each, hws[image_id])
            ]
            matched[contender] = match_results(dataset, found)
            rows[contender] = _percentages(matched[contender]) | {
                "found": _found(workload, raced.found),
                "megapixels": raced.megapixels,
            }
            say(f"{title}: {contender} {json.dumps(rows[contender])}")
    for other, differences in paired_intervals(matched, _SLICES).items() if _SLICES in matched else ():
        rows[other]["over slices"] = {metric: differences[metric] for metric in _METRICS}
    for contender in _TIMED if job.rounds and _OURS in rates else ():
        if contender in rates and contender != _OURS:
            rows[contender]["ours over it"] = ratio(rates[_OURS], rates[contender])
    return rows


def _percentages(matches: Matches) -> dict[str, float]:
    """AP and AP_small in percent; NaN where there are no such objects."""
    figures = summarize(matches)
    return {name: figures[name] for name in _METRICS}


def _found(workload: Workload, detections: Mapping[int, Detections]) -> float:
    """Share of the objects, in percent, that a box of its class and of a score of 0.3 or more overlaps by half."""
    found = []
    for record in workload.records:
        objects, boxes = objects_of(workload.dataset, record.image_id), detections[record.image_id]
        boxes = boxes[boxes.scores >= SHOWN_SCORE]
        same = objects.labels[:, None] == boxes.labels
        overlap = iou_matrix(objects.boxes, boxes.boxes) >= FOREGROUND_IOU
        found.append((same & overlap).any(axis=1)[~objects.crowd])
    return float(np.concatenate(found).mean() * 100)


def plot(results: Mapping[str, Any]) -> str:
    """SVG of AP against megapixels that the detector computes: a panel per large set, a point per contender."""
    results = {title: rows for title, rows in results.items() if _SLICES in rows and not title.startswith("coco")}
    columns = 3
    rows = -(-len(results) // columns)
    colours = dict(zip(_CONTENDERS, _COLOURS, strict=True))
    with drawing(4.2 * columns, 3.2 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (title, contenders) in zip(panels, results.items(), strict=False):
            for name, row in contenders.items():
                size = 90 if name == _OURS else 40
                axes.scatter(row["megapixels"], row["AP"], size, colours.get(name, "#000000"), label=name, zorder=3)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_ylim(0, 1.1 * max(row["AP"] for row in contenders.values()))
            axes.set_title(title, loc="left")
            axes.set_xlabel("megapixels per image")
            axes.set_ylabel("AP")
            quiet(axes, "both")
        for axes in panels[len(results) :]:
            axes.set_axis_off()
        handles = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a table: sets and detectors by contenders."""
    lines = [
        "| set, detector | | AP | AP_small | found | MP | AP over slices | images/s of regions over it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, rows in results.items():
        for contender, row in rows.items():
            over = row.get("over slices", {}).get("AP")
            interval = f"{over['difference']:+.1f} [{over['low']:+.1f}, {over['high']:+.1f}]" if over else ""
            rate = row.get("ours over it")
            speed = f"{rate['median']:.2f} [{rate['min']:.2f}, {rate['max']:.2f}]" if rate else ""
            small = "-" if math.isnan(row["AP_small"]) else f"{row['AP_small']:.1f}"
            found = f"{row['found']:.0f} %" if "found" in row else ""
            figures = f"{row['AP']:.1f} | {small} | {found} | {row['megapixels']:.2f}"
            lines.append(f"| {title} | {contender} | {figures} | {interval} | {speed} |")
            title = ""
    return "\n".join(lines)


def main(job: LargeImages) -> None:
    """Measure and print the table, or print that of a file."""
    results = json.loads(job.table.read_text()) if job.table is not None else compare_large(job)
    print(markdown(results))
    if job.plot is not None:
        job.plot.write_text(plot(results))


if __name__ == "__main__":
    main(tyro.cli(LargeImages))
