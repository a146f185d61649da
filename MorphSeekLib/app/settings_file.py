"""Settings files of trainings, TOML or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from ..protocol.settings import from_dict
from ..protocol.settings_file import read_values

T = TypeVar("T")


def load(settings_type: type[T], path: Path | str | None) -> T:
    """Read settings from a .toml or .json file; without one, return the defaults.

    Raises:
        MorphSeekError: missing, unreadable or malformed file, unknown key, wrong type.
    """
    if path is None:
        return settings_type()
    return from_dict(settings_type, read_values(path), Path(path).name)
