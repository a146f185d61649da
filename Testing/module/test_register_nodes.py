"""register(): from nodes through a worker process to nodes, against a worker whose answer is known."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")

import slicer
import slicer.util
import torch
import vtk
import worlds
from MorphSeekGui import registration, scene
from MorphSeekGui.engine_client import EngineClient, EngineError
from MorphSeekGui.registration import InputError
from MorphSeekGui.views import displacement_of

from MorphSeekLib.measures import folds
from MorphSeekLib.space import geometry

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def client():
    os.environ["OMP_NUM_THREADS"] = "1"
    with EngineClient(command=[sys.executable, str(HERE / "trusting_worker.py")]) as client:
        yield client


@pytest.fixture
def register(client, application):
    def call(fixed, moving, **options):
        return registration.register(fixed, moving, client=client, **{"model": "trusting", **options})

    return call


@pytest.fixture
def pair(application):
    world = worlds.make_world("left-handed")
    return world, worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)


def under(transform_node, moving, onto) -> np.ndarray:
    """MRML's resampling of the moving volume under a transform (None: where it is) onto another volume."""
    if transform_node is not None:
        moving.SetAndObserveTransformNodeID(transform_node.GetID())
    out = slicer.vtkSlicerVolumesLogic.ResampleVolumeToReferenceVolume(moving, onto)
    return slicer.util.arrayFromVolume(out)


def assert_alike(found: np.ndarray, expected: np.ndarray, rim: float = 0.0) -> None:
    """Equal within 0.1 % of the range; ``rim`` is the share of voxels that may lie on the edge of the moving image,
    in by one account and out by the other."""
    assert expected.std() > 10, "an empty picture proves nothing"
    assert (np.abs(found - expected) > 1e-3 * np.ptp(expected)).mean() <= rim


def warp_node(world, fixed, moving, folder):
    """A non-linear transform node that does what the world's transform does."""
    folder.mkdir()
    nodes = scene.create_nodes(worlds.result_of(world, folder, inverse=False, labels=False), fixed, moving)
    return nodes.transform


def test_without_a_network_the_moving_volume_is_resampled_where_it_is(register, pair):
    _world, fixed, moving = pair
    seen = []
    nodes = register(fixed, moving, steps=2, align="rigid", device="cpu", on_progress=seen.append)
    assert_alike(slicer.util.arrayFromVolume(nodes.warped), under(None, moving, fixed))
    assert [p["phase"] for p in seen] == ["read", "write"]
    assert {k: nodes.report[k] for k in ("steps", "align", "device")} == {"steps": 2, "align": "rigid", "device": "cpu"}
    assert not Path(nodes.report["folder"]).exists(), "the private folder is gone"
    assert (nodes.fixed, nodes.moving, nodes.warped_labels) == (fixed, moving, None)
    assert nodes.inverse is not None, "as on every door"


@pytest.mark.parametrize("where", ["apart", "as parent", "above the parent"])
@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_an_initial_transform_comes_back_as_it_went_in(register, pair, tmp_path, kind, where):
    world, fixed, moving = pair
    if kind == "linear":
        initial = worlds.linear_transform("initial", (3, -5, 4), (4, -3, 5))
        initial.SetAndObserveTransformNodeID(worlds.linear_transform("outer", (0, 2, 0), (1, 1, 1)).GetID())
    else:
        initial = warp_node(world, fixed, moving, tmp_path / "warp")
    if where == "as parent":
        moving.SetAndObserveTransformNodeID(initial.GetID())
    elif where == "above the parent":
        parent = worlds.linear_transform("parent", (0, 0, 3), (2, 0, -1))
        parent.SetAndObserveTransformNodeID(initial.GetID())
        moving.SetAndObserveTransformNodeID(parent.GetID())
    else:
        moving.SetAndObserveTransformNodeID(None)
    nodes = register(fixed, moving, initial_transform_node=initial)
    warped = slicer.util.arrayFromVolume(nodes.warped)
    expected = under(initial if where == "apart" else None, moving, fixed)  # as the viewer saw it before
    assert_alike(warped, expected, rim=1e-3)
    # taken for the moving volume's only transform, the result gives the same once more
    assert_alike(under(nodes.transform, moving, fixed), warped, rim=1e-3)


def test_a_parent_that_mirrors_is_known_to_the_report_and_no_fold(register, pair):
    _world, fixed, moving = pair
    frame = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode", "mirror")
    mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
    slicer.util.updateTransformMatrixFromArray(frame, mirror)
    moving.SetIJKToRASMatrix(scene.to_vtk(mirror @ scene.ijk_to_ras(moving)))
    moving.SetAndObserveTransformNodeID(frame.GetID())
    nodes = register(fixed, moving)
    assert nodes.report["mirrored"] is True
    displacement = displacement_of(nodes.transform)
    array = torch.from_numpy(np.ascontiguousarray(displacement.array))
    transform = geometry.DenseTransform(array, geometry.Grid(array.shape[1:], displacement.affine))
    assert folds.certify(transform, transform.grid, nodes.report["mirrored"]).count.no_fold_proven is True
    assert folds.certify(transform, transform.grid).count.no_fold_proven is False


