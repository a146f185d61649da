"""The fit: its objective against finite differences, its kernels against torch, what it delivers and reports."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import blob_grid, blob_image, blob_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from test_registration import random_model
from torch import Tensor
from typer.testing import CliRunner

from MorphSeekLib.app.cli import app
from MorphSeekLib.io.compiled import kernels
from MorphSeekLib.io.images import write_image
from MorphSeekLib.measures.folds import certify
from MorphSeekLib.measures.metrics import dice_per_label
from MorphSeekLib.protocol.errors import Cancelled
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.registration import descent
from MorphSeekLib.registration.descent import CompiledStepper, descend
from MorphSeekLib.registration.objective import (
    Level,
    Maps,
    Objective,
    block_sum,
    diffusion,
    doubled,
    finer,
    folding,
    upsample,
    upsample_transposed,
)
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.registration.pyramid import Crop, Pyramid, lattice_of
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import Grid, Volume, apply_affine, map_voxels

VOXELS = (16, 20, 24)
POINTS = (8, 10, 12)
needs_numba = pytest.mark.skipif(kernels("registration.kernels") is None, reason="numba is not installed")


def smooth(seed: int, channels: int = 1) -> Tensor:
    """An image (1, channels, *VOXELS) in [0, 1]."""
    noise = torch.rand(1, channels, *POINTS, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, scale_factor=2, mode="trilinear")


BOTH = "both"
COMPARED = [None, 0.3, BOTH]  # intensities, features, both


def level(features: float | str | None = None, dtype: torch.dtype = torch.float32) -> Level:
    """Two smooth images, of which some blocks do not count, and some are masked."""
    if features == BOTH:
        maps = Maps(smooth(4, 5).to(dtype), smooth(5, 5).to(dtype), 0.3)
        return replace(level(None, dtype), beside=maps)
    assert not isinstance(features, str)
    channels = 1 if features is None else 5
    counted = (torch.rand(POINTS, generator=torch.Generator().manual_seed(2)) > 0.2) & masked()
    return Level(smooth(0, channels).to(dtype), smooth(1, channels).to(dtype), counted, features, valid=masked())


def masked() -> Tensor:
    """Blocks that a mask leaves."""
    valid = torch.ones(POINTS, dtype=torch.bool)
    valid[5:, :6] = False
    return valid


def control(size: float = 1.5, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Control points that fold here and there and reach beyond the image."""
    return size * torch.randn(1, 3, *POINTS, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("features", COMPARED)
def test_the_gradient_is_that_of_finite_differences(features):
    objective, at = Objective(level(features, torch.float64)), control(dtype=torch.float64)
    gradient = objective(at).gradient
    for seed in range(4):
        along = control(1.0, 10 + seed, torch.float64)
        step = 1e-6 * along
        expected = (objective(at + step).value - objective(at - step).value) / 2e-6
        assert float((gradient * along).sum()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("valid", [None, masked()])
def test_the_value_is_that_of_its_definition(valid):
    """Block by block, by hand; windows are over what a mask leaves."""
    left = torch.ones(POINTS, dtype=torch.bool) if valid is None else valid
    one = Level(smooth(0), smooth(1), left, None, 0.0, 0.0, valid)
    at = control(0.5)
    warped = fields.warp(one.moving, upsample(at), padding="border")
    maps = [left * block_sum(x)[0, 0] for x in (one.fixed, warped, one.fixed**2, warped**2, one.fixed * warped)]
    value = 0.0
    for i, j, k in np.ndindex(*POINTS):
        window = tuple(slice(max(x - 2, 0), x + 3) for x in (i, j, k))
        n = 1000 - 8 * int((~left[window]).sum())
        if n < 200:
            continue
        f, w, ff, ww, fw = (float(x[window].double().sum()) for x in maps)
        value -= (fw - f * w / n) ** 2 / ((ff - f * f / n) * (ww - w * w / n) + 1e-3)
    assert float(Objective(one)(at).value) == pytest.approx(value, rel=1e-4)


def test_what_is_not_counted_changes_nothing():
    one = level()
    other = Level(
        torch.where(doubled(one.counted[None, None]), one.fixed, 0.7), one.moving, one.counted, None, valid=masked()
    )  # another image where nothing counts
    first, second = (Objective(x)(control()) for x in (one, other))
    torch.testing.assert_close(first.value, second.value)
    torch.testing.assert_close(first.gradient, second.gradient)


@needs_numba
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("features", COMPARED)
def test_the_kernels_give_the_same_values_and_gradients(features, threads):
    one, at = level(features), control()
    expected = Objective(level(features, torch.float64))(at.double())
    value, gradient = CompiledStepper(kernels("registration.kernels"), one, at, 0.0, threads).energy()
    assert value == pytest.approx(float(expected.value), rel=1e-5)
    error = (gradient.double() - expected.gradient).abs().max()
    assert float(error) < 1e-5 * float(expected.gradient.abs().max())


@needs_numba
@pytest.mark.parametrize("features", COMPARED)
def test_whole_fits_by_kernels_and_by_torch_end_at_the_same_place(features, monkeypatch):
    fine = level(features)
    halves = [descent.halved(x) for x in (fine.fixed, fine.moving)]
    coarse = Level(*halves, fine.counted[::2, ::2, ::2], fine.features)
    if (maps := fine.beside) is not None:
        coarse = replace(coarse, beside=Maps(descent.halved(maps.fixed), descent.halved(maps.moving), maps.weight))
    ends = [descend([coarse, fine], [10, 10], threads=2)[-1]]
    monkeypatch.setattr(descent, "kernels", lambda _: None)
    ends.append(descend([coarse, fine], [10, 10])[-1])
    apart = (ends[0].control - ends[1].control).abs().max()
    assert float(apart) < 1e-3
    torch.testing.assert_close(ends[0].objectives, ends[1].objectives, rtol=1e-4, atol=1e-2)


def test_levels_that_do_not_double_are_refused():
    """The kernels would write beside the control points."""
    coarse, fine = (torch.rand(1, 1, *shape) for shape in ((8, 10, 8), (16, 20, 18)))
    levels = [Level(image, image, torch.ones([n // 2 for n in image.shape[2:]]) > 0) for image in (coarse, fine)]
    with pytest.raises(ValueError, match=r"level 1 has \(8, 10, 9\) control points, not \(8, 10, 8\)"):
        descend(levels, [1, 1])


@needs_numba
def test_the_same_threads_give_the_same_answer_bit_by_bit():
    first, second = (descend([level()], [8], threads=2)[-1] for _ in range(2))
    assert torch.equal(first.control, second.control)
    assert torch.equal(first.objectives, second.objectives)


@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_upsampling_has_its_transpose_and_keeps_affine_maps(seed):
    u = torch.randn(1, 3, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    v = torch.randn(1, 3, 6, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    torch.testing.assert_close((upsample(u) * v).sum(), (u * upsample_transposed(v)).sum())
    # a level's field is one of the next level, whose voxels are half as long
    inner = (Ellipsis, *[slice(2, -2)] * 3)
    torch.testing.assert_close(upsample(finer(u))[inner], 2 * _sampled_between(upsample(u))[inner])


def _sampled_between(field: Tensor) -> Tensor:
    """A field at the voxels of the next level, linear between its control points."""
    return torch.nn.functional.interpolate(field, scale_factor=2, mode="trilinear", align_corners=False)


def test_regularizers_against_autograd():
    at = control(dtype=torch.float64).requires_grad_()
    for term in (lambda u: diffusion(u, 0.7), lambda u: folding(u, 3.0)):
        energy = term(at)
        [expected] = torch.autograd.grad(energy.value, at)
        torch.testing.assert_close(energy.gradient.detach(), expected)
    assert float(folding(torch.zeros_like(at), 3.0).value) == 0


def test_it_finds_a_known_field_and_lowers_its_objective():
    image = smooth(0)
    truth = 1.2 * torch.sin(fields.identity(VOXELS) / 5)
    one = Level(fields.warp(image, truth, padding="border"), image, torch.ones(POINTS, dtype=torch.bool), None, 0.01)
    end = descend([one], [80])[-1]
    inner = (slice(None), slice(None), *[slice(4, -4)] * 3)
    error = (upsample(end.control) - truth)[inner].norm(dim=1).mean()
    assert float(error) < 0.3 * float(truth[inner].norm(dim=1).mean())
    assert end.objectives[-1] < end.objectives[0]


TURNED = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, -1.0]])


@pytest.mark.parametrize("number", [-1, 0, 1])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.2, 5.0)])
def test_what_is_delivered_is_the_map_of_the_control_points(number, spacing):
    """On nodes that cover the image, whatever its direction, with the alignment in it."""
    grid = Grid.from_parts((30, 26, 21), spacing, TURNED, (10.0, -20.0, 5.0))
    data = torch.zeros(grid.shape)
    data[5:24, 4:20, 3:18] = torch.rand(19, 16, 15, generator=torch.Generator().manual_seed(0)) + 0.1
    alignment = np.array([[1.02, 0.1, 0.0, 3.0], [-0.1, 0.98, 0.05, -2.0], [0.0, 0.02, 1.0, 1.0], [0, 0, 0, 1.0]])
    pyramid = Pyramid.of(Crop.of(Volume(data, grid), torch.device("cpu")), Volume(data, grid), alignment)
    of_level = pyramid.grid(number)
    points = [n // 2 for n in of_level.shape]
    found = 0.4 * torch.randn(1, 3, *points, generator=torch.Generator().manual_seed(1))
    transform = pyramid.transform(found, number)
    inside = np.linalg.inv(transform.grid.affine)
    for corner in grid.corners():
        index = (inside @ (*corner, 1))[:3]
        assert (index > -1e-6).all()
        assert (index < np.array(transform.grid.shape) - 1 + 1e-6).all()
    expected = map_voxels(upsample(found), of_level, alignment, Grid((1, 1, 1), np.eye(4)))[0].flatten(1).T.numpy()
    at = apply_affine(of_level.affine, fields.identity(of_level.shape)[0].flatten(1).T.double().numpy())
    index = apply_affine(inside, at)
    within = ((index >= 0) & (index <= np.array(transform.grid.shape) - 1)).all(axis=1)
    assert within.mean() > 0.3
    np.testing.assert_allclose(transform.map_points(at)[within], expected[within], atol=2e-3)
    # and back
    again = pyramid.control(pyramid.displacement(found, number), number)
    torch.testing.assert_close(again, found, atol=1e-4, rtol=0)


@given(
    shape=st.tuples(*[st.integers(2, 60)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 8.0)] * 3),
)
@settings(max_examples=40, deadline=None)
def test_the_lattice_covers_the_image_with_voxels_of_about_one_length(shape, spacing):
    fixed = Grid.from_parts(shape, spacing, TURNED, (5.0, -3.0, 2.0))
    found = lattice_of(fixed)
    extent = [np.array(grid.shape) * grid.spacing for grid in (fixed, found)]
    np.testing.assert_allclose(extent[1], extent[0], rtol=1e-6)
    np.testing.assert_allclose(found.center, fixed.center, atol=1e-6)
    if max(spacing) <= 2 * min(spacing):
        assert found is fixed


def test_a_huge_image_is_fitted_on_a_coarser_lattice():
    fixed = Grid.from_parts((512, 512, 400), (0.8, 0.8, 1.0), np.eye(3), (0.0, 0.0, 0.0))
    found = lattice_of(fixed)
    assert 0.9 * 20e6 < np.prod(found.shape) < 1.05 * 20e6


@pytest.fixture(scope="module")
def pair():
    """Two images with labels, on different grids."""
    labels = [blob_labels(n, blob_grid()) for n in range(2)]
    return [*(blob_image(v, n) for n, v in enumerate(labels)), *labels]


@pytest.fixture(scope="module")
def fitted(pair):
    """Their registration without a model, and its events."""
    events: list = []
    shown: dict = {}
    job = Job(events.append, on_picture=shown.__setitem__)
    result = register(*pair[:2], None, RegistrationOptions(), job, labels=tuple(pair[2:]))
    return result, events, shown


def test_without_a_model_any_pair_is_registered(pair, fitted):
    result, events, shown = fitted
    report = result.report
    assert report["model"] is None
    assert report["steps"][0]["stage"] == "align"
    assert report["steps"][-1]["stage"] == "fit"
    assert report["steps"][-1]["answer"]
    assert report["dice"]["mean"]["warped"] > report["dice"]["mean"]["aligned"] + 0.05
    assert report["similarity"]["warped"] > report["similarity"]["aligned"]
    dice = dice_per_label(pair[2].data, result.warped_labels.data, moving_labels=pair[3].data)
    assert np.mean(list(dice.values())) == pytest.approx(report["dice"]["mean"]["warped"])
    assert certify(result.transform, pair[0].grid).count.no_fold_proven
    assert report["folding"]["cells"]["no_fold_proven"]
    assert {0, len(report["steps"]) - 1} <= set(shown)
    assert torch.equal(shown[len(report["steps"]) - 1].data, result.warped.data)
    fractions = [e.fraction for e in events]
    assert fractions == sorted(fractions)


def test_the_report_tells_what_was_fitted(fitted):
    result, events, _ = fitted
    fit = result.report["fit"]
    assert fit["similarity"] in ("lncc", "mind")
    assert [len(level["objective"]) for level in fit["levels"]] == fit["iterations"]
    for level in fit["levels"]:
        assert level["objective"][-1] < level["objective"][0]
    assert fit["kernels"].startswith("numba" if kernels("registration.kernels") is not None else "torch")
    assert [e.step for e in events if e.phase == "fit"] == list(range(1, sum(fit["iterations"]) + 1))


def test_it_goes_on_from_a_state(pair, fitted):
    result, *_ = fitted
    further = register(*pair[:2], None, RegistrationOptions(search="off", inverse=False), start=result.state)
    assert len(further.report["steps"]) == len(result.report["steps"]) + 1
    assert further.report["similarity"]["warped"] >= result.report["similarity"]["warped"] - 1e-3


@pytest.mark.parametrize("similarity", ["lncc", "mind", "mse"])
def test_a_fit_follows_the_networks_steps(pair, tmp_path, similarity):
    model = random_model(tmp_path / "random.safetensors")
    options = RegistrationOptions(inverse=False, search="off", similarity=similarity, fit_iterations=(6, 4))
    report = register(*pair[:2], model, options).report
    assert [row["stage"] for row in report["steps"]] == ["align", "network", "network", "fit"]
    assert report["fit"]["similarity"] == similarity
    assert report["similarity"]["warped"] > report["similarity"]["aligned"]
    assert report["folding"]["cells"]["no_fold_proven"]


def test_fast_takes_fewer_iterations_than_best(pair):
    counts = []
    for preset in ("fast", "best"):
        fit = register(*pair[:2], None, RegistrationOptions(inverse=False, preset=preset)).report["fit"]
        voxels = [np.prod(level["shape"]) for level in fit["levels"]]
        counts.append(np.dot(voxels, fit["iterations"]))
    assert counts[0] < 0.6 * counts[1]


def test_cancel_ends_it(pair):
    seen = []

    def on_event(event) -> None:
        if event.phase == "fit":
            seen.append(event)

    with pytest.raises(Cancelled):
        register(*pair[:2], None, RegistrationOptions(), Job(on_event, lambda: len(seen) >= 2))
    assert len(seen) == 2


def test_command_line(pair, tmp_path):
    for name, volume in zip(("f", "m"), pair[:2], strict=True):
        write_image(volume, tmp_path / f"{name}.nii.gz")
    command = ["register", f"{tmp_path}/f.nii.gz", f"{tmp_path}/m.nii.gz", "--no-inverse"]
    chosen = ["--model", "none", "--similarity", "mind", "--fit-iterations", "3/2", "--search", "off"]
    done = CliRunner().invoke(app, [*command, *chosen, "-o", f"{tmp_path}/out"])
    assert done.exit_code == 0, done.output
    assert "Model: none." in done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["fit"]["similarity"], report["fit"]["iterations"]) == ("mind", [3, 2])
    wrong = (["--fit", "30"], ["--fit-iterations", "a/b"], ["--fit-iterations", "1001"], ["--similarity", "cc"])
    for choice in (*wrong, ["--preset", "slow"], ["--search", "far"], ["--model", "nothing"]):
        refused = CliRunner().invoke(app, [*command, *choice, "-o", f"{tmp_path}/none"])
        assert refused.exit_code == 2, choice
        assert choice[1].split("/")[0] in refused.output, choice
        assert not (tmp_path / "none").exists()
