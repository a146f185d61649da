"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

os.environ["MORPHSEEK_PRECISION"] = "float32"  # one result on every processor; what tests reduced precision unsets it
torch.set_num_threads(1)  # pytest-xdist runs one worker a core


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference tensors and real cases that lies beside the project where it is developed."""
    if not (SHARED / "fixtures").is_dir():
        pytest.skip("needs ../shared (fixtures and real cases of the development machines), which is not here")
    return SHARED


@pytest.fixture(scope="session")
def reference(shared: Path):
    """Loads ../shared/fixtures/NAME.pt: tensors that the official codes computed."""
    return lambda name: torch.load(shared / "fixtures" / f"{name}.pt", weights_only=True)
