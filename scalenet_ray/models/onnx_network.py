"""Sessions of detectors in ONNX: what they take, calls on batches of pixels, and trial calls."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # type: ignore[attr-defined]

from scalenet_ray.core.errors import UserError
from scalenet_ray.models.onnx_graph import free_axes
from scalenet_ray.models.onnx_layouts import Layout, recognise
from scalenet_ray.models.onnx_session import EngineSession, providers_of, session_options
from scalenet_ray.models.padding import PADDING_GREY

HW = tuple[int, int]

_RUN_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_SIZES = "orig_target_sizes"
_SIZE_TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32}

_TRIAL_SIDES = (64, 128, 320)
"""Sides of canvases on which a network of free size is tried. Some select 300 cells, more than the smallest has."""


class OnnxNetwork:
    """A session, with the preprocessing and the axes of its input.

    Args:
        session: the session.
        metadata: metadata of the ONNX file: `mean` and `std`, JSON lists of a number for red, green and blue each, for
            pixels in 0..1, without which the input is not normalised; `channel_order`, RGB or BGR; `padding`, the grey
            level beside a tile, 114 by default.
        bgr_bytes: without `mean` and `std` pixels are in 0..255 and not in 0..1, without `channel_order` they are BGR.

    Attributes:
        batch: fixed batch size; None if it is free. 1 if the input has no batch axis.
        fixed_hw: fixed (height, width); None if they are free.
        batched: False if the input has no batch axis.
        padding: grey level, 0 to 255, of a canvas beside its tile.

    Raises:
        UserError: if the input is not an image's, or the metadata is invalid.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, metadata: Mapping[str, str], *, bgr_bytes: bool = False
    ) -> None:
        self.session: onnxruntime.InferenceSession | EngineSession = session
        self.bgr_bytes = bgr_bytes
        self._metadata = metadata
        image, *others = session.get_inputs()
        shape = image.shape
        batch, channels, *sides = shape if len(shape) == 4 else [1, *shape]
        fixed = [side for side in sides if isinstance(side, int)]
        if (
            len(sides) != 2
            or channels != 3
            or len(fixed) == 1
            or image.type not in _FLOATS
            or [each.name for each in others] not in ([], [_SIZES])
        ):
            got = ", ".join(f"{each.name} {each.shape} of {each.type}" for each in (image, *others))
            msg = (
                "the input must be [batch, 3, height, width] or [3, height, width] of float or float16, height and "
                f"width both fixed or both free, and at most {_SIZES} besides, got {got}"
            )
            raise UserError(msg)
        self._image, self._dtype, self._sizes = image.name, _FLOATS[image.type], others
        self.batched = len(shape) == 4
        self.batch = batch if isinstance(batch, int) else None
        self.fixed_hw = (fixed[0], fixed[1]) if fixed else None
        self._names = [output.name for output in session.get_outputs()]
        self._normalisation = None
        if "mean" in metadata or "std" in metadata:
            self._normalisation = _three_numbers(metadata, "mean", 0), _three_numbers(metadata, "std", 1)
        self._order = metadata.get("channel_order")
        if self._order not in (None, "RGB", "BGR"):
            msg = f"metadata 'channel_order' must be RGB or BGR, got {self._order[:80]!r}"
            raise UserError(msg)
        grey = metadata.get("padding", str(PADDING_GREY))
        if not re.fullmatch(r"\d{1,3}", grey) or int(grey) > 255:
            msg = f"metadata 'padding' must be a grey level from 0 to 255, got {grey[:80]!r}"
            raise UserError(msg)
        self.padding = int(grey)

    def on(self, session: onnxruntime.InferenceSession) -> OnnxNetwork:
        """The same network in another session."""
        return OnnxNetwork(session, self._metadata, bgr_bytes=self.bgr_bytes)

    def __call__(self, pixels: np.ndarray, *, quiet: bool = False) -> list[np.ndarray]:
        """All outputs for [B, H, W, 3] uint8 RGB, without logging errors if `quiet`.

        A batch smaller than the fixed one is filled up with grey.
        """
        count, height, width = pixels.shape[:3]
        if self.batch is not None and count < self.batch:
            blank = np.full((self.batch - count, height, width, 3), PADDING_GREY, np.uint8)
            pixels = np.concatenate([pixels, blank])
        images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
        if self._normalisation is not None:
            mean, deviation = self._normalisation
            images = (images / 255 - mean) / deviation
        elif not self.bgr_bytes:
            images /= 255
        if (self._order or ("BGR" if self.bgr_bytes else "RGB")) == "BGR":
            images = np.ascontiguousarray(images[:, ::-1])
        images = images.astype(self._dtype, copy=False)
        feed: dict[str, Any] = {self._image: images if self.batched else images[0]}
        for sizes in self._sizes:
            feed[sizes.name] = np.full((len(images), 2), (width, height), _SIZE_TYPES.get(sizes.type, np.int64))
        options = onnxruntime.RunOptions()
        if quiet:
            options.log_severity_level = 4
        outputs = [np.asarray(output) for output in self.session.run(None, feed, options)]
        return [output[:count] for output in outputs] if count < len(pixels) else outputs

    def recognised(self, canvas: HW) -> Layout:
        """The layout of the outputs, by what they are for a canvas of noise; raises as `layout` does."""
        outputs = self(noise(canvas), quiet=True)
        if not all(np.isfinite(output).all() for output in outputs):
            msg = "a detector's outputs must be finite, got NaN or infinity for noise: check its weights and precision"
            raise UserError(msg)
        return recognise(self._names, outputs, canvas)

    def takes(self, canvas: HW) -> bool:
        """True if the network runs on a canvas of (height, width)."""
        try:
            self(noise(canvas), quiet=True)
        except _RUN_ERRORS:
            return False
        return True

    @functools.cached_property
    def trial_canvases(self) -> tuple[list[HW], int]:
        """The canvases on which the layout is recognised, and the stride that their sides are multiples of.

        That is the fixed size, with stride 1, or else two sizes, of which the first is the smallest that the network
        takes.

        Raises:
            UserError: if it takes none of the sizes tried.
        """
        if self.fixed_hw is not None:
            return [self.fixed_hw], 1
        for side in _TRIAL_SIDES:
            if self.takes((side, 2 * side)):
                stride = 32 if self.takes((side + 32, 2 * side + 32)) else 64
                return [(side, 2 * side), (side + stride, 2 * side + stride)], stride
        tried = ", ".join(f"{side} x {2 * side}" for side in _TRIAL_SIDES)
        msg = (
            f"a network of free height and width must take canvases of {tried} or the like, it fails on each: export "
            "it with a fixed size, or make all of it dynamic"
        )
        raise UserError(msg)

    def layout(self) -> Layout:
        """The layout of the outputs on the `trial_canvases`.

        Raises:
            UserError: if it is none of the known ones or not the same on all canvases, or values are not finite.
        """
        canvases, _ = self.trial_canvases
        try:
            first, *others = (self.recognised(canvas) for canvas in canvases)
        except _RUN_ERRORS as error:
            msg = f"the network must run on canvases of {canvases}, it fails: {error}"
            raise UserError(msg) from error
        if any(other != first for other in others):
            msg = (
                f"a network of free height and width must have the outputs of one kind on all canvases, got those of "
                f"{first.family} and {others[0].family} for {canvases}: export it with a fixed size"
            )
            raise UserError(msg)
        return first


