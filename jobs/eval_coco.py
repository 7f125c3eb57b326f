"""Evaluate ways to zoom with a frozen detector, on any data set in COCO's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from scalenet_ray.commands.arguments import parse_arguments
from scalenet_ray.console import check_retry, difference_table, failure_lines, last_line, policy_table, run_job
from scalenet_ray.core.bounds import MEGAPIXELS, ONE_OR_MORE
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.policy import Policy, check_names, parse_policy, policy_to_dict
from scalenet_ray.data.policy_files import read_policies
from scalenet_ray.engine.session import EngineName, Session
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, DetectorInfo, NetworkSpec
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.resources import Resources
from scalenet_ray.sample.scenes import ensure_sample
from scalenet_ray.workflows import PICTURES, CocoSplit, check_networks, evaluate_policies, open_split, tell_remarks


@dataclass(frozen=True)
class EvalCoco:
    """Evaluate ways to zoom with a frozen detector, on any data set in COCO's layout.

    Without --data it runs on the embedded sample, with its own networks.

    Attributes:
        data: folder or s3:// prefix with SPLIT/ and annotations/instances_SPLIT.json.
        split: which split of it.
        policies: whole, whole@SIZE, pyramid, grid-N, random, first-pass, scalenet, gain, fused, oracle. By default
            whole, grid-2, first-pass, scalenet and oracle: gain in place of scalenet if --scale-net is a scale head,
            neither without --scale-net.
        policy_file: YAML of further policies.
        compare_with: one of the policies; how the others differ from it is measured, with bootstrap intervals. By
            default whole, or the first.
        limit: only the first so many images.
        output: the run folder, local or s3://; by default a new one under runs/eval_coco.
        resume: go on with the run that is in the output folder.
        retry_failed: with --resume: also try those images again that failed before.
        max_failures: images that may fail before the job exits with 1.
        max_image_megapixels: larger images are refused before they are decoded.
        report_pictures: photographs in report.html.
        engine: ray (actors, here or on a cluster) or local (one process).
    """

    data: str | None = None
    split: str = "val2017"
    policies: tuple[str, ...] | None = None
    policy_file: str | None = None
    compare_with: str | None = None
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


def _on_sample(job: EvalCoco) -> EvalCoco:
    networks = replace(
        job.networks,
        detector=job.networks.detector or SAMPLE_DETECTOR,
        scale_net=job.networks.scale_net or SAMPLE_SCALE_NET,
    )
    return replace(job, data=str(ensure_sample(Path("runs/sample"))), networks=networks)


def _named(job: EvalCoco, info: DetectorInfo, names: Sequence[str]) -> list[Policy]:
    return [
        parse_policy(
            name,
            input_side=info.input_side,
            iou_threshold=info.iou_threshold,
            score_threshold=job.networks.score_threshold,
        )
        for name in names
    ]


def _default_policies(job: EvalCoco, info: DetectorInfo, session: Session) -> list[Policy]:
    """What is evaluated if nothing is asked for: one policy of each kind, as far as its network is named."""
    if job.networks.scale_net is None:
        print("no --scale-net: the policy scalenet, which needs one, is left out")
        return _named(job, info, ("whole", "grid-2", "first-pass", "oracle"))
    policies = _named(job, info, ("whole", "grid-2", "first-pass", "scalenet", "oracle"))
    if session.call(job.networks.reads_features, policies):
        # A scale head knows more than classes of scale: what a closer look gains.
        return _named(job, info, ("whole", "grid-2", "first-pass", "gain", "oracle"))
    return policies


def _policies(job: EvalCoco, session: Session, split: CocoSplit) -> list[Policy]:
    info = session.call(job.networks.describe_detector)
    asked = job.policies
    policies = _default_policies(job, info, session) if asked is None else _named(job, info, asked)
    policies += read_policies(job.policy_file) if job.policy_file is not None else []
    check_networks(session, job.networks, check_names(policies), split)
    tell_remarks(split, info.categories, print)
    return policies


def main(job: EvalCoco) -> int:
    """Run all policies, evaluate them, and print one table; the exit status says whether an image was lost."""
    check_retry(job.retry_failed, resume=job.resume)
    job = _on_sample(job) if job.data is None else job
    session = Session(job.engine, job.resources)
    session.call(job.networks.check_device, job.engine == "local")
    split = open_split(session, str(job.data), job.split, limit=job.limit, max_megapixels=job.max_image_megapixels)
    policies = _policies(job, session, split)
    if job.compare_with is not None and job.compare_with not in [policy.name for policy in policies]:
        msg = f"--compare-with must name one of the run's policies, got {job.compare_with!r}"
        raise UserError(msg)
    run = RunFolder.of_job(job.output, "eval_coco", resume=job.resume)
    workers = {"engine": job.engine, "device": job.networks.device, **job.resources.as_settings()}
    options: dict[str, Any] = {"compare_with": job.compare_with, "pictures": job.report_pictures}
    options["retry_failed"] = job.retry_failed
    with run.begin(_settings(job, policies), resume=job.resume, workers=workers):
        document = evaluate_policies(session, run, policies, job.networks, split, print, **options)
    print(policy_table(document))
    if job.compare_with is not None:
        print(difference_table(document))
    print(failure_lines(document), end="")
    line, status = last_line(document, run.uri, job.max_failures)
    print(line)
    return status


def _settings(job: EvalCoco, policies: Sequence[Policy]) -> dict[str, Any]:
    return {
        "data": job.data,
        "split": job.split,
        "limit": job.limit,
        "max_image_megapixels": job.max_image_megapixels,
        "networks": job.networks.settings(),
        "policies": [policy_to_dict(policy) for policy in policies],
    }


if __name__ == "__main__":
    run_job(main, parse_arguments(EvalCoco))
