"""Experiments of eval_digits and eval_cifar: the plan of training and scoring, the table and the plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any, cast

import numpy as np
import torch
from torch import nn

from scalenet_ray.core.bounds import ONE_OR_MORE
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.networks import ScalePredictor
from scalenet_ray.data import storage
from scalenet_ray.experiments.classifiers import build_classifier
from scalenet_ray.experiments.config import DOMAINS, CanvasRecipe, ClassifierRecipe, Domain, NetRecipe, ablations
from scalenet_ray.experiments.data import Pictures, load_pictures, resized
from scalenet_ray.experiments.evaluate import (
    ObjectScales,
    pictures_at,
    response_plot,
    score_classifier,
    score_recursion,
    set_names,
    steps_plot,
)
from scalenet_ray.experiments.rescale import RescaleRules, rescale_canvases
from scalenet_ray.experiments.tasks import Task, run_tasks
from scalenet_ray.experiments.train import train_classifier, train_net
from scalenet_ray.models.scale_net import load_state, save_scale_net
from scalenet_ray.models.scale_networks import load_predictor
from scalenet_ray.models.weights import load_weights, save_weights
from scalenet_ray.report.text import accuracy_table
from scalenet_ray.runs.folder import RunFolder

_FREE_SETTINGS = ("output", "resume", "gpus_per_task", "seeds")
"""Settings that no task's outcome depends on: they may differ when a run is resumed."""

_ONCE = {"scalenet": "once", "scalenet_paper": "once_paper", "as_it_is": "once"}
"""Methods whose accuracy after the first step is a row of the table of its own, with that row's name."""

_EXPENSIVE_LIMIT = 2000

_RESPONSE_SIDES = (4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 42, 56, 84)
_RESPONSE_PICTURES = 100
_STEPS_SIDE = 84


@dataclass(frozen=True, kw_only=True)
class CanvasOptions:
    """Options of both jobs.

    Attributes:
        seeds: number of repetitions of all training and scoring; may grow when a run is resumed.
        held_out: number of training images to test on instead of the test set, and not to train on: to choose settings.
        ablation: score the recipe "scalenet" with one choice changed at a time; needs --held-out.
        train_limit: train on the first N images only.
        test_limit: test on the first N images only.
        mixed_precision: run under bfloat16 autocast; twice as fast on hardware that supports it.
        gpus_per_task: GPU share of each task; 0 for CPUs.
        output: run folder, local, s3://, gs:// or az://; by default a new one under runs.
        resume: continue the run in the output folder.
    """

    seeds: Annotated[int, ONE_OR_MORE] = 3
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
    """Run the tasks that are not done yet; writes config.yaml, units/*.json, weights/, metrics.json and two plots.

    Args:
        options: options of the command line.
        name: data set: mnist, cifar10 or digits.
        data: its folder; None for digits.
        say: called with each line of progress.
        width: channel multiplier of the first classifier; by default the domain's.

    Raises:
        UserError: if an ablation would use the test set.
    """
    if options.ablation and not options.held_out:
        msg = "--ablation chooses settings, which the test set must not: add --held-out, e.g. --held-out 5000"
        raise UserError(msg)
    run = RunFolder.of_job(options.output, f"eval_{name}", resume=options.resume)
    settings = {key: value for key, value in asdict(options).items() if key not in _FREE_SETTINGS}
    workers = {"gpus_per_task": options.gpus_per_task, "seeds": options.seeds}
    with run.begin(settings, resume=options.resume, workers=workers):
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
        # In the driver, so that missing data is downloaded once.
        trained_on, tested_on = len(experiment.train_set().labels), len(experiment.test_set().labels)
        recipe = experiment.domain.recipes["scalenet"]
        recipes = ablations(recipe) if options.ablation else experiment.domain.recipes
        tasks = plan_tasks(experiment, recipes, range(options.seeds))
        if not options.ablation:
            net = "net-s0"
            tasks.append(Task("response", partial(experiment.scale_response, net, _RESPONSE_SIDES), (net,)))
            tasks.append(Task("steps", partial(experiment.steps, recipe, net, _STEPS_SIDE), (net,)))
        outcomes = run_tasks(tasks, run, say, gpus=options.gpus_per_task)
        scores = tabulate(tasks, outcomes)
        metrics = {name: scores, "trained_on": trained_on, "tested_on": tested_on, "seeds": options.seeds}
        run.write_json("metrics.json", metrics)
        if not options.ablation:
            run.write_text("response.svg", response_plot(outcomes["response"]))
            run.write_text("steps.svg", steps_plot(outcomes["steps"]))
    say(accuracy_table(scores))
    say(f"trained on {trained_on}, tested on {tested_on} pictures, {options.seeds} seeds; results in {run.uri}")


