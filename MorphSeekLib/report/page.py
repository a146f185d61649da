"""The report of one registration: report.json for programs and report.html for people.

The page needs no other file: pictures are embedded, nothing is fetched, no script runs. Pictures are cut along the axes
of the world whatever the orientation of the fixed grid, in true proportions and in radiological convention (the right
side of the patient is on the left). Slices are cut before they are drawn, so the time does not grow with the volume.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk
import torch
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from ..io.files import write_atomically
from ..protocol.report import TRUST_COLORS, Report, TrustSection, VerdictSection
from ..protocol.verdict import DEFAULT_LIMITS, HEADLINES, figures, folds, judge
from ..space import geometry
from ..space.geometry import DenseTransform, Grid, Volume
from ..space.preprocessing import sampled_places

if TYPE_CHECKING:  # matplotlib is imported by what draws: a fifth of the time that a worker takes to start
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

FOOTNOTE = (
    "Estimated from the images alone, tuned on simulated deformations; it cannot see every mistake. Not a measurement; "
    "check anatomy before you decide."
)
_MOST_PIXELS = 512  # along the longest side of a slice
_SAMPLE_VOXELS = 300_000  # that intensity windows are judged by
_INCH_WIDTH, _MOST_ROW, _DPI = 12.4, 4.5, 150  # a sheet's width and the most height of one of its rows, inches

# dark in the middle, as a subtraction image: what is black has not changed
_DIFFERENCE = ("#7fd4ff", "#1f6fd0", "#000000", "#d07a10", "#ffe08a")
_VOLUME_CHANGE = ("#8ef0c0", "#149060", "#000000", "#8a4fd0", "#e0c0ff")
_FOLDED = "#ff2020"
_LINES = "#ffd34d"
_TEXT = "#d8d8d8"


@dataclass(frozen=True)
class TrustPicture:
    """The estimated error.

    Attributes:
        colors: 1 likely near, 2 in between, 3 not to be relied on, 0 where nothing is said; on the fixed grid.
        section: its figures.
    """

    colors: Volume
    section: TrustSection

    def legend(self) -> tuple[str, str, str]:
        """Return what the colors say."""
        near, far = self.section["near_mm"], self.section["far_mm"]
        if near is None or far is None:
            return ("likely near", "in between", "do not rely\non this")
        return (f"likely within\n{near:.3g} mm", f"{near:.3g} to {far:.3g} mm", "do not rely\non this")


@dataclass
class RegistrationPictures:
    """What the pictures are drawn from.

    Attributes:
        fixed, moving_aligned, warped: on the fixed grid; ``moving_aligned`` is the moving image after the alignment
            alone, ``warped`` after the whole registration.
        jacobian: Jacobian determinant on the fixed grid, by central differences.
        folding: above 0 where a voxel of the fixed grid meets a folded cell.
        transform: the whole fixed -> moving map, for the deformation grid.
        trust: the estimated error; None where it was not asked for.
    """

    fixed: Volume
    moving_aligned: Volume
    warped: Volume
    jacobian: Volume
    folding: Volume
    transform: DenseTransform
    trust: TrustPicture | None = None


@dataclass(frozen=True)
class Sheet:
    """One drawn page of slices: three planes by four columns."""

    title: str
    caption: str
    png: bytes

    @property
    def uri(self) -> str:
        """For the src of an img element."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Plane:
    """A plane as radiologists hang it.

    Attributes:
        name: for its label.
        right, down: LPS directions of the picture's axes.
        letters: at its left, right, top and bottom edge.
        axis: the LPS axis it cuts across, with the letters of that axis' negative and positive side.
    """

    name: str
    right: tuple[int, int, int]
    down: tuple[int, int, int]
    letters: str
    axis: int
    sides: str


PLANES = (
    Plane("Axial", (1, 0, 0), (0, 1, 0), "RLAP", 2, "IS"),
    Plane("Coronal", (1, 0, 0), (0, 0, -1), "RLSI", 1, "AP"),
    Plane("Sagittal", (0, 1, 0), (0, 0, -1), "APSI", 0, "RL"),
)


