"""Where a page's figures come from: what was run, with what, and which images were given up."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from scalenet_ray.report.shell import section, table

__all__ = ["failures_section", "origin_line", "origin_section"]

_SETTINGS = (
    ("data", "data"),
    ("split", "split"),
    ("images", "images"),
    ("limit", "limit"),
    ("detector", "detector"),
    ("scale_net", "Scale Net"),
    ("score_threshold", "score threshold"),
    ("iou_threshold", "IoU threshold"),
    ("mixed_precision", "mixed precision"),
    ("max_image_megapixels", "largest image, megapixels"),
)


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, those of its networks among them."""
    settings = dict(run.get("settings") or {})
    return {**(settings.pop("networks", None) or {}), **settings}


def origin_line(run: Mapping[str, Any] | None) -> str:
    """What was run, in one line under a page's title; "" if it is not known."""
    if not run:
        return ""
    settings = _settings(run)
    parts = [str(settings[name]) for name in ("data", "split", "images", "detector") if settings.get(name)]
    parts += [str(run["finished"])[:10]] if run.get("finished") else []
    shown = " \N{MIDDLE DOT} ".join(html.escape(part) for part in parts)
    return f'<p class="state origin">{shown} \N{MIDDLE DOT} <a href="#run">what was run</a></p>' if parts else ""


def origin_section(run: Mapping[str, Any] | None) -> str:
    """The section that says what was run.

    Args:
        run: what config.yaml holds, with "finished" (ISO date and time) and "resumed" (bool) besides; None if unknown.

    Returns:
        HTML; "" if it is not known.
    """
    if not run:
        return ""
    settings = _settings(run)
    facts = [(title, settings[name]) for name, title in _SETTINGS if settings.get(name) not in (None, "", False)]
    facts += [("begun", run["begun"])] if run.get("begun") else []
    facts += [("finished", run["finished"])] if run.get("finished") else []
    facts += [("resumed", "yes, in this run folder" if run["resumed"] else "no")] if "resumed" in run else []
    facts += [("command", run["command"])] if run.get("command") else []
    facts += [(title, _in_words(run.get(name))) for name, title in (("workers", "workers"), ("versions", "versions"))]
    rows = "".join(
        f"<div><dt>{html.escape(title)}</dt><dd>{html.escape(str(value))}</dd></div>" for title, value in facts if value
    )
    policies = yaml.safe_dump(settings.get("policies") or [], sort_keys=False)
    more = (
        f"<details><summary>Settings of the policies</summary><pre>{html.escape(policies)}</pre></details>"
        if settings.get("policies")
        else ""
    )
    return section("run", "What was run", "", f'<dl class="origin">{rows}</dl>{more}')


def _in_words(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (values or {}).items() if value is not None)


def failures_section(failures: Mapping[str, Any] | None) -> str:
    """The section of the images that were given up.

    Args:
        failures: "total" (images), "reasons": "stage", "reason", "count" and "example" each, and "rows": the first of
            them, "file", "stage", "reason" and "policies" each; None if not known.

    Returns:
        HTML; "" if there are none.
    """
    if not failures or not failures["total"]:
        return ""
    reasons = [
        [html.escape(str(one["reason"])), html.escape(str(one["stage"])), str(one["count"])]
        for one in failures["reasons"]
    ]
    rows: Sequence[Mapping[str, Any]] = failures["rows"]
    several = len({name for row in rows for name in row["policies"]}) > 1
    listed = [
        [
            html.escape(str(row["file"])),
            html.escape(str(row["stage"])),
            html.escape(str(row["reason"])),
            *([html.escape(", ".join(row["policies"]))] if several else []),
        ]
        for row in rows
    ]
    total = failures["total"]
    shown = f"The first {len(rows)} of {failures['listed']}" if len(rows) < failures["listed"] else "Each of them"
    head = ["file", "stage", "reason", *(["policies"] if several else [])]
    return section(
        "failures",
        "Images given up",
        f"{total} image{'' if total == 1 else 's'} could not be worked on, and nothing of them counts as found. "
        "failures.parquet in the run folder holds them all.",
        f'<div class="words-table">{table("Failures by reason", ["reason", "stage", "how many"], reasons)}</div>',
        f'<details class="list"><summary>{shown}</summary>'
        f'<div class="words-table">{table("Failures", head, listed)}</div></details>',
    )
