"""Timeouts and retries of calls to networks, and the tiles that are given up."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray

from scalenet_ray.core.errors import TileError
from scalenet_ray.runs.resources import RetryPolicy

__all__ = [
    "Attempts",
    "GuardedCalls",
    "TileId",
]

T = TypeVar("T")


class GuardedCalls:
    """A stage's calls to what may hang or crash.

    Args:
        stage: read, look or detect.
        frontier: the queue's actor.
        retries: how long, and how often.
    """

    def __init__(self, stage: str, frontier: Any, retries: RetryPolicy) -> None:
        self._stage = stage
        self._frontier = frontier
        self._retries = retries

    def together(
        self,
        tiles: Sequence[TileId],
        call: Callable[[Sequence[int]], Sequence[T]],
        give_up: Callable[[int, TileError], T],
    ) -> list[T]:
        """Work on some tiles in one call, or one at a time if one of them may be poison.

        Args:
            tiles: their ids.
            call: positions in `tiles` -> an answer each.
            give_up: a position, and why -> the answer for a tile that is given up.

        Returns:
            An answer for each tile, in order.
        """
        if not tiles:
            return []
        # Waited for: an `os._exit` in the call would take a message along that is still on its way.
        if not ray.get(self._frontier.begin.remote(self._stage, tiles)):
            return self.one_by_one(tiles, call, give_up)
        with self.watched():
            answers = list(call(range(len(tiles))))
        self._frontier.end.remote(self._stage, tiles)
        return answers

    def one_by_one(
        self,
        tiles: Sequence[TileId],
        call: Callable[[Sequence[int]], Sequence[T]],
        give_up: Callable[[int, TileError], T],
    ) -> list[T]:
        """As `together`, but each tile in a call of its own; a tile that has used up its tries is given up."""
        answers: list[T] = []
        for at, tile in enumerate(tiles):
            most = self._retries.max_tries
            tries: int | None = ray.get(self._frontier.begin_alone.remote(self._stage, tile, most))
            if tries is None:
                answers.append(give_up(at, TileError("its image is written already")))
            elif tries >= most:
                answers.append(give_up(at, TileError(self._why(tries))))
            else:
                with self.watched():
                    answers += call([at])
                self._frontier.end.remote(self._stage, [tile])
        return answers

    @contextmanager
    def watched(self) -> Iterator[None]:
        """End this process, with the stacks of its threads on the standard error, if the block takes too long.

        The watch needs no interpreter, so that a library that hangs with its lock held is ended, too. The status is 1:
        Ray takes a worker that ends with 0 for one that meant to.
        """
        faulthandler.dump_traceback_later(self._retries.call_seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _why(self, tries: int) -> str:
        return (
            f"killed its process {tries} times, though worked on by itself: a library crashed on it, or memory ran "
            f"out, or there was no answer within {self._retries.call_seconds:g} s; look into the file, or leave it out"
        )


TileId = tuple[int, tuple[int, ...]]
"""(image id, path of the tile)."""


class Attempts:
    """What each stage has begun and not ended.

    A process that dies cannot say so; but whoever takes over its work begins it again, and finds that it was begun.
    """

    def __init__(self) -> None:
        # Image id -> (stage, path) -> how often the tile was begun by itself.
        self._begun: dict[int, dict[tuple[str, tuple[int, ...]], int]] = {}

    def begin(self, stage: str, tiles: Iterable[TileId]) -> bool:
        """Some tiles are begun together.

        Returns:
            Whether none of them was begun before without an end.
        """
        fresh = True
        for image_id, path in tiles:
            begun = self._begun.setdefault(image_id, {})
            fresh &= (stage, path) not in begun
            begun.setdefault((stage, path), 0)
        return fresh

    def begin_alone(self, stage: str, tile: TileId, most: int) -> int:
        """One tile is begun by itself, unless it was so `most` times.

        Returns:
            How often it was before, without an end.
        """
        begun = self._begun.setdefault(tile[0], {})
        before = begun.get((stage, tile[1]), 0)
        begun[stage, tile[1]] = min(before + 1, most)
        return before

    def end(self, stage: str, tiles: Iterable[TileId]) -> None:
        """The process that began these tiles has lived to tell."""
        for image_id, path in tiles:
            self._begun.get(image_id, {}).pop((stage, path), None)

    def end_together(self, stage: str, tiles: Iterable[TileId]) -> None:
        """As `end`, but what was begun by itself ends by itself."""
        self.end(stage, [tile for tile in tiles if not self._begun.get(tile[0], {}).get((stage, tile[1]))])

    def forget(self, image_id: int) -> None:
        """The image is written."""
        self._begun.pop(image_id, None)
