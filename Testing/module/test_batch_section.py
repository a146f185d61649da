"""The part Batch as a person uses it: the real panel, the real `morphseek batch` in its own process, tiny pairs."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
import slicer.util
import worlds
from cases import blob_grid, blob_image, blob_labels
from MorphSeekGui.batch_run import BatchRun, create_batch, find_batches, folder_rows, write_pairs
from MorphSeekGui.scene import result_nodes

from MorphSeekLib.io.images import write_image
from MorphSeekLib.space.geometry import Grid

MODULE = Path(__file__).resolve().parents[2] / "MorphSeek" / "MorphSeek.py"
FOREIGN_PYTHON = sys.executable  # of no Slicer: it is read before a test is launched by Slicer's launcher
PICTURES = os.environ.get("MORPHSEEK_PICTURES")  # a folder: pictures of the states, to be looked at
QUICK = {"search": "off", "fit": "off", "align": "none", "inverse": "false"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A person's folders; whatever still runs at the end is stopped."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield tmp_path
    for run in find_batches(tmp_path / "MorphSeek" / "Batches"):
        run.stop()


@pytest.fixture
def opened(stand_in, home):
    """The panels of the module."""
    return open_module(stand_in)


def open_module(stand_in) -> SimpleNamespace:
    """Open the module as Slicer does; the sections Register and Inspect, and the part Batch, opened."""
    module = stand_in.load_module(MODULE)
    stand_in.show(module.widgetRepresentation())
    module.widgetRepresentation().enter()
    panels = slicer.modules.MorphSeekWidget.panels
    register = panels["register"]
    register.ui.batchSection.collapsed = False
    batch = register.batch
    return SimpleNamespace(register=register, batch=batch, ui=batch.ui, inspect=panels["inspect"])


def choose_quick(register) -> None:
    """Choose what is done soonest."""
    register.refresh_models("none")
    p = register.logic.getParameterNode()
    for name, value in (("alignSelector", "Nothing"), ("searchSelector", "Off"), ("fitSelector", "Off")):
        getattr(register.ui, name).currentText = value
    p.inverse = False


def add_blobs(count: int) -> list:
    """Add volumes and their label maps, which are alike but for a shift."""
    nodes = []
    for seed in range(count):
        labels = blob_labels(seed, blob_grid())
        nodes.append(worlds.add_volume(f"case {seed}", blob_image(labels, seed)))
        worlds.add_volume(f"case {seed} label", labels, "vtkMRMLLabelMapVolumeNode")
    return nodes


def write_blobs(folder: Path, count: int, grid: Grid | None = None) -> list[Path]:
    """Write such images as files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"case{seed}.nii.gz" for seed in range(count)]
    for seed, path in enumerate(paths):
        write_image(blob_image(blob_labels(seed, grid or blob_grid()), seed), path)
    return paths


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def start_table(opened, table: Path) -> BatchRun:
    opened.ui.batchSourceBox.currentIndex = 1
    opened.ui.batchTableEdit.currentPath = str(table)
    opened.ui.startBatchButton.click()
    assert opened.ui.startBatchLabel.text == ""
    return opened.batch.run


def words(ui) -> dict[str, str]:
    """What the table says of each pair."""
    return {ui.rowsTable.item(row, 0).text(): ui.rowsTable.item(row, 1).text() for row in range(ui.rowsTable.rowCount)}


def row_of(ui, name: str) -> int:
    return next(row for row in range(ui.rowsTable.rowCount) if ui.rowsTable.item(row, 0).text() == name)


def ended(batch):
    return lambda: not batch.run.state().alive and not batch._timer.active


def picture(stand_in, name: str, width: int = 430) -> None:
    if PICTURES:
        for _twice in range(2):  # sections that have just opened have their size by then
            stand_in.grab(
                slicer.modules.morphseek.widgetRepresentation(), Path(PICTURES) / f"{name}-{width}.png", width
            )


