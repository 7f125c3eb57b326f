"""`scalenet-ray train`: train a Scale Net on an annotated data set, on any number of workers.

The weights in scalenet_ray/sample/sample_scale_net.safetensors are those of

    scalenet-ray train --input-side 192 --epochs 60 --workers 2 --output RUN_FOLDER
"""

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
from scalenet_ray.models.scale_networks import PRESETS
from scalenet_ray.models.spec import SAMPLE_DETECTOR, NetworkSpec
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.sample.scenes import SAMPLE
from scalenet_ray.training.examples import TrainingImages
from scalenet_ray.training.log import TrainingLog
from scalenet_ray.training.scale_recipe import HeadRecipe, ScaleRecipe
from scalenet_ray.training.schedule import Training

CLASS_PRESETS = tuple(name for name, config in PRESETS.items() if config.kind == "classes")


@dataclass(frozen=True)
class TrainScaleNet(TrainingData):
    """Train a Scale Net on an annotated data set.

    Without --data: on the embedded sample.

    Attributes:
        preset: unet-light, unet-lite0, the paper's unet-vgg16; or head: a scale head on the detector's own features.
        detector: kind:what, the frozen detector whose features a head reads; without --data the sample's.
        input_side: side of the square that tiles are resized to, a multiple of 32; the preset's by default.
        tile_side: the longer side of the detector's tiles, its input side; the net's own by default.
        encoder_weights: initial weights of the encoder (unet-lite0, unet-vgg16): "imagenet", or a classifier's file.
    """

    preset: str = "unet-light"
    detector: str | None = None
    input_side: Annotated[int, ONE_OR_MORE] | None = None
    tile_side: Annotated[int, ONE_OR_MORE] | None = None
    encoder_weights: str | None = None
    training: Annotated[Training, tyro.conf.OmitArgPrefixes] = field(default_factory=Training)


def _pixel_recipe(job: TrainScaleNet, images: TrainingImages) -> ScaleRecipe:
    if job.preset not in CLASS_PRESETS:
        msg = f"--preset must be one of head, {', '.join(CLASS_PRESETS)}, got {job.preset!r}"
        raise UserError(msg)
    config = PRESETS[job.preset]
    config = replace(config, input_side=job.input_side or config.input_side)
    return ScaleRecipe(images, config, job.tile_side, job.encoder_weights, job.training.seed)


def _head_recipe(job: TrainScaleNet, images: TrainingImages) -> HeadRecipe:
    # Data loading tasks have no GPU.
    networks = NetworkSpec(detector=job.detector, device="cpu")
    return HeadRecipe(images, networks, networks.describe_features(), job.training.seed)


def main(job: TrainScaleNet) -> int:
    """Train, validate after each epoch, and write metrics.json and scale_net.safetensors. Returns the exit status."""
    RunFolder.check_output(job.output, resume=job.resume)
    if job.is_sample:
        job = replace(job, data=SAMPLE, detector=job.detector or SAMPLE_DETECTOR)
    images = job.training_images()
    recipe = (_head_recipe if job.preset == "head" else _pixel_recipe)(job, images)
    run = RunFolder.of_job(job.output, "train_scalenet", resume=job.resume)
    settings = {name: value for name, value in asdict(job).items() if name not in ("output", "resume", "training")}
    with run.begin(settings | job.training.settings(), resume=job.resume, workers=job.training.free_settings()):
        images = images.in_coco_form(run.uri)
        if boxes_alone := images.count_boxes_alone():
            say(f"{boxes_alone} objects have no segmentation: the pixels of their boxes stand in")
        recipe = replace(recipe, images=images)
        train_images, val_images = recipe.sizes()
        facts = {"train_images": train_images, "val_images": val_images}
        log = TrainingLog(run, facts, job.training.epochs, say)
        train(recipe, job.training, run.uri, log)
    for reason in log.failed:
        say(f"left out: {reason}")
    say(f"{job.training.epochs} epochs done, weights in {storage.join(run.uri, recipe.file_name)}")
    return 0
