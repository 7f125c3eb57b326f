"""A detector whose answers a test sets, by name: `tests.scripted_detector:Scripted`."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from scalenet_ray.core.detections import Detections

SCRIPTED = "tests.scripted_detector:Scripted"


def one_box(tile: np.ndarray) -> Detections:
    """The left upper quarter of a tile, as class 1."""
    return Detections([[0, 0, tile.shape[1] / 2, tile.shape[0] / 2]], [0.9], [1])  # type: ignore[arg-type]


class Scripted:
    """Its declaration and its answers are attributes of the class, for tests to set."""

    input_side: ClassVar[Any] = 64
    iou_threshold: ClassVar[Any] = 0.6
    categories: ClassVar[Any] = {1: "square", 2: "disc"}
    canvas: ClassVar[Callable[[tuple[int, int]], Any]] = lambda hw: hw
    answer: ClassVar[Callable[[Sequence[np.ndarray]], Any]] = lambda tiles: [one_box(tile) for tile in tiles]

    def canvas_hw(self, hw: tuple[int, int]) -> Any:
        """What the test says."""
        return type(self).canvas(hw)

    def __call__(self, pixels: Sequence[np.ndarray]) -> Any:
        return type(self).answer(pixels)


def scripted(**parts: Any) -> Scripted:
    """One with other parts: `answer` of tiles, `categories` and so on."""
    functions: Mapping[str, Any] = {
        name: staticmethod(part) if name in ("answer", "canvas") else part for name, part in parts.items()
    }
    return type("Scripted", (Scripted,), dict(functions))()


@contextmanager
def answering(answer: Callable[[Sequence[np.ndarray]], Any], **parts: Any) -> Iterator[None]:
    """Have the scripted detector answer so."""
    before = {name: vars(Scripted)[name] for name in ("answer", *parts)}
    try:
        for name, part in {"answer": staticmethod(answer), **parts}.items():
            setattr(Scripted, name, part)
        yield
    finally:
        for name, part in before.items():
            setattr(Scripted, name, part)


class RaisesOn:
    """A detector that raises an exception on some images, told by the colour of `FlatImages`; None: on all."""

    categories: ClassVar[dict[int, str]] = {1: "square"}
    iou_threshold = 0.6
    input_side = 64

    def __init__(self, ids: Container[int] | None) -> None:
        self._ids = ids

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        return hw

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections]:
        if any(self._ids is None or int(tile[0, 0, 0]) in self._ids for tile in pixels):
            msg = "no kernel\nfor this"
            raise RuntimeError(msg)
        return [Detections.empty() for _ in pixels]