def write_report(folder: Path, report: Report, pictures: RegistrationPictures) -> Path:
    """Write ``report.json`` and ``report.html`` into a folder that exists.

    Args:
        folder: where to.
        report: the figures, as the registration job makes them; parts that are None or absent are left out of the
            page. Numbers that are not finite become null in the file, since JSON knows none.
        pictures: see :class:`RegistrationPictures`.

    Returns:
        the path of report.html.

    Raises:
        MorphSeekError: a file cannot be written.
    """
    report = _plain(report)
    page = render_page(report, draw_sheets(pictures))
    path = Path(folder) / "report.html"
    write_atomically(path, page.encode("utf-8"))
    write_figures(Path(folder), report)
    return path


def write_figures(folder: Path, report: Report) -> None:
    """Write ``report.json`` into a folder that exists.

    Raises:
        MorphSeekError: it cannot be written.
    """
    text = json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "report.json", text.encode("utf-8"))


def render_page(report: Report, sheets: list[Sheet]) -> str:
    """Return the page as text; every name in it is escaped, every number carries its full value and its path in the
    JSON."""
    # autoescape by hand: the default goes by endings and would not see .j2 as HTML
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )

    def number(path: str, form: str = "{:.3f}") -> str | Markup:
        value = _find(report, path)
        if not isinstance(value, int | float):
            return "–"
        return Markup('<data data-path="{}" value="{}">{}</data>').format(path, repr(value), form.format(value))

    environment.filters["name"] = lambda path: str(path or "?").replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    template = environment.get_template("page.html.j2")
    words = {"verdict": said(report), "footnote": FOOTNOTE, "estimated_error": estimated_error}
    return template.render(report=report, sheets=sheets, number=number, facts=_facts, **words)


def said(report: Report) -> list[tuple[str, str]]:
    """Return the verdict by the default limits in words: (color, sentence) each; "none" for what has no color."""
    found, values = folds(report), figures(report)
    verdict = judge(values, DEFAULT_LIMITS, found)
    lines: list[tuple[str, str]] = [(verdict.color or "none", HEADLINES[verdict.color])]
    if found is not None:
        lines.append((verdict.folds or "none", found.sentence))
    lines += [(beyond.color, beyond.sentence()) for beyond in verdict.beyond]
    if values["dice"] is None:
        lines.append(("none", "No labels to measure overlap: judge the match by eye."))
    return lines


def verdict_values(report: Report) -> VerdictSection:
    """Return the verdict by the default limits as report.json holds it."""
    found = folds(report)
    verdict = judge(figures(report), DEFAULT_LIMITS, found)
    return {
        "color": verdict.color,
        "folds": None if found is None else found.finding.name.lower().replace("_", "-"),
        "beyond": [dataclasses.asdict(beyond) for beyond in verdict.beyond],
    }


def draw_sheets(pictures: RegistrationPictures) -> list[Sheet]:
    """Draw the slices: anatomy and change through the middle of the foreground, then the largest fold if there is one.

    Returns:
        two to four sheets.
    """
    scene = _Scene(pictures)
    sheets = [
        Sheet(
            "Do they match?",
            "Through the middle of the fixed image's foreground. The outlines are the fixed image's own borders; they "
            "should follow the borders of the warped image.",
            scene.sheet(
                scene.center,
                {
                    "Fixed": scene.draw_fixed,
                    "Moving, aligned": scene.draw_moving,
                    "Moving, warped": scene.draw_warped,
                    "Fixed's outlines on warped": scene.draw_outlines,
                },
            ),
        ),
        Sheet(
            "What did the deformation do?",
            "Difference: moving minus fixed, each scaled to its own gray window, both on one scale; it says little "
            "where the two images have different contrast. Deformation grid: squares of "
            f"{scene.grid_step:g} mm on the aligned moving image, warped with it; the affine part is left out. Local "
            "volume change: Jacobian determinant of fixed to moving, alignment included; red = the transform folds in "
            "or beside the voxel.",
            scene.sheet(
                scene.center,
                {
                    "Difference before": scene.draw_difference_before,
                    "Difference after": scene.draw_difference_after,
                    "Deformation grid on fixed": scene.draw_grid,
                    "Local volume change": scene.draw_volume_change,
                },
            ),
        ),
    ]
    if pictures.trust is not None:
        sheets.append(_trust_sheet(scene, pictures.trust))
    fold = scene.worst_fold()
    if fold is not None:
        sheets.append(
            Sheet(
                "Where does it fold?",
                f"{fold.voxels:,} folded voxels in {fold.clusters:,} region{'s' if fold.clusters > 1 else ''}, "
                f"{fold.in_foreground:,} of them in the fixed image's foreground. Shown and circled: the region that "
                f"covers the most foreground, or the largest where none does; {fold.size:,} voxels. Red = folded: do "
                "not rely on the warped image or on mapped points there.",
                scene.sheet(
                    fold.center,
                    {
                        "Fixed": scene.draw_fixed,
                        "Moving, warped": scene.draw_warped,
                        "Deformation grid on fixed": scene.draw_grid,
                        "Local volume change": scene.draw_volume_change,
                    },
                    fold.radius_mm,
                ),
            )
        )
    return sheets


