"""Policies in YAML files: what a user asks for, field by field."""

from __future__ import annotations

from pathlib import Path

from scalenet_ray.core.errors import UserError
from scalenet_ray.core.policy import Policy, policy_from_dict
from scalenet_ray.core.yaml_file import read_yaml

__all__ = ["read_policies"]


def read_policies(uri: str | Path) -> list[Policy]:
    """The policies of a file: one, or a list of them; `policy_to_dict` says what a policy looks like.

    Raises:
        FileNotFoundError: if it is not there.
        UserError: if it is no YAML, of another version, or a field is wrong; the message says which.
    """
    content = read_yaml(uri)
    entries = content if isinstance(content, list) else [content]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        got = "nothing" if not content else type(content).__name__
        msg = f"{uri} must hold a policy (name: value lines) or a list of them, got {got}: write one"
        raise UserError(msg)
    policies = []
    for entry in entries:
        try:
            policies.append(policy_from_dict(entry))
        except UserError as error:
            msg = f"{uri}: {error}"
            raise UserError(msg) from error
    return policies
