"""Images of a run, with and without ground truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from scalenet_ray.data import storage
from scalenet_ray.data.categories import CategoryChoice, ChosenCategories, choose_categories, with_chosen
from scalenet_ray.data.coco import Listing, parse_annotations
from scalenet_ray.data.datasets import Layout, find_layout
from scalenet_ray.data.image_records import ImageRecords, OpenImage
from scalenet_ray.data.listings import FoundImages, find_images
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, DetectorInfo, NetworkSpec
from scalenet_ray.runs.batch import image_opener
from scalenet_ray.runs.folder import GROUND_TRUTH, RunFolder
from scalenet_ray.runs.inputs import annotation_digests, check_ground_truth
from scalenet_ray.runs.local import Session
from scalenet_ray.sample.scenes import SAMPLE


def sample_inputs(networks: NetworkSpec) -> tuple[str, NetworkSpec]:
    """The embedded sample's address, and its networks where a run names none."""
    detector, scale_net = networks.detector or SAMPLE_DETECTOR, networks.scale_net or SAMPLE_SCALE_NET
    return SAMPLE, replace(networks, detector=detector, scale_net=scale_net)


@dataclass(frozen=True)
class ImageSet:
    """Images of a run that count, and remarks on deviations between the files and their use.

    `source` is the address of the annotations, or of the images where there are none. `folder` is None if each
    `file_name` is a whole address.
    """

    source: str
    folder: str | None
    images: ImageRecords
    remarks: tuple[str, ...]
    max_pixels: int

    @property
    def open_image(self) -> OpenImage:
        """A picklable function that reads one image."""
        return image_opener(self.folder, self.max_pixels)


@dataclass(frozen=True)
class CocoSplit(ImageSet):
    """Images of a run with ground truth.

    `chosen` is the choice that led to these categories; None if they are all of the annotations', as they are.
    `instances` is the ground truth as a COCO instances file; None if `source` is one.
    """

    folder: str
    categories: dict[int, str]
    unused_categories: frozenset[int]
    chosen: ChosenCategories | None = None
    instances: bytes | None = None

    @property
    def annotations(self) -> str:
        """Address of the instances file; before `with_ground_truth` the annotations may have another form."""
        return self.source


def open_split(
    session: Session,
    split: str,
    *,
    data: str | None,
    annotations: str | None,
    images: str | None,
    limit: int | None,
    max_megapixels: float,
    networks: NetworkSpec,
    choice: CategoryChoice,
    log: Callable[[str], None],
) -> CocoSplit:
    """Read the annotations of one split of a data set, outside the driver, and apply a choice of categories.

    `data`, `annotations` and `images` are as `find_layout` takes them. `limit` takes only the first so many images;
    those of more than `max_megapixels` are refused before they are decoded. `log` takes a line on the choice.

    Raises:
        FileNotFoundError: if there are no annotations.
        UserError: if they are in none of the known forms; or as `choose_categories`.
    """
    layout: Layout = session.call(partial(find_layout, split, data=data, annotations=annotations, images=images))
    found: Listing = session.call(layout.open, split)
    read = CocoSplit(
        source=layout.annotations_of(split),
        folder=layout.images_of(split),
        images=found.images[:limit],
        remarks=found.remarks,
        max_pixels=round(max_megapixels * 1e6),
        categories=found.categories,
        unused_categories=found.unused_categories,
        instances=found.instances,
    )
    if not choice.is_made:
        return read
    detector: DetectorInfo = session.call(networks.describe_detector)
    chosen = choose_categories(read.categories, detector.categories, choice)
    log(chosen.in_words())
    used = {chosen.ids[key] for key in chosen.ids if key not in read.unused_categories}
    return replace(
        read,
        categories=chosen.categories,
        unused_categories=frozenset(chosen.categories.keys() - used),
        chosen=chosen,
    )


def open_images(session: Session, images: str, *, limit: int | None, max_megapixels: float, every: int = 1) -> ImageSet:
    """List images without annotations, outside the driver, see `data.listings.find_images`.

    `every` takes only the first of each so many images or frames, `limit` the first so many of these.
    """
    found: FoundImages = session.call(find_images, images)
    return ImageSet(images, None, found.records[::every][:limit], found.remarks, round(max_megapixels * 1e6))


def with_ground_truth(session: Session, run: RunFolder, split: CocoSplit) -> CocoSplit:
    """The split, its ground truth written into the run folder if categories were chosen or its form is not COCO's.

    Raises:
        UserError: if images, categories or objects are not those that the run was begun with; nothing is written then.
    """
    truth = split.source, split.instances, split.chosen
    check_ground_truth(run, split.images, split.categories, session.call(_digests, *truth, split.images.ids))
    if split.instances is None and split.chosen is None:
        return split
    target = storage.join(run.uri, GROUND_TRUTH)
    session.call(_write_ground_truth, *truth, target)
    return replace(split, source=target, instances=None)


def _ground_truth(source: str, instances: bytes | None, chosen: ChosenCategories | None) -> dict[str, Any]:
    document = json.loads(storage.read_bytes(source) if instances is None else instances)
    return document if chosen is None else with_chosen(document, chosen)


def _digests(source: str, instances: bytes | None, chosen: ChosenCategories | None, image_ids: np.ndarray) -> pa.Table:
    return annotation_digests(parse_annotations(_ground_truth(source, instances, chosen), source), image_ids)


def _write_ground_truth(source: str, instances: bytes | None, chosen: ChosenCategories | None, target: str) -> None:
    storage.write_bytes_atomic(target, json.dumps(_ground_truth(source, instances, chosen)).encode())
