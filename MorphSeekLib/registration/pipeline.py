"""The main job: two images in, a transform, a warped image and a report out.

fixed, moving -> alignment (mm) -> search for large motion -> the network's steps -> the fit -> unfolding -> one dense
transform (mm) -> everything else from that transform: the warped image at full resolution by one interpolation,
Jacobian and folding on the fixed image's own grid, the inverse, the figures. Each stage is optional, and one judge
compares what they find (:mod:`.judge`).
"""

from __future__ import annotations

import torch

from ..io.labels import check_label_values
from ..io.transforms import rounded
from ..measures.folds import unfold
from ..measures.metrics import dice_per_label
from ..networks.devices import memory_advice
from ..networks.loading import LoadedModel
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.options import RegistrationOptions
from ..protocol.startup import MAX_STEPS
from ..space.geometry import DenseTransform, Transform, Volume
from .correction import CorrectedFit, Correction, corrected_section
from .find import Search
from .fit import Fit, start_of
from .judge import FAR
from .pair import Clock, Outcome, Pair, State
from .pictures import Pictures
from .result import Labels, Registration, Request, deliver
from .steps import NetworkSteps
from .trust_map import Estimation


def register(
    fixed: Volume,
    moving: Volume,
    model: LoadedModel | None = None,
    options: RegistrationOptions | None = None,
    job: Job = SILENT,
    *,
    labels: Labels = (None, None),
    start: Transform | State | Correction | None = None,
    device: torch.device | None = None,
) -> Registration:
    """Register a moving image to a fixed one.

    Args:
        fixed, moving: finite, not constant; any grids. What does not count of them (:func:`.masks.masked`) changes
            nothing.
        model: from :func:`MorphSeekLib.networks.loading.load_model`; None: no network, which suits any anatomy.
        options: the choices; None for the defaults.
        job: told of every phase and asked often; given a picture after each stage, from 0 (aligned) on.
        labels: integer label maps on their image's grid: fixed, moving; both for Dice; the moving ones are warped.
        start: an initial transform, fixed point -> moving point (LPS mm), from which the alignment starts; or the state
            of an earlier call with the same images and model, from whose answer the stages go on; or what to correct of
            such an answer, by points, which then takes the place of the other stages.
        device: where to compute without a model; None: the CPU.

    Raises:
        MorphSeekError: unusable options, masks that leave too little, images that do not overlap, not enough memory.
        Cancelled: the job was cancelled.
    """
    options = options or RegistrationOptions()
    _check_labels(labels, (fixed, moving))
    _check_steps_left(start, model, options)
    clock, pictures = Clock(), Pictures(job)
    with clock("align"):
        pair = Pair(fixed, moving, model, device, job)
        pair.notices += [notice for volume in labels if volume is not None for notice in volume.notices]
        _align(pair, model, options, start, job.part(0.02, 0.2))
    with clock("resample"), memory_advice(pair.device):
        pictures.show_aligned(pair)
    with memory_advice(pair.device):
        outcome = _deformed(pair, model, options, start, pictures, clock, job.part(0.2, 0.7))
        transform = pair.delivered(outcome)
        if options.fit != "off" or isinstance(start, Correction):
            with clock("unfold"):
                transform = _unfolded(pair, transform, job)
    request = Request(model, options, labels)
    end = 0.75 if options.trust == "on" and not isinstance(start, Correction) else 1.0
    result = deliver(pair, request, outcome, transform, pictures, clock, job.part(0.7, end))
    if isinstance(start, Correction):
        before = pair.whole(start.start.total) if isinstance(start.start, State) else start.start
        result.report["corrections"], notices = corrected_section(start, before, transform)
        result.report["warnings"] += [{"code": notice.code, "message": notice.message} for notice in notices]
        return result
    estimation = Estimation(pair, outcome, model, options)
    if options.trust == "on":
        with clock("trust"):
            result.trust = estimation.run(job.part(0.75, 1.0))
        result.report["trust"] = result.trust.section
    elif options.trust == "later":
        result.estimation = estimation
    return result


