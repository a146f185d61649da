"""Turn weights of the published codes into MorphSeek models: ``morphseek import-checkpoint``.

The policy head that is put between encoder and decoder begins as the identity, so that the network gives what the
official code gives. PyTorch files are read weights-only: a file that holds programs is refused, not run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backbones import build_backbone
from ..backbones.architectures import ARCHITECTURES, Architecture
from ..protocol.errors import MorphSeekError
from ..protocol.settings import to_dict
from ..protocol.startup import check_output_file
from ..space.preprocessing import Preprocessing
from .model_file import Card, save, sha256, software
from .policy import ModelSettings, PolicySettings, RegistrationModel

WRAPPERS = ("state_dict", "model_state", "model_state_dict", "model")
"""Under which keys training scripts put the weights beside an optimizer, an epoch and the like."""
NAMED = 3


def import_checkpoint(
    path: Path | str,
    architecture: str,
    out: Path | str,
    *,
    preprocessing: Preprocessing | None = None,
    title: str = "",
    license: str = "",
) -> Path:
    """Write a model with a card from a PyTorch file of an official code.

    Args:
        path: a state dict, bare or under one of WRAPPERS.
        architecture: a key of :data:`MorphSeekLib.backbones.architectures.ARCHITECTURES`.
        out: the .safetensors file to write.
        preprocessing: how images are to reach the network; the default takes one step and [0, 1] intensities on the
            fixed image's own voxels.
        title, license: for the card; the file itself says neither.

    Raises:
        MorphSeekError: an unknown architecture, a file that is no PyTorch file or holds more than weights, or weights
            of another network.
    """
    path, out = Path(path), Path(out)
    if architecture not in ARCHITECTURES:
        raise MorphSeekError(f"There is no architecture '{architecture}'; choose one of: {', '.join(ARCHITECTURES)}.")
    check_output_file(out, ".safetensors")
    known = ARCHITECTURES[architecture]
    weights, arguments = read_weights(path)
    state = known.from_official(weights)
    settings = known.infer(state, arguments) if known.infer else known.settings
    problem = misfit(state, known.backbone, settings)
    if problem:
        fitting = [name for name, other in ARCHITECTURES.items() if fits(weights, other)]
        advice = f"it fits {' or '.join(fitting)}" if fitting else f"known are {', '.join(ARCHITECTURES)}"
        raise MorphSeekError(f"{path.name} does not hold the weights of {architecture}: {problem}; {advice}.")
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise MorphSeekError(f"{path.name} holds weights that are NaN or infinite ({named(broken)}); use another file.")
    torch.manual_seed(0)  # of the policy's sigma
    model = RegistrationModel(ModelSettings(known.backbone, to_dict(settings), PolicySettings(mean="linear")))
    model.backbone.load_state_dict(state)
    card = Card(
        title=title or f"{architecture}, imported from {path.name}",
        preprocessing=preprocessing or Preprocessing(steps=1),
        provenance={
            "stage": "imported",
            "architecture": architecture,
            "source": known.source,
            "file": path.name,
            "sha256": sha256(path),
            "date": time.strftime("%Y-%m-%d"),
            "software": software(),
        },
        license=license or "unknown: the imported file names none",
    )
    save(out, model, card)
    return out


def read_weights(path: Path) -> tuple[dict[str, Tensor], Mapping[str, object]]:
    """Return the tensors of a PyTorch file by name, and the constructor's arguments where the file keeps them
    ("config").

    Raises:
        MorphSeekError: no such file, no PyTorch file, more than weights in it, or no weights.
    """
    if not path.is_file():
        raise MorphSeekError(f"There is no file {path}; check the path.")
    # a best Dice beside the weights is often a NumPy number, under the name that NumPy 1 or 2 gave its maker
    scalar = np.float64(0).__reduce__()[0]
    numbers: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    numbers += [np.dtype, type(np.dtype("float32")), type(np.dtype("float64"))]
    allowed = torch.serialization.safe_globals(numbers) if torch.__version__ >= "2.6" else nullcontext()
    try:
        with allowed:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign or damaged file fails in many ways
        raise MorphSeekError(
            f"{path.name} is damaged, no PyTorch file, or holds more than weights, which MorphSeek does not open "
            "because it could run any program; copy it again, or save the network's state_dict() in the official code."
        ) from error
    arguments = content.get("config") if isinstance(content, dict) else None
    wrapper = next((key for key in WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
    weights = content if wrapper is None else content[wrapper]
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise MorphSeekError(
            f"{path.name} holds no state dict (names and tensors), neither bare nor under {', '.join(WRAPPERS)}; in "
            "the official code, save the network's state_dict()."
        )
    return {name.removeprefix("module."): v for name, v in weights.items()}, arguments or {}


def misfit(state: dict[str, Tensor], backbone: str, settings: Any) -> str:
    """Return what a network's own state differs in, as a part of a sentence; "" where nothing does."""
    with torch.device("meta"):
        wanted = build_backbone(backbone, to_dict(settings)).state_dict()
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    shapes = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    parts = []
    if missing:
        parts.append(f"it lacks {named(missing)}")
    if extra:
        parts.append(f"it has {named(extra)} too many")
    if shapes:
        found, right = (" x ".join(map(str, tensors[shapes[0]].shape)) for tensors in (state, wanted))
        parts.append(f"{named(shapes)} should be {right} and so on, not {found}")
    return ", ".join(parts)


def fits(weights: dict[str, Tensor], architecture: Architecture) -> bool:
    """Return whether official weights are this network's."""
    state = architecture.from_official(weights)
    try:
        return architecture.infer is None and not misfit(state, architecture.backbone, architecture.settings)
    except MorphSeekError:  # the network needs a library that is not installed
        return False


def named(names: list[str]) -> str:
    """Return the first few of a list of names."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
