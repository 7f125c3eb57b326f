"""What a run folder holds, image by image: for what evaluates it, exports it or shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from scalenet_ray.core.detections import Detections
from scalenet_ray.data.schemas import DETECTIONS, IMAGES, detections_from_rows
from scalenet_ray.runs.folder import Counting, RunFolder, in_image_order

__all__ = [
    "StoredImage",
    "detections_by_image",
    "image_results",
    "tables_in_order",
]

_MOST_IN_MEMORY = 50_000
"""Images of a policy up to which all that it found is sorted in memory."""


_IMAGES_PER_BUCKET = 10_000


_MOST_BUCKETS = 256
"""As many files are open at once."""


class StoredImage(NamedTuple):
    """One image that a policy has finished.

    Attributes:
        image_id: its id.
        file: as the annotations name it, or its whole address where images were listed.
        hw: (height, width) in image pixels.
        detections: merged, in image pixels, the best first; labels are category ids.
    """

    image_id: int
    file: str
    hw: tuple[int, int]
    detections: Detections


def image_results(run: RunFolder, policy: str) -> Iterator[StoredImage]:
    """The images that one policy has finished, in order of their ids; those that failed are left out.

    Args:
        run: the run folder.
        policy: the policy's name.
    """
    for images, detections in tables_in_order(run, policy):
        table = detections.combine_chunks()
        ids = table.column("image_id").to_numpy()
        for row in images.select(["image_id", "file", "height", "width", "failure_stage"]).to_pylist():
            if row["failure_stage"] is None:
                start, end = np.searchsorted(ids, [row["image_id"], row["image_id"] + 1]).tolist()
                found = detections_from_rows(table.slice(start, end - start))
                yield StoredImage(row["image_id"], row["file"], (row["height"], row["width"]), found)


def detections_by_image(run: RunFolder, policy: str) -> Iterator[tuple[int, Detections]]:
    """The detections of one policy, image after image in order of their ids; images without any are left out."""
    for _, detections in tables_in_order(run, policy):
        table = detections.combine_chunks()
        ids = table.column("image_id").to_numpy()
        _, starts = np.unique(ids, return_index=True)
        for start, end in pairwise([*starts.tolist(), len(ids)]):
            yield int(ids[start]), detections_from_rows(table.slice(start, end - start))


def tables_in_order(run: RunFolder, policy: str) -> Iterator[tuple[pa.Table, pa.Table]]:
    """What one policy has written, some images at a time: their records and their detections, in order of image id.

    Beyond 50,000 images the shards are dealt out to files by ranges of image ids, on the local disk (`TMPDIR`), and
    each file is sorted by itself: memory does not grow with the run.

    Args:
        run: the run folder.
        policy: the policy's name.

    Yields:
        Tables of schema `IMAGES` and `DETECTIONS`.
    """
    counting = run.counting(policy)
    count = len(counting.ids)
    if count <= _MOST_IN_MEMORY:
        yield run.table("images", policy), run.table("detections", policy)
        return
    buckets = min(_MOST_BUCKETS, -(-count // _IMAGES_PER_BUCKET))
    # The first id of each bucket but the first.
    bounds = counting.ids[np.arange(1, buckets) * count // buckets]
    with TemporaryDirectory(prefix="scalenet_ray-") as folder:
        images, detections = (
            _deal_out(run, kind, policy, counting, bounds, Path(folder)) for kind in ("images", "detections")
        )
        for pair in zip(images, detections, strict=True):
            one, other = (in_image_order(pa.ipc.open_stream(path.read_bytes()).read_all()) for path in pair)
            yield one, other


def _deal_out(
    run: RunFolder, kind: str, policy: str, counting: Counting, bounds: np.ndarray, folder: Path
) -> list[Path]:
    """Write the rows of all shards to a file for each range of image ids, which `bounds` part."""
    paths = [folder / f"{kind}-{i}.arrow" for i in range(len(bounds) + 1)]
    schema = {"images": IMAGES, "detections": DETECTIONS}[kind]
    with ExitStack() as opened:
        writers = [opened.enter_context(pa.ipc.new_stream(str(path), schema)) for path in paths]
        for part in run.parts(kind, policy, None, counting):
            bucket = np.searchsorted(bounds, part.column("image_id").to_numpy(), side="right")
            for i in np.unique(bucket).tolist():
                writers[i].write_table(part.filter(pa.array(bucket == i)))
    return paths
