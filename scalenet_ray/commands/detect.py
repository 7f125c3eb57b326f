"""`scalenet-ray detect`: detect objects in images without ground truth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from scalenet_ray.commands.run_flags import RunFlags
from scalenet_ray.console import end_run, say
from scalenet_ray.core.bounds import ONE_OR_MORE, SHARE
from scalenet_ray.core.detections import SHOWN_SCORE
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.policy import Policy
from scalenet_ray.data import storage
from scalenet_ray.data.categories import classes_named
from scalenet_ray.data.policy_files import set_fields
from scalenet_ray.models.spec import DetectorInfo
from scalenet_ray.report.pictures import SavedPictures
from scalenet_ray.report.text import found_lines, policy_table
from scalenet_ray.runs.export import export_run
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.results import image_results
from scalenet_ray.workflows.detection import DetectionRun
from scalenet_ray.workflows.image_sets import open_images, sample_inputs
from scalenet_ray.workflows.preparation import (
    file_policies,
    named_policies,
    prepare_run,
    settle_workers,
)


@dataclass(frozen=True)
class DetectImages(RunFlags):
    """Detect objects in images without ground truth.

    Without --images: the val split of the embedded sample, with the sample's networks.

    Attributes:
        images: a folder, a glob (quoted), a video, or a Parquet file with a column uri or path; local, s3://,
            gs://, az://, hf:// or https://.
        every: only the first of each so many images or frames of a video.
        policy: regions, whole, whole@SIZE, slices@PIXELS, grid-N, pyramid, random, first-pass, scalenet or
            regions-scalenet.
        policy_file: YAML of one policy, in place of --policy.
        set: fields of the policy to set, e.g. regions.price=0.2 regions.small=48.
        classes: only these of the detector's classes, by name.
        max_detections: boxes of an image that are kept, those that score most.
        save_images: write each image with its boxes to pictures/ in the run folder, from this process.
        save_crops: write each object, cut out, to crops/CLASS/ in the run folder, from this process.
        csv: write detections.csv, a row per object.
        min_score: objects that score less are left out of pictures, crops and the CSV; the other files have all.
    """

    images: str | None = None
    every: Annotated[int, ONE_OR_MORE] = 1
    policy: str = "regions"
    policy_file: str | None = None
    set: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    max_detections: Annotated[int, ONE_OR_MORE] | None = None
    save_images: bool = False
    save_crops: bool = False
    csv: bool = False
    min_score: Annotated[float, SHARE] = SHOWN_SCORE


def _policies(job: DetectImages, detector: DetectorInfo) -> list[Policy]:
    policies = named_policies([job.policy], job.networks, detector, job.smallest_object)
    if job.policy_file is not None:
        policies = file_policies(job.policy_file, job.networks, detector, job.smallest_object)
    if len(policies) != 1:
        msg = f"detection takes one policy, got {', '.join(policy.name for policy in policies)}: leave one in the file"
        raise UserError(msg)
    most = () if job.max_detections is None else (f"merging.max_detections={job.max_detections}",)
    return set_fields(policies, (*job.set, *most))


def main(job: DetectImages) -> int:
    """Detect objects, and write COCO results, Parquet shards and the report. Returns the exit status."""
    if job.images is None:
        data, networks = sample_inputs(job.networks)
        job = replace(job, images=storage.join(data, "val2017"), networks=networks)
    session = job.start()
    images = open_images(
        session, str(job.images), limit=job.limit, max_megapixels=job.max_image_megapixels, every=job.every
    )
    (policy,), detector = prepare_run(session, job.networks, [images], partial(_policies, job), log=say)
    detector = detector._replace(categories=classes_named(detector.categories, job.classes))
    run = RunFolder.of_job(job.output, "detect", resume=job.resume)
    settings = {
        "images": job.images,
        **job.run_settings([policy]),
        **({"classes": list(job.classes)} if job.classes is not None else {}),
        **({"every": job.every} if job.every > 1 else {}),
    }
    job = replace(job, networks=settle_workers(session, job.networks, detector, [policy], images, log=say))
    workers = {"engine": job.engine, "device": job.networks.device, **session.settings}
    with run.begin(settings, resume=job.resume, workers=workers):
        say(f"results go to {run.uri}; its report.html shows the progress")
        detection = DetectionRun(
            session,
            run,
            policy=policy,
            networks=job.networks,
            detector=detector,
            images=images,
            report=say,
            retry_failed=job.retry_failed,
        )
        saved = SavedPictures(
            run.uri,
            images.open_image,
            detector.categories,
            pictures=job.save_images,
            crops=job.save_crops,
            min_score=job.min_score,
        )
        with saved:
            if run.resumed and (job.save_images or job.save_crops):
                for stored in image_results(run, policy.name):
                    saved.add(detection.records.by_id(stored.image_id), stored.hw, stored.detections)
            for result in detection:
                if result.failure is None:
                    saved.add(detection.records.by_id(result.image_id), result.image_hw, result.detections)
        document = detection.conclude(job.report_pictures)
    if job.csv:
        target = storage.join(run.uri, "detections.csv")
        say(session.call(export_run, run.uri, "supervision", policy.name, target, job.min_score))
    if saved.failed:
        file, reason = saved.failed[0]
        say(f"pictures of {len(saved.failed)} images could not be written, the first: {file}: {reason}")
    say(f"{policy_table(document)}\n\n{found_lines(document)}")
    return end_run(document, run.uri, job.max_failures)
