"""What a registration of a dressed pair must give, judged from its files alone.

*Right*: the error against the true map is within the bound of its coats, the written transform applied by SimpleITK to
what the moving file says gives the written warped image, labels keep their values. *Refused*: exit code 2 and one
sentence that names the file and says what to do, where a coat allows it. Everything else is wrong, a traceback, or
half-written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk
from coats import Coat, Written
from heads import Heads
from image_files import sitk_image

from MorphSeekLib.report.results import ESTIMATED, FILES
from MorphSeekLib.space.geometry import DenseTransform, Grid, apply_affine

Outcome = Literal["right", "refused", "wrong", "traceback", "half-written"]
TOLERANCE = 0.3
"""Millimeters, times the scale of the coats."""
_ADVICE = re.compile(
    r"\b(check|choose|convert|copy|crop|export|fill|free|give|load|make|open|pass|provide|relabel|rename|renumber|"
    r"repair|replace|resample|save|set|start|use|write)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Ran:
    """One run of the command line.

    Attributes:
        code: its exit code.
        error: the traceback of what it did not catch, or "".
        stdout, stderr: what it printed.
        start: the alignment, fixed point -> moving point, where the registration came so far.
        folder: for the results.
    """

    code: int
    error: str
    stdout: str
    stderr: str
    start: np.ndarray | DenseTransform | None
    folder: Path


@dataclass(frozen=True)
class Stored:
    """The files of a case: the images, the label maps, and the values of the labels."""

    fixed: Written
    moving: Written
    fixed_labels: Written | None = None
    moving_labels: Written | None = None

    @property
    def scale(self) -> float:
        """Size of the head in the files, in heads of the base pair."""
        return float(np.cbrt(np.linalg.det(self.fixed.world[:3, :3])))


@dataclass(frozen=True)
class Errors:
    """Distances to the true map at the points of :attr:`Heads.points`, in mm of the base pair.

    Attributes:
        warped: after the registration.
        aligned: after its alignment alone.
    """

    warped: np.ndarray
    aligned: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """How a case ended, why, and its figures."""

    outcome: Outcome
    reason: str = ""


def judge(ran: Ran, stored: Stored, coats: list[Coat], heads: Heads, base: Errors) -> Verdict:
    """Judge a run of a dressed pair.

    Args:
        ran: the run.
        stored: what it was given.
        coats: what the pair wears.
        heads: the base pair.
        base: errors of the undressed pair.
    """
    if ran.error or ran.code not in (0, 2):
        return Verdict("traceback", ran.error or f"exit code {ran.code}: {ran.stderr[-300:]}")
    files = {path.name for path in ran.folder.rglob("*")} if ran.folder.exists() else set()
    if ran.code == 2:
        if ran.folder.exists():
            return Verdict("half-written", f"refused, but left {sorted(files) or 'an empty folder'}")
        return _refused(ran.stderr, stored, coats)
    owed = set(FILES) - {"inverse.h5", *ESTIMATED} - (set() if stored.moving_labels else {"warped-labels.nii.gz"})
    if files != owed:
        return Verdict("half-written", f"missing {sorted(owed - files)}, left over {sorted(files - owed)}")
    must = [coat.name for coat in coats if coat.refusal == "must"]
    if must:
        return Verdict("wrong", f"not refused: {', '.join(must)}")
    try:
        reasons = [*_wrong_errors(ran, stored, coats, heads, base), *_wrong_files(ran, stored, coats)]
    except RuntimeError as error:  # of SimpleITK
        return Verdict("half-written", f"a written file cannot be read: {error}")
    return Verdict("wrong", "; ".join(reasons)) if reasons else Verdict("right", _figures(ran, stored, heads))


def errors_of(ran: Ran, stored: Stored, heads: Heads) -> Errors:
    """Measure a run that wrote its transform."""
    transform = sitk.ReadTransform(str(ran.folder / "transform.h5"))
    points = apply_affine(stored.fixed.world, heads.points)
    truth = apply_affine(stored.moving.world, heads.truth)
    warped = np.array([transform.TransformPoint(point) for point in points.tolist()])
    start = ran.start
    aligned = start.map_points(points) if isinstance(start, DenseTransform) else apply_affine(start, points)
    return Errors(*(np.linalg.norm(found - truth, axis=1) / stored.scale for found in (warped, aligned)))


def seen_by_both(stored: Stored, heads: Heads) -> np.ndarray:
    """Which points of the head lie in both images: (n,) bool."""
    points = (heads.points, heads.truth)
    inside = [_inside(w, apply_affine(w.world, p)) for w, p in zip((stored.fixed, stored.moving), points, strict=True)]
    return inside[0] & inside[1]


def _refused(stderr: str, stored: Stored, coats: list[Coat]) -> Verdict:
    lines = [line for line in stderr.splitlines() if line.strip()]
    sentence = lines[-1] if lines else ""
    if all(coat.refusal == "never" for coat in coats):
        return Verdict("wrong", f"refused without need: {sentence}")
    names = _names_due(stored, coats)
    bare = sentence
    for name in sorted(names, key=len, reverse=True):
        bare = bare.replace(name, "FILE")
    if "FILE" not in bare:
        return Verdict("wrong", f"refused without naming the file: {sentence}")
    bare = re.sub(r"\S*FILE\S*", "FILE", bare)
    if not sentence.endswith(".") or re.search(r"[.!?] +[A-Z]", bare):
        return Verdict("wrong", f"refused in more or less than one sentence: {sentence}")
    if not _ADVICE.search(bare):
        return Verdict("wrong", f"refused without saying what to do: {sentence}")
    return Verdict("refused", sentence)


def _names_due(stored: Stored, coats: list[Coat]) -> set[str]:
    """Collect the names of the files that a refusal is about: one of them must be said."""
    images, labels = [stored.fixed, stored.moving], [w for w in (stored.fixed_labels, stored.moving_labels) if w]
    about = [w for w in images if w.damaged]
    if any(coat.refusal == "must" and "labels" in coat.touches for coat in coats):
        about += labels
    if any(coat.refusal == "may" for coat in coats):
        about = images
    # a DICOM slice stands for its folder; of a name that cannot be printed its plain beginning is enough
    names = {name for w in about for name in (w.path.name, w.path.parent.name if w.path.suffix == ".dcm" else "")}
    return (names | {re.sub(r"[^\x20-\x7e].*", "", name) for name in names}) - {"", "in"}


def _wrong_errors(ran: Ran, stored: Stored, coats: list[Coat], heads: Heads, base: Errors) -> list[str]:
    """Compare the errors with the bounds of the coats."""
    errors, seen = errors_of(ran, stored, heads), seen_by_both(stored, heads)
    if seen.sum() < 20:
        raise ValueError(f"Only {seen.sum()} points of the head lie in both images; the coats cut too much.")
    warped, aligned = errors.warped[seen].mean(), errors.aligned[seen].mean()
    undressed, base_aligned = base.warped[seen].mean(), base.aligned[seen].mean()
    loses = any(c.loses for c in coats)
    voxel = max(w.grid.spacing.max() for w in (stored.fixed, stored.moving)) / stored.scale
    goal = undressed
    if any(w.outline for w in (stored.fixed, stored.moving)):  # nothing tells a better inside from a worse one
        warped, goal = aligned, base_aligned
    bound = goal + TOLERANCE + (voxel if loses else 0.0)
    reasons = []
    if not warped <= bound:
        words = f"undressed {undressed:.2f} mm, alone aligned {base_aligned:.2f} mm"
        reasons.append(f"error {warped:.2f} mm (aligned {aligned:.2f} mm) is above {bound:.2f} mm ({words})")
    if loses and not warped <= aligned + TOLERANCE:
        reasons.append(f"error {warped:.2f} mm is above the alignment's {aligned:.2f} mm")
    return reasons


def _wrong_files(ran: Ran, stored: Stored, coats: list[Coat]) -> list[str]:
    """Compare the written images with what SimpleITK makes of the written transform."""
    reasons = []
    transform = sitk.ReadTransform(str(ran.folder / "transform.h5"))
    warped = sitk.ReadImage(str(ran.folder / "warped.nii.gz"))
    if not _same_box(warped, stored.fixed.grid):
        return ["the warped image does not lie on the fixed image's grid"]
    moving = stored.moving
    finite = np.isfinite(moving.values)
    within = _resampled(finite.astype(np.float64), moving.grid, warped, transform, sitk.sitkLinear, -1.0)
    known = np.abs(within - 1) < 1e-9
    wanted = _resampled(np.where(finite, moving.values, 0), moving.grid, warped, transform, sitk.sitkLinear, 0.0)
    written = sitk.GetArrayFromImage(warped).astype(np.float64)
    span = np.ptp(np.percentile(moving.values[finite], [0.1, 99.9])) or np.ptp(moving.values[finite])
    rounding = 0.51 if "integer" in warped.GetPixelIDTypeAsString() else 0.0
    size = np.abs(moving.values[finite]).max()
    off = np.abs(written - wanted)[known] > 4e-3 * span + rounding + 1e-6 * size
    if not known.any():
        reasons.append("the warped image shows nothing of the moving image")
    elif off.mean() > 2e-3:
        reasons.append(f"{100 * off.mean():.1f} % of the warped image is not what SimpleITK makes of transform.h5")
    if not np.isfinite(written).all():
        reasons.append("the warped image holds NaN or infinity")
    reasons += _wrong_outside(written[within < -0.5], moving, rounding)
    if stored.moving_labels is not None:
        reasons += _wrong_labels(ran, stored, transform)
    try:
        report = json.loads((ran.folder / "report.json").read_text(), parse_constant=_no_number)
    except ValueError as error:
        return [*reasons, f"report.json: {error}"]
    due = [coat.name for coat in coats if coat.warns]
    if due and not report["warnings"]:
        reasons.append(f"no warning about: {', '.join(due)}")
    if any(w.outline for w in (stored.fixed, moving)) and "few-values" not in {w["code"] for w in report["warnings"]}:
        reasons.append("no warning about an image of two values")
    if str(ran.folder / "report.html") not in ran.stdout:
        reasons.append("the path of the report is not printed as it is")
    return reasons


def _wrong_outside(values: np.ndarray, moving: Written, rounding: float) -> list[str]:
    """Check what the warped image holds outside of the moving image: one value, its air, its fill or darker."""
    if not values.size:
        return []
    values = np.percentile(values, [0.1, 50, 99.9], method="nearest")  # on the edge itself rounding decides
    if np.ptp(values) > rounding + 1e-6 * np.abs(values).max():
        return [f"the warped image holds {values.min():g} to {values.max():g} outside of the moving image"]
    span, darkest = moving.white - moving.air, np.nanmin(moving.values)
    held = values[1]
    if abs(held - moving.fill) <= 0.01 * span + rounding:
        return []
    if not min(darkest, moving.air) - 0.05 * span - rounding <= held <= moving.air + 0.25 * span + rounding:
        return [f"the warped image holds {held:g} outside of the moving image, whose air is {moving.air:g}"]
    return []


def _wrong_labels(ran: Ran, stored: Stored, transform: sitk.Transform) -> list[str]:
    warped = sitk.ReadImage(str(ran.folder / "warped-labels.nii.gz"))
    labels = stored.moving_labels
    written = sitk.GetArrayFromImage(warped).astype(np.float64)
    wanted = _resampled(labels.values, labels.grid, warped, transform, sitk.sitkNearestNeighbor, 0.0)
    foreign = sorted(set(np.unique(written)) - set(np.unique(labels.values)) - {0.0})
    if foreign:
        return [f"labels became others, such as {foreign[0]:.0f}"]
    values, counts = np.unique(wanted, return_counts=True)
    lost = sorted(set(values[counts > 20]) - set(np.unique(written)))
    if lost:
        return [f"labels were lost, such as {lost[0]:.0f}"]
    off = (written != wanted).mean()
    return [f"{100 * off:.1f} % of the warped labels are not what SimpleITK makes of them"] if off > 5e-3 else []


def _resampled(
    values: np.ndarray, grid: Grid, onto: sitk.Image, transform: sitk.Transform, interpolator: int, outside: float
) -> np.ndarray:
    return sitk.GetArrayFromImage(
        sitk.Resample(sitk_image(values, grid), onto, transform, interpolator, outside, sitk.sitkFloat64)
    )


def _same_box(image: sitk.Image, grid: Grid) -> bool:
    """Whether the voxels are those of the grid, in whatever order DICOM or the writer stored them."""
    axes = np.array(image.GetDirection()).reshape(3, 3)
    found = Grid.from_parts(image.GetSize(), image.GetSpacing(), axes, image.GetOrigin())
    if sorted(found.shape) != sorted(grid.shape):
        return False
    distances = np.linalg.norm(found.corners()[:, None] - grid.corners()[None], axis=2).min(axis=1)
    return bool(distances.max() < 0.02 * grid.spacing.min() + 1e-6 * np.abs(grid.corners()).max())


def _inside(written: Written, points: np.ndarray) -> np.ndarray:
    index = apply_affine(np.linalg.inv(written.grid.affine), points)
    return ((index >= -0.5) & (index <= np.array(written.grid.shape) - 0.5)).all(axis=1)


def _no_number(name: str) -> float:
    raise ValueError(f"it holds {name}, which is not JSON")


def _figures(ran: Ran, stored: Stored, heads: Heads) -> str:
    errors, seen = errors_of(ran, stored, heads), seen_by_both(stored, heads)
    return f"error {errors.warped[seen].mean():.2f} mm, aligned {errors.aligned[seen].mean():.2f} mm"
