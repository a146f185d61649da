"""Test-time refinement: it lowers its objective, keeps the best, reaches a known answer, unfolds, can be stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cases import blob_grid, blob_image, blob_labels
from hypothesis import given
from hypothesis import strategies as st
from refinement import best_of
from test_registration import random_model
from typer.testing import CliRunner

from MorphSeekLib.app.cli import app
from MorphSeekLib.io.images import write_image
from MorphSeekLib.networks.policy import ModelSettings, RegistrationModel
from MorphSeekLib.protocol.errors import Cancelled
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.options import FitOptions, RegistrationOptions
from MorphSeekLib.registration.fit import objective, optimize
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import Grid, covering_grid
from MorphSeekLib.space.preprocessing import FINE_VOXELS, fine_grid

SHAPE = (16, 20, 16)


@pytest.fixture(scope="module")
def problem():
    """A smooth image, the same image moved by a known field, and a random network's answer for the pair."""
    torch.manual_seed(0)
    noise = torch.nn.functional.avg_pool3d(torch.rand(1, 1, *SHAPE), 5, 1, 2, count_include_pad=False)
    moving = (noise - noise.min()) / (noise.max() - noise.min())
    truth = 1.2 * torch.sin(fields.identity(SHAPE) / 5)
    fixed = fields.warp(moving, truth)
    settings = {"encoder": (4, 4), "decoder": (4,), "extra": (4,), "norm": "instance", "flow_stride": 2}
    model = RegistrationModel(ModelSettings(backbone_settings=settings)).eval()
    torch.nn.init.normal_(model.backbone.flow.weight, 0, 0.02)
    outer = torch.zeros(1, 3, *SHAPE)
    with torch.no_grad():
        latent = model.encode(moving, fixed)
        total = fields.compose(outer, model.displacement(model.field(latent, latent.mu)))
    return model, latent, outer, total, fixed, moving, truth


def value_of(problem, settings):
    _, _, _, _, fixed, moving, _ = problem
    return objective(fixed, lambda u: fields.warp(moving, u), settings)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_never_worse_by_its_own_objective(problem, share):
    model, latent, outer, total, *_ = problem
    settings = FitOptions(iterations=10, latent_share=share, similarity="mse")
    value = value_of(problem, settings)
    before = [p.detach().clone() for p in model.parameters()]
    count = 0

    def counted() -> None:
        nonlocal count
        count += 1

    refined = optimize(model, latent, outer, total, value, settings, counted)
    assert count == 10
    assert float(refined.objectives[0]) == pytest.approx(float(value(total)), rel=1e-5)
    assert float(value(refined.total)) == pytest.approx(float(refined.objectives.min()), rel=1e-5)
    assert refined.objectives.min() < refined.objectives[0]
    assert not refined.total.requires_grad
    assert all(
        torch.equal(p, q) and p.requires_grad and p.grad is None
        for p, q in zip(model.parameters(), before, strict=True)
    )


def test_a_diverging_step_keeps_the_networks_answer(problem):
    model, latent, outer, total, *_ = problem
    settings = FitOptions(iterations=4, latent_share=0.0, field_rate=100.0)
    refined = optimize(model, latent, outer, total, value_of(problem, settings), settings)
    assert torch.equal(refined.total, total)


def test_finds_a_known_deformation(problem):
    model, latent, outer, total, _, _, truth = problem
    settings = FitOptions(iterations=150, latent_share=0.1, similarity="mse", regularization=1e-3)
    refined = optimize(model, latent, outer, total, value_of(problem, settings), settings)
    inner = (..., *(slice(3, -3),) * 3)
    error = lambda u: float((u - truth)[inner].norm(dim=1).mean())  # noqa: E731
    assert error(refined.total) < 0.5 * error(total)


@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    working=st.floats(0.5, 8.0),
    turn=st.floats(-0.5, 0.5),
)
def test_the_fine_grid_is_the_images_own_or_twice_the_working_grids(shape, spacing, working, turn):
    cos, sin = np.cos(turn), np.sin(turn)
    fixed = Grid.from_parts(shape, spacing, np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]), (5.0, -3.0, 2.0))
    found = fine_grid(fixed, covering_grid(fixed, (working,) * 3))
    for axis in range(3):
        if spacing[axis] >= working / 2 or shape[axis] == 1:
            assert found.shape[axis] == max(2, shape[axis])
            assert found.spacing[axis] == pytest.approx(spacing[axis])
        else:
            assert found.shape[axis] <= shape[axis] + 1
            assert found.spacing[axis] <= working / 2 + 1e-6
    np.testing.assert_allclose(found.origin, fixed.origin, atol=1e-6)
    if min(shape) > 1:
        np.testing.assert_allclose(found.corners(), fixed.corners(), atol=1e-4)


def test_a_huge_image_is_refined_on_a_coarser_grid():
    fixed = Grid.from_parts((512, 512, 400), (0.8, 0.8, 1.0), np.eye(3), (0.0, 0.0, 0.0))
    found = fine_grid(fixed, covering_grid(fixed, (2.0,) * 3))
    assert 0.9 * FINE_VOXELS < np.prod(found.shape) < 1.05 * FINE_VOXELS
    assert (found.spacing > 1.0).all()
    assert (found.spacing < 2.0).all()
    np.testing.assert_allclose(found.corners(), fixed.corners(), atol=1e-6)
    crowded = fine_grid(fixed, covering_grid(fixed, (1.0,) * 3))
    np.testing.assert_allclose(crowded.spacing, 1.0, rtol=0.01)


