"""The Register section, driven as a person does: the real module file, .ui, MRML and worker."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
import slicer.util
import vtk
import worlds
from MorphSeekGui import engine_client, models
from MorphSeekGui.scene import InputError

from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.verdict import folds
from MorphSeekLib.space import geometry

pytestmark = pytest.mark.usefixtures("kept_engine")
FOREIGN_PYTHON = sys.executable  # of no Slicer: it is read before a test is launched by Slicer's launcher


@pytest.fixture
def panel(module, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return slicer.modules.MorphSeekWidget.panels["register"]


@pytest.fixture
def ui(panel):
    return panel.ui


@pytest.fixture
def pair(panel, model):
    """Two volumes in the scene and a small model, chosen, and the preset that is done soonest."""
    world = worlds.make_world("oblique")
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    panel.ui.fixedSelector.setCurrentNode(fixed)
    panel.ui.movingSelector.setCurrentNode(moving)
    panel.refresh_models(model)
    panel.ui.presetSelector.currentText = "Fast"
    return SimpleNamespace(world=world, fixed=fixed, moving=moving)


def large(fixed):
    """The fixed volume on a grid three times as fine, so that a run takes some seconds."""
    affine = fixed.grid.affine @ np.diag([1 / 3, 1 / 3, 1 / 3, 1.0])
    return geometry.resample(fixed, geometry.Grid(tuple(3 * n for n in fixed.grid.shape), affine))


def scene_state() -> tuple:
    """The scene's nodes, and what the slice views show; the parameter node is the panel's own."""
    scene = slicer.mrmlScene
    nodes = [scene.GetNthNode(n) for n in range(scene.GetNumberOfNodes())]
    layers = [
        (n.GetBackgroundVolumeID(), n.GetForegroundVolumeID(), n.GetForegroundOpacity())
        for n in nodes
        if n.IsA("vtkMRMLSliceCompositeNode")
    ]
    places = [
        (n.GetFieldOfView(), n.GetXYZOrigin(), slicer.util.arrayFromVTKMatrix(n.GetSliceToRAS()).tolist())
        for n in nodes
        if n.IsA("vtkMRMLSliceNode")
    ]
    return sorted(n.GetID() for n in nodes), layers, places


def run(stand_in, panel) -> None:
    stand_in.wait(lambda: panel._run is None)


def test_two_volumes_are_enough(panel, ui):
    assert ui.registerButton.enabled is False
    assert ui.statusLabel.text == "Choose a fixed and a moving volume."
    world = worlds.make_world("upright")
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    ui.fixedSelector.setCurrentNode(fixed)
    ui.movingSelector.setCurrentNode(fixed)
    assert ui.registerButton.enabled is False
    assert "are the same" in ui.registerButton.toolTip
    ui.movingSelector.setCurrentNode(moving)
    assert ui.registerButton.enabled is True
    assert ui.modelSelector.currentText == "Automatic (by the images)"
    assert not ui.setupFrame.visible


def test_the_list_of_models_begins_with_the_images_and_with_no_model(panel, ui):
    texts = [ui.modelSelector.itemText(n) for n in range(ui.modelSelector.count)]
    assert texts[:2] == ["Automatic (by the images)", "No model (any anatomy)"]
    assert texts[2].startswith("Brain MR")
    for name, words in (("auto", "Takes the bundled model"), ("none", "Uses no network"), ("brain-mr", "14 cases")):
        panel.refresh_models(name)
        assert panel.logic.getParameterNode().model == name
        assert words in ui.cardLabel.text


def test_what_needs_a_certain_model_says_why_it_is_disabled(panel, ui):
    helps = {}
    for name, reason in (("brain-mr", "Number of steps"), ("auto", "chosen by the images"), ("none", "no steps")):
        panel.refresh_models(name)
        assert [w.enabled for w in (ui.stepsSpinBox, ui.stopEarlyCheckBox)] == [name == "brain-mr"] * 2
        helps[name] = ui.stepsSpinBox.toolTip
        assert reason in helps[name]
    assert ui.stopEarlyCheckBox.toolTip == ui.stepsLabel.toolTip == helps["none"]


def test_presets_are_for_a_fit(ui):
    assert ui.presetSelector.enabled is True
    ui.fitSelector.currentText = "Off"
    assert ui.presetSelector.enabled is False
    assert "switched off" in ui.presetSelector.toolTip


def test_the_choices_reach_the_engine(panel, ui, model):
    from MorphSeekGui.parameters import chosen_options

    panel.refresh_models(model)
    ui.stepsSpinBox.value = 4
    ui.stopEarlyCheckBox.checked = True
    ui.alignSelector.currentText = "Rigid"
    ui.presetSelector.currentText = "Fast"
    ui.searchSelector.currentText = "On"
    ui.fitSelector.currentText = "Off"
    ui.similaritySelector.currentText = "Two modalities (MIND)"
    node = panel.logic.getParameterNode()
    chosen = {"align": "rigid", "preset": "fast", "search": "on", "fit": "off", "similarity": "mind"}
    assert chosen_options(node) == RegistrationOptions(steps=4, stop_early=True, **chosen)
    for name in ("auto", "none"):
        panel.refresh_models(name)
        assert chosen_options(node) == RegistrationOptions(**chosen), "a network's choices are its own"


def test_a_scene_of_the_previous_version_opens(stand_in, panel, ui, pair, tmp_path):
    node = panel.logic.getParameterNode().parameterNode
    slicer.mrmlScene.SetURL(str(tmp_path / "scene.mrml"))
    for old, choices in (
        ({"alignment": "MODEL", "fit": "NO", "fitBy": "LNCC"}, ("Automatic", "Off", "Automatic")),
        ({"alignment": "RIGID", "fit": "IMAGE_GRID", "fitBy": "MIND"}, ("Rigid", "On", "Two modalities (MIND)")),
        ({"alignment": "AFFINE", "fit": "MODEL_GRID", "fitBy": "LNCC"}, ("Affine", "On", "Automatic")),
    ):
        for name, value in old.items():
            node.SetParameter(name, value)
        for name in ("preset", "search"):
            node.UnsetParameter(name)
        slicer.mrmlScene.Commit()
        slicer.mrmlScene.Clear(0)
        slicer.modules.MorphSeekWidget.enter()
        slicer.mrmlScene.Connect()
        slicer.modules.MorphSeekWidget.enter()
        shown = (ui.alignSelector, ui.fitSelector, ui.similaritySelector)
        assert tuple(box.currentText for box in shown) == choices
        assert (ui.presetSelector.currentText, ui.searchSelector.currentText) == ("Best", "Automatic")
        node = panel.logic.getParameterNode().parameterNode


def test_register_look_back_and_one_more_step(stand_in, panel, ui, pair):
    stand_in.open_views((120, 120))
    results, said, seen = [], [], []
    panel.on_result.append(results.append)
    hear, picture = panel._hear, panel._picture
    panel._hear = lambda message: (hear(message), said.append(ui.statusLabel.text))
    panel._picture = lambda row, image: (picture(row, image), seen.append((row, ui.stepLabel.text)))
    ui.alignSelector.currentText = "Nothing"
    ui.searchSelector.currentText = ui.fitSelector.currentText = "Off"
    ui.registerButton.click()
    assert ui.cancelButton.visible
    assert ui.settingsWidget.enabled is False
    run(stand_in, panel)
    steps = [text.partition(" (")[0] for text in said if text.startswith("Step ")]
    assert steps == ["Step 1 of 2", "Step 2 of 2"]
    assert seen == [(0, "Aligned"), (1, "Step 1"), (2, "Step 2")]
    assert ui.settingsWidget.enabled is True
    assert not ui.progressBar.visible
    [nodes] = results
    assert ui.statusLabel.text.startswith("Model: random.\nSimilarity ")
    assert folds(nodes.report).sentence in ui.statusLabel.text
    assert nodes.inverse is not None
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSequenceNode") == 1
    composite = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSliceCompositeNode")
    assert composite.GetBackgroundVolumeID() == pair.fixed.GetID()
    assert composite.GetForegroundVolumeID() == panel._steps.volume.GetID()

    def shown() -> np.ndarray:
        return slicer.util.arrayFromVolume(panel._steps.volume).copy()

    warped = slicer.util.arrayFromVolume(nodes.warped)
    assert np.array_equal(shown(), warped)
    ui.stepSlider.value = 0
    assert ui.stepLabel.text == "Aligned"
    in_place = slicer.vtkSlicerVolumesLogic.ResampleVolumeToReferenceVolume(pair.moving, pair.fixed)
    in_place = slicer.util.arrayFromVolume(in_place)
    in_place = np.where(in_place == 0, nodes.report["warped"]["outside"], in_place)  # MRML fills with 0
    assert (np.abs(shown() - in_place) > 1).mean() < 0.02
    ui.stepSlider.value = 2
    assert np.array_equal(shown(), warped)

    before = set(scene_state()[0])
    assert ui.moreButton.text == "One more step"
    ui.moreButton.click()
    run(stand_in, panel)
    assert [s["step"] for s in results[1].report["steps"]] == [0, 1, 2, 3]
    assert results[1].warped is nodes.warped, "the result's nodes are updated"
    assert results[1].folding is nodes.folding
    assert set(scene_state()[0]) == before
    assert ui.stepSlider.maximum == 3
    assert ui.stepLabel.text == "Step 3"
    assert np.array_equal(shown(), slicer.util.arrayFromVolume(nodes.warped))
    ui.initialSelector.setCurrentNode(worlds.linear_transform("other"))
    assert ui.moreButton.enabled is False, "from other inputs there is no further step"


def test_every_stage_is_seen_by_its_name(stand_in, panel, ui, pair):
    results, seen = [], []
    panel.on_result.append(results.append)
    picture = panel._picture
    panel._picture = lambda row, image: (picture(row, image), seen.append((row, ui.stepLabel.text)))
    assert ui.resultWidget.isHidden()
    ui.searchSelector.currentText = ui.fitSelector.currentText = "On"
    ui.similaritySelector.currentText = "Two modalities (MIND)"
    ui.stepsSpinBox.value = 1
    ui.registerButton.click()
    run(stand_in, panel)
    [nodes] = results
    rows = [row["stage"] for row in nodes.report["steps"]]
    assert rows == ["align", "search", "network", "fit"]
    assert (nodes.report["preset"], nodes.report["fit"]["similarity"]) == ("fast", "mind")
    assert seen[:2] == [(0, "Aligned"), (2, "Step 1")]
    answer = next(n for n, row in enumerate(nodes.report["steps"]) if row["answer"])
    assert seen[2:] == ([] if answer == 2 else [(answer, ["", "Search", "", "Fitted"][answer])])
    shown = slicer.util.arrayFromVolume(panel._steps.volume)
    assert answer != 3 or np.array_equal(shown, slicer.util.arrayFromVolume(nodes.warped))


def test_without_a_model_the_pair_can_be_fitted_longer(stand_in, panel, ui, pair):
    results = []
    panel.on_result.append(results.append)
    panel.refresh_models("none")
    ui.searchSelector.currentText = "On"
    ui.registerButton.click()
    run(stand_in, panel)
    assert ui.statusLabel.text.startswith("No model.\nSimilarity ")
    assert results[0].report["model"] is None
    assert ui.moreButton.text == "Fit longer"
    ui.moreButton.click()
    run(stand_in, panel)
    assert [row["stage"] for row in results[1].report["steps"]] == ["align", "search", "fit", "fit"]
    assert results[1].warped is results[0].warped, "the result's nodes are updated"


def test_a_model_chosen_by_the_images_is_named_with_its_reason(stand_in, panel, ui, pair):
    said = []
    hear = panel._hear
    panel._hear = lambda message: (hear(message), said.append(ui.statusLabel.text))
    panel.refresh_models("auto")
    ui.registerButton.click()
    run(stand_in, panel)
    first = ui.statusLabel.text.splitlines()[0]
    assert first.startswith("Model: none, as ")
    assert any(text.startswith(f"{first}\n") and "Similarity" not in text for text in said), "while it runs, too"


def test_a_model_that_knows_no_such_images_offers_to_go_without(stand_in, panel, ui, pair, model, tmp_path):
    from MorphSeekLib.networks import model_file

    card, network = model_file.read_card(model), model_file.load(model)[0]
    small = tmp_path / "small.safetensors"
    model_file.save(small, network, replace(card, preprocessing=replace(card.preprocessing, knows=(15.0, 16.0))))
    panel.refresh_models(str(small))
    ui.registerButton.click()
    run(stand_in, panel)
    assert "trained on objects of 15 to 16 mm" in ui.statusLabel.text
    assert "'No model (any anatomy)'" in ui.statusLabel.text
    assert not ui.noModelButton.isHidden()
    ui.noModelButton.click()
    run(stand_in, panel)
    assert ui.modelSelector.currentText == "No model (any anatomy)"
    assert ui.statusLabel.text.startswith("No model.")
    assert ui.noModelButton.isHidden()


def test_the_expected_time_of_each_preset_is_known_before_the_first_run(stand_in, panel, ui, pair):
    panel.enter()
    stand_in.wait(lambda: panel._estimates)
    assert re.fullmatch(r"Best: about \d+ s, Fast: about \d+ s", ui.expectedTimeLabel.text)
    ui.registerButton.click()
    run(stand_in, panel)
    estimates = next(iter(panel._estimates.values()))
    assert panel._expected.corrected(estimates["fast"]) == pytest.approx(panel._last[1].report["seconds"]["total"]), (
        "a run corrects what is estimated for others"
    )


def test_the_expected_time_of_a_preset_comes_from_earlier_runs(stand_in, panel, ui, pair):
    panel.refresh_models("none")
    assert ui.expectedTimeLabel.text == "no estimate yet"
    ui.registerButton.click()
    run(stand_in, panel)
    known = ui.expectedTimeLabel.text
    assert known.startswith("Best: no estimate yet, Fast: about ")
    ui.inverseCheckBox.checked = False
    assert ui.expectedTimeLabel.text == "no estimate yet", "of other choices"
    ui.inverseCheckBox.checked = True
    assert ui.expectedTimeLabel.text == known
    slicer.util.reloadScriptedModule("MorphSeek")
    again = slicer.modules.MorphSeekWidget.panels["register"].ui
    assert again.expectedTimeLabel.text == known, "it is kept for the next session"


def test_cancel_leaves_the_scene_as_it_was(stand_in, panel, ui, pair, monkeypatch):
    """Of a run with a long fit, so that it is cancelled long before its end."""
    monkeypatch.setattr(engine_client, "_CANCEL_PATIENCE", 300)  # on a busy machine, too, it gives in by itself
    stand_in.open_views((120, 120))
    ui.fixedSelector.setCurrentNode(worlds.add_volume("large", large(pair.world.fixed)))
    ui.fixedSelector.currentNode().CreateDefaultDisplayNodes()  # as every loaded volume has
    ui.stepsSpinBox.value = 8
    ui.fitSelector.currentText = "On"
    red = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSliceNode")
    red.SetFieldOfView(33.0, 33.0, 1.0)
    red.SetSliceOffset(7.5)
    before = scene_state()
    ui.registerButton.click()
    stand_in.wait(lambda: panel._steps is not None and panel._steps.count >= 2)
    assert scene_state() != before, "the stages are seen while it runs"
    assert (ui.resultWidget.isHidden(), ui.moreButton.isHidden()) == (False, True), "by their names"
    ui.cancelButton.click()
    assert ui.statusLabel.text == "Canceling ..."
    run(stand_in, panel)
    assert scene_state() == before
    assert ui.resultWidget.isHidden()
    assert ui.statusLabel.text == "Canceled; the scene is as it was."
    assert ui.registerButton.enabled is True
    assert panel.logic.client().running, "the engine stays for the next run"


@pytest.mark.usefixtures("own_engine")
def test_an_engine_that_dies_is_told_in_a_sentence(stand_in, panel, ui, pair):
    ui.fixedSelector.setCurrentNode(worlds.add_volume("large", large(pair.world.fixed)))
    before = scene_state()
    ui.registerButton.click()
    stand_in.wait(lambda: ui.statusLabel.text.startswith("Aligning"))
    panel.logic.client()._kill()
    run(stand_in, panel)
    assert ui.statusLabel.text.startswith("The engine was killed, most likely because memory ran out")
    assert scene_state() == before
    assert ui.registerButton.enabled is True


def test_chosen_outputs_take_the_result(stand_in, panel, ui, pair):
    taken = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "mine")
    ui.outputVolumeSelector.setCurrentNode(taken)
    ui.outputTransformSelector.addNode()
    ui.showStepsCheckBox.checked = False
    results = []
    panel.on_result.append(results.append)
    ui.registerButton.click()
    run(stand_in, panel)
    assert results[0].warped is taken
    assert results[0].transform is ui.outputTransformSelector.currentNode()
    assert taken.GetName() == "mine"
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSequenceNode") == 0
    ui.outputVolumeSelector.setCurrentNode(pair.moving)
    ui.registerButton.click()
    assert "'M' is an input of this registration and cannot take its result too" in ui.statusLabel.text


def test_closing_the_scene_in_the_middle(stand_in, panel, ui, pair):
    ui.registerButton.click()
    stand_in.wait(lambda: panel._steps is not None and panel._steps.count >= 1)
    slicer.mrmlScene.Clear(0)
    run(stand_in, panel)
    assert ui.statusLabel.text == "The scene was closed, so the registration was canceled."
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode") == 0
    assert ui.fixedSelector.currentNode() is None
    assert ui.registerButton.enabled is False
    world = worlds.make_world("upright")
    ui.fixedSelector.setCurrentNode(worlds.add_volume("F", world.fixed))
    ui.movingSelector.setCurrentNode(worlds.add_volume("M", world.moving))
    assert ui.registerButton.enabled is True, "the panel is of use again"


@pytest.mark.usefixtures("own_engine")
def test_reloading_the_module_in_the_middle_ends_the_engine(stand_in, module, panel, ui, pair):
    # long enough that a busy machine does not hear of the first step and of the end at once
    fixed = worlds.add_volume("large", large(pair.world.fixed))
    ui.fixedSelector.setCurrentNode(fixed)
    ui.stepsSpinBox.value = 8
    ui.registerButton.click()
    stand_in.wait(lambda: panel._steps is not None and panel._steps.count >= 1)
    process = panel.logic.client()._process
    slicer.util.reloadScriptedModule("MorphSeek")
    assert process.poll() is not None
    again = slicer.modules.MorphSeekWidget.panels["register"]
    assert again is not panel
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSequenceNode") == 0
    assert again.ui.fixedSelector.currentNode() is fixed, "what was chosen is kept in the scene"
    assert again.ui.registerButton.enabled is True


@pytest.fixture
def package():
    """Puts the package's modules back that other tests have imported."""
    packages = ("MorphSeekGui", "MorphSeekLib")
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in packages}
    yield
    sys.modules.update(kept)


