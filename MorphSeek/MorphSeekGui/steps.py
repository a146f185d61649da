"""The moving volume after each stage: shown as it comes, and a Sequence to scrub through afterwards."""

from __future__ import annotations

import slicer

from .scene import FLIP, Image, _, copy_window, free_names, to_vtk


class Steps:
    """A volume node that shows one stage at a time, and the sequence of all.

    Each step of the network counts as a stage. The index of the sequence is the row of the report's "steps"; not every
    row has a picture.

    Until :meth:`keep` is called everything can be taken back by :meth:`undo`: a cancelled registration leaves the scene
    as it was, a cancelled continuation leaves the stages before it.
    """

    def __init__(self, fixed, moving) -> None:
        self._scene, self._fixed, self._moving = fixed.GetScene(), fixed, moving
        self.volume = self.sequence = self.browser = None
        self._kept: list[str] = []

    def add(self, row: int, image: Image) -> None:
        """Show the image after a stage, in world coordinates on the fixed grid."""
        if self.volume is None:
            self._make()
        slicer.util.updateVolumeFromArray(self.volume, image.array.transpose(2, 1, 0))
        self.volume.SetIJKToRASMatrix(to_vtk(FLIP @ image.affine))
        self.sequence.SetDataNodeAtValue(self.volume, str(row))
        self.browser.SetSelectedItemNumber(self.count - 1)

    @property
    def count(self) -> int:
        """How many pictures there are, that of the alignment (row 0) included."""
        there = self.sequence is not None and self._scene.IsNodePresent(self.sequence)
        return self.sequence.GetNumberOfDataNodes() if there else 0

    @property
    def nodes(self) -> list:
        """The nodes in the scene that hold the pictures."""
        return [node for node in (self.volume, self.sequence, self.browser) if self.count and node is not None]

    @property
    def rows(self) -> list[int]:
        """The row of each picture, in the order of the sequence."""
        return [int(self.sequence.GetNthIndexValue(n)) for n in range(self.count)]

    def show(self, item: int) -> None:
        """Show the picture with this position in the sequence."""
        if 0 <= item < self.count:
            self.browser.SetSelectedItemNumber(item)

    def keep(self) -> None:
        """Keep what is there now."""
        self._kept = [self.sequence.GetNthIndexValue(n) for n in range(self.count)]

    def undo(self) -> None:
        """Take back what was added since the last :meth:`keep`; without one, all nodes go."""
        if not self.count:
            return
        for value in [self.sequence.GetNthIndexValue(n) for n in range(self.count)]:
            if value not in self._kept:
                self.sequence.RemoveDataNodeAtValue(value)
        if self._kept:
            self.show(self.count - 1)
        else:
            self.remove()

    def keep_first(self, rows: int) -> None:
        """Keep the pictures of the first rows of a report, and remove those of later ones."""
        self._kept = [value for value in map(str, self.rows) if int(value) < rows]
        self.undo()

    def remove(self) -> None:
        """Remove all nodes."""
        # the display node last: a volume that a slice view shows without one is given a new one at once
        display = self.volume.GetDisplayNode() if self.volume is not None else None
        for node in (self.browser, self.sequence, self.volume, display):
            if node is not None and self._scene.IsNodePresent(node):
                self._scene.RemoveNode(node)
        self.volume = self.sequence = self.browser = None
        self._kept = []

    def _make(self) -> None:
        name = self._moving.GetName()
        names = {
            "volume": _("{name} by step").format(name=name),
            "sequence": _("{name} steps").format(name=name),
            "browser": _("{name} step browser").format(name=name),
        }
        names = free_names(self._scene, names)
        add = self._scene.AddNewNodeByClass
        self.volume = add("vtkMRMLScalarVolumeNode", names["volume"])
        self.volume.CreateDefaultDisplayNodes()
        copy_window(self._moving, self.volume)
        self.sequence = add("vtkMRMLSequenceNode", names["sequence"])
        self.sequence.SetIndexName(_("stage"))
        self.sequence.SetIndexUnit("")
        self.sequence.SetIndexTypeFromString("numeric")
        self.browser = add("vtkMRMLSequenceBrowserNode", names["browser"])
        self.browser.SetAndObserveMasterSequenceNodeID(self.sequence.GetID())
        self.browser.AddProxyNode(self.volume, self.sequence, False)
        self.browser.SetOverwriteProxyName(self.sequence, False)
