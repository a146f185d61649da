"""Cases before a training: found in a folder, checked one by one, and some of them held out, so that an error in the
data shows within a minute and not after a night.

    dataset = find_cases("folder")      # dataset.json, or images and label maps matched by their names
    report = check(dataset)             # a row per case, with its problems
    dataset = hold_out(dataset, report.unusable)
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import re
import statistics
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import numpy as np

from ..io.files import write_atomically
from ..io.images import check_labels, read_image, read_labels
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.settings import to_dict, to_json
from ..protocol.startup import check_output_file, shown
from .datasets import IMAGE_SUFFIXES, Case, Dataset, Pair, by_labels, load_dataset, paired_sides

VALIDATION, TEST = "registration_val", "registration_test"
FEWEST = 3  # cases: two to train on, one for the figures before and after
FEW = 10  # cases; below, the figures say little
_HELD_OUT, _MOST_HELD_OUT = 6, 20  # one case of six is held out for the figures, and at most so many
_TO_VALIDATE = 60  # cases, from which on some are spared to validate on
_VALIDATION_PAIRS = 8
_MOST_VOXELS = 2e6  # of the suggested working grid: what a step of training takes comfortably

_LABEL_WORDS = {"label", "labels", "labelmap", "seg", "segs", "segmentation", "segmentations", "mask", "masks"}
_IMAGE_WORDS = {"image", "images", "img", "imgs", "scan", "scans", "volume", "volumes"}
_SPLIT_ENDING = re.compile(r"(tr|ts|train|training|test|val)$")  # imagesTr, labelsTr


@dataclass
class CheckedCase:
    """What was found in one case.

    Attributes:
        name: its image's path in the data set.
        shape, spacing: voxels and mm, along the file's own axes.
        labels: label values without the background.
        problems: sentences, each a reason why the case cannot be used.
        warnings: sentences about what should be looked at.
    """

    name: str
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    labels: tuple[int, ...] = ()
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class CheckReport:
    """What was found in a data set.

    Attributes:
        cases: a row per case.
        labels: label value -> number of usable cases that have it.
        common: labels that every usable case has.
        names: label value -> name, where the data set says it.
        training, validation_pairs, test_pairs: how many a run would use, see :func:`hold_out`.
        unlabeled: how many cases without labels it would use besides, where it needs labels.
        problems: why no run is possible.
        warnings: about the data set as a whole.
        spacing: mm, a working grid that suits the cases; 0 when no case can be read.
    """

    cases: list[CheckedCase] = field(default_factory=list)
    labels: dict[int, int] = field(default_factory=dict)
    common: tuple[int, ...] = ()
    names: dict[int, str] = field(default_factory=dict)
    training: int = 0
    validation_pairs: int = 0
    test_pairs: int = 0
    unlabeled: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    spacing: float = 0.0

    @property
    def unusable(self) -> list[str]:
        """Names of the cases with problems."""
        return [case.name for case in self.cases if case.problems]


def find_cases(path: Path | str) -> Dataset:
    """Read a dataset.json (or the folder that holds one), or a folder of images and label maps that belong together
    by name.

    By name: "images/a.nii.gz" and "labels/a.nii.gz"; "a.nii.gz" and "a_label.nii.gz"; "a/image.nii.gz" and
    "a/segmentation.nii.gz". A file is a label map when its folder's name says so, or a word of its own where no folder
    does.

    Raises:
        MorphSeekError: nothing there, or two files that would both be the labels of one image.
    """
    path = Path(path)
    if not path.exists():
        raise MorphSeekError(f"There is no file or folder {path}; check the path.")
    if path.is_file():
        return load_dataset(path)
    descriptions = [path / "dataset.json"] if (path / "dataset.json").is_file() else sorted(path.glob("*dataset.json"))
    if len(descriptions) == 1:
        return load_dataset(descriptions[0])
    images: dict[tuple, Path] = {}
    labels: dict[tuple, Path] = {}
    for file in sorted(p for p in path.rglob("*") if p.name.lower().endswith(IMAGE_SUFFIXES) and p.is_file()):
        key, is_label = _key(file.relative_to(path))
        found = labels if is_label else images
        if key in found:
            what = "label maps" if is_label else "images"
            raise MorphSeekError(
                f"{found[key].relative_to(path)} and {file.relative_to(path)} are both {what} of one case by their "
                "names; rename or remove one, or describe the cases in a dataset.json."
            )
        found[key] = file
    if not images:
        raise MorphSeekError(
            f"The folder {path} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no dataset.json; choose the folder "
            "with the folders of images and labels in it."
        )
    return Dataset(
        path,
        {"training": [Case(file, labels.get(key)) for key, file in images.items()]},
        about={"name": path.name},
        orphans=tuple(file for key, file in labels.items() if key not in images),
    )


def _key(path: Path) -> tuple[tuple, bool]:
    """Return what an image and its label map share of their paths, and whether this one is a label map."""
    stem = path.name.lower()
    for suffix in sorted(IMAGE_SUFFIXES, key=len, reverse=True):
        stem = stem.removesuffix(suffix)
    words = re.split(r"[_\-. ]+", stem)
    folders = [_SPLIT_ENDING.sub("", part.lower()) for part in path.parts[:-1]]
    telling = [part for part in folders if part in _LABEL_WORDS | _IMAGE_WORDS] or words  # folders go before names
    is_label = any(word in _LABEL_WORDS for word in telling)
    ignored = _LABEL_WORDS | _IMAGE_WORDS
    words = [word for word in words if word not in ignored | {"0000"}]  # 0000: the first channel, in nnU-Net's names
    return (tuple(folder for folder in folders if folder not in ignored), tuple(words)), is_label


def check(
    dataset: Dataset,
    *,
    labels: bool = True,
    out: Path | str | None = None,
    job: Job = SILENT,
) -> CheckReport:
    """Read every case, one at a time, and report what is wrong with it.

    Args:
        dataset: from :func:`find_cases`.
        labels: whether the training needs them (warm-up alone does not).
        out: a JSON file to write the report to; None writes none.
        job: told of every case, and checked before it.

    Raises:
        MorphSeekError: ``out`` cannot be written.
        Cancelled: the user stopped it.
    """
    if out is not None:
        check_output_file(out, inputs=[dataset.path])
    cases = _all_cases(dataset)
    rows: list[CheckedCase] = []
    seen: dict[str, str] = {}
    for index, case in enumerate(cases):
        job.check()
        name = name_of(case, dataset)
        message = f"Checking case {index + 1} of {len(cases)}: {name}"
        job.report("read", index / len(cases), message, index + 1, len(cases))
        row = _check_case(case, name, labels, seen)
        row.problems = [text.replace(f"{_root(dataset)}{os.sep}", "") for text in row.problems]
        rows.append(row)
    report = CheckReport(rows, names=dataset.labels)
    report.warnings += [
        f"{_relative(path, dataset)} is a label map that no image belongs to by its name, so it is not used; rename it "
        "or its image alike, or remove it."
        for path in dataset.orphans
    ]
    good = [row for row in rows if not row.problems]
    labeled = [row for row in good if row.labels]
    report.labels = dict(sorted(Counter(label for row in labeled for label in row.labels).items()))
    _compare(report, labeled, labels, dataset.pairing)
    _check_spacings(good)
    if good:
        report.spacing = _suggest_spacing(good)
    try:
        used = hold_out(dataset, report.unusable)
    except MorphSeekError as problem:
        report.problems.append(str(problem))
    else:
        report.unlabeled = len(by_labels(used.cases["training"])[1]) if labels else 0
        report.training = len(used.cases["training"]) - report.unlabeled
        report.validation_pairs, report.test_pairs = len(used.pairs[VALIDATION]), len(used.pairs[TEST])
        counted = labeled if labels else good
        if labels and len(labeled) < FEWEST:
            report.problems.append(
                f"{len(labeled)} of {len(good)} usable cases have labels, and at least {FEWEST} must: two to train on, "
                "one for the figures; add label maps, or choose the warm-up alone."
            )
        elif len(counted) < FEW:
            report.warnings.append(
                f"{len(counted)} usable cases are few: the figures on the held-out ones will say little; {FEW} or more "
                "are better."
            )
    if out is not None:
        write_atomically(Path(out), to_json(to_dict(report), indent=1).encode())
    job.report("read", 1.0, f"Checked {len(rows)} cases", len(rows), len(rows))
    return report


def hold_out(dataset: Dataset, leave_out: Collection[str] = ()) -> Dataset:
    """Return the data set as a run uses it: cases to train on, pairs to validate on, pairs of other cases to test on.

    The data set's own pairs ("registration_val", "registration_test") are kept where both sides have labels, and their
    cases are taken out of "training". Where it has none to test on, a sixth of the cases is held out, at most twenty
    (of either side, in a data set with a pairing); a single held-out case is the fixed one of pairs with training
    cases. Where it has none to validate on, as many are held out if there are sixty cases or more. Fewer are too
    precious: then pairs of training cases are validated on, bent at random. They say little of how good a model is on
    others, but choose the weights to keep among those of one training, which all know these cases. Where three cases or
    more have labels, only those are counted and held out; the others are all trained on.

    Args:
        leave_out: names (:func:`name_of`) of cases not to use.

    Raises:
        MorphSeekError: too few cases, or none left of one side of a pairing.
    """
    unwanted = set(leave_out)
    cases = [case for case in dataset.cases.get("training", []) if name_of(case, dataset) not in unwanted]
    pairs = {split: _labeled_pairs(dataset, split, unwanted) for split in (VALIDATION, TEST)}
    held = {case.image for rows in pairs.values() for pair in rows for case in (pair.fixed, pair.moving)}
    cases = [case for case in cases if case.image not in held]
    labeled, bare = by_labels(cases)
    cases, bare = (labeled, bare) if len(labeled) >= FEWEST else (cases, [])
    missing = [split for split in (VALIDATION, TEST) if not pairs[split]]
    bent = VALIDATION in missing and len(cases) < _TO_VALIDATE
    if bent:
        missing.remove(VALIDATION)
    needed = FEWEST - 1 + len(missing)
    if len(cases) < needed:
        raise MorphSeekError(
            f"{dataset.path} leaves {len(cases)} usable training cases besides the held-out ones; at least {needed} "
            "are needed."
        )
    if missing and dataset.pairing is not None:
        one_side, other_side = paired_sides(cases, dataset.pairing)
        fixed = _draw(one_side, len(missing))
        moving = _draw([case for case in other_side if not any(case in group for group in fixed)], len(missing))
        cases = [case for case in cases if not any(case in group for group in fixed + moving)]
        paired_sides(cases, dataset.pairing)  # something must be left to train on
        pairs |= {split: _across(f, m) for split, f, m in zip(missing, fixed, moving, strict=True)}
    elif missing:
        groups = _draw(cases, len(missing))
        cases = [case for case in cases if not any(case in group for group in groups)]
        pairs |= {split: _pairs_of(group, cases) for split, group in zip(missing, groups, strict=True)}
    elif dataset.pairing is not None:
        paired_sides(cases, dataset.pairing)
    if bent:
        pairs[VALIDATION] = _bent_pairs(cases, dataset.pairing)
    return dataclasses.replace(dataset, cases={"training": cases + bare}, pairs=pairs)


def all_cases(dataset: Dataset, leave_out: Collection[str] = ()) -> Dataset:
    """Return the data set as the last stage of a run uses it: what :func:`hold_out` held out is trained on too.

    What the data set itself names to validate or to test on stays apart. Bent pairs of training cases are validated on
    where it names none.
    """
    own = {split: pairs for split in (VALIDATION, TEST) if (pairs := _labeled_pairs(dataset, split, leave_out))}
    used = hold_out(dataset, leave_out)
    taken = [
        case
        for split, pairs in used.pairs.items()
        if split not in own
        for pair in pairs
        for case in (pair.fixed, pair.moving)
    ]
    cases = list(dict.fromkeys([*used.cases["training"], *taken]))
    validation = own.get(VALIDATION) or _bent_pairs(cases, dataset.pairing)
    return dataclasses.replace(used, cases={"training": cases}, pairs={VALIDATION: validation})


def choice_pairs(dataset: Dataset) -> list[Pair]:
    """Return the pairs, of a data set from :func:`hold_out`, by which a finished model's answers are compared.

    They must be of cases that were not trained on: a network knows its training cases better than a fit does. They are
    those to validate on, else those to test on with fixed and moving exchanged, so that no pair is chosen by and
    measured on.
    """
    validation = [pair for pair in dataset.pairs[VALIDATION] if pair.bent_by is None]
    pairs = validation or [Pair(pair.moving, pair.fixed) for pair in dataset.pairs[TEST]]
    return [pair for pair in pairs if pair.fixed.label and pair.moving.label]


def _labeled_pairs(dataset: Dataset, split: str, leave_out: Collection[str]) -> list[Pair]:
    """Return the pairs that a data set itself names and that can be used."""
    return [
        pair
        for pair in dataset.pairs.get(split, [])
        if all(name_of(c, dataset) not in leave_out and c.label is not None for c in (pair.fixed, pair.moving))
    ]


def _bent_pairs(cases: list[Case], pairing: tuple[str, str] | None) -> list[Pair]:
    """Return pairs of training cases, each bent in its own way; labeled ones where there are enough."""
    cases = by_labels(cases)[0] or cases
    order = random.Random(1).sample(cases, len(cases))
    if pairing is not None:
        pairs = [pair for pair in _across(*paired_sides(order, pairing)) if pair.fixed != pair.moving]
    else:
        pairs = _pairs_of(order, order[1:]) if len(order) > 1 else []
    return [dataclasses.replace(pair, bent_by=n) for n, pair in enumerate(pairs[:_VALIDATION_PAIRS])]


def _draw(cases: list[Case], groups: int) -> list[list[Case]]:
    """Draw groups of cases, each a sixth of them; the same groups each time."""
    count = max(1, min(len(cases) // _HELD_OUT, _MOST_HELD_OUT))
    order = random.Random(0).sample(cases, len(cases))
    return [order[n * count : (n + 1) * count] for n in range(groups)]


def _across(fixed: list[Case], moving: list[Case]) -> list[Pair]:
    """Pair every held-out case of both sides at least once."""
    return [Pair(fixed[n % len(fixed)], moving[n % len(moving)]) for n in range(max(len(fixed), len(moving)))]


def _pairs_of(held: list[Case], others: list[Case]) -> list[Pair]:
    """Return a ring of held-out cases; a single one is paired with two that are not."""
    if len(held) == 1:
        return [Pair(held[0], other) for other in others[:2]]
    return [Pair(case, held[(n + 1) % len(held)]) for n, case in enumerate(held)]


def name_of(case: Case, dataset: Dataset) -> str:
    """Return what a case is called: its image's path, relative to the data set where it lies in it."""
    return _relative(case.file, dataset)


