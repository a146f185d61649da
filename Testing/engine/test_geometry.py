"""Physical space, against SimpleITK and float64 arithmetic, on grids of any orientation, spacing and handedness."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from MorphSeekLib.protocol.job import Job
from MorphSeekLib.space import fields, geometry
from MorphSeekLib.space.geometry import DenseTransform, Grid, Volume, apply_affine

some = settings(max_examples=15, deadline=None)
POINT_MM = 1e-3  # the promise: points within a micrometre ...
INTENSITY = 1e-3  # ... and intensities within 0.1 % of the range
BACKGROUND = -1000.0
CODES = ["".join(p) for t in itertools.product("RL", "AP", "SI") for p in itertools.permutations(t)]


@st.composite
def grids(draw, center=(0.0, 0.0, 0.0), smallest: int = 5, largest: int = 12) -> Grid:
    """Any orientation, anisotropic, either handedness; its middle within a few mm of ``center``."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    shape = rng.integers(smallest, largest + 1, 3)
    spacing = rng.uniform(0.6, 3.0, 3)
    direction = draw(st.sampled_from(["world axes", "oblique"]))
    if direction == "oblique":
        matrix = Rotation.random(random_state=rng.integers(2**31)).as_matrix()
    else:
        matrix = geometry.orientation_matrix(draw(st.sampled_from(CODES)))
    if draw(st.booleans()):
        matrix = matrix * [1, 1, -1]
    origin = np.asarray(center) + rng.uniform(-3, 3, 3) - matrix @ (spacing * (shape - 1) / 2)
    return Grid.from_parts(shape, spacing, matrix, origin)


def near_affine(seed: int, size: float = 0.15, shift: float = 3.0, about=(0.0, 0.0, 0.0)) -> np.ndarray:
    """Rotation by up to 40 degrees, scaling, shearing and a shift, turning about a point."""
    rng = np.random.default_rng(seed)
    matrix = np.eye(4)
    turn = Rotation.from_rotvec(rng.uniform(-0.4, 0.4, 3)).as_matrix()
    matrix[:3, :3] = turn @ (np.eye(3) + rng.uniform(-size, size, (3, 3)))
    matrix[:3, 3] = rng.uniform(-shift, shift, 3) + about - matrix[:3, :3] @ about
    return matrix


def smooth_values(shape, seed: int, nodes: int = 3) -> torch.Tensor:
    """(3, i, j, k) float32 in -1..1, cubic between a few random nodes."""
    coarse = np.random.default_rng(seed).uniform(-1, 1, (3, nodes, nodes, nodes))
    at = np.stack(np.meshgrid(*[np.linspace(0, nodes - 1, n) for n in shape], indexing="ij"))
    values = np.stack([map_coordinates(c, at, order=3, mode="nearest") for c in coarse])
    return torch.from_numpy(values / np.abs(values).max()).float()


def random_dense(over: Grid, seed: int, size_mm: float = 4.0) -> DenseTransform:
    """A smooth transform on nodes of its own, coarser and otherwise oriented, that cover ``over``."""
    rng = np.random.default_rng(seed)
    nodes = geometry.covering_grid(over, rng.uniform(2.5, 4.0, 3), CODES[rng.integers(len(CODES))])
    return DenseTransform(smooth_values(nodes.shape, seed) * size_mm, nodes)


def indices(grid: Grid) -> np.ndarray:
    """(n, 3) voxel indices, k fastest."""
    return np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij"), -1).reshape(-1, 3)


def world(grid: Grid) -> np.ndarray:
    """(n, 3) LPS mm of all voxels."""
    return apply_affine(grid.affine, indices(grid))


def mapped(transform, points: np.ndarray) -> np.ndarray:
    if transform is None:
        return points
    return transform.map_points(points) if isinstance(transform, DenseTransform) else apply_affine(transform, points)


def flat(points: torch.Tensor) -> np.ndarray:
    """(1, 3, i, j, k) -> (n, 3) float64."""
    return points.reshape(3, -1).T.double().numpy()


