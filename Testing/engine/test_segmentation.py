"""Features that a network learns from labels, and fits that compare them."""

import copy
import dataclasses
import itertools
import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import blob_grid, blob_image, blob_labels, write_dataset
from test_registration import random_model

from MorphSeekLib.app import runs
from MorphSeekLib.app.phantom import abdomen, abdomen_grid
from MorphSeekLib.app.settings_file import load as load_settings
from MorphSeekLib.backbones import build_backbone
from MorphSeekLib.backbones.segmenter import Segmenter
from MorphSeekLib.data.datasets import Case, Pair, PreparedPair, load_dataset
from MorphSeekLib.data.synthesis import SynthesisSettings
from MorphSeekLib.io.images import read_labels, write_image
from MorphSeekLib.networks.loading import load_model
from MorphSeekLib.networks.model_file import Card, load, read_card, save
from MorphSeekLib.protocol.errors import Cancelled, MorphSeekError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.startup import find
from MorphSeekLib.registration import descent
from MorphSeekLib.registration.descent import descend, halved
from MorphSeekLib.registration.fit import between
from MorphSeekLib.registration.learned import Features, Learned, decided
from MorphSeekLib.registration.objective import Level, upsample
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.registration.plans import LEARNED, LEARNED_WEIGHT, SHARE
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import DenseTransform, resample
from MorphSeekLib.space.preprocessing import SOFT_TISSUE, Preprocessing
from MorphSeekLib.training import segmentation
from MorphSeekLib.training.examples import bent, painted, patch_size, segmentation_loss
from MorphSeekLib.training.finetuning import FinetuneConfig, FinetuneRun, Finetuning, finetune
from MorphSeekLib.training.segmentation import Segmentation, SegmentationConfig, SegmentationRun, suited, train_features

RUN = SegmentationRun(iterations=60, validate_every=60, validation_pairs=1, average=0.9, learning_rate=1e-2, seed=3)
CONFIG = SegmentationConfig(
    width=6, depth=2, preprocessing=Preprocessing(spacing=(2.5, 2.5, 2.5), low=0.0, align="center"), training=RUN
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    dataset = load_dataset(write_dataset(folder / "data", 5))
    return train_features(dataset, CONFIG, folder / "features.safetensors")


def test_a_segmenter_says_of_each_voxel_what_it_is_and_moves_nothing():
    torch.manual_seed(0)
    network = build_backbone("segmenter", {"features": 4, "width": 3, "depth": 2}).eval()
    moving, fixed = torch.rand(2, 1, 16, 12, 8), torch.rand(2, 1, 16, 12, 8)
    skips, top = network.encode(moving, fixed)
    learned = network.learned(skips)
    for shares in learned:
        assert shares.shape == (2, 4, 16, 12, 8)
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(2, 16, 12, 8))
    assert torch.equal(network.decode(skips, top), torch.zeros(2, 3, 16, 12, 8))
    torch.testing.assert_close(learned[1], network.image_features(fixed)[0])
    with pytest.raises(MorphSeekError, match="at least 2"):
        build_backbone("segmenter", {"features": 1})


def test_a_widened_segmenter_finds_what_it_found(trained, tmp_path):
    script = Path(__file__).parents[2] / "Resources" / "Training" / "bundle_hippocampus.py"
    widen = runpy.run_path(str(script))["widen"]
    widen(trained, 8, tmp_path / "wide.safetensors")
    (narrow, card), (wide, widened) = load(trained), load(tmp_path / "wide.safetensors")
    image = torch.rand(1, 1, 16, 24, 16)
    assert wide.settings.backbone_settings["width"] == 8
    torch.testing.assert_close(wide.found(image), narrow.found(image), rtol=1e-4, atol=1e-5)
    assert (widened.compare, widened.labels) == (card.compare, card.labels)


