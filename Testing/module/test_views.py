"""What the views show, looked at: pixels of off-screen slice and 3D views, drawn by Slicer's own classes."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")

import slicer.util
import worlds
from MorphSeekGui import scene
from MorphSeekGui.comparison import difference_limit
from MorphSeekGui.views import ResultViews, difference_colors, jacobian_colors

from MorphSeekLib.protocol.report import TRUST_COLORS
from MorphSeekLib.space import geometry


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


def picture_of(volume, view) -> np.ndarray:
    """What the view shows of a volume alone; then it shows what it showed before."""
    c = view.composite
    before = c.GetBackgroundVolumeID(), c.GetForegroundVolumeID()
    c.SetBackgroundVolumeID(volume.GetID())
    c.SetForegroundVolumeID(None)
    picture = view.draw().astype(float)
    c.SetBackgroundVolumeID(before[0])
    c.SetForegroundVolumeID(before[1])
    return picture


def colored(pixels: np.ndarray) -> np.ndarray:
    """Which pixels are not gray."""
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
        assert np.abs(picture_of(shown_alone, view) - pictures[-1]).max() <= 1
    views.overlay(True, opacity=0.5)
    assert np.abs(view.draw() - sum(pictures) / 2).max() <= 2
    assert np.abs(pictures[0] - pictures[1]).mean() > 5
    views.overlay(False)
    assert layers(view) == before


def test_the_last_layer_is_seen_and_gives_way_to_the_one_before(shown):
    nodes, view, views = shown
    views.overlay(True)
    views.jacobian(True)
    assert layers(view)[1] == nodes.jacobian.GetID()
    views.overlay(True)
    assert layers(view)[1] == nodes.warped.GetID()
    views.jacobian(True)
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
    assert mrml.GetNumberOfNodes() == before + 3  # the twin, its display and its colors, once
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


def test_the_estimated_error_has_the_colors_of_the_report_and_leaves_the_rest_as_it_was(shown):
    nodes, view, views = shown
    warped = scene.read_volume(nodes.warped)
    colors = np.zeros(warped.array.shape, np.uint8)
    thirds = np.array_split(np.arange(colors.shape[0] // 4, colors.shape[0]), 3)
    for number, columns in enumerate(thirds, 1):
        colors[columns] = number
    scene.add_estimate(nodes, scene.Estimate(None, scene.Image(colors, warped.affine), {}))
    before = view.draw()
    views.overlay(True, opacity=0.0)
    fixed = view.draw()
    views.trust(True, opacity=1.0)
    pixels = view.draw()
    seen = {"#" + "".join(f"{channel:02x}" for channel in pixel) for pixel in np.unique(pixels.reshape(-1, 3), axis=0)}
    assert seen >= set(TRUST_COLORS)
    same = (pixels == fixed).all(axis=2)
    assert 0.15 < same.mean() < 0.9, "nothing is drawn where nothing is said"
    assert not same[fixed.any(axis=2) & colored(pixels)].any()
    views.trust(False)
    views.overlay(False)
    assert np.array_equal(view.draw(), before)


def test_the_checkerboard_takes_turns(shown, mrml):
    nodes, view, views = shown
    fixed, warped = picture_of(nodes.fixed, view), picture_of(nodes.warped, view)
    apart = np.abs(fixed - warped).max(axis=2) > 20
    before = mrml.GetNumberOfNodes()
    views.checkerboard(True, tile_mm=15)
    board = view.draw().astype(float)
    # what is neither the one nor the other lies on the blocks' seams, where the display interpolates
    as_fixed, as_warped = (np.abs(board - p).max(axis=2) <= 4 for p in (fixed, warped))
    assert (as_fixed | as_warped)[apart].mean() > 0.85
    assert min(as_fixed[apart].mean(), as_warped[apart].mean()) > 0.3
    views.checkerboard(True, tile_mm=3)
    assert np.abs(view.draw() - board).mean() > 3
    made = [mrml.GetNthNode(n) for n in range(before, mrml.GetNumberOfNodes())]
    assert len(made) == 2  # a volume and its display, for both sizes
    assert not any(node.GetSaveWithScene() for node in made)
    views.checkerboard(False)
    assert mrml.GetNumberOfNodes() == before


def test_differences_are_on_one_scale_and_smaller_afterwards(application, tmp_path):
    world = worlds.make_world("oblique", amplitude_mm=3.0)
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    for node in (fixed, moving):
        node.CreateDefaultDisplayNodes()
        node.GetDisplayNode().AutoWindowLevelOff()
        node.GetDisplayNode().SetWindowLevelMinMax(0, 600)
    nodes = scene.create_nodes(worlds.result_of(world, tmp_path), fixed, moving)
    view = application.slice_view(size=(200, 200))
    slicer.util.setSliceViewerLayers(background=fixed)
    view.fit()
    views = ResultViews(nodes)
    views.difference(True, before=True)
    before = view.draw()
    views.difference(True)
    after = view.draw()
    windows = {
        (p.GetDisplayNode().GetWindowLevelMin(), p.GetDisplayNode().GetWindowLevelMax())
        for p in views._pictures.values()
    }
    assert len(windows) == 1
    assert before.mean() > 5
    # the warped volume of this world is the fixed one: nothing is left
    assert after.max() <= 2
    one = slicer.util.arrayFromVolume(views._pictures["difference before"])
    expected = (slicer.util.arrayFromVolume(nodes.aligned) - slicer.util.arrayFromVolume(fixed)) / 600
    assert np.abs(one - expected).max() < 1e-5


def test_difference_colors_tell_the_sign(mrml):
    table = difference_colors(mrml).GetLookupTable()
    table.SetRange(-1, 1)
    colors = {value: np.zeros(3) for value in (-0.6, 0.0, 0.6)}
    for value, color in colors.items():
        table.GetColor(value, color)
    assert colors[0.0].max() < 0.05
    assert colors[0.6].argmax() == 0
    assert colors[-0.6].argmax() == 2


def test_before_needs_the_aligned_volume(shown):
    nodes, view, views = shown
    nodes.aligned = None
    before = layers(view)
    with pytest.raises(scene.InputError, match="register again to compare with it"):
        views.difference(True, before=True)
    assert layers(view) == before
    views.difference(True)  # afterwards can still be seen
    assert layers(view)[0] == nodes.fixed.GetID()


def test_a_fixed_volume_that_was_cropped_meanwhile_is_refused(shown, mrml):
    nodes, _view, views = shown
    slicer.util.updateVolumeFromArray(nodes.fixed, np.zeros((4, 5, 6), np.float32))
    before = mrml.GetNumberOfNodes()
    for switch in (views.checkerboard, views.difference):
        with pytest.raises(scene.InputError, match="'F' has changed its size since it was registered"):
            switch(True)
    assert mrml.GetNumberOfNodes() == before


def test_flicker_shows_one_and_the_other(shown):
    nodes, view, views = shown
    before = layers(view)
    fixed, warped = picture_of(nodes.fixed, view), picture_of(nodes.warped, view)
    views.flip()  # nothing flickers yet
    assert layers(view) == before
    views.flicker(True)
    for expected in (warped, fixed, warped):
        assert np.abs(view.draw() - expected).max() <= 1
        views.flip()
    views.flicker(False)
    assert layers(view) == before


def test_go_to_centers_the_slices_and_sets_the_crosshair(shown, application, mrml):
    _nodes, view, views = shown
    sagittal = application.slice_view("Sagittal", name="Yellow", size=(100, 100))
    crosshair = mrml.AddNewNodeByClass("vtkMRMLCrosshairNode")
    crosshair.SetCrosshairMode(crosshair.NoCrosshair)
    views.go_to((4.0, -3.0, 21.0))
    assert view.logic.GetSliceOffset() == pytest.approx(21.0)
    assert abs(sagittal.logic.GetSliceOffset()) == pytest.approx(4.0)  # along the normal, which points to the left
    assert crosshair.GetCrosshairRAS() == (4.0, -3.0, 21.0)
    assert crosshair.GetCrosshairMode() == crosshair.ShowBasic
    half = [view.node.GetDimensions()[0] / 2, view.node.GetDimensions()[1] / 2, 0, 1]
    middle = view.node.GetXYToRAS().MultiplyPoint(half)
    assert middle[:2] == pytest.approx((4.0, -3.0), abs=1.0)
    views.restore()
    assert crosshair.GetCrosshairMode() == crosshair.NoCrosshair


def test_restore_brings_back_what_was_there(shown, mrml):
    _nodes, view, views = shown
    before, picture = layers(view), view.draw()
    count = mrml.GetNumberOfNodes()
    views.overlay(True)
    views.checkerboard(True)
    views.difference(True)
    views.flicker(True)
    views.jacobian(True)
    views.grid(True)
    views.folding(True)
    assert not np.array_equal(view.draw(), picture)
    views.restore()
    assert layers(view) == before
    assert np.array_equal(view.draw(), picture)
    assert mrml.GetNumberOfNodes() == count + 2, "the two color tables may stay"
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


def test_the_difference_s_limit_does_not_hang_on_one_slice():
    """A stride of 10 would read the empty slice alone."""
    difference = np.full((300, 1000, 10), 0.8, np.float32)
    difference[..., 0] = 0
    assert difference_limit(difference) == pytest.approx(0.8)
