"""The paper's experiment on digits: trained at 14 to 18 pixels, met at any size; without --data on a small version."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import tyro

from scalenet_ray.canvas_plots import response_plot, steps_plot
from scalenet_ray.core import storage
from scalenet_ray.engine.canvas_units import ablations, plan_pictures, plan_units, tabulate
from scalenet_ray.engine.runs import RunFolder
from scalenet_ray.engine.units import run_units
from scalenet_ray.models.canvas_experiment import Experiment
from scalenet_ray.terminal import accuracy_table, run_job


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
    """Train and score everything, and write config.yaml, units/*.json, weights/, metrics.json and the pictures."""
    if job.seeds < 1:
        msg = f"--seeds must be 1 or more, got {job.seeds}"
        raise ValueError(msg)
    if job.ablation and not job.held_out:
        msg = "--ablation chooses settings, which the test set must not: add --held-out, e.g. --held-out 5000"
        raise ValueError(msg)
    run = RunFolder(job.output or time.strftime("runs/eval_digits/%Y%m%d-%H%M%S"))
    experiment = Experiment(
        "digits" if job.data is None else "mnist",
        job.data,
        storage.join(run.uri, "weights"),
        job.held_out,
        job.train_limit,
        job.test_limit,
        "cuda" if job.gpus_per_task else "cpu",
    )
    # Here, so that what is missing is fetched and unpacked once.
    learned, tested = len(experiment.learned().labels), len(experiment.tested().labels)
    settings = {name: value for name, value in asdict(job).items() if name not in ("output", "resume", "gpus_per_task")}
    run.begin(settings, resume=job.resume, workers={"gpus_per_task": job.gpus_per_task})
    recipe = experiment.domain.recipes["scalenet"]
    recipes = ablations(recipe) if job.ablation else experiment.domain.recipes
    units = plan_units(experiment, recipes, range(job.seeds))
    if not job.ablation:
        units += plan_pictures(experiment, recipe, "net-s0")
    outcomes = run_units(units, run, print, gpus=job.gpus_per_task)
    scores = tabulate(outcomes)
    facts = {"trained_on": learned, "tested_on": tested, "seeds": job.seeds}
    run.write_json("metrics.json", {experiment.name: scores, **facts})
    if not job.ablation:
        run.write_text("response.svg", response_plot(outcomes["response"]))
        run.write_text("steps.svg", steps_plot(outcomes["steps"]))
    print(accuracy_table(scores))
    print(f"trained on {learned}, tested on {tested} digits, {job.seeds} seeds; results in {run.uri}")
    return 0


if __name__ == "__main__":
    run_job(main, tyro.cli(EvalDigits))
