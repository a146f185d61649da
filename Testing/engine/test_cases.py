"""Cases found in folders, checked, and held out, on real files."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from cases import blob_grid, blob_image, blob_labels, write_dataset
from typer.testing import CliRunner

from MorphSeekLib.app.cli import app
from MorphSeekLib.data.cases import TEST, VALIDATION, all_cases, check, choice_pairs, find_cases, hold_out, name_of
from MorphSeekLib.data.datasets import Dataset, Pair, PairLoader, load_dataset, paired_sides
from MorphSeekLib.io.images import write_image
from MorphSeekLib.protocol.errors import Cancelled, MorphSeekError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.space.geometry import Grid, Volume
from MorphSeekLib.space.preprocessing import Preprocessing


def write_case(image, label, seed, grid=None):
    """A blob case in two files of any names."""
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    labels = blob_labels(seed, grid or blob_grid())
    write_image(blob_image(labels, seed), image)
    write_image(labels, label)


LAYOUTS = {
    "folders": ("images/p{}.nii.gz", "labels/p{}.nii.gz"),
    "nnU-Net": ("imagesTr/p{}_0000.nii.gz", "labelsTr/p{}.nii.gz"),
    "suffixes": ("p{}.nii.gz", "p{}_seg.nrrd"),
    "a folder each": ("p{}/image.nii.gz", "p{}/segmentation.nii.gz"),
    "a folder each, with names": ("p{}/t1.nii.gz", "p{}/t1-label.nii.gz"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cases_are_matched_by_name(tmp_path, layout):
    for seed in range(2):
        write_case(*(tmp_path / name.format(seed) for name in LAYOUTS[layout]), seed)
    dataset = find_cases(tmp_path)
    image, label = (tmp_path / name for name in LAYOUTS[layout])
    assert [(c.image, c.label) for c in dataset.cases["training"]] == [
        tuple(type(image)(str(path).format(seed)) for path in (image, label)) for seed in range(2)
    ]


def test_a_description_goes_before_names(tmp_path):
    write_dataset(tmp_path, 2)
    assert find_cases(tmp_path).labels[1] == "shell"
    (tmp_path / "dataset.json").rename(tmp_path / "OASIS_dataset.json")
    assert find_cases(tmp_path).labels[1] == "shell"
    assert find_cases(tmp_path / "OASIS_dataset.json").labels[1] == "shell"


def test_folders_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(MorphSeekError, match="holds no images"):
        find_cases(tmp_path)
    with pytest.raises(MorphSeekError, match="no file or folder"):
        find_cases(tmp_path / "gone")
    write_case(tmp_path / "a.nii.gz", tmp_path / "a_seg.nii.gz", 0)
    shutil.copy(tmp_path / "a_seg.nii.gz", tmp_path / "a_mask.nii.gz")
    with pytest.raises(MorphSeekError, match=r"a_mask.nii.gz and a_seg.nii.gz are both label maps of one case"):
        find_cases(tmp_path)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Six good cases, and one of every kind of trouble."""
    folder = tmp_path_factory.mktemp("mixed")

    def names(name):
        return folder / "images" / f"{name}.nii.gz", folder / "labels" / f"{name}.nii.gz"

    for seed in range(6):
        write_case(*names(f"good{seed}"), seed)
    write_case(*names("twin"), 7)
    shutil.copy(names("good0")[0], names("twin")[0])
    write_case(*names("bare"), 8)
    names("bare")[1].unlink()
    write_case(*names("broken"), 9)
    names("broken")[0].write_bytes(names("broken")[0].read_bytes()[:2000])
    write_case(*names("alien"), 10)
    labels = blob_labels(10, blob_grid())
    write_image(Volume((labels.data > 0).int() * 77, labels.grid), names("alien")[1])
    write_case(*names("elsewhere"), 11)
    away = blob_grid().affine.copy()
    away[:3, 3] += 900
    write_image(Volume(labels.data, Grid(labels.grid.shape, away)), names("elsewhere")[1])
    write_case(*names("coarse_labels"), 12)
    coarse = Grid.from_parts((12, 14, 10), (4.0, 4.0, 5.0), np.eye(3), blob_grid().origin)
    write_image(blob_labels(12, coarse), names("coarse_labels")[1])
    write_case(*names("no_ball"), 13)
    labels = blob_labels(13, blob_grid())
    write_image(Volume(labels.data.masked_fill(labels.data == 3, 1), labels.grid), names("no_ball")[1])
    write_case(*names("huge_voxels"), 14, Grid.from_parts((24, 28, 20), (20.0, 20.0, 25.0), np.eye(3), (0, 0, 0)))
    return folder


