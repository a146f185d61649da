"""Make an environment as a user's Slicer has it: what Slicer ships, PyTorch, and what the panel installs; nothing else.

    python Testing/environments/make_environment.py Testing/environments/slicer-python-5.12.3.txt FOLDER

The Python is the one that runs this file. (Slicer's is 3.12; PyPI's PyTorch for it may bring several GB of CUDA.)

It installs as MorphSeekGui/dependencies.py does, with every package that is already there held at its version, and ends
with an error where a package that Slicer ships is left at another version than Slicer's. numba, which the panel only
tries to install, is left out: the engine must work without it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "MorphSeek" / "Resources" / "requirements.txt"


def main(shipped: Path, folder: Path) -> None:
    """Make the environment of a list of packages, in place of the one that may be in the folder."""
    begin = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install(python, "-r", str(shipped))
    before = freeze(python)
    install(python, tested_torch(), "-c", hold(before, folder))
    held = {name: version for name, version in freeze(python).items() if name not in requirement_names(REQUIREMENTS)}
    install(python, "-r", str(REQUIREMENTS), "-c", hold(held, folder))
    after = freeze(python)
    moved = changes(before, after)
    if moved:
        raise SystemExit(f"Packages that Slicer ships were changed: {'; '.join(moved)}.")
    print(
        f"{shipped.stem}: {len(before)} packages as Slicer ships them, {len(after) - len(before)} added, "
        f"none changed; {time.monotonic() - begin:.0f} s"
    )


def tested_torch() -> str:
    """Return the requirement that constraints.txt states for PyTorch."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def install(python: Path, *arguments: str) -> None:
    """Install without compiling: most files are never imported here."""
    command = [str(python), "-m", "pip", "install", "-qq", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments], check=True)


def freeze(python: Path) -> dict[str, str]:
    """Return the version of each installed package, by its normalized name."""
    command = [str(python), "-m", "pip", "freeze", "--all", "--disable-pip-version-check"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pairs = (line.split("==", 1) for line in text.splitlines() if "==" in line)
    return {normalized(name): version for name, version in pairs}


def hold(versions: dict[str, str], folder: Path) -> str:
    """Write a file of constraints that holds packages at their versions; return its path."""
    path = folder / "held.txt"
    path.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()), encoding="utf-8")
    return str(path)


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Say of each package that has another version than before, or none, what became of it."""
    return [
        f"{name} {version} -> {after.get(name, 'removed')}"
        for name, version in before.items()
        if after.get(name) != version
    ]


def requirement_names(file: Path) -> set[str]:
    """Return the normalized names of a file of requirements."""
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return {normalized(re.match(r"[\w.-]+", line).group()) for line in lines if line}


def normalized(name: str) -> str:
    """Return a package's name as PyPI compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
