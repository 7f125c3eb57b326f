"""The table of policies: which is best, by how much, and how sure that is."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

__all__ = ["is_known", "policy_rows", "reads_truth", "winner_of"]

_FIGURES = (
    ("AP small", "AP_small", 1),
    ("AP", "AP", 1),
    ("AP50", "AP50", 1),
    ("AP medium", "AP_medium", 1),
    ("AP large", "AP_large", 1),
    ("AR small", "AR_small", 1),
    ("passes / image", "detector_passes_per_image", 2),
    ("detector MP / image", "detector_megapixels_per_image", 2),
    ("scale net MP / image", "scalenet_megapixels_per_image", 2),
    ("tiles / image", "tiles_per_image", 2),
    ("images / s", "images_per_second", 1),
)


def winner_of(policies: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The policy with the most AP_small that reads no ground truth; without figures the first; None of none.

    Where all read the ground truth it is one of those: ask `reads_truth`.

    Args:
        policies: name -> its row of metrics.json.
    """
    honest = {name: row for name, row in policies.items() if not reads_truth(name, row)} or dict(policies)
    return max(honest, key=lambda name: _known(honest[name].get("AP_small")), default=None)


def reads_truth(name: str, row: Mapping[str, Any]) -> bool:
    """Whether a policy reads the ground truth: by its kind, whatever its name.

    Args:
        name: the policy's; it decides where an older version noted no kind.
        row: its row of metrics.json.
    """
    return row.get("kind", name) == "oracle"


def is_known(value: float | None) -> bool:
    """Whether a figure was measured: neither missing nor NaN."""
    return value is not None and value == value


def _known(value: float | None) -> float:
    return value if value is not None and is_known(value) else -1.0


def policy_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The titles of the columns, and the cells of each policy as HTML.

    Args:
        document: what metrics.json holds; columns that no policy has are left out. The best of a column is bold; one
            that reads the ground truth says so, and is never the best.
    """
    policies: Mapping[str, Mapping[str, Any]] = document["policies"]
    columns = [column for column in _FIGURES if any(column[1] in row for row in policies.values())]
    best = {
        key: max((_known(row.get(key)) for name, row in policies.items() if not reads_truth(name, row)), default=0.0)
        for _, key, _ in columns
        if key[0] == "A"
    }
    differences: Mapping[str, Any] = document.get("differences") or {}
    widest = max(
        (abs(_known(one["AP_small"][end])) for one in differences.values() for end in ("low", "high")), default=0.0
    )
    head = ["policy", *(title for title, _, _ in columns)]
    if differences:
        head.insert(2, f"AP small to {document['compared_with']}")
    rows = []
    for name, row in policies.items():
        knows = reads_truth(name, row)
        cells = [_cell(row.get(key), digits, None if knows else best.get(key)) for _, key, digits in columns]
        if differences:
            cells.insert(1, _interval(differences.get(name, {}).get("AP_small"), widest))
        rows.append([html.escape(name) + (" <small>(reads the ground truth)</small>" if knows else ""), *cells])
    return head, rows


def _cell(value: float | None, digits: int, best: float | None) -> str:
    if value is None or not is_known(value):
        return "\N{EN DASH}"
    text = f"{value:.{digits}f}"
    return f"<b>{text}</b>" if best is not None and value == best else text


def _interval(found: Mapping[str, float] | None, widest: float) -> str:
    """A difference with its 95 % interval in words and as a bar around zero."""
    if found is None or not all(is_known(found[end]) for end in ("low", "high")):
        return "\N{EN DASH}"
    scale = 46 / max(widest, 1e-9)
    low, high, middle = (50 + scale * found[end] for end in ("low", "high", "difference"))
    words = f"{found['difference']:+.1f} <small>[{found['low']:+.1f}, {found['high']:+.1f}]</small>"
    return (
        f'<span class="interval">{words}<svg viewBox="0 0 100 12" aria-hidden="true"><path class="zero" d="M50 0V12"/>'
        f'<path class="range" d="M{low:.1f} 6H{high:.1f}"/><circle cx="{middle:.1f}" cy="6" r="3.4"/></svg></span>'
    )
