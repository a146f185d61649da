"""Checkpoints: what is saved is loaded, and every unusable file gets one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from MorphSeekLib.networks import model_file
from MorphSeekLib.networks.model_file import Card
from MorphSeekLib.networks.policy import ModelSettings, PolicySettings, RegistrationModel
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.startup import find
from MorphSeekLib.space.preprocessing import Preprocessing

MODEL = ModelSettings(
    backbone_settings={"encoder": [4, 6], "decoder": [6, 4], "extra": [4]},
    policy=PolicySettings(lambda_scale=3.0),
    output="velocity",
)
CARD = Card(
    title="A small one",
    preprocessing=Preprocessing(spacing=(2.0, 2.0, 3.0), align="rigid", steps=3),
    provenance={"data": "nothing", "seed": 4},
    results={"dice": 0.5},
    license="Apache-2.0",
)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(3)
    model = RegistrationModel(MODEL)
    model_file.save(tmp_path / "small.safetensors", model, CARD)
    return tmp_path / "small.safetensors", model


def test_round_trip(saved):
    path, model = saved
    loaded, card = model_file.load(path)
    assert card.model == model.settings
    assert (card.preprocessing, card.title, card.provenance, card.results, card.license) == (
        CARD.preprocessing,
        CARD.title,
        CARD.provenance,
        CARD.results,
        CARD.license,
    )
    assert not loaded.training
    count = sum(p.numel() for p in model.head.parameters())
    assert card.parameters["policy_head"] == count == 2 * (6 * 6 + 6)
    assert card.parameters["policy_head_percent"] == pytest.approx(100 * count / card.parameters["backbone"], abs=0.005)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert model_file.read_card(path) == card


def rewrite(path, change):
    """The same weights under a changed card."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        state = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        values = json.loads(file.metadata()["morphseek"])
    change(values, state)
    save_file(state, path, {"morphseek": json.dumps(values)})


def test_a_setting_that_was_removed_is_refused_unless_it_changed_nothing(saved):
    path, model = saved
    rewrite(path, lambda values, state: values["model"]["backbone_settings"].update(skip_gains=[]))
    assert torch.equal(model_file.load(path)[0].head.mu.weight, model.head.mu.weight)
    rewrite(path, lambda values, state: values["model"]["backbone_settings"].update(skip_gains=[0.0]))
    words = "small.safetensors cannot be used. The setting 'skip_gains' of backbone 'voxelmorph' was removed"
    with pytest.raises(MorphSeekError, match=words):
        model_file.load(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def pickled(path):
    torch.save({"weights": torch.zeros(3)}, path)


def plain_pickle(path):
    path.write_bytes(pickle.dumps({"a": 1}))


def foreign(path):
    save_file({"w": torch.zeros(3)}, path, {"format": "pt"})


def later(path):
    rewrite(path, lambda card, state: card.update(format=99))


def unknown_key(path):
    rewrite(path, lambda card, state: card.update(color="red"))


def missing_weight(path):
    rewrite(path, lambda card, state: state.pop("head.mu.weight"))


def not_a_number(path):
    rewrite(path, lambda card, state: state["head.mu.weight"].view(-1)[3:4].fill_(float("nan")))


def infinite(path):
    rewrite(path, lambda card, state: state["head.mu.bias"].fill_(-float("inf")))


def other_backbone(path):
    rewrite(path, lambda card, state: card["model"].update(backbone="resnet"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate, "damaged or not a .safetensors file"),
        (pickled, "pickled PyTorch file"),
        (plain_pickle, "pickled PyTorch file"),
        (foreign, "another program"),
        (later, "format 99"),
        (unknown_key, "no setting 'color'"),
        (missing_weight, "do not fit its card"),
        (not_a_number, r"small.safetensors .* tensor 'head.mu.weight' holds NaN or infinite values"),
        (infinite, "tensor 'head.mu.bias' holds NaN or infinite values"),
        (other_backbone, "no backbone 'resnet'"),
        (lambda path: path.write_bytes(b""), "damaged or not"),
        (lambda path: path.write_text("hello, this is text"), "damaged or not"),
        (lambda path: path.unlink(), "no model file"),
    ],
)
def test_unusable_files_get_one_sentence(saved, spoil, words):
    path, _ = saved
    spoil(path)
    with pytest.raises(MorphSeekError, match=words) as caught:
        model_file.load(path)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "trap.safetensors"
    torch.save({"w": Trap()}, path)
    for reader in (model_file.load, model_file.read_card):
        with pytest.raises(MorphSeekError):
            reader(path)
    assert not (tmp_path / "sprung").exists()


def test_a_failed_write_keeps_the_old_file(saved):
    path, model = saved
    before = path.read_bytes()
    path.parent.chmod(0o500)
    try:
        if os.access(path.parent, os.W_OK):
            pytest.skip("this user may write anywhere, so a write cannot be made to fail this way")
        with pytest.raises(MorphSeekError, match="cannot be written"):
            model_file.save(path, model, CARD)
    finally:
        path.parent.chmod(0o700)
    assert path.read_bytes() == before


def test_a_folder_in_the_way_is_refused_and_nothing_is_left(tmp_path, saved):
    _, model = saved
    (tmp_path / "taken").mkdir()
    with pytest.raises(MorphSeekError, match="cannot be written"):
        model_file.save(tmp_path / "taken", model, CARD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.safetensors", "taken"]


def test_weights_that_are_no_numbers_are_not_written(tmp_path, saved):
    path, model = saved
    before = path.read_bytes()
    model.head.mu.bias.data[0] = float("nan")
    with pytest.raises(MorphSeekError, match=r"small.safetensors was not written because its tensor 'head.mu.bias'"):
        model_file.save(path, model, CARD)
    assert path.read_bytes() == before


def test_a_figure_that_is_no_number_is_null_in_the_card(tmp_path, saved):
    path, model = saved
    model_file.save(path, model, dataclasses.replace(CARD, results={"dice": float("nan")}))
    assert model_file.read_card(path).results == {"dice": None}


def test_find_names_what_there_is(saved):
    path, _ = saved
    assert find(path) == path
    with pytest.raises(MorphSeekError, match="no model 'brain-xr'"):
        find("brain-xr")


def test_a_card_is_rewritten_without_touching_the_weights(tmp_path):
    path = tmp_path / "m.safetensors"
    model_file.save(path, RegistrationModel(CARD.model), CARD)
    weights, file = model_file.weights_sha256(path), model_file.sha256(path)
    before = model_file.load(path)[0].state_dict()
    card = model_file.read_card(path)
    preprocessing = dataclasses.replace(card.preprocessing, knows=(10.0, 20.5))
    model_file.rewrite_card(path, dataclasses.replace(card, preprocessing=preprocessing))
    assert model_file.weights_sha256(path) == weights
    assert model_file.sha256(path) != file
    model, card = model_file.load(path)
    assert card.preprocessing.knows == (10.0, 20.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["brain-mr", "hippocampus-mr"])
def test_the_bundled_models_know_the_sizes_they_were_trained_on(name):
    low, high = model_file.read_card(find(name)).preprocessing.knows
    assert 0 < low < high < 300
