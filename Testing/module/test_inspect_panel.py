"""The Inspect section, driven as a person does: choose, switch, type, click, export, close the scene in the middle."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
import slicer.util
import worlds
from MorphSeekGui import scene
from MorphSeekGui.engine_client import close_shared_client, shared_client

FOLDING = {"njd_percent": 0.085, "min_jacobian": -0.31, "max_jacobian": 3.1, "sdlogj": 0.6}
OVERLAP = {
    "dice": {
        "mean": {"input": 0.3, "aligned": 0.61, "warped": 0.74},
        "labels": {"3": {"input": 0.3, "aligned": 0.61, "warped": 0.74}},
    },
}


@pytest.fixture
def panel(stand_in):
    """The section alone, as the module's widget makes it; Register would start an engine for every test."""
    import ctk
    import qt
    from MorphSeekGui.inspect_panel import InspectPanel

    section = ctk.ctkCollapsibleButton()
    section.setLayout(qt.QVBoxLayout())
    panel = InspectPanel(section, SimpleNamespace(client=shared_client))
    panel.setMRMLScene(slicer.mrmlScene)
    stand_in.show(section)
    panel.enter()
    yield panel
    panel.cleanup()
    section.deleteLater()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The engine of these tests, which ends with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    close_shared_client()


@pytest.fixture
def ui(panel):
    return panel.ui


@pytest.fixture
def view(stand_in):
    return stand_in.open_views((200, 200))["Red"]


@pytest.fixture
def nodes(stand_in, tmp_path):
    return make_result(tmp_path / "one")


def make_result(folder, name: str = "M") -> scene.RegistrationNodes:
    """A registration that folds, in the scene."""
    folder.mkdir()
    world = worlds.make_world("upright")
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume(name, world.moving)
    for node in (fixed, moving):
        node.CreateDefaultDisplayNodes()
    return scene.create_nodes(folded_result(world, folder), fixed, moving)


def folded_result(world, folder) -> dict:
    """The worker's answer, some of its figures chosen."""
    result = worlds.result_of(world, folder)
    report = result["report"]
    return result | {"report": report | {"folding": report["folding"] | FOLDING} | OVERLAP}


def layers(view) -> tuple:
    c = view.composite
    return c.GetBackgroundVolumeID(), c.GetForegroundVolumeID(), c.GetForegroundOpacity()


def texts(table, column: int) -> list[str]:
    return [table.item(row, column).text() for row in range(table.rowCount)]


def row_of(table, label: str) -> int:
    return next(n for n, text in enumerate(texts(table, 0)) if label in text)


def type_into(table, row: int, column: int, text: str) -> None:
    """What a person does in a cell's editor."""
    table.item(row, column).setText(text)


def test_it_opens_empty_and_waits_for_a_result(panel, ui, tmp_path):
    assert not ui.showSection.enabled
    assert not ui.exportSection.enabled
    assert not ui.verdictLabel.isVisibleTo(panel.widget)
    slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode", "someone else's")
    assert ui.resultSelector.nodeCount() == 0
    nodes = make_result(tmp_path / "one")
    assert ui.resultSelector.nodeCount() == 1
    assert ui.resultSelector.currentNode() is None
    panel.show(nodes)
    assert ui.showSection.enabled
    assert ui.resultSelector.currentNode() is nodes.transform


def test_every_layer_is_a_switch_and_one_button_undoes_all(panel, ui, nodes, view, stand_in):
    other = worlds.add_volume("other", worlds.make_world("upright").moving)
    slicer.util.setSliceViewerLayers(background=other, foreground=nodes.fixed, foregroundOpacity=0.2)
    view.fit()
    before, picture, count = layers(view), view.draw(), slicer.mrmlScene.GetNumberOfNodes()
    panel.show(nodes)
    buttons = (
        ui.blendButton,
        ui.flickerButton,
        ui.checkerboardButton,
        ui.differenceBeforeButton,
        ui.differenceAfterButton,
        ui.jacobianButton,
    )
    seen = []
    for button in buttons:
        button.click()
        assert [b.checked for b in buttons].count(True) == 1
        seen.append(view.draw())
    for first in range(len(seen)):
        for second in range(first):
            assert not np.array_equal(seen[first], seen[second]), (first, second)
    ui.jacobianButton.click()
    assert layers(view) == before
    ui.checkerboardButton.click()
    ui.gridCheckBox.click()
    ui.grid3DCheckBox.click()
    ui.foldingCheckBox.click()
    assert nodes.folding.GetDisplayNode().GetVisibility()
    ui.restoreButton.click()
    assert layers(view) == before
    assert np.array_equal(view.draw(), picture)
    assert not any(b.checked for b in (*buttons, ui.gridCheckBox, ui.foldingCheckBox))
    assert slicer.mrmlScene.GetNumberOfNodes() <= count + 2  # color tables
    assert stand_in.take_errors() == []