@pytest.mark.usefixtures("own_engine")
def test_reload_reads_the_package_again(package, stand_in, module, panel):
    """Slicer's developer button reloads the module's file alone."""
    import MorphSeekGui.views as before

    slicer.modules.MorphSeekWidget.onReload()
    assert sys.modules["MorphSeekGui.views"] is not before
    again = slicer.modules.MorphSeekWidget.panels
    assert type(again["register"]).__module__ == "MorphSeekGui.register_panel"
    assert type(again["register"]) is sys.modules["MorphSeekGui.register_panel"].RegisterPanel


def test_old_figures_go_with_the_scene(stand_in, panel, ui, pair):
    ui.registerButton.click()
    run(stand_in, panel)
    assert "Similarity" in ui.statusLabel.text
    slicer.mrmlScene.Clear(0)
    stand_in.process()
    assert ui.statusLabel.text == "Choose a fixed and a moving volume."


def test_a_scene_that_is_loaded_while_the_panel_is_open_is_shown(stand_in, panel, ui, pair, tmp_path):
    for volume in (pair.fixed, pair.moving):
        storage = slicer.vtkMRMLNRRDStorageNode()
        slicer.mrmlScene.AddNode(storage)
        storage.SetFileName(str(tmp_path / f"{volume.GetName()}.nrrd"))
        volume.SetAndObserveStorageNodeID(storage.GetID())
        storage.WriteData(volume)
    slicer.mrmlScene.SetURL(str(tmp_path / "scene.mrml"))
    slicer.mrmlScene.Commit()
    slicer.mrmlScene.Clear(0)
    stand_in.process()
    assert ui.fixedSelector.currentNode() is None
    slicer.mrmlScene.Connect()
    stand_in.process()
    assert ui.fixedSelector.currentNode().GetName() == "F"
    assert ui.movingSelector.currentNode().GetName() == "M"
    assert panel.logic.getParameterNode().fixedVolume.GetName() == "F"
    assert ui.registerButton.enabled is True


