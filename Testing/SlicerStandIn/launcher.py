"""What Slicer's launcher does to the environment: variables with which no Python but Slicer's own can run.

The launcher (Slicer's AppLauncher, SlicerLauncherSettings.ini) sets PYTHONHOME, PYTHONPATH and LD_LIBRARY_PATH for all
below it. Here PYTHONHOME is a folder without a standard library and PYTHONPATH one with a numpy that refuses to be
imported: any Python that is started with them dies, but for PythonSlicer, which, as Slicer's, sets what it needs.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLES = ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH")


class Launcher:
    """Slicer's folder, with an application, its Python, and what the launcher sets.

    Args:
        home: where to make it.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._packages = home / "lib" / "Python" / "site-packages"
        self._before: dict[str, str | None] | None = None
        (self._packages / "numpy").mkdir(parents=True)
        (self._packages / "numpy" / "__init__.py").write_text(
            'raise ImportError("Slicer\'s numpy cannot be imported by another Python")\n', encoding="utf-8"
        )
        (home / "bin").mkdir()
        (home / "bin" / "SlicerApp-real").touch()
        own = home / "bin" / "PythonSlicer"
        folder = shlex.quote(str(self._packages))
        own.write_text(
            "#!/bin/sh\nunset PYTHONHOME LD_LIBRARY_PATH\n"
            f'PYTHONPATH=$(printf %s "$PYTHONPATH" | tr : "\\n" | grep -vxF {folder} | paste -sd: -)\n'
            f'export PYTHONPATH\nexec {shlex.quote(sys.executable)} "$@"\n',
            encoding="utf-8",
        )
        own.chmod(0o755)

    @contextmanager
    def launched(self) -> Iterator[None]:
        """This process as one that the launcher started."""
        executable = sys.executable
        self._before = {name: os.environ.get(name) for name in VARIABLES}
        os.environ["PYTHONHOME"] = str(self.home / "lib" / "Python")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(self._packages), self._before["PYTHONPATH"]]))
        os.environ["LD_LIBRARY_PATH"] = str(self.home / "lib")
        sys.executable = str(self.home / "bin" / "SlicerApp-real")
        try:
            yield
        finally:
            sys.executable = executable
            _restore(os.environ, self._before)
            self._before = None

    def startup_environment(self) -> dict[str, str]:
        """The variables without what the launcher set."""
        environment = dict(os.environ)
        _restore(environment, self._before or {})
        return environment


def _restore(environment, before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value
