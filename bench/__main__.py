"""Measurements, one after the other; their figures, with commit, date and machine, in bench/results.json.

    SCALENET_RAY_DATA=DATA make bench
    SCALENET_RAY_DATA=DATA PYTHONPATH=.venv/peers .venv/bin/python -m bench --parts engine growth

Parts that are not asked for keep the figures that they have. What needs the real photographs, or a CUDA device, is
left out without them. All of it takes hours on two cores; nothing else should run beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.engine import compare_engine
from bench.gpu import GpuBench, measure
from bench.growth import growth
from bench.large import LargeImages, compare_large
from bench.overhead import Overhead, overhead
from bench.scale_out import ScaleOut, scale_out
from bench.slicing import compare
from bench.workloads import photographs

_RESULTS = Path(__file__).parent / "results.json"
_ROUNDS = 3

_SCALE_OUT = (ScaleOut((1, 4), 8.0, seconds=0.002), ScaleOut((16,), 32.0, seconds=0.002), ScaleOut((64,), 16.0))
"""As many times slower than accelerators as a few cores need, to do the rest of the work for so many; a round each."""


def _engine() -> dict[str, Any]:
    return compare_engine(photographs(), "first-pass", _ROUNDS, repeats=15)


def _scale_out() -> dict[str, Any]:
    figures = {
        f"{count} of {1000 * job.seconds:g} ms, {job.slower:g} times slower": scale_out(
            count, job.slower, job.straggles, 1, seconds=job.seconds
        )
        for job in _SCALE_OUT
        for count in job.detectors
    }
    return {"scale_out": figures}


def _scale_out_first_pass() -> dict[str, Any]:
    return {"scale_out_first_pass": {str(n): scale_out(n, 8.0, 1.0, 1, "first-pass") for n in (4, 16)}}


def _straggler() -> dict[str, Any]:
    return {"straggler": {str(n): scale_out(n, slower=8.0, straggles=5.0, rounds=1) for n in (4, 16)}}


_OF_PHOTOGRAPHS: dict[str, Callable[[], dict[str, Any]]] = {
    "engine": _engine,
    "slicing": lambda: compare(photographs(), _ROUNDS, processes=2),
    "slicing-one-process": lambda: {"one_process": compare(photographs(), _ROUNDS, processes=1)},
    "large": lambda: {"large": compare_large(LargeImages(rounds=_ROUNDS))},
}
_ON_CUDA: dict[str, Callable[[], dict[str, Any]]] = {"gpu": lambda: {"gpu": list(measure(GpuBench()))}}
_PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    **_OF_PHOTOGRAPHS,
    **_ON_CUDA,
    "overhead": lambda: {"overhead": overhead(Overhead())},
    "scale-out": _scale_out,
    "scale-out-first-pass": _scale_out_first_pass,
    "straggler": _straggler,
    "growth": lambda: {"growth": growth((5000, 50_000, 200_000))},
}


@dataclass(frozen=True)
class Bench:
    """Measurements.

    Attributes:
        parts: which; all by default.
    """

    parts: tuple[str, ...] = field(default_factory=lambda: tuple(_PARTS))

    def __post_init__(self) -> None:
        unknown = sorted(set(self.parts) - set(_PARTS))
        if unknown:
            msg = f"--parts must be of {', '.join(_PARTS)}, got {', '.join(unknown)}"
            raise ValueError(msg)


def main(job: Bench) -> None:
    """Measure, and write after each part."""
    # One thread to a process: those that run side by side share the cores out, and no pool of threads fights another.
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ray's workers would give way to everything else on the machine, which the loops written by hand do not.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
    about = _about()
    for part in job.parts:
        if part in _OF_PHOTOGRAPHS and "SCALENET_RAY_DATA" not in os.environ:
            print(f"{part} is left out: SCALENET_RAY_DATA is not set, and it needs the real photographs")
            continue
        if part in _ON_CUDA and not torch.cuda.is_available():
            print(f"{part} is left out: torch finds no CUDA device, and it needs one")
            continue
        print(f"{part}:", flush=True)
        figures = _PARTS[part]()
        results = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
        results["measured"] = results.get("measured", {}) | {part: about}
        # JSON has no NaN, which stands for an AP without objects.
        document = json.loads(json.dumps(results | figures), parse_constant=lambda _: None)
        _RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def _about() -> dict[str, Any]:
    """The commit, date and machine of the measurements; a commit ends in -dirty if files differ from it."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    return {
        "commit": commit.stdout.strip(),
        "date": f"{date.today()}",
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("ray", "torch", "onnxruntime")},
    }


if __name__ == "__main__":
    main(tyro.cli(Bench))
