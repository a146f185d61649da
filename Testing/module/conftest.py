"""Fixtures of the Slicer module's tests: the module on the path, and a fresh MRML scene."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "MorphSeek"))


@pytest.fixture
def application():
    """A fresh scene with the application and module logics that Slicer would have (see offscreen.py)."""
    pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
    from offscreen import Application

    return Application()


@pytest.fixture
def mrml(application):
    """The fresh scene, which is slicer.mrmlScene too."""
    return application.scene
