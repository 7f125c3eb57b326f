"""What eval_digits and eval_cifar do alike: all units of an experiment, its figures, its pictures and its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any

import numpy as np

from scalenet_ray.console import accuracy_table
from scalenet_ray.core.bounds import ONE_OR_MORE
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.scale import ScaleRange
from scalenet_ray.data import storage
from scalenet_ray.experiments.config import CanvasRecipe, NetRecipe
from scalenet_ray.experiments.evaluate import set_names
from scalenet_ray.experiments.experiment import Experiment
from scalenet_ray.experiments.figures import response_plot, steps_plot
from scalenet_ray.experiments.rescale import RescaleRules
from scalenet_ray.experiments.tasks import Task, run_tasks
from scalenet_ray.runs.folder import RunFolder

__all__ = [
    "CanvasOptions",
    "ablations",
    "plan_pictures",
    "plan_tasks",
    "run_experiment",
    "tabulate",
]

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
        units = plan_tasks(experiment, recipes, range(options.seeds))
        if not options.ablation:
            units += plan_pictures(experiment, recipe, "net-s0")
        outcomes = run_tasks(units, run, say, gpus=options.gpus_per_task)
        scores = tabulate(outcomes)
        run.write_json(
            "metrics.json", {name: scores, "trained_on": learned, "tested_on": tested, "seeds": options.seeds}
        )
        if not options.ablation:
            run.write_text("response.svg", response_plot(outcomes["response"]))
            run.write_text("steps.svg", steps_plot(outcomes["steps"]))
    say(accuracy_table(scores))
    say(f"trained on {learned}, tested on {tested} pictures, {options.seeds} seeds; results in {run.uri}")


_ONCE = {"scalenet": "once", "scalenet_paper": "once_paper", "as_it_is": "once"}


RESPONSE_SIDES = (4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 42, 56, 84)


STEPS_SIDE = 84


def ablations(recipe: CanvasRecipe) -> dict[str, CanvasRecipe]:
    """A recipe, and others that differ from it in one choice each."""
    rules, net = recipe.rules, recipe.net
    return {
        "as it is": recipe,
        "each convolution padded": replace(recipe, net=replace(net, padding="each")),
        "error of each pixel": replace(recipe, net=replace(net, loss="pixels")),
        "SGD 0.01, not annealed": replace(recipe, net=replace(net, optimizer="sgd", learning_rate=0.01, cosine=False)),
        "mean of the top 15 %": replace(recipe, k=0.15),
        "in range .84 to 1.16": replace(recipe, scale_range=ScaleRange(0.84, 1.16)),
        "one-sided": replace(recipe, one_sided=True),
        "odd sides too": replace(recipe, rules=replace(rules, even=False)),
        "no bisection": replace(recipe, rules=replace(rules, bisect=False)),
        "from the canvas before": replace(recipe, rules=replace(rules, from_original=False)),
        "bilinear": replace(recipe, rules=replace(rules, resampling="bilinear")),
        "nearest": replace(recipe, rules=replace(rules, resampling="nearest")),
        "none of these": CanvasRecipe(
            NetRecipe("each", "pixels", "sgd", 0.01, cosine=False, epochs=net.epochs),
            recipe.scale_range,
            0.15,
            one_sided=True,
            rules=RescaleRules(even=False, bisect=False, from_original=False, resampling="bilinear"),
        ),
    }


def plan_tasks(experiment: Experiment, recipes: Mapping[str, CanvasRecipe], seeds: Sequence[int]) -> list[Task]:
    """All units of an experiment, those that others wait for first.

    Args:
        experiment: what is worked on.
        recipes: recursions by name; nets that are trained alike are trained once.
        seeds: of the trainings; everything is done with each.
    """
    domain = experiment.domain
    (first, _), *_ = domain.classifiers.items()
    nets = list(dict.fromkeys(recipe.net for recipe in recipes.values()))
    net_names = {net: f"net{i}" if i else "net" for i, net in enumerate(nets)}
    units: list[Task] = []
    for seed in seeds:
        for net, name in net_names.items():
            work = partial(experiment.train_net, net, seed, f"{name}-s{seed}")
            units.append(Task(f"{name}-s{seed}", work))
    for seed in seeds:
        for name, classifier in domain.classifiers.items():
            work = partial(experiment.train_classifier, classifier, seed, f"{name}-s{seed}")
            units.append(Task(f"{name}-s{seed}", work))
    for seed in seeds:
        trained = (domain.classifiers[first], f"{first}-s{seed}")
        for tests in set_names(domain):
            for name, recipe in recipes.items():
                net = f"{net_names[recipe.net]}-s{seed}"
                work = partial(experiment.score_recursion, recipe, net, trained, tests)
                units.append(Task(_score_name(name, tests, seed), work, (net, trained[1])))
            work = partial(experiment.score_recursion, domain.recipes["scalenet"], None, trained, tests)
            units.append(Task(_score_name("oracle", tests, seed), work, (trained[1],)))
            for name, classifier in domain.classifiers.items():
                alone = f"{name}-s{seed}"
                work = partial(experiment.score_classifier, classifier, alone, tests, squeeze=False)
                units.append(Task(_score_name(name, tests, seed), work, (alone,)))
            work = partial(experiment.score_classifier, *trained, tests, squeeze=True)
            units.append(Task(_score_name(f"{first}_squeezed", tests, seed), work, (trained[1],)))
    return units


def plan_pictures(experiment: Experiment, recipe: CanvasRecipe, net: str) -> list[Task]:
    """What the plots show: a net's response, and the steps of one picture."""
    return [
        Task("response", partial(experiment.respond, net, RESPONSE_SIDES), (net,)),
        Task("steps", partial(experiment.steps, recipe, net, STEPS_SIDE), (net,)),
    ]


def tabulate(outcomes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Outcomes of scores -> method -> set -> mean and standard deviation of the accuracy over seeds, in percent.

    Recursions have also "steps" and "capped", the means. "once" and "once_paper" are what the first step of "scalenet"
    and "scalenet_paper" brings by itself.
    """
    scores: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for name, outcome in outcomes.items():
        if "accuracy" in outcome:
            method, tests, _ = name.split("--")
            scores.setdefault(method, {}).setdefault(tests, []).append(outcome)
            if method in _ONCE:
                first = {"accuracy": outcome["once"], "steps": 0.0, "capped": 0.0}
                scores.setdefault(_ONCE[method], {}).setdefault(tests, []).append(first)
    return {method: {tests: dict(_summary(rows)) for tests, rows in sets.items()} for method, sets in scores.items()}


def _score_name(method: str, tests: str, seed: int) -> str:
    return f"{method.replace(' ', '_')}--{tests}--s{seed}"


def _summary(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    accuracies = [row["accuracy"] for row in rows]
    yield "mean", float(np.mean(accuracies))
    yield "std", float(np.std(accuracies, ddof=1)) if len(rows) > 1 else 0.0
    if any(row["steps"] for row in rows):
        yield "steps", float(np.mean([row["steps"] for row in rows]))
        yield "capped", float(np.mean([row["capped"] for row in rows]))
