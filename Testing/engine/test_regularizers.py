"""Regularizers: the official codes' values and gradients, and what each must not punish."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from MorphSeekLib.measures.regularizers import bending, diffusion, folding_penalty
from MorphSeekLib.space import fields

ALL = (diffusion, bending, folding_penalty)


def field(seed: int = 0, size: tuple[int, int, int] = (6, 5, 7), dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, *size, generator=generator, dtype=dtype)


def affine_field(matrix: Tensor, size: tuple[int, int, int] = (7, 6, 8)) -> Tensor:
    """u(x) = (A - 1) x, so that the deformation is x -> A x."""
    points = fields.identity(size, torch.empty(0, dtype=torch.float64))
    return torch.einsum("ca,baijk->bcijk", matrix - torch.eye(3, dtype=torch.float64), points)


@pytest.mark.parametrize(
    ("regularizer", "key"),
    [
        (diffusion, "tm_grad3d_l2"),
        (diffusion, "vxm_grad_l2"),
        (diffusion, "nice_grad_l2"),
        (diffusion, "lapirn_smoothloss"),
        (bending, "tm_bending"),
    ],
)
def test_equals_the_official_code(reference, regularizer, key):
    fixture = reference("loss_regularisers")
    displacement = fixture["disp"].requires_grad_()
    loss = regularizer(displacement)
    loss.backward()
    torch.testing.assert_close(loss.detach(), fixture[f"{key}_value"], rtol=1e-6, atol=0)
    expected = fixture[f"{key}_grad"]
    assert (displacement.grad - expected).abs().max() < 1e-6 * expected.abs().max()


def test_folding_penalty_on_a_folded_field(reference):
    fixture = reference("loss_regularisers")
    determinant = fields.corner_determinants(fixture["disp_folded"])
    expected = torch.where(determinant < 0.05, 0.05 - determinant, 0).mean()
    torch.testing.assert_close(folding_penalty(fixture["disp_folded"]), expected)
    assert expected > 0.01
    assert folding_penalty(fixture["disp"], margin=0.0) == 0  # smooth


@pytest.mark.parametrize("regularizer", ALL)
def test_gradient_against_finite_differences(regularizer):
    # 2 * noise folds about half of the voxels, so that the folding penalty has a gradient
    displacement = (2 * field(size=(5, 6, 5))).requires_grad_()
    assert torch.autograd.gradcheck(regularizer, (displacement,), fast_mode=True)


@pytest.mark.parametrize("size", [0.1, 0.4, 2.0])
def test_the_folding_penalty_has_the_value_and_gradient_of_its_definition(size):
    """Also where cells that a cheap bound clears are left out."""
    displacement = (size * field(3)).requires_grad_()
    definition = torch.relu(0.3 - fields.corner_determinants(displacement)).mean()
    penalty = folding_penalty(displacement, margin=0.3)
    torch.testing.assert_close(penalty, definition, rtol=1e-12, atol=0)
    (expected,) = torch.autograd.grad(definition, displacement)
    (found,) = torch.autograd.grad(penalty, displacement)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@given(st.lists(st.floats(-2, 2, allow_subnormal=False), min_size=9, max_size=9))  # torch.det: NaN of subnormals
@settings(max_examples=25, deadline=None)
def test_affine_deformations(entries):
    matrix = torch.tensor(entries, dtype=torch.float64).view(3, 3)
    displacement = affine_field(matrix)
    assert bending(displacement) < 1e-20
    slope = (matrix - torch.eye(3, dtype=torch.float64)).square().mean()  # over components and axes
    torch.testing.assert_close(diffusion(displacement), slope, rtol=1e-9, atol=1e-12)
    expected = torch.relu(0.05 - torch.det(matrix))
    torch.testing.assert_close(folding_penalty(displacement), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("regularizer", ALL)
def test_a_translation_costs_nothing(regularizer):
    displacement = field()
    torch.testing.assert_close(regularizer(displacement + 3.0), regularizer(displacement))
    assert regularizer(torch.full((1, 3, 6, 6, 6), 2.5)) == 0


@pytest.mark.parametrize("regularizer", ALL)
def test_axes_are_treated_alike(regularizer):
    displacement = field()
    turned = displacement[:, [2, 0, 1]].permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(regularizer(turned), regularizer(displacement))


@pytest.mark.parametrize("regularizer", ALL)
def test_a_batch_is_the_mean_of_its_samples(regularizer):
    displacement = field()
    torch.testing.assert_close(
        regularizer(displacement), (regularizer(displacement[:1]) + regularizer(displacement[1:])) / 2
    )


@pytest.mark.parametrize("regularizer", ALL)
def test_float32_whatever_autocast_says(regularizer):
    displacement = 2 * field(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = regularizer(displacement)
        half = regularizer(displacement.bfloat16())
    assert loss.dtype == half.dtype == torch.float32
    torch.testing.assert_close(loss, regularizer(displacement), rtol=0, atol=0)


def test_a_step_down_the_penalty_unfolds():
    displacement = 0.8 * field(size=(8, 8, 8))
    before = folding_penalty(displacement)
    for _ in range(20):
        displacement = displacement.detach().requires_grad_()
        folding_penalty(displacement).backward()
        displacement = displacement - 200 * displacement.grad
    assert folding_penalty(displacement) < 0.1 * before


@pytest.mark.parametrize(("regularizer", "least"), [(diffusion, 2), (bending, 5), (folding_penalty, 2)])
def test_short_axes(regularizer, least):
    assert torch.isfinite(regularizer(torch.rand(1, 3, least, least, least)))
    with pytest.raises(ValueError, match="voxels along every axis"):
        regularizer(torch.rand(1, 3, 8, least - 1, 8))
