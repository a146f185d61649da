"""What users of MorphSeek before the rooms kept, in today's module: a saved scene and a finished training.

Made by the code of commit 78e58be, see Testing/old_files/README.txt.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
import slicer.util
from MorphSeekGui import quality, scene
from MorphSeekGui.training_run import find_runs
from MorphSeekGui.training_texts import figures_table

pytestmark = pytest.mark.usefixtures("kept_engine")
OLD = Path(__file__).resolve().parents[1] / "old_files"
EXPECTED = json.loads((OLD / "scene" / "expected.json").read_text(encoding="utf-8"))
JUDGED = json.loads((OLD / "reports" / "judged.json").read_text(encoding="utf-8"))


@pytest.fixture
def loaded(stand_in, module, tmp_path):
    """The panels, once a copy of the scene of before is loaded."""
    return load(stand_in, tmp_path / "scene")


def load(stand_in, folder, model: str = "hippocampus-mr") -> dict:
    """Load a copy of the scene, with another model if one is given."""
    shutil.copytree(OLD / "scene", folder)
    file = folder / "scene.mrml"
    text = file.read_text(encoding="utf-8")
    assert text.count('"model hippocampus-mr"') == 1
    file.write_text(text.replace('"model hippocampus-mr"', f'"model {model}"'), encoding="utf-8")
    slicer.mrmlScene.SetURL(str(file))
    assert slicer.mrmlScene.Connect()
    stand_in.process()
    return slicer.modules.MorphSeekWidget.panels


def result() -> scene.RegistrationNodes:
    """The registration in the scene."""
    found = scene.result_nodes(slicer.util.getNode(EXPECTED["transform"]))
    assert found is not None
    return found


def test_every_choice_is_as_it_was(loaded):
    """None of them is at its default; what was fitted on two grids is fitted, by what was chosen."""
    p = loaded["register"].logic.getParameterNode()
    assert [p.alignment.name, p.fit.name, p.fitBy.name] == ["RIGID", "ON", "TWO_MODALITIES"]
    assert (p.model, p.device, p.steps) == ("hippocampus-mr", "cpu", 3)
    assert (p.stopEarly, p.inverse, p.showSteps) == (True, True, False)
    nodes = (p.fixedVolume, p.movingVolume, p.fixedLabels, p.movingLabels, p.initialTransform)
    assert [node.GetName() for node in nodes] == ["F", "M", "F segments", "M segments", "start"]
    assert [p.outputVolume.GetName(), p.outputTransform.GetName()] == ["M warped", "M to F"]


def test_every_choice_is_shown(loaded):
    ui = loaded["register"].ui
    texts = [ui.alignSelector.currentText, ui.fitSelector.currentText, ui.similaritySelector.currentText]
    assert texts == ["Rigid", "On", "Two modalities (MIND)"]
    assert ui.modelSelector.currentText.startswith("Hippocampus MR")
    assert ui.stepsSpinBox.value == 3
    assert ui.inverseCheckBox.checked
    assert ui.stopEarlyCheckBox.checked
    assert [ui.fixedSelector.currentNode().GetName(), ui.movingSelector.currentNode().GetName()] == ["F", "M"]
    assert ui.registerButton.enabled


def test_a_path_to_where_bundled_models_were_chooses_the_model_of_that_name(stand_in, module, tmp_path):
    path = "/opt/MorphSeek/Resources/Checkpoints/hippocampus-mr.safetensors"
    ui = load(stand_in, tmp_path / "scene", path)["register"].ui
    assert ui.modelSelector.currentText.startswith("Hippocampus MR")
    assert ui.stepsSpinBox.value == 3


def test_the_result_has_all_its_nodes(loaded):
    nodes = result()
    assert {role: getattr(nodes, role).GetName() for role in EXPECTED["roles"]} == EXPECTED["roles"]
    assert nodes.report == EXPECTED["report"]


def test_the_results_voxels_are_what_they_were(loaded):
    nodes = result()
    means = {role: slicer.util.arrayFromVolume(getattr(nodes, role)).mean() for role in EXPECTED["means"]}
    assert means == pytest.approx(EXPECTED["means"], rel=1e-6)
    values, counts = np.unique(slicer.util.arrayFromVolume(nodes.warped_labels), return_counts=True)
    assert dict(zip(map(str, values), counts, strict=True)) == EXPECTED["warped_labels"]


def test_the_results_transforms_lead_where_they_led(loaded):
    """And interpolate linearly, which Slicer's reader of files changes."""
    points, through, back = (np.array(p) for p in EXPECTED["points"])
    nodes = result()
    for node, expected in ((nodes.transform, through), (nodes.inverse, back)):
        transform = node.GetTransformFromParent()
        assert np.abs(np.array([transform.TransformPoint(p) for p in points]) - expected).max() < 1e-4
        grid = node.GetTransformFromParentAs("vtkOrientedGridTransform", False)
        assert grid.GetInterpolationModeAsString() == "Linear"


