"""Every cell of a delivered transform is judged: proven, folded or undecided; and folds are pulled apart."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import product
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from MorphSeekLib.io.compiled import kernels
from MorphSeekLib.io.transforms import rounded
from MorphSeekLib.measures import folds
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import DenseTransform, Grid, Volume, apply_affine, dense_from_voxels

needs_numba = pytest.mark.skipif(kernels("measures.fold_kernels") is None, reason="numba is not installed")
CORNERS = list(product((0, 1), repeat=3))


def turned(spacing=(0.9, 1.4, 2.2), shape=(14, 15, 13)) -> Grid:
    """An oblique, anisotropic grid far from the origin."""
    a, b = 0.4, -0.7
    about_z = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    return Grid.from_parts(shape, spacing, about_z @ about_x, (80.0, -120.0, 300.0))


def plain(shape) -> Grid:
    return Grid(tuple(shape), np.eye(4))


def rough(shape, strength: float, seed: int) -> torch.Tensor:
    """(1, 3, *shape): coarse random motion and a little noise, in voxels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, 4, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=tuple(shape), mode="trilinear", align_corners=True)
    return strength * (smooth + 0.2 * torch.randn(1, 3, *shape, generator=generator))


def by_kernels_and_by_torch(call):
    """What a call returns with the compiled kernels, where numba is there, and without them."""
    first = call()
    with mock.patch.object(folds, "kernels", return_value=None):
        return first, call()


def determinant_at(corners: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """(n,) determinant of trilinear cells (2, 2, 2, 3, n) at one point, by automatic differentiation."""

    def place(point):
        weights = [torch.stack([1 - x, x]) for x in point]
        return torch.einsum("a,b,c,abcdn->nd", *weights, corners)

    return torch.linalg.det(torch.func.jacfwd(place)(where))


def one_cell(corners: torch.Tensor) -> DenseTransform:
    """A transform of one cell whose corners (2, 2, 2, 3) go where they are told."""
    here = torch.tensor(CORNERS, dtype=torch.float64).view(2, 2, 2, 3)
    return DenseTransform((corners - here).movedim(-1, 0).float(), plain((2, 2, 2)))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), where=st.tuples(*[st.floats(0, 1)] * 3))
def test_the_coefficients_are_those_of_the_determinant(seed, where):
    corners = torch.randn(2, 2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    coefficients = folds.bernstein(corners)
    basis = [torch.tensor([(1 - x) ** 2, 2 * x * (1 - x), x * x], dtype=torch.float64) for x in where]
    value = torch.einsum("i,j,k,ijkn->n", *basis, coefficients)
    point = torch.tensor(where, dtype=torch.float64)
    torch.testing.assert_close(value, determinant_at(corners, point), rtol=1e-9, atol=1e-9)
    at_corners = coefficients[::2, ::2, ::2].flatten(0, 2)
    torch.testing.assert_close(at_corners, fields.determinants_at_corners(corners), rtol=1e-9, atol=1e-9)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.floats(0.05, 1.5))
def test_the_cheap_bound_lies_below_every_determinant_of_the_cell(seed, size):
    u = size * torch.randn(1, 3, 3, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    bound = fields.determinant_bound(u)[0]
    cells = torch.ones_like(bound).nonzero()
    corners = fields.gather_corners(u, torch.zeros(len(cells), dtype=torch.long), cells.unbind(1))
    for where in product((0.0, 0.4, 1.0), repeat=3):
        found = determinant_at(corners, torch.tensor(where, dtype=torch.float64))
        assert bool((bound.flatten() <= found + 1e-9).all())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), strength=st.floats(0.01, 1.0), thick=st.floats(1.0, 20.0), away=st.floats(0, 500))
