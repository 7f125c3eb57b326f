"""Feedback queue of the tiles of a run.

Ray Data pipelines have no cycles, so the cycle goes through this queue: readers lease tiles, the scale stage completes
them with their child tiles, and the children can be leased in turn. The queue holds the coordinates of tiles, no
pixels. Two records make it safe under Ray's retries:

* Leases are journaled. Ray replays a read task *by position*: if it died after k blocks, the first k blocks of the
  retry are discarded. So `lease` returns the same work for the same (reader, sequence number).
* Completion is authoritative. The first decision on a tile is recorded and returned, and the stage emits what was
  returned. A retry that decides differently neither loses nor duplicates tiles.

`Frontier` is plain Python; `FrontierActor` is the same class as a Ray actor.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import ray

from scalenet_ray.core.detections import Failure
from scalenet_ray.core.expansion import Expansion
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.policy import Policy
from scalenet_ray.data.image_records import ImageRecord
from scalenet_ray.engine.quarantine import Attempts, TileId


def child_credit(credit: Fraction, expansion: Expansion) -> Fraction:
    """The credit of a tile after its expansion, and of each of its children: equal shares of the tile's credit."""
    return credit / (1 + len(expansion.children))


@dataclass(frozen=True)
class Work:
    """A unit of work to lease: an image to open (`tile` is None, as its size may be unknown), or a tile of an image."""

    image: ImageRecord
    tile: Tile | None
    credit: Fraction

    @property
    def id(self) -> TileId:
        """(image id, path of the tile)."""
        return (self.image.image_id, self.tile.path if self.tile is not None else ())


@dataclass(frozen=True)
class Lease:
    """Answer to a reader's request.

    Attributes:
        work: the work to do; empty if there is none yet, and the reader must ask again.
        forgotten: all images of this lease are written already. A replayed reader yields an empty block in its place,
            so that the positions of its blocks stay the same.
        suspect: the work was started before, and its reader died: it must be processed one piece at a time.
    """

    work: tuple[Work, ...] = ()
    forgotten: bool = False
    suspect: bool = False


@dataclass(frozen=True)
class LeaseLimits:
    """Limits of a lease beside its count.

    Attributes:
        policy: tells how large the tiles of an image may be.
        shares: a lease is at most this part of the work that is left, so that near the end, or with few images, no
            actor waits for the row of another.
        max_bytes: maximum bytes of the pixels of a lease's tiles; a single larger piece of work is leased alone.
    """

    policy: Policy
    shares: int
    max_bytes: int

    def bytes_of(self, work: Work) -> int:
        """Bytes of the pixels that a reader cuts for a piece of work, at most, if the image's size is not known."""
        tile = work.tile
        if tile is not None:
            return 3 * tile.height * tile.width
        side = self.policy.largest_side
        root = side * side
        if work.image.hw is not None:
            tile = self.policy.root(work.image.image_id, work.image.hw)
            root = tile.height * tile.width
        return 3 * (root + self.policy.fixed_windows * side * side)


class Decision(NamedTuple):
    """Decision on a tile: its expansion, and the failure if it failed."""

    expansion: Expansion
    failure: Failure | None = None


class Completion(NamedTuple):
    """Decision on one tile, proposed by the scale stage."""

    image_id: int
    path: tuple[int, ...]
    decision: Decision


@dataclass(frozen=True)
class FrontierStatus:
    """Counts of images and tiles in the queue."""

    admitted: int
    open_images: int
    ready: int
    outstanding: int
    conflicts: int


@dataclass
class _Reader:
    """Journal of a reader: its leases from number `first` on; earlier ones are of written images."""

    first: int = 0
    entries: list[tuple[Work, ...] | None] = field(default_factory=list)


