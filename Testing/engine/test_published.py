"""The paper's data sets as they are published, in tiny: layouts, splits, labels; what is missing is named."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from comparison.published import OASIS_LABELS, PUBLISHED

from MorphSeekLib.data.cases import check, name_of
from MorphSeekLib.data.datasets import PairLoader, training_pair
from MorphSeekLib.io.images import write_image
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space.geometry import Grid, Volume
from MorphSeekLib.space.preprocessing import Preprocessing

GRID = Grid((6, 5, 4), np.diag([2.0, 2.0, 2.0, 1.0]))


def write(path, labels=0):
    """An image, or a label map with so many labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = torch.arange(120).reshape(GRID.shape)
    own = sum(map(int, re.findall(r"\d+", path.name)))  # no two images are the same
    write_image(Volume((values % (labels + 1)).int() if labels else values.float() + own, GRID), path)


def learn2reg(root, task, names, validation, test, labeled=(), labels=4):
    """A Learn2Reg task: training cases by name, pairs, labeled test images."""
    for name in names:
        write(root / "imagesTr" / name)
        write(root / "labelsTr" / name, labels)
    for name in {name for pair in test for name in pair}:
        write(root / "imagesTs" / name)
    for name in labeled:
        write(root / "labelsTs" / name, labels)
    rows = {
        split: [dict(zip(("fixed", "moving"), (f"./{folder}/{name}" for name in pair), strict=True)) for pair in pairs]
        for split, folder, pairs in (
            ("registration_val", "imagesTr", validation),
            ("registration_test", "imagesTs", test),
        )
    }
    (root / f"{task}_dataset.json").write_text(json.dumps({"name": task, "pairings": "hybrid"} | rows))
    return root


def names(pairs):
    return [(pair.fixed.image.name[-12:-7], pair.moving.image.name[-12:-7]) for pair in pairs]


def oasis(n):
    return f"OASIS_{n:04d}_0000.nii.gz"


@pytest.fixture
def abdomen(tmp_path):
    """Patients 1 to 6 with both scans, 20 and 21 with MR, 30 with CT; 9 is to test on."""
    scans = [(n, m) for n in range(1, 7) for m in (0, 1)] + [(20, 0), (21, 0), (30, 1)]
    return learn2reg(
        tmp_path,
        "AbdomenMRCT",
        [mrct(n, m) for n, m in scans],
        [(mrct(n, 0), mrct(n, 1)) for n in (5, 6)],
        [(mrct(9, 0), mrct(9, 1))],
    )


def mrct(n, modality):
    return f"AbdomenMRCT_{n:04d}_{modality:04d}.nii.gz"


def test_oasis_of_learn2reg(tmp_path):
    pairs = [(oasis(n), oasis(n + 1)) for n in range(13, 15)]
    learn2reg(tmp_path, "OASIS", [oasis(n) for n in range(1, 16)], pairs, [(oasis(16), oasis(17))], labels=35)
    dataset = PUBLISHED["oasis"](tmp_path)
    image_names = [case.image.name for case in dataset.cases["training"]]
    assert image_names == [oasis(1), oasis(2)], "ten are validated on, three tested"
    moved = [(pair.fixed.image.name, pair.moving.image.name) for pair in dataset.split("registration_test")]
    assert moved == pairs, "the secret test pairs are left out"
    assert len(dataset.split("registration_val")) == 9
    assert dataset.split("registration_val")[0].fixed.image.name == oasis(3)
    assert (dataset.path, dataset.pairing, dataset.evaluated) == (tmp_path, None, tuple(range(1, 36)))
    assert name_of(dataset.cases["training"][0], dataset) == f"imagesTr/{oasis(1)}"
    report = check(dataset)
    assert (report.problems, report.training, report.common) == ([], 2, dataset.evaluated)


def test_oasis_of_neurite(tmp_path):
    """Two people are left to train on; the last twenty are Learn2Reg's to validate on, in the file's order."""
    folders = [f"OASIS_OAS1_{n:04d}_MR1" for n in range(40, 72)]
    for folder in folders:
        write(tmp_path / folder / "aligned_norm.nii.gz")
        write(tmp_path / folder / "aligned_seg35.nii.gz", 35)
    (tmp_path / "subjects.txt").write_text("\n".join(folders) + "\n")
    dataset = PUBLISHED["oasis"](tmp_path)
    assert [case.image.parent.name for case in dataset.cases["training"]] == folders[:2]
    assert [len(dataset.split(s)) for s in ("registration_val", "registration_test")] == [9, 19]
    first = dataset.split("registration_test")[0]
    assert [case.image.parent.name for case in (first.fixed, first.moving)] == folders[12:14]
    (tmp_path / folders[3] / "aligned_seg35.nii.gz").unlink()
    with pytest.raises(MorphSeekError, match=rf"{folders[3]}.aligned_seg35.nii.gz should be in .*neurite-oasis"):
        PUBLISHED["oasis"](tmp_path)


