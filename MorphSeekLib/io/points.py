"""Points of an image in files: Slicer's markups (.mrk.json, .fcsv) and tables with a header (.csv)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..protocol.errors import MorphSeekError
from ..protocol.pairing import paired
from ..protocol.startup import check_readable, shown
from ..space.geometry import Grid, apply_affine
from .files import write_atomically

ENDINGS = (".mrk.json", ".fcsv", ".csv")
_NAMED = ".mrk.json, .fcsv or .csv"
_AXES = ("xyz", "ras", "ijk")
_HEADERS = "label,x,y,z (mm, LPS), label,r,a,s (mm, RAS) or i,j,k (voxels)"
_SYSTEMS = {"LPS": "LPS", "1": "LPS", "RAS": "RAS", "0": "RAS"}  # as Slicer writes them, by name or by number
_FLIP = np.array([-1.0, -1.0, 1.0])  # RAS <-> LPS
_FCSV_COLUMNS = "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"


@dataclass(frozen=True, eq=False)
class Points:
    """Points in space.

    Attributes:
        positions: (n, 3) LPS mm.
        labels: one each, "" for a point without.
        axes: in what a table names them: "xyz" (LPS mm), "ras" (RAS mm) or "ijk" (voxels of their image).
    """

    positions: np.ndarray
    labels: tuple[str, ...]
    axes: str = "xyz"


@dataclass(frozen=True, eq=False)
class PointPairs:
    """Points that belong together.

    Attributes:
        fixed, moving: (n, 3) LPS mm, pair by pair.
        labels: of the pairs.
    """

    fixed: np.ndarray
    moving: np.ndarray
    labels: tuple[str, ...]


def read_points(path: str | Path, grid: Grid) -> Points:
    """Read the points of an image.

    Args:
        path: Slicer's markups, .mrk.json or .fcsv, in the coordinate system that the file names; or a .csv table with
            the header label,x,y,z (mm, LPS), label,r,a,s (mm, RAS) or i,j,k (voxels from 0). "label" may be left out
            or added; other columns are passed over.
        grid: the image's, for voxels.

    Raises:
        MorphSeekError: another kind of file, unreadable, without a header, or a point that is not three finite numbers.
    """
    path = Path(path)
    reader = {".json": _read_markups, ".fcsv": _read_fcsv, ".csv": _read_table}.get(path.suffix.lower())
    if reader is None:
        raise MorphSeekError(f"{shown(path)} holds no points that can be read; give a file that ends with {_NAMED}.")
    check_readable(path)
    try:
        points = reader(path.read_text(encoding="utf-8-sig"), path, grid)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise MorphSeekError(
            f"The points in {shown(path)} cannot be read ({error}); save them again, for instance from Slicer."
        ) from error
    if not len(points.positions):
        raise MorphSeekError(f"{shown(path)} holds no point; place some and save it again.")
    return points


def write_points(points: Points, path: str | Path, grid: Grid) -> None:
    """Write points; a .csv table in the axes of :class:`Points`, markups in mm LPS.

    Args:
        points: the points.
        path: ends with .mrk.json, .fcsv or .csv.
        grid: of the image that the points are of, for voxels.

    Raises:
        MorphSeekError: another ending, or the file cannot be written.
    """
    path = Path(path)
    check_points_name(path)
    writer = {".json": _markups, ".fcsv": _fcsv, ".csv": _table}[path.suffix.lower()]
    write_atomically(path, writer(points, grid).encode("utf-8"))


def check_points_name(path: str | Path) -> None:
    """Refuse a name that says no format of points.

    Raises:
        MorphSeekError: with the endings that there are.
    """
    if not str(path).lower().endswith(ENDINGS):
        raise MorphSeekError(f"{shown(path)} has no format to write points in; end its name with {_NAMED}.")


def pair_points(fixed: Points, moving: Points, names: tuple[str, str]) -> PointPairs:
    """Pair the points of two images: by their labels where all have one, else by their order.

    Two lists that share no label at all (as Slicer names points after their list) are paired by order, too.

    Args:
        names: what to call the two in a refusal (their files).

    Raises:
        MorphSeekError: unequal counts, a label that occurs twice, or one that only one side has.
    """
    order, labels = paired(fixed.labels, moving.labels, names)
    return PointPairs(fixed.positions, moving.positions[order], tuple(labels))


def _read_markups(text: str, path: Path, grid: Grid) -> Points:
    lists = json.loads(text)["markups"]
    if len(lists) != 1:
        raise ValueError(f"it holds {len(lists)} lists of points instead of one")
    markup: Mapping[str, Any] = lists[0]
    labels, positions = [], []
    for number, point in enumerate(markup["controlPoints"], 1):
        if point.get("positionStatus", "defined") != "defined":
            raise ValueError(f"point {number} is not placed: place or delete it")
        labels.append(str(point.get("label", "")))
        positions.append([float(mm) for mm in point["position"]])
    system = _system(str(markup.get("coordinateSystem", "LPS")))  # LPS by the schema of the format
    return Points(_finite(positions) * _sign(system), tuple(labels), "xyz")


def _read_fcsv(text: str, path: Path, grid: Grid) -> Points:
    comments = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
    told = dict(line.split("=", 1) for line in comments if "=" in line)
    told = {key.strip().lower(): value.strip() for key, value in told.items()}
    if "coordinatesystem" not in told:
        raise ValueError("it does not say its coordinate system")
    columns = told.get("columns", _FCSV_COLUMNS).split(",")
    rows = [row for row in csv.reader(line for line in text.splitlines() if not line.startswith("#")) if row]
    at, label = [columns.index(axis) for axis in "xyz"], columns.index("label") if "label" in columns else None
    positions = [[float(row[column]) for column in at] for row in rows]
    labels = ["" if label is None or label >= len(row) else row[label] for row in rows]
    return Points(_finite(positions) * _sign(_system(told["coordinatesystem"])), tuple(labels), "xyz")


def _read_table(text: str, path: Path, grid: Grid) -> Points:
    rows = [row for row in csv.reader(io.StringIO(text)) if any(cell.strip() for cell in row)]
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    named = [axes for axes in _AXES if set(axes) <= set(header)]
    if len(named) != 1:
        raise MorphSeekError(
            f"{shown(path)} has no header that says what its numbers are; begin it with a line {_HEADERS}."
        )
    axes = named[0]
    at, label = [header.index(axis) for axis in axes], header.index("label") if "label" in header else None
    for row in rows[1:]:
        if len(row) != len(header):
            raise ValueError(f"the line '{','.join(row)}' has {len(row)} values and the header {len(header)}")
    values = _finite([[float(row[column]) for column in at] for row in rows[1:]])
    labels = tuple("" if label is None else row[label].strip() for row in rows[1:])
    return Points(_to_lps(values, axes, grid), labels, axes)


def _to_lps(values: np.ndarray, axes: str, grid: Grid) -> np.ndarray:
    return apply_affine(grid.affine, values) if axes == "ijk" else values * (_FLIP if axes == "ras" else 1.0)


def _finite(values: Sequence[Sequence[float]]) -> np.ndarray:
    if any(len(row) != 3 for row in values) or not np.isfinite(np.array(values, dtype=np.float64)).all():
        raise ValueError("a point must be three finite numbers")
    return np.array(values, dtype=np.float64).reshape(-1, 3)


def _system(name: str) -> str:
    if name.upper() not in _SYSTEMS:
        raise ValueError(f"its coordinate system '{name}' is neither LPS nor RAS")
    return _SYSTEMS[name.upper()]


def _sign(system: str) -> np.ndarray | float:
    return _FLIP if system == "RAS" else 1.0


def _markups(points: Points, grid: Grid) -> str:
    listed = [
        {"id": str(n), "label": label, "position": position, "positionStatus": "defined"}
        for n, (label, position) in enumerate(zip(points.labels, points.positions.tolist(), strict=True), 1)
    ]
    schema = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    markup = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": listed}
    return json.dumps({"@schema": f"{schema}markups-schema-v1.0.3.json#", "markups": [markup]}, indent=1)


def _fcsv(points: Points, grid: Grid) -> str:
    out = io.StringIO()
    out.write(f"# Markups fiducial file version = 5.4\n# CoordinateSystem = LPS\n# columns = {_FCSV_COLUMNS}\n")
    writer = csv.writer(out, lineterminator="\n")
    for n, (label, position) in enumerate(zip(points.labels, points.positions.tolist(), strict=True), 1):
        writer.writerow([n, *map(_exact, position), 0, 0, 0, 1, 1, 1, 0, label, "", ""])
    return out.getvalue()


def _table(points: Points, grid: Grid) -> str:
    values = points.positions
    if points.axes == "ijk":
        values = apply_affine(np.linalg.inv(grid.affine), values)
    elif points.axes == "ras":
        values = values * _FLIP
    named = any(points.labels)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*(["label"] if named else []), *points.axes])
    for label, row in zip(points.labels, values.tolist(), strict=True):
        writer.writerow([*([label] if named else []), *map(_exact, row)])
    return out.getvalue()


def _exact(value: float) -> str:
    """Return a number to a millionth."""
    return f"{0.0 if math.isclose(value, 0, abs_tol=5e-7) else value:.6f}"
