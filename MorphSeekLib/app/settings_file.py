"""Settings files, TOML or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from ..protocol.errors import MorphSeekError
from ..protocol.settings import from_dict

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

T = TypeVar("T")


def load(settings_type: type[T], path: Path | str | None) -> T:
    """Read settings from a .toml or .json file; without one, return the defaults.

    Raises:
        MorphSeekError: missing, unreadable or malformed file, unknown key, wrong type.
    """
    if path is None:
        return settings_type()
    return from_dict(settings_type, read_values(path), Path(path).name)


def read_values(path: Path | str) -> Any:
    """Return the content of a .toml or .json file, not yet checked against any settings.

    Raises:
        MorphSeekError: missing, unreadable or malformed file.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise MorphSeekError(f"The settings file {path} cannot be read ({error}); check the path.") from error
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise MorphSeekError(f"The settings file {path} is not valid {kind}: {error}.") from error
