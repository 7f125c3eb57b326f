"""Resuming after files, annotations, settings or paths have changed, or files are damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import UserError
from scalenet_ray.data import storage
from scalenet_ray.models.spec import SAMPLE_DETECTOR, NetworkSpec
from scalenet_ray.runs.export import export_run
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.results import image_results
from tests.job_scripts import load_job


class FindsTheWhole:
    """A detector whose one box is as large as the tile, so that each image's results tell its size."""

    input_side = 64
    iou_threshold = 0.5
    categories: ClassVar = {1: "thing", 2: "other"}

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """No padding."""
        return hw

    def __call__(self, pixels: list[np.ndarray]) -> list[Detections]:
        """One box a tile."""
        return [Detections(np.array([[0, 0, p.shape[1], p.shape[0]]], np.float32), [0.9], [1]) for p in pixels]


NETWORKS = NetworkSpec(detector=f"{__name__}:FindsTheWhole")


def write_image(path: Path, width: int) -> None:
    """A picture of 64 pixels' height, whose name and width go together."""
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (width, 64)).save(path)


@pytest.fixture
def pics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder pics/ with b.png, c.png and d.png, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, width in (("b", 34), ("c", 36), ("d", 38)):
        write_image(tmp_path / "pics" / f"{name}.png", width)
    return tmp_path / "pics"


def detect(images: str = "pics", **changes: Any) -> int:
    """Run jobs/detect.py on `images` into run/."""
    job = load_job("detect").DetectImages(
        images=images, policy="whole", output="run", engine="local", report_pictures=1, networks=NETWORKS
    )
    return load_job("detect").main(replace(job, **changes))


def found() -> dict[str, tuple[int, int]]:
    """File's stem -> image id and the width of its box, as results.json has it; each image has one box."""
    rows = json.loads(Path("run/results.json").read_text())
    ids = {image.image_id: image.file for image in image_results(RunFolder("run"), "whole")}
    assert len(rows) == len({row["image_id"] for row in rows})
    return {Path(ids[row["image_id"]]).stem: (row["image_id"], round(row["bbox"][2])) for row in rows}


def metrics() -> dict[str, Any]:
    return json.loads(Path("run/metrics.json").read_text())


# --- files that come, go and are mended ---------------------------------------------------------------------


def test_a_file_that_the_run_knows_keeps_its_id_and_a_new_one_gets_one_above_all(pics: Path) -> None:
    detect()
    assert found() == {"b": (1, 34), "c": (2, 36), "d": (3, 38)}
    write_image(pics / "a.png", 32)
    assert detect(resume=True) == 0
    assert found() == {"b": (1, 34), "c": (2, 36), "d": (3, 38), "a": (4, 32)}
    (pics / "d.png").unlink()
    write_image(pics / "e.png", 40)
    assert detect(resume=True) == 0
    assert found() == {"b": (1, 34), "c": (2, 36), "a": (4, 32), "e": (5, 40)}


@pytest.mark.parametrize("name", ["b", "d"])
def test_a_file_that_is_removed_is_counted_no_longer_wherever_it_sorts(pics: Path, name: str) -> None:
    detect()
    (pics / f"{name}.png").unlink()
    assert detect(resume=True) == 0
    assert name not in found()
    assert metrics()["images"] == {"total": 2, "done": 2, "failed": 0}
    assert metrics()["policies"]["whole"]["images_done"] == 2
    assert name not in {Path(row["file"]).stem for row in RunFolder("run").table("images", "whole").to_pylist()}
    assert export_run("run", "coco").images == 2
    listed = json.loads(Path("run/analysis.json").read_text())["images"]
    assert {row["id"] for row in listed} == {image_id for image_id, _ in found().values()}


def test_a_file_that_comes_back_has_its_results_again(pics: Path) -> None:
    detect()
    shutil.move(pics / "b.png", "elsewhere.png")
    detect(resume=True)
    write_image(pics / "a.png", 32)
    shutil.move("elsewhere.png", pics / "b.png")
    detect(resume=True)
    assert found() == {"b": (1, 34), "c": (2, 36), "d": (3, 38), "a": (4, 32)}


