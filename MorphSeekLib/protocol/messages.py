"""What engine and module send each other: JSON-RPC 2.0, see :mod:`MorphSeekLib.app.worker`.

Arrays travel as .npy files with axes (i, j, k); what is sent is where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from .report import Report, StepSection, TrustSection

Params = Mapping[str, object]
"""The parameters of a request, which the worker checks one by one."""
Answer = Mapping[str, Any]
"""What a request is answered with; see :class:`RegisterAnswer` and the methods of the worker."""


class _Array(TypedDict):
    path: str
    affine: list[list[float]]


class ArrayReference(_Array, total=False):
    """An array: ``path`` of its .npy file, ``affine`` (4x4, voxel to LPS mm), its grid's ``shape``, and the ``file``
    that the client read it from."""

    shape: list[int]
    file: str


class StartReference(TypedDict, total=False):
    """The alignment that a registration began with, fixed to moving: a 4x4 ``matrix`` or a ``displacement``."""

    matrix: list[list[float]]
    displacement: ArrayReference


class StateReference(TypedDict):
    """What a later request needs to take further steps; ``total`` is the path of the displacements so far."""

    start: StartReference
    align: str
    total: str
    figures: list[StepSection]


class EstimateAnswer(TypedDict):
    """What "estimate" is answered with; ``trust`` is None where no millimeters are known."""

    trust: ArrayReference | None
    trust_colors: ArrayReference
    section: TrustSection
    seconds: float


class RegisterAnswer(TypedDict):
    """What "register" is answered with; None for what was not asked for."""

    warped: ArrayReference
    aligned: ArrayReference
    jacobian: ArrayReference
    folding: ArrayReference
    warped_labels: ArrayReference | None
    trust: ArrayReference | None
    trust_colors: ArrayReference | None
    displacement: ArrayReference
    inverse: ArrayReference | None
    state: StateReference
    report: Report


class Progress(TypedDict, total=False):
    """A :class:`MorphSeekLib.protocol.job.Event` of the request ``id``; in the phase "picture" a step's ``warped``."""

    id: int
    phase: str
    fraction: float
    message: str
    step: int
    steps: int
    metrics: dict[str, float]
    warped: ArrayReference


class ErrorMessage(TypedDict, total=False):
    """Why a request failed: ``data`` is the traceback of what was not expected."""

    code: int
    message: str
    data: str