@pytest.mark.parametrize("block", [1, 2])
def test_images_learned_from_together_are_seen_as_alone(block):
    """Two in float32 are convolved in another way than one, or than in float64: scores and gradients are the same."""
    torch.manual_seed(0)
    network = build_backbone("segmenter", {"features": 3, "width": 4, "depth": 2, "block": block})
    assert isinstance(network, Segmenter)
    images, labels = torch.rand(2, 1, 16, 8, 24), torch.randint(3, (2, 1, 16, 8, 24))
    together, alone = network.scores(images), torch.cat([network.scores(images[:1]), network.scores(images[1:])])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    exact = copy.deepcopy(network).double()
    segmentation_loss(together, labels).backward()
    segmentation_loss(exact.scores(images.double()), labels).backward()
    for own, wanted in zip(network.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), wanted.grad, rtol=1e-3, atol=1e-5)


def test_a_segmenter_of_blocks_knows_where_each_voxel_is():
    """Trained on which half of its block of voxels each is, it says so: no voxel is exchanged on the way."""
    torch.manual_seed(0)
    network = build_backbone("segmenter", {"features": 2, "width": 4, "depth": 1, "block": 2})
    assert isinstance(network, Segmenter)
    assert network.multiple_of == 4
    image = torch.rand(1, 1, 16, 12, 8)
    wanted = torch.zeros(1, 1, 16, 12, 8, dtype=torch.int64)
    wanted[:, :, 1::2, :, ::2] = 1
    optimizer = torch.optim.Adam(network.parameters(), 0.05)
    for _ in range(40):
        loss = segmentation_loss(network.scores(image), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = network.scores(image).argmax(dim=1, keepdim=True)
    assert float((found == wanted).float().mean()) == 1


def test_labels_are_bent_as_their_image_is():
    labels = blob_labels(0, blob_grid((32, 32, 32), (2.0, 2.0, 2.0))).data[None, None]
    image = (labels > 0).float()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        seen, known = bent(image, labels, (24, 24, 24), 2.0, generator)
        assert float((((seen > 0.5) == (known > 0)).float()).mean()) > 0.9
        seen = painted(seen, generator)
        assert seen.shape == known.shape == (1, 1, 24, 24, 24)
        inside, outside = seen[known > 0], seen[known == 0]
        assert inside.mean() > outside.mean() + 0.5
        assert set(known.unique().tolist()) <= {0, 1, 2, 3}
    generator = torch.Generator().manual_seed(2)
    again = bent(image, labels, (24, 24, 24), 2.0, generator)
    assert torch.equal(painted(again[0], generator), seen)
    assert torch.equal(again[1], known)


def test_the_loss_is_least_where_labels_are_right():
    labels = torch.randint(3, (1, 1, 6, 6, 6), generator=torch.Generator().manual_seed(0))
    right = 20.0 * torch.nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1).float()
    assert segmentation_loss(right, labels) < 1e-3
    assert segmentation_loss(right.roll(1, dims=1), labels) > 1
    # a label that is nowhere neither counts as found nor as missed
    alone = segmentation_loss(torch.cat([right, torch.full_like(right[:, :1], -20.0)], dim=1), labels)
    torch.testing.assert_close(alone, segmentation_loss(right, labels))


