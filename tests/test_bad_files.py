"""Damaged images and annotations cost their image alone, with a reason."""

from __future__ import annotations

import json
import os
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.masks import mask_of_segmentation
from scalenet_ray.data.coco import read_annotations, safe_file_name
from scalenet_ray.data.images import decode_image, read_image
from scalenet_ray.data.listings import find_images
from scalenet_ray.data.policy_files import read_policies
from scalenet_ray.models.spec import SAMPLE_DETECTOR, NetworkSpec
from scalenet_ray.sample.scenes import write_sample
from tests.bad_files import (
    DOCUMENTS,
    HW,
    JPEG,
    MAX_PIXELS,
    NAMES,
    PICTURES,
    SEGMENTATIONS,
    document,
    mutated,
    mutated_document,
    read_all,
)
from tests.job_scripts import load_job


@pytest.mark.parametrize("kind", PICTURES)
def test_a_bad_picture_is_decoded_or_says_what_to_do(kind: str):
    data, reason = PICTURES[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if reason is None:
            pixels = decode_image(data, max_pixels=MAX_PIXELS)
            assert sorted(pixels.shape) == [3, *HW]
        else:
            with pytest.raises(TileError, match=reason):
                decode_image(data, max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_bad_instances_file_is_read_or_says_what_to_do(kind: str, tmp_path: Path):
    data, reason = DOCUMENTS[kind]
    (tmp_path / "instances.json").write_bytes(data)
    if reason is None:
        assert len(read_annotations(tmp_path / "instances.json").images) == 2
    else:
        with pytest.raises(ValueError, match=reason):
            read_annotations(tmp_path / "instances.json")


@pytest.mark.parametrize("kind", SEGMENTATIONS)
def test_a_bad_segmentation_is_a_mask_or_says_what_to_do(kind: str):
    segmentation, reason = SEGMENTATIONS[kind]
    if reason is None:
        mask = mask_of_segmentation(segmentation, HW)
        assert (mask.shape, mask.dtype) == (HW, np.uint8)
        assert mask.max() <= 1
    else:
        with pytest.raises(TileError, match=reason):
            mask_of_segmentation(segmentation, HW)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_good_run_lengths_are_what_pycocotools_says_they_are(height: int, width: int, seed: int, share: float):
    drawn = np.random.default_rng(seed).random((height, width)) < share
    encoded: Any = coco_mask.encode(np.asfortranarray(drawn.astype(np.uint8)))
    text = {"size": [height, width], "counts": encoded["counts"].decode()}
    assert np.array_equal(mask_of_segmentation(text, (height, width)), drawn)
    edges = np.flatnonzero(np.diff(drawn.ravel(order="F"), prepend=False))
    runs = np.diff([0, *edges, height * width]).tolist()
    assert np.array_equal(mask_of_segmentation({**text, "counts": runs}, (height, width)), drawn)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_name_that_leaves_its_folder_costs_its_picture(name: str):
    with pytest.raises(TileError, match="file_name must be a path inside the images' folder"):
        safe_file_name(name)


# --- files ------------------------------------------------------------------------------------------


def test_a_file_of_many_gigabytes_is_refused_before_it_is_read(tmp_path: Path):
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)
    os.truncate(path, 2**40)
    with pytest.raises(TileError, match=r"a\.jpg may have 1600000000 bytes, got 1099511627776: split or shrink it"):
        read_image(path)
    with pytest.raises(ValueError, match="may have 2147483648 bytes, got 1099511627776"):
        read_annotations(path)
    with pytest.raises(ValueError, match="may have 1048576 bytes"):
        read_policies(path)


def test_what_is_not_there_or_no_file_costs_its_picture(tmp_path: Path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere")
    for name in ("folder.jpg", "link.jpg", "none.jpg", "n\0.jpg", "l" * 300 + ".jpg"):
        with pytest.raises(TileError):
            read_image(tmp_path / name)
    with pytest.raises(TileError, match="must be a path, or start with file://"):
        read_image("gopher://host/a.jpg")


def test_a_file_whose_name_is_not_utf_8_is_named_before_anything_is_done(tmp_path: Path):
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(JPEG)
    with pytest.raises(ValueError, match=r"names of files must be UTF-8, got .*caf\\udce9\.jpg'.*: rename them"):
        find_images(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "a: 2026-99-99", "a: &a [*a", "a: !!python/object:os.system x", "\0"])
def test_settings_that_are_no_yaml_are_refused(text: str, tmp_path: Path):
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"(?s)policy.yaml must be YAML, got something else .*: correct it"):
        read_policies(tmp_path / "policy.yaml")


# --- mutated ----------------------------------------------------------------------------------------


@settings(max_examples=400)
@given(st.integers(0, 2**32 - 1))
def test_mutated_instances_files_are_read_or_refused(seed: int):
    chance = random.Random(seed)
    for make in (mutated_document, lambda chance: json.loads(mutated(json.dumps(document()).encode(), chance))):
        try:
            read_all(make(chance))
        except (TileError, ValueError) as error:
            assert str(error)  # noqa: PT017 - most documents raise, and some do not


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(st.fixed_dictionaries({"images": JSON, "categories": JSON, "annotations": JSON}) | JSON)
def test_any_json_is_read_or_refused(found: Any):
    with pytest.raises(ValueError, match="must"):
        read_all(found)


@settings(max_examples=300)
@given(JSON | st.fixed_dictionaries({"size": st.just([*HW]), "counts": JSON | st.text(max_size=30)}))
def test_any_segmentation_is_a_mask_or_refused(found: Any):
    try:
        assert mask_of_segmentation(found, HW).shape == HW
    except TileError as error:
        assert "correct or remove the annotation" in str(error)  # noqa: PT017 - some are masks


# --- a whole run ------------------------------------------------------------------------------------


def test_a_run_over_bad_pictures_names_each_and_leaves_the_good_ones_alone(tmp_path: Path):
    sample = write_sample(tmp_path / "sample", train=1, val=3)
    listing = sample / "annotations" / "instances_val2017.json"
    good = json.loads(listing.read_text())
    wanted = {}
    module = load_job("eval_coco")
    networks = NetworkSpec(detector=SAMPLE_DETECTOR)
    job = module.EvalCoco(
        data=str(sample),
        output=str(tmp_path / "good"),
        policies=("first-pass",),
        engine="local",
        networks=networks,
        max_image_megapixels=MAX_PIXELS / 1e6,
    )
    assert module.main(job) == 0

    bad = [
        (f"{i:03}.jpg", data, reason) for i, (data, reason) in enumerate(PICTURES.values()) if reason is not None
    ] + [(name, None, "file_name must be a path inside") for name in NAMES]
    for i, (name, data, reason) in enumerate(bad, start=1000):
        if data is not None:
            (sample / "val2017" / name).write_bytes(data)
        good["images"].append({"id": i, "file_name": name})
        wanted[i] = (name, reason)
    listing.write_text(json.dumps(good))
    assert module.main(replace(job, output=str(tmp_path / "mixed"))) == 1

    failures = {row["image_id"]: row for row in pq.read_table(tmp_path / "mixed" / "failures.parquet").to_pylist()}
    assert {i: row["file"] for i, row in failures.items()} == {i: name for i, (name, _) in wanted.items()}
    assert {row["stage"] for row in failures.values()} == {"read"}
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("good", "mixed")]
    assert results[0]
    assert results[1] == results[0]
