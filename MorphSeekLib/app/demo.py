"""``make demo``: register two real brain scans that come with installable packages.

Fixed is the MNI152 T1 template that ships inside the package nilearn. Moving is Colin27, another real head, where
Debian's package mricron-data is on the machine; else the template itself under a known random deformation and a
contrast change, so that the true error in millimeters can be told.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..io.images import read_image
from ..networks.devices import pick_device
from ..protocol.errors import MorphSeekError
from ..protocol.job import Job
from ..protocol.report import Report
from ..protocol.startup import check_output_folder
from ..registration.pipeline import register
from ..report.results import write_results
from ..space import fields
from ..space.geometry import DenseTransform, Volume, apply_affine, covering_grid, dense_from_voxels, resample
from ..space.preprocessing import sampled_places

COLIN27 = Path("/usr/share/mricron/templates/ch2.nii.gz")


def template() -> Volume:
    """Return the MNI152 T1 template, skull-stripped, 1 mm.

    Raises:
        MorphSeekError: nilearn is not installed.
    """
    try:
        from nilearn.datasets import load_mni152_template
    except ImportError as error:
        raise MorphSeekError(
            "The demo needs the package nilearn, which carries the template: pip install nilearn."
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mni152.nii.gz"
        load_mni152_template(resolution=1).to_filename(path)
        return read_image(path)


def deformed(volume: Volume, seed: int = 0) -> tuple[Volume, DenseTransform]:
    """Return a volume with another contrast, moved by a known smooth deformation and pose.

    Returns:
        the new volume, and the true map of its points to the original's.
    """
    generator = torch.Generator().manual_seed(seed)
    grid = covering_grid(volume.grid, (2.5, 2.5, 2.5))
    coarse = torch.randn(1, 3, *(n // 12 for n in grid.shape), generator=generator) * 2.0
    velocity = F.interpolate(coarse, size=grid.shape, mode="trilinear", align_corners=True)
    angle = np.deg2rad(6.0)
    pose = np.eye(4)
    pose[:3, :3] = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.03]]
    pose[:3, 3] = volume.grid.center - pose[:3, :3] @ volume.grid.center + (6.0, -4.0, 5.0)
    to_original = dense_from_voxels(fields.integrate(velocity), grid, pose)
    image = resample(volume, volume.grid, to_original)
    high = float(image.data.max())
    data = torch.where(image.data > 0, high * (1 - image.data / high).clamp(0, 1) ** 0.7 + 0.1 * high, image.data)
    return Volume(data, image.grid), to_original


def run_demo(output: Path, device: str, job: Job) -> tuple[Report, list[str]]:
    """Register the pair and write its results; return the report, and sentences on how well it went."""
    check_output_folder(output)
    job.report("read", 0.0, "Reading the template")
    fixed = template()
    truth = None
    if COLIN27.is_file():
        moving, name = read_image(COLIN27), "Colin27 (mricron-data)"
    else:
        (moving, truth), name = deformed(fixed), "MNI152 deformed, other contrast"
    result = register(fixed, moving, job=job.part(0.0, 0.95), device=pick_device(device))
    job.report("write", 0.95, "Writing the results")
    names = {"fixed": "MNI152 T1 template (nilearn)", "moving": name}
    report = write_results(output, result, fixed, names, job)
    sentences = [f"Fixed: {names['fixed']}. Moving: {name}."]
    if truth is not None:
        before, after = _errors(fixed, result.transform, truth)
        sentences.append(f"True error inside the brain: {before:.2f} mm before, {after:.2f} mm after (mean).")
    return report, sentences


def _errors(fixed: Volume, found: DenseTransform, truth: DenseTransform) -> tuple[float, float]:
    """Return the mean distance (mm) of points of the brain from their true place, before and after.

    ``found`` leads a template point into the deformed image, ``truth`` from there back: together the identity.
    """
    inside = torch.nonzero(fixed.data > 0)
    index = inside[sampled_places(len(inside), 2000)].double().numpy()
    points = apply_affine(fixed.grid.affine, index)
    before = np.linalg.norm(truth.map_points(points) - points, axis=1).mean()
    after = np.linalg.norm(truth.map_points(found.map_points(points)) - points, axis=1).mean()
    return float(before), float(after)
