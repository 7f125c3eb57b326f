"""The page of a training: loss, what was measured after each epoch, and the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from scalenet_ray.report.shell import cards, page, section, table
from scalenet_ray.svg import COLOURS, SHAPES, drawing, quiet, themed, to_svg

__all__ = ["render_training"]

_LAST_EPOCHS = 12


def render_training(document: Mapping[str, Any]) -> str:
    """The page of a training.

    Args:
        document: what metrics.json of a training holds: "epochs", a row each, and "failed".

    Returns:
        HTML, one file that fetches nothing.
    """
    rows: Sequence[Mapping[str, Any]] = document["epochs"]
    flat = [dict(_flat(row)) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    lists = [name for name, value in rows[-1]["val"].items() if isinstance(value, list)] if rows else []
    single = [f"val {name}" for name in rows[-1]["val"] if name not in lists] if rows else []
    failed = document.get("failed", [])
    state = f"{len(rows)} epochs done" + (f"; {len(failed)} images left out" if failed else "")
    sections = [
        section("facts", "At a glance", "", _facts(flat, single)),
        section("loss", "Loss", "On what is trained on, by epoch.", _figure(flat, ["loss"], "Loss by epoch")),
        *(
            section(
                f"list-{name}",
                f"{_title(name)} of each class",
                "On what is held out, by epoch.",
                _figure(
                    flat,
                    [each for each in names if each.startswith(f"val {name} ")],
                    f"{_title(name)} by class and epoch",
                ),
            )
            for name in lists
        ),
        section(
            "figures", "Figures", "On what is held out, by epoch.", *(_figure(flat, [name], name) for name in single)
        ),
        section(
            "rate",
            "Learning rate",
            "At the end of each epoch.",
            _figure(flat, ["learning_rate"], "Learning rate by epoch"),
        ),
        section("epochs", "The last epochs", "", _epochs(flat, ["loss", *single, "images_per_second", "seconds"])),
    ]
    return page("What was learned", f'<p class="state">{state}.</p>', sections)


def _flat(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The numbers of an epoch's row by name; those of a list are numbered."""
    numbers: list[tuple[str, float]] = []
    for name, value in row.items():
        for key, one in ((f"val {key}", one) for key, one in value.items()) if name == "val" else ((name, value),):
            numbers += [(f"{key} {i}", each) for i, each in enumerate(one)] if isinstance(one, list) else [(key, one)]
    return [(key, value) for key, value in numbers if isinstance(value, int | float) and value == value]


def _title(name: str) -> str:
    return {"iou": "IoU", "pixel_ap": "AP of pixels"}.get(name, name.replace("_", " "))


def _facts(rows: Sequence[Mapping[str, float]], figures: Sequence[str]) -> str:
    if not rows:
        return ""
    known = [name for name in ["loss", *figures, "images_per_second"] if name in rows[-1]]
    return cards(
        (f"{rows[-1][name]:.4g}", name.replace("_", " "), f"{rows[0].get(name, 0):.4g} at first") for name in known
    )


def _figure(rows: Sequence[Mapping[str, float]], names: Sequence[str], title: str) -> str:
    lines = {name: [(row["epoch"], row[name]) for row in rows if name in row] for name in names}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    with drawing(8.6, 3.2) as figure:
        axes = figure.subplots()
        for i, (name, points) in enumerate(lines.items()):
            shape, every = SHAPES[i % len(SHAPES)], max(1, len(points) // 12)
            label = f"class {name.rpartition(' ')[2]}" if len(lines) > 1 else name.replace("_", " ")
            style = {"color": COLOURS[i % len(COLOURS)], "marker": shape, "markevery": every, "markersize": 5}
            axes.plot(*zip(*points, strict=True), linewidth=1.8, label=label, **style)  # type: ignore[arg-type]
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        quiet(axes)
        figure.legend(loc="outside right upper", frameon=False)
        return f"<figure>{themed(to_svg(figure), title)}</figure>"


def _epochs(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> str:
    shown = [name for name in names if any(name in row for row in rows)]
    head = ["epoch", *(name.replace("_", " ") for name in shown)]
    cells = [
        [f"{row['epoch']:.0f}", *(f"{row[name]:.4g}" if name in row else "\N{EN DASH}" for name in shown)]
        for row in rows[-_LAST_EPOCHS:]
    ]
    return table("The last epochs", head, cells) if cells else ""