def _trust_sheet(scene: _Scene, trust: TrustPicture) -> Sheet:
    """Draw the colors of the estimated error through the worst place of the worst region, or the middle."""
    regions, error = trust.section["regions"], trust.section["error_mm"]
    point = scene.nearest_voxel(np.array(regions[0]["position"])) if regions else scene.center
    words = "" if error is None else estimated_error(error) + " "
    place = "Through the worst place of the region where most error is expected. " if regions else ""
    return Sheet(
        "Where can it be relied on?",
        f"{words}{place}{FOOTNOTE}",
        scene.sheet(
            point,
            {
                "Fixed": scene.draw_fixed,
                "Moving, warped": scene.draw_warped,
                "Fixed's outlines on warped": scene.draw_outlines,
                "Estimated error on fixed": scene.draw_trust,
            },
            0.04 * float((scene.high - scene.low).max()) if regions else None,
        ),
    )


def estimated_error(error: Mapping[str, float]) -> str:
    """Return the sentence that says how far off a registration is estimated to be."""
    return f"Estimated error: usually below {error['median']:.1f} mm, in 4 of 5 places below {error['p80']:.1f} mm."


@dataclass(frozen=True)
class _Fold:
    center: np.ndarray  # LPS mm of a folded voxel in the middle of the cluster
    radius_mm: float
    size: int
    voxels: int
    in_foreground: int
    clusters: int


@dataclass(frozen=True)
class _Panel:
    """One picture of a sheet: a slice whose upper left corner stands at (left, top) inches of the sheet's axes."""

    axes: Axes
    grid: Grid
    plane: Plane
    left: float
    top: float
    pixel: float  # inches

    @property
    def right(self) -> float:
        return self.left + self.grid.shape[0] * self.pixel

    @property
    def bottom(self) -> float:
        return self.top + self.grid.shape[1] * self.pixel

    def show(
        self, values: np.ndarray, colors: Any = None, low: float = 0, high: float = 1, smooth: bool = True
    ) -> None:
        """Show (down, right) values, or (down, right, 4) colors; NaN stays black."""
        self.axes.imshow(
            values,
            cmap=colors,
            vmin=low,
            vmax=high,
            extent=(self.left, self.right, self.bottom, self.top),
            aspect="auto",
            interpolation="bilinear" if smooth else "nearest",
        )

    def contour(self, values: np.ndarray, levels: Any, color: str, width: float) -> None:
        if min(values.shape) < 2 or not any(values.min() < level < values.max() for level in levels):
            return
        across = self.left + self.pixel * (np.arange(values.shape[1]) + 0.5)
        down = self.top + self.pixel * (np.arange(values.shape[0]) + 0.5)
        self.axes.contour(across, down, values, levels=levels, colors=color, linewidths=width, linestyles="solid")

    def circle(self, point: np.ndarray, radius_mm: float) -> None:
        """Draw a circle around a point in LPS mm."""
        index = geometry.apply_affine(np.linalg.inv(self.grid.affine), point[None])[0, :2] + 0.5
        center = (self.left + index[0] * self.pixel, self.top + index[1] * self.pixel)
        radius = radius_mm / float(self.grid.spacing[0]) * self.pixel
        from matplotlib.patches import Circle, Rectangle

        frame = Rectangle((self.left, self.top), self.right - self.left, self.bottom - self.top)
        circle = self.axes.add_patch(Circle(center, radius, fill=False, color="white", linewidth=0.9))
        circle.set_clip_path(frame.get_path(), frame.get_transform() + self.axes.transData)

    def letters(self) -> None:
        """Draw orientation letters inside the four edges."""
        from matplotlib.patheffects import withStroke

        x, y, rim = (self.left + self.right) / 2, (self.top + self.bottom) / 2, 0.05
        places = (
            (self.left + rim, y, "left", "center"),
            (self.right - rim, y, "right", "center"),
            (x, self.top + rim, "center", "top"),
            (x, self.bottom - rim, "center", "bottom"),
        )
        for letter, (x, y, horizontal, vertical) in zip(self.plane.letters, places, strict=True):
            text = self.axes.text(x, y, letter, ha=horizontal, va=vertical, color="white", fontsize=9)
            text.set_path_effects([withStroke(linewidth=2, foreground="black")])


