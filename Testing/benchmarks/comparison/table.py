"""The main table's report of the results there are: table.md, table.tex, labels.md, results.json, a plot a task.

Nothing in it shows a voxel of a scan.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.stats import wilcoxon

from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.measures.metrics import deviation, mean
from MorphSeekLib.protocol.settings import to_dict

from .classical import CLASSICAL
from .scoring import DEFINITIONS

if TYPE_CHECKING:
    from .main_table import MainTableSettings, Run

CENTRAL_ONLY = (
    "Dated 2026-11-26: folding in this table was judged by central differences only, which miss folds that alternate",
    "from voxel to voxel (see MorphSeekLib/measures/folds.py).",
)
FIGURES = ("dice", "hd95", "folded_percent", "njd_percent", "sdlogj", "seconds", "cpu_seconds", "peak_gb")
MORE_DICE, LESS_FOLDING = 0.02, 0.3
"""What is claimed of MorphSeek over its baseline: points of Dice, share of the folding."""
MARKS = "osD^vP*X<>hd8p"
LEAST_DRAWN = 1e-4
CLASSICAL_TITLES = {
    "none": "as the images lie",
    "affine": "affine only",
    "greedy": "greedy",
    "syn": "ANTs SyN (its defaults)",
    "syn-cc": "ANTs SyN (CC, 40x20x5)",
}


@dataclass(frozen=True)
class Row:
    """A run in the table.

    Attributes:
        task, method, arm: their titles.
        mean, std: of the figures over the pairs.
        gain: Dice above the baseline's; None without one.
        less_folding: share of the baseline's NJD that is gone; None without one, or where it had none.
        p: Wilcoxon signed-rank over the pairs against the baseline, of Dice and NJD.
        result: as the run wrote it.
    """

    run: Run
    task: str
    method: str
    arm: str
    mean: dict[str, float]
    std: dict[str, float]
    gain: float | None
    less_folding: float | None
    p: dict[str, float]
    result: dict[str, Any]


def rows_of(settings: MainTableSettings, out: Path) -> list[Row]:
    """The runs that are done, in the order of the settings.

    Raises:
        MorphSeekError: a result of other settings.
    """
    from .main_table import Run, result_of, run_list

    runs = run_list(settings)
    results = {run.name: result_of(settings, run, out) for run in runs}
    rows = []
    for run in runs:
        result = results[run.name]
        if result is None:
            continue
        arm = settings.arms.get(run.arm) if run.method in settings.networks else None
        baseline = results.get(Run(run.task, run.method, arm.baseline).name) if arm and arm.baseline else None
        mean = {name: _mean(result["pairs"], name) for name in FIGURES}
        gain, less, p = None, None, {}
        if baseline is not None:
            base = {name: _mean(baseline["pairs"], name) for name in ("dice", "njd_percent")}
            gain = mean["dice"] - base["dice"]
            less = 1 - mean["njd_percent"] / base["njd_percent"] if base["njd_percent"] > 0 else None
            p = {name: p_value(result["pairs"], baseline["pairs"], name) for name in base}
        rows.append(
            Row(
                run,
                settings.tasks[run.task].title,
                settings.networks[run.method].title if arm else "",
                arm.title if arm else CLASSICAL_TITLES[run.arm],
                mean,
                {name: _std(result["pairs"], name) for name in FIGURES},
                gain,
                less,
                p,
                result,
            )
        )
    return rows


def p_value(pairs: Sequence[dict], others: Sequence[dict], name: str) -> float:
    """Wilcoxon signed-rank over the same pairs; 1 where nothing differs.

    Raises:
        ValueError: other pairs.
    """
    if [(r["fixed"], r["moving"]) for r in pairs] != [(r["fixed"], r["moving"]) for r in others]:
        raise ValueError("the rows are not of the same pairs")
    return signed_rank(*([row[name] for row in rows] for rows in (pairs, others)))


def signed_rank(here: list[float], there: list[float]) -> float:
    """The p of Wilcoxon's signed-rank test of paired values; 1 where none differ, of which the test itself says NaN."""
    return float(wilcoxon(here, there).pvalue) if here != there else 1.0


