"""What an estimated error is worth: weights and offsets from pairs whose error is known, figures on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls
from scipy.stats import rankdata, spearmanr

from MorphSeekLib.registration.calibrated import DECILES, Kind
from MorphSeekLib.registration.trust import ADDED, LEAST
from MorphSeekLib.registration.trust_map import NEAR_MM, NEAR_VOXELS

UNLIKENESS = 0.2
"""The least weight of unlikeness where the kind is unknown: simulated pairs weigh it less than real pairs of people do
(Docs/trust.md), and what a lesion or a resection changes shows in it first."""
COVERED, PRECISE, ENOUGH = (0.75, 0.95), 0.9, 8
"""Millimeters are told where, over so many unseen pairs, the 80 % bound covers a share in this range, and at least this
share of what is said to be near is."""
FEW = 30
"""Places of either class, below which a pair has no AUROC."""


@dataclass(frozen=True)
class Measured:
    """What a benchmark keeps of a registration: at blocks of a simulated pair, or at surface voxels of a real one.

    Attributes:
        maps: (3, n) quantities.
        error: (n,) mm: the true error, or the distance of label surfaces.
        rivals: what else may tell of errors, name -> (n,), larger where more error is expected.
        group: (n,) int: 1 in changed regions of a simulated pair; the patch of a real one.
        about: voxel (mm), seconds of the registration and of the estimate, and the median error before it, mm.
    """

    maps: np.ndarray
    error: np.ndarray
    rivals: dict[str, np.ndarray]
    group: np.ndarray
    about: dict[str, float]

    def save(self, file: Path) -> None:
        """Write a file, whole or not at all."""
        part = file.with_suffix(".part.npz")
        named = {f"rival {key}": value for key, value in self.rivals.items()}
        named |= {f"about {key}": np.float64(value) for key, value in self.about.items()}
        np.savez_compressed(part, maps=self.maps, error=self.error, group=self.group, **named)
        part.replace(file)

    @classmethod
    def load(cls, file: Path) -> Measured:
        """Read a file."""
        with np.load(file) as saved:
            named = {key: saved[key] for key in saved.files}
        rivals = {key[6:]: value for key, value in named.items() if key.startswith("rival ")}
        about = {key[6:]: float(value) for key, value in named.items() if key.startswith("about ")}
        return cls(named["maps"], named["error"], rivals, named["group"], about)


def logs(pair: Measured) -> np.ndarray:
    """Return (3, n) logarithms of the quantities."""
    return np.log(pair.maps + np.array(ADDED)[:, None])


def target(pair: Measured) -> np.ndarray:
    """Return (n,) logarithms of the error in voxels."""
    return np.log(pair.error / pair.about["voxel"] + ADDED[0])


def fitted_weights(pairs: Sequence[Measured], least: float = 0.0) -> tuple[float, float, float]:
    """Return weights, none below 0 and that of unlikeness not below ``least``, by least squares over places."""
    values = np.concatenate(
        [np.vstack([logs(pair), np.ones(pair.error.size), -np.ones(pair.error.size)]) for pair in pairs], 1
    )
    wanted = np.concatenate([target(pair) for pair in pairs])
    found = nnls(values.T, wanted)[0]
    if found[2] < least:
        kept = np.delete(values, 2, axis=0)
        found = np.insert(nnls(kept.T, wanted - least * values[2])[0], 2, least)
    first, second, third = (round(float(weight), 3) for weight in found[:3])
    return first, second, third


def fitted_offsets(pairs: Sequence[Measured], weights: Sequence[float]) -> tuple[float, ...]:
    """Return the deciles of what is left of the logarithm of the error, each pair counting the same."""
    levels = np.linspace(0, 1, 1001)
    left = np.concatenate([np.quantile(target(pair) - np.array(weights) @ logs(pair), levels) for pair in pairs])
    return tuple(round(float(value), 4) for value in np.quantile(left, DECILES))


def pooled_fit(groups: Sequence[Sequence[Measured]]) -> tuple[tuple[float, float, float], tuple[float, ...]]:
    """Return weights and offsets of all kinds together."""
    pairs = [pair for group in groups for pair in group]
    weights = fitted_weights(pairs, UNLIKENESS)
    return weights, fitted_offsets(pairs, weights)


def calibrated_kind(by_preset: Mapping[str, Sequence[Measured]]) -> Kind:
    """Return a kind's weights, and its offsets by preset."""
    weights = fitted_weights([pair for pairs in by_preset.values() for pair in pairs])
    offsets = {preset: fitted_offsets(pairs, weights) for preset, pairs in by_preset.items()}
    return Kind(weights=weights, offsets=offsets, pairs={preset: len(pairs) for preset, pairs in by_preset.items()})


