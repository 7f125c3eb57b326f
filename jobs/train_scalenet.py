"""Train a Scale Net on a data set in COCO's layout: `scalenet-ray train` as a script."""

from scalenet_ray.commands.arguments import parse_arguments
from scalenet_ray.commands.train import TrainScaleNet, main
from scalenet_ray.console import run_job

if __name__ == "__main__":
    run_job(main, parse_arguments(TrainScaleNet))
