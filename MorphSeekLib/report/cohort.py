"""The report of a batch: cohort.csv for programs and cohort.html for people, the worst pairs first."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from ..io.files import write_atomically
from ..protocol.batch import Outcome
from ..protocol.report import Report
from ..protocol.verdict import DEFAULT_LIMITS, HEADLINES, figures, folds, judge
from ..space.geometry import Volume

COLUMNS = (
    *("name", "state", "color", "verdict", "fixed", "moving", "dice_before", "dice_aligned", "dice"),
    *("folded_percent", "no_fold_proven", "njd_percent", "sdlogj", "similarity_before", "similarity_after"),
    *("largest_region_mm3", "trust_p80_mm", "seconds", "outlier", "report", "problem"),
)
"""Of cohort.csv, in this order."""
WORSE = {"dice": -1, "similarity_after": -1, "folded_percent": 1, "njd_percent": 1, "sdlogj": 1, "seconds": 1}
"""The figures in which outliers are looked for, and the side on which they are worse."""
FAR = 3.5
"""Robust standard deviations (1.4826 times the median absolute deviation) from the median that make an outlier."""
RULE = (
    f"An outlier lies more than {FAR} robust standard deviations (1.4826 times the median absolute deviation) from "
    "the median of all pairs, on the worse side; where more than half of the pairs are equal, every one that is worse."
)
_ICONS = {"red": "■", "amber": "▲", "green": "●", None: "○"}
_ORDER = {"failed": 0, "red": 1, "amber": 2, None: 3, "green": 4}
_SIDE = 96  # pixels of each of a thumbnail's three slices


def cohort_row(report: Report) -> dict[str, Any]:
    """Return a pair's row from its report, without what only the batch knows."""
    values = figures(report)
    verdict = judge(values, DEFAULT_LIMITS, folds(report))
    words = [HEADLINES[verdict.color], *(one.sentence() for one in verdict.beyond)]
    overlap = report["dice"]
    dice = overlap["mean"] if overlap is not None else {}
    similarity = report["similarity"]
    error = report["trust"]["error_mm"] if "trust" in report else None
    before = similarity["input"] if similarity["input"] is not None else similarity["aligned"]
    return {
        "color": verdict.color,
        "verdict": " ".join(words),
        "fixed": report["fixed"].get("path", ""),
        "moving": report["moving"].get("path", ""),
        "dice_before": dice.get("input"),
        "dice_aligned": dice.get("aligned"),
        "dice": dice.get("warped"),
        "folded_percent": values["folded_percent"],
        "no_fold_proven": report["folding"]["cells"]["no_fold_proven"],
        "njd_percent": values["njd_percent"],
        "sdlogj": values["sdlogj"],
        "similarity_before": before,
        "similarity_after": similarity["warped"],
        "largest_region_mm3": values["largest_region_mm3"],
        "trust_p80_mm": None if error is None else error["p80"],
        "seconds": report["seconds"]["total"],
        "report": "report.html" if "report.html" in report["files"] else "report.json",
    }


