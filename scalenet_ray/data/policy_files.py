"""YAML files of policies and search spaces."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml

from scalenet_ray.core.errors import UserError
from scalenet_ray.core.merge import Merging
from scalenet_ray.core.policy import Policy, Recursion
from scalenet_ray.core.policy_form import NamedPolicy, changed_policy, near_names, policy_from_dict, policy_to_dict
from scalenet_ray.core.regions import Regions
from scalenet_ray.data.storage import read_bytes

SPACE_VERSION = 1
"""Version of the search space format; files of other versions are refused."""

_ENDS = {"low": 0, "high": 1}
_COMBINED_FIELDS = ("recursion.scale_range", "recursion.small_classes", "recursion.large_classes")
_PARTS: dict[str, Any] = {"recursion": Recursion, "merging": Merging, "regions": Regions}
_MAX_BYTES = 2**20


def read_policies(uri: str | Path, named: NamedPolicy | None = None) -> list[Policy]:
    """Read a file of one policy or a list of policies.

    Args:
        uri: the file; a policy in it is as `policy_from_dict` takes it.
        named: makes the policies of a detector by name, for the fields that the file leaves out; None if there is no
            detector: then the file must give the input side.

    Raises:
        FileNotFoundError: if it does not exist.
        UserError: if it is not YAML, of another version, or a field is invalid.
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
            policies.append(policy_from_dict(entry, named))
        except UserError as error:
            msg = f"{uri}: {error}"
            raise UserError(msg) from error
    return policies


class Range(NamedTuple):
    """Numbers from `low` to `high`, inclusive; log-uniform if `log`, integers if `whole`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


class Choice(NamedTuple):
    """A choice among values; lists are JSON text, since search libraries take only scalar values."""

    options: tuple[str | int | float | bool | None, ...]


@dataclass(frozen=True)
class SearchSpace:
    """Search space of a sweep: names of its starting policies, and path of a field, "recursion.window" -> values."""

    policies: tuple[str, ...]
    fields: Mapping[str, Range | Choice]


def read_space(uri: str | Path) -> SearchSpace:
    """Read a search space from a YAML file.

    ```yaml
    version: 1
    policies: [regions]
    search:
      regions.target: {of: [32, 48, 64]}
      regions.price: {from: 0.1, to: 10.0, log: true}
      regions.max_depth: {from: 1, to: 2}
      merging.method: {of: [consensus, nms]}
    ```

    Raises:
        FileNotFoundError: if it does not exist.
        UserError: if it is not YAML, of another version, names an unknown field, or a range is empty.
    """
    content = read_yaml(uri)
    if not isinstance(content, dict) or content.get("version") != SPACE_VERSION:
        got = content.get("version") if isinstance(content, dict) else type(content).__name__
        got = "nothing" if content is None else got
        msg = f"{uri} must be a search space with version: {SPACE_VERSION}, got {got!r}: write it anew for this release"
        raise UserError(msg)
    unknown = sorted(set(content) - {"version", "policies", "search"})
    if unknown:
        msg = f"{uri} has {', '.join(unknown)}, which no search space has: it may have version, policies and search"
        raise UserError(msg)
    policies, search = content.get("policies"), content.get("search")
    if not isinstance(policies, list) or not policies or not all(isinstance(name, str) for name in policies):
        msg = f"{uri} must list the policies to start from, e.g. policies: [regions], got {policies!r}"
        raise UserError(msg)
    if not isinstance(search, dict) or not search:
        wanted = "what may change, e.g. regions.price: {from: 0.1, to: 10}"
        msg = f"{uri} must say under search {wanted}, got {search!r}"
        raise UserError(msg)
    return SearchSpace(tuple(policies), {path: _field(str(path), value, uri) for path, value in search.items()})


def _field(path: str, value: Any, uri: str | Path) -> Range | Choice:
    kind = _field_type(path, uri)
    where = f"{path} in {uri}"
    if isinstance(value, dict) and set(value) == {"of"} and isinstance(value["of"], list) and value["of"]:
        return Choice(tuple(json.dumps(option) if isinstance(option, list) else option for option in value["of"]))
    ends = value if isinstance(value, dict) else {}
    if kind not in (int, float) or not {"from", "to"} <= set(ends) <= {"from", "to", "log"}:
        ranges = "{from: LOW, to: HIGH} or " if kind in (int, float) else ""
        msg = f"{where} must be {ranges}{{of: [VALUE, ...]}}, got {value!r}"
        raise UserError(msg)
    low, high, log = ends["from"], ends["to"], ends.get("log", False)
    if not isinstance(log, bool):
        msg = f"log of {where} must be true or false, got {log!r}: correct it"
        raise UserError(msg)
    numbers = all(
        isinstance(end, kind if kind is int else int | float) and not isinstance(end, bool) and abs(end) < math.inf
        for end in (low, high)
    )
    if not numbers or not low < high or (log and low <= 0):
        wanted = f"from one {'whole number' if kind is int else 'number'} to a higher one, above 0 if log"
        msg = f"{where} must go {wanted}, got {value!r}: the range is empty"
        raise UserError(msg)
    return Range(low, high, bool(log), kind is int)


def _field_types() -> dict[str, Any]:
    """Path of each field of a policy that may be changed -> its type."""
    fixed = ("name", "kind", "input_side", "recursion", "merging", "regions", "seed")
    types = {f"{part}.{name}": kind for part, of in _PARTS.items() for name, kind in get_type_hints(of).items()}
    types |= {name: kind for name, kind in get_type_hints(Policy).items() if name not in fixed}
    types |= {f"recursion.scale_range.{end}": float for end in _ENDS}
    return {path: float if kind == float | None else kind for path, kind in types.items()}


def _field_type(path: str, uri: str | Path) -> Any:
    """Return the type of a policy's field."""
    types = _field_types()
    if path not in types:
        known = [known for known in types if known.count(".") < 2]
        msg = f"{uri} would change {path}, which no policy has{near_names(path, known)}: it may be {', '.join(known)}"
        raise UserError(msg)
    return types[path]