def bounds(pair: Measured, weights: Sequence[float], offset: float) -> np.ndarray:
    """Return (n,) mm, as :func:`MorphSeekLib.registration.trust.bound` does."""
    return pair.about["voxel"] * np.maximum(LEAST, np.exp(np.array(weights) @ logs(pair) + offset) - ADDED[0])


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """Return how well a score finds the positives; NaN where either class is rare."""
    count, rest = int(positive.sum()), int((~positive).sum())
    if min(count, rest) < FEW:
        return float("nan")
    return float((rankdata(score)[positive].sum() - count * (count + 1) / 2) / (count * rest))


def pinball(error: np.ndarray, bound: np.ndarray | float, share: float = 0.8) -> float:
    """Return the loss that is least for the quantile of a share."""
    return float(np.mean(np.where(error > bound, share * (error - bound), (1 - share) * (bound - error))))


def simulated_figures(
    pairs: Sequence[Measured],
    weights: Sequence[float],
    offsets: Sequence[float],
    others: Sequence[Sequence[Measured]],
) -> dict[str, object]:
    """Return the figures on pairs whose error is known; means over pairs, lengths in mm.

    Args:
        pairs: that the offsets did not see.
        weights, offsets: of their kind.
        others: calibration pairs of other anatomies.
    """
    rows = [_row(pair, weights, offsets) for pair in pairs]
    found: dict[str, object] = {"pairs": len(rows), **{k: _mean([row[k] for row in rows]) for k in rows[0]}}
    found["worst pair, 80 % bound covers"] = round(min(row["covered 80"] for row in rows), 3)
    error = np.concatenate([pair.error for pair in pairs])
    found["pinball of the best constant"] = round(
        float(np.mean([pinball(pair.error, float(np.quantile(error, 0.8))) for pair in pairs])), 3
    )
    if others:
        foreign, deciles = pooled_fit(others)
        covered = [np.mean(pair.error <= bounds(pair, foreign, deciles[7])) for pair in pairs]
        found["covered 80, offsets of other anatomies"] = _mean(covered)
    return found


def holds(figures: Mapping[str, object]) -> bool:
    """Return whether the figures of :func:`simulated_figures` are good enough for millimeters to be told."""
    pairs, covered, true = (figures[name] for name in ("pairs", "covered 80", "said near, true"))
    numbers = all(isinstance(value, (int, float)) for value in (pairs, covered, true))
    return numbers and pairs >= ENOUGH and COVERED[0] <= covered <= COVERED[1] and true >= PRECISE  # type: ignore[operator]


def _row(pair: Measured, weights: Sequence[float], offsets: Sequence[float]) -> dict[str, float]:
    voxel, error = pair.about["voxel"], pair.error
    score = np.array(weights) @ logs(pair)
    b50, b80, b90 = (bounds(pair, weights, offsets[n]) for n in (4, 7, 8))
    near = max(NEAR_MM, NEAR_VOXELS * voxel)
    large, said = error > 2 * voxel, b80 <= near
    worst = score >= np.quantile(score, 0.9)
    row = {
        "median error": float(np.median(error)),
        "spearman": float(spearmanr(score, error)[0]),
        "auroc": auroc(score, large),
        "covered 50": float(np.mean(error <= b50)),
        "covered 80": float(np.mean(error <= b80)),
        "covered 90": float(np.mean(error <= b90)),
        "said near": float(said.mean()),
        "near": float(np.mean(error <= near)),
        "said near, true": float(np.mean(error[said] <= near)) if said.sum() >= FEW else float("nan"),
        "near, said": float(np.mean(said[error <= near])) if (error <= near).sum() >= FEW else float("nan"),
        "pinball": pinball(error, b80),
        "worst tenth, times the share of large errors": float(large[worst].mean() / large.mean())
        if large.sum() >= FEW
        else float("nan"),
        "times the fit": pair.about["trust seconds"] / pair.about["fit seconds"],
    }
    if 0 < pair.group.mean() < 1:
        for name, where in (("changed regions", pair.group > 0), ("elsewhere", pair.group == 0)):
            row |= {
                f"median error, {name}": float(np.median(error[where])),
                f"median 50 % bound, {name}": float(np.median(b50[where])),
            }
    for name, values in pair.rivals.items():
        row |= {f"spearman, {name}": float(spearmanr(values, error)[0]), f"auroc, {name}": auroc(values, large)}
    return row


