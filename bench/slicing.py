"""Ours against sliced inference: SAHI and supervision, the same detector, the same images, side by side.

    SCALENET_RAY_DATA=DATA make bench
    PYTHONPATH=.venv/peers .venv/bin/python -m bench.slicing --rounds 3

Each round runs every contender once. In one process each has one thread; in two, the peers and our plain loop take
half of the images each, and the engine has two actors that look and detect.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import tyro

from bench.contenders import race
from bench.engine import engine_race
from bench.workloads import Workload, photographs, ratio, spread

_OURS = "regions"
_PEERS = ("sahi_grid2", "sahi_grid3", "sahi_grid2_nms", "sahi_grid3_nms", "supervision_grid2", "supervision_grid3")
_TIMES_OPEN = 6
"""Images over those in work at once: what the engine is timed on is four times the latter."""


@dataclass(frozen=True)
class Slicing:
    """Ours against sliced inference.

    Attributes:
        rounds: how often each contender runs.
        processes: 1 or 2.
    """

    rounds: int = 3
    processes: int = 2


def compare(workload: Workload, rounds: int, processes: int) -> dict[str, Any]:
    """Images a second of ours over each peer's, and the AP of small objects of both.

    Args:
        workload: the images.
        rounds: how often each contender runs.
        processes: 1 (our plain loop), or 2 (our engine).
    """
    rates: dict[str, list[float]] = defaultdict(list)
    found: dict[str, dict[int, Any]] = {}
    for _ in range(rounds):
        for name in (_OURS, *_PEERS):
            if name == _OURS and processes > 1:
                images = _TIMES_OPEN * workload.resources.open_images
                ours = engine_race(workload, _OURS, repeats=math.ceil(images / len(workload.records)))
                rate, found[name] = ours.images_per_second, ours.found
            else:
                rate, found[name], _ = race(name, workload, workload.records, processes)
            rates[name].append(rate)
            print(f"{name}, {processes} processes: {rate:.2f} images/s", flush=True)
    ap_small = {name: workload.ap_small(each) for name, each in found.items()}
    return {
        name: {
            "ratio": ratio(rates[_OURS], rates[name]),
            "ap_small": {"ours": ap_small[_OURS], "theirs": ap_small[name]},
            "images_per_second": spread(rates[name]),
        }
        for name in _PEERS
    }


def main(job: Slicing) -> None:
    """Print the comparison."""
    print(json.dumps(compare(photographs(), job.rounds, job.processes), indent=1))


if __name__ == "__main__":
    main(tyro.cli(Slicing))
