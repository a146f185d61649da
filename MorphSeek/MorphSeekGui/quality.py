"""Is this registration good enough to use? Its figures, the limits that a person sets for them, the verdict in green,
amber or red, and the folded regions one by one.

    verdict = judge(measure(nodes.report), limits, folds(nodes.report))

Nothing here draws or asks; inspect_panel.py does.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import NamedTuple

from .scene import FLIP, _

GREEN, AMBER, RED = "green", "amber", "red"
_ORDER = (GREEN, AMBER, RED)


@dataclass(frozen=True)
class Region:
    """A folded region: fixed voxels that meet a folded cell and touch by face, edge or corner.

    Attributes:
        voxels, mm3: its size.
        determinant: the least one found in it.
        position: RAS mm (world) of the folded voxel next to its middle; for banana-shaped regions the middle itself may
            not be folded.
    """

    voxels: int
    mm3: float
    determinant: float
    position: tuple[float, float, float]


def folded_regions(report: dict) -> list[Region]:
    """Return the folded regions that a report lists, largest first; it lists the largest ones only."""
    regions = []
    for region in (report.get("folding") or {}).get("regions") or []:
        position = (FLIP[:3, :3] @ region["position"]).tolist()
        regions.append(Region(region["voxels"], region["mm3"], region["determinant"], tuple(position)))
    return regions


def count_regions(report: dict) -> int:
    """Return how many folded regions there are, those included that the report does not list."""
    folding = report.get("folding") or {}
    return int(_number(folding.get("region_count")) or len(folding.get("regions") or []))


class Folds(NamedTuple):
    """What is known of a transform's folds whatever the limits are.

    Attributes:
        sentence: for a person.
        color: green where no fold in the fixed image was proven, amber where neither a fold nor a proof was found;
            None where cells fold, which the limits judge.
        key: of the figure that the color is for.
    """

    sentence: str
    color: str | None
    key: str


_COUNTS = ("cells", "folded", "undecided", "folded_outside", "undecided_outside", "folded_percent")


def folds(report: dict) -> Folds | None:
    """Say what a report knows of folds; None where nothing was measured."""
    folding = report.get("folding")
    if not folding:
        return None
    cells = folding.get("cells") or {}
    if any(_number(cells.get(name)) is None for name in _COUNTS):
        sentence = _(
            "An earlier version judged the folds of this registration by central differences only, which can miss "
            "folds; register again."
        )
        return Folds(sentence, AMBER, "folded_percent")
    numbers = {name: f"{cells[name]:,}" for name in ("cells", "folded", "undecided")}
    if cells["folded"]:
        sentence = _("{folded} of {cells} cells fold ({percent:.3g} %).")
        if cells["undecided"]:
            sentence += " " + _("{undecided} more are undecided: neither a fold nor a proof was found.")
        return Folds(sentence.format(percent=cells["folded_percent"], **numbers), None, "folded_percent")
    if cells["undecided"]:
        sentence = _(
            "No fold was found, but {undecided} of {cells} cells are undecided: neither a fold nor a proof was found "
            "in them."
        )
        return Folds(sentence.format(**numbers), AMBER, "undecided_cells")
    outside = cells["folded_outside"] + cells["undecided_outside"]
    if outside or cells.get("no_fold_proven") is not True:
        sentence = _("No fold in the fixed volume: proven; {n} cells beyond its edge fold or are undecided.")
        return Folds(sentence.format(n=f"{outside:,}"), GREEN, "folded_percent")
    return Folds(_("No fold: proven."), GREEN, "folded_percent")


@dataclass(frozen=True)
class Figure:
    """A row of the table of figures.

    Attributes:
        key: its name in the settings.
        label, definition: for a person.
        value: None where it was not measured.
        form: how the value is written.
        worse: "above" or "below" its limits; "" for a figure that is not judged.
    """

    key: str
    label: str
    definition: str
    value: float | None
    form: str = "{:.3g}"
    worse: str = ""

    @property
    def text(self) -> str:
        return "–" if self.value is None else self.form.format(self.value)


@dataclass(frozen=True)
class Limits:
    """From which value on a figure is amber, and from which red.

    Raises:
        ValueError: a limit is no number.
    """

    amber: float
    red: float

    def __post_init__(self) -> None:
        for value in (self.amber, self.red):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(_("A limit must be a number."))


# What a careful reader of registration papers would ask back about; each site has its own, so all can be edited.
DEFAULT_LIMITS = {
    "folded_percent": Limits(0.0, 1.0),
    "largest_region_mm3": Limits(50.0, 500.0),
    "sdlogj": Limits(0.5, 1.0),
    "dice": Limits(0.7, 0.5),
    "dice_change": Limits(0.0, -0.02),
}


def measure(report: dict) -> list[Figure]:
    """The figures of a registration, in the table's order."""
    return [*_cell_figures(report), *_central_figures(report), *_overlap_figures(report)]


