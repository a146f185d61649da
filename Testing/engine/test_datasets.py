"""Landmarks of cases, read in either form and carried to the working grid with the images; which cases make a pair;
how many cases a loader keeps; augmentation of pairs."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import TINY, write_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from MorphSeekLib.data.cases import hold_out
from MorphSeekLib.data.datasets import (
    Case,
    Pair,
    PairLoader,
    PreparedPair,
    augment,
    load_dataset,
    read_landmarks,
    scored_pairs,
    training_pair,
)
from MorphSeekLib.io.images import read_image, write_image
from MorphSeekLib.networks.policy import ModelSettings
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import Grid, Volume, apply_affine
from MorphSeekLib.space.preprocessing import Preprocessing
from MorphSeekLib.training.trainer import RunSettings
from MorphSeekLib.training.warmup import TrainingConfig, warmup

TURNED = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, -1.0]])


def spot(folder, name, index, origin):
    """An image of one soft bright spot on an oblique, left-handed grid, with the spot as its landmark."""
    grid = Grid.from_parts((24, 22, 20), (1.0, 1.5, 2.0), TURNED, origin)
    at = torch.stack(torch.meshgrid(*[torch.arange(n) for n in grid.shape], indexing="ij")).float()
    distance = (at - torch.tensor(index).view(3, 1, 1, 1)).square().sum(dim=0)
    write_image(Volume(200 * (-distance / 8).exp(), grid), folder / f"{name}.nii.gz")
    np.savetxt(folder / f"{name}.csv", [index], delimiter=",")
    return Case(folder / f"{name}.nii.gz", landmarks=folder / f"{name}.csv")


def test_landmarks_lie_where_the_images_say(tmp_path):
    """On the working grid each landmark is the brightest place of its image, centered or not."""
    pair = Pair(
        spot(tmp_path, "fixed", (10.0, 9.0, 11.0), (5, 6, 7)), spot(tmp_path, "moving", (13.0, 12.0, 8.0), (-4, 6, 9))
    )
    for centered in (True, False):
        found = PairLoader(Preprocessing(spacing=(1.2, 1.2, 1.2), align="none"), 4, centered)(pair)
        for image, points in ((found.fixed, found.fixed_points), (found.moving, found.moving_points)):
            brightest = np.unravel_index(int(image[0, 0].argmax()), image.shape[2:])
            assert np.abs(points[0].numpy() - brightest).max() <= 1.0


def test_markups_and_tables_agree(tmp_path):
    grid = Grid.from_parts((10, 10, 10), (1.0, 2.0, 3.0), TURNED, (5, 6, 7))
    index = np.array([[1.0, 2.0, 3.0], [4.5, 0.0, 9.0]])
    np.savetxt(tmp_path / "a.csv", index, delimiter=",")
    expected = apply_affine(grid.affine, index)
    np.testing.assert_allclose(read_landmarks(tmp_path / "a.csv", grid), expected)
    for system, sign in (("LPS", (1, 1, 1)), ("RAS", (-1, -1, 1))):
        points = [{"position": list(p * sign)} for p in expected]
        markup = {"markups": [{"coordinateSystem": system, "controlPoints": points}]}
        (tmp_path / "a.mrk.json").write_text(json.dumps(markup))
        np.testing.assert_allclose(read_landmarks(tmp_path / "a.mrk.json", grid), expected)


@pytest.mark.parametrize("text", ["x,y,z\n1,2,3", "1,2\n3,4", "", "1,2,nan"])
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_unusable_landmarks_are_named(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(MorphSeekError, match=r"The landmarks a.csv cannot be read .*give a Slicer markups file"):
        read_landmarks(tmp_path / "a.csv", Grid((4, 4, 4), np.eye(4)))


def test_landmarks_must_correspond(tmp_path):
    pair = Pair(
        spot(tmp_path, "fixed", (10.0, 9.0, 11.0), (0, 0, 0)), spot(tmp_path, "moving", (9.0, 9.0, 9.0), (0, 0, 0))
    )
    (tmp_path / "moving.csv").write_text("1,2,3\n4,5,6\n")
    with pytest.raises(MorphSeekError, match=r"fixed.csv and moving.csv hold 1 and 2 landmarks"):
        PairLoader(Preprocessing(align="none"), 4, True)(pair)


def drawn(cases, pairing, count=60):
    return [training_pair(cases, pairing, torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_a_pairing_says_who_is_fixed_and_who_moves():
    cases = [Case(Path(f"folder/{name}.nii.gz")) for name in ("mr_1", "mr_2", "ct_1", "ct_2", "ct_3", "us_1")]
    found = {(p.fixed.image.name[:4], p.moving.image.name[:4]) for p in drawn(cases, ("mr_*", "ct_*"))}
    assert found == {(f"mr_{n}", f"ct_{m}") for n in (1, 2) for m in (1, 2, 3)}
    assert all(p.fixed == cases[0] and p.moving != cases[0] for p in drawn(cases, ("mr_1*", "*"))), "not with itself"


def test_without_a_pairing_any_two_cases_make_a_pair():
    """In the order of torch.randperm: runs that began before there were pairings go on as they began."""
    cases = [Case(Path(f"{n}.nii.gz")) for n in range(5)]
    for seed, pair in enumerate(drawn(cases, None)):
        first, second = torch.randperm(5, generator=torch.Generator().manual_seed(seed))[:2].tolist()
        assert pair == Pair(cases[first], cases[second])


@pytest.mark.parametrize(
    ("pairing", "words"),
    [(("mr_*", "ct_*"), "None of 2 training cases is named 'ct_\\*'.* the moving one"), (("mr_1*", "mr_1*"), "same")],
)
def test_a_side_without_cases_is_named(pairing, words):
    cases = [Case(Path("mr_1.nii.gz")), Case(Path("mr_2.nii.gz"))]
    with pytest.raises(MorphSeekError, match=words):
        training_pair(cases, pairing, torch.Generator())


def test_pairings_are_read(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"pairing": "fixed = mr_*, moving=ct_*"}))
    assert load_dataset(path).pairing == ("mr_*", "ct_*")
    for text in ("mr_*, ct_*", "fixed = , moving = ct_*", ["mr_*", "ct_*"]):
        path.write_text(json.dumps({"pairing": text}))
        with pytest.raises(MorphSeekError, match=r"has the pairing .* it must name patterns"):
            load_dataset(path)


def ball_pair():
    """A ball of label 3 in each image, at landmarks of its own."""
    points = [torch.tensor([[12.0, 16.0, 13.0]]), torch.tensor([[15.0, 12.0, 16.0]])]
    at = fields.identity((28, 32, 30))
    labels = [(3 * ((at - p.view(1, 3, 1, 1, 1)).norm(dim=1, keepdim=True) < 5)).int() for p in points]
    images = [(label > 0).float() for label in labels]
    return PreparedPair(*images, *labels, Grid((28, 32, 30), np.eye(4)), *points)


# ------------------------------------------------------------------ cases that are kept


@pytest.fixture
def reads(monkeypatch):
    """Names of the images that are read from files, in their order."""
    names = []

    def read(path):
        names.append(path.name)
        return read_image(path)

    monkeypatch.setattr("MorphSeekLib.data.datasets.read_image", read)
    return names


def test_a_loader_keeps_no_more_than_its_budget(tmp_path, reads):
    """The least recently used case goes; what is read again is the same."""
    cases = load_dataset(write_dataset(tmp_path, 3)).split("training", "cases")
    of_a_case = 8 * 24 * 28 * 20  # float32 image, int32 labels
    a, b, c = (case.image.name for case in cases)
    loader = PairLoader(Preprocessing(align="none"), 4, True, kept_bytes=2 * of_a_case)
    first = loader(Pair(cases[0], cases[1]))
    loader(Pair(cases[1], cases[0]))
    assert reads == [a, b], "kept"
    loader(Pair(cases[0], cases[2]))  # drops b, which was used before a
    loader(Pair(cases[2], cases[0]))
    assert reads == [a, b, c]
    again = loader(Pair(cases[0], cases[1]))
    assert reads == [a, b, c, b]
    for name in ("fixed", "moving", "fixed_labels", "moving_labels"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    tiny = PairLoader(Preprocessing(align="none"), 4, True, kept_bytes=0)
    assert torch.equal(tiny(Pair(cases[0], cases[1])).moving, first.moving), "even where a single case is too large"


def test_a_case_alone_is_the_fixed_one_of_a_pair(tmp_path, reads):
    """It is prepared once, as far as what is kept may be so large."""
    cases = load_dataset(write_dataset(tmp_path, 2)).split("training", "cases")
    a, b = (case.image.name for case in cases)
    loader = PairLoader(Preprocessing(spacing=(2.5, 2.5, 2.5), align="none"), 4, True)
    wanted = loader(Pair(cases[0], cases[1]))
    image, labels = loader.alone(cases[0])
    assert torch.equal(image, wanted.fixed)
    assert torch.equal(labels, wanted.fixed_labels)
    assert loader.alone(cases[0])[0] is image
    assert reads == [a, b]
    held = 8 * 24 * 28 * 20 + 2 * (image.nbytes + labels.nbytes)  # one as it was read, both as they were made
    loader = PairLoader(Preprocessing(spacing=(2.5, 2.5, 2.5), align="none"), 4, True, kept_bytes=held)
    assert torch.equal(loader.alone(cases[0])[0], image)
    loader.alone(cases[1])
    loader.alone(cases[0])
    loader.alone(cases[1])
    assert reads == [a, b, a, b], "what was read has made room for what was made of it"


def test_a_training_and_its_validation_share_what_is_kept(tmp_path, reads):
    """Cases 0 and 1 are trained on and validated on; each is read once for both, and once for the sizes on the card."""
    dataset = load_dataset(write_dataset(tmp_path, 2))
    run = RunSettings(iterations=2, steps=1, validate_every=1)
    small = ModelSettings(backbone_settings=TINY["voxelmorph"])
    warmup(dataset, TrainingConfig(model=small, training=run), tmp_path / "m.safetensors")
    assert sorted(reads) == ["image_0.nii.gz"] * 2 + ["image_1.nii.gz"] * 2


# ------------------------------------------------------------------ descriptions as people write them


def described(folder, **values):
    """A data set of that description, with three files that it may name."""
    for name in "abc":
        (folder / f"{name}.nii.gz").touch()
    (folder / "dataset.json").write_text(json.dumps(values))
    return load_dataset(folder / "dataset.json")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"0": "background", "1": "liver", "7": "spleen"}, {0: "background", 1: "liver", 7: "spleen"}),
        (["background", "liver"], {0: "background", 1: "liver"}),
        ({"background": 0, "liver": 1, "whole": [1, 2]}, {0: "background", 1: "liver"}),
        (None, {}),
    ],
)
def test_names_of_labels_are_read_in_every_usual_form(tmp_path, labels, names):
    assert described(tmp_path, labels=labels).labels == names


@pytest.mark.parametrize("given", [2, "2", [2], ["2"], [2.0], "spleen", ["spleen"], [0, 2, 2]])
def test_labels_to_evaluate_are_read_as_they_are_meant(tmp_path, given):
    assert described(tmp_path, labels={"1": "liver", "2": "spleen"}, evaluated_labels=given).evaluated == (2,)


def test_a_training_row_may_be_the_name_of_an_image(tmp_path):
    assert described(tmp_path, training=["a.nii.gz"]).cases["training"] == [Case(tmp_path / "a.nii.gz")]


def test_a_pair_s_own_labels_go_before_a_training_row_s(tmp_path):
    row = {"image": "a.nii.gz", "label": "b.nii.gz"}
    pair = {"fixed": "a.nii.gz", "fixed_label": "c.nii.gz", "moving": "a.nii.gz"}
    [found] = described(tmp_path, training=[row], registration_test=[pair]).pairs["registration_test"]
    assert (found.fixed.label.name, found.moving.label.name) == ("c.nii.gz", "b.nii.gz")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"labels": 3}, "has 'labels' that are not an object"),
        ({"labels": {"liver": "one"}}, "has the label 'liver' without a value"),
        ({"labels": {"1": "liver", "1.0": "x"}}, "has the label '1.0' without a value"),
        ({"labels": {"-1": "liver"}}, "has the label '-1' without a value"),
        ({"evaluated_labels": ["kidney"]}, "has the entry \"kidney\" in 'evaluated_labels'"),
        ({"evaluated_labels": []}, "has no label in 'evaluated_labels'"),
        ({"evaluated_labels": [True]}, "has the entry true"),
        ({"training": {"image": "a.nii.gz"}}, "has a 'training' that is not a list"),
        ({"training": [{"image": "a.nii.gz"}, 5]}, r"has a 'training\[1\]' that is not an object"),
        ({"training": [{"picture": "a.nii.gz"}]}, r"has a 'training\[0\]' that names neither an image nor"),
        ({"training": [{"image": ["a.nii.gz", "b.nii.gz"]}]}, r"whose 'image' is not a file name"),
        ({"training": [{"image": ""}]}, "whose 'image' is not a file name"),
        ({"training": [{"image": "gone\n.nii.gz"}]}, r"names gone\?.nii.gz, which is not there"),
        ({"registration_test": ["a.nii.gz"]}, r"has a 'registration_test\[0\]' that is not an object"),
        ({"registration_val": [{"fixed": "a.nii.gz"}]}, r"has a 'registration_val\[0\]' without 'moving'"),
        ({"other": [{"image": "a.nii.gz"}, None]}, r"has a 'other\[1\]' that is not an object"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(tmp_path, values, words):
    with pytest.raises(MorphSeekError, match=words) as caught:
        described(tmp_path, **values)
    assert str(caught.value).startswith(f"The data set {tmp_path / 'dataset.json'} ")
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["a.nii.gz", "1", "liver"]) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["image", "1", "fixed"]), inner),
    max_leaves=6,
)
PLACES = ["training", "registration_test", "registration_val", "labels", "evaluated_labels", "pairing", "name", "more"]
CASE = st.fixed_dictionaries({}, optional=dict.fromkeys(("image", "label", "landmarks"), JSON))
PAIR = st.fixed_dictionaries({}, optional=dict.fromkeys(("fixed", "moving", "fixed_label"), JSON))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(PLACES), JSON | st.lists(CASE | JSON, max_size=3) | st.lists(PAIR, max_size=2)))
def test_whatever_a_description_holds_is_read_or_refused_in_one_sentence(tmp_path, values):
    refused = ""
    try:
        found = described(tmp_path, **values)
        for split in found.pairs:
            scored_pairs(found, split)
        hold_out(found)
    except MorphSeekError as problem:
        refused = str(problem)
    assert len(refused.splitlines()) <= 1


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "[" * 100_000, "\ufeff[]"])
def test_a_description_that_is_no_object_is_one_sentence(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text, encoding="utf-8")
    with pytest.raises(MorphSeekError, match=r"dataset.json (is not valid JSON|must be a JSON object)"):
        load_dataset(tmp_path / "dataset.json")


def test_threads_may_share_a_loader(tmp_path, reads):
    """Each case is read once where all fit; where they do not, pairs are the same all the same."""
    cases = load_dataset(write_dataset(tmp_path)).split("training", "cases")
    pairs = [Pair(*sides) for sides in permutations(cases, 2)]
    loader = PairLoader(Preprocessing(align="none"), 4, True)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(loader, pairs))
    assert sorted(reads) == sorted(case.image.name for case in cases)
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(PairLoader(Preprocessing(align="none"), 4, True, kept_bytes=1), pairs))
    assert len(reads) > 2 * len(cases)
    assert all(torch.equal(one.moving, other.moving) for one, other in zip(found, others, strict=True))


def test_augmentation_moves_image_labels_and_landmarks_as_one():
    for seed in range(5):
        seeded = [torch.Generator().manual_seed(seed) for _ in range(2)]
        pair, again = (augment(ball_pair(), 1.0, generator) for generator in seeded)
        for side in ("fixed", "moving"):
            image, label = getattr(pair, side), getattr(pair, f"{side}_labels")
            assert torch.equal(label, getattr(again, f"{side}_labels"))
            assert not torch.equal(label, getattr(ball_pair(), f"{side}_labels"))
            assert float(((image > 0.5) == (label == 3)).float().mean()) > 0.98
            middle = (fields.identity(label.shape[2:]) * (label == 3)).sum(dim=(2, 3, 4)) / (label == 3).sum()
            assert float((getattr(pair, f"{side}_points") - middle).norm()) < 1
    still = augment(ball_pair(), 0.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(still.fixed, ball_pair().fixed)
    assert torch.equal(still.moving_labels, ball_pair().moving_labels)
