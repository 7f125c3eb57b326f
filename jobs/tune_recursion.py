"""Tune the recursion on a data set in COCO's layout: `scalenet-ray tune` as a script."""

import sys

from scalenet_ray.__main__ import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
