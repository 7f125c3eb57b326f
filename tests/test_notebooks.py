"""The notebooks run from start to end and their stored outputs are small."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.job_scripts import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def test_the_notebooks_are_those_that_the_documentation_names() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["01_look_first", "02_digits", "03_your_detector", "04_cluster"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_small_and_no_errors(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert path.stat().st_size < 500_000
    # Cells that only define something print nothing.
    assert sum(bool(cell.outputs) for cell in cells) > len(cells) / 2
    assert [output for cell in cells for output in cell.outputs if output.output_type == "error"] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# jupyter_client says of itself that a kernel on this machine is reached without encryption.
@pytest.mark.filterwarnings("ignore")
def test_it_runs_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    # The kernel's own: where the package is, and one thread on shared cores.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(path.parent)}}).execute()
