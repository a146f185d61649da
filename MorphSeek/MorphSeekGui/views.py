"""How a registration is looked at: overlay, flicker, checkerboard, differences, Jacobian, estimated error, deformation
grid and folding, each switched on and off, and the way back to what was shown before.

    views = ResultViews(nodes)
    views.overlay(True); views.grid(True); views.folding(True)
    views.restore()

Overlay, flicker, checkerboard, differences, Jacobian and estimated error all lie over the fixed volume as the slice
views' foreground, which holds one volume: the one switched on last is seen, and what it covers comes back when it is
switched off.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import slicer
import slicer.util
import vtk
from vtk.util import numpy_support

from MorphSeekLib.protocol.report import TRUST_COLORS

from . import comparison, landmark_arrows
from .scene import FLIP, Image, InputError, RegistrationNodes, _, grid_transform, ijk_to_ras, to_vtk

_JACOBIAN_COLORS = "MorphSeek Jacobian"
_DIFFERENCE_COLORS = "MorphSeek difference"
_TRUST_COLORS = "MorphSeek trust"
# a volume change of this factor, either way, has the full color
_JACOBIAN_LIMIT = 2.0
_OBLIQUE = np.array([0.4, 0.6, 0.7]) / np.linalg.norm([0.4, 0.6, 0.7])  # RAS, from the middle to the camera


class ResultViews:
    """The display of one registration's nodes. What the slice views showed before the first switch is remembered."""

    def __init__(self, nodes: RegistrationNodes) -> None:
        self.nodes = nodes
        self._scene = nodes.fixed.GetScene()
        # by composite node's ID: what was there before us, and what we show instead
        self._before: dict[str, Layers] = {}
        self._shown: dict[str, Layers] = {}
        self._crosshair_before: int | None = None
        # name -> (volume, opacity), in the order in which they were switched on
        self._front: dict[str, tuple] = {}
        # volumes made for display only, by the name of their layer
        self._pictures: dict[str, slicer.vtkMRMLScalarVolumeNode] = {}
        self._twin = None
        self._arrows = None
        self._compared: tuple | None = None
        self._seen_in_3d = False

    def overlay(self, on: bool, opacity: float = 0.5) -> None:
        """Show the warped volume over the fixed one, in all slice views."""
        self._switch("overlay", self.nodes.warped if on else None, opacity)

    def flicker(self, on: bool) -> None:
        """Show the warped volume in place of the fixed one; every :meth:`flip` changes between the two, which makes
        differences easy to see."""
        self._switch("flicker", self.nodes.warped if on else None, 1.0)

    def compare(self, on: bool, other=None) -> None:
        """Show the warped volume of another result in place of the fixed one; every :meth:`flip` changes between it and
        the warped volume of this one."""
        self._switch("compare", other if on else None, 1.0)
        self._compared = (self.nodes.warped, other) if on else None

    @property
    def seen(self):
        """The volume that is seen where two results are compared; None where none are."""
        return self._front["compare"][0] if "compare" in self._front else None

    def flip(self) -> None:
        """Show the other one of the two volumes that flicker."""
        if "compare" in self._front:
            own, other = self._compared
            self._front["compare"] = (own if self.seen is other else other, 1.0)
            self._show_layers()
        if "flicker" in self._front:
            volume, opacity = self._front["flicker"]
            self._front["flicker"] = (volume, 1.0 - opacity)
            self._show_layers()

    def fade(self, opacity: float) -> None:
        """Change the opacity of the layer that is seen, without making it again."""
        if self._front:
            name = list(self._front)[-1]
            self._front[name] = (self._front[name][0], opacity)
            self._show_layers()

    def checkerboard(self, on: bool, tile_mm: float = 20.0, opacity: float = 1.0) -> None:
        """Show fixed and warped volume in turn, in blocks of ``tile_mm``: borders should run on from block to block.

        Raises:
            InputError: the fixed volume is no longer the one that was registered.
        """

        def board() -> np.ndarray:
            spacing = self.nodes.warped.GetSpacing()[::-1]  # (k, j, i)
            tile = tuple(max(1, round(tile_mm / mm)) for mm in spacing)
            return comparison.checkerboard(self._gray(self.nodes.fixed), self._gray(self.nodes.warped), tile)

        if not on:
            self._switch("checkerboard", None)
            return
        picture = self._picture(
            "checkerboard", _("{name} (checkerboard)"), board, (0.0, 1.0), "vtkMRMLColorTableNodeGrey"
        )
        self._switch("checkerboard", picture, opacity)

    def difference(self, on: bool, before: bool = False, opacity: float = 1.0) -> None:
        """Show moving minus fixed volume in gray values: black where equal, orange where the moving one is brighter,
        blue where the fixed one is. Both stages are shown on one scale.

        Args:
            on: show or remove it.
            before: of the aligned moving volume, before the deformation, instead of the warped one.

        Raises:
            InputError: the fixed volume is no longer the one that was registered, or there is no aligned one.
        """
        name = "difference before" if before else "difference after"
        if not on:
            self._switch(name, None)
            return
        if before and self.nodes.aligned is None:
            raise InputError(
                _("The volume before the deformation is not in the scene; register again to compare with it.")
            )
        fixed = self._gray(self.nodes.fixed)
        stage = self.nodes.aligned if before else self.nodes.warped
        values = self._gray(stage) - fixed
        limit = comparison.difference_limit(
            values if before or self.nodes.aligned is None else self._gray(self.nodes.aligned) - fixed
        )
        title = _("{name} (difference before)") if before else _("{name} (difference after)")
        colors = difference_colors(self._scene).GetID()
        self._switch(name, self._picture(name, title, lambda: values, (-limit, limit), colors), opacity)

    def jacobian(self, on: bool, opacity: float = 0.6) -> None:
        """Show the Jacobian determinant, by central differences, over the fixed volume: purple where volume shrinks
        (from fixed to moving), white where it stays, orange where it grows, even in the logarithm; half and double
        have the full color."""
        if on:
            display = self.nodes.jacobian.GetDisplayNode()
            display.SetAndObserveColorNodeID(jacobian_colors(self._scene).GetID())
            display.AutoWindowLevelOff()
            display.SetWindowLevelMinMax(0.0, _JACOBIAN_LIMIT)
        self._switch("jacobian", self.nodes.jacobian if on else None, opacity)

    def trust(self, on: bool, opacity: float = 0.5) -> None:
        """Show the estimated error over the fixed volume in the colors of the report, nothing where nothing is said."""
        if on:
            display = self.nodes.trust_colors.GetDisplayNode()
            display.SetAndObserveColorNodeID(trust_colors(self._scene).GetID())
            display.AutoWindowLevelOff()
            display.SetWindowLevelMinMax(0.0, len(TRUST_COLORS))
            display.SetInterpolate(False)
            display.SetThreshold(1, len(TRUST_COLORS))
            display.ApplyThresholdOn()
        self._switch("trust", self.nodes.trust_colors if on else None, opacity)

    def grid(self, on: bool, spacing_mm: float | None = None, region=None, in_3d: bool = False) -> None:
        """Show the deformation as a grid: straight lines of the fixed volume's space, drawn where the transform takes
        them (fixed -> moving), without the affine part of the motion, which would only push the grid out of the
        picture.

        Slicer would draw the transform node itself the other way round and would have to invert it for that, which
        fails where it folds; so a twin is drawn, which is for display only and is not saved with the scene.

        Args:
            on: show or remove it.
            spacing_mm: distance of the lines; None makes about 24 of them along the fixed volume's longest side.
            region: where it is drawn in 3D: a volume, region of interest or slice node; None is the axial (red) slice,
                since a whole volume's lines hide each other. The slice views draw it in their own planes.
            in_3d: in the 3D views too.
        """
        if not on:
            self._remove_twin()
            return
        if self._twin is None:
            self._twin = _grid_twin(self._scene, self.nodes)
        bounds = np.zeros(6)
        self.nodes.fixed.GetRASBounds(bounds)
        spacing = spacing_mm or max(1.0, float(np.ptp(bounds.reshape(3, 2), axis=1).max()) / 24)
        display = self._twin.GetDisplayNode()
        blocked = display.StartModify()
        display.SetVisualizationMode(display.VIS_MODE_GRID)
        display.SetAndObserveRegionNode(region or _first_slice(self._scene) or self.nodes.fixed)
        display.SetGridSpacingMm(spacing)
        display.SetGridResolutionMm(spacing / 6)
        display.SetGridLineDiameterMm(spacing / 12)
        display.SetGridShowNonWarped(False)
        display.SetGridScalePercent(100)
        display.SetVisibility(True)
        display.SetVisibility2D(True)
        display.SetVisibility3D(in_3d)
        display.EndModify(blocked)
        self._look_in_3d(in_3d, oblique=True)

    def folding(self, on: bool, in_3d: bool = True) -> None:
        """Show voxels that meet a folded cell of the transform in red: filled in slices, as a closed surface in 3D."""
        node = self.nodes.folding
        if on and in_3d:
            node.CreateClosedSurfaceRepresentation()
        display = node.GetDisplayNode()
        display.SetVisibility2DFill(True)
        display.SetVisibility2DOutline(True)
        display.SetAllSegmentsOpacity(1.0)
        display.SetOpacity2DFill(0.7)
        display.SetVisibility3D(in_3d)
        display.SetVisibility(on)
        self._look_in_3d(on and in_3d)

    def _look_in_3d(self, shown: bool, oblique: bool = False) -> None:
        """Turn the 3D views to what is shown there for the first time; later the camera is the user's."""
        if shown and not self._seen_in_3d:
            self._seen_in_3d = True
            look_at_everything_in_3d(oblique)

    def arrows(self, on: bool) -> None:
        """Show what is left between landmarks: an arrow from each fixed point to where the transform's inverse takes
        its partner, in slices (projected) and in 3D, for display only."""
        if self._arrows is not None and self._scene.IsNodePresent(self._arrows):
            self._scene.RemoveNode(self._arrows.GetDisplayNode())
            self._scene.RemoveNode(self._arrows)
        self._arrows = None
        if not on:
            return
        thickness = landmark_arrows.fitting_thickness(self.nodes.fixed)
        points = (self.nodes.report.get("landmarks") or {}).get("points") or []
        name = _("{name} (landmarks)").format(name=self.nodes.transform.GetName())
        self._arrows = landmark_arrows.add_model(self._scene, name, points, thickness)

    def go_to(self, position: tuple[float, float, float]) -> None:
        """Center all slice views on a point (RAS mm) and put the crosshair there."""
        slicer.vtkMRMLSliceNode.JumpAllSlices(self._scene, *position, slicer.vtkMRMLSliceNode.CenteredJumpSlice)
        crosshair = self._scene.GetFirstNodeByClass("vtkMRMLCrosshairNode")
        if crosshair is not None:
            if self._crosshair_before is None:
                self._crosshair_before = crosshair.GetCrosshairMode()
            crosshair.SetCrosshairRAS(*position)
            if crosshair.GetCrosshairMode() == slicer.vtkMRMLCrosshairNode.NoCrosshair:
                crosshair.SetCrosshairMode(slicer.vtkMRMLCrosshairNode.ShowBasic)

    def restore(self) -> None:
        """Switch everything off and show in the slice views what they showed before the first switch, unless someone
        else has given them other volumes meanwhile; where they are stays."""
        self._front.clear()
        self.folding(False)
        self.arrows(False)
        self._remove_twin()
        self._show_layers()
        self._before.clear()
        for name in list(self._pictures):
            self._remove_picture(name)
        crosshair = self._scene.GetFirstNodeByClass("vtkMRMLCrosshairNode")
        if self._crosshair_before is not None and crosshair is not None:
            crosshair.SetCrosshairMode(self._crosshair_before)
        self._crosshair_before = None

    def _switch(self, name: str, volume, opacity: float = 1.0) -> None:
        """Show a layer before all others (again, if only its opacity changes), or take it away."""
        if volume is None:
            self._front.pop(name, None)
        else:
            if name in self._front and list(self._front)[-1] != name:
                del self._front[name]
            self._front[name] = (volume, opacity)
        self._show_layers()
        if volume is None:
            self._remove_picture(name)

    def _show_layers(self) -> None:
        for composite in composites(self._scene):
            key, now = composite.GetID(), Layers.of(composite)
            if key not in self._shown or not now.same_volumes(self._shown[key]):
                self._before[key] = now  # not ours: someone else has chosen what the view shows
                self._shown.pop(key, None)
            before = self._before[key]
            if self._front:
                volume, opacity = list(self._front.values())[-1]
                shown = Layers(self.nodes.fixed.GetID(), volume.GetID(), opacity, before.label, before.label_opacity)
                shown.show(composite)
                self._shown[key] = shown
            elif key in self._shown:
                before.show(composite)
                del self._shown[key]

    def _gray(self, volume) -> np.ndarray:
        """Return (k, j, i) gray values from 0 to 1, as the volume is shown."""
        if volume.GetImageData().GetDimensions() != self.nodes.warped.GetImageData().GetDimensions():
            raise InputError(
                _("'{node}' has changed its size since it was registered; register again.").format(
                    node=volume.GetName()
                )
            )
        if volume.GetDisplayNode() is None:
            volume.CreateDefaultDisplayNodes()
        display = volume.GetDisplayNode()
        window = (display.GetWindowLevelMin(), display.GetWindowLevelMax())
        return comparison.gray(slicer.util.arrayFromVolume(volume), window)

    def _picture(self, name: str, title: str, make: Callable[[], np.ndarray], window, color_node_id: str):
        """Return a volume for display only, on the fixed grid; made once and filled again."""
        values = make()
        node = self._pictures.get(name)
        if node is None or not self._scene.IsNodePresent(node):
            node = self._scene.CreateNodeByClass("vtkMRMLScalarVolumeNode")
            node.UnRegister(None)
            node.SetName(self._scene.GenerateUniqueName(title.format(name=self.nodes.warped.GetName())))
            node.SetHideFromEditors(True)
            node.SetSaveWithScene(False)
            self._scene.AddNode(node)
            self._pictures[name] = node
        slicer.util.updateVolumeFromArray(node, values)
        node.SetIJKToRASMatrix(to_vtk(ijk_to_ras(self.nodes.warped)))
        node.CreateDefaultDisplayNodes()
        display = node.GetDisplayNode()
        display.SetSaveWithScene(False)
        display.SetAndObserveColorNodeID(color_node_id)
        display.AutoWindowLevelOff()
        display.SetWindowLevelMinMax(*window)
        return node

    def _remove_picture(self, name: str) -> None:
        node = self._pictures.pop(name, None)
        for part in (node, node.GetDisplayNode() if node is not None else None):
            if part is not None and self._scene.IsNodePresent(part):
                self._scene.RemoveNode(part)

    def _remove_twin(self) -> None:
        if self._twin is not None:
            display = self._twin.GetDisplayNode()
            for node in (self._twin, display, display.GetColorNode() if display is not None else None):
                if node is not None and self._scene.IsNodePresent(node):
                    self._scene.RemoveNode(node)
            self._twin = None