def test_the_result_is_inspected(loaded):
    panel = loaded["inspect"]
    panel.ui.resultSelector.setCurrentNode(slicer.util.getNode(EXPECTED["transform"]))
    assert panel.ui.showSection.enabled
    cells = EXPECTED["report"]["folding"]["cells"]
    assert cells["no_fold_proven"]
    assert "No fold: proven." in panel.ui.verdictLabel.text


def test_warped_labels_keep_their_names(loaded):
    """They were a label map with a color table; today they would be a segmentation."""
    names = scene.label_names(result().warped_labels)
    assert [names[1], names[2]] == ["shell", "core"]


def test_the_pair_is_registered_again_into_the_old_nodes(stand_in, loaded, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    panel, results = loaded["register"], []
    panel.on_result.append(results.append)
    panel.ui.fitSelector.currentText = "Off"
    panel.ui.registerButton.click()
    stand_in.wait(lambda: panel._run is None)
    [nodes] = results
    assert [nodes.warped.GetName(), nodes.transform.GetName()] == ["M warped", "M to F"]
    assert nodes.report["schema"] == 3
    assert isinstance(nodes.warped_labels, slicer.vtkMRMLSegmentationNode)


# ------------------------------------------------------------------------------------------------------------ reports


@pytest.mark.parametrize("name", JUDGED)
def test_the_figures_of_a_report_are_shown_as_before(name):
    report = json.loads((OLD / "reports" / f"{name}.json").read_text(encoding="utf-8"))
    judged = JUDGED[name]
    measured = quality.measure(report)
    since_then = {"folded_voxels", "similarity_change", "near_percent", "far_percent"}
    assert {figure.key for figure in measured} - set(judged["figures"]) == since_then
    assert {figure.text for figure in measured if figure.key in since_then - {"similarity_change"}} == {"–"}
    measured = [figure for figure in measured if figure.key not in since_then]
    assert {figure.key: figure.value for figure in measured} == judged["figures"]
    assert {figure.key: figure.text for figure in measured} == judged["texts"]
    regions = [[r.voxels, r.mm3, r.determinant, *r.position] for r in quality.folded_regions(report)]
    old = [[r["voxels"], r["mm3"], r["determinant"], *r["position"]] for r in judged["regions"]]
    assert regions == old
    assert [list(row) for row in quality.structures(report)] == judged["structures"]


# ------------------------------------------------------------------------------------------------- a finished training


def test_a_finished_training_is_found_with_its_figures(tmp_path):
    shutil.copytree(OLD / "run", tmp_path / "2026-11-27-blobs")
    [run] = find_runs(tmp_path)
    status, before = run.status(), json.loads((OLD / "run" / "status.json").read_text(encoding="utf-8"))
    assert (run.name, status.state, status.fraction) == ("Blobs of before", "done", 1.0)
    assert (status.held_out, status.model) == (before["held_out"], before["model"])
    table = figures_table(status.held_out, "green", "red")
    assert "2 held-out pairs" in table
    for name in ("dice", "hd95"):
        assert f"{before['held_out']['mean'][name]:.3g}"[:4] in table
        assert f"{before['held_out']['start'][name]:.3g}"[:4] in table


def test_a_finished_trainings_curves_are_read(tmp_path):
    shutil.copytree(OLD / "run", tmp_path / "run")
    [run] = find_runs(tmp_path)
    for stage in ("warmup", "finetune"):
        lines = (OLD / "run" / f"{stage}.safetensors.jsonl").read_text(encoding="utf-8").splitlines()
        assert run.curves(stage) == [json.loads(line) for line in lines]
        assert [row["iteration"] for row in run.curves(stage)] == [1, 2, 3, 4]
