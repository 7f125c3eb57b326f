"""The engine and the training of Scale Net on a GPU: how busy it is, and what feeds it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
import torch

from bench.fakes import Tally
from bench.gpu_networks import (
    REPEAT,
    SPLIT,
    VARIANTS,
    Record,
    Setup,
    Variant,
    Work,
    build_told_scale_net,
    build_torchvision,
    compare,
    cuda_products,
)
from bench.workloads import spread
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.timing import measured
from scalenet_ray.engine.pipeline import ImageStream
from scalenet_ray.engine.session import join_ray
from scalenet_ray.engine.train import train
from scalenet_ray.runs.resources import AdvancedResources, Resources
from scalenet_ray.training.examples import TrainingImages
from scalenet_ray.training.recipe import clip_and_step, forward_backward
from scalenet_ray.training.scale_recipe import ScaleRecipe
from scalenet_ray.training.schedule import Training

_STAGES = ("decode", "cut", "look", "detect")
_BFLOAT16 = VARIANTS["bfloat16"]


@contextmanager
def gpu_figures() -> Iterator[Record]:
    """Utilisation and memory of the first GPU during the block, sampled every 100 ms by nvidia-smi.

    Yields:
        A dict that is filled at the end: "GPU busy, %" and "GPU gigabytes"; {} without nvidia-smi.
    """
    figures: Record = {}
    if shutil.which("nvidia-smi") is None:
        yield figures
        return
    query = ["--id=0", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
    with subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield figures
        finally:
            process.terminate()
            samples = [line.split(",") for line in process.communicate()[0].splitlines() if line.count(",") == 1]
            if samples:
                busy, mebibytes = np.array(samples, float).T
                figures |= {"GPU busy, %": float(busy.mean()), "GPU gigabytes": float(mebibytes.max() * 2**20 / 1e9)}


class _TalliedDetector:
    """A detector whose calls are reported to a `Tally`."""

    def __init__(self, detector: Any, tally: Any) -> None:
        self._detector, self._tally = detector, tally

    def __getattr__(self, name: str) -> Any:
        return getattr(self._detector, name)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        """Detections of the tiles, [h, w, 3] uint8 RGB each."""
        start = time.time()
        found = self._detector(pixels)
        self._tally.add.remote(start, time.time(), len(pixels))
        return found


def _tallied(load: Callable[[], Any], tally: Any) -> Any:
    return _TalliedDetector(load(), tally)


def shared_resources(setup: Setup) -> Resources:
    """Two actors that share the GPU, and a reader for each two CPUs."""
    share = 0.0 if setup.device == "cpu" else 0.5
    batch = setup.sizes.batches[0]
    return Resources(
        detector_actors=1 if setup.device == "cpu" else 2,
        readers=max(1, (os.cpu_count() or 1) // 2),
        gpus_per_scale_actor=share,
        gpus_per_detector_actor=share,
        scale_batch_size=batch,
        detector_batch_size=batch,
        advanced=AdvancedResources(max_open_images=setup.sizes.open_images),
    )


def measure_engine(setup: Setup) -> Iterator[Record]:
    """Images/s of the Ray engine while it is full, what the GPU does then, and what decoding takes of the CPUs."""
    join_ray()
    load = partial(build_torchvision, setup, setup.sizes.detector, _BFLOAT16)
    scale_net = partial(build_told_scale_net, setup, _BFLOAT16)
    # Scale Net's actor and the detector's share the GPU.
    resources = replace(shared_resources(setup), detector_actors=1)
    for name in ("whole", "grid-2", "paper"):
        yield full_engine(setup, setup.policy(name), load, scale_net, resources)


def full_engine(
    setup: Setup,
    policy: Policy,
    load: Callable[[], Any],
    scale_net: Callable[[], Any] | None,
    resources: Resources,
) -> Record:
    """Figures of the Ray engine with a policy while it is full, on the setup's images over and over."""
    images, count = setup.dataset.images, setup.sizes.engine_images
    records = [
        replace(images[i % len(images)], image_id=i // len(images) * REPEAT + images[i % len(images)].image_id)
        for i in range(count)
    ]
    tally: Any = Tally.remote()
    networks = NetworkFactories(partial(_tallied, load, tally), scale_net)
    stream = ImageStream(records, policy, networks, setup.open_image, resources)
    results: Any = iter(stream)
    passes: list[float] = []
    with measured() as busy_seconds:
        # Until it is full, actors start.
        for _ in range(resources.open_images):
            stream.commit([next(results).image_id])
        before, start = busy_seconds.seconds.copy(), time.time()
        with gpu_figures() as gpu:
            for result in results:
                stream.commit([result.image_id])
                passes.append(result.detector_passes)
                # When nothing is left to admit it begins to run dry.
                if time.time() - start > setup.sizes.engine_seconds or len(passes) == count - 2 * resources.open_images:
                    break
            end = time.time()
        spent = busy_seconds.seconds - before
    results.close()
    detectors, tiles, _ = ray.get(tally.between.remote(start, end))
    return {
        "policy": policy.name,
        "images/s": len(passes) / (end - start),
        "passes": float(np.mean(passes)),
        "detectors in a call": detectors,
        "batch fill": tiles / resources.detector_batch_size,
        **gpu,
        **{f"{stage}, ms/image": 1000 * spent[stage] / len(passes) for stage in _STAGES},
        "readers": resources.readers,
    }


def _recipe(setup: Setup) -> ScaleRecipe:
    """The training of Scale Net on the images, a tenth of them held out."""
    return ScaleRecipe(TrainingImages(str(setup.data), SPLIT, SPLIT, 0.1), setup.sizes.scale_net)


def measure_steps(setup: Setup) -> Iterator[Record]:
    """Images/s of training steps of Scale Net on a batch in the device's memory."""
    recipe, batch_size = _recipe(setup), setup.sizes.batches[0]
    rows = [recipe.example(i % recipe.sizes()[0], 0) for i in range(batch_size)]
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])).to(setup.device) for name in rows[0]}
    makers = {title: partial(_make_step, recipe, batch, VARIANTS[title]) for title in ("tf32", "float32", "bfloat16")}
    yield from compare(setup, makers, "images/s", training="steps", batch=batch_size)


def _make_step(recipe: ScaleRecipe, batch: dict[str, torch.Tensor], variant: Variant) -> Work:
    model = recipe.build().to(batch["image"].device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    return partial(_step, recipe, model.train(), optimizer, batch, variant)


def _step(
    recipe: ScaleRecipe,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    variant: Variant,
) -> int:
    with cuda_products(variant.precision):
        loss = forward_backward(model, batch, recipe.loss, mixed_precision=variant.mixed)
        clip_and_step(model, optimizer, loss, 10.0)
        float(loss)  # The device has done all of it.
    return len(batch["image_id"])


def measure_training(setup: Setup) -> Iterator[Record]:
    """Images/s of Scale Net's training on Ray Train, input included: the epochs after the first."""
    settings = Training(
        gpus_per_worker=0.0 if setup.device == "cpu" else 1.0,
        readers=max(1, (os.cpu_count() or 1) // 2),
        epochs=setup.sizes.epochs,
        batch_size=setup.sizes.batches[0],
        mixed_precision=setup.device != "cpu",
    )
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder, gpu_figures() as gpu:
        train(_recipe(setup), settings, folder, rows.append)
    speed = spread([row["images_per_second"] for row in rows[1:]])
    yield {"training": "Ray Train", "batch": settings.batch_size, "images/s": speed, "readers": settings.readers, **gpu}