def itk_image(data: torch.Tensor, grid: Grid) -> sitk.Image:
    """From (i, j, k) or (3, i, j, k)."""
    array = data.numpy()
    vector = array.ndim == 4
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(3, 2, 1, 0) if vector else array.T), vector)
    image.SetSpacing(grid.spacing.tolist())
    image.SetDirection(grid.direction.ravel().tolist())
    image.SetOrigin(grid.origin.tolist())
    return image


def itk_transform(transform) -> sitk.Transform:
    if transform is None:
        return sitk.Transform()
    if isinstance(transform, DenseTransform):
        return sitk.DisplacementFieldTransform(itk_image(transform.displacement.double(), transform.grid))
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(transform[:3, :3].ravel().tolist())
    affine.SetTranslation(transform[:3, 3].tolist())
    return affine


def random_image(grid: Grid, seed: int) -> Volume:
    data = torch.rand(grid.shape, generator=torch.Generator().manual_seed(seed)) * 800 + 100
    return Volume(data, grid)


def transforms(fixed: Grid, kind: str, seed: int):
    if kind == "none":
        return None
    if kind == "affine":
        return near_affine(seed, about=fixed.center)
    return random_dense(fixed, seed)


kinds = st.sampled_from(["none", "affine", "dense"])
seeds = st.integers(0, 2**20)


# --- grids -------------------------------------------------------------------------------------------------------


@some
@given(grids())
def test_grid_is_what_itk_says(grid):
    image = itk_image(torch.zeros(grid.shape), grid)
    for index in ([0, 0, 0], [n - 1 for n in grid.shape], [1, 2, 3]):
        expected = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(apply_affine(grid.affine, np.array([index]))[0], expected, atol=1e-9)
    assert image.GetSize() == grid.shape
    np.testing.assert_allclose(np.array(image.GetDirection()).reshape(3, 3), grid.direction, atol=1e-12)
    np.testing.assert_allclose(grid.center, world(grid).mean(axis=0), atol=1e-9)
    again = Grid.from_parts(image.GetSize(), image.GetSpacing(), image.GetDirection(), image.GetOrigin())
    assert grid.same_as(again)
    assert not grid.same_as(Grid(grid.shape, grid.affine + np.diag([0.1, 0, 0, 0])))
    assert not grid.same_as(Grid((*grid.shape[:2], grid.shape[2] + 1), grid.affine))


@pytest.mark.parametrize("code", CODES)
def test_orientation_codes_are_those_of_itk(code):
    name = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(
        geometry.orientation_matrix(code.lower()).ravel().tolist()
    )
    assert name == code


@pytest.mark.parametrize("code", ["RA", "RAX", "RLS", "RASS", ""])
def test_bad_orientation_codes_are_refused(code):
    with pytest.raises(ValueError, match="for instance RAS"):
        geometry.orientation_matrix(code)


