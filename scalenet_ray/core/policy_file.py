"""Policies in YAML files: what a user asks for, field by field."""

from __future__ import annotations

from pathlib import Path

import yaml

from scalenet_ray.core.policy import Policy, policy_from_dict
from scalenet_ray.core.storage import read_bytes

__all__ = ["read_policies"]


def read_policies(uri: str | Path) -> list[Policy]:
    """The policies of a file: one, or a list of them; `policy_to_dict` says what a policy looks like.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is no YAML, of another version, or a field is wrong; the message says which.
    """
    try:
        content = yaml.safe_load(read_bytes(uri))
    except yaml.YAMLError as error:
        msg = f"{uri} must be YAML, got something else ({error}): correct it"
        raise ValueError(msg) from error
    entries = content if isinstance(content, list) else [content]
    if not all(isinstance(entry, dict) for entry in entries):
        msg = f"{uri} must hold a policy (name: value lines) or a list of them, got {type(content).__name__}"
        raise ValueError(msg)
    return [policy_from_dict(entry) for entry in entries]
