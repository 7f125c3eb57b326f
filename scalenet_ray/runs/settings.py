"""The settings of a run compared with those that it was begun with: what a refusal to resume says."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import yaml

__all__ = [
    "settings_that_differ",
    "working_directory",
]

_SAMPLE_WEIGHTS = re.compile(r"(tiny:)?(.*/)?scalenet_ray/(?:weights|sample)/sample_(detector|scale_net)\.safetensors")


_SHOWN = 3


def settings_that_differ(
    then: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str], directory: str | None
) -> str:
    """Say which settings differ, the first few of them.

    Addresses are the same if they mean the same place, however they are written. Policies hold what follows from
    other settings too: their differences are said if nothing else differs.

    Args:
        then: what the run was begun with, as config.yaml holds it.
        now: what it is resumed with, plain values.
        free: names of settings that may differ, be they networks' or of no group.
        directory: where the run was begun: relative addresses of then start there. None if it is not known.

    Returns:
        E.g. "networks.score_threshold: 0.01 then, 0.05 now"; "" if none differs.
    """
    before, after = dict(_leaves(then)), dict(_leaves(yaml.safe_load(yaml.safe_dump(dict(now)))))
    may_differ = {*free, *(f"networks.{name}" for name in free)}
    differ = [
        name
        for name in dict.fromkeys([*before, *after])
        if name not in may_differ and not _is_same(before.get(name), after.get(name), directory or working_directory())
    ]
    differ = [name for name in differ if not name.startswith("policies")] or differ
    # Other policies altogether: their names say it.
    differ = ["policies"] if differ[:1] == ["policies"] else differ
    said = [f"{name}: {before.get(name)!r} then, {after.get(name)!r} now" for name in differ[:_SHOWN]]
    return "; ".join([*said, *([f"and {len(differ) - _SHOWN} more"] if len(differ) > _SHOWN else [])])


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted path -> value; a list of named settings as its names, and each one's by its name."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
        yield path, [item["name"] for item in value]
        for item in value:
            yield from _leaves(item, f"{path}.{item['name']}")
    else:
        yield path, value


def working_directory() -> str:
    """Where relative addresses start; "" if it was removed, as Ray does with a submitted job's."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def _is_same(then: Any, now: Any, directory: str) -> bool:
    if isinstance(then, str) and isinstance(now, str) and then != now:
        return _address(then, directory) == _address(now, working_directory())
    return bool(then == now)


def _address(text: str, directory: str) -> str:
    """A text as an address that has one form for one place; the sample's networks are the same wherever they lie."""
    if text == "sample" or _SAMPLE_WEIGHTS.fullmatch(text):
        return "sample"
    kind, separator, what = text.partition(":")
    if separator and not what.startswith("//"):
        # A detector: kind:what.
        return f"{kind}:{_address(what, directory)}"
    if text.startswith("s3://"):
        return text.rstrip("/")
    return os.path.normpath(os.path.join(directory, text.removeprefix("file://")))
