"""Types of the documents that jobs write: metrics.json, analysis.json and the rows of a sweep."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class ImageCounts(TypedDict):
    """Numbers of images of a run."""

    total: int
    done: int
    failed: int


class FailureCount(TypedDict):
    """Failed images of one stage and reason; `example` is the file of one of them."""

    stage: str
    reason: str
    count: int
    example: NotRequired[str]


class PolicyCost(TypedDict):
    """Cost of a policy: means over the images that did not fail, busy seconds by stage, and counts.

    `images_reduced` is the number of images of which even the largest zoom shows fewer than half of the pixels along a
    side; `most_reduced` is the image pixels for a tile pixel of the worst of all.
    """

    tiles_per_image: float
    detector_passes_per_image: float
    detector_megapixels_per_image: float
    scalenet_megapixels_per_image: float
    seconds_by_stage: dict[str, float]
    guards: dict[str, int]
    images_reduced: int
    most_reduced: float
    images_done: int
    images_failed: int


class PolicyMetrics(PolicyCost, total=False):
    """One policy's row of metrics.json.

    AP and AR are in percent, None or NaN where nothing was to be found, and missing without ground truth. `segm` holds
    the same metrics for masks. `images_per_second` is None for a run too short to measure.
    """

    kind: str
    AP: float | None
    AP50: float | None
    AP75: float | None
    AP_small: float | None
    AP_medium: float | None
    AP_large: float | None
    AR_1: float | None
    AR_10: float | None
    AR_100: float | None
    AR_small: float | None
    AR_medium: float | None
    AR_large: float | None
    segm: dict[str, float]
    images_per_second: float | None
    seconds: float | None


class Interval(TypedDict):
    """A difference from the baseline policy, and the 2.5th and 97.5th percentiles of its paired bootstrap.

    `above` is the share of the resampled differences above 0.
    """

    difference: float
    low: float
    high: float
    above: float


Differences = dict[str, dict[str, Interval]]
"""Policy -> metric (AP, AP_small, AP_large) -> interval."""


class BoxCounts(TypedDict):
    """Boxes found without ground truth.

    `boxes` and `images`, those with at least one box, are over all images. `after`, `before` (boxes of the pass over
    the whole image), `new` and `lost` are over those whose pass is known.
    """

    boxes: int
    images: int
    after: int
    before: int
    new: int
    lost: int


class ClassCounts(BoxCounts):
    """Boxes of one class; `median_side` is the root of the area, in image pixels, None without boxes."""

    label: int
    median_side: float | None


class MostBoxes(TypedDict):
    """An image with many boxes."""

    id: int
    boxes: int
    file: NotRequired[str]


class FoundCounts(BoxCounts):
    """Boxes over all classes; `compared` counts the images whose pass over the whole image is known."""

    compared: int
    by_class: list[ClassCounts]
    most: list[MostBoxes]


class Metrics(TypedDict):
    """Content of metrics.json.

    `compared_with` and `differences` are written by evaluations that measured intervals, `categories` and `found` by
    detection runs. Evaluations with a choice of categories write `renamed_categories`, name in the annotations ->
    name in the run, and `left_out_categories`.
    """

    images: ImageCounts
    failures: list[FailureCount]
    policies: dict[str, PolicyMetrics]
    compared_with: NotRequired[str]
    differences: NotRequired[Differences]
    categories: NotRequired[dict[int, str]]
    found: NotRequired[FoundCounts]
    renamed_categories: NotRequired[dict[str, str]]
    left_out_categories: NotRequired[list[str]]


class Curves(TypedDict):
    """Precision in percent at the 101 recalls 0, .01, ... 1: at IoU .5, and the mean over IoU .5 to .95."""

    iou50: list[float]
    mean: list[float]


class ErrorCost(TypedDict):
    """Number of errors of one kind, and the AP at IoU .5 that correcting them alone would add."""

    count: int
    cost: float


class ChangesRow(TypedDict):
    """Objects of one class or range of sizes: how many there are, and how many two policies find."""

    name: str
    objects: int
    before: int
    after: int
    gained: int
    lost: int


class Changes(TypedDict):
    """Objects gained and lost: small objects by class, all objects by side."""

    by_class: list[ChangesRow]
    by_side: list[ChangesRow]


class ImageChanges(TypedDict):
    """One image in the report's gallery.

    `by` maps a policy to [found, gained, lost], None where unknown; `cost` maps it to [megapixels that the detector
    computed, largest zoom], None for a failed image.
    """

    id: int
    objects: int
    labels: list[int]
    by: dict[str, list[int | None]]
    cost: NotRequired[dict[str, list[float] | None]]


class Analysis(TypedDict):
    """The fields of every analysis.json; `throughput` is policy -> [seconds since it began, images done], in order."""

    shown_score: float
    images: list[ImageChanges]
    throughput: NotRequired[dict[str, list[list[float]]]]


class EvaluationAnalysis(Analysis):
    """analysis.json of an evaluation; all but `compared_with` is by policy."""

    compared_with: str
    differences: Differences
    curves: dict[str, dict[str, Curves]]
    errors: dict[str, dict[str, ErrorCost]]
    changes: dict[str, Changes]


class DetectionAnalysis(Analysis):
    """analysis.json of a run without ground truth."""

    found: FoundCounts


class FailureRow(TypedDict):
    """One failed image with one reason, and the policies that it failed under."""

    file: str
    stage: str
    reason: str
    policies: list[str]


class FailureList(TypedDict):
    """Failed images in the report: `total` images, `listed` pairs of image and reason, the first of these in `rows`."""

    total: int
    listed: int
    reasons: list[FailureCount]
    rows: list[FailureRow]


class ReportDetails(Analysis, total=False):
    """Input of report.html besides metrics.json: analysis.json's fields, and the last five of the run itself.

    `pictures` are `PictureTask`'s, `files` maps an image id to its file, `run` is config.yaml with "finished" (date and
    time) and "resumed" (bool).
    """

    compared_with: str
    curves: dict[str, dict[str, Curves]]
    errors: dict[str, dict[str, ErrorCost]]
    changes: dict[str, Changes]
    found: FoundCounts
    pictures: list[dict[str, Any]]
    files: dict[int, str]
    categories: dict[int, str]
    failures: FailureList
    run: dict[str, Any]


class TrialMetrics(TypedDict):
    """Metrics of a policy of a sweep on the images that it saw.

    AP, AP_small and AP_large in percent, detector passes per image, images and those that failed, hits and misses of
    the cache of network outputs. `score` is AP_small, or the ceiling minus the passes if these exceed it.
    """

    AP: float
    AP_small: float
    AP_large: float
    passes: float
    score: float
    images: float
    images_failed: float
    hits: float
    misses: float


class TrialRow(TrialMetrics):
    """One trial of a sweep.

    `values` maps a field's path to the value tried; metrics are NaN for a trial that failed before it measured any.
    `complete` is true if the trial saw all images.
    """

    trial: str
    values: dict[str, Any]
    complete: bool
    error: str | None


class Starts(TypedDict):
    """starts.json: the policies that a sweep starts from, by name, with the metrics after each subset of the images.

    `ceilings` holds the most detector passes per image for the trials, after each subset; None without a limit.
    """

    ceilings: list[float] | None
    policies: dict[str, list[TrialMetrics]]