class _Scene:
    """The volumes with their gray windows, and one drawing function a column."""

    def __init__(self, pictures: RegistrationPictures) -> None:
        self.pictures = pictures
        self.folds = bool(pictures.folding.data.any())
        self.places = _places(pictures.fixed.data.numel())
        self.fixed_window, self.levels = _window(self._some(pictures.fixed))
        moving = (self._some(volume) for volume in (pictures.warped, pictures.moving_aligned))
        self.moving_window, _ = _window(np.concatenate(list(moving)))
        self.center, self.low, self.high = self._view()
        extent = self.high - self.low
        self.pixel = max(float(pictures.fixed.grid.spacing.min()), float(extent.max()) / _MOST_PIXELS)
        self.grid_step = _round_number(float(extent.max()) / 24)
        self.back = np.linalg.inv(pictures.transform.affine_part())
        self.difference_limit = self._difference_limit()
        self.volume_limit = self._volume_limit()

    def _some(self, volume: Volume) -> np.ndarray:
        """Return (n,) values of a few hundred thousand voxels, the same ones of each volume."""
        return volume.data.flatten()[self.places].to(torch.float32).numpy()

    # --- where to cut

    def _view(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the foreground's middle (a voxel's LPS mm), and the box along the world's axes to show, with a rim.

        Air all around would only make the pictures smaller.
        """
        grid = self.pictures.fixed.grid
        rim = np.abs(grid.affine[:3, :3]).sum(axis=1) / 2
        low, high = grid.corners().min(axis=0) - rim, grid.corners().max(axis=0) + rim
        shown = self.places[self._some(self.pictures.fixed) > self.levels[0]]
        index = np.stack(np.unravel_index(shown, grid.shape), axis=1)
        if len(index) < 8:
            middle = (np.array(grid.shape) - 1) // 2
            return geometry.apply_affine(grid.affine, middle[None])[0], low, high
        points = geometry.apply_affine(grid.affine, index)
        center = geometry.apply_affine(grid.affine, np.round(index.mean(axis=0))[None])[0]
        first, last = np.percentile(points, [0.1, 99.9], axis=0)  # not stretched by a few bright specks
        margin = 0.1 * (last - first).max() + rim
        return center, np.maximum(low, first - margin), np.minimum(high, last + margin)

    def worst_fold(self) -> _Fold | None:
        """Return the folded region (voxels touching by face, edge or corner) that holds the most foreground, else the
        largest.

        The view grows to show it.
        """
        if not self.folds:
            return None
        from scipy import ndimage  # what does not fold goes without it

        clusters, count = ndimage.label((self.pictures.folding.data > 0).numpy(), np.ones((3, 3, 3)))
        foreground = clusters[(self.pictures.fixed.data > self.levels[0]).numpy()]
        sizes = np.bincount(clusters.ravel(), minlength=count + 1)[1:]
        inside = np.bincount(foreground, minlength=count + 1)[1:]
        worst = int(np.lexsort((sizes, inside))[-1])
        points = geometry.apply_affine(self.pictures.folding.grid.affine, np.argwhere(clusters == worst + 1))
        center = points[np.linalg.norm(points - points.mean(axis=0), axis=1).argmin()]
        radius = float(np.linalg.norm(points - center, axis=1).max()) + 0.02 * float((self.high - self.low).max())
        self.low, self.high = np.minimum(self.low, center - radius), np.maximum(self.high, center + radius)
        return _Fold(center, radius, int(sizes[worst]), int(sizes.sum()), int(inside.sum()), count)

    def nearest_voxel(self, point: np.ndarray) -> np.ndarray:
        """Return the center of the fixed grid's voxel in which a point lies, LPS mm."""
        grid = self.pictures.fixed.grid
        index = np.round(geometry.apply_affine(np.linalg.inv(grid.affine), point[None]))
        return geometry.apply_affine(grid.affine, np.clip(index, 0, np.array(grid.shape) - 1))[0]

    def slice_grid(self, plane: Plane, point: np.ndarray) -> Grid:
        """Return the pixels of a slice through a point: (right, down, 1), square, over the whole view.

        One pixel's center is the point: where the fixed grid lies along the world's axes the pixels are its voxels.
        """
        right, down = np.array(plane.right), np.array(plane.down)
        first, size = np.array(point, dtype=np.float64), []
        for direction in (right, down):
            ends = sorted([float(direction @ (self.low - point)), float(direction @ (self.high - point))])
            begin = math.ceil(ends[0] / self.pixel)
            size.append(max(1, math.floor(ends[1] / self.pixel) - begin + 1))
            first += direction * begin * self.pixel
        direction = np.stack([right, down, np.cross(right, down)], axis=1)
        return Grid.from_parts((*size, 1), [self.pixel] * 3, direction, first)

    # --- what to draw

    def draw_fixed(self, panel: _Panel) -> None:
        panel.show(_cut(self.pictures.fixed, panel.grid), "gray", *self.fixed_window)

    def draw_moving(self, panel: _Panel) -> None:
        panel.show(_cut(self.pictures.moving_aligned, panel.grid), "gray", *self.moving_window)

    def draw_warped(self, panel: _Panel) -> None:
        panel.show(_cut(self.pictures.warped, panel.grid), "gray", *self.moving_window)

    def draw_outlines(self, panel: _Panel) -> None:
        self.draw_warped(panel)
        self._outline(panel, self.levels[:1], "#33d6ff", 0.7)
        self._outline(panel, self.levels[1:], _LINES, 0.7)

    def draw_difference_before(self, panel: _Panel) -> None:
        self._difference(panel, self.pictures.moving_aligned)

    def draw_difference_after(self, panel: _Panel) -> None:
        self._difference(panel, self.pictures.warped)

    def draw_grid(self, panel: _Panel) -> None:
        self.draw_fixed(panel)
        self._folds(panel)
        # iso-lines of where each fixed point comes from: exactly the picture of a grid drawn into the moving image and
        # warped with it, so the lines stand at the right place of the fixed image
        index = np.indices(panel.grid.shape).reshape(3, -1).T
        points = geometry.apply_affine(panel.grid.affine, index)
        moved = points + self.pictures.transform.displacement_at(panel.grid).reshape(3, -1).numpy().T
        source = geometry.apply_affine(self.back, moved)
        for direction in (panel.plane.right, panel.plane.down):
            along = (source @ np.array(direction)).reshape(panel.grid.shape[:2]).T
            levels = np.arange(math.ceil(along.min() / self.grid_step), along.max() / self.grid_step) * self.grid_step
            panel.contour(along, levels, _LINES, 0.6)

    def draw_trust(self, panel: _Panel) -> None:
        self.draw_fixed(panel)
        if self.pictures.trust is None:
            return
        colors = np.nan_to_num(_cut(self.pictures.trust.colors, panel.grid, "nearest")).astype(int)
        from matplotlib.colors import to_rgba

        table = np.array([(0.0, 0.0, 0.0, 0.0), *(to_rgba(color, 0.5) for color in TRUST_COLORS)])
        panel.show(table[np.clip(colors, 0, 3)], smooth=False)

    def draw_volume_change(self, panel: _Panel) -> None:
        change = np.log(np.maximum(_cut(self.pictures.jacobian, panel.grid), 1e-9))
        limit = math.log(self.volume_limit)
        panel.show(change, _colors(_VOLUME_CHANGE), -limit, limit)
        self._outline(panel, self.levels[:1], "#a0a0a0", 0.6)
        self._folds(panel)

    def _outline(self, panel: _Panel, levels: list[float], color: str, width: float) -> None:
        """Draw the fixed image's own borders."""
        fixed = np.nan_to_num(_cut(self.pictures.fixed, panel.grid), nan=self.fixed_window[0])
        panel.contour(_smoothed(fixed), levels, color, width)

    def _difference(self, panel: _Panel, moving: Volume) -> None:
        moving_gray = _scaled(_cut(moving, panel.grid), self.moving_window)
        fixed_gray = _scaled(_cut(self.pictures.fixed, panel.grid), self.fixed_window)
        panel.show(moving_gray - fixed_gray, _colors(_DIFFERENCE), -self.difference_limit, self.difference_limit)

    def _folds(self, panel: _Panel) -> None:
        if self.folds:
            from matplotlib.colors import to_rgba

            folded = _cut(self.pictures.folding, panel.grid, "nearest") > 0
            panel.show(np.where(folded[..., None], to_rgba(_FOLDED), 0.0), smooth=False)

    def _difference_limit(self) -> float:
        moving = _scaled(self._some(self.pictures.moving_aligned), self.moving_window)
        difference = np.abs(moving - _scaled(self._some(self.pictures.fixed), self.fixed_window))
        return max(0.2, float(np.percentile(difference, 99)))

    def _volume_limit(self) -> float:
        values = self._some(self.pictures.jacobian)
        values = values[values > 0]
        needed = math.exp(float(np.percentile(np.abs(np.log(values)), 98))) if len(values) else 1.0
        return next((limit for limit in (1.5, 2.0, 3.0) if needed <= limit), 4.0)

    # --- a sheet

    def sheet(
        self, point: np.ndarray, columns: dict[str, Callable[[_Panel], None]], circle_mm: float | None = None
    ) -> bytes:
        """Draw planes (rows) by columns through one point (LPS mm), all at one scale; PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        grids = [self.slice_grid(plane, point) for plane in PLANES]
        margin, head, gap = 0.32, 0.32, 0.06  # inches
        foot = 0.62 if any(draw in self._scales() for draw in columns.values()) else gap
        column = (_INCH_WIDTH - margin - gap * len(columns)) / len(columns)
        pixel = min(column / max(grid.shape[0] for grid in grids), _MOST_ROW / max(grid.shape[1] for grid in grids))
        height = head + sum(grid.shape[1] * pixel + gap for grid in grids) + foot
        figure = Figure(figsize=(_INCH_WIDTH, height), dpi=_DPI)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))  # one for all, in inches from the upper left: axes are slow to make
        axes.set_axis_off()
        top = head
        for plane, grid in zip(PLANES, grids, strict=True):
            where = float(point[plane.axis])
            label = f"{plane.name}  {plane.sides[where > 0]} {abs(where):.0f} mm"
            _write(axes, margin / 2, top + grid.shape[1] * pixel / 2, label, rotation=90)
            for number, draw in enumerate(columns.values()):
                left = margin + number * (column + gap) + (column - grid.shape[0] * pixel) / 2
                panel = _Panel(axes, grid, plane, left, top, pixel)
                draw(panel)
                if circle_mm is not None:
                    panel.circle(point, circle_mm)
                panel.letters()
            top += grid.shape[1] * pixel + gap
        for number, (title, draw) in enumerate(columns.items()):
            left = margin + number * (column + gap)
            _write(axes, left + column / 2, head / 2, title, size=10)
            if draw in self._scales():
                colors, ends = self._scales()[draw]
                box = (left + 0.1 * column, left + 0.9 * column, top + 0.2, top + 0.08)
                axes.imshow(np.linspace(0, 1, 256)[None], cmap=colors, extent=box, aspect="auto")
                for share, text in zip((0.16, 0.5, 0.84), ends, strict=True):
                    _write(axes, left + share * column, top + 0.38, text, size=8)
        axes.set(xlim=(0, _INCH_WIDTH), ylim=(height, 0))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="black", pil_kwargs={"compress_level": 1})
        return buffer.getvalue()

    def _scales(self) -> dict[Callable, tuple[Any, tuple[str, str, str]]]:
        """Return colors and the texts below their ends and middle, for the columns that have a scale."""
        from matplotlib.colors import ListedColormap

        difference = (_colors(_DIFFERENCE), ("fixed\nbrighter", "equal", "moving\nbrighter"))
        limit = f"{self.volume_limit:g}"
        trust = self.pictures.trust
        return {
            self.draw_trust: (ListedColormap(TRUST_COLORS), ("", "", "") if trust is None else trust.legend()),
            self.draw_difference_before: difference,
            self.draw_difference_after: difference,
            self.draw_volume_change: (
                _colors(_VOLUME_CHANGE),
                (f"1/{limit}: moving\nstretched", "1: kept", f"{limit}: moving\ncompressed"),
            ),
        }


@functools.cache
def _colors(stops: tuple[str, ...]) -> Colormap:
    """Return the colors between some, from the lowest value to the highest."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("stops", stops)


