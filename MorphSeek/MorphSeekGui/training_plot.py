"""The widgets of the section Fine-tune that show a curve of a training in Slicer's plot view."""

from __future__ import annotations

from collections.abc import Callable

import slicer

from .training_curves import CHARTS, TrainingCurves, fit, has_curve, shows_all
from .widgets import SWITCH_STYLE


class CurveView:
    """The box that chooses a curve, and the button that shows it, live, in a layout with a plot view.

    Args:
        box: lists the charts, in the order of :data:`CHARTS`.
        button: shows the chosen one; released, the charts are removed and the layout is restored.
        figures: returns a title and the figures to draw, a row per iteration.
    """

    def __init__(self, box, button, figures: Callable[[], tuple[str, list[dict[str, float]]]]) -> None:
        self._box, self._button, self._figures = box, button, figures
        self._curves: TrainingCurves | None = None
        self._layout_before = 0
        button.enabled = False
        button.styleSheet = SWITCH_STYLE
        box.connect("currentIndexChanged(int)", self._choose)
        button.connect("toggled(bool)", self._plot)

    def use_scene(self, scene) -> None:
        """Put the charts into this scene from now on; None at the application's end."""
        self._curves = TrainingCurves(scene) if scene is not None else None

    def remove(self) -> None:
        """Take all charts out of the scene."""
        if self._curves is not None:
            self._curves.remove()

    def chart(self, name: str | None = None):
        """Return the chart node of a name, of the chosen one by default; None while there is nothing to draw in it."""
        return self._curves.chart(name or self._name())

    def refresh(self) -> None:
        """Enable the button where there is a curve; where it is shown, draw the latest figures."""
        self._button.enabled = self._button.checked or has_curve(self._name(), self._figures()[1])
        if self._button.checked:
            self._update()

    def _name(self) -> str:
        return list(CHARTS)[self._box.currentIndex]

    def _update(self) -> None:
        """Draw the latest figures; the axes follow, unless the user has zoomed in on a part."""
        title, rows = self._figures()
        before = self.chart()
        follow = before is None or shows_all(before)
        if rows:
            self._curves.update(title, rows)
        else:
            self._curves.clear()
        if before is None:
            self._show()  # its first figures have just come
        elif follow and self.chart() is not None:
            fit(self.chart())

    def _plot(self, on: bool) -> None:
        if on:
            self._layout_before = slicer.app.layoutManager().layout
            self._choose()
        else:
            self._curves.remove()
            slicer.app.layoutManager().setLayout(self._layout_before)
            self.refresh()

    def _choose(self, *_args) -> None:
        self.refresh()
        self._show()

    def _show(self) -> None:
        chart = self.chart()
        if self._button.checked and chart is not None:
            slicer.modules.plots.logic().ShowChartInLayout(chart)
            fit(chart)
