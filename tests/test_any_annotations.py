"""Random values in an annotation file: a run is correct, or ends with one line that names the cause."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scalenet_ray.console import run_job
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.sample.scenes import write_sample
from tests.job_scripts import load_job

FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"),
    "categories": ("id", "name", "supercategory"),
}


numbers = st.one_of(
    st.integers(-3, 400),
    st.floats(-10, 400),
    st.sampled_from([0, 1, -1, 2**31, 2**64, 1e9, 3e8, 1e300, math.inf, math.nan]),
)
texts = st.sampled_from(["", "0", "1", "a.jpg", "../x", "\N{LATIN SMALL LETTER E WITH ACUTE}", "\ud800", "a\nb"])
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
runs = st.fixed_dictionaries(
    {},
    optional={
        "size": st.one_of(scalars, st.lists(st.sampled_from([64, 192, 256, 10**9, 0, -1, "8"]), max_size=3)),
        "counts": st.one_of(scalars, st.text(max_size=12), st.lists(numbers, max_size=4)),
    },
)
values = st.one_of(
    scalars,
    st.lists(numbers, min_size=4, max_size=4),
    st.lists(st.one_of(scalars, st.lists(st.one_of(numbers, scalars), max_size=8)), max_size=3),
    st.lists(st.lists(numbers, min_size=6, max_size=8), max_size=2),
    runs,
)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("data") / "sample", train=1, val=2)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_a_run_ends_right_or_names_the_file_and_what_is_wrong(sample: Path, data: st.DataObject) -> None:
    document: Any = json.loads((sample / "annotations" / "instances_val2017.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        section = data.draw(st.sampled_from([*FIELDS, "annotations", "annotations"]))
        field = data.draw(st.sampled_from(FIELDS[section]))
        row = data.draw(st.integers(0, len(document[section]) - 1))
        document[section][row][field] = copy.deepcopy(data.draw(values))
    with tempfile.TemporaryDirectory() as folder:
        status, said = _run(sample, document, Path(folder))
        run = Path(folder, "run")
        if status == 2:
            lines = said.splitlines()
            assert len(lines) == 1
            assert lines[0].startswith("error: ")
            assert "instances_val2017.json" in lines[0] or "categor" in lines[0]
            return
        assert status in (0, 1), said
        metrics = json.loads((run / "metrics.json").read_text(), parse_constant=_refused)
        assert metrics["images"]["done"] + metrics["images"]["failed"] == metrics["images"]["total"] == 2
        assert (status == 1) == (metrics["images"]["failed"] > 0)
        for figures in metrics["policies"].values():
            assert all(value is None or 0 <= value <= 100 for name, value in figures.items() if name.startswith("A"))
        json.loads((run / "results.json").read_text(), parse_constant=_refused)
        assert (run / "report.html").stat().st_size > 1000


def _refused(text: str) -> None:
    raise AssertionError(text)


def _run(sample: Path, document: Any, folder: Path) -> tuple[int, str]:
    """The exit status of an evaluation, and what it said on the standard error but for warnings."""
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    (folder / "val2017").symlink_to(sample / "val2017")
    module = load_job("eval_coco")
    job = module.EvalCoco(
        data=str(folder),
        output=str(folder / "run"),
        policies=("whole",),
        engine="local",
        report_pictures=0,
        networks=NetworkSpec(detector="tests.mask_in_the_middle:Middle"),
    )
    stderr = io.StringIO()
    silent = contextlib.redirect_stdout(io.StringIO())
    with silent, contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as exit_info:
        run_job(module.main, job)
    lines = [line for line in stderr.getvalue().splitlines() if not line.startswith("{")]
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code, "\n".join(lines)
