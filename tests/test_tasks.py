"""Tasks with dependencies on Ray."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from scalenet_ray.experiments.tasks import Task, run_tasks
from scalenet_ray.runs.folder import RunFolder
from tests.task_functions import add, broken, die_once


@pytest.mark.ray
def test_units_wait_for_others_and_leave_their_outcomes(idle_ray: None, tmp_path: Path) -> None:
    log = tmp_path / "log"
    units = [
        Task("sum", partial(add, 1, 2, log, needs=("one",)), after=("one",)),
        Task("one", partial(add, 0, 1, log, name="one")),
    ]
    said: list[str] = []
    outcomes = run_tasks(units, RunFolder(str(tmp_path / "run")), said.append)
    assert list(outcomes.items()) == [("sum", {"sum": 3}), ("one", {"sum": 1})]
    assert json.loads((tmp_path / "run" / "units" / "sum.json").read_text()) == {"sum": 3}
    assert [line.split(",")[0] for line in said] == ["1 of 2 done: one sum 1", "2 of 2 done: sum sum 3"]


@pytest.mark.ray
def test_a_failed_unit_is_named_and_what_is_done_is_not_done_again(idle_ray: None, tmp_path: Path) -> None:
    log, run = tmp_path / "log", RunFolder(str(tmp_path / "run"))
    first = Task("one", partial(add, 0, 1, log, name="one"))
    with pytest.raises(
        RuntimeError, match=r"two failed: .*no such scale in a worker; what is done stays in .*: fix it"
    ):
        run_tasks([first, Task("two", broken, after=("one",))], run, lambda line: None)
    outcomes = run_tasks([first, Task("two", partial(add, 1, 1, log), after=("one",))], run, lambda line: None)
    assert outcomes == {"one": {"sum": 1}, "two": {"sum": 2}}
    assert log.read_text().splitlines().count("one") == 1


@pytest.mark.ray
@pytest.mark.chaos
def test_a_unit_whose_process_dies_is_done_again(idle_ray: None, tmp_path: Path) -> None:
    marker = tmp_path / "died"
    outcomes = run_tasks([Task("one", partial(die_once, marker))], RunFolder(str(tmp_path / "run")), lambda line: None)
    assert marker.exists()
    assert outcomes == {"one": {"alive": 1}}
