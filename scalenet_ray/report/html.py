"""HTML that the reports share: the page with its style and script, tables, settings of the run, failed images."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any, TypeGuard

import yaml

from scalenet_ray.runs.documents import FailureList, Interval, Metrics, PolicyMetrics

_THEME = (
    '<button type="button" class="theme" id="theme" aria-label="Switch between light and dark" '
    'title="Light or dark"><span aria-hidden="true"></span></button>'
)

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

_SETTINGS = (
    ("data", "data"),
    ("split", "split"),
    ("images", "images"),
    ("limit", "limit"),
    ("every", "every"),
    ("classes", "classes"),
    ("detector", "detector"),
    ("scale_net", "Scale Net"),
    ("score_threshold", "score threshold"),
    ("iou_threshold", "IoU threshold"),
    ("mixed_precision", "mixed precision"),
    ("max_image_megapixels", "largest image, megapixels"),
)


def page(
    title: str,
    lead: str,
    sections: Iterable[str],
    data: dict[str, Any] | None = None,
    refresh: int | None = None,
) -> str:
    """Build a self-contained page; its content security policy forbids other resources and scripts.

    The title is plain text, the lead HTML; `data` is the gallery's, read by report.js; `refresh` is in seconds.
    """
    assets = files("scalenet_ray.report")
    style, script = (assets.joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    again = "" if refresh is None else f'<meta http-equiv="refresh" content="{refresh}">'
    blob = ""
    if data is not None:
        # Escaped, so that data cannot end the element or start a comment in it.
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        blob = f'<script type="application/json" id="data">{text}</script>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{again}"
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>"
        f'<body><a class="skip" href="#main">Skip to the content</a><header><p class="brand">Recursive Scale Net</p>'
        f"{_THEME}<h1>{html.escape(title)}</h1>{lead}</header>"
        f'<main id="main">{"".join(sections)}</main>{blob}<script>{script}</script></body></html>\n'
    )


def section(name: str, title: str, text: str, *content: str) -> str:
    """Build a section with an anchor, a heading (plain text), a text and content (HTML); "" if the content is empty."""
    shown = "".join(content)
    if not shown:
        return ""
    words = f'<p class="words">{text}</p>' if text else ""
    heading = f'<h2 id="{name}-title">{html.escape(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{heading}{words}{shown}</section>'


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], marked: int | None = None) -> str:
    """Build a table of HTML cells, the first of a row its header; caption and titles are plain text."""
    titles = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in head)
    body = "".join(
        f'<tr{" class=best" if i == marked else ""}><th scope="row">{first}</th>'
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for i, (first, *cells) in enumerate(rows)
    )
    name = html.escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">'
        f'<table><caption class="unseen">{name}</caption>'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def cards(facts: Iterable[tuple[str, str, str]]) -> str:
    """Build a list of cards from (value, title, remark), plain text."""
    shown = "".join(
        f"<li><strong>{html.escape(value)}</strong><span>{html.escape(title)}</span><em>{html.escape(remark)}</em></li>"
        for value, title, remark in facts
    )
    return f'<ul class="cards">{shown}</ul>'


def winner_of(policies: Mapping[str, PolicyMetrics]) -> str:
    """Return the policy with the highest AP_small among those that do not read the ground truth.

    Without metrics it is the first of them. If all policies read the ground truth it is one of these.
    """
    candidates = {name: row for name, row in policies.items() if not reads_truth(row)} or dict(policies)
    return max(candidates, key=lambda name: _known(candidates[name].get("AP_small")))


def reads_truth(row: PolicyMetrics) -> bool:
    """Return True if the policy of a row of metrics.json reads the ground truth."""
    return row.get("kind") == "oracle"


def is_known(value: float | None) -> TypeGuard[float]:
    """Return True if a metric was measured: neither None nor NaN."""
    return value is not None and value == value


def _known(value: float | None) -> float:
    return value if is_known(value) else -1.0


def policy_rows(document: Metrics) -> tuple[list[str], list[list[str]]]:
    """Return the titles of the columns, and the cells of each policy as HTML.

    Columns without values are omitted. The best value of a column is bold; policies that read the ground truth are
    marked and do not count for it.
    """
    policies = document["policies"]
    columns = [column for column in _FIGURES if any(column[1] in row for row in policies.values())]
    best = {
        key: max((_known(row.get(key)) for row in policies.values() if not reads_truth(row)), default=0.0)
        for _, key, _ in columns
        if key[0] == "A"
    }
    differences = document.get("differences") or {}
    widest = max(
        (abs(_known(by_metric["AP_small"][end])) for by_metric in differences.values() for end in ("low", "high")),
        default=0.0,
    )
    head = ["policy", *(title for title, _, _ in columns)]
    if differences:
        head.insert(2, f"AP small to {document.get('compared_with')}")
    rows = []
    for name, row in policies.items():
        is_oracle = reads_truth(row)
        cells = [figure_cell(row.get(key), digits, None if is_oracle else best.get(key)) for _, key, digits in columns]
        if differences:
            cells.insert(1, interval_cell(differences.get(name, {}).get("AP_small"), widest))
        rows.append([html.escape(name) + (" <small>(reads the ground truth)</small>" if is_oracle else ""), *cells])
    return head, rows


def figure_cell(value: float | None, digits: int, best: float | None = None) -> str:
    """Render a metric, in bold if it is the best; a dash if it was not measured."""
    if not is_known(value):
        return "\N{EN DASH}"
    text = f"{value:.{digits}f}"
    return f"<b>{text}</b>" if best is not None and value == best else text


def interval_cell(interval: Interval | None, widest: float | None = None) -> str:
    """Render a difference with its 95 % interval as text, and as a bar around zero if the widest of them is given."""
    if interval is None or not all(is_known(interval[end]) for end in ("low", "high")):
        return "\N{EN DASH}"
    words = f"{interval['difference']:+.1f} <small>[{interval['low']:+.1f}, {interval['high']:+.1f}]</small>"
    if widest is None:
        return words
    scale = 46 / max(widest, 1e-9)
    low, high, middle = (50 + scale * interval[end] for end in ("low", "high", "difference"))
    return (
        f'<span class="interval">{words}<svg viewBox="0 0 100 12" aria-hidden="true"><path class="zero" d="M50 0V12"/>'
        f'<path class="range" d="M{low:.1f} 6H{high:.1f}"/><circle cx="{middle:.1f}" cy="6" r="3.4"/></svg></span>'
    )


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run, including those of its networks, in one mapping."""
    settings = dict(run.get("settings") or {})
    classes = ", ".join(settings.pop("classes", None) or ())
    return {**(settings.pop("networks", None) or {}), **settings, "classes": classes}


