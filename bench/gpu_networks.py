"""Speed of networks in one process: variants of precision and compilation, and recursion."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench.workloads import ratio, spread
from scalenet_ray.core.errors import OutOfMemoryError, TileError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.inference import OracleScalePredictor
from scalenet_ray.core.policy import Policy, parse_policy
from scalenet_ray.core.scale import ScaleMap
from scalenet_ray.data.coco import CocoDataset, GroundTruth, annotations_uri, read_annotations
from scalenet_ray.data.image_records import OpenImage
from scalenet_ray.models.scale_net import build_scale_net, load_torch_predictor, save_scale_net
from scalenet_ray.models.scale_networks import PRESETS, ScaleNetConfig, ScaleNetPredictor
from scalenet_ray.models.torchvision_builders import build_detector
from scalenet_ray.models.torchvision_detectors import TorchvisionDetector
from scalenet_ray.runs.batch import image_opener

Record = dict[str, Any]
Work = Callable[[], int]
"""Does a piece of work and returns its size, in tiles or images."""

SPLIT = "val2017"
"""The split of photographs."""

REPEAT = 10**9
"""Added to an image's id, any number of times, for another copy of the image."""

_CLASSES = 91
_LONGEST_ERROR = 500
_ROUNDS = 3


@dataclass(frozen=True)
class Sizes:
    """Networks and amounts.

    Attributes:
        detector: the detector that all parts use, of `detector_names()`.
        others: detectors whose speed alone is measured.
        side: longer side of a whole image's tile, in pixels.
        batches: tiles per call; all variants are measured at the first.
        scale_net: configuration of Scale Net.
        images: images of the recursion.
        engine_images: images of the engine, by repetition.
        open_images: images in progress in the engine.
        seconds: least time of a rate.
        engine_seconds: longest time of a rate of the engine.
        epochs: epochs of the training on Ray.
        compiler: settings of `torch.compile` in place of each variant's own.
    """

    detector: str
    others: tuple[str, ...]
    side: int
    batches: tuple[int, ...]
    scale_net: ScaleNetConfig
    images: int
    engine_images: int
    open_images: int
    seconds: float
    engine_seconds: float
    epochs: int
    compiler: Mapping[str, Any] | None = None


FULL = Sizes(
    "fasterrcnn_resnet101_fpn",
    (
        "fasterrcnn_resnet50_fpn_v2",
        "maskrcnn_resnet50_fpn_v2",
        "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
        "ssdlite320_mobilenet_v3_large",
    ),
    side=800,
    batches=(16, 1, 64, 4),
    scale_net=PRESETS["unet-vgg16"],
    images=24,
    engine_images=8000,
    open_images=256,
    seconds=1.0,
    engine_seconds=15.0,
    epochs=4,
)
TOY = Sizes(
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    ("ssdlite320_mobilenet_v3_large",),
    side=96,
    batches=(2, 1),
    scale_net=replace(PRESETS["unet-light"], input_side=64),
    images=2,
    engine_images=40,
    open_images=8,
    seconds=0.0,
    engine_seconds=15.0,
    epochs=2,
    compiler={"backend": "eager"},
)


@dataclass(frozen=True)
class Setup:
    """What all parts measure with.

    Attributes:
        device: torch device.
        sizes: networks and amounts.
        data: a folder in COCO's layout.
        split: its split.
        detector: kind:what, a trained detector; None where there is none.
    """

    device: str
    sizes: Sizes
    data: Path
    split: str = SPLIT
    detector: str | None = None

    @property
    def annotations(self) -> str:
        """Address of the instances file."""
        return annotations_uri(self.data, self.split)

    @property
    def dataset(self) -> CocoDataset:
        """The images and their objects."""
        return read_annotations(self.annotations)

    @property
    def open_image(self) -> OpenImage:
        """Reads an image."""
        return image_opener(str(self.data / self.split), 10**8)

    def policy(self, name: str) -> Policy:
        """A policy with its defaults, at the detector's size."""
        return parse_policy(name, input_side=self.sizes.side, iou_threshold=0.5)

    def truth(self) -> OracleScalePredictor:
        """Scale maps from the ground truth, for images with repeated ids too."""
        objects = GroundTruth(self.annotations)
        return OracleScalePredictor(lambda image_id: objects(image_id % REPEAT))


def compare(setup: Setup, makers: Mapping[str, Callable[[], Work]], unit: str, **fields: Any) -> Iterator[Record]:
    """Speed of each work, its ratio to that of the first that fits, in the same round, and the GPU memory at its peak.

    Each work is made when it is its turn, so that a bench that is cut short has measured those before.
    """
    first: tuple[str, Work] | None = None
    for name, make in makers.items():
        try:
            work = make()
            # Kernels are chosen and compiled in the first call.
            work()
            gigabytes = _gigabytes(setup.device, work)
        except (torch.OutOfMemoryError, OutOfMemoryError):
            yield {**fields, "variant": name, "remark": "out of memory"}
            continue
        except Exception as error:
            # The other variants' figures are wanted all the same.
            yield {**fields, "variant": name, "error": f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]}
            continue
        first = first or (name, work)
        pairs = [[_rate(each, setup.sizes.seconds) for each in (first[1], work)] for _ in range(_ROUNDS)]
        base, rates = zip(*pairs, strict=True)
        figures = {unit: spread(rates), f"over {first[0]}": ratio(rates, base), "gigabytes": gigabytes}
        yield {**fields, "variant": name, **figures}


