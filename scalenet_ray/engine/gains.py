"""Measure the scores of a frozen detector for each object at each zoom, over a data set, with Ray Data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.merge import Merging
from scalenet_ray.data import storage
from scalenet_ray.engine.placement import cpu_share, gpu_share
from scalenet_ray.engine.session import join_ray
from scalenet_ray.engine.worker_errors import workers_errors
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.runs.tables import parquet_bytes
from scalenet_ray.training.examples import TrainingImages, read_pixels
from scalenet_ray.training.gain import measure_scores

_IMAGES_PER_FILE = 512
_BATCH = 8
_SCHEMA = pa.schema([("image_id", pa.int64()), ("scores", pa.list_(pa.list_(pa.float32())))])
_MEASURED = pa.schema([("file", pa.string()), ("place", pa.int64()), *_SCHEMA])
"""Output of an actor: the output file, the index of the example, and its columns; null for an unreadable image."""


class _Measure:
    """Actor that measures images, given by their index in `TrainingImages.examples`."""

    def __init__(self, images: TrainingImages, networks: NetworkSpec) -> None:
        self._examples = [example for part in images.examples() for example in part]
        dataset = images.dataset()
        self._detect = networks.load_detector(dataset.categories, dataset.unused_categories)
        self._merging = Merging(score_threshold=networks.score_threshold)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Add the scores to each row; an image that cannot be read has none."""
        rows: list[dict[str, Any]] = batch.to_pylist()
        for row in rows:
            example = self._examples[row["place"]]
            try:
                scores = measure_scores(read_pixels(example), example.objects, self._detect, self._merging)
            except TileError:
                # Training skips the same image and reports the reason.
                continue
            row |= {"image_id": example.image_id, "scores": scores.tolist()}
        return pa.Table.from_pylist(rows, _MEASURED)


def measure_dataset(
    images: TrainingImages, networks: NetworkSpec, folder: str, *, actors: int, say: Callable[[str], None]
) -> None:
    """Measure the scores of all objects of a data set and write them to `folder`; existing files are kept.

    Args:
        images: the data set, held-out images included.
        networks: specification of the frozen detector.
        folder: local or in a store; `training.head_recipe.read_scores` reads it.
        actors: number of actors, each on `networks.device`.
        say: called with a line of progress for each written file.
    """
    count = sum(map(len, images.examples()))
    ranges = [
        (f"{start:07d}.parquet", range(start, min(start + _IMAGES_PER_FILE, count)))
        for start in range(0, count, _IMAGES_PER_FILE)
    ]
    missing = [(name, places) for name, places in ranges if not storage.exists(storage.join(folder, name))]
    if not missing:
        return
    join_ray()
    cpus = cpu_share(2 * actors)
    sizes = {name: len(places) for name, places in missing}
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
    # Results arrive in any order; a file is written when all of its images are there.
    rows: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    done = count - len(items)
    tables: Iterable[Any] = measured.iter_batches(batch_size=None, batch_format="pyarrow")
    with workers_errors():
        for table in tables:
            for row in table.to_pylist():
                name = row["file"]
                rows[name].append(row)
                if len(rows[name]) == sizes[name]:
                    done += sizes[name]
                    _write(storage.join(folder, name), rows.pop(name))
                    say(f"scores of objects measured: {done} of {count} images")


def _write(uri: str, rows: list[dict[str, Any]]) -> None:
    scored = sorted((row for row in rows if row["image_id"] is not None), key=lambda row: row["place"])
    table = pa.Table.from_pylist([{name: row[name] for name in _SCHEMA.names} for row in scored], _SCHEMA)
    storage.write_bytes_atomic(uri, parquet_bytes(table))
