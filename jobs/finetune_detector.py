"""Fine-tune a detector on a data set in COCO's layout: `scalenet-ray finetune` as a script."""

import sys

from scalenet_ray.__main__ import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
