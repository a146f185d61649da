"""The Fine-tune section as a person uses it: the real panel, the real engine, and tiny cases."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
import slicer.util
import worlds
from cases import blob_grid, blob_image, blob_labels, write_dataset
from MorphSeekGui.training_run import TrainingRun, create_run

from MorphSeekLib.app.runs import read_run
from MorphSeekLib.data.datasets import load_dataset
from MorphSeekLib.networks.model_file import read_card
from MorphSeekLib.protocol.options import TrainingOptions
from MorphSeekLib.protocol.settings import from_dict
from MorphSeekLib.training.warmup import TrainingConfig, warmup

pytestmark = pytest.mark.usefixtures("kept_engine")

MODULE = Path(__file__).resolve().parents[2] / "MorphSeek" / "MorphSeek.py"
FOREIGN_PYTHON = sys.executable  # of no Slicer: it is read before a test is launched by Slicer's launcher
PICTURES = os.environ.get("MORPHSEEK_PICTURES")  # a folder: pictures of the states, to be looked at
WARM = {
    "model": {"backbone_settings": {"encoder": [8, 8], "decoder": [8], "extra": [8], "flow_stride": 2}},
    "preprocessing": {"spacing": [2.5, 2.5, 2.5], "align": "center"},
    "training": {"iterations": 1, "steps": 1},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with cases, and a tiny model to start from."""
    folder = tmp_path_factory.mktemp("files")
    dataset = write_dataset(folder / "cases", 6)
    warmup(load_dataset(dataset), from_dict(TrainingConfig, WARM), folder / "tiny.safetensors")
    return folder


@pytest.fixture
def home(files, tmp_path, monkeypatch):
    """A person's folders, with the tiny model among the models."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    (tmp_path / "MorphSeek" / "Models").mkdir(parents=True)
    (tmp_path / "MorphSeek" / "Models" / "tiny.safetensors").write_bytes((files / "tiny.safetensors").read_bytes())
    return tmp_path / "MorphSeek"


@pytest.fixture
def panel(stand_in, home):
    """The section in the module's own panel; what runs at the end is killed."""
    slicer.app.userSettings().setValue("MorphSeek/Training", True)
    panel = open_module(stand_in)
    yield panel
    for folder in (home / "Trainings").glob("*"):
        TrainingRun(folder).kill()


def open_module(stand_in):
    """The module as Slicer opens it; its Fine-tune section."""
    module = stand_in.load_module(MODULE)
    module.widgetRepresentation().enter()
    return module.widgetRepresentation().python.panels["training"]


def picture(stand_in, panel, name):
    if PICTURES:
        widget = slicer.modules.morphseek.widgetRepresentation()
        widget.self().ui.registerSection.collapsed = True
        panel.parent.collapsed = False
        stand_in.grab(slicer.modules.morphseek.widgetRepresentation(), Path(PICTURES) / f"{name}.png", 480)
        # a second time: sections that have just opened have their size by then
        stand_in.grab(slicer.modules.morphseek.widgetRepresentation(), Path(PICTURES) / f"{name}.png", 480)


def check(stand_in, panel, folder=None):
    if folder is not None:
        panel.ui.casesFolder.directory = str(folder)
    panel.ui.checkButton.click()
    stand_in.wait(lambda: panel.ui.checkButton.text == "Check the cases")


def choose(panel, name="My organ", iterations=3, start="tiny", grpo=True, features=False):
    panel.ui.nameEdit.text = name
    panel.ui.startBox.setCurrentIndex(panel.ui.startBox.findText(start))
    panel.ui.featuresCheck.checked = features
    panel.ui.warmupCheck.checked = not grpo
    panel.ui.finetuneCheck.checked = grpo
    panel.ui.budgetUnit.setCurrentIndex(1)
    panel.ui.budgetBox.value = iterations
    panel.ui.stepsBox.value = 1
    panel.ui.deviceBox.setCurrentText("cpu")


