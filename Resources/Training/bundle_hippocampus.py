"""Make the bundled checkpoint "hippocampus-mr" from the trained one, with measured figures on its card.

    D=hippocampus/dataset.json
    morphseek warmup $D --config hippocampus --out warm.safetensors
    morphseek finetune $D --init warm.safetensors --config hippocampus-finetune --out one.safetensors
    morphseek finetune $D --init one.safetensors --config hippocampus-finetune-grpo --out two.safetensors
    python Resources/Training/bundle_hippocampus.py average one.safetensors two.safetensors --out mean.safetensors
    morphseek finetune $D --init mean.safetensors --config hippocampus-finetune-augmented \\
        --out three.safetensors
    python Resources/Training/bundle_hippocampus.py features $D --like three.safetensors --minutes 34 --width 12 \\
        --out first.safetensors
    python Resources/Training/bundle_hippocampus.py widen first.safetensors --width 16 --out wide.safetensors
    python Resources/Training/bundle_hippocampus.py features $D --like three.safetensors --init wide.safetensors \\
        --minutes 95 --width 16 --out features.safetensors
    python Resources/Training/bundle_hippocampus.py join three.safetensors features.safetensors --share 0.8 \\
        --out joined.safetensors
    morphseek evaluate $D --model joined.safetensors --out figures.json
    python Resources/Training/bundle_hippocampus.py bundle joined.safetensors --figures figures.json

The finder's minutes are of processor time of one thread, the first 34 with AVX-512 BF16, the 95 without. The share was
chosen on pairs of registration_val. "widen" and "join" also take the bundled file, for the network that it holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch

from MorphSeekLib.app.runs import stage_settings
from MorphSeekLib.backbones.segmenter import Segmenter, SegmenterSettings
from MorphSeekLib.data.datasets import load_dataset
from MorphSeekLib.networks.model_file import load, read_card, save
from MorphSeekLib.networks.policy import ModelSettings, RegistrationModel
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.options import TrainingOptions
from MorphSeekLib.protocol.settings import override, to_dict
from MorphSeekLib.protocol.startup import resources
from MorphSeekLib.training.segmentation import Segmentation, SegmentationConfig
from MorphSeekLib.training.trainer import Trainer


def average(one: Path, two: Path, out: Path) -> None:
    """The mean of two checkpoints' weights, under the second one's card."""
    weights, (model, card) = load(one)[0].state_dict(), load(two)
    model.load_state_dict({name: (value + weights[name]) / 2 for name, value in model.state_dict().items()})
    provenance = card.provenance | {"averaged_with": load(one)[1].provenance}
    save(out, model, dataclasses.replace(card, provenance=provenance))


def widen(narrow: Path, width: int, out: Path) -> None:
    """Give a network that finds labels more channels, which change nothing until they are trained."""
    source, card = load(narrow)
    found = source.finder or source.backbone
    assert isinstance(found, Segmenter)
    assert isinstance(found.settings, SegmenterSettings)
    torch.manual_seed(0)
    network = RegistrationModel(ModelSettings("segmenter", to_dict(found.settings) | {"width": width}))
    wide = network.backbone.state_dict()
    for name, known in found.state_dict().items():
        new, out_channels = wide[name], len(known)
        if known.ndim == 1:
            new[:out_channels] = known
            continue
        read = torch.arange(known.shape[1])
        if name.startswith("up") and name.endswith(".0.weight"):  # two of three channels come from below
            read[2 * len(read) // 3 :] += 2 * (new.shape[1] - len(read)) // 3
        new[:out_channels] = 0
        new[:out_channels, read] = known
    network.backbone.load_state_dict(wide)
    provenance = card.provenance.get("finder", card.provenance)
    save(out, network, dataclasses.replace(card, model=network.settings, share=1.0, results={}, provenance=provenance))


def features(dataset: Path, like: Path, init: Path | None, width: int, minutes: float, out: Path) -> None:
    """Train a network that finds the labels in images as a model's card prepares them, or go on with one."""
    torch.set_num_threads(1)
    options = TrainingOptions("finder", str(dataset), out.name, stages=("features",), spacing=1.0)
    config = stage_settings(options)["features"]
    assert isinstance(config, SegmentationConfig)
    config = dataclasses.replace(config, preprocessing=read_card(like).preprocessing, width=width)
    config = override(config, "training", minutes=minutes, validation_pairs=12)
    task = Segmentation(load_dataset(dataset), config, torch.device("cpu"), init)
    Trainer(task, out, Job(lambda event: print(event.message, flush=True)), clock=time.process_time).run()


def join(moves: Path, finds: Path, share: float, out: Path) -> None:
    """Put a network that finds labels beside one that moves; the answer is the mean of both, see Card.share."""
    (model, card), (finder, found) = load(moves), load(finds)
    assert isinstance(finder.backbone, Segmenter)
    provenance = card.provenance | {"finder": found.provenance}
    joined = dataclasses.replace(
        card,
        labels=found.labels,
        volumes=found.volumes,
        fewest=found.fewest,
        compare="features",
        share=share,
        fit=True,
        provenance=provenance,
    )
    save(out, model.with_finder(finder.backbone), joined)


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
    """The verbs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    averaging = verbs.add_parser("average", help="the mean of two checkpoints' weights")
    averaging.add_argument("one", type=Path)
    averaging.add_argument("two", type=Path)
    averaging.add_argument("--out", type=Path, required=True)
    finding = verbs.add_parser("features", help="train the network that finds labels")
    finding.add_argument("dataset", type=Path)
    finding.add_argument("--like", type=Path, required=True)
    finding.add_argument("--init", type=Path)
    finding.add_argument("--width", type=int, default=12)
    finding.add_argument("--minutes", type=float, required=True)
    finding.add_argument("--out", type=Path, required=True)
    widening = verbs.add_parser("widen", help="give that network more channels")
    widening.add_argument("narrow", type=Path)
    widening.add_argument("--width", type=int, required=True)
    widening.add_argument("--out", type=Path, required=True)
    joining = verbs.add_parser("join", help="put it beside the network that moves")
    joining.add_argument("moves", type=Path)
    joining.add_argument("finds", type=Path)
    joining.add_argument("--share", type=float, required=True)
    joining.add_argument("--out", type=Path, required=True)
    bundling = verbs.add_parser("bundle", help="write the bundled checkpoint")
    bundling.add_argument("trained", type=Path)
    bundling.add_argument("--figures", type=Path, required=True)
    options = parser.parse_args()
    if options.verb == "average":
        average(options.one, options.two, options.out)
    elif options.verb == "features":
        features(options.dataset, options.like, options.init, options.width, options.minutes, options.out)
    elif options.verb == "widen":
        widen(options.narrow, options.width, options.out)
    elif options.verb == "join":
        join(options.moves, options.finds, options.share, options.out)
    else:
        bundle(options.trained, options.figures)


if __name__ == "__main__":
    main()
