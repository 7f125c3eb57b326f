"""Policies as plain values, for YAML and JSON; changes of single fields; checks of the policies of a run."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from scalenet_ray.core.errors import UserError
from scalenet_ray.core.merge import Merging
from scalenet_ray.core.policy import Policy, Recursion, parse_policy
from scalenet_ray.core.regions import Regions
from scalenet_ray.core.scale import ScaleRange

POLICY_VERSION = 1
"""Written into every policy file; a file of another version is refused."""

NamedPolicy = Callable[[str], Policy]
"""Makes a policy of its name, as `parse_policy` does, with the input side and thresholds of a detector."""

_OF_DETECTOR = {"input_side": None, "merging": {"iou_threshold", "score_threshold"}, "regions": {"first_look"}}
"""Fields, or fields of parts, that follow from the detector unless they are given."""

_ENDS = {"low": 0, "high": 1}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def near_names(name: str, known: list[str]) -> str:
    """The known names that resemble a wrong one, for a message: " (near: price)", or nothing."""
    near = get_close_matches(name, known, 3)
    return f" (near: {', '.join(near)})" if near else ""


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """Policy as plain values with a version, for YAML or JSON; the inverse of `policy_from_dict`."""
    plain = _plain(dataclasses.asdict(policy))
    for name in ("planner", "regions"):
        if plain[name] is None:
            del plain[name]
    return {"version": POLICY_VERSION, **plain}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _typed(value: Any, kind: Any, where: str) -> Any:
    """A value of a file, checked and converted to the type of its field."""
    if get_origin(kind) is UnionType:
        return None if value is None else _typed(value, get_args(kind)[0], where)
    if kind in (Recursion, Merging, Regions):
        return _build(kind, value, where)
    if kind is ScaleRange:
        return ScaleRange(*_typed(value, tuple[float, float], where))
    if get_origin(kind) is tuple:
        _require(isinstance(value, list | tuple), f"{where} must be a list, got {value!r}")
        kinds = get_args(kind)
        if kinds[-1] is ...:
            kinds = kinds[:1] * len(value)
        _require(len(value) == len(kinds), f"{where} must be a list of {len(kinds)}, got {list(value)}")
        pairs = zip(value, kinds, strict=True)
        return tuple(_typed(item, one, f"{where}[{i}]") for i, (item, one) in enumerate(pairs))
    plain = str if get_origin(kind) is Literal else kind
    # In Python a bool is an int; in a file it is not.
    fits = isinstance(value, int | float if plain is float else plain) and isinstance(value, bool) == (plain is bool)
    _require(fits, f"{where} must be {_IN_WORDS[plain]}, got {value!r}")
    return plain(value)


def _build(cls: type, values: Any, where: str) -> Any:
    kinds = {field.name: get_type_hints(cls)[field.name] for field in dataclasses.fields(cls)}
    _require(isinstance(values, dict), f"{where} must be a mapping of names to values, got {type(values).__name__}")
    for key in values:
        near = near_names(str(key), list(kinds))
        _require(key in kinds, f"{where} has no field {key!r}{near}: it knows {', '.join(sorted(kinds))}")
    places = {key: key if cls is Policy else f"{where}.{key}" for key in values}
    return cls(**{key: _typed(value, kinds[key], places[key]) for key, value in values.items()})


def policy_from_dict(values: dict[str, Any], named: NamedPolicy | None = None) -> Policy:
    """Policy from plain values, as `policy_to_dict` or `describe_policy` return them.

    `base` names a policy whose values the absent fields take; without it they take the defaults of the classes. In
    both cases the input side and the thresholds of merging are the detector's, if it is known.

    Args:
        values: the values.
        named: makes the policies of a detector by name; None if it is not known: then `input_side` must be given.

    Raises:
        UserError: if the version is another one, or a name or a value is wrong; it says which.
    """
    _require(isinstance(values, dict), f"a policy file must map names to values, got {type(values).__name__}")
    rest = dict(values)
    version = rest.pop("version", None)
    _require(
        type(version) is int and version == POLICY_VERSION,
        f"a policy file must say version: {POLICY_VERSION}, got {version!r}: add it, or write the file anew",
    )
    base = rest.pop("base", None)
    wanted = ["name", "kind" if base is None else "base", *(["input_side"] if named is None else [])]
    missing = [name for name in wanted if name not in values]
    _require(not missing, f"a policy file must give {', '.join(missing)}")
    if named is None and base is None:
        return _build(Policy, rest, "policy")
    _require(base is None or isinstance(base, str), f"base must be text, the name of a policy, got {base!r}")
    if named is None:
        side = _typed(rest["input_side"], int, "input_side")
        named = partial(parse_policy, input_side=side, iou_threshold=Merging.iou_threshold)
    start = policy_to_dict(named(base or "whole"))
    del start["version"]
    if base is None:
        start = {"input_side": start["input_side"], "merging": start["merging"]}
    return _build(Policy, _merged(start, rest), "policy")


def _merged(start: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Values over those of `start`, in parts of a policy field by field."""
    return start | {
        key: start[key] | value if isinstance(value, dict) and isinstance(start.get(key), dict) else value
        for key, value in values.items()
    }


