"""Train a Scale Net on a data set in COCO's layout: `scalenet-ray train` as a script."""

import sys

from scalenet_ray.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