def test_the_loss_is_cross_entropy_and_what_soft_dice_lacks():
    scores = torch.randn(2, 4, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(3, (2, 1, 6, 5, 4), generator=torch.Generator().manual_seed(2))  # 3 is nowhere
    shares, truth = scores.softmax(dim=1), torch.nn.functional.one_hot(labels[:, 0], 4).movedim(-1, 1)
    dice = [
        (2 * (shares[:, c] * truth[:, c]).sum() + 1) / ((shares[:, c] ** 2).sum() + truth[:, c].sum() + 1)
        for c in (1, 2)
    ]
    entropy = torch.nn.functional.cross_entropy(scores, labels[:, 0])
    torch.testing.assert_close(segmentation_loss(scores, labels), entropy + 1 - sum(dice) / 2)


@pytest.mark.parametrize(
    ("shapes", "most", "size"),
    [
        ([(40, 56, 40)], 192_000, (40, 56, 40)),
        ([(160, 192, 160), (160, 200, 152)], 192_000, (48, 64, 48)),
        ([(8, 200, 200)], 1000, (16, 24, 24)),
    ],
)
def test_what_is_seen_at_once_is_bounded(shapes, most, size):
    assert patch_size(shapes, 8, most) == size


def test_a_model_of_features_is_fitted_by_them(trained):
    model = load_model(trained, "cpu")
    assert model.card.compare == "features"
    assert model.card.labels == {1: 1, 2: 2, 3: 3}
    assert model.card.results["validation"]["dice"] > model.card.results["validation"]["dice_before"] + 0.1
    grid = blob_grid()
    known = [blob_labels(seed, grid) for seed in (7, 8)]
    fixed, moving = (blob_image(labels, seed) for seed, labels in enumerate(known))
    found = register(fixed, moving, model, RegistrationOptions(align="center"), labels=(known[0], known[1]))
    report = found.report
    assert report["fit"]["similarity"] == "features"
    assert [row["stage"] for row in report["steps"]][-1] == "fit"
    assert report["steps"][-1]["answer"]
    assert report["steps"][-1]["similarity"] > report["steps"][0]["similarity"]
    dice = report["dice"]["mean"]
    assert dice["warped"] > dice["aligned"] + 0.05  # about 0.1 after so short a training
    assert report["folding"]["cells"]["no_fold_proven"]
    longer = register(fixed, moving, model, RegistrationOptions(search="off", fit="on"), start=found.state)
    assert [row["stage"] for row in longer.report["steps"]][-1] == "fit"
    assert longer.report["steps"][-1]["similarity"] >= 0.99 * report["steps"][-1]["similarity"]
    by_intensities = register(fixed, moving, model, RegistrationOptions(similarity="lncc"))
    assert by_intensities.report["fit"]["similarity"] == "lncc"
    assert model.card.preprocessing.align == "center"
    assert by_intensities.report["align"] == "affine", "each image is seen by itself, so that the alignment is free"


def test_features_are_compared_beside_intensities_where_the_card_says_so(trained):
    model = load_model(trained, "cpu")
    grid = blob_grid()
    fixed, moving = (blob_image(blob_labels(seed, grid), seed) for seed in (7, 8))
    quick = RegistrationOptions(search="off", preset="fast")
    cards = {way: replace(model.card, compare=way) for way in ("intensities", "features", "both")}
    found = {way: register(fixed, moving, replace(model, card=card), quick) for way, card in cards.items()}
    said = {way: (one.report["fit"]["similarity"], one.report["fit"]["features_beside"]) for way, one in found.items()}
    assert said == {"intensities": ("lncc", False), "features": ("features", False), "both": ("lncc", True)}
    assert cards["both"].knows_labels
    totals = [found[way].state.total for way in ("both", "intensities", "features")]
    assert all(float((totals[0] - other).abs().max()) > 0.2 for other in totals[1:])


@pytest.fixture(scope="module")
def joined(trained, tmp_path_factory):
    """A network that moves, with the trained segmenter beside it."""
    folder = tmp_path_factory.mktemp("joined")
    own = random_model(folder / "moves.safetensors", spacing=(2.5, 2.5, 2.5), align="center")
    finder, card = load(trained)
    joined = replace(own.card, labels=card.labels, compare="features", share=0.4)
    save(folder / "joined.safetensors", own.network.with_finder(finder.backbone), joined)
    return folder / "joined.safetensors"


def test_the_answer_is_the_mean_of_the_steps_and_of_a_fit_by_features(joined):
    model = load_model(joined, "cpu")
    assert model.network.multiple_of == 4
    assert model.card.knows_labels
    grid = blob_grid()
    fixed, moving = (blob_image(blob_labels(seed, grid), seed) for seed in (7, 8))
    share = {"steps": replace(model.card, fit=False, compare="intensities"), "fit": replace(model.card, share=1.0)}
    share |= {"mean": model.card}
    quick = RegistrationOptions(search="off", steps=1)
    found = {name: register(fixed, moving, replace(model, card=card), quick) for name, card in share.items()}
    mean = found["mean"]
    assert [row["stage"] for row in mean.report["steps"]] == ["align", "network", "fit"]
    assert (mean.report["fit"]["share"], found["fit"].report["fit"]["share"]) == (0.4, 1.0)
    assert mean.report["folding"]["cells"]["no_fold_proven"]
    from_steps, from_mean = (found[name].state.total for name in ("steps", "mean"))
    moved = float((from_mean - from_steps).square().mean())
    assert 0.05 < moved**0.5 < 5, "the fit has its share"
    with torch.no_grad():  # a finder that finds nothing: the steps alone are the answer
        model.network.finder.out.bias[0] += 100
    alone = register(fixed, moving, model, quick)
    assert alone.report["fit"] is None
    torch.testing.assert_close(alone.state.total, from_steps)


def test_a_mean_of_displacements_lies_on_the_nodes_of_the_finer_one():
    fine, coarse = blob_grid((12, 12, 12), (2.0, 2.0, 2.0)), blob_grid((6, 6, 6), (4.0, 4.0, 4.0))
    one, other = (
        DenseTransform(torch.full((3, *grid.shape), value), grid) for grid, value in ((fine, 1.0), (coarse, 2.0))
    )
    for first, second, expected in ((one, other, 1.25), (other, one, 1.75)):
        mean = between(first, second, 0.25)
        assert mean.grid.same_as(fine)
        torch.testing.assert_close(mean.displacement, torch.full((3, 12, 12, 12), expected))
    assert between(one, other, 1.0) is other


def test_a_finder_is_kept_by_a_fine_tuning(joined, tmp_path):
    dataset = load_dataset(write_dataset(tmp_path / "data", 4))
    config = FinetuneConfig(training=FinetuneRun(iterations=1, steps=1, validate_every=1))
    out = finetune(dataset, config, joined, tmp_path / "tuned.safetensors")
    before, after = (load(path) for path in (joined, out))
    assert (after[1].compare, after[1].share) == ("features", 0.4)
    kept = {name: value for name, value in before[0].state_dict().items() if name.startswith("finder.")}
    assert kept
    assert all(torch.equal(after[0].state_dict()[name], value) for name, value in kept.items())
    assert not torch.equal(before[0].state_dict()["head.mu.weight"], after[0].state_dict()["head.mu.weight"])


def test_what_a_card_says_of_the_best_answer_is_what_was_measured(joined, tmp_path):
    """Of a model with a finder: where its steps, or a fit of intensities after them, are best, no mean is made."""
    assert {name: said.get("share") for name, (_, said) in runs._answers(read_card(joined)).items()} == {
        "steps": 1.0,
        "fitted": 1.0,
        "mean": SHARE,
    }
    model = load_model(joined, "cpu")
    grid = blob_grid()
    fixed, moving = (blob_image(blob_labels(seed, grid), seed) for seed in (7, 8))
    for name, (asked, said) in runs._answers(model.card).items():
        told = replace(model, card=replace(model.card, **said))
        quick = RegistrationOptions(search="off", preset="fast", fit_iterations=(4, 2))
        measured, usual = (
            register(fixed, moving, told, options).state.total for options in (replace(quick, fit=asked.fit), quick)
        )
        assert torch.equal(measured, usual), name


def test_features_are_learned_from_images_made_of_label_maps(tmp_path):
    """Two labels share a channel; boxes have sizes that the network takes; the card says how it came."""
    (tmp_path / "maps").mkdir()
    for seed in range(3):
        write_image(blob_labels(seed, blob_grid()), tmp_path / "maps" / f"{seed}.nii.gz")
    synthesis = SynthesisSettings(scored=3, noise=0.0, bias=0.0, blur=0.0, thick=0.0, strip=0.0)
    config = replace(
        CONFIG,
        compare="both",
        structures=((1, 2), (3,)),
        synthesis=synthesis,
        preprocessing=replace(CONFIG.preprocessing, shape=(24, 28, 24)),
        training=replace(RUN, iterations=3),
    )
    dataset = load_dataset(tmp_path / "maps")
    task = Segmentation(dataset, config, torch.device("cpu"))
    seen = set()
    for iteration in range(4):
        batch = task.batch(iteration)
        assert all(16 <= size <= 28 and size % 4 == 0 for size in batch.images.shape[2:])
        seen |= set(batch.labels.unique().tolist())
    assert seen == {0, 1, 2}
    card = read_card(train_features(dataset, config, tmp_path / "made.safetensors"))
    assert (card.compare, card.labels, card.preprocessing.shape) == ("both", {1: 1, 2: 1, 3: 2}, None)
    assert card.provenance["synthetic"]


def test_the_settings_for_brains_are_usable():
    settings = Path(__file__).parents[1] / "benchmarks" / "brain_features.toml"
    config = load_settings(SegmentationConfig, settings)
    assert config.synthesis is not None
    assert {value for values in config.structures for value in values} <= set(config.synthesis.anatomy)
    assert len(config.synthesis.groups) == len(config.synthesis.typical)


def test_images_of_something_else_are_compared_themselves(trained):
    model = load_model(trained, "cpu")
    with torch.no_grad():  # a network that finds nothing
        model.network.backbone.out.bias[0] += 100
    grid = blob_grid()
    fixed, moving = (blob_image(blob_labels(seed, grid), seed) for seed in (7, 8))
    report = register(fixed, moving, model).report
    assert report["fit"]["similarity"] == "lncc"
    said = [row["message"] for row in report["warnings"] if row["code"] == "nothing-found"]
    assert len(said) == 1
    assert "show nothing of what the model was trained to find" in said[0]


def test_a_training_of_features_resumes_to_the_same_weights(tmp_path):
    dataset = load_dataset(write_dataset(tmp_path / "data", 4))
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(RUN, iterations=4, validate_every=4))
    whole = train_features(dataset, config, tmp_path / "whole.safetensors")
    calls = itertools.count()
    with pytest.raises(Cancelled):
        train_features(dataset, config, tmp_path / "cut.safetensors", job=Job(cancelled=lambda: next(calls) > 2))
    cut = train_features(dataset, config, tmp_path / "cut.safetensors")
    one, other = (load_model(path, "cpu").network.state_dict() for path in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_features_go_on_from_a_model_of_features_alone(tmp_path, trained):
    dataset = load_dataset(write_dataset(tmp_path / "data", 4))
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(RUN, iterations=1, learning_rate=1e-9, average=0))
    out = train_features(dataset, config, tmp_path / "more.safetensors", init=trained)
    one, other = (load_model(path, "cpu").network.state_dict() for path in (trained, out))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    assert read_card(out).provenance["init"]["stage"] == "features"
    with pytest.raises(MorphSeekError, match="no model of features"):
        train_features(dataset, CONFIG, tmp_path / "other.safetensors", init=find("hippocampus-mr"))


