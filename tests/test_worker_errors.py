"""Errors of Ray's workers: the user's, or a bug with the worker's trace."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, StreamingGeneratorReplayInconsistentError, UserCodeException

from scalenet_ray.core.errors import TileError, UserError, WorkerError
from scalenet_ray.engine.worker_errors import RowsLostError, from_worker, with_message, workers_errors
from tests.job_scripts import REPOSITORY
from tests.ray_fixture import own_ray_environment

FRAMES = '  File "/a/b.py", line 3, in call\n    raise it\n'
DATA = (
    "\n\nThe above exception was the direct cause of the following exception:\n\n"
    "ray::MapWorker(MapBatches(ScaleStage)).submit() (pid=1, ip=10.0.0.1)\n" + FRAMES + "ray.exceptions."
    "UserCodeException: UDF failed to process a data block.\nFailed to apply UDF transform after 1/1 attempts."
)
USER = "scalenet_ray.core.errors.UserError"


def task_error(last_line: str, cause: Exception, more: str = "") -> RayTaskError:
    return RayTaskError("f", f"\x1b[36mray::f()\x1b[39m (pid=1)\n{FRAMES}{last_line}{more}", cause, "f", 1, "10.0.0.1")


@pytest.mark.parametrize("error", [UserError("give --scale-net"), FileNotFoundError("no a.json"), TileError("bad")])
def test_a_users_error_comes_back_as_itself(error: Exception) -> None:
    assert from_worker(task_error("unread", error)) is error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (task_error("KeyError: 'x'", KeyError("x")), WorkerError, "KeyError: 'x' in a worker"),
        (task_error("ValueError: two", ValueError("two")), WorkerError, "ValueError: two in a worker"),
        (task_error("KeyError: 'x'", UserCodeException(), DATA), WorkerError, "KeyError: 'x' in a worker"),
        (task_error("AssertionError", AssertionError()), WorkerError, "AssertionError in a worker"),
        (task_error("a.b.OddError: 1\nand 2", ValueError(), DATA), WorkerError, "OddError: 1 and 2 in a worker"),
        (task_error(f"{USER}: give --scale-net", UserCodeException(), DATA), UserError, "give --scale-net"),
        (task_error("FileNotFoundError: no a", UserCodeException(), DATA), OSError, "no a"),
        (ActorDiedError(task_error("KeyError: 'x'", KeyError("x"))), WorkerError, "KeyError: 'x' in a worker"),
        (ActorDiedError(task_error(f"{USER}: no device", UserError("no device"))), UserError, "no device"),
        (
            StreamingGeneratorReplayInconsistentError("3 objects, then 0"),
            RowsLostError,
            "StreamingGeneratorReplayInconsistentError of Ray",
        ),
        (
            ActorDiedError(),
            WorkerError,
            "ActorDiedError: The actor died unexpectedly before finishing this task.",
        ),
    ],
)
def test_other_errors_are_the_users_or_a_bug_by_what_the_trace_says(
    error: Exception, kind: type[Exception], message: str
) -> None:
    found = from_worker(error)
    assert (str(found), type(found)) == (message, kind)


def test_of_an_error_raised_from_another_the_later_one_counts() -> None:
    chained = (
        f"\n\nThe above exception was the direct cause of the following exception:\n\nray::f()\n{FRAMES}{USER}: better"
    )
    assert str(from_worker(task_error("KeyError: 'x'", UserCodeException(), chained + DATA))) == "better"


def test_a_bug_keeps_the_workers_trace_without_colours() -> None:
    error = from_worker(task_error("KeyError: 'x'", KeyError("x")))
    assert isinstance(error, WorkerError)
    assert error.trace.endswith("KeyError: 'x'")
    assert FRAMES.strip() in error.trace
    assert "\x1b" not in error.trace


def test_more_words_change_neither_kind_nor_trace() -> None:
    bug = with_message(WorkerError("KeyError", "trace"), "unit two failed: KeyError")
    assert (type(bug), str(bug), bug.trace) == (WorkerError, "unit two failed: KeyError", "trace")  # type: ignore[attr-defined]
    assert isinstance(with_message(FileNotFoundError("a"), "unit two failed: a"), UserError)


def test_a_bug_of_a_worker_passes_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(WorkerError("KeyError", "trace")))
    assert (str(copy), copy.trace) == ("KeyError", "trace")
    assert from_worker(task_error("unread", WorkerError("KeyError", "trace"))).args == ("KeyError", "trace")


def test_an_error_that_is_no_workers_is_let_through() -> None:
    with pytest.raises(KeyError), workers_errors():
        raise KeyError("x")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_ray_a_device_that_no_worker_has_is_one_line_in_the_terminal(tmp_path: Path) -> None:
    """Known by name, and so met in the constructor of an actor, which Ray tries again and again."""
    job = [sys.executable, str(REPOSITORY / "jobs/detect.py"), "--limit", "2", "--device", "cuda:99"]
    done = subprocess.run(
        [*job, "--output", str(tmp_path / "run")],
        cwd=tmp_path,
        env=own_ray_environment(PYTHONPATH=str(REPOSITORY)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.fullmatch(
        "error: device 'cuda:99' was wanted, torch finds [0-9]+ CUDA devices: use device cpu\n", done.stderr
    )
    assert re.fullmatch("checking the images and the networks\nRay's dashboard: http://\\S+\n", done.stdout)
    assert done.returncode == 2
