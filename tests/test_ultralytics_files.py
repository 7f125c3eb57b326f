"""`ultralytics:PATH`: files that are refused in words, and not run."""

from __future__ import annotations

import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scalenet_ray.core.errors import UserError
from scalenet_ray.models.detectors import load_detector

pytest.importorskip("ultralytics", reason="needs the extra ultralytics: pip install -e '.[ultralytics]'")

from tests.ultralytics_models import build, save

RAN = "ran"


class Runs:
    """A pickle that writes a file when it is read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._folder / RAN),)


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as error:
        load_detector("ultralytics:" + str(path))
    return str(error.value)


def test_a_pickle_of_something_else_is_refused_and_not_run(tmp_path: Path) -> None:
    for entries in ({"model": Runs(tmp_path)}, {"model": build("yolov8n"), "train_args": Runs(tmp_path)}):
        torch.save(entries, tmp_path / "net.pt")
        assert "got a pickle that calls posix.mkdir, which no model needs: it was not run" in refusal(
            tmp_path / "net.pt"
        )
    with open(tmp_path / "bare.pt", "wb") as handle:
        pickle.dump({"model": Runs(tmp_path)}, handle)
    assert "got a file that torch.save has not written, or not whole" in refusal(tmp_path / "bare.pt")
    assert not (tmp_path / RAN).exists()


def test_a_file_of_the_yolov5_repository_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("Model", (nn.Module,), {"__module__": "models.yolo"})
    module = types.ModuleType("models.yolo")
    module.Model = kind  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "models", types.ModuleType("models"))
        patch.setitem(sys.modules, "models.yolo", module)
        torch.save({"model": kind()}, tmp_path / "net.pt")
    assert "got a model of the YOLOv5 or YOLOv7 repository: export it to ONNX" in refusal(tmp_path / "net.pt")


def test_a_model_with_layers_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics.nn.modules import block

    name = "ultralytics.nn.modules.block"
    with monkeypatch.context() as patch:
        kind = type("LaterBlock", (nn.Module,), {"__module__": name})
        patch.setattr(block, "LaterBlock", kind, raising=False)
        model = build("yolov8n")
        model.model[0] = kind()
        save(tmp_path / "net.pt", model)
    assert f"got one with {name}.LaterBlock, which it lacks: install the version that wrote it" in refusal(
        tmp_path / "net.pt"
    )


def test_a_model_that_does_not_run_in_this_version_is_refused(tmp_path: Path) -> None:
    model = build("yolov8n")
    del model.model[-1].stride
    said = refusal(save(tmp_path / "net.pt", model, version="9.9.9"))
    assert "must hold a model that runs in the installed Ultralytics" in said
    assert "it was written by version 9.9.9, install that one" in said


@pytest.mark.parametrize("names", [{0: "cat", 1: "dog"}, ["cat", "dog", "kite", "hat"], {1: "cat", 2: "dog", 3: "hat"}])
def test_names_that_are_not_those_of_the_classes_are_refused(tmp_path: Path, names: Any) -> None:
    model = build("yolov8n")
    model.names = names
    said = refusal(save(tmp_path / "net.pt", model))
    assert f"net.pt: a model of 3 classes must name them 0 to 2, got {len(names)} names" in said


@pytest.mark.parametrize(
    ("kind", "head"), [("yolov8n-pose", "Pose"), ("yolov8n-obb", "OBB"), ("yolov8n-cls", "Classify")]
)
def test_models_of_other_tasks_are_refused(tmp_path: Path, kind: str, head: str) -> None:
    from ultralytics.nn import tasks

    make = {"Pose": tasks.PoseModel, "OBB": tasks.OBBModel, "Classify": tasks.ClassificationModel}[head]
    said = refusal(save(tmp_path / "net.pt", make(f"{kind}.yaml", verbose=False)))
    assert f"must detect or segment objects, got a model that ends in {head}" in said


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot read .*nowhere\.pt: there is no such file"):
        load_detector("ultralytics:" + str(tmp_path / "nowhere.pt"))


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    assert "got the entries weight: save it with Ultralytics' own model.save()" in refusal(tmp_path / "state.pt")
    whole = Path(save(tmp_path / "net.pt", build("yolov8n"))).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("cut.pt", "empty.pt"):
        assert "got a file that torch.save has not written, or not whole" in refusal(tmp_path / name)
    assert "that ends in .pt; for its exports use onnx:PATH" in refusal(tmp_path / "net.onnx")
    torch.jit.save(torch.jit.trace(nn.Conv2d(3, 1, 1), torch.zeros(1, 3, 4, 4)), tmp_path / "script.pt")
    assert "got TorchScript" in refusal(tmp_path / "script.pt")


def test_an_ultralytics_whose_loader_runs_what_it_reads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics.nn import tasks

    def former(weight: str, safe_only: bool = False) -> None:
        """The loader until 8.4.60."""

    monkeypatch.setattr(tasks, "torch_safe_load", former)
    assert "needs ultralytics 8.4.70 or later, got" in refusal(save(tmp_path / "net.pt", build("yolov8n")))