def _relative(path: Path, dataset: Dataset) -> str:
    root = _root(dataset)
    return shown(path.relative_to(root).as_posix() if path.is_relative_to(root) else path)


def _root(dataset: Dataset) -> Path:
    """Return the folder that the data set lies in."""
    return dataset.path if dataset.path.is_dir() else dataset.path.parent


def _all_cases(dataset: Dataset) -> list[Case]:
    """Yield every case once: those to train on, then those of the pairs."""
    cases = {case.file: case for case in dataset.cases.get("training", [])}
    for split in (VALIDATION, TEST):
        for pair in dataset.pairs.get(split, []):
            for case in (pair.fixed, pair.moving):
                if case.label is not None or split == VALIDATION:  # published test pairs often keep their labels secret
                    cases.setdefault(case.file, case)
    return list(cases.values())


def _check_case(case: Case, name: str, needs_labels: bool, seen: dict[str, str]) -> CheckedCase:
    """Return one row. ``seen`` maps the digests of the images so far to their names."""
    row = CheckedCase(name)
    if case.image is None:
        row.problems.append("It has a label map but no image.")
        return row
    try:
        image = read_image(case.image)
    except MorphSeekError as problem:
        row.problems.append(str(problem))
        return row
    row.warnings += [notice.message for notice in image.notices]
    row.shape, row.spacing = image.grid.shape, tuple(round(float(s), 3) for s in image.grid.spacing)
    digest = hashlib.sha256(np.ascontiguousarray(image.data.numpy()).data).hexdigest()
    if digest in seen:
        row.problems.append(f"It is the same image as {seen[digest]}, which would count twice; remove one.")
    seen.setdefault(digest, name)
    if case.label is None:
        if needs_labels:
            row.warnings.append(
                "It has no label map, so only a network that finds labels learns from it, by what it finds itself."
            )
        return row
    try:
        labels = read_labels(case.label)
        row.warnings += [notice.message for notice in check_labels(labels, image, case.label.name).notices]
    except MorphSeekError as problem:
        row.problems.append(str(problem))
        return row
    row.labels = tuple(int(value) for value in labels.data.unique() if value != 0)
    return row


