"""`scalenet-ray tune`: tune the recursion on one split of a data set, and report on another."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from scalenet_ray.commands.data_flags import AnnotatedData
from scalenet_ray.console import end_run, say
from scalenet_ray.core.bounds import MEGAPIXELS, ONE_OR_MORE
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.policy_form import check_names, policy_to_dict
from scalenet_ray.data import storage
from scalenet_ray.data.categories import CategoryChoice
from scalenet_ray.data.policy_files import SearchSpace, check_values, read_space
from scalenet_ray.engine.trial import STARTS, TrialSettings, evaluate_starts, read_starts, start_ceilings
from scalenet_ray.engine.tune import Sweep, best_policies, best_trials, check_searcher, open_cache, run_sweep
from scalenet_ray.models.spec import DetectorInfo, NetworkSpec
from scalenet_ray.report.charts import front_plot
from scalenet_ray.report.sweep import contenders_of, render_sweep, sweep_verdict
from scalenet_ray.report.text import difference_table, policy_table, trial_table
from scalenet_ray.runs.documents import Starts
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.local import Session
from scalenet_ray.runs.resources import ResourceChoice
from scalenet_ray.workflows.evaluation import evaluate_policies
from scalenet_ray.workflows.image_sets import (
    CocoSplit,
    open_split,
    sample_inputs,
    with_ground_truth,
)
from scalenet_ray.workflows.preparation import named_policies, prepare_run, settle_workers, start_session

SPACE = Path(__file__).with_name("tune_recursion.yaml")
"""The default search space."""

_MOST_STEPS = 10


@dataclass(frozen=True)
class TuneRecursion(AnnotatedData):
    """Tune the recursion on one split of an annotated data set, and report on another.

    Without --data: the embedded sample, with the sample's networks.

    Attributes:
        split: the split to tune on.
        report_split: the split to report on.
        space: YAML of the search space: policies, and the fields to vary.
        ceiling: maximise AP_small at no more detector passes an image than this. start: than the policies of the space
            take as they are, the dearest of them; none: the Pareto front of both.
        limit: tune on the first so many images only.
        subsets: growing shares of the images; after each, trials that do badly are stopped.
        output: the run folder, local, s3://, gs:// or az://; by default a new one under runs/tune_recursion.
        resume: continue the sweep in the output folder.
        max_failures: images that may fail in the report before the exit status is 1.
        max_image_megapixels: larger images are refused before they are decoded, except TIFFs that are read by window.
    """

    split: str = "train2017"
    report_split: str = "val2017"
    space: str = str(SPACE)
    ceiling: float | Literal["start"] | None = "start"
    limit: Annotated[int, ONE_OR_MORE] | None = None
    subsets: tuple[float, ...] = (0.25, 0.5, 1.0)
    output: str | None = None
    resume: bool = False
    max_failures: int = 0
    max_image_megapixels: Annotated[float, MEGAPIXELS] = 200.0
    sweep: Annotated[Sweep, tyro.conf.OmitArgPrefixes] = field(default_factory=Sweep)
    categories: Annotated[CategoryChoice, tyro.conf.OmitArgPrefixes] = field(default_factory=CategoryChoice)
    networks: Annotated[NetworkSpec, tyro.conf.OmitArgPrefixes] = field(default_factory=NetworkSpec)
    resources: Annotated[ResourceChoice, tyro.conf.OmitArgPrefixes] = field(default_factory=ResourceChoice)


def _policies(job: TuneRecursion, space: SearchSpace, detector: DetectorInfo) -> list[Policy]:
    policies = check_names(named_policies(space.policies, job.networks, detector))
    if oracles := [policy.name for policy in policies if policy.reads_truth]:
        msg = f"a sweep tunes policies that read no ground truth, got {', '.join(oracles)}: leave it out of {job.space}"
        raise UserError(msg)
    check_values(space, policies)
    return policies


def _check_steps(job: TuneRecursion) -> None:
    """Refuse shares of the images that do not grow to 1, and a ceiling below 1; raises `UserError`."""
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
    if isinstance(job.ceiling, float | int) and job.ceiling < 1:
        msg = f"--ceiling must be 1 pass an image, which the whole image takes, or more, got {job.ceiling}"
        raise UserError(msg)


def _task(job: TuneRecursion, policies: list[Policy], split: CocoSplit) -> TrialSettings:
    sizes = sorted({max(1, round(share * len(split.images))) for share in job.subsets})
    ceilings = (float(job.ceiling),) * len(sizes) if isinstance(job.ceiling, float | int) else None
    return TrialSettings(
        {policy.name: policy for policy in policies},
        job.networks,
        split.annotations,
        split.folder,
        tuple(sizes),
        ceilings,
        split.max_pixels,
    )


def _evaluated_starts(job: TuneRecursion, run: RunFolder, task: TrialSettings, cache_actor: Any) -> Starts:
    """The starting policies on all images, and the ceilings; a resumed sweep keeps those that it began with."""
    starts = read_starts(run.uri) if job.resume else None
    if starts is None:
        say("evaluating the policies that the sweep starts from")
        policies = evaluate_starts(task, cache_actor, job.sweep.at_once)
        given = None if task.ceilings is None else list(task.ceilings)
        ceilings = start_ceilings(policies) if job.ceiling == "start" else given
        starts = Starts(ceilings=ceilings, policies=policies)
        run.write_json(STARTS, starts)
    for name, steps in starts["policies"].items():
        last = steps[-1]
        say(f"{name}: AP_small {last['AP_small']:.1f} at {last['passes']:.2f} passes on {last['images']} images")
    if starts["ceilings"] is None:
        say("no ceiling: the sweep searches the front of AP_small and passes")
    else:
        dearest = max(starts["policies"], key=lambda name: starts["policies"][name][-1]["passes"])
        source = f"what {dearest} takes on {job.split}" if job.ceiling == "start" else "from --ceiling"
        say(f"ceiling: {starts['ceilings'][-1]:g} detector passes an image, {source}")
    return starts


def _open_splits(job: TuneRecursion, session: Session) -> list[CocoSplit]:
    """The split to tune on, and that to report on: an error in the latter must not come after the sweep."""
    if job.annotations is not None and "{split}" not in job.annotations:
        msg = f"--annotations must name two splits, as in 'labels/{{split}}.json', got {job.annotations}: add {{split}}"
        raise UserError(msg)
    opened = partial(
        open_split,
        session,
        **job.named(),
        max_megapixels=job.max_image_megapixels,
        networks=job.networks,
        choice=job.categories,
        log=say,
    )
    return [opened(job.split, limit=job.limit), opened(job.report_split, limit=None)]


def main(job: TuneRecursion) -> int:
    """Tune, then evaluate the best policies on the other split. Returns the exit status.

    Writes starts.json, trials.json, front.svg, report.html, best.yaml, tune/ for TensorBoard, study.log for
    optuna-dashboard, and report/.
    """
    RunFolder.check_output(job.output, resume=job.resume)
    _check_steps(job)
    space = read_space(job.space)
    check_searcher(space, job.sweep)
    if job.is_sample:
        data, networks = sample_inputs(job.networks)
        job = replace(job, data=data, networks=networks)
    session = start_session("ray", job.resources, job.networks)
    say("checking the images and the networks")
    splits = tuned_on, reported_on = _open_splits(job, session)
    policies, detector = prepare_run(session, job.networks, splits, partial(_policies, job, space), log=say)
    job = replace(job, networks=settle_workers(session, job.networks, detector, policies, tuned_on, log=say))
    task = _task(job, policies, tuned_on)
    run = RunFolder.of_job(job.output, "tune_recursion", resume=job.resume)
    workers = {"device": job.networks.device, **session.settings}
    with run.begin(_settings(job, space, policies), resume=job.resume, workers=workers):
        tuned_on = with_ground_truth(session, run, tuned_on)
        task = replace(task, annotations=tuned_on.annotations)
        cache_actor = open_cache(job.sweep)
        starts = _evaluated_starts(job, run, task, cache_actor)
        task = replace(task, ceilings=None if starts["ceilings"] is None else tuple(starts["ceilings"]))
        run.standing = "the trials that ended are kept"
        rows = run_sweep(space, task, job.sweep, run.uri, say, cache_actor=cache_actor, resume=job.resume)
        run.write_json("trials.json", rows)
        run.write_text("front.svg", front_plot(rows, task.ceiling))
        run.write_text("report.html", render_sweep(rows, task.ceiling))
        say(trial_table(rows))
        best, found = best_policies(rows, task), best_trials(rows, task)
        run.write_text("best.yaml", yaml.safe_dump([policy_to_dict(policy) for policy in best], sort_keys=False))

    report = RunFolder(storage.join(run.uri, "report"), run.uri)
    contenders = [*policies, *best]
    with report.begin(_report_settings(job, contenders), resume=job.resume, workers=workers):
        document = evaluate_policies(
            session,
            report,
            policies=contenders,
            networks=job.networks,
            split=reported_on,
            report=say,
            compare_with=policies[0].name,
        )
    say(f"tuned on {job.split}, {len(tuned_on.images)} images; on {job.report_split}:")
    say(policy_table(document))
    say(difference_table(document))
    began = {name: steps[-1] for name, steps in starts["policies"].items()}
    names, compared = (job.split, job.report_split), contenders_of(began, found, document)
    run.write_text("report.html", render_sweep(rows, task.ceiling, compared, names, run.config()))
    for line in sweep_verdict(compared, task.ceiling, names):
        say(line)
    say(f"the best policy: {storage.join(run.uri, 'best.yaml')}, for --policy-file")
    return end_run(document, report.uri, job.max_failures)


def _report_settings(job: TuneRecursion, policies: list[Policy]) -> dict[str, Any]:
    return {
        **job.named(),
        "split": job.report_split,
        "networks": job.networks.settings(),
        "policies": [policy_to_dict(policy) for policy in policies],
    }


def _settings(job: TuneRecursion, space: SearchSpace, policies: list[Policy]) -> dict[str, Any]:
    settings = {
        name: value
        for name, value in asdict(job).items()
        if name not in ("output", "resume", "resources", "space", "max_failures", "sweep")
        and (name != "categories" or job.categories.is_made)
    }
    return {
        **settings,
        "networks": job.networks.settings(),
        "sweep": {"searcher": job.sweep.searcher, "trials": job.sweep.trials, "seed": job.sweep.seed},
        "space": {path: list(value) for path, value in space.fields.items()},
        "policies": [policy_to_dict(policy) for policy in policies],
    }
