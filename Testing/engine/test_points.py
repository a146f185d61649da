"""Points in files, and in pairs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from MorphSeekLib.io.points import Points, pair_points, read_points, write_points
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space.geometry import Grid, apply_affine

GRID = Grid.from_parts((10, 12, 14), (1.0, 2.0, 3.0), [[0, -1, 0], [1, 0, 0], [0, 0, 1]], (5, 6, 7))
POINTS = Points(np.array([[1.5, -2.0, 30.25], [0.0, 12.0, -4.0]]), ("tip, left", "base"))
NAMES = ("a.csv", "b.csv")


def labeled(*labels: str) -> Points:
    return Points(np.arange(3.0 * len(labels)).reshape(-1, 3), labels)


@pytest.mark.parametrize("name", ["p.mrk.json", "p.fcsv", "p.csv"])
@pytest.mark.parametrize("axes", ["xyz", "ras", "ijk"])
def test_what_is_written_is_read_again(tmp_path, name, axes):
    write_points(Points(POINTS.positions, POINTS.labels, axes), tmp_path / name, GRID)
    read = read_points(tmp_path / name, GRID)
    np.testing.assert_allclose(read.positions, POINTS.positions, atol=1e-5)
    assert read.labels == POINTS.labels


def test_a_table_means_what_its_header_says(tmp_path):
    for header, values in (
        ("label,x,y,z", POINTS.positions),
        ("Label, R, A, S", POINTS.positions * (-1, -1, 1)),
        ("k,j,i,remark", None),
    ):
        if values is None:
            values = apply_affine(np.linalg.inv(GRID.affine), POINTS.positions)[:, ::-1]
            rows = [f"{','.join(map(repr, row.tolist()))},none" for row in values]
        else:
            rows = [f"n,{','.join(map(repr, row.tolist()))}" for row in values]
        (tmp_path / "p.csv").write_text("\n".join([header, *rows]), encoding="utf-8-sig")
        np.testing.assert_allclose(read_points(tmp_path / "p.csv", GRID).positions, POINTS.positions)


@pytest.mark.parametrize("system", ["LPS", "RAS", "0", "1"])
@pytest.mark.parametrize("name", ["p.mrk.json", "p.fcsv"])
def test_markups_lie_in_the_coordinate_system_of_their_file(tmp_path, name, system):
    write_points(POINTS, tmp_path / name, GRID)
    text = (tmp_path / name).read_text().replace("LPS", system)
    (tmp_path / name).write_text(text)
    sign = (-1, -1, 1) if system in ("RAS", "0") else (1, 1, 1)
    np.testing.assert_allclose(read_points(tmp_path / name, GRID).positions, POINTS.positions * sign, atol=1e-5)


@pytest.mark.parametrize("name", ["p.mrk.json", "p.fcsv"])
def test_slicer_reads_the_same_points(tmp_path, name):
    slicer = pytest.importorskip("slicer")
    write_points(POINTS, tmp_path / name, GRID)
    scene = slicer.vtkMRMLScene()
    node = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode")
    kind = "vtkMRMLMarkupsJsonStorageNode" if name.endswith("json") else "vtkMRMLMarkupsFiducialStorageNode"
    storage = scene.AddNode(getattr(slicer, kind)())
    storage.SetFileName(str(tmp_path / name))
    assert storage.ReadData(node)
    found = np.array([node.GetNthControlPointPosition(n) for n in range(node.GetNumberOfControlPoints())])
    np.testing.assert_allclose(found * (-1, -1, 1), POINTS.positions, atol=1e-5)
    assert [node.GetNthControlPointLabel(n) for n in range(2)][1] == "base"
    assert storage.WriteData(node)
    np.testing.assert_allclose(read_points(tmp_path / name, GRID).positions, POINTS.positions, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.csv", "1,2,3\n4,5,6", "has no header that says what its numbers are; begin it with a line label,x,y,z"),
        ("p.csv", "x,y,z,i,j,k\n1,2,3,4,5,6", "has no header"),
        ("p.csv", "x,y,z\n1,2", "the line '1,2' has 2 values"),
        ("p.csv", "x,y,z\n1,2,nan", "three finite numbers"),
        ("p.csv", "x,y,z\n", "holds no point"),
        ("p.fcsv", "# columns = id,x,y,z\n1,2,3,4\n", "does not say its coordinate system"),
        ("p.mrk.json", json.dumps({"markups": []}), "0 lists of points"),
        ("p.mrk.json", "{", "cannot be read"),
        (
            "p.mrk.json",
            json.dumps({"markups": [{"controlPoints": [{"positionStatus": "undefined"}]}]}),
            "point 1 is not placed",
        ),
        ("p.txt", "1 2 3", "holds no points that can be read"),
    ],
)
def test_a_file_that_says_too_little_is_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(MorphSeekError, match=words):
        read_points(tmp_path / name, GRID)


def test_pairs_are_by_label_where_all_points_have_one():
    pairs = pair_points(labeled("a", "b", "c"), labeled("c", "a", "b"), NAMES)
    assert pairs.labels == ("a", "b", "c")
    np.testing.assert_array_equal(pairs.moving[:, 0], [3, 6, 0])


@pytest.mark.parametrize("other", [("", "", ""), ("moving-1", "moving-2", "moving-3"), ("a", "", "b")])
def test_pairs_are_by_order_else(other):
    pairs = pair_points(labeled("a", "b", "c"), labeled(*other), NAMES)
    np.testing.assert_array_equal(pairs.moving[:, 0], [0, 3, 6])
    assert pairs.labels == ("a", "b", "c")


@pytest.mark.parametrize(
    ("fixed", "moving", "words"),
    [
        (("a", "b"), ("a",), "a.csv and b.csv hold 2 and 1 points"),
        (("a", "a"), ("a", "b"), "a.csv names two points 'a'"),
        (("a", "b"), ("b", "c"), "Only a.csv has a point named 'a'"),
    ],
)
def test_points_without_a_partner_are_refused(fixed, moving, words):
    with pytest.raises(MorphSeekError, match=words):
        pair_points(labeled(*fixed), labeled(*moving), NAMES)
