"""The shapes of the embedded sample's objects, and how they are painted."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

SAMPLE_CATEGORIES: dict[int, str] = {
    1: "circle",
    2: "square",
    3: "triangle",
    5: "star",
    8: "cross",
    13: "ring",
    16: "diamond",
    21: "crescent",
    27: "hourglass",
    34: "arrow",
}
"""Category id -> name. The ids have gaps, as in COCO."""

SMALL_SIDE = 32.0
"""Upper limit of a small object's longer side, in pixels."""


def arc(start: float, stop: float, radius: float = 1.0, count: int = 48) -> np.ndarray:
    """[count, 2] xy points of an arc around the origin, angles in radians."""
    angles = np.linspace(start, stop, count)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> np.ndarray:
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return arc(0, 2 * math.pi, count=11)[:10] * radii[:, None]


def _crescent() -> np.ndarray:
    outer = arc(-2.2, 2.2)
    inner = arc(1.92, -1.92, radius=0.86) - np.array([0.295, 0.0])
    return np.concatenate([outer, inner])


def _outlines() -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Name -> (outline, hole), polygons of [P, 2] xy around the origin."""
    third, full = 0.34, 1.0
    cross = [(-third, -full), (third, -full), (third, -third), (full, -third), (full, third), (third, third)]
    cross += [(-x, -y) for x, y in cross]
    arrow = [(-1, -0.24), (0.1, -0.24), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.24), (-1, 0.24)]
    circle = arc(0, 2 * math.pi)
    return {
        "circle": (circle, None),
        "square": (np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float), None),
        "triangle": (arc(0, 2 * math.pi, count=4)[:3], None),
        "star": (_star(), None),
        "cross": (np.array(cross), None),
        "ring": (circle, 0.55 * circle),
        "diamond": (np.array([(-1, 0), (0, -0.52), (1, 0), (0, 0.52)], float), None),
        "crescent": (_crescent(), None),
        "hourglass": (np.array([(-0.8, -1), (0.8, -1), (0.14, 0), (0.8, 1), (-0.8, 1), (-0.14, 0)]), None),
        "arrow": (np.array(arrow), None),
    }


_OUTLINES = _outlines()


def shape_alpha(rng: np.random.Generator, name: str, side: float) -> np.ndarray:
    """Antialiased coverage of a randomly rotated shape, [h, w] float32 in [0, 1].

    The longer side of the rotated shape's bounding box is `side` pixels.
    """
    outline, hole = _OUTLINES[name]
    angle = rng.uniform(0, 2 * math.pi)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    rotated = outline @ rotation
    low, high = rotated.min(axis=0), rotated.max(axis=0)
    scale = side / (high - low).max()
    shift = rng.uniform(0, 1, 2)
    width, height = (math.ceil(extent) + 1 for extent in (high - low) * scale)
    # Supersampling; small shapes need more of it.
    fine = 8 if side < SMALL_SIDE else 4 if side < 96 else 2
    canvas = Image.new("L", (width * fine, height * fine))
    draw = ImageDraw.Draw(canvas)
    for polygon, fill in ((outline, 255), (hole, 0)):
        if polygon is not None:
            points = ((polygon @ rotation - low) * scale + shift) * fine
            draw.polygon([tuple(point) for point in points.tolist()], fill=fill)
    return np.asarray(canvas.reduce(fine), np.float32) / 255.0


def _colour(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """A random RGB colour in contrast to the mean of `under`, [h, w, 3]."""
    mean = under.mean(axis=(0, 1))
    colours = rng.uniform(0, 255, (8, 3))
    distances = np.abs(colours - mean).max(axis=1)
    return colours[np.argmax(distances > 90) if (distances > 90).any() else np.argmax(distances)]


def paint(rng: np.random.Generator, under: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Blend a shaded shape with coverage `alpha` [h, w] over `under` [h, w, 3] float32."""
    height, width = alpha.shape
    shade_y, shade_x = rng.normal(0, 18, 2)
    shade = np.linspace(-1, 1, height)[:, None] * shade_y + np.linspace(-1, 1, width)[None, :] * shade_x
    colour = _colour(rng, under) + shade[:, :, None]
    return (under + alpha[:, :, None] * (colour - under)).astype(np.float32)
