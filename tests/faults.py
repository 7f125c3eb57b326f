"""What goes wrong on purpose, where actors and readers can import it: networks that die, break, change their mind or
hang; scenes to read; and the reference that a run must equal.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scalenet_ray.core.detections import Detections, Failure, ImageResult
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.inference import OracleScalePredictor
from scalenet_ray.core.networks import Detect, NetworkFactories, ScalePredictor
from scalenet_ray.core.policy import Policy, Recursion, parse_policy
from scalenet_ray.core.recursion import recursive_detect
from scalenet_ray.core.scale import ScaleMap
from scalenet_ray.data.image_records import ImageRecord, OpenImage
from tests.oracles import OuterDetector, RandomDetector, RandomScale, TruthOfSquares, draw_squares, scattered_squares

INPUT_SIDE = 64
_SIZES_HW = ((96, 128), (128, 96), (64, 64), (100, 40))

# --- scenes and their reference -----------------------------------------------------------------------------


def records_of(count: int) -> list[ImageRecord]:
    """Images 1 to `count`."""
    return [ImageRecord(i, f"{i}.png") for i in range(1, count + 1)]


class Scenes:
    """Opens images that are drawn from their id; those in `unreadable` cannot be read."""

    def __init__(self, unreadable: Iterable[int] = ()) -> None:
        self._unreadable = frozenset(unreadable)

    def boxes(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """[N, 4] xyxy in image pixels, and labels [N]."""
        return scattered_squares(image_id, _SIZES_HW[image_id % len(_SIZES_HW)], (3, 14), 8)

    def __call__(self, record: ImageRecord) -> np.ndarray:
        if record.image_id in self._unreadable:
            raise TileError(f"image {record.image_id} cannot be read")
        return draw_squares(_SIZES_HW[record.image_id % len(_SIZES_HW)], *self.boxes(record.image_id))


class SlowImages(Scenes):
    """Scenes that take 20 ms to open."""

    def __call__(self, record: ImageRecord) -> np.ndarray:
        time.sleep(0.02)
        return super().__call__(record)


class FlatImages:
    """Opens square images of `side` pixels and one colour, another for each id."""

    def __init__(self, side: int) -> None:
        self._side = side

    def __call__(self, record: ImageRecord) -> np.ndarray:
        return np.full((self._side, self._side, 3), record.image_id % 256, np.uint8)


def policy_of(name: str, max_depth: int = 2) -> Policy:
    """A policy on 64-px tiles whose images fan out down to `max_depth`."""
    recursion = Recursion(max_depth=max_depth, max_windows=6, min_window_side=8)
    policy = parse_policy(name, input_side=INPUT_SIDE, iou_threshold=0.65)
    return dataclasses.replace(policy, recursion=recursion) if policy.uses_evidence else policy


class Given:
    """Makes a network by giving the one that it was made with: each actor has its own copy."""

    def __init__(self, network: Any) -> None:
        self._network = network

    def __call__(self) -> Any:
        return self._network


def random_networks(policy: Policy, count: int = 0) -> NetworkFactories:
    """Networks that answer at random, the same for the same tile; the truth of images 1 to `count` for oracle."""
    if policy.reads_truth:
        truth = TruthOfSquares({i: Scenes().boxes(i)[0] for i in range(1, count + 1)})
        return NetworkFactories(Given(RandomDetector()), Given(OracleScalePredictor(truth)))
    return NetworkFactories(Given(RandomDetector()), Given(RandomScale()))


def as_values(result: ImageResult) -> dict[str, Any]:
    """All that an image's result holds, to the last bit, as values that compare."""
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    found: Detections = values.pop("detections")
    arrays = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    masks = arrays.pop("masks")
    alone: Detections | None = values.pop("whole_pass")
    columns = () if alone is None else (alone.boxes, alone.scores, alone.labels)
    values["whole_pass"] = [column.tolist() for column in columns]
    return {**values, **{name: array.tolist() for name, array in arrays.items()}, "masks": masks}


def reference(
    records: Sequence[ImageRecord], policy: Policy, networks: NetworkFactories, open_image: OpenImage
) -> dict[int, dict[str, Any]]:
    """Image id -> what `recursive_detect` finds, or the failure of an image that cannot be read."""
    detect = networks.detect()
    predict_scale = networks.predict_scale() if networks.predict_scale else None
    expected = {}
    for record in records:
        try:
            image = open_image(record)
        except TileError as error:
            failure = Failure("read", error.reason)
            result = ImageResult(record.image_id, Detections.empty(), failure, 0, 0, 0, 0.0, {}, None)
        else:
            result = recursive_detect(image, record.image_id, policy, detect=detect, predict_scale=predict_scale)
        expected[record.image_id] = as_values(result)
    return expected


