"""Train the embedded sample's tiny detector, which is never shown small objects.

The weights in scalenet_ray/sample/sample_detector.safetensors are those of

    .venv/bin/python jobs/train_tiny_detector.py --mixed-precision --output RUN_FOLDER
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from scalenet_ray.commands.arguments import parse_arguments
from scalenet_ray.console import run_job
from scalenet_ray.core.bounds import ABOVE_ZERO, ONE_OR_MORE
from scalenet_ray.data import storage
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.sample.detector import save_tiny_detector
from scalenet_ray.sample.scenes import SAMPLE_CATEGORIES, ensure_sample
from scalenet_ray.sample.tiny import TinyNetConfig
from scalenet_ray.sample.train_detector import train_tiny_detector
from scalenet_ray.training.examples import read_examples


@dataclass(frozen=True)
class TrainTinyDetector:
    """Train the embedded sample's tiny detector, which is never shown small objects.

    Attributes:
        data: where the embedded sample lies, or is to be written.
        output: the run folder, local, s3://, gs:// or az://; by default a new one under runs/train_tiny_detector.
        epochs: passes over the images.
        batch_size: tiles a step.
        learning_rate: at its highest.
        seed: of the weights, the order and the windows.
        limit: only the first so many images.
        device: where the network is trained, as torch names it.
        mixed_precision: compute in bfloat16 what bears it; twice as fast where the hardware knows it.
    """

    data: str = "runs/sample"
    output: str | None = None
    epochs: Annotated[int, ONE_OR_MORE] = 120
    batch_size: Annotated[int, ONE_OR_MORE] = 8
    learning_rate: Annotated[float, ABOVE_ZERO] = 2e-3
    seed: int = 0
    limit: Annotated[int, ONE_OR_MORE] | None = None
    device: str = "cpu"
    mixed_precision: bool = False


def main(job: TrainTinyDetector) -> int:
    """Train and write config.yaml, metrics.json and detector.safetensors."""
    examples = read_examples(str(ensure_sample(Path(job.data))), "train2017", job.limit)
    config = TinyNetConfig(tuple(SAMPLE_CATEGORIES), tuple(SAMPLE_CATEGORIES.values()))
    run = RunFolder.of_job(job.output, "train_tiny_detector")
    epochs: list[dict] = []

    def report(row: dict) -> None:
        epochs.append(row)
        left = f"{row['seconds_left']:.0f} s left"
        print(f"epoch {row['epoch']}/{job.epochs}: loss {row['loss']:.4f}, {left}", flush=True)

    with run.begin(asdict(job), resume=False):
        model = train_tiny_detector(
            examples,
            config,
            epochs=job.epochs,
            batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            seed=job.seed,
            device=job.device,
            mixed_precision=job.mixed_precision,
            report=report,
        )
        save_tiny_detector(model, config, storage.join(run.uri, "detector.safetensors"))
        run.write_json("metrics.json", {"train_images": len(examples), "epochs": epochs})
    print(f"{job.epochs} epochs done, weights in {storage.join(run.uri, 'detector.safetensors')}")
    return 0


if __name__ == "__main__":
    run_job(main, parse_arguments(TrainTinyDetector))
