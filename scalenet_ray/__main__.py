"""`python -m scalenet_ray`: look at one image, or carry a run's detections to another tool. Neither starts Ray."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any

import tyro

from scalenet_ray.commands.arguments import parse_arguments
from scalenet_ray.console import run_job, say, step_table
from scalenet_ray.core.bounds import SHARE
from scalenet_ray.data import storage
from scalenet_ray.runs.export import ExportFormat, export_run
from scalenet_ray.sample.scenes import sample_scene

_SCENE = 7
"""The scene of the sample that is shown without an image."""


@dataclass(frozen=True)
class Show:
    """Look at one image with one detector: print the steps of the recursion, and draw them.

    Without an image it shows a scene of the embedded sample, without --detector it uses the sample's networks.

    Attributes:
        image: a local path, file:// or s3://.
        policy: whole, whole@SIZE, pyramid, grid-N, random, first-pass, scalenet, gain or fused; by default scalenet
            where there is a Scale Net (gain where it is a scale head), else first-pass.
        output: the picture, as .png, .svg or .pdf.
        shown_score: objects that score less are neither drawn nor counted.
        detector: kind:what, e.g. yolox-onnx:PATH, torchvision:NAME, torchvision:PATH, module:Class.
        scale_net: weights of Scale Net, a local path or s3://.
        device: where the networks compute, as torch names it.
    """

    image: Annotated[str | None, tyro.conf.Positional] = None
    policy: str | None = None
    output: str = "recursion.png"
    shown_score: Annotated[float, SHARE] = 0.4
    detector: str | None = None
    scale_net: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Export:
    """Carry what a run found to another tool's format.

    Attributes:
        run: the run folder of jobs/eval_coco.py or jobs/detect.py, local or s3://.
        to: coco (results JSON), parquet (one file), yolo (label files), supervision (the table of its CSVSink) or
            fiftyone (labels.json of a FiftyOneImageDetectionDataset).
        policy: which of the run's; by default its first.
        output: a file, or for yolo and fiftyone a folder; by default under exports/ in the run folder.
        score_threshold: detections that score less are left out.
    """

    run: Annotated[str, tyro.conf.Positional]
    to: ExportFormat
    policy: str | None = None
    output: str | None = None
    score_threshold: Annotated[float, SHARE] = 0.0


def show(job: Show) -> int:
    """Print the steps of one recursion and draw them."""
    # Here and not above: what draws takes as long to load as all the rest of an export.
    from scalenet_ray.api import get_scaled_prediction
    from scalenet_ray.report.recursion_figure import picture_bytes, recursion_figure

    suffix = PurePosixPath(job.output).suffix
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
    found = recursion_figure(
        prediction.pixels, prediction.steps, prediction.policy, before, after, prediction.categories
    )
    storage.write_bytes_atomic(job.output, picture_bytes(found, suffix))
    say(f"merged: {len(after)} objects that score {job.shown_score} or more, {len(before)} in the whole image alone")
    say(f"{prediction.detector_passes:.2f} detector passes, picture in {job.output}")
    return 0


def export(job: Export) -> int:
    """Export one policy's detections and say where they are."""
    say(str(export_run(job.run, job.to, job.policy, job.output, job.score_threshold)))
    return 0


def main(arguments: list[str]) -> None:
    """Run the command that is named; without one, say which there are."""
    kinds: Any = Show | Export
    job = parse_arguments(kinds, arguments or ["--help"], program="python -m scalenet_ray", about=__doc__)
    run_job(show if isinstance(job, Show) else export, job)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1:])