def test_each_registration_has_a_folder_and_names_of_its_own(stand_in, panel, ui, pair):
    results = []
    panel.on_result.append(results.append)
    for _ in range(2):
        ui.registerButton.click()
        run(stand_in, panel)
    assert [nodes.warped.GetName() for nodes in results] == ["M warped", "M warped (2)"]
    assert [nodes.transform.GetName() for nodes in results] == ["M to F", "M to F (2)"]
    scene = slicer.mrmlScene
    names = [scene.GetNthNode(n).GetName() for n in range(scene.GetNumberOfNodes())]
    assert not [name for name in names if name.startswith(("M ", "F ")) and name.endswith("_1")]
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    for nodes in results:
        roles = (nodes.warped, nodes.aligned, nodes.jacobian, nodes.folding, nodes.transform)
        folders = {hierarchy.GetItemParent(hierarchy.GetItemByDataNode(node)) for node in roles}
        assert [hierarchy.GetItemName(folder) for folder in folders] == [nodes.transform.GetName()]
    steps = hierarchy.GetItemParent(hierarchy.GetItemByDataNode(panel._steps.sequence))
    assert hierarchy.GetItemName(steps) == "M to F (2)"
    ui.moreButton.click()
    run(stand_in, panel)
    children = vtk.vtkIdList()
    hierarchy.GetItemChildren(hierarchy.GetSceneItemID(), children, False)
    assert children.GetNumberOfIds() == 2, "a further step stays in its registration's folder"


