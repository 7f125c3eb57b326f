"""Frames of videos, read by OpenCV.

The address of a frame is VIDEO/NUMBER.png, counted from 0, as of a folder into which the video was extracted. Videos
must be local files. At a variable frame rate, OpenCV's numbers of frames are times in units of the mean rate.
"""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

import cv2
import numpy as np

from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.data.storage import Address, local_path

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")

_MOST_MISSING = 32
"""Frames at the end that a file's header counts and its stream lacks."""

_MOST_SKIPPED = 64
"""Frames up to which decoding on is cheaper than to seek."""

# The decoder's own words about a damaged file would stand between the lines of the terminal.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

_open = threading.local()
"""The video that a thread read last, and its path: the next frame is often of the same."""


class Frame(NamedTuple):
    """A frame's video, a local path, and its number."""

    video: str
    number: int


def frame_of(uri: Address) -> Frame | None:
    """The frame of an address; None if it is another image's."""
    video, _, name = os.fspath(uri).rpartition("/")
    number, suffix = os.path.splitext(name)
    if suffix != ".png" or not number.isdecimal() or not video.lower().endswith(VIDEO_SUFFIXES):
        return None
    path = local_path(video)
    return Frame(path, int(number)) if path is not None and os.path.isfile(path) else None


def list_frames(uri: str) -> list[str]:
    """Addresses of the frames of a video; raises `UserError` if it is not local, or not one that OpenCV decodes."""
    path = local_path(uri)
    if path is None:
        msg = f"a video must be a local file, got {uri}: copy it, or extract its frames into a folder"
        raise UserError(msg)
    count = int(cv2.VideoCapture(path).get(cv2.CAP_PROP_FRAME_COUNT))
    for last in range(count - 1, max(-1, count - 1 - _MOST_MISSING), -1):
        if _decoded(Frame(path, last)) is not None:
            return [f"{uri}/{number:06d}.png" for number in range(last + 1)]
    msg = f"{uri} must be a video that OpenCV decodes, got one without frames at its end: convert it, e.g. with ffmpeg"
    raise UserError(msg)


def read_frame(frame: Frame, max_pixels: int) -> np.ndarray:
    """Read a frame: [h, w, 3] uint8 RGB; raises `TileError` if it cannot be decoded, or has too many pixels."""
    pixels = _decoded(frame)
    if pixels is None:
        msg = f"frame {frame.number} of {frame.video} cannot be decoded: convert the video, or extract its frames"
        raise TileError(msg)
    height, width = pixels.shape[:2]
    if height * width > max_pixels:
        msg = f"an image may have {max_pixels} pixels, got {height} x {width} = {height * width}: shrink the video"
        raise TileError(msg)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _decoded(frame: Frame) -> np.ndarray | None:
    """[h, w, 3] uint8 BGR; None if it cannot be decoded."""
    # Backwards from the start again: OpenCV cannot seek back in a video of one frame.
    if getattr(_open, "path", None) != frame.video or _open.video.get(cv2.CAP_PROP_POS_FRAMES) > frame.number:
        _open.path, _open.video = frame.video, cv2.VideoCapture(frame.video)
    video: cv2.VideoCapture = _open.video
    skipped = frame.number - max(0, int(video.get(cv2.CAP_PROP_POS_FRAMES)))
    if skipped < _MOST_SKIPPED:
        for _ in range(skipped):
            video.grab()
    else:
        video.set(cv2.CAP_PROP_POS_FRAMES, frame.number)
    if int(video.get(cv2.CAP_PROP_POS_FRAMES)) != frame.number:
        return None
    return video.read()[1]