class Layers:
    """What a slice view shows."""

    def __init__(self, background, foreground, opacity, label, label_opacity) -> None:
        self.background, self.foreground, self.opacity = background, foreground, opacity
        self.label, self.label_opacity = label, label_opacity

    @classmethod
    def of(cls, composite) -> Layers:
        return cls(
            composite.GetBackgroundVolumeID(),
            composite.GetForegroundVolumeID(),
            composite.GetForegroundOpacity(),
            composite.GetLabelVolumeID(),
            composite.GetLabelOpacity(),
        )

    def same_volumes(self, other: Layers) -> bool:
        """Return whether the background and the foreground are the same; the user may have faded or labeled them."""
        return (self.background, self.foreground) == (other.background, other.foreground)

    def show(self, composite) -> None:
        blocked = composite.StartModify()
        composite.SetBackgroundVolumeID(self.background)
        composite.SetForegroundVolumeID(self.foreground)
        composite.SetForegroundOpacity(self.opacity)
        composite.SetLabelVolumeID(self.label)
        composite.SetLabelOpacity(self.label_opacity)
        composite.EndModify(blocked)


class SliceViews:
    """What the slice views show and where they stand, to come back to.

    Showing a volume with ``fit`` moves a view; its volumes alone do not bring back where it stood.
    """

    def __init__(self, scene) -> None:
        self._scene = scene
        self._layers = [(composite, Layers.of(composite)) for composite in composites(scene)]
        self._places = []
        for n in range(scene.GetNumberOfNodesByClass("vtkMRMLSliceNode")):
            node = scene.GetNthNodeByClass(n, "vtkMRMLSliceNode")
            matrix = vtk.vtkMatrix4x4()
            matrix.DeepCopy(node.GetSliceToRAS())
            self._places.append((node, node.GetFieldOfView(), node.GetXYZOrigin(), matrix))

    def restore(self) -> None:
        """Show the same, from the same place, in the views that are still there."""
        for composite, layers in self._layers:
            if self._scene.IsNodePresent(composite):
                layers.show(composite)
        for node, field_of_view, origin, matrix in self._places:
            if self._scene.IsNodePresent(node):
                blocked = node.StartModify()
                node.GetSliceToRAS().DeepCopy(matrix)
                node.SetFieldOfView(*field_of_view)
                node.SetXYZOrigin(*origin)
                node.UpdateMatrices()
                node.EndModify(blocked)


