"""An experiment on canvases as units of work: what is trained, what is scored then, and the table that comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from scalenet_ray.core.canvas_recursion import CanvasRules
from scalenet_ray.core.scale import ScaleRange
from scalenet_ray.engine.units import Unit
from scalenet_ray.models.canvas_experiment import Experiment
from scalenet_ray.models.canvas_recipes import CanvasRecipe, NetRecipe
from scalenet_ray.models.canvas_scores import set_names

__all__ = ["ablations", "plan_pictures", "plan_units", "tabulate"]

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
            rules=CanvasRules(even=False, bisect=False, from_original=False, resampling="bilinear"),
        ),
    }


def plan_units(experiment: Experiment, recipes: Mapping[str, CanvasRecipe], seeds: Sequence[int]) -> list[Unit]:
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
    units: list[Unit] = []
    for seed in seeds:
        for net, name in net_names.items():
            work = partial(experiment.train_net, net, seed, f"{name}-s{seed}")
            units.append(Unit(f"{name}-s{seed}", work))
    for seed in seeds:
        for name, classifier in domain.classifiers.items():
            work = partial(experiment.train_classifier, classifier, seed, f"{name}-s{seed}")
            units.append(Unit(f"{name}-s{seed}", work))
    for seed in seeds:
        trained = (domain.classifiers[first], f"{first}-s{seed}")
        for tests in set_names(domain):
            for name, recipe in recipes.items():
                net = f"{net_names[recipe.net]}-s{seed}"
                work = partial(experiment.score_recursion, recipe, net, trained, tests)
                units.append(Unit(_score_name(name, tests, seed), work, (net, trained[1])))
            work = partial(experiment.score_recursion, domain.recipes["scalenet"], None, trained, tests)
            units.append(Unit(_score_name("oracle", tests, seed), work, (trained[1],)))
            for name, classifier in domain.classifiers.items():
                alone = f"{name}-s{seed}"
                work = partial(experiment.score_classifier, classifier, alone, tests, squeeze=False)
                units.append(Unit(_score_name(name, tests, seed), work, (alone,)))
            work = partial(experiment.score_classifier, *trained, tests, squeeze=True)
            units.append(Unit(_score_name(f"{first}_squeezed", tests, seed), work, (trained[1],)))
    return units


def plan_pictures(experiment: Experiment, recipe: CanvasRecipe, net: str) -> list[Unit]:
    """What the plots show: a net's response, and the steps of one picture."""
    return [
        Unit("response", partial(experiment.respond, net, RESPONSE_SIDES), (net,)),
        Unit("steps", partial(experiment.steps, recipe, net, STEPS_SIDE), (net,)),
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
