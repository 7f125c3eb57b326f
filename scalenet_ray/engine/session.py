"""Where the work happens: Ray, joined or started, or this very process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import ray
from ray.exceptions import RayTaskError

from scalenet_ray.core.coco import ImageRecord
from scalenet_ray.core.policy import Policy
from scalenet_ray.engine.batch import Stream
from scalenet_ray.engine.local import LocalStream
from scalenet_ray.engine.resources import Resources
from scalenet_ray.engine.sharded import image_stream
from scalenet_ray.engine.stages import Networks, OpenImage

__all__ = ["EngineName", "Session", "join_ray"]

EngineName = Literal["ray", "local"]
"""ray: actors on this machine or a cluster; local: one process, for small jobs and notebooks."""


@ray.remote(num_cpus=0, max_retries=0)
def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def join_ray() -> None:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it); without it start Ray on this machine."""
    if not ray.is_initialized():
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        joins = "RAY_ADDRESS" in os.environ
        ray.init(address=None if joins else "local", logging_level=logging.ERROR)


class Session:
    """An engine, ready for work; with `ray`, as `join_ray` finds it.

    Args:
        engine: which one.
        resources: who works, for `ray`.
    """

    def __init__(self, engine: EngineName, resources: Resources) -> None:
        self._engine = engine
        self._resources = resources
        if engine == "ray":
            join_ray()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function away from the driver, so that what it loads never lies in the driver's memory."""
        if self._engine == "local":
            return function(*args)
        try:
            return ray.get(_call.remote(function, *args))
        except RayTaskError as error:
            # The message is for the person who gave the input, not Ray's traceback of the worker.
            raise error.cause from None

    def start(self, images: Sequence[ImageRecord], policy: Policy, networks: Networks, open_image: OpenImage) -> Stream:
        """Begin to work on images."""
        if self._engine == "local":
            return LocalStream(images, policy, networks, open_image)
        return image_stream(images, policy, networks, open_image, self._resources)
