"""The end of a batch run: what all of its shards come to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from scalenet_ray.engine.evaluate import policy_cost, write_policy_results
from scalenet_ray.engine.runs import RunFolder
from scalenet_ray.engine.session import Session

__all__ = ["conclude", "failure_counts"]

_MOST_REASONS = 20
_NAMED = re.compile(r"""(?P<quote>['"]).*?(?P=quote)|\S*/\S*[^\s:;,)]""")
_NUMBER = re.compile(r"\d+(\.\d+)?")


def conclude(session: Session, run: RunFolder, figures: Mapping[str, Mapping[str, Any]], total: int) -> dict[str, Any]:
    """Gather a run's end into its folder: failures.parquet, COCO results, metrics.json.

    results.json is of the first policy; results/NAME.json of each.

    Args:
        session: the engine.
        run: the run folder, all policies worked through.
        figures: policy -> what was measured; its speed and its cost are added here.
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
        "failures": failure_counts(failures),
        "policies": {
            policy: {**figures[policy], **run.speed(policy), **policy_cost(run, policy)} for policy in policies
        },
    }
    run.write_json("metrics.json", document)
    return document


def failure_counts(failures: pa.Table) -> list[dict[str, Any]]:
    """Failed images by stage and kind of reason.

    Args:
        failures: schema `FAILURES`.

    Returns:
        The most frequent first, 20 at most: "stage"; "reason", without the names and numbers by which those of one kind
        differ; "count", of images, whatever the policy; "example", the file of one.
    """
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    seen: set[tuple[int, str, str]] = set()
    columns = (failures.column(name).to_pylist() for name in ("image_id", "file", "stage", "reason"))
    for image_id, file, stage, reason in zip(*columns, strict=True):
        kind = (stage, _kind_of(reason, file))
        if (image_id, *kind) not in seen:
            seen.add((image_id, *kind))
            counts[kind] += 1
            examples.setdefault(kind, file)
    return [
        {"stage": stage, "reason": reason, "count": count, "example": examples[stage, reason]}
        for (stage, reason), count in counts.most_common(_MOST_REASONS)
    ]


def _kind_of(reason: str, file: str) -> str:
    """A reason without what names this one image: its file, other paths and quoted text, and numbers."""
    return _NUMBER.sub("N", _NAMED.sub("...", reason.replace(file, "...")))
