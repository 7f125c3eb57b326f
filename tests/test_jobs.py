"""The jobs eval_coco and detect on the embedded sample."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO

from scalenet_ray.console import run_job
from scalenet_ray.core.detections import Detections
from scalenet_ray.data.image_records import ImageRecord
from scalenet_ray.models.scale_net import ScaleHead, save_scale_head
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkSpec
from scalenet_ray.report.pictures import SavedPictures
from scalenet_ray.sample.scenes import write_sample
from tests.bad_files import encoded
from tests.job_scripts import load_job

SAMPLE_NETWORKS = NetworkSpec(detector=SAMPLE_DETECTOR, scale_net=SAMPLE_SCALE_NET)
FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
RECALLS = ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
COSTS = (
    "tiles_per_image",
    "detector_passes_per_image",
    "detector_megapixels_per_image",
    "scalenet_megapixels_per_image",
    "images_per_second",
    "seconds",
)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("data") / "sample", train=2, val=8)


def eval_job(data: str | Path | None, output: Path | str, *policies: str, **changes: Any) -> Any:
    module = load_job("eval_coco")
    job = module.EvalCoco(
        data=None if data is None else str(data),
        output=str(output),
        policies=policies or ("whole",),
        engine="local",
        networks=SAMPLE_NETWORKS,
    )
    return replace(job, **changes)


def run_eval(job: Any) -> int:
    return load_job("eval_coco").main(job)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def error_of(job: Any, capsys: pytest.CaptureFixture[str], name: str = "eval_coco") -> str:
    """What a job that cannot begin says, having checked that it exits with 2."""
    with pytest.raises(SystemExit) as exit_info:
        run_job(load_job(name).main, job)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def test_several_policies_run_into_one_run_folder(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = ("whole", "whole@384", "grid-2", "first-pass", "scalenet", "oracle")
    assert run_eval(eval_job(sample, tmp_path / "run", *policies)) == 0

    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["images"] == {"total": 8, "done": 8, "failed": 0}
    assert list(metrics["policies"]) == list(policies)
    for figures in metrics["policies"].values():
        assert not [name for name in (*FIGURES, *RECALLS, *COSTS) if name not in figures]
    assert metrics["policies"]["whole"]["detector_passes_per_image"] == 1
    assert metrics["policies"]["grid-2"]["detector_passes_per_image"] == 5
    # Four times the pixels, less what is rounded up to whole strides.
    assert 3 < metrics["policies"]["whole@384"]["detector_passes_per_image"] <= 4
    # A look at the whole image by Scale Net costs its pixels; the first pass and the oracle look for nothing.
    assert metrics["policies"]["scalenet"]["scalenet_megapixels_per_image"] > 0
    assert metrics["policies"]["first-pass"]["scalenet_megapixels_per_image"] == 0

    for policy in policies:
        rows = pq.read_table(tmp_path / "run" / "detections" / f"{policy}-00000.parquet")
        assert len(read_json(tmp_path / "run" / "results" / f"{policy}.json")) == rows.num_rows
    assert pq.read_table(tmp_path / "run" / "failures.parquet").num_rows == 0
    assert "AP of small objects" in (tmp_path / "run" / "report.html").read_text()
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert [policy["name"] for policy in config["settings"]["policies"]] == list(policies)
    assert "torch" in config["versions"]
    last = capsys.readouterr().out.splitlines()
    assert last[-1] == f"8 of 8 images done, results in {tmp_path / 'run'} (open its report.html)"
    assert "all images are done: comparing what was found, and writing the report" in last
    table = next(i for i, line in enumerate(last) if line.startswith("policy ")) + 1
    assert [line.split()[0] for line in last[table : table + len(policies)]] == list(policies)
    reduced = metrics["policies"]["whole"]["images_reduced"]
    assert reduced > 0
    assert any(line.startswith(f"whole: {reduced} images were seen reduced only, down to 1 / ") for line in last)


@pytest.mark.parametrize(
    ("scale_net", "policies", "is_said"),
    [
        (SAMPLE_SCALE_NET, ["whole", "grid-2", "regions", "scalenet", "regions-oracle"], False),
        ("head", ["whole", "grid-2", "regions", "scalenet", "regions-oracle"], False),
        (None, ["whole", "grid-2", "regions", "regions-oracle"], True),
    ],
)
def test_the_default_policies_are_those_that_there_are_networks_for(
    sample: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    scale_net: str | None,
    policies: list[str],
    is_said: bool,
) -> None:
    networks = replace(SAMPLE_NETWORKS, scale_net=scale_net)
    if scale_net == "head":
        config = SAMPLE_NETWORKS.describe_features()
        networks = replace(networks, scale_net=str(tmp_path / "head.safetensors"))
        save_scale_head(ScaleHead(config), config, str(networks.scale_net))
    assert run_eval(replace(eval_job(sample, tmp_path / "run"), policies=None, limit=1, networks=networks)) == 0
    assert list(read_json(tmp_path / "run" / "metrics.json")["policies"]) == policies
    assert ("no --scale-net: the policy scalenet, which needs one, is left out" in capsys.readouterr().out) == is_said


def test_policies_are_compared_with_one_of_them(
    drawn_charts: None, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_eval(eval_job(sample, tmp_path / "run", "whole", "oracle", compare_with="whole")) == 0
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["compared_with"] == "whole"
    (name,) = metrics["differences"]
    assert name == "oracle"
    for figure, found in metrics["differences"]["oracle"].items():
        oracle, whole = (metrics["policies"][policy][figure] for policy in ("oracle", "whole"))
        assert found["difference"] == pytest.approx(oracle - whole, abs=0.01)
        assert found["low"] <= found["difference"] <= found["high"]
    assert "difference to whole, and where 95 %" in capsys.readouterr().out
    assert 'id="interval oracle"' in (tmp_path / "run" / "policies.svg").read_text()
    error = error_of(eval_job(sample, tmp_path / "other", "whole", compare_with="oracle"), capsys)
    assert "--compare-with must name one of the run's policies, got 'oracle'" in error


def test_results_are_what_pycocotools_reads(sample: Path, tmp_path: Path) -> None:
    run_eval(eval_job(sample, tmp_path / "run", "grid-2"))
    truth = COCO(sample / "annotations" / "instances_val2017.json")
    loaded = truth.loadRes(str(tmp_path / "run" / "results.json"))
    assert set(loaded.getImgIds()) == set(truth.getImgIds())
    assert {row["category_id"] for row in loaded.loadAnns(loaded.getAnnIds())} <= set(truth.getCatIds())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policies": ("whole", "grid-2"), "smallest_object": 12.0},
            "a smallest object is for regions, got it with whole, grid-2: leave it out, or use policy regions",
        ),
        ({"policies": ("zoom",)}, "there is no policy 'zoom': use regions"),
        ({"policies": ()}, "name at least one policy"),
        ({"policies": ("whole", "whole")}, "got twice whole"),
        ({"networks": NetworkSpec(detector="tiny:nowhere.safetensors")}, "nowhere.safetensors"),
        ({"networks": NetworkSpec(detector="magic:x")}, "magic:x"),
        ({"networks": NetworkSpec()}, "give --detector kind:what"),
        ({"policies": ("scalenet",), "networks": NetworkSpec(detector=SAMPLE_DETECTOR)}, "give --scale-net PATH"),
        ({"data": "no/such/folder"}, "no/such/folder"),
        ({"split": "test2017"}, "instances_test2017.json"),
        ({"policy_file": "no-such.yaml"}, "no-such.yaml"),
    ],
)
def test_what_cannot_begin_says_why_in_one_line(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    said = error_of(replace(eval_job(sample, tmp_path / "run"), **changes), capsys)
    assert said.startswith("error: ")
    assert message in said
    assert not (tmp_path / "run").exists()


def test_a_category_that_the_detector_does_not_know_is_refused(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    path = data / "annotations" / "instances_val2017.json"
    document = read_json(path)
    document["categories"].append({"id": 77, "name": "dodecahedron"})
    path.write_text(json.dumps(document))
    assert run_eval(eval_job(data, tmp_path / "unused", limit=1)) == 0
    wanted = "categories that no annotation is of and the detector does not know: dodecahedron; left out"
    assert wanted in capsys.readouterr().out
    document["annotations"][0]["category_id"] = 77
    path.write_text(json.dumps(document))
    assert "dodecahedron" in error_of(eval_job(data, tmp_path / "run"), capsys)


def test_a_run_whose_images_all_fail_still_has_its_figures(sample: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    for file in (data / "val2017").iterdir():
        file.write_bytes(b"")
    assert run_eval(eval_job(data, tmp_path / "run", "grid-2")) == 1
    figures = read_json(tmp_path / "run" / "metrics.json")["policies"]["grid-2"]
    assert figures["AP"] == 0
    assert figures["detector_passes_per_image"] == 0
    assert read_json(tmp_path / "run" / "results.json") == []


def test_images_without_any_object_are_no_error(sample: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    path = data / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps({**read_json(path), "annotations": []}))
    assert run_eval(eval_job(data, tmp_path / "run", "whole", "oracle")) == 0
    figures = read_json(tmp_path / "run" / "metrics.json")["policies"]
    # Nothing is there to be found: the figures are missing, not 0; and the oracle sees no reason to zoom.
    assert figures["whole"]["AP"] is None
    assert figures["oracle"]["detector_passes_per_image"] == 1


def detect_job(images: str | Path, output: Path, **changes: Any) -> Any:
    module = load_job("detect")
    job = module.DetectImages(images=str(images), output=str(output), engine="local", networks=SAMPLE_NETWORKS)
    return replace(job, **changes)


def shown_boxes(folder: Path, policy: str) -> dict[int, list[tuple[int, list[float]]]]:
    """Image id -> label and corners of each box that scores 0.3 or more."""
    found: dict[int, list[tuple[int, list[float]]]] = {}
    for row in pq.read_table(folder / "detections" / f"{policy}-00000.parquet").to_pylist():
        if row["score"] >= np.float32(0.3):
            corners = [row[name] for name in ("x0", "y0", "x1", "y1")]
            found.setdefault(row["image_id"], []).append((row["category_id"], corners))
    return found


def same_object(one: tuple[int, list[float]], other: tuple[int, list[float]]) -> bool:
    (label, a), (other_label, b) = one, other
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return label == other_label and shared / (areas - shared) >= 0.5


def test_new_is_what_a_run_of_the_whole_image_does_not_find(sample: Path, tmp_path: Path) -> None:
    policy = "first-pass"
    for name in ("whole", policy):
        assert load_job("detect").main(detect_job(sample / "val2017", tmp_path / name, policy=name)) == 0
    before, after = (shown_boxes(tmp_path / name, name) for name in ("whole", policy))
    rows = read_json(tmp_path / policy / "analysis.json")["images"]
    assert len(rows) == 8
    total = {"boxes": 0, "before": 0, "new": 0, "lost": 0}
    for row in rows:
        one, other = before.get(row["id"], []), after.get(row["id"], [])
        new = sum(not any(same_object(box, known) for known in one) for box in other)
        lost = sum(not any(same_object(known, box) for box in other) for known in one)
        assert row["by"][policy] == [len(other), new, lost]
        for key, value in zip(total, (len(other), len(one), new, lost), strict=True):
            total[key] += value
    found = read_json(tmp_path / policy / "metrics.json")["found"]
    assert {key: found[key] for key in total} == total
    assert found["new"] > 0
    assert found["compared"] == 8
    assert read_json(tmp_path / "whole" / "metrics.json")["found"]["new"] == 0


def test_a_policy_without_a_whole_pass_claims_nothing_new(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_job("detect").main(detect_job(sample / "val2017", tmp_path / "run", policy="pyramid", limit=2)) == 0
    found = read_json(tmp_path / "run" / "metrics.json")["found"]
    assert found["boxes"] > 0
    assert (found["compared"], found["new"]) == (0, 0)
    assert "nothing says which are new" in capsys.readouterr().out


def test_a_run_of_an_older_version_is_resumed_without_claiming_what_is_new(sample: Path, tmp_path: Path) -> None:
    job = detect_job(sample / "val2017", tmp_path / "run", policy="grid-2", limit=2)
    assert load_job("detect").main(job) == 0
    shard = tmp_path / "run" / "images" / "grid-2-00000.parquet"
    pq.write_table(pq.read_table(shard).drop_columns(["whole_pass"]), shard)
    assert load_job("detect").main(replace(job, resume=True)) == 0
    found = read_json(tmp_path / "run" / "metrics.json")["found"]
    assert found["boxes"] > 0
    assert found["compared"] == 0


def test_detect_says_what_was_found(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_job("detect").main(detect_job(sample / "val2017", tmp_path / "run")) == 0
    metrics = read_json(tmp_path / "run" / "metrics.json")
    found, lines = metrics["found"], capsys.readouterr().out.splitlines()
    assert lines[-4] == f"found {found['boxes']} boxes that score 0.3 or more, in {found['images']} of 8 images"
    by_name = {metrics["categories"][str(row["label"])]: row for row in found["by_class"]}
    header = lines.index(next(line for line in lines if line.startswith("class ")))
    for line in lines[header + 1 : header + 1 + len(by_name)]:
        name, boxes, images, new, side, _ = line.split()
        row = by_name[name]
        assert [int(boxes), int(images), int(new)] == [row["boxes"], row["images"], row["new"]]
        assert float(side) == round(row["median_side"])
    assert max(map(len, lines[header:-1])) <= 80
    most = ", ".join(f"{Path(row['file']).name} ({row['boxes']})" for row in found["most"])
    assert " ".join(lines[header + 1 + len(by_name) : -4]).split() == f"most boxes: {most}".split()
    assert sum(row["boxes"] for row in found["most"]) == found["boxes"]
    more = found["boxes"] - found["before"]
    assert lines[-3] == f"{more} more than the pass over the whole image alone finds ({found['before']}):"
    assert lines[-2].startswith(f"{found['new']} new by looking closer, {found['lost']} lost")
    assert lines[-1].endswith(f"results in {tmp_path / 'run'} (open its report.html)")


def test_detect_writes_pictures_crops_and_a_csv_of_what_scores_enough(sample: Path, tmp_path: Path) -> None:
    asked = {"save_images": True, "save_crops": True, "csv": True, "min_score": 0.5, "policy": "grid-2"}
    job = detect_job(sample / "val2017", tmp_path / "run", limit=3, **asked)
    assert load_job("detect").main(job) == 0
    results = read_json(tmp_path / "run" / "results.json")
    shown = [row for row in results if row["score"] >= 0.5]
    assert 0 < len(shown) < len(results)
    names = read_json(tmp_path / "run" / "metrics.json")["categories"]
    pictures = sorted((tmp_path / "run" / "pictures").iterdir())
    assert [path.name for path in pictures] == sorted(
        f"{row:06d}-{Path(file).stem}.jpg"
        for row, file in {row["image_id"]: row["file_name"] for row in results}.items()
    )
    for path, row in zip(pictures, {row["image_id"]: row for row in results}.values(), strict=True):
        with Image.open(path) as picture:
            assert picture.size == (row["width"], row["height"])
    crops = [path.parent.name for path in (tmp_path / "run" / "crops").rglob("*.jpg")]
    assert Counter(crops) == Counter(names[str(row["category_id"])] for row in shown)
    with (tmp_path / "run" / "detections.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["confidence"]) for row in rows] == [row["score"] for row in shown]
    # What an interrupted run has not drawn yet, the resumed one draws.
    pictures[0].unlink()
    assert load_job("detect").main(replace(job, resume=True)) == 0
    assert sorted((tmp_path / "run" / "pictures").iterdir()) == pictures


@pytest.mark.parametrize(("category", "folder"), [("car", "car"), ("..", "_"), (".car", "_car"), ("a/../b", "a_.._b")])
def test_a_crop_stays_in_the_run_folder_whatever_its_class_is(category: str, folder: str, tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    saved = SavedPictures(
        str(tmp_path / "run"), lambda record: pixels, {1: category}, pictures=False, crops=True, min_score=0.5
    )
    with saved:
        saved.add(ImageRecord(3, "/in/a.jpg"), (8, 8), Detections([[0, 0, 4, 4]], [0.9], [1]))
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.jpg")]
    assert written == [Path("run", "crops", folder, "000003-a-0.jpg")]


@pytest.mark.parametrize(("now", "reason"), [(b"gone", ""), (encoded(np.zeros((9, 7, 3), np.uint8)), "is (9, 7)")])
def test_a_picture_that_cannot_be_read_again_is_named(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], now: bytes, reason: str
) -> None:
    job = detect_job(sample / "val2017", tmp_path / "run", limit=2, policy="whole")
    assert load_job("detect").main(job) == 0
    image = next(iter(sorted((sample / "val2017").iterdir())))
    data = image.read_bytes()
    try:
        image.write_bytes(now)
        assert load_job("detect").main(replace(job, resume=True, save_images=True)) == 0
    finally:
        image.write_bytes(data)
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("pictures of 1 images could not")
    ]
    assert f"could not be written, the first: {image}: " in line
    assert reason in line
    assert len(list((tmp_path / "run" / "pictures").iterdir())) == 1


def test_detect_has_no_ground_truth_for_an_oracle(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = detect_job(sample / "val2017", tmp_path / "run", policy="oracle")
    assert "has no ground truth" in error_of(job, capsys, "detect")


def test_what_reads_the_ground_truth_never_wins_whatever_its_name(sample: Path, tmp_path: Path) -> None:
    named = {"whole": "oracle", "plain": "whole"}
    entries = [{"version": 1, "name": name, "kind": kind, "input_side": 192} for name, kind in named.items()]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(entries))
    run_eval(eval_job(sample, tmp_path / "run", limit=4, policies=(), policy_file=str(tmp_path / "mine.yaml")))
    kinds = {name: row["kind"] for name, row in read_json(tmp_path / "run" / "metrics.json")["policies"].items()}
    assert kinds == named
    assert read_json(tmp_path / "run" / "analysis.json")["compared_with"] == "plain"
    assert '<tr class=best><th scope="row">plain' in (tmp_path / "run" / "report.html").read_text()
