"""Model files: one .safetensors file; its metadata holds a JSON card that says what the weights are.

Nothing is ever unpickled from a file that a user picked. A file is written under a temporary name and renamed, so
that a crash or a full disk never costs the old one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from ..io.files import write_atomically
from ..protocol.card import ParameterCounts, Provenance
from ..protocol.errors import MorphSeekError
from ..protocol.settings import from_dict, to_dict, to_json
from ..protocol.startup import FORMAT, read_header
from ..protocol.startup import sha256 as sha256  # for those who read a model file
from ..protocol.version import __version__
from ..space.preprocessing import Preprocessing
from .policy import ModelSettings, RegistrationModel


@dataclass(frozen=True)
class Card:
    """What a model says of itself.

    Attributes:
        title: one line for a list of models.
        model: how to rebuild the network.
        parameters: of the backbone and of its policy head, and the head's share; written by :func:`save`.
        preprocessing: how to feed it.
        search: whether large motion is searched for before the steps when nothing is asked for.
        fit: whether the pair is fitted after the steps when nothing is asked for. False where the model was trained on
            labels and was better without on its validation pairs; then its steps are kept even where the images say
            otherwise.
        provenance: data, settings, seconds, software; see :class:`MorphSeekLib.protocol.card.Provenance`.
        results: figures that were measured, each with its definition; free keys.
        license: of the weights, with the reason.
        compare: what the fit compares when nothing is asked for: "intensities", the network's learned "features", or
            "both".
        share: of a fit by features in the answer, where steps were taken before it: the displacement is the mean of
            theirs and its own, which is smoother and more often right than either. Below 1 the steps are kept even
            where the images say otherwise, and nothing is fitted where no features are found.
        labels: label value -> channel of the class-like features that stands for it, see
            :mod:`MorphSeekLib.data.label_channels`; empty where nothing was learned of labels, or channel c stands for
            label c.
        volumes: milliliters of what such a channel stands for, the median of the training's cases; where something else
            is found in an image, its features are not compared. Empty: whatever is found counts.
        fewest: channels that each of the training's cases had at least; half as many must be found. 0: half of all.
    """

    title: str = ""
    model: ModelSettings = field(default_factory=ModelSettings)
    parameters: ParameterCounts = field(default_factory=ParameterCounts)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    provenance: Provenance = field(default_factory=Provenance)
    results: dict[str, Any] = field(default_factory=dict)
    license: str = ""
    search: bool = True
    fit: bool = True
    labels: dict[int, int] = field(default_factory=dict)
    compare: Literal["intensities", "features", "both"] = "intensities"
    share: float = 1.0
    volumes: dict[int, float] = field(default_factory=dict)
    fewest: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError("share must be above 0 and at most 1")

    @property
    def keeps_steps(self) -> bool:
        """Whether its steps are part of the answer even where the images say otherwise."""
        return not self.fit or self.share < 1

    @property
    def knows_labels(self) -> bool:
        """Whether what it answers was found better on labeled pairs than what a fit of intensities leads to."""
        return not self.fit or self.compare != "intensities"


def software() -> dict[str, str]:
    """Return the versions that provenance and reports name."""
    return {
        "morphseek": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "simpleitk": version("SimpleITK"),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def save(path: Path | str, model: RegistrationModel, card: Card) -> None:
    """Write weights and card; the file appears whole or not at all.

    Raises:
        MorphSeekError: a weight is NaN or infinite, the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    card = dataclasses.replace(card, model=model.settings, parameters=model.parameter_counts())
    metadata = {"morphseek": to_json({"format": FORMAT, **to_dict(card)})}
    state = {k: v.detach().float().cpu().contiguous() for k, v in model.state_dict().items()}
    if (name := not_finite(state)) is not None:
        raise MorphSeekError(
            f"{path.name} was not written because its tensor '{name}' holds NaN or infinite values; train again with a "
            "lower learning rate, or check the file that the weights come from."
        )
    write_atomically(path, serialize(state, metadata))


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity; None where all are finite."""
    return next((name for name, value in state.items() if not bool(torch.isfinite(value).all())), None)


def rewrite_card(path: Path | str, card: Card) -> None:
    """Put another card on a model file; its weights stay as they are, bit by bit.

    Raises:
        MorphSeekError: the file is not a model, or cannot be written.
    """
    path = Path(path)
    read_card(path)
    header, data = _parts(path)
    header["__metadata__"]["morphseek"] = json.dumps({"format": FORMAT, **to_dict(card)})
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomically(path, len(text).to_bytes(8, "little") + text + data)


def read_card(path: Path | str) -> Card:
    """Return the card alone; no weights are read.

    Raises:
        MorphSeekError: no such file, or not a MorphSeek model: pickled, foreign, damaged or from a later version.
    """
    path = Path(path)
    return from_dict(Card, read_header(path), f"the card of {path.name}")


def load(path: Path | str, device: torch.device | str = "cpu") -> tuple[RegistrationModel, Card]:
    """Return the model in eval mode, and its card.

    Raises:
        MorphSeekError: as :func:`read_card`, or weights that do not fit the card, are NaN or are infinite.
    """
    path = Path(path)
    card = read_card(path)
    try:
        model = RegistrationModel(card.model)
    except MorphSeekError as error:
        raise MorphSeekError(f"{path.name} cannot be used. {error}") from error
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise MorphSeekError(f"The weights in {path.name} do not fit its card ({reason}); copy it again.") from error
    if (name := not_finite(state)) is not None:
        raise MorphSeekError(
            f"{path.name} cannot be used because its tensor '{name}' holds NaN or infinite values; download or copy "
            "the file again, or train the model again."
        )
    return model.to(device).eval(), card


def weights_sha256(path: Path | str) -> str:
    """Return the hex digest of a model's weights alone; it stays when the card is rewritten."""
    return hashlib.sha256(_parts(Path(path))[1]).hexdigest()


def _parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header of a .safetensors file and the bytes of its tensors
    (https://github.com/huggingface/safetensors)."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]