def _three_numbers(metadata: Mapping[str, str], key: str, default: int) -> np.ndarray:
    """[3, 1, 1] float32 from the metadata."""
    text = metadata.get(key, str([default] * 3))
    try:
        numbers = np.array(json.loads(text), np.float32).reshape(3, 1, 1)
    except (ValueError, TypeError):
        numbers = np.full((3, 1, 1), np.nan, np.float32)
    if not np.isfinite(numbers).all() or (key == "std" and numbers.min() <= 0):
        msg = f"metadata {key!r} must be a JSON list of a number for red, green and blue each, got {text[:80]!r}"
        raise UserError(msg)
    return numbers


def noise(canvas: HW, seed: int = 0) -> np.ndarray:
    """[1, H, W, 3] uint8 of random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (1, *canvas, 3), dtype=np.uint8)


def free_network(network: OnnxNetwork, data: bytes, layout: Layout, device: str) -> tuple[OnnxNetwork, bytes]:
    """Make batch and size of a network dynamic, or the batch alone, as far as it gives the same outputs.

    They are the same if two canvases of noise have the outputs together that each had alone. The size is freed only
    where rows belong to cells, and boxes follow them at other sizes too.

    Args:
        network: the network.
        data: content of its ONNX file.
        layout: that of its outputs.
        device: as for `providers_of`.

    Returns:
        The network and the content of its file, with free axes if that is possible.
    """
    if not (network.batched and layout.batched):
        return network, data
    choices = [True] if network.fixed_hw is not None and layout.on_cells else []
    choices += [False] if network.batch is not None else []
    for sizes in choices:
        try:
            content = free_axes(data, sizes=sizes)
            options = session_options()
            options.log_severity_level = 4  # No messages about graphs that do not fit together.
            freed = network.on(onnxruntime.InferenceSession(content, options, providers=providers_of(device)))
            if (not sizes or freed.layout() == layout) and _is_same(network, freed):
                return freed, content
        except (*_RUN_ERRORS, UserError):
            continue
    return network, data


def _is_same(network: OnnxNetwork, freed: OnnxNetwork) -> bool:
    """True if two canvases of noise have the outputs together in one network that each has alone in the other."""
    (canvas, *_), _ = network.trial_canvases
    views = [noise(canvas, seed) for seed in (1, 2)]
    alone = [network(view, quiet=True) for view in views]
    together = freed(np.concatenate(views), quiet=True)
    pairs = zip(together, (np.concatenate(parts) for parts in zip(*alone, strict=True)), strict=True)
    return all(
        one.shape == other.shape and np.allclose(one, other, rtol=close, atol=close)
        for one, other in pairs
        for close in (1e-2 if one.dtype == np.float16 else 1e-4,)
    )
