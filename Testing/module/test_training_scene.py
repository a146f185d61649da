"""Cases out of the scene and curves into it, on real MRML."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")

import slicer
import slicer.util
import worlds
from MorphSeekGui.scene import InputError
from MorphSeekGui.training_cases import export_cases, matching_cases
from MorphSeekGui.training_curves import CHARTS, TrainingCurves, has_curve, moving_mean

from MorphSeekLib.data.cases import check, find_cases
from MorphSeekLib.io.images import read_image, read_labels
from MorphSeekLib.space import geometry


@pytest.mark.parametrize("grid", worlds.GRIDS)
def test_cases_are_written_where_they_stand_in_the_world(mrml, tmp_path, grid):
    world = worlds.make_world(grid)
    labels = geometry.Volume(world.moving_labels, world.moving.grid)
    frame = worlds.linear_transform("frame")
    volume = worlds.add_volume("Patient / 1", world.moving, frame=frame)
    label_map = worlds.add_volume("Patient 1 label", labels, "vtkMRMLLabelMapVolumeNode", frame=frame)
    before = mrml.GetNumberOfNodes()
    copied = list(export_cases([(volume, label_map)], tmp_path))
    assert {part.name for part in copied} == {"Patient / 1"}
    assert copied[-1].share == 1
    assert mrml.GetNumberOfNodes() == before
    (case,) = find_cases(tmp_path).cases["training"]
    image, found = read_image(case.image), read_labels(case.label)
    assert image.grid.same_as(world.moving.grid, 1e-2)
    assert np.allclose(image.data, world.moving.data, atol=1e-3)
    assert np.array_equal(found.data, world.moving_labels)


def segmentation(name, volume, segments):
    """A segmentation node; ``segments`` maps a name to a label of the world's labels."""
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
    node.CreateDefaultDisplayNodes()
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    world = worlds.make_world("oblique")
    for segment, label in segments.items():
        mask = geometry.Volume((world.moving_labels == label).int(), world.moving.grid)
        part = worlds.add_volume(segment, mask, "vtkMRMLLabelMapVolumeNode")
        slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(part, node)
        node.GetSegmentation().GetNthSegment(node.GetSegmentation().GetNumberOfSegments() - 1).SetName(segment)
        slicer.mrmlScene.RemoveNode(part)
    return node


def test_segments_are_numbered_by_name_across_cases(mrml, tmp_path):
    world = worlds.make_world("oblique")
    volumes = [worlds.add_volume(f"V{n}", world.moving) for n in range(2)]
    cases = [
        (volumes[0], segmentation("S0", volumes[0], {"liver": 3, "spleen": 7})),
        (volumes[1], segmentation("S1", volumes[1], {"spleen": 7, "liver": 3})),
    ]
    list(export_cases(cases, tmp_path))
    values = json.loads((tmp_path / "dataset.json").read_text())
    assert values["labels"] == {"0": "background", "1": "liver", "2": "spleen"}
    one, two = (read_labels(case.label).data for case in find_cases(tmp_path).cases["training"])
    assert np.array_equal(one, two)
    report = check(find_cases(tmp_path))
    assert report.common == (1, 2)
    assert "same image as" in report.cases[1].problems[0]


def test_mixed_kinds_of_labels_are_refused(mrml, tmp_path):
    world = worlds.make_world("oblique")
    volume = worlds.add_volume("V", world.moving)
    labels = geometry.Volume(world.moving_labels, world.moving.grid)
    label_map = worlds.add_volume("L", labels, "vtkMRMLLabelMapVolumeNode")
    with pytest.raises(InputError, match="nothing says which labels belong together"):
        list(export_cases([(volume, label_map), (volume, segmentation("S", volume, {"a": 3}))], tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_names_that_belong_together(mrml):
    def add(kind, *names):
        return [mrml.AddNewNodeByClass(kind, name) for name in names]

    volumes = add("vtkMRMLScalarVolumeNode", "case_1", "case_2", "case_3", "case_4")
    labels = add("vtkMRMLLabelMapVolumeNode", "case_1-label", "case_3 seg", "case_3 mask")
    labels += add("vtkMRMLSegmentationNode", "Segmentation case_2")
    found = [(v.GetName(), n.GetName()) for v, n in matching_cases(volumes, labels)]
    assert found == [("case_1", "case_1-label"), ("case_2", "Segmentation case_2")]


def rows(count=60, every=20):
    rng = np.random.default_rng(0)
    for n in range(1, count + 1):
        row = {"iteration": n, "loss": 2 * 0.97**n + 0.1 * rng.random(), "reward": 0.01 * n, "reward_spread": 0.2}
        row |= {"kl": 1.0 + 1 / n}
        if n % every == 0:
            row |= {"validation/dice": 0.6 + 0.002 * n, "validation/dice_before": 0.5}
            row |= {"validation/njd_percent": 0.1, "validation/folded_percent": 0.3}
        yield row


def column(table, name):
    return slicer.util.arrayFromTableColumn(table, name)


def test_curves_are_tables_series_and_charts(mrml):
    before = mrml.GetNumberOfNodes()
    curves = TrainingCurves(mrml)
    assert curves.chart("loss") is None
    data = list(rows())
    assert [has_curve(name, data[:10]) for name in CHARTS] == [True] * 4 + [False] * 2
    curves.update("Liver", data[:10])
    assert curves.chart("dice") is None, "nothing was validated yet"
    curves.update("Liver", data)
    for name, (_figure, _axis, lines) in CHARTS.items():
        chart = curves.chart(name)
        assert chart.GetTitle() == "Liver"
        assert chart.GetNumberOfPlotSeriesNodes() == len(lines)
        for index, (wanted, *_rest) in enumerate(lines):
            series = chart.GetNthPlotSeriesNode(index)
            assert series.GetYColumnName() == wanted
            x, y = (column(series.GetTableNode(), c) for c in (series.GetXColumnName(), series.GetYColumnName()))
            assert len(x) == len(y) > 0
            assert x[-1] == 60
    table = curves.chart("loss").GetNthPlotSeriesNode(0).GetTableNode()
    assert np.allclose(column(table, "loss"), [row["loss"] for row in data])
    table = curves.chart("reward").GetNthPlotSeriesNode(0).GetTableNode()
    assert np.allclose(column(table, "reward high") - column(table, "reward low"), 0.4)
    table = curves.chart("dice").GetNthPlotSeriesNode(0).GetTableNode()
    assert column(table, "validation/dice iteration").tolist() == [20, 40, 60]
    curves.clear()
    assert table.GetNumberOfRows() == 0
    curves.remove()
    assert mrml.GetNumberOfNodes() == before


def test_a_figure_that_is_no_number_is_left_out(mrml):
    curves = TrainingCurves(mrml)
    curves.update("", [{"iteration": 1, "loss": float("nan")}, {"iteration": 2, "loss": 1.0}])
    table = curves.chart("loss").GetNthPlotSeriesNode(0).GetTableNode()
    assert column(table, "loss iteration").tolist() == [2]


def test_moving_mean():
    assert np.allclose(moving_mean(np.array([1.0, 3.0, 5.0, 7.0]), 2), [1, 2, 4, 6])
