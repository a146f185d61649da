"""Pairs of the scene as files of a batch: images, label maps, masks, points and initial transforms that outlive it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import slicer

from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.settings import to_dict
from MorphSeekLib.protocol.settings_file import RegistrationSettings

from .batch_run import IMAGES
from .nrrd import write_nrrd
from .registration import Inputs, Request, read_inputs
from .scene import Image, InputError, Labels, _, ijk_to_ras

NAMES = "labels.json"  # in the folder of images: the names and colors of segments by their numbers
# columns of the table of a batch -> the names that a registration has for the same
_MASKS = {
    "fixed_mask": "fixed_mask",
    "moving_mask": "moving_mask",
    "ignore": "fixed_ignore",
    "ignore_moving": "moving_ignore",
}
_NOT_OF_A_PAIR = {"device", "threads", "show_steps", "state", "corrections", "into"}


@dataclass(frozen=True)
class ScenePair:
    """A pair of the scene.

    Attributes:
        fixed, moving: the volumes.
        request: the other nodes, and the choices.
        name: of its folder; "" for one made of the volumes' names.
    """

    fixed: slicer.vtkMRMLNode
    moving: slicer.vtkMRMLNode
    request: Request = field(default_factory=Request)
    name: str = ""

    def nodes(self) -> list:
        """Return every node that is read."""
        others = (value for value in vars(self.request).values() if isinstance(value, slicer.vtkMRMLNode))
        return [node for node in (self.fixed, self.moving, *others) if node is not None]


@dataclass(frozen=True)
class Source:
    """The node that a file was written from.

    Attributes:
        node: the volume.
        to_space: (4, 4) RAS, from the node's own coordinates to those of the file.
        labels: of the moving volume, as they were written.
        stamp: changes with the voxels and the place of the node.
    """

    node: slicer.vtkMRMLNode
    to_space: np.ndarray
    labels: Labels | None
    stamp: tuple[object, ...]

    @classmethod
    def of(cls, node, to_space: np.ndarray | None = None, labels: Labels | None = None) -> Source:
        """Return the source that a node is now; without ``to_space`` it is in coordinates of its own."""
        return cls(node, np.eye(4) if to_space is None else to_space, labels, _stamp(node))

    def is_unchanged(self) -> bool:
        """Return whether the node is in the scene and still holds what was written."""
        return bool(slicer.mrmlScene.IsNodePresent(self.node)) and self.stamp == _stamp(self.node)


def _stamp(node) -> tuple[object, ...]:
    parent, image = node.GetParentTransformNode(), node.GetImageData()
    place = None if parent is None else (parent.GetID(), parent.GetTransformToWorldMTime())
    return image is not None and image.GetMTime(), ijk_to_ras(node).tobytes(), place


@dataclass
class Exported:
    """Pairs that were written.

    Attributes:
        rows: of the batch's table.
        sources: of each row by its name, its fixed and its moving volume.
        places: of each row by its name, its place in the list of pairs.
        problems: of pairs that cannot be registered, by their place in the list; a sentence each.
    """

    rows: list[dict[str, str]] = field(default_factory=list)
    sources: dict[str, tuple[Source, Source]] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Copied:
    """How far the pairs are written: the ``name`` of the one under way, and the ``share`` of all, 0 to 1."""

    name: str
    share: float


class PairWriter:
    """Writes pairs of the scene into the folder of a batch, piece by piece.

    Args:
        folder: the batch's.
        shared: the settings of the batch; a pair with others has them in its row.
        on_warning: told in a sentence what labels could not take over.
    """

    def __init__(
        self,
        folder: Path,
        shared: RegistrationSettings,
        on_warning: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.exported = Exported()
        self._folder, self._shared, self._warn = folder / IMAGES, shared, on_warning
        self._numbers: dict[str, int] = {}  # segment's name -> label, alike in all pairs
        self._colors: dict[int, tuple[str, tuple[float, float, float]]] = {}
        self._written: dict[tuple[object, ...], str] = {}  # what -> its file

    def write(self, pairs: Sequence[ScenePair]) -> Iterator[Copied]:
        """Write them; whoever iterates can show progress, and cancels by iterating no further.

        A pair that cannot be used is a problem of :attr:`exported`.

        Raises:
            InputError: the folder cannot be written.
        """
        found, names = self.exported, _names(pairs)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for number, (pair, name) in enumerate(zip(pairs, names, strict=True)):
                yield Copied(name, number / len(pairs))
                try:
                    inputs = self._read(pair)
                except InputError as problem:
                    found.problems[number] = str(problem)
                    continue
                row = {"name": name, **self._overrides(pair.request)}
                for _bytes in self._write(pair, inputs, name, row):
                    yield Copied(name, number / len(pairs))
                found.rows.append(row)
                found.places[name] = number
                moving = Source.of(pair.moving, inputs.moving_to_space, inputs.labels[1])
                found.sources[name] = Source.of(pair.fixed), moving
            (self._folder / NAMES).write_text(json.dumps(self._colors), encoding="utf-8")
        except OSError as problem:
            raise InputError(
                _("The pair cannot be written to {path} ({reason}); choose another folder or free some space.").format(
                    path=self._folder, reason=problem.strerror or problem
                )
            ) from problem

    def _read(self, pair: ScenePair) -> Inputs:
        if not all(slicer.mrmlScene.IsNodePresent(node) for node in pair.nodes()):
            raise InputError(_("A volume of this pair was removed from the scene; load it again or remove the pair."))
        inputs = read_inputs(pair.fixed, pair.moving, pair.request, self._numbers)
        for labels in inputs.labels:
            if labels is not None:
                self._colors |= labels.names
                if labels.warning:
                    self._warn(labels.warning)
        return inputs

    def _overrides(self, request: Request) -> dict[str, str]:
        """Return what a pair chooses otherwise than the batch, as its table says it."""
        row = {} if request.model == self._shared.model else {"model": request.model}
        shared = to_dict(self._shared.options)
        for name, value in to_dict(request.options).items():
            if value != shared[name]:
                row[name] = "/".join(map(str, value)) if isinstance(value, list) else str(value).lower()
        return row

    def _write(self, pair: ScenePair, inputs: Inputs, name: str, row: dict[str, str]) -> Iterator[int]:
        """Write the files of a pair and name them in its row; yields now and then."""
        request = pair.request
        images = {"fixed": (pair.fixed, inputs.fixed), "moving": (pair.moving, inputs.moving)}
        for side, own in zip(("fixed", "moving"), inputs.labels, strict=True):
            if own is not None:
                node = getattr(request, f"{side}_labels_node")
                images[f"{side}_labels"] = (node, Image(own.array, images[side][1].affine))
        for column, mask in _MASKS.items():
            if mask in inputs.masks:
                images[column] = (getattr(request, f"{mask}_node"), inputs.masks[mask])
        for column, (node, image) in images.items():
            key = (column.partition("_")[2] or "image", node.GetID(), image.array.shape, image.affine.tobytes())
            if key not in self._written:
                path = self._folder / f"{len(self._written) + 1:03d}-{_plain(node.GetName())}.nrrd"
                yield from write_nrrd(Image(image.array.copy(order="K"), image.affine), path)
                self._written[key] = str(path)
            row[column] = self._written[key]
        for column, points in inputs.points.items():
            if points is not None:
                row[column] = str(self._folder / f"{name}-{column}.csv")
                Path(row[column]).write_text(_points_table(points), encoding="utf-8")
        if inputs.initial is not None:
            row["initial_transform"] = str(self._folder / f"{name}-initial")
            row["initial_transform"] += _write_transform(inputs.initial, row["initial_transform"])
        yield 0


def shared_settings(requests: Sequence[Request]) -> RegistrationSettings:
    """Return the settings of a batch of registrations: what all have in common, else the defaults."""
    all_alike = all((one.model, one.options) == (requests[0].model, requests[0].options) for one in requests)
    if not requests or not all_alike:
        return RegistrationSettings("", Request.model, RegistrationOptions())
    return RegistrationSettings("", requests[0].model, requests[0].options)


def segment_names(folder: Path) -> dict[int, tuple[str, tuple[float, float, float]]]:
    """Return the names and colors of the segments that were written for a batch, by their numbers; empty for none."""
    try:
        values = json.loads((folder / IMAGES / NAMES).read_text(encoding="utf-8"))
        return {int(number): (name, tuple(color)) for number, (name, color) in values.items()}
    except (OSError, ValueError, TypeError):
        return {}


def _names(pairs: Sequence[ScenePair]) -> list[str]:
    """Return a name for the folder of each pair, each its own."""
    taken: set[str] = set()
    names = []
    for pair in pairs:
        both = [node.GetName() if node is not None else "" for node in (pair.moving, pair.fixed)]
        several = sum(other.moving is pair.moving for other in pairs) > 1
        wanted = _plain(pair.name or "-to-".join(both if several else both[:1])) or "pair"
        name, number = wanted, 1
        while name.casefold() in taken:
            number += 1
            name = f"{wanted}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name).strip("-")[:60]


def _points_table(points: dict[str, list[Any]]) -> str:
    """Return points as the engine reads them, LPS mm."""
    lines = [
        ",".join(['"' + label.replace('"', '""') + '"', *map(repr, position)])
        for label, position in zip(points["labels"], points["positions"], strict=True)
    ]
    return "\n".join(["label,x,y,z", *lines]) + "\n"


def _write_transform(transform: np.ndarray | Image, path: str) -> str:
    """Write a transform, fixed to moving, LPS mm; return the ending of its file."""
    if isinstance(transform, np.ndarray):
        numbers = " ".join(repr(float(n)) for n in (*transform[:3, :3].ravel(), *transform[:3, 3]))
        text = (
            "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
            f"Parameters: {numbers}\nFixedParameters: 0 0 0\n"
        )
        Path(f"{path}.tfm").write_text(text, encoding="ascii")
        return ".tfm"
    for _bytes in write_nrrd(transform, Path(f"{path}.nrrd")):
        pass
    return ".nrrd"


def as_pairs(given: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> list[ScenePair | str]:
    """Return what a script asks for each pair, or the sentence that says why that cannot be.

    Args:
        given: the arguments of a registration that differ, "fixed_node" and "moving_node" at least.
        shared: those that all have.
    """
    asked: list[ScenePair | str] = []
    for pair in given:
        choices = {**shared, **pair}
        fixed, moving = choices.pop("fixed_node", None), choices.pop("moving_node", None)
        try:
            if wrong := sorted(set(choices) & _NOT_OF_A_PAIR):
                raise InputError(
                    _("'{name}' cannot be chosen for a pair of a batch; leave it out.").format(name=wrong[0])
                )
            asked.append(ScenePair(fixed, moving, Request.of(**choices)))
        except InputError as problem:
            asked.append(str(problem))
    return asked
