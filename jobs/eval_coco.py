"""Evaluate policies on a data set in COCO's layout: `scalenet-ray eval` as a script."""

from scalenet_ray.commands.arguments import parse_arguments
from scalenet_ray.commands.evaluate import EvalCoco, main
from scalenet_ray.console import run_job

if __name__ == "__main__":
    run_job(main, parse_arguments(EvalCoco))
