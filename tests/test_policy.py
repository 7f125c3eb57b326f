"""Policies: names, bounds of parameters, serialization."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.expansion import expand
from scalenet_ray.core.geometry import Tile, Window, fit_longer_side
from scalenet_ray.core.merge import Merging
from scalenet_ray.core.policy import DEFAULT_PYRAMID, Policy, Recursion, parse_policy
from scalenet_ray.core.policy_form import POLICY_VERSION, check_names, policy_from_dict, policy_to_dict
from scalenet_ray.core.regions import Regions
from scalenet_ray.core.scale import ScaleRange

KINDS = {
    "whole": "whole",
    "whole@640": "whole",
    "pyramid": "pyramid",
    "grid-2": "grid",
    "grid-3": "grid",
    "slices@512": "slices",
    "random": "random",
    "first-pass": "first-pass",
    "scalenet": "scalenet",
    "paper": "scalenet",
    "oracle": "oracle",
    "regions": "first-pass",
    "regions-scalenet": "scalenet",
    "regions-oracle": "oracle",
}
NAMES = tuple(KINDS)


def _named(name: str) -> Policy:
    return parse_policy(name, input_side=416, iou_threshold=0.6, score_threshold=0.02)


# --- names ------------------------------------------------------------------------------------------


def test_every_name_gives_its_kind_and_takes_the_detectors_own_side_and_threshold() -> None:
    for name in NAMES:
        policy = _named(name)
        assert policy.name == name
        assert policy.kind == KINDS[name]
        assert (policy.regions is not None) == name.startswith("regions")
        assert policy.input_side == (640 if name == "whole@640" else 416)
        assert (policy.merging.iou_threshold, policy.merging.score_threshold) == (0.6, 0.02)
        methods = {"pyramid": "soft-nms-linear", "paper": "nms"}
        assert policy.merging.method == methods.get(name, "consensus")
    assert (_named("grid-2").grid, _named("grid-3").grid) == (2, 3)
    assert _named("pyramid").pyramid == DEFAULT_PYRAMID
    assert _named("slices@512").slice_side == 512
    assert _named("paper").recursion == Recursion()
    few = parse_policy("regions", input_side=416, iou_threshold=0.6, smallest_object=30.0)
    assert few.regions == Regions(smallest_object=30.0)


def test_a_policy_that_is_no_name_is_refused() -> None:
    with pytest.raises(UserError, match="a policy must be a name or a Policy, got 3"):
        parse_policy(3, input_side=416, iou_threshold=0.6)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["", "Whole", "whole@", "whole@x", "whole@-1", "whole@640 ", "grid", "grid-", "grid-2.5", "scalenet2", "\n"]
)
def test_an_unknown_name_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=r"there is no policy .*: use regions, whole, whole@SIZE \(e") as e:
        _named(name)
    assert repr(name) in str(e.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("whole@0", "input_side must be 1 pixel or more, got 0"),
        ("grid-0", "grid must be 1 to 316 windows a side, got 0"),
        ("grid-500", "grid must be 1 to 316 windows a side, got 500: choose fewer"),
        ("slices@15", "slice_side must be 16 image pixels or more, got 15: choose larger slices"),
    ],
)
def test_a_name_with_an_impossible_number_says_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _named(name)


def test_which_policies_look_and_at_what() -> None:
    looks = {name for name in NAMES if _named(name).uses_evidence}
    regions = {"regions", "regions-scalenet", "regions-oracle"}
    assert looks == {"first-pass", "scalenet", "paper", "oracle"} | regions
    assert {name for name in NAMES if _named(name).needs_network} == {"scalenet", "paper", "regions-scalenet"}
    assert {name for name in NAMES if _named(name).needs_first_pass} == {"first-pass", "regions"}
    assert {name for name in NAMES if _named(name).reads_truth} == {"oracle", "regions-oracle"}


def test_a_tile_is_looked_at_while_it_may_still_be_cut() -> None:
    tile = Tile(1, (0,), (8, 8), Window(0, 0, 8, 8), 8, 8, window_budget=1)
    policy = dataclasses.replace(_named("scalenet"), recursion=Recursion(max_depth=2))
    assert policy.needs_scales(tile)
    assert not policy.needs_scales(dataclasses.replace(tile, window_budget=0))
    assert not policy.needs_scales(dataclasses.replace(tile, path=(0, 0)))
    assert not dataclasses.replace(policy, kind="grid").needs_scales(tile)


# --- the whole image's tile -------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 31, 416, 640]))
def test_the_root_has_the_longer_side_exactly_and_the_other_rounded_down(h: int, w: int, side: int) -> None:
    height, width = fit_longer_side(h, w, side)
    assert max(height, width) == side
    assert min(height, width) == max(1, min(h, w) * side // max(h, w))
    assert (height, width) == tuple(reversed(fit_longer_side(w, h, side)))


def test_roots_worked_by_hand() -> None:
    root = _named("scalenet").root(7, (480, 640))
    assert (root.image_id, root.path, root.image_hw, root.window) == (7, (), (480, 640), Window(0, 0, 640, 480))
    assert (root.height, root.width) == (312, 416)
    assert root.window_budget == _named("scalenet").recursion.max_windows
    # 427 * 416 / 640 = 277.55; a small image is enlarged; a line of pixels keeps one.
    assert fit_longer_side(427, 640, 416) == (277, 416)
    assert fit_longer_side(100, 50, 416) == (416, 208)
    assert fit_longer_side(1, 3000, 416) == (1, 416)
    assert _named("whole").root(7, (480, 640)).window_budget == 0


def test_the_largest_side_is_that_of_the_deepest_window_or_of_the_largest_size() -> None:
    assert [_named(name).largest_side for name in ("whole", "whole@640", "grid-3", "random")] == [416, 640, 416, 416]
    # DEFAULT_PYRAMID goes up to twice the side.
    assert _named("pyramid").largest_side == 832
    zoomed = dataclasses.replace(_named("scalenet"), recursion=Recursion(window=0.5, zoom=2.0, max_depth=3))
    assert zoomed.largest_side == 416
    # Half of the side at zoom 3 is 1.5 times as many pixels, twice.
    grown = dataclasses.replace(zoomed, recursion=Recursion(window=0.5, zoom=3.0, max_depth=2))
    assert grown.largest_side == 936
    # A window that is shown smaller than its tile leaves the whole image's tile the largest.
    shrunk = dataclasses.replace(zoomed, recursion=Recursion(window=0.25, zoom=2.0, max_depth=2))
    assert shrunk.largest_side == 416
    assert dataclasses.replace(grown, kind="whole").largest_side == 416


# --- several at once --------------------------------------------------------------------------------


def test_policies_of_a_run_keep_their_order() -> None:
    policies = [_named(name) for name in ("whole@640", "grid-2", "first-pass")]
    assert check_names(policies) == policies
    named = [dataclasses.replace(policies[0], name="my.own_policy+2-b")]
    assert check_names(named) == named


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "name at least one policy"),
        (["whole", "grid-2", "whole"], "each policy of a run needs a name of its own, got twice whole$"),
        (["a/b"], "a policy's name may have letters, digits and @ . _ [+] -, got 'a/b': it names files"),
        ([""], "got ''"),
        (["a b"], "got 'a b'"),
        (["a\n"], r"got 'a\\n'"),
    ],
)
def test_policies_whose_files_would_clash_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_names([dataclasses.replace(_named("whole"), name=name) for name in names])


# --- numbers out of range ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", "both", "method must be one of class, confidence, got 'both'"),
        ("threshold", 1.1, "threshold must be between 0 and 1, got 1.1"),
        ("k", 0.0, "k must be a share above 0 and at most 1, got 0.0"),
        ("window", 0.0, "window must be a share above 0 and at most 1, got 0.0"),
        ("zoom", 1.0, "zoom must be above 1 and finite, or none for TopK, got 1.0"),
        ("max_depth", -1, "max_depth must be 0 or more, got -1"),
        ("max_windows", -1, "max_windows must be 0 or more, got -1"),
        ("price", -0.1, "price must be 0 or more, got -0.1"),
        ("price", math.nan, "price must be 0 or more, got nan"),
        ("keep_factor", 0.5, "keep_factor must be 1 or more, got 0.5"),
        ("min_window_side", 0, "min_window_side must be 1 or more, got 0"),
        ("max_tile_pixels", 0, "max_tile_pixels must be 1 or more, got 0"),
        ("first_pass_threshold", 1.5, "first_pass_threshold must be between 0 and 1, got 1.5"),
        ("scale_range", ScaleRange(1.2, 1.1), "scale_range must be 0 < R_L <= R_H, got 1.2 and 1.1"),
        ("scale_range", ScaleRange(math.nan, 1.1), "scale_range must be 0 < R_L <= R_H, got nan and 1.1"),
        ("small_classes", (0,), r"scale classes are 1 to 5, got \(0,\)"),
        ("large_classes", (6,), r"scale classes are 1 to 5, got \(1, 6\)"),
        ("large_classes", (1, 5), r"a scale class is too small or too large, not both: got \[1\] in both"),
    ],
)
def test_a_parameter_of_the_recursion_out_of_its_range_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recursion(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "zoom", "a policy's kind must be one of whole, pyramid, grid, .*, got 'zoom'"),
        ("input_side", 0, "input_side must be 1 pixel or more, got 0"),
        ("overlap", 1.0, "overlap must be at least 0 and under 1, got 1.0"),
        ("random_windows", -1, "random_windows must be 0 to 100000, got -1"),
        ("seed", -1, "seed must be 0 or more, got -1"),
        ("pyramid", ((0.0, 0.0, 1.0),), "pyramid sizes must be above 0, got "),
    ],
)
def test_a_field_of_a_policy_out_of_its_range_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**({"name": "mine", "kind": "whole", "input_side": 64} | {field: value}))


def test_a_pyramid_without_sizes_would_find_nothing_and_is_refused() -> None:
    with pytest.raises(ValueError, match="a pyramid needs sizes"):
        Policy("mine", "pyramid", 64)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", "hard", "method must be one of consensus, nms, soft-nms-linear, soft-nms-gaussian, got 'hard'"),
        ("iou_threshold", 1.5, "iou_threshold must be between 0 and 1, got 1.5"),
        ("score_threshold", math.nan, "score_threshold must be between 0 and 1, got nan"),
        ("sigma", 0.0, "sigma must be above 0 and edge_margin not below, got 0.0 and "),
        ("edge_margin", -1.0, "sigma must be above 0 and edge_margin not below, got 0.5 and -1.0"),
    ],
)
def test_a_parameter_of_merging_out_of_its_range_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Merging(**{field: value})


def test_parameters_may_lie_on_their_bounds() -> None:
    Merging(iou_threshold=1.0, score_threshold=0.0, edge_margin=0.0)
    Merging(iou_threshold=0.0, score_threshold=1.0)
    Recursion(threshold=1.0, k=1.0, window=1.0, keep_factor=1.0, min_window_side=1, max_tile_pixels=1)
    Recursion(threshold=0.0, max_depth=0, max_windows=0, scale_range=ScaleRange(1.0, 1.0), small_classes=(1, 5))
    Policy("mine", "grid", 1, grid=1, overlap=0.0, random_windows=0)


# --- files ------------------------------------------------------------------------------------------

BASE = {"version": 1, "name": "mine", "kind": "scalenet", "input_side": 416}

UNUSUAL = Policy(
    "mine",
    "own",
    512,
    Recursion("class", 0.25, (1, 2), (5,), ScaleRange(0.5, 2.0), 0.11, 0.41, None, 7, 19, 1e-5, 2, 2.5, 7, 10**6, 0.07),
    Merging("soft-nms-gaussian", 0.5, 0.25, 0.001, 0.0, False, 300),
    3,
    0.1,
    5,
    ((1.0, 0.0, math.inf), (2.0, 10.0, 20.0)),
    4,
    "module:function",
    512,
)


ODD_REGIONS = Policy(
    "mine",
    "oracle",
    512,
    regions=Regions(
        9.0, 7.0, 1.5, 2.0, 0.2, 50.0, 70.0, 2.0, 1.5, 0.6, 20.0, 100, 50, 0.9, 1.25, 2, 3.5, ((0.1, 0.2, 0.3, 0.4),)
    ),
)


@pytest.mark.parametrize("policy", [*map(_named, NAMES), UNUSUAL, ODD_REGIONS], ids=lambda policy: policy.name)
def test_a_policy_survives_yaml_and_json(policy: Policy) -> None:
    plain = policy_to_dict(policy)
    assert plain["version"] == POLICY_VERSION
    for there_and_back in (yaml.safe_load(yaml.safe_dump(plain)), json.loads(json.dumps(plain)), plain):
        assert policy_from_dict(there_and_back) == policy
    assert isinstance(policy_from_dict(plain).recursion.scale_range, ScaleRange)


def test_the_unusual_policies_have_no_field_left_at_its_default() -> None:
    usual = Policy("whole", "whole", 416)
    assert {UNUSUAL.regions, usual.regions} == {None}
    assert ODD_REGIONS.regions is not None
    for name in (field.name for field in dataclasses.fields(Regions)):
        assert getattr(ODD_REGIONS.regions, name) != getattr(Regions(), name), name
    for one, other in ((UNUSUAL, usual), (UNUSUAL.recursion, usual.recursion), (UNUSUAL.merging, usual.merging)):
        for field in (field for field in dataclasses.fields(one) if field.name != "regions"):
            assert getattr(one, field.name) != getattr(other, field.name), field.name


def test_a_whole_number_does_for_a_real_one() -> None:
    recursion = policy_from_dict(BASE | {"recursion": {"zoom": 3, "window": 1}}).recursion
    assert (recursion.zoom, recursion.window) == (3.0, 1.0)
    assert isinstance(recursion.zoom, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "a policy file must say version: 1, got 2: add it, or write the file anew"),
        ({"version": None}, "a policy file must say version: 1, got None"),
        ({"version": True}, "a policy file must say version: 1, got True"),
        ({"zom": 2}, "policy has no field 'zom': it knows grid, input_side, kind, merging, name, "),
        ({"recursion": {"W": 0.5, "depth": 1}}, "recursion has no field 'W': it knows first_pass_threshold, "),
        ({1: 2}, "policy has no field 1: it knows "),
        ({"recursion": None}, "recursion must be a mapping of names to values, got NoneType"),
        ({"recursion": {"scale_range": [1.0]}}, r"recursion.scale_range must be a list of 2, got \[1.0\]"),
        ({"recursion": {"max_depth": 1.5}}, r"recursion.max_depth must be a whole number, got 1\.5"),
        ({"recursion": {"max_depth": True}}, "recursion.max_depth must be a whole number, got True"),
        # YAML reads 1e-3, without a point, as text.
        ({"recursion": {"price": "1e-3"}}, "recursion.price must be a number, got '1e-3'"),
        ({"recursion": {"small_classes": 1}}, "recursion.small_classes must be a list, got 1"),
        ({"recursion": {"small_classes": ["one"]}}, r"recursion.small_classes\[0\] must be a whole number, got 'one'"),
        ({"merging": {"match_size": "no"}}, "merging.match_size must be true or false, got 'no'"),
        ({"merging": {"method": 1}}, "merging.method must be text, got 1"),
        ({"pyramid": [[1.0, "0", 2.0]]}, r"pyramid\[0\]\[1\] must be a number, got '0'"),
        ({"pyramid": [[1.0, 0.0]]}, r"pyramid\[0\] must be a list of 3, got \[1\.0, 0\.0\]"),
        ({"kind": "zoom"}, "a policy's kind must be one of whole, .*, got 'zoom'"),
        ({"kind": ["whole"]}, r"kind must be text, got \['whole'\]"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_what_was_wanted(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_from_dict(BASE | changes)


def test_what_a_file_must_give_is_named() -> None:
    with pytest.raises(ValueError, match="a policy file must give kind, input_side"):
        policy_from_dict({"version": 1, "name": "mine"})


@pytest.mark.parametrize("values", [None, [], "whole"])
def test_a_file_that_is_no_mapping_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="a policy file must map names to values, got "):
        policy_from_dict(values)


# --- windows of the user's own ----------------------------------------------------------------------


def halves(image_hw: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    height, width = image_hw
    return [(0, 0, width // 2, height), (width // 2, 0, width, height), (0, 0, width // 2, height)]


def outside(image_hw: tuple[int, int]) -> list[tuple[float, ...]]:
    return [(0, 0, image_hw[1] + 1, image_hw[0])]


def fractional(image_hw: tuple[int, int]) -> list[tuple[float, ...]]:
    return [(0, 0, 0.5, 1)]


def endless(image_hw: tuple[int, int]) -> Iterator[tuple[int, ...]]:
    while True:
        yield (0, 0, 1, 1)


def own(function: str) -> Policy:
    return parse_policy(f"{__name__}:{function}", input_side=64, iou_threshold=0.5)


def test_a_policy_cuts_the_windows_of_a_users_function():
    policy = own("halves")
    assert (policy.name, policy.kind, policy.uses_evidence) == ("halves", "own", False)
    expansion = expand(policy.root(1, (40, 81)), None, policy)
    assert expansion.detect
    assert [(t.path, t.window.xyxy, t.height, t.width) for t in expansion.children] == [
        ((0,), (0, 0, 40, 40), 64, 64),
        ((1,), (40, 0, 81, 40), 62, 64),
    ]
    assert policy_from_dict(policy_to_dict(policy)) == policy
    assert all(expand(child, None, policy).children == () for child in expansion.children)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("outside", "outside must return windows .* within an image of \\(40, 81\\).*leaves its image"),
        ("fractional", "in whole pixels.*TypeError"),
        ("absent", "must name a function that can be imported, got .*:absent"),
    ],
)
def test_windows_that_are_none_are_refused_by_the_functions_name(function: str, message: str):
    policy = own(function)
    with pytest.raises(UserError, match=message):
        expand(policy.root(1, (40, 81)), None, policy)


@pytest.mark.parametrize(("name", "most"), [("slices@16", 100_000), (f"{__name__}:endless", 2)])
def test_an_image_of_more_windows_than_any_needs_costs_itself(name: str, most: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("scalenet_ray.core.windows.MOST_WINDOWS", most)
    policy = parse_policy(name, input_side=64, iou_threshold=0.5)
    with pytest.raises(TileError, match=rf"may cut {most} windows of an image, got \d+ for 5000 x 7000 pixels"):
        expand(policy.root(1, (5000, 7000)), None, policy)


def test_a_planner_belongs_to_kind_own_alone():
    for kind, planner in (("own", None), ("grid", "a:b")):
        with pytest.raises(UserError, match="planner is for kind own"):
            Policy("p", kind, 64, planner=planner)
