"""The rules that the code as a whole keeps."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import scalenet_ray

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "scalenet_ray").rglob("*.py"))
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


def test_importing_the_package_loads_neither_ray_nor_torch():
    assert not loaded_by(["scalenet_ray"]) & {"ray", "torch", "numpy"}


def test_the_command_to_export_loads_neither_networks_nor_ray_nor_what_draws():
    assert not loaded_by(["scalenet_ray.__main__"]) & {"ray", "torch", "torchvision", "onnxruntime", "matplotlib"}


def test_every_module_of_the_engine_imports_ray():
    engine = [path for path in PACKAGE if path.parent.name == "engine" and path.name != "__init__.py"]
    assert [path.name for path in engine if "ray" not in {name.partition(".")[0] for name in imports_of(path)}] == []


def test_the_root_of_the_package_holds_what_users_call():
    root = {path.stem for path in PACKAGE if path.parent.name == "scalenet_ray"}
    assert root == {"__init__", "__main__", "api", "console", "workflows"}


def test_a_local_run_loads_neither_ray_nor_torch():
    assert not loaded_by(["scalenet_ray.commands.detect", "scalenet_ray.commands.show"]) & {"ray", "torch"}


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


@pytest.mark.parametrize(("name", "least"), [("requirements.txt", 100), ("requirements-demo.txt", 50)])
def test_every_locked_requirement_has_a_version_and_a_hash(name: str, least: int):
    lines = requirements(name)
    assert len(lines) > least
    assert [line for line in lines if not re.match(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", line)] == []


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
    runtime = set(extras) - {"all", "dev", "imagenet"}
    assert asked("all") == set().union(*map(asked, runtime))


def test_the_licence_is_there_and_named():
    assert project()["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