def test_settings_suit_the_cases(tmp_path, trained):
    """Images that are seen in parts are seen in blocks of voxels, CT through a window; what is gone on from is kept."""
    small = load_dataset(write_dataset(tmp_path / "small", 2))
    assert suited(CONFIG, small) == CONFIG
    fine = replace(CONFIG, preprocessing=replace(CONFIG.preprocessing, spacing=(0.6, 0.6, 0.6)))
    assert (suited(fine, small).width, suited(fine, small).block) == (16, 2)
    for number in range(2):
        write_image(abdomen(abdomen_grid(8.0), "ct", seed=number), small.path.parent / f"image_{number}.nii.gz")
    seen = suited(CONFIG, small).preprocessing
    assert (seen.intensity, seen.low, seen.high, seen.spacing) == ("window", *SOFT_TISSUE, CONFIG.preprocessing.spacing)
    description = write_dataset(tmp_path / "mixed", 7)
    for number in range(5):
        write_image(abdomen(abdomen_grid(8.0), "ct", seed=number), description.parent / f"image_{number}.nii.gz")
    assert suited(CONFIG, load_dataset(description)).preprocessing == CONFIG.preprocessing, "two of seven are no CT"
    kept = suited(SegmentationConfig(width=9, block=2), small, trained)
    assert (kept.width, kept.depth, kept.block) == (6, 2, 1)
    assert kept.preprocessing == read_card(trained).preprocessing


