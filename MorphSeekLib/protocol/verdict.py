"""Is a registration good enough to use? Its figures, the limits for them, and green, amber or red.

One rule for the report and the panel. The texts are English; the panel translates them by their keys.

    judge(figures(report), DEFAULT_LIMITS, folds(report))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from .report import SavedReport

Color = Literal["green", "amber", "red"]
GREEN: Color = "green"
AMBER: Color = "amber"
RED: Color = "red"
_ORDER: tuple[Color, ...] = (GREEN, AMBER, RED)

HEADLINES: dict[Color | None, str] = {
    GREEN: "Green: every figure is within its limits.",
    AMBER: "Amber: have a look before you use it.",
    RED: "Red: do not use it without knowing why.",
    None: "Nothing was measured that could be judged.",
}
LABELS = {
    "folded_percent": "Folded cells, %",
    "folded_cells": "Folded cells",
    "undecided_cells": "Undecided cells",
    "cells_outside": "Not proven beyond the fixed volume",
    "smallest_proven": "Smallest proven determinant",
    "folded_voxels": "Folded voxels",
    "largest_region_mm3": "Largest folded region, mm³",
    "njd_percent": "NJD, % (central differences)",
    "min_jacobian": "Smallest Jacobian (central differences)",
    "max_jacobian": "Largest Jacobian (central differences)",
    "sdlogj": "Roughness (SDlogJ)",
    "dice": "Overlap after (mean Dice)",
    "dice_change": "Overlap gained over the alignment",
    "similarity_change": "Similarity gained over the alignment",
    "near_percent": "Tissue that is likely near, % (estimated)",
    "far_percent": "Tissue not to be relied on, % (estimated)",
}
"""Every figure of a registration, in the order in which they are shown."""

WORSE = {
    "folded_percent": "above",
    "largest_region_mm3": "above",
    "sdlogj": "above",
    "dice": "below",
    "dice_change": "below",
    "similarity_change": "below",
    "far_percent": "above",
}
"""The figures that are judged, and on which side of their limits they are worse."""

BEYOND = {"above": "{figure}: {value} is above {limit}.", "below": "{figure}: {value} is below {limit}."}
_FORMS = {
    "folded_percent": "{:.4g}",
    "folded_cells": "{:,.0f}",
    "undecided_cells": "{:,.0f}",
    "cells_outside": "{:,.0f}",
    "folded_voxels": "{:,.0f}",
    "njd_percent": "{:.4g}",
    "dice": "{:.3f}",
    "dice_change": "{:+.3f}",
    "similarity_change": "{:+.3f}",
    "near_percent": "{:.0f}",
    "far_percent": "{:.0f}",
}


def number(value: Any) -> float | None:
    """Return a finite number of a report; None for anything else."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


@dataclass(frozen=True)
class Limits:
    """From which value on a figure is amber, and from which red.

    Raises:
        ValueError: a limit is not a number.
    """

    amber: float
    red: float

    def __post_init__(self) -> None:
        if number(self.amber) is None or number(self.red) is None:
            raise ValueError("a limit must be a number")


# what a careful reader of registration papers would ask about; each site has its own, so the panel can change them
DEFAULT_LIMITS = {
    "folded_percent": Limits(0.0, 1.0),
    "largest_region_mm3": Limits(50.0, 500.0),
    "sdlogj": Limits(0.5, 1.0),
    "dice": Limits(0.7, 0.5),
    "dice_change": Limits(0.0, -0.02),
    "similarity_change": Limits(-0.005, -0.05),
    "far_percent": Limits(20.0, 50.0),
}


class Finding(Enum):
    """What is known of the folds of a transform; the value is the sentence, whose braces take numbers."""

    EARLIER_VERSION = (
        "An earlier version judged the folds of this registration by central differences only, which can miss folds; "
        "register again."
    )
    FOLDED = "{folded} of {cells} cells fold ({percent} %)."
    FOLDED_OR_UNDECIDED = (
        "{folded} of {cells} cells fold ({percent} %). {undecided} more are undecided: neither a fold nor a proof was "
        "found."
    )
    UNDECIDED = (
        "No fold was found, but {undecided} of {cells} cells are undecided: neither a fold nor a proof was found in "
        "them."
    )
    PROVEN_INSIDE = "No fold in the fixed volume: proven; {outside} cells beyond its edge fold or are undecided."
    PROVEN = "No fold: proven."


@dataclass(frozen=True)
class Folds:
    """What is known of the folds of a transform, whatever the limits are.

    Attributes:
        finding: which sentence.
        values: what its braces take.
        color: green where no fold in the fixed image was proven, amber where neither a fold nor a proof was found;
            None where cells fold, which the limits judge.
        key: of the figure that the color is for.
    """

    finding: Finding
    values: dict[str, str]
    color: Color | None
    key: str = "folded_percent"

    @property
    def sentence(self) -> str:
        """The finding in English."""
        return self.finding.value.format(**self.values)


_COUNTS = ("cells", "folded", "undecided", "folded_outside", "undecided_outside", "folded_percent")