def test_hidden_until_switched_on(stand_in, home, module):
    panel = module.widgetRepresentation().python
    section, switch = panel.ui.trainingSection, panel.panels["register"].ui.trainingCheckBox
    assert section.isHidden()
    switch.checked = True
    assert not section.isHidden()
    switch.checked = False
    assert section.isHidden()


def test_shown_in_developer_mode(stand_in, home):
    slicer.app.userSettings().setValue("Developer/DeveloperMode", True)
    assert not open_module(stand_in).parent.isHidden()


def test_from_cases_to_a_model_with_figures(stand_in, panel, files, home):
    """The whole way: check, start, watch the curves, get a model with its figures."""
    ui, made = panel.ui, []
    panel.on_model.append(made.append)
    assert not ui.startButton.enabled
    assert ui.startButton.toolTip == "Check the cases first."
    picture(stand_in, panel, "training-empty")
    check(stand_in, panel, files / "cases")
    assert ui.casesTable.rowCount == 6
    assert ui.casesTable.item(0, 3).text() == "24 x 28 x 20"
    assert "Labels in common: shell, core, ball." in ui.casesSummary.text
    assert ui.spacingBox.value == 2.0
    from cases import SHIPPED

    assert {ui.backboneBox.itemText(n) for n in range(ui.backboneBox.count)} == set(SHIPPED)
    assert ui.startButton.toolTip == "Give the new model a name."
    choose(panel)
    picture(stand_in, panel, "training-checked")
    ui.startButton.click()
    assert ui.stopButton.enabled
    assert not ui.resumeButton.enabled
    stand_in.wait(lambda: panel.run.status().state == "running")
    picture(stand_in, panel, "training-running")
    stand_in.wait(lambda: made)
    assert made == [home / "Models" / "My-organ.safetensors"]
    assert made[0].is_file()
    assert "Done." in ui.statusLabel.text
    assert (ui.progressBar.value, ui.stopButton.enabled, ui.resumeButton.enabled) == (1000, False, False)
    assert "2 held-out pairs" in ui.figuresText.text
    assert ui.startBox.findText("My-organ") >= 0
    assert (ui.startBox.currentText, ui.warmupCheck.checked) == ("tiny", False), "the list's renewal changes no choice"
    assert not panel._timer.active, "nobody looks at what is over"
    assert slicer.util.settingsValue("MorphSeek/ModelsFolder", "") == str(home / "Models")
    for index in range(ui.curveBox.count):
        ui.curveBox.setCurrentIndex(index)
        assert ui.plotButton.enabled, f"there is a curve of {ui.curveBox.currentText}"
    picture(stand_in, panel, "training-done")
    ui.advancedSection.collapsed = False
    picture(stand_in, panel, "training-advanced")

    # a second one of that name would replace it
    check(stand_in, panel)
    ui.startButton.click()
    assert "There is a model named 'My organ' already" in ui.statusLabel.text
    assert len(list((home / "Trainings").iterdir())) == 1


def test_every_setting_reaches_the_engine(stand_in, panel, files, home):
    check(stand_in, panel, files / "cases")
    choose(panel, start="from scratch")
    ui = panel.ui
    ui.warmupCheck.checked = ui.finalCheck.checked = True
    assert ui.backboneBox.enabled
    ui.klBox.value, ui.policyBox.value, ui.seedBox.value, ui.trajectoriesBox.value = 0.7, 0.25, 5, 4
    ui.featuresBox.value, ui.augmentationBox.value = 0.5, 0.25
    ui.similarityBox.setCurrentText("mind")
    run = create_run(home / "Trainings", panel.options())
    options, configs = read_run(run.folder / "run.json")  # the engine's own reading; an unknown key would be refused
    assert options == panel.options()
    first, then = configs["warmup"], configs["finetune"]
    assert first.preprocessing.spacing == (2.0, 2.0, 2.0)
    assert first.model.backbone == "voxelmorph"
    assert (first.loss.dice, first.loss.regularization) == (0, 1.0)
    assert (then.loss.dice, then.loss.regularization, then.loss.similarity) == (1.0, 1.0, "mind")
    assert (then.loss.features, then.training.augmentation) == (0.5, 0.25)
    assert tuple(configs) == ("warmup", "finetune", "final")
    assert (then.policy.weight, then.policy.trajectories) == (0.25, 4)
    assert (then.training.iterations, then.training.seed, then.training.kl_target) == (3, 5, 0.7)
    assert options.minutes is None
    ui.budgetUnit.setCurrentIndex(0)
    assert panel.options().minutes == 60


