"""The documentation holds: links lead somewhere, code compiles, flags exist, the site is built without a warning."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import tyro
from markdown.extensions.toc import slugify

from scalenet_ray.__main__ import Export, Show
from tests.job_scripts import REPOSITORY, load_job

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
RUNS = "# runs\n"


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def blocks_of(path: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of some languages ("" for none)."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


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
def test_no_page_sends_a_reader_to_a_package_registry(path: Path) -> None:
    assert not re.search(r"pypi\.org|pythonhosted\.org|anaconda\.org", path.read_text())


PYTHON = [
    pytest.param(text, id=f"{name_of(path)}-{i}") for path in PAGES for i, text in enumerate(blocks_of(path, "python"))
]


@pytest.mark.parametrize("text", PYTHON)
def test_every_python_block_compiles(text: str) -> None:
    compile(text, "a block", "exec")


def test_blocks_that_say_so_run(tmp_path: Path) -> None:
    texts = [text for path in PAGES for text in blocks_of(path, "python") if text.startswith(RUNS)]
    assert len(texts) >= 3
    # In one process, one after the other, each with names of its own.
    script = "".join(f"exec(compile({text!r}, 'block {i}', 'exec'), {{}})\n" for i, text in enumerate(texts))
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{script}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@cache
def flags_of(command: str) -> frozenset[str]:
    """The flags that a job, or a command of the package, knows."""
    if command in ("show", "export"):
        kind: type = {"show": Show, "export": Export}[command]
    else:
        module = load_job(command)
        named = re.search(r"parse_arguments\((\w+)", Path(str(module.__file__)).read_text())
        assert named is not None
        kind = getattr(module, named[1])
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        tyro.cli(kind, args=["--help"])
    return frozenset(re.findall(r"--[a-z][a-z-]*", said.getvalue()))


def commands_in(path: Path) -> list[list[str]]:
    """The jobs and commands of the package that a page's shell blocks call, each as its name and flags."""
    found = []
    for text in blocks_of(path, "", "bash", "sh", "shell"):
        for line in text.replace("\\\n", " ").splitlines():
            called = re.search(r"python (?:jobs/(\w+)\.py|-m scalenet_ray (\w+))(.*)", line)
            if called is not None:
                words = shlex.split(called[3], comments=True)
                found.append([called[1] or called[2], *(word for word in words if word.startswith("--"))])
    return found


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_flag_in_a_command_exists(path: Path) -> None:
    for name, *flags in commands_in(path):
        unknown = [flag for flag in flags if flag.partition("=")[0] not in flags_of(name)]
        assert not unknown, f"{name} {unknown}"


def test_the_pages_call_every_job_and_command() -> None:
    called = {name for path in PAGES for name, *_ in commands_in(path)}
    jobs = {path.stem for path in (REPOSITORY / "jobs").glob("*.py")} - {"train_tiny_detector"}
    assert jobs | {"show", "export"} <= called


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "recursive_detect" in page
    assert "xyxy" in page
    home = (tmp_path / "site" / "index.html").read_text()
    # A page that fetches something shows nothing where there is no network.
    assert not re.search(r'(?:src|href)="https?://[^"]+\.(?:js|css|woff2?)"', home)
