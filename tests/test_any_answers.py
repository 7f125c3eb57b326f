"""Random answers of a detector: a run is correct or ends with one line that names the cause."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from scalenet_ray import get_scaled_prediction
from scalenet_ray.console import run_job
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.policy import parse_policy
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkSpec
from scalenet_ray.workflows.preparation import named_policies
from tests.job_scripts import load_job
from tests.scripted_detector import SCRIPTED, Scripted, answering, one_box

COUNT = 3
HW = (40, 64)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of one colour each, by which a detector knows them."""
    folder = tmp_path_factory.mktemp("pictures")
    for nth in range(COUNT):
        Image.fromarray(np.full((*HW, 3), nth, np.uint8)).save(folder / f"{nth}.png")
    return folder


def nth_of(tile: np.ndarray) -> int:
    """Which picture a tile is cut from; a blank one is like the first."""
    return int(tile[0, 0, 0]) % 57 % COUNT


def run_detect(pictures: Path, output: Path, policy: str = "whole", **changes: Any) -> int:
    """The exit status of a run of jobs/detect.py."""
    module = load_job("detect")
    job = module.DetectImages(
        images=str(pictures),
        policy=policy,
        output=str(output),
        engine="local",
        networks=NetworkSpec(detector=SCRIPTED),
        report_pictures=0,
        **changes,
    )
    with pytest.raises(SystemExit) as exit_info:
        run_job(module.main, job)
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of the standard error, without the log's."""
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("{")]


def failures_of(output: Path) -> dict[str, tuple[str, str]]:
    """File -> stage and reason."""
    rows = pq.read_table(output / "failures.parquet").to_pylist()
    return {Path(row["file"]).name: (row["stage"], row["reason"]) for row in rows}


def check_folder(output: Path, status: int) -> None:
    """Whether what a run left behind is whole and possible."""
    failures = failures_of(output)
    assert all(stage in ("look", "detect") and reason for stage, reason in failures.values())
    assert status == (1 if failures else 0)
    counts = json.loads((output / "metrics.json").read_text())["images"]
    assert counts == {"total": COUNT, "done": COUNT - len(failures), "failed": len(failures)}
    for row in json.loads((output / "results.json").read_text()):
        x, y, width, height = row["bbox"]
        assert all(map(math.isfinite, [*row["bbox"], row["score"]]))
        assert min(x, y) >= 0
        assert x + width <= HW[1] + 0.01
        assert y + height <= HW[0] + 0.01
        assert 0 <= row["score"] <= 1
        assert row["category_id"] in Scripted.categories
        assert f"{row['image_id'] - 1}.png" not in failures


NUMBERS: list[Any] = [0, 1, 0.5, 2, 30]
ODD_NUMBERS: list[Any] = [-1, 2.5, 97.0, math.nan, math.inf, -math.inf, 1e30, 1e300, 10**30, True, None, "1"]
FORMS: list[Callable[[Any], Any]] = [
    lambda values: values,
    tuple,
    np.array,
    lambda values: np.array(values, np.float16),
    lambda values: np.array(values, np.uint8),
    lambda values: torch.tensor(values, dtype=torch.bfloat16, requires_grad=True),
    lambda values: torch.tensor(values, dtype=torch.int64),
]


def as_dict(found: list[Any]) -> dict[str, Any]:
    return dict(zip(("boxes", "scores", "labels", "masks"), found, strict=False))


