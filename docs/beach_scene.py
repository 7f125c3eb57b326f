"""Render a photograph-like scene: a kite festival at the beach, with the embedded sample's shapes as kites.

Sky, clouds, sea, sand, haze, lens blur and sensor noise are drawn by code. Most kites are far away, and too small for
the sample's detector when it sees the whole image at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from scalenet_ray.sample.scenes import SAMPLE_CATEGORIES, shape_alpha

__all__ = ["BeachScene", "render_beach"]

HEIGHT, WIDTH = 768, 1152
_HORIZON = 560
_SHORE = 628

_KITE_COLOURS = np.array(
    [
        (214, 40, 40),
        (247, 127, 0),
        (252, 191, 73),
        (30, 60, 140),
        (106, 27, 120),
        (16, 110, 70),
        (230, 57, 120),
        (20, 20, 30),
    ],
    np.float32,
)


@dataclass(frozen=True, eq=False)
class BeachScene:
    """A rendered scene and its kites.

    Attributes:
        pixels: [768, 1152, 3] uint8 RGB.
        boxes: [N, 4] float32 xyxy, the kites.
        labels: [N] int64, keys of SAMPLE_CATEGORIES.
    """

    pixels: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def _fractal_noise(
    rng: np.random.Generator, hw: tuple[int, int], cells_hw: tuple[int, int], octaves: int
) -> np.ndarray:
    """[h, w] float32 in [0, 1]: octaves of smooth noise, each half as strong as the one before."""
    total = np.zeros(hw, np.float32)
    for i in range(octaves):
        rough = rng.standard_normal((cells_hw[0] * 2**i + 1, cells_hw[1] * 2**i + 1), dtype=np.float32)
        total += cv2.resize(rough, (hw[1], hw[0]), interpolation=cv2.INTER_CUBIC) / 2**i
    return (total - total.min()) / (total.max() - total.min())


def _blend(canvas: np.ndarray, colour: np.ndarray | tuple[float, ...], alpha: np.ndarray) -> np.ndarray:
    return canvas + alpha[..., None] * (np.asarray(colour, np.float32) - canvas)


def _sky(rng: np.random.Generator) -> np.ndarray:
    down = np.linspace(0, 1, HEIGHT, dtype=np.float32)[:, None] * (HEIGHT / _HORIZON)
    down = np.clip(np.broadcast_to(down, (HEIGHT, WIDTH)), 0, 1)[..., None]
    top, low = np.array([58, 112, 176], np.float32), np.array([196, 216, 228], np.float32)
    sky = top + (low - top) * down**1.3
    clouds = _fractal_noise(rng, (HEIGHT, WIDTH), (3, 4), 6)
    cover = np.clip((clouds - 0.52) * 3.2, 0, 1) ** 1.2
    shade = 236 + 16 * _fractal_noise(rng, (HEIGHT, WIDTH), (6, 5), 4)
    return (
        _blend(sky, (0, 0, 0), np.zeros((HEIGHT, WIDTH), np.float32)) * (1 - 0.85 * cover[..., None])
        + (0.85 * cover * shade)[..., None]
    )


def _hills(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    rows = np.arange(HEIGHT)[:, None]
    for height, colour in ((58, (142, 164, 182)), (34, (108, 134, 142))):
        outline = _fractal_noise(rng, (1, WIDTH), (1, 4), 6)[0]
        top = _HORIZON - height * np.clip(outline * 1.5 - 0.45, 0, 1)
        alpha = np.clip(rows - top[None] + 0.5, 0, 1) * (rows < _HORIZON)
        canvas = _blend(canvas, colour, alpha.astype(np.float32))
    return canvas


def _sea(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    rows = np.arange(_HORIZON, HEIGHT)
    near = np.clip((rows - _HORIZON) / (_SHORE - _HORIZON), 0, 1)[:, None, None]
    sea = np.array([92, 132, 152], np.float32) * (1 - near) + np.array([96, 152, 150], np.float32) * near
    waves = _fractal_noise(rng, (HEIGHT - _HORIZON, WIDTH), (44, 8), 3)
    sea = sea + (waves[..., None] - 0.5) * 46
    canvas = canvas.copy()
    canvas[_HORIZON:] = sea
    return canvas


def _beach(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    shore = _SHORE + 16 * np.sin(columns / 190) + 5 * np.sin(columns / 47) - 22 * (columns / WIDTH)
    sand = np.array([203, 180, 142], np.float32) + (
        (_fractal_noise(rng, (HEIGHT, WIDTH), (24, 8), 6) - 0.5) * 62 + rng.standard_normal((HEIGHT, WIDTH)) * 3
    )[..., None].astype(np.float32)
    wet = np.clip(1 - (rows - shore) / 30, 0, 1)[..., None]
    sand = sand * (1 - 0.34 * wet)
    canvas = canvas + np.clip(rows - shore + 0.5, 0, 1)[..., None] * (sand - canvas)
    ragged = 3 * _fractal_noise(rng, (1, WIDTH), (1, 30), 3)
    for offset, width, strength in ((0, 3.2, 0.85), (-15, 1.6, 0.5), (-30, 1.1, 0.35)):
        foam = np.exp(-(((rows - shore - offset - ragged) / width) ** 2)) * strength
        canvas = _blend(canvas, (240, 243, 240), foam.astype(np.float32))
    return canvas


def _people(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Small figures on the sand with a soft shadow, taller where they are nearer."""
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    for y in np.sort(rng.uniform(_SHORE + 16, HEIGHT - 34, 24)):
        x, height = float(rng.uniform(8, WIDTH - 8)), 7 + 30 * (y - _SHORE) / (HEIGHT - _SHORE)
        colour = tuple(int(v) for v in rng.uniform(30, 150, 3))
        cv2.ellipse(image, ((x + height * 0.34, y), (height * 0.8, height * 0.14), 0), (150, 130, 102), -1, cv2.LINE_AA)
        cv2.ellipse(image, ((x, y - height * 0.44), (height * 0.24, height * 0.62), 0), colour, -1, cv2.LINE_AA)
        cv2.ellipse(image, ((x, y - height * 0.86), (height * 0.17, height * 0.2), 0), (120, 88, 70), -1, cv2.LINE_AA)
    return cv2.GaussianBlur(image.astype(np.float32), (0, 0), 0.7)


