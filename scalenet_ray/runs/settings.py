"""config.yaml of a run folder: written when the run begins, compared with the settings when it is resumed."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from scalenet_ray import __version__
from scalenet_ray.core.errors import UserError
from scalenet_ray.data import storage

CONFIG = "config.yaml"

_VERSIONED = ("torch", "torchvision", "ray", "numpy", "pyarrow", "onnxruntime", "pycocotools")

_SAMPLE_WEIGHTS = re.compile(
    r"(tiny:)?(.*/)?scalenet_ray/(?:weights|sample)/sample_(detector|scale_net)\.(onnx|safetensors)"
)

_MAX_SHOWN = 3


def write_config(run_uri: str, settings: Mapping[str, Any], workers: Mapping[str, Any]) -> None:
    """Write config.yaml: the command, the settings, the workers, the versions and the machine."""
    versions = {}
    for name in _VERSIONED:
        # Extras install some of them.
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    versions |= {"python": platform.python_version(), "scalenet-ray": __version__}
    content = {
        "command": " ".join(sys.argv),
        "begun": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "directory": _working_directory(),
        "settings": dict(settings),
        "workers": dict(workers),
        "versions": versions,
        "machine": f"{platform.node()}, {platform.platform()}, {os.cpu_count()} CPUs",
    }
    storage.write_bytes_atomic(storage.join(run_uri, CONFIG), yaml.safe_dump(content, sort_keys=False).encode())


def read_config(run_uri: str) -> dict[str, Any]:
    """Read config.yaml: "settings", "workers", "command", "versions"; raises `UserError` if it is damaged."""
    uri = storage.join(run_uri, CONFIG)
    try:
        content = yaml.safe_load(storage.read_bytes(uri))
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        msg = f"{uri} must hold the settings of a run, got a damaged file or another tool's: give another --output"
        raise UserError(msg)
    return content


def check_settings(run_uri: str, settings: Mapping[str, Any], workers: Mapping[str, Any]) -> None:
    """Raise `UserError` if a run to resume was begun with other settings, the first few of which it names."""
    config = read_config(run_uri)
    differences = _differences(config["settings"], settings, workers, config.get("directory"))
    if differences:
        msg = f"{run_uri} was begun with other settings ({differences}): use the same, or another --output"
        raise UserError(msg)


def _differences(
    then: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str], directory: str | None
) -> str:
    """The first few settings that differ, e.g. "networks.score_threshold: 0.01 then, 0.05 now"; "" if none does.

    Addresses are equal if they name the same place; relative ones in `then` are below `directory`. Digests of weights
    are compared where both are known. Policies also hold values that follow from other settings: their differences are
    listed only if nothing else differs. Settings in `ignored`, of the networks or at the top level, may differ.
    """
    before, after = dict(_flatten(then)), dict(_flatten(yaml.safe_load(yaml.safe_dump(dict(now)))))
    may_differ = {*ignored, *(f"networks.{name}" for name in ignored)}
    digests = {name for name in (*before, *after) if name.startswith("networks.weights")}
    may_differ |= {name for name in digests if None in (before.get(name), after.get(name))}
    names = [
        name
        for name in dict.fromkeys([*before, *after])
        if name not in may_differ and not _is_same(before.get(name), after.get(name), directory or _working_directory())
    ]
    names = [name for name in names if not name.startswith("policies")] or names
    # If the policies' names differ, differences inside the policies are not listed.
    names = ["policies"] if names[:1] == ["policies"] else names
    texts = [f"{name}: {before.get(name)!r} then, {after.get(name)!r} now" for name in names[:_MAX_SHOWN]]
    return "; ".join([*texts, *([f"and {len(names) - _MAX_SHOWN} more"] if len(names) > _MAX_SHOWN else [])])


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as (dotted path, value); a list of named settings as the list of names and each item by name."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
        yield path, [item["name"] for item in value]
        for item in value:
            yield from _flatten(item, f"{path}.{item['name']}")
    else:
        yield path, value


def _working_directory() -> str:
    """The base of relative addresses; "" if it was removed, as Ray does with that of a submitted job."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def _is_same(then: Any, now: Any, directory: str) -> bool:
    if isinstance(then, str) and isinstance(now, str) and then != now:
        return _normalized(then, directory) == _normalized(now, _working_directory())
    return bool(then == now)


def _normalized(text: str, directory: str) -> str:
    """A text as a normalized address; the sample's networks are equal wherever the package is installed."""
    if text == "sample" or _SAMPLE_WEIGHTS.fullmatch(text):
        return "sample"
    kind, separator, rest = text.partition(":")
    if separator and not rest.startswith("//"):
        # A detector, KIND:ADDRESS.
        return f"{kind}:{_normalized(rest, directory)}"
    if "://" in text and not text.startswith("file://"):
        return text.rstrip("/")
    return os.path.normpath(os.path.join(directory, text.removeprefix("file://")))