def test_bad_grids_are_refused():
    with pytest.raises(ValueError, match="three axes"):
        Grid((4, 4), np.eye(4))
    with pytest.raises(ValueError, match="three axes"):
        Grid((4, 0, 4), np.eye(4))
    for affine in (np.eye(3), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match="finite 4x4"):
            Grid((4, 4, 4), affine)
    for diagonal in ([1, 0, 1, 1], [0, 0, 0, 1]):
        with pytest.raises(ValueError, match="singular"):
            Grid((4, 4, 4), np.diag(diagonal))
    with pytest.raises(ValueError, match="singular"):
        Grid((4, 4, 4), np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    assert Grid((4, 4, 4), np.diag([1e-3, 1e-3, 1e-3, 1])).spacing.tolist() == [1e-3] * 3  # microscopy is fine
    with pytest.raises(ValueError, match="its grid"):
        Volume(torch.zeros(2, 3, 4), Grid((4, 3, 2), np.eye(4)))


@some
@given(
    grids(),
    st.sampled_from(CODES),
    st.none() | st.tuples(*[st.floats(0.5, 5)] * 3),
    st.sampled_from([1, 2, 16]),
    st.none() | st.tuples(*[st.integers(1, 40)] * 3),
)
def test_covering_grid_covers_every_voxel_rim(grid, code, spacing, multiple, at_least):
    cover = geometry.covering_grid(grid, spacing, code, multiple, at_least)
    corners = np.array(list(itertools.product(*[(-0.5, n - 0.5) for n in grid.shape])))
    at = apply_affine(np.linalg.inv(cover.affine) @ grid.affine, corners)
    last = np.array(cover.shape) - 1
    assert (at > -1e-5).all()
    assert (at < last + 1e-5).all()
    np.testing.assert_allclose(cover.center, grid.center, atol=1e-9)
    np.testing.assert_allclose(cover.direction, geometry.orientation_matrix(code), atol=1e-12)
    assert all(n % multiple == 0 and n >= 2 for n in cover.shape)
    if spacing is not None:
        np.testing.assert_allclose(cover.spacing, spacing)
    if at_least is not None:
        assert (np.array(cover.shape) >= at_least).all()
    elif multiple == 1:  # and no larger than it must be
        assert (at.max(axis=0) - at.min(axis=0) > last - 1 - 1e-5).all()


def test_covering_grid_keeps_the_spacing_of_the_nearest_axis():
    grid = Grid.from_parts((10, 20, 30), (1.0, 2.0, 3.0), geometry.orientation_matrix("ASR"), (0, 0, 0))
    assert geometry.covering_grid(grid).spacing.tolist() == [3.0, 1.0, 2.0]


# --- points ------------------------------------------------------------------------------------------------------


@some
@given(st.data(), seeds)
def test_points_as_itk(data, seed):
    fixed = data.draw(grids())
    transform = random_dense(fixed, seed)
    rng = np.random.default_rng(seed)
    points = apply_affine(fixed.affine, rng.uniform(-0.5, np.array(fixed.shape) - 0.5, (20, 3)))
    itk = itk_transform(transform)
    expected = np.array([itk.TransformPoint(p.tolist()) for p in points])
    assert np.abs(transform.map_points(points) - expected).max() < POINT_MM
    # at voxels, in voxels of another grid
    moving = data.draw(grids())
    expected = np.array([itk.TransformPoint(p.tolist()) for p in world(fixed)])
    landed = flat(geometry.index_points(fixed, transform, moving))
    assert np.abs(apply_affine(moving.affine, landed) - expected).max() < POINT_MM
    displacement = flat(transform.displacement_at(fixed)[None])
    assert np.abs(world(fixed) + displacement - expected).max() < POINT_MM


@some
@given(st.data(), seeds, st.sampled_from([0.0, 1500.0, -1500.0]), st.sampled_from([0.0, 1500.0]))
def test_points_stay_exact_far_from_the_origin(data, seed, fixed_at, moving_at):
    """Table positions of meters, also when the two images lie meters apart."""
    fixed = data.draw(grids(center=(fixed_at, -fixed_at, fixed_at)))
    moving = data.draw(grids(center=(moving_at, moving_at, -moving_at)))
    there = np.eye(4)
    there[:3, 3] = moving.center - fixed.center
    matrix = near_affine(seed, about=moving.center) @ there
    work = geometry.covering_grid(fixed, (3.0, 3.5, 4.0), "LIA")
    u = smooth_values(work.shape, seed)[None]
    step = DenseTransform(torch.einsum("ab,bijk->aijk", torch.from_numpy(work.affine[:3, :3]), u[0].double()), work)
    points = world(fixed)

    transform = geometry.dense_from_voxels(u, work, matrix)
    around = geometry.covering_grid(work, (5.0, 5.0, 5.0), at_least=(30, 30, 30))
    alignment = geometry.dense_from_voxels(torch.zeros(1, 3, *around.shape), around, matrix)
    twice = geometry.dense_from_voxels(u, work, alignment)
    expected = apply_affine(matrix, step.map_points(points))
    assert np.abs(transform.map_points(points) - expected).max() < POINT_MM
    assert np.abs(twice.map_points(points) - expected).max() < POINT_MM
    for way, exact in ((matrix, apply_affine(matrix, points)), (transform, expected)):
        landed = apply_affine(moving.affine, flat(geometry.index_points(fixed, way, moving)))
        assert np.abs(landed - exact).max() < POINT_MM


# --- resampling --------------------------------------------------------------------------------------------------


def check_resampling(fixed: Grid, moving: Grid, transform, seed: int) -> None:
    """Linear and nearest against SimpleITK; points within 1e-3 voxel of a decision (a tie, the rim) are left out."""
    at = apply_affine(np.linalg.inv(moving.affine), mapped(transform, world(fixed)))
    shape = np.array(moving.shape)
    rim = np.minimum(np.abs(at + 0.5), np.abs(at - (shape - 0.5))).min(axis=1)
    tie = np.abs(at + 0.5 - np.round(at + 0.5)).min(axis=1)
    inside = ((at >= -0.5) & (at < shape - 0.5)).all(axis=1)
    volume, itk = random_image(moving, seed), itk_transform(transform)
    reference = itk_image(torch.zeros(fixed.shape), fixed)

    ours = geometry.resample(volume, fixed, transform, background=BACKGROUND)
    theirs = sitk.Resample(itk_image(volume.data, moving), reference, itk, sitk.sitkLinear, BACKGROUND)
    ours, theirs = ours.data.flatten().numpy(), sitk.GetArrayFromImage(theirs).T.flatten()
    sure = rim > 1e-3
    assert (ours[sure & ~inside] == BACKGROUND).all()
    assert np.abs(ours - theirs)[sure].max(initial=0) < INTENSITY * float(np.ptp(volume.data.numpy()))

    labels = torch.randint(0, 40, moving.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int16)
    ours = geometry.resample(Volume(labels, moving), fixed, transform, mode="nearest", background=-1)
    theirs = sitk.Resample(itk_image(labels, moving), reference, itk, sitk.sitkNearestNeighbor, -1)
    assert ours.data.dtype == torch.int16
    ours, theirs = ours.data.flatten().numpy(), sitk.GetArrayFromImage(theirs).T.flatten()
    sure &= tie > 1e-3
    assert np.array_equal(ours[sure], theirs[sure])
    assert (ours[sure & ~inside] == -1).all()


@settings(max_examples=40, deadline=None)
@given(st.data(), kinds, seeds)
def test_resampling_as_itk(data, kind, seed):
    fixed, moving = data.draw(grids()), data.draw(grids())
    check_resampling(fixed, moving, transforms(fixed, kind, seed), seed)


@some
@given(st.data(), st.sampled_from(["affine", "dense"]), seeds)
def test_resampling_as_itk_far_from_the_origin(data, kind, seed):
    center = (1500.0, -1400.0, 1600.0)
    fixed, moving = data.draw(grids(center)), data.draw(grids(center))
    check_resampling(fixed, moving, transforms(fixed, kind, seed), seed)


def test_resampling_onto_its_own_grid_changes_nothing():
    grid = Grid.from_parts((6, 7, 8), (1.1, 0.9, 2.3), Rotation.random(random_state=1).as_matrix(), (900, -40, 7))
    volume = random_image(grid, 0)
    torch.testing.assert_close(geometry.resample(volume, grid).data, volume.data, atol=0.02, rtol=0)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.bool, torch.float64):
        data = volume.data.to(dtype)
        nearest = geometry.resample(Volume(data, grid), grid, mode="nearest").data
        assert nearest.dtype == dtype
        assert torch.equal(nearest, data)