def _write(axes: Axes, x: float, y: float, text: str, size: float = 9, rotation: float = 0) -> None:
    axes.text(x, y, text, ha="center", va="center", color=_TEXT, fontsize=size, rotation=rotation)


def _cut(volume: Volume, grid: Grid, mode: str = "linear") -> np.ndarray:
    """Return (down, right) values of a slice; NaN outside the volume."""
    data = volume.data if volume.data.is_floating_point() else volume.data.float()
    return geometry.resample(Volume(data, volume.grid), grid, mode=mode, background=math.nan).data[:, :, 0].numpy().T


def _places(voxels: int) -> np.ndarray:
    """Return which voxels of a volume, counted as they lie in memory, stand for all in what is measured of them."""
    return (torch.arange(voxels) if voxels <= _SAMPLE_VOXELS else sampled_places(voxels, _SAMPLE_VOXELS)).numpy()


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Blur (down, right) values by a Gaussian of 0.7 pixels."""
    weights = np.exp(-0.5 * (np.arange(-3, 4) / 0.7) ** 2)
    for axis in (0, 1):
        padded = np.pad(values, [(3 * (axis == a),) * 2 for a in (0, 1)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 7, axis=axis)
        values = windows @ (weights / weights.sum())
    return values


def _window(values: np.ndarray) -> tuple[tuple[float, float], list[float]]:
    """Return a gray window for the foreground's contrast, and two levels: background | tissue | bright tissue."""
    first, last = np.percentile(values, [0.1, 99.9])
    if last > first:  # metal and other specks would take the whole histogram
        values = np.clip(values, first, last)
    if not values.max() > values.min():
        return (float(values[0]), float(values[0]) + 1), [float(values[0])] * 2
    image = sitk.GetImageFromArray(values.reshape(1, -1))
    levels = [float(level) for level in _otsu_levels(image)]
    foreground = values[values > levels[0]]
    low, high = np.percentile(foreground if foreground.size else values, [2, 98])
    contrast = max(float(high - low), 1e-6 * float(values.max() - values.min()))
    # dark enough that the background and fluid stay visible, but never far below the darkest value there is
    return (max(float(low) - 0.4 * contrast, float(values.min())), float(high) + 0.1 * contrast), levels


