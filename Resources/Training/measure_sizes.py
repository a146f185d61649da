"""Write on a checkpoint's card how large the objects are that it was trained on; its weights stay as they are.

    python Resources/Training/measure_sizes.py Resources/Models/hippocampus-mr.safetensors hippocampus/dataset.json
    python Resources/Training/measure_sizes.py Resources/Models/brain-mr.safetensors brain_labels

Trainings do so themselves (``preprocessing.knows``); this is for models that were trained before they did.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from MorphSeekLib.data.datasets import known_sizes, load_dataset
from MorphSeekLib.networks.model_file import read_card, rewrite_card, weights_sha256


def main() -> None:
    """Measure, rewrite the card, say what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("dataset", type=Path, help="the training data: dataset.json or a folder of label maps")
    options = parser.parse_args()
    card, weights = read_card(options.model), weights_sha256(options.model)
    anatomy = None
    if card.provenance.get("synthetic"):
        anatomy = card.provenance["settings"]["synthesis"]["anatomy"]
    knows = known_sizes(load_dataset(options.dataset).split("training", "cases"), anatomy, most=1000)
    preprocessing = dataclasses.replace(card.preprocessing, knows=knows)
    rewrite_card(options.model, dataclasses.replace(card, preprocessing=preprocessing))
    if weights_sha256(options.model) != weights:
        raise SystemExit(f"The weights of {options.model} were changed; take the old file again.")
    print(f"{options.model.name}: objects of {knows[0]:g} to {knows[1]:g} mm; weights {weights}")


if __name__ == "__main__":
    main()
