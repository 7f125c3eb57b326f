"""Batch runs over images: prepare the inputs, evaluate policies or detect, write results and the report."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from scalenet_ray.core.answers import MOST_FAILED
from scalenet_ray.core.detections import ImageResult
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.extras import needs_extra
from scalenet_ray.core.inference import NetworkFactories
from scalenet_ray.core.policy import Policy, check_names, check_smallest_object, parse_policy
from scalenet_ray.core.policy_form import NamedPolicy
from scalenet_ray.data import storage
from scalenet_ray.data.categories import CategoryChoice, ChosenCategories, choose_categories, write_chosen
from scalenet_ray.data.coco import (
    FoundImages,
    ImageRecord,
    OpenImage,
    find_images,
    oracle_from,
    unknown_categories,
)
from scalenet_ray.data.datasets import Layout, OpenedSplit, find_layout
from scalenet_ray.data.policy_files import read_policies, set_fields
from scalenet_ray.models.network_trial import try_networks
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, DetectorInfo, NetworkSpec
from scalenet_ray.report.charts import policy_plot
from scalenet_ray.report.gallery import PictureTask, choose_pictures
from scalenet_ray.report.page import render_report
from scalenet_ray.report.tables import winner_of
from scalenet_ray.runs.analysis import INTERVALS_UP_TO, analyse_detections, analyse_run
from scalenet_ray.runs.batch import PolicyRun, Progress, image_opener, run_policy
from scalenet_ray.runs.documents import (
    DetectionAnalysis,
    EvaluationAnalysis,
    FailureCount,
    FailureList,
    FailureRow,
    Metrics,
    PolicyMetrics,
    ReportDetails,
)
from scalenet_ray.runs.folder import GROUND_TRUTH, RunFolder
from scalenet_ray.runs.inputs import annotation_digests, check_ground_truth, keep_image_ids
from scalenet_ray.runs.local import LocalSession, Session
from scalenet_ray.runs.resources import ResourceChoice
from scalenet_ray.runs.summary import evaluate_policy, failure_counts, policy_cost, write_policy_results
from scalenet_ray.sample.scenes import ensure_sample

__all__ = [
    "PICTURES",
    "CocoSplit",
    "DetectionRun",
    "EngineName",
    "ImageSet",
    "ProgressLog",
    "check_split",
    "choose_policies",
    "evaluate_policies",
    "file_policies",
    "named_policies",
    "open_images",
    "open_split",
    "prepare_run",
    "sample_inputs",
    "settle_workers",
    "start_session",
    "with_categories",
    "with_ground_truth",
    "write_report",
    "write_summary",
]

EngineName = Literal["ray", "local"]
"""ray: actors on this machine or a cluster; local: this process, for small jobs and notebooks."""

PICTURES = 24
"""Default number of photographs in a report, which keeps it at a few megabytes."""

_SAMPLE_FOLDER = Path("runs/sample")
_MOST_POINTS = 200
_MOST_FAILURES = 200
_MOST_NAMES = 5


def start_session(engine: EngineName, resources: ResourceChoice, networks: NetworkSpec) -> Session:
    """Start an engine, and check that the networks' device exists.

    Args:
        engine: ray or local.
        resources: the user's actors, batch sizes and timeouts, for ray.
        networks: the networks of the run. A local engine must have their device, a cluster's head need not.

    Raises:
        UserError: if Ray is not installed, or can be neither joined nor started, or there is no such device.
    """
    session: Session = LocalSession()
    if engine == "ray":
        with needs_extra():
            from scalenet_ray.engine.session import RaySession
        session = RaySession(resources)
    session.call(networks.check_device, engine == "local")
    return session


def sample_inputs(networks: NetworkSpec) -> tuple[str, NetworkSpec]:
    """Write the embedded sample to runs/sample, if it is not there.

    Args:
        networks: the networks of the run; those that are not named become the sample's.

    Returns:
        The sample's folder, and the networks.
    """
    detector, scale_net = networks.detector or SAMPLE_DETECTOR, networks.scale_net or SAMPLE_SCALE_NET
    return str(ensure_sample(_SAMPLE_FOLDER)), replace(networks, detector=detector, scale_net=scale_net)


@dataclass(frozen=True)
class ImageSet:
    """Images of a run.

    Attributes:
        source: address of the annotations, or of the images where there are none.
        folder: address of the images' folder; None if each `file_name` is a whole address.
        images: the images that count.
        remarks: deviations between the files and their use in the run, a line each.
        max_pixels: larger images are refused before they are decoded.
    """

    source: str
    folder: str | None
    images: Sequence[ImageRecord]
    remarks: tuple[str, ...]
    max_pixels: int

    @property
    def open_image(self) -> OpenImage:
        """A picklable function that reads one image."""
        return image_opener(self.folder, self.max_pixels)


@dataclass(frozen=True)
class CocoSplit(ImageSet):
    """Images of a run with ground truth.

    Attributes:
        folder: address of the images' folder.
        categories: id -> name.
        unused_categories: ids of the categories without annotations.
        chosen: the choice that led to these categories; None if they are all of the annotations', as they are.
        instances: the ground truth as a COCO instances file, for the run folder; None if `source` is one.
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
    data: str | None,
    split: str,
    *,
    limit: int | None,
    max_megapixels: float,
    annotations: str | None = None,
    images: str | None = None,
) -> CocoSplit:
    """Read the annotations of one split of a data set.

    Args:
        session: the engine; the annotations are read outside the driver.
        data: a folder or a data.yaml, see `data.datasets`; None if `annotations` and `images` are given.
        split: its name.
        limit: only the first so many images.
        max_megapixels: larger images are refused before they are decoded.
        annotations: instances file or folder of label files, in place of `data`.
        images: folder of the images, with `annotations`.

    Raises:
        FileNotFoundError: if there are no annotations.
        UserError: if they are in none of the known forms.
    """
    layout: Layout = session.call(partial(find_layout, split, data=data, annotations=annotations, images=images))
    opened: OpenedSplit = session.call(layout.open, split)
    found = opened.listing
    return CocoSplit(
        source=layout.annotations_of(split),
        folder=layout.images_of(split),
        images=found.images[:limit],
        remarks=found.remarks,
        max_pixels=round(max_megapixels * 1e6),
        categories=found.categories,
        unused_categories=found.unused_categories,
        instances=opened.instances,
    )


