"""Examine the installation, for bug reports.

    morphseek doctor            # text to read and to send
    morphseek doctor --json     # the same for programs

Versions, devices and their free memory, threads, folders, models with their check sums, and the last lines of the log.
Names of patients, files and users are taken out (:class:`Redaction`). Only the standard library is imported before the
examination, which continues where a part of the engine cannot be imported: that is when it is needed most.

Slicer's panel starts ``python -m MorphSeekLib.app.doctor`` and hands over a :class:`Told` as JSON on its standard
input.
"""

from __future__ import annotations

import argparse
import dataclasses
import getpass
import importlib.metadata
import json
import os
import platform
import re
import shutil
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..protocol.errors import MorphSeekError
from ..protocol.startup import ALIGNMENTS, bundled, check_output_folder, read_header, sha256, wait_passively
from ..protocol.version import __version__

PACKAGES = (
    "torch",
    "numpy",
    "SimpleITK",
    "safetensors",
    "h5py",
    "pydicom",
    "scipy",
    "matplotlib",
    "jinja2",
    "typer",
    "rich",
    "tensorboard",
    "monai",
    "einops",
    "lightning-fabric",
)
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "CUDA_VISIBLE_DEVICES", "MORPHSEEK_PRECISION")
"""Of the environment, shown with their values; of the next ones only whether they are set."""
LAUNCHER_VARIABLES = ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH")

_SUFFIXES = (
    "nii nii.gz nrrd nhdr mha mhd img hdr gipl dcm ima h5 hdf5 tfm txt mat npy npz json jsonl toml csv tsv safetensors "
    "pt pth ckpt mrml mrb zip gz tar vtk vtp stl obj png jpg jpeg tif tiff bmp mgz mgh raw html pdf xlsx"
)
_ENDINGS = "|".join(map(re.escape, sorted(_SUFFIXES.split(), key=len, reverse=True)))
_FILE = re.compile(rf"[^'\"/\\:;,()<>|=\[\]{{}}]*?[\w)-]\.(?:{_ENDINGS})\b", re.IGNORECASE)  # with spaces in its name
_BEGIN = r"(?:(?<=[\s'\"(=:,\[])|^)(?:~?/|[A-Za-z]:[\\/]|\\\\)"
_PATH = re.compile(  # up to the next file name, whatever the folders are called, or up to a punctuation mark
    rf"{_BEGIN}(?:[^\n]*?\.(?:{_ENDINGS})(?![\w.])|(?:[^'\";:,()<>\n]|<name>)*)", re.IGNORECASE
)
_RELATIVE = re.compile(r"(?<![\w>/\\.-])[\w.-]+[\\/](?:[^\s'\";:,()<>]|<name>)*")
_DICOM_NAME = re.compile(r"[^\s'\"]*\^[^\s'\"]*")
_QUOTED = re.compile(r"(?<!\w)(['\"])(.+?)\1(?!\w)")
_NUMBER = re.compile(r"(?<![\w.])\d{6,}(?![\w.])")
_LOG_LINES = 40
_MOST_MODELS = 20
_SECONDS = 10.0  # that nvidia-smi may take


@dataclass
class Told:
    """What Slicer's panel knows and this process does not.

    Attributes:
        about: lines of its own, such as Slicer's version and the sentence that the user saw.
        log: the last lines of the engine's or a training's log.
        names: of nodes, cases and patients; taken out of everything.
        folders: what for -> folder that the user has chosen; its path is not shown.
    """

    about: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    folders: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Device:
    """What can compute; bytes where they are known."""

    name: str
    label: str
    free: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class Folder:
    """Where MorphSeek writes; ``place`` is "" for a folder that the user has chosen."""

    what: str
    place: str
    writable: bool
    free: int | None


@dataclass(frozen=True)
class Model:
    """A model's file, by its own name only where it is bundled."""

    name: str
    size: int
    sha256: str
    problem: str = ""


@dataclass
class Findings:
    """All that was found, without names."""

    morphseek: str
    about: dict[str, str]
    system: dict[str, str]
    packages: dict[str, str]
    engine: str
    devices: list[Device]
    cuda: dict[str, str]
    threads: dict[str, str]
    memory: dict[str, int]
    folders: list[Folder]
    models: list[Model]
    log: list[str]