def folds(report: SavedReport) -> Folds | None:
    """Return what a report knows of folds; None where nothing was measured."""
    folding = report.get("folding")
    if not folding:
        return None
    cells = folding.get("cells") or {}
    if any(number(cells.get(name)) is None for name in _COUNTS):
        return Folds(Finding.EARLIER_VERSION, {}, AMBER)
    outside = cells["folded_outside"] + cells["undecided_outside"]
    values = {name: f"{cells[name]:,}" for name in ("cells", "folded", "undecided")}
    values |= {"percent": f"{cells['folded_percent']:.3g}", "outside": f"{outside:,}"}
    if cells["folded"]:
        return Folds(Finding.FOLDED_OR_UNDECIDED if cells["undecided"] else Finding.FOLDED, values, None)
    if cells["undecided"]:
        return Folds(Finding.UNDECIDED, values, AMBER, "undecided_cells")
    if outside or cells.get("no_fold_proven") is not True:
        return Folds(Finding.PROVEN_INSIDE, values, GREEN)
    return Folds(Finding.PROVEN, values, GREEN)


def figures(report: SavedReport) -> dict[str, float | None]:
    """Return every figure of a registration by its key, see :data:`LABELS`; None where it was not measured."""
    folding = report.get("folding") or {}
    cells, overlap = folding.get("cells") or {}, (report.get("dice") or {}).get("mean") or {}
    outside = number(cells.get("folded_outside")), number(cells.get("undecided_outside"))
    sizes = [region["mm3"] for region in folding.get("regions") or []]
    before, after = number(overlap.get("aligned")), number(overlap.get("warped"))
    alike, trust = report.get("similarity") or {}, report.get("trust") or {}
    gained = number(alike.get("aligned")), number(alike.get("warped"))
    known = trust.get("kind") is not None
    return {
        "folded_percent": number(cells.get("folded_percent")),
        "folded_cells": number(cells.get("folded")),
        "undecided_cells": number(cells.get("undecided")),
        "cells_outside": None if outside[0] is None or outside[1] is None else outside[0] + outside[1],
        "smallest_proven": number(cells.get("smallest_proven")),
        "folded_voxels": number(folding.get("region_voxels")),
        "largest_region_mm3": max(sizes, default=0.0) if "regions" in folding else None,
        **{name: number(folding.get(name)) for name in ("njd_percent", "min_jacobian", "max_jacobian", "sdlogj")},
        "dice": after,
        "dice_change": None if before is None or after is None else after - before,
        "similarity_change": None if gained[0] is None or gained[1] is None else gained[1] - gained[0],
        "near_percent": number(trust.get("near_percent")) if known else None,
        "far_percent": number(trust.get("far_percent")) if known else None,
    }


def figures_inside(report: SavedReport) -> dict[str, float | None]:
    """Return the figures that are measured inside the fixed image's mask, or its tissue, too, by the same keys."""
    inside = (report.get("folding") or {}).get("inside") or {}
    of_central = ("njd_percent", "min_jacobian", "max_jacobian", "sdlogj")
    return {name: number(inside.get(name)) for name in ("folded_voxels", *of_central)}


@dataclass(frozen=True)
class Beyond:
    """A figure that is beyond one of its limits.

    Attributes:
        key, value: the figure.
        color: amber or red.
        limit: which it is beyond.
    """

    key: str
    value: float
    color: Color
    limit: float

    def sentence(self, texts: Mapping[str, str] = BEYOND, labels: Mapping[str, str] = LABELS) -> str:
        """Return the sentence, in English or in the language of :data:`BEYOND` and :data:`LABELS` given."""
        text, value = texts[WORSE[self.key]], shown(self.key, self.value)
        return text.format(figure=labels[self.key], value=value, limit=f"{self.limit:g}")


@dataclass(frozen=True)
class Verdict:
    """What the limits, and the proof of the cells, say of the figures.

    Attributes:
        color: the worst of the colors; None when nothing could be judged.
        colors: the color of each figure that is judged.
        folds: the color of what is known of folds; None when nothing was measured.
        beyond: the figures that are not within their limits.
    """

    color: Color | None
    colors: dict[str, Color]
    folds: Color | None
    beyond: list[Beyond]


def judge(values: Mapping[str, float | None], limits: Mapping[str, Limits], found: Folds | None = None) -> Verdict:
    """Compare figures with limits; a figure that is equal to a limit is not beyond it.

    Args:
        values: from :func:`figures`.
        limits: by the keys of the figures.
        found: from :func:`folds`; where it has a color, limits cannot make it better.
    """
    colors: dict[str, Color] = {}
    beyond = []
    for key, side in WORSE.items():
        value, limit = values.get(key), limits.get(key)
        if value is None or limit is None:
            continue
        sign = 1 if side == "above" else -1
        colors[key] = GREEN
        for color, bound in ((RED, limit.red), (AMBER, limit.amber)):
            if sign * (value - bound) > 0:
                colors[key] = color
                beyond.append(Beyond(key, value, color, bound))
                break
    said: Color | None = None
    if found is not None:
        if found.color is not None:
            colors[found.key] = max(found.color, colors.get(found.key, GREEN), key=_ORDER.index)
        said = colors.get(found.key, RED)
    return Verdict(max(colors.values(), key=_ORDER.index, default=None), colors, said, beyond)


def shown(key: str, value: float | None) -> str:
    """Return how a figure is written; a dash where it was not measured."""
    if value is None:
        return "–"
    if key == "largest_region_mm3" and value >= 100:
        return f"{value:,.0f}"
    return _FORMS.get(key, "{:.3g}").format(value)
