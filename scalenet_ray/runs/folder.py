"""The run folder: settings, inputs, results and failures of a batch job.

    config.yaml            settings and versions, enough to run the job again
    inputs.parquet         the input images and their ids (schema INPUTS); see `runs.inputs`
    ground_truth.json      the annotations in COCO's form, where they were given in another or categories were chosen
    detections/*.parquet   detections, written in shards while the job runs (schema DETECTIONS)
    images/*.parquet       one per shard of detections: its finished images (schema IMAGES); `finished_at` is in
                           seconds since the run began, without the pauses before a resume
    failures.parquet       failed images: policy, image id, file, stage, reason
    error.txt              the traceback of the error that ended the run; deleted when the run is resumed
    metrics.json, results.json, report.html, policies.svg   written at the end
    driver.lock            present while a driver works on the run; a second driver is refused

metrics.json sums the busy seconds of each stage over all shards, as `seconds_by_stage` of each policy: decode, cut,
look, detect, merge, write. Local folders and those in a store are treated alike.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa

from scalenet_ray.core.errors import UserError, WorkerError
from scalenet_ray.data import storage
from scalenet_ray.runs.lock import LOCK, lock_run
from scalenet_ray.runs.settings import CONFIG, check_settings, read_config, write_config
from scalenet_ray.runs.shards import ShardReader
from scalenet_ray.runs.tables import parquet_bytes, read_parquet

GROUND_TRUTH = "ground_truth.json"
"""The ground truth that a run measures against, where the annotations are not COCO's or categories were chosen."""

_INITIAL_FILES = (CONFIG, GROUND_TRUTH, "inputs.parquet", "annotations.parquet")
"""Files that a run writes before its first result."""

_ERROR = "error.txt"

_NO_OUTPUT = "--resume goes on with the run in --output, got no --output: name the run's folder"