def strip_labels(description: Path, count: int) -> Path:
    """Take the label maps of the last so many training cases out of a dataset.json."""
    values = json.loads(description.read_text())
    for case in values["training"][-count:]:
        case.pop("label")
    description.write_text(json.dumps(values))
    return description


def test_what_the_network_finds_in_unlabeled_cases_is_learned_too(tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation, "_BELIEVED", 2)
    dataset = load_dataset(strip_labels(write_dataset(tmp_path / "data", 5), 2))
    config = replace(CONFIG, training=replace(RUN, iterations=3, learning_rate=1e-3, average=0.0))
    task = Segmentation(dataset, config, torch.device("cpu"))
    assert (len(task.cases), len(task.unlabeled)) == (3, 2)
    early, late = task.batch(1), task.batch(2)
    assert (len(early.labels), len(early.plain)) == (2, 0)
    assert (len(late.images), len(late.labels), len(late.plain)) == (2, 1, 1)
    assert not torch.equal(late.images[1], late.plain[0]), "painted"
    network = task.network.backbone
    assert isinstance(network, Segmenter)
    with torch.no_grad():
        labels = torch.cat([late.labels, network.scores(late.plain).argmax(dim=1, keepdim=True)])
        expected = float(segmentation_loss(network.scores(late.images), labels))
    assert task.update(2, late)["loss"] == pytest.approx(expected, rel=2e-2)  # bfloat16 where that is fast
    card = read_card(train_features(dataset, config, tmp_path / "model.safetensors"))
    assert (card.provenance["cases"], card.provenance["unlabeled"]) == (3, 2)


