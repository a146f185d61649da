"""Settings files, TOML or JSON: read, and the settings of a registration also written."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import MorphSeekError
from .options import RegistrationOptions
from .settings import current_names, from_dict, to_dict
from .startup import AUTO, NO_MODEL, bundled, shown

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ENDINGS = (".toml", ".json")


@dataclass(frozen=True)
class RegistrationSettings:
    """The settings of a registration, to be saved, named and given to a colleague.

    Their file has these keys and those of the options side by side; what it leaves out is as by default.

    Attributes:
        name: what its author calls them.
        model: "auto", "none", a bundled model's name, or a model file; in a file relative to the file's folder.
        options: the choices.

    Raises:
        MorphSeekError: the error is to be estimated "later", which only the panel can ask for.
    """

    name: str = ""
    model: str = AUTO
    options: RegistrationOptions = field(default_factory=RegistrationOptions)

    def __post_init__(self) -> None:
        if self.options.trust == "later":
            raise MorphSeekError("trust is 'later', which only the panel can ask for; choose on or off.")


def read_settings(path: Path | str) -> RegistrationSettings:
    """Read the settings of a registration.

    Raises:
        MorphSeekError: missing, unreadable or malformed file, unknown key, or a value that there is not.
    """
    path = Path(path)
    values = read_values(path)
    if not isinstance(values, dict):
        raise MorphSeekError(f"{shown(path)} must be a table of settings, not {type(values).__name__}.")
    own = {"name", "model"}
    known = {field.name for field in fields(RegistrationOptions)}
    if unknown := sorted(set(current_names(values)) - known - own):
        listed = ", ".join(["name", "model", *sorted(known)])
        raise MorphSeekError(f"{shown(path)} has no setting '{unknown[0]}'; known settings: {listed}.")
    nested = {"options": {key: value for key, value in values.items() if key not in own}}
    settings = from_dict(RegistrationSettings, {k: values[k] for k in own & set(values)} | nested, path.name)
    beside = path.parent / settings.model
    model = str(beside) if _is_file(settings.model) and beside.is_file() else settings.model
    return RegistrationSettings(settings.name or path.stem, model, settings.options)


def settings_text(settings: RegistrationSettings, path: Path | str) -> str:
    """Return what :func:`read_settings` reads.

    Args:
        settings: the settings.
        path: the file that it is for; a model file beside it is named without its folder.

    Raises:
        MorphSeekError: the path ends with neither .toml nor .json.
    """
    path = Path(path)
    check_settings_name(path)
    model = settings.model
    if _is_file(model) and Path(model).resolve().parent == path.resolve().parent:
        model = Path(model).name
    given = {"name": settings.name or path.stem, "model": model, **to_dict(settings.options)}
    values = {key: value for key, value in given.items() if value is not None}
    if path.suffix.lower() == ".json":
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    # texts, numbers, lists and booleans of JSON are those of TOML
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())


def check_settings_name(path: Path | str) -> None:
    """Refuse a name that says no format of settings.

    Raises:
        MorphSeekError: with the endings that there are.
    """
    if Path(path).suffix.lower() not in ENDINGS:
        raise MorphSeekError(f"{shown(path)} has no format to write settings in; end its name with .toml or .json.")


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


def _is_file(model: str) -> bool:
    """Return whether a model is named by its file."""
    return model not in (AUTO, NO_MODEL) and model not in bundled()
