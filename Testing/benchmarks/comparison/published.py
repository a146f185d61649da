"""Readers of the paper's data sets as their publishers give them (OASIS, LiTS, Abdomen MR<-CT), and of plain folders.

    dataset = PUBLISHED["oasis"](Path("OASIS"))

They read names, not voxels, and download nothing. The paper (arXiv 2511.17392) names the data sets; which cases it
trained, validated and tested on is not in what is public of it. Where a publisher fixed pairs, those are used; every
other choice is said in the reader's docstring and, for provenance, in the data set's ``about["split"]``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise, permutations
from pathlib import Path

from MorphSeekLib.data.datasets import Case, Dataset, Pair
from MorphSeekLib.protocol.errors import MorphSeekError

LEARN2REG = "https://learn2reg.grand-challenge.org/Datasets/"
NEURITE = "https://github.com/adalca/medical-datasets/blob/master/neurite-oasis.md"
LITS = "https://competitions.codalab.org/competitions/17094"

_HEMISPHERE = [
    *("cerebral white matter", "cerebral cortex", "lateral ventricle", "inferior lateral ventricle"),
    *("cerebellum white matter", "cerebellum cortex", "thalamus", "caudate", "putamen", "pallidum"),
    *("hippocampus", "amygdala", "accumbens", "ventral diencephalon", "vessel", "choroid plexus"),
]
_LEFT, _RIGHT = ([f"{side} {name}" for name in _HEMISPHERE] for side in ("left", "right"))
_MIDDLE = ["third ventricle", "fourth ventricle", "brain stem"]
OASIS_LABELS = dict(enumerate(["background", *_LEFT[:10], *_MIDDLE, *_LEFT[10:], *_RIGHT]))
"""The 35 structures of FreeSurfer, in the order of the published label maps."""
ABDOMEN_LABELS = {0: "background", 1: "liver", 2: "spleen", 3: "right kidney", 4: "left kidney"}
"""In the order of the task's description; names in the download's own JSON file go before them."""
LITS_LABELS = {0: "background", 1: "liver"}
LITS_CASES, LITS_TRAINING, LITS_TEST = 131, 101, 15

HELD_OUT = 10  # OASIS: the last training cases, to choose weights on
TESTED = 20  # OASIS: Learn2Reg's validation cases, 395 to 414


def oasis(root: Path) -> Dataset:
    """OASIS brain MR with 35 labels, in Learn2Reg's layout or neurite-oasis's (the same 414 subjects).

    Learn2Reg: ``OASIS_dataset.json``, ``imagesTr/OASIS_0001_0000.nii.gz``, ``labelsTr/`` likewise. neurite-oasis:
    ``subjects.txt``, ``OASIS_OAS1_0001_MR1/aligned_norm.nii.gz`` and ``aligned_seg35.nii.gz``.

    The labels of Learn2Reg's test pairs are secret. So its 19 validation pairs (395 <- 396, ... 413 <- 414), on which
    most papers report, are the test here, and are never used to choose weights; for that, cases 385 to 394 are taken
    out of the training, each paired with the next. In neurite-oasis cases count in the order of subjects.txt, which we
    take to be Learn2Reg's.

    Raises:
        MorphSeekError: a file that should be there is not, with where the download is.
    """
    root = Path(root)
    about = {
        "name": "OASIS",
        "licence": "the OASIS data use terms; no redistribution",
        "reference": "Marcus et al. 2007; labels: Hoopes et al. 2022 (neurite-oasis), Hering et al. 2022 (Learn2Reg)",
        "split": "test: Learn2Reg's 19 validation pairs; validation: the 10 cases before them, 9 pairs; training: 384",
    }
    if not (root / "subjects.txt").is_file():
        wanted = f"OASIS_dataset.json (Learn2Reg, {LEARN2REG}) or subjects.txt (neurite-oasis, {NEURITE})"
        if not (root / "OASIS_dataset.json").is_file():
            raise MorphSeekError(f"The folder {root} should hold {wanted}; get either and give its folder.")
        return _learn2reg(root, "OASIS", OASIS_LABELS, about, lambda cases: _chain(cases[-HELD_OUT:]))
    folders = (root / "subjects.txt").read_text(encoding="utf-8").split()
    if len(folders) <= HELD_OUT + TESTED:
        raise MorphSeekError(f"{root / 'subjects.txt'} names {len(folders)} subjects; it should name 414: {NEURITE}.")
    cases = [
        Case(
            _there(root / folder / "aligned_norm.nii.gz", root, NEURITE),
            _there(root / folder / "aligned_seg35.nii.gz", root, NEURITE),
        )
        for folder in folders
    ]
    validation, test = _chain(cases[-HELD_OUT - TESTED : -TESTED]), _chain(cases[-TESTED:])
    return _dataset(root, cases, validation, test, OASIS_LABELS, about)


def abdomen_mrct(root: Path) -> Dataset:
    """Learn2Reg's AbdomenMRCT: MR fixed, CT moving; liver, spleen, right and left kidney.

    ``AbdomenMRCT_dataset.json``, ``imagesTr/AbdomenMRCT_0001_0000.nii.gz`` (MR; ``_0001`` is CT), ``labelsTr/``
    likewise; 8 patients with both and others with one of them. Masks and keypoints are not used, also not in scoring:
    Learn2Reg scores its test pairs within the masks.

    Any MR is paired with any CT in training. Test: the 8 published test pairs where their labels are there (labelsTs),
    with the 3 validation pairs as published; else those 3 validation pairs, and the last 2 patients with both scans
    are taken out of the training to choose weights on.

    Raises:
        MorphSeekError: a file that should be there is not, with where the download is.
    """
    about = {
        "name": "Abdomen MR<-CT (Learn2Reg)",
        "licence": "those of its sources, in the download's README_LICENCE files (TCIA, CHAOS, BCV); research only",
        "reference": "Hering et al. 2022 (Learn2Reg); Clark et al. 2013 (TCIA); Kavur et al. 2021 (CHAOS)",
        "split": "test: the published test pairs if labeled, else the published validation pairs and 2 training pairs "
        "to validate on",
    }

    def both(cases: Sequence[Case]) -> list[Pair]:
        scans = {case.image.name: case for case in cases}
        pairs = [
            Pair(case, scans[ct])
            for case in cases
            if (ct := case.image.name.replace("_0000.nii", "_0001.nii")) in scans and ct != case.image.name
        ]
        return pairs[-2:]

    pairing = ("*_0000.nii.gz", "*_0001.nii.gz")
    return _learn2reg(Path(root), "AbdomenMRCT", ABDOMEN_LABELS, about, both, pairing)


def lits(root: Path) -> Dataset:
    """LiTS liver CT: ``volume-0.nii`` to ``volume-130.nii`` and ``segmentation-0.nii`` ..., in any folders of ``root``.

    The files are published as "Training Batch 1" (0 to 27) and "Training Batch 2"; the 70 test volumes have no labels
    and are not used. A tumour (label 2) lies in the liver and counts as liver.

    Split by number: 0 to 100 to train on, 101 to 115 to validate on, 116 to 130 to test on (as Valanarasu et al. 2020,
    KiU-Net), each held-out case paired with the next: 14 pairs each.

    Raises:
        MorphSeekError: a file that should be there is not, with where the download is.
    """
    root = Path(root)
    files: dict[tuple[str, int], Path] = {}
    for path in sorted(root.rglob("*.nii*")):
        if found := re.fullmatch(r"(volume|segmentation)-(\d+)\.nii(\.gz)?", path.name):
            files[found[1], int(found[2])] = path
    cases = []
    for n in range(LITS_CASES):
        for kind in ("volume", "segmentation"):
            if (kind, n) not in files:
                _there(root / f"Training Batch {1 if n < 28 else 2}" / f"{kind}-{n}.nii", root, LITS)
        cases.append(Case(files["volume", n], files["segmentation", n], merged=((2, 1),)))
    about = {
        "name": "LiTS",
        "licence": "CC BY-NC-ND 4.0: no weights trained on it are bundled",
        "reference": "Bilic et al. 2023, The Liver Tumor Segmentation Benchmark",
        "split": "by number: training 0-100, validation 101-115, test 116-130, each held-out case with the next",
    }
    validation, test = _chain(cases[LITS_TRAINING:-LITS_TEST]), _chain(cases[-LITS_TEST:])
    return _dataset(root, cases, validation, test, LITS_LABELS, about)


def ordered_pairs(root: Path) -> Dataset:
    """A folder of NAME_t1.nii.gz and NAME_seg.nii.gz: every scan onto every other. Nothing is there to train on.

    Raises:
        MorphSeekError: fewer than two scans, or one without its segmentation.
    """
    images = sorted(root.glob("*_t1.nii.gz"))
    if len(images) < 2:
        raise MorphSeekError(f"{root} holds {len(images)} scans named NAME_t1.nii.gz; pairs need at least two.")
    labels = [image.with_name(image.name.replace("_t1.", "_seg.")) for image in images]
    missing = next((label for label in labels if not label.is_file()), None)
    if missing is not None:
        raise MorphSeekError(f"{missing} is not there; every scan needs its segmentation beside it.")
    cases = [Case(*files) for files in zip(images, labels, strict=True)]
    pairs = [Pair(fixed, moving) for fixed, moving in permutations(cases, 2)]
    return Dataset(root, pairs={"registration_test": pairs}, about={"name": root.name})


PUBLISHED: dict[str, Callable[[Path], Dataset]] = {
    "oasis": oasis,
    "lits": lits,
    "abdomen-mrct": abdomen_mrct,
    "ordered-pairs": ordered_pairs,
}


def _learn2reg(
    root: Path,
    task: str,
    labels: dict[int, str],
    about: dict[str, str],
    held_out: Callable[[Sequence[Case]], list[Pair]],
    pairing: tuple[str, str] | None = None,
) -> Dataset:
    """A Learn2Reg task: cases by the files that are there, pairs by its JSON file.

    Args:
        labels: names, where the JSON file has none.
        held_out: training cases -> pairs to validate on, where the published validation pairs are the test.
    """
    path = _there(root / f"{task}_dataset.json", root, LEARN2REG)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        published = {
            split: [tuple(root / row[side] for side in ("fixed", "moving")) for row in values.get(split, [])]
            for split in ("registration_val", "registration_test")
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise MorphSeekError(f"{path} is not as Learn2Reg publishes it ({error}); unpack it anew.") from error
    images = sorted((root / "imagesTr").glob(f"{task}_*.nii.gz"))
    if not images:
        _there(root / "imagesTr" / f"{task}_0001_0000.nii.gz", root, LEARN2REG)
    if not published["registration_val"]:
        raise MorphSeekError(f"{path} names no pairs under registration_val; unpack it anew from {LEARN2REG}.")
    scans = [image for pairs in published.values() for pair in pairs for image in pair]
    cases = {image: Case(image, label if label.is_file() else None) for image, label in _labeled(images + scans)}

    def pairs_of(split: str) -> list[Pair]:
        for pair in published[split]:
            for image, label in _labeled(pair):
                _there(image, root, LEARN2REG)
                _there(label, root, LEARN2REG)
        return [Pair(cases[fixed], cases[moving]) for fixed, moving in published[split]]

    test = published["registration_test"]
    if test and all(cases[image].label for pair in test for image in pair):
        validation, test = pairs_of("registration_val"), pairs_of("registration_test")
    else:
        test = pairs_of("registration_val")
        tested = {case for pair in test for case in (pair.fixed, pair.moving)}
        validation = held_out([cases[image] for image in images if cases[image] not in tested])
    training = [cases[image] for image in images]
    return _dataset(root, training, validation, test, _names(values.get("labels")) or labels, about, pairing)


def _labeled(images: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Images, and where Learn2Reg has their labels: imagesTr/a -> labelsTr/a."""
    folders = [image.parent.with_name(image.parent.name.replace("images", "labels")) for image in images]
    return [(image, folder / image.name) for image, folder in zip(images, folders, strict=True)]


