"""Settings: dataclasses, filled from plain dicts, where an unknown key is an error.

Nested dataclasses are nested tables; a table that names some of its settings leaves the others as the whole's defaults
have them. Lists become tuples, so that settings compare and hash.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import MorphSeekError

T = TypeVar("T")

OLD_NAMES = {"licence": "license", "checkpointing": "recompute"}
"""What settings and cards written by an earlier version call by another name."""


def current_names(values: Mapping[str, object]) -> dict[str, Any]:
    """Return the same values by today's names."""
    return {OLD_NAMES.get(name, name): value for name, value in values.items()}


def from_dict(
    settings_type: type[T], values: Mapping[str, object], where: str = "settings", base: T | None = None
) -> T:
    """Fill a settings dataclass from a plain dict, checked key by key and type by type.

    Args:
        base: has the values of the keys that are not given; None for the dataclass's own defaults.

    Raises:
        MorphSeekError: an unknown key (named, with the known ones) or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise MorphSeekError(f"{where} must be a table of settings, not {type(values).__name__}.")
    hints = typing.get_type_hints(settings_type)
    known = {field.name: field for field in dataclasses.fields(settings_type)}  # type: ignore[arg-type]
    values = current_names(values)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise MorphSeekError(f"{where} has no setting '{unknown[0]}'; known settings: {', '.join(known)}.")
    try:
        given = {k: _convert(hints[k], v, f"{where}.{k}", _default(known[k], base)) for k, v in values.items()}
        return settings_type(**given) if base is None else dataclasses.replace(base, **given)  # type: ignore[type-var]
    except (TypeError, ValueError) as error:
        raise MorphSeekError(f"{where}: {error}") from error


def to_dict(settings: Any) -> dict[str, Any]:
    """Return the plain dict of a settings dataclass, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def finite(value: Any) -> Any:
    """Return the same structure with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, indent: int | None = None) -> str:
    """Write JSON that every program reads: a number that is not finite becomes null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def override(settings: T, table: str, **values: Any) -> T:
    """Return the same settings with some values of a nested table replaced; None leaves a value as it is.

    Raises:
        MorphSeekError: a value that the table refuses.
    """
    given = {name: value for name, value in values.items() if value is not None}
    try:
        changed = dataclasses.replace(getattr(settings, table), **given)
        return dataclasses.replace(settings, **{table: changed})  # type: ignore[type-var]
    except ValueError as error:
        raise MorphSeekError(f"{table}: {error}") from error


def _default(field: dataclasses.Field, base: Any) -> Any:
    """Return what the field holds where nothing is given; None where it must be given."""
    if base is not None:
        return getattr(base, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _convert(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    """Convert ``value`` to what the type hint says, or raise MorphSeekError."""
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast("type[Any]", hint), value, where, default)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise MorphSeekError(f"{where} is {value!r}; choose one of {', '.join(map(str, arguments))}.")
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], v, where) for v in value)
        if len(arguments) != len(value):
            raise MorphSeekError(f"{where} needs {len(arguments)} values, not {len(value)}.")
        return tuple(_convert(a, v, where) for a, v in zip(arguments, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {_key(arguments[0], k, where): _convert(arguments[1], v, where) for k, v in value.items()}
    if typing.is_typeddict(hint) and isinstance(value, dict):
        return dict(value)
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise MorphSeekError(f"{where} must be of type {expected}, but is {value!r}.")


def _key(hint: Any, key: object, where: str) -> Any:
    """Return a key as its type hint says; JSON has only texts."""
    if hint is not int:
        return str(key)
    try:
        return int(str(key))
    except ValueError as error:
        raise MorphSeekError(f"{where} has the key {key!r}, which must be a whole number.") from error
