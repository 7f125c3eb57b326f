from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalenet_ray.core.detections import Detections, Failure, TileResult
from scalenet_ray.core.merge import Merging, merge_image
from scalenet_ray.engine.pipeline import Assembler
from tests.faults import as_values


def tree(draw: Callable[[st.SearchStrategy], Any], image_id: int) -> list[TileResult]:
    """All tiles of one image that fans out at random, with exact credits."""
    results = []
    waiting: list[tuple[tuple[int, ...], Fraction]] = [((), Fraction(1))]
    while waiting:
        path, credit = waiting.pop()
        children = draw(st.integers(0, 3)) if len(path) < 3 else 0
        credit /= 1 + children
        waiting += [((*path, i), credit) for i in range(children)]
        box = np.array([[len(path), len(results), 9 + len(results), 9]])
        found = Detections(box, np.array([draw(st.integers(1, 3)) / 4]), np.array([1]))
        failure = Failure("detect", "NaN") if draw(st.integers(0, 9)) == 0 else None
        results.append(TileResult(image_id, path, credit, found, failure, 5, 7, 0.5, ("max_depth",), (99, 99)))
    return results


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_images_finish_once_in_any_order_and_whatever_comes_twice(data: st.DataObject) -> None:
    images = {i: tree(data.draw, i) for i in range(data.draw(st.integers(0, 4)))}
    tiles = [tile for results in images.values() for tile in results]
    doubled = [*tiles, *(data.draw(st.lists(st.sampled_from(tiles), max_size=6)) if tiles else [])]
    arriving = data.draw(st.permutations(doubled))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(arriving)), max_size=4)))

    assembler = Assembler(Merging())
    done = []
    for start, end in zip([0, *cuts], [*cuts, len(arriving)], strict=True):
        done += assembler.add(arriving[start:end])
    assert sorted(result.image_id for result in done) == sorted(images)
    assert assembler.unfinished == []
    for result in done:
        assert as_values(result) == as_values(merge_image(images[result.image_id], Merging()))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_an_image_is_not_finished_while_a_tile_is_missing(data: st.DataObject) -> None:
    tiles = tree(data.draw, 5)
    missing = data.draw(st.integers(0, len(tiles) - 1))
    assembler = Assembler(Merging())
    rest = tiles[:missing] + tiles[missing + 1 :]
    assert assembler.add(rest) == []
    assert assembler.unfinished == ([5] if rest else [])
    (result,) = assembler.add([tiles[missing]])
    assert result.tiles == len(tiles)


def test_the_first_of_two_results_of_a_tile_counts() -> None:
    assembler = Assembler(Merging())
    child = TileResult(1, (0,), Fraction(1, 2))
    assembler.add([child, TileResult(1, (0,), Fraction(1, 2), failure=Failure("detect", "a retry broke"))])
    (result,) = assembler.add([TileResult(1, (), Fraction(1, 2))])
    assert result.failure is None


def test_what_comes_after_an_image_is_finished_is_dropped() -> None:
    assembler = Assembler(Merging())
    assert len(assembler.add([TileResult(1, (), Fraction(1))])) == 1
    assert assembler.add([TileResult(1, (), Fraction(1)), TileResult(1, (0,), Fraction(1, 2))]) == []
    assert assembler.unfinished == []


def test_tiles_worth_more_than_their_image_are_a_bug_that_is_named() -> None:
    assembler = Assembler(Merging())
    assembler.add([TileResult(7, (0,), Fraction(2, 3))])
    with pytest.raises(RuntimeError, match=r"image 7 has tiles worth 7/6 of it, more than 1: \[\(0,\), \(1,\)\]"):
        assembler.add([TileResult(7, (1,), Fraction(1, 2))])


def test_a_failed_tile_fails_its_image_and_shows_none_of_its_boxes() -> None:
    found = Detections(np.array([[1, 1, 9, 9]]), np.array([0.9]), np.array([1]))
    assembler = Assembler(Merging())
    assembler.add([TileResult(1, (0,), Fraction(1, 2), found, image_hw=(20, 20))])
    (result,) = assembler.add([TileResult(1, (), Fraction(1, 2), failure=Failure("look", "NaN"))])
    assert result.failure == Failure("look", "NaN")
    assert len(result.detections) == 0
    assert result.image_hw == (20, 20)