def look_at_everything_in_3d(oblique: bool = False) -> None:
    """Turn the cameras of the 3D views to what these show; without it they look at the world's origin.

    Args:
        oblique: from above and the right in front, where an axial plane is more than a line.
    """
    layout = slicer.app.layoutManager() if hasattr(slicer, "app") else None
    for n in range(layout.threeDViewCount if layout is not None else 0):
        view = layout.threeDWidget(n).threeDView()
        view.resetFocalPoint()
        view.resetCamera()
    scene = slicer.mrmlScene
    for n in range(scene.GetNumberOfNodesByClass("vtkMRMLCameraNode") if oblique else 0):
        node = scene.GetNthNodeByClass(n, "vtkMRMLCameraNode")
        camera = node.GetCamera()
        position = np.array(camera.GetFocalPoint()) + camera.GetDistance() * _OBLIQUE
        node.SetPosition(*position)
        node.SetViewUp(0.0, 0.0, 1.0)
        node.ResetClippingRange()


def jacobian_colors(scene):
    """Return the color table for Jacobian determinants from 0 to 2, made once in a scene: even in log J, so that
    halving and doubling a volume look equally strong. Purple, white, orange: red is left to folding."""
    values = np.linspace(0.0, _JACOBIAN_LIMIT, 256)
    steps = np.clip(np.log(np.maximum(values, 1e-6)) / np.log(_JACOBIAN_LIMIT), -1.0, 1.0)
    ends = np.where(steps[:, None] < 0, (0.33, 0.15, 0.53), (0.90, 0.45, 0.02))
    colors = (1 - np.abs(steps))[:, None] * 0.97 + np.abs(steps)[:, None] * ends
    return _color_table(scene, _JACOBIAN_COLORS, [f"{value:.2f}" for value in values], colors)


