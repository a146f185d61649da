"""The part *Compare* of the section Inspect: two results of one pair, figure by figure."""

from __future__ import annotations

from collections.abc import Callable

import qt

from . import quality, scene
from .panel import Panel
from .scene import RegistrationNodes, _
from .stages import stage_names
from .widgets import fit_height, spread, table_cell


class CompareSection:
    """Chooses another result of the pair that is looked at, and shows the figures of both in one table.

    Args:
        panel: the section Inspect.
        changed: called when another result was chosen, or none.

    Attributes:
        other: the result to compare with; None without one.
    """

    def __init__(self, panel: Panel, changed: Callable[[], None]) -> None:
        self.ui, self._changed = panel.ui, changed
        self._nodes: RegistrationNodes | None = None
        self.other: RegistrationNodes | None = None
        spread(self.ui.compareTable, 0)
        self.ui.otherResultSelector.addAttribute("vtkMRMLTransformNode", scene.REPORT)
        self.ui.otherResultSelector.connect("currentNodeChanged(vtkMRMLNode*)", lambda _node: self._choose())
        self._choose()

    def show(self, nodes: RegistrationNodes | None) -> None:
        """Compare this result with the one that is chosen."""
        self._nodes = nodes
        self._choose()

    def uses(self, node) -> bool:
        """Return whether a node is part of the other result."""
        return self.other is not None and any(node is part for part in vars(self.other).values())

    def forget(self) -> None:
        """Compare with nothing."""
        self.ui.otherResultSelector.setCurrentNode(None)
        self._choose()

    def _choose(self) -> None:
        transform = self.ui.otherResultSelector.currentNode()
        other, problem = scene.result_nodes(transform), ""
        if self._nodes is None or transform is None:
            other = None
        elif other is None:
            problem = _("Not everything of this registration is left in the scene; choose another one.")
        elif transform is self._nodes.transform:
            other, problem = None, _("This is the result above; choose another one of the same two volumes.")
        elif (other.fixed, other.moving) != (self._nodes.fixed, self._nodes.moving):
            other, problem = None, _("This is a result of other volumes; choose one of the same two.")
        self.other = other
        self.ui.compareLabel.text = problem
        self.ui.compareLabel.visible = bool(problem)
        self.ui.compareTable.visible = self.ui.compareButton.visible = other is not None
        self._fill()
        self._changed()

    def _fill(self) -> None:
        table = self.ui.compareTable
        rows = [] if self.other is None or self._nodes is None else figures(self._nodes.report, self.other.report)
        table.setRowCount(len(rows))
        for row, (label, texts, better) in enumerate(rows):
            table_cell(table, row, 0, label)
            for column, text in enumerate(texts):
                item = table_cell(table, row, column + 1, text, right=True, tip=text)
                if better == column:
                    bold = qt.QFont()
                    bold.setBold(True)
                    item.setFont(bold)
        fit_height(table, 700)


def figures(first: dict, second: dict) -> list[tuple[str, tuple[str, str], int | None]]:
    """Return the rows of the table: a label, the texts of both results, and which of them is better (None: neither)."""
    both = first, second
    rows = [
        (_("Model"), _model),
        (_("Alignment"), lambda report: report.get("align")),
        (_("Stages"), _stages),
        (_("Preset"), lambda report: report.get("preset")),
        (_("Voxels that masks leave, fixed / moving"), _masks),
    ]
    similarity = "below" if _masks(first) == _masks(second) else ""  # of other voxels it says nothing
    found = [(label, (_text(value(first)), _text(value(second))), None) for label, value in rows]
    numbers = [
        (_("Similarity (1 is best)"), "{:.3f}", similarity, ("similarity", "warped")),
        (_("Landmark error, mm"), "{:.2f}", "above", ("landmarks", "mean", "warped")),
    ]
    for label, form, worse, path in numbers:
        values = tuple(_at(report, path) for report in both)
        texts = tuple("–" if value is None else form.format(value) for value in values)
        found.append((label, (texts[0], texts[1]), _better(values, worse)))
    for one, other in zip(quality.measure(first), quality.measure(second), strict=True):
        found.append((one.label, (one.text, other.text), _better((one.value, other.value), one.worse)))
    seconds = [_at(report, ("seconds", "total")) for report in both]
    texts = ["–" if value is None else f"{value:.1f}" for value in seconds]
    return [*found, (_("Seconds"), (texts[0], texts[1]), None)]


def _better(values: tuple, worse: str) -> int | None:
    if None in values or values[0] == values[1] or not worse:
        return None
    return int((values[0] > values[1]) == (worse == "above"))


def _model(report: dict) -> str:
    model = report.get("model")
    return _("none") if model is None else model.get("title") or model.get("name") or "?"


def _stages(report: dict) -> str | None:
    rows = report.get("steps") or []
    named = all("stage" in row for row in rows)  # those of earlier versions have no names
    return (", ".join(stage_names(rows)) if named else None) or None


def _masks(report: dict) -> str | None:
    counts = quality.of_both(report, "masks")
    return " / ".join(_("all") if n is None else f"{n:,}" for n in counts) if counts != [None, None] else None


def _text(value: str | None) -> str:
    return "–" if value is None else value


def _at(report: dict, path: tuple[str, ...]) -> float | None:
    for key in path:
        report = (report or {}).get(key)
    return report