def test_a_finder_stands_in_for_missing_labels_in_a_fine_tuning(joined, tmp_path):
    """Dice and rewards of pairs with unlabeled cases are by what the finder finds there."""
    dataset = load_dataset(strip_labels(write_dataset(tmp_path / "data", 5), 2))
    config = FinetuneConfig(training=FinetuneRun(iterations=1, steps=1, validate_every=1))
    task = Finetuning(dataset, config, joined, torch.device("cpu"))
    bare = [case for case in task.cases if case.label is None]
    assert (len(task.cases), len(bare)) == (5, 2)
    number = int(bare[0].file.name.removeprefix("image_").removesuffix(".nii.gz"))
    prepared = task.loader(Pair(bare[0], bare[0]))
    truth = resample(blob_labels(number, blob_grid()), prepared.grid, mode="nearest").data
    found = prepared.fixed_labels[0, 0]
    inside = (found > 0) & (truth > 0)
    assert float(2 * inside.sum() / ((found > 0).sum() + (truth > 0).sum())) > 0.8
    assert set(found.unique().tolist()) <= {0, 1, 2, 3}
    elsewhere = Case(tmp_path / "data" / "image_1.nii.gz")  # one to validate on has its own labels or none
    assert task.loader(Pair(elsewhere, elsewhere)).fixed_labels is None
    card = read_card(finetune(dataset, config, joined, tmp_path / "tuned.safetensors"))
    assert (card.provenance["cases"], card.provenance["unlabeled"]) == (3, 2)
    other = replace(load(joined)[1], labels={1: 1, 2: 2})  # one label of the cases is unknown to it
    save(tmp_path / "less.safetensors", load(joined)[0], other)
    assert len(Finetuning(dataset, config, tmp_path / "less.safetensors", torch.device("cpu")).cases) == 3