class Frontier:
    """Feedback queue of tiles.

    Args:
        images: the images, in the order in which they are admitted.
        max_open_images: maximum number of images in progress. It bounds memory, and must exceed the pipeline's depth
            times its batch sizes, or the stages starve.
        limits: limits of a lease; None for its count alone.

    Raises:
        ValueError: if max_open_images is under 1.
    """

    def __init__(self, images: Sequence[ImageRecord], max_open_images: int, limits: LeaseLimits | None = None) -> None:
        if max_open_images < 1:
            msg = f"max_open_images must be 1 or more, got {max_open_images}"
            raise ValueError(msg)
        self._images = images
        self._max_open = max_open_images
        self._limits = limits
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
        self._began: float | None = None

    def lease(self, reader: int, sequence: int, count: int) -> Lease | None:
        """Lease work to a reader; the same work again for the same (reader, sequence).

        A request also acknowledges the reader's lease before: its block has left the reader.

        A reader gets tiles of the images that it opened, since it has them decoded: the deepest first, then by age of
        the image. If they do not fill a lease but new images do, it opens new images, so that batches are full. If it
        has no other work it gets tiles of other readers' images: those beyond one lease of their reader, or any if no
        tile is leased.

        Args:
            reader: the reader's number.
            sequence: the number of the reader's lease: one past its last non-empty one, or any earlier one.
            count: maximum number of pieces of work; `LeaseLimits` may allow fewer.

        Returns:
            A lease; an empty one means wait and ask again; None means that the run is over.
        """
        journal = self._journal[reader]
        at = sequence - journal.first
        self._acknowledge(journal, at - 1)
        if at < len(journal.entries):
            entry = journal.entries[at] if at >= 0 else None
            return Lease(forgotten=True) if entry is None else self._start_reading(entry)
        work = self._take(reader, count)
        if not work:
            return None if self._is_finished() else Lease()
        self._began = self._began or time.monotonic()
        journal.entries.append(work)
        images = {item.image.image_id for item in work}
        self._uncommitted[reader, sequence] = len(images)
        for image_id in images:
            self._leases_of[image_id].add((reader, sequence))
        return self._start_reading(work)

    def begin(self, stage: str, tiles: Sequence[TileId], ended: Sequence[TileId] = ()) -> bool:
        """Record that a stage starts to process some tiles in one call.

        Args:
            stage: the stage.
            tiles: the tiles.
            ended: tiles that the same process has processed before, as in `end`.

        Returns:
            False if a tile was started before without an end, or its image is written already: the tiles must then be
            processed one by one.
        """
        self.end(stage, ended)
        known = self._known(tiles)
        return self._attempts.begin(stage, known) and len(known) == len(tiles)

    def begin_alone(self, stage: str, tile: TileId, limit: int) -> int | None:
        """Record that a stage starts to process one tile alone, unless it has done so `limit` times.

        Returns:
            How often the tile was started alone before, without an end; None if its image is written already.
        """
        return self._attempts.begin_alone(stage, tile, limit) if self._known([tile]) else None

    def end(self, stage: str, tiles: Sequence[TileId]) -> None:
        """Record that a stage has processed these tiles and that its process lives."""
        self._attempts.end(stage, tiles)

    def complete(self, completions: Sequence[Completion]) -> list[Decision]:
        """Record decisions in one step; child tiles can be leased from now on. The look at the tiles has ended.

        Args:
            completions: the decisions of the scale stage.

        Returns:
            The valid decisions: the first one recorded for each tile.

        Raises:
            KeyError: if a tile was never leased, which is a bug.
        """
        self._attempts.end_together("look", [(image_id, path) for image_id, path, _ in completions])
        return [self._complete(completion) for completion in completions]

    def commit(self, image_ids: Sequence[int]) -> None:
        """Delete the decisions and journal entries of images whose results are written."""
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
        """Counts of images and tiles."""
        return FrontierStatus(
            admitted=self._admitted,
            open_images=len(self._open_tiles),
            ready=self._waiting,
            outstanding=len(self._out) + self._waiting,
            conflicts=self._conflicts,
        )

    def seconds_at_work(self) -> float:
        """Seconds since the first lease; 0 before."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    # --- internals --------------------------------------------------------------------------------------

    def _known(self, tiles: Sequence[TileId]) -> list[TileId]:
        """The tiles of images that are not written yet."""
        return [tile for tile in tiles if tile[0] in self._order]

    def _acknowledge(self, journal: _Reader, index: int) -> None:
        """Record that a reader has read the lease at `index` of its journal, if there is one."""
        if 0 <= index < len(journal.entries):
            self._attempts.end_together("read", [item.id for item in journal.entries[index] or ()])

    def _start_reading(self, work: tuple[Work, ...]) -> Lease:
        """Record that a reader starts to read the work, and return its lease."""
        return Lease(work, suspect=not self._attempts.begin("read", self._known([item.id for item in work])))

    @property
    def _waiting(self) -> int:
        return len(self._fresh) + sum(map(len, self._ready.values()))

    def _take(self, reader: int, count: int) -> tuple[Work, ...]:
        if self._limits is not None:
            left = len(self._images) - self._admitted + self._waiting
            count = min(count, max(1, left // self._limits.shares))
        own = self._ready[reader]
        if len(own) < count:
            self._admit(count)
        row = _Row(count, self._limits)
        if len(own) >= count or len(self._fresh) < count:
            while own and row.add(own[0][-1]):
                heapq.heappop(own)
        while self._fresh and row.add(self._fresh[0]):
            self._fresh.popleft()
        work = row.work
        if not work:
            others = max(self._ready.values(), key=len)
            if len(others) > count or not self._out:
                while others and row.add(others[0][-1]):
                    heapq.heappop(others)
        for item in work:
            self._out[item.id] = item
            self._opened_by.setdefault(item.image.image_id, reader)
        return tuple(work)

    def _admit(self, wanted: int) -> None:
        """Admit images until `wanted` are ready to be opened, or the limit of open images is reached."""
        while (
            len(self._fresh) < wanted and len(self._open_tiles) < self._max_open and self._admitted < len(self._images)
        ):
            image = self._images[self._admitted]
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

    def _is_finished(self) -> bool:
        return self._admitted == len(self._images) and not self._waiting and not self._out

    def _complete(self, completion: Completion) -> Decision:
        image_id, path, decision = completion
        decided = self._decided.get(image_id)
        if decided is None:
            # The image is written: the assembler drops what this retry emits as a duplicate.
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
        first = next((i for i, entry in enumerate(journal.entries) if entry is not None), len(journal.entries))
        del journal.entries[:first]
        journal.first += first


class _Row:
    """Work of a lease, added while there is room."""

    def __init__(self, count: int, limits: LeaseLimits | None) -> None:
        self.work: list[Work] = []
        self._count, self._limits, self._bytes = count, limits, 0

    def add(self, work: Work) -> bool:
        """Add a piece of work; returns False if there is no room for it."""
        size = 0 if self._limits is None else self._limits.bytes_of(work)
        too_large = self._limits is not None and self._bytes + size > self._limits.max_bytes
        if len(self.work) >= self._count or (self.work and too_large):
            return False
        self.work.append(work)
        self._bytes += size
        return True


@ray.remote(num_cpus=0, max_restarts=0)
class FrontierActor(Frontier):
    """Feedback queue as a Ray actor. If it dies, the run ends with an error and can be resumed."""
