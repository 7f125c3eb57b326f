"""The documentation: links, commands and code blocks, and the build of the site."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from markdown.extensions.toc import slugify

from scalenet_ray.__main__ import COMMANDS, main
from scalenet_ray.core.detections import Detections
from scalenet_ray.models.detectors import load_detector
from tests.documented_world import World, build_world
from tests.job_scripts import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
SHELL = ("", "bash", "sh")
LANGUAGES = (*SHELL, "python", "yaml", "toml", "text")
MEASURED = REPOSITORY / "docs" / "results.md"
"""Its commands are those behind the measurements, on data that is named DATA: hours. Only their flags are checked."""


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        language: what stands after the fence; shell has none, and what is no command is `text`.
        text: what is in it.
        not_run: why it can't be run here, from a comment on the line before: <!-- not run: WHY -->; else "".
    """

    language: str
    text: str
    not_run: str


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def blocks_of(path: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in some of the languages."""
    fence = r"^(?:<!-- not run: ([^\n]+) -->\n)?```(\w*)\n(.*?)^```$"
    found = re.findall(fence, path.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, text, why) for why, language, text in found if language in languages]


def prose_of(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors_of(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose_of(path), re.MULTILINE)
    return {slugify(re.sub(r"[`*]", "", heading), "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), target
        assert not anchor or anchor in anchors_of(place), target


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_block_says_what_it_is(path: Path) -> None:
    fences = re.findall(r"^ *(`{3,}.*)$", path.read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(blocks_of(path, *LANGUAGES)), f"a block is no plain one of {LANGUAGES}: {fences}"
    assert path.read_text().count("<!--") == sum(bool(block.not_run) for block in blocks_of(path, *LANGUAGES))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[World]:
    with build_world(tmp_path_factory.mktemp("world"), s3_endpoint) as built:
        yield built


RUN = {
    name_of(path): [block for block in blocks_of(path, *SHELL, "python") if not block.not_run]
    for path in PAGES
    if path != MEASURED
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [page for page, blocks in RUN.items() if blocks])
def test_what_a_page_tells_to_run_runs_as_written(page: str, world: World) -> None:
    world.tidy()
    for block in RUN[page]:
        done = world.run_python(block.text) if block.language == "python" else world.run(block.text)
        assert done.returncode == 0, f"{block.text}\n{done.stdout}"


@pytest.mark.slow
def test_a_command_that_fails_fails_its_block(world: World) -> None:
    assert world.run("make no-such-target\ntrue").returncode != 0
    assert world.run("no-such-program | cat").returncode != 0
    assert world.run("scalenet-ray show nowhere.jpg\ntrue").returncode != 0


def test_the_readmes_detector_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = (block.text for block in blocks_of(REPOSITORY / "README.md", "python") if "class My" in block.text)
    (tmp_path / "my_detector.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = load_detector("my_detector:MyDetector")([np.zeros((480, 640, 3), np.uint8)])
    assert isinstance(found, Detections)
    assert len(found) == 1


def test_the_clusters_python_is_where_the_pages_say() -> None:
    cluster = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    # ~ is /home/ray in Ray's images, where the project is mounted too.
    assert any(command.endswith("python -m venv ~/venv") for command in cluster["setup_commands"])
    assert "/home/ray/project/scalenet_ray" in cluster["file_mounts"]
    assert "RUN python -m venv /home/ray/venv\n" in (REPOSITORY / "Dockerfile").read_text()


@cache
def flags_of(command: str) -> frozenset[str]:
    """The flags of a command of `scalenet-ray`, or of a script, jobs/NAME.py."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        if command.endswith(".py"):
            patched.setattr(sys, "argv", [command, "--help"])
            runpy.run_path(str(REPOSITORY / command), run_name="__main__")
        else:
            main([command, "--help"])
    return frozenset(re.findall(r"--[a-z][a-z-]*", printed.getvalue()))


def commands_in(path: Path) -> list[list[str]]:
    """The commands and scripts that a page's shell blocks call, each as its name and flags."""
    found = []
    for block in blocks_of(path, *SHELL):
        for line in block.text.replace("\\\n", " ").splitlines():
            called = re.search(r"(?:(?:python|PYTHON) (jobs/\w+\.py)|(?:^|=\w+ )scalenet-ray (\w[\w-]*))(.*)", line)
            if called is not None:
                words = shlex.split(called[3], comments=True)
                found.append([called[1] or called[2], *(word for word in words if word.startswith("--"))])
    return found


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_flag_in_a_command_exists(path: Path) -> None:
    for name, *flags in commands_in(path):
        unknown = [flag for flag in flags if flag.partition("=")[0] not in flags_of(name)]
        assert not unknown, f"{name} {unknown}"


def test_the_pages_call_every_command_and_experiment() -> None:
    called = {name for path in PAGES for name, *_ in commands_in(path)}
    assert {*COMMANDS, "jobs/eval_digits.py", "jobs/eval_cifar.py"} <= called


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "algorithm" / "index.html").read_text()
    assert "recursive_detect" in page
    assert "xyxy" in page
    home = (tmp_path / "site" / "index.html").read_text()
    # A page that fetches something shows nothing where there is no network.
    assert not re.search(r'(?:src|href)="https?://[^"]+\.(?:js|css|woff2?)"', home)
