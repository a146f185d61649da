"""How a pair is fitted, by preset: similarity, levels, iterations and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

VERSION = 1
"""Of search and fit: count it up where their answers change by anything but the settings that
:func:`.calibrated.fingerprint` reads, and calibrate again what errors are estimated by."""
LEARNED_VERSION = 2
"""In the same way, of what is compared of learned features."""


@dataclass(frozen=True)
class Plan:
    """How a pair is fitted.

    Attributes:
        similarity: a key of SIMILARITIES, or "features".
        levels: coarse to fine, as for :meth:`.pyramid.Pyramid.images`.
        iterations: on each.
        rate: of Adam, voxels of the level.
        regularization, folding: weights of :class:`.objective.Level`.
    """

    similarity: str
    levels: tuple[int, ...]
    iterations: tuple[int, ...]
    rate: float
    regularization: float
    folding: float


CORRELATION = {
    "best": Plan("lncc", (2, 1, 0), (60, 60, 30), 0.1, 0.1, 800.0),
    "fast": Plan("lncc", (2, 1, 0), (40, 30, 10), 0.1, 0.1, 800.0),
}
"""By preset."""
CORRELATION_FROM_NEAR = {
    "best": Plan("lncc", (1, 0), (60, 40), 0.1, 0.1, 800.0),
    "fast": Plan("lncc", (1, 0), (40, 15), 0.1, 0.1, 800.0),
}
"""After a search: a coarser level would undo some of what it has found."""
CORRELATION_OPPOSITE = {
    "best": Plan("lncc", (0,), (40,), 0.1, 0.1, 800.0),
    "fast": Plan("lncc", (0,), (20,), 0.1, 0.1, 800.0),
}
"""After a fit by features where the contrast is opposite: wider windows hold more of the outlines."""
FEATURES = {
    "best": Plan("mind", (1, 0), (40, 20), 0.2, 0.4, 240.0),
    "fast": Plan("mind", (2, 1), (40, 20), 0.2, 0.4, 240.0),
}
"""By any other similarity than correlation."""
LEARNED = {
    "best": Plan("features", (2, 1, 0), (40, 40, 20), 0.1, 0.4, 800.0),
    "fast": Plan("features", (2, 1, 0), (30, 20, 10), 0.1, 0.4, 800.0),
}
"""By features that a network has learned from labels."""
LEARNED_WEIGHT = 160.0
"""Of their squared differences, a voxel: 40, 160 and 640 came to a Dice of 0.869, 0.871 and 0.874 in a
trial on 20 validation pairs (onto sharpened probabilities), rougher the more."""
SHARE = 0.8
"""Of a fit by learned features, where a network's steps came before it: what a card says unless it was measured."""
BESIDE_WEIGHT = 8.0
"""Of their squared differences, a voxel, where they are compared beside correlated intensities, ..."""
BESIDE_LEVELS = (0, 1, 2)
"""... and the levels on which they are."""
_AROUND_POINTS = {"lncc": Plan("lncc", (1, 0), (15, 10), 0.1, 0.1, 800.0)}
_FEATURES_AROUND_POINTS = Plan("mind", (1, 0), (10, 5), 0.2, 0.4, 240.0)
FINER = 5
"""Iterations more on voxels of half the length, by the best preset ..."""
FEW_VOXELS = 1_500_000
"""... on a crop of fewer voxels."""


def correction_plan(similarity: str, fitted: bool) -> Plan:
    """Return how the fit goes on around corrected points: in less than half of the time of a fit.

    Args:
        similarity: a key of SIMILARITIES.
        fitted: False: the points alone, without an iteration.
    """
    plan = _AROUND_POINTS.get(similarity, replace(_FEATURES_AROUND_POINTS, similarity=similarity))
    return plan if fitted else replace(plan, levels=(0,), iterations=(0,))
