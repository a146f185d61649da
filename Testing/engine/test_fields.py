"""Displacement-field algebra: against the tensors of the official codes, and by its laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from scipy.ndimage import map_coordinates

from MorphSeekLib.space import fields

quick = settings(max_examples=20, deadline=None)
few = settings(max_examples=8, deadline=None)
shapes = st.tuples(*[st.integers(2, 9)] * 3)
seeds = st.integers(0, 2**31 - 1)


def affine_field(matrix: torch.Tensor, shift: torch.Tensor, shape) -> torch.Tensor:
    """u(x) = matrix x + shift."""
    x = fields.identity(shape, matrix)
    return torch.einsum("ab,nbijk->naijk", matrix, x) + shift.view(1, 3, 1, 1, 1)


def smooth_field(shape, seed: int, largest: float, dtype=torch.float32, nodes: int = 3) -> torch.Tensor:
    """A random field, cubic between a few nodes, zero at the border, at most ``largest`` voxels."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(3, nodes, nodes, nodes, generator=g, dtype=torch.float64).numpy()
    x = fields.identity(shape)[0].double().numpy()
    at = np.stack([x[c] * (nodes - 1) / (shape[c] - 1) for c in range(3)])
    u = torch.from_numpy(np.stack([map_coordinates(c, at, order=3, mode="nearest") for c in coarse]))
    for c in range(3):
        window = torch.sin(torch.pi * torch.arange(shape[c], dtype=torch.float64) / (shape[c] - 1)) ** 2
        u = u * window.view([-1 if a == c else 1 for a in range(3)])
    return (u * (largest / u.abs().max()))[None].to(dtype)


def random_affine(seed: int, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    matrix, shift = torch.rand(3, 3, generator=g, dtype=torch.float64), torch.rand(3, generator=g, dtype=torch.float64)
    return (2 * matrix - 1) * size, 2 * shift - 1


def inside(points: torch.Tensor, shape, margin: float = 0.0) -> torch.Tensor:
    """(batch, 1, i, j, k): which points lie on the grid, ``margin`` voxels from its border."""
    last = torch.tensor(shape).view(1, 3, 1, 1, 1) - 1
    return ((points >= margin) & (points <= last - margin)).all(dim=1, keepdim=True)


# --- the official codes' tensors ---------------------------------------------------------------------------------


def test_warp_as_voxelmorph(reference):
    r = reference("warp_compose")
    torch.testing.assert_close(fields.warp(r["image"], r["disp_a"]), r["vxm_warp_linear"], atol=1e-4, rtol=0)
    assert torch.equal(fields.warp(r["seg"], r["disp_a"], "nearest"), r["vxm_warp_nearest"])


@pytest.mark.parametrize("official", ["spac", "convexadam"])
def test_compose_as_the_official_codes(reference, official):
    r = reference("warp_compose")
    shape = r["disp_a"].shape[2:]

    def voxels(unit):  # align_corners=False units, last axis first
        return torch.stack([unit[:, 2 - c] * shape[c] / 2 for c in range(3)], dim=1)

    if official == "spac":
        outer, step, expected = r["disp_a"], r["disp_b"], r["spac_compose_a_then_b"]
    else:
        outer, step, expected = voxels(r["unit_a"]), voxels(r["unit_b"]), voxels(r["convexadam_compose_unit"])
    # they read zeros outside the grid, we hold the edge
    kept = inside(fields.identity(shape) + step, shape)
    assert kept.double().mean() > 0.8
    torch.testing.assert_close(fields.compose(outer, step) * kept, expected * kept, atol=1e-4, rtol=0)


def test_integrate_as_voxelmorph(reference):
    r = reference("warp_compose")
    torch.testing.assert_close(fields.integrate(r["disp_a"], 7), r["vxm_vecint7_a"], atol=1e-4, rtol=0)


def test_resize_as_voxelmorph_but_for_the_factor(reference):
    r = reference("warp_compose")
    old, new = r["disp_a"].shape[2:], r["vxm_resize_half_a"].shape[2:]
    plain = torch.tensor([0.5 * (o - 1) / (n - 1) for o, n in zip(old, new, strict=True)]).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(fields.resize(r["disp_a"], new) * plain, r["vxm_resize_half_a"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["smooth", "folded"])
def test_jacobian_as_the_official_codes(reference, case):
    r = reference("jacobian_metrics")
    jacobian = fields.jacobian_determinant(r[f"{case}_disp"])[0, 0]
    torch.testing.assert_close(jacobian, r[f"{case}_vxm_np_gradient_jacdet"], atol=1e-4, rtol=0)
    crop = (slice(2, -2),) * 3
    torch.testing.assert_close(jacobian[crop], r[f"{case}_l2r_jacdet"], atol=1e-4, rtol=0)
    assert int((jacobian[crop] <= 0).sum()) == r[f"{case}_count_jac_le0_l2r"]
    assert float((jacobian <= 0).double().mean()) == pytest.approx(r[f"{case}_vxm_frac_le0"])


# --- warp --------------------------------------------------------------------------------------------------------


@quick
@given(shapes, seeds, st.sampled_from(["linear", "nearest"]), st.sampled_from(["zeros", "border"]))
def test_zero_displacement_is_the_identity(shape, seed, mode, padding):
    image = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(seed))
    warped = fields.warp(image, torch.zeros(2, 3, *shape), mode, padding)
    torch.testing.assert_close(warped, image, atol=2e-6, rtol=0)


@quick
@given(shapes, seeds)
def test_linear_warp_as_scipy(shape, seed):
    g = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 1, *shape, generator=g, dtype=torch.float64)
    u = 6 * torch.rand(1, 3, *shape, generator=g, dtype=torch.float64) - 3
    points = (fields.identity(shape, u) + u)[0].numpy()
    for padding, scipy_mode in (("border", "nearest"), ("zeros", "grid-constant")):
        expected = map_coordinates(image[0, 0].numpy(), points, order=1, mode=scipy_mode, cval=0.0)
        warped = fields.warp(image, u, padding=padding)[0, 0].numpy()
        np.testing.assert_allclose(warped, expected, atol=1e-12)


