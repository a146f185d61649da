"""The part *Estimated error* of the section Inspect: what is estimated, and where it is worst."""

from __future__ import annotations

from collections.abc import Callable

from MorphSeekLib.protocol.verdict import shown

from . import quality
from .scene import RegistrationNodes, _
from .widgets import PlacesTable


class EstimatedErrorSection:
    """Shows the estimated error of the registration that is looked at.

    Args:
        ui: the widgets of the section Inspect.
        go_to: called with a place (RAS mm) that was clicked.
    """

    def __init__(self, ui, go_to: Callable[[tuple[float, float, float]], None]) -> None:
        self.ui = ui
        self._nodes: RegistrationNodes | None = None
        self._table = PlacesTable(ui.trustTable, 3, go_to)

    def show(self, nodes: RegistrationNodes | None) -> None:
        """Show the estimated error of this registration; None for none."""
        self._nodes = nodes
        report = nodes.report if nodes is not None else {}
        regions, words = quality.estimated_regions(report), quality.estimated_error(report)
        self.ui.trustButton.enabled = nodes is not None and nodes.trust_colors is not None
        if regions:
            words.insert(-1, _("The largest regions in which most error is expected; click one to go there."))
        if nodes is not None and not words:
            words = [_("The error of this result was not estimated.")]
        self.ui.trustLabel.text = "\n".join(words)
        rows = []
        for row, region in enumerate(regions):
            known = region.bound_mm is not None
            text = _("below {mm:.1f} mm").format(mm=region.bound_mm) if known else self.legend_of(region.color)
            rows.append((region.position, [str(row + 1), text, shown("largest_region_mm3", region.mm3)]))
        self._table.fill(rows)

    def legend_of(self, color: int) -> str:
        """Return what a color says, 1 to 3."""
        return quality.estimated_legend(self._nodes.report if self._nodes is not None else {})[color - 1]

    def legend(self) -> str:
        """Return what the bar of colors says."""
        return _("Blue: {near}. Yellow: {between}. Red: {far}. An estimate, not a measurement.").format(
            near=self.legend_of(1), between=self.legend_of(2), far=self.legend_of(3)
        )
