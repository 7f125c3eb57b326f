"""The measurements of bench.gpu, rehearsed on the CPU with small networks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.gpu import GpuBench, main, measure, tables
from bench.gpu_engine import gpu_figures
from bench.gpu_networks import TOY, VARIANTS, Setup, compare, cuda_products
from scalenet_ray.models.spec import SAMPLE_DETECTOR_WEIGHTS


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_bench_runs_on_a_cpu_and_becomes_tables(idle_ray: None, tmp_path: Path) -> None:
    job = GpuBench(device="cpu", detector=SAMPLE_DETECTOR_WEIGHTS, output=tmp_path / "figures.jsonl")
    assert main(job) == 0
    figures = lines_of(job.output)
    by_part = {part: [row for row in figures if row["part"] == part] for part in ("machine", *gpu._PARTS)}
    assert {part: len(rows) for part, rows in by_part.items()} == {
        "machine": 1,
        "recursion": 8,
        "networks": 2 * (len(VARIANTS) + 1) + 4 * (len(TOY.batches) - 1) + 2 * len(TOY.others),
        "shapes": 5 + len(TOY.batches) - 1,
        "large": 6,
        "engine": 3,
        "steps": 3,
        "training": 1,
    }
    whole, slices, paper = by_part["engine"]
    assert slices["passes"] == pytest.approx(5 * whole["passes"])
    assert paper["passes"] > whole["passes"]
    assert all(0 < row["batch fill"] <= 1 for row in by_part["engine"])
    one_by_one, engine = by_part["large"][:3], by_part["large"][3:]
    # The engine stops in the middle of a round of the images.
    assert [row["passes"] for row in engine] == pytest.approx([row["passes"] for row in one_by_one], rel=0.2)
    assert one_by_one[1]["passes"] > one_by_one[0]["passes"]
    text = tables(figures)
    assert text.count("**") == 2 * 10
    assert all(line.startswith(("|", "**")) or not line for line in text.splitlines())


def test_a_part_that_fails_costs_its_own_figures_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(setup: Setup) -> Iterator[dict[str, Any]]:
        yield {"figure": 1}
        raise RuntimeError("the driver is too old")

    def works(setup: Setup) -> Iterator[dict[str, Any]]:
        yield {"figure": 2}

    monkeypatch.setitem(gpu._PARTS, "networks", gpu._Part(breaks, 1.0))
    monkeypatch.setitem(gpu._PARTS, "steps", gpu._Part(works, 1.0))
    job = GpuBench(device="cpu", parts=("networks", "steps"), output=tmp_path / "figures.jsonl")
    assert main(job) == 1
    _, before, error, after = lines_of(job.output)
    assert (before["figure"], after["figure"]) == (1, 2)
    assert error["error"] == "RuntimeError: the driver is too old"
    assert "breaks" in error["trace"]


def test_a_variant_that_does_not_fit_or_fails_says_so_and_the_others_are_measured(tmp_path: Path) -> None:
    def too_large() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def too_new() -> Any:
        raise RuntimeError("no such kernel")

    makers = {"large": too_large, "small": lambda: lambda: 1, "new": too_new, "middle": lambda: lambda: 2}
    large, small, new, middle = compare(Setup("cpu", TOY, tmp_path), makers, "tiles/s", batch=1)
    assert large == {"batch": 1, "variant": "large", "remark": "out of memory"}
    assert new == {"batch": 1, "variant": "new", "error": "RuntimeError: no such kernel"}
    assert small["variant"] == "small"
    assert middle["over small"]["min"] > 0


def test_rows_of_one_part_and_columns_are_one_table() -> None:
    spread = {"median": 2.0, "min": 1.0, "max": 3.0}
    rows = [
        {"part": "a", "x": spread, "after seconds": 1.0},
        {"part": "a", "x": None, "after seconds": 2.0},
        {"part": "a", "y": 0.12345},
    ]
    assert tables(rows).splitlines() == [
        *("**a**", "", "| x |", "|---|", "| 2 [1, 3] |", "|  |", ""),
        *("**a**", "", "| y |", "|---|", "| 0.123 |"),
    ]


def test_the_precision_of_products_is_restored() -> None:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    with cuda_products("ieee"):
        assert (cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == ("ieee", "ieee")
    assert (cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before


def test_the_gpus_use_is_what_nvidia_smi_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, printed = tmp_path / "nvidia-smi", tmp_path / "printed"
    program.write_text(f"#!/bin/sh\nprintf '40, 1000\\n60, 3000\\n'\ntouch {printed}\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with gpu_figures() as figures:
        while not printed.exists():
            time.sleep(0.01)
        assert figures == {}
    assert figures == {"GPU busy, %": 50.0, "GPU gigabytes": pytest.approx(3000 * 2**20 / 1e9)}


def test_an_unknown_part_is_refused_with_the_known_ones() -> None:
    known = "recursion, networks, shapes, large, engine, steps, training"
    with pytest.raises(ValueError, match=f"--parts must be of {known}, got speed"):
        GpuBench(parts=("speed",))


def test_a_device_that_is_not_there_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ValueError, match="device 'cuda:99' was wanted"):
        next(measure(GpuBench(device="cuda:99")))
