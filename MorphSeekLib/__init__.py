"""MorphSeek's engine: learned deformable registration. Runs without Slicer; README.md says how.

The names in ``__all__`` are the public ones; each is imported when it is first used, so that importing the package, or
its protocol alone, loads neither torch nor numpy.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

from .protocol.version import __version__

if TYPE_CHECKING:
    from .app.batch import BatchOptions, batch
    from .app.train import train
    from .data.datasets import load_dataset
    from .evaluation.evaluate import evaluate
    from .io.apply import apply_transforms, map_points
    from .io.images import read_image, read_labels, write_image
    from .io.points import PointPairs, Points, pair_points, read_points, write_points
    from .io.transforms import read_transform, write_transform
    from .measures.folds import certify, unfold
    from .networks.devices import use_threads
    from .networks.loading import LoadedModel, load_model
    from .protocol.batch import BatchSettings
    from .protocol.errors import Cancelled, MorphSeekError
    from .protocol.job import Event, Job
    from .protocol.options import RegistrationOptions, TrainingOptions
    from .registration.correction import Correction
    from .registration.landmarks import measure_landmarks
    from .registration.masks import masked
    from .registration.pipeline import register
    from .registration.result import Registration
    from .report.results import write_results
    from .space.geometry import DenseTransform, Grid, Volume
    from .training.finetuning import FinetuneConfig, finetune
    from .training.sac import SACConfig, train_spac
    from .training.warmup import TrainingConfig, warmup

__all__ = [
    "BatchOptions",
    "BatchSettings",
    "Cancelled",
    "Correction",
    "DenseTransform",
    "Event",
    "FinetuneConfig",
    "Grid",
    "Job",
    "LoadedModel",
    "MorphSeekError",
    "PointPairs",
    "Points",
    "Registration",
    "RegistrationOptions",
    "SACConfig",
    "TrainingConfig",
    "TrainingOptions",
    "Volume",
    "__version__",
    "apply_transforms",
    "batch",
    "certify",
    "evaluate",
    "finetune",
    "load_dataset",
    "load_model",
    "map_points",
    "masked",
    "measure_landmarks",
    "pair_points",
    "read_image",
    "read_labels",
    "read_points",
    "read_transform",
    "register",
    "train",
    "train_spac",
    "unfold",
    "use_threads",
    "warmup",
    "write_image",
    "write_points",
    "write_results",
    "write_transform",
]

_MODULES = {
    "app.batch": ("BatchOptions", "batch"),
    "app.train": ("train",),
    "data.datasets": ("load_dataset",),
    "evaluation.evaluate": ("evaluate",),
    "io.apply": ("apply_transforms", "map_points"),
    "io.images": ("read_image", "read_labels", "write_image"),
    "io.points": ("PointPairs", "Points", "pair_points", "read_points", "write_points"),
    "io.transforms": ("read_transform", "write_transform"),
    "measures.folds": ("certify", "unfold"),
    "networks.devices": ("use_threads",),
    "networks.loading": ("LoadedModel", "load_model"),
    "protocol.batch": ("BatchSettings",),
    "protocol.errors": ("Cancelled", "MorphSeekError"),
    "protocol.job": ("Event", "Job"),
    "protocol.options": ("RegistrationOptions", "TrainingOptions"),
    "registration.correction": ("Correction",),
    "registration.landmarks": ("measure_landmarks",),
    "registration.masks": ("masked",),
    "registration.pipeline": ("register",),
    "registration.result": ("Registration",),
    "report.results": ("write_results",),
    "space.geometry": ("DenseTransform", "Grid", "Volume"),
    "training.finetuning": ("FinetuneConfig", "finetune"),
    "training.sac": ("SACConfig", "train_spac"),
    "training.warmup": ("TrainingConfig", "warmup"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
# what README's examples imported before the engine had rooms; kept for one release
_MOVED = {"images": ("read_image",), "registration": ("load_model", "register"), "devices": ("use_threads",)}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'MorphSeekLib' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})


def moved(module: str, name: str) -> Any:
    """Return what a module of before held under a name of README's examples, with a warning.

    Raises:
        AttributeError: it is none of these names.
    """
    if name not in _MOVED[module]:
        raise AttributeError(f"module 'MorphSeekLib.{module}' has no attribute '{name}'")
    words = f"MorphSeekLib.{module}.{name} is now MorphSeekLib.{name}; the old name goes with the next release."
    warnings.warn(words, DeprecationWarning, stacklevel=3)
    return __getattr__(name)


def _add_old_module(name: str) -> None:
    module = types.ModuleType(f"{__name__}.{name}")
    module.__getattr__ = lambda attribute: moved(name, attribute)  # type: ignore[method-assign]
    sys.modules[module.__name__] = module


for _name in ("images", "devices"):  # registration is a room now, and asks moved() itself
    _add_old_module(_name)
