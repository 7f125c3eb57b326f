"""Listings of images without annotations: folders, globs, prefixes of stores, videos, Parquet files of addresses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from scalenet_ray.core.errors import UserError, abbreviated, repeated
from scalenet_ray.data.coco import MAX_BYTES
from scalenet_ray.data.image_records import ImageRecords
from scalenet_ray.data.images import IMAGE_SUFFIXES, OTHER_SUFFIXES
from scalenet_ray.data.storage import Address, join, linked_folders, list_files, local_path, read_bytes
from scalenet_ray.data.video import VIDEO_SUFFIXES, list_frames


class FoundImages(NamedTuple):
    """Images without annotations, numbered from 1 in the order of their addresses; remarks on skipped files."""

    records: ImageRecords
    remarks: tuple[str, ...]


def find_images(uri: Address) -> FoundImages:
    """List the images of a folder, a glob, an S3 prefix, a video, or a Parquet file with a column `uri` or `path`.

    Args:
        uri: folders are listed with their subfolders, except run folders; in a folder without images, Parquet files are
            read as one list of addresses, or videos as their frames. Relative paths in a Parquet file are relative to
            its folder.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        UserError: if it contains no image, a Parquet file has no such column, or a video is not one that is decoded.
    """
    files = list_files(uri)
    runs = _run_folders(files)
    # A run may lie in the folder of its images itself.
    whole = {local_path(uri), str(uri).rstrip("/")}
    parts = tuple(f"{run}/{part}" for run in runs for part in (("pictures/", "crops/") if run in whole else ("",)))
    files = [name for name in files if not name.startswith(parts)]
    names = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    others = (*OTHER_SUFFIXES, *VIDEO_SUFFIXES)
    skipped = Counter(name[name.rindex(".") :].lower() for name in files if name.lower().endswith(others))
    if not names:
        names = [name for part in files if part.lower().endswith(".parquet") for name in _addresses_in_parquet(part)]
        _refuse_repeated(names, str(uri))
    if not names and (videos := [name for name in files if name.lower().endswith(VIDEO_SUFFIXES)]):
        names = [frame for video in videos for frame in list_frames(video)]
        skipped = Counter({suffix: count for suffix, count in skipped.items() if suffix not in VIDEO_SUFFIXES})
    remarks = [
        f"{count} files skipped: {suffix} is not read{' beside images' if suffix in VIDEO_SUFFIXES else ''}"
        for suffix, count in sorted(skipped.items())
    ]
    if runs:
        remarks.append(f"pictures of {len(runs)} run folders are not listed: {abbreviated(runs)}")
    if links := linked_folders(uri):
        remarks.append(f"{len(links)} links to folders are not followed: {abbreviated(links)}")
    if not names:
        wanted, got = ", ".join(IMAGE_SUFFIXES), "; ".join(["got none", *remarks])
        remedy = "convert them" if skipped else "name that folder" if links else "check the path, or quote a glob"
        msg = f"{uri} must hold at least one image ({wanted}), {got}: {remedy}"
        raise UserError(msg)
    return FoundImages(ImageRecords.listed(sorted(names)), tuple(remarks))


def _run_folders(files: Sequence[str]) -> list[str]:
    """Folders of runs among the listed files, whose pictures and crops are no images of a run to come."""
    there = set(files)
    folders = (name.removesuffix("/inputs.parquet") for name in files if name.endswith("/inputs.parquet"))
    return [folder for folder in folders if f"{folder}/config.yaml" in there]


def _refuse_repeated(names: Sequence[str], where: str) -> None:
    if twice := repeated(names):
        msg = f"{where} must name each image once, got twice {abbreviated(twice)}: remove them"
        raise UserError(msg)


def _addresses_in_parquet(uri: str) -> list[str]:
    try:
        # Without Arrow's threads: at interpreter exit, a running one can abort the process.
        file = pq.ParquetFile(pa.BufferReader(read_bytes(uri, max_bytes=MAX_BYTES)), pre_buffer=False)
        column = next((name for name in ("uri", "path") if name in file.schema_arrow.names), None)
        if column is None:
            msg = f"{uri} must have a column uri or path, got {', '.join(file.schema_arrow.names)}: rename it"
            raise UserError(msg)
        names = file.read([column], use_threads=False).column(column).to_pylist()
    except pa.ArrowException as error:
        msg = f"{uri} must be a Parquet file, got something else ({error}): write it again"
        raise UserError(msg) from error
    wrong = [i for i, name in enumerate(names) if not isinstance(name, str) or not name.strip()]
    if wrong:
        got = abbreviated(wrong)
        msg = f"column {column} of {uri} must hold an address in each row, got none in rows {got}: fill it"
        raise UserError(msg)
    _refuse_repeated(names, f"column {column} of {uri}")
    folder = uri.rpartition("/")[0]
    return [name if name.startswith("/") or "://" in name else join(folder, name) for name in names]
