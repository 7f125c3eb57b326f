"""`scalenet-ray show`: the recursion on one image, step by step, without Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated

import tyro

from scalenet_ray.api import get_scaled_prediction
from scalenet_ray.console import say
from scalenet_ray.core.bounds import SHARE
from scalenet_ray.data import storage
from scalenet_ray.report.recursion_figure import picture_bytes, picture_kind, recursion_figure
from scalenet_ray.report.text import step_table
from scalenet_ray.sample.scenes import sample_scene

_SCENE = 7


@dataclass(frozen=True)
class Show:
    """Run the recursion on one image, print its steps, and draw them.

    Without an image: a scene of the embedded sample. Without --detector: the sample's networks.

    Attributes:
        image: a local path or a store's address.
        policy: regions, whole, whole@SIZE, slices@PIXELS, grid-N, pyramid, random, first-pass, scalenet or
            regions-scalenet; by default scalenet where there is a Scale Net, else regions.
        output: the picture, as .png, .svg or .pdf.
        shown_score: objects with a lower score are neither drawn nor counted.
        detector: kind:what, e.g. onnx:PATH, torchvision:NAME, torchvision:PATH, module:Class.
        scale_net: weights of Scale Net, a local path or a store's address.
        device: torch device that the networks run on.
    """

    image: Annotated[str | None, tyro.conf.Positional] = None
    policy: str | None = None
    output: str = "recursion.png"
    shown_score: Annotated[float, SHARE] = 0.4
    detector: str | None = None
    scale_net: str | None = None
    device: str = "cpu"


def main(job: Show) -> int:
    """Print the steps of one recursion and draw them. Returns the exit status."""
    kind = picture_kind(PurePosixPath(job.output).suffix)
    image = job.image if job.image is not None else sample_scene("val2017", _SCENE).pixels
    if job.detector is None:
        say("no --detector: the embedded sample's networks, which know its ten shapes and nothing else")
    prediction = get_scaled_prediction(
        image,
        job.detector,
        policy=job.policy,
        scale_net=job.scale_net,
        confidence_threshold=job.shown_score,
        device=job.device,
        verbose=0,
    )
    before, after = prediction.found_in_whole_image(job.shown_score), prediction.detections
    say(step_table(prediction.steps, prediction.policy))
    figure = recursion_figure(
        prediction.pixels, prediction.steps, prediction.policy, before, after, prediction.categories
    )
    storage.write_bytes_atomic(job.output, picture_bytes(figure, kind))
    say(f"merged: {len(after)} objects that score {job.shown_score} or more, {len(before)} in the whole image alone")
    say(f"{prediction.detector_passes:.2f} detector passes, picture in {job.output}")
    return 0