def _cell_figures(report: dict) -> list[Figure]:
    """What the proof of each cell of the transform brought."""
    folding = report.get("folding") or {}
    cells = folding.get("cells") or {}
    largest = max((region.mm3 for region in folded_regions(report)), default=0.0)
    outside = [_number(cells.get(name)) for name in ("folded_outside", "undecided_outside")]
    return [
        Figure(
            "folded_percent",
            _("Folded cells, %"),
            _("Share of the transform's cells in the fixed volume that fold.") + " " + cells.get("definition", ""),
            _number(cells.get("folded_percent")),
            "{:.4g}",
            "above",
        ),
        Figure(
            "folded_cells",
            _("Folded cells"),
            _("The count behind the share."),
            _number(cells.get("folded")),
            "{:,.0f}",
        ),
        Figure(
            "undecided_cells",
            _("Undecided cells"),
            _("Cells in the fixed volume for which neither a fold nor a proof was found."),
            _number(cells.get("undecided")),
            "{:,.0f}",
        ),
        Figure(
            "cells_outside",
            _("Not proven beyond the fixed volume"),
            _("Folded or undecided cells whose center lies outside of the fixed volume."),
            None if None in outside else sum(outside),
            "{:,.0f}",
        ),
        Figure(
            "smallest_proven",
            _("Smallest proven determinant"),
            _("What the Jacobian determinant is proven to stay above in all proven cells of the fixed volume."),
            _number(cells.get("smallest_proven")),
        ),
        Figure(
            "largest_region_mm3",
            _("Largest folded region, mm³"),
            _(
                "Fixed voxels that meet a folded cell and touch by face, edge or corner. One large region is worse "
                "than as many lone voxels."
            ),
            largest if "regions" in folding else None,
            volume_form(largest),
            "above",
        ),
    ]


def _central_figures(report: dict) -> list[Figure]:
    """What papers print: figures by central differences, which can miss folds."""
    folding = report.get("folding") or {}
    central = " " + _("By central differences, as papers and Learn2Reg print it.")
    return [
        Figure(
            "njd_percent",
            _("NJD, % (central differences)"),
            _("Share of the fixed volume's voxels whose Jacobian determinant is 0 or less; it can miss folds.")
            + central
            + " "
            + folding.get("definition", ""),
            _number(folding.get("njd_percent")),
            "{:.4g}",
        ),
        Figure(
            "min_jacobian",
            _("Smallest Jacobian (central differences)"),
            _("Volume change where the deformation shrinks or folds most: 1 keeps volume, 0.5 halves it.") + central,
            _number(folding.get("min_jacobian")),
        ),
        Figure(
            "max_jacobian",
            _("Largest Jacobian (central differences)"),
            _("Volume change where the deformation grows most: 2 doubles volume.") + central,
            _number(folding.get("max_jacobian")),
        ),
        Figure(
            "sdlogj",
            _("Roughness (SDlogJ)"),
            _("Standard deviation of ln J over the voxels where J is above 0: small is smooth.") + central,
            _number(folding.get("sdlogj")),
            worse="above",
        ),
    ]


def _overlap_figures(report: dict) -> list[Figure]:
    overlap = (report.get("dice") or {}).get("mean") or {}
    before, after = _number(overlap.get("aligned")), _number(overlap.get("warped"))
    return [
        Figure(
            "dice",
            _("Overlap after (mean Dice)"),
            _("2|A and B| / (|A| + |B|) of each structure on the fixed grid, 1 is best; mean over the structures."),
            after,
            "{:.3f}",
            "below",
        ),
        Figure(
            "dice_change",
            _("Overlap gained over the alignment"),
            _("Mean Dice after the registration minus mean Dice after the alignment alone."),
            None if before is None or after is None else after - before,
            "{:+.3f}",
            "below",
        ),
    ]