def test_nearest_takes_the_nearest_voxel():
    image = torch.arange(2.0 * 3 * 4).view(1, 1, 2, 3, 4)
    for shift, index in ((0.4, 1), (0.6, 2), (-0.4, 1), (-0.6, 0)):
        u = torch.zeros(1, 3, 2, 3, 4)
        u[:, 1] = shift
        assert torch.equal(fields.warp(image, u, "nearest")[:, :, :, 1], image[:, :, :, index])


def test_integer_images_are_read_as_float():
    labels = torch.arange(8).view(1, 1, 2, 2, 2)
    warped = fields.warp(labels, torch.zeros(1, 3, 2, 2, 2), "nearest")
    assert warped.dtype == torch.float32
    assert torch.equal(warped, labels.float())


def test_one_image_under_many_displacements():
    image = torch.rand(1, 2, 5, 6, 7)
    u = torch.randn(4, 3, 5, 6, 7)
    expected = torch.cat([fields.warp(image, one[None]) for one in u])
    assert torch.equal(fields.warp(image, u), expected)
    assert fields.compose(u[:1], u).shape == u.shape
    assert fields.warp(image.expand(4, -1, -1, -1, -1), u[:1]).shape == (4, 2, 5, 6, 7)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'cubic'"):
        fields.sample(torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 3, 1, 1, 1), "cubic")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_voxel_axis(axis):
    shape = [4, 5, 6]
    shape[axis] = 1
    image = torch.rand(1, 1, *shape)
    u = torch.zeros(1, 3, *shape)
    assert torch.allclose(fields.warp(image, u), image, atol=1e-6)
    u[:, axis] = 0.25  # a quarter out of the only slice
    assert torch.allclose(fields.warp(image, u), 0.75 * image, atol=1e-6)
    assert torch.allclose(fields.warp(image, u, padding="border"), image, atol=1e-6)
    u[:, axis] = 3
    assert not fields.warp(image, u).any()
    assert torch.allclose(fields.compose(u, u), 2 * u)
    resized = fields.resize(u, [7 if n == 1 else n for n in shape])
    assert torch.allclose(resized.amax(dim=(0, 2, 3, 4)), u.amax(dim=(0, 2, 3, 4)))
    with pytest.raises(ValueError, match="two voxels"):
        fields.jacobian_determinant(u)


# --- compose -----------------------------------------------------------------------------------------------------


@quick
@given(shapes, seeds)
def test_zero_is_neutral_in_compose(shape, seed):
    u = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(fields.compose(torch.zeros_like(u), u), u)
    torch.testing.assert_close(fields.compose(u, torch.zeros_like(u)), u, atol=2e-5, rtol=0)


@quick
@given(st.tuples(*[st.floats(-5, 5)] * 3), st.tuples(*[st.integers(-2, 2)] * 3), shapes, seeds)
def test_translations_add_and_compose_is_associative(shift, whole, shape, seed):
    u = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(seed))
    a, b = (torch.tensor(t, dtype=torch.float32).view(1, 3, 1, 1, 1).expand_as(u) for t in (shift, whole))
    torch.testing.assert_close(fields.compose(a, b), a + b, atol=1e-5, rtol=0)
    # whole voxels, so that the inner field is read at its nodes
    left, right = fields.compose(fields.compose(u, a), b), fields.compose(u, fields.compose(a, b))
    kept = inside(fields.identity(shape) + b, shape)
    torch.testing.assert_close(left * kept, right * kept, atol=2e-4, rtol=0)