def write_report(settings: MainTableSettings, out: Path) -> None:
    """Write all files of the report; those of tasks without a result are left out."""
    rows = rows_of(settings, out)
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "table.md": markdown(settings, rows),
        "table.tex": latex(rows),
        "labels.md": labels_table(rows),
        "results.json": json.dumps(_facts(settings, rows), separators=(",", ":")) + "\n",
    }
    for name, text in texts.items():
        write_atomically(out / name, text.encode())
    for task in dict.fromkeys(row.run.task for row in rows):
        plot([row for row in rows if row.run.task == task], out / f"{task}.png")


def markdown(settings: MainTableSettings, rows: Sequence[Row]) -> str:
    """The table, what it is compared with, whether the claim is reached, and the definitions."""
    lines = [f"# {settings.title}", ""]
    if any(math.isnan(row.mean["folded_percent"]) for row in rows):
        lines += [*CENTRAL_ONLY, ""]
    by_processor = settings.threads == 1 and all(row.result["device"] == "cpu" for row in rows)
    for task in dict.fromkeys(row.task for row in rows):
        here = [row for row in rows if row.task == task]
        lines += [
            f"## {task}: {len(here[0].result['pairs'])} pairs",
            "",
            "| network | arm | Dice | HD95 mm | folded cells % | NJD % | SDlogJ | seconds | GB "
            "| trained: iterations, min | parameters | Dice gained | folding gone | p (Dice, NJD) |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in here:
            training = row.result["training"]
            parameters = training.get("parameters", {})
            cells = [
                row.method,
                row.arm,
                f"{row.mean['dice']:.4f} ± {row.std['dice']:.3f}",
                _number(row.mean["hd95"], 2),
                _number(row.mean["folded_percent"], 4),
                f"{row.mean['njd_percent']:.4f}",
                f"{row.mean['sdlogj']:.3f}",
                f"{row.mean['cpu_seconds' if by_processor else 'seconds']:.2f}",
                _number(row.mean["peak_gb"], 2),
                f"{training['iterations']}, {training['minutes']:g}" if "minutes" in training else "",
                f"{parameters['backbone'] + parameters['policy_head']:,}" if parameters else "",
                "" if row.gain is None else f"{100 * row.gain:+.2f}",
                "" if row.less_folding is None else f"{100 * row.less_folding:.0f} %",
                f"{row.p['dice']:.2g}, {row.p['njd_percent']:.2g}" if row.p else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *_claims(here), ""]
    lines += ["## What the columns say", ""]
    lines += [f"- {name}: {text}." for name, text in DEFINITIONS.items()]
    lines += [
        "- Means over the pairs, Dice with its standard deviation. Seconds: one registration, all of it, "
        + ("processor time of one thread" if by_processor else "by the clock")
        + ". GB: the process's largest resident set meanwhile, on a GPU its largest allocation.",
        "- Dice gained (points) and folding gone (share of NJD): against "
        + "; ".join(
            f"'{settings.arms[a.baseline].title}' for '{a.title}'" for a in settings.arms.values() if a.baseline
        )
        + ", the same network. p: Wilcoxon signed-rank over the pairs.",
        "- Trained: iterations, and the minutes that the arm was given after the arm it starts from; iterations are "
        "as many as fit.",
        f"- Seed {settings.seed}. All pairs, settings and versions: results.json; per label: labels.md.",
        "",
    ]
    return "\n".join(lines)


def _claims(rows: Sequence[Row]) -> list[str]:
    """Sentences on what is claimed of the best arms, reached or missed."""
    lines = []
    for row in rows:
        if row.gain is None:
            continue
        some = row.mean["njd_percent"] > 0
        folds = "folds where the baseline has none" if some else "no folds to lose"
        if row.less_folding is not None:
            share = round(100 * row.less_folding)
            folds = f"{abs(share)} % {'less' if share >= 0 else 'more'} folding"
        less = not some if row.less_folding is None else row.less_folding >= LESS_FOLDING
        reached = row.gain >= MORE_DICE and less
        lines.append(
            f"- {row.method}, {row.arm}: {100 * row.gain:+.1f} Dice points, {folds}: "
            f"{'reached' if reached else 'missed'} (+{100 * MORE_DICE:.0f} points and {100 * LESS_FOLDING:.0f} % less)."
        )
    classical = [row for row in rows if not row.method and row.run.arm in CLASSICAL]
    learned = [row for row in rows if row.method]
    if classical and learned:
        best = max(learned, key=lambda row: row.mean["dice"])
        for row in classical:
            p = p_value(best.result["pairs"], row.result["pairs"], "dice")
            word = "above" if best.mean["dice"] > row.mean["dice"] else "below"
            lines.append(
                f"- The best of them ({best.method}, {best.arm}, {best.mean['dice']:.4f}) is {word} {row.arm} "
                f"({row.mean['dice']:.4f}; p {p:.2g})."
            )
    return lines


def latex(rows: Sequence[Row]) -> str:
    """A booktabs table: a line a run, Dice in percent."""
    lines = [
        r"\begin{tabular}{llrrrr}",
        r"\toprule",
        r"Network & Arm & Dice (\%) & HD95 (mm) & NJD (\%) & SDlogJ \\",
    ]
    for task in dict.fromkeys(row.task for row in rows):
        lines += [r"\midrule", rf"\multicolumn{{6}}{{l}}{{{_tex(task)}}} \\"]
        for row in rows:
            if row.task == task:
                figures = [
                    rf"${100 * row.mean['dice']:.2f} \pm {100 * row.std['dice']:.2f}$",
                    _number(row.mean["hd95"], 2),
                    f"{row.mean['njd_percent']:.4f}",
                    f"{row.mean['sdlogj']:.3f}",
                ]
                lines.append(" & ".join([_tex(row.method), _tex(row.arm), *figures]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def labels_table(rows: Sequence[Row]) -> str:
    """Mean Dice of every label, a column a run."""
    lines = ["# Dice per label", ""]
    for task in dict.fromkeys(row.task for row in rows):
        here = [row for row in rows if row.task == task]
        names = list(dict.fromkeys(n for row in here for pair in row.result["pairs"] for n in pair["dice_per_label"]))
        titles = [", ".join(filter(None, (row.method, row.arm))) for row in here]
        lines += [f"## {task}", "", f"| label | {' | '.join(titles)} |", "|---" * (len(here) + 1) + "|"]
        for name in names:
            cells = []
            for row in here:
                found = [p["dice_per_label"][name] for p in row.result["pairs"] if name in p["dice_per_label"]]
                cells.append(f"{statistics.fmean(found):.3f}" if found else "")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Dice against folding, a point a run: the color says the network, the mark the arm."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(7, 5.5))
    axes = figure.subplots()
    networks = list(dict.fromkeys(row.method for row in rows))
    arms = list(dict.fromkeys(row.arm for row in rows))
    colors = {name: f"C{number}" for number, name in enumerate(networks)}
    marks = {name: MARKS[number % len(MARKS)] for number, name in enumerate(arms)}
    for row in rows:
        x = max(row.mean["njd_percent"], LEAST_DRAWN)
        axes.plot(x, row.mean["dice"], marks[row.arm], color=colors[row.method], markersize=8)
    axes.set_xscale("log")
    axes.set(xlabel=f"NJD, % of voxels (drawn as {LEAST_DRAWN:g} where less)", ylabel="Dice", title=rows[0].task)
    axes.grid(alpha=0.3)
    legend = [Line2D([], [], color=c, marker="o", ls="", label=n or "no network") for n, c in colors.items()]
    legend += [Line2D([], [], color="0.4", marker=m, ls="", label=n) for n, m in marks.items()]
    axes.legend(handles=legend, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _facts(settings: MainTableSettings, rows: Sequence[Row]) -> dict[str, Any]:
    """All figures, rounded to what they mean."""
    return {
        "settings": to_dict(settings),
        "definitions": DEFINITIONS,
        "runs": {
            row.run.name: {
                "mean": _rounded(row.mean),
                "std": _rounded(row.std),
                "gain": _rounded(row.gain),
                "less_folding": _rounded(row.less_folding),
                "p": row.p,
                **{k: v for k, v in row.result.items() if k not in ("settings", "pairs")},
                "pairs": _rounded(row.result["pairs"]),
            }
            for row in rows
        },
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None  # JSON knows no NaN
    return value


def _mean(pairs: Sequence[dict], name: str) -> float:
    """Mean over the pairs that have the figure; NaN without any."""
    found = mean(row.get(name) for row in pairs)
    return math.nan if found is None else found


def _std(pairs: Sequence[dict], name: str) -> float:
    """Standard deviation over the pairs that have the figure; NaN without any."""
    found = deviation(row.get(name) for row in pairs)
    return math.nan if found is None else found


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _tex(text: str) -> str:
    return text.replace("&", r"\&").replace("%", r"\%").replace("_", r"\_")
