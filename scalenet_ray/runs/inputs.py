"""Inputs of a run: image ids stay the same when it is resumed, and changed annotations are refused.

    inputs.parquet        all images that were ever an input of the run (schema INPUTS), and which of them are now
    annotations.parquet   for a data set with ground truth: its categories, and a digest of each annotation

Images listed from a folder have no ids of their own and are identified by their files. When a run is resumed, a known
file keeps its id, whatever files were added or removed meanwhile; a new file gets an id above all used ones.
"""

from __future__ import annotations

import json
import posixpath
import zlib
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalenet_ray.core.errors import UserError
from scalenet_ray.data import storage
from scalenet_ray.data.coco import CocoDataset
from scalenet_ray.data.image_records import ImageRecords
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.tables import INPUTS

_FOLDER = b"folder"
_CATEGORIES = b"categories"


# --- images that are listed -------------------------------------------------------------------------


def keep_image_ids(run: RunFolder, listed: ImageRecords, images: str) -> ImageRecords:
    """Assign ids to listed images, the same as before in a resumed run, and write them to inputs.parquet.

    Args:
        run: the run folder, begun.
        listed: the images as they are listed now, in order of their addresses, with ascending numbers.
        images: the folder, glob or file that they are listed from. If it was moved, files are identified by their
            paths below it.

    Returns:
        The images with their ids, in order of id; in a new run these are the numbers.

    Raises:
        UserError: if the run has results but no inputs.parquet, so that the ids of its images are not known.
    """
    folder, table = _folder_of(images), run.inputs()
    if table is None:
        if storage.exists(storage.join(run.uri, "images")):
            msg = (
                f"{run.uri} must have inputs.parquet, which holds the ids of its images, got none: it was deleted, or "
                "an older version began the run; give another --output"
            )
            raise UserError(msg)
        _write_inputs(run, listed, listed[:0], {_FOLDER: folder.encode()})
        return listed
    known = ImageRecords(table)
    begun_in = _metadata_value(table, _FOLDER, f"{run.uri}/inputs.parquet")
    if begun_in != folder and not storage.exists(begun_in):
        known = known.with_names([_moved(record.file_name, begun_in, folder) for record in known])
    rows = pc.call_function("index_in", [listed.files], pc.SetLookupOptions(known.files)).to_numpy()
    is_known = ~np.isnan(rows)
    rows = rows[is_known].astype(np.int64)
    ids = listed.ids.copy()
    unused = int(known.ids.max(initial=0)) + 1
    ids[is_known] = known.ids[rows]
    ids[~is_known] = np.arange(unused, unused + np.count_nonzero(~is_known))
    listed = listed.with_ids(ids)
    gone = known.take(np.isin(np.arange(len(known)), rows, invert=True))
    _write_inputs(run, listed, gone, {_FOLDER: folder.encode()})
    return listed.take(np.argsort(listed.ids, kind="stable"))


def _folder_of(images: str) -> str:
    """The absolute address of the folder that images are listed from."""
    path = storage.local_path(images)
    address = (images if path is None else path).rstrip("/")
    marks = [at for mark in "*?[" if (at := address.find(mark)) >= 0]
    if marks and not storage.exists(images):
        return posixpath.dirname(address[: min(marks)])
    return posixpath.dirname(address) if address.lower().endswith(".parquet") else address


def _moved(file: str, before: str, after: str) -> str:
    return f"{after}/{file.removeprefix(f'{before}/')}" if file.startswith(f"{before}/") else file


def _write_inputs(run: RunFolder, given: ImageRecords, gone: ImageRecords, metadata: Mapping[bytes, bytes]) -> None:
    parts = [
        records.table.append_column("counts", pa.array(np.full(len(records), is_input)))
        for records, is_input in ((given, True), (gone, False))
    ]
    table = pa.concat_tables(parts).cast(INPUTS)
    if np.any(np.diff(table.column("image_id").to_numpy()) < 0):
        table = table.sort_by("image_id")
    run.write_table("inputs.parquet", table.replace_schema_metadata(dict(metadata)))


# --- data sets with ground truth --------------------------------------------------------------------


def annotation_digests(dataset: CocoDataset, image_ids: np.ndarray) -> pa.Table:
    """Digests of the annotations of some images, 12 bytes per object.

    Returns:
        "annotation_id" and "digest", in the file's order.
    """
    rows = np.flatnonzero(np.isin(dataset.image_ids, image_ids))
    whole = np.stack([dataset.image_ids[rows], dataset.labels[rows], dataset.crowd[rows]], axis=1)
    sizes = np.concatenate([dataset.boxes_xywh[rows], dataset.areas[rows, None]], axis=1)
    digests = [
        zlib.crc32(repr(dataset.segmentations[row]).encode(), zlib.crc32(numbers, zlib.crc32(size)))
        for row, numbers, size in zip(rows.tolist(), whole, sizes, strict=True)
    ]
    return pa.table({"annotation_id": dataset.annotation_ids[rows], "digest": pa.array(digests, pa.uint32())})


def check_ground_truth(run: RunFolder, images: ImageRecords, categories: Mapping[int, str], digests: pa.Table) -> None:
    """Check that a resumed run has the images, categories and annotations that it was begun with.

    A new run, and one of an older version that did not store them, stores them now; `digests` are of the annotations.

    Raises:
        UserError: if they differ; it names one difference.
    """
    before, then = run.inputs(), run.read_table("annotations.parquet")
    if before is None or then is None:
        names = {_CATEGORIES: json.dumps(list(categories.items())).encode()}
        run.write_table("annotations.parquet", digests.replace_schema_metadata(names))
        _write_inputs(run, images, images[:0], {})
        return
    old_categories = dict(json.loads(_metadata_value(then, _CATEGORIES, f"{run.uri}/annotations.parquet")))
    difference = (
        _difference("category", old_categories, categories)
        or _difference("image", _described(ImageRecords(before)), _described(images))
        or _annotation_that_differs(then, digests)
    )
    if difference:
        msg = f"{run.uri} was begun with other annotations ({difference}): use the same, or another --output"
        raise UserError(msg)


def _metadata_value(table: pa.Table, name: bytes, uri: str) -> str:
    """A value in the schema metadata of a table of the run folder."""
    metadata = table.schema.metadata or {}
    if name not in metadata:
        msg = f"{uri} must be as a run wrote it, got one without {name.decode()}: give another --output"
        raise UserError(msg)
    return metadata[name].decode()


def _described(images: ImageRecords) -> dict[int, str]:
    """Image id -> file, and annotated height and width."""
    return {
        record.image_id: record.file_name + ("" if record.hw is None else f" of {record.height} x {record.width}")
        for record in images
    }


def _difference(what: str, then: Mapping[int, str], now: Mapping[int, str]) -> str:
    """The first item that differs, in words; "" if none does."""
    for key in sorted({*then, *now}):
        before, after = (items.get(key, "not there") for items in (then, now))
        if before != after:
            return f"{what} {key} was {before}, is {after}"
    return ""


def _annotation_that_differs(then: pa.Table, now: pa.Table) -> str:
    if then.num_rows != now.num_rows:
        return f"annotation counts: {then.num_rows} then, {now.num_rows} now"
    before, after = (dict(zip(*table.to_pydict().values(), strict=True)) for table in (then, now))
    for key, digest in after.items():
        if before.get(key) != digest:
            what = "is another one: its image, category, box, area, crowd or segmentation changed"
            return f"annotation {key} {what if key in before else 'is new'}"
    return ""
