"""A user's own detector by name, `module:NAME` or `module:NAME@ARGUMENT`: import, and call with what it takes."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from scalenet_ray.core.errors import UserError

_OWN = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)(?:@(.+))?", re.DOTALL)


def names_own(spec: str) -> bool:
    """True if a detector's name has the form `module:NAME` or `module:NAME@ARGUMENT`."""
    return _OWN.fullmatch(spec) is not None


def load_own(spec: str, settings: Mapping[str, Any]) -> Any:
    """Import a user's class, function or object, also from the current directory.

    A class or a function is called: with ARGUMENT as its first argument that is none of the settings, and with those
    settings that it takes by name. A setting of None is left out where it has a default. An object is used as it is.

    Args:
        spec: `module:NAME` or `module:NAME@ARGUMENT`.
        settings: device, score_threshold, iou_threshold and mixed_precision.

    Raises:
        ModuleNotFoundError: if there is no such module.
        UserError: if the module lacks the name, does not take the argument or needs others, or raises an exception.
    """
    found = _OWN.fullmatch(spec)
    assert found is not None
    module_name, name, argument = found.groups()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with quoting(spec):
        module = importlib.import_module(module_name)
    if not hasattr(module, name):
        msg = f"module {module_name} must have a class {name!r} for detector {spec!r}, got none of that name"
        raise UserError(msg)
    kind = getattr(module, name)
    if not isinstance(kind, type) and not inspect.isroutine(kind):
        if argument is not None:
            msg = f"detector {spec!r} must name a class or a function to take {argument!r}, got an object: leave it out"
            raise UserError(msg)
        return kind
    arguments = _arguments(kind, argument, settings, spec)
    with quoting(spec):
        return kind(**arguments)


def _arguments(kind: Any, argument: str | None, settings: Mapping[str, Any], spec: str) -> dict[str, Any]:
    """The arguments by name that a class or a function is called with."""
    try:
        signature = inspect.signature(kind)
    except ValueError:
        # Classes in C may have no signature.
        signature = inspect.Signature()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {name: each for name, each in signature.parameters.items() if each.kind in by_name}
    given = {
        name: value
        for name, value in settings.items()
        if name in parameters and (value is not None or parameters[name].default is inspect.Parameter.empty)
    }
    if settings.get("mixed_precision") and "mixed_precision" not in given:
        msg = f"detector {spec!r} must take an argument mixed_precision for it, got none: leave mixed precision out"
        raise UserError(msg)
    first = next((name for name in parameters if name not in settings), None)
    if argument is not None and first is None:
        msg = f"detector {spec!r} must take an argument for {argument!r}, got none but its settings: leave it out"
        raise UserError(msg)
    if argument is not None:
        given[str(first)] = argument
    try:
        signature.bind(**given)
    except TypeError as error:
        msg = (
            f"detector {spec!r} must name a class or a function that is called with the ARGUMENT of "
            f"module:NAME@ARGUMENT and with {', '.join(settings)} by name, as far as it takes them, got one with "
            f"{error}: give its other arguments defaults, or, if it is to detect itself, write a class around it"
        )
        raise UserError(msg) from None
    return given


@contextmanager
def quoting(spec: str) -> Iterator[None]:
    """Translate exceptions of a user's or a package's code in the block into a UserError.

    Raises:
        UserError: with the detector's name and the original error. UserErrors of the block, and the
            ModuleNotFoundError of the detector's own module, are propagated.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        module_name = spec.partition(":")[0]
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        frame = next(frame for frame in reversed(frames) if not frame.filename.startswith("<frozen importlib"))
        msg = (
            f"detector {spec!r} could not be made, it raised {type(error).__name__}: {error} "
            f"({frame.filename}, line {frame.lineno})"
        )
        raise UserError(msg) from error