def with_categories(
    session: Session, split: CocoSplit, networks: NetworkSpec, choice: CategoryChoice, log: Callable[[str], None]
) -> CocoSplit:
    """Apply a choice of categories to a split.

    Args:
        session: the engine; the detector is loaded outside the driver.
        split: the split.
        networks: the detector, whose classes are the known ones.
        choice: the choice.
        log: takes a line that says what was chosen.

    Raises:
        UserError: if a name is not the annotations', or no category is left.
    """
    if not choice.is_made:
        return split
    detector: DetectorInfo = session.call(networks.describe_detector)
    chosen = choose_categories(split.categories, detector.categories, choice)
    log(chosen.in_words())
    used = {chosen.ids[key] for key in chosen.ids if key not in split.unused_categories}
    return replace(
        split,
        categories=chosen.categories,
        unused_categories=frozenset(chosen.categories.keys() - used),
        chosen=chosen,
    )


def open_images(session: Session, images: str, *, limit: int | None, max_megapixels: float) -> ImageSet:
    """List images without annotations.

    Args:
        session: the engine; the images are listed outside the driver.
        images: a folder, a glob, an s3:// prefix, or a Parquet file with a column uri or path.
        limit: only the first so many images.
        max_megapixels: larger images are refused before they are decoded.
    """
    found: FoundImages = session.call(find_images, images)
    return ImageSet(images, None, found.records[:limit], found.remarks, round(max_megapixels * 1e6))


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
    """Policies of a file; what it leaves out is as for the policies of `named_policies`.

    Raises:
        FileNotFoundError: if it does not exist.
        UserError: if it is invalid.
    """
    return read_policies(policy_file, _named(networks, detector, smallest_object))


