"""A training as a folder: what the panel starts, watches, stops and finds again, and anyone with a file manager can.

| file in the folder | what it is |
|---|---|
| run.json | what is wanted: :class:`MorphSeekLib.protocol.options.TrainingOptions` |
| cases | copies of the cases, where they came from a scene |
| STAGE.json | the settings of each stage as they were used, for `morphseek warmup` or `finetune` |
| STAGE.safetensors | the stages' models, with .jsonl (curves), .log (TensorBoard), .state |
| fresh.safetensors | the untrained network that fine-tuning from scratch starts from |
| start.json, result.json | figures on the held-out pairs, before and after |
| status.json | where it stands: :class:`Status` |
| lock | held by the process that trains, with its number and computer |
| stop | made by whoever wants the run to stop; its state is kept |
| keep | lets the run go on when its standard input, which its starter holds, is closed |
| log.txt | what the process printed |
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from .errors import InUseError
from .lock import try_lock

SETTINGS, STATUS, LOCK, STOP, KEEP, LOG = "run.json", "status.json", "lock", "stop", "keep", "log.txt"
CASES = "cases"
Stage = Literal["features", "warmup", "finetune", "final"]
"""What a run can train: features for a fit to compare, from labels; a network without labels; one with labels; and
whichever was trained with labels once more on all cases, the held-out ones too."""
STAGES: tuple[Stage, ...] = get_args(Stage)
EVALUATE = "evaluate"
SHARES: dict[str, float] = {"features": 8.0, "warmup": 2.0, "finetune": 8.0, EVALUATE: 1.0, "final": 2.0}
"""The parts of a run in their order, and how its minutes are shared among those that it has.

A part more is a line here, its settings in :func:`MorphSeekLib.app.runs.stage_settings`, and a branch in
:func:`MorphSeekLib.app.runs.train_stage`.
"""


def parts(stages: Collection[str], measured: bool) -> dict[str, tuple[float, float]]:
    """Return where each part of a run begins and ends, as shares of the whole, in their order.

    Args:
        stages: what is trained.
        measured: whether there are figures on held-out pairs; they follow all stages but the one on all cases.
    """
    weights = {name: weight for name, weight in SHARES.items() if name in stages or (name == EVALUATE and measured)}
    ends = [end / sum(weights.values()) for end in itertools.accumulate(weights.values())]
    return {name: (begin, end) for name, begin, end in zip(weights, [0.0, *ends], ends, strict=False)}


class HeldOut(TypedDict, total=False):
    """The finished model's figures on the held-out pairs, as `morphseek evaluate` gives them; empty before.

    ``start``: the same means of what it was started from, where there was something.
    """

    pairs: int
    mean: dict[str, float | None]
    definitions: dict[str, str]
    start: dict[str, float | None]


@dataclass
class Status:
    """status.json: where a run stands.

    Attributes:
        state: "running", "stopped", "failed" or "done"; "running" without a held lock is a run that was killed.
        stage: one of SHARES, or "" before the first.
        fraction: share of the whole run that is done, 0 to 1.
        message: a sentence for the user; of a failed run, what is wrong and what to do.
        held_out: when done, the figures before and after on the held-out pairs.
        model: when done, the finished model's file.
    """

    state: str = "running"
    stage: str = ""
    fraction: float = 0.0
    message: str = ""
    held_out: HeldOut = field(default_factory=HeldOut)
    model: str = ""


def run_beside(model: Path | str) -> Path:
    """Return the folder of the run that `morphseek train` makes for a model: NAME-training beside NAME.safetensors."""
    path = Path(model)
    return path.with_name(f"{path.stem}-training")


def curves_file(folder: Path, stage: str) -> Path:
    """Return the file of a stage's figures, a line of JSON an iteration."""
    return folder / f"{stage}.safetensors.jsonl"


@contextmanager
def locked(folder: Path, patience: float = 2.0) -> Iterator[None]:
    """Hold a run's folder: no other process trains in it meanwhile.

    Args:
        folder: the run's.
        patience: seconds; on Windows whoever only asks whether the lock is held holds it for a moment.

    Raises:
        InUseError: another process holds it.
    """
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + patience
        while not try_lock(file):
            if time.monotonic() > deadline:
                raise InUseError(f"Another process is training in {folder}; wait for it or stop it first.")
            time.sleep(0.05)
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Return whether a process holds a run's folder; asking disturbs nobody."""
    path = folder / LOCK
    with contextlib.suppress(OSError):
        if path.is_file():
            with open(path, "r+", encoding="utf-8") as file:
                return not try_lock(file, shared=True)
    return False


def holder(folder: Path) -> dict[str, Any]:
    """Return who holds a run's folder, or held it last: "pid" and "host"; empty where nobody did."""
    return read_json(folder / LOCK)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if it cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