def _align(
    pair: Pair,
    model: LoadedModel | None,
    options: RegistrationOptions,
    start: Transform | State | Correction | None,
    job: Job,
) -> None:
    """Align the pair as the options, the card or an earlier call says."""
    if isinstance(start, Correction) and not isinstance(start.start, State):
        pair.align("none", start.start, job)
        return
    if isinstance(start, Correction):
        start = start.start
    if isinstance(start, State):
        pair.go_on_from(start)
        return
    kind = options.align
    if kind == "auto" and start is not None:
        kind = "none"
    elif kind == "auto" and model is not None and model.network.backbone.moves:  # else each image is seen by itself
        kind = model.card.preprocessing.align
    pair.align(kind, start, job)


def _deformed(
    pair: Pair,
    model: LoadedModel | None,
    options: RegistrationOptions,
    start: Transform | State | Correction | None,
    pictures: Pictures,
    clock: Clock,
    job: Job,
) -> Outcome:
    """Run the stages that were chosen, one after the other."""
    card = None if model is None else model.card
    with clock("prepare"), torch.no_grad():
        job.report("align", 0.0, "Preparing the images")
        pair.prepare(options.similarity)
        begin = start.start if isinstance(start, Correction) else start
        outcome = start_of(pair, begin if isinstance(begin, State) else None)
    if isinstance(start, Correction):
        with clock("fit"), torch.no_grad():
            corrected = CorrectedFit(options, start, trusted=card is not None and card.keeps_steps)
            return corrected.run(pair, outcome, pictures, job.part(0.0, 1.0))
    wanted = card is None or card.search
    if options.search == "on" or (options.search == "auto" and wanted and _is_far(pair, outcome)):
        with clock("search"), torch.no_grad():
            outcome = Search().run(pair, outcome, job.part(0.05, 0.3))
    if model is not None and card is not None and model.network.backbone.moves:
        trusted = card.keeps_steps and not pair.masks  # labels were never inside a mask
        steps = NetworkSteps(model.network, options.steps or card.preprocessing.steps, options.stop_early, trusted)
        with clock("network"):
            outcome = steps.run(pair, outcome, pictures, job.part(0.3, 0.6))
    suits = card is None or (card.fit and (card.share == 1 or pair.learned is not None))
    if options.fit == "on" or (options.fit == "auto" and suits):
        with clock("fit"), torch.no_grad():
            outcome = Fit(options).run(pair, outcome, job.part(0.6, 1.0))
    return outcome


def _is_far(pair: Pair, outcome: Outcome) -> bool:
    """Return whether large motion is left: never where an earlier call has searched."""
    return len(outcome.figures) == 1 and pair.alike_by_features() < FAR


def _unfolded(pair: Pair, transform: DenseTransform, job: Job) -> DenseTransform:
    """Return the transform with its folds pulled apart, rounded as its file is."""
    return rounded(unfold(transform, pair.alignment.mirrored, job=job))


def _check_steps_left(
    start: Transform | State | Correction | None, model: LoadedModel | None, options: RegistrationOptions
) -> None:
    """Refuse more steps than there may be in all."""
    if model is None or not isinstance(start, State):
        return
    taken = start.figures[-1]["step"]
    if taken + (options.steps or model.card.preprocessing.steps) > MAX_STEPS:
        raise MorphSeekError(f"{taken} steps were taken already, and {MAX_STEPS} are the most.")


def _check_labels(labels: Labels, images: tuple[Volume, Volume]) -> None:
    """Refuse labels that cannot be compared, before the work."""
    fixed, moving = labels
    for volume, image, name in zip(labels, images, ("fixed", "moving"), strict=True):
        if volume is not None and not volume.grid.same_as(image.grid):
            raise MorphSeekError(
                f"The {name} labels lie on another grid than their image; resample them (nearest neighbor)."
            )
    if (
        fixed is not None
        and moving is not None
        and not dice_per_label(fixed.data, fixed.data, moving_labels=moving.data)
    ):
        raise MorphSeekError("The two label images have no label in common; check that they use the same numbers.")
    for volume, name in ((fixed, "The fixed label map"), (moving, "The moving label map")):
        if volume is not None:
            check_label_values(volume.data, name)
