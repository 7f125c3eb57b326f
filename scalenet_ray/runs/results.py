"""Read the results of a run image by image, in bounded memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalenet_ray.core.detections import Detections
from scalenet_ray.data.schemas import DETECTIONS, IMAGES, detections_from_rows, detections_from_structs
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.shards import CurrentRecords
from scalenet_ray.runs.tables import in_image_order

_MOST_IN_MEMORY = 10_000
"""Results of at most this many images are sorted in memory."""

_IMAGES_PER_BUCKET = 10_000
_ROWS_AT_ONCE = 256

_MOST_BUCKETS = 256
"""Bounds the number of open files."""


class StoredImage(NamedTuple):
    """Stored result of one policy on one image.

    `file` is its name in the annotations, or its full address for listed images; `detections` are merged, in image
    pixels, by descending score, with category ids as labels.
    """

    image_id: int
    file: str
    hw: tuple[int, int]
    detections: Detections


def image_results(run: RunFolder, policy: str) -> Iterator[StoredImage]:
    """Iterate over the finished images of one policy by id, failed ones excluded."""
    for row, detections in rows_in_order(run, policy, ["image_id", "file", "height", "width", "failure_stage"]):
        if row["failure_stage"] is None:
            yield StoredImage(row["image_id"], row["file"], (row["height"], row["width"]), detections)


def rows_in_order(run: RunFolder, policy: str, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], Detections]]:
    """Iterate over columns of a policy's image records by id, failed ones included, with the images' detections."""
    for images, detections in tables_in_order(run, policy):
        table = detections.combine_chunks()
        ids = table.column("image_id").to_numpy()
        for batch in images.select(columns).to_batches(max_chunksize=_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                start, end = np.searchsorted(ids, [row["image_id"], row["image_id"] + 1]).tolist()
                yield row, detections_from_rows(table.slice(start, end - start))


def detections_of(run: RunFolder, policy: str, image_ids: Collection[int]) -> dict[int, Detections]:
    """The detections of some images: id -> detections, for those that have any."""
    wanted = pc.field("image_id").isin(list(image_ids))
    found = {}
    for part in run.parts("detections", policy):
        rows = part.filter(wanted)
        for image_id in rows.column("image_id").unique().to_pylist():
            found[image_id] = detections_from_rows(rows.filter(pc.field("image_id") == image_id).combine_chunks())
    return found


def whole_passes_of(run: RunFolder, policy: str, image_ids: Collection[int]) -> dict[int, Detections]:
    """`ImageResult.whole_pass` of some images: id -> detections, for those that have one."""
    wanted = pc.field("image_id").isin(list(image_ids)) & pc.field("whole_pass").is_valid()
    rows = [
        row
        for part in run.parts("images", policy, ["image_id", "whole_pass"])
        for row in part.filter(wanted).to_pylist()
    ]
    return {row["image_id"]: detections_from_structs(row["whole_pass"]) for row in rows}


def tables_in_order(run: RunFolder, policy: str) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Iterate over a policy's `IMAGES` and `DETECTIONS` in order of image id, in groups of images.

    Beyond 10,000 images, rows are partitioned by ranges of image ids into files on the local disk (`TMPDIR`) and
    sorted file by file, so that memory does not grow with the run.
    """
    current = run.current_records(policy)
    count = len(current.ids)
    if count <= _MOST_IN_MEMORY:
        yield run.table("images", policy), run.table("detections", policy)
        return
    buckets = min(_MOST_BUCKETS, -(-count // _IMAGES_PER_BUCKET))
    # The first id of each bucket except the first one.
    bounds = current.ids[np.arange(1, buckets) * count // buckets]
    with TemporaryDirectory(prefix="scalenet_ray-") as folder:
        images, detections = (
            _partition(run, kind, policy, current, bounds, Path(folder)) for kind in ("images", "detections")
        )
        for pair in zip(images, detections, strict=True):
            records, found = (in_image_order(pa.ipc.open_stream(path.read_bytes()).read_all()) for path in pair)
            yield records, found


def _partition(
    run: RunFolder, kind: str, policy: str, current: CurrentRecords, bounds: np.ndarray, folder: Path
) -> list[Path]:
    """Write the rows of all shards to one file per range of image ids; `bounds` are the first ids of all but one."""
    paths = [folder / f"{kind}-{i}.arrow" for i in range(len(bounds) + 1)]
    schema = {"images": IMAGES, "detections": DETECTIONS}[kind]
    with ExitStack() as opened:
        writers = [opened.enter_context(pa.ipc.new_stream(str(path), schema)) for path in paths]
        for part in run.parts(kind, policy, None, current):
            bucket = np.searchsorted(bounds, part.column("image_id").to_numpy(), side="right")
            for i in np.unique(bucket).tolist():
                writers[i].write_table(part.filter(pa.array(bucket == i)))
    return paths