def test_the_slider_fades_and_each_layer_keeps_its_own(panel, ui, nodes, view):
    panel.show(nodes)
    assert not ui.opacitySlider.isVisibleTo(panel.widget)
    ui.blendButton.click()
    assert ui.opacitySlider.isVisibleTo(panel.widget)
    ui.opacitySlider.value = 0.25
    assert layers(view) == (nodes.fixed.GetID(), nodes.warped.GetID(), 0.25)
    ui.jacobianButton.click()
    assert ui.opacitySlider.value == pytest.approx(0.6)
    assert layers(view)[1] == nodes.jacobian.GetID()
    assert ui.legendBar.isVisibleTo(panel.widget)
    ui.blendButton.click()
    assert layers(view)[2] == 0.25
    assert not ui.legendBar.isVisibleTo(panel.widget)


def estimated(nodes) -> scene.Estimate:
    """An error of 1 to 12 mm, worst at one corner."""
    warped = scene.read_volume(nodes.warped)
    bound = np.linspace(1, 12, warped.array.size, dtype=np.float32).reshape(warped.array.shape)
    colors = (1 + (bound > 4).astype(np.uint8) + (bound > 10)).astype(np.uint8)
    regions = [
        {"position": (warped.affine @ [*place, 1])[:3].tolist(), "bound_mm": mm, "mm3": 640.0, "color": 3}
        for place, mm in (((30, 35, 25), 11.4), ((8, 9, 7), 10.9))
    ]
    section = {"kind": "brain", "near_mm": 4.0, "far_mm": 10.0, "near_percent": 27.0, "far_percent": 18.0}
    section |= {"error_mm": {"median": 2.1, "p80": 6.5}, "regions": regions}
    place = warped.affine
    return scene.Estimate(scene.Image(bound, place), scene.Image(colors, place), section)


def test_an_estimated_error_that_comes_later_is_listed_and_a_click_goes_there(panel, ui, nodes, view):
    panel.show(nodes)
    assert not ui.trustButton.enabled
    assert ui.trustLabel.text == "The error of this result was not estimated."
    ui.blendButton.click()
    scene.add_estimate(nodes, estimated(nodes))
    panel.take_estimate(nodes)
    assert ui.blendButton.checked, "what is looked at stays"
    assert "usually below 2.1 mm, in 4 of 5 places below 6.5 mm." in ui.trustLabel.text
    assert texts(ui.trustTable, 1) == ["below 11.4 mm", "below 10.9 mm"]
    assert texts(ui.figuresTable, 1)[row_of(ui.figuresTable, "not to be relied on")].endswith("18")
    ui.trustTable.cellClicked(1, 0)
    corner = (scene.ijk_to_ras(nodes.warped) @ [8, 9, 7, 1])[:3]
    assert view.logic.GetSliceOffset() == pytest.approx(corner[2], abs=0.01)
    ui.trustButton.click()
    assert ui.legendLabel.text.startswith("Blue: likely within 4 mm. Yellow: 4 to 10 mm. Red: do not rely on this.")
    assert layers(view)[1] == nodes.trust_colors.GetID()
    assert scene.result_nodes(nodes.transform).trust is nodes.trust, "a scene that is loaded has it"
    scene.forget_estimate(nodes.transform)
    assert "was removed from the scene" in ui.messageLabel.text
    panel.show(scene.result_nodes(nodes.transform))
    assert not ui.trustButton.enabled


