"""Speed of recursion on a GPU against the plain detector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bench.gpu_networks import (
    MAIN_VARIANTS,
    VARIANTS,
    Record,
    Setup,
    Work,
    build_told_scale_net,
    build_torchvision,
    compare,
)
from scalenet_ray.core.geometry import AnyImage
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.recursion import recursive_detect
from scalenet_ray.models.devices import batch_size_on

_PAPER = {"whole": 6.9, "paper": 2.5}
"""Images/s in the paper, of Faster R-CNN alone and with Recursive-Scale Net."""


def measure_recursion(setup: Setup) -> Iterator[Record]:
    """Images/s of the plain detector and with recursion, one image at a time, decoded beforehand.

    The windows of first-pass and of the region planner come from the ground truth as well: their own would need a
    trained detector. They cost no network either.
    """
    policies = {name: setup.policy(name) for name in ("whole", "paper", "first-pass", "regions-oracle")}
    policies["first-pass"] = replace(policies["first-pass"], kind="oracle")
    images = [(setup.open_image(record), record.image_id) for record in setup.dataset.images[: setup.sizes.images]]
    for title in MAIN_VARIANTS:
        variant, passes = VARIANTS[title], dict[str, float]()
        detector = build_torchvision(setup, setup.sizes.detector, variant)
        predictors = {"paper": build_told_scale_net(setup, variant)}
        makers = {
            name: partial(recursion, setup, images, policy, detector, predictors.get(name, setup.truth()), passes)
            for name, policy in policies.items()
        }
        for figures in compare(setup, makers, "images/s", precision=title):
            name = figures["variant"]
            yield {**figures, "passes": passes.get(name), "images/s in the paper": _PAPER.get(name)}


def recursion(
    setup: Setup,
    images: Sequence[tuple[AnyImage, int]],
    policy: Policy,
    detector: Any,
    predictor: Any,
    passes: dict[str, float],
) -> Work:
    """The detection in (image, id) one by one, which notes the mean number of passes under the policy's name."""

    def work() -> int:
        """Detect in all."""
        found = [
            recursive_detect(
                image,
                image_id,
                policy,
                detect=detector,
                predict_scale=predictor,
                batch_size=batch_size_on(setup.device),
            )
            for image, image_id in images
        ]
        passes[policy.name] = sum(each.detector_passes for each in found) / len(found)
        return len(found)

    return work
