"""Tune the recursion on one split of a data set in COCO's layout, and report on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from scalenet_ray.commands.arguments import parse_arguments
from scalenet_ray.console import difference_table, failure_lines, last_line, policy_table, run_job, trial_table
from scalenet_ray.core.bounds import MEGAPIXELS, ONE_OR_MORE
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.policy import Policy, check_names, parse_policy, policy_to_dict
from scalenet_ray.data import storage
from scalenet_ray.data.policy_files import SearchSpace, check_values, read_space
from scalenet_ray.engine.session import Session
from scalenet_ray.engine.trial import TrialSettings
from scalenet_ray.engine.tune import Sweep, best_policies, best_trials, run_sweep, start_trials
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkSpec
from scalenet_ray.report.charts import front_plot
from scalenet_ray.report.sweep import contenders_of, render_sweep, sweep_verdict
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.resources import Resources
from scalenet_ray.sample.scenes import ensure_sample
from scalenet_ray.workflows import CocoSplit, check_networks, check_split, evaluate_policies, open_split, tell_remarks

SPACE = Path(__file__).with_name("tune_recursion.yaml")
_MOST_STEPS = 10


@dataclass(frozen=True)
class TuneRecursion:
    """Tune the recursion on one split of a data set in COCO's layout, and report on another.

    Without --data it runs on the embedded sample, with its own networks.

    Attributes:
        data: folder or s3:// prefix with SPLIT/ and annotations/instances_SPLIT.json for both splits.
        split: which split to tune on.
        report_split: which split to report on.
        space: YAML of what may change.
        ceiling: find the most AP_small at so many detector passes an image or fewer; none: the front of both.
        limit: tune on the first so many images only.
        subsets: shares of the images that a trial ends its steps at; what does badly is stopped there.
        output: the run folder, local or s3://; by default a new one under runs/tune_recursion.
        resume: go on with the sweep that is in the output folder.
        max_failures: images that may fail in the report before the job exits with 1.
        max_image_megapixels: larger images are refused before they are decoded.
    """

    data: str | None = None
    split: str = "train2017"
    report_split: str = "val2017"
    space: str = str(SPACE)
    ceiling: float | None = 2.5
    limit: Annotated[int, ONE_OR_MORE] | None = None
    subsets: tuple[float, ...] = (0.25, 0.5, 1.0)
    output: str | None = None
    resume: bool = False
    max_failures: int = 0
    max_image_megapixels: Annotated[float, MEGAPIXELS] = 200.0
    sweep: Annotated[Sweep, tyro.conf.OmitArgPrefixes] = field(default_factory=Sweep)
    networks: Annotated[NetworkSpec, tyro.conf.OmitArgPrefixes] = field(default_factory=NetworkSpec)
    resources: Annotated[Resources, tyro.conf.OmitArgPrefixes] = field(default_factory=Resources)


def _on_sample(job: TuneRecursion) -> TuneRecursion:
    networks = replace(
        job.networks,
        detector=job.networks.detector or SAMPLE_DETECTOR,
        scale_net=job.networks.scale_net or SAMPLE_SCALE_NET,
    )
    return replace(job, data=str(ensure_sample(Path("runs/sample"))), networks=networks)


def _start_policies(
    job: TuneRecursion, space: SearchSpace, session: Session, splits: Sequence[CocoSplit]
) -> list[Policy]:
    info = session.call(job.networks.describe_detector)
    policies = check_names(
        [
            parse_policy(
                name,
                input_side=info.input_side,
                iou_threshold=info.iou_threshold,
                score_threshold=job.networks.score_threshold,
            )
            for name in space.policies
        ]
    )
    knowing = [policy.name for policy in policies if policy.reads_truth]
    if knowing:
        msg = f"a sweep tunes policies that read no ground truth, got {', '.join(knowing)}: leave it out of {job.space}"
        raise UserError(msg)
    check_values(space, policies)
    for split in splits:
        check_networks(session, job.networks, policies, split)
        tell_remarks(split, info.categories, print)
    return policies


def _task(job: TuneRecursion, policies: list[Policy], split: CocoSplit) -> TrialSettings:
    shares = job.subsets
    if (
        not shares
        or list(shares) != sorted(set(shares))
        or not shares[0] > 0
        or shares[-1] != 1
        or len(shares) > _MOST_STEPS
    ):
        wanted = f"at most {_MOST_STEPS} growing shares of the images that end at 1, e.g. 0.25 0.5 1"
        msg = f"--subsets must be {wanted}, got {list(shares)}"
        raise UserError(msg)
    if job.ceiling is not None and job.ceiling < 1:
        msg = f"--ceiling must be 1 pass an image, which the whole image takes, or more, got {job.ceiling}"
        raise UserError(msg)
    sizes = sorted({max(1, round(share * len(split.images))) for share in shares})
    return TrialSettings(
        {policy.name: policy for policy in policies},
        job.networks,
        split.annotations,
        split.folder,
        tuple(sizes),
        job.ceiling,
        split.max_pixels,
    )


def main(job: TuneRecursion) -> int:
    """Tune, then report; writes trials.json, front.svg, report.html, best.yaml, tune/ for TensorBoard, and report/."""
    job = _on_sample(job) if job.data is None else job
    space = read_space(job.space)
    session = Session("ray", job.resources)
    session.call(job.networks.check_device, False)
    limits: dict[str, Any] = {"max_megapixels": job.max_image_megapixels}
    tuned_on = open_split(session, str(job.data), job.split, limit=job.limit, **limits)
    # Both before the first trial: what is wrong with the other split must not come after all the work.
    reported_on = open_split(session, str(job.data), job.report_split, limit=None, **limits)
    policies = _start_policies(job, space, session, [tuned_on, reported_on])
    task = _task(job, policies, tuned_on)
    run = RunFolder.of_job(job.output, "tune_recursion", resume=job.resume)
    workers = {"device": job.networks.device, **job.resources.as_settings()}
    with run.begin(_settings(job, space, policies), resume=job.resume, workers=workers):
        check_split(session, run, tuned_on)
        run.standing = "the trials that ended are kept"
        rows = run_sweep(space, task, job.sweep, run.uri, print, resume=job.resume)
        run.write_json("trials.json", rows)
        run.write_text("front.svg", front_plot(rows, job.ceiling))
        run.write_text("report.html", render_sweep(rows, job.ceiling))
        print(trial_table(rows))
        best, starts, found = best_policies(rows, task), start_trials(rows, task, space), best_trials(rows, task)
        run.write_text("best.yaml", yaml.safe_dump([policy_to_dict(policy) for policy in best], sort_keys=False))

    report = RunFolder(storage.join(run.uri, "report"), run.uri)
    contenders = [*policies, *best]
    settings = {
        "data": job.data,
        "split": job.report_split,
        "networks": job.networks.settings(),
        "policies": [policy_to_dict(policy) for policy in contenders],
    }
    with report.begin(settings, resume=job.resume, workers=workers):
        document = evaluate_policies(
            session, report, contenders, job.networks, reported_on, print, compare_with=policies[0].name
        )
    print(f"tuned on {job.split}, {len(tuned_on.images)} images; on {job.report_split}:")
    print(policy_table(document))
    print(difference_table(document))
    splits, contenders = (job.split, job.report_split), contenders_of(starts, found, document)
    run.write_text("report.html", render_sweep(rows, job.ceiling, contenders, splits))
    for line in sweep_verdict(contenders, job.ceiling, splits):
        print(line)
    print(f"the best policy: {storage.join(run.uri, 'best.yaml')}, for --policy-file")
    print(failure_lines(document), end="")
    line, status = last_line(document, report.uri, job.max_failures)
    print(line)
    return status


def _settings(job: TuneRecursion, space: SearchSpace, policies: list[Policy]) -> dict[str, Any]:
    settings = {
        name: value
        for name, value in asdict(job).items()
        if name not in ("output", "resume", "resources", "space", "max_failures", "sweep")
    }
    return {
        **settings,
        "networks": job.networks.settings(),
        "sweep": {"searcher": job.sweep.searcher, "trials": job.sweep.trials, "seed": job.sweep.seed},
        "space": {path: list(value) for path, value in space.fields.items()},
        "policies": [policy_to_dict(policy) for policy in policies],
    }


if __name__ == "__main__":
    run_job(main, parse_arguments(TuneRecursion))