def test_every_kind_of_trouble_is_named(mixed):
    events = []
    report = check(find_cases(mixed), job=Job(events.append))
    rows = {case.name.removeprefix("images/").removesuffix(".nii.gz"): case for case in report.cases}
    problems = {name: " ".join(row.problems) for name, row in rows.items() if row.problems}
    assert set(problems) == {"twin", "broken", "alien", "elsewhere"}
    assert "same image as images/good0.nii.gz" in problems["twin"]
    assert problems["broken"].startswith("images/broken.nii.gz"), "without the folder, which all share"
    assert "(77) are none of those that most cases have (1, 2, 3)" in problems["alien"]
    assert "labels nothing in its image" in problems["elsewhere"]
    warnings = {name: " ".join(row.warnings) for name, row in rows.items() if row.warnings}
    assert set(warnings) == {"bare", "coarse_labels", "no_ball", "huge_voxels"}
    assert "no label map, so only a network that finds labels learns from it" in warnings["bare"]
    assert "another grid (12 x 14 x 10 voxels of 4 x 4 x 5 mm)" in warnings["coarse_labels"]
    assert "lacks the labels 3" in warnings["no_ball"]
    assert "1000 times as large as usual" in warnings["huge_voxels"]
    assert report.common == (1, 2)
    assert report.labels == {1: 9, 2: 9, 3: 8}
    assert not report.problems
    assert (report.training, report.unlabeled, report.validation_pairs, report.test_pairs) == (8, 1, 8, 2)
    assert rows["good0"].shape == (24, 28, 20)
    assert [e.step for e in events] == [*range(1, 15), 14]


def test_negative_labels_are_a_problem_of_their_case(tmp_path):
    """And a training that is begun all the same refuses them by the same sentence."""
    path = write_dataset(tmp_path, 5)
    labels = blob_labels(2, blob_grid())
    write_image(Volume(-labels.data, labels.grid), tmp_path / "label_2.nii.gz")
    report = check(load_dataset(path))
    assert report.unusable == ["image_2.nii.gz"]
    [problem] = next(case for case in report.cases if case.name == "image_2.nii.gz").problems
    assert problem.startswith("label_2.nii.gz has the label -3, and labels must not be negative")
    case = next(c for c in load_dataset(path).cases["training"] if c.label.name == "label_2.nii.gz")
    with pytest.raises(MorphSeekError, match="labels must not be negative"):
        PairLoader(Preprocessing(), 4, True)(Pair(case, case))


def test_a_label_map_without_an_image_is_named(tmp_path):
    for seed in range(5):
        write_case(tmp_path / f"images/{seed}.nii.gz", tmp_path / f"labels/{seed}.nii.gz", seed)
    (tmp_path / "images/4.nii.gz").rename(tmp_path / "images/five.nii.gz")
    report = check(find_cases(tmp_path))
    assert report.warnings[0].startswith("labels/4.nii.gz is a label map that no image belongs to by its name")
    assert "no label map" in report.cases[-1].warnings[0]


def test_cases_without_labels_are_trained_on_and_neither_held_out_nor_counted(tmp_path):
    for seed in range(9):
        write_case(tmp_path / f"images/{seed}.nii.gz", tmp_path / f"labels/{seed}.nii.gz", seed)
        if seed > 3:
            (tmp_path / f"labels/{seed}.nii.gz").unlink()
    used = hold_out(find_cases(tmp_path))
    bare = {case for case in used.cases["training"] if case.label is None}
    assert len(bare) == 5
    assert not bare & {case for pairs in used.pairs.values() for pair in pairs for case in (pair.fixed, pair.moving)}
    assert "4 usable cases are few" in check(find_cases(tmp_path)).warnings[0]
    for seed in (2, 3):
        (tmp_path / f"labels/{seed}.nii.gz").unlink()
    [problem] = check(find_cases(tmp_path)).problems
    assert problem.startswith("2 of 9 usable cases have labels, and at least 3 must")
    assert not check(find_cases(tmp_path), labels=False).problems


def test_a_report_that_cannot_be_written_is_refused_before_the_cases_are_read(mixed, tmp_path):
    events = []
    with pytest.raises(MorphSeekError, match="a folder has this name"):
        check(find_cases(mixed), out=tmp_path, job=Job(events.append))
    assert events == []