@quick
@given(seeds)
def test_affine_fields_compose_as_matrices_and_associatively(seed):
    shape = (12, 11, 13)
    (a, s), (b, t), (c, r) = [random_affine(seed + n, 0.04) for n in range(3)]
    one = torch.eye(3, dtype=torch.float64)
    u, v, w = affine_field(a, s, shape), affine_field(b, t, shape), affine_field(c, r, shape)
    left, right = fields.compose(fields.compose(u, v), w), fields.compose(u, fields.compose(v, w))
    matrix = (one + a) @ (one + b) @ (one + c) - one
    shift = (one + a) @ ((one + b) @ r + t) + s
    expected = affine_field(matrix, shift, shape)
    # the three maps move a point by at most 2.6 voxels each
    kept = inside(fields.identity(shape), shape, 4)
    torch.testing.assert_close(left * kept, expected * kept, atol=1e-9, rtol=0)
    torch.testing.assert_close(right * kept, expected * kept, atol=1e-9, rtol=0)


@few
@given(seeds)
def test_composed_field_reads_as_sequential_warping(seed):
    """(I o Phi) o phi = I o (Phi o phi), exactly for the smooth function itself, nearly for its samples."""
    shape = (16, 17, 18)
    outer, step = smooth_field(shape, seed, 1.0), smooth_field(shape, seed + 1, 1.0)
    x = fields.identity(shape)
    image = sum(torch.sin(x[:, c : c + 1] * (0.10 + 0.04 * c) + c) for c in range(3))
    once = fields.warp(image, fields.compose(outer, step))
    twice = fields.warp(fields.warp(image, outer), step)
    core = (..., *[slice(3, -3)] * 3)
    assert float((once - twice)[core].abs().max()) < 0.015


# --- resize ------------------------------------------------------------------------------------------------------


@quick
@given(shapes, shapes, seeds)
def test_resize_keeps_affine_displacements_exactly(old, new, seed):
    matrix, shift = random_affine(seed, 1.0)
    u = affine_field(matrix, shift, old)
    factor = torch.tensor([(n - 1) / (o - 1) for n, o in zip(new, old, strict=True)], dtype=torch.float64)
    # the new voxel x is the old voxel x / factor
    expected = affine_field(factor[:, None] * matrix / factor, factor * shift, new)
    resized = fields.resize(u, new)
    torch.testing.assert_close(resized, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(fields.resize(resized, old), u, atol=1e-9, rtol=0)


@quick
@given(shapes, seeds)
def test_finer_and_back_is_the_same(shape, seed):
    u = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(seed))
    finer = fields.resize(u, [2 * n - 1 for n in shape])  # every old center is a new center
    torch.testing.assert_close(fields.resize(finer, shape), u, atol=1e-5, rtol=0)
    assert fields.resize(u, shape) is u


# --- integrate, invert -------------------------------------------------------------------------------------------


@few
@given(seeds)
def test_integrate_is_the_matrix_exponential_of_linear_velocities(seed):
    shape = (21, 21, 21)
    matrix, shift = random_affine(seed, 0.1)
    middle = torch.full((3,), 10.0, dtype=torch.float64)
    velocity = affine_field(matrix, shift - matrix @ middle, shape)  # v(x) = M (x - middle) + shift
    full = np.zeros((4, 4))
    full[:3, :3], full[:3, 3] = matrix, shift - matrix @ middle
    flow = torch.from_numpy(expm(full))
    expected = affine_field(flow[:3, :3] - torch.eye(3), flow[:3, 3], shape)
    core = (..., *[slice(7, -7)] * 3)
    torch.testing.assert_close(fields.integrate(velocity, 10)[core], expected[core], atol=2e-3, rtol=0)


@few
@given(seeds)
def test_integrating_backwards_is_the_inverse(seed):
    velocity = smooth_field((16, 17, 18), seed, 1.0)
    forth, back = fields.integrate(velocity), fields.integrate(-velocity)
    assert float(forth.abs().max()) > 0.5
    # what linear interpolation between the nodes leaves
    assert float(fields.compose(forth, back).abs().max()) < 0.15
    assert float(fields.compose(back, forth).abs().mean()) < 0.006
    assert float(fields.jacobian_determinant(forth).min()) > 0


@few
@given(seeds)
def test_invert_undoes(seed):
    u = smooth_field((16, 17, 18), seed, 1.0)
    v = fields.invert(u)
    # u(x + v) + v = 0 at the grid's nodes; the other order is read between the nodes of v
    assert float(fields.compose(u, v).abs().max()) < 2e-3
    assert float(fields.compose(v, u).abs().mean()) < 0.02


