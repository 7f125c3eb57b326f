"""Tune the recursion on a data set in COCO's layout: `scalenet-ray tune` as a script."""

from scalenet_ray.commands.arguments import parse_arguments
from scalenet_ray.commands.tune import TuneRecursion, main
from scalenet_ray.console import run_job

if __name__ == "__main__":
    run_job(main, parse_arguments(TuneRecursion))