def thumbnail(fixed: Volume, warped: Volume) -> bytes:
    """Return a JPEG of three slices of the warped image, with the outlines of the fixed image drawn over them."""
    values, outline = _scaled(warped.data.numpy()), _outline(fixed.data.numpy())
    spacing = fixed.grid.spacing
    tiles = []
    for axis in (2, 1, 0):
        at = values.shape[axis] // 2
        gray = np.take(values, at, axis).T[::-1]
        edge = np.take(outline, at, axis).T[::-1]
        color = np.repeat(gray[..., None], 3, -1)
        color[edge] = (255, 200, 0)
        first, second = (s for i, s in enumerate(spacing) if i != axis)
        size = gray.shape[1] * first, gray.shape[0] * second
        scale = _SIDE / max(size)
        tile = Image.new("RGB", (_SIDE, _SIDE))
        small = Image.fromarray(color).resize((max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
        tile.paste(small, ((_SIDE - small.width) // 2, (_SIDE - small.height) // 2))
        tiles.append(tile)
    row = Image.new("RGB", (_SIDE * len(tiles), _SIDE))
    for index, tile in enumerate(tiles):
        row.paste(tile, (index * _SIDE, 0))
    buffer = io.BytesIO()
    row.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _scaled(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values[::2, ::2, ::2], (1, 99.5))
    return (np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)


def _outline(values: np.ndarray) -> np.ndarray:
    """Return the border of what is brighter than the mean."""
    smooth = ndimage.gaussian_filter(values.astype(np.float32), 1.0)
    inside = smooth > smooth.mean()
    return inside & ~ndimage.binary_erosion(inside)


def outliers(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return for each pair's name the figures in which it is an outlier, see :data:`RULE`."""
    found: dict[str, list[str]] = {}
    for figure, sign in WORSE.items():
        known = [(row["name"], row[figure]) for row in rows if isinstance(row.get(figure), (int, float))]
        if len(known) < 5:
            continue
        middle = statistics.median(value for _, value in known)
        spread = 1.4826 * statistics.median(abs(value - middle) for _, value in known)
        for name, value in known:
            if sign * (value - middle) > FAR * spread:
                found.setdefault(name, []).append(figure)
    return found


def write_cohort(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Write cohort.csv and cohort.html of all pairs that were tried, the worst first, unless they are there.

    Raises:
        MorphSeekError: a file cannot be written.
    """
    rows: list[dict[str, Any]] = [
        {**outcome.figures, "name": outcome.name, "state": outcome.state, "problem": outcome.problem}
        for outcome in outcomes
    ]
    far = outliers(rows)
    for row in rows:
        row["outlier"] = " ".join(far.get(row["name"], ()))
        if row["state"] == "done":
            row["report"] = f"{row['name']}/{row.get('report', 'report.json')}"
    rows.sort(key=_badness)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode()
    table, page = folder / "cohort.csv", folder / "cohort.html"
    if page.is_file() and table.is_file() and table.read_bytes() == content:
        return
    write_atomically(page, _page(folder, rows).encode("utf-8", "replace"))
    write_atomically(table, content)


def _badness(row: Mapping[str, Any]) -> tuple[object, ...]:
    color = "failed" if row["state"] == "failed" else row.get("color")
    figure = row.get("similarity_after")
    likeness = row["dice"] if isinstance(row.get("dice"), float) else figure if isinstance(figure, float) else math.inf
    far = sum(figure != "seconds" for figure in row["outlier"].split())
    return _ORDER[color], -far, likeness, row["name"]


_SHOWN = {
    "dice_before": "Dice before", "dice": "Dice", "folded_percent": "Folded cells, %", "njd_percent": "NJD, %",
    "sdlogj": "SDlogJ", "similarity_before": "Similarity before", "similarity_after": "Similarity after",
    "largest_region_mm3": "Largest folded region, mm³", "trust_p80_mm": "Estimated error (80 %), mm",
    "seconds": "Seconds",
}  # fmt: skip
_STYLE = """body{font:14px sans-serif;margin:1.5em;color:#222;background:#fff}table{border-collapse:collapse}
th,td{padding:4px 8px;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
th{position:sticky;top:0;background:#fff}td.n{text-align:right;font-variant-numeric:tabular-nums}
.red,.failed{color:#b00020}.amber{color:#8a5a00}.green{color:#0a6b2d}.far{background:#ffe9c7}
img{display:block;width:288px;height:96px}.words{max-width:26em}svg{margin-right:1em}"""


def _page(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    failed = sum(row["state"] == "failed" for row in rows)
    counts = {color: sum(row.get("color") == color for row in rows) for color in ("red", "amber", "green")}
    words = ", ".join(f"{count} {color}" for color, count in counts.items())
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("Pair", "", *_SHOWN.values(), "Verdict"))
    charts = "".join(_histogram(title, [row.get(name) for row in rows]) for name, title in _SHOWN.items())
    body = "".join(_row(folder, row) for row in rows)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Cohort</title><style>{_STYLE}</style>'
        f"<h1>{len(rows)} pairs: {words}, {failed} failed</h1><p>For research, not for diagnosis. The worst first. The "
        f"outlines of the fixed image are drawn over the warped one. {RULE} Such figures are shaded.</p>"
        f"<div>{charts}</div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></html>"
    )


def _row(folder: Path, row: Mapping[str, Any]) -> str:
    color = "failed" if row["state"] == "failed" else row.get("color")
    name, far = html.escape(row["name"]), row["outlier"].split()
    picture = folder / row["name"] / "thumbnail.jpg"
    shown = ""
    if row["state"] == "done":
        name = f'<a href="{html.escape(row["report"])}">{name}</a>'
        if picture.is_file():
            data = base64.b64encode(picture.read_bytes()).decode("ascii")
            shown = f'<img alt="" src="data:image/jpeg;base64,{data}">'
    cells = ""
    for figure in _SHOWN:
        value = row.get(figure)
        text = "–" if not isinstance(value, (int, float)) else f"{value:.4g}"
        cells += f'<td class="n{" far" if figure in far else ""}">{text}</td>'
    icon = "✕" if color == "failed" else _ICONS[color]
    words = f"Failed: {row['problem']}" if color == "failed" else row.get("verdict", "")
    return f'<tr><td>{name}</td><td>{shown}</td>{cells}<td class="words {color}">{icon} {html.escape(words)}</td></tr>'


def _histogram(title: str, values: Sequence[Any], bins: int = 20) -> str:
    """Return a small drawing of how a figure is distributed."""
    known = [float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    if len(known) < 2:
        return ""
    counts, _ = np.histogram(known, bins)
    bars = "".join(
        f'<rect x="{8 * index}" y="{60 - 50 * count / counts.max():.1f}" width="7" '
        f'height="{50 * count / counts.max():.1f}" fill="#4477aa"/>'
        for index, count in enumerate(counts)
    )
    return (
        f'<svg width="{8 * bins}" height="90" role="img"><title>{html.escape(title)}</title>{bars}'
        f'<text x="0" y="74" font-size="11">{html.escape(title)}</text>'
        f'<text x="0" y="88" font-size="11">{min(known):.3g} to {max(known):.3g}, '
        f"median {statistics.median(known):.3g}</text></svg>"
    )