@dataclass(frozen=True)
class Verdict:
    """What the limits, and the proof of the cells, say of the figures.

    Attributes:
        color: the worst of the colours; None when nothing could be judged.
        colors: figure's key -> colour, for those that are judged.
        folds: colour and sentence of what is known of folds; None when nothing was measured.
        reasons: one sentence for each figure that is not within its limits.
    """

    color: str | None
    colors: dict[str, str]
    folds: tuple[str, str] | None
    reasons: list[str]


def judge(figures: list[Figure], limits: dict[str, Limits], found: Folds | None = None) -> Verdict:
    """Compare figures with limits; reaching a limit counts as beyond it only for the worse side (0.1 % is not above
    0.1 %).

    Args:
        figures: from :func:`measure`.
        limits: by the figures' keys.
        found: from :func:`folds`; where it has a color, limits cannot make it better.
    """
    colors, reasons = {}, []
    for figure in figures:
        limit = limits.get(figure.key)
        if figure.value is None or not figure.worse or limit is None:
            continue
        sign = 1 if figure.worse == "above" else -1
        color = next(
            (name for name, bound in ((RED, limit.red), (AMBER, limit.amber)) if sign * (figure.value - bound) > 0),
            GREEN,
        )
        colors[figure.key] = color
        if color != GREEN:
            bound = limit.red if color == RED else limit.amber
            text = _("{figure}: {value} is above {limit}.") if sign > 0 else _("{figure}: {value} is below {limit}.")
            reasons.append(text.format(figure=figure.label, value=figure.text, limit=f"{bound:g}"))
    said = None
    if found is not None:
        if found.color is not None:
            colors[found.key] = max(found.color, colors.get(found.key, GREEN), key=_ORDER.index)
        said = colors.get(found.key, RED), found.sentence
    worst = max(colors.values(), key=_ORDER.index, default=None)
    return Verdict(worst, colors, said, reasons)


def edited_limits(figure: Figure, limits: Limits, name: str, text: str) -> Limits:
    """The limits of a figure after a person typed one.

    Args:
        name: "amber" or "red".
        text: what was typed.

    Raises:
        ValueError: no number, or red would come before amber; one sentence that says what to do.
    """
    try:
        value = float(text.strip().replace(",", "."))
        changed = Limits(**{"amber": limits.amber, "red": limits.red, name: value})
    except ValueError:
        raise ValueError(_("'{text}' is no number; type one such as 0.5.").format(text=text.strip())) from None
    if figure.worse == "above" and changed.red < changed.amber:
        raise ValueError(
            _("Red must not lie below amber for '{figure}', which is worse the higher it is.").format(
                figure=figure.label
            )
        )
    if figure.worse == "below" and changed.red > changed.amber:
        raise ValueError(
            _("Red must not lie above amber for '{figure}', which is worse the lower it is.").format(
                figure=figure.label
            )
        )
    return changed


def limits_to_text(limits: dict[str, Limits]) -> str:
    """For the application's settings."""
    return json.dumps({key: [limit.amber, limit.red] for key, limit in limits.items()})


def limits_from_text(text: str | None) -> dict[str, Limits]:
    """From the application's settings; what is missing or unusable there gets its default."""
    limits = dict(DEFAULT_LIMITS)
    try:
        stored = json.loads(text or "{}")
        items = list(stored.items())
    except (ValueError, AttributeError):
        return limits
    for key, pair in items:
        if key in limits and isinstance(pair, list) and len(pair) == 2:
            try:
                limits[key] = Limits(*pair)
            except ValueError:
                continue
    return limits


def structures(
    report: dict, names: dict[int, str] | None = None
) -> list[tuple[str, float | None, float | None, float | None]]:
    """Dice of each structure: (name, as the images came, after the alignment, after the registration).

    Args:
        report: the engine's figures.
        names: what the labels are called, see :func:`MorphSeekGui.scene.label_names`; else their numbers are shown.
    """
    rows = []
    for label, dice in ((report.get("dice") or {}).get("labels") or {}).items():
        name = (names or {}).get(int(label))
        shown = f"{name} ({label})" if name and name not in ("(none)", label) else str(label)
        rows.append((shown, *(_number(dice.get(stage)) for stage in ("input", "aligned", "warped"))))
    return rows


def volume_form(mm3: float) -> str:
    """How a volume is written: three digits, but all of a large one."""
    return "{:,.0f}" if mm3 >= 100 else "{:.3g}"


def _number(value) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None
