"""Labeled volumes of the scene as cases to train on: files that outlive the scene, with a dataset.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import slicer

from . import scene
from .nrrd import write_nrrd
from .scene import Image, InputError, _


@dataclass(frozen=True)
class Copied:
    """How far the cases are written.

    Attributes:
        name: of the case under way.
        share: of all cases, 0 to 1.
    """

    name: str
    share: float


def export_cases(
    cases: list[tuple], folder: Path, on_warning: Callable[[str], None] = lambda text: None
) -> Iterator[Copied]:
    """Write (volume node, labels node) pairs as cases of a data set, piece by piece.

    Whoever iterates can show progress and let the application live meanwhile, and cancels by iterating no further.
    A volume is copied when its turn comes, so that what the user does to it afterwards changes nothing.

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
    for number, (volume, labels) in enumerate(cases):
        name = _name_of(volume, labels)
        image = scene.read_volume(volume)
        image = Image(image.array.copy(order="K"), image.affine)
        yield Copied(name, number / len(cases))
        found = scene.read_labels(labels, volume, numbers)
        if found.warning:
            on_warning(found.warning)
        stem = f"{number + 1:03d}-{_plain(name)}"
        row = {"image": f"images/{stem}.nrrd", "label": f"labels/{stem}.nrrd"}
        size, done = image.array.nbytes + found.array.nbytes, 0
        for what, written in ((image, row["image"]), (Image(found.array, image.affine), row["label"])):
            for count in _write(what, folder / written):
                done += count
                yield Copied(name, (number + done / size) / len(cases))
        rows.append(row)
    values = {"name": _("Cases from Slicer's scene"), "training": rows}
    values["labels"] = {"0": "background"} | {str(number): name for name, number in numbers.items()}
    (folder / "dataset.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def matching_cases(nodes: list, labels: list) -> list[tuple]:
    """Return (volume, labels) whose names belong together: "a" with "a", "a segmentation", "a-label" and the like. A
    volume that two would fit gets none."""
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


def _name_of(volume, labels) -> str:
    """Return a case's name.

    Raises:
        InputError: one of its nodes left the scene while the cases before it were written.
    """
    if not all(slicer.mrmlScene.IsNodePresent(node) for node in (volume, labels)):
        raise InputError(_("A case was removed from the scene; remove it from the list, too."))
    return volume.GetName()


def _write(image: Image, path: Path) -> Iterator[int]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield from write_nrrd(image, path)
    except OSError as problem:
        raise InputError(
            _("The case cannot be written to {path} ({reason}); choose another folder or free some space.").format(
                path=path, reason=problem.strerror or problem
            )
        ) from problem
