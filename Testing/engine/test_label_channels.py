"""Label values of any size, and the channels that stand for them."""

from __future__ import annotations

import pytest
import torch
from cases import write_dataset

from MorphSeekLib.data.datasets import Case, label_values, load_dataset
from MorphSeekLib.data.label_channels import channels_for, to_channels
from MorphSeekLib.networks import model_file
from MorphSeekLib.networks.policy import ModelSettings, RegistrationModel
from MorphSeekLib.protocol.errors import MorphSeekError


def test_values_take_channels_in_their_order():
    assert channels_for([2035, 1002, 7]) == {7: 1, 1002: 2, 2035: 3}


def test_known_values_keep_their_channels():
    assert channels_for([1, 3, 9], {3: 1, 5: 3}) == {3: 1, 5: 3, 1: 2, 9: 4}


def test_more_labels_than_a_model_learns_are_refused():
    assert max(channels_for(range(1, 101)).values()) == 100
    with pytest.raises(MorphSeekError, match="hold 101 different labels"):
        channels_for(range(1, 102))


def test_a_label_map_becomes_channels():
    labels = torch.tensor([[0, 1002], [2035, 5]], dtype=torch.int32)
    assert to_channels(labels, {1002: 1, 2035: 2}).tolist() == [[0, 1], [2, 0]]
    assert to_channels(labels, {}).tolist() == [[0, 0], [0, 0]]


def test_values_are_read_from_label_maps(tmp_path):
    cases = load_dataset(write_dataset(tmp_path, 2)).cases["training"]
    assert label_values(cases) == (1, 2, 3)
    merged = [Case(case.image, case.label, merged=((3, 2),)) for case in cases]
    assert label_values(merged) == (1, 2)


def test_a_card_keeps_the_channels(tmp_path):
    file = tmp_path / "model.safetensors"
    model_file.save(file, RegistrationModel(ModelSettings()), model_file.Card(labels={1002: 1, 2035: 2}))
    assert model_file.read_card(file).labels == {1002: 1, 2035: 2}
