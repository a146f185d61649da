"""Cases and pairs: Learn2Reg-style data sets (dataset.json), or a folder of label maps.

dataset.json names splits of cases (``"training": [{"image": ..., "label": ...}]``) and of pairs
(``"registration_test": [{"fixed": ..., "moving": ...}]``); paths are relative to it. A case may name ``"landmarks"``:
points that correspond, in their order, to those of every other case; see :func:`read_landmarks`. ``"pairing"`` says
which cases are fixed and which moving in training, by file name: ``"fixed = mr_*, moving = ct_*"``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import fields
from .background import quiet_background
from .errors import MorphSeekError
from .geometry import Grid, Volume, apply_affine, orientation_matrix, resample, smooth_for_spacing
from .images import check_labels, read_image, read_labels
from .preprocessing import Preprocessing, normalize, working_grid

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".mgz")
KEPT_BYTES = 4 * 2**30
"""What a :class:`PairLoader` keeps. Not a share of the computer's memory: a job on a cluster may use only a part of
that, several processes share it, and a case that was dropped costs no more than reading it again, ahead of time."""


@dataclass(frozen=True)
class Case:
    """One scan: files, any of which may be missing.

    Attributes:
        merged: (value, value to take it for) of labels, such as a tumour's for its organ's; see
            :func:`read_case_labels`.
    """

    image: Path | None = None
    label: Path | None = None
    landmarks: Path | None = None
    merged: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Pair:
    """A fixed and a moving case."""

    fixed: Case
    moving: Case


@dataclass(frozen=True)
class Dataset:
    """What dataset.json says.

    Attributes:
        path: the file, or the folder.
        cases: split -> cases.
        pairs: split -> pairs.
        labels: label value -> name.
        evaluated: labels to score; None for all.
        pairing: patterns (fnmatch) that the file names of fixed and of moving training cases match; None: any two cases
            make a pair. See :func:`training_pair`.
        about: name, licence, reference and so on, for provenance.
    """

    path: Path
    cases: dict[str, list[Case]] = field(default_factory=dict)
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    labels: dict[int, str] = field(default_factory=dict)
    evaluated: tuple[int, ...] | None = None
    pairing: tuple[str, str] | None = None
    about: dict[str, str] = field(default_factory=dict)

    def split(self, name: str, kind: str = "pairs") -> list:
        """The pairs (or cases) of a split.

        Raises:
            MorphSeekError: no such split; the known ones are listed.
        """
        splits = getattr(self, kind)
        if not splits.get(name):
            known = ", ".join(sorted(k for k, v in splits.items() if v)) or "none"
            raise MorphSeekError(f"{self.path} has no {kind} under '{name}'; it has: {known}.")
        return splits[name]


def load_dataset(path: Path | str) -> Dataset:
    """Read a dataset.json, or take every image file of a folder as a label map for the split "training".

    Raises:
        MorphSeekError: missing or malformed file, a file it names that does not exist.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith(IMAGE_SUFFIXES))
        if not files:
            raise MorphSeekError(f"The folder {path} holds no label maps ({', '.join(IMAGE_SUFFIXES)}).")
        return Dataset(path, {"training": [Case(label=p) for p in files]}, about={"name": path.name})
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MorphSeekError(f"The data set {path} cannot be read ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise MorphSeekError(f"The data set {path} is not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise MorphSeekError(f"The data set {path} must be a JSON object with splits such as 'training'.")
    root = path.parent
    cases: dict[str, list[Case]] = {}
    pairs: dict[str, list[Pair]] = {}
    by_image: dict[str, Case] = {}
    entries = {k: v for k, v in values.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    for split, rows in entries.items():
        if "image" in rows[0] or "label" in rows[0]:
            cases[split] = [
                Case(*(_file(root, row.get(kind), path) for kind in ("image", "label", "landmarks"))) for row in rows
            ]
            by_image.update(
                {row["image"]: case for row, case in zip(rows, cases[split], strict=True) if "image" in row}
            )
    for split, rows in entries.items():
        if "fixed" in rows[0]:
            pairs[split] = [
                Pair(*(_case(row, side, by_image, root, path) for side in ("fixed", "moving"))) for row in rows
            ]
    return Dataset(
        path,
        cases,
        pairs,
        {int(k): str(v) for k, v in values.get("labels", {}).items() if str(k).isdigit()},
        tuple(values["evaluated_labels"]) if "evaluated_labels" in values else None,
        _pairing(values["pairing"], path) if "pairing" in values else None,
        {k: v for k, v in values.items() if isinstance(v, str)},
    )


def _pairing(text: object, path: Path) -> tuple[str, str]:
    found = re.fullmatch(r"\s*fixed\s*=\s*([^\s,=]+)\s*,\s*moving\s*=\s*([^\s,=]+)\s*", str(text))
    if found is None:
        raise MorphSeekError(
            f"{path} has the pairing '{text}'; it must name patterns of file names: 'fixed = mr_*, moving = ct_*'."
        )
    return found[1], found[2]


def paired_sides(cases: Sequence[Case], pairing: tuple[str, str]) -> tuple[list[Case], ...]:
    """The cases that may be fixed, and those that may be moving, by the names of their images (else of their labels).

    Raises:
        MorphSeekError: a side without cases, or both with the same single one.
    """
    sides = tuple([c for c in cases if fnmatchcase((c.image or c.label).name, pattern)] for pattern in pairing)
    for side, pattern, found in zip(("fixed", "moving"), pairing, sides, strict=True):
        if not found:
            raise MorphSeekError(
                f"None of {len(cases)} training cases is named '{pattern}', as the data set's pairing wants the {side} "
                "one of a pair; mend the pairing, or add such cases."
            )
    if len(sides[0]) == 1 and sides[0] == sides[1]:
        raise MorphSeekError(f"{pairing[0]} and {pairing[1]} match one and the same training case; mend the pairing.")
    return sides


def training_pair(cases: Sequence[Case], pairing: tuple[str, str] | None, generator: torch.Generator) -> Pair:
    """Draw a pair to train on: two cases, or one of either side of a pairing.

    Raises:
        MorphSeekError: as :func:`paired_sides`.
    """
    if pairing is None:
        first, second = torch.randperm(len(cases), generator=generator)[:2].tolist()
        return Pair(cases[first], cases[second])
    sides = paired_sides(cases, pairing)
    while True:  # patterns may overlap; a case is no pair with itself
        fixed, moving = (side[int(torch.randint(len(side), (1,), generator=generator))] for side in sides)
        if fixed != moving:
            return Pair(fixed, moving)


def _case(row: dict, side: str, known: dict[str, Case], root: Path, path: Path) -> Case:
    image = row.get(side)
    if image in known:
        return known[image]
    return Case(*(_file(root, name, path) for name in (image, row.get(f"{side}_label"), row.get(f"{side}_landmarks"))))


def _file(root: Path, name: str | None, dataset: Path) -> Path | None:
    if name is None:
        return None
    if not (root / name).exists():
        raise MorphSeekError(f"{dataset} names {name}, which is not there; mend the data set or copy the file.")
    return root / name


def read_case_labels(case: Case, image: Volume) -> Volume:
    """A case's label map on the grid of its image, int32 (i, j, k), merged as the case says.

    Raises:
        MorphSeekError: as :func:`MorphSeekLib.images.read_labels` and :func:`MorphSeekLib.images.check_labels`.
    """
    labels = check_labels(read_labels(case.label), image, case.label.name)
    for value, other in case.merged:
        labels = Volume(labels.data.masked_fill(labels.data == value, other), labels.grid)
    return labels


def read_pair(pair: Pair) -> tuple[tuple[Volume, Volume], tuple[Volume, Volume]]:
    """((fixed image, its labels), (moving image, its labels)) of a pair to score.

    Raises:
        MorphSeekError: a case without image or labels, or as :func:`MorphSeekLib.images.read_image` and
            :func:`read_case_labels`.
    """
    volumes = []
    for case in (pair.fixed, pair.moving):
        if case.image is None or case.label is None:
            raise MorphSeekError(f"{case.image or case.label} has no partner: a pair needs images and labels.")
        image = read_image(case.image)
        volumes.append((image, read_case_labels(case, image)))
    return volumes[0], volumes[1]


def read_landmarks(path: Path, grid: Grid) -> np.ndarray:
    """Landmarks of an image, from a Slicer markups file (.mrk.json) or a table of voxel indices (.csv, as Learn2Reg's).

    Args:
        grid: the image's; a table's indices i, j, k are those of its voxels.

    Returns:
        (n, 3) LPS mm.

    Raises:
        MorphSeekError: unreadable, malformed or empty.
    """
    try:
        if path.suffix == ".json":
            markup = json.loads(path.read_text(encoding="utf-8"))["markups"][0]
            points = np.array([point["position"] for point in markup["controlPoints"]], dtype=np.float64)
            if markup.get("coordinateSystem", "LPS") in ("RAS", "0"):
                points *= (-1, -1, 1)
        else:
            points = apply_affine(grid.affine, np.loadtxt(path, delimiter=",", ndmin=2))
        if points.ndim != 2 or points.shape[1] != 3 or not len(points) or not np.isfinite(points).all():
            raise ValueError("it must hold three finite numbers a point, and at least one point")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise MorphSeekError(
            f"The landmarks {path.name} cannot be read ({error}); give a Slicer markups file (.mrk.json), or a .csv "
            "table without a header, a line 'i,j,k' of voxel indices for each point."
        ) from error
    return points


@dataclass
class PreparedPair:
    """A pair on the fixed case's working grid, as a training or validation step takes it.

    Attributes:
        fixed, moving: (1, 1, i, j, k), normalised.
        fixed_labels, moving_labels: (1, 1, i, j, k) int32, or None.
        grid: the working grid.
        fixed_points, moving_points: (n, 3) landmarks in voxels of the working grid, or None.
    """

    fixed: Tensor
    moving: Tensor
    fixed_labels: Tensor | None
    moving_labels: Tensor | None
    grid: Grid
    fixed_points: Tensor | None = None
    moving_points: Tensor | None = None


class PairLoader:
    """Prepares pairs and keeps the cases it has read, at their own resolution, as far as they fit; the least recently
    used ones go first. May be called from several threads."""

    def __init__(
        self, preprocessing: Preprocessing, multiple_of: int, centered: bool, kept_bytes: int = KEPT_BYTES
    ) -> None:
        """``centered``: put the middles of the two images together; else their world coordinates count as they are."""
        self.preprocessing, self.multiple_of, self.centered = preprocessing, multiple_of, centered
        self.kept_bytes = kept_bytes
        self._cases: OrderedDict[Case, tuple[Volume, Volume | None, np.ndarray | None]] = OrderedDict()
        self._reading = threading.Lock()

    def __call__(self, pair: Pair) -> PreparedPair:
        fixed, fixed_labels, fixed_points = self._case(pair.fixed)
        moving, moving_labels, moving_points = self._case(pair.moving)
        grid = working_grid(fixed.grid, self.preprocessing, self.multiple_of)
        shift = np.eye(4)
        if self.centered:
            shift[:3, 3] = moving.grid.center - fixed.grid.center
        labels = [
            None if volume is None else resample(volume, grid, matrix, mode="nearest").data[None, None]
            for volume, matrix in ((fixed_labels, None), (moving_labels, shift))
        ]
        points = None, None
        if fixed_points is not None and moving_points is not None:
            if len(fixed_points) != len(moving_points):
                names = f"{pair.fixed.landmarks.name} and {pair.moving.landmarks.name}"
                raise MorphSeekError(
                    f"{names} hold {len(fixed_points)} and {len(moving_points)} landmarks; they must correspond one to "
                    "one."
                )
            to_index = np.linalg.inv(grid.affine)
            points = (
                torch.from_numpy(apply_affine(to_index, fixed_points)).float(),
                torch.from_numpy(apply_affine(to_index @ np.linalg.inv(shift), moving_points)).float(),
            )
        return PreparedPair(
            resample(fixed, grid).data[None, None],
            resample(moving, grid, shift).data[None, None],
            *labels,
            grid,
            *points,
        )

    def _case(self, case: Case) -> tuple[Volume, Volume | None, np.ndarray | None]:
        """A case from memory, else from its files; then the oldest ones are dropped, but never this one."""
        with self._reading:
            if case not in self._cases:
                self._cases[case] = self._read(case)
                held = {known: _bytes(volumes) for known, (*volumes, _) in self._cases.items()}
                while sum(held.values()) > self.kept_bytes and len(held) > 1:
                    dropped, _ = self._cases.popitem(last=False)
                    del held[dropped]
            self._cases.move_to_end(case)
            return self._cases[case]

    def _read(self, case: Case) -> tuple[Volume, Volume | None, np.ndarray | None]:
        if case.image is None:
            raise MorphSeekError(f"{case.label} has no image beside it; training on images needs one per case.")
        image = read_image(case.image)
        labels = None
        if case.label is not None:
            labels = read_case_labels(case, image)
        points = None if case.landmarks is None else read_landmarks(case.landmarks, image.grid)
        image = Volume(quiet_background(normalize(image.data, self.preprocessing)), image.grid)
        if self.preprocessing.spacing is not None:
            direction = orientation_matrix(self.preprocessing.orientation)
            image = smooth_for_spacing(image, np.abs(direction) @ np.array(self.preprocessing.spacing))
        return image, labels, points


def _bytes(volumes: Sequence[Volume | None]) -> int:
    return sum(volume.data.nbytes for volume in volumes if volume is not None)


def augment(pair: PreparedPair, strength: float, generator: torch.Generator) -> PreparedPair:
    """Both images of a pair, with their labels and landmarks, each bent by a random affine and smooth deformation.

    At strength 1 an affine part moves the grid's ends by up to a seventh of it, a smooth part has a standard deviation
    of one voxel at 4 x 4 x 4 nodes, and intensities in [0, 1] are raised to a power of 0.74 to 1.35.
    """
    changed = {}
    for side in ("fixed", "moving"):
        image = getattr(pair, side)
        shape = image.shape[2:]
        uniform = lambda *size: 2 * torch.rand(*size, generator=generator) - 1  # noqa: E731
        matrix, shift = 0.15 * strength * uniform(3, 3), 0.05 * strength * uniform(3) * torch.tensor(shape)
        centre = (torch.tensor(shape).view(3, 1, 1, 1) - 1) / 2
        bent = torch.einsum("ab,bijk->aijk", matrix, fields.identity(shape)[0] - centre) + shift.view(3, 1, 1, 1)
        nodes = strength * torch.randn(1, 3, 4, 4, 4, generator=generator)
        bent = bent[None] + F.interpolate(nodes, size=tuple(shape), mode="trilinear", align_corners=True)
        gamma = math.exp(0.3 * strength * float(uniform(1)))
        changed[side] = fields.warp(image, bent).clamp(min=0) ** gamma
        labels, points = getattr(pair, f"{side}_labels"), getattr(pair, f"{side}_points")
        if labels is not None:
            changed[f"{side}_labels"] = fields.warp(labels.float(), bent, "nearest").to(labels.dtype)
        if points is not None:  # what was at p is now where x + bent(x) = p
            back = fields.sample(fields.invert(bent), points.T.view(1, 3, -1, 1, 1).float(), padding="border")
            changed[f"{side}_points"] = points + back.flatten(2)[0].T
    return dataclasses.replace(pair, **changed)