def difference_colors(scene):
    """Return the color table for differences, made once in a scene: dark in the middle as a subtraction image is, blue
    below and orange above, ever brighter."""
    stops = ((0.50, 0.83, 1.0), (0.12, 0.44, 0.82), (0.0, 0.0, 0.0), (0.82, 0.48, 0.06), (1.0, 0.88, 0.54))
    where = np.linspace(0, 1, 256)
    channels = [np.interp(where, np.linspace(0, 1, len(stops)), channel) for channel in zip(*stops, strict=True)]
    names = [f"{2 * share - 1:+.2f}" for share in where]
    return _color_table(scene, _DIFFERENCE_COLORS, names, np.stack(channels, axis=1))


def trust_colors(scene):
    """Return the color table of the estimated error, made once in a scene; its volume holds 0 to 3."""
    colors = [(0.0, 0.0, 0.0), *([int(text[n : n + 2], 16) / 255 for n in (1, 3, 5)] for text in TRUST_COLORS)]
    names = [_("nothing is said"), _("likely near"), _("in between"), _("not to be relied on")]
    values = np.rint(np.linspace(0, len(TRUST_COLORS), 256)).astype(int)
    return _color_table(scene, _TRUST_COLORS, [names[n] for n in values], np.array(colors)[values])


def _color_table(scene, name: str, names: list[str], colors: np.ndarray):
    """Return the scene's table of that name; made without a file when it is not there yet."""
    table = scene.GetFirstNodeByName(name)
    if table is None:
        table = scene.AddNewNodeByClass("vtkMRMLColorTableNode", name)
        table.SetTypeToUser()
        table.SetAttribute("Category", "MorphSeek")
        table.SetNumberOfColors(len(colors))
        for number, (text, color) in enumerate(zip(names, colors, strict=True)):
            table.SetColor(number, text, *color.tolist(), 1.0)
    return table


