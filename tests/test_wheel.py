"""The wheel, installed beside its own dependencies alone: no checkout, no torch, no Ray, no network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.job_scripts import REPOSITORY
from tests.test_repository import project

pytestmark = pytest.mark.slow


def closure(requirements: list[str]) -> Iterator[Distribution]:
    """The installed distributions that requirements lead to, each once."""
    ahead = [Requirement(text) for text in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while ahead:
        wanted = ahead.pop()
        key = (wanted.name.lower(), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        found = distribution(wanted.name)
        yield found
        for text in found.requires or []:
            further = Requirement(text)
            extras = ["", *wanted.extras]
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                ahead.append(further)


def link_dependencies(site_packages: Path) -> None:
    """Link what the core asks for, and nothing else that is installed here."""
    for found in closure(project()["dependencies"]):
        for top in {path.parts[0] for path in found.files or []} - {"..", "__pycache__"}:
            source, target = Path(str(found.locate_file(top))), site_packages / top
            if source.exists() and not target.exists():
                target.symlink_to(source)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel and the dependencies of its core."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(REPOSITORY / "scalenet_ray", source / "scalenet_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input"]
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True, capture_output=True, text=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    install = ["--python", str(folder / "env" / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True, text=True, cwd=folder)
    (site_packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    link_dependencies(site_packages)
    assert not any((site_packages / name).exists() for name in ("ray", "torch", "torchvision", "pandas"))
    return folder / "env" / "bin"


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command in an empty folder; Python is told of no other place."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [str(installed / "scalenet-ray"), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_show_draws_a_scene_of_the_sample(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "show")
    assert done.returncode == 0, done.stderr
    assert "merged: " in done.stdout
    assert (tmp_path / "recursion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(600)
def test_detect_runs_on_the_sample_in_one_process(installed: Path, tmp_path: Path) -> None:
    flags = ("--engine", "local", "--policy", "scalenet", "--limit", "3", "--output", "run")
    done = run(installed, tmp_path, "detect", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "3 of 3 images done, results in run (open its report.html)"
    assert json.loads((tmp_path / "run" / "results.json").read_text())
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("detect", "--images", "."), "error: ray is not installed: pip install 'scalenet-ray[ray]'"),
        (("train",), "is not installed: pip install 'scalenet-ray[train]'"),
        (("tune",), "is not installed: pip install 'scalenet-ray[train]'"),
        (("export-onnx", "net.safetensors"), "is not installed: pip install 'scalenet-ray[torch]'"),
        (("show", "--detector", "torchvision:x"), "is not installed: pip install 'scalenet-ray[torch]'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_needs_an_extra_names_it(installed: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = run(installed, tmp_path, *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