def test_a_mended_file_is_tried_again_where_that_is_asked_for_and_its_failure_is_superseded(
    pics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pics / "c.png").write_bytes(b"no picture")
    assert detect() == 1
    write_image(pics / "c.png", 36)
    assert detect(resume=True) == 1
    assert "c" not in found()
    assert detect(resume=True, retry_failed=True) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 of 3 images done")
    assert found() == {"b": (1, 34), "c": (2, 36), "d": (3, 38)}
    assert pq.read_table("run/failures.parquet").num_rows == 0
    assert metrics()["policies"]["whole"]["images_failed"] == 0
    assert metrics()["policies"]["whole"]["images_done"] == 3
    exported = export_run("run", "coco")
    assert (exported.images, exported.failed) == (3, 0)


@pytest.mark.parametrize("job", ["detect", "eval_coco"])
def test_trying_failed_images_again_without_a_run_to_resume_is_refused(job: str, tmp_path: Path) -> None:
    kind = {"detect": "DetectImages", "eval_coco": "EvalCoco"}[job]
    made = getattr(load_job(job), kind)(output=str(tmp_path / "run"), engine="local", retry_failed=True)
    with pytest.raises(ValueError, match=r"--retry-failed .* got no --resume: add it"):
        load_job(job).main(made)
    assert not (tmp_path / "run").exists()


def test_a_run_whose_images_have_no_known_ids_is_not_resumed(pics: Path) -> None:
    detect()
    Path("run/inputs.parquet").unlink()
    with pytest.raises(UserError, match=r"run must have inputs\.parquet, .* got none: .* give another --output"):
        detect(resume=True)


# --- annotations --------------------------------------------------------------------------------------------


def coco_document() -> dict[str, Any]:
    """Annotations of pics/, two objects an image."""
    boxes = [[2.0, 2.0, 10.0, 12.0], [20, 30, 8, 8]]
    return {
        "images": [{"id": 10 + i, "file_name": f"{name}.png"} for i, name in enumerate("bcd")],
        "categories": [{"id": 3, "name": "thing"}, {"id": 5, "name": "other"}],
        "annotations": [
            {"id": 100 + 2 * i + k, "image_id": 10 + i, "category_id": 3, "bbox": boxes[k], "iscrowd": 0}
            for i in range(3)
            for k in range(2)
        ],
    }


def evaluate(document: dict[str, Any], **changes: Any) -> int:
    """Run jobs/eval_coco.py on pics/ with these annotations into run/."""
    Path("annotations").mkdir(exist_ok=True)
    Path("annotations/instances_pics.json").write_text(json.dumps(document))
    job = load_job("eval_coco").EvalCoco(
        data=".", split="pics", policies=("whole",), output="run", engine="local", report_pictures=1, networks=NETWORKS
    )
    return load_job("eval_coco").main(replace(job, **changes))


def change(section: str, at: int, **values: Any) -> Callable[[dict], None]:
    return lambda document: document[section][at].update(values)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (change("categories", 0, name="other thing"), "category 3 was thing, is other thing"),
        (lambda d: d["categories"].append({"id": 9, "name": "new"}), "category 9 was not there, is new"),
        (change("images", 1, file_name="b2.png"), "image 11 was c.png, is b2.png"),
        (
            lambda d: d["images"].append({"id": 17, "file_name": "x.png"}),
            "image 17 was not there, is x.png",
        ),
        (change("images", 2, height=64, width=38), "image 12 was d.png, is d.png of 64 x 38"),
        (lambda d: d["annotations"].pop(), "annotation counts: 6 then, 5 now"),
        (change("annotations", 3, bbox=[2.0, 2.0, 10.0, 12.5]), "annotation 103 is another one"),
        (change("annotations", 4, iscrowd=1), "annotation 104 is another one"),
        (change("annotations", 0, segmentation=[[0, 0, 9, 0, 9, 9]]), "annotation 100 is another one"),
        (change("annotations", 5, id=900), "annotation 900 is new"),
    ],
)
def test_other_annotations_are_refused_by_the_one_difference(
    pics: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[dict], None], said: str
) -> None:
    # What the detector knows is another matter.
    monkeypatch.setattr(FindsTheWhole, "categories", {1: "thing", 2: "other", 3: "new", 4: "other thing"})
    evaluate(coco_document())
    before = Path("run/metrics.json").read_bytes()
    document = coco_document()
    spoil(document)
    with pytest.raises(ValueError, match="was begun with other annotations") as refused:
        evaluate(document, resume=True)
    assert said in str(refused.value)
    assert Path("run/metrics.json").read_bytes() == before


def test_annotations_written_in_another_order_are_the_same(pics: Path) -> None:
    evaluate(coco_document())
    document = coco_document()
    document["annotations"].reverse()
    document["images"].reverse()
    assert evaluate(document, resume=True) == 0