# --- faults -------------------------------------------------------------------------------------------------


class Fault:
    """Ends its process without a word at its `turn`-th call, once in a run: then the file `marker` is there."""

    def __init__(self, marker: Path, turn: int = 1) -> None:
        self._marker, self._turn, self._turns = marker, turn, 0

    def strike(self) -> None:
        """Count a turn, and die if it is the one."""
        self._turns += 1
        if self._turns < self._turn:
            return
        try:
            os.close(os.open(self._marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os._exit(1)

    @property
    def fired(self) -> bool:
        """Whether it has happened."""
        return self._marker.exists()


class WorkLog:
    """What networks were asked, over all processes and deaths: each process writes its own file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, line: str) -> None:
        """Add a line; it is there even if the process dies next."""
        handle = os.open(self._folder / f"{os.getpid()}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(handle, f"{line}\n".encode())
        os.close(handle)

    def lines(self) -> list[str]:
        """All lines, in no order."""
        return [line for path in self._folder.glob("*.log") for line in path.read_text().splitlines()]


class FaultyOpen:
    """Opens images, and dies by `fault` before one: its lease is taken by then, and is not yielded."""

    def __init__(self, inner: OpenImage, fault: Fault, log: WorkLog) -> None:
        self._inner, self._fault, self._log = inner, fault, log

    def __call__(self, record: ImageRecord) -> np.ndarray:
        self._log.write(str(record.image_id))
        self._fault.strike()
        return self._inner(record)


class FaultyScale:
    """A Scale Net that logs its tiles, and dies `before` a decision on them or `after` the frontier has it."""

    def __init__(
        self, inner: ScalePredictor, log: WorkLog, before: Fault | None = None, after: Fault | None = None
    ) -> None:
        self._inner, self._log, self._before, self._after = inner, log, before, after

    @property
    def input_pixels(self) -> int:
        """What the look stage asks for first once the frontier has answered; protocol checks ask before, too."""
        if self._after is not None and sys._getframe(1).f_code.co_name == "_apply":
            self._after.strike()
        return self._inner.input_pixels

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        for tile in tiles:
            self._log.write(f"{tile.image_id} {tile.path}")
        maps = self._inner(pixels, tiles)
        if self._before is not None:
            self._before.strike()
        return maps


class WhimsicalScale:
    """A Scale Net that decides otherwise each time it is asked."""

    input_pixels = 32 * 32

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        return RandomScale(int.from_bytes(os.urandom(4)), share=0.05)(pixels, tiles)


class BuggyScale:
    """A Scale Net with a bug that the image `image_id` brings out."""

    input_pixels = 32 * 32

    def __init__(self, image_id: int) -> None:
        self._image_id = image_id

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        if any(tile.image_id == self._image_id for tile in tiles):
            raise ValueError("a bug: the weights are of another network")
        return RandomScale()(pixels, tiles)


class FaultyDetector(OuterDetector):
    """A detector that logs the size of each tile, and dies at the start or the end of a call."""

    def __init__(self, inner: Detect, log: WorkLog, at_start: Fault | None = None, at_end: Fault | None = None) -> None:
        super().__init__(inner)
        self._log, self._at_start, self._at_end = log, at_start, at_end

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        for one in pixels:
            self._log.write(f"{one.shape}")
        if self._at_start is not None:
            self._at_start.strike()
        found = super().__call__(pixels)
        if self._at_end is not None:
            self._at_end.strike()
        return found


class StuckDetector(RandomDetector):
    """A detector that never answers until the file `let_go` is there: such an actor outlives its run."""

    def __init__(self, let_go: Path) -> None:
        super().__init__(input_side=INPUT_SIDE)
        self._let_go = let_go

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        while not self._let_go.exists():
            time.sleep(0.1)
        return super().__call__(pixels)


class SlowDetector(RandomDetector):
    """A detector that takes `seconds` for each tile."""

    def __init__(self, seconds: float, input_side: int = INPUT_SIDE) -> None:
        super().__init__(input_side=input_side)
        self._seconds = seconds

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        time.sleep(self._seconds * len(pixels))
        return super().__call__(pixels)
