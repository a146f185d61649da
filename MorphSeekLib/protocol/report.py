"""What report.json holds of a registration: the engine makes it, the page and the panel show it.

``schema`` counts the changes of its meaning. 1 (files without the key): folds were judged by central differences alone.
2: ``folding.cells``, ``folding.regions`` and ``verdict`` are there; every key of before keeps its meaning, so
``folding.njd_percent`` is by central differences. 3: ``steps`` has a row for each stage, with its name; ``fit`` took
the place of ``refinement``; ``model`` is null where none was used; the similarity is that of the fit. Since then
``masks``, ``folding.inside``, ``folding.region_voxels``, ``trust``, ``fit.features_beside`` and ``beside_body`` were
added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

SCHEMA = 3
Stage = Literal["align", "search", "network", "fit", "correct"]
SavedReport = Mapping[str, Any]
"""A report as a file or a scene has it: of any schema, so any section may be missing."""


class GridSection(TypedDict):
    """A grid: voxels along each axis, and mm between them."""

    shape: list[int]
    spacing: list[float]


class ImageSection(GridSection, total=False):
    """An image that was registered; ``path`` where it came from a file."""

    path: str


class ModelSection(TypedDict):
    """The model, as its card has it."""

    name: str
    sha256: str | None
    backbone: str
    title: str
    licence: str
    output: str


class WarpedSection(TypedDict):
    """The warped image: its number type, and the value outside of the moving image."""

    type: str
    outside: float
    definition: str


class StepSection(TypedDict, total=False):
    """The figures after a stage, or after a step of the network; the first is the alignment, ``answer`` is true in one.

    ``step`` counts the network's steps so far, ``seconds`` are those of the stage.
    """

    stage: Stage
    step: int
    similarity: float
    mean_displacement_mm: float
    folded_percent: float
    njd_percent: float
    seconds: float
    answer: bool


class LevelSection(GridSection):
    """A level of the fit: its voxels, what it compared by and with which weights, and the objective before each
    iteration."""

    similarity: str
    regularization: float
    folding: float
    objective: list[float]


class FitSection(TypedDict):
    """The fit: what it compared by, its share in the answer beside the network's steps, whether learned features were
    compared beside it, whether the moving image's contrast was turned around for it, its levels, and what computed
    it."""

    similarity: str
    share: float
    features_beside: bool
    opposite_contrast: bool
    iterations: list[int]
    levels: list[LevelSection]
    kernels: str
    definition: str


class SimilaritySection(TypedDict):
    """The judge's figure of the images as given (None: nothing was aligned), aligned and warped."""

    name: str
    input: float | None
    aligned: float
    warped: float


class CellsSection(TypedDict):
    """The proof of folding, see :class:`MorphSeekLib.measures.folds.FoldCount`."""

    cells: int
    proven: int
    folded: int
    undecided: int
    folded_percent: float
    smallest_proven: float
    folded_outside: int
    undecided_outside: int
    no_fold_proven: bool
    definition: str


class RegionSection(TypedDict):
    """A folded region, see :class:`MorphSeekLib.measures.folds.Region`."""

    voxels: int
    mm3: float
    determinant: float
    position: list[float]
    radius_mm: float


class InsideSection(TypedDict):
    """Folding and unevenness inside what the fixed image shows, or inside its mask (``of``), by central differences;
    ``folded_voxels`` are those whose box meets a folded cell."""

    of: Literal["tissue", "mask"]
    voxels: int
    folded_voxels: int
    njd_percent: float
    sdlogj: float
    min_jacobian: float
    max_jacobian: float


class FoldingSection(TypedDict):
    """Figures by central differences, the proof by cells, and the largest folded regions of ``region_count``;
    ``region_voxels`` are those of all regions."""

    njd_percent: float
    folded_voxels: int
    voxels: int
    sdlogj: float
    sdlogj_learn2reg: float
    min_jacobian: float
    max_jacobian: float
    definition: str
    cells: CellsSection
    regions: list[RegionSection]
    region_count: int
    region_voxels: int
    inside: InsideSection


class DiceSection(TypedDict):
    """Dice of each label, and their mean, at the stages "input", "aligned" and "warped"."""

    labels: dict[str, dict[str, float]]
    mean: dict[str, float]
    definition: str