def _kite_places(rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """(x, y, side) of the kites, smallest first: three near, five at middle distance, three flocks far away."""
    near = [(168, 150, 124), (905, 120, 140), (540, 250, 96)]
    middle = [(330, 318, 62), (735, 300, 56), (1060, 300, 66), (60, 352, 58), (420, 96, 64)]
    flocks = [((230, 446), (110, 44), 9), ((640, 436), (120, 44), 11), ((990, 436), (110, 40), 10)]
    far = []
    for (x, y), (spread_x, spread_y), count in flocks:
        for _ in range(count):
            side = float(np.exp(rng.uniform(math.log(19), math.log(38))))
            for _ in range(60):
                place = (x + spread_x * rng.uniform(-1, 1), y + spread_y * rng.uniform(-1, 1) * 1.4)
                if all(math.dist(place, other[:2]) > 0.75 * (side + other[2]) for other in far):
                    far.append((*place, side))
                    break
    return sorted([*near, *middle, *far], key=lambda place: place[2])


def _fly(rng: np.random.Generator, canvas: np.ndarray) -> tuple[np.ndarray, list[list[float]], list[int]]:
    names = list(SAMPLE_CATEGORIES.items())
    boxes, labels = [], []
    for i, (x, y, side) in enumerate(_kite_places(rng)):
        category_id, name = names[(i * 7 + i // 10) % len(names)]
        alpha = shape_alpha(rng, name, side)
        height, width = alpha.shape
        x0, y0 = round(x - width / 2), round(y - height / 2)
        canvas = _string(rng, canvas, (x, y + 0.2 * side), side)
        under = canvas[y0 : y0 + height, x0 : x0 + width]
        distances = np.abs(_KITE_COLOURS - under.mean(axis=(0, 1))).max(axis=1)
        colour = rng.choice(_KITE_COLOURS[distances > 85])
        light = np.linspace(1.16, 0.86, height, dtype=np.float32)[:, None, None]
        cloth = np.clip(colour * light, 0, 255) + rng.standard_normal((height, width, 1), dtype=np.float32) * 3
        haze = 0.22 * max(0.0, 1 - side / 60)
        cloth = cloth * (1 - haze) + np.array([190, 208, 220], np.float32) * haze
        canvas[y0 : y0 + height, x0 : x0 + width] = under + alpha[..., None] * (cloth - under)
        rows, columns = np.nonzero(alpha >= 0.5)
        boxes.append([x0 + columns.min(), y0 + rows.min(), x0 + columns.max() + 1, y0 + rows.max() + 1])
        labels.append(category_id)
    return canvas, boxes, labels


def _string(rng: np.random.Generator, canvas: np.ndarray, start: tuple[float, float], side: float) -> np.ndarray:
    """A thin sagging line from a kite to the beach."""
    end = (start[0] + rng.uniform(-90, 90), rng.uniform(_SHORE + 20, HEIGHT - 60))
    along = np.linspace(0, 1, 40)
    x = start[0] + (end[0] - start[0]) * along
    y = start[1] + (end[1] - start[1]) * along + 26 * np.sin(np.pi * along)
    line = np.zeros((HEIGHT, WIDTH), np.uint8)
    points = (np.stack([x, y], 1) * 16).astype(np.int32)
    cv2.polylines(line, [points], False, 255, 1, cv2.LINE_AA, shift=4)
    return _blend(canvas, (70, 74, 82), line.astype(np.float32) / 255 * (0.1 + 0.24 * min(1.0, side / 120)))


def render_beach(seed: int = 0) -> BeachScene:
    """Render the scene; the same seed gives the same picture."""
    rng = np.random.default_rng(seed)
    canvas = _people(rng, _beach(rng, _sea(rng, _hills(rng, _sky(rng)))))
    canvas, boxes, labels = _fly(rng, canvas)
    canvas = cv2.GaussianBlur(canvas, (0, 0), 0.6)
    rows, columns = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    canvas *= (1 - 0.14 * (rows**2 + columns**2))[..., None]
    canvas += rng.standard_normal((HEIGHT, WIDTH, 1), dtype=np.float32) * 2.5
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    return BeachScene(pixels, np.array(boxes, np.float32), np.array(labels, np.int64))
