"""The engine's Python packages inside Slicer: what is missing, and how it is installed once the user agreed.

PyTorch comes through the PyTorch extension alone, which picks the build for the graphics card. The rest comes through
slicer.packaging (slicer.util.pip_install before Slicer 5.11), with every package that is installed already held at its
version, so that nothing of Slicer's own Python is replaced. Nothing is imported to find out.

numba makes registrations on the processor faster and is optional: it is tried after all that is needed, within the same
consent. Where pip cannot add it without changing another package, the log says so and the setting ``REFUSED`` keeps it
from being tried again until Slicer has another Python or numpy.
"""

from __future__ import annotations

import importlib
import platform
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import qt
import slicer
import slicer.util

from .scene import _

TORCH = ">=2.4"
OPTIONAL = "numba>=0.60"
REFUSED = "MorphSeek/NumbaRefused"
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


def optional() -> list[str]:
    """Return the optional package where it is missing and was not refused with this Python and numpy."""
    importlib.invalidate_caches()
    refused = slicer.util.settingsValue(REFUSED, "") == _circumstances()
    return [] if refused or _installed(OPTIONAL) else [OPTIONAL]


def install(on_log: Callable[[str], None], on_done: Callable[[Exception | None], None]) -> None:
    """Install what is missing, then what is optional. Returns at once where Slicer can install in the background;
    ``on_done`` is called with None when all that is needed is there, or with what went wrong.

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
            _install_optional(_what_is_left(), on_log, on_done)
            return
        on_log(_("Installing {names} ...").format(names=", ".join(rest)))
        _pip_install(rest, on_log, lambda code: _install_optional(_outcome(code), on_log, on_done))
    except Exception as problem:
        on_done(problem)


def _install_optional(
    problem: InstallError | None, on_log: Callable[[str], None], on_done: Callable[[Exception | None], None]
) -> None:
    """Try the optional package where all else went well; what becomes of it is a line in the log."""
    names = [] if problem is not None else optional()
    if not names:
        on_done(problem)
        return

    def completed(_code: int) -> None:
        if optional():
            qt.QSettings().setValue(REFUSED, _circumstances())
            on_log(
                _("{names} could not be installed; MorphSeek works without it, more slowly on the processor.").format(
                    names=OPTIONAL
                )
            )
        else:
            on_log(_("{names} is installed.").format(names=OPTIONAL))
        on_done(None)

    on_log(_("Installing {names}, which is optional: it makes registrations faster ...").format(names=OPTIONAL))
    try:
        _pip_install(names, on_log, completed)
    except Exception as failure:
        on_log(str(failure))
        completed(1)


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


def _pip_install(names: list[str], on_log: Callable[[str], None], on_code: Callable[[int], None]) -> None:
    """Install packages with all others held at their versions; ``on_code`` is given pip's exit code."""
    folder = tempfile.TemporaryDirectory(prefix="morphseek-pip-")
    constraints = Path(folder.name) / "constraints.txt"
    held = [f"{name}=={version}" for name, version in _present().items() if name not in map(_name, names)]
    # without a wheel pip would compile llvmlite for an hour, and fail
    constraints.write_text("\n".join(["--only-binary numba,llvmlite", *held, ""]), encoding="utf-8")

    def completed(code: int) -> None:
        folder.cleanup()
        on_code(code)

    try:
        from slicer.packaging import pip_install
    except ImportError:  # before Slicer 5.11
        try:
            slicer.util.pip_install([*names, "-c", str(constraints)])
            code = 0
        except Exception as problem:
            on_log(str(problem))
            code = 1
        completed(code)
        return
    pip_install(
        names,
        constraints=str(constraints),
        blocking=False,
        show_progress=False,
        requester="MorphSeek",
        logCallback=on_log,
        completedCallback=completed,
    )


def _outcome(code: int) -> InstallError | None:
    """Return what is wrong after pip ended."""
    if code == 0:
        return _what_is_left()
    return InstallError(
        _("The packages could not be installed (pip ended with {code}); the log says why.").format(code=code)
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


def _circumstances() -> str:
    """Return what decides whether the optional package can be installed."""
    return f"Python {platform.python_version()}, numpy {metadata.version('numpy')}"


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
