"""What a training computes on every voxel: the compiled form, torch's, and the plain definition are one."""

from __future__ import annotations

from importlib import util

import host_syncs
import pytest
import torch
import torch.nn.functional as F

from MorphSeekLib.backbones.voxelmorph import structure_force
from MorphSeekLib.measures import fast_fields, regularizers, similarity
from MorphSeekLib.measures.fast_fields import label_sums, least_determinant
from MorphSeekLib.measures.regularizers import diffusion
from MorphSeekLib.measures.similarity import mind_ssc
from MorphSeekLib.networks.policy import ModelSettings, RegistrationModel
from MorphSeekLib.space import fields
from MorphSeekLib.training import losses
from MorphSeekLib.training.losses import Batch, LossSettings, advance, label_dice, soft_dice, warmup_loss
from MorphSeekLib.training.rewards import State, dice_gain

SHAPE, COUNT = (20, 16, 24), 7
KINDS = [
    pytest.param(True, marks=pytest.mark.skipif(util.find_spec("numba") is None, reason="numba is not installed")),
    False,
]
"""By the kernels, and by torch alone."""


@pytest.fixture
def compiled(request, monkeypatch):
    """Whether the kernels are used; without them nothing else changes."""
    if not request.param:
        for module in (fast_fields, regularizers, similarity):
            monkeypatch.setattr(module, "kernels_for", lambda *_: None)
    return request.param


def label_map(seed: int) -> torch.Tensor:
    """Blocks of random classes, so that many cells have corners of one class and others of up to eight."""
    coarse = torch.randint(0, COUNT + 1, (1, 1, 5, 4, 6), generator=torch.Generator().manual_seed(seed))
    classes = F.interpolate(coarse.float(), size=SHAPE, mode="nearest").int()
    noise = torch.rand(classes.shape, generator=torch.Generator().manual_seed(seed)) < 0.05
    return torch.where(noise, 1, classes)


def displacement(size: float, dtype: torch.dtype = torch.float32, count: int = 1) -> torch.Tensor:
    coarse = torch.randn(count, 3, 5, 4, 6, generator=torch.Generator().manual_seed(3), dtype=dtype)
    return F.interpolate(size * coarse, size=SHAPE, mode="trilinear")


