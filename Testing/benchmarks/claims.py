"""Whether MorphSeek does what is claimed of it: 2 points of Dice more and 30 % less folding, with the same labels.

    python Testing/benchmarks/claims.py RESULTS.json [RESULTS.json ...] [--out FOLDER]

RESULTS.json are of ``main_table.py claims`` (or ``main-table``), one for each seed; the figures of a pair are averaged
over them. Each network of each data set is compared twice, in the best form and in the paper's: with the same network
trained as long in one step (what the paper compares with), and in three steps without a policy (what the policy adds).
Writes claims.md and claims.json into FOLDER, or prints the table.

Pairs share cases, so the intervals are of a bootstrap over cases: as many as there are drawn again, and each pair as
often as its two cases together (the product of how often each was drawn). 95 % by percentiles, 10,000
draws; p is twice the share of draws on the other side of no difference in Dice, corrected over the rows by Holm's
method. Folding is judged by both measures, where a table has both: shares of folded cells, and NJD. "Reached" is said
of the means, "shown" where the interval lies beyond what is claimed, too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from comparison.table import LESS_FOLDING, MORE_DICE

from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.protocol.settings import to_json

FORMS = {"morphseek": "the best form", "paper": "the paper's form"}
BASELINES = {"soft-dice": "one step", "soft-dice-3": "three steps"}
FOLDING = {"folded_percent": "folded cells", "njd_percent": "NJD"}
DRAWS = 10_000


def averaged(results: Sequence[dict], run: str) -> list[dict] | None:
    """Return the pairs of a run, their figures averaged over tables; None where one of these lacks the run."""
    tables = [result["runs"].get(run) for result in results]
    if not all(tables):
        return None
    found = []
    for rows in zip(*(table["pairs"] for table in tables if table), strict=True):
        names = {(row["fixed"], row["moving"]) for row in rows}
        if len(names) != 1:
            raise ValueError(f"the tables have other pairs of {run}")
        figures = ("dice", *(name for name in FOLDING if all(row.get(name) is not None for row in rows)))
        found.append(
            {"fixed": rows[0]["fixed"], "moving": rows[0]["moving"]}
            | {name: float(np.mean([row[name] for row in rows])) for name in figures}
        )
    return found


def weights(pairs: Sequence[dict], draws: int, seed: int = 0) -> np.ndarray:
    """Return how often each pair counts in each draw of cases, (draws, pairs); draws without a pair are left out."""
    cases = sorted({row[side] for row in pairs for side in ("fixed", "moving")})
    place = {case: n for n, case in enumerate(cases)}
    fixed, moving = ([place[row[side]] for row in pairs] for side in ("fixed", "moving"))
    counts = np.random.default_rng(seed).multinomial(len(cases), np.full(len(cases), 1 / len(cases)), draws)
    found = counts[:, fixed] * counts[:, moving]
    return found[found.sum(axis=1) > 0].astype(float)


def compared(new: Sequence[dict], base: Sequence[dict], draws: int = DRAWS) -> dict:
    """Return the differences of two runs on the same pairs, with intervals."""
    if [(r["fixed"], r["moving"]) for r in new] != [(r["fixed"], r["moving"]) for r in base]:
        raise ValueError("the runs are not of the same pairs")
    drawn = weights(new, draws)
    total = drawn.sum(axis=1)
    gains = np.array([one["dice"] - other["dice"] for one, other in zip(new, base, strict=True)])
    by_draw = drawn @ gains / total
    sides = np.mean(by_draw <= 0), np.mean(by_draw >= 0)
    row: dict = {
        "pairs": len(gains),
        "cases": len({r[side] for r in new for side in ("fixed", "moving")}),
        "dice": {"mean": float(gains.mean()), "interval": np.quantile(by_draw, (0.025, 0.975)).tolist()},
        "p": float(min(1.0, 2 * max(min(sides), 1 / draws))),
    }
    for name in FOLDING:
        if name not in new[0] or name not in base[0]:
            continue
        ours, theirs = (np.array([r[name] for r in rows]) for rows in (new, base))
        row[name] = {"before": float(theirs.mean()), "after": float(ours.mean()), "less": None, "interval": None}
        if theirs.sum() > 0:
            folded = drawn @ theirs
            less = 1 - (drawn @ ours)[folded > 0] / folded[folded > 0]
            row[name] |= {"less": 1 - float(ours.sum() / theirs.sum())}
            row[name] |= {"interval": np.quantile(less, (0.025, 0.975)).tolist()}
    return row | verdict(row)


def verdict(row: dict) -> dict[str, bool]:
    """Return whether the claim is reached by the means, and shown by the intervals, in both measures of folding."""
    folding = [row[name] for name in FOLDING if name in row]
    reached, shown = row["dice"]["mean"] >= MORE_DICE, row["dice"]["interval"][0] >= MORE_DICE
    for one in folding:
        reached &= one["less"] is not None and one["less"] >= LESS_FOLDING
        shown &= one["less"] is not None and one["interval"][0] >= LESS_FOLDING
    return {"reached": bool(reached and folding), "shown": bool(shown and folding)}


def holm(p: Sequence[float]) -> list[float]:
    """Return the p values corrected for their number (Holm 1979)."""
    found, most = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda n: p[n])):
        most = max(most, min(1.0, (len(p) - rank) * p[place]))
        found[place] = most
    return found


def judged(results: Sequence[dict], draws: int = DRAWS) -> dict[str, dict]:
    """Return every comparison that the tables allow, by "task, network, form over baseline"."""
    rows: dict[str, dict] = {}
    runs = results[0]["runs"]
    for task, network in dict.fromkeys(tuple(name.split("/")[:2]) for name in runs):
        for form, said in FORMS.items():
            for baseline, over in BASELINES.items():
                new, base = (averaged(results, f"{task}/{network}/{arm}") for arm in (form, baseline))
                if new is not None and base is not None:
                    rows[f"{task}, {network}, {said} over {over}"] = compared(new, base, draws)
    for row, p in zip(rows.values(), holm([row["p"] for row in rows.values()]), strict=True):
        row["p_holm"] = p
    return rows


def markdown(rows: dict[str, dict], seeds: int) -> str:
    """Return the table."""
    lines = [
        f"# What MorphSeek adds ({seeds} seed{'s' if seeds > 1 else ''}; intervals over cases, 95 %)",
        "",
        "| data, network, form over baseline | pairs (cases) | Dice, points | p (Holm) | less folded cells | less NJD "
        "| claim |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        dice, ends = 100 * row["dice"]["mean"], (100 * end for end in row["dice"]["interval"])
        folding = [_less(row.get(measure)) for measure in FOLDING]
        claim = "shown" if row["shown"] else "reached" if row["reached"] else "missed"
        said = f"{dice:+.1f} ({' to '.join(f'{end:+.1f}' for end in ends)})"
        counted = f"{row['pairs']} ({row['cases']})"
        lines.append(f"| {name} | {counted} | {said} | {row['p_holm']:.2g} | {' | '.join(folding)} | {claim} |")
    return "\n".join(lines) + "\n"


def _less(folding: dict | None) -> str:
    if folding is None:
        return "not counted"
    if folding["less"] is None:
        return "nothing folds" if folding["after"] == 0 else f"0 → {folding['after']:.3g} %"
    low, high = (100 * end for end in folding["interval"])
    return f"{100 * folding['less']:.0f} % ({low:.0f} to {high:.0f})"


def main() -> None:
    """Judge, and write or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = judged([json.loads(path.read_text(encoding="utf-8")) for path in options.results])
    text = markdown(rows, len(options.results))
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out / "claims.md", text.encode())
        write_atomically(options.out / "claims.json", to_json(rows, indent=1).encode())


if __name__ == "__main__":
    main()