def describe_policy(
    base: str, policy: Policy, *, input_side: int | None = None, iou_threshold: float | None = None
) -> dict[str, Any]:
    """The content of a file that describes a named policy: the fields in use, without what follows from the detector.

    Args:
        base: the policy's name.
        policy: the policy.
        input_side: to be written too, in pixels; None to leave it to the detector.
        iou_threshold: to be written too; None to leave it to the detector.
    """
    plain = policy_to_dict(policy)
    fields: dict[str, Any] = {"version": POLICY_VERSION, "name": policy.name, "base": base}
    if input_side is not None:
        fields["input_side"] = policy.input_side
    for name in sorted(policy.fields_in_use):
        left_out = _OF_DETECTOR.get(name, set())
        if left_out is not None:
            value = plain[name]
            fields[name] = {k: v for k, v in value.items() if k not in left_out} if isinstance(value, dict) else value
    if iou_threshold is not None:
        fields["merging"]["iou_threshold"] = iou_threshold
    return fields


def changed_policy(policy: Policy, name: str, values: Mapping[str, Any]) -> Policy:
    """Return a copy of a policy with another name and other values.

    Args:
        policy: the policy.
        name: name of the copy.
        values: new values by path, e.g. "recursion.window" or "recursion.scale_range.high"; lists may be JSON text.

    Raises:
        UserError: if a value is out of range, or two are incompatible.
    """
    plain = copy.deepcopy(policy_to_dict(policy)) | {"name": name}
    for path, given in values.items():
        value = json.loads(given) if isinstance(given, str) and given.startswith("[") else given
        *parents, last = path.split(".")
        holder: Any = plain
        for parent in parents:
            if parent not in holder:
                msg = f"{path} can't be changed in policy {policy.name}, which has no {parent}: start from regions"
                raise UserError(msg)
            holder = holder[parent]
        if isinstance(holder, list):
            holder[_ENDS[last]] = value
        else:
            holder[last] = value
    return policy_from_dict(plain)


def check_names(policies: Sequence[Policy]) -> list[Policy]:
    """The policies, if one run may work through them: their names differ and are fit for file names.

    Raises:
        UserError: if there is none, two have one name, or a name has an odd character.
    """
    names = [policy.name for policy in policies]
    _require(bool(names), "name at least one policy, e.g. --policies whole scalenet")
    twice = sorted({name for name in names if names.count(name) > 1})
    _require(not twice, f"each policy of a run needs a name of its own, got twice {', '.join(twice)}")
    for name in names:
        plain = re.fullmatch(r"[A-Za-z0-9@._+-]+", name)
        _require(bool(plain), f"a policy's name may have letters, digits and @ . _ + -, got {name!r}: it names files")
    return list(policies)


def check_smallest_object(smallest_object: float | None, policies: Sequence[Policy]) -> None:
    """Refuse a smallest object where no policy has regions, which it is for.

    Raises:
        UserError: if it is given, and no policy has regions.
    """
    names = ", ".join(policy.name for policy in policies)
    has_use = smallest_object is None or any(policy.regions is not None for policy in policies)
    _require(has_use, f"a smallest object is for regions, got it with {names}: leave it out, or use policy regions")