class Pip:
    """An installation as Slicer does it, in the background; what it is told is kept."""

    def __init__(self, stand_in, monkeypatch, code: int = 0) -> None:
        import slicer.packaging
        from MorphSeekGui import dependencies

        self.stand_in, self.code, self.there, self.calls = stand_in, code, False, []
        self.numba_there, self.numba_code = True, 0
        monkeypatch.setattr(dependencies, "missing", lambda: [] if self.there else ["safetensors>=0.5"])
        checked = slicer.packaging.pip_check
        monkeypatch.setattr(
            slicer.packaging, "pip_check", lambda name: self.numba_there if name.startswith("numba") else checked(name)
        )
        monkeypatch.setattr(slicer.packaging, "pip_install", self.install)

    def install(self, requirements, constraints, blocking, show_progress, requester, logCallback, completedCallback):
        import qt

        held = Path(constraints).read_text(encoding="utf-8")
        self.calls.append((requirements, held))
        assert not blocking

        def work() -> None:
            logCallback(f"Collecting {requirements[0]}")
            if requirements[0].startswith("numba"):
                self.numba_there = self.numba_code == 0
                completedCallback(self.numba_code)
                return
            self.there = self.code == 0
            completedCallback(self.code)

        qt.QTimer.singleShot(20, work)


