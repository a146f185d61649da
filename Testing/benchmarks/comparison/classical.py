"""greedy and ANTs SyN, which registration is measured against: optional packages, called as their makers recommend."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from MorphSeekLib.io.images import write_image
from MorphSeekLib.io.transforms import read_transform
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space.geometry import DenseTransform, Transform, Volume, dense_from_voxels

_AFFINE = "-a -ia-image-centers"


def greedy(
    fixed: Volume, moving: Volume, *, affine: bool, multimodal: bool = False, threads: int = 1
) -> DenseTransform:
    """greedy (Yushkevich et al.): NCC of radius 2, for two modalities NMI; 100 x 50 x 10 iterations.

    Its random numbers have a fixed seed, and so with one thread the same images give the same transform.

    Args:
        fixed, moving: intensities.
        affine: find an affine transform first, from the images' centers.
        multimodal: compare by normalized mutual information (NMI).
        threads: of the processor; 0 for all.

    Returns:
        fixed point -> moving point, LPS mm, on the fixed grid.

    Raises:
        MorphSeekError: the package is missing.
    """
    greedy3d = _greedy_package()
    with tempfile.TemporaryDirectory(prefix="morphseek-greedy-") as name:
        folder = Path(name)
        for side, volume in (("fixed", fixed), ("moving", moving)):
            write_image(volume, folder / f"{side}.nii.gz")
        metric = "NMI" if multimodal else "NCC 2x2x2"
        base = "-d 3 -V 0 -seed 1" + (f" -threads {threads}" if threads else "")
        common = f"{base} -m {metric} -n 100x50x10 -i {folder}/fixed.nii.gz {folder}/moving.nii.gz"
        then = ""
        if affine:
            greedy3d().execute(f"{common} {_AFFINE} -o {folder}/affine.mat")
            then = f"{folder}/affine.mat"
        greedy3d().execute(f"{common} {f'-it {then}' if affine else ''} -o {folder}/warp.nii.gz")
        greedy3d().execute(
            f"{base} -rf {folder}/fixed.nii.gz -rm {folder}/moving.nii.gz {folder}/out.nii.gz "
            f"-rc {folder}/whole.nii.gz -r {folder}/warp.nii.gz {then}"
        )
        return _dense(read_transform(folder / "whole.nii.gz", fixed.grid), fixed)


def greedy_affine(fixed: Volume, moving: Volume, *, multimodal: bool = False, threads: int = 1) -> np.ndarray:
    """Return the affine transform that :func:`greedy` begins with: fixed point -> moving point, (4, 4) LPS mm.

    Raises:
        MorphSeekError: the package is missing.
        RuntimeError: greedy found none.
    """
    greedy3d = _greedy_package()
    with tempfile.TemporaryDirectory(prefix="morphseek-greedy-") as name:
        folder = Path(name)
        for side, volume in (("fixed", fixed), ("moving", moving)):
            write_image(volume, folder / f"{side}.nii.gz")
        metric = "NMI" if multimodal else "NCC 2x2x2"
        greedy3d().execute(
            f"-d 3 -V 0 -seed 1{f' -threads {threads}' if threads else ''} -m {metric} -n 100x50x10 "
            f"-i {folder}/fixed.nii.gz {folder}/moving.nii.gz {_AFFINE} -o {folder}/affine.mat"
        )
        flip = np.diag([-1.0, -1.0, 1.0, 1.0])  # its file is in RAS
        return flip @ np.loadtxt(folder / "affine.mat") @ flip


def syn(
    fixed: Volume,
    moving: Volume,
    *,
    affine: bool,
    multimodal: bool = False,
    threads: int = 1,
    correlation: bool = False,
) -> DenseTransform:
    """SyN of ANTs (Avants et al. 2008) as antspyx has it by default: Mattes mutual information, 40 x 20 x 0 iterations.

    Args, Returns, Raises:
        as :func:`greedy`; the metric serves two modalities, too. ``threads`` holds from a process's first call on.
        correlation: cross-correlation of radius 2 in its place, and five iterations at full resolution, which is far
            slower and better. Not for two modalities.
    """
    if threads:
        os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", str(threads))
    try:
        import ants
    except ImportError as error:
        raise MorphSeekError("ANTs is not installed; run: pip install antspyx.") from error
    ants.config.set_ants_deterministic(on=False, seed_value=1)  # the seed alone: "on" reseeds NumPy and random, too
    correlation = correlation and not multimodal
    with tempfile.TemporaryDirectory(prefix="morphseek-syn-") as name:
        folder = Path(name)
        images = []
        for side, volume in (("fixed", fixed), ("moving", moving)):
            write_image(volume, folder / f"{side}.nii.gz")
            images.append(ants.image_read(str(folder / f"{side}.nii.gz")))
        found = ants.registration(
            *images,
            type_of_transform="SyN" if affine else "SyNOnly",
            initial_transform=None if affine else "Identity",
            syn_metric="CC" if correlation else "mattes",
            syn_sampling=2 if correlation else 32,
            reg_iterations=(40, 20, 5 if correlation else 0),
            outprefix=f"{folder}/syn",
        )
        ants.apply_transforms(*images, found["fwdtransforms"], compose=f"{folder}/whole")
        return _dense(read_transform(folder / "wholecomptx.nii.gz", fixed.grid), fixed)


def _greedy_package() -> type:
    """Return greedy's class for three dimensions."""
    try:
        from picsl_greedy import Greedy3D
    except ImportError as error:
        raise MorphSeekError("greedy is not installed; run: pip install picsl-greedy.") from error
    return Greedy3D


def _dense(transform: Transform, fixed: Volume) -> DenseTransform:
    """The transform on the fixed grid."""
    if isinstance(transform, DenseTransform):
        return transform
    return dense_from_voxels(torch.zeros(1, 3, *fixed.grid.shape), fixed.grid, transform)


CLASSICAL = {"greedy": greedy, "syn": syn, "syn-cc": partial(syn, correlation=True)}
