"""What the pages say, and which pictures they hold."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from scalenet_ray.core.samples import write_sample
from scalenet_ray.engine.pictures import choose_pictures
from scalenet_ray.models.networks import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkNames
from scalenet_ray.report.canvases import render_canvases
from scalenet_ray.report.page import render_report
from scalenet_ray.report.policies import winner_of
from scalenet_ray.report.sweep import render_sweep
from scalenet_ray.report.training import render_training
from tests.job_scripts import load_job
from tests.report_fakes import big_page

NETWORKS = NetworkNames(detector=SAMPLE_DETECTOR, scale_net=SAMPLE_SCALE_NET)


def pictures_of(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])["pictures"]


def test_the_best_policy_that_reads_no_ground_truth_wins() -> None:
    rows = {"whole": {"AP_small": 3.0}, "scalenet": {"AP_small": 5.0}, "oracle": {"AP_small": 9.0}}
    assert winner_of(rows) == "scalenet"
    assert winner_of({"whole": {"AP_small": math.nan}, "grid-2": {"AP_small": 1.0}}) == "grid-2"
    assert winner_of({"first-pass": {}}) == "first-pass"
    assert winner_of({}) is None


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


def test_a_run_without_figures_still_has_a_page() -> None:
    row = {"AP": math.nan, "AP_small": math.nan, "detector_passes_per_image": 0.0}
    page = render_report({"images": {"total": 2, "done": 0, "failed": 2}, "policies": {"whole": row}})
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
    assert "0 of 1 images done, 1 failed" in page


def test_a_training_has_its_curves() -> None:
    rows = [
        {"epoch": i, "loss": 1 / i, "learning_rate": 0.1, "val": {"iou": [90.0, 40.0 + i], "ap": 3.0}, "seconds": 2.0}
        for i in (1, 2, 3)
    ]
    page = render_training({"epochs": rows, "failed": ["a.jpg: damaged"]})
    for title in ("Loss by epoch", "IoU by class and epoch", "Learning rate by epoch"):
        assert f'aria-label="{title}"' in page
    assert "3 epochs done; 1 images left out." in page
    assert "0 epochs done" in render_training({"epochs": [], "failed": []})


def test_a_sweep_has_its_front_and_all_trials() -> None:
    def trial(name: str, passes: float, worth: float, **changes: Any) -> dict[str, Any]:
        row = {"trial": name, "passes": passes, "AP_small": worth, "AP": 30.0, "complete": True, "error": None}
        return row | {"values": {"policy": "scalenet", "recursion.price": passes / 10}} | changes

    lost = trial("c", math.nan, math.nan, complete=False, error="<b>broke</b>")
    rows = [trial("a", 2.0, 20.0), trial("b", 3.0, 10.0), trial("d", 3.0, 30.0), lost]
    page = render_sweep(rows, 2.5)
    assert re.findall(r'<th scope="row">([^<]*)</th>', page) == ["d (front)", "a (front)", "b", "c"]
    assert "&lt;b&gt;broke&lt;/b&gt;" in page
    assert "3 of 4 trials saw all images; 1 failed." in page
    assert "recursion.price" in page
    # The best at the price that was asked for.
    assert "<strong>20.0</strong>" in page
    assert "0 of 0 trials" in render_sweep([], None)


def test_an_experiment_on_canvases_has_its_table_and_pictures() -> None:
    scores = {"plain": {"test": {"mean": 90.0, "std": 0.5}}, "scalenet": {"test": {"mean": 95.0, "std": 0.2}}}
    page = render_canvases("mnist", scores, "trained on 3", '<svg id="a"></svg>', "")
    assert "<b>95.00</b> <small>(0.20)</small>" in page
    assert 'aria-label="Predicted against true scale"' in page
    assert "The steps of one recursion" not in page