def test_pairs_of_the_scene_are_registered_and_looked_at_after_a_restart(stand_in, opened, home):
    ui, register = opened.ui, opened.register
    fixed, *others = add_blobs(3)
    choose_quick(register)
    register.ui.estimateSelector.currentText = "On"
    register.ui.fixedSelector.setCurrentNode(fixed)
    ui.addAllButton.click()
    assert [ui.pairsTable.item(row, 1).text() for row in range(2)] == ["case 1", "case 2"]
    assert ui.pairsTable.item(0, 2).text() == "labels"
    ui.batchNameEdit.text = "My study"
    picture(stand_in, "batch-scene")
    ui.startBatchButton.click()
    stand_in.wait(lambda: opened.batch.run is not None)
    run = opened.batch.run
    assert run.folder.parent == home / "MorphSeek" / "Batches"
    assert run.folder.name.endswith("-My-study")
    stand_in.wait(ended(opened.batch))
    picture(stand_in, "batch-done")
    assert set(words(ui)) == {"case-1", "case-2"}
    assert all(text[0] in "●▲■" and ":" in text for text in words(ui).values()), "a sign and words, not color alone"
    assert ui.batchLabel.text.startswith("Done: 2 of 2 pairs.")
    assert float(ui.rowsTable.item(0, 2).text()) > 0.3
    assert ui.batchReportButton.enabled
    results = []
    register.on_result.append(results.append)
    ui.rowsTable.cellClicked(row_of(ui, "case-1"), 0)
    stand_in.wait(lambda: results)
    assert (results[0].fixed, results[0].moving) == (fixed, others[0]), "the volumes are in the scene already"
    ui.rowsTable.cellClicked(row_of(ui, "case-1"), 0)
    assert results[1].transform is results[0].transform, "nothing is loaded twice"
    warped = slicer.util.arrayFromVolume(results[0].warped).copy()
    colors = slicer.util.arrayFromVolume(results[0].trust_colors).copy()
    assert set(np.unique(colors)) - {0}, "its error was estimated"

    stand_in.fresh()  # Slicer is closed and opened again
    opened = open_module(stand_in)
    ui = opened.ui
    assert opened.batch.run.folder == run.folder
    assert len(words(ui)) == 2
    ui.rowsTable.cellClicked(row_of(ui, "case-1"), 0)
    stand_in.wait(lambda: opened.inspect._nodes is not None)
    nodes = opened.inspect._nodes
    assert nodes.moving.GetName() == "case-1"
    np.testing.assert_allclose(slicer.util.arrayFromVolume(nodes.warped), warped, atol=1e-3)
    assert np.array_equal(slicer.util.arrayFromVolume(nodes.trust_colors), colors)
    assert opened.inspect.ui.trustButton.enabled
    assert "Not a measurement" in opened.inspect.ui.trustLabel.text
    assert result_nodes(nodes.transform).warped_labels is not None
    assert slicer.util.getNodesByClass("vtkMRMLLabelMapVolumeNode"), "the labels of the fixed image come too"
    volumes = len(slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode"))
    ui.rowsTable.cellClicked(row_of(ui, "case-2"), 0)
    stand_in.wait(lambda: opened.inspect._nodes is not None and opened.inspect._nodes.moving.GetName() == "case-2")
    assert opened.inspect._nodes.fixed is nodes.fixed, "the template is loaded once"
    assert len(slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")) < 2 * volumes


def test_a_pair_that_fails_says_why_and_can_be_tried_again(stand_in, opened, home):
    first, second, third = write_blobs(home / "scans", 3)
    whole = third.read_bytes()
    third.write_bytes(b"no image")
    choose_quick(opened.register)
    ui = opened.ui
    ui.batchSourceBox.currentIndex = 2
    ui.batchTemplateEdit.currentPath = str(first)
    ui.batchImagesButton.directory = str(home / "scans")
    picture(stand_in, "batch-folder")
    ui.startBatchButton.click()
    stand_in.wait(ended(opened.batch))
    found = words(ui)
    assert set(found) == {second.name[:5], third.name[:5]}
    assert found["case2"].startswith("✕ Failed: ")
    assert row_of(ui, "case2") == 0, "the worst comes first"
    picture(stand_in, "batch-failed")
    picture(stand_in, "batch-failed", 570)
    ui.rowsTable.cellClicked(0, 0)
    assert "'case2' failed: " in ui.batchLabel.text
    assert ui.resumeBatchButton.text == "Try again"
    third.write_bytes(whole)
    ui.resumeBatchButton.click()
    stand_in.wait(ended(opened.batch))
    assert not any("Failed" in text for text in words(ui).values())
    assert not ui.resumeBatchButton.enabled


def test_canceled_continued_and_found_again_while_it_runs(stand_in, opened, home):
    small = write_blobs(home / "scans", 2)
    large = write_blobs(home / "large", 2, blob_grid((96, 112, 80), (0.5, 0.5, 0.625)))  # a minute, so that it is never
    pairs = [{"fixed": fixed, "moving": moving} for fixed, moving in (small, large)]  # done while Slicer starts again
    slow = {**QUICK, "fit": "on", "fit_iterations": "1000/1000/1000"}
    rows = [{"name": "quick", **pairs[0], **QUICK}, {"name": "slow", **pairs[1], **slow}]
    table = write_table(home / "pairs.csv", rows)
    opened.register.refresh_models("none")
    ui, run = opened.ui, start_table(opened, table)
    assert ui.stopBatchButton.enabled
    stand_in.wait(lambda: "waiting" not in words(ui)["quick"])
    assert words(ui)["slow"] == "… waiting"
    assert "1 of 2 pairs" in ui.batchLabel.text
    assert not ui.batchProgressBar.isHidden()
    picture(stand_in, "batch-running")
    assert ui.keepBatchCheck.checked

    stand_in.fresh()  # Slicer is closed, and opened again while the batch runs
    assert run.is_running()
    opened = open_module(stand_in)
    ui = opened.ui
    assert opened.batch.run.folder == run.folder
    assert ui.stopBatchButton.enabled
    assert "about" in ui.batchLabel.text, "the time that is left is known at once"
    ui.stopBatchButton.click()
    assert "Stopping" in ui.batchLabel.text or "Canceled" in ui.batchLabel.text
    stand_in.wait(ended(opened.batch))
    assert ui.batchLabel.text.startswith("Canceled after 1 of 2 pairs; it can be continued.")
    assert words(ui)["slow"] == "… waiting"

    rows = list(csv.DictReader((run.folder / "pairs.csv").open()))
    rows[1] |= QUICK | {"fit_iterations": ""}
    write_table(run.folder / "pairs.csv", rows)
    before = (run.folder / "quick" / "report.json").stat().st_mtime_ns
    assert ui.resumeBatchButton.text == "Go on"
    ui.resumeBatchButton.click()
    stand_in.wait(ended(opened.batch))
    assert ui.batchLabel.text.startswith("Done: 2 of 2 pairs.")
    assert (run.folder / "quick" / "report.json").stat().st_mtime_ns == before, "what is done is not done again"


def test_bad_input_is_refused_in_one_sentence(opened, home):
    ui = opened.ui

    def refusal(click) -> str:
        click.click()
        assert not list((home / "MorphSeek" / "Batches").glob("*")), "nothing is left of a batch that cannot start"
        return ui.startBatchLabel.text

    assert refusal(ui.addPairButton) == "Choose a fixed and another moving volume above first."
    assert refusal(ui.addAllButton) == "Choose a fixed volume above first."
    assert "list has no pair yet" in refusal(ui.startBatchButton)
    ui.batchSourceBox.currentIndex = 1
    assert refusal(ui.startBatchButton) == "Choose the table with the pairs first."
    ui.batchTableEdit.currentPath = str(write_table(home / "wrong.csv", [{"fixed": "a.nii", "other": "b.nii"}]))
    assert "has no column 'moving'" in refusal(ui.startBatchButton)
    ui.batchTableEdit.currentPath = str(write_table(home / "empty.csv", [{"fixed": "", "moving": ""}]))
    (home / "empty.csv").write_text("fixed,moving\n")
    assert refusal(ui.startBatchButton) == "There is no pair to register; add one first."
    ui.batchSourceBox.currentIndex = 2
    assert refusal(ui.startBatchButton) == "Choose the fixed image first."
    ui.batchTemplateEdit.currentPath = str(home / "no.nii")
    assert "no.nii; choose the fixed image." in refusal(ui.startBatchButton)
    ui.batchTemplateEdit.currentPath = str(home / "empty.csv")
    assert "Choose the folder" in refusal(ui.startBatchButton)
    ui.batchImagesButton.directory = str(home)
    assert "No file matches" in refusal(ui.startBatchButton)
    opened.batch.open_batch(home)
    assert "is not the folder of a batch" in ui.batchLabel.text


def test_a_volume_that_cannot_be_used_is_named(stand_in, opened, home):
    fixed, moving = add_blobs(2)
    moving.SetAndObserveImageData(None)
    opened.register.ui.fixedSelector.setCurrentNode(fixed)
    opened.register.ui.movingSelector.setCurrentNode(moving)
    opened.ui.addPairButton.click()
    opened.ui.startBatchButton.click()
    stand_in.wait(lambda: opened.batch._copying is None)
    assert "Pair 1, 'case 1': The volume 'case 1' is empty" in opened.ui.startBatchLabel.text
    assert not list((home / "MorphSeek" / "Batches").glob("*"))


def test_a_batch_of_the_command_line_is_watched_and_not_continued(opened, home):
    folder = home / "study"
    folder.mkdir()
    (folder / "batch.json").write_text("{}")
    figures = {"color": "amber", "verdict": "Amber.", "folded_percent": 0.01}
    lines = [
        {"name": "a", "state": "done", "key": "", "problem": "", "figures": figures},
        {"name": "b", "state": "failed", "key": "", "problem": "It is no image.", "figures": {}},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened.batch.open_batch(folder)
    assert words(opened.ui) == {"b": "✕ Failed: It is no image.", "a": "▲ Amber: have a look before you use it."}
    assert not opened.ui.resumeBatchButton.enabled
    assert "command line" in opened.ui.resumeBatchButton.toolTip
    opened.batch.find_runs()
    assert opened.batch.run.folder == folder, "it is remembered"


def test_a_folder_is_read_by_a_pattern_and_its_own_name_counts_as_it_is(home):
    paths = write_blobs(home / "scans [1]", 2)
    rows = folder_rows(paths[0], home / "scans [1]", "*.nii.gz")
    assert [row["moving"] for row in rows] == [str(paths[1])]


def test_a_process_that_cannot_begin_says_its_last_words(opened, home):
    batch = opened.batch
    run = create_batch(home, "x", opened.register.chosen_settings(), opened.register.chosen_start())
    write_pairs(run, [{"fixed": "a.nii", "moving": "b.nii"}])
    command = [FOREIGN_PYTHON, "-c", "import sys; sys.exit('no room')"]
    run.start(command=command, environment=slicer.util.startupEnvironment())
    run._process.wait()
    batch.open_batch(run.folder)
    batch._runs[0] = batch.run = run
    batch.refresh()
    assert opened.ui.batchLabel.text == "The batch could not begin; its log says: no room"
