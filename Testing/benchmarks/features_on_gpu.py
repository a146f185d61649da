"""Train features on a machine that has a GPU and nothing but PyTorch, NumPy and
this; ``train`` is what runs there.

    D=hippocampus/dataset.json
    python Testing/benchmarks/features_on_gpu.py export $D --spacing 1 --out cases.npz
    python Testing/benchmarks/features_on_gpu.py train cases.npz --minutes 3.9 --width 16 --out weights.pt
    python Testing/benchmarks/features_on_gpu.py bundle weights.pt cases.npz $D --out hippocampus-features.safetensors
    morphseek evaluate $D --model hippocampus-features.safetensors --out figures.json
    python Testing/benchmarks/features_on_gpu.py figures hippocampus-features.safetensors figures.json

Where MorphSeek is installed whole, ``morphseek train`` does the same in one command.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout need not be installed

from MorphSeekLib.backbones import build_backbone
from MorphSeekLib.training.examples import bent, painted, segmentation_loss

DEPTH, CASES, RATE, BENDING, AVERAGE = 3, 4, 3e-3, 2.0, 0.999
AHEAD = 16  # iterations whose examples are made ahead


def export(dataset: Path, spacing: float, out: Path) -> None:
    """Write the cases of the splits training and validation as arrays: intensities as bytes, channels of labels."""
    from MorphSeekLib.data.datasets import PairLoader, label_values, load_dataset
    from MorphSeekLib.data.label_channels import channels_for
    from MorphSeekLib.space.preprocessing import Preprocessing

    found = load_dataset(dataset)
    training, validation = (sorted(found.split(name, "cases"), key=str) for name in ("training", "validation"))
    loader = PairLoader(Preprocessing(spacing=(spacing,) * 3, low=0.0), 2**DEPTH, False)
    loader.channels = channels_for(label_values(training))
    arrays: dict[str, np.ndarray] = {}
    for number, case in enumerate([*training, *validation]):
        image, known = loader.alone(case)
        assert known is not None
        arrays[f"image{number}"] = (image[0, 0] * 255).round().clamp(0, 255).byte().numpy()
        arrays[f"labels{number}"] = known[0, 0].to(torch.uint8).numpy()
    about = {"spacing": spacing, "validation": len(validation), "labels": list(loader.channels.items())}
    np.savez_compressed(out, about=json.dumps(about), **arrays)


def train(arrays: Path, minutes: float, width: int, out: Path) -> None:
    """Train on the arrays for so many minutes, and write the averaged weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = np.load(arrays)
    about, count = json.loads(str(values["about"])), sum(name.startswith("image") for name in values)
    images = [torch.from_numpy(values[f"image{n}"]).to(device)[None, None] / 255 for n in range(count)]
    labels = [torch.from_numpy(values[f"labels{n}"]).int().to(device)[None, None] for n in range(count)]
    known, size = count - about["validation"], tuple(max(i.shape[axis] for i in images) for axis in (2, 3, 4))
    torch.manual_seed(0)
    features = 1 + max(channel for _, channel in about["labels"])
    network = build_backbone("segmenter", {"features": features, "width": width, "depth": DEPTH}).to(device)
    average = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)

    def examples(iteration: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(iteration * 7919 + 13)
        drawn = torch.randint(known, (CASES,), generator=generator).tolist()
        parts = [bent(images[n], labels[n], size, BENDING, generator) for n in drawn]
        return torch.cat([painted(image, generator) for image, _ in parts]), torch.cat(
            [channels for _, channels in parts]
        )

    begin, iteration, told = time.monotonic(), 0, 0
    with ThreadPoolExecutor(8) as pool:
        coming = [pool.submit(examples, n) for n in range(AHEAD)]
        while (done := (time.monotonic() - begin) / (60 * minutes)) < 1:
            image, channels = coming.pop(0).result()
            coming.append(pool.submit(examples, iteration + AHEAD))
            for group in optimizer.param_groups:
                group["lr"] = RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
            with torch.autocast(device.type, torch.bfloat16):
                scores = network.scores(image)
            optimizer.zero_grad(set_to_none=True)
            segmentation_loss(scores.float(), channels).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            iteration += 1
            own, share = network.state_dict(), 1 - min(AVERAGE, (1 + iteration) / (10 + iteration))
            torch._foreach_lerp_([average[name] for name in own], list(own.values()), share)
            if int(8 * done) > told:
                told = int(8 * done)
                print(f"iteration {iteration}, Dice {_dice(network, average, images[known:], labels[known:]):.4f}")
        for waiting in coming:
            waiting.cancel()
    dice = _dice(network, average, images[known:], labels[known:])
    print(f"end: iteration {iteration}, Dice {dice:.4f} of the {count - known} cases of the split validation")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    said = {"iterations": iteration, "minutes": minutes, "device": where, "dice_segmentation": round(dice, 4)}
    torch.save({"weights": average, "width": width, "features": features, "said": said}, out)


@torch.no_grad()
def _dice(network: torch.nn.Module, weights: dict[str, Tensor], images: list[Tensor], labels: list[Tensor]) -> float:
    """Mean Dice of segmentations by some weights."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(weights)
    found = []
    for image, known in zip(images, labels, strict=True):
        chosen = network.scores(image).argmax(dim=1, keepdim=True)
        for label in range(1, int(known.max()) + 1):
            one, other = chosen == label, known == label
            found.append(float(2 * (one & other).sum() / (one.sum() + other.sum())))
    network.load_state_dict(before)
    return sum(found) / len(found)


def bundle(weights: Path, arrays: Path, dataset: Path, out: Path) -> None:
    """Write the model file of weights from :func:`train`."""
    from MorphSeekLib.data.datasets import known_sizes, load_dataset
    from MorphSeekLib.networks.model_file import Card, save, software
    from MorphSeekLib.networks.policy import ModelSettings, RegistrationModel
    from MorphSeekLib.space.preprocessing import Preprocessing

    trained, found = torch.load(weights, map_location="cpu", weights_only=True), load_dataset(dataset)
    about = json.loads(str(np.load(arrays)["about"]))
    settings = {"features": trained["features"], "width": trained["width"], "depth": DEPTH}
    model = RegistrationModel(ModelSettings("segmenter", settings))
    model.backbone.load_state_dict(trained["weights"])
    cases = found.split("training", "cases")
    preprocessing = Preprocessing(
        spacing=(about["spacing"],) * 3, low=0.0, align="center", steps=1, knows=known_sizes(cases, most=len(cases))
    )
    card = Card(
        title=f"Hippocampus MR crops: features that {len(cases)} labeled cases taught, for a fit",
        preprocessing=preprocessing,
        provenance={
            "stage": "features",
            "data": found.about | {"file": dataset.name},
            "cases": len(cases),
            "init": None,
            "settings": {"cases": CASES, "learning_rate": RATE, "bending": BENDING, "average": AVERAGE}
            | trained["said"],
            "seconds": round(60 * trained["said"]["minutes"]),
            "date": time.strftime("%Y-%m-%d"),
            "software": software(),
        },
        license="CC-BY-SA 4.0, as the training data (MSD Task04, Simpson et al. 2019)",
        labels={int(value): int(channel) for value, channel in about["labels"]},
        compare="features",
        search=False,
    )
    save(out, model, card)


def figures(model: Path, found: Path) -> None:
    """Put the figures of ``morphseek evaluate`` on the card."""
    from MorphSeekLib.networks.model_file import read_card, rewrite_card

    values = json.loads(found.read_text(encoding="utf-8"))
    tested = {k: values[k] for k in ("dataset", "split", "mean", "std", "definitions", "folding_definition")}
    card = read_card(model)
    rewrite_card(model, replace(card, results=card.results | {"test": tested | {"pairs": len(values["pairs"])}}))


def main() -> None:
    """The verbs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    exporting = verbs.add_parser("export", help="cases as arrays")
    exporting.add_argument("dataset", type=Path)
    exporting.add_argument("--spacing", type=float, default=1.0)
    training = verbs.add_parser("train", help="weights from arrays")
    training.add_argument("arrays", type=Path)
    training.add_argument("--minutes", type=float, default=4.0)
    training.add_argument("--width", type=int, default=16)
    bundling = verbs.add_parser("bundle", help="a model file from weights")
    bundling.add_argument("weights", type=Path)
    bundling.add_argument("arrays", type=Path)
    bundling.add_argument("dataset", type=Path)
    for verb in (exporting, training, bundling):
        verb.add_argument("--out", type=Path, required=True)
    noting = verbs.add_parser("figures", help="figures on the card")
    noting.add_argument("model", type=Path)
    noting.add_argument("found", type=Path)
    options = vars(parser.parse_args())
    {"export": export, "train": train, "bundle": bundle, "figures": figures}[options.pop("verb")](**options)


if __name__ == "__main__":
    main()
