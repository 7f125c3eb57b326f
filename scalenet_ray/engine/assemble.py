"""Tile results -> finished images, each as soon as its last tile is in.

An image carries credit 1, shared out exactly among the tiles that come of it; it is finished when the credits
of its tiles sum to 1. That needs no look-up in the frontier and no shuffle, and is the proof of exactly once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from fractions import Fraction

from scalenet_ray.core.merge import Merging
from scalenet_ray.core.results import ImageResult, TileResult, merge_image

__all__ = ["Assembler"]


class Assembler:
    """Collects tile results by image; a tile that comes twice counts once.

    Args:
        merging: how an image's detections become one list.
    """

    def __init__(self, merging: Merging) -> None:
        self._merging = merging
        self._tiles: defaultdict[int, dict[tuple[int, ...], TileResult]] = defaultdict(dict)
        self._finished: set[int] = set()

    def add(self, results: Iterable[TileResult]) -> list[ImageResult]:
        """Take in tile results, and give the images that they finish.

        Raises:
            RuntimeError: if an image's credits exceed 1: a tile was made twice under two names, which is a bug.
        """
        done = []
        for result in results:
            if result.image_id in self._finished:
                continue
            tiles = self._tiles[result.image_id]
            tiles.setdefault(result.path, result)
            credit = sum((tile.credit for tile in tiles.values()), Fraction(0))
            if credit > 1:
                msg = f"image {result.image_id} has tiles worth {credit} of it, more than 1: {sorted(tiles)}"
                raise RuntimeError(msg)
            if credit == 1:
                self._finished.add(result.image_id)
                done.append(merge_image(list(self._tiles.pop(result.image_id).values()), self._merging))
        return done

    @property
    def unfinished(self) -> list[int]:
        """Ids of images with some of their tiles in, but not all."""
        return sorted(self._tiles)