def composites(scene) -> list:
    kind = "vtkMRMLSliceCompositeNode"
    return [scene.GetNthNodeByClass(n, kind) for n in range(scene.GetNumberOfNodesByClass(kind))]


def _first_slice(scene):
    """Return the red slice's node, which is the axial one unless the user turned it; None without slice views."""
    return scene.GetFirstNode("Red", "vtkMRMLSliceNode") or scene.GetFirstNodeByClass("vtkMRMLSliceNode")


def _grid_twin(scene, nodes: RegistrationNodes):
    """Make a transform node whose TransformToParent is fixed -> moving without its affine part, for display only."""
    displacement = displacement_of(nodes.transform)
    affine = _affine_part(displacement, nodes.warped)
    twin = scene.CreateNodeByClass("vtkMRMLTransformNode")
    twin.UnRegister(None)
    twin.SetName(scene.GenerateUniqueName(_("{name} (grid)").format(name=nodes.transform.GetName())))
    twin.SetHideFromEditors(True)
    twin.SetSaveWithScene(False)
    scene.AddNode(twin)
    twin.SetAndObserveTransformToParent(grid_transform(displacement, target=np.linalg.inv(affine)))
    twin.CreateDefaultDisplayNodes()
    display = twin.GetDisplayNode()
    display.SetSaveWithScene(False)
    colors = vtk.vtkColorTransferFunction()
    for millimeters, color in ((0.0, (0.35, 0.80, 0.95)), (4.0, (0.95, 0.95, 0.45)), (12.0, (1.0, 0.60, 0.15))):
        colors.AddRGBPoint(millimeters, *color)
    display.SetColorMap(colors)
    display.GetColorNode().SetSaveWithScene(False)
    return twin


