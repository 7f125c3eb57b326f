"""What a person looks at: one self-contained page of a run, no network needed."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from scalenet_ray.policy_plot import policy_plot

__all__ = ["render_report"]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; max-width: 52rem; height: auto; background: #fff; }
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
        f"{policy_plot(document)}</html>\n"
    )


def _cell(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.2f}"
