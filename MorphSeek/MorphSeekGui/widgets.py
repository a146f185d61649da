"""What the panels do with Slicer's widgets so that they look and behave right in its module panel."""

from __future__ import annotations

from collections.abc import Callable

import qt

from .scene import _

# a switch that is on must be told from its neighbors at a glance, in light and dark styles
SWITCH_STYLE = (
    "QPushButton:checked { background-color: palette(highlight); color: palette(highlighted-text); "
    "border: 1px solid palette(shadow); border-radius: 3px; padding: 3px }"
)
_FIT_MS = 200
# color of a text: on a light background, on a dark one
_INKS = {"bad": ("#be1414", "#ff8a80"), "warning": ("#a05f00", "#f5b83d"), "good": ("#0a7d32", "#6fdc8c")}


def ink(widget, name: str) -> str:
    """Return the color of a "bad", "warning" or "good" text that can be read in a widget's style, light or dark."""
    dark = widget.palette.color(qt.QPalette.Window).lightness() < 128
    return _INKS[name][dark]


class WrappedLabels:
    """Give each wrapped label of a widget the height of its text as its minimum, while the module is open.

    Slicer's module panel does not ask a module for its height again at a width for which it has asked before, once
    another module was visited (qSlicerModulePanel keeps the layout item of a module that leaves; the next item is not
    told about changes). Minimum heights reach the panel nevertheless. Without them a text that grows squashes the form.
    """

    def __init__(self, widget) -> None:
        self._labels = [label for label in widget.findChildren(qt.QLabel) if label.wordWrap]
        self._timer = qt.QTimer()
        self._timer.setInterval(_FIT_MS)
        self._timer.connect("timeout()", self.fit)

    def start(self) -> None:
        """Follow the texts from now on."""
        self.fit()
        self._timer.start()

    def stop(self) -> None:
        """Leave the labels as they are."""
        self._timer.stop()

    def fit(self) -> None:
        """Set the minimum heights for the widths that the labels have now."""
        for label in self._labels:
            if label.visible:
                height = max(0, label.heightForWidth(label.width))  # -1 without a text
                if label.minimumHeight != height:
                    label.setMinimumHeight(height)


class FolderButton:
    """A ctkDirectoryButton that shows no folder until one is chosen; by itself it shows the working directory.

    Args:
        button: the ctkDirectoryButton.
        folder: the folder to begin with; empty for none.
        on_choice: called with each other folder that is chosen.

    Attributes:
        folder: the chosen folder; empty until one is chosen. The button's own ``directory`` is "." then.
    """

    def __init__(self, button, folder: str = "", on_choice: Callable[[str], None] | None = None) -> None:
        self.folder = ""
        self._button, self._help, self._on_choice = button, button.toolTip, None
        button.text = _("Choose a folder...")
        # not directoryChanged: choosing the working directory is no change for the button
        button.connect("directorySelected(QString)", self._choose)
        if folder:
            button.directory = folder
        self._on_choice = on_choice

    def _choose(self, folder: str) -> None:
        if folder == self.folder:
            return
        self.folder = folder
        self._button.text = folder
        self._button.toolTip = f"{folder}\n\n{self._help}"  # the button shortens a long path
        if self._on_choice is not None:
            self._on_choice(folder)


class PlacesTable:
    """A table of places in the volumes; a click on a row, or the keyboard's arrows, go to its place.

    Args:
        table: with a column for each text of a place.
        wide: the column that takes the room that is left.
        go_to: called with the place of a row, RAS mm.
    """

    def __init__(self, table, wide: int, go_to: Callable[[tuple[float, float, float]], None]) -> None:
        self._table, self._go_to_place = table, go_to
        self._places: list[tuple[float, float, float]] = []
        spread(table, wide)
        # a click comes back to the row that is current
        table.connect("currentCellChanged(int,int,int,int)", lambda row: self._go_to(row))
        table.connect("cellClicked(int,int)", lambda row: self._go_to(row))

    def fill(self, rows: list[tuple[tuple[float, float, float], list[str]]]) -> None:
        """List places, each with the texts of its columns but for the last one, which is the place."""
        table, self._places = self._table, [place for place, _texts in rows]
        blocked = table.blockSignals(True)
        table.setRowCount(len(rows))
        for row, (place, texts) in enumerate(rows):
            for column, text in enumerate([*texts, ", ".join(f"{mm:.1f}" for mm in place)]):
                table_cell(table, row, column, text, right=True)
        table.setCurrentCell(-1, -1)
        table.blockSignals(blocked)
        fit_height(table)
        table.visible = bool(rows)

    def _go_to(self, row: int) -> None:
        if 0 <= row < len(self._places):
            self._go_to_place(self._places[row])


def spread(table, wide: int) -> None:
    """Let one column of a table take the room that is left."""
    header = table.horizontalHeader()
    header.setHighlightSections(False)
    for column in range(table.columnCount):
        mode = qt.QHeaderView.Stretch if column == wide else qt.QHeaderView.ResizeToContents
        header.setSectionResizeMode(column, mode)


def table_cell(table, row: int, column: int, text: str, right: bool = False, editable: bool = False, tip: str = ""):
    """Set a table's cell; return its item."""
    item = qt.QTableWidgetItem(text)
    flags = qt.Qt.ItemIsEnabled | qt.Qt.ItemIsSelectable
    item.setFlags(flags | qt.Qt.ItemIsEditable if editable else flags)
    if right:
        item.setTextAlignment(qt.Qt.AlignRight | qt.Qt.AlignVCenter)
    item.setToolTip(tip)
    table.setItem(row, column, item)
    return item


def fit_height(table, most: int = 300) -> None:
    """Make a table as high as its rows, up to ``most`` pixels: a panel scrolls, so its tables should not."""
    needed = table.horizontalHeader().sizeHint.height() + table.verticalHeader().length() + 2 * table.frameWidth
    table.setFixedHeight(min(most, needed + 2))