@pytest.mark.usefixtures("own_engine")
def test_first_run_asks_installs_and_goes_on(stand_in, panel, ui, pair, monkeypatch):
    pip = Pip(stand_in, monkeypatch)
    asked = []
    monkeypatch.setattr(slicer.util, "confirmOkCancelDisplay", lambda text, title=None, **_: asked.append(text) or True)
    panel.enter()
    assert not ui.setupFrame.isHidden()
    assert "safetensors" in ui.setupLabel.text
    results = []
    panel.on_result.append(results.append)
    ui.registerButton.click()
    assert ui.registerButton.enabled is False
    stand_in.wait(lambda: results)
    assert "Collecting safetensors" in ui.installLog.toPlainText()
    assert ui.setupFrame.isHidden()
    assert len(asked) == 1
    [(requirements, held)] = pip.calls
    assert requirements == ["safetensors>=0.5"]
    assert f"numpy=={np.__version__}\n" in held, "what is there is held at its version"
    assert "safetensors==" not in held


def test_declined_or_failed_is_a_clear_state(stand_in, panel, ui, pair, monkeypatch):
    pip = Pip(stand_in, monkeypatch, code=1)
    answers = [False, True]
    monkeypatch.setattr(slicer.util, "confirmOkCancelDisplay", lambda *_arguments, **_options: answers.pop(0))
    panel.enter()
    before = scene_state()
    ui.registerButton.click()
    assert ui.statusLabel.text.startswith("Nothing was installed.")
    assert ui.registerButton.enabled is True
    ui.installButton.click()
    stand_in.wait(lambda: not panel._installing)
    assert ui.statusLabel.text == "The packages could not be installed (pip ended with 1); the log says why."
    assert not ui.setupFrame.isHidden()
    assert scene_state() == before
    assert not pip.there


