"""The engine's Python packages inside Slicer: what is missing, and how it is installed once the user agreed.

PyTorch comes through the PyTorch extension alone, which picks the build for the graphics card. The rest comes through
slicer.packaging (slicer.util.pip_install before Slicer 5.11), with every package that is installed already held at its
version, so that nothing of Slicer's own Python is replaced. Nothing is imported to find out.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import slicer
import slicer.util

from .scene import _

TORCH = ">=2.4"
REQUIREMENTS = Path(__file__).resolve().parents[1] / "Resources" / "requirements.txt"


class InstallError(Exception):
    """It could not be installed; the text is one sentence that says what to do."""


class Declined(Exception):
    """The user does not want it now."""


def requirements() -> list[str]:
    """Return the lines of requirements.txt."""
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def missing() -> list[str]:
    """Return those that are missing, PyTorch first; empty when the engine can start."""
    importlib.invalidate_caches()
    return [name for name in [f"torch{TORCH}", *requirements()] if not _installed(name)]


def install(on_log: Callable[[str], None], on_done: Callable[[Exception | None], None]) -> None:
    """Install what is missing. Returns at once where Slicer can install in the background; ``on_done`` is called with
    None when all is there, or with what went wrong.

    Args:
        on_log: called with each line for the log.
        on_done: called once.
    """
    try:
        wanted = missing()
        if any(name.startswith("torch") for name in wanted):
            on_log(_("Installing PyTorch through the PyTorch extension; this takes some minutes ..."))
            slicer.app.processEvents()
            _install_torch()
            on_log(_("PyTorch is installed."))
        rest = [name for name in wanted if not name.startswith("torch")]
        if not rest:
            on_done(_what_is_left())
            return
        on_log(_("Installing {names} ...").format(names=", ".join(rest)))
        _pip_install(rest, on_log, on_done)
    except Exception as problem:
        on_done(problem)


def _install_torch() -> None:
    try:
        from PyTorchUtils import PyTorchUtilsLogic
    except ImportError as problem:
        raise InstallError(
            _(
                "MorphSeek gets PyTorch through the extension 'PyTorch', which is not installed: install it in the "
                "Extensions Manager, restart Slicer and come back."
            )
        ) from problem
    try:
        torch = PyTorchUtilsLogic().installTorch(askConfirmation=False, torchVersionRequirement=TORCH)
    except Exception as problem:
        raise InstallError(
            _("PyTorch could not be installed ({reason}); check the network, or use the module 'PyTorch'.").format(
                reason=problem
            )
        ) from problem
    if torch is None:
        raise Declined


def _pip_install(rest: list[str], on_log: Callable[[str], None], on_done: Callable[[Exception | None], None]) -> None:
    folder = tempfile.TemporaryDirectory(prefix="morphseek-pip-")
    constraints = Path(folder.name) / "constraints.txt"
    held = (f"{name}=={version}\n" for name, version in _present().items() if name not in map(_name, rest))
    constraints.write_text("".join(held), encoding="utf-8")

    def completed(code: int) -> None:
        folder.cleanup()
        if code == 0:
            on_done(_what_is_left())
        else:
            on_done(
                InstallError(
                    _("The packages could not be installed (pip ended with {code}); the log says why.").format(
                        code=code
                    )
                )
            )

    try:
        from slicer.packaging import pip_install
    except ImportError:  # before Slicer 5.11
        try:
            slicer.util.pip_install([*rest, "-c", str(constraints)])
            completed(0)
        except Exception as problem:
            on_log(str(problem))
            completed(1)
        return
    pip_install(
        rest,
        constraints=str(constraints),
        blocking=False,
        show_progress=False,
        requester="MorphSeek",
        logCallback=on_log,
        completedCallback=completed,
    )


def _what_is_left() -> InstallError | None:
    left = missing()
    if not left:
        return None
    return InstallError(
        _("After the installation {names} cannot be found; restart Slicer and try again.").format(names=", ".join(left))
    )


def _present() -> dict[str, str]:
    """Return every installed distribution and its version."""
    found = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name and distribution.version:
            found.setdefault(name, distribution.version)
    return dict(sorted(found.items()))


def _name(requirement: str) -> str:
    return requirement.partition(">")[0].partition("=")[0].strip()


def _installed(requirement: str) -> bool:
    try:
        from slicer.packaging import pip_check
    except ImportError:  # before Slicer 5.11: the name will do
        try:
            metadata.version(_name(requirement))
        except metadata.PackageNotFoundError:
            return False
        return True
    return pip_check(requirement)