def test_single_precision_bounds_lie_below_every_determinant_of_the_cell(seed, strength, thick, away):
    grid = turned(spacing=(1.0, 1.0, thick), shape=(5, 7, 6))
    alignment = np.eye(4)
    alignment[:3] = [[1.2, 0.3, 0, away], [-0.3, 0.9, 0.1, -away], [0, 0, 0.8, away]]
    transform = rounded(dense_from_voxels(rough(grid.shape, strength, seed), grid, alignment))
    bounds = by_kernels_and_by_torch(lambda: next(folds._Frame(transform, mirrored=False).blocks()).bound)
    index = torch.ones(bounds[0].shape).nonzero()
    nodes = transform.displacement.double()[None]
    corners = fields.gather_corners(nodes, torch.zeros(len(index), dtype=torch.long), index.unbind(1))
    here = torch.tensor(CORNERS, dtype=torch.float64).view(2, 2, 2, 3, 1)
    corners = corners - here + torch.einsum("ab,xyzbn->xyzan", torch.from_numpy(grid.affine[:3, :3]), here)
    at_rest = np.linalg.det(grid.affine[:3, :3]) * np.linalg.det(transform.affine_part()[:3, :3])
    for where in product((0.0, 0.4, 1.0), repeat=3):
        found = determinant_at(corners, torch.tensor(where, dtype=torch.float64)) / at_rest
        for bound in bounds:
            assert (bound.ravel() <= found.numpy()).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), strength=st.floats(0.05, 1.5))
def test_the_least_determinant_is_exact_where_it_is_asked_for(seed, strength):
    u = rough((6, 5, 7), strength, seed)
    exact = fields.corner_determinants(u).amin(dim=1, keepdim=True)
    least = fields.least_determinant(u, below=0.1)
    below = exact <= 0.1
    torch.testing.assert_close(least[below], exact[below], rtol=1e-4, atol=1e-5)
    assert bool((least[~below] > 0.1).all())


def test_an_alternating_fold_is_seen_where_central_differences_see_none():
    u = torch.zeros(1, 3, 12, 12, 12)
    index = fields.identity((12, 12, 12)).sum(dim=1)
    u[:, 0] = torch.where(index % 2 == 0, 0.6, -0.6)
    u = u * torch.nn.functional.pad(torch.ones(6, 6, 6), (3,) * 6)
    assert float(fields.jacobian_determinant(u).min()) > 0.5
    grid = plain((12, 12, 12))
    found = folds.certify(dense_from_voxels(u, grid), grid)
    assert float(found.folded.determinant.min()) == pytest.approx(-0.2, abs=1e-6)
    assert found.count.folded > 100
    halved = folds.certify(dense_from_voxels(u.clamp(min=0), grid), grid).count  # 0 or 0.6: kept apart
    assert (halved.folded, halved.undecided) == (0, 0)
    assert halved.no_fold_proven


def test_folds_everywhere_are_all_judged():
    u = torch.zeros(1, 3, 24, 24, 24)
    u[:, 0] = torch.where(fields.identity((24, 24, 24)).sum(dim=1) % 2 == 0, 0.6, -0.6)
    grid = plain((24, 24, 24))
    count = folds.certify(dense_from_voxels(u, grid), grid).count
    assert count.folded == count.cells == 23**3


def cell_that_folds_inside(seed: int) -> torch.Tensor | None:
    """A cell (2, 2, 2, 3) whose corner determinants are above 0 and whose determinant at some inner point is not."""
    generator = torch.Generator().manual_seed(seed)
    here = torch.tensor(CORNERS, dtype=torch.float64).view(2, 2, 2, 3, 1)
    corners = here + 0.55 * torch.randn(2, 2, 2, 3, 1000, dtype=torch.float64, generator=generator)
    corners = corners[..., fields.determinants_at_corners(corners).amin(dim=0) > 0.02]
    inside = torch.stack(
        [determinant_at(corners, torch.tensor(p, dtype=torch.float64)) for p in product((0.3, 0.7), repeat=3)]
    )
    bad = (inside.amin(dim=0) < -0.02).nonzero()
    return corners[..., bad[0, 0]] if len(bad) else None


