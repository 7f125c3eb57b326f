"""Runs whose readers, actors, nodes, frontier and driver are killed at random, against the plain reference.

    .venv/bin/python -m bench.chaos --images 1000 --seeds 1 2 3

Faults injected by kind, and what they did: images lost, doubled and wrong, and images looked at twice.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from tests.chaos import run_chaos

__all__ = ["Chaos"]


@dataclass(frozen=True)
class Chaos:
    """Each run on a cluster of its own.

    Attributes:
        images: of a run.
        seeds: a run for each.
        deaths: of readers, scale actors and detector actors in a run, at most, each.
        node_losses: nodes lost in a run. Its frontier is killed once, and its driver once.
    """

    images: int = 1000
    seeds: tuple[int, ...] = (1, 2, 3)
    deaths: int = 10
    node_losses: int = 4


def main(job: Chaos) -> None:
    """Print the table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    print("| seed | faults injected | images | lost | doubled | wrong | done twice |\n|---|---|---|---|---|---|---|")
    faults: Counter[str] = Counter()
    for seed in job.seeds:
        with tempfile.TemporaryDirectory() as folder:
            came = run_chaos(Path(folder) / "run", job.images, seed, deaths=job.deaths, node_losses=job.node_losses)
        faults.update(came["faults"])
        figures = " | ".join(str(came[name]) for name in ("images", "lost", "doubled", "wrong", "done_twice"))
        print(f"| {seed} | {sum(came['faults'].values())} | {figures} |", flush=True)
    print(json.dumps(dict(faults)))


if __name__ == "__main__":
    main(tyro.cli(Chaos))
