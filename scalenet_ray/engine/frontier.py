"""The feedback queue: which tiles wait, which are out, what was decided, and when a run is over.

Ray Data has no cycles; the cycle goes through this queue. Readers lease work from it, the look stage
completes it with the tiles that come of it, and those can be leased again. It holds recipes and never
pixels. Two records make it safe under Ray's retries:

* Leases are journaled. Ray replays a read task *by position*: after a death past k blocks the retry's first k
  are thrown away unseen, so `lease` gives the same work for the same (reader, sequence number) again.
* Completion is authoritative. The first decision on a tile is recorded and returned, and the stage emits
  what was returned: a retry that would decide otherwise loses and doubles nothing.

`Frontier` is plain Python; `FrontierActor` is the same behind a Ray actor.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import ray

from scalenet_ray.core.detections import Failure
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.recursion import Expansion
from scalenet_ray.data.coco import ImageRecord
from scalenet_ray.engine.quarantine import Attempts, TileId

__all__ = ["Completion", "Decision", "Frontier", "FrontierActor", "FrontierStatus", "Lease", "Work", "child_credit"]


def child_credit(credit: Fraction, expansion: Expansion) -> Fraction:
    """The share that a tile, and each tile cut from it, has of the tile's credit."""
    return credit / (1 + len(expansion.children))


@dataclass(frozen=True)
class Work:
    """One thing to lease: an image to open (no tile yet: its size may be unknown), or a tile cut from one."""

    image: ImageRecord
    tile: Tile | None
    credit: Fraction

    @property
    def id(self) -> TileId:
        """(image id, path): the identity of the tile, made once."""
        return (self.image.image_id, self.tile.path if self.tile is not None else ())


@dataclass(frozen=True)
class Lease:
    """What a reader is told: work to do; nothing yet (wait); or that this sequence number is long since done.

    `forgotten` leases are of images that are written already: a replaying reader yields an empty block in
    their place to keep its positions. `suspect` work was begun before, and its reader died: one piece at a time.
    """

    work: tuple[Work, ...] = ()
    forgotten: bool = False
    suspect: bool = False


class Decision(NamedTuple):
    """What was decided on a tile: what becomes of it, or why it was given up."""

    expansion: Expansion
    failure: Failure | None = None


class Completion(NamedTuple):
    """A decision on one tile, offered by the look stage."""

    image_id: int
    path: tuple[int, ...]
    decision: Decision


@dataclass(frozen=True)
class FrontierStatus:
    """How far the queue is: counts of images and tiles."""

    admitted: int
    open_images: int
    ready: int
    outstanding: int
    conflicts: int
    redelivered: int


@dataclass
class _Reader:
    """A reader's journal: entries from `first` on; what came before is of written images."""

    first: int = 0
    entries: list[tuple[Work, ...] | None] = field(default_factory=list)


