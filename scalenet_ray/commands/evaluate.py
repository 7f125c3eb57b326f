"""`scalenet-ray eval`: evaluate policies on an annotated data set."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated

import tyro

from scalenet_ray.commands.data_flags import AnnotatedData
from scalenet_ray.commands.run_flags import RunFlags
from scalenet_ray.console import end_run, say
from scalenet_ray.core.errors import UserError
from scalenet_ray.data.categories import CategoryChoice
from scalenet_ray.report.text import difference_table, policy_table
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.workflows.evaluation import evaluate_policies
from scalenet_ray.workflows.image_sets import open_split, sample_inputs
from scalenet_ray.workflows.preparation import choose_policies, prepare_run, settle_workers


@dataclass(frozen=True)
class EvalCoco(RunFlags, AnnotatedData):
    """Evaluate policies with a frozen detector on an annotated data set.

    Without --data: the embedded sample, with the sample's networks.

    Attributes:
        split: the split to evaluate on. The embedded sample has train2017, val2017 and large2017.
        policies: regions, whole, whole@SIZE, slices@PIXELS, grid-N, pyramid, random, first-pass, scalenet, oracle,
            regions-scalenet, regions-oracle, paper. By default whole, grid-2, regions, scalenet and regions-oracle,
            without scalenet if there is no --scale-net.
        policy_file: YAML of further policies.
        set: fields of the policies to set, e.g. recursion.price=0.5 or regions.small=48: of those that use them.
        compare_with: the policy that the others are compared with, with bootstrap intervals. By default whole, or the
            first.
    """

    split: str = "val2017"
    policies: tuple[str, ...] | None = None
    policy_file: str | None = None
    set: tuple[str, ...] = ()
    compare_with: str | None = None
    categories: Annotated[CategoryChoice, tyro.conf.OmitArgPrefixes] = field(default_factory=CategoryChoice)


def main(job: EvalCoco) -> int:
    """Run and evaluate all policies, and print their metrics as a table. Returns the exit status."""
    if job.is_sample:
        data, networks = sample_inputs(job.networks)
        job = replace(job, data=data, networks=networks)
    session = job.start()
    split = open_split(
        session,
        job.split,
        **job.named(),
        limit=job.limit,
        max_megapixels=job.max_image_megapixels,
        networks=job.networks,
        choice=job.categories,
        log=say,
    )
    choose = partial(
        choose_policies,
        job.networks,
        names=job.policies,
        policy_file=job.policy_file,
        smallest_object=job.smallest_object,
        settings=job.set,
        log=say,
    )
    policies, detector = prepare_run(session, job.networks, [split], choose, log=say)
    if job.compare_with is not None and job.compare_with not in [policy.name for policy in policies]:
        msg = f"--compare-with must name one of the run's policies, got {job.compare_with!r}"
        raise UserError(msg)
    run = RunFolder.of_job(job.output, "eval_coco", resume=job.resume)
    job = replace(job, networks=settle_workers(session, job.networks, detector, policies, split, log=say))
    workers = {"engine": job.engine, "device": job.networks.device, **session.settings}
    settings = {
        **job.named(),
        "split": job.split,
        **job.run_settings(policies),
        **({"categories": asdict(job.categories)} if job.categories.is_made else {}),
    }
    with run.begin(settings, resume=job.resume, workers=workers):
        say(f"results go to {run.uri}; its report.html shows the progress")
        document = evaluate_policies(
            session,
            run,
            policies=policies,
            networks=job.networks,
            split=split,
            report=say,
            compare_with=job.compare_with,
            pictures=job.report_pictures,
            retry_failed=job.retry_failed,
        )
    say(policy_table(document))
    if job.compare_with is not None:
        say(difference_table(document))
    return end_run(document, run.uri, job.max_failures)
