"""How long a call may take, and how often a tile may take its process down, until it is given up.

A poison image kills whatever works on it: a library crashes, or the memory of the machine runs out. Ray restarts the
process and gives it the same work again, for ever. So a stage says at the frontier what it begins, before it begins:
if it finds that its tiles were begun before and never ended, it takes them one at a time, and gives up the one that
has died often enough by itself.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.engine.attempts import TileId

__all__ = ["PATIENCE", "CarefulCalls", "Patience"]

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """What is put up with.

    Attributes:
        call_seconds: a call that takes longer hangs: its process is ended, and the work begun again in a new one.
        max_tries: a tile that by itself has ended its process so often is given up.

    Raises:
        UserError: if a number leaves its range.
    """

    call_seconds: float = 300.0
    max_tries: int = 3

    def __post_init__(self) -> None:
        if self.call_seconds <= 0:
            msg = f"call_seconds must be above 0, got {self.call_seconds}"
            raise UserError(msg)
        if self.max_tries < 1:
            msg = f"max_tries must be 1 or more, got {self.max_tries}"
            raise UserError(msg)


PATIENCE = Patience()


class CarefulCalls:
    """A stage's calls to what may hang or crash.

    Args:
        stage: read, look or detect.
        frontier: the queue's actor.
        patience: how long, and how often.
    """

    def __init__(self, stage: str, frontier: Any, patience: Patience) -> None:
        self._stage = stage
        self._frontier = frontier
        self._patience = patience

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
            most = self._patience.max_tries
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
        faulthandler.dump_traceback_later(self._patience.call_seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _why(self, tries: int) -> str:
        return (
            f"killed its process {tries} times, though worked on by itself: a library crashed on it, or memory ran "
            f"out, or there was no answer within {self._patience.call_seconds:g} s; look into the file, or leave it out"
        )