def test_flicker_takes_turns_until_the_module_is_left(panel, ui, nodes, view, stand_in):
    panel.show(nodes)
    ui.rateSlider.value = 3
    ui.flickerButton.click()
    seen = set()
    stand_in.wait(lambda: seen.add(layers(view)[2]) or seen == {0.0, 1.0})
    panel.exit()
    assert not ui.flickerButton.checked
    assert not panel._flicker.active
    assert layers(view)[1] is None


def test_sliders_redraw_when_they_come_to_rest(panel, ui, nodes, view, stand_in):
    panel.show(nodes)
    ui.checkerboardButton.click()
    view.fit()
    board = view.draw()
    ui.tileSlider.value = 5
    stand_in.wait(lambda: not np.array_equal(view.draw(), board))
    ui.gridCheckBox.click()
    assert ui.gridLabel.isVisibleTo(panel.widget)
    display = panel._views._twin.GetDisplayNode()
    assert display.GetGridSpacingMm() == ui.gridSpacingSlider.value
    ui.gridSpacingSlider.value = 7
    stand_in.wait(lambda: display.GetGridSpacingMm() == 7)
    assert not display.GetVisibility3D()
    assert display.GetRegionNode() is view.node
    ui.grid3DCheckBox.click()
    assert display.GetVisibility3D()


def test_folding_is_switched_in_slices_and_in_3d(panel, ui, nodes):
    panel.show(nodes)
    display = nodes.folding.GetDisplayNode()
    ui.foldingCheckBox.click()
    assert (display.GetVisibility(), display.GetVisibility3D()) == (1, 1)
    ui.folding3DCheckBox.click()
    assert (display.GetVisibility(), display.GetVisibility3D()) == (1, 0)
    ui.foldingCheckBox.click()
    assert not display.GetVisibility()


def test_figures_verdict_and_definition(panel, ui, nodes):
    panel.show(nodes)
    table = ui.figuresTable
    cells = nodes.report["folding"]["cells"]
    assert cells["folded"] > 0
    assert table.item(row_of(table, "Folded cells, %"), 1).text() == f"■ {cells['folded_percent']:.4g}"
    assert table.item(row_of(table, "NJD"), 1).text() == "0.085"
    assert table.item(row_of(table, "SDlogJ"), 1).text() == "▲ 0.6"
    assert table.item(row_of(table, "Smallest Jacobian"), 1).text() == "-0.31"
    assert ui.verdictLabel.text.startswith("■ Red")
    assert f"\n■ {cells['folded']} of {cells['cells']:,} cells fold" in ui.verdictLabel.text
    assert "Roughness (SDlogJ): 0.6 is above 0.5." in ui.verdictLabel.text
    assert "set them to linear" in ui.definitionLabel.text
    assert "Bernstein coefficients" in table.item(row_of(table, "Folded cells, %"), 1).toolTip()
    assert "Jacobian determinant is 0 or less" in table.item(row_of(table, "NJD"), 1).toolTip()
    structures = ui.structuresTable
    assert [structures.item(0, column).text() for column in range(4)] == ["3", "0.300", "0.610", "0.740"]


def test_limits_are_typed_kept_refused_and_set_back(panel, ui, nodes, stand_in):
    panel.show(nodes)
    table = ui.figuresTable
    row = row_of(table, "SDlogJ")
    type_into(table, row, 3, "0.7")
    assert table.item(row, 1).text() == "● 0.6"
    type_into(table, row, 4, "nonsense")
    assert ui.messageLabel.text == "'nonsense' is not a number; type one such as 0.5."
    assert table.item(row, 4).text() == "1"
    type_into(table, row, 4, "0.1")
    assert "Red must not lie below amber" in ui.messageLabel.text
    folded = row_of(table, "Folded cells, %")
    type_into(table, folded, 4, "50")
    type_into(table, row_of(table, "Largest folded"), 4, "5000")
    assert not ui.messageLabel.isVisibleTo(panel.widget)
    assert ui.verdictLabel.text.startswith("▲ Amber")

    again = type(panel)(panel.widget.parent(), None)  # as after a restart
    again.setMRMLScene(slicer.mrmlScene)
    again.show(nodes)
    assert again.ui.verdictLabel.text.startswith("▲ Amber")
    again.ui.defaultLimitsButton.click()
    assert again.ui.verdictLabel.text.startswith("■ Red")
    again.cleanup()