def test_labels_beyond_float32_stay_exact():
    data = torch.tensor([2**24 + 1, 2**31 - 1, -(2**31), 7], dtype=torch.int32).view(4, 1, 1)
    grid = Grid((4, 1, 1), np.eye(4))
    assert torch.equal(geometry.resample(Volume(data, grid), grid, mode="nearest").data, data)


def test_halves_round_up_and_the_rim_holds_the_edge():
    volume = Volume(torch.tensor([10.0, 20.0, 30.0]).view(3, 1, 1), Grid((3, 1, 1), np.eye(4)))
    affine = np.diag([0.5, 1, 1, 1.0])
    affine[0, 3] = -1.0
    onto = Grid((9, 1, 1), affine)  # x = -1, -0.5, 0, ... 3
    nearest = geometry.resample(volume, onto, mode="nearest", background=-1).data.flatten().tolist()
    linear = geometry.resample(volume, onto, background=-1).data.flatten().tolist()
    assert nearest == [-1, 10, 10, 20, 20, 30, 30, -1, -1]
    assert linear == pytest.approx([-1, 10, 10, 15, 20, 25, 30, -1, -1], abs=1e-4)
    reference = itk_image(torch.zeros(onto.shape), onto)
    itk = sitk.Resample(itk_image(volume.data, volume.grid), reference, sitk.Transform(), sitk.sitkNearestNeighbor, -1)
    assert sitk.GetArrayFromImage(itk).flatten().tolist() == nearest


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_resampling_goes_slab_by_slab(monkeypatch, mode):
    fixed = Grid.from_parts((11, 6, 5), (2, 3, 4), Rotation.random(random_state=2).as_matrix(), (0, 0, 0))
    moving = random_image(Grid.from_parts((9, 9, 9), (3, 2, 3), np.eye(3), fixed.center - 10), 0)
    transform = random_dense(fixed, 4)
    whole = geometry.resample(moving, fixed, transform, mode=mode).data
    landed, displaced = geometry.index_points(fixed, transform, moving.grid), transform.displacement_at(fixed)
    jacobian = fields.jacobian_determinant(geometry.voxel_displacement(transform, fixed))[0, 0]
    monkeypatch.setattr(geometry, "_SLAB_POINTS", 100)  # 3 planes of 6 x 5
    calls = []
    slabs = geometry.resample(moving, fixed, transform, mode=mode, job=Job(cancelled=lambda: calls.append(1))).data
    assert torch.equal(slabs, whole)
    assert len(calls) == 4
    assert [s.shape[2] for s in geometry._slabs(fixed)] == [3, 3, 3, 2]
    assert torch.equal(geometry.index_points(fixed, transform, moving.grid), landed)
    assert torch.equal(transform.displacement_at(fixed), displaced)
    for points in (1, 60, 90, 120, 10_000):  # slabs of 1, 2, 3, 4 and all planes
        monkeypatch.setattr(geometry, "_SLAB_POINTS", points)
        by_slabs = geometry.jacobian_volume(transform, fixed).data
        torch.testing.assert_close(by_slabs, jacobian, atol=1e-5, rtol=0)

    def cancel():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        geometry.resample(moving, fixed, transform, mode=mode, job=Job(cancelled=cancel))
    with pytest.raises(InterruptedError):
        transform.inverse(moving.grid, job=Job(cancelled=cancel))
    with pytest.raises(InterruptedError):
        geometry.jacobian_volume(transform, fixed, job=Job(cancelled=cancel))