def examine(told: Told | None = None, home: Path | None = None) -> Findings:
    """Look at the installation; torch is imported, which takes seconds.

    Args:
        told: what the caller knows.
        home: the folder with the user's own models and trainings; by default the user's home.
    """
    told, home = told or Told(), Path.home() if home is None else home
    redact = Redaction(told.names)
    trainings = home / "MorphSeek" / "Trainings"
    temporary = Path(tempfile.gettempdir())
    places = {"models": home / "MorphSeek" / "Models", "trainings": trainings, "temporary files": temporary}
    folders = [_folder(what, path, shorten(path, home)) for what, path in places.items()]
    folders += [_folder(what, Path(path), "") for what, path in told.folders.items() if path]
    own = [places["models"], *(Path(path) for path in told.folders.values() if path)]
    engine = _import_problem()
    return Findings(
        morphseek=__version__,
        about={name: redact(value) for name, value in told.about.items()},
        system={
            "system": platform.platform(),
            "processor": _processor(),
            "python": f"{platform.python_version()} ({platform.python_implementation()}, {platform.machine()})",
            "program": shorten(sys.executable or "?", home),
        },
        packages={name: version for name in PACKAGES if (version := _version(name))},
        engine=redact(engine) if engine else "it can be imported",
        devices=list(_devices()),
        cuda=_cuda(),
        threads=_threads(),
        memory=_memory(),
        folders=folders,
        models=list(_models(own, redact)),
        log=[redact(line) for line in (told.log or _last_log(trainings))[-_LOG_LINES:]],
    )


def as_text(found: Findings) -> str:
    """Return the findings as text to read, and to send with a question."""
    sections: dict[str, Iterable[str]] = {
        f"MorphSeek {found.morphseek}": [*_pairs(found.about), *_pairs(found.system), f"engine: {found.engine}"],
        "Packages": [*_pairs(found.packages), f"not installed: {', '.join(_missing(found)) or 'none'}"],
        "Devices": [*map(_device_line, found.devices), *_pairs(found.cuda)],
        "Memory": [f"{name}: {_bytes(value)}" for name, value in found.memory.items()],
        "Threads": _pairs(found.threads),
        "Folders": [
            f"{folder.what}{f' ({folder.place})' if folder.place else ', chosen by the user'}: "
            f"{'can be written' if folder.writable else 'CANNOT BE WRITTEN'}, {_bytes(folder.free)} free"
            for folder in found.folders
        ],
        "Models": [
            f"{model.name}: {_bytes(model.size)}, SHA-256 {model.sha256}{f', {model.problem}' * bool(model.problem)}"
            for model in found.models
        ],
        "The log's last lines": found.log or ["none"],
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items()) + "\n"


def as_json(found: Findings) -> str:
    """Return the findings for programs."""
    return json.dumps(dataclasses.asdict(found), indent=1, ensure_ascii=False) + "\n"


def shorten(path: str | os.PathLike, home: Path) -> str:
    """Return a path with the home folder as ~, which holds the user's name."""
    path = Path(path)
    return str(Path("~") / path.relative_to(home)) if path.is_relative_to(home) else str(path)


class Redaction:
    """Take names of patients, files and users out of a line of text.

    What is neither known as harmless nor needed to understand a failure goes: paths and file names, what stands in
    quotes unless it is a module, device or option, and long numbers. Too much is taken rather than too little.

    Args:
        names: that the caller knows, of nodes, cases and patients.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        known = {name for name in map(str, names) if len(name) > 2}
        known |= {re.sub(r"[^\w-]", "-", name) for name in known}  # as file names are made from them
        known |= {name for name in (_user(), socket.gethostname()) if len(name) > 2 and name != "root"}
        longest_first = sorted(known, key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first))
        self._names = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE) if known else None
        self._roots = _roots()

    def __call__(self, line: str) -> str:
        for folder, name in self._roots:
            line = line.replace(folder, name)
        if self._names is not None:
            line = self._names.sub("<name>", line)
        for pattern, words in (
            (_PATH, "<path>"),
            (_RELATIVE, "<path>"),
            (_DICOM_NAME, "<name>"),
            (_NUMBER, "<number>"),
        ):
            line = pattern.sub(words, line)
        line = _FILE.sub(lambda match: " " * match[0].startswith(" ") + "<file>", line)
        return _QUOTED.sub(_unless_harmless, line)


def _unless_harmless(match: re.Match) -> str:
    quote, text = match[1], match[2]
    first = text.partition(".")[0].replace("-", "_")
    harmless = text.startswith("<") or first in _HARMLESS or re.fullmatch(r"cuda(:\d+)?|--[a-z-]+", text)
    return match[0] if harmless else f"{quote}<name>{quote}"


_HARMLESS = {
    *sys.stdlib_module_names,
    *(name.replace("-", "_") for name in PACKAGES),
    *ALIGNMENTS,
    *(name.replace("-", "_") for name in bundled()),
    "MorphSeekLib",
    "MorphSeekGui",
    "auto",
    "cpu",
    "encodings",
    "nibabel",
    "slicer",
    "vtk",
}


def _roots() -> list[tuple[str, str]]:
    """Return the folders of programs, which do not identify the user, and what to write for them; longest first."""
    folders = {str(Path(__file__).resolve().parent): "<MorphSeekLib>", sysconfig.get_path("stdlib"): "<python>"}
    folders |= dict.fromkeys((*site.getsitepackages(), sysconfig.get_path("purelib")), "<site-packages>")
    return sorted(folders.items(), key=lambda pair: -len(pair[0]))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # an account without a name
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _missing(found: Findings) -> list[str]:
    return [name for name in PACKAGES if name not in found.packages]


def _import_problem() -> str:
    """Import the engine; return why it cannot be imported, "" if it can."""
    try:
        from . import worker  # noqa: F401  (with all that a registration needs)
    except Exception as problem:  # whatever a broken library raises is what is looked for
        return f"it cannot be imported ({type(problem).__name__}: {problem})"
    return ""


def _devices() -> Iterator[Device]:
    try:
        import torch

        from ..networks.devices import describe_devices
    except Exception:  # said by _import_problem already
        return
    for device in describe_devices():
        total = None
        if device["name"] != "cpu":
            total = torch.cuda.get_device_properties(device["name"]).total_memory
        yield Device(device["name"], device["label"], device.get("free_bytes"), total)


def _cuda() -> dict[str, str]:
    """Return what PyTorch and the driver report about CUDA."""
    told = {}
    try:
        import torch

        told["CUDA of PyTorch"] = str(torch.version.cuda or "none, this PyTorch computes on the processor")
    except Exception as problem:
        told["CUDA of PyTorch"] = f"unknown, PyTorch cannot be imported ({type(problem).__name__})"
    program = shutil.which("nvidia-smi")
    if program is None:
        return told | {"NVIDIA driver": "none was found"}
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError) as problem:
        return told | {"NVIDIA driver": f"nvidia-smi does not answer ({type(problem).__name__})"}
    return told | {"NVIDIA driver": ", ".join(sorted(set(answer.split()))) or "no GPU"}


def _threads() -> dict[str, str]:
    told = {"processors": str(os.cpu_count())}
    if hasattr(os, "sched_getaffinity"):
        told["processors that may be used"] = str(len(os.sched_getaffinity(0)))
    try:
        import torch

        told["threads of PyTorch"] = str(torch.get_num_threads())
    except Exception:  # said by _import_problem already
        pass
    told |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return told | {name: "set" for name in LAUNCHER_VARIABLES if name in os.environ}


def _memory() -> dict[str, int]:
    """Return the computer's memory in bytes: "total", and "available" where the system reports it."""
    if os.name == "nt":
        return _windows_memory()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        values = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
        return {"total": values["MemTotal"], "available": values["MemAvailable"]}
    except (OSError, KeyError, IndexError, ValueError):
        return {"total": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}