@dataclass(frozen=True)
class Experiment:
    """Data, weights and devices of an experiment; the methods with dict results are the work of tasks.

    Attributes:
        name: data set: mnist, cifar10 or digits.
        data: its folder; None for digits.
        folder: folder of the weights, local or in a store.
        held_out: as for `CanvasOptions`, of the last training images; so are the limits and `mixed_precision`.
        width: channel multiplier of the first classifier; by default the domain's.
        device: torch device.
    """

    name: str
    data: str | None
    folder: str
    held_out: int = 0
    train_limit: int | None = None
    test_limit: int | None = None
    width: float | None = None
    device: str = "cpu"
    mixed_precision: bool = False

    @property
    def domain(self) -> Domain:
        """Settings of the data set."""
        domain = DOMAINS[self.name]
        if self.width is None:
            return domain
        first = next(iter(domain.classifiers))
        resized_first = replace(domain.classifiers[first], width=self.width)
        return replace(domain, classifiers={**domain.classifiers, first: resized_first})

    def train_set(self) -> Pictures:
        """Images to train on.

        Raises:
            UserError: if none are left.
        """
        pictures = load_pictures(self.name, self.data, train=True)
        count = len(pictures.labels) - self.held_out
        if count < 1:
            msg = f"held_out must leave pictures to train on, got {self.held_out} of {len(pictures.labels)}"
            raise UserError(msg)
        return pictures.part(slice(0, min(count, self.train_limit or count)))

    def test_set(self, name: str = "") -> Pictures:
        """Images to test on, fewer for the expensive ones of `set_names`."""
        pictures = load_pictures(self.name, self.data, train=bool(self.held_out))
        pictures = pictures.part(slice(-self.held_out, None)).part(slice(0, self.test_limit))
        expensive = name in map(str, self.domain.expensive_sides)
        return pictures.part(slice(0, _EXPENSIVE_LIMIT if expensive else None))

    def train(self, recipe: NetRecipe | ClassifierRecipe, seed: int, name: str) -> dict[str, Any]:
        """Train a Scale Net or a classifier and save its weights as `name`; returns its number of parameters."""
        pictures, domain = self.train_set(), self.domain
        hardware: dict[str, Any] = {"device": self.device, "mixed_precision": self.mixed_precision}
        if isinstance(recipe, NetRecipe):
            model = train_net(pictures, domain, recipe, seed=seed, **hardware)
            save_scale_net(model, recipe.config(domain.in_channels), self._weights(name))
        else:
            model = train_classifier(pictures, domain, recipe, seed=seed, **hardware)
            save_weights(model.state_dict(), {}, self._weights(name))
        return {"parameters": sum(parameter.numel() for parameter in model.parameters())}

    def score_classifier(self, recipe: ClassifierRecipe, name: str, test_set: str, *, squeeze: bool) -> dict[str, Any]:
        """Score a classifier on a test set without rescaling."""
        classifier, pictures = self._classifier(recipe, name), self.test_set(test_set)
        return score_classifier(classifier, pictures, test_set, self.domain, squeeze=squeeze)._asdict()

    def score_recursion(
        self, recipe: CanvasRecipe, net: str | None, classifier: tuple[ClassifierRecipe, str], test_set: str
    ) -> dict[str, Any]:
        """Score a classifier on a rescaled test set; without a net the oracle predicts the scales."""
        predict = None if net is None else self._predictor(net)
        model, pictures = self._classifier(*classifier), self.test_set(test_set)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.mixed_precision):
            return score_recursion(model, predict, recipe, pictures, test_set, self.domain)._asdict()

    def scale_response(self, net: str, sides: tuple[int, ...]) -> dict[str, Any]:
        """A Scale Net's mean prediction on the first images at some sides."""
        predict = ObjectScales(self._predictor(net))
        first = self.test_set().part(slice(0, _RESPONSE_PICTURES))
        means = []
        for side in sides:
            ((_, pictures),) = pictures_at(first, str(side), self.domain)
            recursion = CanvasRecipe().recursion(side, self.domain.canvas_side)
            scales = [result.maps[0].scale for result in rescale_canvases(pictures, recursion, RescaleRules(), predict)]
            # Far out of range a net may predict 0 everywhere.
            predicted = [scale[scale > 0].mean() for scale in scales if scale is not None and scale.any()]
            means.append(float(np.mean(predicted or [np.nan])))
        return {"sides": list(sides), "true": [side / self.domain.unit_side for side in sides], "predicted": means}

    def steps(self, recipe: CanvasRecipe, net: str, side: int) -> dict[str, Any]:
        """Rescale the first image from a side; returns the grey canvases and their scale maps as nested lists."""
        predict = ObjectScales(self._predictor(net))
        ((_, (picture,)),) = pictures_at(self.test_set().part(slice(0, 1)), str(side), self.domain)
        recursion = recipe.recursion(side, self.domain.canvas_side)
        (result,) = rescale_canvases([picture], recursion, recipe.rules, predict)
        canvases = [resized(picture, canvas_side, recipe.rules.resampling) for canvas_side in result.sides]
        return {
            "canvases": [canvas[..., 0].tolist() for canvas in canvases],
            "maps": [found.scale.round(3).tolist() for found in result.maps if found.scale is not None],
        }

    def _weights(self, name: str) -> str:
        return storage.join(self.folder, f"{name}.safetensors")

    def _predictor(self, net: str) -> ScalePredictor:
        return cast(ScalePredictor, load_predictor(self._weights(net), self.device))

    def _classifier(self, recipe: ClassifierRecipe, name: str) -> nn.Module:
        side, in_channels = self.domain.canvas_side, self.domain.in_channels
        model = build_classifier(recipe.kind, side=side, in_channels=in_channels, width=recipe.width)
        path = self._weights(name)
        load_state(model, load_weights(path)[0], path)
        return model.to(torch.device(self.device)).eval()


