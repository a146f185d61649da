"""Make the bundled checkpoint "hippocampus-mr" from the trained one, with measured figures on its card.

    morphseek warmup hippocampus/dataset.json --config Resources/Training/hippocampus.toml --out warm.safetensors
    morphseek finetune hippocampus/dataset.json --init warm.safetensors \\
        --config Resources/Training/hippocampus-finetune.toml --out supervised.safetensors
    morphseek finetune hippocampus/dataset.json --init supervised.safetensors \\
        --config Resources/Training/hippocampus-finetune-grpo.toml --out trained.safetensors
    morphseek evaluate hippocampus/dataset.json --model trained.safetensors --out figures.json
    python Resources/Training/bundle_hippocampus.py trained.safetensors --figures figures.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from MorphSeekLib.checkpoint import BUNDLED, load, save


def main() -> None:
    """Read, put the figures on the card, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("--figures", type=Path, required=True)
    options = parser.parse_args()
    model, card = load(options.trained)
    figures = json.loads(options.figures.read_text(encoding="utf-8"))
    tested = {k: figures[k] for k in ("dataset", "split", "mean", "std", "definitions", "folding_definition", "steps")}
    results = card.results | {"test": tested | {"pairs": len(figures["pairs"])}}
    title = "Hippocampus MR crops, fine-tuned on 150 labelled cases"
    card = dataclasses.replace(card, title=title, results=results)
    save(BUNDLED / "hippocampus-mr.safetensors", model, card)


if __name__ == "__main__":
    main()
