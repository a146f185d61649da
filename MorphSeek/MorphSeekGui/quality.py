"""Is this registration good enough to use? Its figures, the limits that a person sets for them, the verdict in green,
amber or red, and the folded regions one by one.

    verdict = judge(measure(nodes.report, regions), limits)

Nothing here draws or asks; inspect_panel.py does.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import slicer.util

from .scene import _, ijk_to_ras

GREEN, AMBER, RED = "green", "amber", "red"
_ORDER = (GREEN, AMBER, RED)


@dataclass(frozen=True)
class Region:
    """A folded region: voxels of Jacobian <= 0 that touch by face, edge or corner.

    Attributes:
        voxels, mm3: its size.
        min_jacobian: how badly it folds.
        position: RAS mm (world) of the folded voxel next to its middle; for banana-shaped regions the middle itself may
            not be folded.
    """

    voxels: int
    mm3: float
    min_jacobian: float
    position: tuple[float, float, float]


def folded_regions(jacobian_node) -> list[Region]:
    """The folded regions of a Jacobian volume without parent transform, largest first."""
    import SimpleITK as sitk  # part of Slicer, but slow to import

    jacobian = slicer.util.arrayFromVolume(jacobian_node)
    folded = jacobian <= 0
    if not folded.any():
        return []
    # only the box that holds them is searched
    box = []
    for axis in range(3):
        found = np.flatnonzero(folded.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(found[0], found[-1] + 1))
    box = tuple(box)
    labels = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(folded[box].astype(np.uint8)), True))
    kji = np.argwhere(labels)
    order = np.argsort(labels[tuple(kji.T)], kind="stable")
    kji = kji[order]
    starts = np.cumsum(np.bincount(labels[labels > 0])[1:])[:-1]
    kji += [axis.start for axis in box]
    to_ras = ijk_to_ras(jacobian_node)
    voxel = abs(float(np.linalg.det(to_ras[:3, :3])))
    ras = (to_ras @ np.c_[kji[:, ::-1], np.ones(len(kji))].T)[:3].T
    regions = []
    for points, values in zip(np.split(ras, starts), np.split(jacobian[tuple(kji.T)], starts), strict=True):
        middle = points[np.linalg.norm(points - points.mean(axis=0), axis=1).argmin()]
        regions.append(Region(len(points), len(points) * voxel, float(values.min()), tuple(middle.tolist())))
    return sorted(regions, key=lambda region: (-region.voxels, region.min_jacobian))


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
    "njd_percent": Limits(0.1, 1.0),
    "largest_region_mm3": Limits(50.0, 500.0),
    "sdlogj": Limits(0.5, 1.0),
    "dice": Limits(0.7, 0.5),
    "dice_change": Limits(0.0, -0.02),
}


def measure(report: dict, regions: list[Region]) -> list[Figure]:
    """The figures of a registration, in the table's order."""
    folding = report.get("folding") or {}
    overlap = (report.get("dice") or {}).get("mean") or {}
    before, after = _number(overlap.get("aligned")), _number(overlap.get("warped"))
    definition = folding.get("definition", "")
    return [
        Figure(
            "njd_percent",
            _("Folded voxels (NJD), %"),
            _("Share of the fixed image's voxels whose Jacobian determinant is 0 or less.") + " " + definition,
            _number(folding.get("njd_percent")),
            "{:.4g}",
            "above",
        ),
        Figure(
            "folded_voxels",
            _("Folded voxels"),
            _("The count behind the share."),
            _number(folding.get("folded_voxels")),
            "{:,.0f}",
        ),
        Figure(
            "largest_region_mm3",
            _("Largest folded region, mm³"),
            _("Folded voxels that touch by face, edge or corner. One large region is worse than as many lone voxels."),
            regions[0].mm3 if regions else 0.0,
            volume_form(regions[0].mm3 if regions else 0.0),
            "above",
        ),
        Figure(
            "min_jacobian",
            _("Smallest Jacobian"),
            _("Volume change where the deformation shrinks or folds most: 1 keeps volume, 0.5 halves it."),
            _number(folding.get("min_jacobian")),
        ),
        Figure(
            "max_jacobian",
            _("Largest Jacobian"),
            _("Volume change where the deformation grows most: 2 doubles volume."),
            _number(folding.get("max_jacobian")),
        ),
        Figure(
            "sdlogj",
            _("Roughness (SDlogJ)"),
            _("Standard deviation of ln J over the voxels that do not fold: small is smooth."),
            _number(folding.get("sdlogj")),
            worse="above",
        ),
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
    """What the limits say of the figures.

    Attributes:
        color: the worst of the colours; None when nothing could be judged.
        colors: figure's key -> colour, for those that are judged.
        reasons: one sentence for each figure that is not green.
    """

    color: str | None
    colors: dict[str, str]
    reasons: list[str]


def judge(figures: list[Figure], limits: dict[str, Limits]) -> Verdict:
    """Compare figures with limits; reaching a limit counts as beyond it only for the worse side (0.1 % is not above
    0.1 %)."""
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
    worst = max(colors.values(), key=_ORDER.index, default=None)
    return Verdict(worst, colors, reasons)


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


def structures(report: dict, color_node=None) -> list[tuple[str, float | None, float | None, float | None]]:
    """Dice of each structure: (name, as the images came, after the alignment, after the registration).

    Args:
        report: the engine's figures.
        color_node: the colour table of the labels, which knows their names; None leaves the numbers. So does one of
            Slicer's own, which would call any label 3 "brain".
    """
    if color_node is not None and color_node.GetType() != color_node.User:
        color_node = None
    rows = []
    for label, dice in ((report.get("dice") or {}).get("labels") or {}).items():
        name = color_node.GetColorName(int(label)) if color_node is not None else None
        shown = f"{name} ({label})" if name and name not in ("(none)", label) else str(label)
        rows.append((shown, *(_number(dice.get(stage)) for stage in ("input", "aligned", "warped"))))
    return rows


def volume_form(mm3: float) -> str:
    """How a volume is written: three digits, but all of a large one."""
    return "{:,.0f}" if mm3 >= 100 else "{:.3g}"


def _number(value) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None
