"""Cases and pairs: Learn2Reg-style data sets (dataset.json), or a folder of label maps.

dataset.json names splits of cases (``"training": [{"image": ..., "label": ...}]``) and of pairs
(``"registration_test": [{"fixed": ..., "moving": ...}]``); paths are relative to it. A case may name ``"landmarks"``:
points that correspond, in their order, to those of every other case; see :func:`read_landmarks`. ``"pairing"`` says
which cases are fixed and which moving in training, by file name: ``"fixed = mr_*, moving = ct_*"``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.images import check_labels, read_image, read_labels
from ..io.points import read_points
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..registration.alignment import object_size
from ..space import fields
from ..space.geometry import Grid, Volume, apply_affine, orientation_matrix, resample, smooth_for_spacing
from ..space.preprocessing import Preprocessing, normalized, sampled, working_grid
from .label_channels import to_channels

log = logging.getLogger(__name__)

Made = TypeVar("Made", bound=tuple[Any, ...])

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
BENT = 0.8
"""Strength of the deformations of pairs that are validated on though their cases are trained on."""
KEPT_BYTES = 4 * 2**30
"""What a :class:`PairLoader` keeps. Not a share of the computer's memory: a job on a cluster may use only a part of
that, several processes share it, and a case that was dropped costs no more than reading it again, ahead of time."""


@dataclass(frozen=True)
class Case:
    """One scan: files, any of which may be missing.

    Attributes:
        merged: (value, value to take it for) of labels, such as a tumor's for its organ's; see
            :func:`read_case_labels`.
    """

    image: Path | None = None
    label: Path | None = None
    landmarks: Path | None = None
    merged: tuple[tuple[int, int], ...] = ()

    @property
    def file(self) -> Path:
        """The image's file; the label map's where there is no image."""
        return given(self.image or self.label)


def given(path: Path | None) -> Path:
    """Return a file that a case was checked to have."""
    if path is None:
        raise ValueError("the case lacks a file; check it with scored_pairs or training_cases first")
    return path


@dataclass(frozen=True)
class Pair:
    """A fixed and a moving case.

    Attributes:
        bent_by: seed of the random deformations by which a :class:`PairLoader` bends both (:func:`augment`), so that
            cases that are trained on can be validated on too; None: they are taken as they are.
    """

    fixed: Case
    moving: Case
    bent_by: int | None = None


@dataclass(frozen=True)
class Dataset:
    """What dataset.json says.

    Attributes:
        path: the file, or the folder.
        cases: split -> cases.
        pairs: split -> pairs.
        labels: label value -> name.
        orphans: label maps of a folder without dataset.json that no image belongs to.
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
    orphans: tuple[Path, ...] = ()

    def label_name(self, value: int) -> str:
        """Return what a label is called: its name, with the value where another label has the same name."""
        name = self.labels.get(value, str(value))
        return name if list(self.labels.values()).count(name) < 2 else f"{name} ({value})"

    def split(self, name: str, kind: str = "pairs") -> list:
        """Return the pairs (or cases) of a split.

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
        files = sorted(p for p in path.iterdir() if p.name.lower().endswith(IMAGE_SUFFIXES))
        if not files:
            raise MorphSeekError(f"The folder {path} holds no label maps ({', '.join(IMAGE_SUFFIXES)}).")
        return Dataset(path, {"training": [Case(label=p) for p in files]}, about={"name": path.name})
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise MorphSeekError(f"The data set {path} cannot be read ({error.strerror}); check the path.") from error
    except (ValueError, RecursionError) as error:
        raise MorphSeekError(f"The data set {path} is not valid JSON ({error}).") from error
    return _Description(path, values).dataset()


Row = Mapping[str, Any]
"""A row of a split as dataset.json has it, not checked yet."""
_CASE, _PAIR = ("image", "label", "landmarks"), ("fixed", "moving")
_SPLITS = {"training": "image", "registration_val": "fixed", "registration_test": "fixed"}
"""Names that are splits, whatever they hold, and what their rows must name."""


class _Description:
    """The content of a dataset.json on its way to a :class:`Dataset`.

    Raises, in all its methods:
        MorphSeekError: one sentence that names the file, what is wrong in it, and what it should be.
    """

    def __init__(self, path: Path, values: object) -> None:
        self.path = path
        if not isinstance(values, dict):
            self.refuse("must be a JSON object with splits such as 'training'")
        self.values = {name: value for name, value in values.items() if value is not None}

    def refuse(self, what: str) -> NoReturn:
        shown = "".join(c if c.isprintable() else "?" for c in what)  # names in it may hold anything
        raise MorphSeekError(f"The data set {self.path} {shown}.")

    def dataset(self) -> Dataset:
        """Return what is described."""
        splits = {name: rows for name in self.values if (rows := self.rows(name)) is not None}
        cases: dict[str, list[Case]] = {}
        known: dict[str, Case] = {}
        for name, rows in splits.items():
            if not self.is_pairs(name, rows):
                cases[name] = [self.case(row, f"{name}[{n}]") for n, row in enumerate(rows)]
                known |= {row["image"]: c for row, c in zip(rows, cases[name], strict=True) if row.get("image")}
        pairs = {
            name: [self.pair(row, f"{name}[{n}]", known) for n, row in enumerate(rows)]
            for name, rows in splits.items()
            if self.is_pairs(name, rows)
        }
        labels = self.labels()
        return Dataset(
            self.path,
            cases,
            pairs,
            labels,
            self.evaluated(labels),
            _pairing(self.values["pairing"], self.path) if "pairing" in self.values else None,
            {k: v for k, v in self.values.items() if isinstance(v, str)},
        )

    def rows(self, name: str) -> list[Row] | None:
        """Return the rows of a split; None where the name stands for something else, or for nothing."""
        rows = self.values[name]
        keys = {*_CASE, *_PAIR}
        ours = isinstance(rows, list) and any(isinstance(row, dict) and keys & set(row) for row in rows)
        if name not in _SPLITS and not ours:
            return None
        if not isinstance(rows, list):
            self.refuse(f"has a '{name}' that is not a list of cases or pairs; write it as [{{...}}, {{...}}]")
        if name == "training":  # a bare name can only be an image
            rows = [{"image": row} if isinstance(row, str) else row for row in rows]
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                self.refuse(f"has a '{name}[{number}]' that is not an object; {self.example(name)}")
        return rows or None

    def is_pairs(self, name: str, rows: list[Row]) -> bool:
        return _SPLITS.get(name, "fixed" if "fixed" in rows[0] else "image") == "fixed"

    def example(self, name: str) -> str:
        if _SPLITS.get(name) == "fixed":
            return 'write each row as {"fixed": "images/a.nii.gz", "moving": "images/b.nii.gz"}'
        return 'write each row as {"image": "images/a.nii.gz", "label": "labels/a.nii.gz"}'

    def case(self, row: Row, where: str) -> Case:
        image, label, landmarks = (self.file(row, kind, where) for kind in _CASE)
        if image is None and label is None:
            self.refuse(f"has a '{where}' that names neither an image nor a label map; {self.example('training')}")
        return Case(image, label, landmarks)

    def pair(self, row: Row, where: str, known: dict[str, Case]) -> Pair:
        sides = []
        for side in _PAIR:
            name = row.get(side)
            if name is None:
                self.refuse(f"has a '{where}' without '{side}'; {self.example('registration_test')}")
            own = [self.file(row, key, where) for key in (side, f"{side}_label", f"{side}_landmarks")]
            case = known.get(name) if isinstance(name, str) else None
            if case is not None:  # what the pair itself says goes before what a training row says
                own = [mine or other for mine, other in zip(own, (case.image, case.label, case.landmarks), strict=True)]
            image, label, landmarks = own
            sides.append(Case(image, label, landmarks))
        return Pair(sides[0], sides[1])

    def file(self, row: Row, key: str, where: str) -> Path | None:
        """Return the file that a row names; None where it names none."""
        name = row.get(key)
        if name is None:
            return None
        if not isinstance(name, str) or not name.strip():
            self.refuse(f"has a '{where}' whose '{key}' is not a file name; name one file, relative to the data set")
        path = self.path.parent / name
        try:
            found = path.exists()
        except (OSError, ValueError):  # too long a name, or a character that no name has
            found = False
        if not found:
            self.refuse(f"names {name}, which is not there; fix the data set or copy the file")
        return path

    def labels(self) -> dict[int, str]:
        """Return value -> name, from {"1": "liver"}, {"liver": 1} (as nnU-Net writes it) or ["background", "liver"]."""
        given = self.values.get("labels", {})
        if isinstance(given, list):
            given = dict(enumerate(given))
        if not isinstance(given, dict):
            self.refuse('has \'labels\' that are not an object; write them as {"1": "liver", "2": "spleen"}')
        names: dict[int, str] = {}
        for key, value in given.items():
            number, name = _whole(key), value
            if number is None:
                number, name = _whole(value), key
                if isinstance(value, list):  # a region of nnU-Net: a name for several values together
                    continue
            if number is None or number < 0 or isinstance(name, (dict, list)) or name is None:
                self.refuse(
                    f"has the label '{key}' without a value of 0 or above; write labels as "
                    '{"1": "liver", "2": "spleen"}'
                )
            if number in names:
                self.refuse(f"names the label value {number} twice; give each value one name")
            names[number] = str(name)
        return names

    def evaluated(self, labels: dict[int, str]) -> tuple[int, ...] | None:
        """Return the labels to score, from values or names, one or several; None for all."""
        given = self.values.get("evaluated_labels")
        if given is None:
            return None
        by_name = {name: value for value, name in labels.items()}
        found = []
        for entry in given if isinstance(given, list) else [given]:
            value = _whole(entry)
            if value is None and isinstance(entry, str):
                value = by_name.get(entry)
            if value is None or value < 0:
                self.refuse(f"has the entry {json.dumps(entry)} in 'evaluated_labels'; write values such as [1, 2, 3]")
            if value:  # the background is never scored
                found.append(value)
        if not found:
            self.refuse("has no label in 'evaluated_labels'; name some, or leave it out to evaluate all")
        return tuple(dict.fromkeys(found))


def _whole(value: object) -> int | None:
    """Return the whole number that a JSON value is or spells; None if it is neither."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*-?[0-9]{1,18}\s*", value) else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) else None