def test_the_optional_package_follows_what_is_needed(stand_in, panel, ui, monkeypatch):
    pip = Pip(stand_in, monkeypatch)
    pip.numba_there = False
    asked = []
    monkeypatch.setattr(slicer.util, "confirmOkCancelDisplay", lambda text, title=None, **_: asked.append(text) or True)
    panel.enter()
    ui.installButton.click()
    stand_in.wait(lambda: not panel._installing)
    assert "numba>=0.60 (optional: faster on the processor)" in asked[0]
    assert [requirements for requirements, _ in pip.calls] == [["safetensors>=0.5"], ["numba>=0.60"]]
    held = pip.calls[1][1]
    assert f"numpy=={np.__version__}\n" in held
    assert "--only-binary numba,llvmlite\n" in held
    assert pip.numba_there
    assert "numba>=0.60 is installed." in ui.installLog.toPlainText()


def test_a_refused_optional_package_is_a_line_in_the_log_and_not_tried_again(stand_in, panel, ui, monkeypatch):
    from MorphSeekGui import dependencies

    pip = Pip(stand_in, monkeypatch)
    pip.numba_there, pip.numba_code = False, 1
    monkeypatch.setattr(slicer.util, "confirmOkCancelDisplay", lambda *_arguments, **_options: True)
    panel.enter()
    ui.installButton.click()
    stand_in.wait(lambda: not panel._installing)
    assert ui.statusLabel.text == "All packages are installed."
    assert "numba>=0.60 could not be installed; MorphSeek works without it" in ui.installLog.toPlainText()
    assert dependencies.optional() == []
    pip.there = False
    ui.installButton.click()
    stand_in.wait(lambda: not panel._installing)
    assert [requirements[0] for requirements, _ in pip.calls] == ["safetensors>=0.5", "numba>=0.60", "safetensors>=0.5"]
    monkeypatch.setattr(dependencies.metadata, "version", lambda name: "99")
    assert dependencies.optional() == ["numba>=0.60"], "another numpy may allow it"


def test_an_optional_package_that_pip_cannot_even_look_for_is_no_error(stand_in, panel, monkeypatch):
    import slicer.packaging
    from MorphSeekGui import dependencies

    pip = Pip(stand_in, monkeypatch)
    pip.there, pip.numba_there = True, False

    def refuse(*_arguments, **_options) -> None:
        raise OSError("no network")

    monkeypatch.setattr(slicer.packaging, "pip_install", refuse)
    ended, log = [], []
    dependencies.install(log.append, ended.append)
    assert ended == [None]
    assert "no network" in log