def choose_policies(
    session: Session,
    networks: NetworkSpec,
    detector: DetectorInfo,
    *,
    names: Sequence[str] | None,
    policy_file: str | None,
    smallest_object: float | None = None,
    settings: Sequence[str] = (),
    log: Callable[[str], None],
) -> list[Policy]:
    """Policies of an evaluation: those that are named and those of a file.

    Args:
        session: the engine.
        networks: the detector and Scale Net.
        detector: the detector's declaration.
        names: names of policies. None: whole, grid-2, regions, scalenet and regions-oracle; gain in place of scalenet
            if Scale Net is a scale head, neither without Scale Net.
        policy_file: YAML of further policies.
        smallest_object: side of the smallest object worth finding, in image pixels (regions).
        settings: fields to set, see `set_fields`.
        log: takes a line for the terminal.

    Raises:
        UserError: if there is no policy of a name, or the file or a setting is invalid.
    """
    if names is None:
        names = ("whole", "grid-2", "regions", "scalenet", "regions-oracle")
        if networks.scale_net is None:
            log("no --scale-net: the policy scalenet, which needs one, is left out")
            names = ("whole", "grid-2", "regions", "regions-oracle")
        elif session.call(networks.reads_features, named_policies(names, networks, detector)):
            names = ("whole", "grid-2", "regions", "gain", "regions-oracle")
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
        log: takes a line for each deviation between the files and their use.

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
        categories, unused = detector.categories, frozenset[int]()
        if isinstance(images, CocoSplit):
            categories, unused = images.categories, images.unused_categories
        first = images.images[:MOST_FAILED]
        session.call(networks.check, policies, categories, unused, first, images.open_image)
    return policies, detector


def settle_workers(
    session: Session,
    networks: NetworkSpec,
    policies: Sequence[Policy],
    images: ImageSet,
    log: Callable[[str], None],
) -> NetworkSpec:
    """Choose the device of the networks, and the engine's workers, as far as the user has left them open.

    Args:
        session: the engine.
        networks: the networks.
        policies: policies of the run.
        images: images of the run.
        log: takes a line that says what was chosen.

    Returns:
        The networks with their device.

    Raises:
        UserError: if the networks do not run on the user's device.
    """
    if isinstance(session, LocalSession):
        return networks.on_this_machine()
    categories, unused = session.call(networks.describe_detector).categories, frozenset[int]()
    if isinstance(images, CocoSplit):
        categories, unused = images.categories, images.unused_categories
    trial = partial(
        try_networks,
        policies=policies,
        categories=categories,
        unused=unused,
        images=images.images[:MOST_FAILED],
        open_image=images.open_image,
    )
    return session.settle(networks, trial, log)


def _remarks(images: ImageSet, detector: DetectorInfo) -> list[str]:
    remarks = list(images.remarks)
    if isinstance(images, CocoSplit) and (
        unknown := unknown_categories(detector.categories, images.categories, images.unused_categories)
    ):
        names = f"{', '.join(unknown[:_MOST_NAMES])}{' ...' if len(unknown) > _MOST_NAMES else ''}"
        remarks.append(f"categories that no annotation is of and the detector does not know: {names}; left out")
    return remarks


