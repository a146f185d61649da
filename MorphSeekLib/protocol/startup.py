"""What is decided and checked before torch, numpy and SimpleITK are imported, which takes seconds.

Names, numbers and paths of a request are looked at here first, so that a misspelled one is refused at once. Nothing but
the standard library may be imported in this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast

from .card import CardValues
from .errors import MorphSeekError
from .run_folder import SETTINGS
from .settings import current_names

Kind = Literal["model", "recipe"]
"""What comes with MorphSeek beside its code: models, and settings of trainings."""

_FOLDERS = {"model": "Models", "recipe": "Training"}
_OLD_MODELS = "Checkpoints"  # where the bundled models lay before; a path into it opens the model of that name
_SUFFIXES = {"model": ".safetensors", "recipe": ".toml"}
ALIGNMENTS = ("none", "center", "rigid", "affine")
INTERPOLATIONS = ("linear", "nearest", "bspline")
MAX_STEPS = 20
AUTO, NO_MODEL = "auto", "none"
"""In a model's place: chosen by the images, and no network."""
FORMAT = 1
"""Of the card in a model file."""

_LONGEST_HEADER = 100_000_000  # bytes; the limit of the .safetensors format
_PICKLED = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def shown(path: str | os.PathLike) -> str:
    """Return a file's name as text that can be printed and stored, whatever its bytes are."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def wait_passively() -> None:
    """Let the threads of torch sleep while they wait for work, instead of spinning; what the user has set stays.

    On a machine that does something else too, spinning threads take the processor from the ones they wait for. The
    OpenMP libraries read these variables when they are loaded, so this must come before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("KMP_BLOCKTIME", "0")


def resources() -> Path:
    """Return the folder of what comes with MorphSeek beside its code.

    A wheel holds it inside the package, a checkout and an installation in Slicer beside it.
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / "resources"
    return inside if inside.is_dir() else package.parent / "Resources"


def bundled(kind: Kind = "model") -> dict[str, Path]:
    """Return what comes with MorphSeek of a kind: name -> file."""
    files = sorted((resources() / _FOLDERS[kind]).glob(f"*{_SUFFIXES[kind]}"))
    return {path.stem: path for path in files}


def find(name: str | Path, kind: Kind = "model") -> Path:
    """Return the file of a bundled name, or of a path.

    Raises:
        MorphSeekError: neither; the known names are listed.
    """
    names = bundled(kind)
    if str(name) in names:
        return names[str(name)]
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if kind == "model" and path.parent.name == _OLD_MODELS and path.stem in names:
        return names[path.stem]
    known = ", ".join(names) or "none are installed"
    if kind == "model":
        raise MorphSeekError(
            f"There is no model '{name}': give a bundled name ({known}), a .safetensors file, auto or none."
        )
    raise MorphSeekError(f"There are no settings '{name}': give a bundled name ({known}) or a .toml or .json file.")


def read_header(path: Path | str) -> CardValues:
    """Return the card of a model file, without its format number and by today's names; no weights are read.

    Raises:
        MorphSeekError: no such file, or not a MorphSeek model: pickled, foreign, damaged or from a later version.
    """
    path = Path(path)
    if not path.is_file():
        raise MorphSeekError(f"There is no model file {path}; check the path.")
    try:
        header = _safetensors_header(path)
    except (OSError, ValueError) as error:
        raise MorphSeekError(
            f"{path.name} is damaged or not a .safetensors file ({error}); download or copy it again."
        ) from error
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or "morphseek" not in metadata:
        raise MorphSeekError(
            f"{path.name} is a .safetensors file of another program: it carries no MorphSeek card. "
            "Choose a model that MorphSeek wrote."
        )
    try:
        card = json.loads(metadata["morphseek"])
        number = card.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise MorphSeekError(f"The card of {path.name} is damaged ({error}); copy the file again.") from error
    if number != FORMAT:
        raise MorphSeekError(f"{path.name} has format {number}, this MorphSeek reads {FORMAT}; update MorphSeek.")
    return cast("CardValues", current_names(card))


def _safetensors_header(path: Path) -> dict[str, Any]:
    """Return the JSON at the beginning of a .safetensors file; ValueError where file and header do not belong
    together."""
    with open(path, "rb") as file:
        head = file.read(8)
        if head.startswith(_PICKLED):
            raise MorphSeekError(
                f"{path.name} is a pickled PyTorch file, which MorphSeek does not open because it could run any "
                "program; use a MorphSeek model (.safetensors)."
            )
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= _LONGEST_HEADER:
            raise ValueError("it has no header")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    tensors = [value for name, value in header.items() if name != "__metadata__"]
    try:
        end = max((int(tensor["data_offsets"][1]) for tensor in tensors), default=0)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("its header does not say where the weights are") from error
    if path.stat().st_size != 8 + length + end:
        raise ValueError(f"it has {path.stat().st_size} bytes instead of {8 + length + end}")
    return header


def sha256(path: Path | str) -> str:
    """Return the hex digest of a file, by which reports name a model."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_model(model: str | Path) -> Path:
    """Return the file of a model whose card can be read.

    Raises:
        MorphSeekError: as :func:`find` and :func:`read_header`.
    """
    path = find(model)
    read_header(path)
    return path


def check_model_choice(name: str) -> Path | None:
    """Return the file of a model as :func:`check_model`; None for "auto" and "none".

    Raises:
        MorphSeekError: as :func:`check_model`.
    """
    return None if name in (AUTO, NO_MODEL) else check_model(name)