def test_a_fold_between_positive_corners_is_found():
    cells = [cell for cell in map(cell_that_folds_inside, range(60)) if cell is not None][:10]
    assert len(cells) == 10
    for cell in cells:
        found = folds.certify(one_cell(cell), plain((2, 2, 2)))
        assert (found.count.folded, found.count.proven) == (1, 0)
        assert bool((found.folded.size < 1).all()), "found in a part, not at a corner of the cell"


def test_a_cell_that_touches_zero_inside_stays_undecided():
    """J = 1e-10 + (i - 1/3)^2 where the halves' corners never meet 1/3."""
    corners = torch.tensor(CORNERS, dtype=torch.float64).view(2, 2, 2, 3).clone()
    flat = torch.full((3, 3, 3, 1), 1.0, dtype=torch.float64)
    flat[:, :, :, 0] = torch.tensor([1 / 9, -2 / 9, 4 / 9]).double().view(3, 1, 1) + 1e-10
    decided = folds._decide(flat.reshape(27, 1).numpy())
    assert (bool(decided.folded[0]), bool(decided.undecided[0])) == (False, True)
    assert folds.certify(one_cell(corners), plain((2, 2, 2))).count.no_fold_proven


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), strength=st.floats(0.1, 2.0))
def test_what_is_proven_is_positive_everywhere_and_what_is_folded_is_not(seed, strength):
    grid = turned()
    transform = rounded(dense_from_voxels(rough(grid.shape, strength, seed), grid))
    found = folds.certify(transform, grid)
    assert found.count.cells == math.prod(n - 1 for n in grid.shape)
    assert found.count.proven + found.count.folded + found.count.undecided == found.count.cells
    to_voxels = np.linalg.inv(grid.affine[:3, :3])
    u = torch.einsum("ab,bijk->aijk", torch.from_numpy(to_voxels), transform.displacement.double())[None]
    exact = fields.corner_determinants(u)[0]
    at_corner = int((exact.amin(dim=0) <= 0).sum())
    assert at_corner <= found.count.folded <= at_corner + 0.02 * found.count.cells
    if found.count.folded == 0:
        assert found.count.smallest_proven <= float(exact.min()) + 1e-9


def test_more_open_cells_than_are_judged_together_are_all_judged():
    grid = plain((24, 24, 24))
    found = folds.certify(dense_from_voxels(rough(grid.shape, 3.0, 0), grid), grid).count
    assert found.folded > 8_000
    assert found.folded + found.undecided + found.proven == 23**3


@needs_numba
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), strength=st.floats(0.1, 2.0), mirrored=st.booleans(), length=st.integers(2, 70))
def test_kernels_and_torch_find_the_same(seed, strength, mirrored, length):
    nodes, fixed = turned(shape=(9, 8, length)), turned(shape=(8, 9, 40))
    matrix = np.diag([-1.3 if mirrored else 1.3, 0.8, 1.1, 1.0])
    transform = rounded(dense_from_voxels(rough(nodes.shape, strength, seed), nodes, matrix))
    one, other = by_kernels_and_by_torch(lambda: folds.certify(transform, fixed, mirrored))
    assert one.count.smallest_proven == pytest.approx(other.count.smallest_proven, rel=1e-4, nan_ok=True)
    unlike = {"smallest_proven": 0.0}
    assert dataclasses.replace(one.count, **unlike) == dataclasses.replace(other.count, **unlike)
    assert torch.equal(one.folded.low, other.folded.low)
    assert torch.equal(one.folded.size, other.folded.size)
    torch.testing.assert_close(one.folded.determinant, other.folded.determinant)


def test_as_many_doubtful_cells_as_are_judged_together_leave_none_for_the_end():
    grid = plain((24, 24, 24))
    found = folds.certify(dense_from_voxels(rough(grid.shape, 3.0, 0), grid), grid).count
    assert found.cells == 23**3
    assert found.folded > 0


