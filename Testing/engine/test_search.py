"""The search for large motion: it finds a known shift, both ways alike, compiled as by torch, in bounded memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from MorphSeekLib.io.compiled import kernels
from MorphSeekLib.protocol.errors import Cancelled
from MorphSeekLib.registration import search as searching
from MorphSeekLib.registration.search import Pass, search
from MorphSeekLib.space import fields

needs_numba = pytest.mark.skipif(kernels("registration.search_kernels") is None, reason="numba is not installed")
SHAPE = (32, 36, 28)


def smooth_features(seed: int, shape: tuple[int, int, int] = SHAPE, channels: int = 6) -> torch.Tensor:
    """Random features in [0, 1] that vary over about four voxels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, *(n // 4 + 1 for n in shape), generator=generator)
    return F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)


def inner(field: torch.Tensor, rim: int) -> torch.Tensor:
    return field[..., rim:-rim, rim:-rim, rim:-rim]


@pytest.fixture(params=["torch", pytest.param("compiled", marks=needs_numba)])
def form(request, monkeypatch):
    """Search by each of the two forms."""
    if request.param == "torch":
        monkeypatch.setattr(searching, "kernels", lambda _: None)
    return request.param


def test_a_shift_of_several_cells_is_found(form):
    moving = smooth_features(0)
    shift = torch.tensor([6.0, -5.0, 4.0]).view(1, 3, 1, 1, 1)
    fixed = fields.warp(moving, shift.expand(1, 3, *SHAPE), padding="border")
    found = search(fixed, moving, passes=(Pass(2, 4), Pass(2, 1)))
    assert found.shape == (1, 3, *(n // 2 for n in SHAPE))
    assert float((inner(found, 5) - shift).abs().mean()) < 0.3


def test_images_that_are_alike_are_left_in_place(form):
    image = smooth_features(1)
    assert float(search(image, image, passes=(Pass(4, 2), Pass(3, 1))).abs().max()) < 0.05


def test_the_two_directions_undo_each_other(form):
    fixed, moving = smooth_features(2), smooth_features(3)
    there, back = (search(a, b, passes=(Pass(4, 3),)) / 2 for a, b in ((fixed, moving), (moving, fixed)))
    left = fields.compose(there, back)
    assert float(inner(there, 3).norm(dim=1).mean()) > 0.5
    assert float(inner(left, 3).norm(dim=1).mean()) < 0.1


@needs_numba
@pytest.mark.parametrize(("reach", "channels"), [(2, 6), (1, 4), (3, 1)])
def test_the_compiled_costs_are_those_of_torch(reach, channels):
    fixed, moving = (smooth_features(seed, (7, 9, 6), channels) for seed in (4, 5))
    counts = torch.rand(7, 9, 6)
    expected = searching.TorchCosts(fixed, moving, reach, counts).costs
    module = kernels("registration.search_kernels")
    got = torch.from_numpy(searching.CompiledCosts(module, fixed, moving, reach, counts).costs).movedim(3, 0)
    assert torch.allclose(got, expected, atol=1e-5)


@needs_numba
def test_the_compiled_search_finds_what_torch_finds(monkeypatch):
    fixed, moving = smooth_features(6), smooth_features(7)
    got = search(fixed, moving, passes=(Pass(4, 3), Pass(3, 2)))
    monkeypatch.setattr(searching, "kernels", lambda _: None)
    expected = search(fixed, moving, passes=(Pass(4, 3), Pass(3, 2)))
    # rounding decides where two displacements are equally good
    assert float(((got - expected).abs() > 1e-3).float().mean()) < 0.01


@needs_numba
def test_the_number_of_threads_does_not_change_the_answer():
    fixed, moving = smooth_features(8), smooth_features(9)
    one, three = (search(fixed, moving, passes=(Pass(4, 2),), threads=n) for n in (1, 3))
    assert torch.equal(one, three)


def test_the_costs_of_a_pass_stay_within_bounds_however_large_the_image_is():
    for shape in ((48, 64, 48), (112, 112, 96), (192, 224, 176), (512, 512, 320), (1024, 1024, 64)):
        level, passes = searching.level_for(shape)
        costs = [searching.costs_of(one, tuple(n / 2**level for n in shape)) for one in passes]
        assert max(costs) <= searching.MOST_COSTS
    assert searching.level_for((48, 64, 48)) == (0, searching.SMALL)
    assert searching.level_for((112, 112, 96)) == (0, searching.PASSES)


def test_a_search_can_be_canceled(form):
    def stop() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        search(smooth_features(0), smooth_features(1), passes=(Pass(4, 1),), check=stop)
