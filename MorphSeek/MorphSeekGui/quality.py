"""What the panel shows of the quality of a registration: its figures, the verdict in words, folded regions one by one.

The figures, the limits and the rule are those of :mod:`MorphSeekLib.protocol.verdict`, which the report uses too; here
they get the texts of the user's language. Slicer's translators find only texts that stand in a call of ``_``, so the
protocol's are here once more; Testing/module/test_quality.py compares them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from MorphSeekLib.protocol.report import SavedReport
from MorphSeekLib.protocol.verdict import (
    AMBER,
    DEFAULT_LIMITS,
    GREEN,
    RED,
    WORSE,
    Color,
    Finding,
    Folds,
    Limits,
    Verdict,
    figures,
    figures_inside,
    number,
    shown,
)

from .scene import FLIP, _


@dataclass(frozen=True)
class Region:
    """A folded region: fixed voxels that meet a folded cell and touch by face, edge or corner.

    Attributes:
        voxels, mm3: its size.
        determinant: the least one found in it.
        position: RAS mm (world) of the folded voxel next to its middle, which need not be folded itself.
    """

    voxels: int
    mm3: float
    determinant: float
    position: tuple[float, float, float]


def folded_regions(report: SavedReport) -> list[Region]:
    """Return the folded regions that a report lists, largest first; it lists the largest ones only."""
    regions = []
    for region in (report.get("folding") or {}).get("regions") or []:
        position = (FLIP[:3, :3] @ region["position"]).tolist()
        regions.append(Region(region["voxels"], region["mm3"], region["determinant"], tuple(position)))
    return regions


@dataclass(frozen=True)
class EstimatedRegion:
    """A region in which the estimated error is large.

    Attributes:
        bound_mm: what the error is estimated to be below at its worst place; None where no millimeters are known.
        mm3: its size.
        color: the worst in it, 2 or 3.
        position: RAS mm (world) of its worst place.
    """

    bound_mm: float | None
    mm3: float
    color: int
    position: tuple[float, float, float]


def estimated_regions(report: SavedReport) -> list[EstimatedRegion]:
    """Return the regions that a report says are worst, the worst first."""
    return [
        EstimatedRegion(one["bound_mm"], one["mm3"], one["color"], tuple((FLIP[:3, :3] @ one["position"]).tolist()))
        for one in (report.get("trust") or {}).get("regions") or []
    ]


def estimated_error(report: SavedReport) -> list[str]:
    """Return what is said of the estimated error, a sentence each; nothing where it was not estimated."""
    section = report.get("trust")
    if section is None:
        return []
    error, near, far = section["error_mm"], section["near_mm"], section["far_mm"]
    if error is None or near is None:
        return [
            _("Colors only, no millimeters: the estimate was not tuned on such images, or not with these options."),
            footnote(),
        ]
    return [
        _("Estimated error: usually below {median:.1f} mm, in 4 of 5 places below {p80:.1f} mm.").format(**error),
        _("{n} % of tissue is likely within {mm:.3g} mm.").format(n=_rounded(section["near_percent"]), mm=near)
        + " "
        + _("{n} % is not to be relied on (over {mm:.3g} mm).").format(n=_rounded(section["far_percent"]), mm=far),
        footnote(),
    ]


def _rounded(percent: float) -> str:
    """Return whole percent; what is little is not said to be nothing."""
    return f"{percent:.0f}" if percent == 0 or percent >= 1 else f"{percent:.1g}"


def footnote() -> str:
    """Return what must stand beside every estimated error."""
    return _(
        "Estimated from the images alone, tuned on simulated deformations; it cannot see every mistake. Not a "
        "measurement; check anatomy before you decide."
    )


def estimated_legend(report: SavedReport) -> tuple[str, str, str]:
    """Return what the three colors of the estimated error say."""
    section = report.get("trust") or {}
    near, far = section.get("near_mm"), section.get("far_mm")
    if near is None or far is None:
        return _("likely near"), _("in between"), _("do not rely on this")
    return (
        _("likely within {mm:.3g} mm").format(mm=near),
        _("{near:.3g} to {far:.3g} mm").format(near=near, far=far),
        _("do not rely on this"),
    )


def count_regions(report: SavedReport) -> int:
    """Return how many folded regions there are, those included that the report does not list."""
    folding = report.get("folding") or {}
    return int(number(folding.get("region_count")) or len(folding.get("regions") or []))


@dataclass(frozen=True)
class Figure:
    """A row of the table of figures.

    Attributes:
        key: as in :data:`MorphSeekLib.protocol.verdict.LABELS`.
        label, definition: for the user.
        value: None where it was not measured.
        inside: the same inside the fixed volume's mask, or its tissue; None where it is measured of the whole alone.
    """

    key: str
    label: str
    definition: str
    value: float | None
    inside: float | None = None

    @property
    def text(self) -> str:
        """The value as it is written."""
        return shown(self.key, self.value)

    @property
    def text_inside(self) -> str:
        """The value inside as it is written; "" where there is none."""
        return "" if self.inside is None else shown(self.key, self.inside)

    @property
    def worse(self) -> str:
        """ "above" or "below" its limits; "" for a figure that is not judged."""
        return WORSE.get(self.key, "")


def measure(report: SavedReport) -> list[Figure]:
    """Return the figures of a registration, in the order of the table."""
    values, inside, definitions = figures(report), figures_inside(report), _definitions(report)
    return [Figure(key, label, definitions[key], values[key], inside.get(key)) for key, label in labels().items()]


def inside_of(report: SavedReport) -> tuple[str, str]:
    """Return what the figures inside are called, and what they are of, for a tool tip."""
    inside = (report.get("folding") or {}).get("inside") or {}
    if not inside:
        return _("Inside"), _("This registration was not measured inside a mask or the tissue; register again.")
    masked = inside.get("of") == "mask"
    words = (
        _("The same inside the fixed volume's mask: {n} voxels.")
        if masked
        else _("The same inside what the fixed volume shows (it has no mask): {n} voxels.")
    )
    return _("In mask") if masked else _("In tissue"), words.format(n=f"{inside['voxels']:,}")


def of_both(report: SavedReport, section: str) -> list:
    """Return what a section of a report has of the fixed and of the moving volume; None where nothing is known."""
    return [(report.get(section) or {}).get(side) for side in ("fixed", "moving")]


def masks_sentence(report: SavedReport) -> str:
    """Return how much of the volumes masks left; "" where nothing was masked."""
    counts = of_both(report, "masks")
    if counts == [None, None]:
        return ""
    fixed, moving = (_("all voxels") if n is None else _("{n} voxels").format(n=f"{n:,}") for n in counts)
    return _("Masks: {fixed} of the fixed and {moving} of the moving volume counted.").format(
        fixed=fixed, moving=moving
    )


def beside_sentence(report: SavedReport) -> str:
    """Return how much of two CT scans was left out as no part of the body; "" where nothing was."""
    left_out = of_both(report, "beside_body")
    if left_out == [None, None]:
        return ""
    fixed, moving = (_("nothing") if ml is None else _("{n} ml").format(n=f"{ml:,.0f}") for ml in left_out)
    return _(
        "Not compared, as it lies beside the body (table, arms): {fixed} of the fixed, {moving} of the moving volume."
    ).format(fixed=fixed, moving=moving)


def labels() -> dict[str, str]:
    """Return what the figures are called."""
    return {
        "folded_percent": _("Folded cells, %"),
        "folded_cells": _("Folded cells"),
        "undecided_cells": _("Undecided cells"),
        "cells_outside": _("Not proven beyond the fixed volume"),
        "smallest_proven": _("Smallest proven determinant"),
        "folded_voxels": _("Folded voxels"),
        "largest_region_mm3": _("Largest folded region, mm³"),
        "njd_percent": _("NJD, % (central differences)"),
        "min_jacobian": _("Smallest Jacobian (central differences)"),
        "max_jacobian": _("Largest Jacobian (central differences)"),
        "sdlogj": _("Roughness (SDlogJ)"),
        "dice": _("Overlap after (mean Dice)"),
        "dice_change": _("Overlap gained over the alignment"),
        "similarity_change": _("Similarity gained over the alignment"),
        "near_percent": _("Tissue that is likely near, % (estimated)"),
        "far_percent": _("Tissue not to be relied on, % (estimated)"),
    }


def _definitions(report: SavedReport) -> dict[str, str]:
    """Return the tool tip of each figure."""
    folding = report.get("folding") or {}
    cells = (folding.get("cells") or {}).get("definition", "")
    estimated = " " + _(
        "Estimated from the images alone, tuned on simulated deformations; it cannot see every mistake. Not a "
        "measurement."
    )
    central = " " + _("By central differences, as papers and Learn2Reg print it.")
    return {
        "folded_percent": _("Share of the transform's cells in the fixed volume that fold.") + " " + cells,
        "folded_cells": _("The count behind the share."),
        "undecided_cells": _("Cells in the fixed volume for which neither a fold nor a proof was found."),
        "cells_outside": _("Folded or undecided cells whose center lies outside the fixed volume."),
        "smallest_proven": _(
            "The bound above which the Jacobian determinant is proven to stay in all proven cells of the fixed volume."
        ),
        "folded_voxels": _("Voxels of the fixed volume whose box meets a folded cell."),
        "largest_region_mm3": _(
            "Fixed voxels that meet a folded cell and touch by face, edge or corner. One large region is worse than as "
            "many single voxels."
        ),
        "njd_percent": _(
            "Share of the fixed volume's voxels whose Jacobian determinant is 0 or less; it can miss folds."
        )
        + central
        + " "
        + folding.get("definition", ""),
        "min_jacobian": _("Volume change where the deformation shrinks or folds most: 1 keeps volume, 0.5 halves it.")
        + central,
        "max_jacobian": _("Volume change where the deformation grows most: 2 doubles volume.") + central,
        "sdlogj": _("Standard deviation of ln J over the voxels where J is above 0: small is smooth.") + central,
        "dice": _("2|A and B| / (|A| + |B|) of each structure on the fixed grid, 1 is best; mean over the structures."),
        "dice_change": _("Mean Dice after the registration minus mean Dice after the alignment alone."),
        "similarity_change": _("Similarity after the registration minus similarity after the alignment alone."),
        "near_percent": _("Tissue where the error is estimated to be small in four of five places.") + estimated,
        "far_percent": _("Tissue where the estimated error is too large to rely on.") + estimated,
    }


def headline(color: Color | None) -> str:
    """Return the verdict in a few words."""
    return headlines()[color]


def headlines() -> dict[Color | None, str]:
    """Return the words of each color; of None where nothing was judged."""
    return {
        GREEN: _("Green: every figure is within its limits."),
        AMBER: _("Amber: have a look before you use it."),
        RED: _("Red: do not use it without knowing why."),
        None: _("Nothing was measured that could be judged."),
    }


def reasons(verdict: Verdict) -> list[str]:
    """Return a sentence for each figure that is not within its limits."""
    return [found.sentence(beyond(), labels()) for found in verdict.beyond]


def beyond() -> dict[str, str]:
    """Return the sentence of a figure beyond its limits, by the side on which it is worse."""
    return {"above": _("{figure}: {value} is above {limit}."), "below": _("{figure}: {value} is below {limit}.")}


def folds_sentence(found: Folds) -> str:
    """Return what is known of folds."""
    return findings()[found.finding].format(**found.values)


def findings() -> dict[Finding, str]:
    """Return the sentence of each finding."""
    return {
        Finding.EARLIER_VERSION: _(
            "An earlier version judged the folds of this registration by central differences only, which can miss "
            "folds; register again."
        ),
        Finding.FOLDED: _("{folded} of {cells} cells fold ({percent} %)."),
        Finding.FOLDED_OR_UNDECIDED: _(
            "{folded} of {cells} cells fold ({percent} %). {undecided} more are undecided: neither a fold nor a proof "
            "was found."
        ),
        Finding.UNDECIDED: _(
            "No fold was found, but {undecided} of {cells} cells are undecided: neither a fold nor a proof was found "
            "in them."
        ),
        Finding.PROVEN_INSIDE: _(
            "No fold in the fixed volume: proven; {outside} cells beyond its edge fold or are undecided."
        ),
        Finding.PROVEN: _("No fold: proven."),
    }


def edited_limits(figure: Figure, limits: Limits, name: str, text: str) -> Limits:
    """Return the limits of a figure after the user typed one.

    Args:
        name: "amber" or "red".
        text: what was typed.

    Raises:
        ValueError: not a number, or red would come before amber; one sentence that says what to do.
    """
    try:
        value = float(text.strip().replace(",", "."))
        changed = Limits(**{"amber": limits.amber, "red": limits.red, name: value})
    except ValueError:
        raise ValueError(_("'{text}' is not a number; type one such as 0.5.").format(text=text.strip())) from None
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
    """Return limits as a text for the settings of the application."""
    return json.dumps({key: [limit.amber, limit.red] for key, limit in limits.items()})


def limits_from_text(text: str | None) -> dict[str, Limits]:
    """Read limits from the settings of the application; what is missing or unusable there gets its default."""
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
    report: SavedReport, names: dict[int, str] | None = None
) -> list[tuple[str, float | None, float | None, float | None]]:
    """Return the Dice of each structure: (name, as given, after the alignment, after the registration).

    Args:
        report: the figures of the engine.
        names: what the labels are called, see :func:`MorphSeekGui.scene.label_names`; else their numbers are shown.
    """
    rows: list[tuple[str, float | None, float | None, float | None]] = []
    for label, dice in ((report.get("dice") or {}).get("labels") or {}).items():
        name = (names or {}).get(int(label))
        shown = f"{name} ({label})" if name and name not in ("(none)", label) else str(label)
        before, aligned, after = (number(dice.get(stage)) for stage in ("input", "aligned", "warped"))
        rows.append((shown, before, aligned, after))
    return rows
