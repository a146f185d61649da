"""The choices of the section Register, in the parameter node of the scene, so that they are saved with the scene."""

from __future__ import annotations

import enum
from typing import Annotated, Union

import slicer
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper

from MorphSeekLib.protocol.options import FitOptions, RegistrationOptions
from MorphSeekLib.protocol.startup import MAX_STEPS

from .models import DEFAULT
from .scene import _

DEFAULTS = RegistrationOptions()
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
        """Return the text in the list."""
        return {
            Alignment.MODEL: _("As the model says"),
            Alignment.NONE: _("Nothing"),
            Alignment.CENTER: _("Centers together"),
            Alignment.RIGID: _("Rigid"),
            Alignment.AFFINE: _("Affine"),
        }[self]


class Fit(enum.Enum):
    """Whether this pair is fitted without labels after the network, and how finely."""

    NO = "no"
    MODEL_GRID = "model"
    IMAGE_GRID = "image"

    def label(self) -> str:
        """Return the text in the list."""
        return {
            Fit.NO: _("No"),
            Fit.MODEL_GRID: _("On the model's grid"),
            Fit.IMAGE_GRID: _("On the image's grid, too"),
        }[self]

    def options(self, by: FitBy) -> FitOptions:
        """Return the engine's options."""
        return FitOptions.preset(self.value, by.value)


class FitBy(enum.Enum):
    """What fitting compares; values as the engine names them."""

    LNCC = "lncc"
    MIND = "mind"

    def label(self) -> str:
        """Return the text in the list."""
        return {FitBy.LNCC: _("one modality"), FitBy.MIND: _("two modalities")}[self]


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
    steps: Annotated[int, WithinRange(1, MAX_STEPS)] = 2
    stopEarly: bool = DEFAULTS.stop_early
    fit: Fit = Fit.NO
    fitBy: FitBy = FitBy.LNCC
    device: str = "auto"
    outputVolume: slicer.vtkMRMLScalarVolumeNode
    outputTransform: slicer.vtkMRMLTransformNode
    inverse: bool = DEFAULTS.inverse
    showSteps: bool = True
