"""The state of an unfinished training, kept beside its model and read again to resume."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from ..io.files import write_atomically
from ..protocol.errors import MorphSeekError
from ..protocol.settings import current_names

FORMAT = "3"
OLD_FORMAT = "2"
OLD_NAMES = {"score": "score", "best/iteration": "best_iteration"}
"""What format 2 kept among the task's numbers, and the attribute of :class:`RunState` that it is now."""
LATER: dict[str, dict[str, object]] = {
    "training": {"minutes": None, "average": 0.0, "patience": None},
    "model": {"finder": None},
    "synthesis": {"mirror": 0.0},
    "": {"compare": "features", "synthesis": None, "structures": [], "block": 1},
}
"""Settings that there were not always, by their section, and the values that change nothing."""


_KEPT = ("best", "average")  # weights of a RunState


@dataclass
class RunState:
    """All that a training's remaining iterations depend on, besides weights, optimizer and the task's memory.

    Attributes:
        done: iterations.
        seconds: spent until the last state.
        score: of the best validation so far; None before the first, or where the last weights count.
        best_iteration: after which it was reached.
        best: the weights then.
        figures: of the validation of the weights to keep.
        owed: figures of the last iteration while its validation is not finished; None once it is.
        validated: seconds that were spent when the last validation ended; ``validation`` those that it took.
        without_gain: validations in a row that were not better than the best.
        stopped: whether the run has come to its end.
        average: the averaged weights, where some are kept.
    """

    done: int = 0
    seconds: float = 0.0
    score: float | None = None
    best_iteration: int | None = None
    best: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    owed: dict[str, float] | None = None
    validated: float = 0.0
    validation: float = 0.0
    without_gain: int = 0
    stopped: bool = False
    average: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Memory:
    """The numbers of a task that must survive a kill. A task that has some declares them in a subclass."""


M = TypeVar("M", bound=Memory)


def state_file(out: Path) -> Path:
    """Return where an unfinished training of a model keeps what it needs to resume."""
    return out.with_name(out.name + ".state")


def save_state(
    path: Path, fingerprint: str, state: RunState, memory: Memory, model: nn.Module, optimizer: torch.optim.Adam
) -> None:
    """Write all that the iterations after ``state.done`` depend on; the file appears whole or not at all.

    Args:
        path: from :func:`state_file`.
        fingerprint: of all settings.
        state, memory: where the training stands, and its task's numbers.
        model, optimizer: what is trained, and by what.
    """
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for kept in _KEPT:
        tensors |= {f"{kept}.{k}": v for k, v in getattr(state, kept).items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"adam.{k}.{name}": v for k, v in optimizer.state[parameter].items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    standing = {f.name: getattr(state, f.name) for f in dataclasses.fields(RunState) if f.name not in _KEPT}
    standing["memory"] = dataclasses.asdict(memory)
    metadata = {"format": FORMAT, "settings": fingerprint, "standing": json.dumps(standing)}
    write_atomically(path, serialize(tensors, metadata))


def load_state(
    path: Path, fingerprint: str, memory: M, model: nn.Module, optimizer: torch.optim.Adam
) -> tuple[RunState, M]:
    """Load a state if there is one, into model and optimizer too; arguments as for :func:`save_state`.

    Returns:
        where the training stands, and its task's numbers; a new state and ``memory`` itself without a file.

    Raises:
        MorphSeekError: a damaged state, or one of other settings or another version.
    """
    if not path.is_file():
        return RunState(), memory
    advice = f"remove {path} to start again, or choose another --out"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _todays(metadata.get("settings", "")) != fingerprint:
                raise MorphSeekError(f"{path.name} belongs to a run with other settings; {advice}.")
            if metadata.get("format") not in (FORMAT, OLD_FORMAT):
                raise MorphSeekError(f"{path.name} was written by another version of MorphSeek; {advice}.")
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise MorphSeekError(f"{path.name} cannot be read ({error}); {advice}.") from error
    model.load_state_dict({k: stored[f"model.{k}"] for k in model.state_dict()})
    moments = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"adam.{k}.{name}" in stored]
        if keys:  # a parameter that no loss has reached yet has no moments
            moments[index] = {k: stored[f"adam.{k}.{name}"].to(parameter.device) for k in keys}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    weights = {
        kept: {k.removeprefix(f"{kept}."): v for k, v in stored.items() if k.startswith(f"{kept}.")} for kept in _KEPT
    }
    standing = json.loads(metadata["standing"])
    if metadata["format"] == OLD_FORMAT:  # what a state says of where it stands, by today's names
        names = {name: old for old, name in OLD_NAMES.items() if old in standing["memory"]}
        standing |= {name: standing["memory"].pop(old) for name, old in names.items()}
    memory = dataclasses.replace(memory, **standing.pop("memory"))
    return RunState(**standing, best=weights["best"], average=weights["average"]), memory


def fingerprint_of(settings: dict[str, Any]) -> str:
    """Return what tells a training's settings, with what else it depends on, from others."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    for section, later in LATER.items():
        values = (plain.get(section) or {}) if section else plain
        for name, value in later.items():
            if name in values and values[name] == value:
                del values[name]
    return json.dumps(plain, sort_keys=True)


def _todays(text: str) -> str:
    """Return the settings of a state, by today's names, as a training writes them."""
    try:
        return fingerprint_of(json.loads(text, object_hook=current_names))
    except ValueError:
        return text
