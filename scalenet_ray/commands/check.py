"""`scalenet-ray check`: try data, networks and policies without a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from scalenet_ray.commands.data_flags import AnnotatedData
from scalenet_ray.console import say
from scalenet_ray.core.answers import MOST_FAILED
from scalenet_ray.core.bounds import MEGAPIXELS
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.geometry import whole_pixels
from scalenet_ray.core.networks import FeatureScalePredictor
from scalenet_ray.core.policy import Policy
from scalenet_ray.data import storage
from scalenet_ray.data.categories import CategoryChoice, map_categories
from scalenet_ray.data.rasters import open_image
from scalenet_ray.models.detector_diagnosis import diagnose
from scalenet_ray.models.detectors import Detector, load_detector
from scalenet_ray.models.spec import DetectorInfo, NetworkSpec
from scalenet_ray.report.pictures import PICTURE_SIDE
from scalenet_ray.runs.resources import ResourceChoice
from scalenet_ray.sample.scenes import sample_scene
from scalenet_ray.workflows.image_sets import (
    CocoSplit,
    ImageSet,
    open_images,
    open_split,
    sample_inputs,
)
from scalenet_ray.workflows.preparation import choose_policies, prepare_run, start_session

_MOST_NAMES = 5
_SCENE = 7


@dataclass(frozen=True)
class CheckInputs(AnnotatedData):
    """Look closely at one detector; or try the data, networks and policies of a run, as eval and detect do before it.

    With NAME: the detector is tried on an image, on --device, and what is wrong with it is said; the exit status is 1
    if anything is. Without: networks are tried on the CPU of this machine, on the first images of --data or --images;
    by default the embedded sample's images, with the sample's networks unless --detector is given.

    Attributes:
        name: kind:what of the detector to look at; see --detector.
        image: an image that shows its classes, a local path or a store's address; by default a scene of the embedded
            sample, in which few detectors find anything.
        split: the split of --data or --annotations.
        images: folder of the images of --annotations; or a folder, a glob (quoted), a prefix in a store, or a Parquet
            file with a column uri or path, as for detect.
        policies: those that eval takes. By default those of eval, without an oracle where there is no ground truth.
        policy_file: YAML of further policies.
        max_image_megapixels: larger images are refused before they are decoded, except TIFFs that are read by window.
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    image: Annotated[str | None, tyro.conf.Positional] = None
    split: str = "val2017"
    images: str | None = None
    policies: tuple[str, ...] | None = None
    policy_file: str | None = None
    max_image_megapixels: Annotated[float, MEGAPIXELS] = 200.0
    categories: Annotated[CategoryChoice, tyro.conf.OmitArgPrefixes] = field(default_factory=CategoryChoice)
    networks: Annotated[NetworkSpec, tyro.conf.OmitArgPrefixes] = field(default_factory=NetworkSpec)


def main(job: CheckInputs) -> int:
    """Check all inputs, or one detector, and print what there is to say. Returns the exit status."""
    if job.name is not None:
        return _look_at_detector(job, job.name)
    if job.data is not None and job.images is not None:
        msg = f"check takes --data or --images, got {job.data} and {job.images}: leave one out"
        raise UserError(msg)
    if job.is_sample:
        data, networks = sample_inputs(job.networks)
        if job.networks.detector is None:
            job = replace(job, data=data, networks=networks)
        else:
            # Another detector need not know the sample's categories.
            job = replace(job, images=storage.join(data, "val2017"))
    session = start_session("local", ResourceChoice(), replace(job.networks, device="cpu"))
    if job.data is not None or job.annotations is not None:
        images = open_split(
            session,
            job.split,
            **job.named(),
            limit=None,
            max_megapixels=job.max_image_megapixels,
            networks=job.networks,
            choice=job.categories,
            log=say,
        )
    else:
        images = open_images(session, str(job.images), limit=None, max_megapixels=job.max_image_megapixels)
    say(_data_line(images))
    _check_readable(images)

    def choose(detector: DetectorInfo) -> list[Policy]:
        """The named policies; of the default ones those that the images allow."""
        chosen = choose_policies(job.networks, detector, names=job.policies, policy_file=job.policy_file, log=say)
        default = job.policies is None and not isinstance(images, CocoSplit)
        return [policy for policy in chosen if not (default and policy.reads_truth)]

    policies, detector = prepare_run(session, job.networks, [images], choose, log=say)
    for line in _detector_lines(job.networks, detector, images):
        say(line)
    if job.networks.scale_net is not None:
        say(_scale_net_line(job.networks))
    say(f"policies: {', '.join(f'{policy.name} (tiles of up to {policy.largest_side})' for policy in policies)}")
    say(_device_line(job.networks))
    say("all checks passed")
    return 0


