"""The page of an experiment on canvases: accuracies, how a net responds to scale, and one recursion's steps."""

from __future__ import annotations

import html
from collections.abc import Mapping

from scalenet_ray.report.shell import page, section, table
from scalenet_ray.svg import themed

__all__ = ["render_canvases"]


def render_canvases(
    name: str, scores: Mapping[str, Mapping[str, Mapping[str, float]]], facts: str, response: str, steps: str
) -> str:
    """The page of an experiment.

    Args:
        name: of the data.
        scores: method -> set -> "mean" and "std" of the accuracy in percent.
        facts: a plain sentence on what was trained and tested on.
        response: an SVG element from `response_plot`; "" if there is none.
        steps: an SVG element from `steps_plot`; "" if there is none.

    Returns:
        HTML, one file that fetches nothing.
    """
    sets = list(dict.fromkeys(each for row in scores.values() for each in row))
    best = {each: max(row[each]["mean"] for row in scores.values() if each in row) for each in sets}
    rows = [
        [html.escape(method), *(_cell(row.get(each), best[each]) for each in sets)] for method, row in scores.items()
    ]
    sections = [
        section(
            "scores",
            "Accuracy",
            "In percent; in brackets the standard deviation over seeds. The best of each column is bold.",
            table("Accuracy", ["method", *sets], rows) if rows else "",
        ),
        section(
            "response",
            "What the net says of scale",
            "A net that is right lies on the diagonal.",
            f"<figure>{themed(response, 'Predicted against true scale')}</figure>" if response else "",
        ),
        section(
            "steps",
            "The steps of one recursion",
            "Above each canvas, below it what the net saw: the next canvas is rescaled by it.",
            f"<figure>{themed(steps, 'The steps of one recursion')}</figure>" if steps else "",
        ),
    ]
    return page(f"Recursion on {name}", f'<p class="state">{html.escape(facts)}</p>', sections)


def _cell(score: Mapping[str, float] | None, best: float) -> str:
    if score is None:
        return "\N{EN DASH}"
    text = f"{score['mean']:.2f}"
    return f"{f'<b>{text}</b>' if score['mean'] == best else text} <small>({score['std']:.2f})</small>"