def test_best_of_takes_the_lowest(problem):
    model, latent, outer, total, *_ = problem
    value = value_of(problem, FitOptions())
    found = best_of(model, latent, outer, total, value, 6, tau=3.0, generator=torch.Generator().manual_seed(0))
    assert len(found.objectives) == 7
    assert float(value(found.total)) == pytest.approx(float(found.objectives.min()), rel=1e-5)
    assert len(set(found.objectives.tolist())) == 7


def test_zero_z_and_zero_correction_start_at_the_networks_answer(problem):
    """With steps too small to matter, what comes back is the network's answer to a hair."""
    model, latent, outer, total, *_ = problem
    settings = FitOptions(iterations=4, latent_rate=1e-7, field_rate=1e-7)
    refined = optimize(model, latent, outer, total, value_of(problem, settings), settings)
    torch.testing.assert_close(refined.total, total, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def pair():
    labels = [blob_labels(n, blob_grid()) for n in range(2)]
    return [blob_image(v, n) for n, v in enumerate(labels)]


def test_register_reports_the_refinement(pair, tmp_path):
    model = random_model(tmp_path / "random.safetensors")
    plain = register(*pair, model, RegistrationOptions(steps=2, inverse=False))
    assert plain.report["refinement"] is None
    events = []
    settings = FitOptions(iterations=8)
    result = register(*pair, model, RegistrationOptions(steps=2, inverse=False, fit=settings), Job(events.append))
    report = result.report["refinement"]
    assert report["objective"]["refined"] < report["objective"]["start"]
    assert report["network"] == result.report["steps"][-1]
    assert result.report["steps"] == plain.report["steps"]
    assert (
        result.report["similarity"]["warped"] == report["refined"]["similarity"] > plain.report["similarity"]["warped"]
    )
    assert result.report["seconds"]["refinement"] > 0
    assert [e.step for e in events if e.phase == "fit"] == list(range(1, 9))
    fractions = [e.fraction for e in events]
    assert fractions == sorted(fractions)


@pytest.mark.parametrize("similarity", ["lncc", "mind"])
def test_register_refines_on_the_images_own_grid(pair, tmp_path, similarity):
    model = random_model(tmp_path / "random.safetensors")
    events = []
    settings = FitOptions(iterations=4, fine_iterations=6, similarity=similarity, folding=0.0)
    result = register(*pair, model, RegistrationOptions(inverse=False, fit=settings), Job(events.append))
    report = result.report["refinement"]
    assert result.transform.grid.same_as(pair[0].grid)
    assert report["fine"]["shape"] == list(pair[0].grid.shape)
    assert report["fine"]["objective"]["refined"] < report["fine"]["objective"]["start"]
    assert len(report["objective"]["curve"]) == 4 + 2, "one look after each share of z and field"
    assert len(report["fine"]["objective"]["curve"]) == 6 + 1
    assert result.report["folding"]["njd_percent"] == 0
    fractions = [e.fraction for e in events]
    assert fractions == sorted(fractions)
    assert [e.step for e in events if e.phase == "fit"] == list(range(1, 11))
    # the state holds the same field on the working grid, so further steps go on from there
    further = register(*pair, model, RegistrationOptions(steps=1, inverse=False), start=result.state)
    assert len(further.report["steps"]) == len(result.report["steps"]) + 1


def test_the_fine_grid_alone(pair, tmp_path):
    model = random_model(tmp_path / "random.safetensors")
    settings = FitOptions(fine_iterations=3)
    report = register(*pair, model, RegistrationOptions(inverse=False, fit=settings)).report["refinement"]
    assert report["objective"] == {}
    assert len(report["fine"]["objective"]["curve"]) == 4
    assert report["refined"]["similarity"] > report["network"]["similarity"]


def test_the_fine_grid_finds_what_the_working_grid_cannot(pair, tmp_path):
    """On a working grid of 6 mm the images (2 mm) are registered worse than on their own."""
    model = random_model(tmp_path / "random.safetensors", spacing=(6.0,) * 3)
    found = [
        register(
            *pair, model, RegistrationOptions(inverse=False, fit=FitOptions(iterations=20, fine_iterations=n))
        ).warped.data
        for n in (0, 20)
    ]
    shown = pair[0].data > pair[0].data.max() / 4  # noise in the air stays apart whatever is done
    apart = [float((warped - pair[0].data)[shown].abs().mean()) for warped in found]
    assert apart[1] < 0.9 * apart[0], apart


def test_cancel_ends_it(pair, tmp_path):
    model = random_model(tmp_path / "random.safetensors")
    seen = []

    def cancelled() -> bool:
        return len(seen) >= 2

    def on_event(event) -> None:
        if event.phase == "fit":
            seen.append(event)

    settings = FitOptions(iterations=1000)
    with pytest.raises(Cancelled):
        register(*pair, model, RegistrationOptions(inverse=False, fit=settings), Job(on_event, cancelled))
    assert len(seen) == 2


def test_command_line(pair, tmp_path):
    random_model(tmp_path / "random.safetensors")
    for name, volume in zip(("f", "m"), pair, strict=True):
        write_image(volume, tmp_path / f"{name}.nii.gz")
    command = ["register", f"{tmp_path}/f.nii.gz", f"{tmp_path}/m.nii.gz", "--model", f"{tmp_path}/random.safetensors"]
    done = CliRunner().invoke(
        app, [*command, "--fit", "3", "--fit-fine", "2", "--fit-by", "mind", "-o", f"{tmp_path}/out"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["refinement"]["settings"]["similarity"] == "mind"
    assert report["refinement"]["settings"]["fine_iterations"] == 2
    for wrong in (["--fit", "-1"], ["--fit-fine", "1001"], ["--fit", "3", "--fit-by", "cc"]):
        refused = CliRunner().invoke(app, [*command, *wrong, "-o", f"{tmp_path}/none"])
        assert refused.exit_code == 2
        assert not (tmp_path / "none").exists()