def _rate(work: Work, seconds: float) -> float:
    done, start = 0, time.perf_counter()
    while not done or time.perf_counter() - start < seconds:
        done += work()
    return done / (time.perf_counter() - start)


def _gigabytes(device: str, work: Work) -> float | None:
    """Gigabytes that torch allocated at the peak of a call, weights included; None where it does not count them."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) / 1e9


@contextmanager
def cuda_products(precision: str) -> Iterator[None]:
    """Compute float32 convolutions and matrix products on CUDA as "ieee" or as "tf32" within the block."""
    cudnn: Any = torch.backends.cudnn
    places: list[Any] = [cudnn.conv, torch.backends.cuda.matmul]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = precision
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


# --- variants ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """How a network computes.

    Attributes:
        precision: of float32 products: "ieee" or "tf32".
        mixed: under bfloat16 autocast.
        channels_last: memory format of the network and its input.
        compiled: settings of `torch.compile`; None to leave it out.
    """

    precision: str = "tf32"
    mixed: bool = False
    channels_last: bool = True
    compiled: Mapping[str, Any] | None = None

    def prepare(self, network: Any, compiler: Mapping[str, Any] | None) -> None:
        """Change a network's memory format and compile it; in place."""
        if not self.channels_last:
            network.to(memory_format=torch.contiguous_format)
            network.register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(),))
        if self.compiled is not None:
            network.compile(**(compiler or self.compiled))


VARIANTS = {
    "tf32": Variant(),
    "float32": Variant("ieee"),
    "bfloat16": Variant(mixed=True),
    "bfloat16, not channels last": Variant(mixed=True, channels_last=False),
    "bfloat16, compiled": Variant(mixed=True, compiled={"dynamic": False}),
    "bfloat16, CUDA graphs": Variant(mixed=True, compiled={"dynamic": False, "mode": "reduce-overhead"}),
}
"""All variants by name."""

MAIN_VARIANTS = ("tf32", "bfloat16")
"""Those that are measured in all conditions."""


def build_torchvision(setup: Setup, name: str, variant: Variant) -> TorchvisionDetector:
    """A detector with random weights; what is compiled is its backbone."""
    # Random boxes score about 1 in 91: none is kept, as of a trained network few are.
    detector = TorchvisionDetector(
        build_detector(name, _CLASSES),
        {1: "object"},
        device=setup.device,
        score_threshold=0.5,
        mixed_precision=variant.mixed,
    )
    variant.prepare(detector.model.backbone, setup.sizes.compiler)
    return detector


def _build_scale_net(setup: Setup, variant: Variant) -> ScaleNetPredictor:
    config = setup.sizes.scale_net
    with TemporaryDirectory() as folder:
        path = Path(folder) / "scale_net.safetensors"
        save_scale_net(build_scale_net(config), config, path)
        predictor: Any = load_torch_predictor(path, setup.device, mixed_precision=variant.mixed)
    variant.prepare(predictor.model, setup.sizes.compiler)
    return predictor


# --- parts ------------------------------------------------------------------------------------------


def _look(network: Callable[[list[np.ndarray]], Any], tiles: list[np.ndarray], precision: str) -> int:
    with cuda_products(precision):
        network(tiles)  # Its answers are in numpy: the device has done all of it.
    return len(tiles)


def measure_networks(setup: Setup) -> Iterator[Record]:
    """Tiles/s of the detector and Scale Net, then at other batch sizes, of other detectors, and compiled.

    Compiling takes a minute each, so what it gains comes last.
    """
    sizes = setup.sizes
    first, *rest = sizes.batches
    both = (sizes.detector, sizes.scale_net.preset)
    compiled = tuple(title for title, variant in VARIANTS.items() if variant.compiled is not None)
    for name in both:
        yield from _network_speed(setup, name, first, tuple(title for title in VARIANTS if title not in compiled))
    for batch in rest:
        for name in both:
            yield from _network_speed(setup, name, batch, MAIN_VARIANTS)
    for name in sizes.others:
        yield from _network_speed(setup, name, first, MAIN_VARIANTS)
    for name in both:
        yield from _network_speed(setup, name, first, ("bfloat16", *compiled))


def _network_speed(setup: Setup, name: str, batch: int, variants: Sequence[str]) -> Iterator[Record]:
    makers = {title: partial(_make_look, setup, name, batch, VARIANTS[title]) for title in variants}
    yield from compare(setup, makers, "tiles/s", network=name, batch=batch)


def _make_look(setup: Setup, name: str, batch: int, variant: Variant) -> Work:
    side, rng = setup.sizes.side, np.random.default_rng(0)
    if name == setup.sizes.scale_net.preset:
        network: Any = _build_scale_net(setup, variant)
    else:
        network = build_torchvision(setup, name, variant)
        side = min(side, network.input_side)
    tiles = [rng.integers(0, 256, (side * 3 // 4, side, 3), np.uint8) for _ in range(batch)]
    return partial(_look, network, tiles, variant.precision)


class _ToldScaleNet:
    """A Scale Net that runs, and answers with the ground truth's map: a trained network's cost and windows."""

    def __init__(self, network: ScaleNetPredictor, truth: OracleScalePredictor) -> None:
        self.input_pixels = network.input_pixels
        self._network, self._truth = network, truth

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        """True maps of the tiles, after a forward pass."""
        self._network(pixels, tiles)
        return self._truth(pixels, tiles)


def build_told_scale_net(setup: Setup, variant: Variant) -> _ToldScaleNet:
    """A Scale Net with random weights that answers with the ground truth."""
    return _ToldScaleNet(_build_scale_net(setup, variant), setup.truth())
