"""The paper's experiment on CIFAR-10: trained at 32 to 44 pixels on a canvas of 64, met at 96."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from scalenet_ray.commands.arguments import parse_arguments
from scalenet_ray.console import run_job
from scalenet_ray.core.bounds import ABOVE_ZERO
from scalenet_ray.experiments.run import CanvasOptions, run_experiment


@dataclass(frozen=True, kw_only=True)
class EvalCifar(CanvasOptions):
    """The paper's experiment on CIFAR-10.

    Attributes:
        data: CIFAR-10's folder as torchvision lays it out (with cifar-10-batches-py in it); fetched there if it is
            missing.
        width: of VGG-11, times the paper's.
    """

    data: str
    width: Annotated[float, ABOVE_ZERO] = 0.25


def main(job: EvalCifar) -> int:
    """Train and score everything; see `run_experiment` for what is written."""
    run_experiment(job, "cifar10", job.data, print, width=job.width)
    return 0


if __name__ == "__main__":
    run_job(main, parse_arguments(EvalCifar))
