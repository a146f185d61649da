"""Warn of, or refuse, what cannot be right, so that no meaningless result is returned without a word.

A function either raises :class:`MorphSeekLib.protocol.errors.MorphSeekError`, where nothing useful can follow, or
returns the :class:`MorphSeekLib.protocol.job.Notice`s that go with the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..protocol.errors import MorphSeekError
from ..protocol.job import Notice
from ..protocol.report import StepSection
from ..space.geometry import DenseTransform, Transform
from ..space.preprocessing import Preprocessing, sampled

SAME_SIZE = 1.5  # times smaller or larger than the training images is still what a model knows
OTHER_WORLD = 5.0  # times: another species, or other units than mm; no two images of one object differ so much either
LEAST_VOXELS = 200  # of the working grid: fewer show no shape
LEAST_OVERLAP = 0.1  # of what the fixed image shows
ONE_VALUE = 0.8  # of what an image shows is of one value: a mask
ON_FACES = 0.1  # of the voxels of an image's faces
FLAT = 0.02  # of the range
LOST = 0.15  # of similarity by MIND: nothing but another place in the body, or none, makes so much
NOTABLE = 0.005  # of similarity or Dice: smaller losses are not worth a sentence


def check_finite(values: Transform | Tensor | float | list[float], what: str) -> None:
    """Refuse a matrix, a field or a figure that is not made of finite numbers.

    Raises:
        MorphSeekError: with ``what``, the name of the stage, such as "The alignment".
    """
    if isinstance(values, DenseTransform):
        values = values.displacement
    finite = torch.isfinite(values).all() if isinstance(values, Tensor) else np.isfinite(values).all()
    if not bool(finite):
        raise MorphSeekError(
            f"{what} gave numbers that are not finite, so there is no result; check the two images and, if others fail "
            "too, get the model's file again."
        )


def unknown_sizes(sizes: Sequence[float], preprocessing: Preprocessing) -> tuple[list[Notice], float]:
    """Warn of objects of a size that the model was not trained on.

    Args:
        sizes: of the fixed and the moving image's object, mm.
        preprocessing: of the model's card.

    Returns:
        the notices, and how many times coarser the working grid should be: 1, except for another species or unit.
    """
    notices = []
    beyond = [preprocessing.beyond(size) for size in sizes]
    factor = beyond[0] if _times(beyond[0]) > OTHER_WORLD else 1.0
    unknown = [
        f"the {name} image shows an object of {_mm(size)} mm"
        for name, size, times in zip(("fixed", "moving"), sizes, beyond, strict=True)
        if _times(times) > SAME_SIZE
    ]
    if unknown and preprocessing.knows is not None:
        low, high = preprocessing.knows
        tail = (
            ""
            if factor == 1
            else f"; the model's grid was made {_times(factor):.0f} times " + ("finer" if factor < 1 else "coarser")
        )
        known = f"The model was trained on objects of {_mm(low)} to {_mm(high)} mm"
        words = f"{known}, but {' and '.join(unknown)}{tail}; check the spacing and the units, and look at the result."
        notices.append(Notice("unknown-size", words))
    if _times(sizes[1] / sizes[0]) > 2 * OTHER_WORLD:
        words = (
            f"The object of the fixed image is {_mm(sizes[0])} mm long, that of the moving image {_mm(sizes[1])} mm; "
            "check the spacing and the units of both files."
        )
        notices.append(Notice("sizes-differ", words))
    return notices, factor


def mirrored_alignment(mirrored: bool) -> list[Notice]:
    """Say whether the alignment exchanges left and right."""
    if not mirrored:
        return []
    words = (
        "The initial transform mirrors the image (its determinant is negative), so left and right change places; "
        "folding is judged relative to that. Check that you want this."
    )
    return [Notice("mirrored", words)]


def lost_initial(alike: float, possible: float) -> list[Notice]:
    """Say whether an initial transform leaves the images much less alike, by MIND, than an alignment without it."""
    if possible - alike < LOST:
        return []
    words = (
        f"The images are far less alike after the initial transform (by MIND: {alike:.2f}) than after an alignment "
        f"without it ({possible:.2f}); check that it belongs to these images and leads from the fixed to the moving "
        "one, or leave it out."
    )
    return [Notice("initial-lost", words)]


def small_foreground(voxels: int) -> list[Notice]:
    """Say whether the fixed image shows enough on the working grid, in voxels of it."""
    if voxels >= LEAST_VOXELS:
        return []
    words = (
        f"What the fixed image shows covers {voxels} voxels of the model's grid, too few to judge a registration by; "
        "check its spacing, or choose a model with a finer grid."
    )
    return [Notice("small-foreground", words)]


def nothing_to_judge(counted: Tensor) -> list[Notice]:
    """Warn of images of which nothing can be compared.

    Args:
        counted: bool, any shape: which blocks of voxels count, see :class:`.pyramid.Coarse`.
    """
    if bool(counted.any()):
        return []
    words = (
        "The images lie together in so thin a part that nothing in it can be compared: no similarity is known, and no "
        "result is better than the alignment. Give an image with more or thicker slices."
    )
    return [Notice("not-judged", words)]


def few_values(image: Tensor, name: str) -> list[Notice]:
    """Warn of an image that shows hardly more than an outline.

    Then no figure tells which of two results is better inside of it: every measure rises while the inside gets worse.
    A level that holds a good part of the image's faces is air, or what fills the grid around the field of view.

    Args:
        image: its intensities as the network sees them, (i, j, k), from 0 on.
        name: what to call it.
    """
    top, highest = float(image.max()) or 1.0, round(1 / FLAT)
    faces = torch.cat([image.select(axis, end).flatten() for axis in range(3) for end in (0, -1)])
    count, around = (
        torch.bincount((values / (FLAT * top)).round().long().clamp(0, highest), minlength=highest + 1)
        for values in (sampled(image), faces)
    )
    shown, inside = count[1:], torch.where(around < ON_FACES * len(faces), count, 0)
    if all(int(levels.max()) < ONE_VALUE * int(levels.sum()) for levels in (shown, inside)):
        return []
    words = (
        f"{name} shows hardly more than one value inside its outline, so that nothing there guides the registration, "
        "which can be worse than the alignment alone; compare with the result of the alignment."
    )
    return [Notice("few-values", words)]


def small_overlap(share: float) -> list[Notice]:
    """Say whether enough of what the fixed image shows lies in the moving image after the registration."""
    if share >= LEAST_OVERLAP:
        return []
    words = (
        f"Only {100 * share:.1f} % of what the fixed image shows lies inside the moving image after the registration; "
        "check the alignment."
    )
    return [Notice("small-overlap", words)]


def lowered_by_alignment(kind: str, measure: str, before: float | None, after: float | None) -> list[Notice]:
    """Say whether the alignment made a figure worse, of which 1 is best; None where it was not measured."""
    if before is None or after is None or before - after <= NOTABLE:
        return []
    words = (
        f"The alignment ({kind}) lowered the {measure} from {before:.3f} to {after:.3f}; "
        "compare with the result without alignment."
    )
    return [Notice("alignment-lowers", words)]


def nothing_found(names: Sequence[str]) -> list[Notice]:
    """Say in which images a network that was trained on labels finds none; without names, that none is in both."""
    what = "The images show nothing in common"
    if names:
        what = f"{' and '.join(names)} {'shows' if len(names) == 1 else 'show'} nothing"
    words = (
        f"{what} of what the model was trained to find, so the images themselves are compared, as without a model; "
        "check that the model is for such images."
    )
    return [Notice("nothing-found", words)]


def no_step_helped(figures: Sequence[StepSection], answer: int, first: int) -> list[Notice]:
    """Warn if no step of the network brought the images closer, or the trusted ones led away from the alignment.

    Args:
        figures: a row for each stage and step; index 0: the alignment.
        answer: the row that was chosen.
        first: the row of the first step of this call.
    """
    new = [row["similarity"] for row in figures[first:]]
    if not new:
        return []
    before = figures[first - 1]
    if answer < first:
        where = {"align": "alignment", "search": "search"}.get(before["stage"], f"result after step {before['step']}")
        words = (
            f"No step of the network brought the images closer than the {where} did (similarity "
            f"{figures[answer]['similarity']:.3f}, at best {max(new):.3f} after a step), so the answer is the {where}."
        )
        return [Notice("no-step-helped", words)]
    aligned, after = figures[0]["similarity"], figures[answer]["similarity"]
    if after >= aligned - NOTABLE:
        return []
    words = (
        f"The network's steps lowered the similarity from {aligned:.3f} to {after:.3f}; they are kept because this "
        "model was better on labeled pairs than images alone. Compare with the result without a model."
    )
    return [Notice("steps-fell", words)]


def stage_fell(stage: str, before: float, after: float) -> list[Notice]:
    """Say that a stage's result was taken back; not of the search, which is a try."""
    if stage == "search":
        return []
    words = (
        f"Fitting the pair lowered the similarity from {before:.3f} to {after:.3f}, so the answer is the one from "
        "before the fit."
    )
    return [Notice("fit-fell", words)]


def _times(factor: float) -> float:
    """Return how many times smaller or larger."""
    return max(factor, 1 / factor) if factor > 0 else math.inf


def _mm(length: float) -> str:
    """Return a length in three digits."""
    return f"{length:.3g}" if length < 1000 else f"{length:,.0f}"