def test_a_run_of_an_older_version_without_a_note_of_its_annotations_goes_on_and_has_one(pics: Path) -> None:
    evaluate(coco_document())
    Path("run/annotations.parquet").unlink()
    Path("run/inputs.parquet").unlink()
    document = coco_document()
    document["annotations"].pop()
    assert evaluate(document, resume=True) == 0
    with pytest.raises(ValueError, match="annotation counts: 5 then, 6 now"):
        evaluate(coco_document(), resume=True)


# --- addresses and settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["./pics", "{}/x/../pics/", "file://{}/pics"])
def test_one_folder_is_the_same_however_its_address_is_written(pics: Path, form: str) -> None:
    detect()
    before = Path("run/results.json").read_bytes()
    assert detect(form.format(pics.parent), resume=True) == 0
    assert Path("run/results.json").read_bytes() == before


def test_an_address_is_the_same_from_another_working_directory(pics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detect()
    (pics.parent / "other").mkdir()
    monkeypatch.chdir(pics.parent / "other")
    assert detect("../pics", output="../run", resume=True) == 0


def test_a_run_whose_images_moved_with_it_goes_on_with_their_ids(pics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detect()
    moved = pics.parent / "moved"
    moved.mkdir()
    for name in ("pics", "run"):
        shutil.move(name, moved / name)
    monkeypatch.chdir(moved)
    write_image(moved / "pics" / "a.png", 32)
    shards = set(os.listdir("run/images"))
    assert detect(resume=True) == 0
    assert found() == {"b": (1, 34), "c": (2, 36), "d": (3, 38), "a": (4, 32)}
    (fresh,) = set(os.listdir("run/images")) - shards
    assert pq.read_table(f"run/images/{fresh}").column("image_id").to_pylist() == [4]


def test_a_changed_policy_is_named_by_the_field_that_changed(pics: Path) -> None:
    text = "version: 1\nname: mine\nkind: grid\ninput_side: 64\ngrid: 2\noverlap: 0.0\n"
    Path("mine.yaml").write_text(text)
    detect(policy_file="mine.yaml")
    Path("mine.yaml").write_text(text.replace("grid: 2", "grid: 3"))
    with pytest.raises(ValueError, match=r"other settings \(policies\.mine\.grid: 2 then, 3 now\)"):
        detect(policy_file="mine.yaml", resume=True)


def test_the_device_may_differ_and_so_it_may_in_a_run_of_an_older_version(pics: Path) -> None:
    detect()
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert "device" not in config["settings"]["networks"]
    config["settings"]["networks"]["device"] = "cuda"
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    assert detect(resume=True) == 0


@pytest.mark.parametrize("then", ["sample", "tiny:/old/checkout/scalenet_ray/weights/sample_detector.safetensors"])
def test_a_run_on_the_sample_goes_on_after_the_checkout_moved(tmp_path: Path, then: str) -> None:
    run = RunFolder(str(tmp_path / "run"))
    older = {**asdict(NetworkSpec()), "detector": then}
    with run.begin({"networks": older}, resume=False):
        pass
    with run.begin({"networks": NetworkSpec(SAMPLE_DETECTOR).settings()}, resume=True, workers={"device": "cpu"}):
        pass


def test_other_weights_under_the_same_name_are_refused_where_both_are_known(tmp_path: Path) -> None:
    run, weights = RunFolder(str(tmp_path / "run")), tmp_path / "mine.onnx"

    def begin(*, resume: bool) -> None:
        with run.begin({"networks": NetworkSpec(f"onnx:{weights}").settings()}, resume=resume):
            pass

    weights.write_bytes(b"first")
    begin(resume=False)
    begin(resume=True)
    weights.write_bytes(b"second")
    with pytest.raises(ValueError, match=r"networks\.weights\.detector: '\w{16}' then, '\w{16}' now"):
        begin(resume=True)
    weights.unlink()  # A driver on another machine, whose workers alone have the file.
    begin(resume=True)


# --- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"- 1\n", b"settings: 3\n", b"{unclosed", b"\xff\xfe\x00", b"name: another tool's\n"]
)
def test_a_config_that_is_no_runs_is_refused_in_one_line(pics: Path, content: bytes) -> None:
    detect()
    Path("run/config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"run/config\.yaml must hold the settings of a run.*another --output"):
        detect(resume=True)
    with pytest.raises(ValueError, match=r"run/config\.yaml must hold the settings of a run"):
        export_run("run", "coco")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("kind", ["images", "detections"])
def test_a_damaged_shard_is_refused_by_name_before_any_work_and_remade_once_it_is_deleted(
    pics: Path, kind: str
) -> None:
    detect()
    expected = Path("run/results.json").read_bytes()
    shard = f"{kind}/whole-00000.parquet"
    truncate(Path("run", shard))
    write_image(pics / "z.png", 50)
    with pytest.raises(ValueError, match=rf"run/{shard} must be a Parquet file of a run.*delete it and its other half"):
        detect(resume=True)
    assert len(os.listdir("run/images")) == 1
    for half in ("images", "detections"):
        Path("run", half, "whole-00000.parquet").unlink()
    (pics / "z.png").unlink()
    assert detect(resume=True) == 0
    assert Path("run/results.json").read_bytes() == expected


def test_finished_images_whose_detections_are_missing_are_refused_and_not_empty(pics: Path) -> None:
    detect()
    Path("run/detections/whole-00000.parquet").unlink()
    wanted = r"detections/whole-00000\.parquet is missing: delete run/images/whole-00000\.parquet, and --resume"
    with pytest.raises(ValueError, match=wanted):
        detect(resume=True)
    with pytest.raises(ValueError, match=wanted):
        RunFolder("run").table("detections", "whole")


def test_a_run_folder_that_is_not_there_is_an_error_and_not_an_empty_table(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "none"))
    for kind in ("images", "detections"):
        with pytest.raises(FileNotFoundError, match="must be a run folder, got no such folder"):
            run.table(kind, "whole")


# --- folders ------------------------------------------------------------------------------------------------


def test_runs_without_a_name_that_begin_in_one_second_have_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scalenet_ray.runs.folder.time.strftime", lambda form: "20261127-101500")
    names = [RunFolder.of_job(None, "detect").uri for _ in range(3)]
    assert names == [f"runs/detect/20261127-101500{end}" for end in ("", "-2", "-3")]
    assert all(Path(name).is_dir() for name in names)
    assert RunFolder.of_job("mine", "detect").uri == "mine"


def test_a_run_to_resume_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--resume goes on with the run in --output, got no --output"):
        RunFolder.of_job(None, "detect", resume=True)


@pytest.mark.parametrize("output", [None, "run", "new/deep/run"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
def test_a_run_that_is_refused_leaves_no_folder_and_one_that_is_broken_off_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | None, error: type[BaseException] | None
) -> None:
    monkeypatch.chdir(tmp_path)
    error = error or UserError
    run = RunFolder.of_job(output, "detect")
    with pytest.raises(error), run.begin({"seed": 1}, resume=False):
        raise error("no")
    assert os.listdir(tmp_path) == ([] if error is UserError else [run.uri.split("/")[0]])


def test_a_refused_run_leaves_what_was_there_before(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError), run.begin({"seed": 1}, resume=False):
        raise UserError("no")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with RunFolder(str(tmp_path)).begin({"seed": 1}, resume=True):
        pass


def test_a_refused_run_on_s3_leaves_no_objects(s3_bucket: str) -> None:
    with pytest.raises(UserError), RunFolder(f"{s3_bucket}/runs/one").begin({"seed": 1}, resume=False):
        raise UserError("no")
    assert not storage.exists(f"{s3_bucket}/runs/one")


REFUSED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("detect", "DetectImages", {"images": "nowhere"}),
    ("detect", "DetectImages", {"images": "pics", "policy": "scalenet"}),
    ("eval_coco", "EvalCoco", {"data": "nowhere"}),
    ("train_scalenet", "TrainScaleNet", {"data": "nowhere"}),
    (
        "finetune_detector",
        "FinetuneDetector",
        {"data": "nowhere", "detector": "torchvision:x.safetensors"},
    ),
    ("eval_digits", "EvalDigits", {"held_out": 10**6}),
)


@pytest.mark.parametrize(("job", "kind", "given"), REFUSED)
def test_a_job_that_refuses_what_it_is_given_leaves_no_folder(
    pics: Path, job: str, kind: str, given: dict[str, Any]
) -> None:
    module = load_job(job)
    networks = {"networks": NETWORKS, "engine": "local"} if job in ("detect", "eval_coco") else {}
    with pytest.raises((UserError, OSError)):
        module.main(getattr(module, kind)(**networks, **given))
    assert os.listdir(pics.parent) == ["pics"]