class ProgressLog:
    """Progress of a run, passed on to the terminal and recorded for the report.

    Args:
        report: takes each progress.
    """

    def __init__(self, report: Callable[[Progress], None]) -> None:
        self._report = report
        self._points: defaultdict[str, list[list[float]]] = defaultdict(list)

    def __call__(self, progress: Progress) -> None:
        """Record one progress, and pass it on."""
        self._points[progress.policy].append([round(progress.elapsed, 2), progress.images])
        self._report(progress)

    @property
    def points(self) -> dict[str, list[list[float]]]:
        """Policy -> [seconds since its start, images done in this run], at most a few hundred points each."""
        return {policy: rows[:: max(1, len(rows) // _MOST_POINTS)] for policy, rows in self._points.items()}


def check_split(session: Session, run: RunFolder, split: CocoSplit) -> None:
    """Compare images, categories and objects with those that the run was begun with.

    Raises:
        UserError: if they differ.
    """
    digests = session.call(annotation_digests, split.annotations, [record.image_id for record in split.images])
    check_ground_truth(run, split.images, split.categories, digests)


def with_ground_truth(session: Session, run: RunFolder, split: CocoSplit) -> CocoSplit:
    """The split, its ground truth written into the run folder if categories were chosen or it was not in COCO's form.

    Args:
        session: the engine.
        run: the run folder, begun.
        split: the split.
    """
    target = storage.join(run.uri, GROUND_TRUTH)
    if split.instances is not None:
        storage.write_bytes_atomic(target, split.instances)
        split = replace(split, source=target, instances=None)
    if split.chosen is not None:
        split = replace(split, source=session.call(write_chosen, split.annotations, target, split.chosen))
    return split


def evaluate_policies(
    session: Session,
    run: RunFolder,
    *,
    policies: Sequence[Policy],
    networks: NetworkSpec,
    split: CocoSplit,
    report: Callable[[Progress | str], None],
    compare_with: str | None = None,
    pictures: int = PICTURES,
    retry_failed: bool = False,
) -> Metrics:
    """Run all policies and evaluate them. Writes metrics.json, analysis.json, policies.svg and report.html.

    Args:
        session: the engine.
        run: the run folder, begun; images with results there are skipped.
        policies: in the order of execution.
        networks: the detector and Scale Net.
        split: the images and their ground truth.
        report: takes the progress, and a line for the work after the last image.
        compare_with: name of the policy that the others are compared with, with bootstrap intervals. By default the
            whole image, or the first policy that reads no ground truth, and without intervals for very many images.
        pictures: photographs in the report.
        retry_failed: also process the images that failed before.

    Returns:
        The content of metrics.json.
    """
    ids = [record.image_id for record in split.images]
    split = with_ground_truth(session, run, split)
    check_split(session, run, split)
    log = ProgressLog(report)
    reads_features = session.call(networks.reads_features, policies)
    metrics: dict[str, Any] = {}
    for policy in policies:
        factories = replace(_split_networks(policy, networks, split), reads_features=reads_features)
        start = partial(session.start, policy=policy, networks=factories, open_image=split.open_image)
        run_policy(split.images, policy.name, start, run, log, retry_failed=retry_failed)
        figures = session.call(evaluate_policy, run.uri, policy.name, split.annotations, ids)
        metrics[policy.name] = {"kind": policy.kind, **figures.pop("bbox"), **figures}
    report("all images are done: comparing what was found, and writing the report")
    document = write_summary(session, run, metrics, len(split.images))
    if split.chosen is not None:
        document["renamed_categories"] = split.chosen.renamed
        document["left_out_categories"] = list(split.chosen.left_out)
        run.write_json("metrics.json", document)
    base = compare_with or _baseline(policies)
    intervals = compare_with is not None or len(ids) <= INTERVALS_UP_TO
    analysis: EvaluationAnalysis = session.call(
        analyse_run, run.uri, list(metrics), base, split.annotations, ids, intervals
    )
    if analysis["differences"]:
        document["compared_with"] = base
        document["differences"] = analysis["differences"]
        run.write_json("metrics.json", document)
    run.write_text("policies.svg", policy_plot(document))
    on_cpu = _on_cpu(networks)
    looks = [(policy, _split_networks(policy, on_cpu, split)) for policy in policies]
    write_report(
        session,
        run,
        document=document,
        analysis=analysis,
        images=split.images,
        categories=split.categories,
        make_pictures=PictureTask(run.uri, looks, split.open_image, split.annotations, base),
        progress=log,
        pictures=pictures,
    )
    return document


class DetectionRun:
    """One policy over images without ground truth.

    Iterating processes the images that are not in the run folder yet, and yields their results, see `PolicyRun`;
    `conclude` writes metrics.json, analysis.json and report.html.

    Args:
        session: the engine.
        run: the run folder, begun; images with results there are skipped.
        policy: the policy.
        networks: the detector and Scale Net.
        detector: the detector's declaration; its categories are those of the results.
        images: the images. In a resumed run they keep the ids that their files had.
        report: takes the progress.
        retry_failed: also process the images that failed before.

    Attributes:
        records: the images, with the ids that they have in the run.
    """

    def __init__(
        self,
        session: Session,
        run: RunFolder,
        *,
        policy: Policy,
        networks: NetworkSpec,
        detector: DetectorInfo,
        images: ImageSet,
        report: Callable[[Progress], None],
        retry_failed: bool = False,
    ) -> None:
        self._session, self._run, self._policy, self._images = session, run, policy, images
        self._networks, self._detector = networks, detector
        self.records = keep_image_ids(run, images.images, images.source, policy.name)
        self._log = ProgressLog(report)
        reads_features = session.call(networks.reads_features, [policy])
        factories = replace(_own_networks(networks, detector), reads_features=reads_features)
        start = partial(session.start, policy=policy, networks=factories, open_image=images.open_image)
        self._work = PolicyRun(self.records, policy.name, start, run, self._log, retry_failed=retry_failed)

    def __iter__(self) -> Iterator[ImageResult]:
        """Process the remaining images and yield their results."""
        return iter(self._work)

    def conclude(self, pictures: int = PICTURES) -> Metrics:
        """Write the results, metrics and the report of a finished run.

        Args:
            pictures: photographs in the report.

        Returns:
            The content of metrics.json.
        """
        session, run, policy = self._session, self._run, self._policy
        document = write_summary(session, run, {policy.name: {"kind": policy.kind}}, len(self.records), name_files=True)
        document["categories"] = self._detector.categories
        ids = [record.image_id for record in self.records]
        analysis: DetectionAnalysis = session.call(analyse_detections, run.uri, policy.name, ids)
        files = {record.image_id: record.file_name for record in self.records}
        for row in analysis["found"]["most"]:
            row["file"] = files[row["id"]]
        document["found"] = analysis["found"]
        run.write_json("metrics.json", document)
        looks = [(policy, _own_networks(_on_cpu(self._networks), self._detector))]
        write_report(
            session,
            run,
            document=document,
            analysis=analysis,
            images=self.records,
            categories=self._detector.categories,
            make_pictures=PictureTask(run.uri, looks, self._images.open_image),
            progress=self._log,
            pictures=pictures,
        )
        return document


def _on_cpu(networks: NetworkSpec) -> NetworkSpec:
    """Networks for the report's pictures: tasks have no GPU, and most CPUs emulate bfloat16 slowly."""
    return replace(networks, device="cpu", mixed_precision=False)


def _split_networks(policy: Policy, networks: NetworkSpec, split: CocoSplit) -> NetworkFactories:
    return NetworkFactories(
        partial(networks.load_detector, split.categories, split.unused_categories),
        partial(oracle_from, split.annotations) if policy.reads_truth else networks.load_scale_net,
    )


def _own_networks(networks: NetworkSpec, detector: DetectorInfo) -> NetworkFactories:
    return NetworkFactories(partial(networks.load_detector, detector.categories), networks.load_scale_net)


def _baseline(policies: Sequence[Policy]) -> str:
    """Default of `compare_with`: whole, else a policy of its kind, else the first that reads no ground truth."""
    whole = [policy for policy in policies if policy.is_whole]
    honest = [policy for policy in policies if not policy.reads_truth]
    named = [policy for policy in whole if policy.name == "whole"]
    return next(policy.name for policy in (*named, *whole, *honest, *policies))


def write_summary(
    session: Session,
    run: RunFolder,
    figures: Mapping[str, Mapping[str, Any]],
    total: int,
    *,
    name_files: bool = False,
) -> Metrics:
    """Write failures.parquet, the COCO results and metrics.json of a finished run.

    results.json holds the first policy's results, results/NAME.json those of each.

    Args:
        session: the engine.
        run: the run folder; all policies are done.
        figures: policy -> its metrics; speed and cost are added here.
        total: images of the run.
        name_files: give each COCO result the image's file and size, for images without annotations that would.

    Returns:
        The content of metrics.json.
    """
    policies = list(figures)
    failures = run.write_failures(policies)
    for i, policy in enumerate(policies):
        names = [f"results/{policy}.json", *(["results.json"] if i == 0 else [])]
        session.call(write_policy_results, run.uri, policy, names, name_files)
    failed = len(set(failures.column("image_id").to_pylist()))
    document: Metrics = {
        "images": {"total": total, "done": total - failed, "failed": failed},
        "failures": failure_counts(failures),
        "policies": {
            policy: cast(PolicyMetrics, {**figures[policy], **run.speed(policy), **policy_cost(run, policy)})
            for policy in policies
        },
    }
    run.write_json("metrics.json", document)
    return document


def write_report(
    session: Session,
    run: RunFolder,
    *,
    document: Metrics,
    analysis: EvaluationAnalysis | DetectionAnalysis,
    images: Sequence[ImageRecord],
    categories: Mapping[int, str],
    make_pictures: PictureTask,
    progress: ProgressLog,
    pictures: int,
) -> None:
    """Write analysis.json and report.html.

    Args:
        session: the engine; pictures are made outside the driver.
        run: the run folder.
        document: the content of metrics.json.
        analysis: result of `analyse_run` or `analyse_detections`.
        images: all images of the run.
        categories: id -> name.
        make_pictures: makes the pictures.
        progress: the run's recorded progress.
        pictures: the most pictures.
    """
    analysis["throughput"] = progress.points
    run.write_json("analysis.json", analysis)
    by_id = {record.image_id: record for record in images}
    chosen = choose_pictures(analysis["images"], winner_of(document["policies"]) or "", pictures)
    made = session.call(make_pictures, [(by_id[image_id], group) for image_id, group in chosen.items()])
    files = {row["id"]: by_id[row["id"]].file_name for row in analysis["images"]}
    details = {
        **analysis,
        "pictures": made,
        "files": files,
        "categories": dict(categories),
        "failures": _failures(run, document),
        "run": {**run.config(), "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"), "resumed": run.resumed},
    }
    run.write_text("report.html", render_report(document, cast(ReportDetails, details)))


def _failures(run: RunFolder, document: Metrics) -> FailureList:
    """Input of `failures_section`: one row for an image that fails under several policies for the same reason."""
    policies: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in run.failures().to_pylist():
        policies[row["file"], row["stage"], row["reason"]].append(row["policy"])
    counts = Counter((stage, reason) for _, stage, reason in policies)
    reasons: list[FailureCount] = [
        {"stage": stage, "reason": reason, "count": count} for (stage, reason), count in counts.most_common()
    ]
    rows: list[FailureRow] = [
        {"file": file, "stage": stage, "reason": reason, "policies": names}
        for (file, stage, reason), names in list(policies.items())[:_MOST_FAILURES]
    ]
    return {
        "total": document["images"]["failed"],
        "listed": len(policies),
        "reasons": (document.get("failures") or reasons)[:_MOST_FAILURES],
        "rows": rows,
    }
