"""Fine-tune a detector on a data set in COCO's layout: `scalenet-ray finetune` as a script."""

from scalenet_ray.commands.arguments import parse_arguments
from scalenet_ray.commands.finetune import FinetuneDetector, main
from scalenet_ray.console import run_job

if __name__ == "__main__":
    run_job(main, parse_arguments(FinetuneDetector))
