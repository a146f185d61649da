"""register() with the engine's real worker and a small untrained model: from nodes to nodes, in earnest."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")

import slicer
import slicer.util
import worlds
from MorphSeekGui import engine_client, scene
from MorphSeekGui.engine_client import EngineCancelled, EngineClient, EngineError
from MorphSeekGui.registration import register

from MorphSeekLib.io import images
from MorphSeekLib.space import geometry


@pytest.fixture(scope="module")
def client():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with EngineClient() as client:
            client.call("hello")
            yield client


@pytest.mark.parametrize("name", sorted(worlds.GRIDS))
def test_applying_the_transform_node_gives_the_warped_node(application, client, model, name):
    world = worlds.make_world(name)
    frame, other = worlds.linear_transform("frame", (3, 0, 9)), worlds.linear_transform("other", (-4, 11, 2))
    fixed, moving = worlds.add_volume("F", world.fixed, frame=frame), worlds.add_volume("M", world.moving, frame=other)
    labels = geometry.Volume(world.moving_labels, world.moving.grid)
    moving_labels = worlds.add_volume("ML", labels, "vtkMRMLLabelMapVolumeNode")
    on_fixed = geometry.resample(labels, world.fixed.grid, world.transform, mode="nearest")
    fixed_labels = worlds.add_volume("FL", on_fixed, "vtkMRMLLabelMapVolumeNode")
    phases = []
    nodes = register(
        fixed,
        moving,
        model=model,
        device="cpu",
        align="none",
        fixed_labels_node=fixed_labels,
        moving_labels_node=moving_labels,
        inverse=True,
        client=client,
        on_progress=lambda p: phases.append(p["phase"]),
    )
    warped = slicer.util.arrayFromVolume(nodes.warped)
    moving.SetAndObserveTransformNodeID(nodes.transform.GetID())
    found = slicer.util.arrayFromVolume(
        slicer.vtkSlicerVolumesLogic.ResampleVolumeToReferenceVolume(moving, nodes.warped)
    )
    found = np.where(found == 0, nodes.report["warped"]["outside"], found)  # MRML fills with 0
    # where a point falls on the very edge of the moving image, it may be in by one account and out by the other
    assert (np.abs(found - warped) > 1e-3 * np.ptp(warped)).mean() < 1e-3
    assert nodes.report["displacement_mm"]["mean"] > 0.4, "the network moves something"
    assert nodes.report["folding"]["folded_voxels"] == (slicer.util.arrayFromVolume(nodes.jacobian) <= 0).sum()
    assert set(nodes.report["dice"]["labels"]) == {"3", "7"}
    assert nodes.inverse is not None
    assert set(phases) >= {"read", "load", "step", "resample", "metrics", "write"}
    assert scene.read_volume(nodes.warped_labels).array.shape == world.fixed.grid.shape


def test_the_engine_s_refusals_arrive_as_sentences(application, client, mrml):
    world = worlds.make_world("upright")
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    before = mrml.GetNumberOfNodes()
    with pytest.raises(EngineError, match="no-such-model"):
        register(fixed, moving, model="no-such-model", client=client)
    assert mrml.GetNumberOfNodes() == before


def test_cancel_in_the_midst_of_a_run(application, client, model, mrml, monkeypatch):
    """Of the longest fit there is: its phases tell that it was not finished."""
    monkeypatch.setattr(engine_client, "_CANCEL_PATIENCE", 300)  # on a busy machine, too, it is not killed
    world = worlds.make_world("oblique")
    onto, fine = world.fixed.grid, np.diag([1 / 3, 1 / 3, 1 / 3, 1.0])
    large = geometry.resample(world.fixed, geometry.Grid(tuple(3 * n for n in onto.shape), onto.affine @ fine))
    fixed, moving = worlds.add_volume("F", large), worlds.add_volume("M", world.moving)
    before, phases = mrml.GetNumberOfNodes(), []
    with pytest.raises(EngineCancelled):
        register(
            fixed,
            moving,
            model=model,
            device="cpu",
            align="affine",
            fit="on",
            fit_iterations=[1000, 1000],
            client=client,
            on_progress=lambda p: phases.append(p["phase"]),
            cancelled=lambda: "align" in phases,
        )
    assert not {"metrics", "write"} & set(phases)
    assert mrml.GetNumberOfNodes() == before
    assert client.running, "the worker gave in by itself and was not killed"


def load_volume(path):
    """A volume node as Slicer loads it from a file."""
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", path.name)
    storage = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLVolumeArchetypeStorageNode")
    storage.SetFileName(str(path))
    storage.SetCenterImage(False)
    assert storage.ReadData(node)
    node.SetAndObserveStorageNodeID(storage.GetID())
    return node


def test_a_file_that_states_two_places_is_said_and_the_result_has_its_number_type(application, client, model, tmp_path):
    world = worlds.make_world("upright")
    for name in ("fixed", "moving"):
        volume = getattr(world, name)
        stored = geometry.Volume(volume.data.round(), volume.grid, dtype="int16")
        images.write_image(stored, tmp_path / f"{name}.nii.gz")
    place = state_another_place(tmp_path / "fixed.nii.gz")
    fixed, moving = load_volume(tmp_path / "fixed.nii.gz"), load_volume(tmp_path / "moving.nii.gz")
    expected = images.read_image(tmp_path / "fixed.nii.gz")
    np.testing.assert_allclose(scene.read_volume(fixed).affine, expected.grid.affine, atol=1e-3)
    assert not np.allclose(expected.grid.affine, place, atol=1), "Slicer takes the form that ITK takes, the qform"
    nodes = register(fixed, moving, model=model, device="cpu", align="none", client=client)
    (warning,) = nodes.report["warnings"]
    assert warning["code"] == "nifti-forms"
    assert str(tmp_path / "fixed.nii.gz") in warning["message"]
    assert slicer.util.arrayFromVolume(nodes.warped).dtype == np.int16
    assert slicer.util.arrayFromVolume(nodes.aligned).dtype == np.int16


def state_another_place(path) -> np.ndarray:
    """Move the sform of a NIfTI file by 7 mm, with a code that ITK does not prefer; returns it, LPS."""
    sform = images.read_image(path).grid.affine
    sform[0, 3] += 7
    data = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<2h", data, 252, 1, 2)
    struct.pack_into("<12f", data, 280, *(np.diag([-1, -1, 1, 1]) @ sform)[:3].ravel())
    path.write_bytes(gzip.compress(bytes(data)))
    return sform
