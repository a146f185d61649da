"""``make demo``: register two brain scans that come with installable packages, and a phantom of an abdomen.

Brain: fixed is the MNI152 T1 template that ships inside the package nilearn. Moving is Colin27, another real head,
where Debian's package mricron-data is on the machine; else the template itself under a known random deformation and a
contrast change, so that the true error in millimeters can be told. Abdomen: the phantom (:mod:`.phantom`) as a CT
would show it, and as an MRI would after a known large deformation; no model knows such images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.images import read_image
from ..networks.devices import pick_device
from ..protocol.errors import MorphSeekError
from ..protocol.job import Job
from ..protocol.options import RegistrationOptions
from ..protocol.report import Report
from ..protocol.startup import check_output_folder
from ..registration.pipeline import register
from ..report.results import write_results
from ..space import fields
from ..space.geometry import DenseTransform, Grid, Volume, apply_affine, covering_grid, dense_from_voxels, resample
from ..space.preprocessing import sampled_places
from .phantom import abdomen, abdomen_grid

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


def known_map(grid: Grid, seed: int = 0, wave: float = 30.0, strength: float = 5.0) -> DenseTransform:
    """Return a smooth deformation within a pose of its own: point of a moved image -> point of the original, LPS mm.

    Args:
        grid: of the original; the map turns about its center.
        seed: another one gives another deformation.
        wave: mm from one random push to the next; what is between is smooth.
        strength: of the pushes, mm (standard deviation along each axis).
    """
    generator = torch.Generator().manual_seed(seed)
    nodes = covering_grid(grid, (2.5, 2.5, 2.5))
    size = [max(2, int(n * 2.5 / wave)) for n in nodes.shape]
    coarse = torch.randn(1, 3, *size, generator=generator) * strength / 2.5
    velocity = F.interpolate(coarse, size=nodes.shape, mode="trilinear", align_corners=True)
    angle = np.deg2rad(6.0)
    pose = np.eye(4)
    pose[:3, :3] = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.03]]
    pose[:3, 3] = grid.center - pose[:3, :3] @ grid.center + (6.0, -4.0, 5.0)
    return dense_from_voxels(fields.integrate(velocity), nodes, pose)


def deformed(volume: Volume, seed: int = 0) -> tuple[Volume, DenseTransform]:
    """Return a volume with another contrast, moved by a known smooth deformation and pose.

    Returns:
        the new volume, and the true map of its points to the original's.
    """
    to_original = known_map(volume.grid, seed)
    image = resample(volume, volume.grid, to_original)
    high = float(image.data.max())
    data = torch.where(image.data > 0, high * (1 - image.data / high).clamp(0, 1) ** 0.7 + 0.1 * high, image.data)
    return Volume(data, image.grid), to_original


@dataclass(frozen=True)
class DemoPair:
    """Two images to register.

    Attributes:
        name: of the pair, and of the folder with its results.
        titles: what the report calls the fixed and the moving image.
        options: the choices, where they are not the defaults.
        truth: moving point -> fixed point, LPS mm; None where it is not known.
        inside: where the error is measured, on the fixed grid.
    """

    name: str
    titles: tuple[str, str]
    fixed: Volume
    moving: Volume
    options: RegistrationOptions
    truth: DenseTransform | None
    inside: Tensor


def brain_pair() -> DemoPair:
    """Return two brains.

    Raises:
        MorphSeekError: nilearn is not installed.
    """
    fixed, truth = template(), None
    if COLIN27.is_file():
        moving, title = read_image(COLIN27), "Colin27 (mricron-data)"
    else:
        (moving, truth), title = deformed(fixed), "MNI152 deformed, other contrast"
    titles = ("MNI152 T1 template (nilearn)", title)
    return DemoPair("brain", titles, fixed, moving, RegistrationOptions(), truth, fixed.data > 0)


def abdomen_pair(spacing: float = 3.0) -> DemoPair:
    """Return a phantom of the abdomen in two modalities, the moving one with a large known deformation.

    Args:
        spacing: of both images, mm.
    """
    grid = abdomen_grid(spacing)
    fixed, truth = abdomen(grid, "ct"), known_map(grid, seed=1, wave=80.0, strength=8.0)
    inside = fixed.data > -300
    inside[:, :, :7] = inside[:, :, -7:] = False  # what may have left the moving image is nowhere to be found
    titles = ("phantom of an abdomen, CT", "the phantom deformed, MRI")
    moving = abdomen(grid, "mr", truth, seed=1)
    return DemoPair("abdomen", titles, fixed, moving, RegistrationOptions(similarity="mind"), truth, inside)


PAIRS = (brain_pair, abdomen_pair)


def run_demo(output: Path, device: str, job: Job) -> list[tuple[Path, Report, list[str]]]:
    """Register both pairs; return of each the folder of its results, its report, and sentences on how well it went."""
    check_output_folder(output)
    return [
        _run_pair(make, output, device, job.part(n / len(PAIRS), (n + 1) / len(PAIRS))) for n, make in enumerate(PAIRS)
    ]


def _run_pair(make: Callable[[], DemoPair], output: Path, device: str, job: Job) -> tuple[Path, Report, list[str]]:
    """Register a pair and write its results."""
    job.report("read", 0.0, "Making the images")
    pair = make()
    result = register(pair.fixed, pair.moving, None, pair.options, job.part(0.02, 0.95), device=pick_device(device))
    job.report("write", 0.95, "Writing the results")
    names = dict(zip(("fixed", "moving"), pair.titles, strict=True))
    report = write_results(output / pair.name, result, pair.fixed, names, job)
    sentences = [f"Fixed: {names['fixed']}. Moving: {names['moving']}."]
    if pair.truth is not None:
        before, after = _errors(pair, pair.truth, result.transform)
        sentences.append(f"True error inside the {pair.name}: {before:.2f} mm before, {after:.2f} mm after (mean).")
    return output / pair.name, report, sentences


def _errors(pair: DemoPair, truth: DenseTransform, found: DenseTransform) -> tuple[float, float]:
    """Return the mean distance (mm) of points of the object from their true place, before and after.

    ``found`` leads a fixed point into the moving image, ``truth`` from there back: together the identity.
    """
    inside = torch.nonzero(pair.inside)
    index = inside[sampled_places(len(inside), 2000)].double().numpy()
    points = apply_affine(pair.fixed.grid.affine, index)
    before = np.linalg.norm(truth.map_points(points) - points, axis=1).mean()
    after = np.linalg.norm(truth.map_points(found.map_points(points)) - points, axis=1).mean()
    return float(before), float(after)