def test_cells_that_are_no_limits_cannot_be_edited(panel, ui, nodes):
    import qt

    panel.show(nodes)
    table = ui.figuresTable
    editable = {
        (row, column)
        for row in range(table.rowCount)
        for column in range(5)
        if table.item(row, column).flags() & qt.Qt.ItemIsEditable
    }
    names = ("Folded cells, %", "Largest folded", "SDlogJ", "Overlap after", "Overlap gained")
    names += ("Similarity gained", "Tissue not to be relied on")
    judged = {row_of(table, name) for name in names}
    assert editable == {(row, column) for row in judged for column in (3, 4)}


def test_a_click_goes_to_the_region(panel, ui, nodes, view):
    panel.show(nodes)
    table = ui.regionsTable
    assert table.rowCount == len(panel._regions) > 0
    folded = scene.read_labels(nodes.folding, nodes.fixed).array
    assert sum(int(text.replace(",", "")) for text in texts(table, 2)) == folded.sum()
    sizes = [float(text.replace(",", "")) for text in texts(table, 1)]
    assert sizes == sorted(sizes, reverse=True)
    last = table.rowCount - 1
    for row in (0, last):
        table.setCurrentCell(row, 0)
        region = panel._regions[row]
        assert view.logic.GetSliceOffset() == pytest.approx(region.position[2])
    view.logic.SetSliceOffset(0)
    table.cellClicked(last, 1)  # the same one again
    assert view.logic.GetSliceOffset() == pytest.approx(panel._regions[last].position[2])


def test_another_result_takes_its_place(panel, ui, nodes, view, tmp_path):
    panel.show(nodes)
    before = layers(view)
    ui.blendButton.click()
    other = make_result(tmp_path / "two", "N")
    panel.show(other)
    assert layers(view) == before
    assert not ui.blendButton.checked
    ui.blendButton.click()
    assert layers(view)[1] == other.warped.GetID()
    ui.resultSelector.setCurrentNode(None)
    assert layers(view) == before
    assert not ui.showSection.enabled


def test_one_more_step_in_the_same_nodes_is_looked_at_anew(panel, ui, nodes, tmp_path):
    panel.show(nodes)
    assert ui.verdictLabel.text.startswith("■ Red")
    (tmp_path / "more").mkdir()
    calm = worlds.result_of(worlds.make_world("upright", amplitude_mm=0.5), tmp_path / "more")
    names = ("warped", "transform", "jacobian", "folding", "inverse", "aligned", "warped_labels")
    before = slicer.mrmlScene.GetNumberOfNodes()
    into = {name: getattr(nodes, name) for name in names}
    panel.show(scene.create_nodes(calm, nodes.fixed, nodes.moving, into=into))
    assert slicer.mrmlScene.GetNumberOfNodes() == before
    assert ui.verdictLabel.text == "● Green: every figure is within its limits.\n● No fold: proven."
    assert ui.regionsLabel.text == "No folded region was found."


def test_a_result_of_an_earlier_version_is_not_called_free_of_folds(panel, ui, tmp_path):
    result = worlds.result_of(worlds.make_world("upright", amplitude_mm=0.5), tmp_path)
    result["report"] = {"folding": {"folded_voxels": 0, "njd_percent": 0.0, "sdlogj": 0.1, "definition": "J: old."}}
    world = worlds.make_world("upright")
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    panel.show(scene.create_nodes(result, fixed, moving))
    assert ui.verdictLabel.text.startswith("▲ Amber")
    assert "by central differences only" in ui.verdictLabel.text
    assert "lists no regions; register again" in ui.regionsLabel.text
    assert ui.definitionLabel.text == "J: old."


def test_a_longer_list_of_regions_is_counted(panel, ui, tmp_path):
    result = folded_result(worlds.make_world("upright"), tmp_path)
    result["report"]["folding"]["region_count"] = len(result["report"]["folding"]["regions"]) + 7
    world = worlds.make_world("upright")
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    panel.show(scene.create_nodes(result, fixed, moving))
    assert ui.regionsLabel.text.endswith("The 7 smallest are not listed.")


