"""The paper's experiment on digits: trained at 14 to 18 pixels, met at any size; without --data on a small version."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import tyro

from scalenet_ray.canvas_report import check_experiment, report_experiment
from scalenet_ray.core import storage
from scalenet_ray.engine.runs import RunFolder
from scalenet_ray.models.canvas_experiment import Experiment
from scalenet_ray.terminal import run_job


@dataclass(frozen=True)
class EvalDigits:
    """The paper's experiment on digits; without --data on scikit-learn's, enlarged.

    Attributes:
        data: MNIST's folder as torchvision lays it out (with MNIST/raw in it); fetched there if it is missing.
        seeds: how often everything is trained and scored.
        held_out: test on so many of the training digits, which are then not trained on: to choose settings.
        ablation: score the recipe "scalenet" with one choice changed at a time; wants --held-out.
        train_limit: only the first so many digits to train on.
        test_limit: only the first so many digits to test on.
        gpus_per_task: a share of a GPU for each training or scoring; 0 for CPUs.
        output: the run folder, local or s3://; by default a new one under runs/eval_digits.
        resume: go on with the run that is in the output folder.
    """

    data: str | None = None
    seeds: int = 3
    held_out: int = 0
    ablation: bool = False
    train_limit: int | None = None
    test_limit: int | None = None
    gpus_per_task: float = 0.0
    output: str | None = None
    resume: bool = False


def main(job: EvalDigits) -> int:
    """Train and score everything; writes config.yaml, units/*.json, weights/, metrics.json and two pictures."""
    check_experiment(job.seeds, job.ablation, job.held_out)
    run = RunFolder(job.output or time.strftime("runs/eval_digits/%Y%m%d-%H%M%S"))
    experiment = Experiment(
        "digits" if job.data is None else "mnist",
        job.data,
        storage.join(run.uri, "weights"),
        job.held_out,
        job.train_limit,
        job.test_limit,
        device="cuda" if job.gpus_per_task else "cpu",
    )
    settings = {name: value for name, value in asdict(job).items() if name not in ("output", "resume", "gpus_per_task")}
    run.begin(settings, resume=job.resume, workers={"gpus_per_task": job.gpus_per_task})
    report_experiment(experiment, run, print, seeds=job.seeds, ablation=job.ablation, gpus_per_task=job.gpus_per_task)
    return 0


if __name__ == "__main__":
    run_job(main, tyro.cli(EvalDigits))