def test_unlabeled_cases_alone_are_refused(tmp_path):
    dataset = load_dataset(strip_labels(write_dataset(tmp_path / "data", 4), 3))
    with pytest.raises(MorphSeekError, match="1 labeled training cases"):
        train_features(dataset, CONFIG, tmp_path / "model.safetensors")


def test_features_of_large_images_are_compared_where_they_fit(trained):
    """Fifty features on a large grid would take more memory than there may be: the finest level is left out."""
    maps = torch.zeros(1, 50, 8, 8, 8)
    features = Features(maps, blob_grid((8, 8, 8)))
    learned = Learned(features, features)
    assert learned.levels((2, 1, 0), (64, 64, 64)) == (2, 1, 0)
    assert learned.levels((2, 1, 0), (160, 208, 192)) == (2, 1)
    assert not features.found()
    assert Features(maps + 1, features.grid).found()


def test_what_is_found_must_be_about_as_large_as_what_was_learned():
    grid = blob_grid((8, 8, 8))
    maps = torch.zeros(1, 3, 8, 8, 8)
    maps[0, 0, :4], maps[0, 1, 4:6] = 1.0, 1.0
    voxel = float(np.prod(grid.spacing)) / 1000
    whole = Card(volumes={1: 256 * voxel, 2: 128 * voxel, 3: 9 * voxel})
    assert Features(maps, grid).found(whole)
    assert not Features(maps.flip(1), grid).found(whole)  # 1 is missing, 3 is much too large
    assert not Features(maps, grid).found(replace(whole, volumes={1: 9 * voxel, 2: 9 * voxel, 3: 9 * voxel}))


def test_a_modality_with_fewer_labels_is_found_and_what_both_images_show_is_compared():
    """Of six labels that the cases of one modality have, those of the other have two."""
    grid = blob_grid((8, 8, 8))
    many, few = torch.zeros(2, 1, 6, 8, 8, 8)
    for channel in range(6):
        many[0, channel, channel] = 1.0
    few[0, :2] = many[0, :2]
    whole = Card(volumes={channel: 64 * float(np.prod(grid.spacing)) / 1000 for channel in range(1, 7)}, fewest=2)
    both = Learned(Features(few, grid), Features(many, grid))
    assert both.fixed.found(whole)
    assert not both.fixed.found(replace(whole, fewest=0)), "two of six are too few where every case had six"
    common = both.common(whole)
    assert torch.equal(common.fixed.maps, few[:, :2])
    assert torch.equal(common.moving.maps, many[:, :2])
    same = Learned(both.moving, both.moving)
    assert same.common(whole) is same
    assert (
        Learned(Features(few, grid), Features(many - torch.cat([few[:, :2], 0 * few[:, 2:]], 1), grid)).common(whole)
        is None
    )


def test_the_likeliest_label_of_a_voxel_is_decided_and_one_that_hardly_ever_is_stays_uncertain():
    maps = torch.zeros(1, 3, 4, 1, 1)
    maps[0, 0, :, 0, 0] = torch.tensor([0.9, 0.5, 0.2, 0.0])
    maps[0, 1, :, 0, 0] = torch.tensor([0.1, 0.3, 0.6, 0.4])
    maps[0, 2, :, 0, 0] = torch.tensor([0.0, 0.1, 0.1, 0.1])
    found = decided(maps)
    assert found[0, 0, :, 0, 0].tolist() == [1, 1, 0, 0]
    assert found[0, 1, :, 0, 0].tolist() == [0, 0, 1, 0], "the background is likelier in the last"
    assert torch.equal(found[0, 2], maps[0, 2]), "nowhere the likeliest"
    assert torch.equal(decided(0 * maps), 0 * maps)


