"""Run a policy in one process without Ray, for small jobs and notebooks, and as the reference for the Ray engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from operator import getitem
from typing import Any, Protocol

from scalenet_ray.core.detections import Failure, ImageResult, TileResult
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.merge import merge_image
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.recursion import recursive_detect
from scalenet_ray.core.timing import timed
from scalenet_ray.data.image_records import ImageRecord, OpenImage
from scalenet_ray.runs.batch import Stream


class Session(Protocol):
    """An engine that is ready for work: `LocalSession`, or `RaySession` of `scalenet_ray.engine.session`."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function on the engine and return its result."""
        ...

    def hold(self, values: Sequence[Any]) -> Callable[[int], Any]:
        """Keep values where the workers reach them; returns a picklable function: position -> value."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the engine that results do not depend on."""
        ...

    def settle(self, networks: Any, trial: Callable[[Any], Any], log: Callable[[str], None]) -> Any:
        """Choose what the user has left open.

        Args:
            networks: the `NetworkSpec` of the run, on a device or auto.
            trial: tries networks in the process that calls it, `models.network_trial.try_networks`.
            log: takes a line that says what was chosen.

        Returns:
            The networks with their device.
        """
        ...

    def start(
        self, images: Sequence[ImageRecord], policy: Policy, networks: NetworkFactories, open_image: OpenImage
    ) -> Stream:
        """Start to process images."""
        ...


class LocalSession:
    """`Session` of engine `local`: this process, without Ray."""

    @property
    def settings(self) -> dict[str, Any]:
        """Empty: this process has no actors or batches to record."""
        return {}

    def settle(self, networks: Any, trial: Callable[[Any], Any], log: Callable[[str], None]) -> Any:
        """Choose the device alone: this process has no actors or batches."""
        del trial, log
        return networks.on_this_machine()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function."""
        return function(*args)

    def hold(self, values: Sequence[Any]) -> Callable[[int], Any]:
        """Keep values in this process."""
        return partial(getitem, values)

    def start(
        self, images: Sequence[ImageRecord], policy: Policy, networks: NetworkFactories, open_image: OpenImage
    ) -> Stream:
        """Start to process images, one at a time."""
        return LocalStream(images, policy, networks, open_image)


class LocalStream:
    """Stream of image results from `recursive_detect`, one image at a time."""

    def __init__(
        self, images: Sequence[ImageRecord], policy: Policy, networks: NetworkFactories, open_image: OpenImage
    ) -> None:
        self._images = images
        self._policy = policy
        self._networks = networks
        self._open_image = open_image
        self._began: float | None = None

    def __iter__(self) -> Iterator[ImageResult]:
        """Yield the result of each image, in order."""
        policy = self._policy
        detect = self._networks.detect()
        needs_map = policy.needs_predictor
        predict_scale = self._networks.predict_scale() if needs_map and self._networks.predict_scale else None
        for record in self._images:
            self._began = self._began or time.monotonic()
            try:
                with timed("decode"):
                    image = self._open_image(record)
                result = recursive_detect(
                    image,
                    record.image_id,
                    policy,
                    detect=detect,
                    predict_scale=predict_scale,
                    batch_size=self._networks.batch_size,
                )
            except TileError as error:
                failed = TileResult(record.image_id, (), Fraction(1), failure=Failure("read", error.reason))
                result = merge_image([failed], policy.merging)
            yield result

    def commit(self, image_ids: Iterable[int]) -> None:
        """Do nothing: no state is kept per image."""

    def seconds_at_work(self) -> float:
        """Seconds since the first image was opened; 0 before."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    @property
    def queued(self) -> int:
        """0: no tile waits."""
        return 0