def one_hot(classes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (classes == torch.arange(1, COUNT + 1).view(1, -1, 1, 1, 1)).to(dtype)


@pytest.mark.parametrize("compiled", KINDS, indirect=True)
@pytest.mark.parametrize("size", [0.0, 1e-5, 2.5, 30.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_one_warp_of_the_map_is_a_warp_of_every_channel(compiled, size, dtype, tolerance):
    """Also where voxels lie on the border of two cells (0), and beyond the image (30)."""
    fixed, moving = label_map(0), label_map(1)
    found = []
    for channels in (True, False):
        u = displacement(size, dtype).requires_grad_()
        if channels:
            dice = soft_dice(one_hot(fixed, dtype), fields.warp(one_hot(moving, dtype), u))
        else:
            dice = label_dice(fixed, moving, torch.arange(1, COUNT + 1), u)
        dice.backward()
        found.append((dice.detach(), u.grad))
    (dice, slope), (other, other_slope) = found
    assert abs(other / dice - 1) <= tolerance
    assert float((other_slope - slope).norm()) <= tolerance * float(slope.norm())


@pytest.mark.parametrize("compiled", KINDS, indirect=True)
def test_the_gradient_is_that_of_the_loss(compiled):
    fixed, moving = label_map(0)[..., :6, :6, :6], label_map(1)[..., :6, :6, :6]
    u = displacement(1.3, torch.float64)[..., :6, :6, :6].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda u: label_sums(fixed, moving, COUNT, u), (u,))


def test_nothing_waits_for_the_device(monkeypatch):
    """On a device that computes nothing."""
    fixed, moving = (torch.empty(1, 1, *SHAPE, dtype=torch.int32, device="meta") for _ in range(2))
    u = torch.empty(1, 3, *SHAPE, device="meta", requires_grad=True)
    structures = torch.empty(COUNT, dtype=torch.int32, device="meta")
    with host_syncs.HostSyncs() as found:
        label_dice(fixed, moving, structures, u).backward()
    assert found.waits == []


@pytest.mark.parametrize("threads", [1, 3])
def test_slabs_give_the_same_as_one(threads, monkeypatch):
    whole = label_sums(label_map(0), label_map(1), COUNT, displacement(2.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for one, other in zip(whole, label_sums(label_map(0), label_map(1), COUNT, displacement(2.0)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("channels", "padding"), [(1, "zeros"), (3, "border")])
@pytest.mark.parametrize("size", [0.0, 2.5, 30.0])
def test_a_warp_is_that_of_the_fields(channels, padding, size):
    image = torch.rand(1, channels, *SHAPE, generator=torch.Generator().manual_seed(0))
    weight = torch.rand(2, channels, *SHAPE, generator=torch.Generator().manual_seed(1))
    found = []
    for warp in (fields.warp, fast_fields.warp):
        u = displacement(size, count=2).requires_grad_()
        warped = warp(image, u, padding=padding)
        (warped * weight).sum().backward()
        found.append((warped.detach(), u.grad))
    torch.testing.assert_close(*(warped for warped, _ in found), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*(slope for _, slope in found), atol=1e-4, rtol=1e-4)


def test_folds_are_counted_alike():
    u = displacement(6.0, count=2)
    found, expected = least_determinant(u), fields.least_determinant(u)
    assert bool((expected <= 0).any())
    assert torch.equal(found <= 0, expected <= 0)
    torch.testing.assert_close(found[expected <= 0], expected[expected <= 0])


def test_rewards_of_dice_are_the_same_without_the_kernels(monkeypatch):
    state = State(torch.rand(1, 1, *SHAPE), torch.rand(1, 1, *SHAPE), displacement(0.5), label_map(0), label_map(1))
    total = displacement(2.0, count=2)
    found = dice_gain(state, total)
    monkeypatch.setattr(fast_fields, "kernels_for", lambda *_: None)
    torch.testing.assert_close(dice_gain(state.moved(state.total), total), found)


def test_diffusion_is_the_mean_square_of_differences():
    found = []
    for known in (diffusion, lambda u: sum(u.diff(dim=axis).square().mean() for axis in (2, 3, 4)) / 3):
        u = displacement(2.0).requires_grad_()
        (3 * known(u)).backward()
        found.append((known(u).detach(), u.grad))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("radius", [1, 2])
def test_descriptors_and_forces_are_those_of_torch(radius, monkeypatch):
    fixed, moving = torch.rand(2, 1, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    found = mind_ssc(fixed, radius), structure_force(moving, fixed)
    monkeypatch.setattr(similarity, "kernels_for", lambda *_: None)
    torch.testing.assert_close(found[0], mind_ssc(fixed, radius), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], structure_force(moving, fixed), atol=1e-5, rtol=1e-4)


def test_twenty_iterations_have_the_same_curve():
    """Training on the map against training on channels, from the same weights."""
    weights = LossSettings(regularization=0.5, folding=1.0, dice=1.0)
    fixed, moving = label_map(0), label_map(1)
    images = [classes.float() / COUNT for classes in (fixed, moving)]
    structures = torch.arange(1, COUNT + 1)
    curves = []
    for batch in (
        Batch(*images, fixed_labels=one_hot(fixed, torch.float32), moving_labels=one_hot(moving, torch.float32)),
        Batch(*images, fixed_classes=fixed, moving_classes=moving, structures=structures),
    ):
        torch.manual_seed(0)
        model = RegistrationModel(ModelSettings(backbone_settings={"encoder": (8, 8), "decoder": (8, 8)}))
        optimizer, curve = torch.optim.Adam(model.parameters(), lr=1e-3), []
        for _ in range(20):
            optimizer.zero_grad()
            loss, _ = warmup_loss(advance(model, batch, torch.zeros(1, 3, *SHAPE)), batch, weights)
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        curves.append(torch.tensor(curve))
    assert float((curves[1] / curves[0] - 1).abs().max()) <= 1e-4
    assert curves[0][-1] < curves[0][0]


def test_shares_of_classes_are_channels():
    batch = Batch(
        torch.zeros(1, 1, *SHAPE), torch.zeros(1, 1, *SHAPE), fixed_classes=label_map(0), moving_classes=label_map(1),
        structures=torch.arange(1, COUNT + 1),
    )  # fmt: skip
    assert torch.equal(batch.shares[0], one_hot(label_map(0), torch.float32))
    assert losses.to_device(batch, torch.device("cpu")).moving_classes is not None
    with pytest.raises(ValueError, match="no labels"):
        _ = Batch(batch.fixed, batch.moving).shares
