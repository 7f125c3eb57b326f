"""The trials of a sweep as a study of Optuna in the run folder, which optuna-dashboard shows while the sweep runs."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from ray import tune

from scalenet_ray.data.policy_files import Choice, Range, SearchSpace


class StudyFile(tune.Callback):
    """Callback that adds each trial that ends to a study, whatever the searcher; one stopped early is pruned.

    Args:
        path: the study's file.
        space: the search space.
        images: images of a trial that was not stopped early.
        single: whether trials are ranked by their score alone; else by AP_small and passes.
    """

    def __init__(self, path: str, space: SearchSpace, images: int, *, single: bool) -> None:
        fields: dict[str, Range | Choice] = {"policy": Choice(space.policies), **space.fields}
        self._distributions = {name: _distribution(field) for name, field in fields.items()}
        self._path, self._images = path, images
        self._names = ["score"] if single else ["AP_small", "passes"]

    def open(self) -> optuna.Study:
        """The study; it is created if there is none."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(JournalFileBackend(self._path)),
            study_name="sweep",
            directions=[StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE][: len(self._names)],
            load_if_exists=True,
        )
        study.set_user_attr("objectives", self._names)
        return study

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Add a trial."""
        complete = trial.last_result["images"] == self._images
        self._add(trial, TrialState.COMPLETE if complete else TrialState.PRUNED)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Add a failed trial."""
        self._add(trial, TrialState.FAIL)

    def _add(self, trial: Any, state: TrialState) -> None:
        values = [float(trial.last_result.get(name, math.nan)) for name in self._names]
        if any(map(math.isnan, values)):
            state = TrialState.FAIL
        # The folder of a resumed sweep may have moved: its callbacks are those it began with.
        with suppress(OSError):
            study = self.open()
            # After a resume Tune may run a trial again that is in the study.
            if any(known.user_attrs["trial"] == trial.trial_id for known in study.get_trials(deepcopy=False)):
                return
            added = create_trial(
                state=state,
                values=values if state == TrialState.COMPLETE else None,
                params=dict(trial.config),
                distributions={name: self._distributions[name] for name in trial.config},
                user_attrs={"trial": trial.trial_id},
                intermediate_values={trial.last_result["images"]: values[0]} if state == TrialState.PRUNED else None,
            )
            study.add_trial(added)


def _distribution(field: Range | Choice) -> BaseDistribution:
    if isinstance(field, Choice):
        return CategoricalDistribution(field.options)
    if field.whole:
        return IntDistribution(int(field.low), int(field.high), log=field.log)
    return FloatDistribution(field.low, field.high, log=field.log)