def test_torch_comes_through_its_extension_alone(stand_in, panel, monkeypatch):
    from MorphSeekGui import dependencies

    monkeypatch.setattr(dependencies, "missing", lambda: ["torch>=2.4"])
    ended, log = [], []
    monkeypatch.setitem(sys.modules, "PyTorchUtils", None)
    dependencies.install(log.append, ended.append)
    assert "extension 'PyTorch', which is not installed" in str(ended[0])
    asked = {}

    class Logic:
        def installTorch(self, **options):  # noqa: N802
            asked.update(options)

    monkeypatch.setitem(sys.modules, "PyTorchUtils", SimpleNamespace(PyTorchUtilsLogic=Logic))
    dependencies.install(log.append, ended.append)
    assert isinstance(ended[1], dependencies.Declined)
    assert asked == {"askConfirmation": False, "torchVersionRequirement": ">=2.4"}


def test_models_of_a_folder_and_a_file_that_is_none(panel, ui, tmp_path, model):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "mine.safetensors").write_bytes(Path(model).read_bytes())
    (folder / "broken.safetensors").write_bytes(b"no model at all")
    ui.modelsFolderButton.directory = str(folder)
    texts = [ui.modelSelector.itemText(n) for n in range(ui.modelSelector.count)]
    assert texts[-2:] == ["broken", "random"]
    ui.modelSelector.currentIndex = texts.index("broken")
    assert "broken.safetensors is damaged or not a .safetensors file" in ui.cardLabel.text
    assert panel.logic.getParameterNode().model == str(folder / "broken.safetensors")
    assert ui.registerButton.enabled is False


def test_a_card_s_folded_cells_are_named_beside_its_njd(stand_in):
    mean = {"dice": 0.8, "njd_percent": 0.01}
    for figures, text in (
        (mean, "a: Dice 0.800, NJD 0.01 % by central differences (3 pairs)"),
        (mean | {"folded_percent": 0.2}, "a: Dice 0.800, folded cells 0.2 %, NJD 0.01 % by central differences"),
    ):
        card = {"results": {"a": {"pairs": 3, "mean": figures}}}
        assert text in models.describe(models.Model("m", Path("m.safetensors"), card))


def test_devices_are_asked_of_the_engine(stand_in, panel, ui):
    stand_in.wait(lambda: any("threads" in ui.deviceSelector.itemText(n) for n in range(ui.deviceSelector.count)))
    ui.deviceSelector.currentIndex = ui.deviceSelector.count - 1
    assert panel.logic.getParameterNode().device == "cpu"


@pytest.mark.usefixtures("own_engine")
def test_a_python_of_ones_own_runs_the_engine(stand_in, panel, ui):
    """It gets none of the variables that Slicer's launcher sets for Slicer's own."""
    stand_in.wait(lambda: panel._hello is None)
    ui.enginePythonEdit.currentPath = FOREIGN_PYTHON
    assert slicer.util.settingsValue("MorphSeek/EnginePython", "") == FOREIGN_PYTHON
    assert panel.logic.client().call("hello")["devices"]


@pytest.mark.usefixtures("own_engine")
def test_the_engines_python_can_be_emptied(stand_in, panel, ui):
    def chosen() -> str:
        return slicer.util.settingsValue("MorphSeek/EnginePython", "")

    for empty in (lambda: setattr(ui.enginePythonEdit, "currentPath", ""), ui.resetPythonButton.click):
        ui.enginePythonEdit.currentPath = FOREIGN_PYTHON
        assert chosen() == FOREIGN_PYTHON
        empty()
        assert chosen() == ui.enginePythonEdit.currentPath == ""
        assert not ui.resetPythonButton.enabled


@pytest.mark.usefixtures("own_engine")
def test_a_wrong_path_of_the_engines_python_is_said(stand_in, panel, ui, tmp_path):
    text = tmp_path / "notes.txt"
    text.touch()
    ui.advancedSection.collapsed = False
    ui.enginePythonEdit.currentPath = FOREIGN_PYTHON
    assert ui.enginePythonLabel.isHidden()
    for path, problem in (
        (tmp_path / "python", "There is no file"),
        (tmp_path, "is a folder; choose the Python program in it."),
        (text, "is not a program that can be run"),
    ):
        ui.enginePythonEdit.currentPath = str(path)
        assert not ui.enginePythonLabel.isHidden()
        assert problem in ui.enginePythonLabel.text
        assert f"The engine still runs with {FOREIGN_PYTHON}." in ui.enginePythonLabel.text
    assert panel.logic.engine_python() == FOREIGN_PYTHON
    ui.resetPythonButton.click()
    assert ui.enginePythonLabel.isHidden()


