"""Train a Scale Net on any data set in COCO's layout.

The embedded sample's weights, scalenet_ray/weights/sample_scale_net.safetensors, are those of

    .venv/bin/python jobs/train_scalenet.py --input-side 192 --epochs 60 --mixed-precision --output RUN_FOLDER
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro

from scalenet_ray.core import storage
from scalenet_ray.core.samples import ensure_sample
from scalenet_ray.engine.runs import RunFolder
from scalenet_ray.models.scale_net import (
    PRESETS,
    ScaleNetConfig,
    build_scale_net,
    load_encoder_weights,
    save_scale_net,
)
from scalenet_ray.models.training import ScaleDataset, evaluate, read_examples, train
from scalenet_ray.terminal import run_job


@dataclass(frozen=True)
class TrainScaleNet:
    """Train a Scale Net on any data set in COCO's layout; without --data on the embedded sample.

    Attributes:
        data: folder or s3:// prefix with SPLIT/ and annotations/instances_SPLIT.json.
        split: what is trained on.
        val_split: what is measured on after each epoch.
        preset: unet-light, unet-lite0, or the paper's unet-vgg16.
        input_side: side of the square that tiles are squashed to, a multiple of 32; the preset's by default.
        tile_side: the longer side of the detector's tiles, its input side; the net's own by default.
        encoder_weights: a classifier's weights that the encoder starts from (unet-lite0, unet-vgg16).
        output: the run folder, local or s3://; by default a new one under runs/train_scalenet.
        epochs: passes over the images.
        batch_size: images a step.
        learning_rate: at the start; it falls to 0 along a cosine.
        seed: of the weights, the order and the windows.
        limit: only the first so many images of each split.
        device: where the network is trained, as torch names it.
        mixed_precision: compute in bfloat16 what bears it; twice as fast where the hardware knows it.
    """

    data: str | None = None
    split: str = "train2017"
    val_split: str = "val2017"
    preset: str = "unet-light"
    input_side: int | None = None
    tile_side: int | None = None
    encoder_weights: str | None = None
    output: str | None = None
    epochs: int = 40
    batch_size: int = 16
    learning_rate: float = 2e-3
    seed: int = 0
    limit: int | None = None
    device: str = "cpu"
    mixed_precision: bool = False


def _config(job: TrainScaleNet) -> ScaleNetConfig:
    if job.preset not in PRESETS or PRESETS[job.preset].kind != "classes":
        names = ", ".join(name for name, config in PRESETS.items() if config.kind == "classes")
        msg = f"--preset must be one of {names}, got {job.preset!r}"
        raise ValueError(msg)
    config = PRESETS[job.preset]
    return replace(config, input_side=job.input_side or config.input_side)


def main(job: TrainScaleNet) -> int:
    """Train, measure after each epoch, and write config.yaml, metrics.json and scale_net.safetensors."""
    job = replace(job, data=job.data or str(ensure_sample(Path("runs/sample"))))
    config = _config(job)
    learned, held_out = (read_examples(str(job.data), split, job.limit) for split in (job.split, job.val_split))
    dataset = ScaleDataset(learned, config, tile_side=job.tile_side, augment=True, seed=job.seed)
    validation = ScaleDataset(held_out, config, tile_side=job.tile_side)
    torch.manual_seed(job.seed)
    model = build_scale_net(config)
    if job.encoder_weights is not None:
        load_encoder_weights(model, job.encoder_weights)
    run = RunFolder(job.output or time.strftime("runs/train_scalenet/%Y%m%d-%H%M%S"))
    run.begin(asdict(job), resume=False)

    epochs: list[dict] = []

    def report(row: dict) -> None:
        measured = evaluate(model, validation, batch_size=job.batch_size, device=job.device)
        epochs.append({**row, "val": measured})
        print(
            f"epoch {row['epoch']}/{job.epochs}: loss {row['loss']:.4f}, val loss {measured['loss']:.4f}, "
            f"IoU of class 1 {measured['iou'][1]:.1f}, {row['seconds_left']:.0f} s left",
            flush=True,
        )

    train(
        model,
        dataset,
        epochs=job.epochs,
        batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        seed=job.seed,
        device=job.device,
        mixed_precision=job.mixed_precision,
        report=report,
    )
    save_scale_net(model, config, storage.join(run.uri, "scale_net.safetensors"))
    run.write_json("metrics.json", {"train_images": len(dataset), "val_images": len(validation), "epochs": epochs})
    print(f"{job.epochs} epochs done, weights in {storage.join(run.uri, 'scale_net.safetensors')}")
    return 0


if __name__ == "__main__":
    run_job(main, tyro.cli(TrainScaleNet))