def test_probabilities_are_brought_onto_what_is_decided_in_the_image_that_is_fitted_to():
    grid = blob_grid((8, 8, 8), (2.0, 2.0, 2.0))
    fixed, moving = 0.8 * torch.rand(2, 1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    learned = Learned(Features(fixed, grid), Features(moving, grid))
    there, back = learned.compared(grid, np.eye(4)), learned.compared(grid, np.eye(4), swapped=True)
    for found, wanted in zip((*there, *back), (decided(fixed), moving, decided(moving), fixed), strict=True):
        torch.testing.assert_close(found, wanted)


def test_uncertain_labels_overlap_more_when_fitted_to_what_is_decided():
    """Two balls of other sizes, whose outlines are known to two voxels: drawn many times, they overlap more where the
    certain part of the one fills the likely part of the other than where the probabilities are equal."""
    index = torch.stack(torch.meshgrid(*[torch.arange(24.0) - 11.5] * 3, indexing="ij"))
    shares = [torch.sigmoid((radius - index.norm(dim=0)) / 1.5)[None, None] for radius in (6.0, 8.0)]

    def expected_dice(target: torch.Tensor) -> float:
        levels = []
        for level in LEARNED["best"].levels:
            images = [target, shares[1]]
            for _ in range(level):
                images = [halved(image) for image in images]
            counted = torch.ones([n // 2 for n in images[0].shape[2:]], dtype=torch.bool)
            levels.append(Level(images[0], images[1], counted, LEARNED_WEIGHT, LEARNED["best"].regularization))
        field = upsample(descend(levels, LEARNED["best"].iterations)[-1].control)
        warped = fields.warp(shares[1], field)
        return float(2 * (shares[0] * warped).sum() / (shares[0] + warped).sum())

    assert expected_dice(decided(shares[0])) > expected_dice(shares[0]) + 0.02


def test_a_pair_of_any_size_is_fitted_while_features_are_learned(trained, monkeypatch):
    """The coarsest of three levels has five voxels along an axis, which are no whole blocks of two: nothing is read or
    written beside them, so that the compiled form ends where torch does."""
    network, _ = load(trained)
    grid = blob_grid((20, 28, 20))
    images = [blob_image(blob_labels(seed, grid), seed).data.float()[None, None] / 255 for seed in (7, 8)]
    pair = PreparedPair(*images, None, None, grid)
    found = segmentation.fitted_by(network, pair, torch.device("cpu"))
    assert found.shape == (1, 3, 20, 28, 20)
    assert float(found.abs().max()) > 0.2
    monkeypatch.setattr(descent, "kernels", lambda _: None)
    assert float((segmentation.fitted_by(network, pair, torch.device("cpu")) - found).abs().mean()) < 0.005


def test_a_segmenter_of_blocks_sees_an_image_from_two_places():
    torch.manual_seed(0)
    network = build_backbone("segmenter", {"features": 3, "width": 3, "depth": 1, "block": 2}).eval()
    image = torch.rand(1, 1, 16, 12, 8)
    moved = network.scores(image.roll((1, 1, 1), (2, 3, 4))).softmax(dim=1).roll((-1, -1, -1), (2, 3, 4))
    (found,) = network.image_features(image)
    torch.testing.assert_close(found, (network.scores(image).softmax(dim=1) + moved) / 2)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(1, 16, 12, 8))
    alone = build_backbone("segmenter", {"features": 3, "width": 3, "depth": 1}).eval()
    assert torch.equal(alone.image_features(image)[0], alone.scores(image).softmax(dim=1))


def test_a_training_notes_how_large_is_what_it_learns(trained):
    card = read_card(trained)
    assert set(card.volumes) == set(card.labels.values())
    assert card.fewest == 3
    cases = load_dataset(trained.parent / "data" / "dataset.json").cases["training"]
    for value, channel in card.labels.items():
        found = sorted(
            float((labels.data == value).sum()) * float(np.prod(labels.grid.spacing)) / 1000
            for labels in (read_labels(case.label) for case in cases)
        )
        assert found[0] - 1e-3 <= card.volumes[channel] <= found[-1] + 1e-3
