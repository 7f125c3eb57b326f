"""The summary at the end of a run."""

from __future__ import annotations

import pyarrow as pa
import pytest

from scalenet_ray.console import end_run
from scalenet_ray.runs.summary import failure_counts
from scalenet_ray.runs.tables import FAILURES


def failures(*rows: tuple[int, str, str], policy: str = "whole", file: str = "/photos/{}.jpg") -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"policy": policy, "image_id": i, "file": file.format(i), "stage": stage, "reason": reason}
            for i, stage, reason in rows
        ],
        FAILURES,
    )


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        (
            "cannot read /photos/1.jpg: it is gone",
            "cannot read /photos/2.jpg: it is gone",
            "cannot read ...: it is gone",
        ),
        (
            "may have 9 pixels, got 20 (4 x 5)",
            "may have 9 pixels, got 21.5 (3 x 7)",
            "may have 9 pixels, got N (N x N)",
        ),
        ("must be a path, got '../x y.jpg': mend", "must be a path, got '/z': mend", "must be a path, got ...: mend"),
        ("must have 8 or 16 bits, got '1'", "must have 8 or 16 bits, got '1'", "must have 8 or 16 bits, got '1'"),
        ("killed its process 3 times", "killed its process 4 times", "killed its process N times"),
        ("cannot read s3://b/k/1.jpg: denied", "cannot read s3://b/k/2.jpg: denied", "cannot read ...: denied"),
    ],
)
def test_reasons_that_differ_by_names_and_numbers_are_one_kind(one: str, other: str, kind: str) -> None:
    rows = failure_counts(failures((1, "read", one), (2, "read", other)))
    assert rows == [{"stage": "read", "reason": kind, "count": 2, "example": "/photos/1.jpg"}]
    (alone,) = failure_counts(failures((1, "read", one)))
    assert alone["reason"] == one.replace("/photos/1.jpg", "...")


def test_the_most_frequent_failures_come_first_and_twenty_at_most() -> None:
    rows = [(i, "read", f"reason {chr(97 + i)}") for i in range(24)] + [(100 + i, "look", "NaN") for i in range(3)]
    counted = failure_counts(failures(*rows))
    assert counted[0] == {"stage": "look", "reason": "NaN", "count": 3, "example": "/photos/100.jpg"}
    assert len(counted) == 20


def test_an_image_that_fails_under_two_policies_is_one_image() -> None:
    table = pa.concat_tables([failures((1, "read", "gone"), policy=name) for name in ("whole", "grid-2")])
    assert [row["count"] for row in failure_counts(table)] == [1]
    # Counted by kind: another reason is another row.
    assert len(failure_counts(failures((1, "read", "gone"), (1, "detect", "gone")))) == 2


def test_the_terminal_says_how_many_failed_for_which_reason_and_where_the_page_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = failure_counts(failures((1, "read", "gone"), (2, "read", "gone"), (3, "detect", "NaN")))
    document = {"images": {"total": 4, "done": 1, "failed": 3}, "failures": rows, "policies": {}}
    assert end_run(document, "run", 2) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [
        "2 failed in read: gone (e.g. /photos/1.jpg)",
        "1 failed in detect: NaN (e.g. /photos/3.jpg)",
    ]
    assert last.startswith("1 of 4 images done, results in run (open its report.html); 3 FAILED: ")
    assert last.endswith(" (--max-failures 2)")
    assert end_run(document, "run", 3) == 0


def test_only_other_policies_than_regions_are_told_to_use_regions(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"images_reduced": 1, "most_reduced": 7.8}
    images = {"total": 2, "done": 2, "failed": 0}
    end_run({"images": images, "failures": [], "policies": {"whole": row, "regions": row}}, "run", 0)
    *lines, _ = capsys.readouterr().out.splitlines()
    assert ["policy regions looks closer" in line for line in lines] == [True, False]
