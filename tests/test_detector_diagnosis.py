"""What `scalenet-ray check NAME IMAGE` says of a detector: each fault once, and nothing of a sound one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from scalenet_ray.models.detector_diagnosis import Diagnosis, advise_batch, diagnose, unnamed
from tests.oracles import PerfectDetector, draw_squares
from tests.scripted_detector import scripted
from tests.test_detector_check import longer_side, perfect, resized

IMAGE = draw_squares((192, 256), np.array([[8, 8, 56, 64], [80, 16, 130, 90], [150, 100, 230, 180]]), [1, 2, 1])


def thresholded(answer: Any, **parts: Any) -> Any:
    """Loads a detector that keeps the thresholds, as one of the project's own does."""

    def load(score_threshold: float, iou_threshold: float | None) -> Any:
        def kept(tiles: Sequence[np.ndarray]) -> Any:
            found = [(boxes, scores, labels, scores >= score_threshold) for boxes, scores, labels in answer(tiles)]
            return [(boxes[shown], scores[shown], labels[shown]) for boxes, scores, labels, shown in found]

        threshold = 0.6 if iou_threshold is None else iou_threshold
        return scripted(answer=kept, iou_threshold=threshold, **{"input_side": 128, **parts})

    return load


def sound(tiles: Sequence[np.ndarray]) -> list[Any]:
    """Finds all squares, and each a second time with a score of 0.05."""
    answers = []
    for found in PerfectDetector()(tiles):
        boxes, scores = np.concatenate([found.boxes] * 2), np.concatenate([found.scores, np.full(len(found), 0.05)])
        answers.append((boxes, scores, np.concatenate([found.labels] * 2)))
    return answers


def diagnosed(load: Any, image: np.ndarray = IMAGE) -> Diagnosis:
    return diagnose(load, "mine:Net", image, score_threshold=0.01, device="cpu")


def only_fault(load: Any) -> str:
    (fault,) = diagnosed(load).faults
    return fault


def test_of_a_sound_detector_nothing_is_wrong() -> None:
    diagnosis = diagnosed(thresholded(sound))
    assert diagnosis.faults == ()
    assert diagnosis.facts[:3] == (
        "detector mine:Net: input side 128, canvas 128 x 128, NMS at IoU 0.6, 2 categories",
        "image 192 x 256, at its input side 96 x 128: reduced 2.0 times",
        "found there: 6 boxes, 3 of them with a score of 0.3 or more",
    )
    assert diagnosis.facts[3].startswith("time per tile on cpu: ")
    assert diagnosis.facts[4].startswith("use input_side 128 and --detector-batch-size ")


def test_what_a_detector_says_about_itself_is_repeated() -> None:
    load = thresholded(sound)
    facts = diagnosed(lambda *thresholds: _described(load(*thresholds))).facts
    assert facts[1] == "taken for a net of mine"


def _described(detector: Any) -> Any:
    detector.description = "a net of mine"
    return detector


_CALLS = itertools.count()


@pytest.mark.parametrize(
    ("answer", "parts", "said"),
    [
        (lambda tiles: sound_of(resized(longer_side(128), perfect)(tiles)), {}, "resizes its tiles, which undoes the"),
        (
            lambda tiles: [(b, s if len(tiles) == 1 else s * 0.4, c) for b, s, c in sound(tiles)],
            {},
            "answers a tile otherwise in a batch than alone",
        ),
        (
            lambda tiles: [(b, s * (0.35 if next(_CALLS) % 2 else 1.0), c) for b, s, c in sound(tiles)],
            {},
            "otherwise the second time",
        ),
        (
            lambda tiles: [(b * 3, s, c) for b, s, c in sound(tiles)],
            {},
            "boxes lie outside a tile of 96 x 128, such as [",
        ),
        (
            lambda tiles: sound_of(perfect(tiles)),
            {},
            "none of its 3 boxes scores below 0.25, though the threshold is 0.01",
        ),
        (sound, {"categories": {1: "LABEL_1", 2: "disc"}}, "1 of 2 classes have no name, such as 'LABEL_1': name them"),
    ],
)
def test_a_fault_is_told(answer: Any, parts: dict[str, Any], said: str) -> None:
    assert any(said in fault for fault in diagnosed(thresholded(answer, **parts)).faults)


def sound_of(found: Sequence[Any]) -> list[Any]:
    return [(each.boxes, each.scores, each.labels) for each in found]


def test_names_that_are_none_are_numbers_and_labels() -> None:
    none = ["", " ", "0", "17", "LABEL_3", "class 4", "Class-5", "category6"]
    assert unnamed([*none, "person", "N/A", "3d printer", "class", "boeing 747", "label maker"]) == none


def test_an_invalid_answer_ends_the_diagnosis_with_its_reason() -> None:
    def answer(tiles: Sequence[np.ndarray]) -> list[Any]:
        return [(b, s * 90, c) for b, s, c in sound(tiles)]

    diagnosis = diagnosed(thresholded(answer))
    assert len(diagnosis.faults) == 1
    assert "scores must be between 0 and 1, got 81: divide percentages by 100" in diagnosis.faults[0]


def test_a_score_threshold_that_does_not_reach_it_is_told() -> None:
    fault = only_fault(lambda score, iou: thresholded(sound)(0.01, iou))
    assert fault.startswith("--score-threshold does not reach it: asked for 0.6, it gave a box of 0.05: let it take")


def test_an_iou_threshold_that_does_not_reach_it_is_remarked() -> None:
    diagnosis = diagnosed(lambda score, iou: thresholded(sound)(score, None))
    assert diagnosis.faults == ()
    assert "--iou-threshold does not reach it: it keeps 0.6" in diagnosis.facts


def test_where_nothing_is_found_it_is_said_what_can_not_be_told() -> None:
    diagnosis = diagnosed(thresholded(sound), np.zeros((64, 64, 3), np.uint8))
    assert any(fact.startswith("without sure boxes it can't be told whether it resizes") for fact in diagnosis.facts)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 0.1}, 1),
        ({1: 0.1, 2: 0.099, 4: 0.098, 8: 0.097}, 1),
        ({1: 0.1, 2: 0.06, 4: 0.04, 8: 0.039}, 4),
        ({1: 0.1, 2: 0.12, 4: 0.05}, 4),
    ],
)
def test_the_smallest_batch_that_is_worth_it_is_advised(seconds: dict[int, float], best: int) -> None:
    assert advise_batch(seconds, on_gpu=False) == (f"--detector-batch-size {best} here", None)


def test_batches_that_are_none_are_told_on_a_gpu() -> None:
    advice, fault = advise_batch({1: 0.1, 2: 0.1, 4: 0.1}, on_gpu=True)
    assert advice == "--detector-batch-size 1 here"
    assert fault is not None
    assert fault.startswith("batches are no faster than one tile at a time (100 ms a tile at best, 100 ms alone): give")
    assert advise_batch({1: 0.1, 2: 0.05}, on_gpu=True)[1] is None
    assert advise_batch({1: 0.1}, on_gpu=True)[1] is None
