"""The coats: what two images and their label maps may wear on disk without being other images.

A coat changes how a pair is stored (:class:`Pair`), never where the anatomy is. Coats that touch the same thing are
never worn together. What a coat allows the product to do is stated with it: lose precision (``loses``), refuse
(``refusal``), and whether a warning is due (``warns``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk
from heads import REGIONS, Heads
from image_files import (
    LPS_TO_RAS,
    DicomScale,
    NiftiHeader,
    sitk_image,
    write_frames,
    write_nifti,
    write_nrrd,
    write_sitk,
    write_slices,
)
from scipy.ndimage import zoom
from scipy.spatial.transform import Rotation

from MorphSeekLib.space.geometry import Grid, apply_affine

Refusal = Literal["never", "may", "must"]


@dataclass
class Dress:
    """How one image of the pair is stored.

    Attributes:
        moving: which image.
        grid: its voxels, in the space of the base pair.
        averaged: voxels are means over their extent; else slices are thin and have gaps.
        world: (4, 4), space of the base pair -> space of the file: a shift and one scale for all axes.
        changes: of the intensities, which are 0 (air) to 1.
        fill: intensity outside of the field of view; None: air.
        kind: numpy type of the stored values.
        low, high: stored values of the intensities 0 and 1.
        nifti: of the header, if the file is NIfTI; its slope counts there.
        form: ending of the file, or "dicom" (folder), "dicom-file" (one of the slices), "enhanced" (multi-frame).
        slopes: DICOM slices have slopes and intercepts of their own.
        shuffle: DICOM slices or frames are stored in random order.
        late: called with the final grid (in the file's space) before writing.
        writer: replaces the writer of the form; given path, stored values and grid.
        spoil: called with the written path.
        damaged: the product must refuse this file.
        outline: it holds two values: the inside of the head shows nothing.
        stem: name of the file without its ending.
    """

    moving: bool
    grid: Grid
    averaged: bool = True
    world: np.ndarray = field(default_factory=lambda: np.eye(4))
    changes: list[Callable[[np.ndarray], np.ndarray]] = field(default_factory=list)
    fill: float | None = None
    kind: str = "float32"
    low: float = 0.0
    high: float = 255.0
    nifti: NiftiHeader = field(default_factory=NiftiHeader)
    form: str = ".nii.gz"
    slopes: bool = False
    shuffle: bool = False
    late: list[Callable[[Dress, Grid], None]] = field(default_factory=list)
    writer: Callable[[Path, np.ndarray, Grid], Path] | None = None
    spoil: Callable[[Path], Path | None] | None = None
    damaged: bool = False
    outline: bool = False
    stem: str = ""


@dataclass
class LabelDress:
    """How the label maps of the pair are stored.

    Attributes:
        values: of the eight regions.
        kind: numpy type of the file.
        turned: stored along other axes than the image.
        form: ending of the file.
        spoil: changes the stored values (float64) of the moving labels.
    """

    values: np.ndarray
    kind: str = "int32"
    turned: bool = False
    form: str = ".nii.gz"
    spoil: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass
class Pair:
    """What a case stores.

    Attributes:
        fixed, moving: the images.
        labels: of both images; None: none are given.
        output: name of the folder for the results.
    """

    fixed: Dress
    moving: Dress
    labels: LabelDress | None = None
    output: str = "out"

    @classmethod
    def undressed(cls, heads: Heads) -> Pair:
        """The base pair."""
        return cls(Dress(False, heads.grid, stem="anna"), Dress(True, heads.grid, stem="bertha"))

    def some(self, generator: np.random.Generator) -> tuple[list[Dress], str]:
        """One of the images or both, and their names."""
        return [
            ([self.fixed], "fixed"),
            ([self.moving], "moving"),
            ([self.fixed, self.moving], "both"),
        ][generator.integers(3)]


@dataclass(frozen=True)
class Coat:
    """One kind of coat.

    Attributes:
        name: short, for lists.
        wear: puts it on a pair; returns its particulars for the reader.
        touches: what no other coat of the case may touch.
        loses: it removes information: an error of one voxel of the coarser grid more is right.
        warns: the report must hold a warning.
        refusal: whether the product may or must refuse it, in one sentence.
    """

    name: str
    wear: Callable[[np.random.Generator, Pair], str]
    touches: frozenset[str]
    loses: bool = False
    warns: bool = False
    refusal: Refusal = "never"


COATS: list[Coat] = []


def _coat(name: str, *touches: str, **facts):
    """Enter a function into the list of coats."""

    def enter(wear: Callable[[np.random.Generator, Pair], str]):
        COATS.append(Coat(name, wear, frozenset(touches), **facts))
        return wear

    return enter


# --- where the voxels lie


@_coat("orientation", "axes")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    for dress in dresses:
        order, flips = g.permutation(3), g.integers(2, size=3).astype(bool)
        dress.grid = turned(dress.grid, order, flips)
    return which


@_coat("oblique", "oblique")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    angle = g.uniform(5, 35)
    for dress in dresses:
        axis = g.normal(size=3)
        turn = Rotation.from_rotvec(np.deg2rad(angle) * axis / np.linalg.norm(axis)).as_matrix()
        at = dress.grid
        dress.grid = _around(at.center, at.shape, at.spacing, turn @ at.direction)
    return f"{which} {angle:.0f} degrees"


@_coat("far", "world")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    shift = g.uniform(-2000, 2000, 3)
    for dress in dresses:
        dress.world = _shift(shift)
    return f"{which} by {np.linalg.norm(shift):.0f} mm"


@_coat("padding", "extent")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    for dress in dresses:
        dress.grid = _extended(dress.grid, g.integers(0, 14, 3), g.integers(0, 14, 3))
    return which


@_coat("cropping", "extent", loses=True)
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    for dress in dresses:
        cut = np.zeros((2, 3), dtype=int)
        for _ in range(g.integers(1, 3)):
            axis = g.integers(3)
            cut[g.integers(2), axis] = round(g.uniform(0.12, 0.32) * dress.grid.shape[axis])
        dress.grid = _extended(dress.grid, -cut[0], -cut[1])
    return which


@_coat("thick slices", "extent", loses=True)
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    axis, thick, across = g.integers(3), g.uniform(4, 9), g.uniform(1.5, 2.5)
    for dress in dresses:
        dress.grid = _with_spacing(dress.grid, [thick if a == axis else across for a in range(3)])
    return f"{which} {thick:.1f} mm along {axis}, {across:.1f} mm across"


@_coat("thin volume", "extent", loses=True)
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    count = int(g.choice([6, 8, 10]) if len(dresses) > 1 else g.choice([2, 3, 4, 6, 10]))
    axis, apart, aside = g.integers(3), g.uniform(3, 7), g.uniform(-15, 15)
    for dress in dresses:
        at = dress.grid
        shape, spacing = list(at.shape), at.spacing.copy()
        shape[axis], spacing[axis] = count, apart
        dress.grid = _around(at.center + aside * at.direction[:, axis], shape, spacing, at.direction)
    return f"{which} {count} slices every {apart:.1f} mm along {axis}"


@_coat("stride", "extent", "axes", loses=True)
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    i, j, slices = [
        (448, 448, g.integers(16, 28)),
        (640, 320, g.integers(16, 28)),
        (512, 400, g.integers(16, 28)),
        (464, 464, g.integers(10, 14)),
        (320, 320, 2 * g.integers(8, 16)),
    ][g.integers(5)]
    for dress in dresses:
        at = dress.grid
        shape = np.array([i, j, slices])
        length = at.spacing * at.shape
        dress.grid = _around(at.center, shape, length * [1.0, 1.0, 1.15] / shape, at.direction)
        dress.averaged = False
    return f"{which} {i} x {j} x {slices}"


@_coat("tiny", "world")
def _(g: np.random.Generator, pair: Pair) -> str:
    scale = g.choice([1 / 1000, 1 / 20, 1 / 10])
    for dress in (pair.fixed, pair.moving):
        dress.world = np.diag([scale, scale, scale, 1.0])
    return f"1/{1 / scale:.0f} of the size"


@_coat("huge", "world", refusal="may")
def _(g: np.random.Generator, pair: Pair) -> str:
    scale = float(g.choice([10, 1000]))
    for dress in (pair.fixed, pair.moving):
        dress.world = np.diag([scale, scale, scale, 1.0])
    return f"{scale:.0f} times the size"


# --- what the voxels hold


@_coat("offset and scale", "levels", "kind")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    span, offset = 10 ** g.uniform(-6, 8), g.choice([0.0, -0.5, 3.0, -3.0, 100.0, -100.0])
    for dress in dresses:
        dress.low, dress.high = offset * span, (offset + 1) * span
    return f"{which} air {offset * span:.3g}, range {span:.3g}"


@_coat("number type", "levels", "kind")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    kind = str(g.choice(["uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "float64"]))
    for dress in dresses:
        dress.kind = kind
        dress.low, dress.high = _span(g, kind)
    return f"{which} {kind} {dress.low:g} to {dress.high:g}"


@_coat("shifted CT", "levels", "kind")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    air = float(g.choice([-1000, -1024, -2000, -32768, -33792, 0]))
    kind = str(g.choice(["int32", "float32"]))
    for dress in dresses:
        dress.kind, dress.low, dress.high = kind, air, air + 1400
    return f"{which} air {air:g}, {kind}"


@_coat("dark fill", "fill")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    value = -g.uniform(0.2, 20)
    for dress in dresses:
        _fill(dress, value)
    return f"{which} {value:.2f} of the range"


@_coat("bright fill", "fill")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    value = g.uniform(0.2, 3)
    for dress in dresses:
        _fill(dress, value)
    return f"{which} {value:.2f} of the range"


@_coat("NaN outside the field of view", "fill", "levels", "kind", "slope", "dicom", warns=True)
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    kind = str(g.choice(["float32", "float64"]))
    for dress in dresses:
        dress.kind = kind
        _fill(dress, np.nan)
    return f"{which} {kind}"


@_coat("outlier voxels", "outlier")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    value, count, seed = g.choice([-1, 1]) * 10 ** g.uniform(0.5, 5), g.integers(1, 4), g.integers(2**31)

    def change(x: np.ndarray) -> np.ndarray:
        x.flat[np.random.default_rng(seed).integers(x.size, size=count)] = value
        return x

    for dress in dresses:
        dress.changes.append(change)
    return f"{which} {count} of {value:.3g} times the range"


@_coat("noise", "noise", "few", loses=True)
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    sigma, rician, seed = g.uniform(0.003, 0.015), bool(g.integers(2)), int(g.integers(2**31))

    def change(seed: int) -> Callable[[np.ndarray], np.ndarray]:
        def added(x: np.ndarray) -> np.ndarray:
            real, imaginary = np.random.default_rng(seed).normal(0, sigma, (2, *x.shape))
            return np.hypot(x + real, imaginary) if rician else x + real

        return added

    for n, dress in enumerate(dresses):
        dress.changes.insert(0, change(seed + n))
    return f"{which} {'Rician' if rician else 'Gaussian'} {100 * sigma:.1f} %"


@_coat("bias", "bias", loses=True)
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    knots = g.uniform(0.8, 1.2, (len(dresses), 3, 3, 3))

    def change(knots: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: x * zoom(knots, np.array(x.shape) / 3, order=1, grid_mode=True, mode="nearest")

    for dress, part in zip(dresses, knots, strict=True):
        dress.changes.insert(0, change(part))
    return which


@_coat("few values", "few", "bias", loses=True)
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    levels = int(g.integers(1, 4))
    for dress in dresses:
        dress.outline = levels == 1
        dress.changes.insert(0, lambda x: np.ceil(np.clip(x, 0, 1) * levels - 0.25).clip(0) / levels)
    return f"{which} {levels + 1} values"


# --- how it is stored


@_coat("NIfTI variant", "form")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    form, version, order = str(g.choice([".nii", ".nii.gz", ".img"])), int(g.integers(1, 3)), str(g.choice(["<", ">"]))
    version = 1 if form == ".img" else version
    trailing = (1,) * int(g.integers(3))
    meters = bool(g.integers(2))
    for dress in dresses:
        dress.form = form
        dress.nifti.version, dress.nifti.order, dress.nifti.trailing = version, order, trailing
        dress.nifti.meters = meters
    return f"{which} {form} NIfTI-{version} {order} trailing axes {len(trailing)}{' in meters' if meters else ''}"


@_coat("qform or sform only", "form")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    code = int(g.integers(1, 5))
    codes = (code, 0) if g.integers(2) else (0, code)
    for dress in dresses:
        dress.nifti.qform_code, dress.nifti.sform_code = codes
    return f"{which} codes {codes[0]} and {codes[1]}"


@_coat("qform and sform of any code", "form")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    codes = g.integers(1, 5, 2).tolist()
    for dress in dresses:
        dress.nifti.qform_code, dress.nifti.sform_code = codes
    return f"{which} codes {codes[0]} and {codes[1]}"


@_coat("neither qform nor sform", "form", "axes", "oblique", "world")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)

    def late(dress: Dress, grid: Grid) -> None:
        dress.world = _shift(-grid.origin) @ dress.world  # where ITK places such a file

    for dress in dresses:
        dress.nifti.qform_code = dress.nifti.sform_code = 0
        dress.late.append(late)
    return which


@_coat("qform and sform disagree", "form", warns=True)
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    codes = g.integers(1, 5, 2).tolist()
    angle, away = g.uniform(3, 30), g.uniform(3, 20)
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("xyz"[g.integers(3)], angle, degrees=True).as_matrix()
    pose[:3, 3] = away * g.permutation([1.0, 0.0, 0.0])

    def late(dress: Dress, grid: Grid) -> None:
        other = pose @ LPS_TO_RAS @ grid.affine
        if codes[1] == 1:  # ITK takes the sform of this code, else the qform
            dress.nifti.qform = other
        else:
            dress.nifti.sform = other

    for dress in dresses:
        dress.nifti.qform_code, dress.nifti.sform_code = codes
        dress.late.append(late)
    return f"{which} codes {codes[0]} and {codes[1]}, {angle:.0f} degrees, {away:.0f} mm"


@_coat("sheared sform beside a qform", "form", warns=True)
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    codes, shear = g.integers(1, 5, 2).tolist(), g.uniform(0.05, 0.3)
    for dress in dresses:
        dress.nifti.qform_code, dress.nifti.sform_code = codes
        dress.late.append(_sheared(shear))
    return f"{which} codes {codes[0]} and {codes[1]}, shear {shear:.2f}"


@_coat("NIfTI slope and intercept", "form", "levels", "kind", "slope")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    kind = str(g.choice(["uint8", "int16", "uint16", "int32", "float32"]))
    slope = g.choice([-1, 1, 1, 1]) * 10 ** g.uniform(-5, 3)
    intercept = g.choice([0.0, 1.0, -1.0]) * 10 ** g.uniform(-2, 4)
    for dress in dresses:
        dress.kind = kind
        dress.low, dress.high = _span(g, kind)
        if slope < 0:
            dress.low, dress.high = dress.high, dress.low
        dress.nifti.slope, dress.nifti.intercept = float(np.float32(slope)), float(np.float32(intercept))
    return f"{which} {kind}, slope {slope:.3g}, intercept {intercept:.3g}"


@_coat("NIfTI slope that is no number", "form", "slope")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    for dress in dresses:
        dress.nifti.slope, dress.nifti.intercept = np.nan, np.nan
    return which


@_coat("NRRD", "form")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    form, space, order = (str(g.choice(c)) for c in ([".nrrd", ".nhdr"], ["LPS", "RAS"], ["little", "big"]))
    for dress in dresses:
        dress.form = form
        dress.writer = lambda path, array, grid: write_nrrd(path, array, grid, space, order)
    return f"{which} {form} {space} {order}"


@_coat("MetaImage", "form")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    form = str(g.choice([".mha", ".mhd"]))
    for dress in dresses:
        dress.form = form
    return f"{which} {form}"


@_coat("DICOM series", "form", "levels", "kind", "dicom")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    form, shuffle = str(g.choice(["dicom", "dicom-file"])), bool(g.integers(2))
    for dress in dresses:
        _as_dicom(g, dress, form)
        dress.shuffle = shuffle
    return f"{which} {form} {dress.kind}{' shuffled' if shuffle else ''}"


@_coat("DICOM slices with slopes of their own", "form", "levels", "kind", "dicom")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    for dress in dresses:
        _as_dicom(g, dress, "dicom")
        dress.slopes = True
    return f"{which} {dress.kind}"


@_coat("enhanced DICOM", "form", "levels", "kind", "dicom")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    shuffle, slopes = bool(g.integers(2)), bool(g.integers(2))
    for dress in dresses:
        _as_dicom(g, dress, "enhanced")
        dress.shuffle, dress.slopes = shuffle, slopes
    return f"{which} {dress.kind}{' shuffled' if shuffle else ''}{' slopes of their own' if slopes else ''}"


@_coat("file names", "name")
def _(g: np.random.Generator, pair: Pair) -> str:
    stems = ["with spaces", "[bold]brackets", "ünïcödé 头", ".hidden", "v1.2.nii.final", "quote'\"s", "per%20cent"]
    for dress in (pair.fixed, pair.moving):
        dress.stem = f"{dress.stem} {stems[g.integers(len(stems))]}" if g.integers(2) else stems[g.integers(len(stems))]
    if pair.fixed.stem == pair.moving.stem:
        pair.moving.stem += " again"
    pair.output = str(g.choice(["out [x]", "out", "résultats", "out [/red] 1"]))
    return f"{pair.fixed.stem} / {pair.moving.stem} / {pair.output}"


@_coat("upper-case suffix", "form", refusal="may")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    form = str(g.choice([".NII", ".NII.GZ", ".NRRD", ".Nii.gz"]))
    for dress in dresses:
        dress.form = form
    return f"{which} {form}"


@_coat("file names that are not UTF-8", "name", refusal="may")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)
    for dress in dresses:
        dress.stem += os.fsdecode(b"\xe9\xff")
    return which


@_coat("gzip named .nii", "form", refusal="may")
def _(g: np.random.Generator, pair: Pair) -> str:
    dresses, which = pair.some(g)

    def spoil(path: Path) -> Path:
        renamed = path.with_suffix("")
        path.rename(renamed)
        return renamed

    for dress in dresses:
        dress.spoil = spoil
    return which


@_coat("FreeSurfer's .mgz", "form", "levels", "kind", refusal="may")
def _(g: np.random.Generator, pair: Pair) -> str:
    import nibabel

    dresses, which = pair.some(g)
    kind = str(g.choice(["uint8", "int16", "float32"]))

    def writer(path: Path, array: np.ndarray, grid: Grid) -> Path:
        nibabel.save(nibabel.MGHImage(array, LPS_TO_RAS @ grid.affine), path)
        return path

    for dress in dresses:
        dress.kind, dress.form, dress.writer = kind, ".mgz", writer
    return f"{which} {kind}"


# --- labels


@_coat("labels of any value", "labels")
def _(g: np.random.Generator, pair: Pair) -> str:
    pool = {
        "uint8": [1, 2, 17, 41, 127, 128, 254, 255],
        "int16": [1, 3, 99, 255, 256, 1000, 2035, 32766, 32767],
        "uint16": [1, 255, 256, 32767, 32768, 40000, 65534, 65535],
        "int32": [1, 65535, 65536, 2**24, 2**24 + 1, 2**30 + 1, 2**31 - 2, 2**31 - 1],
        "uint32": [1, 65535, 65536, 2**24, 2**24 + 1, 2**30 + 1, 2**31 - 2, 2**31 - 1],
        "int64": [1, 65535, 65536, 2**24, 2**24 + 1, 2**30 + 1, 2**31 - 2, 2**31 - 1],
        "float32": [1, 2, 5, 1000, 65536, 2**24 - 1, 2**24, 77],
        "float64": [1, 2, 5, 1000, 65536, 2**24 + 1, 2**31 - 1, 77],
    }
    kind = str(g.choice(list(pool)))
    values = g.permutation(pool[kind])[:REGIONS]
    pair.labels = LabelDress(values, kind, form=str(g.choice([".nii.gz", ".nrrd"])))
    return f"{kind} {values.tolist()}"


@_coat("labels along other axes", "labels")
def _(g: np.random.Generator, pair: Pair) -> str:
    pair.labels = LabelDress(np.arange(1, REGIONS + 1), "uint8", turned=True)
    return ""


@_coat("negative label", "labels", refusal="must")
def _(g: np.random.Generator, pair: Pair) -> str:
    values = np.arange(1, REGIONS + 1)
    values[g.integers(REGIONS)] = value = -int(g.choice([1, 2, 1000]))
    pair.labels = LabelDress(values, str(g.choice(["int16", "int32", "float32"])))
    return f"{value}"


@_coat("label of 2^31 or more", "labels", refusal="must")
def _(g: np.random.Generator, pair: Pair) -> str:
    values = np.arange(1, REGIONS + 1, dtype=np.int64)
    values[g.integers(REGIONS)] = value = int(g.choice([2**31, 2**32 - 1]))
    pair.labels = LabelDress(values, str(g.choice(["uint32", "int64", "float64"])))
    return f"{value}"


@_coat("labels that are not whole", "labels", refusal="must")
def _(g: np.random.Generator, pair: Pair) -> str:
    pair.labels = LabelDress(np.arange(1, REGIONS + 1), "float32", spoil=lambda x: x * 0.77)
    return ""


@_coat("no label", "labels", refusal="must")
def _(g: np.random.Generator, pair: Pair) -> str:
    pair.labels = LabelDress(np.arange(1, REGIONS + 1), "uint8", spoil=lambda x: x * 0)
    return ""


# --- no coats but damage: what must be refused


def _damage(name: str, *touches: str):
    return _coat(name, *(touches or ("form",)), "damage", refusal="must")


def _one(g: np.random.Generator, pair: Pair) -> tuple[Dress, str]:
    """The image that is damaged."""
    dress, which = [(pair.fixed, "fixed"), (pair.moving, "moving")][g.integers(2)]
    dress.damaged = True
    return dress, which


@_damage("truncated file")
def _(g: np.random.Generator, pair: Pair) -> str:
    dress, which = _one(g, pair)
    dress.form, keep = str(g.choice([".nii", ".nii.gz", ".nrrd", ".mha"])), g.uniform(0.05, 0.98)
    dress.spoil = lambda path: os.truncate(path, int(keep * path.stat().st_size))
    return f"{which} {dress.form} {100 * keep:.0f} %"


@_damage("empty file")
def _(g: np.random.Generator, pair: Pair) -> str:
    dress, which = _one(g, pair)
    dress.form = str(g.choice([".nii", ".nii.gz", ".nrrd", ".mha"]))
    dress.spoil = lambda path: os.truncate(path, 0)
    return f"{which} {dress.form}"


@_damage("no image at all")
def _(g: np.random.Generator, pair: Pair) -> str:
    dress, which = _one(g, pair)
    dress.form = str(g.choice([".nii", ".nii.gz", ".nrrd", ".mha"]))
    dress.spoil = lambda path: path.write_text("patient,age\n1,70\n" * 50) and None
    return f"{which} {dress.form}"


@_damage("missing file")
def _(g: np.random.Generator, pair: Pair) -> str:
    dress, which = _one(g, pair)
    dress.spoil = lambda path: path.unlink()
    return which


@_damage("constant image", "few", "noise", "bias", "outlier", "fill", "form")
def _(g: np.random.Generator, pair: Pair) -> str:
    dress, which = _one(g, pair)
    value = float(g.choice([0, 1, 0.5]))
    dress.changes.append(lambda x: np.full_like(x, value))
    return f"{which} {value:g}"


@_damage("time series")
def _(g: np.random.Generator, pair: Pair) -> str:
    dress, which = _one(g, pair)
    dress.nifti.trailing = (int(g.integers(2, 4)),)
    return which


@_damage("single slice")
def _(g: np.random.Generator, pair: Pair) -> str:
    dress, which = _one(g, pair)
    flat = bool(g.integers(2))

    def writer(path: Path, array: np.ndarray, grid: Grid) -> Path:
        image = sitk_image(array, grid)
        middle = array.shape[2] // 2
        return write_sitk(image[:, :, middle] if flat else image[:, :, middle : middle + 1], path)

    dress.writer = writer
    return f"{which} {'2D' if flat else 'one slice'}"


@_damage("color or complex image")
def _(g: np.random.Generator, pair: Pair) -> str:
    dress, which = _one(g, pair)
    color = bool(g.integers(2))

    def writer(path: Path, array: np.ndarray, grid: Grid) -> Path:
        image = sitk_image(array.astype(np.float32), grid)
        made = sitk.Compose(image, image, image) if color else sitk.RealAndImaginaryToComplex(image, image)
        return write_sitk(made, path)

    dress.writer = writer
    return f"{which} {'color' if color else 'complex'}"


@_damage("sheared sform alone")
def _(g: np.random.Generator, pair: Pair) -> str:
    dress, which = _one(g, pair)
    shear = g.uniform(0.05, 0.3)
    dress.nifti.qform_code, dress.nifti.sform_code = 0, int(g.integers(1, 5))
    dress.late.append(_sheared(shear))
    return f"{which} {shear:.2f}"


@_damage("singular sform")
def _(g: np.random.Generator, pair: Pair) -> str:
    dress, which = _one(g, pair)
    axis, equal = g.integers(3), bool(g.integers(2))

    def late(dress: Dress, grid: Grid) -> None:
        dress.nifti.sform = LPS_TO_RAS @ grid.affine
        dress.nifti.sform[:3, axis] = dress.nifti.sform[:3, axis - 1] if equal else 0

    dress.nifti.qform_code, dress.nifti.sform_code = 0, int(g.integers(1, 5))
    dress.late.append(late)
    return which


@_damage("DICOM series with a missing slice", "form", "levels", "kind", "dicom")
def _(g: np.random.Generator, pair: Pair) -> str:
    dress, which = _one(g, pair)
    _as_dicom(g, dress, "dicom")
    share = g.uniform(0.2, 0.8)

    def spoil(path: Path) -> None:
        files = sorted(path.iterdir())
        files[int(share * len(files))].unlink()

    dress.spoil = spoil
    return which


@_damage("two DICOM series in one folder", "form", "levels", "kind", "dicom")
def _(g: np.random.Generator, pair: Pair) -> str:
    dress, which = _one(g, pair)
    _as_dicom(g, dress, "dicom")

    def writer(path: Path, array: np.ndarray, grid: Grid) -> Path:
        scale = DicomScale(np.ones(array.shape[2]), np.zeros(array.shape[2]))
        write_slices(path / "second", array, grid, scale)
        for file in sorted((path / "second").iterdir()):
            file.rename(path / f"B{file.name}")
        (path / "second").rmdir()
        return write_slices(path, array, grid, scale)

    dress.writer = writer
    return which


@_damage("enhanced DICOM with a gap", "form", "levels", "kind", "dicom")
def _(g: np.random.Generator, pair: Pair) -> str:
    dress, which = _one(g, pair)
    _as_dicom(g, dress, "enhanced")
    share, shuffle, seed = g.uniform(0.2, 0.8), bool(g.integers(2)), g.integers(2**31)

    def writer(path: Path, array: np.ndarray, grid: Grid) -> Path:
        order = np.delete(np.arange(array.shape[2]), int(share * array.shape[2]))
        if shuffle:
            np.random.default_rng(seed).shuffle(order)
        scale = DicomScale(np.ones(array.shape[2]), np.zeros(array.shape[2]))
        return write_frames(path, array, grid, scale, order)

    dress.writer = writer
    return f"{which}{' shuffled' if shuffle else ''}"


@_damage("infinite voxel in the head", "form", "levels", "kind", "outlier", "fill")
def _(g: np.random.Generator, pair: Pair) -> str:
    dress, which = _one(g, pair)
    dress.form = str(g.choice([".nii.gz", ".nrrd", ".mha"]))
    value = float(g.choice([np.inf, -np.inf]))

    def change(x: np.ndarray) -> np.ndarray:
        x[tuple(n // 2 for n in x.shape)] = value
        return x

    dress.changes.append(change)
    return f"{which} {value}"


# --- from a pair to files


@dataclass(frozen=True)
class Written:
    """An image on disk.

    Attributes:
        path: what to give to the command line.
        values: (i, j, k) float64, what the file says of the intensities.
        grid: in the file's space.
        world: (4, 4), space of the base pair -> space of the file.
        air, white, fill: what the file says of the intensities 0 and 1, and outside of the field of view.
        damaged: the product must refuse it.
        outline: the inside of the head shows nothing: the alignment must be right, and a warning is due.
    """

    path: Path
    values: np.ndarray
    grid: Grid
    world: np.ndarray
    air: float
    white: float
    fill: float
    damaged: bool = False
    outline: bool = False


def write(dress: Dress, heads: Heads, folder: Path, generator: np.random.Generator) -> Written:
    """Store one image of a pair."""
    dicom = dress.form in ("dicom", "dicom-file", "enhanced")
    grid = dress.grid
    if dicom and np.linalg.det(grid.direction) < 0:  # DICOM's slices follow a right-handed normal
        grid = turned(grid, [0, 1, 2], [False, False, True])
    x = heads.image(grid, dress.moving, dress.averaged)
    for change in dress.changes:
        x = change(x)
    for late in dress.late:
        late(dress, Grid(grid.shape, dress.world @ grid.affine))
    grid = Grid(grid.shape, dress.world @ grid.affine)
    stored = _stored(dress.low + x * (dress.high - dress.low), dress.kind)
    path = folder / (dress.stem + ("" if dress.form.startswith("dicom") else dress.form))
    scale = DicomScale(np.ones(grid.shape[2]), np.zeros(grid.shape[2]))
    if dress.form == "enhanced":
        path = path.with_name(dress.stem + ".dcm")
    if dress.slopes:
        stored, scale = _per_slice(dress.low + x * (dress.high - dress.low), dress.kind)
    values = stored.astype(np.float64)
    air, white = dress.low, dress.high
    fill = air if dress.fill is None or np.isnan(dress.fill) else air + dress.fill * (white - air)
    if not dress.slopes:  # which store values that their type alone cannot
        fill = float(_stored(np.array(fill), dress.kind))
    suffix = dress.form.lower()
    if dress.writer is not None:
        path = dress.writer(path, stored, grid)
    elif dress.form.startswith("dicom"):
        path = write_slices(path, stored, grid, scale, generator if dress.shuffle else None)
    elif dress.form == "enhanced":
        order = generator.permutation(grid.shape[2]) if dress.shuffle else np.arange(grid.shape[2])
        path = write_frames(path, stored, grid, scale, order)
    elif suffix in (".mha", ".mhd"):
        path = write_sitk(sitk_image(stored, grid), path)
    elif suffix in (".nrrd", ".nhdr"):
        path = write_nrrd(path, stored, grid)
    else:
        more = dress.nifti.trailing
        repeated = np.broadcast_to(stored.reshape(*stored.shape, *(1 for _ in more)), (*stored.shape, *more))
        path = write_nifti(path, repeated, grid, dress.nifti)
        if np.isfinite(dress.nifti.slope) and dress.nifti.slope != 0:
            values, air, white, fill = (
                v * dress.nifti.slope + dress.nifti.intercept for v in (values, air, white, fill)
            )
    if dicom:
        values = values * scale.slopes + scale.intercepts
    if dress.spoil is not None:
        path = dress.spoil(path) or path
    if dress.form == "dicom-file" and path.is_dir():
        path = sorted(path.iterdir())[grid.shape[2] // 3]
    return Written(path, values, grid, dress.world, air, white, fill, dress.damaged, dress.outline)


def write_labels(labels: LabelDress, dress: Dress, image: Written, heads: Heads, folder: Path) -> Written:
    """Store the label map of an image that was written."""
    to_base = Grid(image.grid.shape, np.linalg.inv(image.world) @ image.grid.affine)
    number = heads.labels(to_base, dress.moving)
    values = np.concatenate([[0], labels.values])[number].astype(np.float64)
    grid, stored = image.grid, values
    if labels.spoil is not None and dress.moving:
        stored = labels.spoil(stored)
    if labels.turned:
        grid, stored = turned(grid, [1, 2, 0], [True, False, True]), stored.transpose(1, 2, 0)[::-1, :, ::-1]
    stored = stored.astype(labels.kind)
    path = folder / f"{'bertha' if dress.moving else 'anna'}-labels{labels.form}"
    if labels.form == ".nrrd":
        write_nrrd(path, stored, grid)
    else:
        write_nifti(path, stored, grid, NiftiHeader())
    return Written(path, values, image.grid, image.world, 0.0, float(values.max()), 0.0)


def turned(grid: Grid, order, flips) -> Grid:
    """The same voxels, stored along other axes."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
        matrix[old, new] = -1 if flip else 1
        matrix[old, 3] = grid.shape[old] - 1 if flip else 0
    return Grid(tuple(grid.shape[a] for a in order), grid.affine @ matrix)


def _around(center: np.ndarray, shape, spacing, direction: np.ndarray) -> Grid:
    first = center - direction @ (np.asarray(spacing) * (np.asarray(shape) - 1) / 2)
    return Grid.from_parts([int(n) for n in shape], spacing, direction, first)


def _extended(grid: Grid, before: np.ndarray, after: np.ndarray) -> Grid:
    """More (or, below zero, fewer) voxels at both ends of each axis."""
    origin = apply_affine(grid.affine, -np.asarray(before)[None])[0]
    shape = np.array(grid.shape) + before + after
    return Grid.from_parts(shape.tolist(), grid.spacing, grid.direction, origin)


def _with_spacing(grid: Grid, spacing) -> Grid:
    shape = np.ceil(grid.spacing * grid.shape / spacing).astype(int)
    return _around(grid.center, shape, spacing, grid.direction)


def _shift(vector: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = vector
    return matrix


def _fill(dress: Dress, value: float) -> None:
    """Fill the air outside of the ellipse that the first two axes inscribe."""

    def change(x: np.ndarray) -> np.ndarray:
        i, j = (np.linspace(-1, 1, n) for n in x.shape[:2])
        outside = (i[:, None] ** 2 + j[None, :] ** 2 > 1.0)[:, :, None] & (np.abs(x) < 0.05)
        x[outside] = value
        return x

    dress.fill = value
    dress.changes.append(change)


def _sheared(shear: float) -> Callable[[Dress, Grid], None]:
    def late(dress: Dress, grid: Grid) -> None:
        matrix = np.eye(4)
        matrix[0, 1] = shear
        dress.nifti.sform = LPS_TO_RAS @ grid.affine @ matrix

    return late


def _span(g: np.random.Generator, kind: str) -> tuple[float, float]:
    """Stored values of air and of the brightest tissue."""
    choices = {
        "uint8": [(0, 255), (10, 200)],
        "int8": [(-128, 127), (0, 120)],
        "uint16": [(0, 4095), (0, 65535), (1000, 3000)],
        "int16": [(0, 1000), (-1024, 3000), (-32768, 32767)],
        "int32": [(0, 1e6), (-1e5, 1e5), (2e9, 2.1e9)],
        "uint32": [(0, 1e6), (3e9, 4.2e9)],
        "int64": [(0, 1e6), (-1e5, 1e5)],
        "float32": [(0, 255), (-5, 5)],
        "float64": [(0, 255), (0, 1e-9), (-1e5, 1e5)],
    }[kind]
    return choices[g.integers(len(choices))]


def _stored(values: np.ndarray, kind: str) -> np.ndarray:
    """Round and clip to a number type."""
    if np.issubdtype(np.dtype(kind), np.floating):
        return values.astype(kind)
    limits = np.iinfo(kind)
    return np.round(np.clip(values, limits.min, limits.max)).astype(kind)


def _as_dicom(g: np.random.Generator, dress: Dress, form: str) -> None:
    dress.form, dress.kind = form, str(g.choice(["int16", "uint16"]))
    dress.low, dress.high = _span(g, dress.kind)


def _per_slice(values: np.ndarray, kind: str) -> tuple[np.ndarray, DicomScale]:
    """Store every slice with the slope that makes the most of 12 bits, as scanners for PET do."""
    low, high = values.min(axis=(0, 1)), values.max(axis=(0, 1))
    slopes = np.array([float(f"{max(s, 1e-3):.6g}") for s in (high - low) / 4000])
    intercepts = np.array([float(f"{v:.6g}") for v in low])
    return _stored((values - intercepts) / slopes, kind), DicomScale(slopes, intercepts)
