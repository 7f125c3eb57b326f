"""Detect over any pile of images: a folder, a glob, an S3 prefix, or a Parquet file of addresses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from scalenet_ray.commands.arguments import parse_arguments
from scalenet_ray.console import check_retry, failure_lines, found_lines, last_line, policy_table, run_job
from scalenet_ray.core.answers import MOST_FAILED
from scalenet_ray.core.bounds import MEGAPIXELS, ONE_OR_MORE
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.inference import NetworkFactories
from scalenet_ray.core.policy import Policy, check_names, parse_policy, policy_to_dict
from scalenet_ray.data.coco import FoundImages, find_images
from scalenet_ray.data.policy_files import read_policies
from scalenet_ray.engine.session import EngineName, Session
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, DetectorInfo, NetworkSpec
from scalenet_ray.report.gallery import PictureTask
from scalenet_ray.runs.analysis import analyse_detections
from scalenet_ray.runs.batch import image_opener, run_policy
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.inputs import keep_image_ids
from scalenet_ray.runs.resources import Resources
from scalenet_ray.sample.scenes import ensure_sample
from scalenet_ray.workflows import PICTURES, ProgressLog, write_report, write_summary


@dataclass(frozen=True)
class DetectImages:
    """Detect over any pile of images, without ground truth.

    Without --images it runs on the embedded sample's val split, with its own networks.

    Attributes:
        images: a folder, a glob (quoted), an s3:// prefix, or a Parquet file with a column uri or path.
        policy: whole, whole@SIZE, pyramid, grid-N, random, first-pass, scalenet, gain or fused.
        policy_file: YAML of one policy, in place of --policy.
        limit: only the first so many images.
        output: the run folder, local or s3://; by default a new one under runs/detect.
        resume: go on with the run that is in the output folder; images are known by their files.
        retry_failed: with --resume: also try those images again that failed before.
        max_failures: images that may fail before the job exits with 1.
        max_image_megapixels: larger images are refused before they are decoded.
        report_pictures: photographs in report.html.
        engine: ray (actors, here or on a cluster) or local (one process).
    """

    images: str | None = None
    policy: str = "first-pass"
    policy_file: str | None = None
    limit: Annotated[int, ONE_OR_MORE] | None = None
    output: str | None = None
    resume: bool = False
    retry_failed: bool = False
    max_failures: int = 0
    max_image_megapixels: Annotated[float, MEGAPIXELS] = 200.0
    report_pictures: int = PICTURES
    engine: EngineName = "ray"
    networks: Annotated[NetworkSpec, tyro.conf.OmitArgPrefixes] = field(default_factory=NetworkSpec)
    resources: Annotated[Resources, tyro.conf.OmitArgPrefixes] = field(default_factory=Resources)


def _on_sample(job: DetectImages) -> DetectImages:
    detector = job.networks.detector or SAMPLE_DETECTOR
    scale_net = job.networks.scale_net or SAMPLE_SCALE_NET
    networks = replace(job.networks, detector=detector, scale_net=scale_net)
    return replace(job, images=str(ensure_sample(Path("runs/sample")) / "val2017"), networks=networks)


def _policy(job: DetectImages, info: DetectorInfo) -> Policy:
    named = parse_policy(
        job.policy,
        input_side=info.input_side,
        iou_threshold=info.iou_threshold,
        score_threshold=job.networks.score_threshold,
    )
    policies = check_names(read_policies(job.policy_file) if job.policy_file is not None else [named])
    if len(policies) != 1 or policies[0].reads_truth:
        msg = f"detection takes one policy and has no ground truth, got {', '.join(p.name for p in policies)}"
        raise UserError(msg)
    return policies[0]


def _networks(names: NetworkSpec, info: DetectorInfo) -> NetworkFactories:
    return NetworkFactories(partial(names.load_detector, info.categories), names.load_scale_net)


def main(job: DetectImages) -> int:
    """Detect, and write COCO results and Parquet; the exit status says whether an image was lost."""
    check_retry(job.retry_failed, resume=job.resume)
    job = _on_sample(job) if job.images is None else job
    session = Session(job.engine, job.resources)
    session.call(job.networks.check_device, job.engine == "local")
    found: FoundImages = session.call(find_images, str(job.images))
    images = found.records[: job.limit]
    for remark in found.remarks:
        print(f"{job.images}: {remark}")
    info = session.call(job.networks.describe_detector)
    policy = _policy(job, info)
    open_image = image_opener(None, round(job.max_image_megapixels * 1e6))
    session.call(job.networks.check, [policy], info.categories, (), images[:MOST_FAILED], open_image)
    run = RunFolder.of_job(job.output, "detect", resume=job.resume)
    settings = {
        "images": job.images,
        "limit": job.limit,
        "max_image_megapixels": job.max_image_megapixels,
        "networks": job.networks.settings(),
        "policies": [policy_to_dict(policy)],
    }
    workers = {"engine": job.engine, "device": job.networks.device, **job.resources.as_settings()}
    with run.begin(settings, resume=job.resume, workers=workers):
        images = keep_image_ids(run, images, str(job.images), policy.name)
        log = ProgressLog(print)
        reads_features = session.call(job.networks.reads_features, [policy])
        networks = replace(_networks(job.networks, info), reads_features=reads_features)
        start = partial(session.start, policy=policy, networks=networks, open_image=open_image)
        run_policy(images, policy.name, start, run, log, retry_failed=job.retry_failed)
        document = write_summary(session, run, {policy.name: {"kind": policy.kind}}, len(images))
        document["categories"] = info.categories
        ids = [record.image_id for record in images]
        analysis = session.call(analyse_detections, run.uri, policy.name, ids)
        document["found"] = analysis["found"]
        run.write_json("metrics.json", document)
        # A task of the engine has no GPU of its own, and a few looks need none. Most CPUs only imitate bfloat16.
        on_cpu = replace(job.networks, device="cpu", mixed_precision=False)
        task = PictureTask(run.uri, [(policy, _networks(on_cpu, info))], open_image)
        write_report(session, run, document, analysis, images, info.categories, task, log, job.report_pictures)
    print(policy_table(document))
    print(found_lines(document))
    print(failure_lines(document), end="")
    line, status = last_line(document, run.uri, job.max_failures)
    print(line)
    return status


if __name__ == "__main__":
    run_job(main, parse_arguments(DetectImages))