def test_cases_without_labels_will_do_for_warmup(mixed):
    report = check(find_cases(mixed), labels=False)
    assert "images/bare.nii.gz" not in report.unusable
    assert "images/broken.nii.gz" in report.unusable


def test_a_check_can_be_cancelled(mixed):
    seen = []
    with pytest.raises(Cancelled):
        check(find_cases(mixed), job=Job(seen.append, lambda: len(seen) > 1))
    assert len(seen) == 2


def test_labels_without_any_in_common(tmp_path):
    for seed in range(4):
        write_case(tmp_path / f"{seed}.nii.gz", tmp_path / f"{seed}_label.nii.gz", seed)
        labels = blob_labels(seed, blob_grid())
        write_image(Volume((labels.data > 0).int() * (seed + 1), labels.grid), tmp_path / f"{seed}_label.nii.gz")
    report = check(find_cases(tmp_path))
    assert "none of those" in report.cases[0].problems[0]
    assert any("0 usable training cases" in text for text in report.problems)


def test_a_data_sets_own_pairs_are_held_out(tmp_path):
    dataset = find_cases(write_dataset(tmp_path, 5))
    used = hold_out(dataset)
    assert [name_of(c, dataset) for c in used.cases["training"]] == [f"image_{n}.nii.gz" for n in (2, 3, 4)]
    assert (len(used.pairs[VALIDATION]), len(used.pairs[TEST])) == (1, 2)
    with pytest.raises(MorphSeekError, match="leaves 1 usable training cases"):
        hold_out(dataset, ["image_2.nii.gz", "image_3.nii.gz"])


@pytest.mark.parametrize("count", [3, 6, 30, 66, 150])
def test_held_out_cases_are_not_trained_on(tmp_path, count):
    (tmp_path / "dataset.json").write_text(json.dumps(description(tmp_path, count)))
    dataset = find_cases(tmp_path)
    used = hold_out(dataset)
    training = set(used.cases["training"])
    fixed = {split: {pair.fixed for pair in used.pairs[split]} for split in (VALIDATION, TEST)}
    spared = fixed[TEST] | (fixed[VALIDATION] if count >= 60 else set())
    assert not training & spared
    assert not fixed[VALIDATION] & fixed[TEST]
    assert len(training) + len(spared) == count
    assert len(fixed[TEST]) == {3: 1, 6: 1, 30: 5, 66: 11, 150: 20}[count]
    moving = {pair.moving for pair in used.pairs[TEST]}
    assert (moving <= training) == (count < 12), "a single held-out case needs a partner, several have each other"
    assert hold_out(dataset) == used, "the same each time"


def test_few_cases_are_validated_on_bent_and_all_trained_on_in_the_end(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(description(tmp_path, 30)))
    dataset = find_cases(tmp_path)
    used, final = hold_out(dataset), all_cases(dataset, ["3.nii.gz"])
    for part in (used, final):
        pairs = part.pairs[VALIDATION]
        assert {case for pair in pairs for case in (pair.fixed, pair.moving)} <= set(part.cases["training"])
        assert [pair.bent_by for pair in pairs] == list(range(8))
    assert len(used.cases["training"]) == 25
    assert len(final.cases["training"]) == 29
    assert not final.pairs.get(TEST)


def test_answers_are_chosen_by_cases_that_were_not_trained_on(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(description(tmp_path, 30)))
    used = hold_out(find_cases(tmp_path))
    assert [(p.fixed, p.moving) for p in choice_pairs(used)] == [(p.moving, p.fixed) for p in used.pairs[TEST]]
    own = hold_out(find_cases(write_dataset(tmp_path / "own", 5)))
    assert choice_pairs(own) == own.pairs[VALIDATION]


def test_what_a_data_set_itself_keeps_apart_stays_apart(tmp_path):
    dataset = find_cases(write_dataset(tmp_path, 5))
    assert [name_of(c, dataset) for c in all_cases(dataset).cases["training"]] == [
        f"image_{n}.nii.gz" for n in (2, 3, 4)
    ]


