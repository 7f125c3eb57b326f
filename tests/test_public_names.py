"""What the package promises: its public names, and what their docstrings say."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import scalenet_ray
from tests.job_scripts import REPOSITORY

PROMISED = {
    "Detections",
    "Detector",
    "ImageResult",
    "Merging",
    "Policy",
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
    "export_run",
    "get_scaled_prediction",
    "load_detector",
    "load_predictor",
    "parse_policy",
    "read_policies",
    "recursive_detect",
    "to_supervision",
}
MODULES = [
    path
    for path in sorted((REPOSITORY / "scalenet_ray").rglob("*.py"))
    if path.name not in ("__main__.py", "__init__.py", "version.py")
]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


def public_definitions(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The functions and classes of a module that its `__all__` names, and their public methods."""
    tree = ast.parse(path.read_text())
    module = importlib.import_module(module_of(path))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in module.__all__:
            yield node
            if isinstance(node, ast.ClassDef):
                methods = (item for item in node.body if isinstance(item, ast.FunctionDef))
                yield from (item for item in methods if not item.name.startswith("_"))


def test_the_public_names_are_those_that_are_promised() -> None:
    assert set(scalenet_ray.__all__) == PROMISED
    assert set(dir(scalenet_ray)) >= PROMISED


def test_every_promised_name_can_be_had_and_says_what_it_is() -> None:
    for name in PROMISED - {"__version__"}:
        assert inspect.getdoc(getattr(scalenet_ray, name)), name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'scalenet_ray' has no attribute 'Detection'"):
        scalenet_ray.Detection  # noqa: B018


def test_asking_for_arrays_loads_neither_ray_nor_torch() -> None:
    script = (
        "import sys, scalenet_ray\n"
        "scalenet_ray.Detections, scalenet_ray.recursive_detect, scalenet_ray.parse_policy\n"
        "scalenet_ray.load_detector\n"
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_each_module_says_what_is_public_in_it(path: Path) -> None:
    module = importlib.import_module(module_of(path))
    assert module.__doc__
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_every_public_function_and_class_has_a_docstring(path: Path) -> None:
    bare = [node.name for node in public_definitions(path) if not ast.get_docstring(node)]
    assert bare == []


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_whoever_takes_an_array_says_its_shape(path: Path) -> None:
    silent = []
    for node in public_definitions(path):
        if isinstance(node, ast.FunctionDef):
            hints = [one.annotation for one in (*node.args.args, *node.args.kwonlyargs)]
            texts = [ast.unparse(hint) for hint in hints if hint is not None]
            # Named arrays (a batch, sums) have the shapes that their maker says.
            takes = any(re.search(r"ndarray|Tensor", text) and not re.search("Mapping|dict", text) for text in texts)
            if takes and not re.search(r"\[[^\]]+\]|scalar", ast.get_docstring(node) or ""):
                silent.append(node.name)
    assert silent == []


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_what_a_public_function_raises_by_itself_is_in_its_docstring(path: Path) -> None:
    silent = []
    for node in public_definitions(path):
        if not isinstance(node, ast.FunctionDef):
            continue
        raised = {
            error.exc.func.id
            for error in ast.walk(node)
            if isinstance(error, ast.Raise) and isinstance(error.exc, ast.Call) and isinstance(error.exc.func, ast.Name)
        }
        said = ast.get_docstring(node) or ""
        silent += [f"{node.name}: {name}" for name in raised if name not in said]
    assert silent == []
