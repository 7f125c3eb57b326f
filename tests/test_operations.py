"""Metrics for Prometheus, the dashboard, the log, and the page that explains them."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import time
import urllib.request
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

from bench.fakes import TILES_PER_IMAGE, fake_networks, records_of, two_windows
from scalenet_ray.console import JsonLines, log_to_stderr
from scalenet_ray.core.timing import STAGES
from scalenet_ray.engine.metrics import METRICS
from scalenet_ray.engine.session import RaySession
from scalenet_ray.runs.batch import PolicyRun
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.local import LocalSession, Session
from scalenet_ray.runs.resources import ResourceChoice
from tests.job_scripts import REPOSITORY
from tests.one_bad_image import BAD_IMAGE, open_but_one

PAGE = (REPOSITORY / "docs" / "operations.md").read_text()
DASHBOARD = json.loads((REPOSITORY / "ops" / "grafana.json").read_text())


def exported_name(name: str) -> str:
    """The name of a metric in Prometheus."""
    return f"ray_{name}_total" if METRICS[name].kind == "counter" else f"ray_{name}"


def work(session: Session, images: int, folder: Path) -> None:
    # No other test's run has this name.
    policy = replace(two_windows(), name="watched")
    start = partial(session.start, policy=policy, networks=fake_networks(), open_image=open_but_one)
    PolicyRun(records_of(images), policy.name, start, RunFolder(str(folder)), lambda _: None).finish()


def scraped() -> dict[tuple[str, str], float]:
    """(name, tags) -> value, of what this node exports of our run, summed over processes."""
    import ray

    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    values: dict[tuple[str, str], float] = {}
    for line in urllib.request.urlopen(address, timeout=10).read().decode().splitlines():
        found = re.fullmatch(r"(ray_scalenet_\w+)\{(.*)\} (\S+)", line)
        if found and 'policy="watched"' in found[2]:
            own = re.findall(r"(outcome|depth|stage|guard|state)=\"([^\"]*)\"", found[2])
            key = (found[1], ",".join(f"{name}={value}" for name, value in sorted(own)))
            values[key] = values.get(key, 0.0) + float(found[3])
    return values


@pytest.mark.ray
@pytest.mark.slow
def test_prometheus_is_told_what_was_done(idle_ray: None, tmp_path: Path) -> None:
    work(RaySession(ResourceChoice()), 20, tmp_path / "run")
    wanted = {
        ("ray_scalenet_images_total", "outcome=done"): 19,
        ("ray_scalenet_images_total", "outcome=failed"): 1,
        ("ray_scalenet_failures_total", "stage=read"): 1,
        ("ray_scalenet_tiles_total", "depth=1"): 19 * (TILES_PER_IMAGE - 1),
        ("ray_scalenet_batch_tiles_total", "stage=detect"): 19 * TILES_PER_IMAGE,
        ("ray_scalenet_batch_tiles_total", "stage=look"): 19,
    }
    until = time.monotonic() + 90
    while True:
        now = scraped()
        told = {key: now.get(key) for key in wanted}
        if told == wanted or time.monotonic() > until:
            break
        time.sleep(2)
    assert told == wanted
    names = {name for name, _ in now}
    # No limit acted, so there is no counter of them.
    assert names == {exported_name(name) for name in METRICS} - {"ray_scalenet_guards_total"}
    assert now[("ray_scalenet_stage_seconds_total", "stage=detect")] > 0


def test_the_dashboard_asks_for_each_metric_and_for_no_other() -> None:
    queries = " ".join(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])
    assert set(re.findall(r"ray_scalenet_\w+", queries)) == {exported_name(name) for name in METRICS}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_dashboard_tells_apart_by_tags_that_there_are() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            names = [name for name in METRICS if exported_name(name) in target["expr"]]
            tags = {tag for name in names for tag in METRICS[name].tags} | ({"instance"} if not names else set())
            by = re.findall(r"by \(([^)]*)\)", target["expr"])
            assert {tag.strip() for group in by for tag in group.split(",")} <= tags


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: install prometheus (Debian: apt)")
def test_prometheus_reads_every_query_of_the_dashboard(tmp_path: Path) -> None:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    # Grafana fills in its variables before it asks.
    filled = [query.replace("$__rate_interval", "1m").replace("$policy", ".*") for query in queries]
    rules = [{"record": f"panel:{i}", "expr": query} for i, query in enumerate(filled)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    checked = subprocess.run(
        ["promtool", "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert not [query for query in filled if "$" in query]


def test_the_page_explains_each_metric_stage_and_limit() -> None:
    source = "".join(path.read_text() for path in (REPOSITORY / "scalenet_ray").rglob("*.py"))
    guards = set(re.findall(r"guards\.append\(\"(\w+)\"\)", source)) | {"max_depth", "batch_halved"}
    assert len(guards) > 4
    failing = set(re.findall(r"Failure\(\"(\w+)\"", source))
    assert failing == {"read", "look", "detect"}
    wanted = {exported_name(name) for name in METRICS} | guards | failing
    assert {name for name in wanted if f"`{name}`" not in PAGE} == set()
    assert all(stage in PAGE for stage in STAGES)


def test_an_image_that_is_given_up_is_a_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "scalenet_ray.runs.batch"):
        work(LocalSession(), 4, tmp_path / "run")
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    line = json.loads(JsonLines().format(record))
    about = {"policy": "watched", "image_id": BAD_IMAGE, "file": "3.jpg", "stage": "read", "reason": "not a picture"}
    assert line.items() >= {**about, "level": "WARNING", "message": "image given up: 3.jpg: not a picture"}.items()


def test_the_log_says_more_where_it_is_asked_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCALENET_RAY_LOG", "debug")
    log_to_stderr()
    logging.getLogger("scalenet_ray.runs.batch").debug("limits acted", extra={"fields": {"image_id": 7}})
    assert json.loads(capsys.readouterr().err)["image_id"] == 7
    monkeypatch.setenv("SCALENET_RAY_LOG", "loud")
    with pytest.raises(ValueError, match="SCALENET_RAY_LOG must be DEBUG, INFO, WARNING or ERROR, got LOUD"):
        log_to_stderr()