def displacement_of(transform_node) -> Image:
    """Return the transform node's grid as the engine's displacement image.

    Raises:
        InputError: it was inverted or replaced since the registration made it.
    """
    transform = transform_node.GetTransformFromParentAs("vtkOrientedGridTransform", False)
    if transform is None or transform.GetDisplacementGrid() is None:
        raise InputError(
            _("'{node}' is no longer the transform that the registration made; register again.").format(
                node=transform_node.GetName()
            )
        )
    image = transform.GetDisplacementGrid()
    affine = np.eye(4)
    direction = transform.GetGridDirectionMatrix()
    if direction is not None:
        affine = slicer.util.arrayFromVTKMatrix(direction)
    affine = affine @ np.diag([*image.GetSpacing(), 1.0])
    affine[:3, 3] = image.GetOrigin()
    field = numpy_support.vtk_to_numpy(image.GetPointData().GetScalars())
    field = field.reshape(*image.GetDimensions()[::-1], 3).transpose(3, 2, 1, 0)
    return Image(field * np.array([-1, -1, 1], field.dtype).reshape(3, 1, 1, 1), FLIP @ affine)


def _affine_part(displacement: Image, volume) -> np.ndarray:
    """Return (4, 4) RAS: least-squares affine of the transform over a lattice of points in the volume."""
    index = np.array(np.meshgrid(*[np.linspace(0, n - 1, 12) for n in volume.GetImageData().GetDimensions()]))
    points = ijk_to_ras(volume) @ np.vstack([index.reshape(3, -1), np.ones(index[0].size)])
    transform = grid_transform(displacement)
    mapped = np.array([transform.TransformPoint(p) for p in points[:3].T])
    affine = np.eye(4)
    affine[:3] = np.linalg.lstsq(points.T, mapped, rcond=None)[0].T
    return affine