def test_the_panel_begins_with_the_defaults_of_the_engine(stand_in, panel, files):
    check(stand_in, panel, files / "cases")
    panel.ui.nameEdit.text = "a"
    options = panel.options()
    named = TrainingOptions(options.name, options.dataset, options.model)
    suited = named.suited(labeled=True)
    assert options == dataclasses.replace(suited, spacing=2.0), "the check suggests the spacing"


def test_features_are_learned_instead_of_a_network(stand_in, panel, files, home):
    check(stand_in, panel, files / "cases")
    choose(panel, name="Found", start="from scratch", features=True)
    ui, made = panel.ui, []
    panel.on_model.append(made.append)
    others = ui.warmupCheck, ui.finetuneCheck, ui.backboneBox, ui.policyBox
    assert not any(box.enabled for box in others)
    assert ui.finalCheck.enabled
    assert panel.options().stages == ("features",)
    picture(stand_in, panel, "training-features")
    ui.startButton.click()
    stand_in.wait(lambda: made)
    assert "2 held-out pairs" in ui.figuresText.text
    card = read_card(made[0])
    assert card.labels
    assert card.compare in ("features", "both", "intensities"), "the best on pairs of cases not trained on"
    rows = panel.run.curves("features")
    assert "loss" in rows[0]
    assert "validation/dice" in rows[-1]
    ui.startBox.setCurrentIndex(ui.startBox.findText("tiny"))
    assert not ui.featuresCheck.enabled, "a network is fine-tuned"
    assert ui.finetuneCheck.enabled


def test_stop_resume_and_stop_at_once(stand_in, panel, files):
    check(stand_in, panel, files / "cases")
    choose(panel, iterations=100_000)
    ui = panel.ui
    ui.startButton.click()
    stand_in.wait(lambda: len(panel.run.curves("finetune")) > 2)
    panel.refresh()
    assert "Fine-tuning: Iteration" in ui.statusLabel.text
    ui.stopButton.click()
    stand_in.wait(lambda: ui.resumeButton.enabled)
    assert ui.statusLabel.text == "Stopped; it can be resumed."
    picture(stand_in, panel, "training-stopped")
    done = len(panel.run.curves("finetune"))
    ui.resumeButton.click()
    stand_in.wait(lambda: len(panel.run.curves("finetune")) > done + 1)
    panel.run.kill()
    stand_in.wait(lambda: ui.resumeButton.enabled)
    assert "The training was interrupted" in ui.statusLabel.text


@pytest.mark.usefixtures("own_engine")
@pytest.mark.parametrize("keep", [True, False])
def test_slicer_closes_and_opens_again(stand_in, panel, files, home, keep):
    check(stand_in, panel, files / "cases")
    choose(panel, iterations=100_000)
    panel.ui.startButton.click()
    stand_in.wait(lambda: len(panel.run.curves("finetune")) > 2)
    panel.ui.keepCheck.click()  # asked for while it runs
    if not keep:
        panel.ui.keepCheck.click()
    run = panel.run
    stand_in.fresh()  # unloads the module: cleanup
    assert not panel._timer.active if panel._timer else True
    if not keep:
        stand_in.wait(lambda: not run.is_running())
    slicer.app.userSettings().setValue("MorphSeek/Training", True)
    again = open_module(stand_in)
    assert again.run.folder == run.folder
    assert again.ui.keepCheck.checked == keep
    if keep:
        assert again.ui.stopButton.enabled
        done = len(again.run.curves("finetune"))
        stand_in.wait(lambda: len(again.run.curves("finetune")) > done)
        again.ui.stopButton.click()
        stand_in.wait(lambda: again.ui.resumeButton.enabled)
    assert again.ui.resumeButton.enabled
    assert again.ui.statusLabel.text == "Stopped; it can be resumed."


