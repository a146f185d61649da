"""Corrections of a registration in the scene: lines that the user draws on the result, and lists of points.

A line begins where a place of the warped volume is seen, and ends where it belongs in the fixed volume. So its end is
the point of the fixed image, and the registration's transform leads its beginning to the point of the moving image.
That point is kept with the line once it was used: the transform is another one then. The lines belong to the transform
node of their registration by references, which are saved with the scene.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import slicer
import slicer.util

from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.pairing import paired

from . import scene
from .scene import FLIP, Image, InputError, RegistrationNodes, _
from .views import displacement_of

LINE = "vtkMRMLMarkupsLineNode"
ROLE = "MorphSeek.correction"  # of the references from a result's transform to its lines
USED = "MorphSeek.Correction"  # attribute of a line: from where to where it led when it was used
ERROR_MM = 1.0  # how far off a point may be, unless the user says otherwise
_SAME_MM = 1e-3
_GLYPH = 1.5  # percent of a view: the ends do not hide the arrow
_COLORS = {False: (1.0, 0.55, 0.1), True: (0.3, 0.85, 0.45)}  # of a line: drawn, used


@dataclass(frozen=True)
class Corrections:
    """Points by which a registration is corrected.

    Attributes:
        transform: the transform node of the registration.
        labels: of the pairs.
        fixed: (n, 3) LPS mm in the world.
        moving: (n, 3) LPS mm in the moving volume's own coordinates.
        error_mm: how far off each of the points may be, one standard deviation.
        used: of each line what :data:`USED` will say, and the line.
    """

    transform: slicer.vtkMRMLTransformNode
    labels: list[str]
    fixed: np.ndarray
    moving: np.ndarray
    error_mm: float = ERROR_MM
    used: list[tuple[slicer.vtkMRMLMarkupsLineNode, str]] = field(default_factory=list)

    def sent(self, moving_to_space: np.ndarray) -> dict[str, list]:
        """Return what the worker takes.

        Args:
            moving_to_space: (4, 4) RAS, from the moving volume's own coordinates to those in which it is sent.
        """
        matrix = FLIP @ moving_to_space @ FLIP
        moving = self.moving @ matrix[:3, :3].T + matrix[:3, 3]
        errors = [self.error_mm] * len(self.labels)
        return {"labels": self.labels, "fixed": self.fixed.tolist(), "moving": moving.tolist(), "errors": errors}

    def start(self, moving_to_space: np.ndarray) -> Image:
        """Return the displacement that is corrected where there is no state of the engine: the transform node's.

        Args:
            moving_to_space: as in :meth:`sent`.
        """
        own = displacement_of(self.transform)
        if np.array_equal(moving_to_space, np.eye(4)):
            return own
        return displacement_of_grid(scene.grid_transform(own, target=moving_to_space))

    def keep(self) -> None:
        """Note in the lines that they were used."""
        for line, text in self.used:
            mark(line, text)


def new_line(nodes: RegistrationNodes):
    """Return a line to be drawn for a registration; one that was never drawn is taken again."""
    waiting = [line for line in lines(nodes) if line.GetNumberOfDefinedControlPoints() == 0]
    if waiting:
        return waiting[0]
    plain = {"line": _("Correction {n}").format(n=len(lines(nodes)) + 1)}
    line = slicer.mrmlScene.AddNewNodeByClass(LINE, scene.free_names(slicer.mrmlScene, plain)["line"])
    line.CreateDefaultDisplayNodes()
    line.GetDisplayNode().SetGlyphScale(_GLYPH)
    nodes.transform.AddNodeReferenceID(ROLE, line.GetID())
    mark(line, None)
    scene.put_into_folder(nodes, [line])
    return line


def lines(nodes: RegistrationNodes) -> list:
    """Return the lines that belong to a registration, in the order in which they were made."""
    count = nodes.transform.GetNumberOfNodeReferences(ROLE)
    found = [nodes.transform.GetNthNodeReference(ROLE, n) for n in range(count)]
    return [line for line in found if line is not None]


def is_drawn(line) -> bool:
    """Return whether a line has both ends."""
    return line.GetNumberOfControlPoints() == 2 and line.GetNumberOfDefinedControlPoints() == 2


def ends(line) -> np.ndarray:
    """Return where a line begins and ends, (2, 3) LPS mm in the world."""
    return slicer.util.arrayFromMarkupsControlPoints(line, world=True) @ FLIP[:3, :3]


def length(line) -> float:
    """Return how long a line is, mm."""
    begin, end = ends(line)
    return float(np.linalg.norm(end - begin))


def mark(line, text: str | None) -> None:
    """Note in a line how it was used, and show that by its color; None: it was not."""
    if text is None:
        line.RemoveAttribute(USED)
    else:
        line.SetAttribute(USED, text)
    display = line.GetDisplayNode()
    if display is not None:
        display.SetColor(*_COLORS[text is not None])
        display.SetSelectedColor(*_COLORS[text is not None])


def gather(nodes: RegistrationNodes, fixed_points=None, moving_points=None, error_mm: float = ERROR_MM) -> Corrections:
    """Return the corrections of a registration: all lines that were drawn for it, and two lists of points.

    Args:
        nodes: of the registration.
        fixed_points, moving_points: markups, each with its volume; pairs by label, or by order where no label is the
            same. None for both without.
        error_mm: how far off a point may be, one standard deviation.

    Raises:
        InputError: nothing to correct by, one list without the other, or an error that is no length.
    """
    if not error_mm > 0:
        raise InputError(_("The error of a point must be a number of mm above 0, such as 1."))
    labels, fixed, moving = _listed(nodes, fixed_points, moving_points)
    used = []
    for line in [line for line in lines(nodes) if is_drawn(line)]:
        begin, end = ends(line)
        place = _moving_place(nodes, line, begin)
        labels.append(line.GetName())
        fixed.append(end)
        moving.append(place)
        used.append((line, json.dumps({"begin": begin.tolist(), "moving": place.tolist()})))
    if not labels:
        raise InputError(
            _("There is nothing to correct by; draw a line from where a place is seen to where it belongs.")
        )
    return Corrections(nodes.transform, labels, np.array(fixed), np.array(moving), float(error_mm), used)


def displacement_of_grid(transform) -> Image:
    """Return a grid transform of VTK, set as TransformFromParent, as the engine's displacement image."""
    node = slicer.vtkMRMLTransformNode()
    node.SetAndObserveTransformFromParent(transform)
    return displacement_of(node)