def _windows_memory() -> dict[str, int]:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)]
        _fields_ += [(name, ctypes.c_ulonglong) for name in ("total", "available", "a", "b", "c", "d", "e")]

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return {"total": status.total, "available": status.available}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _folder(what: str, path: Path, place: str) -> Folder:
    try:
        check_output_folder(path)
    except MorphSeekError:
        writable = False
    else:
        writable = True
    existing = next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), None)
    try:
        free = None if existing is None else shutil.disk_usage(existing).free
    except OSError:
        free = None
    return Folder(what, place, writable, free)


def _models(folders: Iterable[Path], redact: Redaction) -> Iterator[Model]:
    """Return bundled models by their names, the user's by numbers: a file may be named after a patient."""
    files = {path.resolve(): name for name, path in bundled().items()}
    own = {path.resolve() for folder in folders for path in sorted(folder.glob("*.safetensors"))}
    files |= {path: f"own model {number}" for number, path in enumerate(sorted(own - files.keys()), 1)}
    for path, name in list(files.items())[:_MOST_MODELS]:
        problem = ""
        try:
            read_header(path)
        except MorphSeekError as refused:
            problem = redact(str(refused))
        try:
            yield Model(name, path.stat().st_size, sha256(path), problem)
        except OSError as unreadable:
            yield Model(name, 0, "", f"it cannot be read ({unreadable.strerror})")


def _last_log(trainings: Path) -> list[str]:
    """Return the lines of the newest training's log."""
    logs = sorted(trainings.glob("*/log.txt"), key=lambda path: path.stat().st_mtime_ns)
    if not logs:
        return []
    with open(logs[-1], "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
        return file.read().decode("utf-8", "replace").splitlines()


def _pairs(values: dict[str, str]) -> list[str]:
    return [f"{name}: {value}" for name, value in values.items()]


def _device_line(device: Device) -> str:
    memory = "" if device.free is None else f", {_bytes(device.free)} free of {_bytes(device.total)}"
    return f"{device.name}: {device.label}{memory}"


def _bytes(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def main(arguments: list[str] | None = None) -> None:
    """Run ``python -m MorphSeekLib.app.doctor``."""
    parser = argparse.ArgumentParser(prog="python -m MorphSeekLib.app.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--told", action="store_true", help="read what Slicer's panel knows from the standard input")
    options = parser.parse_args(arguments)
    wait_passively()  # before torch is imported
    values: dict[str, Any] = json.load(sys.stdin) if options.told else {}
    found = examine(Told(**values))
    print(as_json(found) if options.json else as_text(found), end="")


if __name__ == "__main__":
    main()