@pytest.mark.parametrize("mirrored", [False, True])
def test_signs_are_relative_to_the_alignment(mirrored):
    grid = turned()
    matrix = np.eye(4)
    matrix[:3, :3] = np.diag([-1.3 if mirrored else 1.3, 0.8, 1.1])
    u = rough(grid.shape, 0.1, 3)
    alone = folds.certify(dense_from_voxels(u, grid), grid).count
    together = folds.certify(dense_from_voxels(u, grid, matrix), grid, mirrored=mirrored).count
    assert (together.folded, together.undecided) == (alone.folded, alone.undecided) == (0, 0)
    assert together.smallest_proven == pytest.approx(1.3 * 0.8 * 1.1 * alone.smallest_proven, rel=0.2)
    against = folds.certify(dense_from_voxels(u, grid, matrix), grid, mirrored=not mirrored).count
    assert against.folded == against.cells


def test_cells_beyond_the_fixed_image_are_counted_apart():
    nodes, fixed = plain((12, 12, 12)), Grid((5, 5, 5), np.diag([1.0, 1, 1, 1]))
    u = torch.zeros(1, 3, 12, 12, 12)
    u[0, 0, 9, 9, 9] = 1.5
    found = folds.certify(dense_from_voxels(u, nodes), fixed).count
    assert (found.cells, found.folded, found.no_fold_proven) == (5**3, 0, False)
    assert found.folded_outside > 0
    assert json.loads(json.dumps(dataclasses.asdict(found))) == dataclasses.asdict(found)


def test_a_voxel_is_marked_when_its_box_meets_a_folded_cell():
    nodes = Grid((6, 6, 6), np.diag([2.0, 2.0, 2.0, 1.0]))
    fixed = plain((11, 11, 11))
    u = torch.zeros(1, 3, 6, 6, 6)
    u[0, 0, 2, 2, 2] = 1.2  # crosses its neighbor: the cells beyond it along i fold
    found = folds.certify(dense_from_voxels(u, nodes), fixed)
    assert bool((found.folded.size == 1).all())
    marked = folds.folded_voxels(found.folded, nodes, fixed) <= 0
    expected = torch.zeros(11, 11, 11, dtype=torch.bool)
    for i, j, k in found.folded.low.long().tolist():  # a cell of 2 mm from an even index: voxels 2i to 2i + 2
        expected[2 * i : 2 * i + 3, 2 * j : 2 * j + 3, 2 * k : 2 * k + 3] = True
    assert torch.equal(marked, expected)


def test_marks_follow_an_oblique_fixed_image():
    nodes, fixed = plain((8, 8, 8)), turned(spacing=(0.5, 0.5, 0.5), shape=(30, 30, 30))
    affine = fixed.affine.copy()
    affine[:3, 3] += nodes.center - fixed.center
    fixed = Grid(fixed.shape, affine)
    low, size = torch.tensor([[3.0, 3.0, 3.0]]), torch.tensor([1.0])
    marked = folds.folded_voxels(folds.Parts(low, size, torch.tensor([-0.5])), nodes, fixed) <= 0
    index = np.indices(fixed.shape).reshape(3, -1).T
    offsets = np.array(list(product((-0.49, -0.25, 0, 0.25, 0.49), repeat=3)))
    points = apply_affine(fixed.affine, (index[:, None] + offsets).reshape(-1, 3)).reshape(len(index), -1, 3)
    hit = ((points > 3) & (points < 4)).all(axis=2).any(axis=1)
    assert not (hit & ~marked.numpy().ravel()).any(), "every voxel with a point in the cell is marked"
    near = ((points > 2.8) & (points < 4.2)).all(axis=2).any(axis=1)
    assert not (marked.numpy().ravel() & ~near).any(), "and none that stays clear of it"


def test_regions_are_listed_largest_first():
    grid = turned()
    least = torch.full(grid.shape, math.inf)
    least[2:4, 2:4, 2:4] = -0.1
    least[10, 10, 10] = -0.7
    large, small = folds.regions(Volume(least, grid))
    voxel = float(np.prod(grid.spacing))
    assert (large.voxels, small.voxels) == (8, 1)
    assert large.mm3 == pytest.approx(8 * voxel)
    assert small.determinant == pytest.approx(-0.7)
    np.testing.assert_allclose(small.position, apply_affine(grid.affine, np.array([[10, 10, 10]]))[0])


