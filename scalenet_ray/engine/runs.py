"""The run folder: what was asked, what is finished, what came of it, what went wrong.

    config.yaml            all that is needed to run it again, seeds and versions included
    detections/*.parquet   written while running, a shard at a time (schema DETECTIONS)
    images/*.parquet       after each of those: the record that its images are finished (schema IMAGES); `finished_at`
                           says when, in seconds at work since the run began, pauses before a resume left out
    failures.parquet       every image that was given up: policy, image id, file, stage, reason
    error.txt              the trace of the bug that ended the run, if one did; gone once the run is resumed
    metrics.json, results.json, report.html, policies.svg   written at the end
    driver.lock            while a driver is at work: a second one is refused

The shards of `images` hold, in their schema's metadata, the busy seconds of each stage since the shard before, summed
over all processes; metrics.json has their sum as `seconds_by_stage` of each policy: decode, cut, look, detect, merge,
write. Shards of older versions have neither, and are read as null and as nothing.

A shard of `images` is the commit: detections without it are of a run that died in between, and are
written again. Local folders and s3:// alike.
"""

from __future__ import annotations

import json
import math
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from scalenet_ray.core import storage
from scalenet_ray.core.clock import STAGES, current_tally, timed
from scalenet_ray.core.coco import ImageRecord
from scalenet_ray.core.errors import UserError, WorkerError
from scalenet_ray.core.results import ImageResult
from scalenet_ray.core.schemas import DETECTIONS, IMAGES, detections_table, images_table
from scalenet_ray.engine.run_lock import RunLock, lock_run
from scalenet_ray.version import __version__

__all__ = ["FAILURES", "RunFolder", "ShardWriter"]

