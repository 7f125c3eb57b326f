"""A command line -> a job, for all jobs: its flags are the fields of a dataclass, and each is checked."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from scalenet_ray.console import complain
from scalenet_ray.core.bounds import ANY_NUMBER, Bounds
from scalenet_ray.core.errors import UserError

Job = TypeVar("Job")

Spec = PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None

_NONE = "none"
_NUMBERS: dict[type, str] = {int: "a whole number", float: "a number"}


def parse_arguments(
    kind: Callable[..., Job],
    arguments: Sequence[str] | None = None,
    *,
    program: str | None = None,
) -> Job:
    """The job that a command line asks for; ends the process with status 2 if it can't be one.

    `none` in any case stands for None wherever a number may be that; numbers are held to the `Bounds` of their fields,
    and no text may be empty: an unset variable of the shell must not pass for a flag that was left out.

    Args:
        kind: the job's dataclass, or a union of them: then the first word says which.
        arguments: the words of the command line; those of this process by default.
        program: its name in the help; the script's by default.
    """
    registry = ConstructorRegistry()
    registry.primitive_rule(_number)
    registry.primitive_rule(_or_none)
    job = tyro.cli(kind, args=arguments, prog=program, registry=registry)
    try:
        check_arguments(job)
    except UserError as error:
        sys.exit(complain(f"error: {error}", 2))
    return job


def check_arguments(job: Any) -> None:
    """Check the text and the numbers of a job, and of the dataclasses in it.

    Raises:
        UserError: if a text is empty or a number is NaN, infinite or out of its bounds; the message names the flag.
    """
    hints = get_type_hints(type(job), include_extras=True)
    for field in dataclasses.fields(job):
        value, hint = getattr(job, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            check_arguments(value)
            continue
        flag = field.name.upper() if tyro.conf.Positional in _metadata(hint) else f"--{field.name.replace('_', '-')}"
        bounds = next((item for item in _metadata(hint) if isinstance(item, Bounds)), ANY_NUMBER)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, str) and not item.strip():
                msg = f"{flag} must not be empty, got {item!r}: name something, or leave {flag} out for its default"
                raise UserError(msg)
            if isinstance(item, int | float) and not isinstance(item, bool) and item not in bounds:
                msg = f"{flag} must be {bounds.text}, got {item}: correct it"
                raise UserError(msg)


def _metadata(hint: Any) -> Iterator[Any]:
    """Yield the metadata of `Annotated` in a type, at any depth."""
    if get_origin(hint) is Annotated:
        yield from hint.__metadata__
    for part in get_args(hint):
        yield from _metadata(part)


_TEXT = PrimitiveConstructorSpec[Any](
    nargs=1,
    metavar="STR",
    # `none` is a name as any other: only a flag that is left out means its default.
    instance_from_str=lambda words: words[0],
    is_instance=lambda value: True if value is None else isinstance(value, str),
    str_from_instance=lambda value: [] if value is None else [value],
)


def _number(info: PrimitiveTypeInfo) -> Spec:
    if info.type not in _NUMBERS:
        return None

    def parse(words: list[str]) -> Any:
        """Parse one word as a number."""
        try:
            return info.type(words[0])
        except ValueError:
            msg = f"must be {_NUMBERS[info.type]}, got {words[0]!r}"
            raise ValueError(msg) from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=info.type.__name__.upper(),
        instance_from_str=parse,
        # A whole number stands for a float too.
        is_instance=lambda value: type(value) is info.type or (info.type is float and type(value) is int and "~"),
        str_from_instance=lambda value: [str(value)],
    )


def _or_none(info: PrimitiveTypeInfo) -> Spec:
    """Parse `X | None`: the words of X, or the word none."""
    options = get_args(info.type)
    if type(None) not in options:
        return None
    others = tuple(option for option in options if option is not type(None))
    if others == (str,):
        return _TEXT
    # Union[...] of one type is that type.
    other: Any = Union[others]  # noqa: UP007
    inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(other, info.markers))
    if isinstance(inner, UnsupportedTypeAnnotationError):
        return inner

    def parse(words: list[str]) -> Any:
        """Return None for the word none, else the value of the other type."""
        if [word.lower() for word in words] == [_NONE]:
            return None
        if inner.choices is not None and not set(words) <= set(inner.choices):
            msg = f"must be one of {', '.join(inner.choices)} or {_NONE}, got {' '.join(words)!r}"
            raise ValueError(msg)
        try:
            return inner.instance_from_str(words)
        except ValueError as error:
            msg = str(error).replace(", got", f" or {_NONE}, got", 1)
            raise ValueError(msg) from None

    return PrimitiveConstructorSpec(
        nargs=inner.nargs if inner.nargs == "*" else _with_one(inner.nargs),
        metavar=f"{inner.metavar}|{_NONE}",
        instance_from_str=parse,
        is_instance=lambda value: True if value is None else inner.is_instance(value),
        str_from_instance=lambda value: [_NONE] if value is None else inner.str_from_instance(value),
    )


def _with_one(counts: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """Numbers of words, and 1 for the word none."""
    found = tuple(sorted({1, *((counts,) if isinstance(counts, int) else counts)}))
    return 1 if found == (1,) else found
