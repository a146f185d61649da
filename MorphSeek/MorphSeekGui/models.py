"""What a user can choose to register by: the images, no model, bundled models, those of a folder, any file.

A model is a .safetensors file whose header, plain JSON, holds its card; so the list and the cards are there before
PyTorch is.
"""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from MorphSeekLib.protocol.card import CardValues
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.startup import AUTO, NO_MODEL, bundled, find, read_header

from .scene import _

DEFAULT = AUTO


@dataclass(frozen=True)
class Choice:
    """An entry of the list that is not a file.

    Attributes:
        name: what the engine takes: "auto" or "none".
        title: one line for the list.
        explanation: what it does.
        card, problem: those of a :class:`Model`; always empty.
    """

    name: str
    title: str
    explanation: str
    card: dict = field(default_factory=dict, init=False)
    problem: str = field(default="", init=False)


@dataclass(frozen=True)
class Model:
    """An entry of the list that is a file.

    Attributes:
        name: what the engine takes: a bundled name, or a path.
        path: its file.
        card: what its file says; empty when it cannot be read, and then ``problem`` says why.
    """

    name: str
    path: Path
    card: CardValues = field(default_factory=CardValues)
    problem: str = ""

    @property
    def title(self) -> str:
        """One line for the list."""
        return self.card.get("title") or self.path.stem


def without_file() -> list[Choice]:
    """Return the entries that are not files."""
    return [
        Choice(
            AUTO,
            _("Automatic (by the images)"),
            _(
                "Takes the bundled model that was trained on objects of the size of these and was better on labeled "
                "pairs than fitting alone; without one, registers with no model. A run says first which and why."
            ),
        ),
        Choice(
            NO_MODEL,
            _("No model (any anatomy)"),
            _(
                "Uses no network: aligns the two images, searches for large motion where there is some, and fits the "
                "pair. Nothing was trained, so any anatomy and any size will do."
            ),
        ),
    ]


def available(folder: str | Path | None = None, more: Iterable[str] = ()) -> list[Model]:
    """Return the bundled models, then those of the user's folder, then files that are in neither.

    Args:
        folder: a folder of .safetensors files; None or a folder that does not exist: none.
        more: names or paths that must be in the list if they exist, also paths to where bundled models were before.
    """
    models = [_model(name, path) for name, path in bundled().items()]
    if folder and Path(folder).is_dir():
        models += [_model(str(path), path) for path in sorted(Path(folder).glob("*.safetensors"))]
    for name in more:
        if name not in {m.name for m in models}:
            with contextlib.suppress(MorphSeekError):
                models.append(_model(name, find(name)))
    return models


def describe(model: Model | Choice) -> str:
    """Return the card as a few lines of HTML: what it was trained on, its grid, figures, license."""
    if isinstance(model, Choice):
        return html.escape(model.explanation)
    if model.problem:
        return f"<p>{html.escape(model.problem)}</p>"
    card = model.card
    lines = [(_("Model"), model.title), (_("Trained on"), _trained_on(card)), (_("Works on"), _grid(card))]
    lines += [(_("Measured"), text) for text in _figures(card)]
    lines += [(_("License"), card.get("license") or _("not stated"))]
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
        return Model(name, path, read_header(path))
    except MorphSeekError as problem:
        return Model(name, path, problem=str(problem))


def _trained_on(card: CardValues) -> str:
    provenance = card.get("provenance") or {}
    data = provenance.get("data")
    name = data.get("name", "") if isinstance(data, dict) else str(data or "")
    parts = [name, _("{n} cases").format(n=provenance["cases"]) if "cases" in provenance else ""]
    parts += [_("images synthesized from labels") if provenance.get("synthetic") else "", provenance.get("stage", "")]
    return ", ".join(filter(None, map(str, parts))) or _("not stated")


def _grid(card: CardValues) -> str:
    preprocessing = card.get("preprocessing") or {}
    spacing = preprocessing.get("spacing")
    grid = " x ".join(f"{s:g}" for s in spacing) + " mm" if spacing else _("the fixed volume's own grid")
    return _("{grid}, {steps} steps, after {align} alignment").format(
        grid=grid, steps=preprocessing.get("steps", "?"), align=preprocessing.get("align", "?")
    )


def _figures(card: CardValues) -> list[str]:
    """Return mean Dice before and after, and folding, for each data set that the card holds figures of."""
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
