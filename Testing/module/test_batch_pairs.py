"""Pairs of the scene as files of a batch: what the engine reads of them is what the nodes hold."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")

import slicer
import slicer.util
import worlds
from MorphSeekGui import scene
from MorphSeekGui.batch_pairs import PairWriter, ScenePair, as_pairs, shared_settings
from MorphSeekGui.registration import Request

from MorphSeekLib.io.images import read_image, read_labels
from MorphSeekLib.io.points import read_points
from MorphSeekLib.io.transforms import read_transform
from MorphSeekLib.protocol.batch import BatchSettings, plan
from MorphSeekLib.space.geometry import Volume


def written(tmp_path, pairs):
    shared = shared_settings([pair.request for pair in pairs])
    writer = PairWriter(tmp_path, shared)
    list(writer.write(pairs))
    return writer.exported, plan(writer.exported.rows, BatchSettings(shared.model, shared.options))


def test_everything_that_belongs_to_a_pair_is_written(mrml, tmp_path):
    world = worlds.make_world("left-handed")
    frame = worlds.linear_transform("frame")
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving, frame=frame)
    labels = Volume(world.moving_labels, world.moving.grid)
    label_node = worlds.add_volume("M label", labels, "vtkMRMLLabelMapVolumeNode", frame)
    points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    points.AddControlPoint(3.0, 4.0, 50.0, 'the "tip", left')
    start = worlds.linear_transform("start", shift=(2.0, 0.0, 1.0))
    request = Request(
        moving_labels_node=label_node, moving_mask_node=label_node, fixed_landmarks_node=points,
        moving_landmarks_node=points, initial_transform_node=start,
    )  # fmt: skip
    exported, [pair] = written(tmp_path, [ScenePair(fixed, moving, request)])
    assert pair.problems == ()
    image = read_image(pair.files["moving"])
    np.testing.assert_allclose(image.grid.affine, world.moving.grid.affine, atol=1e-4)
    np.testing.assert_allclose(image.data, world.moving.data, rtol=1e-5)
    np.testing.assert_array_equal(read_labels(pair.files["moving_labels"]).data, world.moving_labels)
    np.testing.assert_array_equal(read_labels(pair.files["moving_mask"]).data, world.moving_labels != 0)
    found = read_points(pair.files["fixed_landmarks"], image.grid)
    assert found.labels == ('the "tip", left',)
    np.testing.assert_allclose(found.positions, [[-3.0, -4.0, 50.0]])
    matrix = read_transform(pair.inputs()[2], world.fixed.grid)
    np.testing.assert_allclose(matrix, scene.read_transform(start, scene.read_volume(fixed)), atol=1e-6)
    assert all(source.is_unchanged() for source in exported.sources[pair.name])
    frame.ApplyTransformMatrix(scene.to_vtk(np.diag([1.0, 1.0, 1.1, 1.0])))
    assert not exported.sources[pair.name][1].is_unchanged()


def test_an_initial_displacement_is_written_as_a_field(mrml, tmp_path):
    world = worlds.make_world("oblique")
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode", "start")
    field = scene.Image(world.transform.displacement.numpy(), world.transform.grid.affine)
    node.SetAndObserveTransformFromParent(scene.grid_transform(field))
    _exported, [pair] = written(tmp_path, [ScenePair(fixed, moving, Request(initial_transform_node=node))])
    found = read_transform(pair.files["initial_transform"], world.fixed.grid)
    expected = scene.read_transform(node, scene.read_volume(fixed))
    np.testing.assert_allclose(found.displacement, expected.array, atol=1e-3)


def test_a_template_is_written_once_and_pairs_have_names_of_their_own(mrml, tmp_path):
    world = worlds.make_world("upright")
    fixed = worlds.add_volume("atlas", world.fixed)
    others = [worlds.add_volume("scan", world.moving) for _ in range(2)]
    choices = [{"fixed_node": fixed, "moving_node": others[0]}, {"fixed_node": fixed, "moving_node": others[1]}]
    pairs = as_pairs([choices[0], {**choices[1], "steps": 3, "fit_iterations": (5, 6, 7)}], {"inverse": False})
    exported, planned = written(tmp_path, pairs)
    assert [pair.name for pair in planned] == ["scan", "scan-2"]
    assert len({row["fixed"] for row in exported.rows}) == 1
    assert [pair.settings.options for pair in planned] == [pair.request.options for pair in pairs]
    [refused] = as_pairs([choices[0]], {"into": {}})
    assert refused == "'into' cannot be chosen for a pair of a batch; leave it out."
