"""Rules of the repository: imports, versions, the lock file, public names, the audit of dependencies."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import scalenet_ray
from tests.job_scripts import REPOSITORY

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "jobs").glob("*.py"))
INSTALLS = ("requirements.txt", "requirements-demo.txt", "Makefile", ".ci/run", ".pre-commit-config.yaml")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(name: str = "requirements.txt") -> list[str]:
    """Requirements of a lock file, each with its continuation lines."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def locked_version(name: str) -> str:
    return next(line for line in requirements() if line.startswith(f"{name}==")).split()[0].partition("==")[2]


def loaded_by(modules: list[str]) -> set[str]:
    """The top-level packages that importing `modules` loads, in a process of its own."""
    script = f"import sys, {', '.join(modules)}; sys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


NETWORKS_OF_EXTRAS = {"ray", "torch", "torchvision"}


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        (["scalenet_ray"], NETWORKS_OF_EXTRAS | {"numpy"}),
        (["scalenet_ray.__main__"], NETWORKS_OF_EXTRAS | {"onnxruntime", "matplotlib"}),
        (["scalenet_ray.commands.detect", "scalenet_ray.commands.show"], NETWORKS_OF_EXTRAS),
    ],
)
def test_imports_load_no_more_than_is_needed(modules: list[str], without: set[str]):
    assert not loaded_by(modules) & without


def test_no_job_imports_another():
    others = {job.stem for job in JOBS} | {"jobs"}
    found = {job.stem: {name.partition(".")[0] for name in imports_of(job)} & others for job in JOBS}
    assert found == {job.stem: set() for job in JOBS}


def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert scalenet_ray.__version__ == project()["version"] == newest[1]


@pytest.mark.parametrize("name", INSTALLS)
def test_what_installs_names_no_address(name: str):
    text = (ROOT / name).read_text()
    assert not re.search(r"://|--(extra-)?index-url|--find-links|--trusted-host", text)


def test_the_demos_environment_is_part_of_the_whole_one():
    light = requirements("requirements-demo.txt")
    # A platform's marker may differ: the whole environment needs some packages on every one.
    assert {line.split()[0] for line in light} <= {line.split()[0] for line in requirements()}
    assert not {line.partition("==")[0] for line in light} & {"torch", "torchvision", "scikit-learn", "optuna"}


def asked(extra: str) -> set[str]:
    """Requirements of an extra, and of the extras that it names."""
    found: set[str] = set()
    for text in project()["optional-dependencies"][extra]:
        name, _, others = text.partition("[")
        found |= set().union(*map(asked, others.strip("]").split(","))) if name == "scalenet-ray" else {text}
    return found


def test_the_lock_holds_what_the_project_asks_for():
    wanted = {*project()["dependencies"], *asked("dev")}
    names = {re.split(r"[^\w.-]", requirement)[0] for requirement in wanted}
    assert names - {line.partition("==")[0] for line in requirements()} == set()
    exact = [requirement.partition("==") for requirement in wanted if "==" in requirement]
    assert {name.partition("[")[0] for name, _, _ in exact} == {"ray"}
    assert [(name, pin) for name, _, pin in exact if locked_version(name.partition("[")[0]) != pin] == []


def test_all_is_every_extra_but_those_of_developers():
    extras = project()["optional-dependencies"]
    # Ultralytics is AGPL-3.0: nobody gets it without asking for it.
    runtime = set(extras) - {"all", "dev", "imagenet", "ultralytics"}
    assert asked("all") == set().union(*map(asked, runtime))


# --- The public names of the package, and what importing them loads -------------------------------


PROMISED = {
    "Detections",
    "Detector",
    "ImagePrediction",
    "ImageResult",
    "Merging",
    "Policy",
    "Prediction",
    "Recursion",
    "ScaleMap",
    "ScaledPrediction",
    "Step",
    "Tile",
    "TileError",
    "UserError",
    "Window",
    "__version__",
    "decode_image",
    "detect",
    "export_run",
    "get_scaled_prediction",
    "load_detector",
    "load_predictor",
    "parse_policy",
    "read_policies",
    "recursive_detect",
    "to_supervision",
    "wrap_sahi",
    "wrap_supervision",
}


def test_the_public_names_are_those_that_are_promised() -> None:
    assert set(scalenet_ray.__all__) == PROMISED
    assert set(dir(scalenet_ray)) >= PROMISED


def test_every_promised_name_can_be_had_and_says_what_it_is() -> None:
    for name in PROMISED - {"__version__"}:
        assert inspect.getdoc(getattr(scalenet_ray, name)), name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'scalenet_ray' has no attribute 'Detection'"):
        scalenet_ray.Detection  # noqa: B018


# --- audit ----------------------------------------------------------------------------------------


CLEAN = {"name": "a", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "b", "skip_reason": "not found"}
OPEN = {"name": "c", "version": "2.0", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.1"]}]}


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", REPOSITORY / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_known_vulnerability_fails_unless_it_is_accepted(audit: ModuleType, monkeypatch: pytest.MonkeyPatch):
    text, status = audit.judge({"dependencies": [CLEAN, UNKNOWN, OPEN]})
    assert status == 1
    assert "c 2.0: PYSEC-1, mended in 2.1\nvulnerabilities: 2 of 3 packages audited, 1 open, 0 accepted" in text
    monkeypatch.setattr(audit, "ACCEPTED", {"CVE-1": "we never call it"})
    accepted = "vulnerabilities: 2 of 3 packages audited, 0 open, 1 accepted"
    assert audit.judge({"dependencies": [CLEAN, UNKNOWN, OPEN]}) == (accepted, 0)


@pytest.mark.parametrize("report", [None, {"dependencies": [UNKNOWN]}])
def test_where_no_registry_answers_it_says_so_and_does_not_fail(audit: ModuleType, report: dict[str, Any] | None):
    assert audit.judge(report) == ("vulnerabilities: not audited, no registry answered", 0)
