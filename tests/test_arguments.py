"""Command-line flags: the bounds of their values, and `none`."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any, get_type_hints

import pytest

from scalenet_ray.commands.arguments import check_arguments, parse_arguments
from scalenet_ray.commands.check import CheckInputs
from scalenet_ray.commands.export import Export
from scalenet_ray.commands.policy import PrintPolicy
from scalenet_ray.commands.show import Show
from scalenet_ray.core.errors import UserError
from tests.job_scripts import REPOSITORY, load_job

JOBS: dict[str, Any] = {
    **{path.stem: None for path in (REPOSITORY / "jobs").glob("*.py")},
    "check": CheckInputs,
    "export": Export,
    "policy": PrintPolicy,
    "show": Show,
}
REQUIRED: dict[str, dict[str, Any]] = {
    "eval_cifar": {"data": "DIR"},
    "export": {"run": "RUN", "to": "coco"},
    "reproduce_coco": {"data": "DIR"},
}
COUNTS = ("limit", "input_side", "tile_side", "train_limit", "test_limit", "epochs", "batch_size")


def job_of(name: str, /, **changes: Any) -> Any:
    """A job with its defaults."""
    kind = JOBS[name] or next(
        value
        for value in vars(load_job(name)).values()
        if dataclasses.is_dataclass(value) and value.__module__ == load_job(name).__name__
    )
    return kind(**{**REQUIRED.get(name, {}), **changes})


def fields_of(name: str, *types: Any) -> list[str]:
    """Fields of a job itself whose plain type is one of `types`."""
    kind = type(job_of(name))
    hints = get_type_hints(kind)
    return [field.name for field in dataclasses.fields(kind) if hints[field.name] in types]


@pytest.mark.parametrize("name", sorted(JOBS))
def test_a_jobs_defaults_are_in_their_bounds(name: str):
    check_arguments(job_of(name))


@pytest.mark.parametrize("name", sorted(JOBS))
def test_a_value_that_no_flag_can_have_is_refused_by_its_name(name: str):
    wrong = [(field, empty, "must not be empty") for field in fields_of(name, str, str | None) for empty in ("", "  ")]
    numbers = fields_of(name, int, int | None, float, float | None)
    wrong += [(field, number, "must be .*") for field in numbers for number in (-1, math.nan, math.inf)]
    wrong += [(field, 0, "must be 1 or more") for field in fields_of(name, int, int | None) if field in COUNTS]
    for field, value, message in wrong:
        with pytest.raises(UserError, match=f"{flag(field)} {message}, got {value!r}"):
            check_arguments(job_of(name, **{field: value}))


def flag(field: str) -> str:
    return f"({field.upper()}|--{field.replace('_', '-')})"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--detector=", "--detector must not be empty"),
        ("--scale-net=", "--scale-net must not be empty"),
        ("--policies whole ", "--policies must not be empty"),
        ("--score-threshold nan", "--score-threshold must be a number from 0 to 1, got nan"),
        ("--score-threshold 50", "--score-threshold must be a number from 0 to 1, got 50.0"),
        ("--iou-threshold -0.5", "--iou-threshold must be a number from 0 to 1, got -0.5"),
        ("--no-progress-seconds nan", "--no-progress-seconds must be a number of 0 or more, got nan"),
        ("--max-image-megapixels 0", "--max-image-megapixels must be a number above 0, at most 100000, got 0.0"),
        ("--limit ten", "--limit: must be a whole number or none, got 'ten'"),
        ("--max-failures 1.5", "--max-failures: must be a whole number, got '1.5'"),
    ],
)
def test_a_command_line_is_refused_by_the_flags_name(words: str, message: str, capsys: pytest.CaptureFixture[str]):
    arguments = words.split(" ")
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(load_job("eval_coco").EvalCoco, [word or " " for word in arguments])
    assert exit_info.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("word", ["none", "None", "NONE"])
def test_none_is_said_in_any_case_wherever_a_number_may_be_that(word: str):
    flags = ("--ceiling", "--limit", "--iou-threshold", "--max-open-images", "--pipelines", "--output", "--data")
    job: Any = parse_arguments(
        load_job("tune_recursion").TuneRecursion, [part for each in flags for part in (each, word)]
    )
    advanced = job.resources.advanced
    given = (job.ceiling, job.limit, job.networks.iou_threshold, advanced.max_open_images, advanced.pipelines)
    assert given == (None,) * 5
    # A name is a name: that a variable of a script is None must not stand for the embedded sample.
    assert (job.output, job.data) == (word, word)


def test_what_may_be_none_still_takes_its_values():
    words = "--ceiling 3 --limit 5 --iou-threshold 0.5 --scale-actors 1 2 --output runs/x"
    job: Any = parse_arguments(load_job("tune_recursion").TuneRecursion, words.split())
    assert (job.ceiling, job.limit, job.networks.iou_threshold, job.output) == (3.0, 5, 0.5, "runs/x")
    assert job.resources.scale_actors == (1, 2)
    assert parse_arguments(load_job("tune_recursion").TuneRecursion, ["--ceiling", "start"]).ceiling == "start"


def test_a_tuple_that_may_be_none_takes_many_words_or_none():
    @dataclasses.dataclass
    class Names:
        """Names.

        Attributes:
            names: of things.
        """

        names: tuple[str, ...] | None = ("a",)

    check = {"--names none": None, "--names a b": ("a", "b"), "": ("a",)}
    # Annotations of a class in a function are text that only its own module can resolve.
    Names.__annotations__["names"] = tuple[str, ...] | None
    for words, wanted in check.items():
        assert parse_arguments(Names, words.split()).names == wanted


@pytest.mark.parametrize("command", [["jobs/detect.py", "--images", ""], ["-m", "scalenet_ray", "show", ""]])
def test_an_empty_argument_ends_a_command_with_one_line(command: list[str]):
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(("error: --images must not be empty", "error: IMAGE must not be empty"))