class Raise:
    """An answer that is an exception."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


@st.composite
def parts(draw: st.DrawFn) -> Any:
    """Boxes, scores and labels of some boxes, mostly of the right shapes, with odd numbers now and then."""
    count = draw(st.integers(0, 2))
    number = st.sampled_from(NUMBERS + ODD_NUMBERS if draw(st.booleans()) else NUMBERS)
    rows = [[draw(number) for _ in range(draw(st.sampled_from([4, 4, 4, 5])))] for _ in range(count)]
    found = [
        rows,
        [draw(number) for _ in range(count)],
        [draw(st.sampled_from([1, 2, 2, 1.0, 3])) for _ in range(count)],
    ]
    if draw(st.booleans()):
        found[draw(st.integers(0, 2))] = draw(st.sampled_from([None, "text", [], [1], 0.5, [[]], {}, object()]))
    form = draw(st.sampled_from(FORMS))
    try:
        with np.errstate(all="ignore"):
            found = [form(part) for part in found]
    except (ValueError, TypeError, RuntimeError, OverflowError):
        pass
    if draw(st.booleans()):
        masks: Any = [np.zeros((count, *HW), bool), np.zeros((count, 3, 3), bool), [b"P"] * count, None, [None], "text"]
        found.append(draw(st.sampled_from(masks)))
    return draw(st.sampled_from([tuple, list, as_dict]))(found)


ERRORS = [RuntimeError("two\nlines"), ValueError(), KeyError("boxes"), TileError("too dark"), AssertionError("\udc00")]
ODD = st.sampled_from([None, "text", (), TileError("broken"), Detections.empty(), np.zeros((2, 4))])
KINDS = [*[parts()] * 4, *[st.just("good")] * 2, st.sampled_from(ERRORS).map(Raise), ODD]
ANSWERS = st.sampled_from(range(len(KINDS))).flatmap(KINDS.__getitem__)
CALLS = st.sampled_from(
    [*[list] * 12, tuple, iter, lambda all_: all_[1:], lambda all_: [*all_, all_[0]], lambda all_: None, dict.fromkeys]
)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    answers=st.lists(ANSWERS, min_size=COUNT, max_size=COUNT),
    call=CALLS,
    policy=st.sampled_from(["whole", "first-pass"]),
)
def test_a_run_ends_right_or_names_the_culprit_whatever_the_detector_answers(
    pictures: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    answers: list[Any],
    call: Callable[[list[Any]], Any],
    policy: str,
) -> None:
    def answer(tiles: Sequence[np.ndarray]) -> Any:
        given = [answers[nth_of(tile)] for tile in tiles]
        for one in given:
            if isinstance(one, Raise):
                raise one.error
        return call(
            [
                one_box(tile) if isinstance(one, str) and one == "good" else one
                for one, tile in zip(given, tiles, strict=True)
            ]
        )

    output = tmp_path_factory.mktemp("runs") / "run"
    capsys.readouterr()
    with answering(answer):
        status = run_detect(pictures, output, policy)
    lines = said(capsys)
    if status == 2:
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert SCRIPTED in lines[0] or "the detector raised" in lines[0]
    else:
        assert not lines
        check_folder(output, status)


def refused(pictures: Path, output: Path, capsys: pytest.CaptureFixture[str], policy: str = "whole") -> str:
    """What a run says that is refused before it leaves a folder."""
    assert run_detect(pictures, output, policy) == 2
    (line,) = said(capsys)
    assert not output.exists()
    return line


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("whole@100000", "wants tiles of 100000 pixels a side, at most 16384 are computed: choose a smaller one"),
        ("whole@128", "canvas_hw of detector"),
        ("pyramid", "got 64 x 64 for a tile of 128 x 128: a detector that shrinks its tiles undoes the zoom"),
    ],
)
def test_a_policy_whose_tiles_cannot_be_computed_is_refused_before_the_run(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str, message: str
) -> None:
    fixed = staticmethod(lambda hw: (64, 64))
    with answering(lambda tiles: [one_box(tile) for tile in tiles], canvas=fixed):
        assert message in refused(pictures, tmp_path / "run", capsys, policy)


@pytest.mark.parametrize("kind", ["first-pass", "oracle", "scalenet"])
def test_a_zoom_by_topk_of_class_maps_is_refused_by_the_check(kind: str) -> None:
    policy = parse_policy(kind, input_side=64, iou_threshold=0.6)
    names = NetworkSpec(SAMPLE_DETECTOR, SAMPLE_SCALE_NET)
    categories = names.describe_detector().categories
    names.check([policy], categories)
    by_top_k = replace(policy, recursion=replace(policy.recursion, zoom=None))
    with pytest.raises(UserError, match=f"policy {kind} has zoom none, which rescales by 1 / TopK"):
        names.check([by_top_k], categories)


def test_a_detector_of_one_canvas_takes_the_default_policy_with_a_first_look_of_its_input_side() -> None:
    fixed = staticmethod(lambda hw: (64, 64))
    with answering(lambda tiles: [one_box(tile) for tile in tiles], canvas=fixed):
        info = NetworkSpec(SCRIPTED).describe_detector()
        assert not info.takes_larger
        (policy,) = named_policies(["regions"], NetworkSpec(), info)
        assert policy.largest_side == info.input_side == 64
    with answering(lambda tiles: [one_box(tile) for tile in tiles]):
        info = NetworkSpec(SCRIPTED).describe_detector()
        assert named_policies(["regions"], NetworkSpec(), info)[0].largest_side == 128


@pytest.mark.parametrize("categories", [{"1": "square", "2": "disc"}, ["nothing", "square", "disc"]])
def test_one_image_takes_plain_answers_and_text_keys(categories: Any) -> None:
    def plain(tiles: Sequence[np.ndarray]) -> list[Any]:
        return [(torch.tensor([[0, 0, 9, 9]]), [torch.tensor(0.5)], [1.0]) for _ in tiles]

    with answering(plain, categories=categories, input_side=np.int64(64)):
        found = get_scaled_prediction(np.zeros((*HW, 3), np.uint8), Scripted(), policy="whole", verbose=0)
    assert [(each.category.id, each.category.name) for each in found.object_prediction_list] == [(1, "square")]
    with pytest.raises(UserError, match="wants tiles of 100000 pixels"):
        get_scaled_prediction(np.zeros((*HW, 3), np.uint8), Scripted(), policy="whole@100000", verbose=0)
