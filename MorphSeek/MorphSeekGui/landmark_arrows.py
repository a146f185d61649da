"""Arrows between landmarks, as a model that the slice views and the 3D views show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import vtk

from .scene import to_vtk

_COLOR = (1.0, 0.75, 0.1)


def add_model(scene, name: str, points: Iterable[Mapping[str, Any]], thickness: float):
    """Add a model of the arrows of a registration's landmarks to a scene, for display only.

    Args:
        scene: where to.
        name: of the node.
        points: of the report's "landmarks".
        thickness: of the arrows' heads and of the balls at their beginnings, mm.
    """
    model = scene.CreateNodeByClass("vtkMRMLModelNode")
    model.UnRegister(None)
    model.SetName(scene.GenerateUniqueName(name))
    model.SetHideFromEditors(True)
    model.SetSaveWithScene(False)
    model.SetAndObserveMesh(shapes(points, thickness))
    scene.AddNode(model)
    model.CreateDefaultDisplayNodes()
    display = model.GetDisplayNode()
    display.SetSaveWithScene(False)
    display.SetColor(*_COLOR)
    display.SetVisibility2D(True)
    display.SetSliceDisplayModeToProjection()
    display.SetSliceIntersectionThickness(2)
    return model


def shapes(points: Iterable[Mapping[str, Any]], thickness: float):
    """Return the surface of the arrows; arguments as :func:`add_model`."""
    joined = vtk.vtkAppendPolyData()
    for point in points:
        begin = np.array(point["fixed"]) * (-1, -1, 1)
        joined.AddInputData(_ball(begin, thickness / 2))
        if point.get("moving_in_fixed") is not None:
            joined.AddInputData(_arrow(begin, np.array(point["moving_in_fixed"]) * (-1, -1, 1), thickness))
    joined.Update()
    return joined.GetOutput()


def fitting_thickness(volume) -> float:
    """Return how thick arrows look right on a volume, mm."""
    bounds = np.zeros(6)
    volume.GetRASBounds(bounds)
    return float(np.ptp(bounds.reshape(3, 2), axis=1).max()) / 150


def _ball(center: np.ndarray, radius: float):
    ball = vtk.vtkSphereSource()
    ball.SetCenter(*center)
    ball.SetRadius(radius)
    ball.Update()
    return ball.GetOutput()


def _arrow(begin: np.ndarray, end: np.ndarray, thickness: float):
    """Return an arrow between two points (RAS mm); its head is no longer than a third of it."""
    length = max(float(np.linalg.norm(end - begin)), 1e-6)
    source = vtk.vtkArrowSource()
    source.SetTipResolution(12)
    source.SetTipLength(min(0.35, 2 * thickness / length))
    source.SetTipRadius(min(0.2, 0.7 * thickness / length))
    source.SetShaftRadius(min(0.08, 0.25 * thickness / length))
    # the source's arrow is the x axis from 0 to 1
    along = (end - begin) / length
    aside = np.cross(along, np.eye(3)[np.abs(along).argmin()])
    aside /= np.linalg.norm(aside) or 1.0
    matrix = np.eye(4)
    matrix[:3, :3] = length * np.stack([along, aside, np.cross(along, aside)], axis=1)
    matrix[:3, 3] = begin
    placed = vtk.vtkTransform()
    placed.SetMatrix(to_vtk(matrix))
    moved = vtk.vtkTransformPolyDataFilter()
    moved.SetTransform(placed)
    moved.SetInputConnection(source.GetOutputPort())
    moved.Update()
    return moved.GetOutput()
