"""Records of images in columns."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalenet_ray.data.image_records import ImageRecord, ImageRecords

SIDES = st.none() | st.integers(1, 10**9)
NAMES = st.text(st.characters(exclude_categories=["Cs"]))
ROWS = st.lists(
    st.builds(ImageRecord, st.integers(-(2**62), 2**62), NAMES, SIDES, SIDES),
    unique_by=lambda record: record.image_id,
)


@given(ROWS, st.slices(5))
def test_columns_are_the_sequence_of_their_records(rows: list[ImageRecord], part: slice) -> None:
    records = ImageRecords.of(rows)
    assert (len(records), list(records), list(records[part])) == (len(rows), rows, rows[part])
    assert [records[i] for i in range(-len(rows), len(rows))] == rows * 2
    assert list(pickle.loads(pickle.dumps(records))) == rows
    assert list(records.take(np.arange(len(rows)) % 2 == 0)) == rows[::2]
    with pytest.raises(IndexError):
        records[len(rows)]


@given(ROWS)
def test_a_record_is_found_by_its_id_in_any_order(rows: list[ImageRecord]) -> None:
    records = ImageRecords.of(rows)
    assert [records.by_id(row.image_id) for row in rows] == rows
    assert records.positions([row.image_id for row in rows]).tolist() == list(range(len(rows)))
    assert records.positions([2**62 + 1]).tolist() == [-1]
    with pytest.raises(KeyError):
        records.by_id(2**62 + 1)


def test_listed_files_are_numbered_from_one() -> None:
    assert list(ImageRecords.listed(["b.png", "a.png"])) == [ImageRecord(1, "b.png"), ImageRecord(2, "a.png")]


def test_an_image_costs_24_bytes_and_its_name() -> None:
    records = ImageRecords.listed([f"{i:020d}" for i in range(10_000)])
    # The columns, their bits of validity, and the ids that pickles hold.
    assert records.table.nbytes < 10_000 * (24 + 20 + 1)
    assert len(pickle.dumps(records)) < 10_000 * (24 + 20 + 1)
