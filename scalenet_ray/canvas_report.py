"""What eval_digits and eval_cifar do alike: all units of an experiment, its figures, its pictures and its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

from scalenet_ray.canvas_plots import response_plot, steps_plot
from scalenet_ray.core import storage
from scalenet_ray.core.bounds import ONE_OR_MORE
from scalenet_ray.core.errors import UserError
from scalenet_ray.engine.canvas_units import ablations, plan_pictures, plan_units, tabulate
from scalenet_ray.engine.runs import RunFolder
from scalenet_ray.engine.units import run_units
from scalenet_ray.models.canvas_experiment import Experiment
from scalenet_ray.terminal import accuracy_table

__all__ = ["CanvasOptions", "run_experiment"]

_NOT_ITS_RESULTS = ("output", "resume", "gpus_per_task", "seeds")
"""No unit's outcome depends on these: a run may be resumed with others, and so with more seeds."""


@dataclass(frozen=True, kw_only=True)
class CanvasOptions:
    """What can be asked of both.

    Attributes:
        seeds: how often everything is trained and scored; may grow when a run is resumed.
        held_out: test on so many of the training pictures, which are then not trained on: to choose settings.
        ablation: score the recipe "scalenet" with one choice changed at a time; wants --held-out.
        train_limit: only the first so many pictures to train on.
        test_limit: only the first so many pictures to test on.
        mixed_precision: compute in bfloat16 what bears it; twice as fast where the hardware knows it.
        gpus_per_task: a share of a GPU for each training or scoring; 0 for CPUs.
        output: the run folder, local or s3://; by default a new one under runs.
        resume: go on with the run that is in the output folder.
    """

    seeds: int = 3
    held_out: int = 0
    ablation: bool = False
    train_limit: Annotated[int, ONE_OR_MORE] | None = None
    test_limit: Annotated[int, ONE_OR_MORE] | None = None
    mixed_precision: bool = False
    gpus_per_task: float = 0.0
    output: str | None = None
    resume: bool = False


def run_experiment(
    options: CanvasOptions, name: str, data: str | None, say: Callable[[str], None], *, width: float | None = None
) -> None:
    """Do what is not done yet; writes config.yaml, units/*.json, weights/, metrics.json and *.svg.

    Args:
        options: from the command line, the job's own among them.
        name: of the data: mnist, cifar10 or digits.
        data: its folder; None for digits.
        say: takes a line for the person who waits.
        width: of the first classifier's layers; the domain's own by default.

    Raises:
        UserError: if there is no seed, or settings would be chosen on the test set.
    """
    if options.seeds < 1:
        msg = f"--seeds must be 1 or more, got {options.seeds}"
        raise UserError(msg)
    if options.ablation and not options.held_out:
        msg = "--ablation chooses settings, which the test set must not: add --held-out, e.g. --held-out 5000"
        raise UserError(msg)
    run = RunFolder.of_job(options.output, f"eval_{name}", resume=options.resume)
    settings = {key: value for key, value in asdict(options).items() if key not in _NOT_ITS_RESULTS}
    others = {"gpus_per_task": options.gpus_per_task, "seeds": options.seeds}
    with run.begin(settings, resume=options.resume, workers=others):
        experiment = Experiment(
            name,
            data,
            storage.join(run.uri, "weights"),
            options.held_out,
            options.train_limit,
            options.test_limit,
            width,
            device="cuda" if options.gpus_per_task else "cpu",
            mixed_precision=options.mixed_precision,
        )
        # Here, so that what is missing is fetched and unpacked once.
        learned, tested = len(experiment.learned().labels), len(experiment.tested().labels)
        recipe = experiment.domain.recipes["scalenet"]
        recipes = ablations(recipe) if options.ablation else experiment.domain.recipes
        units = plan_units(experiment, recipes, range(options.seeds))
        if not options.ablation:
            units += plan_pictures(experiment, recipe, "net-s0")
        outcomes = run_units(units, run, say, gpus=options.gpus_per_task)
        scores = tabulate(outcomes)
        run.write_json(
            "metrics.json", {name: scores, "trained_on": learned, "tested_on": tested, "seeds": options.seeds}
        )
        if not options.ablation:
            run.write_text("response.svg", response_plot(outcomes["response"]))
            run.write_text("steps.svg", steps_plot(outcomes["steps"]))
    say(accuracy_table(scores))
    say(f"trained on {learned}, tested on {tested} pictures, {options.seeds} seeds; results in {run.uri}")
