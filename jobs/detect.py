"""Detect objects in images without ground truth: `scalenet-ray detect` as a script."""

import sys

from scalenet_ray.__main__ import main

if __name__ == "__main__":
    main(["detect", *sys.argv[1:]])
