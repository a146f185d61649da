"""How well the bundled brain model aligns real scans that it never saw.

    python Testing/benchmarks/brain_model.py [--shared ../shared] [--model brain-mr] [--steps 2] [--out FILE]

1. A T1 scan with a whole-brain segmentation (brain_t1) and the MNI152 T1 template of nilearn, both ways, from
   their own poses, with `--align affine`: Dice of gray and of white matter between the template's tissue maps
   (probability above one half) and the scan's segmentation, after the affine alignment and after the registration.
2. Pairs of other brains (brain_oasis, split registration_test, already affine to MNI, 2 mm): mean Dice over all
   labels, before and after, alignment off.
3. Other contrasts: the same scan with its intensities inverted, onto the template.

Folding: share of the fixed image's voxels with a Jacobian determinant <= 0 (central differences). Needs ../shared and
pip install -e '.[demo]'.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from MorphSeekLib.app.demo import template
from MorphSeekLib.data.datasets import load_dataset
from MorphSeekLib.evaluation.evaluate import evaluate
from MorphSeekLib.io.images import read_image, read_labels
from MorphSeekLib.networks.loading import load_model
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space.geometry import Volume, resample

GREY = [3, 42, 8, 47, 10, 11, 12, 13, 17, 18, 26, 49, 50, 51, 52, 53, 54, 58]
WHITE = [2, 41, 7, 46, 77, 16, 28, 60, 251, 252, 253, 254, 255]
TISSUES = {1: "gray matter", 2: "white matter"}


def template_tissues(onto: Volume) -> Volume:
    """1 gray, 2 white matter, where nilearn's tissue maps of the template exceed one half."""
    from nilearn.datasets import load_mni152_gm_template, load_mni152_wm_template

    tissues = torch.zeros(onto.grid.shape, dtype=torch.int32)
    with tempfile.TemporaryDirectory() as folder:
        for label, load in ((1, load_mni152_gm_template), (2, load_mni152_wm_template)):
            path = Path(folder) / f"{label}.nii.gz"
            load(resolution=1).to_filename(path)
            tissues[resample(read_image(path), onto.grid).data > 0.5] = label
    return Volume(tissues, onto.grid)


def scan_tissues(segmentation: Volume) -> Volume:
    """1 gray, 2 white matter of a FreeSurfer segmentation."""
    tissues = torch.zeros_like(segmentation.data)
    for label, values in ((1, GREY), (2, WHITE)):
        tissues[torch.isin(segmentation.data, torch.tensor(values, dtype=segmentation.data.dtype))] = label
    return Volume(tissues, segmentation.grid)


def row(name: str, report: dict) -> dict:
    """What the table shows of one registration."""
    dice = {
        f"{TISSUES[int(k)]} {stage}": v[stage]
        for k, v in report["dice"]["labels"].items()
        for stage in ("aligned", "warped")
    }
    return {
        "pair": name,
        **dice,
        "njd_percent": report["folding"]["njd_percent"],
        "sdlogj": report["folding"]["sdlogj"],
    }


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[3] / "shared")
    parser.add_argument("--model", default="brain-mr")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    model = load_model(options.model)
    data = options.shared / "data"
    mni = template()
    scan = read_image(data / "brain_t1" / "scan_t1.nii.gz")
    inverted = Volume(torch.where(scan.data > 0, 1.1 * scan.data.max() - scan.data, scan.data), scan.grid)
    mni_labels = template_tissues(mni)
    scan_labels = scan_tissues(read_labels(data / "brain_t1" / "scan_seg.nii.gz"))
    pairs = {
        "scan onto template": (mni, scan, mni_labels, scan_labels),
        "template onto scan": (scan, mni, scan_labels, mni_labels),
        "inverted scan onto template": (mni, inverted, mni_labels, scan_labels),
    }
    rows = []
    for name, (fixed, moving, fixed_labels, moving_labels) in pairs.items():
        result = register(
            fixed,
            moving,
            model,
            RegistrationOptions(steps=options.steps, align="affine", inverse=False),
            labels=(fixed_labels, moving_labels),
        )
        rows.append(row(name, result.report))
        print(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{v}" for k, v in rows[-1].items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        oasis = load_dataset(data / "brain_oasis" / "dataset.json")
        settings = RegistrationOptions(steps=options.steps, align="none")
        figures = evaluate(oasis, "registration_test", model, Path(folder) / "oasis.json", settings)
    print(
        "OASIS, 2 mm, means of", len(figures["pairs"]), "pairs:", {k: round(v, 4) for k, v in figures["mean"].items()}
    )
    if options.out:
        content = {
            "model": {"sha256": model.sha256, "title": model.card.title},
            "steps": options.steps or model.card.preprocessing.steps,
            "tissue_overlap": rows,
            "oasis": {"mean": figures["mean"], "std": figures["std"], "pairs": len(figures["pairs"])},
            "definitions": figures["definitions"],
        }
        options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
