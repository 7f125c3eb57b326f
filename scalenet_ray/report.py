"""What a person looks at: one self-contained page of a run, no network needed."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

__all__ = ["render_report"]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: #0072b2; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; max-width: 44rem; height: auto; }
svg text { fill: currentColor; font: 13px system-ui, sans-serif; }
.scroll { overflow-x: auto; }
"""

_FIGURES = (
    ("AP", "AP"),
    ("AP50", "AP50"),
    ("AP small", "AP_small"),
    ("AP medium", "AP_medium"),
    ("AP large", "AP_large"),
    ("AR small", "AR_small"),
    ("passes / image", "detector_passes_per_image"),
    ("detector MP / image", "detector_megapixels_per_image"),
    ("scale net MP / image", "scalenet_megapixels_per_image"),
    ("tiles / image", "tiles_per_image"),
    ("images / s", "images_per_second"),
)


def render_report(document: Mapping[str, Any]) -> str:
    """The page of a run.

    Args:
        document: what metrics.json holds.

    Returns:
        HTML: the policies' table, and AP_small against detector passes as a picture.
    """
    images = document["images"]
    policies: Mapping[str, Mapping[str, Any]] = document["policies"]
    columns = [(title, key) for title, key in _FIGURES if any(key in row for row in policies.values())]
    head = "".join(f"<th>{title}</th>" for title, _ in columns)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{_cell(row.get(key))}</td>' for _, key in columns)}</tr>"
        for name, row in policies.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Recursive Scale Net: run</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>Recursive Scale Net</h1><p>{images['done']} of {images['total']} images done, {images['failed']} failed"
        f"{' (failures.parquet names each with its reason)' if images['failed'] else ''}.</p>"
        f'<h2>Policies</h2><div class="scroll"><table><tr><th>policy</th>{head}</tr>{rows}</table></div>'
        f"{_plot(policies)}</html>\n"
    )


def _cell(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.2f}"


def _plot(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """AP_small against detector passes, a point a policy; nothing without ground truth."""
    points = [
        (float(row["detector_passes_per_image"]), float(row["AP_small"]), name)
        for name, row in policies.items()
        if row.get("AP_small") is not None and row["AP_small"] == row["AP_small"]
    ]
    if not points:
        return ""
    most_x = max(1.0, *(x for x, _, _ in points)) * 1.15
    most_y = max(1.0, *(y for _, y, _ in points)) * 1.15
    marks = []
    for x, y, name in points:
        at_x, at_y = 60 + 580 * x / most_x, 330 - 300 * y / most_y
        marks.append(
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="5" fill="var(--accent)"/>'
            f'<text x="{at_x + 9:.1f}" y="{at_y + 4:.1f}">{html.escape(name)}</text>'
        )
    ticks = "".join(
        f'<text x="{60 + 580 * i / 4:.0f}" y="350" text-anchor="middle">{most_x * i / 4:.1f}</text>'
        f'<text x="52" y="{334 - 300 * i / 4:.0f}" text-anchor="end">{most_y * i / 4:.1f}</text>'
        for i in range(5)
    )
    return (
        '<h2>Small objects found, for a price</h2><svg viewBox="0 0 700 380" role="img" '
        'aria-label="AP of small objects against detector passes per image">'
        '<path d="M60 30V330H640" fill="none" stroke="currentColor"/>'
        f'{ticks}<text x="350" y="374" text-anchor="middle">detector passes per image</text>'
        f'<text x="60" y="20">AP of small objects (%)</text>{"".join(marks)}</svg>'
    )
