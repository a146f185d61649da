"""greedy and ANTs SyN as they are called: they align, and their transforms are read as the tools mean them."""

from __future__ import annotations

import contextlib
import sys

import numpy as np
import pytest
import torch
from cases import blob_image, blob_labels
from comparison import classical
from comparison.classical import CLASSICAL

from MorphSeekLib.io.images import read_image
from MorphSeekLib.measures.metrics import dice_per_label
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space.geometry import Grid, Volume, index_points, resample

PACKAGES = {"greedy": "picsl_greedy", "syn": "ants", "syn-cc": "ants"}
AXES = np.diag([-1.0, -1.0, 1.0])
TURN = np.array([[0.995, -0.1, 0.0], [0.1, 0.995, 0.0], [0.0, 0.0, 1.0]]) / np.array([1.00001, 1.00001, 1.0])
FIXED = Grid.from_parts((24, 28, 20), (2.0, 2.0, 2.5), AXES, (23, 27, -24))
# another size and spacing, turned a little, and away by some mm
MOVING = Grid.from_parts((26, 26, 24), (2.0, 2.2, 2.2), TURN @ AXES, TURN @ (25, 27.5, -25.3) + (2.0, -3.0, 1.0))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder in which the tools leave their files, here not removed."""
    monkeypatch.setattr(classical.tempfile, "TemporaryDirectory", lambda **_: contextlib.nullcontext(str(tmp_path)))
    monkeypatch.setenv("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
    return tmp_path


def blobs(inverted=False):
    """A fixed image and its labels, a moving one and its labels."""
    fixed, moving = blob_labels(0, FIXED), blob_labels(1, MOVING)
    image = blob_image(moving, 1)
    return blob_image(fixed, 0), fixed, Volume(240 - image.data, MOVING) if inverted else image, moving


def own_warped(name, folder):
    """What the tool itself makes of the moving image with what it found."""
    if name == "greedy":
        return read_image(folder / "out.nii.gz")
    import ants

    images = [ants.image_read(str(folder / f"{side}.nii.gz")) for side in ("fixed", "moving")]
    steps = [str(folder / file) for file in ("syn1Warp.nii.gz", "syn0GenericAffine.mat")]
    ants.image_write(ants.apply_transforms(*images, steps), str(folder / "own.nii.gz"))
    return read_image(folder / "own.nii.gz")


@pytest.mark.parametrize(
    ("name", "affine", "multimodal"),
    [
        ("greedy", False, False),
        ("greedy", True, False),
        ("greedy", False, True),
        ("syn", True, False),
        ("syn", False, True),
        ("syn-cc", False, False),
    ],
)
def test_the_transform_is_the_tools_own(name, affine, multimodal, kept):
    """Dice rises, of one modality and of two; warped by our reading of the transform, the image is the tool's."""
    pytest.importorskip(PACKAGES[name], reason=f"needs {PACKAGES[name]} (pip install 'morphseek[benchmark]')")
    fixed, fixed_labels, moving, moving_labels = blobs(inverted=multimodal)
    transform = CLASSICAL[name](fixed, moving, affine=affine, multimodal=multimodal, threads=1)
    assert transform.grid.same_as(FIXED)

    def dice(way):
        warped = resample(moving_labels, FIXED, way, mode="nearest").data
        return np.mean(list(dice_per_label(fixed_labels.data, warped, moving_labels=moving_labels.data).values()))

    assert dice(transform) > dice(None) + 0.1
    own, ours = own_warped(name, kept).data, resample(moving, FIXED, transform).data
    at = index_points(FIXED, transform, MOVING)[0]
    last = torch.tensor(MOVING.shape).view(3, 1, 1, 1) - 1
    inside = ((at > 0.2) & (at < last - 0.2)).all(dim=0)  # beyond it the tools fill differently
    assert inside.float().mean() > 0.5
    difference = (own - ours)[inside].abs()
    # greedy rounds what it stores to a tenth of a voxel
    assert difference.mean() < (0.2 if name == "greedy" else 0.001), "of 240"


@pytest.mark.parametrize("name", CLASSICAL)
def test_the_same_images_give_the_same_transform(name):
    pytest.importorskip(PACKAGES[name], reason=f"needs {PACKAGES[name]} (pip install 'morphseek[benchmark]')")
    fixed, _, moving, _ = blobs()
    first, second = (CLASSICAL[name](fixed, moving, affine=True, threads=1) for _ in range(2))
    assert torch.equal(first.displacement, second.displacement)


@pytest.mark.parametrize("name", CLASSICAL)
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    fixed, _, moving, _ = blobs()
    with pytest.raises(MorphSeekError, match=r"not installed; run: pip install (picsl-greedy|antspyx)\."):
        CLASSICAL[name](fixed, moving, affine=False)
