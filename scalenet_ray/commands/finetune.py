"""`scalenet-ray finetune`: fine-tune a detector on upsampled windows, on any number of workers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

import tyro

from scalenet_ray.commands.data_flags import TrainingData
from scalenet_ray.console import say
from scalenet_ray.core.bounds import ONE_OR_MORE
from scalenet_ray.core.errors import UserError
from scalenet_ray.data import storage
from scalenet_ray.engine.train import train
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.sample.scenes import SAMPLE
from scalenet_ray.training.detector_recipe import plan_fine_tuning
from scalenet_ray.training.log import TrainingLog
from scalenet_ray.training.schedule import Training

SAMPLE_START = "untrained:ssdlite320_mobilenet_v3_large"
"""Initial detector on the embedded sample, whose categories no published detector has."""


@dataclass(frozen=True)
class FinetuneDetector(TrainingData):
    """Fine-tune a detector on an annotated data set.

    Without --data: on the embedded sample.

    Attributes:
        detector: torchvision:NAME or torchvision:PATH; or untrained:NAME, with random weights for the data's own
            categories, the default on the embedded sample.
        input_side: the longer side of a tile, in pixels; the detector's own by default.
    """

    detector: str | None = None
    input_side: Annotated[int, ONE_OR_MORE] | None = None
    training: Annotated[Training, tyro.conf.OmitArgPrefixes] = field(default_factory=lambda: Training(epochs=12))


def main(job: FinetuneDetector) -> int:
    """Fine-tune, validate after each epoch, and write metrics.json and the weights. Returns the exit status."""
    if job.detector is None and not job.is_sample:
        msg = "--detector must name what is fine-tuned on your data, torchvision:NAME or torchvision:PATH, got none"
        raise UserError(msg)
    RunFolder.check_output(job.output, resume=job.resume)
    job = replace(job, data=SAMPLE if job.is_sample else job.data, detector=job.detector or SAMPLE_START)
    images = job.training_images()
    recipe = plan_fine_tuning(images, str(job.detector), input_side=job.input_side, seed=job.training.seed)
    run = RunFolder.of_job(job.output, "finetune_detector", resume=job.resume)
    settings = {name: value for name, value in asdict(job).items() if name not in ("output", "resume", "training")}
    with run.begin(settings | job.training.settings(), resume=job.resume, workers=job.training.free_settings()):
        recipe = replace(recipe, images=images.in_coco_form(run.uri))
        train_images, val_tiles = recipe.sizes()
        facts = {"train_images": train_images, "val_images": val_tiles // 2}
        log = TrainingLog(run, facts, job.training.epochs, say)
        train(recipe, job.training, run.uri, log)
    for reason in log.failed:
        say(f"left out: {reason}")
    weights = storage.join(run.uri, recipe.file_name)
    say(f"{job.training.epochs} epochs done: --detector torchvision:{weights}")
    return 0