def _pairing(text: object, path: Path) -> tuple[str, str]:
    found = re.fullmatch(r"\s*fixed\s*=\s*([^\s,=]+)\s*,\s*moving\s*=\s*([^\s,=]+)\s*", str(text))
    if found is None:
        raise MorphSeekError(
            f"The data set {path} has the pairing '{text}'; it must name patterns of file names: 'fixed = mr_*, moving "
            "= ct_*'."
        )
    return found[1], found[2]


def paired_sides(cases: Sequence[Case], pairing: tuple[str, str]) -> tuple[list[Case], ...]:
    """Return the cases that may be fixed, and those that may be moving, by the names of their images (else of their
    labels).

    Raises:
        MorphSeekError: a side without cases, or both with the same single one.
    """
    sides = tuple([c for c in cases if fnmatchcase(c.file.name, pattern)] for pattern in pairing)
    for side, pattern, found in zip(("fixed", "moving"), pairing, sides, strict=True):
        if not found:
            raise MorphSeekError(
                f"None of {len(cases)} training cases is named '{pattern}', as the data set's pairing wants the {side} "
                "one of a pair; correct the pairing, or add such cases."
            )
    if len(sides[0]) == 1 and sides[0] == sides[1]:
        raise MorphSeekError(f"{pairing[0]} and {pairing[1]} match the same training case; correct the pairing.")
    return sides