def test_the_35_structures():
    assert len(OASIS_LABELS) == 36
    some = {
        1: "left cerebral white matter",
        13: "brain stem",
        14: "left hippocampus",
        20: "right cerebral white matter",
    }
    assert {k: OASIS_LABELS[k] for k in (*some, 30, 35)} == some | {30: "right hippocampus", 35: "right choroid plexus"}


def test_abdomen_with_secret_test_labels(abdomen):
    dataset = PUBLISHED["abdomen-mrct"](abdomen)
    assert [case.image.name for case in dataset.cases["training"]] == [
        *(mrct(n, m) for n in (1, 2) for m in (0, 1)),
        *(mrct(n, 0) for n in (20, 21)),
        mrct(30, 1),
    ]
    assert names(dataset.split("registration_test")) == [("_0000", "_0001")] * 2
    assert [pair.fixed.image.name for pair in dataset.split("registration_val")] == [mrct(3, 0), mrct(4, 0)]
    assert names(dataset.split("registration_val")) == [("_0000", "_0001")] * 2
    assert (dataset.evaluated, dataset.labels[4]) == ((1, 2, 3, 4), "left kidney")
    for seed in range(20):
        pair = training_pair(dataset.cases["training"], dataset.pairing, torch.Generator().manual_seed(seed))
        assert names([pair]) == [("_0000", "_0001")], "MR stays, CT moves"


def test_abdomen_with_test_labels(abdomen):
    for modality in (0, 1):
        write(abdomen / "labelsTs" / mrct(9, modality), 4)
    values = json.loads((abdomen / "AbdomenMRCT_dataset.json").read_text())
    values["labels"] = {"0": {"0": "background", "1": "one"}, "1": {"0": "background", "1": "one"}}
    (abdomen / "AbdomenMRCT_dataset.json").write_text(json.dumps(values))
    dataset = PUBLISHED["abdomen-mrct"](abdomen)
    assert [pair.moving.image.name for pair in dataset.split("registration_test")] == [mrct(9, 1)]
    assert [pair.fixed.image.name for pair in dataset.split("registration_val")] == [mrct(5, 0), mrct(6, 0)]
    assert len(dataset.cases["training"]) == 11
    assert dataset.labels == {0: "background", 1: "one"}, "the download's own names go before ours"


def test_lits(tmp_path):
    """Real voxels where a pair is read, empty files elsewhere."""
    for n in range(131):
        folder = tmp_path / f"Training Batch {1 if n < 28 else 2}"
        for kind, labels in (("volume", 0), ("segmentation", 2)):
            path = folder / f"{kind}-{n}.nii"
            path.parent.mkdir(exist_ok=True)
            write(path, labels) if n in (101, 102) else path.touch()
    (tmp_path / "test-volume-0.nii").touch()
    dataset = PUBLISHED["lits"](tmp_path)
    assert [len(dataset.cases["training"]), len(dataset.split("registration_val"))] == [101, 14]
    assert dataset.split("registration_test")[-1].moving.label.name == "segmentation-130.nii"
    pair = PairLoader(Preprocessing(align="none"), 1, True)(dataset.split("registration_val")[0])
    assert pair.fixed_labels.unique().tolist() == [0, 1], "a tumour is liver"
    (tmp_path / "Training Batch 2" / "volume-77.nii").unlink()
    with pytest.raises(MorphSeekError, match=r"Training Batch 2.volume-77.nii should be in .*codalab"):
        PUBLISHED["lits"](tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("oasis", "should hold OASIS_dataset.json .* or subjects.txt"),
        ("lits", "Training Batch 1.volume-0.nii should be in"),
        ("abdomen-mrct", "AbdomenMRCT_dataset.json should be in .* get the data set from https://learn2reg"),
    ],
)
def test_an_empty_folder(tmp_path, name, words):
    with pytest.raises(MorphSeekError, match=words):
        PUBLISHED[name](tmp_path)


def test_an_incomplete_download(abdomen):
    (abdomen / "labelsTr" / mrct(5, 1)).unlink()
    with pytest.raises(MorphSeekError, match=r"labelsTr.AbdomenMRCT_0005_0001.nii.gz should be in .* but is not there"):
        PUBLISHED["abdomen-mrct"](abdomen)
    (abdomen / "AbdomenMRCT_dataset.json").write_text("[]")
    with pytest.raises(MorphSeekError, match="is not as Learn2Reg publishes it"):
        PUBLISHED["abdomen-mrct"](abdomen)
