"""How well a frozen detector finds each object at each zoom, measured over a data set by Ray Data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.merge import Merging
from scalenet_ray.data import storage
from scalenet_ray.data.coco import annotations_uri, read_annotations
from scalenet_ray.engine.placement import cpu_share, gpu_share
from scalenet_ray.engine.session import join_ray
from scalenet_ray.engine.worker_errors import workers_errors
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.training.examples import TrainingImages, read_pixels
from scalenet_ray.training.gain import measure_scores

__all__ = ["measure_dataset"]

_IMAGES_PER_FILE = 512
_BATCH = 8
_SCHEMA = pa.schema([("image_id", pa.int64()), ("scores", pa.list_(pa.list_(pa.float32())))])
_MEASURED = pa.schema([("file", pa.string()), ("place", pa.int64()), *_SCHEMA])
"""What an actor answers: a file's columns, null of an image that can't be measured, and the file and place it is of."""


class _Measure:
    """An actor that measures images, named by their place in `TrainingImages.examples`."""

    def __init__(self, images: TrainingImages, networks: NetworkSpec) -> None:
        self._examples = [example for part in images.examples() for example in part]
        dataset = read_annotations(annotations_uri(images.data, images.split))
        self._detect = networks.load_detector(dataset.categories, dataset.unused_categories)
        self._merging = Merging(score_threshold=networks.score_threshold)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One row a row: its file, and of an image that can't be measured, no scores."""
        rows: list[dict[str, Any]] = batch.to_pylist()
        for row in rows:
            example = self._examples[row["place"]]
            try:
                scores = measure_scores(read_pixels(example), example.objects, self._detect, self._merging)
            except TileError:
                # Training meets the same image, leaves it out and says why.
                continue
            row |= {"image_id": example.image_id, "scores": scores.tolist()}
        return pa.Table.from_pylist(rows, _MEASURED)


def measure_dataset(
    images: TrainingImages, networks: NetworkSpec, folder: str, *, actors: int, say: Callable[[str], None]
) -> None:
    """Measure the scores of all objects of a data set into `folder`; files that are there are not made again.

    Args:
        images: the data set, what is held out included.
        networks: names the frozen detector.
        folder: local or s3://; `models.head_recipe.read_scores` reads it.
        actors: how many processes measure; one pool of them for the whole data set, with `networks.device` each.
        say: takes a line for the person who waits.
    """
    count = sum(map(len, images.examples()))
    ranges = list(_ranges(count))
    missing = [(name, places) for name, places in ranges if not storage.exists(storage.join(folder, name))]
    if not missing:
        return
    join_ray()
    cpus = cpu_share(2 * actors)
    left = {name: len(places) for name, places in missing}
    items = [{"file": name, "place": place} for name, places in missing for place in places]
    measured = ray.data.from_items(items, override_num_blocks=max(1, len(items) // _BATCH)).map_batches(
        _Measure,
        fn_constructor_args=(images, networks),
        batch_size=_BATCH,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=actors),
        num_cpus=cpus,
        num_gpus=gpu_share(networks.device, actors),
    )
    # Answers come in any order; a file is written when the last of its images is in.
    rows: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    done = count - len(items)
    tables: Iterable[Any] = measured.iter_batches(batch_size=None, batch_format="pyarrow")
    with workers_errors():
        for table in tables:
            for row in table.to_pylist():
                name = row["file"]
                rows[name].append(row)
                if len(rows[name]) == left[name]:
                    done += left[name]
                    _write(storage.join(folder, name), rows.pop(name))
                    say(f"scores of objects measured: {done} of {count} images")


def _write(uri: str, rows: list[dict[str, Any]]) -> None:
    scored = sorted((row for row in rows if row["image_id"] is not None), key=lambda row: row["place"])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{name: row[name] for name in _SCHEMA.names} for row in scored], _SCHEMA), sink)
    storage.write_bytes_atomic(uri, sink.getvalue().to_pybytes())


def _ranges(count: int) -> Iterator[tuple[str, range]]:
    for start in range(0, count, _IMAGES_PER_FILE):
        yield f"{start:07d}.parquet", range(start, min(start + _IMAGES_PER_FILE, count))
