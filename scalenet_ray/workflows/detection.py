"""Detection in images without ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from scalenet_ray.core.detections import ImageResult
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.models.devices import batch_size_on
from scalenet_ray.models.spec import DetectorInfo, NetworkSpec
from scalenet_ray.report.gallery import PictureTask
from scalenet_ray.runs.analysis import analyse_detections
from scalenet_ray.runs.batch import PolicyRun, Progress
from scalenet_ray.runs.documents import DetectionAnalysis, Metrics
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.inputs import keep_image_ids
from scalenet_ray.runs.local import Session
from scalenet_ray.workflows.image_sets import ImageSet
from scalenet_ray.workflows.run_report import PICTURES, ProgressLog, on_cpu, write_report, write_summary


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
        self.records = keep_image_ids(run, images.images, images.source)
        self._log = ProgressLog(report, run)
        reads_features = session.call(networks.reads_features, [policy])
        factories = replace(_own_networks(networks, detector), reads_features=reads_features)
        start = partial(session.start, policy=policy, networks=factories, open_image=images.open_image)
        self._work = PolicyRun(self.records, policy.name, start, run, self._log, retry_failed=retry_failed)

    def __iter__(self) -> Iterator[ImageResult]:
        """Process the remaining images and yield their results."""
        with self._log:
            yield from self._work

    def conclude(self, pictures: int = PICTURES) -> Metrics:
        """Write the results, metrics and the report, with so many pictures, of a finished run; returns metrics.json."""
        session, run, policy = self._session, self._run, self._policy
        document = write_summary(session, run, {policy.name: {"kind": policy.kind}}, len(self.records), name_files=True)
        document["categories"] = self._detector.categories
        analysis: DetectionAnalysis = session.call(analyse_detections, run.uri, policy.name)
        for row in analysis["found"]["most"]:
            row["file"] = self.records.by_id(row["id"]).file_name
        document["found"] = analysis["found"]
        run.write_json("metrics.json", document)
        looks = [(policy, _own_networks(on_cpu(self._networks), self._detector))]
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


def _own_networks(networks: NetworkSpec, detector: DetectorInfo) -> NetworkFactories:
    return NetworkFactories(
        partial(networks.load_detector, detector.categories),
        networks.load_scale_net,
        batch_size=batch_size_on(networks.device),
    )
