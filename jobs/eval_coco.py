"""Evaluate policies on a data set in COCO's layout: `scalenet-ray eval` as a script."""

import sys

from scalenet_ray.__main__ import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
