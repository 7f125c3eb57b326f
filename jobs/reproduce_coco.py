"""The paper's experiment on COCO: a detector alone, Grid-Rescale, Recursive-Scale Net, first pass; at two sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated

import tyro
import yaml

from scalenet_ray.commands import evaluate, train
from scalenet_ray.commands.arguments import parse_arguments
from scalenet_ray.commands.evaluate import EvalCoco
from scalenet_ray.commands.train import TrainScaleNet
from scalenet_ray.console import run_job, say
from scalenet_ray.core.bounds import ONE_OR_MORE
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.policy_form import policy_to_dict
from scalenet_ray.data import storage
from scalenet_ray.data.coco import annotations_uri, images_and_categories
from scalenet_ray.experiments.coco import coco_policies, coco_table, expected_hours, tile_side
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.training.schedule import Training

_HELD_OUT = 0.05


@dataclass(frozen=True, kw_only=True)
class ReproduceCoco:
    """The paper's experiment on COCO.

    Attributes:
        data: folder, local or in a store, with SPLIT/ and annotations/instances_SPLIT.json.
        split: the split to evaluate on.
        detectors: torchvision's names, or NAME@PATH or PATH for weights of your own. Without a network, name the files.
        scale_net: weights of Scale Net; by default it is trained on --train-split.
        train_split: the split that Scale Net is trained on, a twentieth of it held out for validation.
        preset: the network that is trained; unet-vgg16 at 512 x 512 is the paper's.
        encoder_weights: initial weights of its encoder: "imagenet", or a classifier's file.
        sides: shorter sides of a whole photograph's tile, in pixels.
        limit: only the first so many images.
        output: the run folder, local, s3://, gs:// or az://; by default a new one under runs/reproduce_coco.
        resume: continue the run in the output folder.
        device: torch device of the evaluation, in float32.
    """

    data: str
    split: str = "val2017"
    detectors: tuple[str, ...] = (
        "fasterrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "maskrcnn_resnet50_fpn",
        "maskrcnn_resnet50_fpn_v2",
    )
    scale_net: str | None = None
    train_split: str = "train2017"
    preset: str = "unet-vgg16"
    encoder_weights: str | None = None
    sides: tuple[Annotated[int, ONE_OR_MORE], ...] = (600, 800)
    limit: Annotated[int, ONE_OR_MORE] | None = None
    output: str | None = None
    resume: bool = False
    device: str = "cpu"
    training: Annotated[Training, tyro.conf.OmitArgPrefixes] = field(default_factory=Training)


def main(job: ReproduceCoco) -> int:
    """Train Scale Net if none is given, evaluate each detector, and write and print table.md. Returns the status."""
    labels = [_label(detector) for detector in job.detectors]
    if len(set(labels)) < len(labels) or not labels:
        msg = f"--detectors must be one or more of different names, got {', '.join(labels) or 'none'}"
        raise UserError(msg)
    folder = RunFolder.of_job(job.output, "reproduce_coco", resume=job.resume).uri
    images = len(images_and_categories(annotations_uri(job.data, job.split)).images[: job.limit])
    hours = expected_hours(images, job.sides, len(labels))
    say(f"{images} images: about {hours:.2g} hours of a GPU as fast as the paper's, without the training")
    scale_net = job.scale_net or _train_scale_net(job, storage.join(folder, "scale_net"))
    metrics, status = {}, 0
    for label, detector in zip(labels, job.detectors, strict=True):
        networks = NetworkSpec(detector=f"torchvision:{detector}", scale_net=scale_net, device=job.device)
        say(f"{label}:")
        status = max(status, _evaluate(job, networks, storage.join(folder, label)))
        metrics[label] = json.loads(storage.read_bytes(storage.join(folder, label, "metrics.json")))["policies"]
        # After each detector: a job that is stopped has written the table of those before.
        storage.write_bytes_atomic(storage.join(folder, "table.md"), f"{coco_table(metrics)}\n".encode())
    say(coco_table(metrics))
    say(f"the table is in {storage.join(folder, 'table.md')}")
    return status


def _label(detector: str) -> str:
    """Name of a detector without its path, which names its run folder."""
    return PurePosixPath(detector.partition("@")[0]).name.partition(".")[0]


def _goes_on(job: ReproduceCoco, folder: str) -> bool:
    """True if a run in this folder was begun before and is to be continued."""
    return job.resume and storage.exists(storage.join(folder, "config.yaml"))


def _train_scale_net(job: ReproduceCoco, folder: str) -> str:
    weights = storage.join(folder, "scale_net.safetensors")
    if _goes_on(job, folder) and storage.exists(weights):
        return weights
    training = TrainScaleNet(
        data=job.data,
        split=job.train_split,
        holdout=_HELD_OUT,
        limit=job.limit,
        preset=job.preset,
        tile_side=tile_side(max(job.sides)),
        encoder_weights=job.encoder_weights,
        output=folder,
        resume=_goes_on(job, folder),
        training=job.training,
    )
    train.main(training)
    return weights


def _evaluate(job: ReproduceCoco, networks: NetworkSpec, folder: str) -> int:
    detector = networks.describe_detector()
    policies = coco_policies(job.sides, iou_threshold=detector.iou_threshold, score_threshold=networks.score_threshold)
    policy_file = f"{folder}.policies.yaml"
    storage.write_bytes_atomic(policy_file, yaml.safe_dump([policy_to_dict(policy) for policy in policies]).encode())
    evaluation = EvalCoco(
        data=job.data,
        split=job.split,
        policies=(),
        policy_file=policy_file,
        limit=job.limit,
        output=folder,
        resume=_goes_on(job, folder),
        report_pictures=0,
        # One image at a time, as for the paper's FPS.
        engine="local",
        networks=networks,
    )
    return evaluate.main(evaluation)


if __name__ == "__main__":
    run_job(main, parse_arguments(ReproduceCoco))