def plan_tasks(experiment: Experiment, recipes: Mapping[str, CanvasRecipe], seeds: Sequence[int]) -> list[Task]:
    """Training and scoring tasks of an experiment, training first.

    Args:
        experiment: the experiment.
        recipes: methods of rescaling by name; nets with equal recipes are trained once.
        seeds: seeds of the training; all tasks are repeated for each.
    """
    domain = experiment.domain
    first = next(iter(domain.classifiers))
    nets = list(dict.fromkeys(recipe.net for recipe in recipes.values()))
    net_names = {net: f"net{i}" if i else "net" for i, net in enumerate(nets)}
    trained = [*((name, net) for net, name in net_names.items()), *domain.classifiers.items()]
    tasks = [
        Task(f"{name}-s{seed}", partial(experiment.train, recipe, seed, f"{name}-s{seed}"))
        for name, recipe in trained
        for seed in seeds
    ]
    for seed in seeds:
        classifier = f"{first}-s{seed}"
        spec = (domain.classifiers[first], classifier)
        for test_set in set_names(domain):

            def add(method: str, work: Callable[..., Any], *after: str, seed: int = seed, on: str = test_set) -> None:
                """Add the task that scores a method on this seed and test set."""
                tasks.append(Task(f"{method}--{on}--s{seed}", work, after, method, on))

            for name, recipe in recipes.items():
                net = f"{net_names[recipe.net]}-s{seed}"
                add(name, partial(experiment.score_recursion, recipe, net, spec, test_set), net, classifier)
            oracle = domain.recipes["scalenet"]
            add("oracle", partial(experiment.score_recursion, oracle, None, spec, test_set), classifier)
            for name, recipe in domain.classifiers.items():
                alone = f"{name}-s{seed}"
                add(name, partial(experiment.score_classifier, recipe, alone, test_set, squeeze=False), alone)
            squeezed = partial(experiment.score_classifier, *spec, test_set, squeeze=True)
            add(f"{first}_squeezed", squeezed, classifier)
    return tasks


def tabulate(
    tasks: Sequence[Task], outcomes: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Method -> test set -> "mean" and "std" of the accuracy over seeds, in percent.

    Recursions also have the means of "steps" and "capped". Methods "once" and "once_paper" are the first steps of
    "scalenet" and "scalenet_paper".
    """
    scores: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for task in tasks:
        if task.method is None or task.test_set is None:
            continue
        outcome = outcomes[task.name]
        scores.setdefault(task.method, {}).setdefault(task.test_set, []).append(outcome)
        if task.method in _ONCE:
            once = {"accuracy": outcome["once"], "steps": 0.0, "capped": 0.0}
            scores.setdefault(_ONCE[task.method], {}).setdefault(task.test_set, []).append(once)
    return {method: {tests: dict(_summary(rows)) for tests, rows in sets.items()} for method, sets in scores.items()}


def _summary(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    accuracies = [row["accuracy"] for row in rows]
    yield "mean", float(np.mean(accuracies))
    yield "std", float(np.std(accuracies, ddof=1)) if len(rows) > 1 else 0.0
    if any(row["steps"] for row in rows):
        yield "steps", float(np.mean([row["steps"] for row in rows]))
        yield "capped", float(np.mean([row["capped"] for row in rows]))
