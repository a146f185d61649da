"""Make the bundled checkpoint from the trained one: the working grid it is used on, and measured figures on its card.

    python Resources/Training/bundle_brain_mr.py TRAINED.safetensors [--figures brain_model.json]

The network was trained at 2 mm. On the two validation pairs of brain_oasis (which no training saw) it did better on a
finer grid: mean Dice 0.607 at 2 mm, 0.632 at 1.5 mm (two steps each; 0.518 before; three steps: 0.600 and 0.621). So
1.5 mm and two steps it is. Figures come from Testing/benchmarks/brain_model.py, run on the bundle without figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from MorphSeekLib.networks.model_file import load, save
from MorphSeekLib.protocol.startup import resources

SPACING, SHAPE, STEPS = (1.5, 1.5, 1.5), (128, 160, 128), 2


def main() -> None:
    """Read, change the card, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("--figures", type=Path)
    options = parser.parse_args()
    model, card = load(options.trained)
    trained_on = card.preprocessing
    preprocessing = dataclasses.replace(trained_on, spacing=SPACING, shape=SHAPE, steps=STEPS)
    provenance = card.provenance | {
        "training_grid": {"spacing": trained_on.spacing, "shape": trained_on.shape},
        "working_grid_chosen_on": "brain_oasis, split registration_val",
    }
    results = json.loads(options.figures.read_text(encoding="utf-8")) if options.figures else {}
    results = {k: v for k, v in results.items() if k != "model"}
    card = dataclasses.replace(card, preprocessing=preprocessing, provenance=provenance, results=results)
    save(resources() / "Models" / "brain-mr.safetensors", model, card)


if __name__ == "__main__":
    main()