def test_transforms_of_a_scene_that_is_loaded_are_made_linear(panel, nodes, tmp_path):
    for node in (nodes.transform, nodes.inverse):
        storage = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformStorageNode")
        storage.SetFileName(str(tmp_path / f"{node.GetName()}.h5"))
        assert storage.WriteData(node)
        node.SetAndObserveStorageNodeID(storage.GetID())
    slicer.mrmlScene.SetURL(str(tmp_path / "scene.mrml"))
    slicer.mrmlScene.Commit()
    loaded = []
    slicer.mrmlScene.Clear(False)
    observer = slicer.mrmlScene.AddObserver(slicer.mrmlScene.EndImportEvent, lambda *_: loaded.append(modes()), 1.0)
    slicer.mrmlScene.Connect()
    slicer.mrmlScene.RemoveObserver(observer)
    assert loaded == [["Cubic", "Cubic"]], "as Slicer reads files"
    assert modes() == ["Linear", "Linear"]


def modes() -> list[str]:
    """How the scene's transform nodes interpolate."""
    count = slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLTransformNode")
    nodes = [slicer.mrmlScene.GetNthNodeByClass(n, "vtkMRMLTransformNode") for n in range(count)]
    grids = [node.GetTransformFromParentAs("vtkOrientedGridTransform", False) for node in nodes]
    return [grid.GetInterpolationModeAsString() for grid in grids]


def test_a_result_in_a_transform_that_the_person_chose(panel, ui, tmp_path):
    world = worlds.make_world("upright")
    chosen = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode", "mine")
    result = folded_result(world, tmp_path)
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    panel.show(scene.create_nodes(result, fixed, moving, into={"transform": chosen}))
    assert ui.resultSelector.currentNode() is chosen
    assert ui.showSection.enabled


def test_volumes_that_someone_else_shows_meanwhile_stay(panel, ui, nodes, view):
    panel.show(nodes)
    ui.blendButton.click()
    slicer.util.setSliceViewerLayers(background=nodes.moving, foreground=nodes.aligned)
    ui.restoreButton.click()
    assert layers(view)[:2] == (nodes.moving.GetID(), nodes.aligned.GetID())
    ui.jacobianButton.click()
    ui.jacobianButton.click()
    assert layers(view)[:2] == (nodes.moving.GetID(), nodes.aligned.GetID())


def test_parts_that_leave_the_scene(panel, ui, nodes, view, stand_in):
    panel.show(nodes)
    before = layers(view)
    ui.blendButton.click()
    ui.gridCheckBox.click()
    slicer.mrmlScene.RemoveNode(nodes.warped)
    assert layers(view) == before
    assert ui.messageLabel.text == "'M warped' was removed from the scene; choose another registration."
    assert not ui.showSection.enabled
    ui.resultSelector.setCurrentNode(None)
    ui.resultSelector.setCurrentNode(nodes.transform)
    assert "Not everything of this registration is left" in ui.messageLabel.text
    assert stand_in.take_errors() == []


def test_the_scene_closes_in_the_middle(panel, ui, nodes, view, stand_in, tmp_path):
    panel.show(nodes)
    ui.flickerButton.click()
    ui.gridCheckBox.click()
    ui.foldingCheckBox.click()
    slicer.mrmlScene.Clear(False)
    stand_in.process()
    assert not ui.showSection.enabled
    assert not panel._flicker.active
    assert panel._nodes is None
    panel.show(make_result(tmp_path / "after"))
    assert ui.showSection.enabled


def test_a_result_without_the_aligned_volume(panel, ui, nodes):
    slicer.mrmlScene.RemoveNode(nodes.aligned)
    panel.show(nodes)
    assert not ui.differenceBeforeButton.enabled
    ui.differenceAfterButton.click()
    assert ui.differenceAfterButton.checked


def test_a_refusal_is_a_sentence_and_the_switch_goes_back(panel, ui, nodes, view):
    panel.show(nodes)
    before = layers(view)
    slicer.util.updateVolumeFromArray(nodes.fixed, np.zeros((4, 5, 6), np.float32))
    ui.checkerboardButton.click()
    assert not ui.checkerboardButton.checked
    assert "'F' has changed its size" in ui.messageLabel.text
    assert layers(view) == before
    ui.blendButton.click()
    assert not ui.messageLabel.text


