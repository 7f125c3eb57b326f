"""Policy files and search spaces, and the Pareto front."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scalenet_ray.commands.detect import DetectImages
from scalenet_ray.commands.tune import SPACE
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.policy import Policy, Recursion, parse_policy
from scalenet_ray.core.policy_form import changed_policy
from scalenet_ray.core.scale import ScaleRange
from scalenet_ray.data.policy_files import (
    Choice,
    Range,
    SearchSpace,
    check_values,
    read_policies,
    read_space,
    set_fields,
    start_values,
)
from scalenet_ray.evaluation.compare import pareto_front

POLICY = parse_policy("first-pass", input_side=416, iou_threshold=0.65)


def written(folder: Path, content: Any) -> Path:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def space(**search: Any) -> dict[str, Any]:
    return {"version": 1, "policies": ["first-pass"], "search": search}


def test_ranges_and_choices_are_read(tmp_path: Path) -> None:
    content = space(
        **{
            "recursion.window": {"from": 0.3, "to": 0.6},
            "recursion.price": {"from": 0.01, "to": 1, "log": True},
            "recursion.max_windows": {"from": 1, "to": 6},
            "recursion.zoom": {"of": [1.5, 2.0]},
            "recursion.scale_range.high": {"from": 1.0, "to": 1.3},
            "merging.method": {"of": ["nms", "soft-nms-linear"]},
            "recursion.small_classes": {"of": [[1], [1, 2]]},
            "overlap": {"from": 0.0, "to": 0.4},
        }
    )
    assert read_space(written(tmp_path, content)) == SearchSpace(
        ("first-pass",),
        {
            "recursion.window": Range(0.3, 0.6),
            "recursion.price": Range(0.01, 1, log=True),
            "recursion.max_windows": Range(1, 6, whole=True),
            "recursion.zoom": Choice((1.5, 2.0)),
            "recursion.scale_range.high": Range(1.0, 1.3),
            "merging.method": Choice(("nms", "soft-nms-linear")),
            "recursion.small_classes": Choice(("[1]", "[1, 2]")),
            "overlap": Range(0.0, 0.4),
        },
    )


NAMED = partial(parse_policy, input_side=416, iou_threshold=0.65, score_threshold=0.05)


def test_a_file_changes_a_named_policy(tmp_path: Path) -> None:
    content = {"version": 1, "name": "mine", "base": "regions", "regions": {"small": 48}, "merging": {"sigma": 0.4}}
    (policy,) = read_policies(written(tmp_path, content), NAMED)
    start = NAMED("regions")
    assert start.regions is not None
    assert policy == replace(
        start,
        name="mine",
        regions=replace(start.regions, small=48.0),
        merging=replace(start.merging, sigma=0.4),
    )


def test_a_file_without_a_base_takes_the_detectors_side_and_thresholds(tmp_path: Path) -> None:
    content = {"version": 1, "name": "mine", "kind": "first-pass", "recursion": {"zoom": 3}}
    (policy,) = read_policies(written(tmp_path, content), NAMED)
    assert policy == Policy("mine", "first-pass", 416, Recursion(zoom=3.0), NAMED("whole").merging)
    with pytest.raises(UserError, match="a policy file must give input_side"):
        read_policies(written(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "mine", "base": "region"}, "there is no policy 'region'"),
        ({"name": "mine", "base": ["regions"]}, "base must be text, the name of a policy"),
        ({"base": "regions"}, "a policy file must give name"),
        ({"name": "mine"}, "a policy file must give kind"),
        ({"name": "mine", "base": "grid-2", "regions": {}}, "regions are planned from evidence"),
        ({"name": "mine", "base": "regions", "regions": {"smal": 3}}, r"regions has no field 'smal' \(near: small"),
    ],
)
def test_a_wrong_policy_is_refused_with_its_file(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"space.yaml: .*{message}"):
        read_policies(written(tmp_path, {"version": 1} | content), NAMED)


def test_fields_are_set_where_they_are_used() -> None:
    policies = [NAMED(name) for name in ("whole", "first-pass", "regions")]
    whole, first_pass, regions = set_fields(
        policies, ["recursion.price=1e-3", "regions.budget=2", "recursion.small_classes=[1, 2]", "merging.sigma=0.4"]
    )
    assert whole == changed_policy(policies[0], "whole", {"merging.sigma": 0.4})
    assert (first_pass.recursion.price, first_pass.recursion.small_classes) == (0.001, (1, 2))
    assert regions.regions is not None
    assert regions.regions.budget == 2.0
    (unlimited,) = set_fields([regions], ["regions.budget=none"])
    assert unlimited.regions is not None
    assert unlimited.regions.budget is None
    assert set_fields(policies, []) == policies


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("regions.price", "--set must be FIELD=VALUE, e.g. recursion.price=0.5, got 'regions.price'"),
        ("regions.prize=1", r"regions.prize, which no policy has \(near: regions.price"),
        ("price=1", "--set would change price, which no policy has"),
        ("regions.price=cheap", "--set regions.price=cheap: regions.price must be a number, got 'cheap'"),
        ("regions.max_depth=1.5", "regions.max_depth must be a whole number, got 1.5"),
        ("regions.price=-1", "--set regions.price=-1: price must be 0 or more and finite, got -1"),
        ("regions.price=[", "--set regions.price=.: a value must be written as in YAML, got"),
        ("merging.match_size=maybe", "merging.match_size must be true or false, got 'maybe'"),
        ("recursion.price=1", "--set recursion.price=1 is of no use to regions: leave it out"),
        ("grid=3", "is of no use to regions"),
    ],
)
def test_a_wrong_setting_names_the_field_its_type_and_near_ones(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        set_fields([NAMED("regions")], [setting])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "recursion.windo",
            {"of": [1]},
            r"would change recursion.windo, which no policy has \(near: recursion.window, .*: it may be recursion",
        ),
        ("name", {"of": ["a"]}, "would change name, which no policy has"),
        ("recursion", {"of": [1]}, "would change recursion, which no policy has"),
        ("recursion.scale_range.middle", {"from": 1, "to": 2}, "which no policy has"),
        (
            "recursion.window",
            {"from": 0.6, "to": 0.6},
            r"recursion.window in .* must go from one number to a higher one",
        ),
        ("recursion.window", {"from": 0.6, "to": 0.3}, "the range is empty"),
        ("recursion.price", {"from": 0, "to": 1, "log": True}, "above 0 if log"),
        ("recursion.price", {"from": 0.0, "to": float("inf")}, r"recursion\.price"),
        ("recursion.price", {"from": 0.1, "to": 0.5, "log": "yes"}, r"recursion\.price"),
        ("recursion.max_windows", {"from": 0.5, "to": 6}, "must go from one whole number to a higher one"),
        ("recursion.window", {"of": []}, r"must be {from: LOW, to: HIGH} or {of: \[VALUE, ...\]}, got {'of': \[\]}"),
        ("merging.method", {"from": 1, "to": 2}, r"must be {of: \[VALUE, ...\]}, got"),
        ("recursion.window", 0.4, r"must be {from: LOW, to: HIGH} or"),
        ("recursion.window", {"from": 0.3, "to": 0.6, "step": 1}, r"must be {from: LOW, to: HIGH} or"),
    ],
)
def test_what_no_sweep_can_search_is_refused(tmp_path: Path, path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_space(written(tmp_path, space(**{path: value})))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 2}, "must be a search space with version: 1, got 2: write it anew"),
        ([1], "must be a search space with version: 1, got 'list'"),
        ({"version": 1, "policies": ["whole"], "serch": {}}, "has serch, which no search space has"),
        ({"version": 1, "policies": [], "search": {"grid": {"of": [2]}}}, "must list the policies to start from"),
        ({"version": 1, "policies": ["whole"], "search": {}}, "must say under search what may change"),
    ],
)
def test_what_is_no_space_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_space(written(tmp_path, content))


def test_a_policy_changes_where_it_is_told_and_nowhere_else() -> None:
    values = {"recursion.window": 0.3, "recursion.scale_range.high": 1.2, "overlap": 0.1}
    values["recursion.small_classes"] = "[1, 2]"
    changed = changed_policy(POLICY, "other", values)
    assert (changed.name, changed.kind, changed.overlap) == ("other", "first-pass", 0.1)
    assert (changed.recursion.window, changed.recursion.small_classes) == (0.3, (1, 2))
    assert changed.recursion.scale_range == ScaleRange(POLICY.recursion.scale_range.low, 1.2)
    assert changed.recursion.zoom == POLICY.recursion.zoom
    assert changed_policy(POLICY, POLICY.name, {}) == POLICY


def test_the_rules_of_regions_can_be_searched_in_a_policy_that_has_them() -> None:
    regions = parse_policy("regions", input_side=416, iou_threshold=0.65)
    changed = changed_policy(regions, "trial", {"regions.price": 0.7, "regions.max_depth": 2})
    assert changed.regions is not None
    assert (changed.regions.price, changed.regions.max_depth) == (0.7, 2)
    space = SearchSpace(("regions",), {"regions.price": Range(0.1, 1.0)})
    assert start_values(regions, space) == {"regions.price": regions.regions.price}  # type: ignore[union-attr]
    squares = parse_policy("first-pass", input_side=416, iou_threshold=0.65)
    assert start_values(squares, space) is None
    with pytest.raises(UserError, match=r"regions.price can't be changed in policy first-pass, which has no regions"):
        changed_policy(squares, "trial", {"regions.price": 0.7})


def test_values_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="scale_range must be 0 < R_L <= R_H"):
        changed_policy(POLICY, "p", {"recursion.scale_range.high": 0.5})


def test_a_policy_that_lies_in_a_space_is_one_of_its_points(tmp_path: Path) -> None:
    search = {
        "recursion.window": {"from": 0.3, "to": 0.6},
        "recursion.zoom": {"of": [2.0, 2.5]},
        "recursion.small_classes": {"of": [[1], [1, 2]]},
        "recursion.scale_range.high": {"from": 1.0, "to": 1.3},
    }
    values = start_values(POLICY, read_space(written(tmp_path, space(**search))))
    assert values is not None
    assert changed_policy(POLICY, POLICY.name, values) == POLICY
    search["recursion.zoom"] = {"of": [2.0, 3.0]}
    assert start_values(POLICY, read_space(written(tmp_path, space(**search)))) is None


# --- the front --------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_that_of_comparing_all_with_all(points: list[tuple[int, int]]) -> None:
    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    unbeaten = {point for point in points if not any(beats(other, point) for other in points)}
    found = [points[i] for i in pareto_front(points)]
    assert set(found) == unbeaten
    assert found == sorted(found)
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("recursion.window", Choice((0.5, "a"))),
        ("recursion.window", Choice((None,))),
        ("recursion.zoom", Range(0.5, 2.0)),
        ("recursion.max_depth", Range(-1, 3, whole=True)),
        ("merging.method", Choice(("nms", "nmm"))),
    ],
)
def test_values_that_no_policy_may_have_are_refused_before_the_trials(path: str, field: Range | Choice) -> None:
    with pytest.raises(UserError, match=rf"{path} of the search space can't be .* in policy {POLICY.name}: "):
        check_values(SearchSpace((POLICY.name,), {path: field}), [POLICY])


@pytest.mark.parametrize("iou_threshold", [0.5, 0.6, 0.65, 0.7])
def test_the_shipped_space_holds_the_default_policy_whatever_the_detector(iou_threshold: float) -> None:
    space = read_space(SPACE)
    assert space.policies == (DetectImages.policy,)
    policy = parse_policy(DetectImages.policy, input_side=640, iou_threshold=iou_threshold)
    check_values(space, [policy])
    assert start_values(policy, space) is not None
