"""Export from nodes through the real worker to files, and every refusal."""

from __future__ import annotations

import os
import tempfile

import numpy as np
import pytest
import torch

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")

import SimpleITK as sitk
import slicer.util
import worlds
from MorphSeekGui import scene
from MorphSeekGui.engine_client import EngineCancelled, EngineClient
from MorphSeekGui.export import export
from MorphSeekGui.scene import InputError

from MorphSeekLib.io import images, transforms
from MorphSeekLib.space import geometry

UNKNOWN = {"kind": None, "title": None, "near_mm": None, "far_mm": None, "near_percent": 100.0, "far_percent": 0.0}
UNKNOWN |= {"voxels": 10, "error_mm": None, "regions": [], "definition": "A rank alone."}
"""An estimated error of no known kind."""


@pytest.fixture(scope="module")
def client():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with EngineClient() as client:
            yield client


@pytest.fixture
def result(application, tmp_path):
    """A world and its nodes."""
    world = worlds.make_world("left-handed")
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    (tmp_path / "answer").mkdir()
    nodes = scene.create_nodes(worlds.result_of(world, tmp_path / "answer"), fixed, moving)
    nodes.transform.SetName('M to "F": a/b')
    return world, nodes


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder that private folders are made in."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_everything_is_written_into_a_folder_of_its_own(client, result, tmp_path, temporary):
    world, nodes = result
    warped = scene.read_volume(nodes.warped)
    colors = scene.Image(np.ones(warped.array.shape, np.uint8), warped.affine)
    scene.add_estimate(nodes, scene.Estimate(None, colors, UNKNOWN))
    seen = []
    folder = export(nodes, tmp_path, client=client, on_progress=seen.append)
    assert folder == tmp_path / "M to _F_ a_b"
    names = ["folding.nii.gz", "inverse.h5", "jacobian.nii.gz", "report.html", "report.json", "transform.h5"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [p["message"] for p in seen][-2:] == ["Drawing the report", "Moving the files to their place"]
    assert not list(temporary.iterdir()), "the private folder is gone"

    points = geometry.apply_affine(world.fixed.grid.affine, np.argwhere(np.ones((5, 5, 5))) * [7, 8, 4])
    written = transforms.read_transform(folder / "transform.h5", world.transform.grid)
    assert np.abs(written.map_points(points) - world.transform.map_points(points)).max() < 2e-3
    jacobian = images.read_image(folder / "jacobian.nii.gz")
    ours = geometry.resample(jacobian, world.fixed.grid, mode="nearest").data.numpy()
    assert np.abs(ours - slicer.util.arrayFromVolume(nodes.jacobian).transpose(2, 1, 0)).max() < 1e-5
    written = images.read_image(folder / "folding.nii.gz")
    ours = geometry.resample(written, world.fixed.grid, mode="nearest").data.numpy()
    assert ours.sum() > 0
    assert np.array_equal(ours, scene.read_labels(nodes.folding, nodes.fixed).array)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "M registered onto F" in page
    assert page.count("data:image/png;base64,") >= 3
    assert "Where can it be relied on?" in page

    again = export(nodes, tmp_path, ["jacobian"], client=client)
    assert again == tmp_path / "M to _F_ a_b 2"
    assert sorted(path.name for path in again.iterdir()) == ["folding.nii.gz", "jacobian.nii.gz"]


def test_the_folding_of_a_mirroring_transform_is_exported_as_it_was_found(client, application, tmp_path):
    world = worlds.make_world("upright", amplitude_mm=0.5)
    mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
    nodes = world.transform.grid
    points = geometry.apply_affine(nodes.affine, np.argwhere(np.ones(nodes.shape)))
    moved = world.transform.map_points(points) @ mirror[:3, :3] - points
    displacement = torch.from_numpy(moved.T.reshape(3, *nodes.shape).astype(np.float32))
    world.transform = geometry.DenseTransform(displacement, nodes)
    result = worlds.result_of(world, tmp_path, inverse=False, mirrored=True)
    assert result["report"]["folding"]["cells"]["no_fold_proven"] is True
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    folder = export(scene.create_nodes(result, fixed, moving), tmp_path, ["jacobian"], client=client)
    assert not sitk.GetArrayFromImage(images.read_sitk(folder / "folding.nii.gz")).any()


def test_cancelled_leaves_nothing(client, result, tmp_path, temporary):
    _world, nodes = result
    before = sorted(tmp_path.iterdir())
    messages = []
    with pytest.raises(EngineCancelled):
        export(nodes, tmp_path, client=client, on_progress=messages.append, cancelled=lambda: True)
    assert sorted(tmp_path.iterdir()) == before
    assert not list(temporary.iterdir())


def test_refusals_come_before_the_engine_starts(result, tmp_path, temporary):
    _world, nodes = result
    idle = EngineClient(command=["there-is-no-such-program"])
    with pytest.raises(InputError, match="Choose what to export"):
        export(nodes, tmp_path, [], client=idle)
    for folder in (tmp_path / "none", "", "relative"):
        with pytest.raises(InputError, match="Choose a folder that exists"):
            export(nodes, folder, client=idle)
    if os.name == "posix" and os.getuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(InputError, match="cannot be written to"):
            export(nodes, tmp_path / "closed", client=idle)
    nodes.aligned = None
    with pytest.raises(InputError, match="The report needs the volume before the deformation"):
        export(nodes, tmp_path, client=idle)
    assert not list(temporary.iterdir())


def test_transform_and_jacobian_need_no_aligned_volume(client, result, tmp_path):
    _world, nodes = result
    nodes.aligned = nodes.inverse = None
    folder = export(nodes, tmp_path, ["transform", "jacobian"], client=client)
    assert sorted(p.name for p in folder.iterdir()) == ["folding.nii.gz", "jacobian.nii.gz", "transform.h5"]