def _compare(
    report: CheckReport, labeled: list[CheckedCase], needs_labels: bool, pairing: tuple[str, str] | None
) -> None:
    """Report labels in common, and which case lacks which; the sides of a pairing may differ in their labels."""
    if not labeled:
        return
    groups = [labeled]
    if pairing is not None:
        named = [(PurePosixPath(row.name).name, row) for row in labeled]
        groups = [[row for name, row in named if fnmatchcase(name, pattern)] for pattern in dict.fromkeys(pairing)]
        for name, row in named:
            if not any(fnmatchcase(name, pattern) for pattern in pairing):
                row.warnings.append("It is on neither side of the data set's pairing, so no training pair has it.")
    for group in groups:
        _compare_side(report, group, needs_labels)
    rest = [set(row.labels) for row in labeled if not row.problems]
    report.common = tuple(sorted(set.intersection(*rest))) if rest else ()
    report.labels = dict(sorted(Counter(label for values in rest for label in values).items()))
    if needs_labels and not report.common:
        report.problems.append(
            "The cases have no label in common, so there is nothing to learn from; check their labels."
        )


def _compare_side(report: CheckReport, rows: list[CheckedCase], needs_labels: bool) -> None:
    """Compare the labels of cases that should have the same ones."""
    counts = Counter(label for row in rows for label in row.labels)
    usual = {label for label, count in counts.items() if count > len(rows) / 2}
    for row in rows:
        if not usual & set(row.labels):
            found, others = _list(row.labels), _list(sorted(usual)) or "no label in common"
            problem = f"Its labels ({found}) are none of those that most cases have ({others})."
            (row.problems if needs_labels else row.warnings).append(problem)
        elif missing := sorted(usual - set(row.labels)):
            row.warnings.append(f"It lacks the labels {_list([report.names.get(m, m) for m in missing])}.")


def _check_spacings(good: list[CheckedCase]) -> None:
    """Warn of an unusual voxel size: often a header without units, or the wrong series."""
    if len(good) < 3:
        return
    volumes = [float(np.prod(row.spacing)) for row in good]
    usual = statistics.median(volumes)
    for row, volume in zip(good, volumes, strict=True):
        if not 1 / 8 <= volume / usual <= 8:
            row.warnings.append(
                f"Its voxels ({_by(row.spacing)} mm) are {max(volume / usual, usual / volume):.0f} times as "
                f"{'large' if volume > usual else 'small'} as usual here; check the file's header."
            )


def _suggest_spacing(good: list[CheckedCase]) -> float:
    """Suggest a spacing in mm: as fine as the cases, but coarse enough for a working grid of moderate size."""
    finest = statistics.median(min(row.spacing) for row in good)
    largest = max(float(np.prod(np.multiply(row.shape, row.spacing))) for row in good)
    return round(max(finest, (largest / _MOST_VOXELS) ** (1 / 3)), 1) or 0.1


def _by(numbers: Collection[float]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)


def _list(values: Collection) -> str:
    return ", ".join(str(v) for v in values)
