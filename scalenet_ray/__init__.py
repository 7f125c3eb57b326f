"""Recursive Scale Net on Ray: a learned, recursive zoom for any frozen detector.

Importing the package loads neither ray nor torch: name the layer you need
(`scalenet_ray.core`, `scalenet_ray.models`, `scalenet_ray.engine`).
"""

__version__ = "0.1.0"
