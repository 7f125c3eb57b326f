"""Evaluation of several policies on images with ground truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.data.coco import oracle_from
from scalenet_ray.models.devices import batch_size_on
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.report.charts import policy_plot
from scalenet_ray.report.gallery import PictureTask
from scalenet_ray.runs.analysis import INTERVALS_UP_TO, analyse_run
from scalenet_ray.runs.batch import PolicyRun, Progress
from scalenet_ray.runs.documents import EvaluationAnalysis, Metrics
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.local import Session
from scalenet_ray.runs.summary import evaluate_policy
from scalenet_ray.workflows.image_sets import CocoSplit, with_ground_truth
from scalenet_ray.workflows.run_report import PICTURES, ProgressLog, on_cpu, write_report, write_summary


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
    """Run all policies in order, and evaluate them. Writes metrics.json, analysis.json, policies.svg and report.html.

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
    ids = split.images.ids
    split = with_ground_truth(session, run, split)
    log = ProgressLog(report, run)
    reads_features = session.call(networks.reads_features, policies)
    metrics: dict[str, Any] = {}
    for policy in policies:
        factories = replace(_split_networks(policy, networks, split), reads_features=reads_features)
        start = partial(session.start, policy=policy, networks=factories, open_image=split.open_image)
        with log:
            PolicyRun(split.images, policy.name, start, run, log, retry_failed=retry_failed).finish()
        figures = session.call(evaluate_policy, run.uri, policy.name, split.annotations, ids)
        metrics[policy.name] = {"kind": policy.kind, **figures.pop("bbox"), **figures}
    report("all images are done: comparing what was found, and writing the report")
    document = write_summary(session, run, metrics, len(split.images))
    if split.chosen is not None:
        document["renamed_categories"] = split.chosen.renamed
        document["left_out_categories"] = list(split.chosen.left_out)
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
    looks = [(policy, _split_networks(policy, on_cpu(networks), split)) for policy in policies]
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


def _split_networks(policy: Policy, networks: NetworkSpec, split: CocoSplit) -> NetworkFactories:
    return NetworkFactories(
        partial(networks.load_detector, split.categories, split.unused_categories),
        partial(oracle_from, split.annotations) if policy.reads_truth else networks.load_scale_net,
        batch_size=batch_size_on(networks.device),
    )


def _baseline(policies: Sequence[Policy]) -> str:
    """Default of `compare_with`: whole, else a policy of its kind, else the first that reads no ground truth."""
    whole = [policy for policy in policies if policy.is_whole]
    honest = [policy for policy in policies if not policy.reads_truth]
    named = [policy for policy in whole if policy.name == "whole"]
    return next(policy.name for policy in (*named, *whole, *honest, *policies))
