"""Policies: which tiles of an image the detector runs on.

`whole`, `pyramid`, `grid-N`, `random` and `module:function` cut windows that depend on the image's size alone
(`core.windows`). `scalenet`, `first-pass` and `oracle` read a scale map and follow Algorithm 1 (`core.recursion`);
their evidence is Scale Net, the detector's first pass, or the ground truth.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import Tile, Window, fit_longer_side
from scalenet_ray.core.merge import Merging
from scalenet_ray.core.regions import Regions
from scalenet_ray.core.scale import UNIT_AREA, ScaleRange

DEFAULT_PYRAMID = (
    (1.0, 0.0, math.inf),
    (1.5, 0.0, 20.0 * UNIT_AREA),
    (2.0, 0.0, 8.0 * UNIT_AREA),
)
"""Three sizes as factors of the input side, each with the range of areas whose boxes it keeps."""

LARGEST_SIDE = 16_384
"""The longest side of a tile, in tile pixels: a square of them takes 3 GB as a network's input alone."""

MOST_WINDOWS = 100_000
"""The most windows of an image that a policy without evidence cuts: slices of 640 pixels of 26 gigapixels."""

MIN_SLICE_SIDE = 16
"""The smallest side of a slice, in image pixels: a network sees nothing in a smaller one, however enlarged."""

DIGITS_RANGE = ScaleRange(low=0.99, high=1.05)
"""R_L and R_H of the paper's digits."""

PolicyKind = Literal["whole", "pyramid", "grid", "slices", "random", "own", "first-pass", "scalenet", "oracle"]