def check_values(space: SearchSpace, policies: Sequence[Policy]) -> None:
    """Check that each value of a search space is valid in each of its policies; raises `UserError`.

    Each option, and both ends of each range, is tried on its own. Fields that are only valid in combination (the ends
    of the scale range, the classes) are checked by the trials.
    """
    for path, field in space.fields.items():
        if path.startswith(_COMBINED_FIELDS):
            continue
        for value in field.options if isinstance(field, Choice) else (field.low, field.high):
            for policy in policies:
                try:
                    changed_policy(policy, "trial", {path: value})
                except UserError as error:
                    msg = f"{path} of the search space can't be {value!r} in policy {policy.name}: {error}"
                    raise UserError(msg) from error


def start_values(policy: Policy, space: SearchSpace) -> dict[str, Any] | None:
    """Return a policy's own values of the fields of a space, by path; None if one is outside the space."""
    values = {}
    for path, field in space.fields.items():
        holder: Any = policy_to_dict(policy)
        for part in path.split("."):
            if isinstance(holder, dict) and part not in holder:
                return None
            holder = holder[_ENDS[part]] if isinstance(holder, list) else holder[part]
        value: Any = json.dumps(holder) if isinstance(holder, list) else holder
        within = value in field.options if isinstance(field, Choice) else field.low <= value <= field.high
        if not within:
            return None
        values[path] = value
    return values


def set_fields(policies: Sequence[Policy], settings: Sequence[str]) -> list[Policy]:
    """Set fields of the policies that use them; they keep their names.

    Settings are PATH=VALUE, e.g. recursion.price=0.5 or regions.budget=none, with a value as in YAML.

    Raises:
        UserError: if no policy uses a field, there is none of a name, or a value is wrong.
    """
    policies = list(policies)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            msg = f"--set must be FIELD=VALUE, e.g. recursion.price=0.5, got {setting!r}"
            raise UserError(msg)
        _field_type(path, "--set")
        users = [i for i, policy in enumerate(policies) if path.split(".")[0] in policy.fields_in_use]
        if not users:
            names = ", ".join(policy.name for policy in policies)
            msg = f"--set {setting} is of no use to {names}: leave it out, or name a policy that has this field"
            raise UserError(msg)
        for i in users:
            try:
                policies[i] = changed_policy(policies[i], policies[i].name, {path: _value(text)})
            except UserError as error:
                msg = f"--set {setting}: {error}"
                raise UserError(msg) from error
    return policies


def _value(text: str) -> Any:
    """A value as in YAML; 1e-3 is a number too, and none is null."""
    try:
        value = yaml.safe_load(text)
        return (None if value.lower() == "none" else float(value)) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        msg = f"a value must be written as in YAML, got {text!r}: correct it"
        raise UserError(msg) from error
    except ValueError:
        return text


def read_yaml(uri: str | Path) -> Any:
    """Read a YAML file; raises `UserError` if it is not YAML, or larger than 1 MiB."""
    data = read_bytes(uri, max_bytes=_MAX_BYTES)
    try:
        return yaml.safe_load(data)
    # ValueError: an invalid date. RecursionError: deeply nested brackets.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        msg = f"{uri} must be YAML, got something else ({error}): correct it"
        raise UserError(msg) from error
