"""The modules behind the scripts in jobs/, and the comparison of their results."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from scalenet_ray.__main__ import main

REPOSITORY = Path(__file__).parents[1]

COMMAND_MODULES = {
    "detect": "detect",
    "eval_coco": "evaluate",
    "finetune_detector": "finetune",
    "train_scalenet": "train",
    "tune_recursion": "tune",
}
"""Script in jobs/ -> the module in scalenet_ray/commands/ that it calls."""


def load_job(name: str) -> ModuleType:
    """The module with the dataclass and `main` of jobs/NAME.py: a command, or else the script, loaded once."""
    if name in COMMAND_MODULES:
        return importlib.import_module(f"scalenet_ray.commands.{COMMAND_MODULES[name]}")
    module_name = f"job_{name}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, REPOSITORY / "jobs" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return sys.modules[module_name]


def run_command(*arguments: str) -> int:
    """The exit status of a command, run in this process."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


def _rows(results: list[dict[str, Any]]) -> np.ndarray:
    """[N, 7] image id, category id, score, x, y, width, height."""
    rows = [(row["image_id"], row["category_id"], row["score"], *row["bbox"]) for row in results]
    return np.array(rows, np.float64).reshape(-1, 7)


def same_results(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """COCO results that match one to one but for a network's last digits, in any order.

    Boxes match within 0.01 px, scores within 1e-4. Noise of 1e-6 at each layer, ten times float32's rounding, moves
    what the sample's networks find by a tenth of either, and noise of 1e-5 changes none of their decisions.
    """
    left, right = _rows(one), _rows(other)
    if left.shape != right.shape:
        return False
    tolerance = np.array([0, 0, 1e-4, 0.01, 0.01, 0.01, 0.01])
    for image_id in np.unique(left[:, 0]):
        mine, theirs = left[left[:, 0] == image_id], right[right[:, 0] == image_id]
        near = (np.abs(mine[:, None] - theirs[None]) <= tolerance).all(axis=2)
        free = np.ones(len(theirs), bool)
        for row in near:
            partners = np.flatnonzero(row & free)
            if not len(partners):
                return False
            free[partners[0]] = False
    return True