class Frontier:
    """The queue.

    Args:
        images: the images, in the order in which they are admitted.
        max_open_images: images that may be open at once. It bounds memory, and must exceed the pipeline's depth
            times its batches, or the pipeline runs dry.

    Raises:
        ValueError: if max_open_images is under 1.
    """

    def __init__(self, images: Iterable[ImageRecord], max_open_images: int) -> None:
        if max_open_images < 1:
            msg = f"max_open_images must be 1 or more, got {max_open_images}"
            raise ValueError(msg)
        self._images: Iterator[ImageRecord] | None = iter(images)
        self._max_open = max_open_images
        self._fresh: deque[Work] = deque()
        self._ready: defaultdict[int, list[tuple[int, int, tuple[int, ...], Work]]] = defaultdict(list)
        self._opened_by: dict[int, int] = {}
        self._order: dict[int, int] = {}
        self._out: dict[TileId, Work] = {}
        self._open_tiles: dict[int, int] = {}
        self._decided: dict[int, dict[tuple[int, ...], Decision]] = {}
        self._journal: defaultdict[int, _Reader] = defaultdict(_Reader)
        self._leases_of: dict[int, set[tuple[int, int]]] = {}
        self._uncommitted: dict[tuple[int, int], int] = {}
        self._attempts = Attempts()
        self._admitted = 0
        self._conflicts = 0
        self._redelivered = 0
        self._began: float | None = None

    def lease(self, reader: int, sequence: int, count: int) -> Lease | None:
        """Work for a reader, the same again for the same (reader, sequence).

        A reader gets the tiles of the images that it opened, since it has them decoded: the deepest first, then the
        oldest image's. While they do not fill a lease it opens new images, if those do, so that a batch is looked at or
        detected as a whole. Tiles of another's images it gets where it has no other work: those that are more than
        their reader would take at once, or, with nothing out, any.

        Args:
            reader: the reader's number.
            sequence: which lease of this reader's; one past the last non-empty one, or any earlier.
            count: the most pieces of work to give.

        Returns:
            A lease; an empty one means wait and ask again; None that the run is over.
        """
        journal = self._journal[reader]
        at = sequence - journal.first
        if 0 < at <= len(journal.entries):
            self._attempts.end_together("read", [item.id for item in journal.entries[at - 1] or ()])
        if at < len(journal.entries):
            self._redelivered += 1
            entry = journal.entries[at] if at >= 0 else None
            return Lease(forgotten=True) if entry is None else self._begun(entry)
        work = self._take(reader, count)
        if not work:
            return None if self._over() else Lease()
        self._began = self._began or time.monotonic()
        journal.entries.append(work)
        images = {item.image.image_id for item in work}
        self._uncommitted[reader, sequence] = len(images)
        for image_id in images:
            self._leases_of[image_id].add((reader, sequence))
        return self._begun(work)

    def begin(self, stage: str, tiles: Sequence[TileId]) -> bool:
        """A stage is about to work on some tiles in one call.

        Returns:
            Whether it may: False if one was begun before without an end, or its image is written by now; then they
            are to be begun by themselves.
        """
        known = self._known(tiles)
        return self._attempts.begin(stage, known) and len(known) == len(tiles)

    def begin_alone(self, stage: str, tile: TileId, most: int) -> int | None:
        """A stage is about to work on one tile by itself, unless it has tried so `most` times.

        Returns:
            How often it was begun so before, without an end; None if its image is written, and nothing need be done.
        """
        return self._attempts.begin_alone(stage, tile, most) if self._known([tile]) else None

    def end(self, stage: str, tiles: Sequence[TileId]) -> None:
        """The work on these tiles is over, and its process lives."""
        self._attempts.end(stage, tiles)

    def complete(self, completions: Sequence[Completion]) -> list[Decision]:
        """Record decisions, in one step: tiles that come of them can be leased from now on.

        Args:
            completions: what the look stage decided.

        Returns:
            The decisions that count: the first ever offered for each tile.

        Raises:
            KeyError: if a tile was never leased: a bug, not a fault.
        """
        return [self._complete(completion) for completion in completions]

    def commit(self, image_ids: Sequence[int]) -> None:
        """Forget images whose results are written: their decisions and their entries in the journal."""
        for image_id in image_ids:
            self._decided.pop(image_id, None)
            self._order.pop(image_id, None)
            self._opened_by.pop(image_id, None)
            self._attempts.forget(image_id)
            for reader, sequence in self._leases_of.pop(image_id, ()):
                self._uncommitted[reader, sequence] -= 1
                if not self._uncommitted[reader, sequence]:
                    del self._uncommitted[reader, sequence]
                    self._forget(reader, sequence)

    def status(self) -> FrontierStatus:
        """Counts, for the progress line and for tests."""
        return FrontierStatus(
            admitted=self._admitted,
            open_images=len(self._open_tiles),
            ready=self._waiting,
            outstanding=len(self._out) + self._waiting,
            conflicts=self._conflicts,
            redelivered=self._redelivered,
        )

    def seconds_at_work(self) -> float:
        """Seconds since the first lease; 0 before."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    # --- inside -----------------------------------------------------------------------------------------

    def _known(self, tiles: Sequence[TileId]) -> list[TileId]:
        """Those of images that are not written yet."""
        return [tile for tile in tiles if tile[0] in self._order]

    def _begun(self, work: tuple[Work, ...]) -> Lease:
        """A lease, its work begun."""
        return Lease(work, suspect=not self._attempts.begin("read", self._known([item.id for item in work])))

    @property
    def _waiting(self) -> int:
        return len(self._fresh) + sum(map(len, self._ready.values()))

    def _take(self, reader: int, count: int) -> tuple[Work, ...]:
        own = self._ready[reader]
        if len(own) < count:
            self._admit(count)
        work: list[Work] = []
        if len(own) >= count or len(self._fresh) < count:
            work += _popped(own, count)
        work += [self._fresh.popleft() for _ in range(min(count - len(work), len(self._fresh)))]
        if not work:
            others = max(self._ready.values(), key=len)
            work = _popped(others, count) if len(others) > count or not self._out else []
        for item in work:
            self._out[item.id] = item
            self._opened_by.setdefault(item.image.image_id, reader)
        return tuple(work)

    def _admit(self, wanted: int) -> None:
        """Have so many images ready to be opened, if that many may be open."""
        while len(self._fresh) < wanted and len(self._open_tiles) < self._max_open and self._images is not None:
            image = next(self._images, None)
            if image is None:
                self._images = None
                break
            self._order[image.image_id] = self._admitted
            self._admitted += 1
            self._open_tiles[image.image_id] = 1
            self._decided[image.image_id] = {}
            self._leases_of[image.image_id] = set()
            self._fresh.append(Work(image, None, Fraction(1)))

    def _push(self, work: Work) -> None:
        image_id, path = work.id
        self._open_tiles[image_id] += 1
        heapq.heappush(self._ready[self._opened_by[image_id]], (-len(path), self._order[image_id], path, work))

    def _over(self) -> bool:
        return self._images is None and not self._waiting and not self._out

    def _complete(self, completion: Completion) -> Decision:
        image_id, path, decision = completion
        decided = self._decided.get(image_id)
        if decided is None:
            # Written and forgotten: whatever this retry emits is dropped by the assembler as a double.
            return decision
        if path in decided:
            self._conflicts += decided[path] != decision
            return decided[path]
        work = self._out.pop((image_id, path))
        decided[path] = decision
        credit = child_credit(work.credit, decision.expansion)
        for child in decision.expansion.children:
            self._push(Work(work.image, child, credit))
        self._open_tiles[image_id] -= 1
        if not self._open_tiles[image_id]:
            del self._open_tiles[image_id]
        return decision

    def _forget(self, reader: int, sequence: int) -> None:
        journal = self._journal[reader]
        journal.entries[sequence - journal.first] = None
        done = next((i for i, entry in enumerate(journal.entries) if entry is not None), len(journal.entries))
        del journal.entries[:done]
        journal.first += done


def _popped(heap: list[tuple[int, int, tuple[int, ...], Work]], count: int) -> list[Work]:
    return [heapq.heappop(heap)[-1] for _ in range(min(count, len(heap)))]


@ray.remote(num_cpus=0, max_restarts=0)
class FrontierActor(Frontier):
    """The queue as one actor. If it dies the run ends with a clear message, and resuming goes on."""
