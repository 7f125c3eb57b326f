"""Timeouts and retries of calls that may hang or crash; tiles that keep ending their process fail."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray

from scalenet_ray.core.errors import TileError
from scalenet_ray.runs.resources import AdvancedResources

T = TypeVar("T")


TileId = tuple[int, tuple[int, ...]]
"""(image id, path of the tile)."""


class GuardedCalls:
    """Calls of one stage, with a timeout, recorded in the frontier so that crashes are attributed to tiles.

    Args:
        stage: read, look or detect.
        frontier: the queue's actor.
        advanced: the timeout and the number of tries.
    """

    def __init__(self, stage: str, frontier: Any, advanced: AdvancedResources) -> None:
        self._stage = stage
        self._frontier = frontier
        self._advanced = advanced
        self._ended: Sequence[TileId] = ()

    def in_batches(
        self,
        tiles: Sequence[TileId],
        call: Callable[[Sequence[int]], Sequence[T]],
        give_up: Callable[[int, TileError], T],
        batch_size: int,
    ) -> list[T]:
        """Process tiles in batches, or one by one if such work on one of them did not end.

        The tiles are announced together. That they are done is told with the next ones, or by their completion.

        Args:
            tiles: their ids.
            call: indices into `tiles` -> one result each.
            give_up: an index and the error -> the result of a tile that fails.
            batch_size: maximum number of tiles of a call.

        Returns:
            One result per tile, in order.
        """
        if not tiles:
            return []
        ended, self._ended = self._ended, ()
        # Blocking: a process that calls `os._exit` would not send a message that is still queued.
        if not ray.get(self._frontier.begin.remote(self._stage, tiles, ended)):
            return self.one_by_one(tiles, call, give_up)
        results: list[T] = []
        for start in range(0, len(tiles), batch_size):
            with self.watched():
                results += call(range(start, min(start + batch_size, len(tiles))))
        self._ended = tiles
        return results

    def one_by_one(
        self,
        tiles: Sequence[TileId],
        call: Callable[[Sequence[int]], Sequence[T]],
        give_up: Callable[[int, TileError], T],
    ) -> list[T]:
        """Like `in_batches`, with one call for each tile; a tile without tries left fails."""
        results: list[T] = []
        for i, tile in enumerate(tiles):
            limit = self._advanced.max_tries
            tries: int | None = ray.get(self._frontier.begin_alone.remote(self._stage, tile, limit))
            if tries is None:
                results.append(give_up(i, TileError("its image is written already")))
            elif tries >= limit:
                results.append(give_up(i, TileError(self._reason(tries))))
            else:
                with self.watched():
                    results += call([i])
                self._frontier.end.remote(self._stage, [tile])
        return results

    @contextmanager
    def watched(self) -> Iterator[None]:
        """End this process if the block takes longer than the timeout; print the stacks of its threads to stderr.

        The timer needs no interpreter, so it also ends a library that hangs while it holds the GIL. The exit status is
        1: Ray treats 0 as an intended exit.
        """
        faulthandler.dump_traceback_later(self._advanced.call_seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _reason(self, tries: int) -> str:
        return (
            f"killed its process {tries} times, though worked on by itself: a library crashed on it, or memory ran "
            f"out, or there was no answer within {self._advanced.call_seconds:g} s; look into the file, or leave it out"
        )


class Attempts:
    """Calls of each stage that were started and have not ended.

    A process that dies cannot report it. The process that retries its work starts the same tiles again, and learns here
    that they were started before.
    """

    def __init__(self) -> None:
        # Image id -> (stage, path) -> number of starts of the tile alone.
        self._started: dict[int, dict[tuple[str, tuple[int, ...]], int]] = {}

    def begin(self, stage: str, tiles: Iterable[TileId]) -> bool:
        """Record the start of a call with several tiles.

        Returns:
            True if none of them was started before without an end.
        """
        is_first = True
        for image_id, path in tiles:
            started = self._started.setdefault(image_id, {})
            is_first &= (stage, path) not in started
            started.setdefault((stage, path), 0)
        return is_first

    def begin_alone(self, stage: str, tile: TileId, limit: int) -> int:
        """Record the start of a call with one tile, unless `limit` such calls were started.

        Returns:
            Number of such calls before that did not end.
        """
        started = self._started.setdefault(tile[0], {})
        before = started.get((stage, tile[1]), 0)
        started[stage, tile[1]] = min(before + 1, limit)
        return before

    def end(self, stage: str, tiles: Iterable[TileId]) -> None:
        """Record that a live process has processed these tiles."""
        for image_id, path in tiles:
            self._started.get(image_id, {}).pop((stage, path), None)

    def end_together(self, stage: str, tiles: Iterable[TileId]) -> None:
        """Like `end`, except for tiles that were started alone: each of those is ended by itself."""
        self.end(stage, [tile for tile in tiles if not self._started.get(tile[0], {}).get((stage, tile[1]))])

    def forget(self, image_id: int) -> None:
        """Delete the records of an image."""
        self._started.pop(image_id, None)
