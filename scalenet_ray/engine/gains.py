"""How well a frozen detector finds each object at each zoom, measured over a data set by Ray Data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy

from scalenet_ray.core import storage
from scalenet_ray.core.coco import read_annotations
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.gain import measure_scores
from scalenet_ray.core.merge import Merging
from scalenet_ray.engine.session import join_ray
from scalenet_ray.engine.shares import cpu_share
from scalenet_ray.models.examples import TrainingImages, read_pixels
from scalenet_ray.models.networks import NetworkNames

__all__ = ["measure_dataset"]

_IMAGES_PER_FILE = 512
_SCHEMA = pa.schema([("image_id", pa.int64()), ("scores", pa.list_(pa.list_(pa.float32())))])


class _Measure:
    """An actor that measures images, named by their place in `TrainingImages.examples`."""

    def __init__(self, images: TrainingImages, networks: NetworkNames) -> None:
        self._examples = [example for part in images.examples() for example in part]
        annotations = storage.join(images.data, "annotations", f"instances_{images.split}.json")
        dataset = read_annotations(annotations)
        self._detect = networks.load_detector(dataset.categories, dataset.unused_categories)
        self._merging = Merging(score_threshold=networks.score_threshold)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        rows = []
        for place in batch["id"].tolist():
            example = self._examples[place]
            try:
                scores = measure_scores(read_pixels(example), example.objects, self._detect, self._merging)
            except TileError:
                # Training meets the same image, leaves it out and says why.
                continue
            rows.append({"image_id": example.image_id, "scores": scores.tolist()})
        return pa.Table.from_pylist(rows, _SCHEMA)


def measure_dataset(
    images: TrainingImages, networks: NetworkNames, folder: str, *, actors: int, say: Callable[[str], None]
) -> None:
    """Measure the scores of all objects of a data set into `folder`; files that are there are not made again.

    Args:
        images: the data set, what is held out included.
        networks: names the frozen detector.
        folder: local or s3://; `models.head_recipe.read_scores` reads it.
        actors: how many processes measure.
        say: takes a line for the person who waits.
    """
    count = sum(map(len, images.examples()))
    ranges = list(_ranges(count))
    missing = [(name, places) for name, places in ranges if not storage.exists(storage.join(folder, name))]
    if not missing:
        return
    join_ray()
    cpus = cpu_share(2 * actors)
    for name, places in missing:
        dataset = ray.data.from_items([{"id": place} for place in places], override_num_blocks=max(1, len(places) // 8))
        measured = dataset.map_batches(
            _Measure,
            fn_constructor_args=(images, networks),
            batch_size=8,
            compute=ActorPoolStrategy(size=actors),
            num_cpus=cpus,
        )
        tables: list[Any] = list(measured.iter_batches(batch_size=None, batch_format="pyarrow"))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.concat_tables([_SCHEMA.empty_table(), *tables]), sink)
        storage.write_bytes_atomic(storage.join(folder, name), sink.getvalue().to_pybytes())
        say(f"scores of objects measured: {places.stop} of {count} images")


def _ranges(count: int) -> Iterator[tuple[str, range]]:
    for start in range(0, count, _IMAGES_PER_FILE):
        yield f"{start:07d}.parquet", range(start, min(start + _IMAGES_PER_FILE, count))
