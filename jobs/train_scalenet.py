"""Train a Scale Net on any data set in COCO's layout, on any number of workers.

The embedded sample's weights, scalenet_ray/sample/sample_scale_net.safetensors, are those of

    .venv/bin/python jobs/train_scalenet.py --input-side 192 --epochs 60 --workers 2 --output RUN
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from scalenet_ray.commands.arguments import parse_arguments
from scalenet_ray.console import run_job
from scalenet_ray.core.bounds import ONE_OR_MORE
from scalenet_ray.core.errors import UserError
from scalenet_ray.data import storage
from scalenet_ray.engine.gains import measure_dataset
from scalenet_ray.engine.train import train
from scalenet_ray.models.scale_net import PRESETS
from scalenet_ray.models.spec import SAMPLE_DETECTOR, NetworkSpec
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.sample.scenes import ensure_sample
from scalenet_ray.training.examples import TrainingImages
from scalenet_ray.training.head_recipe import HeadRecipe
from scalenet_ray.training.log import TrainingLog
from scalenet_ray.training.recipe import Recipe
from scalenet_ray.training.scale_recipe import ScaleRecipe
from scalenet_ray.training.schedule import Training

CLASS_PRESETS = tuple(name for name, config in PRESETS.items() if config.kind == "classes")


@dataclass(frozen=True)
class TrainScaleNet:
    """Train a Scale Net on any data set in COCO's layout; without --data on the embedded sample.

    Attributes:
        data: folder or s3:// prefix with SPLIT/ and annotations/instances_SPLIT.json.
        split: what is trained on.
        val_split: what is measured on after each epoch.
        holdout: a share of the split that is measured on instead, and not trained on.
        limit: only the first so many images of each split.
        preset: unet-light, unet-lite0, the paper's unet-vgg16; or head: a scale head on the detector's own features.
        detector: kind:what, the frozen detector whose features a head reads; without --data the sample's.
        device: where that detector finds the objects whose gains a head learns, as torch names it.
        input_side: side of the square that tiles are squashed to, a multiple of 32; the preset's by default.
        tile_side: the longer side of the detector's tiles, its input side; the net's own by default.
        encoder_weights: what the encoder starts from (unet-lite0, unet-vgg16): "imagenet", or a classifier's file.
        output: the run folder, local or s3://; by default a new one under runs/train_scalenet.
        resume: go on with the run that is in the output folder.
    """

    data: str | None = None
    split: str = "train2017"
    val_split: str = "val2017"
    holdout: float = 0.0
    limit: Annotated[int, ONE_OR_MORE] | None = None
    preset: str = "unet-light"
    detector: str | None = None
    device: str = "cpu"
    input_side: Annotated[int, ONE_OR_MORE] | None = None
    tile_side: Annotated[int, ONE_OR_MORE] | None = None
    encoder_weights: str | None = None
    output: str | None = None
    resume: bool = False
    training: Annotated[Training, tyro.conf.OmitArgPrefixes] = field(default_factory=Training)


def _pixel_recipe(job: TrainScaleNet, images: TrainingImages) -> Recipe:
    if job.preset not in CLASS_PRESETS:
        msg = f"--preset must be one of head, {', '.join(CLASS_PRESETS)}, got {job.preset!r}"
        raise UserError(msg)
    config = PRESETS[job.preset]
    config = replace(config, input_side=job.input_side or config.input_side)
    return ScaleRecipe(images, config, job.tile_side, job.encoder_weights, job.training.seed)


def _head_recipe(job: TrainScaleNet, images: TrainingImages, run: RunFolder) -> HeadRecipe:
    networks = NetworkSpec(detector=job.detector, device=job.device)
    networks.check_device(here=False)
    # The readers that make examples have no GPU.
    recipe = HeadRecipe(
        images,
        replace(networks, device="cpu"),
        storage.join(run.uri, "scores"),
        networks.describe_features(),
        seed=job.training.seed,
    )
    measure_dataset(images, networks, recipe.scores, actors=job.training.workers, say=print)
    return recipe


def main(job: TrainScaleNet) -> int:
    """Train, measure after each epoch, and write config.yaml, metrics.json and scale_net.safetensors."""
    if job.data is None:
        job = replace(job, data=str(ensure_sample(Path("runs/sample"))), detector=job.detector or SAMPLE_DETECTOR)
    images = TrainingImages(str(job.data), job.split, job.val_split, job.holdout, job.limit)
    recipe = None if job.preset == "head" else _pixel_recipe(job, images)
    run = RunFolder.of_job(job.output, "train_scalenet", resume=job.resume)
    settings = {
        name: value for name, value in asdict(job).items() if name not in ("output", "resume", "training", "device")
    }
    with run.begin(
        settings | job.training.settings(),
        resume=job.resume,
        workers={"device": job.device, **job.training.free_settings()},
    ):
        if boxes_alone := images.count_boxes_alone():
            print(f"{boxes_alone} objects have no segmentation: the pixels of their boxes stand in")
        recipe = recipe or _head_recipe(job, images, run)
        train_images, val_images = recipe.sizes()
        facts = {"train_images": train_images, "val_images": val_images}
        log = TrainingLog(run, facts, job.training.epochs, print)
        train(recipe, job.training, run.uri, log)
    for reason in log.failed:
        print(f"left out: {reason}")
    print(f"{job.training.epochs} epochs done, weights in {storage.join(run.uri, recipe.file_name)}")
    return 0


if __name__ == "__main__":
    run_job(main, parse_arguments(TrainScaleNet))
