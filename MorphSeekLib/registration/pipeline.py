"""The main job: two images in, a transform, a warped image and a report out.

fixed, moving -> alignment (mm) -> working grid and intensities as the model's card says -> the network, T times,
composed -> the fit, where it is asked for -> one dense transform (mm) -> everything else from that transform: the
warped image at full resolution by one interpolation, Jacobian and folding on the fixed image's own grid, the inverse,
the figures.
"""

from __future__ import annotations

from ..io.labels import check_label_values
from ..measures.metrics import dice_per_label
from ..networks.devices import memory_advice
from ..networks.loading import LoadedModel
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.options import RegistrationOptions
from ..protocol.startup import MAX_STEPS
from ..space.geometry import Transform, Volume
from .fit import Fit
from .pair import Clock, Outcome, Pair, State
from .result import Labels, Pictures, Registration, deliver
from .steps import NetworkSteps


def register(
    fixed: Volume,
    moving: Volume,
    model: LoadedModel,
    options: RegistrationOptions | None = None,
    job: Job = SILENT,
    *,
    labels: Labels = (None, None),
    start: Transform | State | None = None,
) -> Registration:
    """Register a moving image to a fixed one.

    The answer is the one of all steps, none included, after which the images are most alike
    (:class:`MorphSeekLib.measures.similarity.Judge`); a fit begins there.

    Args:
        fixed, moving: finite, not constant; any grids.
        model: from :func:`MorphSeekLib.networks.loading.load_model`.
        options: the choices; None for the defaults.
        job: told of every phase and asked often; given each step's picture, from 0 (aligned) on, and the answer's again
            after a fit.
        labels: integer label maps on their image's grid: fixed, moving; both for Dice; the moving ones are warped.
        start: an initial transform, fixed point -> moving point (LPS mm), from which the alignment starts; or the state
            of an earlier call with the same images and model, from whose answer ``options.steps`` more are taken.

    Raises:
        MorphSeekError: unusable options, images that do not overlap, not enough memory.
        Cancelled: the job was cancelled.
    """
    options, card = options or RegistrationOptions(), model.card.preprocessing
    steps = NetworkSteps(model.network, options.steps or card.steps, options.stop_early)
    state = _earlier(start, steps.steps)
    _check_labels(labels)
    clock = Clock()
    with clock("align"):
        pair = Pair(fixed, moving, model, job)
        pair.notices += [notice for volume in labels if volume is not None for notice in volume.notices]
        if isinstance(start, State):
            pair.go_on_from(start)
        else:
            kind = options.align or (card.align if start is None else "none")
            pair.align(kind, start, job.part(0.02, 0.3))
    pictures = Pictures(pair, job)
    if state is None:
        with clock("resample"), memory_advice(pair.device):
            pictures.show_aligned()
    outcome = _deformed(pair, model, options, steps, state, pictures, clock, job)
    return deliver(pair, model, outcome, options, labels, pictures, clock, job.part(0.7, 1.0))


def _deformed(
    pair: Pair,
    model: LoadedModel,
    options: RegistrationOptions,
    steps: NetworkSteps,
    state: State | None,
    pictures: Pictures,
    clock: Clock,
    job: Job,
) -> Outcome:
    """Return the network's steps, and the fit after them."""
    done = 0.35 if options.fit.total else 0.7  # the progress bar's share at the end of the steps
    with memory_advice(pair.device):
        with clock("network"):
            job.report("step", 0.3, "Preparing the images")
            pair.prepare()
            outcome = steps.run(pair, state, pictures.show, job.part(0.3, done))
        if options.fit.total:
            with clock("refinement"):
                outcome = Fit(options.fit, model.network).run(pair, outcome, job.part(done, 0.7))
    return outcome


def _earlier(start: Transform | State | None, steps: int) -> State | None:
    """Return the state from which to take ``steps`` more steps; None for a new registration."""
    if not isinstance(start, State):
        return None
    taken = len(start.figures) - 1
    if taken + steps > MAX_STEPS:
        raise MorphSeekError(f"{taken} steps were taken already, and {MAX_STEPS} are the most.")
    return start


def _check_labels(labels: Labels) -> None:
    """Refuse labels that cannot be compared, before the work."""
    fixed, moving = labels
    if (
        fixed is not None
        and moving is not None
        and not dice_per_label(fixed.data, fixed.data, moving_labels=moving.data)
    ):
        raise MorphSeekError("The two label images have no label in common; check that they use the same numbers.")
    for volume, name in ((fixed, "The fixed label map"), (moving, "The moving label map")):
        if volume is not None:
            check_label_values(volume.data, name)
