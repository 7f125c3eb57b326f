"""The end of a batch run: what all of its shards come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scalenet_ray.engine.evaluate import policy_cost, write_policy_results
from scalenet_ray.engine.runs import RunFolder
from scalenet_ray.engine.session import Session

__all__ = ["conclude"]


def conclude(session: Session, run: RunFolder, figures: Mapping[str, Mapping[str, Any]], total: int) -> dict[str, Any]:
    """Gather a run's end into its folder: failures.parquet, COCO results, metrics.json.

    results.json is of the first policy; results/NAME.json of each.

    Args:
        session: the engine.
        run: the run folder, all policies worked through.
        figures: policy -> what was measured; its cost is added here.
        total: images of the run.

    Returns:
        What metrics.json holds.
    """
    policies = list(figures)
    failures = run.write_failures(policies)
    for i, policy in enumerate(policies):
        names = [f"results/{policy}.json", *(["results.json"] if i == 0 else [])]
        session.call(write_policy_results, run.uri, policy, names)
    failed = len(set(failures.column("image_id").to_pylist()))
    document = {
        "images": {"total": total, "done": total - failed, "failed": failed},
        "policies": {policy: {**figures[policy], **policy_cost(run, policy)} for policy in policies},
    }
    run.write_json("metrics.json", document)
    return document
