"""The engine in one process without Ray, with random faults and replays.

What Ray Data does is done here by hand: a reader that dies begins again and what it had yielded is thrown away
*by position*, a call that dies is made again with the same rows, and now and then rows that were done long ago are made
and sent once more, as after the loss of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from scalenet_ray.core.detections import Detections, ImageResult
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.data.image_records import ImageRecord, ImageRecords, OpenImage
from scalenet_ray.engine.frontier import Frontier
from scalenet_ray.engine.pipeline import Assembler
from scalenet_ray.engine.readers import TileSource
from scalenet_ray.engine.rows import unpack_results
from scalenet_ray.engine.stages import DetectStage, ScaleAndDetectStage, ScaleStage
from scalenet_ray.runs.resources import AdvancedResources


class Died(BaseException):
    """A process ended; no stage may catch it."""


class Handle:
    """A frontier as its actor's handle: `handle.method.remote(...)` gives what `ray.get` then passes on, or dies
    first.
    """

    def __init__(self, frontier: Any, dies: Callable[[], bool] = lambda: False) -> None:
        self.frontier = frontier
        self._dies = dies

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.frontier, name)

        def remote(*args: Any) -> Any:
            answer = method(*args)
            if self._dies():
                raise Died
            return answer

        return SimpleNamespace(remote=remote)


class InProcessEngine:
    """Runs a policy to its end, or until nothing moves any more, in an order and with faults that `seed` decides.

    Each step of a reader or a stage dies at `death_rate`, and at `rerun_rate` an old row is made and sent again;
    deaths at random are nobody's fault, and give nothing up unless `max_tries` says so.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        policy: Policy,
        networks: NetworkFactories,
        open_image: OpenImage,
        *,
        seed: int = 0,
        death_rate: float = 0.0,
        rerun_rate: float = 0.0,
        readers: int = 2,
        lease_size: int = 3,
        detector_batch_size: int = 4,
        max_open_images: int = 4,
        max_tries: int = 10**6,
    ) -> None:
        self._random = Random(seed)
        self._death_rate, self._rerun_rate = death_rate, rerun_rate
        self._records = records
        self._max_open_images = max_open_images
        self._lease_size = lease_size
        self.frontier = Frontier(records, max_open_images)
        handle = Handle(self.frontier, self._dies)
        advanced = AdvancedResources(max_tries=max_tries)
        source = TileSource(
            handle,
            policy,
            self._mortal(open_image),
            readers=readers,
            lease_size=lease_size,
            open_images=max_open_images,
            advanced=advanced,
        )
        self._tasks = source.get_read_tasks(1)
        self._readers = [_Replaying(task) for task in self._tasks]
        detector = _Mortal(networks.detect(), self._dies)
        mortal = replace(networks, detect=lambda: detector)
        together = networks.one_actor_suffices(policy)
        self._look = _pass_on if together else ScaleStage(handle, policy, networks, advanced=advanced)
        stage = ScaleAndDetectStage if together else DetectStage
        self._detect = stage(handle, policy, mortal, detector_batch_size, advanced)
        self._assembler = Assembler(policy.merging, ImageRecords.of(records))
        self._rows: list[pa.Table] = []
        self._looked: list[pa.Table] = []
        self._old_calls: list[pa.Table] = []
        self._uncommitted: list[int] = []
        self.results: list[ImageResult] = []
        self.deaths = 0

    def run(self) -> list[ImageResult]:
        """The images that were finished, in their order; those that a fault swallowed are missing."""
        while self._step():
            if self._random.random() < self._rerun_rate:
                self._rerun()
            if self._uncommitted and self._random.random() < 0.2:
                self.frontier.commit([self._uncommitted.pop(0)])
        return self.results

    def _dies(self) -> bool:
        died = self._random.random() < self._death_rate
        self.deaths += died
        return died

    def _mortal(self, open_image: OpenImage) -> OpenImage:
        def opened(record: ImageRecord) -> np.ndarray:
            if self._dies():
                raise Died
            return open_image(record)

        return opened

    def _can_lease(self, reader: int) -> bool:
        """Whether a reader's next call would not wait: in one process nobody else would end the wait."""
        status, journal, waiting = self.frontier.status(), self.frontier._journal[reader], self.frontier._ready
        has_work = self.frontier._fresh or waiting[reader]
        takes = status.ready > 0 and (not self.frontier._out or max(map(len, waiting.values())) > self._lease_size)
        left = status.admitted < len(self._records)
        admits = left and status.open_images < self._max_open_images
        owed = journal.first + len(journal.entries) > self._readers[reader].sequence
        over = not left and not status.outstanding
        return bool(has_work or takes or admits or owed or over)

    def _step(self) -> bool:
        """One reader, look or detect step at random; False if there is none left."""
        steps: list[Callable[[], None]] = [
            self._read_step(reader) for i, reader in enumerate(self._readers) if not reader.ended and self._can_lease(i)
        ]
        if self._rows:
            steps.append(self._look_step)
        if self._looked:
            steps.append(self._detect_step)
        if not steps:
            return False
        self._random.choice(steps)()
        return True

    def _read_step(self, reader: _Replaying) -> Callable[[], None]:
        def step() -> None:
            self._rows += reader.advance()

        return step

    def _look_step(self) -> None:
        row = self._rows.pop(self._random.randrange(len(self._rows)))
        self._looked.append(self._until_it_lives(self._look, row))

    def _detect_step(self) -> None:
        call = self._looked.pop(0)
        self._old_calls.append(call)
        self._take(self._until_it_lives(self._detect, call))

    def _take(self, results: pa.Table) -> None:
        done = self._assembler.add(unpack_results(results))
        self.results += done
        self._uncommitted += [result.image_id for result in done]

    def _until_it_lives(self, stage: Callable[[pa.Table], pa.Table], table: pa.Table) -> pa.Table:
        while True:
            try:
                return stage(table)
            except Died:
                continue

    def _rerun(self) -> None:
        """A node was lost: a reader's row, or a detect call, is made again, and what comes of it arrives again."""
        if self._old_calls and self._random.random() < 0.5:
            self._take(self._until_it_lives(self._detect, self._random.choice(self._old_calls)))
            return
        at = self._random.randrange(len(self._readers))
        again, rows = _Replaying(self._tasks[at]), list[pa.Table]()
        while len(rows) < self._readers[at].taken:
            rows += again.advance()
        if rows:
            self._looked.append(self._until_it_lives(self._look, self._random.choice(rows)))


def _pass_on(row: pa.Table) -> pa.Table:
    return row


class _Replaying:
    """A read task as Ray runs it: after a death it begins again, and as many rows as were taken are thrown away."""

    def __init__(self, task: Callable[[], Any]) -> None:
        self._task = task
        self._generator: Iterator[pa.Table] = iter(task())
        self.sequence = 0
        self.taken = 0
        self.ended = False

    def advance(self) -> list[pa.Table]:
        """The next row; none if it is thrown away, the reader died, or it has ended."""
        try:
            row = next(self._generator, None)
        except Died:
            self._generator, self.sequence = iter(self._task()), 0
            return []
        if row is None:
            self.ended = True
            return []
        self.sequence += 1
        if self.sequence <= self.taken:
            return []
        self.taken = self.sequence
        return [row]


class _Mortal:
    """A detector that may die before or after it detects."""

    def __init__(self, inner: Any, dies: Callable[[], bool]) -> None:
        self._inner, self._dies = inner, dies
        self.input_side = inner.input_side

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        return self._inner.canvas_hw(hw)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        if self._dies():
            raise Died
        found = self._inner(pixels)
        if self._dies():
            raise Died
        return found
