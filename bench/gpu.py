"""Speed on a GPU: recursion over the plain detector, networks, the engine, and training.

    .venv/bin/python -m bench.gpu --data DATA --minutes 8
    .venv/bin/python -m bench.gpu --device cpu                    # a rehearsal with small networks and images
    .venv/bin/python -m bench.gpu --table runs/bench/gpu.jsonl    # the file as tables for docs/results.md

Each figure is a line of a JSON lines file, written as soon as it is measured. Weights are random: they cost what
trained ones do, but for the boxes that come out. Windows come from the ground truth.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torchvision
import tyro

from bench.gpu_engine import measure_engine, measure_steps, measure_training
from bench.gpu_large import measure_large, measure_shapes
from bench.gpu_networks import FULL, TOY, Record, Setup, measure_networks
from bench.gpu_recursion import measure_recursion
from scalenet_ray.models.devices import device_on_this_machine
from scalenet_ray.sample.scenes import write_sample


class _Part(NamedTuple):
    """A part, and the share of the minutes at whose end it begins no more figures."""

    measure: Callable[[Setup], Iterator[Record]]
    until: float


_PARTS = {
    "recursion": _Part(measure_recursion, 0.2),
    "networks": _Part(measure_networks, 0.55),
    "shapes": _Part(measure_shapes, 0.6),
    "large": _Part(measure_large, 0.75),
    "engine": _Part(measure_engine, 0.85),
    "steps": _Part(measure_steps, 0.9),
    "training": _Part(measure_training, 1.0),
}


@dataclass(frozen=True)
class GpuBench:
    """Measure what a GPU does, as far as the time goes.

    Attributes:
        data: folder with coco/ (annotations/ and val2017/) and, for the part large, large/street/ (annotations/ and
            val/); by default drawn scenes.
        detector: a trained detector for the parts shapes and large, kind:what; without it they are left out.
        device: cuda; or cpu, for a rehearsal with small networks and images.
        minutes: no figure is begun after these.
        parts: recursion, networks, shapes, large, engine, steps, training; all by default.
        output: JSON lines file; each run adds a line for the machine and one per figure.
        table: print this file as tables, and measure nothing.
    """

    data: Path | None = None
    detector: str | None = None
    device: str = "cuda"
    minutes: float = 8.0
    parts: tuple[str, ...] = tuple(_PARTS)
    output: Path = Path("runs/bench/gpu.jsonl")
    table: Path | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.parts) - set(_PARTS))
        if unknown:
            msg = f"--parts must be of {', '.join(_PARTS)}, got {', '.join(unknown)}"
            raise ValueError(msg)


def measure(job: GpuBench) -> Iterator[Record]:
    """Yield the machine, then each figure when it is measured; of a part that fails, the error."""
    device = device_on_this_machine(job.device)
    start = time.monotonic()
    sizes = TOY if job.device == "cpu" else FULL
    with TemporaryDirectory() as folder:
        data = write_sample(Path(folder) / "sample", train=1, val=24) if job.data is None else job.data / "coco"
        photographs = Setup(job.device, sizes, data, detector=job.detector)
        large = photographs if job.data is None else replace(photographs, data=job.data / "large/street", split="val")
        yield {"part": "machine", **_machine(device), "images": "drawn" if job.data is None else "photographs"}
        for name in job.parts:
            part = _PARTS[name]
            try:
                for record in part.measure(large if name == "large" else photographs):
                    yield {"part": name, **record, "after seconds": round(time.monotonic() - start, 1)}
                    if time.monotonic() - start > 60 * job.minutes * part.until:
                        break
            except Exception as error:
                # The figures of the other parts are wanted all the same.
                yield {"part": name, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _machine(device: torch.device) -> Record:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


def tables(records: Sequence[Record]) -> str:
    """The records as Markdown tables, one for each part and set of columns."""
    text = []
    hidden = ("part", "after seconds", "trace")
    rows = [(record["part"], {key: value for key, value in record.items() if key not in hidden}) for record in records]
    for (part, columns), group in itertools.groupby(rows, key=lambda row: (row[0], tuple(row[1]))):
        text += [f"**{part}**", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        text += [f"| {' | '.join(_cell(value) for value in row.values())} |" for _, row in group]
        text.append("")
    return "\n".join(text)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{value['median']:.3g} [{value['min']:.3g}, {value['max']:.3g}]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(job: GpuBench) -> int:
    """Measure and write, or print the tables of a file; the exit status is 1 if a part failed."""
    if job.table is not None:
        print(tables([json.loads(line) for line in job.table.read_text().splitlines()]))
        return 0
    failed = 0
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with job.output.open("a", buffering=1) as file:
        for record in measure(job):
            line = json.dumps(record)
            file.write(line + "\n")
            print(line, flush=True)
            failed |= "error" in record
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(GpuBench)))
