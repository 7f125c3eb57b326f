"""Work that was begun and did not end: what tells a poison image from a process that died by chance."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Attempts", "TileId"]

TileId = tuple[int, tuple[int, ...]]
"""(image id, path of the tile)."""


class Attempts:
    """What each stage has begun and not ended.

    A process that dies cannot say so; but whoever takes over its work begins it again, and finds that it was begun.
    """

    def __init__(self) -> None:
        # Image id -> (stage, path) -> how often the tile was begun by itself.
        self._begun: dict[int, dict[tuple[str, tuple[int, ...]], int]] = {}

    def begin(self, stage: str, tiles: Iterable[TileId]) -> bool:
        """Some tiles are begun together.

        Returns:
            Whether none of them was begun before without an end.
        """
        fresh = True
        for image_id, path in tiles:
            begun = self._begun.setdefault(image_id, {})
            fresh &= (stage, path) not in begun
            begun.setdefault((stage, path), 0)
        return fresh

    def begin_alone(self, stage: str, tile: TileId, most: int) -> int:
        """One tile is begun by itself, unless it was so `most` times.

        Returns:
            How often it was before, without an end.
        """
        begun = self._begun.setdefault(tile[0], {})
        before = begun.get((stage, tile[1]), 0)
        begun[stage, tile[1]] = min(before + 1, most)
        return before

    def end(self, stage: str, tiles: Iterable[TileId]) -> None:
        """The process that began these tiles has lived to tell."""
        for image_id, path in tiles:
            self._begun.get(image_id, {}).pop((stage, path), None)

    def end_together(self, stage: str, tiles: Iterable[TileId]) -> None:
        """As `end`, but what was begun by itself ends by itself."""
        self.end(stage, [tile for tile in tiles if not self._begun.get(tile[0], {}).get((stage, tile[1]))])

    def forget(self, image_id: int) -> None:
        """The image is written."""
        self._begun.pop(image_id, None)
