"""What a process costs, and the processes that are measured: the command line and greedy on its own files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HIDE = "import sys; sys.modules['numba'] = None; from MorphSeekLib.app.cli import main; main()"
GREEDY = """
import sys
from picsl_greedy import Greedy3D
fixed, moving, folder, threads = sys.argv[1:]
base = f"-d 3 -V 0 -seed 1 -threads {threads}"
common = f"{base} -m NCC 2x2x2 -n 100x50x10 -i {fixed} {moving}"
Greedy3D().execute(f"{common} -a -ia-image-centers -o {folder}/affine.mat")
Greedy3D().execute(f"{common} -it {folder}/affine.mat -o {folder}/warp.nii.gz")
Greedy3D().execute(
    f"{base} -rf {fixed} -rm {moving} {folder}/out.nii.gz -rc {folder}/whole.nii.gz "
    f"-r {folder}/warp.nii.gz {folder}/affine.mat"
)
"""


@dataclass(frozen=True)
class Cost:
    """What a process and the children that it waited for took.

    Attributes:
        cpu_seconds: user + system.
        seconds: of the clock.
        peak_gb: the largest resident set of one of them, GiB.
    """

    cpu_seconds: float
    seconds: float
    peak_gb: float


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Cost:
    """Run a process to its end.

    Args:
        command: program and arguments.
        environment: its variables; None: those of this process. The checkout is on its path in either case.

    Raises:
        SystemExit: it failed; what it printed is shown.
    """
    variables = {**(os.environ if environment is None else environment), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as printed:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=variables)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            printed.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{printed.read().decode(errors='replace')}")
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return Cost(usage.ru_utime + usage.ru_stime, seconds, usage.ru_maxrss / unit)


def command_line(hide_numba: bool = False) -> list[str]:
    """Return how ``morphseek`` of this checkout is started."""
    return [sys.executable, "-c", HIDE] if hide_numba else [sys.executable, "-m", "MorphSeekLib.app.cli"]


def greedy_command(fixed: Path, moving: Path, folder: Path, threads: int) -> list[str]:
    """Return the process of greedy, which writes whole.nii.gz: affine from centers, NCC 2x2x2, 100x50x10."""
    return [sys.executable, "-c", GREEDY, str(fixed), str(moving), str(folder), str(threads)]


def fill_cache() -> None:
    """Compile the kernels of the fit, which would be counted else."""
    run([sys.executable, "-m", "MorphSeekLib.registration.compile_kernels"])