def _moving_place(nodes: RegistrationNodes, line, begin: np.ndarray) -> np.ndarray:
    """Return the place of the moving volume that is or was seen at a line's beginning, LPS mm."""
    text = line.GetAttribute(USED)
    if text is not None:
        used = json.loads(text)
        if np.abs(begin - used["begin"]).max() < _SAME_MM:
            return np.array(used["moving"])
    return FLIP[:3, :3] @ nodes.transform.GetTransformFromParent().TransformPoint(FLIP[:3, :3] @ begin)


def _listed(nodes: RegistrationNodes, fixed_points, moving_points) -> tuple[list[str], list, list]:
    """Return labels, fixed and moving points of two lists."""
    if fixed_points is None and moving_points is None:
        return [], [], []
    if fixed_points is None or moving_points is None:
        raise InputError(_("Choose points of both volumes to correct by, or of none."))
    fixed = scene.read_points(fixed_points)
    moving = scene.read_points(moving_points, nodes.moving.GetParentTransformNode())
    names = f"'{fixed_points.GetName()}'", f"'{moving_points.GetName()}'"
    order, labels = _paired(fixed["labels"], moving["labels"], names)
    return labels, list(fixed["positions"]), [moving["positions"][n] for n in order]


def _paired(fixed: Sequence[str], moving: Sequence[str], names: tuple[str, str]) -> tuple[list[int], list[str]]:
    try:
        return paired(fixed, moving, names)
    except MorphSeekError as refused:
        raise InputError(str(refused)) from refused
