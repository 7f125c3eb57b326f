"""What eval_digits and eval_cifar do alike: all units of an experiment, its figures, its pictures and its table."""

from __future__ import annotations

from collections.abc import Callable

from scalenet_ray.canvas_plots import response_plot, steps_plot
from scalenet_ray.engine.canvas_units import ablations, plan_pictures, plan_units, tabulate
from scalenet_ray.engine.runs import RunFolder
from scalenet_ray.engine.units import run_units
from scalenet_ray.models.canvas_experiment import Experiment
from scalenet_ray.terminal import accuracy_table

__all__ = ["check_experiment", "report_experiment"]


def check_experiment(seeds: int, ablation: bool, held_out: int) -> None:
    """Refuse what cannot be asked for.

    Raises:
        ValueError: if there is no seed, or settings would be chosen on the test set.
    """
    if seeds < 1:
        msg = f"--seeds must be 1 or more, got {seeds}"
        raise ValueError(msg)
    if ablation and not held_out:
        msg = "--ablation chooses settings, which the test set must not: add --held-out, e.g. --held-out 5000"
        raise ValueError(msg)


def report_experiment(
    experiment: Experiment,
    run: RunFolder,
    say: Callable[[str], None],
    *,
    seeds: int,
    ablation: bool,
    gpus_per_task: float,
) -> None:
    """Do what is not done yet, and write metrics.json, response.svg and steps.svg.

    Args:
        experiment: what is worked on.
        run: the run folder, begun.
        say: takes a line for the person who waits.
        seeds: how often everything is trained and scored.
        ablation: score the recipe "scalenet" with one choice changed at a time, and nothing else.
        gpus_per_task: a share of a GPU for each unit.
    """
    # Here, so that what is missing is fetched and unpacked once.
    learned, tested = len(experiment.learned().labels), len(experiment.tested().labels)
    recipe = experiment.domain.recipes["scalenet"]
    recipes = ablations(recipe) if ablation else experiment.domain.recipes
    units = plan_units(experiment, recipes, range(seeds))
    if not ablation:
        units += plan_pictures(experiment, recipe, "net-s0")
    outcomes = run_units(units, run, say, gpus=gpus_per_task)
    scores = tabulate(outcomes)
    run.write_json(
        "metrics.json", {experiment.name: scores, "trained_on": learned, "tested_on": tested, "seeds": seeds}
    )
    if not ablation:
        run.write_text("response.svg", response_plot(outcomes["response"]))
        run.write_text("steps.svg", steps_plot(outcomes["steps"]))
    say(accuracy_table(scores))
    say(f"trained on {learned}, tested on {tested} pictures, {seeds} seeds; results in {run.uri}")
