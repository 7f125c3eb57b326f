"""The paper's experiment on digits: trained at 14 to 18 pixels, met at any size; without --data on a small version."""

from __future__ import annotations

from dataclasses import dataclass

from scalenet_ray.commands.arguments import parse_arguments
from scalenet_ray.console import run_job
from scalenet_ray.experiments.run import CanvasOptions, run_experiment


@dataclass(frozen=True, kw_only=True)
class EvalDigits(CanvasOptions):
    """The paper's experiment on digits; without --data on scikit-learn's, enlarged.

    Attributes:
        data: MNIST's folder as torchvision lays it out (with MNIST/raw in it); fetched there if it is missing.
    """

    data: str | None = None


def main(job: EvalDigits) -> int:
    """Train and score everything; see `run_experiment` for what is written."""
    run_experiment(job, "digits" if job.data is None else "mnist", job.data, print)
    return 0


if __name__ == "__main__":
    run_job(main, parse_arguments(EvalDigits))