def test_both_sides_of_a_pairing_are_held_out_and_left(tmp_path):
    """Ten cases of one digit, which are fixed, and five of two, which move: one of each is held out."""
    values = description(tmp_path, 15) | {"pairing": "fixed = ?.nii.gz, moving = ??.nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    dataset = find_cases(tmp_path)
    used = hold_out(dataset)
    pairs = used.pairs[TEST]
    assert all(len(name_of(p.fixed, dataset)) == 8 and len(name_of(p.moving, dataset)) == 9 for p in pairs)
    assert [len(side) for side in paired_sides(used.cases["training"], dataset.pairing)] == [9, 4]
    held = {case for pair in pairs for case in (pair.fixed, pair.moving)}
    assert not held & {*used.cases["training"]}
    assert len(held) == 2
    unwanted = [f"{n}.nii.gz" for n in (10, 11, 12, 13)]
    with pytest.raises(MorphSeekError, match=r"None of 9 training cases is named '\?\?"):
        hold_out(dataset, unwanted)


def test_either_side_of_a_pairing_has_labels_of_its_own(tmp_path):
    """Three labels on one side, one of them on the other: nothing to warn of."""
    rows = []
    for seed in range(6):
        image, label = f"{'ct' if seed < 3 else 'mr'}_{seed}.nii.gz", f"label_{seed}.nii.gz"
        write_case(tmp_path / image, tmp_path / label, seed)
        if seed < 3:
            labels = blob_labels(seed, blob_grid())
            write_image(Volume((labels.data == 1).int(), labels.grid), tmp_path / label)
        rows.append({"image": image, "label": label})
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"training": rows, "pairing": "fixed = mr_*, moving = ct_*"}))
    report = check(load_dataset(path))
    assert not any(row.warnings or row.problems for row in report.cases)
    assert (report.common, report.training, report.problems) == ((1,), 4, [])
    path.write_text(json.dumps({"training": rows, "pairing": "fixed = mr_[34]*, moving = ct_*"}))
    assert "neither side" in check(load_dataset(path)).cases[5].warnings[0]
    path.write_text(json.dumps({"training": rows, "pairing": "fixed = us_*, moving = ct_*"}))
    assert "is named 'us_*'" in check(load_dataset(path)).problems[0]


def test_two_cases_are_too_few(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(description(tmp_path, 2)))
    with pytest.raises(MorphSeekError, match=r"leaves 2 usable training cases .* at least 3"):
        hold_out(find_cases(tmp_path))


def test_a_secret_test_set_is_not_held_against_it(tmp_path):
    """Learn2Reg publishes test pairs without labels: no problem, and others are held out instead."""
    values = description(tmp_path, 6)
    (tmp_path / "secret.nii.gz").touch()
    values["registration_test"] = [{"fixed": "secret.nii.gz", "moving": "secret.nii.gz"}]
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    used = hold_out(find_cases(tmp_path))
    assert all(pair.fixed.label for pair in used.pairs[TEST])


def description(folder, count):
    for n in range(count):
        (folder / f"{n}.nii.gz").touch()
    return {"training": [{"image": f"{n}.nii.gz", "label": f"{n}.nii.gz"} for n in range(count)]}


def test_the_command(mixed, tmp_path):
    done = CliRunner().invoke(app, ["check", str(mixed), "--out", str(tmp_path / "check.json")], terminal_width=200)
    assert done.exit_code == 0, done.output
    said = "8 cases to train on, 1 without labels besides, 8 pairs to validate on, 2 held-out pairs"
    assert said in " ".join(done.output.split())
    written = json.loads((tmp_path / "check.json").read_text())
    assert len(written["cases"]) == 14
    assert written["common"] == [1, 2]
    one = tmp_path / "one"
    write_case(one / "a.nii.gz", one / "a_seg.nii.gz", 0)
    done = CliRunner().invoke(app, ["check", str(one)])
    assert done.exit_code == 2
    assert "leaves 1 usable training cases" in " ".join(done.output.split())


def test_the_suggested_grid_is_handy(tmp_path):
    write_case(tmp_path / "a.nii.gz", tmp_path / "a_seg.nii.gz", 0)
    assert check(find_cases(tmp_path)).spacing == 2.0
    data = torch.rand(300, 300, 100)
    grid = Grid.from_parts(data.shape, (1.0, 1.0, 2.0), np.eye(3), (0, 0, 0))
    write_image(Volume(data, grid), tmp_path / "a.nii.gz")
    dataset = find_cases(tmp_path)
    spacing = check(Dataset(tmp_path, dataset.cases), labels=False).spacing
    assert 300 * 300 * 200 / spacing**3 < 2.2e6
