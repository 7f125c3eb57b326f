"""Preparation of a run: the engine, the policies, a trial of the networks, and the workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

from scalenet_ray.core.answers import MOST_FAILED
from scalenet_ray.core.errors import TileError, UserError, abbreviated, needs_extra
from scalenet_ray.core.policy import Policy, parse_policy
from scalenet_ray.core.policy_form import NamedPolicy, check_names, check_smallest_object
from scalenet_ray.core.windows import fixed_tiles
from scalenet_ray.data.categories import unknown_categories
from scalenet_ray.data.image_records import ImageRecord, OpenImage
from scalenet_ray.data.policy_files import read_policies, set_fields
from scalenet_ray.models.network_trial import try_networks
from scalenet_ray.models.spec import DetectorInfo, NetworkSpec
from scalenet_ray.runs.local import LocalSession, Session
from scalenet_ray.runs.resources import ResourceChoice
from scalenet_ray.workflows.image_sets import CocoSplit, ImageSet

EngineName = Literal["ray", "local"]
"""ray: actors on this machine or a cluster; local: this process, for small jobs and notebooks."""

_MANY_WINDOWS = 100


def start_session(engine: EngineName, resources: ResourceChoice, networks: NetworkSpec) -> Session:
    """Start an engine, and check that the networks' device exists: on this machine for `local` alone.

    Raises:
        UserError: if there is no such engine, Ray is not installed, or can be neither joined nor started, or there is
            no such device.
    """
    if engine not in get_args(EngineName):
        msg = f"engine must be {' or '.join(get_args(EngineName))}, got {engine!r}: correct it"
        raise UserError(msg)
    session: Session = LocalSession()
    if engine == "ray":
        with needs_extra():
            from scalenet_ray.engine.session import RaySession
        session = RaySession(resources)
    session.call(networks.check_device, engine == "local")
    return session


def named_policies(
    names: Sequence[str], networks: NetworkSpec, detector: DetectorInfo, smallest_object: float | None = None
) -> list[Policy]:
    """Policies by name, with the input side and the NMS threshold of a detector, and a smallest object for regions.

    Raises:
        UserError: if there is no policy of a name, or none of them has a use for the smallest object.
    """
    policies = [_named(networks, detector, smallest_object)(name) for name in names]
    check_smallest_object(smallest_object, policies)
    return policies


def _named(networks: NetworkSpec, detector: DetectorInfo, smallest_object: float | None) -> NamedPolicy:
    return partial(
        parse_policy,
        input_side=detector.input_side,
        iou_threshold=detector.iou_threshold,
        score_threshold=networks.score_threshold,
        smallest_object=smallest_object,
        takes_larger=detector.takes_larger,
    )


def file_policies(
    policy_file: str, networks: NetworkSpec, detector: DetectorInfo, smallest_object: float | None = None
) -> list[Policy]:
    """Policies of a file, see `read_policies`; what it leaves out is as for the policies of `named_policies`."""
    return read_policies(policy_file, _named(networks, detector, smallest_object))


def choose_policies(
    networks: NetworkSpec,
    detector: DetectorInfo,
    *,
    names: Sequence[str] | None,
    policy_file: str | None,
    smallest_object: float | None = None,
    settings: Sequence[str] = (),
    log: Callable[[str], None],
) -> list[Policy]:
    """Policies of an evaluation: those that are named and those of a file, with fields set as `set_fields` does.

    Without names: whole, grid-2, regions, scalenet and regions-oracle, without scalenet if there is no Scale Net, of
    which `log` takes a line.

    Raises:
        UserError: if there is no policy of a name, or the file or a setting is invalid.
    """
    if names is None:
        names = ("whole", "grid-2", "regions", "scalenet", "regions-oracle")
        if networks.scale_net is None:
            log("no --scale-net: the policy scalenet, which needs one, is left out")
            names = ("whole", "grid-2", "regions", "regions-oracle")
    policies = named_policies(names, networks, detector, smallest_object)
    if policy_file is not None:
        policies += file_policies(policy_file, networks, detector, smallest_object)
    return set_fields(policies, settings)


def prepare_run(
    session: Session,
    networks: NetworkSpec,
    image_sets: Sequence[ImageSet],
    choose: Callable[[DetectorInfo], Sequence[Policy]],
    log: Callable[[str], None],
) -> tuple[list[Policy], DetectorInfo]:
    """Choose the policies of a run, and try the networks on its first images.

    Args:
        session: the engine; networks are loaded outside the driver.
        networks: the detector and Scale Net.
        image_sets: the images of the run; several for a run over several splits.
        choose: the detector's declaration -> the policies.
        log: takes a line for each deviation between the files and their use, each warning about the networks, and each
            policy without evidence that cuts very many windows.

    Returns:
        The policies, and the detector's declaration.

    Raises:
        UserError: if a policy does not fit the images, the networks or the other policies, or as `NetworkSpec.check`
            does.
    """
    detector: DetectorInfo = session.call(networks.describe_detector)
    policies = check_names(choose(detector))
    for images in image_sets:
        oracles = [policy.name for policy in policies if policy.reads_truth]
        if oracles and not isinstance(images, CocoSplit):
            msg = f"policy {oracles[0]} reads the ground truth, {images.source} has no ground truth: use another policy"
            raise UserError(msg)
        for remark in _remarks(images, detector):
            log(f"{images.source}: {remark}")
        categories, unused = _categories_of(images, detector)
        first = images.images[:MOST_FAILED]
        if fixed := [policy for policy in policies if not (policy.uses_evidence or policy.is_whole)]:
            for line in session.call(_many_windows, fixed, first, images.open_image):
                log(line)
        for warning in session.call(networks.check, policies, categories, unused, first, images.open_image):
            log(f"warning: {warning}")
    return policies, detector


def _many_windows(policies: Sequence[Policy], images: Sequence[ImageRecord], open_image: OpenImage) -> list[str]:
    """A line for each policy that cuts very many windows of the first image that can be cut; raises if none can be."""
    refused: TileError | None = None
    for record in images:
        try:
            height, width, _ = open_image(record).shape
        except TileError:
            continue
        try:
            counts = {one.name: len(fixed_tiles(one.root(record.image_id, (height, width)), one)) for one in policies}
        except TileError as error:
            refused = error
            continue
        return [
            f"policy {name} cuts {count} windows of an image of {height} x {width} pixels, such as {record.file_name}"
            for name, count in counts.items()
            if count >= _MANY_WINDOWS
        ]
    if refused is not None:
        raise refused
    return []


def settle_workers(
    session: Session,
    networks: NetworkSpec,
    detector: DetectorInfo,
    policies: Sequence[Policy],
    images: ImageSet,
    log: Callable[[str], None],
) -> NetworkSpec:
    """Choose the device of the networks and the engine's workers, as far as the user has left them open.

    Returns:
        The networks with their device.

    Raises:
        UserError: if the networks do not run on the user's device.
    """
    categories, unused = _categories_of(images, detector)
    trial = partial(
        try_networks,
        policies=policies,
        categories=categories,
        unused=unused,
        images=images.images[:MOST_FAILED],
        open_image=images.open_image,
    )
    return session.settle(networks, trial, log)


def _categories_of(images: ImageSet, detector: DetectorInfo) -> tuple[dict[int, str], frozenset[int]]:
    """(id -> name, ids without annotations) of the ground truth; where there is none, the detector's."""
    if isinstance(images, CocoSplit):
        return images.categories, images.unused_categories
    return detector.categories, frozenset()


def _remarks(images: ImageSet, detector: DetectorInfo) -> list[str]:
    remarks = list(images.remarks)
    if isinstance(images, CocoSplit) and (
        unknown := unknown_categories(detector.categories, images.categories, images.unused_categories)
    ):
        names = abbreviated(unknown)
        remarks.append(f"categories that no annotation is of and the detector does not know: {names}; left out")
    return remarks
