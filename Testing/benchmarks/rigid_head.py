"""The same head moved rigidly: how far a registration leads it from where it went.

    python Testing/benchmarks/rigid_head.py [--shared ../shared] [--models none auto brain-mr] [--presets best fast]
        [--out FILE]

The moving image is the fixed one, turned by 4 degrees and moved by 7 mm (shared/cases/same_mov.nii.gz, same_true.tfm):
whatever is deformed is an error. Printed is the mean distance in the head, mm; at most 0.3 is asked.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from comparison.command import ROOT

from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.io.images import read_image
from MorphSeekLib.networks.model_file import software
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.settings import to_json
from MorphSeekLib.registration.choice import chosen_model
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space.geometry import apply_affine

HEAD = 20  # what is brighter belongs to it
MOST = 0.3  # mm


def rigid_error(shared: Path, model: str, options: RegistrationOptions) -> tuple[float, list[str], str]:
    """Return the mean error in the head (mm), the codes of the warnings, and which model was taken and why."""
    fixed = read_image(shared / "data" / "brain_oasis" / "images" / "oasis_1000.nii.gz")
    moving = read_image(shared / "cases" / "same_mov.nii.gz")
    loaded, device, words = chosen_model(model, (fixed, moving), "cpu")
    result = register(fixed, moving, loaded, options, device=device)
    true = sitk.ReadTransform(str(shared / "cases" / "same_true.tfm"))
    points = apply_affine(fixed.grid.affine, (fixed.data > HEAD).nonzero().numpy()[::500])
    expected = np.array([true.TransformPoint(p) for p in points])
    error = np.linalg.norm(result.transform.map_points(points) - expected, axis=1).mean()
    return float(error), [warning["code"] for warning in result.report["warnings"]], words


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--models", nargs="+", default=["none", "auto", "brain-mr"])
    parser.add_argument("--presets", nargs="+", default=["best", "fast"])
    parser.add_argument("--out", type=Path, default=Path("rigid_head.json"))
    options = parser.parse_args()
    rows = []
    for model in options.models:
        for preset in options.presets:
            error, warnings, words = rigid_error(options.shared, model, RegistrationOptions(preset=preset))
            rows.append({"model": model, "preset": preset, "error_mm": error, "warnings": warnings, "told": words})
            print(f"{model:10} {preset:5} {error:.3f} mm {'' if error <= MOST else '(too far)'}", flush=True)
    result = {"rows": rows, "date": time.strftime("%Y-%m-%d"), "software": software()}
    write_atomically(options.out, to_json(result, indent=1).encode())


if __name__ == "__main__":
    main()