def origin_line(run: Mapping[str, Any] | None) -> str:
    """Render data, detector and date of a run in one line; "" if unknown."""
    if not run:
        return ""
    settings = _settings(run)
    parts = [str(settings[name]) for name in ("data", "split", "images", "detector") if settings.get(name)]
    parts += [str(run["finished"])[:10]] if run.get("finished") else []
    shown = " \N{MIDDLE DOT} ".join(html.escape(part) for part in parts)
    return f'<p class="state origin">{shown} \N{MIDDLE DOT} <a href="#run">what was run</a></p>' if parts else ""


def origin_section(run: Mapping[str, Any] | None) -> str:
    """Render the section of a run's settings: config.yaml with "finished" (date and time) and "resumed"."""
    if not run:
        return ""
    settings = _settings(run)
    facts = [(title, settings[name]) for name, title in _SETTINGS if settings.get(name) not in (None, "", False)]
    facts += [(name, run.get(name)) for name in ("begun", "finished")]
    facts += [("resumed", "yes, in this run folder" if run["resumed"] else "no")] if "resumed" in run else []
    facts += [("command", run.get("command"))]
    facts += [(name, _joined(run.get(name))) for name in ("workers", "versions")]
    facts += [("machine", run.get("machine"))]
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


def _joined(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (values or {}).items() if value is not None)


def failures_section(failures: FailureList | None) -> str:
    """Render the section of the failed images; "" if there are none."""
    if not failures or not failures["total"]:
        return ""
    reasons = [
        [html.escape(row["reason"]), html.escape(row["stage"]), str(row["count"])] for row in failures["reasons"]
    ]
    rows = failures["rows"]
    several = len({name for row in rows for name in row["policies"]}) > 1
    listed = [
        [
            html.escape(row["file"]),
            html.escape(row["stage"]),
            html.escape(row["reason"]),
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
