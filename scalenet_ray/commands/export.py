"""`scalenet-ray export`: detections of a run in another tool's format, without Ray or torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from scalenet_ray.console import say
from scalenet_ray.core.bounds import SHARE
from scalenet_ray.runs.export import ExportFormat, export_run


@dataclass(frozen=True)
class Export:
    """Convert the detections of a run to another tool's format.

    Attributes:
        run: run folder of `scalenet-ray eval` or `scalenet-ray detect`, local or in a store.
        to: coco (instances file, with file names), coco-results (the list that COCO's evaluation reads), parquet (one
            file), yolo or voc (label files), supervision (the table of its CSVSink),
            fiftyone (labels.json of a FiftyOneImageDetectionDataset) or geojson (in longitude and latitude, if the
            images are georeferenced).
        policy: one of the run's policies; by default its first.
        output: a file, or for yolo, voc and fiftyone a folder; by default under exports/ in the run folder.
        score_threshold: detections with a lower score are left out.
    """

    run: Annotated[str, tyro.conf.Positional]
    to: ExportFormat
    policy: str | None = None
    output: str | None = None
    score_threshold: Annotated[float, SHARE] = 0.0


def main(job: Export) -> int:
    """Export one policy's detections and print their address. Returns the exit status."""
    say(export_run(job.run, job.to, job.policy, job.output, job.score_threshold))
    return 0