@settings(max_examples=15, deadline=None)
@example(seed=474, strength=1.125)  # a cell between positive corners, which asking for more alone did not unfold
@given(seed=st.integers(0, 1000), strength=st.floats(0.2, 1.2))
def test_unfolding_ends_proven_after_rounding(seed, strength):
    grid = turned(shape=(16, 15, 17))
    matrix = np.eye(4)
    matrix[:3, :3] = [[1.1, 0.1, 0], [-0.1, 0.9, 0.05], [0, 0.1, 1.2]]
    transform = rounded(dense_from_voxels(rough(grid.shape, strength, seed), grid, matrix))
    found = folds.certify(rounded(folds.unfold(transform)), grid).count
    assert found.no_fold_proven
    assert found.smallest_proven > 0


def test_unfolding_moves_only_what_folds():
    at = fields.identity((20, 20, 20)) - 10
    bump = torch.exp(-at.square().sum(dim=1, keepdim=True) / 18)
    u = 0.3 * torch.sin(at / 6)
    u[:, :1] -= 1.8 * at[:, :1] * bump
    grid = plain((20, 20, 20))
    transform = rounded(dense_from_voxels(u, grid))
    before = folds.certify(transform, grid)
    calls = []
    unfolded = folds.unfold(transform, job=Job(cancelled=lambda: calls.append(None)))
    assert before.count.folded > 20
    assert len(calls) < 200
    moved = (unfolded.displacement - transform.displacement).norm(dim=0)
    folded = folds.folded_voxels(before.folded, grid, grid) <= 0
    far = torch.nn.functional.max_pool3d(folded[None].float(), 9, 1, 4)[0] == 0
    assert float(moved[far].max()) == 0
    assert float(moved.max()) < 1.5
    assert folds.unfold(unfolded) is unfolded
    assert folds.unfold(transform, iterations=0) is transform


def test_unfolding_goes_on_while_fewer_folds_are_left():
    """A field as rough as a network's steps may be, which more than twice the iterations are needed for."""
    smooth = torch.randn(1, 3, 10, 10, 10, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        smooth = torch.nn.functional.avg_pool3d(smooth, 3, 1, 1)
    transform = DenseTransform(2 * smooth[0] / smooth.std(), plain((10, 10, 10)))
    calls = []
    unfolded = folds.unfold(transform, job=Job(cancelled=lambda: calls.append(None)))
    assert len(calls) > 600
    assert folds.certify(unfolded, unfolded.grid).count.no_fold_proven


@settings(max_examples=4, deadline=None)
@given(strength=st.floats(2.0, 20.0), seed=st.integers(0, 1000))
def test_unfolding_a_field_of_folds_stays_finite_and_makes_none_more(strength, seed):
    grid = plain((12, 12, 12))
    transform = dense_from_voxels(rough(grid.shape, strength, seed), grid)
    unfolded = folds.unfold(transform, iterations=40)
    assert bool(torch.isfinite(unfolded.displacement).all())
    assert folds.certify(unfolded, grid).count.folded <= folds.certify(transform, grid).count.folded


def test_a_displacement_that_is_no_number_is_refused():
    grid = plain((6, 6, 6))
    u = torch.zeros(1, 3, 6, 6, 6)
    u[0, 1, 3, 3, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        folds.certify(dense_from_voxels(u, grid), grid)


def test_a_judgment_can_be_cancelled():
    grid = plain((6, 6, 6))
    with pytest.raises(KeyboardInterrupt):
        folds.certify(dense_from_voxels(torch.zeros(1, 3, 6, 6, 6), grid), grid, job=Job(cancelled=interrupt))


def interrupt():
    raise KeyboardInterrupt
