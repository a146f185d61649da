"""Fixtures of the Slicer module's tests: the module on the path, and a fresh MRML scene."""

from __future__ import annotations

import os
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
def quick_panel(module, world, monkeypatch):
    """The section Register with the two volumes of a test's world, to be aligned and hardly fitted."""
    import slicer
    import worlds

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    panel = slicer.modules.MorphSeekWidget.panels["register"]
    panel.ui.fixedSelector.setCurrentNode(worlds.add_volume("F", world.fixed))
    panel.ui.movingSelector.setCurrentNode(worlds.add_volume("M", world.moving))
    panel.refresh_models("none")
    panel.ui.fitSelector.currentText = panel.ui.searchSelector.currentText = "Off"
    return panel


class Engines:
    """Makes the engines of panels; one that a panel closed is given to the next, since starting one takes seconds."""

    def __init__(self) -> None:
        self._kind = self._kept = self._made_for = None

    def of(self, kind: type) -> Engines:
        """Make engines of a class; another one than before after the module was reloaded."""
        if kind is not self._kind:
            self.end()
        self._kind = kind
        return self

    def __call__(self, python=None, environment=None):
        variables = {**(os.environ if environment is None else environment), "PYTEST_CURRENT_TEST": ""}
        if self._kept is None or self._made_for != (python, variables) or not self._kept.running:
            self.end()
            self._kept, self._made_for = self._kind(python, environment=environment), (python, variables)
            self._kept.close = self._give_up
        return self._kept

    def _give_up(self, patience: float = 5.0) -> None:
        """End the requests as a closed engine does, but not the engine."""
        from MorphSeekGui.engine_client import Fault

        for request in list(self._kept._pending.values()):
            self._kept.cancel(request)
        self._kept._fail_pending(Fault.ENGINE_CLOSED)

    def end(self) -> None:
        """End the engine, and let it be closed as any other from now on."""
        engine, self._kept = self._kept, None
        if engine is not None:
            del engine.close
            engine.close()


@pytest.fixture(scope="module")
def engines():
    """What makes the engines of a file's tests."""
    engines = Engines()
    yield engines
    engines.end()


@pytest.fixture
def own_engine():
    """For a test of how the engine starts and ends, in a file that keeps it."""


@pytest.fixture
def kept_engine(request, engines, monkeypatch):
    """Keep the engine from test to test, for those of what panels show and do."""
    from MorphSeekGui import engine_client

    if "own_engine" not in request.fixturenames:
        monkeypatch.setattr(engine_client, "EngineClient", engines.of(engine_client.EngineClient))


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
