"""YAML files of settings, read as plain values: no code in them is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from scalenet_ray.core.errors import UserError
from scalenet_ray.core.storage import read_bytes

__all__ = ["read_yaml"]

_MOST_BYTES = 2**20


def read_yaml(uri: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        FileNotFoundError: if it is not there.
        UserError: if it is no YAML, or over a MiB: settings are not.
    """
    data = read_bytes(uri, max_bytes=_MOST_BYTES)
    try:
        return yaml.safe_load(data)
    # A ValueError: a date that is none. A RecursionError: brackets without end.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        msg = f"{uri} must be YAML, got something else ({error}): correct it"
        raise UserError(msg) from error
