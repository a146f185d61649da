"""Which model a pair is registered by, where nothing is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..networks.devices import pick_device
from ..networks.loading import LoadedModel, load_model
from ..networks.model_file import read_card
from ..protocol.job import SILENT, Job
from ..protocol.startup import AUTO, NO_MODEL, bundled
from ..space.geometry import Volume
from ..space.preprocessing import general
from .alignment import object_size

NEAR = 1.1
"""How many times larger or smaller than the objects of a model's training another may be for "auto" to take it."""


def chosen_model(
    name: str,
    images: Sequence[Volume],
    device: str = "auto",
    job: Job = SILENT,
    load: Callable[[str, str], LoadedModel] = load_model,
) -> tuple[LoadedModel | None, torch.device, str]:
    """Return the model of a name, the device, and a sentence that says which and why.

    Args:
        name: a bundled model's, a file's, "none", or "auto": the bundled model that was trained on labels, was better
            on labeled pairs than a fit, and knows objects of about the size that both images show; else none.
        images: fixed and moving.
        device: as for :func:`MorphSeekLib.networks.loading.load_model`.
        job: checked.
        load: gives a model for a name and a device; the worker's keeps the last one.

    Raises:
        MorphSeekError: unknown model or device, unusable file, or not enough memory.
    """
    where = pick_device(device)
    if name not in (AUTO, NO_MODEL):
        return load(name, device), where, f"Model: {name}."
    if name == NO_MODEL:
        return None, where, "Model: none."
    if general(*(image.data for image in images)).intensity == "window":
        return None, where, "Model: none, as the images look like CT, which no bundled model knows."
    sizes = [object_size(image, job) for image in images]
    for own, path in bundled().items():
        card = read_card(path)
        if card.knows_labels and all(1 / NEAR <= card.preprocessing.beyond(size) <= NEAR for size in sizes):
            shown = " and ".join(f"{size:.0f}" for size in sizes)
            words = f"Model: {own}, which was trained on labels of objects of the size of these ({shown} mm)."
            return load(own, device), where, words
    return None, where, "Model: none, as no bundled model is better on such images than the fit alone."
