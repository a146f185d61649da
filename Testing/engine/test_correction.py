"""Correcting by hand: points are met, what is far from them stays, and what cannot be is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_masks import GRID, error, moved, structured

from MorphSeekLib.io.points import PointPairs
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.registration.correction import Correction, Pull
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import DenseTransform, Grid, apply_affine, index_points

FAST = RegistrationOptions(preset="fast", inverse=False, search="off", align="none")
POINTS = RegistrationOptions(preset="fast", inverse=False, search="off", align="none", fit="off")
ALIGNED = np.array([[1.02, 0.03, 0.0, 4.0], [-0.03, 0.98, 0.0, -3.0], [0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 1.0]])


def pairs(fixed: list, shifts: list) -> PointPairs:
    """Points of the fixed image, and the same shifted, mm."""
    fixed = np.array(fixed, dtype=float)
    return PointPairs(fixed, fixed + np.array(shifts), tuple(f"P{n + 1}" for n in range(len(fixed))))


def middle(*offset: float) -> list[float]:
    return (GRID.center + np.array(offset)).tolist()


def still() -> DenseTransform:
    return DenseTransform(torch.zeros(3, *GRID.shape), GRID)


def correction(points: PointPairs, start=None, mm: float = 1.0) -> Correction:
    return Correction(np.eye(4) if start is None else start, points, np.full(len(points.labels), mm))


def test_points_are_drawn_as_near_as_their_errors_say():
    """One point alone: of its distance the share error^2 / (error^2 + 10^2) is left, and beside it a Gaussian bump."""
    nodes = Grid.from_parts((30, 28, 26), (3.0, 4.0, 5.0), GRID.direction, GRID.origin - 10)
    place = apply_affine(nodes.affine, np.array([[14.0, 13.0, 12.0]]))[0]
    for mm in (0.5, 5.0):
        pull = Pull(correction(pairs([place], [[6.0, -2.0, 3.0]]), mm=mm), np.eye(4), still())
        control = torch.zeros(1, 3, *nodes.shape)
        pull(control, nodes)
        length = control[0] / 2 * torch.tensor([3.0, 4.0, 5.0]).view(3, 1, 1, 1)
        expected = torch.tensor([6.0, -2.0, 3.0]) * 100 / (100 + mm**2)
        assert torch.allclose(length[:, 14, 13, 12], expected, atol=1e-4)
        beside = expected * np.exp(-0.5 * (6.0 / pull.reach) ** 2)
        assert torch.allclose(length[:, 16, 13, 12], beside, atol=1e-4)


def test_points_are_met_through_an_alignment():
    points = pairs([middle(-10, 0, 5), middle(14, 6, -4)], [[3.0, 0, -2], [-2, 4, 1]])
    pull = Pull(correction(points, mm=0.01), ALIGNED, still())
    control = torch.zeros(1, 3, *GRID.shape)
    for _ in range(3):
        pull(control, GRID)
    field = DenseTransform(
        torch.einsum("ab,bijk->aijk", torch.from_numpy(GRID.affine[:3, :3]).float(), control[0] / 2), GRID
    )
    met = apply_affine(ALIGNED, field.map_points(points.fixed))
    assert np.abs(met - points.moving).max() < 0.01


@pytest.fixture(scope="module")
def first():
    """A pair, and a registration of it that was misled: it stands still."""
    moving = structured()
    fixed, true = moved(moving, 3.0)
    result = register(fixed, moving, None, RegistrationOptions(**vars(FAST) | {"fit_iterations": (1,)}))
    return fixed, moving, true, result


def true_pairs(true: torch.Tensor, *offsets) -> PointPairs:
    """Points that belong together by a true displacement."""
    map_ = DenseTransform(2.0 * true[0], GRID)  # along the axes, whose voxels are 2 mm long
    fixed = np.array([middle(*offset) for offset in offsets])
    return PointPairs(fixed, map_.map_points(fixed), tuple(f"P{n + 1}" for n in range(len(fixed))))


def test_points_alone_move_what_is_near_and_nothing_else(first):
    fixed, moving, true, result = first
    points = true_pairs(true, (-6, 4, 2))
    before = result.state.total.clone()
    second = register(fixed, moving, None, POINTS, start=correction(points, result.state, 0.5))
    row = second.report["corrections"]["points"][0]
    assert row["before"] > 2.0
    assert row["after"] < 0.5
    assert second.report["steps"][-1]["stage"] == "correct"
    assert second.report["steps"][-1]["answer"] is True
    assert second.report["folding"]["cells"]["no_fold_proven"]
    far = GRID.origin[None] + 4.0
    assert np.allclose(second.transform.map_points(far), result.transform.map_points(far), atol=1e-3)
    assert torch.equal(result.state.total, before)  # undo is the state of before


def test_the_fit_goes_on_around_the_points(first):
    fixed, moving, true, result = first
    points = true_pairs(true, (-6, 4, 2), (10, -8, 6))
    alone = register(fixed, moving, None, POINTS, start=correction(points, result.state))
    fitted = register(fixed, moving, None, FAST, start=correction(points, result.state))
    near = torch.zeros(GRID.shape, dtype=torch.bool)
    near[14:32, 16:34, 14:30] = True
    assert error(fitted.transform, true, near) < 0.7 * error(alone.transform, true, near)
    assert all(row["after"] < 1.5 for row in fitted.report["corrections"]["points"])
    again = register(fixed, moving, None, FAST, start=correction(points, fitted.state))
    assert [row["stage"] for row in again.report["steps"]][-2:] == ["correct", "correct"]


def test_any_transform_can_be_corrected(first):
    fixed, moving, true, result = first
    points = true_pairs(true, (-6, 4, 2))
    second = register(fixed, moving, None, POINTS, start=correction(points, result.transform, 0.5))
    assert second.report["corrections"]["points"][0]["after"] < 0.5
    at = index_points(GRID, second.transform, GRID) - fields.identity(GRID.shape)
    assert (
        float((at - (index_points(GRID, result.transform, GRID) - fields.identity(GRID.shape))).abs()[..., :2].max())
        < 0.01
    )


def test_points_that_contradict_each_other_are_named(first):
    fixed, moving, _, result = first
    points = pairs([middle(0, 0, 0), middle(1, 0, 0), middle(20, 0, 0)], [[0, 0, 0], [0, 12, 0], [-40, 0, 0]])
    second = register(fixed, moving, None, POINTS, start=correction(points, result.state))
    said = {w["message"] for w in second.report["warnings"] if w["code"] == "points-contradict"}
    assert any("P1 and P2 lie 1.0 mm apart in the fixed image and 12.0 mm in the moving one" in words for words in said)
    assert any("P3 lie 20.0 mm apart" in words and "which would fold" in words for words in said)
    left = [w["message"] for w in second.report["warnings"] if w["code"] == "point-not-met"]
    assert any("The point P1 is still" in words or "The point P2 is still" in words for words in left)
    assert second.report["folding"]["cells"]["no_fold_proven"]


def test_there_must_be_points_and_errors():
    with pytest.raises(MorphSeekError, match="There is no point to correct by"):
        correction(PointPairs(np.zeros((0, 3)), np.zeros((0, 3)), ()))
    for mm in (0.0, -1.0, np.nan):
        with pytest.raises(MorphSeekError, match="must be a number of mm above 0"):
            correction(pairs([[0, 0, 0]], [[1, 0, 0]]), mm=mm)
