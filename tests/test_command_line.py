"""The command line: its help, each command in process and as `python -m scalenet_ray`, quick start-up."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

import scalenet_ray
from scalenet_ray import __main__ as program
from scalenet_ray.__main__ import COMMANDS
from scalenet_ray.commands.policy import POLICIES
from scalenet_ray.core.policy import parse_policy
from scalenet_ray.data.policy_files import read_policies
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET
from scalenet_ray.sample.scenes import write_sample
from tests.job_scripts import COMMAND_MODULES, REPOSITORY, run_command
from tests.scripted_detector import SCRIPTED, answering, one_box

NETWORKS = ("--detector", SAMPLE_DETECTOR, "--scale-net", SAMPLE_SCALE_NET)
MODEL = "models/yolox_nano.onnx"


# --- the program -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_help_lists_each_command_with_a_line(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert [line for line in lines if line.split() == [name, *command.summary.split()]]


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--version") == 0
    assert capsys.readouterr().out == f"scalenet-ray {scalenet_ray.__version__}\n"


def test_the_help_is_no_error_where_the_output_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    # As of `>&-`.
    monkeypatch.setattr("sys.stdout", None)
    for flag in ("--help", "--version"):
        with pytest.raises(SystemExit) as end:
            program.main([flag])
        assert end.value.code == 0


def test_an_unknown_command_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("evaluate") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: the command must be one of show, detect, eval, ")
    assert printed.err.endswith(", got 'evaluate': see --help\n")
    assert printed.out == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_lists_its_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(name, "--help") == 0
    printed = capsys.readouterr().out
    assert f"usage: scalenet-ray {name} " in printed


def test_every_module_of_a_command_is_registered() -> None:
    modules = {path.stem for path in (REPOSITORY / "scalenet_ray" / "commands").glob("*.py")}
    assert {command.module for command in COMMANDS.values()} == modules - {
        "__init__",
        "arguments",
        "data_flags",
        "run_flags",
    }


@pytest.mark.parametrize(("job", "module"), COMMAND_MODULES.items())
def test_a_job_runs_its_command(job: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = (name for name, command in COMMANDS.items() if command.module == module)
    called: list[list[str]] = []
    monkeypatch.setattr(program, "main", called.append)
    monkeypatch.setattr(sys, "argv", [job, "--help"])
    runpy.run_path(str(REPOSITORY / "jobs" / f"{job}.py"), run_name="__main__")
    assert called == [[name, "--help"]]


# --- each command --------------------------------------------------------------------------------------


def test_the_program_runs_as_a_module_in_any_folder(sample: Path, tmp_path: Path) -> None:
    flags = ("--engine", "local", "--limit", "1", "--report-pictures", "0", "--policy", "whole", *NETWORKS)
    command = [sys.executable, "-m", "scalenet_ray", "detect", "--images", str(sample / "val2017"), "--output", "run"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "1 of 1 images done, results in run (open its report.html)"
    assert pq.read_table(tmp_path / "run" / "images" / "whole-00000.parquet").num_rows == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("show", "nowhere.jpg"), 2, "cannot read nowhere.jpg: there is no such file"),
        (("eval", "--data", "nowhere", "--engine", "local"), 2, "nowhere/annotations/instances_val2017.json"),
        (("detect", "--images", "nowhere", "--engine", "local"), 2, "nowhere"),
        (("check", "--images", "nowhere"), 2, "nowhere"),
        (
            ("train", "--data", "nowhere", "--preset", "unet"),
            2,
            "--preset must be one of head, unet-vgg16, unet-light, unet-lite0, got 'unet'",
        ),
        (("finetune", "--data", "nowhere"), 2, "--detector must name what is fine-tuned on your data"),
        (("tune", "--space", "nowhere.yaml"), 2, "nowhere.yaml"),
        (("export", "nowhere", "--to", "coco"), 2, "nowhere"),
        (("policy", "firstpass"), 2, "there is no policy 'firstpass'"),
    ],
)
def test_what_a_command_cannot_do_is_one_line(
    arguments: tuple[str, ...],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sample(tmp_path / "runs" / "sample", train=1, val=1)
    assert run_command(*arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


# --- policy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name.replace("SIZE", "640").replace("PIXELS", "640").replace("-N", "-3") for name in POLICIES]
)
def test_a_printed_policy_is_what_its_file_says(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("policy", name, "--input-side", "416", "--iou-threshold", "0.5") == 0
    file = tmp_path / "policy.yaml"
    file.write_text(capsys.readouterr().out)
    assert read_policies(file) == [parse_policy(name, input_side=416, iou_threshold=0.5)]
    assert run_command("policy", "--policy-file", str(file)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{file} is valid, policies: 1"


def test_a_printed_policy_takes_what_it_leaves_out_from_the_detector(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        *(name for name in POLICIES if name.isidentifier()),
        "grid-3",
        "whole@320",
        "slices@64",
        "mine:windows",
    ):
        assert run_command("policy", name) == 0
        file = tmp_path / "policy.yaml"
        file.write_text(capsys.readouterr().out)
        named = partial(parse_policy, input_side=416, iou_threshold=0.5, score_threshold=0.2, takes_larger=False)
        assert read_policies(file, named) == [named(name)]
        assert run_command("policy", "--policy-file", str(file)) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{file} is valid, policies: 1"


def test_policies_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("policy") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(POLICIES)
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 1, "name": "a", "kind": "whole", "input_side": "x"}, "input_side must be a whole number, got 'x'"),
        ([{"version": 1, "name": "a", "kind": "whole", "input_side": 64}] * 2, "got twice a"),
    ],
)
def test_an_invalid_policy_file_is_refused(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(content))
    assert run_command("policy", "--policy-file", str(tmp_path / "policy.yaml")) == 2
    assert message in capsys.readouterr().err


def test_policy_takes_a_name_or_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("policy", "whole", "--policy-file", "policy.yaml") == 2
    assert "a name or --policy-file, got whole and policy.yaml" in capsys.readouterr().err


# --- check -------------------------------------------------------------------------------------------


def test_check_reports_the_data_and_each_network(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("check", "--data", str(sample), *NETWORKS) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"data {sample}/annotations/instances_val2017.json: 4 images, 10 categories",
        f"detector {SAMPLE_DETECTOR}: input side 192, canvas 192 x 192, NMS at IoU 0.6, 10 categories",
        "categories: the detector's own",
        f"Scale Net {SAMPLE_SCALE_NET}: class maps, input side 192",
        "policies: "
        "whole (tiles of up to 192), grid-2 (tiles of up to 192), regions (tiles of up to 384), "
        "scalenet (tiles of up to 192), regions-oracle (tiles of up to 384)",
        "device cpu: on this machine",
        "all checks passed",
    ]


def test_check_of_images_leaves_the_oracle_out(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("check", "--images", f"{sample}/val2017", "--detector", SAMPLE_DETECTOR) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"data {sample}/val2017: 4 images, no ground truth"
    assert lines[-3].startswith("policies: whole ")
    assert "oracle" not in lines[-3]


def test_check_says_how_categories_are_mapped(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads((sample / "annotations" / "instances_val2017.json").read_text())
    names = {category["id"]: category["name"] for category in document["categories"]}
    for rows, key in ((document["categories"], "id"), (document["annotations"], "category_id")):
        for row in rows:
            row[key] += 100
    document["categories"].append({"id": 7, "name": "dodecahedron"})
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    (tmp_path / "val2017").symlink_to(sample / "val2017")
    assert run_command("check", "--data", str(tmp_path), "--policies", "whole", "--detector", SAMPLE_DETECTOR) == 0
    printed = capsys.readouterr().out
    assert "11 categories (" in printed
    assert "the detector does not know: dodecahedron; left out" in printed
    first = min(names)
    assert f"categories: 10 of the detector's 10: {first} {names[first]} -> {first + 100} {names[first]}, " in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--policies", "zoom"), "there is no policy 'zoom'"),
        (("--policies", "scalenet"), "give --scale-net PATH"),
        (("--policy-file", "nowhere.yaml"), "nowhere.yaml"),
        (("--scale-net", "nowhere.safetensors"), "nowhere.safetensors"),
        (("--detector", "tiny:nowhere.safetensors"), "nowhere.safetensors"),
        (("--detector", "tests.stalling_detector:NoSuchClass"), "NoSuchClass"),
        (("--device", "cudaa"), "cudaa"),
        (("--images", "photos"), "check takes --data or --images"),
        (("--split", "test2017"), "instances_test2017.json"),
    ],
)
def test_check_ends_with_the_error_that_the_run_would_end_with(
    flags: tuple[str, ...], message: str, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", str(sample), "--detector", SAMPLE_DETECTOR)
    assert run_command("check", *data, *flags) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert "all checks passed" not in printed.out


def test_check_refuses_an_oracle_without_ground_truth_and_unreadable_images(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ("--images", str(sample / "val2017"), "--detector", SAMPLE_DETECTOR)
    assert run_command("check", *images, "--policies", "oracle") == 2
    assert "has no ground truth: use another policy" in capsys.readouterr().err
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    assert run_command("check", "--images", str(tmp_path), "--detector", SAMPLE_DETECTOR) == 2
    assert "must have an image that can be read, got none among the first 1: " in capsys.readouterr().err


def test_check_names_a_device_that_this_machine_lacks(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--policies", "whole", "--detector", SAMPLE_DETECTOR, "--device", "cuda:99")
    assert run_command("check", "--data", str(sample), *flags) == 0
    assert "device cuda:99: not on this machine, needed where the networks run" in capsys.readouterr().out


def test_check_looks_closely_at_a_detector(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = next((sample / "val2017").iterdir())
    assert run_command("check", SAMPLE_DETECTOR, str(image)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"detector {SAMPLE_DETECTOR}: input side 192, canvas 192 x 192, NMS at IoU 0.6, 10 categories"
    assert lines[-1] == "nothing wrong was found"
    assert run_command("check", SAMPLE_DETECTOR) == 0


def test_check_ends_with_1_where_a_detector_has_faults(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(lambda tiles: [one_box(tile) for tile in tiles], categories={1: "LABEL_1", 2: "disc"}):
        assert run_command("check", SCRIPTED) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("wrong: 1 of 2 classes have no name, such as 'LABEL_1'")
    assert lines[-1] == "1 fault"


@pytest.mark.parametrize("flags", [("--detector", SAMPLE_DETECTOR), ("--images", "photos"), ("--data", "coco")])
def test_check_takes_a_detectors_name_or_the_inputs_of_a_run(
    flags: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("check", SAMPLE_DETECTOR, *flags) == 2
    assert f"check takes a detector's name or {flags[0]}, got {SAMPLE_DETECTOR} and {flags[1]}" in (
        capsys.readouterr().err
    )


def test_check_writes_nothing(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command("check", "--data", str(sample), "--policies", "whole", *NETWORKS) == 0
    assert capsys.readouterr().out.endswith("all checks passed\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_check_without_data_tries_a_detector_on_the_samples_images(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command("check", "--detector", f"yolox-onnx:{real_data / MODEL}", "--policies", "whole") == 0
    printed = capsys.readouterr().out
    assert "data embedded://sample/val2017: 100 images, no ground truth" in printed
    assert "input side 416, canvas 416 x 416" in printed