def check_device(name: str) -> None:
    """Refuse a device whose name means nothing; whether a GPU is there only torch can say.

    Raises:
        MorphSeekError: not auto, cpu or cuda:N.
    """
    kind, colon, number = name.partition(":")
    if name not in ("auto", "cpu") and (kind != "cuda" or (colon and not number.isdecimal())):
        raise MorphSeekError(
            f"There is no device '{name}'; use auto, cpu or cuda:N (N is the number of a GPU, from 0)."
        )


def check_steps(steps: int) -> None:
    """Refuse a number of steps that no registration takes.

    Raises:
        MorphSeekError: with the range.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise MorphSeekError(f"{steps} steps were asked for; choose 1 to {MAX_STEPS}.")


def check_alignment(align: str) -> None:
    """Refuse an unknown alignment.

    Raises:
        MorphSeekError: with the known ones.
    """
    if align not in ALIGNMENTS:
        raise MorphSeekError(f"There is no alignment '{align}'; choose one of {', '.join(ALIGNMENTS)}.")


def check_interpolation(name: str) -> None:
    """Refuse an unknown interpolation.

    Raises:
        MorphSeekError: with the known ones.
    """
    if name not in INTERPOLATIONS:
        raise MorphSeekError(f"There is no interpolation '{name}'; choose one of {', '.join(INTERPOLATIONS)}.")


def check_threads(threads: int) -> None:
    """Refuse a number of threads below one.

    Raises:
        MorphSeekError: with what to give.
    """
    if threads < 1:
        raise MorphSeekError(f"{threads} threads were asked for; choose 1 or more, or leave it out for all.")


def check_iterations(iterations: int) -> None:
    """Refuse a training of no iterations.

    Raises:
        MorphSeekError: with what to give.
    """
    if iterations < 1:
        raise MorphSeekError(f"{iterations} iterations were asked for; choose 1 or more.")


def check_readable(path: Path | str) -> None:
    """Refuse a file or folder that is missing, may not be read, or is an empty file.

    Raises:
        MorphSeekError: which of them.
    """
    path = Path(path)
    if not path.exists():
        raise MorphSeekError(f"{path} does not exist; check the name.")
    if not os.access(path, os.R_OK):
        raise MorphSeekError(f"{path} may not be read; check its permissions.")
    if path.is_file() and path.stat().st_size == 0:
        raise MorphSeekError(f"{path} is an empty file (0 bytes); copy or export it again.")


def transform_paths(text: str | None) -> list[Path]:
    """Return the files of TRANSFORM[,TRANSFORM...]; a file whose own name has a comma is one, and None is no file."""
    if text is None:
        return []
    return [Path(text)] if Path(text).exists() else [Path(part.strip()) for part in text.split(",") if part.strip()]


def check_run(folder: Path | str) -> None:
    """Refuse a folder that holds no training run.

    Raises:
        MorphSeekError: it has no run.json.
    """
    if not (Path(folder) / SETTINGS).is_file():
        raise MorphSeekError(
            f"{folder} is not a training run: it has no {SETTINGS}; choose the folder of a training, or name a new "
            "model by --out to train one on these cases."
        )


def refuse_overwriting(outputs: Iterable[str | os.PathLike], inputs: Iterable[str | os.PathLike | None]) -> None:
    """Refuse to write over a file that is read.

    Args:
        outputs: the files that will be written.
        inputs: what is read; None and what is not there are passed over.

    Raises:
        MorphSeekError: an output is one of the inputs, by whatever name.
    """
    existing = [path for path in inputs if path is not None and os.path.exists(path)]
    for output in outputs:
        for path in existing:
            if os.path.exists(output) and os.path.samefile(output, path):
                raise MorphSeekError(
                    f"{shown(path)} is an input and would be overwritten by the results; choose another output."
                )


def check_output_folder(folder: Path | str) -> None:
    """Refuse a folder for results that is a file, or that could not be made or written to.

    Raises:
        MorphSeekError: which of them.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise MorphSeekError(f"The output folder {folder} is a file; choose another name.")
    _try_to_write(folder, folder)


def check_output_file(
    path: str | os.PathLike, suffix: str = "", inputs: Iterable[str | os.PathLike | None] = ()
) -> None:
    """Refuse a file that could not be written, before the work that it is for.

    Args:
        path: the file; its folder need not exist yet.
        suffix: what its name must end with.
        inputs: what the job reads; None is skipped.

    Raises:
        MorphSeekError: another ending, a folder of that name, one of the inputs, or a place that cannot be written to.
    """
    path = Path(path)
    refuse_overwriting([path], inputs)
    if suffix and path.suffix != suffix:
        raise MorphSeekError(f"The model file {path.name} must be named with the ending {suffix}.")
    if path.is_dir():
        raise MorphSeekError(f"{path} cannot be written because a folder has this name; choose another name.")
    _try_to_write(path.parent, path)


def _try_to_write(folder: Path, wanted: Path) -> None:
    """Write a nameless file into a folder, or into the nearest one above it that exists."""
    try:
        above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=above) as file:
            file.write(b"\0" * 512)
    except OSError as error:
        raise MorphSeekError(
            f"{wanted} cannot be written ({(error.strerror or str(error)).lower()}); choose another folder or free "
            "some space."
        ) from error