class RunFolder(ShardReader):
    """A run's folder.

    Args:
        uri: local path or a store's address.
        output: the job's run folder, if this folder is a part of it.
        is_kept: False for a folder that is deleted when the run ends, of which errors say nothing.

    Attributes:
        resumed: whether `begin` resumed an existing run.
        standing: the progress in words: "whole: 163 of 343 done".
    """

    def __init__(self, uri: str, output: str | None = None, *, is_kept: bool = True) -> None:
        super().__init__(uri)
        self.standing = "nothing done yet"
        self.resumed = False
        self._is_kept = is_kept
        self._output = output or uri
        self._check_lock: Callable[[], None] = lambda: None
        self._created_folders: list[str] = []

    # --- begin, resume, end -----------------------------------------------------------------------------

    @classmethod
    def of_job(cls, output: str | None, job: str, *, resume: bool = False) -> RunFolder:
        """The run folder for a job: `output`, or a new folder runs/JOB/DATE-TIME.

        Raises:
            UserError: if a run is to be resumed and no folder is named.
        """
        if output is not None:
            return cls(output)
        if resume:
            raise UserError(_NO_OUTPUT)
        moment = time.strftime("%Y%m%d-%H%M%S")
        for count in itertools.count(1):
            run = cls(f"runs/{job}/{moment}" + (f"-{count}" if count > 1 else ""))
            missing = _missing_folders(os.path.abspath(run.uri))
            try:
                os.makedirs(os.path.dirname(run.uri), exist_ok=True)
                os.mkdir(run.uri)
            except (FileExistsError, FileNotFoundError):
                # Taken by another job, or a job that was refused has just removed the parent folder.
                continue
            run._created_folders = missing
            return run
        raise AssertionError

    @classmethod
    def check_output(cls, output: str | None, *, resume: bool) -> None:
        """Refuse an --output that `begin` would refuse whatever the settings, before there is any work.

        Raises:
            FileExistsError: if the folder holds a run and `resume` is false.
            NotADirectoryError: if there is a file.
            PermissionError: if a local folder may not be written.
            UserError: if a run is to be resumed and no folder is named.
        """
        if output is None:
            if resume:
                raise UserError(_NO_OUTPUT)
            return
        path = storage.local_path(output)
        if path is not None:
            there = os.path.dirname(missing[-1]) if (missing := _missing_folders(path)) else path
            if not os.path.isdir(there):
                msg = f"the output must be a folder, got {output}, where {there} is a file: give another --output"
                raise NotADirectoryError(msg)
            if not os.access(there, os.W_OK | os.X_OK):
                msg = f"cannot write {output}: access is denied in {there}; check its owner and mode, and its disk"
                raise PermissionError(msg)
        _refuse_run(output, resume=resume)

    @contextmanager
    def begin(
        self, settings: Mapping[str, Any], *, resume: bool, workers: Mapping[str, Any] | None = None
    ) -> Iterator[None]:
        """Lock the folder while the block runs, and write config.yaml, or with `resume` check that of its run.

        An error that leaves the block gets a note: the progress for a `KeyboardInterrupt`, the file of the traceback
        for a bug. If a new run raises a `UserError` or `OSError` before it has written a result, its files are removed.

        Args:
            settings: plain values that the results depend on.
            workers: plain values that they do not depend on, which may differ when the run is resumed.
            resume: resume an existing run; without it an existing run is refused.

        Raises:
            FileExistsError: if the folder holds a run and `resume` is false, or another driver is at work on it.
            UserError: if the run to resume was begun with other settings, or its config.yaml is damaged.
        """
        path = storage.local_path(self.uri)
        self._created_folders = self._created_folders or ([] if path is None else _missing_folders(path))
        try:
            with lock_run(self.uri, take_over=resume) as self._check_lock:
                is_new = self._create_or_resume(settings, workers or {}, resume=resume)
                try:
                    yield
                except (UserError, OSError):
                    if is_new:
                        self._delete_initial_files()
                    raise
                except BaseException as error:
                    if self._is_kept:
                        self._add_notes(error)
                    raise
        except BaseException:
            self._remove_created_folders()
            raise

    def _create_or_resume(self, settings: Mapping[str, Any], workers: Mapping[str, Any], *, resume: bool) -> bool:
        """Write config.yaml, or check it against the settings; return whether the run is new."""
        if _refuse_run(self.uri, resume=resume):
            check_settings(self.uri, settings, workers)
            self.resumed = True
            if storage.exists(storage.join(self.uri, _ERROR)):
                storage.delete(storage.join(self.uri, _ERROR))
            return False
        shards = storage.join(self.uri, "images")
        if storage.exists(shards) and storage.list_files(shards, (".parquet",)):
            msg = f"{self.uri} holds results of a run whose config.yaml is lost: give another --output, or remove them"
            raise UserError(msg)
        write_config(self.uri, settings, workers)
        return True

    def check_lock(self) -> None:
        """Raise `RuntimeError` if this driver began the run and another one has taken over."""
        self._check_lock()

    def _add_notes(self, error: BaseException) -> None:
        """Add a note to an error that ends the run: how to resume it, or where its traceback was written."""
        if isinstance(error, KeyboardInterrupt):
            error.add_note(f"{self.standing}; go on with --resume --output {self._output}")
        elif isinstance(error, Exception):
            trace = error.trace if isinstance(error, WorkerError) else "".join(traceback.format_exception(error))
            with suppress(OSError):
                self.write_text(_ERROR, trace)
                error.add_note(f"its trace: {storage.join(self.uri, _ERROR)}")

    def _delete_initial_files(self) -> None:
        """Delete the files of a run that was refused, if the folder holds nothing else."""
        names = {uri: uri.rsplit("/", 1)[-1] for uri in storage.list_files(self.uri)}
        if set(names.values()) <= {*_INITIAL_FILES, LOCK}:
            for uri, name in names.items():
                if name in _INITIAL_FILES:
                    storage.delete(uri)

    def _remove_created_folders(self) -> None:
        for folder in self._created_folders:
            try:
                os.rmdir(folder)
            except OSError:
                return

    # --- files ------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The content of config.yaml, see `read_config`."""
        return read_config(self.uri)

    def read_json(self, name: str) -> Any:
        """The content of a JSON file; None if it does not exist."""
        uri = storage.join(self.uri, name)
        return json.loads(storage.read_bytes(uri)) if storage.exists(uri) else None

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as JSON under `name`; NaN, which JSON lacks, becomes null."""
        text = json.dumps(_without_nan(value), indent=1, allow_nan=False)
        # Paths may hold lone surrogates, e.g. under an ASCII locale.
        storage.write_bytes_atomic(storage.join(self.uri, name), text.encode("utf-8", "backslashreplace"))

    def write_text(self, name: str, text: str) -> None:
        """Write text under `name`."""
        storage.write_bytes_atomic(storage.join(self.uri, name), text.encode())

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a table as Parquet; raises `RuntimeError` if another driver has taken over the run."""
        self.check_lock()
        storage.write_bytes_atomic(storage.join(self.uri, name), parquet_bytes(table))

    def write_failures(self, policies: Sequence[str]) -> pa.Table:
        """Collect the failures of all policies into failures.parquet; returns the table (schema `FAILURES`)."""
        table = self.find_failures(policies)
        self.write_table("failures.parquet", table)
        return table

    def failures(self) -> pa.Table:
        """Read failures.parquet (schema `FAILURES`)."""
        return read_parquet(storage.join(self.uri, "failures.parquet"), "--resume writes it again")


def _refuse_run(uri: str, *, resume: bool) -> bool:
    """True if the folder holds a run that is to be resumed; raises `FileExistsError` if it is not to be."""
    if not storage.exists(storage.join(uri, CONFIG)):
        return False
    if not resume:
        msg = f"{uri} holds a run already: add --resume to go on with it, or give another --output"
        raise FileExistsError(msg)
    return True


def _missing_folders(path: str) -> list[str]:
    """An absolute local path and its parents, as far as they do not exist, innermost first."""
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