def _look_at_detector(job: CheckInputs, name: str) -> int:
    """Print what there is to say about one detector. Returns the exit status."""
    for flag, given in (("--data", job.data), ("--images", job.images), ("--detector", job.networks.detector)):
        if given is not None:
            msg = f"check takes a detector's name or {flag}, got {name} and {given}: leave one out"
            raise UserError(msg)
    networks = replace(job.networks, detector=name).on_this_machine()
    networks.check_device(here=True)

    def load(score_threshold: float, iou_threshold: float | None) -> Detector:
        """Load the detector with other thresholds."""
        return load_detector(
            name,
            device=networks.device,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            mixed_precision=networks.mixed_precision,
        )

    max_pixels = round(job.max_image_megapixels * 1e6)
    image = (
        sample_scene("val2017", _SCENE).pixels if job.image is None else open_image(job.image, max_pixels=max_pixels)
    )
    pixels = whole_pixels(image, PICTURE_SIDE)
    diagnosis = diagnose(load, name, pixels, score_threshold=networks.score_threshold, device=networks.device)
    for line in diagnosis.facts:
        say(line)
    for line in diagnosis.faults:
        say(f"wrong: {line}")
    count = len(diagnosis.faults)
    say(f"{count} fault{'s' if count > 1 else ''}" if count else "nothing wrong was found")
    return 1 if diagnosis.faults else 0


def _data_line(images: ImageSet) -> str:
    line = f"data {images.source}: {len(images.images)} images"
    if not isinstance(images, CocoSplit):
        return f"{line}, no ground truth"
    unused = f" ({len(images.unused_categories)} without annotations)" if images.unused_categories else ""
    return f"{line}, {len(images.categories)} categories{unused}"


def _check_readable(images: ImageSet) -> None:
    """Refuse images the first of which cannot be read."""
    reasons: list[str] = []
    for record in images.images[:MOST_FAILED]:
        try:
            images.open_image(record)
        except TileError as error:
            reasons.append(error.reason)
            continue
        return
    msg = f"{images.source} must have an image that can be read, got none among the first {len(reasons)}: "
    raise UserError(msg + (reasons[0] if reasons else "it lists no images"))


def _detector_lines(networks: NetworkSpec, info: DetectorInfo, images: ImageSet) -> Sequence[str]:
    lines = replace(networks, device="cpu").load_detector(info.categories).in_words()
    if not isinstance(images, CocoSplit) or images.categories == info.categories:
        return [*lines, "categories: the detector's own"]
    mapping = map_categories(info.categories, images.categories, images.unused_categories)
    pairs = [
        f"{class_id} {info.categories[class_id]} -> {category_id} {images.categories[category_id]}"
        for class_id, category_id in list(mapping.items())[:_MOST_NAMES]
    ]
    more = ", ..." if len(mapping) > _MOST_NAMES else ""
    lines.append(f"categories: {len(mapping)} of the detector's {len(info.categories)}: {', '.join(pairs)}{more}")
    return lines


def _scale_net_line(networks: NetworkSpec) -> str:
    predictor = replace(networks, device="cpu").load_scale_net()
    if isinstance(predictor, FeatureScalePredictor):
        return f"Scale Net {networks.scale_net}: scale head on the detector's feature maps"
    maps = "class maps" if predictor.config.kind == "classes" else "regression maps"
    side = predictor.config.input_side
    return f"Scale Net {networks.scale_net}: {maps}, " + (f"input side {side}" if side else "input of any size")


def _device_line(networks: NetworkSpec) -> str:
    networks = networks.on_this_machine()
    networks.check_device(here=False)
    try:
        networks.check_device(here=True)
    except UserError as error:
        return f"device {networks.device}: not on this machine, needed where the networks run ({error})"
    return f"device {networks.device}: on this machine"