def test_invert_where_the_plain_iteration_diverges():
    """du/dx = 1.5: x -> -u(y + x) alone runs away, the damped one does not."""
    shape = (3, 3, 31)
    u = torch.zeros(1, 3, *shape)
    u[:, 2] = 1.5 * (torch.arange(31.0) - 15)
    y = torch.arange(31.0)
    expected = (15 + (y - 15) / 2.5) - y
    torch.testing.assert_close(fields.invert(u, 80, 1e-6)[0, 2, 1, 1], expected, atol=1e-3, rtol=0)


# --- Jacobian ----------------------------------------------------------------------------------------------------


@quick
@given(shapes, seeds)
def test_jacobian_of_an_affine_field_is_its_determinant(shape, seed):
    matrix, shift = random_affine(seed, 1.0)
    jacobian = fields.jacobian_determinant(affine_field(matrix, shift, shape))
    expected = torch.det(torch.eye(3, dtype=torch.float64) + matrix)
    assert jacobian.shape == (1, 1, *shape)
    torch.testing.assert_close(jacobian, expected.expand_as(jacobian), atol=1e-10, rtol=0)


def test_jacobian_of_an_analytic_field():
    """u_i = a sin(wj), u_j = b sin(wk), u_k = c sin(wi): det = 1 + product of the three derivatives."""
    w, (a, b, c) = 0.02, (30.0, -20.0, 25.0)
    i, j, k = fields.identity((40, 30, 35), torch.empty(0, dtype=torch.float64)).unbind(1)
    u = torch.stack([a * torch.sin(w * j), b * torch.sin(w * k), c * torch.sin(w * i)], dim=1)
    exact = 1 + (a * w * torch.cos(w * j)) * (b * w * torch.cos(w * k)) * (c * w * torch.cos(w * i))
    jacobian = fields.jacobian_determinant(u)
    core = (..., *[slice(1, -1)] * 3)
    torch.testing.assert_close(jacobian[:, 0][core], exact[core], atol=1e-4, rtol=0)  # w^2 / 6 per derivative
    torch.testing.assert_close(jacobian[:, 0], exact, atol=1e-2, rtol=0)  # one-sided at the border


@quick
@given(seeds)
def test_jacobian_as_numpy_gradient(seed):
    u = torch.randn(1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradient = np.stack([np.stack(np.gradient(c), -1) for c in u[0].numpy()], -2)
    np.testing.assert_allclose(fields.jacobian_determinant(u)[0, 0], np.linalg.det(np.eye(3) + gradient), atol=1e-12)


# --- number formats ----------------------------------------------------------------------------------------------


operations = {
    "warp": lambda u: fields.warp(u[:, :1], u),
    "compose": lambda u: fields.compose(u, -u),
    "resize": lambda u: fields.resize(u, (5, 2, 3)),
    "integrate": lambda u: fields.integrate(u, 2),
    "jacobian": fields.jacobian_determinant,
}


@pytest.mark.parametrize("name", operations)
def test_gradients(name):
    g = torch.Generator().manual_seed(3)
    # away from voxel centers, where linear interpolation has a kink
    u = 0.2 + 0.15 * torch.rand(1, 3, 3, 3, 3, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(operations[name], u.requires_grad_())


@pytest.mark.parametrize("name", [*operations, "invert"])
@pytest.mark.parametrize("how", ["bfloat16 input", "float16 input", "autocast"])
def test_computed_in_float32(name, how):
    operation = {**operations, "invert": fields.invert}[name]
    u = smooth_field((9, 10, 11), 5, 1.0)
    if how != "autocast":
        u = u.to(torch.bfloat16 if how.startswith("b") else torch.float16)
        assert torch.equal(operation(u), operation(u.float()))
        assert operation(u).dtype == torch.float32
        return
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = operation(u)
    assert result.dtype == torch.float32
    assert torch.equal(result, operation(u))


def test_float64_stays():
    u = torch.zeros(1, 3, 3, 3, 3, dtype=torch.float64)
    assert {operation(u).dtype for operation in (*operations.values(), fields.invert)} == {torch.float64}
    assert fields.identity((2, 3, 4), u).dtype == torch.float64
    assert fields.identity((2, 3, 4), u.bfloat16()).dtype == torch.float32


def test_coordinates_survive_a_long_axis():
    ramp = torch.arange(512.0).view(1, 1, 512, 1, 1).expand(1, 1, 512, 2, 2)
    u = torch.full((1, 3, 512, 2, 2), 0.0)
    u[:, 0] = 0.375
    warped = fields.warp(ramp, u, padding="border")[0, 0, :-1]
    torch.testing.assert_close(warped, ramp[0, 0, :-1] + 0.375, atol=2e-4, rtol=0)