def test_unknown_mode_is_refused():
    volume = random_image(Grid((2, 2, 2), np.eye(4)), 0)
    with pytest.raises(ValueError, match="'cubic'"):
        geometry.resample(volume, volume.grid, mode="cubic")


def test_autocast_does_not_touch_positions():
    fixed = Grid.from_parts((9, 8, 7), (2, 3, 4), Rotation.random(random_state=2).as_matrix(), (800, 0, 0))
    moving = random_image(fixed, 0)
    transform = random_dense(fixed, 4)

    def everything():
        u = torch.ones(1, 3, *transform.grid.shape)
        total = geometry.dense_from_voxels(u, transform.grid, transform)
        return [
            geometry.resample(moving, fixed, transform).data,
            geometry.smooth_for_spacing(moving, 6.0).data,
            geometry.voxel_displacement(total, fixed),
            total.inverse(fixed).displacement,
        ]

    plain = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, plain, everything()))


# --- smoothing ---------------------------------------------------------------------------------------------------


@some
@given(grids(), st.floats(0.5, 8.0))
def test_smoothing_keeps_constants_and_the_mean(grid, spacing):
    constant = geometry.smooth_for_spacing(Volume(torch.full(grid.shape, 321.5), grid), spacing).data
    torch.testing.assert_close(constant, torch.full(grid.shape, 321.5), atol=1e-3, rtol=0)
    margin = np.ceil(3 * spacing / grid.spacing / 2.3).astype(int) + 1
    inner = torch.rand([int(n) for n in grid.shape])
    padded = torch.zeros([int(n + 2 * m) for n, m in zip(grid.shape, margin, strict=True)])
    padded[tuple(slice(int(m), int(m) + n) for n, m in zip(grid.shape, margin, strict=True))] = inner
    blurred = geometry.smooth_for_spacing(Volume(padded, Grid(padded.shape, grid.affine)), spacing).data
    assert float(blurred.sum()) == pytest.approx(float(inner.sum()), rel=1e-4)