def _names(labels: object) -> dict[int, str]:
    """Label names of a Learn2Reg file: one table, or one a modality (then the fixed one's)."""
    if isinstance(labels, dict) and isinstance(labels.get("0"), dict):
        labels = labels["0"]
    return {int(k): str(v) for k, v in labels.items() if str(k).isdigit()} if isinstance(labels, dict) else {}


def _dataset(
    root: Path,
    cases: Sequence[Case],
    validation: list[Pair],
    test: list[Pair],
    labels: dict[int, str],
    about: dict[str, str],
    pairing: tuple[str, str] | None = None,
) -> Dataset:
    """All cases but the held-out ones to train on."""
    held = {case for pair in validation + test for case in (pair.fixed, pair.moving)}
    return Dataset(
        root,
        {"training": [case for case in cases if case not in held]},
        {"registration_val": validation, "registration_test": test},
        labels,
        tuple(value for value in labels if value != 0),
        pairing,
        about,
    )


def _chain(cases: Sequence[Case]) -> list[Pair]:
    """Every case as the fixed one with the next as the moving one, as in Learn2Reg's OASIS pairs."""
    return [Pair(fixed, moving) for fixed, moving in pairwise(cases)]


def _there(path: Path, root: Path, download: str) -> Path:
    if not path.is_file():
        raise MorphSeekError(
            f"{path.relative_to(root)} should be in {root} but is not there; get the data set from {download} and give "
            "the folder it was unpacked to (nothing is downloaded for you)."
        )
    return path