_KINDS_WITH_EVIDENCE = ("first-pass", "scalenet", "oracle")
"""The kinds whose windows are planned from scale maps."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class Recursion:
    """The parameters of Algorithm 1.

    Attributes:
        method: how out-of-range cells of a class map are found. "class": the most probable class is one of
            `small_classes` or `large_classes` (method 1). "confidence": their probability exceeds `threshold`
            (method 2; the paper's for COCO). A regression map uses `scale_range` in place of a method.
        threshold: th of method 2.
        small_classes: classes too small for the detector (COCO: 1).
        large_classes: classes too large for it (COCO: none).
        scale_range: [R_L, R_H] of a regression map.
        k: share of the scales that TopK averages, 0 < k <= 1.
        window: W, the side of a window, a square, as a share of its tile's longer side.
        zoom: the fixed factor of a window (COCO: 2); None rescales by 1 / TopK (digits).
        max_depth: how often an image may be rescaled (COCO: at most twice).
        max_windows: the most windows of one image, over all depths.
        price: least gain of a window: out-of-range cells as a share of the tile's cells, or the expected gain where
            the map has one.
        margin: cells along a window's sides that do not count when it is chosen, since objects there are cut.
        keep_factor: boxes from a window cut for small objects may be this many times larger in area than the
            largest such object (8: up to class 2, as in the paper).
        min_window_side: windows whose longer side is under this are not cut, in image pixels.
        max_tile_pixels: larger tiles are cut at a smaller zoom.
        first_pass_threshold: the detector's own boxes count from this score on (policy first-pass).

    Raises:
        UserError: if a number leaves its range.
    """

    method: Literal["class", "confidence"] = "confidence"
    threshold: float = 0.3
    small_classes: tuple[int, ...] = (1,)
    large_classes: tuple[int, ...] = ()
    scale_range: ScaleRange = DIGITS_RANGE
    k: float = 0.15
    window: float = 0.5
    zoom: float | None = 2.0
    max_depth: int = 2
    max_windows: int = 3
    price: float = 0.0
    margin: int = 0
    keep_factor: float = 8.0
    min_window_side: int = 16
    max_tile_pixels: int = 2048 * 2048
    first_pass_threshold: float = 0.03

    def __post_init__(self) -> None:
        methods = ("class", "confidence")
        _require(self.method in methods, f"method must be one of {', '.join(methods)}, got {self.method!r}")
        _require(0.0 <= self.threshold <= 1.0, f"threshold must be between 0 and 1, got {self.threshold}")
        _require(0.0 < self.k <= 1.0, f"k must be a share above 0 and at most 1, got {self.k}")
        _require(0.0 < self.window <= 1.0, f"window must be a share above 0 and at most 1, got {self.window}")
        fits = self.zoom is None or 1.0 < self.zoom < math.inf
        _require(fits, f"zoom must be above 1 and finite, or none for TopK, got {self.zoom}")
        _require(self.max_depth >= 0, f"max_depth must be 0 or more, got {self.max_depth}")
        _require(self.max_windows >= 0, f"max_windows must be 0 or more, got {self.max_windows}")
        _require(self.price >= 0.0, f"price must be 0 or more, got {self.price}")
        _require(self.margin >= 0, f"margin must be 0 or more, got {self.margin}")
        _require(self.min_window_side >= 1, f"min_window_side must be 1 or more, got {self.min_window_side}")
        _require(self.max_tile_pixels >= 1, f"max_tile_pixels must be 1 or more, got {self.max_tile_pixels}")
        most = LARGEST_SIDE**2
        _require(self.max_tile_pixels <= most, f"max_tile_pixels must be at most {most}, got {self.max_tile_pixels}")
        _require(self.keep_factor >= 1.0, f"keep_factor must be 1 or more, got {self.keep_factor}")
        first_pass = self.first_pass_threshold
        _require(0.0 <= first_pass <= 1.0, f"first_pass_threshold must be between 0 and 1, got {first_pass}")
        low, high = self.scale_range
        _require(0.0 < low <= high, f"scale_range must be 0 < R_L <= R_H, got {low} and {high}")
        classes = (*self.small_classes, *self.large_classes)
        _require(all(1 <= c <= 5 for c in classes), f"scale classes are 1 to 5, got {classes}")
        both = sorted(set(self.small_classes) & set(self.large_classes))
        _require(not both, f"a scale class is too small or too large, not both: got {both} in both")


@dataclass(frozen=True)
class Policy:
    """Rules by which tiles are cut from an image, and detections merged.

    Attributes:
        name: as given by the user, e.g. "grid-2"; names result rows and files.
        kind: its family, which decides where its windows come from.
        input_side: the longer side of the whole image's tile, in tile pixels.
        recursion: Algorithm 1's parameters, for the kinds with evidence.
        regions: rules of the region planner, which takes the place of Algorithm 1's windows; none for these.
        merging: filters and suppression of detections.
        grid: windows along each side (grid).
        slice_side: side of a slice, in image pixels (slices).
        overlap: overlap of neighbouring windows, as a share of a window's side (grid, slices).
        random_windows: number of windows (random).
        pyramid: sizes as factors of `input_side`, each with its valid range of areas in pixels of a
            512 x 512 frame (pyramid).
        seed: of the random windows; each image draws its own.
        planner: "module:function", the function that plans the windows (own); see `core.windows.own_tiles`.
    """

    name: str
    kind: PolicyKind
    input_side: int
    recursion: Recursion = field(default_factory=Recursion)
    merging: Merging = field(default_factory=Merging)
    grid: int = 2
    overlap: float = 0.2
    random_windows: int = 2
    pyramid: tuple[tuple[float, float, float], ...] = ()
    seed: int = 0
    planner: str | None = None
    slice_side: int = 640
    regions: Regions | None = None

    def __post_init__(self) -> None:
        kinds = get_args(PolicyKind)
        _require(self.kind in kinds, f"a policy's kind must be one of {', '.join(kinds)}, got {self.kind!r}")
        _require(
            len(self.name) <= 100, f"a policy's name must be at most 100 characters, got {len(self.name)}: shorten it"
        )
        _require(self.input_side >= 1, f"input_side must be 1 pixel or more, got {self.input_side}")
        most = math.isqrt(MOST_WINDOWS)
        _require(1 <= self.grid <= most, f"grid must be 1 to {most} windows a side, got {self.grid}: choose fewer")
        _require(
            self.slice_side >= MIN_SLICE_SIDE,
            f"slice_side must be {MIN_SLICE_SIDE} image pixels or more, got {self.slice_side}: choose larger slices",
        )
        _require(
            self.regions is None or self.uses_evidence,
            f"regions are planned from evidence, which kind {self.kind} has none of: use "
            f"{', '.join(_KINDS_WITH_EVIDENCE)}",
        )
        _require(0.0 <= self.overlap < 1.0, f"overlap must be at least 0 and under 1, got {self.overlap}")
        _require(
            0 <= self.random_windows <= MOST_WINDOWS,
            f"random_windows must be 0 to {MOST_WINDOWS}, got {self.random_windows}: choose fewer",
        )
        _require(self.seed >= 0, f"seed must be 0 or more, got {self.seed}")
        _require(self.kind != "pyramid" or bool(self.pyramid), "a pyramid needs sizes: give at least one, got none")
        _require(
            (self.kind == "own") == (self.planner is not None),
            f"planner is for kind own, and must be given there, got {self.planner!r} for kind {self.kind}",
        )
        _require(all(size > 0 for size, _, _ in self.pyramid), f"pyramid sizes must be above 0, got {self.pyramid}")
        first_look = 1.0 if self.regions is None else self.regions.first_look
        side = self.input_side * max([first_look, *(size for size, _, _ in self.pyramid)])
        _require(
            side <= LARGEST_SIDE,
            f"policy {self.name} wants tiles of {side:.0f} pixels a side, at most {LARGEST_SIDE} are computed: choose "
            "a smaller one",
        )

    @property
    def uses_evidence(self) -> bool:
        """True if its windows are planned from scale maps."""
        return self.kind in _KINDS_WITH_EVIDENCE

    @property
    def needs_network(self) -> bool:
        """True if Scale Net runs on the tiles."""
        return self.kind == "scalenet"

    @property
    def needs_first_pass(self) -> bool:
        """True if the detector runs on a tile before windows are cut from it."""
        return self.kind == "first-pass"

    @property
    def reads_truth(self) -> bool:
        """True if its scale maps come from the ground truth."""
        return self.kind == "oracle"

    @property
    def needs_predictor(self) -> bool:
        """True if it needs a scale predictor beside the detector: Scale Net or the oracle."""
        return self.needs_network or self.reads_truth

    @property
    def detects_whole(self) -> bool:
        """True if the whole image's tile is detected whatever comes of it; a pyramid has it among its sizes."""
        return self.kind != "pyramid"

    @property
    def is_whole(self) -> bool:
        """True if the whole image's tile is all that is detected."""
        return self.kind == "whole"

    @property
    def fixed_windows(self) -> int:
        """Number of windows cut from each image, whatever is in it; 0 if it depends on the image."""
        return {"grid": self.grid**2, "random": self.random_windows, "pyramid": len(self.pyramid)}.get(self.kind, 0)

    @property
    def largest_side(self) -> int:
        """Longest side of a tile, in tile pixels; TopK's tiles, whose size depends on the image, are not counted."""
        growth = self.regions.first_look if self.regions is not None else 1.0
        if self.uses_evidence and self.regions is None and self.recursion.zoom is not None:
            growth = max(1.0, self.recursion.window * self.recursion.zoom) ** self.recursion.max_depth
        return round(self.input_side * max([growth, *(size for size, _, _ in self.pyramid)]))

    @property
    def fields_in_use(self) -> frozenset[str]:
        """Names of the fields that its windows and its merging depend on."""
        of_kind = {
            "pyramid": {"pyramid"},
            "grid": {"grid", "overlap"},
            "slices": {"slice_side", "overlap"},
            "random": {"random_windows", "seed"},
            "own": {"planner"},
        }
        planned = {"recursion"} if self.regions is None else {"regions"}
        return frozenset({"input_side", "merging"} | of_kind.get(self.kind, planned if self.uses_evidence else set()))

    def needs_scales(self, tile: Tile) -> bool:
        """True if windows may be cut from this tile by its evidence."""
        if not self.uses_evidence or tile.window_budget <= 0:
            return False
        if self.regions is None:
            return tile.depth < self.recursion.max_depth
        return self.regions.may_expand(tile, self.input_side)

    def root(self, image_id: int, image_hw: tuple[int, int]) -> Tile:
        """Tile of the whole image, its longer side resampled to `input_side` pixels.

        Args:
            image_id: the image's id.
            image_hw: its (height, width) in image pixels.
        """
        height, width = image_hw
        return Tile(
            image_id,
            (),
            (height, width),
            Window(0, 0, width, height),
            *fit_longer_side(height, width, self._first_side(max(image_hw))),
            window_budget=self._window_budget,
        )

    def _first_side(self, longer_side: int) -> int:
        return self.input_side if self.regions is None else self.regions.first_side(longer_side, self.input_side)

    @property
    def _window_budget(self) -> int:
        if not self.uses_evidence:
            return 0
        return self.recursion.max_windows if self.regions is None else self.regions.budget_cells


_TUNED = {
    "first-pass": Recursion(window=0.4, zoom=2.5, price=0.1, margin=1, max_depth=1, max_windows=6),
    "oracle": Recursion(window=0.4, zoom=2.5, price=0.5),
}
"""Parameters chosen on training images where the paper's were not the best. The unit of `price` is that of the map: the
score of boxes (first pass), the smallness of objects (oracle)."""


_REGION_KINDS: dict[str, PolicyKind] = {
    "regions": "first-pass",
    "regions-scalenet": "scalenet",
    "regions-oracle": "oracle",
}
"""Policies of the region planner, and the kind that their evidence comes from."""


def parse_policy(
    name: str,
    *,
    input_side: int,
    iou_threshold: float,
    score_threshold: float = 0.01,
    smallest_object: float | None = None,
    takes_larger: bool = True,
) -> Policy:
    """A policy by its name.

    The names are whole, whole@SIZE, pyramid, grid-N, slices@PIXELS, random, module:function, regions,
    regions-scalenet, regions-oracle, first-pass, paper, scalenet and oracle.

    Args:
        name: the name, as on the command line.
        input_side: the detector's own side for a whole image, in pixels.
        iou_threshold: the detector's own NMS threshold.
        score_threshold: boxes that score less are dropped.
        smallest_object: side of the smallest object worth finding, in image pixels (regions); none for the default.
        takes_larger: False for a detector that takes no tile larger than `input_side`.

    Raises:
        UserError: if there is no such policy.
    """
    _require(isinstance(name, str), f"a policy must be a name or a Policy, got {name!r}")
    merging = Merging(iou_threshold=iou_threshold, score_threshold=score_threshold)
    if match := re.fullmatch(r"whole@(\d+)", name):
        return Policy(name, "whole", int(match[1]), merging=merging)
    if match := re.fullmatch(r"grid-(\d+)", name):
        return Policy(name, "grid", input_side, merging=merging, grid=int(match[1]))
    if name == "pyramid":
        soft = dataclasses.replace(merging, method="soft-nms-linear")
        return Policy(name, "pyramid", input_side, merging=soft, pyramid=DEFAULT_PYRAMID)
    if name in ("whole", "random", "first-pass", "scalenet", "oracle"):
        return Policy(name, name, input_side, _TUNED.get(name, Recursion()), merging)
    if name in _REGION_KINDS:
        regions = Regions(
            smallest_object=Regions.smallest_object if smallest_object is None else smallest_object,
            first_look=Regions.first_look if takes_larger else 1.0,
        )
        return Policy(name, _REGION_KINDS[name], input_side, merging=merging, regions=regions)
    if name == "paper":
        # As printed: NMS alone.
        return Policy(name, "scalenet", input_side, Recursion(), dataclasses.replace(merging, method="nms"))
    if match := re.fullmatch(r"slices@(\d+)", name):
        return Policy(name, "slices", input_side, merging=merging, slice_side=int(match[1]))
    if match := re.fullmatch(r"[A-Za-z_][\w.]*:([A-Za-z_]\w*)", name):
        return Policy(match[1], "own", input_side, merging=merging, planner=name)
    msg = (
        f"there is no policy {name!r}: use regions, whole, whole@SIZE (e.g. whole@640), slices@PIXELS, grid-N (e.g. "
        "grid-2), pyramid, random, first-pass, scalenet, oracle, regions-scalenet, regions-oracle or paper, "
        "module:function for windows of your own, or describe one in a file for --policy-file"
    )
    raise UserError(msg)
