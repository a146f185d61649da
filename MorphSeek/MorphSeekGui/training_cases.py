"""Labelled volumes of the scene as cases to train on: files that outlive the scene, with a dataset.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import slicer
import slicer.util

from . import scene
from .scene import FLIP, Image, InputError, _


def export_cases(
    cases: list[tuple], folder: Path, on_warning: Callable[[str], None] = lambda text: None
) -> Iterator[str]:
    """Write (volume node, labels node) pairs as cases of a data set; the names of the cases, one by one as they are
    written, so that whoever iterates can show progress and give up.

    Labels are numbered alike in all cases: label maps by their values, segmentations by their segments' names. Linear
    parent transforms count, as in a registration. ``on_warning`` is told in a sentence what labels could not take over,
    such as voxels where segments overlap.

    Raises:
        InputError: a node that cannot be used, label maps mixed with segmentations, or a folder that cannot be written.
    """
    kinds = {isinstance(labels, slicer.vtkMRMLSegmentationNode) for _volume, labels in cases}
    if len(kinds) == 2:
        raise InputError(
            _(
                "Some cases have a segmentation, others a label map, and nothing says which labels belong together; "
                "import the label maps into segmentations with the same segment names."
            )
        )
    numbers: dict[str, int] = {}
    rows = []
    for number, (volume, labels) in enumerate(cases, 1):
        image = scene.read_volume(volume)
        found = scene.read_labels(labels, volume, numbers)
        if found.warning:
            on_warning(found.warning)
        stem = f"{number:03d}-{_plain(volume.GetName())}"
        row = {"image": f"images/{stem}.nrrd", "label": f"labels/{stem}.nrrd"}
        _write(image, folder / row["image"])
        _write(Image(found.array, image.affine), folder / row["label"])
        rows.append(row)
        yield volume.GetName()
    values = {"name": _("Cases from Slicer's scene"), "training": rows}
    values["labels"] = {"0": "background"} | {str(number): name for name, number in numbers.items()}
    (folder / "dataset.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def matching_cases(nodes: list, labels: list) -> list[tuple]:
    """(volume, labels) whose names belong together: "a" with "a", "a segmentation", "a-label" and the like. A volume
    that two would fit gets none."""
    pairs = []
    for volume in nodes:
        wanted = _words(volume.GetName())
        found = [node for node in labels if _words(node.GetName()) == wanted]
        if len(found) == 1:
            pairs.append((volume, found[0]))
    return pairs


_IGNORED = {"label", "labels", "labelmap", "seg", "segmentation", "segmentations", "mask", "image", "volume"}


def _words(name: str) -> list[str]:
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return [word for word in words if word not in _IGNORED]


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:60]


def _write(image: Image, path: Path) -> None:
    """A NRRD file, written by MRML from a volume of a scene of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    private = slicer.vtkMRMLScene()
    node = private.AddNewNodeByClass("vtkMRMLScalarVolumeNode")
    slicer.util.updateVolumeFromArray(node, np.ascontiguousarray(image.array.transpose(2, 1, 0)))
    node.SetIJKToRASMatrix(scene.to_vtk(FLIP @ image.affine))
    storage = private.AddNewNodeByClass("vtkMRMLNRRDStorageNode")
    storage.SetFileName(str(path))
    storage.SetUseCompression(True)
    if not storage.WriteData(node):
        raise InputError(
            _("The case cannot be written to {path}; choose another folder or free some space.").format(path=path)
        )
