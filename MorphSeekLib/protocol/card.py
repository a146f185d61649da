"""The card of a model file as JSON has it: what engine and module read of it.

Keys that a kind of training does not write are absent, and cards may hold more keys than these.
"""

from __future__ import annotations

from typing import Any, TypedDict


class Provenance(TypedDict, total=False):
    """Where weights come from.

    A training writes what it was (``stage``), on which ``data`` (name, license, file) and how many ``cases``, how many
    more without labels (``unlabeled``), whether images were ``synthetic``, what it began with (``init``, with the
    ``sha256`` of that file), its ``settings``, the ``best_iteration``, the ``seconds`` it took, and ``averaged``, what
    an iteration kept of the averaged weights; an import writes ``architecture``, ``source``, ``file`` and ``sha256``.
    """

    stage: str
    data: dict[str, str]
    cases: int
    unlabeled: int
    synthetic: bool
    init: Provenance | None
    settings: dict[str, object]
    best_iteration: int | None
    seconds: int
    averaged: float
    date: str
    software: dict[str, str]
    architecture: str
    source: str
    file: str
    sha256: str


class ParameterCounts(TypedDict, total=False):
    """Parameters of the backbone, of the policy head, the head's as percent of the backbone's, and those of the finder
    where there is one."""

    backbone: int
    policy_head: int
    policy_head_percent: float
    finder: int


class CardValues(TypedDict, total=False):
    """A whole card; :class:`MorphSeekLib.networks.model_file.Card` is what the engine makes of it.

    ``model`` and ``preprocessing`` are settings, ``results`` figures by the name of what was measured, ``labels``
    the channel of each label value.
    """

    title: str
    model: dict[str, Any]
    parameters: ParameterCounts
    preprocessing: dict[str, Any]
    provenance: Provenance
    results: dict[str, Any]
    license: str
    labels: dict[str, int]
