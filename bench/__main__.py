"""All measurements, one after the other; what they came to in bench/results.json.

    SCALENET_RAY_DATA=DATA make bench

What needs the real photographs is left out without them. Two hours on two cores; nothing else should run beside it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bench.engine import compare_engine
from bench.growth import growth
from bench.parts import frontier_tasks_per_second, merge_costs
from bench.scale_out import scale_out
from bench.slicing import compare
from bench.stage_costs import stage_shares
from bench.workloads import large_images, photographs

_RESULTS = Path(__file__).parent / "results.json"
_ROUNDS = 3


def main() -> None:
    """Measure, and write after each part."""
    results: dict[str, Any] = {}

    def keep(**figures: Any) -> None:
        results.update(figures)
        _RESULTS.write_text(json.dumps(results, indent=1) + "\n")

    # One thread to a process: those that run side by side share the cores out, and no pool of threads fights another.
    os.environ["OMP_NUM_THREADS"] = "1"
    if "SCALENET_RAY_DATA" in os.environ:
        photos = photographs()
        keep(stage_shares=stage_shares(photos, "first-pass"))
        keep(**compare_engine(photos, "first-pass", _ROUNDS, repeats=4))
        keep(**compare(photos, _ROUNDS, processes=2))
        keep(one_process=compare(photos, _ROUNDS, processes=1))
        large = large_images(Path("runs/bench/large"))
        keep(large_images=compare(large, _ROUNDS, processes=2), large_images_one_process=compare(large, 1, processes=1))
    else:
        print("SCALENET_RAY_DATA is not set: what needs real photographs is left out")
    costs = merge_costs()
    keep(merge_seconds={count: cost["seconds"] for count, cost in costs.items()})
    keep(merge_megabytes={count: cost["megabytes"] for count, cost in costs.items()})
    keep(frontier_tasks_per_second=frontier_tasks_per_second())
    keep(scale_out={str(n): scale_out(n, slower=8.0, straggles=1.0, rounds=_ROUNDS) for n in (1, 4, 16, 64)})
    keep(straggler={str(n): scale_out(n, slower=8.0, straggles=5.0, rounds=_ROUNDS) for n in (4, 16)})
    keep(growth=growth((500, 5000, 50_000)))


if __name__ == "__main__":
    main()
