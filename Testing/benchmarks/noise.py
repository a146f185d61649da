"""What faint noise and shading do to a registration: Dice over the brain pairs, by arm and seed.

    python Testing/benchmarks/noise.py [--shared ../shared] [--model auto] [--pairs N] [--seeds 0 1 2]
        [--arms ARM ...] [--out FILE]

Noise is Rician (Gudbjartsson and Patz, 1995), sigma 1 % of the image's range, over the whole image, air included;
bias is a smooth field from 0.8 to 1.2 by which the image is multiplied. Either is put on the fixed image, the moving
image or both, and the pair is registered as a user would, alignment included; "unaligned" is without it. "auto" is what
the command does without options, which is no model for brains; "none" and a model's name choose. Noise and field follow
from seed, pair and side alone. Every row is written when it is known, and rows that the file already holds for this
model are not measured again; delete the file after a change to the code. results/noise.json is of brain-mr's network
alone, before registrations had stages; it is not measured again.

Dice: the mean over labels, nearest-neighbor warped, after the alignment and after the registration.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from pathlib import Path

import torch
from comparison.changes import BIAS, SIGMA, noisy, shaded

from MorphSeekLib.data.datasets import Pair, load_dataset, read_pair
from MorphSeekLib.networks.loading import load_model
from MorphSeekLib.networks.model_file import software, write_atomically
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.startup import AUTO, NO_MODEL
from MorphSeekLib.registration.choice import chosen_model
from MorphSeekLib.registration.pipeline import register

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("fixed", "moving")
SOME = {"fixed": ("fixed",), "moving": ("moving",), "both": SIDES}
ARMS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "clean": ("nothing", (), "auto"),
    **{f"noise {name}": ("noise", sides, "auto") for name, sides in SOME.items()},
    **{f"bias {name}": ("bias", sides, "auto") for name, sides in SOME.items()},
    "noise both unaligned": ("noise", SIDES, "none"),
}
"""Name -> what is done, to which images, and the alignment (auto: as the command chooses)."""


loaded_once = functools.cache(load_model)


def measure(pair: Pair, number: int, arm: str, seed: int, model: str) -> dict:
    """Return the row of one pair, arm and seed."""
    change, sides, align = ARMS[arm]
    (fixed, fixed_labels), (moving, moving_labels) = read_pair(pair)
    images = {"fixed": fixed, "moving": moving}
    for side in sides:
        generator = torch.Generator().manual_seed(1000 * seed + 2 * number + SIDES.index(side))
        images[side] = {"noise": noisy, "bias": shaded}[change](images[side], generator)
    loaded, device, _ = chosen_model(model, list(images.values()), "cpu", load=loaded_once)
    options = RegistrationOptions(align=align, inverse=False)
    labels = fixed_labels, moving_labels
    found = register(images["fixed"], images["moving"], loaded, options, labels=labels, device=device)
    dice = found.report["dice"]["mean"]
    names = {"fixed": pair.fixed.image.name, "moving": pair.moving.image.name}
    return {"arm": arm, "seed": seed, **names, **{stage: round(dice[stage], 5) for stage in ("aligned", "warped")}}


def table(rows: list[dict]) -> list[dict]:
    """Return means by arm: over all rows, and after the registration by seed."""
    means = []
    for arm in ARMS:
        found = [row for row in rows if row["arm"] == arm]
        if not found:
            continue
        mean = {stage: round(statistics.fmean(row[stage] for row in found), 5) for stage in ("aligned", "warped")}
        seeds = sorted({row["seed"] for row in found})
        by_seed = {
            str(seed): round(statistics.fmean(row["warped"] for row in found if row["seed"] == seed), 5)
            for seed in seeds
        }
        means.append({"arm": arm, "rows": len(found), **mean, "by_seed": by_seed})
    return means


def report(rows: list[dict], model: dict) -> dict:
    """Return what the file holds."""
    settings = {"sigma": SIGMA, "bias": BIAS}
    return {"model": model, "settings": settings, "means": table(rows), "rows": rows, "software": software()}


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--model", default="auto", help="auto (default), none, or a model's name or file")
    parser.add_argument("--split", default="registration_test")
    parser.add_argument("--pairs", type=int, help="only the first so many (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, help="default: noise-MODEL.json beside the other results")
    options = parser.parse_args()
    out = options.out or ROOT / f"Testing/benchmarks/results/noise-{Path(options.model).stem}.json"
    sha256 = None if options.model in (AUTO, NO_MODEL) else load_model(options.model, "cpu").sha256
    pairs = load_dataset(options.shared / "data/brain_oasis/dataset.json").split(options.split)[: options.pairs]
    about = {"name": Path(options.model).stem, "sha256": sha256, "split": options.split}
    before = json.loads(out.read_text()) if out.is_file() else {}
    rows = before["rows"] if before.get("model") == about else []
    known = {(row["arm"], row["seed"], row["fixed"], row["moving"]) for row in rows}
    for seed in options.seeds:
        for arm in options.arms:
            if not ARMS[arm][1] and seed != options.seeds[0]:
                continue  # nothing is random in it
            for number, pair in enumerate(pairs):
                if (arm, seed, pair.fixed.image.name, pair.moving.image.name) in known:
                    continue
                rows.append(measure(pair, number, arm, seed, options.model))
                print(rows[-1], flush=True)
                write_atomically(out, (json.dumps(report(rows, about), indent=1) + "\n").encode())
    print(f"{'arm':<22}{'rows':>5}{'aligned':>9}{'Dice':>8}   by seed")
    for row in table(rows):
        by_seed = "  ".join(f"{k}: {v:.4f}" for k, v in row["by_seed"].items())
        print(f"{row['arm']:<22}{row['rows']:>5}{row['aligned']:>9.4f}{row['warped']:>8.4f}   {by_seed}")


if __name__ == "__main__":
    main()
