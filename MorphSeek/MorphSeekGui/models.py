"""The models a person can choose from, read without the engine: bundled ones, those of a folder, any file.

A checkpoint is a .safetensors file whose header, plain JSON, holds the card; so the list and the cards are there before
PyTorch is.
"""

from __future__ import annotations

import html
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from . import engine_root
from .scene import InputError, _

DEFAULT = "brain-mr"
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Model:
    """One entry of the list.

    Attributes:
        name: what the engine takes: a bundled name, or a path.
        path: its file.
        card: what it says of itself; empty when it cannot be read, then ``problem`` says why.
    """

    name: str
    path: Path
    card: dict = field(default_factory=dict)
    problem: str = ""

    @property
    def title(self) -> str:
        """One line for the list."""
        return self.card.get("title") or self.path.stem


def available(folder: str | Path | None = None, more: Iterable[str] = ()) -> list[Model]:
    """Bundled models, then those of a person's folder, then files that are in neither.

    Args:
        folder: a folder of .safetensors files; None or a folder that is not there: none.
        more: names or paths that must be in the list if they exist.
    """
    root = engine_root()
    files = sorted((root / "Resources" / "Models").glob("*.safetensors")) if root is not None else []
    models = [_model(path.stem, path) for path in files]
    if folder and Path(folder).is_dir():
        models += [_model(str(path), path) for path in sorted(Path(folder).glob("*.safetensors"))]
    for name in more:
        if name not in {m.name for m in models} and Path(name).is_file():
            models.append(_model(name, Path(name)))
    return models


def read_card(path: str | Path) -> dict:
    """The card of a checkpoint.

    Raises:
        InputError: no such file, or not a MorphSeek checkpoint.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            header = json.loads(file.read(length)) if 0 < length <= _LONGEST_HEADER else {}
        return json.loads(header["__metadata__"]["morphseek"])
    except OSError as problem:
        raise InputError(
            _("The model {path} cannot be read ({reason}); check the path.").format(
                path=path, reason=problem.strerror or problem
            )
        ) from problem
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise InputError(
            _("{name} is no MorphSeek checkpoint (.safetensors with a card); choose another file.").format(
                name=path.name
            )
        ) from problem


def describe(model: Model) -> str:
    """The card as a few lines of HTML: what it was trained on, its grid, figures, licence."""
    if model.problem:
        return f"<p>{html.escape(model.problem)}</p>"
    card = model.card
    lines = [(_("Model"), model.title), (_("Trained on"), _trained_on(card)), (_("Works on"), _grid(card))]
    lines += [(_("Measured"), text) for text in _figures(card)]
    lines += [(_("Licence"), card.get("licence") or _("not stated"))]
    lines += [(_("File"), str(model.path))] if model.name == str(model.path) else []
    rows = (
        # no color of its own: the label's, which follows the style and pales with the panel while something runs
        f"<tr><td style='padding-right:8px'>{html.escape(name)}:</td><td>{html.escape(text)}</td></tr>"
        for name, text in lines
        if text
    )
    return f"<table>{''.join(rows)}</table>"


def _model(name: str, path: Path) -> Model:
    try:
        return Model(name, path, read_card(path))
    except InputError as problem:
        return Model(name, path, problem=str(problem))


def _trained_on(card: dict) -> str:
    provenance = card.get("provenance") or {}
    data = provenance.get("data")
    name = data.get("name", "") if isinstance(data, dict) else str(data or "")
    parts = [name, _("{n} cases").format(n=provenance["cases"]) if "cases" in provenance else ""]
    parts += [_("images synthesised from labels") if provenance.get("synthetic") else "", provenance.get("stage", "")]
    return ", ".join(filter(None, map(str, parts))) or _("not stated")


def _grid(card: dict) -> str:
    preprocessing = card.get("preprocessing") or {}
    spacing = preprocessing.get("spacing")
    grid = " x ".join(f"{s:g}" for s in spacing) + " mm" if spacing else _("the fixed volume's own grid")
    return _("{grid}, {steps} steps, after {align} alignment").format(
        grid=grid, steps=preprocessing.get("steps", "?"), align=preprocessing.get("align", "?")
    )


def _figures(card: dict) -> list[str]:
    """Mean Dice before and after and folding of each data set that the card holds figures of."""
    found = []
    for name, value in (card.get("results") or {}).items():
        mean = value.get("mean") if isinstance(value, dict) else None
        if not isinstance(mean, dict) or "dice" not in mean:
            continue
        before = mean.get("dice_aligned", mean.get("dice_before"))
        text = (
            f"{name}: Dice {before:.3f} \N{RIGHTWARDS ARROW} {mean['dice']:.3f}"
            if before is not None
            else (f"{name}: Dice {mean['dice']:.3f}")
        )
        if "folded_percent" in mean:
            text += _(", folded cells {share:.3g} %").format(share=mean["folded_percent"])
        if "njd_percent" in mean:
            text += _(", NJD {njd:.3g} % by central differences").format(njd=mean["njd_percent"])
        if "pairs" in value:
            text += _(" ({n} pairs)").format(n=value["pairs"])
        found.append(text)
    return found or [_("no figures in the card")]