@pytest.mark.usefixtures("own_engine")
def test_a_program_that_is_no_python_is_said(stand_in, panel, ui, tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho this is no Python >&2\nexit 4\n")
    program.chmod(0o755)
    ui.enginePythonEdit.currentPath = str(program)
    stand_in.wait(lambda: "this is no Python" in ui.statusLabel.text)
    assert "exit code 4" in ui.statusLabel.text


def test_threads_are_kept_and_go_to_the_engine(stand_in, module, panel, ui, pair):
    assert ui.threadsSpinBox.text == "all"
    ui.threadsSpinBox.value = 3
    ui.registerButton.click()
    run(stand_in, panel)
    devices = panel.logic.client().call("hello")["devices"]
    assert devices[-1]["label"] == "CPU (3 threads)"
    assert slicer.util.settingsValue("MorphSeek/Threads", 0, converter=int) == 3


def test_the_settings_are_saved_with_the_scene(stand_in, panel, ui, pair, tmp_path):
    ui.stepsSpinBox.value = 4
    slicer.mrmlScene.SetURL(str(tmp_path / "scene.mrml"))
    slicer.mrmlScene.Commit()
    slicer.mrmlScene.Clear(0)
    slicer.modules.MorphSeekWidget.enter()
    assert ui.stepsSpinBox.value == 2
    slicer.mrmlScene.Connect()
    slicer.modules.MorphSeekWidget.enter()
    assert ui.stepsSpinBox.value == 4


def test_a_batch_of_a_script_goes_on_after_a_pair_that_fails(stand_in, panel, pair, model, tmp_path):
    told = []
    parent = worlds.linear_transform("frame", shift=(1.0, 0.0, 0.0))
    framed = worlds.add_volume("framed", pair.world.moving, frame=parent)
    pairs = [
        {"fixed_node": pair.fixed, "moving_node": pair.moving},
        {"fixed_node": pair.fixed, "moving_node": None},
        {"fixed_node": pair.fixed, "moving_node": framed, "steps": 2, "fit": "off"},
        {"fixed_node": pair.fixed, "moving_node": pair.moving, "device": "cpu"},
    ]
    choices = {"model": model, "steps": 1, "align": "none", "preset": "fast", "inverse": False, "device": "cpu"}
    outcomes = panel.logic.registerBatch(pairs, folder=tmp_path, on_outcome=told.append, **choices)
    assert [outcome.pair for outcome in outcomes] == pairs
    assert sorted(map(id, told)) == sorted(map(id, outcomes)), "each is told of once"
    assert [outcome.error[:8] for outcome in outcomes] == ["", "Choose a", "", "'device'"]
    taken = [[row["step"] for row in outcome.nodes.report["steps"] if "step" in row] for outcome in outcomes[::2]]
    assert max(taken[0]) == 1
    assert max(taken[1]) == 2
    first, framed_result = outcomes[0].nodes, outcomes[2].nodes
    assert (first.fixed, first.moving) == (pair.fixed, pair.moving)
    assert (outcomes[0].folder / "transform.h5").is_file()
    alone = panel.logic.register(pair.fixed, framed, **{**choices, "steps": 2, "fit": "off"})
    a, b = (slicer.util.arrayFromVolume(nodes.warped) for nodes in (framed_result, alone))
    assert np.abs(a - b).max() < 1e-2 * np.ptp(b)
    points = [
        np.array(nodes.transform.GetTransformFromParent().TransformPoint(10, 20, 60))
        for nodes in (framed_result, alone)
    ]
    np.testing.assert_allclose(*points, atol=0.05)


def test_self_test(stand_in, module):
    before = slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLDisplayableNode")
    module.python.runTest(msec=0)
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLDisplayableNode") == before
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode") == 0


def test_what_slicers_lists_say(module):
    assert module.title == "MorphSeek"
    assert module.categories == ["Registration"]
    assert "CVPR 2026" in module.helpText
    assert not module.icon.isNull()
    import SampleData

    source = SampleData.SampleDataLogic.sources[-1]
    assert source["nodeNames"] == ["MorphSeekFixed", "MorphSeekMoving"]
    for uri, checksum in zip(source["uris"], source["checksums"], strict=True):
        assert uri.endswith(checksum.removeprefix("SHA256:"))
        assert len(checksum) == len("SHA256:") + 64


def test_every_control_has_a_help_text(ui):
    import qt

    silent = []
    for name, widget in vars(ui).items():
        if isinstance(widget, (qt.QAbstractButton, qt.QComboBox, qt.QAbstractSpinBox, slicer.qMRMLNodeComboBox)):
            section = "Section" in name or name.startswith("qt_") or widget.parent().className().startswith("ctk")
            if not widget.toolTip and not section:
                silent.append(name)
    assert silent == []


def test_logic_refuses_in_one_sentence(panel):
    with pytest.raises(InputError, match="Choose a fixed and a moving volume"):
        panel.logic.register(None, None)
