"""What the views show, looked at: pixels of off-screen slice and 3D views, drawn by Slicer's own classes."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")

import slicer.util
import worlds
from MorphSeekGui import scene
from MorphSeekGui.views import ResultViews, jacobian_colors

from MorphSeekLib import geometry


@pytest.fixture
def shown(application, tmp_path):
    """A registration with folding, a slice view through the fold that shows another volume, and the result's views."""
    world = worlds.make_world("upright")
    result = worlds.result_of(world, tmp_path, inverse=False)
    other_contrast = geometry.Volume(700 - world.fixed.data, world.fixed.grid)
    fixed, moving = worlds.add_volume("F", other_contrast), worlds.add_volume("M", world.moving)
    for node in (fixed, moving):
        node.CreateDefaultDisplayNodes()
    nodes = scene.create_nodes(result, fixed, moving)
    folded = np.argwhere(np.load(result["folding"]["path"]))
    offset = (world.fixed.grid.affine @ [*folded[len(folded) // 2], 1])[2]
    view = application.slice_view(size=(300, 300))
    slicer.util.setSliceViewerLayers(background=moving, foreground=fixed, foregroundOpacity=0.25)
    view.fit(offset)
    return nodes, view, ResultViews(nodes)


def layers(view) -> tuple:
    c = view.composite
    return c.GetBackgroundVolumeID(), c.GetForegroundVolumeID(), c.GetForegroundOpacity(), c.GetLabelVolumeID()


def colored(pixels: np.ndarray) -> np.ndarray:
    """Which pixels are not grey."""
    return np.ptp(pixels.astype(int), axis=2) > 30


def red(pixels: np.ndarray) -> np.ndarray:
    r, g, b = np.moveaxis(pixels.astype(int), 2, 0)
    return (r > 120) & (g < 60) & (b < 60)


def test_overlay_blends_the_warped_volume_over_the_fixed_one(shown):
    nodes, view, views = shown
    before = layers(view)
    views.overlay(True, opacity=0.7)
    assert layers(view)[:3] == (nodes.fixed.GetID(), nodes.warped.GetID(), 0.7)
    pictures = []
    for opacity, shown_alone in ((0.0, nodes.fixed), (1.0, nodes.warped)):
        views.overlay(True, opacity=opacity)
        pictures.append(view.draw().astype(float))
        slicer.util.setSliceViewerLayers(background=shown_alone, foreground=None)
        assert np.abs(view.draw() - pictures[-1]).max() <= 1
    views.overlay(True, opacity=0.5)
    assert np.abs(view.draw() - sum(pictures) / 2).max() <= 2
    assert np.abs(pictures[0] - pictures[1]).mean() > 5
    views.overlay(False)
    assert layers(view) == before


def test_the_jacobian_goes_before_the_overlay_and_gives_way_to_it(shown):
    nodes, view, views = shown
    views.overlay(True)
    views.jacobian(True)
    assert layers(view)[1] == nodes.jacobian.GetID()
    assert colored(view.draw()).mean() > 0.1
    views.jacobian(False)
    assert layers(view)[1] == nodes.warped.GetID()
    assert colored(view.draw()).mean() < 0.001


def test_jacobian_colors_are_even_in_the_logarithm(mrml):
    table = jacobian_colors(mrml).GetLookupTable()
    table.SetRange(0.0, 2.0)

    def strength(jacobian: float) -> float:
        color = np.zeros(3)
        table.GetColor(jacobian, color)
        return float(np.ptp(color))

    assert strength(1.0) < 0.05
    assert strength(0.5) == pytest.approx(strength(0.25), abs=0.02)
    assert strength(2 / 3) / strength(0.5) == pytest.approx(strength(1.5) / strength(2.0), abs=0.05)
    assert jacobian_colors(mrml) is jacobian_colors(mrml)


def test_the_grid_is_drawn_and_taken_away_with_its_twin(shown, mrml):
    nodes, view, views = shown
    slicer.util.setSliceViewerLayers(background=nodes.fixed, foreground=None)
    before, plain = mrml.GetNumberOfNodes(), view.draw()
    views.grid(True, spacing_mm=6)
    drawn = view.draw()
    assert 0.01 < colored(drawn).mean() < 0.5
    views.grid(True, spacing_mm=3)
    assert colored(view.draw()).sum() > 1.5 * colored(drawn).sum()
    assert mrml.GetNumberOfNodes() == before + 3  # the twin, its display and its colours, once
    assert nodes.transform.GetDisplayNode() is None
    views.grid(False)
    assert mrml.GetNumberOfNodes() == before
    assert np.array_equal(view.draw(), plain)


def test_the_grid_shows_the_deformation_without_its_affine_part(mrml, tmp_path):
    world = worlds.make_world("oblique", amplitude_mm=1.0)
    affine = np.eye(4)
    affine[:3, :3] = worlds.rotation((10, 20, 5)) * 1.2
    affine[:3, 3] = (40, -30, 20)
    points = scene._node_points(world.transform.grid.affine, world.transform.grid.shape)
    p = np.stack(points).reshape(3, -1)
    far = affine[:3, :3] @ (p + world.transform.displacement.numpy().reshape(3, -1)) + affine[:3, 3:] - p
    image = scene.Image(far.reshape(world.transform.displacement.shape).astype(np.float32), world.transform.grid.affine)
    result = worlds.result_of(world, tmp_path, inverse=False)
    result["displacement"] = scene.save_image(image, tmp_path / "far.npy")
    nodes = scene.create_nodes(result, worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving))
    views = ResultViews(nodes)
    views.grid(True)
    twin = views._twin.GetTransformToParent()
    index = np.random.default_rng(0).uniform(0, np.array(world.fixed.grid.shape) - 1, (50, 3))
    ras = (scene.ijk_to_ras(nodes.fixed) @ np.c_[index, np.ones(50)].T)[:3].T
    moved = np.linalg.norm(np.array([twin.TransformPoint(q) for q in ras]) - ras, axis=1)
    assert 0.1 < moved.mean() < 3.0


def test_folding_is_red_in_slices_and_a_surface_in_3d(shown, application):
    _nodes, view, views = shown
    assert not red(view.draw()).any()
    views.folding(True)
    assert red(view.draw()).sum() > 20
    three_d = application.three_d_view(size=(300, 300))
    three_d.look((-1, 1, -0.5), zoom=1.5)
    assert red(three_d.draw()).sum() > 20
    views.folding(False)
    assert not red(view.draw()).any()
    assert not red(three_d.draw()).any()


def test_restore_brings_back_what_was_there(shown, mrml):
    _nodes, view, views = shown
    before, picture = layers(view), view.draw()
    views.overlay(True)
    views.jacobian(True)
    views.grid(True)
    views.folding(True)
    assert not np.array_equal(view.draw(), picture)
    views.restore()
    assert layers(view) == before
    assert np.array_equal(view.draw(), picture)
    views.restore()  # twice does no harm
    assert layers(view) == before


def test_a_slice_view_that_opens_later_joins_in(shown, application):
    nodes, _view, views = shown
    views.overlay(True)
    later = application.slice_view("Coronal", name="Green", size=(100, 100))
    views.overlay(True)
    assert later.composite.GetBackgroundVolumeID() == nodes.fixed.GetID()
    views.restore()
    assert later.composite.GetBackgroundVolumeID() is None
