"""Batches that run out of memory are halved."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import OutOfMemoryError, TileError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.inference import BATCH_HALVED, split_on_oom
from scalenet_ray.core.networks import NetworkFactories, ScalePredictor
from scalenet_ray.core.recursion import recursive_detect
from scalenet_ray.core.scale import ScaleMap
from scalenet_ray.models.checked_detector import MappedDetector
from scalenet_ray.models.devices import translate_oom
from tests.faults import Given, Scenes, as_values, policy_of, random_networks, records_of, reference
from tests.in_process import InProcessEngine
from tests.oracles import CATEGORIES, RandomDetector, RandomScale

POLICIES = ("grid-2", "first-pass", "scalenet")


class SmallDetector(RandomDetector):
    """A detector whose device holds so many tiles at most, and so many pixels."""

    def __init__(self, most: int, pixels: int = 10**9) -> None:
        super().__init__()
        self._most, self._most_pixels = most, pixels
        self.refused = 0

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        if len(pixels) > self._most or sum(one.shape[0] * one.shape[1] for one in pixels) > self._most_pixels:
            self.refused += 1
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().__call__(pixels)


class SmallScale(RandomScale):
    """A Scale Net whose device holds so many tiles at most."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self.refused = 0

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        if len(tiles) > self._most:
            self.refused += 1
            raise OutOfMemoryError("CUDA out of memory")
        return super().__call__(pixels, tiles)


# --- halving ------------------------------------------------------------------------------------------------


def test_a_batch_is_halved_until_it_fits_and_answers_keep_their_order(caplog: pytest.LogCaptureFixture) -> None:
    sizes = []

    def call(some: slice) -> list[int]:
        sizes.append(some.stop - some.start)
        if sizes[-1] > 3:
            raise OutOfMemoryError("full")
        return list(range(some.start, some.stop))

    answers, halved = split_on_oom(call, 11)
    assert answers == list(range(11))
    assert sizes == [11, 5, 2, 3, 6, 3, 3]
    assert halved == [0, 0, 5]
    assert [record.message for record in caplog.records][:1] == [
        "a batch of 11 tiles does not fit the device's memory and is halved: full"
    ]
    assert len(caplog.records) == 3


def test_a_tile_that_does_not_fit_alone_fails_alone_and_names_the_remedy() -> None:
    def call(some: slice) -> list[int]:
        if 2 in range(some.start, some.stop):
            raise OutOfMemoryError("full")
        return list(range(some.start, some.stop))

    answers, halved = split_on_oom(call, 4)
    assert [answer for answer in answers if not isinstance(answer, TileError)] == [0, 1, 3]
    assert isinstance(answers[2], TileError)
    assert "even alone: give a smaller max_tile_pixels" in answers[2].reason
    assert halved == [0, 2]


def test_no_tiles_are_no_call() -> None:
    assert split_on_oom(lambda some: pytest.fail("called"), 0) == ([], [])


# --- the engines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_small_memory_changes_nothing_but_the_batches_and_says_so(without_ray: None, name: str) -> None:
    policy, records, scenes = policy_of(name), records_of(6), Scenes()
    detector, scale_net = SmallDetector(2), SmallScale(2)
    networks = NetworkFactories(Given(detector), Given(scale_net))
    engine = InProcessEngine(records, policy, networks, scenes, lease_size=5, detector_batch_size=8)
    results = engine.run()
    halvings = sum(result.guards.pop(BATCH_HALVED, 0) for result in results)
    assert halvings == detector.refused + scale_net.refused > 0
    expected = reference(records, policy, random_networks(policy), scenes)
    assert {result.image_id: as_values(result) for result in results} == expected


def test_a_tile_too_large_for_the_detector_costs_its_image_alone(without_ray: None) -> None:
    policy, records, scenes = policy_of("whole"), records_of(8), Scenes()
    # Of the four sizes of scenes one keeps its whole side when it is fitted into 64 x 64: the square.
    networks = NetworkFactories(Given(SmallDetector(8, pixels=64 * 63)))
    results = InProcessEngine(records, policy, networks, scenes, detector_batch_size=8).run()
    failed = {result.image_id: result.failure for result in results if result.failure is not None}
    assert sorted(failed) == [2, 6]
    assert all(one.stage == "detect" and "does not fit the device's memory" in one.reason for one in failed.values())
    expected = reference(records, policy, random_networks(policy), scenes)
    for result in results:
        if result.failure is None:
            assert as_values(dataclasses.replace(result, guards={})) == expected[result.image_id]


@pytest.mark.parametrize("name", ["whole", "first-pass", "scalenet"])
def test_the_plain_reference_fails_such_an_image_with_the_same_reason(name: str) -> None:
    policy = policy_of(name)
    image = Scenes()(records_of(1)[0])
    scale_net: ScalePredictor = SmallScale(0) if name == "scalenet" else RandomScale()
    result = recursive_detect(image, 1, policy, detect=SmallDetector(0), predict_scale=scale_net)
    assert result.failure is not None
    assert result.failure.stage == ("detect" if name == "whole" else "look")
    assert "does not fit the device's memory even alone" in result.failure.reason


# --- libraries' errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        onnxruntime_errors.RuntimeException(
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 1024"
        ),
        onnxruntime_errors.Fail("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory"),
        MemoryError("Unable to allocate 8.00 EiB for an array"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_libraries_raise_for_memory_becomes_one_error(error: Exception) -> None:
    def call() -> None:
        raise error

    with pytest.raises(OutOfMemoryError) as caught:
        translate_oom(call)
    # What it holds would keep the batch's tensors alive.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyError("a")],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    def call() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        translate_oom(call)
    assert caught.value is error


def test_a_library_that_really_has_no_room_is_understood() -> None:
    with pytest.raises(OutOfMemoryError):
        translate_oom(lambda: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(OutOfMemoryError):
        translate_oom(lambda: np.zeros((2**60,), np.uint8))


def test_what_did_not_fit_is_let_go_before_the_halves_are_tried() -> None:
    held: list[weakref.ref[Any]] = []

    def call(some: slice) -> list[int]:
        assert all(batch() is None for batch in held)
        batch = np.zeros(some.stop - some.start)
        held.append(weakref.ref(batch))

        def network() -> list[int]:
            if len(batch) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [len(batch)]

        return translate_oom(network)

    gc.disable()
    try:
        assert split_on_oom(call, 4)[0] == [1, 1, 1, 1]
    finally:
        gc.enable()
    assert len(held) == 7


def test_a_mapped_detector_says_so_whatever_detector_it_is() -> None:
    class Full(RandomDetector):
        def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def with_features(self, pixels: Sequence[np.ndarray]) -> list[Any]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    detector = MappedDetector(Full(), CATEGORIES)
    for call in (detector, detector.with_features):
        with pytest.raises(OutOfMemoryError, match="CUDA out of memory"):
            call([np.zeros((8, 8, 3), np.uint8)])