def test_a_parent_and_an_initial_transform_add_up(register, pair):
    _world, fixed, moving = pair
    parent, initial = (
        worlds.linear_transform("parent", (2, 1, 0)),
        worlds.linear_transform("initial", (0, 0, -3), (-5, 4, -8)),
    )
    moving.SetAndObserveTransformNodeID(parent.GetID())
    nodes = register(fixed, moving, initial_transform_node=initial)
    parent.SetAndObserveTransformNodeID(initial.GetID())
    warped = slicer.util.arrayFromVolume(nodes.warped)
    assert_alike(warped, under(None, moving, fixed), rim=1e-3)
    assert_alike(under(nodes.transform, moving, fixed), warped, rim=1e-3)


def test_a_fixed_volume_under_a_transform_stays_where_it_is_seen(register, application):
    world = worlds.make_world("oblique")
    frame = worlds.linear_transform("frame", scale=1.05)
    fixed = worlds.add_volume("F", world.fixed, frame=frame)
    moving = worlds.add_volume("M", world.moving, frame=worlds.linear_transform("other", (9, 9, 9)))
    nodes = register(fixed, moving, inverse=True)
    plain_fixed, plain_moving = worlds.add_volume("F0", world.fixed), worlds.add_volume("M0", world.moving)
    warped = slicer.util.arrayFromVolume(nodes.warped)
    assert_alike(warped, under(None, plain_moving, plain_fixed), rim=1e-3)
    assert_alike(under(nodes.transform, moving, nodes.warped), warped, rim=1e-3)
    point = nodes.transform.GetTransformFromParent().TransformPoint(world.fixed.grid.center * [-1, -1, 1])
    back = nodes.inverse.GetTransformFromParent().TransformPoint(point)
    assert np.allclose(back, world.fixed.grid.center * [-1, -1, 1], atol=0.05)


def test_labels_go_along(register, pair, tmp_path):
    world, fixed, moving = pair
    labels = geometry.Volume(world.moving_labels, world.moving.grid)
    on_fixed = geometry.resample(labels, world.fixed.grid, mode="nearest")
    fixed_labels = worlds.add_volume("FL", on_fixed, "vtkMRMLLabelMapVolumeNode")
    moving_labels = worlds.add_volume("ML", labels, "vtkMRMLLabelMapVolumeNode")
    nodes = register(fixed, moving, fixed_labels_node=fixed_labels, moving_labels_node=moving_labels)
    assert nodes.report["labels"] == [0, 3, 7]
    found = slicer.util.arrayFromVolume(nodes.warped_labels)
    assert (found != slicer.util.arrayFromVolume(fixed_labels)).mean() < 1e-3
    assert nodes.warped_labels.IsA("vtkMRMLLabelMapVolumeNode")


def test_errors_leave_the_scene_as_it_was(register, pair, mrml, tmp_path, monkeypatch):
    _world, fixed, moving = pair
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = mrml.GetNumberOfNodes()
    with pytest.raises(EngineError, match="There is no model 'brain-xr'; choose another one"):
        register(fixed, moving, model="brain-xr")
    with pytest.raises(InputError, match="Choose a fixed and a moving volume"):
        register(fixed, None)
    assert mrml.GetNumberOfNodes() == before
    assert not list(tmp_path.iterdir()), "no folder is left behind"


def test_a_volume_that_left_meanwhile_is_told(client, pair, mrml):
    _world, fixed, moving = pair
    job = registration.prepare(fixed, moving, registration.Request(model="trusting"))
    result = client.call("register", job.params)
    mrml.RemoveNode(moving)
    with pytest.raises(InputError, match="'M' was removed from the scene"):
        job.finish(result)
    assert not Path(job.folder.name).exists()


def test_points_agree_to_a_thousandth_of_a_millimeter(register, pair, tmp_path):
    world, fixed, moving = pair
    initial = warp_node(world, fixed, moving, tmp_path / "warp")
    nodes = register(fixed, moving, initial_transform_node=initial)
    index = np.random.default_rng(3).integers(1, np.array(world.fixed.grid.shape) - 1, (40, 3))
    points = geometry.apply_affine(world.fixed.grid.affine, index)
    expected = world.transform.map_points(points)
    through = nodes.transform.GetTransformFromParent()
    found = np.array([through.TransformPoint(p) for p in points * [-1, -1, 1]]) * [-1, -1, 1]
    assert np.abs(found - expected).max() < 1e-3
    assert isinstance(through, vtk.vtkAbstractTransform)
