"""A few kills with every run of the tests; ``python Testing/fuzz/kills.py`` does as many as you like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked and killed, as on Linux or macOS")
def test_killed_work_leaves_nothing_damaged_and_ends_as_if_it_had_not_been_killed():
    script = [sys.executable, ROOT / "Testing" / "fuzz" / "kills.py", "--count", "3", "--seed", "1"]
    script += ["--only", "register", "worker", "run"]  # a run warms up and fine-tunes
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "kept 3, damaged 0, leftover 0, differing 0"