def test_a_transform_that_was_inverted_meanwhile(panel, ui, nodes, tmp_path):
    panel.show(nodes)
    nodes.transform.Inverse()
    count = slicer.mrmlScene.GetNumberOfNodes()
    ui.gridCheckBox.click()
    assert not ui.gridCheckBox.checked
    assert "'M to F' is no longer the transform that the registration made" in ui.messageLabel.text
    assert slicer.mrmlScene.GetNumberOfNodes() == count
    ui.folderButton.directory = str(tmp_path)
    ui.exportButton.click()
    assert "no longer the transform" in ui.exportLabel.text
    assert ui.exportButton.enabled


def test_export_through_the_real_worker(panel, ui, nodes, stand_in, tmp_path):
    panel.show(nodes)
    ui.exportSection.collapsed = False
    ui.folderButton.directory = str(tmp_path)
    ui.exportButton.click()
    assert not ui.exportButton.enabled
    assert ui.cancelExportButton.isVisibleTo(panel.widget)
    stand_in.wait(lambda: ui.exportButton.enabled)
    assert (tmp_path / "M to F" / "report.html").stat().st_size > 10_000
    assert "report.html" in ui.exportLabel.text
    assert not ui.cancelExportButton.isVisibleTo(panel.widget)

    for box in (ui.reportCheckBox, ui.transformCheckBox, ui.jacobianCheckBox):
        box.click()
    ui.exportButton.click()
    assert ui.exportLabel.text == "Choose what to export: report, transform or Jacobian."
    ui.jacobianCheckBox.click()
    ui.folderButton.directory = str(tmp_path / "gone")
    ui.exportButton.click()
    assert "Choose a folder that exists" in ui.exportLabel.text

    ui.reportCheckBox.click()
    ui.folderButton.directory = str(tmp_path)
    ui.exportButton.click()
    ui.cancelExportButton.click()
    stand_in.wait(lambda: ui.exportButton.enabled)
    assert ui.exportLabel.text == "Canceled; no file was written."
    assert not (tmp_path / "M to F 2").exists()


def test_cleanup_leaves_the_views_as_they_were(panel, ui, nodes, view, stand_in):
    panel.show(nodes)
    before = layers(view)
    ui.flickerButton.click()
    ui.foldingCheckBox.click()
    panel.cleanup()
    assert layers(view) == before
    slicer.mrmlScene.RemoveNode(nodes.warped)  # nobody listens any more
    assert stand_in.take_errors() == []


def test_the_module_hands_a_result_over(module, tmp_path):
    widget = module.representation.python
    nodes = make_result(tmp_path / "one")
    assert widget.ui.inspectSection.collapsed
    for function in widget.panels["register"].on_result:
        function(nodes)
    assert not widget.ui.inspectSection.collapsed
    assert widget.panels["inspect"].ui.resultSelector.currentNode() is nodes.transform
    assert widget.panels["inspect"].ui.verdictLabel.text.startswith("■ Red")


@pytest.mark.parametrize("what", ["folding", "grid"])
def test_what_is_first_shown_in_3d_is_looked_at(stand_in, panel, ui, nodes, what):
    """Slicer's camera looks at the world's origin, wherever the content is."""
    three_d = stand_in.open_3d_view()
    camera = three_d.renderer.GetActiveCamera()
    camera.SetPosition(0, 5000, 0)
    camera.SetFocalPoint(0, 4000, 0)
    panel.show(nodes)
    empty = three_d.draw()
    ui.gridCheckBox.checked = ui.foldingCheckBox.checked = False
    ui.grid3DCheckBox.checked = what == "grid"
    ui.folding3DCheckBox.checked = what == "folding"
    (ui.gridCheckBox if what == "grid" else ui.foldingCheckBox).click()
    stand_in.process()
    assert (three_d.draw() != empty).any(), "it is in the picture"
    if what == "grid":
        assert camera.GetDirectionOfProjection()[2] < -0.3, "an axial plane is not seen edge-on"
    camera.SetPosition(1, 2, 3)
    (ui.gridCheckBox if what == "grid" else ui.foldingCheckBox).click()
    (ui.gridCheckBox if what == "grid" else ui.foldingCheckBox).click()
    assert np.allclose(camera.GetPosition(), (1, 2, 3)), "later the camera is the user's"
