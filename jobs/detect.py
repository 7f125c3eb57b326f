"""Detect objects in images without ground truth: `scalenet-ray detect` as a script."""

from scalenet_ray.commands.arguments import parse_arguments
from scalenet_ray.commands.detect import DetectImages, main
from scalenet_ray.console import run_job

if __name__ == "__main__":
    run_job(main, parse_arguments(DetectImages))
