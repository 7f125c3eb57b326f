"""The report's pages: text, figures, selected images."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkSpec
from scalenet_ray.report.charts import front_plot
from scalenet_ray.report.gallery import choose_pictures
from scalenet_ray.report.html import winner_of
from scalenet_ray.report.page import render_report
from scalenet_ray.report.sweep import contenders_of, render_sweep, sweep_verdict
from scalenet_ray.report.text import found_lines
from scalenet_ray.sample.scenes import write_sample
from tests.job_scripts import load_job
from tests.report_fakes import big_page

pytestmark = pytest.mark.usefixtures("drawn_charts")

NETWORKS = NetworkSpec(detector=SAMPLE_DETECTOR, scale_net=SAMPLE_SCALE_NET)


def pictures_of(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])["pictures"]


def test_the_best_policy_that_reads_no_ground_truth_wins_whatever_its_name() -> None:
    rows = {"whole": {"kind": "whole", "AP_small": 3.0}, "oracle": {"kind": "grid", "AP_small": 5.0}}
    assert winner_of({**rows, "best": {"kind": "oracle", "AP_small": 9.0}}) == "oracle"


def test_without_figures_the_first_policy_is_shown() -> None:
    assert winner_of({"whole": {"AP_small": math.nan}, "grid-2": {"AP_small": 1.0}}) == "grid-2"
    assert winner_of({"first-pass": {}}) == "first-pass"


def test_pictures_are_those_that_gained_lost_and_some_by_chance() -> None:
    rows = [{"id": i, "by": {"p": [0, i // 4, 2 * (i == 3)]}} for i in range(20)]
    chosen = choose_pictures(rows, "p", 6)
    assert list(chosen.items())[:3] == [(16, "gained"), (17, "gained"), (3, "lost")]
    assert len(chosen) == 6
    assert chosen == choose_pictures(rows, "p", 6)
    assert choose_pictures(rows, "p", 0) == {}


def test_the_page_marks_the_winner_and_shows_its_interval() -> None:
    document, details = big_page(3, 0)
    interval = {"difference": 10.0, "low": 4.0, "high": 16.0, "above": 1.0}
    document |= {"compared_with": "whole", "differences": {"scalenet": dict.fromkeys(("AP", "AP_small"), interval)}}
    page = render_report(document, details)
    assert re.findall(r'<tr class=best><th scope="row">(\w+)</th>', page) == ["scalenet"]
    assert "+10.0 <small>[+4.0, +16.0]</small>" in page
    assert "<b>scalenet</b> takes AP of small objects from 10.0 to <b>20.0</b>" in page
    for title in ("Precision and recall", "What goes wrong", "Where objects were gained", "Time and pixels"):
        assert title in page
    assert not re.search(r'(?:src|href)="(?:http|//)', page)


def test_what_reads_the_ground_truth_is_neither_marked_nor_bold() -> None:
    document, details = big_page(3, 0)
    document["policies"] = {"best": document["policies"]["scalenet"] | {"kind": "oracle"}}
    for one in (
        document,
        {**document, "policies": {"whole": big_page(1, 0)[0]["policies"]["whole"], **document["policies"]}},
    ):
        page = render_report(one, details | {"compared_with": next(iter(one["policies"]))})
        assert re.findall(r'<tr class=best><th scope="row">(\w+)', page) == ["whole"] * ("whole" in one["policies"])
        assert "best <small>(reads the ground truth)</small>" in page
        assert "<b>20.0</b>" not in page


def test_a_run_without_figures_still_has_a_page() -> None:
    row = {"AP": math.nan, "AP_small": math.nan, "detector_passes_per_image": 0.0}
    document = {"images": {"total": 2, "done": 0, "failed": 2}, "policies": {"whole": row}}
    page = render_report(document, {"shown_score": 0.3, "images": []})
    assert "0 of 2 images done, 2 failed (failures.parquet names each with its reason)." in page


def test_an_unreadable_picture_is_left_out_of_the_page(tmp_path: Path) -> None:
    sample = write_sample(tmp_path / "sample", train=1, val=3)
    broken = sorted((sample / "val2017").iterdir())[1]
    broken.write_bytes(b"no picture")
    job = load_job("eval_coco").EvalCoco(
        data=str(sample),
        policies=("whole", "scalenet"),
        engine="local",
        networks=NETWORKS,
        output=str(tmp_path / "run"),
        max_failures=1,
    )
    assert load_job("eval_coco").main(job) == 0
    pictures = pictures_of((tmp_path / "run" / "report.html").read_text())
    assert len(pictures) == 2
    assert broken.name not in [picture["file"] for picture in pictures]
    looks = pictures[0]["looks"]
    assert looks["whole"] == {"windows": [], "map": None}
    assert looks["scalenet"]["map"].startswith("data:image/png;base64,")
    analysis = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert analysis["compared_with"] == "whole"
    assert set(analysis["curves"]) == set(analysis["errors"]) == {"whole", "scalenet"}
    assert analysis["throughput"]["whole"][-1][1] == 3


def test_a_run_that_lost_every_image_has_a_page_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "<script>.jpg").write_bytes(b"no picture")
    job = load_job("detect").DetectImages(
        images=str(tmp_path / "images"), engine="local", networks=NETWORKS, output=str(tmp_path / "run"), max_failures=1
    )
    assert load_job("detect").main(job) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert pictures_of(page) == []
    assert "<script>.jpg" not in page
    assert "&lt;script&gt;.jpg</th><td>read</td>" in page
    assert "0 of 1 images done, 1 failed" in page


# --- without ground truth ---------------------------------------------------------------------------


def found_page(**changes: Any) -> str:
    """The page of a run of `detect`: 6 boxes in 2 of 4 images, 3 of them new, one lost, one a second on an object."""
    row = {"label": 1, "boxes": 6, "images": 2, "after": 6, "before": 3, "new": 3, "lost": 1, "median_side": 17.4}
    document = {
        "images": {"total": 4, "done": 4, "failed": 0},
        "policies": {"first-pass": {"kind": "first-pass", "detector_passes_per_image": 2.0, "images_per_second": None}},
    }
    most = [{"id": 1, "boxes": 6, "file": "<a>.jpg"}]
    found = {**row, "compared": 4, "by_class": [row], "most": most, **changes}
    rows = [{"id": 1, "objects": 0, "labels": [1], "by": {"first-pass": [6, 3, 1]}}]
    details = {"shown_score": 0.3, "images": rows, "found": found, "categories": {1: "cat"}, "files": {1: "a.jpg"}}
    return render_report(document, details)


def test_the_page_says_what_the_whole_image_alone_would_have_found() -> None:
    page = found_page()
    assert "<b>6</b> boxes that score 0.3 or more, in 2 of 4 images. That is " in page
    assert (
        "3 more than the pass over the whole image alone finds (3): 3 new by looking closer, 1 lost, 1 further on what "
        "it found"
    ) in page
    cells = "".join(f"<td>{cell}</td>" for cell in (6, 2, 3, 3, 1, 17))
    assert f'<tr><th scope="row">cat</th>{cells}</tr>' in page
    assert '<tr><th scope="row"><span title="&lt;a&gt;.jpg">&lt;a&gt;.jpg</span></th><td>6</td></tr>' in page


def test_a_class_that_was_lost_altogether_is_listed_without_a_size() -> None:
    row = {"label": 1, "boxes": 0, "images": 0, "after": 0, "before": 1, "new": 0, "lost": 1, "median_side": None}
    assert "<td>1</td><td>\N{EN DASH}</td></tr>" in found_page(by_class=[row])
    found = {**row, "compared": 4, "by_class": [row], "most": []}
    lines = found_lines({"found": found, "categories": {1: "cat"}, "images": {"done": 4}})
    assert lines.splitlines()[1].split() == ["cat", "0", "0", "0", "-"]


def test_the_page_says_on_how_many_images_it_could_compare() -> None:
    assert "In the 2 images with such a pass, <b>3 more than" in found_page(compared=2)


def test_without_a_whole_pass_the_page_claims_nothing_new() -> None:
    page = found_page(compared=0, after=0, before=0, new=0, lost=0)
    assert "Nothing says which are new: first-pass made no pass over the whole image alone" in page
    assert "more than the pass" not in page
    assert '<tr><th scope="row">cat</th><td>6</td><td>2</td><td>17</td></tr>' in page


def test_a_speed_that_was_too_short_to_measure_is_a_dash() -> None:
    page = found_page()
    assert "<strong>\N{EN DASH}</strong><span>images a second</span><em>too short to tell</em>" in page
    assert "<td>\N{EN DASH}</td>" in page


# --- what was run, and what was given up ------------------------------------------------------------


def test_the_page_says_what_was_run() -> None:
    document, details = big_page(1, 0)
    run = {
        "command": "jobs/eval_coco.py --data <here>",
        "settings": {
            "data": "s3://bucket/data",
            "split": "val2017",
            "classes": ["cat", "dog"],
            "networks": {"detector": "tiny:a.safetensors", "score_threshold": 0.01},
            "policies": [{"name": "mine", "kind": "grid"}],
        },
        "workers": {"engine": "local"},
        "versions": {"torch": "2.0"},
        "begun": "2026-11-26 23:00:00 +0000",
        "finished": "2026-11-27 01:00:00 +0000",
        "resumed": True,
    }
    page = render_report(document, details | {"run": run})
    assert "s3://bucket/data \N{MIDDLE DOT} val2017 \N{MIDDLE DOT} tiny:a.safetensors \N{MIDDLE DOT} 2026-11-27" in page
    for text in (
        "jobs/eval_coco.py --data &lt;here&gt;",
        "torch 2.0",
        "engine local",
        "name: mine",
        "<dt>classes</dt><dd>cat, dog</dd>",
        "2026-11-26 23:00:00",
    ):
        assert text in page
    assert "<dt>resumed</dt><dd>yes, in this run folder</dd>" in page


def test_failures_are_counted_by_reason_and_listed() -> None:
    document, details = big_page(1, 0)
    rows = [{"file": f"<{i}>.jpg", "stage": "read", "reason": "damaged", "policies": ["whole"]} for i in range(2)]
    reasons = [{"stage": "read", "reason": "damaged", "count": 300, "example": "<0>.jpg"}]
    failures = {"total": 300, "listed": 300, "reasons": reasons, "rows": rows}
    page = render_report(document, details | {"failures": failures})
    assert '<th scope="row">damaged</th><td>read</td><td>300</td>' in page
    assert '<th scope="row">&lt;0&gt;.jpg</th><td>read</td><td>damaged</td>' in page
    assert "The first 2 of 300" in page
    assert "Images given up" not in render_report(document, details | {"failures": failures | {"total": 0}})


def test_a_sweep_has_its_front_and_all_trials() -> None:
    def trial(name: str, passes: float, worth: float, **changes: Any) -> dict[str, Any]:
        row = {"trial": name, "passes": passes, "AP_small": worth, "AP": 30.0, "complete": True, "error": None}
        return row | {"values": {"policy": "scalenet", "recursion.price": passes / 10}} | changes

    lost = trial("c", math.nan, math.nan, complete=False, error="<b>broke</b>")
    rows = [trial("a", 2.0, 20.0), trial("b", 3.0, 10.0), trial("d", 3.0, 30.0), lost]
    page = render_sweep(rows, 2.5)
    assert "The ceiling is 2.5 detector passes an image." in page
    assert re.findall(r'<th scope="row">([^<]*)</th>', page) == ["d (front)", "a (front)", "b", "c"]
    assert "&lt;b&gt;broke&lt;/b&gt;" in page
    assert "3 of 4 trials saw all images; 1 failed." in page
    assert '<th scope="col">price</th>' in page
    # The best at the price that was asked for.
    assert "<strong>20.0</strong>" in page
    assert "0 of 0 trials" in render_sweep([], None)
    # What follows says why no trial came to its end: its picture must not break before.
    assert "0 of 1 trials saw all images" in front_plot([lost], None)


# --- what a sweep came to ---------------------------------------------------------------------------


def verdict(
    start: dict[str, float],
    best: dict[str, float],
    reported_passes: float = 2.0,
    interval: tuple[float, ...] = (1.0, 0.5, 1.5),
    ceiling: float | None = 2.5,
) -> list[str]:
    found = dict(zip(("difference", "low", "high"), interval, strict=True))
    document = {
        "policies": {
            "first-pass": {"AP_small": 19.0, "detector_passes_per_image": 2.65},
            "tuned": {"AP_small": 20.0, "detector_passes_per_image": reported_passes},
        },
        "differences": {"tuned": {"AP_small": found}},
    }
    contenders = contenders_of({"first-pass": start}, {"tuned": best}, document)
    return sweep_verdict(contenders, ceiling, ("train2017", "val2017"))


START = {"AP_small": 20.0, "passes": 2.0}


@pytest.mark.parametrize("best", [START, {"AP_small": 20.0, "passes": 1.5}, {"AP_small": 19.0, "passes": 2.5}])
def test_a_sweep_that_nothing_beat_the_start_in_says_so(best: dict[str, float]) -> None:
    said = verdict(START, best)
    assert said[0] == (
        "nothing beat the start on train2017: first-pass has AP_small 20.0 at 2.00 passes; best.yaml holds the best "
        "trial all the same, tuned"
    )


def test_a_sweep_says_by_how_much_the_start_was_beaten() -> None:
    said = verdict(START, {"AP_small": 23.5, "passes": 2.25})
    assert said[0].startswith("on train2017 tuned finds AP_small 23.5 at 2.25 passes, +3.5 to first-pass")


def test_a_start_that_is_too_dear_is_beaten_by_nothing() -> None:
    said = verdict(START | {"passes": 2.6}, {"AP_small": 1.0, "passes": 2.0})
    assert "over the ceiling of 2.5" in said[0]
    assert not any("beat" in line for line in said)


@pytest.mark.parametrize(
    ("best", "beaten"),
    [
        # More, but dearer than the start.
        ({"AP_small": 30.0, "passes": 3.0}, False),
        ({"AP_small": 20.5, "passes": 2.0}, True),
    ],
)
def test_without_a_ceiling_the_start_is_beaten_at_its_own_price(best: dict[str, float], beaten: bool) -> None:
    said = verdict(START, best, ceiling=None)
    assert ("nothing beat the start" not in said[0]) == beaten


@pytest.mark.parametrize(
    ("interval", "kind"),
    [
        ((0.5, -0.5, 1.5), "no sure gain on val2017"),
        ((0.5, 0.0, 1.0), "no sure gain on val2017"),
        ((1.0, 0.5, 1.5), "a gain on val2017"),
        ((-1.0, -1.5, -0.5), "a loss on val2017"),
        ((math.nan, math.nan, math.nan), "cannot be compared with first-pass on val2017"),
    ],
)
def test_a_sweep_says_how_sure_its_gain_is(interval: tuple[float, ...], kind: str) -> None:
    assert kind in verdict(START, START, interval=interval)[1]


def test_passes_over_the_ceiling_in_the_report_are_said() -> None:
    best = {"AP_small": 23.0, "passes": 2.48}
    said = (
        "2.70 passes on val2017 exceed the ceiling of 2.5, which held on train2017 (2.48); first-pass takes 2.65 there"
    )
    assert said in verdict(START, best, 2.7)[-1]
    assert not any("exceed" in line for line in verdict(START, best, 2.5) + verdict(START, best, 2.7, ceiling=None))


def test_the_page_of_a_sweep_has_the_start_beside_the_best() -> None:
    rows = [{"trial": "a", "passes": 2.0, "AP_small": 20.0, "AP": 30.0, "complete": True, "error": None, "values": {}}]
    contenders = contenders_of({"first-pass": rows[0]}, {"tuned": rows[0]})
    page = render_sweep(rows, 2.5, contenders, ("train2017", "val2017"))
    assert '<th scope="row">first-pass (start)</th><td>20.0</td><td>2.00</td>' in page
    assert "Nothing beat the start on train2017" in page