def add_scene_cases(count=4):
    for seed in range(count):
        labels = blob_labels(seed, blob_grid())
        worlds.add_volume(f"case {seed}", blob_image(labels, seed))
        worlds.add_volume(f"case {seed} label", labels, "vtkMRMLLabelMapVolumeNode")


def test_cases_from_the_scene(stand_in, panel, home):
    ui = panel.ui
    ui.sourceBox.setCurrentIndex(1)
    assert ui.folderPage.isHidden()
    ui.checkButton.click()
    assert "The list has no case yet" in ui.casesSummary.text
    ui.addMatching.click()
    assert "No volume has labels of its name" in ui.casesSummary.text
    add_scene_cases()
    ui.caseVolume.setCurrentNode(slicer.util.getNode("case 1"))
    ui.caseLabels.setCurrentNode(slicer.util.getNode("case 1 label"))
    ui.addCase.click()
    ui.addMatching.click()
    assert ui.sceneCases.count == 4, "a case that is there is not added again"
    ui.sceneCases.setCurrentRow(0)
    ui.removeCase.click()
    ui.addMatching.click()
    assert ui.sceneCases.count == 4
    check(stand_in, panel)
    assert "Cases to train on: 3." in ui.casesSummary.text
    picture(stand_in, panel, "training-scene")
    choose(panel, iterations=2, grpo=False)
    check(stand_in, panel)
    ui.startButton.click()
    folder = panel.run.folder
    assert (folder / "cases" / "dataset.json").is_file()
    assert json.loads((folder / "run.json").read_text())["dataset"] == "cases"
    assert not list(folder.parent.glob(".cases-*")), "the copy for the check is gone"
    stand_in.wait(lambda: panel.run.status().state == "done")

    check(stand_in, panel)
    slicer.mrmlScene.RemoveNode(slicer.util.getNode("case 2"))
    ui.checkButton.click()
    assert "A case was removed from the scene" in ui.casesSummary.text
    assert not list(folder.parent.glob(".cases-*"))


def test_problems_are_listed_and_left_out(stand_in, panel, files, tmp_path):
    import shutil

    bad = tmp_path / "bad"
    write_dataset(bad, 6)
    (bad / "dataset.json").unlink()
    (bad / "image_5.nii.gz").write_text("no image")
    shutil.copy(bad / "image_0.nii.gz", bad / "image_4.nii.gz")
    check(stand_in, panel, bad)
    ui = panel.ui
    remarks = {ui.casesTable.item(row, 0).text(): ui.casesTable.item(row, 1).text() for row in range(6)}
    assert "same image as image_0.nii.gz" in remarks["image_4.nii.gz"]
    assert "image_5.nii.gz" in remarks["image_5.nii.gz"]
    assert remarks["image_1.nii.gz"] == "good"
    assert "Left out because of problems: 2." in ui.casesSummary.text
    picture(stand_in, panel, "training-problems")
    choose(panel)
    check(stand_in, panel)
    assert panel.options().leave_out == ("image_4.nii.gz", "image_5.nii.gz")
    for seed in range(3):
        (bad / f"label_{seed}.nii.gz").unlink()
    check(stand_in, panel)
    assert "1 of 4 usable cases have labels, and at least 3 must" in ui.casesSummary.text
    assert not ui.startButton.enabled
    check(stand_in, panel, tmp_path / "gone")
    assert "no file or folder" in ui.casesSummary.text


def test_a_check_can_be_cancelled(stand_in, panel, files):
    panel.ui.casesFolder.directory = str(files / "cases")
    panel.ui.checkButton.click()
    assert panel.ui.checkButton.text == "Cancel"
    panel.ui.checkButton.click()
    assert panel.ui.casesSummary.text == "The check was canceled."
    assert not panel.ui.startButton.enabled
    check(stand_in, panel)
    assert "Cases to train on" in panel.ui.casesSummary.text