def _otsu_levels(image: sitk.Image) -> tuple[float, ...]:
    """Return two thresholds by Otsu's method."""
    otsu = sitk.OtsuMultipleThresholdsImageFilter()
    otsu.SetNumberOfThresholds(2)
    otsu.SetNumberOfHistogramBins(128)
    otsu.Execute(image)
    return otsu.GetThresholds()


def _scaled(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Scale gray values to 0 to 1."""
    return np.clip((values - window[0]) / (window[1] - window[0]), 0, 1)


def _round_number(value: float) -> float:
    """Return the 1, 2 or 5 times a power of ten that is nearest."""
    power = 10 ** math.floor(math.log10(value))
    return min((1 * power, 2 * power, 5 * power, 10 * power), key=lambda n: abs(math.log(n / value)))


def _find(report: Report, path: str) -> object:
    """Return a value by its dotted path; None where any part is absent."""
    value: Any = report
    for key in path.split("."):
        if isinstance(value, list) and key.isdigit():
            value = dict(enumerate(value)).get(int(key))
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value


def _facts(section: Mapping[str, object] | None, prefix: str = "") -> list[tuple[str, object]]:
    """Return (name, value) rows of a section, inner sections flattened; empty values left out."""
    rows: list[tuple[str, object]] = []
    for key, value in (section or {}).items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            rows += _facts(value, f"{name}: ")
        elif isinstance(value, list):
            rows.append((name, ", ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in value)))
        elif value not in (None, ""):
            rows.append((name, f"{value:.6g}" if isinstance(value, float) else value))
    return rows


def _plain(value: Any) -> Any:
    """Return what JSON can hold: keys as text, numpy's and torch's numbers as Python's, not-finite numbers as None."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray | torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
