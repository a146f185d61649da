"""Make the bundled checkpoint "hippocampus-mr" from the trained one, with measured figures on its card.

    D=hippocampus/dataset.json
    morphseek warmup $D --config hippocampus --out warm.safetensors
    morphseek finetune $D --init warm.safetensors --config hippocampus-finetune --out one.safetensors
    morphseek finetune $D --init one.safetensors --config hippocampus-finetune-grpo --out two.safetensors
    python Resources/Training/bundle_hippocampus.py average one.safetensors two.safetensors --out mean.safetensors
    morphseek finetune $D --init mean.safetensors --config hippocampus-finetune-augmented \\
        --out three.safetensors
    morphseek evaluate $D --model three.safetensors --out figures.json
    python Resources/Training/bundle_hippocampus.py bundle three.safetensors --figures figures.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from MorphSeekLib.networks.model_file import load, save
from MorphSeekLib.protocol.startup import resources


def average(one: Path, two: Path, out: Path) -> None:
    """The mean of two checkpoints' weights, under the second one's card."""
    weights, (model, card) = load(one)[0].state_dict(), load(two)
    model.load_state_dict({name: (value + weights[name]) / 2 for name, value in model.state_dict().items()})
    provenance = card.provenance | {"averaged_with": load(one)[1].provenance}
    save(out, model, dataclasses.replace(card, provenance=provenance))


def bundle(trained: Path, figures: Path) -> None:
    """Put the figures of ``morphseek evaluate`` on the card and write the bundled file."""
    model, card = load(trained)
    found = json.loads(figures.read_text(encoding="utf-8"))
    tested = {k: found[k] for k in ("dataset", "split", "mean", "std", "definitions", "folding_definition", "steps")}
    results = card.results | {"test": tested | {"pairs": len(found["pairs"])}}
    title = "Hippocampus MR crops, fine-tuned on 150 labeled cases"
    save(
        resources() / "Models" / "hippocampus-mr.safetensors",
        model,
        dataclasses.replace(card, title=title, results=results),
    )


def main() -> None:
    """The two verbs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    averaging = verbs.add_parser("average", help="the mean of two checkpoints' weights")
    averaging.add_argument("one", type=Path)
    averaging.add_argument("two", type=Path)
    averaging.add_argument("--out", type=Path, required=True)
    bundling = verbs.add_parser("bundle", help="write the bundled checkpoint")
    bundling.add_argument("trained", type=Path)
    bundling.add_argument("--figures", type=Path, required=True)
    options = parser.parse_args()
    if options.verb == "average":
        average(options.one, options.two, options.out)
    else:
        bundle(options.trained, options.figures)


if __name__ == "__main__":
    main()