@pytest.mark.usefixtures("own_engine")
def test_without_the_engine_it_says_what_to_do(stand_in, panel, files, monkeypatch):
    from MorphSeekGui import dependencies

    monkeypatch.setattr(dependencies, "missing", lambda: ["torch"])
    check(stand_in, panel, files / "cases")
    assert "press Install in the section Register" in panel.ui.casesSummary.text


def test_a_failed_training_says_why(stand_in, panel, files, home):
    check(stand_in, panel, files / "cases")
    choose(panel)
    panel.ui.deviceBox.setCurrentText("cuda:42")
    panel.ui.startButton.click()
    stand_in.wait(lambda: panel.ui.resumeButton.enabled)
    assert "cuda:42" in panel.ui.statusLabel.text
    assert "red" in panel.ui.statusLabel.styleSheet or "#be1414" in panel.ui.statusLabel.styleSheet
    assert "cuda:42" in panel.ui.logText.plainText


@pytest.mark.usefixtures("own_engine")
def test_a_python_of_ones_own_checks_and_trains(stand_in, panel, files):
    """It gets none of the variables that Slicer's launcher sets for Slicer's own."""
    slicer.app.userSettings().setValue("MorphSeek/EnginePython", FOREIGN_PYTHON)
    check(stand_in, panel, files / "cases")
    assert "Cases to train on" in panel.ui.casesSummary.text
    choose(panel, iterations=2)
    panel.ui.startButton.click()
    stand_in.wait(lambda: not panel.run.status().alive)
    assert panel.run.status().state == "done", panel.run.log()


@pytest.mark.usefixtures("own_engine")
def test_there_is_one_engine_and_it_follows_its_python(stand_in, panel, files, tmp_path):
    check(stand_in, panel, files / "cases")
    first = panel.logic.client()
    assert panel._client is first
    started = tmp_path / "started"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ntouch "{started}"\nexec "{FOREIGN_PYTHON}" "$@"\n')
    python.chmod(0o755)
    slicer.modules.MorphSeekWidget.panels["register"].ui.enginePythonEdit.currentPath = str(python)
    check(stand_in, panel)
    assert "Cases to train on" in panel.ui.casesSummary.text
    assert started.exists()
    assert not first.running
    assert panel._client is panel.logic.client()


def test_cases_of_the_scene_are_copied_in_pieces(stand_in, panel, home, monkeypatch):
    """The window answers between two pieces, shows how far it is, and can cancel."""
    from MorphSeekGui import nrrd, training_panel

    monkeypatch.setattr(nrrd, "_PIECE", 4000)
    monkeypatch.setattr(training_panel, "_MOMENT", 0.0)
    ui, shown, say = panel.ui, [], panel._checked.say

    def watch(text: str) -> None:
        say(text)
        if text.startswith("Copying case "):
            shown.append(ui.checkProgress.value)
            if len(shown) == 20:
                ui.checkButton.click()

    panel._checked.say = watch
    ui.sourceBox.setCurrentIndex(1)
    add_scene_cases()
    ui.addMatching.click()
    check(stand_in, panel)
    assert ui.casesSummary.text == "The check was canceled."
    assert len(shown) == 20
    assert sorted(set(shown)) == shown, "every piece is seen"
    assert 0 < shown[-1] < 1000
    choose(panel, grpo=False)
    check(stand_in, panel)
    assert "Cases to train on: 3." in ui.casesSummary.text
    copied = Path(panel._exported.name).stat().st_ino
    ui.startButton.click()
    assert (panel.run.folder / "cases").stat().st_ino == copied, "moved, not copied again"
    assert not list((home / "Trainings").glob(".cases-*"))


def test_a_training_that_cannot_start_keeps_the_copied_cases(stand_in, panel, home, monkeypatch):
    panel.ui.sourceBox.setCurrentIndex(1)
    add_scene_cases()
    panel.ui.addMatching.click()
    choose(panel, grpo=False)
    check(stand_in, panel)
    monkeypatch.setattr(panel.logic, "engine_python", lambda: "/no/such/python")
    panel.ui.startButton.click()
    assert "could not be started with '/no/such/python'" in panel.ui.statusLabel.text
    assert (Path(panel._exported.name) / "dataset.json").is_file()
    assert panel.ui.startButton.enabled


