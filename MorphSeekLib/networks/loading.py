"""A model file, ready on its device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..protocol.startup import find
from . import model_file
from .devices import memory_advice, pick_device, place
from .model_file import Card
from .policy import RegistrationModel


@dataclass(frozen=True)
class LoadedModel:
    """A model, ready on its device.

    Attributes:
        network: in eval mode.
        card: the model file's card.
        name: how it was asked for.
        sha256: of its file.
        device: where the network is.
    """

    network: RegistrationModel
    card: Card
    name: str
    sha256: str
    device: torch.device


def load_model(model: str | Path, device: str = "auto") -> LoadedModel:
    """Load a bundled model by name, or a .safetensors file.

    Raises:
        MorphSeekError: unknown model or device, unusable file, or not enough memory.
    """
    where = pick_device(device)
    path = find(model)
    with memory_advice(where):
        network, card = model_file.load(path)
        return LoadedModel(place(network, where), card, str(model), model_file.sha256(path), where)
