"""Policies over a split of a data set in COCO's layout: worked through, evaluated, and its pages written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from scalenet_ray.batch_report import PICTURES, ProgressLog, write_report
from scalenet_ray.core import storage
from scalenet_ray.core.answers import MOST_FAILED
from scalenet_ray.core.coco import ImageRecord, Listing, images_and_categories, unknown_categories
from scalenet_ray.core.ground_truth import oracle_from
from scalenet_ray.core.policy import Policy
from scalenet_ray.engine.analysis import INTERVALS_UP_TO, analyse_run
from scalenet_ray.engine.batch import Progress, image_opener, run_policy
from scalenet_ray.engine.conclude import conclude
from scalenet_ray.engine.evaluate import evaluate_policy
from scalenet_ray.engine.inputs import annotation_digests, check_ground_truth
from scalenet_ray.engine.pictures import PictureTask
from scalenet_ray.engine.runs import RunFolder
from scalenet_ray.engine.session import Session
from scalenet_ray.engine.stages import Networks
from scalenet_ray.models.networks import NetworkNames
from scalenet_ray.policy_plot import policy_plot

__all__ = ["CocoSplit", "check_networks", "check_split", "evaluate_policies", "open_split", "tell_remarks"]


@dataclass(frozen=True)
class CocoSplit:
    """A split with its objects.

    Attributes:
        folder: address of the images.
        annotations: address of the instances file.
        images: the images that count.
        categories: id -> name.
        unused_categories: ids of those that no annotation is of.
        remarks: what is taken otherwise than it is written, a line each.
        max_pixels: larger images are refused before they are decoded.
    """

    folder: str
    annotations: str
    images: Sequence[ImageRecord]
    categories: dict[int, str]
    unused_categories: frozenset[int]
    remarks: tuple[str, ...]
    max_pixels: int


def open_split(session: Session, data: str, split: str, *, limit: int | None, max_megapixels: float) -> CocoSplit:
    """A split of a data set.

    Args:
        session: the engine; the annotations are read away from the driver.
        data: folder or s3:// prefix with SPLIT/ and annotations/instances_SPLIT.json.
        split: its name.
        limit: only the first so many images.
        max_megapixels: larger images are refused before they are decoded.
    """
    annotations = storage.join(data, "annotations", f"instances_{split}.json")
    found: Listing = session.call(images_and_categories, annotations)
    return CocoSplit(
        storage.join(data, split),
        annotations,
        found.images[:limit],
        found.categories,
        found.unused_categories,
        found.remarks,
        round(max_megapixels * 1e6),
    )


def tell_remarks(split: CocoSplit, detector_categories: Mapping[int, str], say: Callable[[str], None]) -> None:
    """Say what of a split is taken otherwise than it is written, before a run begins."""
    remarks = list(split.remarks)
    if unknown := unknown_categories(detector_categories, split.categories, split.unused_categories):
        names = f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}"
        remarks.append(f"categories that no annotation is of and the detector does not know: {names}; left out")
    for remark in remarks:
        say(f"{split.annotations}: {remark}")


def check_split(session: Session, run: RunFolder, split: CocoSplit) -> None:
    """Refuse to go on with a run whose images, categories or objects are other ones by now; raises `UserError`."""
    digests = session.call(annotation_digests, split.annotations, [record.image_id for record in split.images])
    check_ground_truth(run, split.images, split.categories, digests)


def check_networks(session: Session, networks: NetworkNames, policies: Sequence[Policy], split: CocoSplit) -> None:
    """Try the networks on the first images of a split, away from the driver; raises as `NetworkNames.check` does."""
    open_image = image_opener(split.folder, split.max_pixels)
    session.call(
        networks.check, policies, split.categories, split.unused_categories, split.images[:MOST_FAILED], open_image
    )


def evaluate_policies(
    session: Session,
    run: RunFolder,
    policies: Sequence[Policy],
    networks: NetworkNames,
    split: CocoSplit,
    report: Callable[[Progress | str], None],
    *,
    compare_with: str | None = None,
    pictures: int = PICTURES,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Work through all policies and evaluate them; writes metrics.json, analysis.json, policies.svg and report.html.

    Args:
        session: the engine.
        run: the run folder, begun; what it has already is not done again.
        policies: in the order in which they are done.
        networks: the detector and Scale Net.
        split: the images.
        report: takes the progress, and a line for what comes after the last image.
        compare_with: one of the policies; how the others differ from it is measured, with bootstrap intervals. By
            default the whole image, or the first policy that reads no ground truth, and for very many images without
            intervals.
        pictures: photographs in the report.
        retry_failed: also try those images again that failed before.

    Returns:
        What metrics.json holds.
    """
    ids = [record.image_id for record in split.images]
    check_split(session, run, split)
    open_image = image_opener(split.folder, split.max_pixels)
    log = ProgressLog(report)
    reads_features = session.call(networks.reads_features, policies)
    metrics: dict[str, Any] = {}
    for policy in policies:
        made = replace(_networks(policy, networks, split), reads_features=reads_features)
        start = partial(session.start, policy=policy, networks=made, open_image=open_image)
        run_policy(split.images, policy.name, start, run, log, retry_failed=retry_failed)
        figures = session.call(evaluate_policy, run.uri, policy.name, split.annotations, ids)
        metrics[policy.name] = {"kind": policy.kind, **figures.pop("bbox"), **figures}
    report("all images are done: comparing what was found, and writing the report")
    document = conclude(session, run, metrics, len(split.images))
    base = compare_with or _baseline(policies)
    intervals = compare_with is not None or len(ids) <= INTERVALS_UP_TO
    analysis = session.call(analyse_run, run.uri, list(metrics), base, split.annotations, ids, intervals)
    if analysis["differences"]:
        document |= {"compared_with": base, "differences": analysis["differences"]}
        run.write_json("metrics.json", document)
    run.write_text("policies.svg", policy_plot(document))
    # A task of the engine has no GPU of its own, and a few looks need none. Most CPUs only imitate bfloat16.
    on_cpu = replace(networks, device="cpu", mixed_precision=False)
    looks = [(policy, _networks(policy, on_cpu, split)) for policy in policies]
    task = PictureTask(run.uri, looks, open_image, split.annotations, base)
    write_report(session, run, document, analysis, split.images, split.categories, task, log, pictures)
    return document


def _baseline(policies: Sequence[Policy]) -> str:
    """What the others are compared with: the whole image, else the first policy that reads no ground truth, if any."""
    whole = [policy for policy in policies if policy.kind == "whole"]
    honest = [policy for policy in policies if policy.kind != "oracle"]
    named = [policy for policy in whole if policy.name == "whole"]
    return next(policy.name for policy in (*named, *whole, *honest, *policies))


def _networks(policy: Policy, names: NetworkNames, split: CocoSplit) -> Networks:
    return Networks(
        partial(names.load_detector, split.categories, split.unused_categories),
        partial(oracle_from, split.annotations) if policy.kind == "oracle" else names.load_scale_net,
    )