def test_curves_go_into_the_plot_view(stand_in, panel, files, home):
    layout = slicer.vtkMRMLLayoutNode()
    slicer.mrmlScene.AddNode(layout)
    view = stand_in.open_plot_view().node
    run = home / "Trainings" / "2026-01-01-old"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"name": "Old"}))
    rows = [{"iteration": n, "loss": 1 / n, "reward": 0.1, "reward_spread": 0.2, "kl": 1.0} for n in range(1, 50)]
    (run / "finetune.safetensors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, layouts = slicer.mrmlScene.GetNumberOfNodes(), slicer.app.layoutManager()
    layouts.setLayout(3)
    panel.find_runs()
    ui = panel.ui
    assert ui.runsBox.currentText == "Old  (2026-01-01-old)"
    assert slicer.mrmlScene.GetNumberOfNodes() == before, "nothing is put into the scene unasked"
    ui.plotButton.click()
    assert view.GetPlotChartNodeID() == panel._curves.chart("loss").GetID()
    assert panel._curves.chart("loss").GetTitle() == "Old, fine-tuning"
    ui.curveBox.setCurrentIndex(1)
    assert view.GetPlotChartNodeID() == panel._curves.chart("reward").GetID()
    table = panel._curves.chart("loss").GetNthPlotSeriesNode(0).GetTableNode()
    with (run / "finetune.safetensors.jsonl").open("a") as file:
        file.write(json.dumps(rows[-1] | {"iteration": 50}) + "\n")
    panel.refresh()
    assert table.GetNumberOfRows() == 50, "live"
    layouts.setLayout(30)  # as Slicer's layout follows the layout node
    ui.plotButton.click()
    assert slicer.mrmlScene.GetNumberOfNodes() == before
    assert layouts.layout == 3
    ui.curveBox.setCurrentIndex(4)
    assert not ui.plotButton.enabled, "nothing was validated"
    ui.curveBox.setCurrentIndex(0)
    ui.plotButton.click()
    slicer.mrmlScene.Clear()
    panel.refresh()  # a scene that was closed takes the charts along; they come again
    assert slicer.mrmlScene.IsNodePresent(panel._curves.chart("loss"))


def test_figures_say_what_got_better_and_what_worse(stand_in, panel):
    from MorphSeekGui.training_texts import figures_table

    start = {"dice": 0.7, "hd95": 3.0, "njd_percent": 0.1, "sdlogj": 0.2}
    mean = {"dice": 0.8, "hd95": 2.0, "njd_percent": 0.2, "sdlogj": 0.2, "dice_aligned": 0.5}
    inks = good, bad = "#0a7d32", "#a05f00"
    text = figures_table({"pairs": 4, "mean": mean, "start": start, "definitions": {"dice": "a < b"}}, *inks)
    rows = text.split("<tr>")[2:]
    assert good in rows[0]
    assert "0.500" in rows[0]
    assert "a &lt; b" in rows[0]
    assert good in rows[1]
    assert bad in rows[2]
    assert good not in rows[3]
    assert bad not in rows[3]
    assert ">-<" in figures_table({"pairs": 4, "mean": mean, "definitions": {}}, *inks)
    assert "Folded cells" not in text, "an earlier version's model has none"
    held_out = {"pairs": 4, "mean": mean | {"folded_percent": 1.25}, "start": start, "definitions": {}}
    text = figures_table(held_out, *inks)
    assert "Folded cells, %</td>" in text
    assert "1.250" in text


@pytest.mark.usefixtures("own_engine")
def test_no_process_is_left(stand_in, panel, files):
    """After the panel's cleanup neither the check's engine nor anything else of it runs."""
    check(stand_in, panel, files / "cases")
    client = panel.logic.client()
    assert client.running
    stand_in.fresh()
    stand_in.wait(lambda: not client.running)