def test_smoothing_takes_away_what_would_alias():
    grid = Grid((64, 4, 4), np.eye(4))
    x = torch.arange(64.0).view(64, 1, 1).expand(grid.shape)
    above, below = torch.cos(2 * torch.pi * x / 3.2), torch.cos(2 * torch.pi * x / 32)  # periods in mm

    def seen(wave, smooth):  # standard deviation of the samples every 4 mm
        volume = Volume(wave, grid)
        return float((geometry.smooth_for_spacing(volume, 4.0) if smooth else volume).data[8:-8:4].std())

    assert seen(above, smooth=False) > 0.5
    assert seen(above, smooth=True) < 0.02
    assert seen(below, smooth=True) > 0.9 * seen(below, smooth=False)


@pytest.mark.parametrize("spacing", [(4.0, 1.0, 2.0), (1.0, 1.0, 1.0), (1.0, 6.0, 3.0)])
def test_smoothing_widens_each_axis_to_its_new_voxel(spacing):
    """Axes i, j, k of the volume run along z, x, y of the world."""
    own = np.array([0.5, 1.0, 1.5])
    grid = Grid.from_parts((61, 41, 31), own, geometry.orientation_matrix("ILA"), (0, 0, 0))
    impulse = torch.zeros(grid.shape)
    impulse[30, 20, 15] = 1
    response = geometry.smooth_for_spacing(Volume(impulse, grid), spacing).data.double().numpy()
    assert np.all(impulse.numpy().sum() == 1)  # the input is left alone
    for axis, wanted in enumerate((spacing[2], spacing[0], spacing[1])):
        profile = response.sum(axis=tuple({0, 1, 2} - {axis}))
        x = (np.arange(len(profile)) - len(profile) // 2) * own[axis]
        fwhm = 2.3548 * np.sqrt((profile * x**2).sum() / profile.sum())
        assert np.hypot(fwhm, own[axis]) == pytest.approx(max(wanted, own[axis]), rel=0.03)


# --- dense transforms --------------------------------------------------------------------------------------------


@some
@given(st.data(), seeds, st.sampled_from(["none", "affine", "dense"]))
def test_dense_from_voxels_is_sequential_mapping(data, seed, kind):
    work = geometry.covering_grid(data.draw(grids()), (2.0, 2.5, 3.0), data.draw(st.sampled_from(CODES)))
    u = smooth_values(work.shape, seed)[None]
    if kind == "dense":  # elsewhere oriented, and reaching beyond what u maps to
        around = geometry.covering_grid(work, at_least=[n + 6 for n in work.shape])
        then = random_dense(around, seed + 1)
    else:
        then = transforms(work, kind, seed)
    transform = geometry.dense_from_voxels(u, work, then)
    assert transform.displacement.dtype == torch.float32
    assert not transform.displacement.requires_grad
    expected = mapped(then, apply_affine(work.affine, indices(work) + flat(u)))
    assert np.abs(transform.map_points(world(work)) - expected).max() < POINT_MM
    moving = data.draw(grids())
    landed = flat(geometry.map_voxels(u, work, then, moving))
    assert np.abs(apply_affine(moving.affine, landed) - expected).max() < POINT_MM


def test_dense_from_voxels_takes_gradients_halves_and_whole_matrices():
    grid = Grid((3, 3, 3), np.eye(4))
    u = torch.ones(1, 3, 3, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    shift = np.array([[1, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # integers
    transform = geometry.dense_from_voxels(u, grid, shift)
    assert transform.displacement[:, 1, 1, 1].tolist() == [3, 1, 1]
    assert not transform.displacement.requires_grad
    geometry.map_voxels(u, grid, transform, grid).sum().backward()  # a refinement step is trained through this one
    assert torch.isfinite(u.grad).all()
    assert u.grad.any()


def inverse_errors(fixed: Grid, seed: int) -> tuple[float, float, float]:
    """(worst |T(T^-1(y)) - y| at the inverse's nodes, worst and mean |T^-1(T(x)) - x| in the fixed image), mm."""
    work = geometry.covering_grid(fixed, (1.5, 1.5, 1.5), at_least=(12, 12, 12))
    matrix = near_affine(seed, size=0.25, about=fixed.center)
    matrix[:3, 3] += [40, -60, 25]
    u = smooth_values(work.shape, seed)[None]
    transform = geometry.dense_from_voxels(u, work, matrix)
    assert float(fields.jacobian_determinant(u).min()) > 0
    moving = geometry.covering_grid(Grid(work.shape, matrix @ work.affine), (2.0, 2.0, 2.0), "LPS")
    inverse = transform.inverse(moving, tolerance_mm=1e-4)
    nodes = world(moving)
    back = inverse.map_points(nodes)
    at = apply_affine(np.linalg.inv(work.affine), back)
    covered = ((at >= 0) & (at <= np.array(work.shape) - 1)).all(axis=1)
    there = np.linalg.norm(transform.map_points(back) - nodes, axis=1)[covered]
    again = np.linalg.norm(inverse.map_points(transform.map_points(world(fixed))) - world(fixed), axis=1)
    return there.max(), again.max(), again.mean()


@some
@given(st.data(), seeds, st.sampled_from([0.0, 1500.0]))
def test_inverse_leads_back(data, seed, far):
    at_nodes, worst, mean = inverse_errors(data.draw(grids(center=(far, -far, far))), seed)
    assert at_nodes < POINT_MM
    # between its nodes, 2 mm apart: what linear interpolation leaves
    assert worst < 1.0
    assert mean < 0.15


@some
@given(grids(), seeds)
def test_affine_part(grid, seed):
    matrix = near_affine(seed, about=(200, -300, 100))
    work = geometry.covering_grid(grid, (2.0, 2.0, 2.0))
    exact = geometry.dense_from_voxels(torch.zeros(1, 3, *work.shape), work, matrix)
    np.testing.assert_allclose(exact.affine_part(), matrix, atol=1e-3)
    corners = work.corners()
    assert np.abs(apply_affine(exact.affine_part(), corners) - apply_affine(matrix, corners)).max() < POINT_MM


def test_affine_part_of_one_slice_is_the_identity():
    flat_grid = Grid((5, 5, 1), np.eye(4))
    assert np.array_equal(DenseTransform(torch.ones(3, 5, 5, 1), flat_grid).affine_part(), np.eye(4))


@some
@given(st.data(), seeds, st.sampled_from([0.0, 1500.0]))
def test_jacobian_is_the_physical_one(data, seed, far):
    """det(I + du/dx) with du/dx = du/dindex (direction spacing)^-1, whatever the grid's orientation."""
    grid = data.draw(grids(center=(far, far, -far)))
    u = smooth_values(grid.shape, seed).numpy() * 2.0
    matrix = near_affine(seed, about=grid.center)
    transform = DenseTransform(torch.from_numpy(u), grid)
    gradient = np.stack([np.stack(np.gradient(c.astype(np.float64)), -1) for c in u], -2)
    expected = np.linalg.det(np.eye(3) + gradient @ np.linalg.inv(grid.affine[:3, :3]))
    jacobian = fields.jacobian_determinant(geometry.voxel_displacement(transform, grid))[0, 0]
    np.testing.assert_allclose(jacobian, expected, atol=2e-3)
    work = geometry.covering_grid(grid, (2.0, 2.0, 2.0))
    affine = geometry.dense_from_voxels(torch.zeros(1, 3, *work.shape), work, matrix)
    jacobian = geometry.jacobian_volume(affine, grid).data
    np.testing.assert_allclose(jacobian, np.linalg.det(matrix[:3, :3]), atol=2e-3)
