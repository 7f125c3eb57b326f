"""Run folders: shards, manifests, settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from scalenet_ray.core.detections import Detections, Failure, ImageResult
from scalenet_ray.core.errors import UserError
from scalenet_ray.data import storage
from scalenet_ray.data.image_records import ImageRecord, ImageRecords
from scalenet_ray.data.schemas import DETECTIONS, IMAGES, detections_from_rows
from scalenet_ray.runs.batch import ShardWriter
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.tables import FAILURES

SETTINGS = {"seed": 3, "policies": ("whole", "grid-2"), "nested": {"score_threshold": 0.01, "none": None}}


def result_of(image_id: int, scores: tuple[float, ...] = (0.9, 0.5), failure: Failure | None = None) -> ImageResult:
    boxes = np.tile([[1, 2, 3, 4]], (len(scores), 1)) + image_id
    found = Detections(boxes, np.array(scores), np.full(len(scores), 7))
    return ImageResult(image_id, found, failure, 1, 10, 20, 1.0, {"max_depth": image_id}, (64, 48))


def writer_of(run: RunFolder, policy: str = "whole", committed: list[list[int]] | None = None) -> ShardWriter:
    records = ImageRecords.of(ImageRecord(i, f"{i}.jpg") for i in range(100))
    return ShardWriter(run, policy, records, (committed if committed is not None else []).append)


def write(run: RunFolder, *image_ids: int, policy: str = "whole") -> None:
    writer = writer_of(run, policy)
    for image_id in image_ids:
        writer.add(result_of(image_id), 1.5)
    writer.flush()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


# --- beginning and resuming ---------------------------------------------------------------------------------


def test_a_run_notes_all_that_is_needed_to_run_it_again(run: RunFolder) -> None:
    with run.begin(SETTINGS, resume=False, workers={"scale_actors": 3}):
        pass
    config = yaml.safe_load(Path(run.uri, "config.yaml").read_text())
    assert config["settings"] == {**SETTINGS, "policies": ["whole", "grid-2"]}
    assert config["workers"] == {"scale_actors": 3}
    assert {"python", "scalenet-ray", "ray", "torch", "numpy"} <= set(config["versions"])


def test_resuming_with_the_same_settings_and_other_workers_goes_on(run: RunFolder) -> None:
    with run.begin(SETTINGS, resume=False, workers={"engine": "ray"}):
        pass
    before = Path(run.uri, "config.yaml").read_bytes()
    with run.begin(dict(reversed(SETTINGS.items())), resume=True, workers={"engine": "local"}):
        pass
    assert Path(run.uri, "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "seed: 3 then, 4 now"),
        ({"nested": {"score_threshold": 0.02, "none": None}}, r"nested\.score_threshold: 0\.01 then, 0\.02 now"),
        ({"limit": 5}, "limit: None then, 5 now"),
        ({"policies": ("grid-2", "whole")}, "policies: .*then"),
    ],
)
def test_resuming_with_other_settings_is_refused_and_they_are_named(
    run: RunFolder, changes: dict, message: str
) -> None:
    with run.begin(SETTINGS, resume=False):
        pass
    refusal = f"was begun with other settings .{message}.*use the same, or another --output"
    with pytest.raises(ValueError, match=refusal), run.begin({**SETTINGS, **changes}, resume=True):
        pass


def test_an_output_that_no_run_can_begin_in_is_refused_before_the_work(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder.check_output(None, resume=False)
    RunFolder.check_output(str(tmp_path / "new" / "run"), resume=False)
    assert list(tmp_path.iterdir()) == []
    with run.begin(SETTINGS, resume=False):
        pass
    RunFolder.check_output(run.uri, resume=True)
    with pytest.raises(FileExistsError, match="run holds a run already: add --resume"):
        RunFolder.check_output(run.uri, resume=False)
    with pytest.raises(UserError, match="got no --output: name the run's folder"):
        RunFolder.check_output(None, resume=True)
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(NotADirectoryError, match=r"must be a folder, got .*file is a file: give another --output"):
            RunFolder.check_output(str(output), resume=False)
    # A superuser may write everywhere.
    monkeypatch.setattr("os.access", lambda path, mode: path != str(tmp_path))
    with pytest.raises(PermissionError, match=f"cannot write .*new/run: access is denied in {tmp_path}; check"):
        RunFolder.check_output(str(tmp_path / "new" / "run"), resume=False)


# --- shards -------------------------------------------------------------------------------------------------


def test_detections_are_written_before_the_record_that_their_images_are_finished(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write_bytes = storage.write_bytes_atomic

    def noted(uri: str, data: bytes) -> None:
        written.append(uri.removeprefix(f"{run.uri}/"))
        write_bytes(uri, data)

    monkeypatch.setattr(storage, "write_bytes_atomic", noted)
    committed: list[list[int]] = []
    writer = writer_of(run, committed=committed)
    writer.add(result_of(5), 1.5)
    assert written == []
    assert committed == []
    writer.flush()
    assert written == ["detections/whole-00000.parquet", "images/whole-00000.parquet"]
    assert committed == [[5]]
    writer.flush()
    assert len(written) == 2


def test_a_full_shard_is_written_at_once(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalenet_ray.runs.batch._IMAGES_PER_SHARD", 2)
    write(run, 1, 2, 3, 4, 5)
    shards = [pq.read_table(uri) for uri in run.shards("images", "whole")]
    assert [table.column("image_id").to_pylist() for table in shards] == [[1, 2], [3, 4], [5]]
    assert all(table.schema == IMAGES for table in shards)
    assert all(pq.read_table(uri).schema == DETECTIONS for uri in run.shards("detections", "whole"))


def test_tables_are_in_order_of_image_id_with_the_best_detection_first(run: RunFolder) -> None:
    write(run, 9, 2)
    write(run, 5)
    assert run.table("images", "whole").column("image_id").to_pylist() == [2, 5, 9]
    assert [(image.image_id, image.file_name) for image in run.finished("whole")] == [
        (2, "2.jpg"),
        (5, "5.jpg"),
        (9, "9.jpg"),
    ]
    table = run.table("detections", "whole")
    assert table.column("image_id").to_pylist() == [2, 2, 5, 5, 9, 9]
    assert table.column("score").to_pylist() == pytest.approx([0.9, 0.5] * 3)
    assert detections_from_rows(table.slice(2, 2)).boxes.tolist() == [[6, 7, 8, 9]] * 2


def test_policies_with_a_common_beginning_are_kept_apart(run: RunFolder) -> None:
    for i, policy in enumerate(["grid-2", "grid-20", "grid-2-00000", "whole@64", "whole"]):
        write(run, i, policy=policy)
    for i, policy in enumerate(["grid-2", "grid-20", "grid-2-00000", "whole@64", "whole"]):
        assert run.finished(policy).ids.tolist() == [i]
        assert set(run.table("detections", policy).column("policy").to_pylist()) == {policy}


def test_an_orphan_shard_of_detections_is_ignored_and_overwritten(run: RunFolder) -> None:
    write(run, 1)
    orphan = Path(run.uri, "detections", "whole-00001.parquet")
    orphan.write_bytes(Path(run.uri, "detections", "whole-00000.parquet").read_bytes())
    assert run.table("detections", "whole").num_rows == 2
    write(run, 2)
    assert pq.read_table(orphan).column("image_id").to_pylist() == [2, 2]
    assert run.table("detections", "whole").column("image_id").to_pylist() == [1, 1, 2, 2]


def test_a_shard_in_writing_is_no_shard(run: RunFolder) -> None:
    write(run, 1)
    Path(run.uri, "images", ".0123.part").write_bytes(b"half")
    Path(run.uri, "images", "whole-00001.parquet.part").write_bytes(b"half")
    assert run.finished("whole").ids.tolist() == [1]


def test_deleting_a_shard_makes_its_images_missing_and_harms_no_other(run: RunFolder) -> None:
    write(run, 1)
    write(run, 2)
    write(run, 3)
    Path(run.uri, "images", "whole-00001.parquet").unlink()
    assert run.finished("whole").ids.tolist() == [1, 3]
    write(run, 2)
    assert run.finished("whole").ids.tolist() == [1, 2, 3]
    assert run.table("detections", "whole").column("image_id").to_pylist() == [1, 1, 2, 2, 3, 3]


def test_a_run_without_shards_has_tables_without_rows(run: RunFolder) -> None:
    with run.begin(SETTINGS, resume=False):
        pass
    assert not run.finished("whole")
    assert run.table("images", "whole").schema == IMAGES
    assert run.table("detections", "whole").schema == DETECTIONS
    assert run.table("images", "whole", ["image_id", "file"]).column_names == ["image_id", "file"]


# --- the end ------------------------------------------------------------------------------------------------


def test_failures_of_all_policies_are_gathered(run: RunFolder) -> None:
    for policy in ("whole", "grid-2"):
        writer = writer_of(run, policy)
        writer.add(result_of(1, failure=Failure("read", "truncated")), 1.5)
        writer.add(result_of(2), 1.5)
        writer.flush()
    table = run.write_failures(["whole", "grid-2"])
    assert table.schema == FAILURES
    expected = [
        {"policy": policy, "image_id": 1, "file": "1.jpg", "stage": "read", "reason": "truncated"}
        for policy in ("whole", "grid-2")
    ]
    assert table.to_pylist() == expected
    assert pq.read_table(Path(run.uri, "failures.parquet")).to_pylist() == expected


def test_no_failures_are_a_table_without_rows(run: RunFolder) -> None:
    write(run, 1)
    assert run.write_failures(["whole"]).num_rows == 0
    assert pq.read_table(Path(run.uri, "failures.parquet")).schema == FAILURES


def test_json_has_null_where_there_is_no_number(run: RunFolder) -> None:
    run.write_json("metrics.json", {"AP": float("nan"), "list": [1.5, float("nan")]})
    assert json.loads(Path(run.uri, "metrics.json").read_text()) == {"AP": None, "list": [1.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        run.write_json("metrics.json", {"AP": float("inf")})


def test_a_run_folder_may_lie_on_s3(s3_bucket: str) -> None:
    run = RunFolder(f"{s3_bucket}/runs/first")
    with run.begin(SETTINGS, resume=False):
        pass
    with pytest.raises(FileExistsError, match="add --resume"), run.begin(SETTINGS, resume=False):
        pass
    write(run, 4, 1)
    write(run, 2)
    with run.begin(SETTINGS, resume=True):
        pass
    assert run.finished("whole").ids.tolist() == [1, 2, 4]
    assert run.shards("images", "whole") == [f"{run.uri}/images/whole-0000{i}.parquet" for i in range(2)]
    assert run.table("detections", "whole").num_rows == 6
    assert run.write_failures(["whole"]).num_rows == 0


# --- numbers of shards --------------------------------------------------------------------------------------


def rename_shards(run: RunFolder, number: str, to: str) -> None:
    for kind in ("images", "detections"):
        Path(run.uri, kind, f"whole-{number}.parquet").rename(Path(run.uri, kind, f"whole-{to}.parquet"))


@pytest.mark.parametrize("last", ["99999", "100000", "999999999999"])
def test_shards_of_any_number_are_read_and_the_next_number_is_one_more(run: RunFolder, last: str) -> None:
    write(run, 1)
    rename_shards(run, "00000", last)
    write(run, 2)
    write(run, 3)
    assert run.finished("whole").ids.tolist() == [1, 2, 3]
    assert run.table("detections", "whole").column("image_id").to_pylist() == [1, 1, 2, 2, 3, 3]
    numbers = [int(uri.rsplit("-", 1)[-1].removesuffix(".parquet")) for uri in run.shards("images", "whole")]
    assert numbers == [int(last) + i for i in range(3)]


def test_of_two_records_of_an_image_the_one_in_the_shard_of_the_higher_number_counts(run: RunFolder) -> None:
    for number, scores in (("99999", (0.9,)), ("100000", (0.4, 0.3, 0.2))):
        writer = writer_of(run)
        writer.add(result_of(5, scores), 1.5)
        writer.flush()
        # As text the later one sorts first.
        rename_shards(run, "00000" if number == "99999" else "100000", number)
    table = run.table("detections", "whole")
    assert table.column("score").to_pylist() == pytest.approx([0.4, 0.3, 0.2])
    assert run.table("images", "whole").num_rows == 1


# --- speed --------------------------------------------------------------------------------------------------


def write_session(run: RunFolder, ids: range, began: float, ended: float) -> None:
    """What a driver writes that began to work at one moment of the run and finished at another, in two shards."""
    writer = writer_of(run)
    writer.work_began(began)
    for at, image_id in enumerate(ids, start=1):
        writer.add(result_of(image_id), began + (ended - began) * at / len(ids))
        if at == 2:
            writer.flush()
    writer.flush()


def test_images_per_second_are_those_of_all_drivers_from_the_first_that_was_begun_to_the_last_that_was_finished(
    run: RunFolder,
) -> None:
    write_session(run, range(6), began=10.0, ended=13.0)
    assert run.speed("whole") == {"images_per_second": 2.0, "seconds": 13.0}
    # A second driver, whose start-up took from 13 to 20.
    write_session(run, range(6, 8), began=20.0, ended=25.0)
    assert run.speed("whole") == {"images_per_second": 1.0, "seconds": 25.0}


def test_work_of_under_two_seconds_says_nothing_of_the_speed(run: RunFolder) -> None:
    write_session(run, range(6), began=10.0, ended=11.75)
    assert run.speed("whole") == {"images_per_second": None, "seconds": 11.75}


def test_shards_that_say_nothing_of_their_time_count_neither_images_nor_seconds(run: RunFolder) -> None:
    write(run, 90, 91)
    assert run.speed("whole") == {"images_per_second": None, "seconds": 1.5}
    write_session(run, range(6), began=10.0, ended=13.0)
    assert run.speed("whole") == {"images_per_second": 2.0, "seconds": 13.0}


def test_results_without_their_config_are_no_run_to_go_on_with(run: RunFolder) -> None:
    write(run, 1, 2)
    message = r"holds results of a run whose config.yaml is lost: give another --output"
    with pytest.raises(UserError, match=message), RunFolder(run.uri).begin({"split": "other"}, resume=True):
        pass


def test_a_folder_of_pictures_named_images_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    with RunFolder(str(tmp_path)).begin({}, resume=False):
        assert (tmp_path / "config.yaml").exists()


def test_a_run_may_begin_where_the_working_directory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    run = RunFolder(str(tmp_path / "run"))
    with run.begin(SETTINGS, resume=False):
        assert run.config()["directory"] == ""
    with RunFolder(run.uri).begin(SETTINGS, resume=True):
        pass


def test_a_long_table_is_written_in_row_groups_without_a_dictionary_of_its_names(run: RunFolder) -> None:
    count = 25_000
    files = [f"/photographs/{i // 1000:03d}/{i:07d}.jpg" for i in range(count)]
    table = pa.table(
        {"image_id": np.arange(count), "file": pa.array(files, pa.large_string()), "counts": [True] * count}
    )
    run.write_table("inputs.parquet", table)
    file = pq.ParquetFile(Path(run.uri, "inputs.parquet"))
    assert file.read() == table
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    assert max(group.num_rows for group in groups) <= 10_000
    assert not any(group.column(column).has_dictionary_page for group in groups for column in (0, 1))
    assert sum(group.column(1).total_uncompressed_size for group in groups) < len("".join(files)) / 4