def real_figures(pairs: Sequence[Measured], weights: Sequence[float], offsets: Sequence[float]) -> dict[str, object]:
    """Return the figures on real pairs, against the distances of label surfaces; means over pairs."""
    rows = []
    for pair in pairs:
        score, large = np.array(weights) @ logs(pair), pair.error > 2 * pair.about["voxel"]
        bound = bounds(pair, weights, offsets[7])
        patches = [_patch_means(pair.group, values) for values in (score, pair.error)]
        row = {
            "median distance": float(np.median(pair.error)),
            "median 80 % bound": float(np.median(bound)),
            "spearman": float(spearmanr(score, pair.error)[0]),
            "spearman of patches": float(spearmanr(*patches)[0]),
            "auroc": auroc(score, large),
            "covered 80": float(np.mean(pair.error <= bound)),
            "times the fit": pair.about["trust seconds"] / pair.about["fit seconds"],
        }
        for name, values in pair.rivals.items():
            row[f"spearman of patches, {name}"] = float(spearmanr(_patch_means(pair.group, values), patches[1])[0])
        for number, name in enumerate(("inconsistency", "spread", "unlikeness")):
            row[f"spearman of patches, {name} alone"] = float(
                spearmanr(_patch_means(pair.group, pair.maps[number]), patches[1])[0]
            )
        rows.append(row)
    return {"pairs": len(rows), **{key: _mean([row[key] for row in rows]) for key in rows[0]}}


def _patch_means(group: np.ndarray, values: np.ndarray, least: int = 5) -> np.ndarray:
    """Return means over patches that hold so many places."""
    _, index, count = np.unique(group, return_inverse=True, return_counts=True)
    return (np.bincount(index, values) / count)[count >= least]


def _mean(values: Sequence[float]) -> float | None:
    """Return the mean of what is known, in three digits."""
    finite = [value for value in values if np.isfinite(value)]
    return round(float(np.mean(finite)), 3) if finite else None


_SIMULATED = {
    "simulated pairs": ("pairs",),
    "median error, mm": ("median error",),
    "Spearman": ("spearman",),
    "distance to the nearest edge / local deviation / displacement": (
        "spearman, edge",
        "spearman, flat",
        "spearman, length",
    ),
    "AUROC, error above 2 voxels": ("auroc",),
    "the same three": ("auroc, edge", "auroc, flat", "auroc, length"),
    "inside the 50 / 80 / 90 % bound": ("covered 50", "covered 80", "covered 90"),
    "worst pair, 80 % bound": ("worst pair, 80 % bound covers",),
    "80 % bound, offsets of other anatomies": ("covered 80, offsets of other anatomies",),
    "said near / of these true / of the near said": ("said near", "said near, true", "near, said"),
    "near": ("near",),
    "pinball loss, mm / of the best constant": ("pinball", "pinball of the best constant"),
    "worst tenth, times the share of large errors": ("worst tenth, times the share of large errors",),
    "median error / 50 % bound in changed regions, mm": (
        "median error, changed regions",
        "median 50 % bound, changed regions",
    ),
    "seconds, times those of search, steps and fit": ("times the fit",),
}
_REAL = {
    "real pairs": ("pairs",),
    "median distance of surfaces / 80 % bound, mm": ("median distance", "median 80 % bound"),
    "Spearman of patches of 6 voxels": ("spearman of patches",),
    "the same three rivals": (
        "spearman of patches, edge",
        "spearman of patches, flat",
        "spearman of patches, length",
    ),
    "Spearman of surface voxels": ("spearman",),
    "inside the 80 % bound": ("covered 80",),
}


def table(kinds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return figures by kind and preset as a table in Markdown."""
    columns = [(name, preset, row) for name, by_preset in kinds.items() for preset, row in by_preset.items()]
    lines = ["| | " + " | ".join(f"{name}, {preset}" for name, preset, _ in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    lines.append("| pairs calibrated on | " + " | ".join(str(row["calibrated on"]) for *_, row in columns) + " |")
    lines.append("| millimeters are told | " + " | ".join("yes" if row["told"] else "no" for *_, row in columns) + " |")
    for section, named in (("simulated", _SIMULATED), ("real", _REAL)):
        for title, keys in named.items():
            cells = [" / ".join(_text(row.get(section, {}).get(key)) for key in keys) for *_, row in columns]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _text(value: float | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
