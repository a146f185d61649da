"""How a registration is looked at: overlay, deformation grid, Jacobian and folding, each switched on and off, and the
way back to what was shown before.

    views = ResultViews(nodes)
    views.overlay(True); views.grid(True); views.folding(True)
    views.restore()
"""

from __future__ import annotations

import numpy as np
import slicer
import vtk
from vtk.util import numpy_support

from .scene import FLIP, Image, RegistrationNodes, _, grid_transform, ijk_to_ras

_JACOBIAN_COLORS = "MorphSeek Jacobian"
# a volume change of this factor, either way, has the full colour
_JACOBIAN_LIMIT = 2.0


class ResultViews:
    """The display of one registration's nodes. What the slice views showed before the first switch is remembered."""

    def __init__(self, nodes: RegistrationNodes) -> None:
        self.nodes = nodes
        self._scene = nodes.fixed.GetScene()
        self._before: dict[str, _Layers] = {}
        self._overlay = self._jacobian = False
        self._opacity = {"overlay": 0.5, "jacobian": 0.6}
        self._twin = None

    def overlay(self, on: bool, opacity: float = 0.5) -> None:
        """The warped volume over the fixed one, in all slice views."""
        self._overlay, self._opacity["overlay"] = on, opacity
        self._show_layers()

    def jacobian(self, on: bool, opacity: float = 0.6) -> None:
        """The Jacobian determinant over the fixed volume: purple where volume shrinks (from fixed to moving), white
        where it stays, orange where it grows; half and double have the full colour. Goes before the overlay."""
        self._jacobian, self._opacity["jacobian"] = on, opacity
        if on:
            display = self.nodes.jacobian.GetDisplayNode()
            display.SetAndObserveColorNodeID(jacobian_colors(self._scene).GetID())
            display.AutoWindowLevelOff()
            display.SetWindowLevelMinMax(0.0, _JACOBIAN_LIMIT)
        self._show_layers()

    def grid(self, on: bool, spacing_mm: float | None = None, region=None, in_3d: bool = False) -> None:
        """The deformation as a grid: straight lines of the fixed volume's space, drawn where the transform takes them
        (fixed -> moving), without the affine part of the motion, which would only push the grid out of the picture.

        Slicer would draw the transform node itself the other way round and would have to invert it for that, which
        fails where it folds; so a twin is drawn, which is for display only and is not saved with the scene.

        Args:
            on: show or remove it.
            spacing_mm: distance of the lines; None makes about 24 of them along the fixed volume's longest side.
            region: where it is drawn: a volume, region of interest or slice node; None is the fixed volume.
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
        display.SetAndObserveRegionNode(region or self.nodes.fixed)
        display.SetGridSpacingMm(spacing)
        display.SetGridResolutionMm(spacing / 6)
        display.SetGridLineDiameterMm(spacing / 12)
        display.SetGridShowNonWarped(False)
        display.SetGridScalePercent(100)
        display.SetVisibility(True)
        display.SetVisibility2D(True)
        display.SetVisibility3D(in_3d)
        display.EndModify(blocked)

    def folding(self, on: bool, in_3d: bool = True) -> None:
        """Folded voxels (Jacobian <= 0) red: filled in the slices, as a closed surface in 3D."""
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

    def restore(self) -> None:
        """Everything off, and the slice views as they were before the first switch."""
        self._overlay = self._jacobian = False
        self.folding(False)
        self._remove_twin()
        self._show_layers()
        self._before.clear()

    def _show_layers(self) -> None:
        for composite in _composites(self._scene):
            before = self._before.setdefault(composite.GetID(), _Layers.of(composite))
            if self._jacobian:
                front = (self.nodes.jacobian.GetID(), self._opacity["jacobian"])
            elif self._overlay:
                front = (self.nodes.warped.GetID(), self._opacity["overlay"])
            else:
                before.show(composite)
                continue
            _Layers(self.nodes.fixed.GetID(), *front, before.label, before.label_opacity).show(composite)

    def _remove_twin(self) -> None:
        if self._twin is not None:
            display = self._twin.GetDisplayNode()
            for node in (self._twin, display, display.GetColorNode() if display is not None else None):
                if node is not None and self._scene.IsNodePresent(node):
                    self._scene.RemoveNode(node)
            self._twin = None


class _Layers:
    """What a slice view shows."""

    def __init__(self, background, foreground, opacity, label, label_opacity) -> None:
        self.background, self.foreground, self.opacity = background, foreground, opacity
        self.label, self.label_opacity = label, label_opacity

    @classmethod
    def of(cls, composite) -> _Layers:
        return cls(
            composite.GetBackgroundVolumeID(),
            composite.GetForegroundVolumeID(),
            composite.GetForegroundOpacity(),
            composite.GetLabelVolumeID(),
            composite.GetLabelOpacity(),
        )

    def show(self, composite) -> None:
        blocked = composite.StartModify()
        composite.SetBackgroundVolumeID(self.background)
        composite.SetForegroundVolumeID(self.foreground)
        composite.SetForegroundOpacity(self.opacity)
        composite.SetLabelVolumeID(self.label)
        composite.SetLabelOpacity(self.label_opacity)
        composite.EndModify(blocked)


def jacobian_colors(scene):
    """The colour table for Jacobian determinants from 0 to 2, made once in a scene: as steep in log J as it is even,
    so that halving and doubling a volume look equally strong. Purple, white, orange: red is left to folding."""
    table = scene.GetFirstNodeByName(_JACOBIAN_COLORS)
    if table is not None:
        return table
    table = scene.AddNewNodeByClass("vtkMRMLColorTableNode", _JACOBIAN_COLORS)
    table.SetTypeToUser()
    table.SetAttribute("Category", "MorphSeek")
    table.SetNumberOfColors(256)
    values = np.linspace(0.0, _JACOBIAN_LIMIT, 256)
    steps = np.clip(np.log(np.maximum(values, 1e-6)) / np.log(_JACOBIAN_LIMIT), -1.0, 1.0)
    for n, (value, step) in enumerate(zip(values, steps, strict=True)):
        end = np.array((0.33, 0.15, 0.53)) if step < 0 else np.array((0.90, 0.45, 0.02))
        rgb = (1 - abs(step)) * np.array((0.97, 0.97, 0.97)) + abs(step) * end
        table.SetColor(n, f"{value:.2f}", *rgb.tolist(), 1.0)
    return table


def _composites(scene) -> list:
    kind = "vtkMRMLSliceCompositeNode"
    return [scene.GetNthNodeByClass(n, kind) for n in range(scene.GetNumberOfNodesByClass(kind))]


def _grid_twin(scene, nodes: RegistrationNodes):
    """A transform node whose TransformToParent is fixed -> moving without its affine part; for display only."""
    displacement = _displacement_of(nodes.transform)
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
    for millimetres, color in ((0.0, (0.35, 0.80, 0.95)), (4.0, (0.95, 0.95, 0.45)), (12.0, (1.0, 0.60, 0.15))):
        colors.AddRGBPoint(millimetres, *color)
    display.SetColorMap(colors)
    display.GetColorNode().SetSaveWithScene(False)
    return twin


def _displacement_of(transform_node) -> Image:
    """The transform node's grid as the engine's displacement image."""
    transform = transform_node.GetTransformFromParentAs("vtkOrientedGridTransform")
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
    """(4, 4) RAS: least-squares affine of the transform over a lattice of points in the volume."""
    index = np.array(np.meshgrid(*[np.linspace(0, n - 1, 12) for n in volume.GetImageData().GetDimensions()]))
    points = ijk_to_ras(volume) @ np.vstack([index.reshape(3, -1), np.ones(index[0].size)])
    transform = grid_transform(displacement)
    mapped = np.array([transform.TransformPoint(p) for p in points[:3].T])
    affine = np.eye(4)
    affine[:3] = np.linalg.lstsq(points.T, mapped, rcond=None)[0].T
    return affine