FAILURES = pa.schema(
    [
        ("policy", pa.string()),
        ("image_id", pa.int64()),
        ("file", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
    ]
)
"""One row an image that was given up."""

_IMAGES_PER_SHARD = 256
_SECONDS = b"seconds_by_stage"
_ERROR = "error.txt"
_VERSIONED = ("torch", "torchvision", "ray", "numpy", "pyarrow", "onnxruntime", "pycocotools")


class RunFolder:
    """A run's folder.

    Args:
        uri: local path or s3:// address.
        output: the job's run folder, where this one is a part of it.

    Attributes:
        resumed: whether `begin` took up a run that was there.
        standing: how far the work is, in words: "whole: 163 of 343 done".
    """

    def __init__(self, uri: str, output: str | None = None) -> None:
        self.uri = uri
        self.standing = "nothing done yet"
        self._output = output or uri
        self._lock: RunLock | None = None
        self.resumed = False

    def begin(self, settings: Mapping[str, Any], *, resume: bool, workers: Mapping[str, Any] | None = None) -> RunLock:
        """Lock the folder for this driver and write config.yaml, or take up the run that is there.

        Args:
            settings: what the results depend on, plain values.
            workers: what they do not depend on: engine, pools, batches; noted, and free to differ on resuming.
            resume: go on with a run that is there; else one that is there is refused.

        Returns:
            The lock: `with run.begin(...):` lets go at the end, also when the block raises. What it raises is told
            where the run stands (a `KeyboardInterrupt`) or where its trace is (a bug), as notes.

        Raises:
            FileExistsError: if there is a run and `resume` is not asked for, or another driver is at work on it.
            ValueError: if the run to resume was begun with other settings; it names them.
        """
        lock = lock_run(self.uri, take_over=resume)
        try:
            self._take_up(settings, workers or {}, resume=resume)
        except BaseException:
            lock.release()
            raise
        self._lock = lock
        return _Begun(self, lock)

    def ended_by(self, error: BaseException) -> None:
        """Tell an error that ends the run what its reader needs: how to go on, or where its trace was written."""
        if isinstance(error, KeyboardInterrupt):
            error.add_note(f"{self.standing}; go on with --resume --output {self._output}")
        elif isinstance(error, Exception) and not isinstance(error, (UserError, OSError)):
            trace = error.trace if isinstance(error, WorkerError) else "".join(traceback.format_exception(error))
            with suppress(OSError):
                self.write_text(_ERROR, trace)
                error.add_note(f"its trace: {storage.join(self.uri, _ERROR)}")

    def check_lock(self) -> None:
        """Raise `RuntimeError` if this driver began the run and another one has taken over."""
        if self._lock is not None:
            self._lock.check()

    def _take_up(self, settings: Mapping[str, Any], workers: Mapping[str, Any], *, resume: bool) -> None:
        config = storage.join(self.uri, "config.yaml")
        if storage.exists(config):
            if not resume:
                msg = f"{self.uri} holds a run already: add --resume to go on with it, or give another --output"
                raise FileExistsError(msg)
            self._check_settings(settings)
            self.resumed = True
            if storage.exists(storage.join(self.uri, _ERROR)):
                storage.delete(storage.join(self.uri, _ERROR))
            return
        versions = {name: version(name) for name in _VERSIONED}
        versions |= {"python": platform.python_version(), "scalenet-ray": __version__}
        content = {
            "command": " ".join(sys.argv),
            "begun": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "settings": dict(settings),
            "workers": dict(workers),
            "versions": versions,
        }
        storage.write_bytes_atomic(config, yaml.safe_dump(content, sort_keys=False).encode())

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        before = self.config()["settings"]
        after = yaml.safe_load(yaml.safe_dump(dict(settings)))
        differ = [
            f"{name}: {before.get(name)!r} then, {after.get(name)!r} now"
            for name in sorted({*before, *after})
            if before.get(name) != after.get(name)
        ]
        if differ:
            msg = f"{self.uri} was begun with other settings ({'; '.join(differ)}): use the same, or another --output"
            raise UserError(msg)

    def config(self) -> dict[str, Any]:
        """What config.yaml holds."""
        return yaml.safe_load(storage.read_bytes(storage.join(self.uri, "config.yaml")))

    def shards(self, kind: str, policy: str) -> list[str]:
        """Addresses of the finished shards of `detections` or `images` of one policy, in order."""
        folder = storage.join(self.uri, "images")
        if not storage.exists(folder):
            return []
        pattern = re.compile(re.escape(policy) + r"-\d{5}\.parquet")
        names = [uri.rsplit("/", 1)[-1] for uri in storage.list_files(folder, (".parquet",))]
        return [storage.join(self.uri, kind, name) for name in names if pattern.fullmatch(name)]

    def table(self, kind: str, policy: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of `detections` or `images` of one policy, in order of image id, the best detection first."""
        schema = {"detections": DETECTIONS, "images": IMAGES}[kind]
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        parts = [self._read(uri, columns) for uri in self.shards(kind, policy)]
        # A shard of an older version lacks the columns that came after it: they are null.
        rows = pa.concat_tables([schema.empty_table(), *parts], promote_options="default")
        # Arrow's sort is not stable: a row's own position breaks ties and keeps the best first.
        numbered = rows.append_column("at", pa.array(range(rows.num_rows), pa.int64()))
        return numbered.sort_by([("image_id", "ascending"), ("at", "ascending")]).drop_columns(["at"])

    def _read(self, uri: str, columns: Sequence[str] | None) -> pa.Table:
        # By the main thread alone, without reading ahead: a thread of Arrow's that lets go of a Python object while the
        # interpreter ends aborts the process ("terminate called without an active exception").
        data = pa.BufferReader(storage.read_bytes(uri))
        # Not `read_table`: that one raises for a column which an older shard lacks.
        names = None if columns is None else list(columns)
        return pq.ParquetFile(data, pre_buffer=False).read(columns=names, use_threads=False)

    def seconds_by_stage(self, policy: str) -> dict[str, float]:
        """Busy seconds of each stage, summed over all processes, up to the last finished shard."""
        total = dict.fromkeys(STAGES, 0.0)
        for uri in self.shards("images", policy):
            metadata = pq.read_schema(pa.BufferReader(storage.read_bytes(uri))).metadata or {}
            for stage, seconds in json.loads(metadata.get(_SECONDS, b"{}")).items():
                total[stage] += seconds
        return total

    def seconds_at_work(self, policy: str) -> float:
        """When the last image that is written was finished, in seconds since the run began."""
        times = self.table("images", policy, ["image_id", "finished_at"]).column("finished_at").to_pylist()
        return max((at for at in times if at is not None), default=0.0)

    def finished(self, policy: str) -> dict[int, str]:
        """The images that are written: id -> file."""
        table = self.table("images", policy, ["image_id", "file"])
        return dict(zip(table.column("image_id").to_pylist(), table.column("file").to_pylist(), strict=True))

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as JSON under `name`; NaN, which JSON does not have, becomes null."""
        text = json.dumps(_without_nan(value), indent=1, allow_nan=False)
        storage.write_bytes_atomic(storage.join(self.uri, name), text.encode())

    def write_text(self, name: str, text: str) -> None:
        """Write text under `name`."""
        storage.write_bytes_atomic(storage.join(self.uri, name), text.encode())

    def write_failures(self, policies: Sequence[str]) -> pa.Table:
        """Gather the failures of all policies into failures.parquet.

        Returns:
            The table (schema `FAILURES`).
        """
        rows: list[dict[str, Any]] = []
        for policy in policies:
            table = self.table("images", policy, ["policy", "image_id", "file", "failure_stage", "failure_reason"])
            failed = table.filter(pc.field("failure_stage").is_valid())
            names = {"failure_stage": "stage", "failure_reason": "reason"}
            rows += failed.rename_columns([names.get(name, name) for name in failed.column_names]).to_pylist()
        table = pa.Table.from_pylist(rows, FAILURES)
        storage.write_bytes_atomic(storage.join(self.uri, "failures.parquet"), _parquet(table))
        return table

    def failures(self) -> pa.Table:
        """The table of failures.parquet (schema `FAILURES`), as `write_failures` left it."""
        return self._read(storage.join(self.uri, "failures.parquet"), None)


class _Begun:
    """The lock of a run that has begun; an error that leaves its block passes by the run folder.

    Args:
        run: the run folder.
        lock: what is held.
    """

    def __init__(self, run: RunFolder, lock: RunLock) -> None:
        self._run = run
        self._lock = lock

    def check(self) -> None:
        """Raise `RuntimeError` if another driver has taken over."""
        self._lock.check()

    def release(self) -> None:
        """Let go."""
        self._lock.release()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, traceback
        try:
            if error is not None:
                self._run.ended_by(error)
        finally:
            self.release()


class ShardWriter:
    """Writes finished images in shards: detections first, then the record that they are finished.

    Args:
        run: the run folder.
        policy: the policy's name.
        records: image id -> its record.
        committed: called with the ids of a shard's images once it is written.
    """

    def __init__(
        self,
        run: RunFolder,
        policy: str,
        records: Mapping[int, ImageRecord],
        committed: Callable[[list[int]], None],
    ) -> None:
        self._run = run
        self._policy = policy
        self._records = records
        self._committed = committed
        self._pending: list[tuple[ImageResult, float]] = []
        self._written = 0
        # One past the last number, not how many there are: a shard may have been deleted so that it is made again.
        shards = run.shards("images", policy)
        self._next = int(re.findall(r"\d+", shards[-1])[-1]) + 1 if shards else 0

    @property
    def taken(self) -> int:
        """Images taken in."""
        return self._written + len(self._pending)

    def add(self, result: ImageResult, finished_at: float) -> None:
        """Take in an image, finished so many seconds after the run began; it is written with its shard."""
        self._pending.append((result, finished_at))
        if len(self._pending) >= _IMAGES_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        if not self._pending:
            return
        self._run.check_lock()
        results, finished_at = [one for one, _ in self._pending], [at for _, at in self._pending]
        name = f"{self._policy}-{self._next:05d}.parquet"
        with timed("write"):
            detections = detections_table(results, self._policy)
            storage.write_bytes_atomic(storage.join(self._run.uri, "detections", name), _parquet(detections))
        # What writing the record itself takes is known when it is written: it counts with the next shard.
        tally = current_tally()
        seconds = json.dumps(tally.take() if tally else {}).encode()
        with timed("write"):
            files = [self._records[result.image_id].file_name for result in results]
            images = images_table(results, self._policy, files, finished_at)
            images = images.replace_schema_metadata({_SECONDS: seconds})
            storage.write_bytes_atomic(storage.join(self._run.uri, "images", name), _parquet(images))
        self._pending, self._written, self._next = [], self._written + len(results), self._next + 1
        self._committed([result.image_id for result in results])


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