def training_pair(cases: Sequence[Case], pairing: tuple[str, str] | None, generator: torch.Generator) -> Pair:
    """Draw a pair to train on: two cases, or one of each side of a pairing.

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


def by_labels(cases: Iterable[Case]) -> tuple[list[Case], list[Case]]:
    """Return the cases with labels, and those without."""
    found: tuple[list[Case], list[Case]] = [], []
    for case in cases:
        found[case.label is None].append(case)
    return found


def read_case_labels(case: Case, image: Volume) -> Volume:
    """Return a case's label map on the grid of its image, int32 (i, j, k), merged as the case says.

    Raises:
        MorphSeekError: as :func:`MorphSeekLib.io.images.read_labels` and :func:`MorphSeekLib.io.images.check_labels`.
    """
    labels = _noted(check_labels(read_labels(given(case.label)), image, given(case.label).name))
    for value, other in case.merged:
        labels = Volume(labels.data.masked_fill(labels.data == value, other), labels.grid)
    return labels


def label_values(cases: Iterable[Case], job: Job = SILENT) -> tuple[int, ...]:
    """Read the label maps of cases; return the values that occur in any, merged as the cases say, without 0, in order.

    Raises:
        MorphSeekError: a label map that cannot be read.
        Cancelled: the user stopped it.
    """
    found: set[int] = set()
    for case in cases:
        job.check()
        if case.label is not None:
            merged = dict(case.merged)
            values = (int(value) for value in read_labels(case.label).data.unique())
            found |= {merged.get(value, value) for value in values}
    return tuple(sorted(found - {0}))


def _noted(volume: Volume) -> Volume:
    """Return the volume, after its notices were logged, each once: a training reads a case again and again."""
    for notice in volume.notices:
        _log_once(notice.message)
    return volume


@functools.cache
def _log_once(message: str) -> None:
    log.warning("%s", message)


def scored_pairs(dataset: Dataset, split: str) -> list[Pair]:
    """Return the pairs of a split, all of which have images and label maps.

    Raises:
        MorphSeekError: no such split, or a pair that cannot be scored, with what it lacks.
    """
    pairs: list[Pair] = dataset.split(split)
    for number, pair in enumerate(pairs):
        for side, case in (("fixed", pair.fixed), ("moving", pair.moving)):
            if case.image is None or case.label is None:
                lacks = "an image" if case.image is None else "a label map"
                raise MorphSeekError(
                    f"{case.file.name}, the {side} one of pair {number + 1} of '{split}' in {dataset.path.name}, has "
                    f"no entry for {lacks}, without which the pair cannot be scored; add a training row that names "
                    f"both, or '{side}_label' to the pair."
                )
    return pairs


def read_pair(pair: Pair) -> tuple[tuple[Volume, Volume], tuple[Volume, Volume]]:
    """Return ((fixed image, its labels), (moving image, its labels)) of a pair from :func:`scored_pairs`.

    Raises:
        MorphSeekError: as :func:`MorphSeekLib.io.images.read_image` and :func:`read_case_labels`.
    """
    volumes = []
    for case in (pair.fixed, pair.moving):
        image = _noted(read_image(given(case.image)))
        volumes.append((image, read_case_labels(case, image)))
    return volumes[0], volumes[1]


def known_sizes(cases: Sequence[Case], anatomy: Sequence[int] | None = None, most: int = 100) -> tuple[float, float]:
    """Return the smallest and largest size (mm) of what a training on these cases shows, for ``Preprocessing.knows``.

    Args:
        cases: of the training; of many, some are drawn.
        anatomy: None when the images are shown; else they are synthesized from the label maps, and these labels are
            shown alone at times.
        most: how many cases to measure.
    """
    places = sampled(torch.arange(len(cases)), most).tolist()
    sizes = []
    for case in (cases[place] for place in places):
        if anatomy is None:
            sizes.append(object_size(read_image(case.image)))
            continue
        labels = read_labels(case.label)
        shown = [labels.data != 0]
        if anatomy:
            shown.append(torch.isin(labels.data, torch.tensor(anatomy, dtype=labels.data.dtype)))
        sizes += [object_size(Volume(mask.float(), labels.grid)) for mask in shown]
    return round(min(sizes), 1), round(max(sizes), 1)


def known_volumes(cases: Sequence[Case], channels: Mapping[int, int], most: int = 100) -> tuple[dict[int, float], int]:
    """Return how much of what each channel stands for a case holds, and how many of them at least, for ``Card.volumes``
    and ``Card.fewest``.

    Args:
        cases: of the training; of many, some are drawn.
        channels: label value -> channel.
        most: how many cases to measure.

    Returns:
        channel -> milliliters, the median of the cases that hold any; the fewest channels of a case.
    """
    volumes: dict[int, list[float]] = {}
    held = []
    places = sampled(torch.arange(len(cases)), most).tolist()
    for case in (cases[place] for place in places):
        if case.label is None:
            continue
        labels = read_labels(case.label)
        known = dict(channels) | {value: channels.get(other, 0) for value, other in case.merged}
        counts = torch.bincount(to_channels(labels.data, known).flatten()).tolist()
        voxel = abs(float(np.linalg.det(labels.grid.affine[:3, :3]))) / 1000
        for channel, count in enumerate(counts):
            if channel and count:
                volumes.setdefault(channel, []).append(count * voxel)
        held.append(sum(count > 0 for count in counts[1:]))
    medians = {channel: round(float(np.median(found)), 3) for channel, found in sorted(volumes.items())}
    return medians, min(held, default=0)


def label_maps(cases: Sequence[Case]) -> list[Path]:
    """Return the label map of each case.

    Raises:
        MorphSeekError: one has none.
    """
    maps = []
    for case in cases:
        if case.label is None:
            raise MorphSeekError(f"{case.image} has no label map; synthesis needs one for every training case.")
        maps.append(case.label)
    return maps


def read_landmarks(path: Path, grid: Grid) -> np.ndarray:
    """Read landmarks of an image from Slicer's markups (.mrk.json, .fcsv) or a .csv of voxel indices (Learn2Reg's).

    Args:
        grid: the image's; a table's indices i, j, k are those of its voxels.

    Returns:
        (n, 3) LPS mm.

    Raises:
        MorphSeekError: unreadable, malformed or empty.
    """
    if path.suffix in (".json", ".fcsv"):
        return read_points(path, grid).positions
    try:
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
        fixed, moving: (1, 1, i, j, k), normalized.
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

    @property
    def labels(self) -> tuple[Tensor, Tensor] | None:
        """The labels of both; None where one has none."""
        if self.fixed_labels is None or self.moving_labels is None:
            return None
        return self.fixed_labels, self.moving_labels

    @property
    def points(self) -> tuple[Tensor, Tensor] | None:
        """The landmarks of both; None where one has none."""
        if self.fixed_points is None or self.moving_points is None:
            return None
        return self.fixed_points, self.moving_points


class PairLoader:
    """Prepares pairs, and cases alone, and keeps what it has read, at its own resolution, and the cases alone as they
    are prepared, as far as they fit; what was not used for longest goes first. May be called from several threads.

    Attributes:
        channels: label value -> what stands for it in the pairs (:mod:`MorphSeekLib.data.label_channels`); None: the
            values themselves. To be set before the first call.
        labeler: returns the label values, int32 (i, j, k), that stand for the label maps of the ``unlabeled`` cases,
            from an image (1, 1, i, j, k) on its working grid; None: they have no labels. Both to be set before the
            first call.
    """

    def __init__(
        self, preprocessing: Preprocessing, multiple_of: int, centered: bool, kept_bytes: int = KEPT_BYTES
    ) -> None:
        """Set ``centered``: whether the centers of the two images are put together; else world coordinates count."""
        self.preprocessing, self.multiple_of, self.centered = preprocessing, multiple_of, centered
        self.kept_bytes = kept_bytes
        self.channels: Mapping[int, int] | None = None
        self.labeler: Callable[[Tensor], Tensor] | None = None
        self.unlabeled: frozenset[Case] = frozenset()
        self._kept: OrderedDict[tuple[str, Case], tuple[Any, ...]] = OrderedDict()
        self._reading = threading.RLock()

    def __call__(self, pair: Pair) -> PreparedPair:
        fixed, fixed_labels, fixed_points = self._case(pair.fixed)
        moving, moving_labels, moving_points = self._case(pair.moving)
        grid = working_grid(fixed.grid, self.preprocessing, self.multiple_of)
        shift = np.eye(4)
        if self.centered:
            shift[:3, 3] = moving.grid.center - fixed.grid.center
        still, known = _onto(grid, fixed, fixed_labels)
        brought, carried = _onto(grid, moving, moving_labels, shift)
        prepared = PreparedPair(still, brought, known, carried, grid)
        if fixed_points is not None and moving_points is not None:
            if len(fixed_points) != len(moving_points):
                names = f"{given(pair.fixed.landmarks).name} and {given(pair.moving.landmarks).name}"
                raise MorphSeekError(
                    f"{names} hold {len(fixed_points)} and {len(moving_points)} landmarks; they must correspond one to "
                    "one."
                )
            to_index = np.linalg.inv(grid.affine)
            back = to_index @ np.linalg.inv(shift)
            prepared.fixed_points = torch.from_numpy(apply_affine(to_index, fixed_points)).float()
            prepared.moving_points = torch.from_numpy(apply_affine(back, moving_points)).float()
        if pair.bent_by is not None:
            prepared = augment(prepared, BENT, torch.Generator().manual_seed(pair.bent_by))
        return prepared

    def alone(self, case: Case) -> tuple[Tensor, Tensor | None]:
        """Return the image and the labels, (1, 1, i, j, k), of one case on its own grid, as :class:`PreparedPair` has
        those of a fixed one. They are kept, so that they must not be written to."""
        return self._once("alone", case, self._sampled)

    def _sampled(self, case: Case) -> tuple[Tensor, Tensor | None]:
        image, labels, _ = self._case(case)
        return _onto(working_grid(image.grid, self.preprocessing, self.multiple_of), image, labels)

    def _case(self, case: Case) -> tuple[Volume, Volume | None, np.ndarray | None]:
        return self._once("read", case, self._read)

    def _once(self, kind: str, case: Case, make: Callable[[Case], Made]) -> Made:
        """Return what was made of a case from memory, else make it; then the oldest go, but never what is asked for."""
        with self._reading:
            if (kind, case) not in self._kept:
                self._kept[kind, case] = make(case)
                held = {key: _bytes(made) for key, made in self._kept.items()}
                while sum(held.values()) > self.kept_bytes and len(held) > 1:
                    dropped, _ = self._kept.popitem(last=False)
                    del held[dropped]
            self._kept.move_to_end((kind, case))
            return cast(Made, self._kept[kind, case])

    def _read(self, case: Case) -> tuple[Volume, Volume | None, np.ndarray | None]:
        if case.image is None:
            raise MorphSeekError(f"{case.label} has no image; training on images needs one per case.")
        image = _noted(read_image(case.image))
        labels = None if case.label is None else read_case_labels(case, image)
        points = None if case.landmarks is None else read_landmarks(case.landmarks, image.grid)
        image = normalized(image, self.preprocessing, f"{case.image}")
        if self.preprocessing.spacing is not None:
            direction = orientation_matrix(self.preprocessing.orientation)
            image = smooth_for_spacing(image, np.abs(direction) @ np.array(self.preprocessing.spacing))
        if self.labeler is not None and case in self.unlabeled:
            grid = working_grid(image.grid, self.preprocessing, self.multiple_of)
            labels = Volume(self.labeler(resample(image, grid).data[None, None]), grid)
        if labels is not None and self.channels is not None:
            labels = Volume(to_channels(labels.data, self.channels), labels.grid)
        return image, labels, points


def _onto(
    grid: Grid, image: Volume, labels: Volume | None, matrix: np.ndarray | None = None
) -> tuple[Tensor, Tensor | None]:
    """Resample an image and its labels, (1, 1, i, j, k) each."""
    known = None if labels is None else resample(labels, grid, matrix, mode="nearest").data[None, None]
    return resample(image, grid, matrix).data[None, None], known


def _bytes(made: Iterable[Volume | Tensor | np.ndarray | None]) -> int:
    tensors = (one.data if isinstance(one, Volume) else one for one in made)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def augment(pair: PreparedPair, strength: float, generator: torch.Generator) -> PreparedPair:
    """Deform both images of a pair, with labels and landmarks, by random affine and smooth deformations.

    At strength 1 an affine part moves the grid's ends by up to a seventh of it, a smooth part has a standard deviation
    of one voxel at 4 x 4 x 4 nodes, and intensities in [0, 1] are raised to a power of 0.74 to 1.35.
    """
    changed: dict[str, Any] = {}
    for side in ("fixed", "moving"):
        image = getattr(pair, side)
        shape = image.shape[2:]
        uniform = lambda *size: 2 * torch.rand(*size, generator=generator) - 1  # noqa: E731
        matrix, shift = 0.15 * strength * uniform(3, 3), 0.05 * strength * uniform(3) * torch.tensor(shape)
        center = (torch.tensor(shape).view(3, 1, 1, 1) - 1) / 2
        bent = torch.einsum("ab,bijk->aijk", matrix, fields.identity(shape)[0] - center) + shift.view(3, 1, 1, 1)
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
