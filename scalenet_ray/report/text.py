"""Results as text: tables and lines for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from scalenet_ray.core.detections import SHOWN_SCORE
from scalenet_ray.core.expansion import out_of_range
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.recursion import Step
from scalenet_ray.evaluation.compare import closer_look_in_words, pareto_front

_COLUMNS = (
    ("AP", "AP"),
    ("AP50", "AP50"),
    ("AP_small", "AP_small"),
    ("AP_medium", "AP_medium"),
    ("AP_large", "AP_large"),
    ("AR_small", "AR_small"),
    ("AR_medium", "AR_medium"),
    ("AR_large", "AR_large"),
    ("passes", "detector_passes_per_image"),
    ("det MP", "detector_megapixels_per_image"),
    ("net MP", "scalenet_megapixels_per_image"),
    ("images/s", "images_per_second"),
)

_MOST_CLASSES = 20
_COLUMNS_OF_TEXT = 80


def policy_table(document: Mapping[str, Any]) -> str:
    """Format the metrics of all policies as a table, without the columns that were not measured."""
    policies: Mapping[str, Mapping[str, Any]] = document["policies"]
    columns = [(title, key) for title, key in _COLUMNS if any(key in row for row in policies.values())]
    rows = [["policy", *(title for title, _ in columns)]]
    for name, row in policies.items():
        rows.append([name, *(_figure(row.get(key), key) for _, key in columns)])
    return _aligned(rows)


def found_lines(document: Mapping[str, Any]) -> str:
    """Summarise a run without ground truth, by its metrics.json: classes and images with most boxes, new boxes."""
    found, done = document["found"], document["images"]["done"]
    classes, lines = found["by_class"], []
    if classes:
        rows = [["class", "boxes", "images", *(["new by zooming"] if found["compared"] else []), "median side"]]
        for row in classes[:_MOST_CLASSES]:
            name = document["categories"].get(row["label"], f"category {row['label']}")
            new = [str(row["new"])] if found["compared"] else []
            side = "-" if row["median_side"] is None else f"{row['median_side']:.0f} px"
            rows.append([name, str(row["boxes"]), str(row["images"]), *new, side])
        more = len(classes) - _MOST_CLASSES
        lines += [_aligned(rows), *([f"and {_counted(more, 'class', 'classes')} more"] if more > 0 else [])]
        listed = ", ".join(f"{row['file'].rpartition('/')[2]} ({row['boxes']})" for row in found["most"])
        lines += textwrap.wrap(
            f"most boxes: {listed}",
            _COLUMNS_OF_TEXT,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    lines.append(
        f"found {_counted(found['boxes'], 'box', 'boxes')} that score {SHOWN_SCORE:g} or more, in {found['images']} of "
        f"{_counted(done, 'image')}"
    )
    if found["compared"]:
        among = "" if found["compared"] == done else f"in {_counted(found['compared'], 'image')} with such a pass, "
        total, _, parts = closer_look_in_words(found).partition(": ")
        lines += [f"{among}{total}:", parts]
    elif done:
        lines.append("nothing says which are new: there was no pass over the whole image alone to compare with")
    return "\n".join(lines)


def _counted(count: int, singular: str, plural: str = "") -> str:
    return f"{count} {singular if count == 1 else plural or singular + 's'}"


def accuracy_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Format accuracies by method and set, in percent: mean and standard deviation over seeds."""
    sets = list(dict.fromkeys(name for row in scores.values() for name in row))
    rows = [["method", *sets]]
    for method, row in scores.items():
        cells = (f"{row[name]['mean']:.2f} ({row[name]['std']:.2f})" if name in row else "-" for name in sets)
        rows.append([method, *cells])
    return _aligned(rows)


def trial_table(trials: Sequence[Mapping[str, Any]]) -> str:
    """Format the trials of a sweep: those on the Pareto front by cost, then the failed ones with their errors."""
    complete = [row for row in trials if row["complete"]]
    best = [complete[i] for i in pareto_front([(row["passes"], row["AP_small"]) for row in complete])]
    paths = list(dict.fromkeys(path for row in best for path in row["values"]))
    rows = [["trial", "passes", "AP_small", "AP", *(path.rpartition(".")[-1] for path in paths)]]
    for row in best:
        figures = (f"{row['passes']:.2f}", f"{row['AP_small']:.1f}", f"{row['AP']:.1f}")
        rows.append([row["trial"], *figures, *(_value(row["values"].get(path)) for path in paths)])
    lines = [f"the front of {len(complete)} trials that saw all images, of {len(trials)}:", _aligned(rows)]
    lines += [f"trial {row['trial']} failed: {row['error']}" for row in trials if row["error"]]
    return "\n".join(lines)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of cells: the first column left, the others right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))])
        for name, *cells in rows
    )


def _figure(value: float | None, key: str) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.1f}" if key.startswith("A") or key == "images_per_second" else f"{value:.2f}"


def difference_table(document: Mapping[str, Any]) -> str:
    """Format the differences of each policy to the baseline, with 95 % intervals of the paired bootstrap."""
    lines = [f"difference to {document['compared_with']}, and where 95 % of the paired bootstrap's lie:"]
    for name, figures in document["differences"].items():
        parts = (
            f"{figure} {f['difference']:+.1f} [{f['low']:+.1f}, {f['high']:+.1f}]" for figure, f in figures.items()
        )
        lines.append(f"{name}: {', '.join(parts)}")
    return "\n".join(lines)


def step_table(steps: Sequence[Step], policy: Policy) -> str:
    """Format the steps of a recursion: a row for each tile, with its windows and detections."""
    rows = [["tile", "depth", "window", "pixels", "out of range", "asked", "found"]]
    for step in steps:
        tile, result = step.tile, step.result
        seen = "-" if step.scale_map is None else f"{out_of_range(tile, step.scale_map, policy).mean():.1%}"
        found = str(len(result.detections)) if result.detector_pixels else "not detected"
        x0, y0, x1, y1 = tile.window.xyxy
        rows.append(
            [
                ".".join(map(str, tile.path)) or "whole",
                str(tile.depth),
                f"{x0}-{x1} x {y0}-{y1}",
                f"{tile.width} x {tile.height}",
                seen,
                " ".join([str(len(step.children)), *(f"({guard})" for guard in result.guards)]),
                result.failure.reason if result.failure else found,
            ]
        )
    return _aligned(rows)
