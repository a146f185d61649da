"""The choices of the section Register, in the parameter node of the scene, so that they are saved with the scene.

Slicer saves an enum by the name of its member. Names that earlier versions saved live on as second names of a member,
so that their scenes open: with the same choice where there is one, else with the default.
"""

from __future__ import annotations

import enum
import json
from dataclasses import replace
from typing import Annotated, Union

import slicer
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper

from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.startup import AUTO, MAX_STEPS, NO_MODEL

from .models import DEFAULT
from .scene import _

DEFAULTS = RegistrationOptions()
# Slicer's wrapper can be given no node only where the union says so
LabelsNode = Union[slicer.vtkMRMLSegmentationNode, slicer.vtkMRMLLabelMapVolumeNode, None]  # noqa: UP007


class Alignment(enum.Enum):
    """What is done before anything deformable; values as the engine names them."""

    AUTO = "auto"
    NONE = "none"
    CENTER = "center"
    RIGID = "rigid"
    AFFINE = "affine"
    MODEL = "auto"  # of earlier versions

    def label(self) -> str:
        """Return the text in the list."""
        return {
            Alignment.AUTO: _("Automatic"),
            Alignment.NONE: _("Nothing"),
            Alignment.CENTER: _("Centers together"),
            Alignment.RIGID: _("Rigid"),
            Alignment.AFFINE: _("Affine"),
        }[self]


class Preset(enum.Enum):
    """How much time the fit may take; values as the engine names them."""

    BEST = "best"
    FAST = "fast"

    def label(self) -> str:
        """Return the text in the list."""
        return {Preset.BEST: _("Best"), Preset.FAST: _("Fast")}[self]


class Search(enum.Enum):
    """Whether large motion is searched for; values as the engine names them."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"

    def label(self) -> str:
        """Return the text in the list."""
        return {Search.AUTO: _("Automatic"), Search.ON: _("On"), Search.OFF: _("Off")}[self]


class Fit(enum.Enum):
    """Whether this pair is fitted without labels; values as the engine names them."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"
    NO = "off"  # of earlier versions, and the next two
    MODEL_GRID = "on"
    IMAGE_GRID = "on"

    def label(self) -> str:
        """Return the text in the list."""
        return {Fit.AUTO: _("Automatic"), Fit.ON: _("On"), Fit.OFF: _("Off")}[self]


class CompareBy(enum.Enum):
    """What the fit and the figures compare by; values as the engine names them."""

    AUTO = "auto"
    ONE_MODALITY = "lncc"
    TWO_MODALITIES = "mind"
    SAME_INTENSITIES = "mse"
    LNCC = "auto"  # of earlier versions: their default, which did not look at the pair
    MIND = "mind"

    def label(self) -> str:
        """Return the text in the list."""
        return {
            CompareBy.AUTO: _("Automatic"),
            CompareBy.ONE_MODALITY: _("One modality (LNCC)"),
            CompareBy.TWO_MODALITIES: _("Two modalities (MIND)"),
            CompareBy.SAME_INTENSITIES: _("Same intensities (MSE)"),
        }[self]


class EstimatedError(enum.Enum):
    """Whether the error of a result is estimated after it is shown."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"

    def label(self) -> str:
        """Return the text in the list."""
        return {EstimatedError.AUTO: _("Automatic"), EstimatedError.ON: _("On"), EstimatedError.OFF: _("Off")}[self]


@parameterNodeWrapper
class MorphSeekParameterNode:
    """Nodes are None until chosen; an output that is None becomes a new node.

    ``model`` is "auto", "none", a bundled name or a path, ``device`` "auto", "cpu" or "cuda:N"; their lists depend on
    the machine, so the panel keeps these two itself. ``otherOptions`` are those of saved settings that no widget shows,
    as JSON. ``fitBy`` is what the fit and the figures compare by; scenes of
    earlier versions have it by this name.
    """

    fixedVolume: slicer.vtkMRMLScalarVolumeNode
    movingVolume: slicer.vtkMRMLScalarVolumeNode
    fixedLabels: LabelsNode
    movingLabels: LabelsNode
    fixedLandmarks: slicer.vtkMRMLMarkupsFiducialNode
    movingLandmarks: slicer.vtkMRMLMarkupsFiducialNode
    initialTransform: slicer.vtkMRMLTransformNode
    fixedMask: LabelsNode
    fixedIgnore: LabelsNode
    movingMask: LabelsNode
    movingIgnore: LabelsNode
    alignment: Alignment = Alignment.AUTO
    model: str = DEFAULT
    steps: Annotated[int, WithinRange(1, MAX_STEPS)] = 2
    stopEarly: bool = DEFAULTS.stop_early
    preset: Preset = Preset.BEST
    search: Search = Search.AUTO
    fit: Fit = Fit.AUTO
    fitBy: CompareBy = CompareBy.AUTO
    estimate: EstimatedError = EstimatedError.AUTO
    device: str = "auto"
    outputVolume: slicer.vtkMRMLScalarVolumeNode
    outputTransform: slicer.vtkMRMLTransformNode
    inverse: bool = DEFAULTS.inverse
    showSteps: bool = True
    otherOptions: str = ""


def has_named_model(parameters: MorphSeekParameterNode) -> bool:
    """Return whether a certain model was chosen, so that the steps of its network can be."""
    return parameters.model not in (AUTO, NO_MODEL)


def chosen_options(parameters: MorphSeekParameterNode) -> RegistrationOptions:
    """Return the engine's options; a model that is not chosen by name takes the steps it was trained with."""
    named = has_named_model(parameters)
    options = RegistrationOptions(
        steps=parameters.steps if named else None,
        align=parameters.alignment.value,
        stop_early=named and parameters.stopEarly,
        inverse=parameters.inverse,
        preset=parameters.preset.value,
        search=parameters.search.value,
        fit=parameters.fit.value,
        similarity=parameters.fitBy.value,
    )
    return replace(options, **{name: tuple(value) for name, value in other_options(parameters).items()})


def other_options(parameters: MorphSeekParameterNode) -> dict[str, list[int]]:
    """Return the chosen options that no widget shows, by the engine's names."""
    return json.loads(parameters.otherOptions or "{}")


def shared_options(parameters: MorphSeekParameterNode) -> RegistrationOptions:
    """Return the options as they are saved and given to batches: with the estimated error where it is switched on."""
    estimate = "on" if parameters.estimate is EstimatedError.ON else "off"
    return replace(chosen_options(parameters), trust=estimate)


def use_options(parameters: MorphSeekParameterNode, options: RegistrationOptions) -> None:
    """Choose what options say; without a number of steps that stays as it is, and without an estimated error the choice
    of it, unless it is on."""
    parameters.alignment = Alignment(options.align)
    parameters.preset = Preset(options.preset)
    parameters.search = Search(options.search)
    parameters.fit = Fit(options.fit)
    parameters.fitBy = CompareBy(options.similarity)
    if (options.trust == "on") != (parameters.estimate is EstimatedError.ON):
        parameters.estimate = EstimatedError.ON if options.trust == "on" else EstimatedError.AUTO
    parameters.stopEarly = options.stop_early
    parameters.inverse = options.inverse
    if options.steps is not None:
        parameters.steps = options.steps
    counts = options.fit_iterations
    parameters.otherOptions = "" if counts is None else json.dumps({"fit_iterations": list(counts)})
