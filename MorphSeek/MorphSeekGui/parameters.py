"""What the Register section remembers, in the scene's parameter node, so that it is saved with the scene."""

from __future__ import annotations

import enum
from typing import Annotated, Union

import slicer
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper

from .models import DEFAULT
from .scene import _

# Slicer's wrapper can be given no node only where the union says so
LabelsNode = Union[slicer.vtkMRMLSegmentationNode, slicer.vtkMRMLLabelMapVolumeNode, None]  # noqa: UP007


class Alignment(enum.Enum):
    """What is done before the network; values as the engine names them, None for the model's own choice."""

    MODEL = None
    NONE = "none"
    CENTER = "center"
    RIGID = "rigid"
    AFFINE = "affine"

    def label(self) -> str:
        """The text in the list."""
        return {
            Alignment.MODEL: _("As the model says"),
            Alignment.NONE: _("Nothing"),
            Alignment.CENTER: _("Centres together"),
            Alignment.RIGID: _("Rigid"),
            Alignment.AFFINE: _("Affine"),
        }[self]


@parameterNodeWrapper
class MorphSeekParameterNode:
    """Nodes are None until chosen; an output that is None becomes a new node.

    ``model`` is a bundled name or a path, ``device`` "auto", "cpu" or "cuda:N"; their lists depend on the machine, so
    the panel keeps these two itself.
    """

    fixedVolume: slicer.vtkMRMLScalarVolumeNode
    movingVolume: slicer.vtkMRMLScalarVolumeNode
    fixedLabels: LabelsNode
    movingLabels: LabelsNode
    initialTransform: slicer.vtkMRMLTransformNode
    alignment: Alignment = Alignment.MODEL
    model: str = DEFAULT
    steps: Annotated[int, WithinRange(1, 8)] = 2
    stopEarly: bool = True
    device: str = "auto"
    outputVolume: slicer.vtkMRMLScalarVolumeNode
    outputTransform: slicer.vtkMRMLTransformNode
    inverse: bool = False
    showSteps: bool = True
