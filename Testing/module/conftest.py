"""Fixtures of the Slicer module's tests: the module on the path, and a fresh MRML scene."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "MorphSeek"))


MODULE = Path(__file__).resolve().parents[2] / "MorphSeek" / "MorphSeek.py"


@pytest.fixture
def stand_in():
    """Slicer's application layer over PySide6 (Testing/SlicerStandIn), with a fresh scene. A test fails if a slot
    raised something that it did not expect."""
    pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
    pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")
    import SlicerStandIn

    application = SlicerStandIn.start()
    application.fresh()
    with application.qt.launcher.launched():
        yield application
        application.unload()
    assert application.take_errors() == []


@pytest.fixture
def module(stand_in):
    """The MorphSeek module, loaded and its panel open."""
    module = stand_in.load_module(MODULE)
    stand_in.show(module.widgetRepresentation())
    module.widgetRepresentation().enter()
    return module


@pytest.fixture
def application(request):
    """A fresh scene with the application and module logics that Slicer would have (see offscreen.py)."""
    pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
    if "stand_in" in request.fixturenames:
        return request.getfixturevalue("stand_in").world
    from offscreen import Application

    return Application()


@pytest.fixture
def mrml(application):
    """The fresh scene, which is slicer.mrmlScene too."""
    return application.scene


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A model whose network moves things by some millimeters, and closer."""
    import torch
    from cases import follow_forces

    from MorphSeekLib.networks import model_file
    from MorphSeekLib.networks.policy import ModelSettings, RegistrationModel
    from MorphSeekLib.space.preprocessing import Preprocessing

    torch.manual_seed(1)
    widths = {"encoder": (4, 4), "decoder": (4, 4), "extra": (8,), "forces": 2}
    network = RegistrationModel(ModelSettings(backbone_settings=widths))
    follow_forces(network.backbone, 0.6)
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    model_file.save(path, network, model_file.Card("random", preprocessing=Preprocessing(spacing=(2.5, 2.5, 2.5))))
    return str(path)
