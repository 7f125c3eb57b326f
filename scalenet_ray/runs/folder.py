"""The run folder: what was asked, what is finished, what came of it, what went wrong.

    config.yaml            all that is needed to run it again, seeds and versions included
    inputs.parquet         the images that the run was given, with their ids (schema INPUTS); see `engine.inputs`
    detections/*.parquet   written while running, a shard at a time (schema DETECTIONS)
    images/*.parquet       after each of those: the record that its images are finished (schema IMAGES); `finished_at`
                           says when, in seconds at work since the run began, pauses before a resume left out
    failures.parquet       every image that was given up: policy, image id, file, stage, reason
    error.txt              the trace of the bug that ended the run, if one did; gone once the run is resumed
    metrics.json, results.json, report.html, policies.svg   written at the end
    driver.lock            while a driver is at work: a second one is refused

The shards of `images` hold, in their schema's metadata, what passed since the shard before: the busy seconds of each
stage, summed over all processes (metrics.json has their sum as `seconds_by_stage` of each policy: decode, cut, look,
detect, merge, write), and the seconds of work on the clock, from the first image that was begun. Shards of older
versions lack some of it, and are read as null and as nothing.

A shard of `images` is the commit: detections without it are of a run that died in between, and are
written again. Shards are read in the order of their numbers. Where two record one image, which failed and was tried
again, the later one counts; an image that the run is no longer given does not count. Local folders and s3:// alike.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from scalenet_ray import __version__
from scalenet_ray.core.detections import ImageResult
from scalenet_ray.core.errors import UserError, WorkerError
from scalenet_ray.core.timing import STAGES, current_tally, timed
from scalenet_ray.data import storage
from scalenet_ray.data.coco import ImageRecord
from scalenet_ray.data.schemas import DETECTIONS, IMAGES, detections_table, images_table
from scalenet_ray.runs.lock import RunLock, lock_run
from scalenet_ray.runs.settings import settings_that_differ, working_directory

__all__ = [
    "FAILURES",
    "INPUTS",
    "SECONDS_WORTH_A_RATE",
    "BegunRun",
    "Counting",
    "RunFolder",
    "ShardWriter",
    "in_image_order",
]

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


INPUTS = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file", pa.large_string()),
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("counts", pa.bool_()),
    ]
)
"""One row an image that the run was ever given; counts: it is given now. height and width are as annotated, or null."""


_SCHEMAS = {"detections": DETECTIONS, "images": IMAGES}


_IMAGES_PER_SHARD = 256


_SECONDS = b"seconds_by_stage"


_WORK = b"seconds_of_work"


SECONDS_WORTH_A_RATE = 2.0
"""Work that took less says nothing of the speed."""


_BEGUN_WITH = ("config.yaml", "inputs.parquet", "annotations.parquet")
"""Files of a run that has not done anything yet."""


_ERROR = "error.txt"


_VERSIONED = ("torch", "torchvision", "ray", "numpy", "pyarrow", "onnxruntime", "pycocotools")


class Counting(NamedTuple):
    """The records of one policy that count.

    Attributes:
        ids: [N] int64, the images, in order.
        shards: [N] int64, each one's place among the policy's shards.
        files: N files, as the run was last given them; None for a run of an older version.
    """

    ids: np.ndarray
    shards: np.ndarray
    files: pa.Array | None

    def rows(self, table: pa.Table, shard: int) -> pa.Table:
        """Those rows of the shard at a place, of images or of detections, whose record counts."""
        if not len(self.ids):
            return table.slice(0, 0)
        ids = table.column("image_id").to_numpy()
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        counts = (self.ids[at] == ids) & (self.shards[at] == shard)
        rows = table.filter(pa.array(counts))
        if self.files is None or "file" not in table.column_names:
            return rows
        files = self.files.take(pa.array(at[counts])).cast(pa.string())
        return rows.set_column(rows.column_names.index("file"), "file", files)


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
        self._missing: list[str] = []

    @classmethod
    def of_job(cls, output: str | None, job: str, *, resume: bool = False) -> RunFolder:
        """The folder that --output names; without it a new one, runs/JOB/DATE-TIME, that no other job has.

        Args:
            output: what --output says.
            job: the job's name.
            resume: whether --resume was given.

        Raises:
            UserError: if a run is to be resumed and no folder is named.
        """
        if output is not None:
            return cls(output)
        if resume:
            msg = "--resume goes on with the run in --output, got no --output: name the run's folder"
            raise UserError(msg)
        moment = time.strftime("%Y%m%d-%H%M%S")
        for count in itertools.count(1):
            run = cls(f"runs/{job}/{moment}" + (f"-{count}" if count > 1 else ""))
            missing = _missing_folders(os.path.abspath(run.uri))
            try:
                os.makedirs(os.path.dirname(run.uri), exist_ok=True)
                os.mkdir(run.uri)
            except (FileExistsError, FileNotFoundError):
                # Another job's; or a job that was refused has just removed the folder above.
                continue
            run._missing = missing
            return run
        raise AssertionError

    def begin(self, settings: Mapping[str, Any], *, resume: bool, workers: Mapping[str, Any] | None = None) -> BegunRun:
        """Lock the folder for this driver and write config.yaml, or take up the run that is there.

        Args:
            settings: what the results depend on, plain values.
            workers: what they do not depend on: engine, device, pools, batches; noted, and free to differ on resuming.
            resume: go on with a run that is there; else one that is there is refused.

        Returns:
            The lock: `with run.begin(...):` lets go at the end, also when the block raises. What it raises is told
            where the run stands (a `KeyboardInterrupt`) or where its trace is (a bug), as notes. If a new run is
            refused before it has done anything (`UserError`, `OSError`), what was written of it is removed.

        Raises:
            FileExistsError: if there is a run and `resume` is not asked for, or another driver is at work on it.
            UserError: if the run to resume was begun with other settings, one is named; or its config.yaml is damaged.
        """
        path = storage.local_path(self.uri)
        self._missing = self._missing or ([] if path is None else _missing_folders(path))
        try:
            lock = lock_run(self.uri, take_over=resume)
            try:
                is_new = self._take_up(settings, workers or {}, resume=resume)
            except BaseException:
                lock.release()
                raise
        except BaseException:
            self._remove_folders()
            raise
        self._lock = lock
        return BegunRun(self, lock, is_new=is_new)

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

    def discard(self, lock: RunLock) -> None:
        """Let go of a run that is refused, and remove what beginning it wrote if nothing else is there."""
        try:
            names = {uri: uri.rsplit("/", 1)[-1] for uri in storage.list_files(self.uri)}
            if set(names.values()) <= {*_BEGUN_WITH, "driver.lock"}:
                for uri, name in names.items():
                    if name in _BEGUN_WITH:
                        storage.delete(uri)
        finally:
            lock.release()
        self._remove_folders()

    def _remove_folders(self) -> None:
        for folder in self._missing:
            try:
                os.rmdir(folder)
            except OSError:
                return

    def _take_up(self, settings: Mapping[str, Any], workers: Mapping[str, Any], *, resume: bool) -> bool:
        config = storage.join(self.uri, "config.yaml")
        if storage.exists(config):
            if not resume:
                msg = f"{self.uri} holds a run already: add --resume to go on with it, or give another --output"
                raise FileExistsError(msg)
            self._check_settings(settings, workers)
            self.resumed = True
            if storage.exists(storage.join(self.uri, _ERROR)):
                storage.delete(storage.join(self.uri, _ERROR))
            return False
        shards = storage.join(self.uri, "images")
        if storage.exists(shards) and storage.list_files(shards, (".parquet",)):
            msg = f"{self.uri} holds results of a run whose config.yaml is lost: give another --output, or remove them"
            raise UserError(msg)
        versions = {name: version(name) for name in _VERSIONED}
        versions |= {"python": platform.python_version(), "scalenet-ray": __version__}
        content = {
            "command": " ".join(sys.argv),
            "begun": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "directory": working_directory(),
            "settings": dict(settings),
            "workers": dict(workers),
            "versions": versions,
        }
        storage.write_bytes_atomic(config, yaml.safe_dump(content, sort_keys=False).encode())
        return True

    def config(self) -> dict[str, Any]:
        """What config.yaml holds: "settings", "workers", "command", "versions".

        Raises:
            FileNotFoundError: if it is not there.
            UserError: if it is damaged, or not a run's.
        """
        uri = storage.join(self.uri, "config.yaml")
        try:
            content = yaml.safe_load(storage.read_bytes(uri))
        except (yaml.YAMLError, UnicodeDecodeError):
            content = None
        if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
            msg = f"{uri} must hold the settings of a run, got a damaged file or another tool's: give another --output"
            raise UserError(msg)
        return content

    def _check_settings(self, settings: Mapping[str, Any], workers: Mapping[str, Any]) -> None:
        config = self.config()
        differ = settings_that_differ(config["settings"], settings, workers, config.get("directory"))
        if differ:
            msg = f"{self.uri} was begun with other settings ({differ}): use the same, or another --output"
            raise UserError(msg)

    # --- inputs -----------------------------------------------------------------------------------------

    def inputs(self) -> pa.Table | None:
        """The images that the run was ever given (schema INPUTS); None for a run of an older version.

        Raises:
            UserError: if it is damaged, or another table.
        """
        table = self.read_table("inputs.parquet")
        if table is not None and (missing := [name for name in INPUTS.names if name not in table.column_names]):
            msg = f"{self.uri}/inputs.parquet must list a run's images, got no {missing[0]}: give another --output"
            raise UserError(msg)
        return table

    def read_table(self, name: str) -> pa.Table | None:
        """A Parquet file of the folder; None if it is not there."""
        uri = storage.join(self.uri, name)
        return _read_parquet(uri, "give another --output") if storage.exists(uri) else None

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a table under `name`, as Parquet."""
        self.check_lock()
        storage.write_bytes_atomic(storage.join(self.uri, name), _parquet(table))

    # --- shards -----------------------------------------------------------------------------------------

    def shards(self, kind: str, policy: str) -> list[str]:
        """Addresses of the finished shards of `detections` or `images` of one policy, in order of their numbers."""
        return [storage.join(self.uri, kind, name) for name in self._shard_names("images", policy)]

    def _shard_names(self, kind: str, policy: str) -> list[str]:
        folder = storage.join(self.uri, kind)
        if not storage.exists(folder):
            return []
        pattern = re.compile(re.escape(policy) + r"-(\d+)\.parquet")
        names = [uri.rsplit("/", 1)[-1] for uri in storage.list_files(folder, (".parquet",))]
        numbers = {name: int(found[1]) for name in names if (found := pattern.fullmatch(name))}
        return sorted(numbers, key=lambda name: (numbers[name], name))

    def check_shards(self, policy: str) -> None:
        """Refuse finished shards whose detections are missing or damaged, before anything is built on them.

        Raises:
            UserError: it names the file.
        """
        there = set(self._shard_names("detections", policy))
        for uri in self.shards("detections", policy):
            if uri.rsplit("/", 1)[-1] not in there:
                raise UserError(_missing_half(uri))
            # An object of S3 is whole or not there: its end need not be read for that.
            if (path := storage.local_path(uri)) is not None:
                _explain_damage(uri, _remedy(uri), lambda path=path: pq.read_metadata(path))

    def counting(self, policy: str) -> Counting:
        """Which records of one policy count: the last of each image, of the images that the run is given.

        Raises:
            FileNotFoundError: if there is no such run folder.
        """
        self._require_folder()
        return self._counting([self._read("images", uri, ["image_id"]) for uri in self.shards("images", policy)])

    def _counting(self, shards: Sequence[pa.Table]) -> Counting:
        places = np.repeat(np.arange(len(shards)), [table.num_rows for table in shards])
        ids = np.concatenate([np.zeros(0, np.int64), *(table.column("image_id").to_numpy() for table in shards)])
        # The last of each: the first of them from behind.
        unique, first = np.unique(ids[::-1], return_index=True)
        places = places[::-1][first]
        inputs = self.inputs()
        if inputs is None:
            return Counting(unique, places, None)
        given = inputs.filter(pc.field("counts")).sort_by("image_id").combine_chunks()
        ids = given.column("image_id").to_numpy()
        kept = np.isin(unique, ids)
        files = given.column("file").combine_chunks().take(pa.array(np.searchsorted(ids, unique[kept])))
        return Counting(unique[kept], places[kept], files)

    def parts(
        self, kind: str, policy: str, columns: Sequence[str] | None = None, counting: Counting | None = None
    ) -> Iterator[pa.Table]:
        """The rows of `detections` or `images` of one policy that count, shard after shard.

        Args:
            kind: detections or images.
            policy: the policy's name.
            columns: "image_id" and others; None for all.
            counting: which records count; found out if it is not given.

        Raises:
            FileNotFoundError: if there is no such run folder.
            UserError: if a shard is damaged, or lacks its other half; it is named.
        """
        counting = counting or self.counting(policy)
        for i, uri in enumerate(self.shards(kind, policy)):
            yield counting.rows(self._read(kind, uri, columns), i)

    def table(self, kind: str, policy: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of one policy that count, in order of image id, the best detection first.

        Args:
            kind: detections or images.
            policy: the policy's name.
            columns: "image_id" and others; None for all.

        Raises:
            FileNotFoundError: if there is no such run folder.
            UserError: if a shard is damaged, or lacks its other half; it is named.
        """
        if kind == "images":
            self._require_folder()
            shards = [self._read(kind, uri, columns) for uri in self.shards(kind, policy)]
            counting = self._counting(shards)
            parts = [counting.rows(table, i) for i, table in enumerate(shards)]
        else:
            parts = list(self.parts(kind, policy, columns))
        return in_image_order(pa.concat_tables([_columns_of(kind, columns).empty_table(), *parts]))

    def _require_folder(self) -> None:
        if not storage.exists(self.uri):
            msg = f"{self.uri} must be a run folder, got no such folder: check the path, and that this machine sees it"
            raise FileNotFoundError(msg)

    def _read(self, kind: str, uri: str, columns: Sequence[str] | None) -> pa.Table:
        schema = _columns_of(kind, columns)
        try:
            table = _read_parquet(uri, _remedy(uri), schema.names)
        except FileNotFoundError:
            if kind == "images":
                raise
            raise UserError(_missing_half(uri)) from None
        if "image_id" in schema.names and "image_id" not in table.column_names:
            msg = f"{uri} must be a shard of a run, got a table without image_id: {_remedy(uri)}"
            raise UserError(msg)
        # A shard of an older version lacks the columns that came after it: they are null.
        values = [
            table.column(field.name).cast(field.type)
            if field.name in table.column_names
            else pa.nulls(table.num_rows, field.type)
            for field in schema
        ]
        return pa.table(values, schema=schema)

    def seconds_by_stage(self, policy: str) -> dict[str, float]:
        """Busy seconds of each stage, summed over all processes, up to the last finished shard."""
        total = dict.fromkeys(STAGES, 0.0)
        for _, metadata in self._manifest(policy):
            for stage, seconds in json.loads(metadata.get(_SECONDS, b"{}")).items():
                total[stage] += seconds
        return total

    def speed(self, policy: str) -> dict[str, float | None]:
        """How fast one policy was worked through, over all drivers that worked on it.

        Returns:
            "images_per_second": written images over the time from the first that was begun to the last that was
            finished, pauses and start-up left out; None if that is under two seconds or not known. "seconds": the time
            to the last finished image, start-up included.
        """
        images, seconds = 0, 0.0
        for count, metadata in self._manifest(policy):
            if _WORK in metadata:
                images, seconds = images + count, seconds + float(metadata[_WORK])
        rate = images / seconds if seconds >= SECONDS_WORTH_A_RATE else None
        return {"images_per_second": rate, "seconds": self.seconds_at_work(policy)}

    def _manifest(self, policy: str) -> Iterator[tuple[int, Mapping[bytes, bytes]]]:
        """How many images each shard records, and its schema's metadata."""
        for uri in self.shards("images", policy):
            data = pa.BufferReader(storage.read_bytes(uri))
            file = _explain_damage(uri, _remedy(uri), lambda data=data: pq.ParquetFile(data))
            yield file.metadata.num_rows, file.schema_arrow.metadata or {}

    def seconds_at_work(self, policy: str) -> float:
        """When the last image that is written was finished, in seconds since the run began."""
        tables = (self._read("images", uri, ["finished_at"]) for uri in self.shards("images", policy))
        return max((at for table in tables for at in table.column("finished_at").drop_null().to_pylist()), default=0.0)

    def finished(self, policy: str) -> dict[int, str]:
        """The images that are written: id -> file; those that failed among them."""
        table = self.table("images", policy, ["image_id", "file"])
        return dict(zip(table.column("image_id").to_pylist(), table.column("file").to_pylist(), strict=True))

    def find_failures(self, policies: Sequence[str]) -> pa.Table:
        """The images that were given up, policy after policy, in order of their ids (schema FAILURES)."""
        columns = ["policy", "image_id", "file", "failure_stage", "failure_reason"]
        found = [FAILURES.empty_table()]
        for policy in policies:
            parts = [_columns_of("images", columns).empty_table()]
            for part in self.parts("images", policy, columns):
                parts.append(part.filter(pc.field("failure_stage").is_valid()))
            found.append(in_image_order(pa.concat_tables(parts)).rename_columns(FAILURES.names))
        return pa.concat_tables(found)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as JSON under `name`; NaN, which JSON does not have, becomes null."""
        text = json.dumps(_without_nan(value), indent=1, allow_nan=False)
        # Half a character: what a terminal of ASCII alone makes of a path.
        storage.write_bytes_atomic(storage.join(self.uri, name), text.encode("utf-8", "backslashreplace"))

    def write_text(self, name: str, text: str) -> None:
        """Write text under `name`."""
        storage.write_bytes_atomic(storage.join(self.uri, name), text.encode())

    def write_failures(self, policies: Sequence[str]) -> pa.Table:
        """Gather the failures of all policies into failures.parquet.

        Returns:
            The table (schema `FAILURES`).
        """
        table = self.find_failures(policies)
        self.write_table("failures.parquet", table)
        return table

    def failures(self) -> pa.Table:
        """The table of failures.parquet (schema `FAILURES`), as `write_failures` left it."""
        return _read_parquet(storage.join(self.uri, "failures.parquet"), "--resume writes it again")


class BegunRun:
    """A run that this driver has begun or taken up: its lock, as a context manager; what its block raises is noted.

    Args:
        run: the run folder.
        lock: its lock.
        is_new: whether the run began now.
    """

    def __init__(self, run: RunFolder, lock: RunLock, *, is_new: bool) -> None:
        self._run = run
        self._lock = lock
        self._is_new = is_new

    def check(self) -> None:
        """Raise `RuntimeError` if another driver has taken over."""
        self._lock.check()

    def release(self) -> None:
        """Let go."""
        self._lock.release()

    def __enter__(self) -> BegunRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, traceback
        if self._is_new and isinstance(error, UserError | OSError):
            self._run.discard(self._lock)
            return
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
        self._worked_until: float | None = None
        # One past the last number, not how many there are: a shard may have been deleted so that it is made again.
        shards = run.shards("images", policy)
        self._next = int(re.findall(r"\d+", shards[-1])[-1]) + 1 if shards else 0

    def work_began(self, at: float) -> None:
        """The first image was begun so many seconds after the run began: from then on the time of work counts."""
        self._worked_until = at

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
        metadata = {_SECONDS: json.dumps(tally.take() if tally else {}).encode()}
        if self._worked_until is not None:
            metadata[_WORK] = repr(finished_at[-1] - self._worked_until).encode()
            self._worked_until = finished_at[-1]
        with timed("write"):
            files = [self._records[result.image_id].file_name for result in results]
            images = images_table(results, self._policy, files, finished_at)
            images = images.replace_schema_metadata(metadata)
            storage.write_bytes_atomic(storage.join(self._run.uri, "images", name), _parquet(images))
        self._pending, self._written, self._next = [], self._written + len(results), self._next + 1
        self._committed([result.image_id for result in results])


def in_image_order(table: pa.Table) -> pa.Table:
    """Rows in order of image id; those of one image stay in the order in which they are."""
    # Arrow's sort is not stable: a row's own position breaks ties and keeps the best first.
    numbered = table.append_column("at", pa.array(np.arange(table.num_rows), pa.int64()))
    return numbered.sort_by([("image_id", "ascending"), ("at", "ascending")]).drop_columns(["at"])


def _columns_of(kind: str, columns: Sequence[str] | None) -> pa.Schema:
    schema = _SCHEMAS[kind]
    return schema if columns is None else pa.schema([schema.field(name) for name in columns])


# --- files and folders ------------------------------------------------------------------------------


def _missing_folders(path: str) -> list[str]:
    """Those of an absolute local path and the folders above it that are not there, the innermost first."""
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


def _halves(uri: str) -> tuple[str, str]:
    """A shard's address in its run folder, and that of its other half: images and detections."""
    base, kind, name = uri.rsplit("/", 2)
    return f"{kind}/{name}", storage.join(base, "images" if kind == "detections" else "detections", name)


def _remedy(uri: str) -> str:
    return f"delete it and its other half, {_halves(uri)[1]}, and --resume works on their images again"


def _missing_half(uri: str) -> str:
    name, images = _halves(uri)
    remedy = f"delete {images}, and --resume works on them again"
    return f"{images} says that its images are finished, but {name} is missing: {remedy}"


def _explain_damage(uri: str, remedy: str, read: Callable[[], Any]) -> Any:
    """What `read` gives; whatever Arrow says of a damaged file names the file and what to do."""
    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        msg = f"{uri} must be a Parquet file of a run, got a damaged one ({str(error).splitlines()[0]}): {remedy}"
        raise UserError(msg) from error


def _read_parquet(uri: str, remedy: str, columns: Sequence[str] | None = None) -> pa.Table:
    # By the main thread alone, without reading ahead: a thread of Arrow's that lets go of a Python object while the
    # interpreter ends aborts the process ("terminate called without an active exception").
    data = pa.BufferReader(storage.read_bytes(uri))
    # Not `read_table`: that one raises for a column which an older shard lacks.
    return _explain_damage(
        uri, remedy, lambda: pq.ParquetFile(data, pre_buffer=False).read(columns=columns, use_threads=False)
    )


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
