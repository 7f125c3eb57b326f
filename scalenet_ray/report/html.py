"""HTML of the reports: the page with its style and script, sections, tables, cards."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

_THEME = (
    '<button type="button" class="theme" id="theme" aria-label="Switch between light and dark" '
    'title="Light or dark"><span aria-hidden="true"></span></button>'
)


def page(
    title: str,
    lead: str,
    sections: Iterable[str],
    data: dict[str, Any] | None = None,
    refresh: int | None = None,
) -> str:
    """Build a self-contained page; its content security policy forbids other resources and scripts.

    Args:
        title: plain text.
        lead: HTML below the title.
        sections: from `section`.
        data: JSON data of the gallery, read by report.js; None for a page without gallery.
        refresh: seconds after which a browser reads the page again; None for never.
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
    """Build a section with a heading and a text; "" if the content is empty.

    Args:
        name: anchor of the section.
        title: plain text.
        text: HTML.
        content: HTML of figures and tables.
    """
    shown = "".join(content)
    if not shown:
        return ""
    words = f'<p class="words">{text}</p>' if text else ""
    heading = f'<h2 id="{name}-title">{html.escape(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{heading}{words}{shown}</section>'


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], marked: int | None = None) -> str:
    """Build a table; the first cell of a row is its header.

    Args:
        caption: plain text, for screen readers.
        head: titles of the columns, plain text.
        rows: HTML of the cells.
        marked: index of the row to highlight.
    """
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