class LandmarkSection(TypedDict):
    """A pair of landmarks: where they lie (LPS mm), where the transform's inverse takes the moving one (None: it has no
    inverse there), and their distance in mm at the stages "input", "aligned" and "warped"."""

    label: str
    fixed: list[float]
    moving: list[float]
    moving_in_fixed: list[float] | None
    input: float
    aligned: float
    warped: float


class LandmarksSection(TypedDict):
    """The target registration error of each pair of landmarks, and its mean at each stage, mm."""

    points: list[LandmarkSection]
    mean: dict[str, float]
    definition: str


class InverseSection(TypedDict, total=False):
    """How far transform and inverse lead a point from where it was, mm: "mean", "p95", "max"."""

    residual_mm: dict[str, float] | None
    definition: str


class WarningSection(TypedDict):
    """A :class:`MorphSeekLib.protocol.job.Notice`."""

    code: str
    message: str


class VerdictSection(TypedDict):
    """The verdict by the default limits, see :mod:`MorphSeekLib.protocol.verdict`."""

    color: str | None
    folds: str | None
    beyond: list[dict[str, object]]


class CorrectionSection(TypedDict):
    """A pair of points by which a registration was corrected, LPS mm, with its stated error and its distance before and
    after, mm."""

    label: str
    fixed: list[float]
    moving: list[float]
    error_mm: float
    before: float
    after: float


class CorrectedSection(TypedDict):
    """What a registration was corrected by."""

    points: list[CorrectionSection]
    definition: str


TRUST_COLORS = ("#3fa7d6", "#f2c14e", "#d1495b")
"""Of places that are likely near, in between, and not to be relied on; blind people of each kind tell them apart."""


class TrustRegionSection(TypedDict):
    """A region in which the estimated error is large: its worst place (LPS mm), the bound there (None: no millimeters
    are known), its size, and its color, 3 for the worst."""

    position: list[float]
    bound_mm: float | None
    mm3: float
    color: int


class TrustSection(TypedDict):
    """The estimated error over ``voxels`` of tissue.

    ``kind`` and ``title`` name the kind of pair on which the estimate was tuned; where it is None, nothing that is in
    mm is known. ``near_percent`` and ``far_percent`` are the shares of tissue where the error is below ``near_mm``, or
    may be above ``far_mm``, in four of five places; ``error_mm`` has what it is below in half ("median") and in four
    fifths ("p80") of all places.
    """

    kind: str | None
    title: str | None
    near_mm: float | None
    far_mm: float | None
    near_percent: float
    far_percent: float
    voxels: int
    error_mm: dict[str, float] | None
    regions: list[TrustRegionSection]
    definition: str


class MasksSection(TypedDict):
    """How many voxels of each image count; None: all."""

    fixed: int | None
    moving: int | None


class BesideSection(TypedDict):
    """How much of two CT scans lies beside the body (a table, arms that lie apart) and is not compared, milliliters;
    None: nothing does, or the images are no CT scans, or masks say what counts."""

    fixed: float | None
    moving: float | None


class Figures(TypedDict):
    """What is measured on the delivered transform; None: without labels, without an inverse."""

    folding: FoldingSection
    dice: DiceSection | None
    inverse: InverseSection | None


class _Measured(Figures):
    """What is known once a registration is done."""

    schema: int
    model: ModelSection | None
    fixed: ImageSection
    moving: ImageSection
    warped: WarpedSection
    working_grid: GridSection
    device: str
    precision: str
    align: str
    mirrored: bool
    alignment_determinant: float | None
    masks: MasksSection
    beside_body: BesideSection
    steps: list[StepSection]
    preset: str
    fit: FitSection | None
    similarity: SimilaritySection
    displacement_mm: dict[str, float]
    warnings: list[WarningSection]
    seconds: dict[str, float]


class Report(_Measured, total=False):
    """report.json: what was measured, with landmarks where they were given, and what is known once its files are
    written."""

    landmarks: LandmarksSection
    verdict: VerdictSection
    morphseek: str
    date: str
    software: dict[str, str]
    files: list[str]
    corrections: CorrectedSection
    trust: TrustSection
