"""The results of a pair of a batch as nodes: asked of the engine, which reads the files, and put into the scene."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import slicer

from MorphSeekLib.protocol.messages import Answer, Params

from . import scene
from .batch_pairs import Source, segment_names
from .batch_run import IMAGES, BatchRow, BatchRun
from .scene import Image, InputError, Labels, RegistrationNodes, _

PAIR = "MorphSeek.Pair"  # attribute of a result's transform: the folder of the pair that it was loaded from
FILE = "MorphSeek.File"  # attribute of an image that was loaded from a file of a batch


@dataclass
class Loading:
    """A pair whose results are ready to be asked of the engine; :meth:`discard` removes its private folder.

    Attributes:
        params: what the worker's "results" takes.
    """

    params: Params
    row: BatchRow
    run: BatchRun
    sources: tuple[Source, Source] | None
    folder: tempfile.TemporaryDirectory

    def finish(self, answer: Answer) -> RegistrationNodes:
        """Make nodes of the engine's answer; the folder is removed in any case.

        Raises:
            InputError: a volume left the scene meanwhile.
        """
        try:
            with scene.all_or_nothing(slicer.mrmlScene):
                fixed, moving = self._images(answer)
                nodes = scene.create_nodes(
                    self._with_warnings(answer, moving), fixed.node, moving.node, moving.to_space, moving.labels
                )
                nodes.transform.SetAttribute(PAIR, str(self.run.folder / self.row.name))
                self._add_labels(answer, nodes)
            return nodes
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the folder with the arrays; twice does no harm."""
        self.folder.cleanup()

    def _images(self, answer: Answer) -> tuple[Source, Source]:
        """Return the two volumes: those of the scene that the pair was made of, or the ones of its files."""
        if self.sources is not None:
            for source in self.sources:
                if not slicer.mrmlScene.IsNodePresent(source.node):
                    raise InputError(
                        _("'{node}' was removed from the scene; its results are in {folder}.").format(
                            node=source.node.GetName(), folder=self.run.folder / self.row.name
                        )
                    )
            return self.sources
        files = self.row.files
        names = Path(files["fixed"]).name.partition(".")[0], self.row.name
        nodes = [
            loaded(files[side]) or _add(answer.get(side), name, files[side])
            for side, name in zip(("fixed", "moving"), names, strict=True)
        ]
        segments = segment_names(self.run.folder) if self._exported("moving_labels") else {}
        return Source.of(nodes[0]), Source.of(nodes[1], labels=Labels(None, segments))

    def _exported(self, column: str) -> bool:
        """Return whether a file of the pair was written from a scene."""
        return column in self.row.files and Path(self.row.files[column]).parent == self.run.folder / IMAGES

    def _with_warnings(self, answer: Answer, moving: Source) -> Answer:
        """Return the answer with what only the scene knows: overlapping segments, and a parent that mirrors."""
        report = dict(answer.get("report") or {})
        if moving.labels is not None and moving.labels.warning:
            own = {"code": "overlapping-segments", "message": moving.labels.warning}
            report["warnings"] = [own, *(report.get("warnings") or [])]
        if np.linalg.det(moving.to_space) < 0:  # the transform node contains the mirroring parent
            report["mirrored"] = report.get("mirrored") is not True
        return {**answer, "report": report}

    def _add_labels(self, answer: Answer, nodes: RegistrationNodes) -> None:
        """Add the label maps of both volumes, where they came from files."""
        for side, volume in (("fixed", nodes.fixed), ("moving", nodes.moving)):
            column = f"{side}_labels"
            if answer.get(column) is not None and loaded(self.row.files[column]) is None:
                name = _("{name} labels").format(name=volume.GetName())
                _add(answer[column], name, self.row.files[column], "vtkMRMLLabelMapVolumeNode")


def prepare_loading(run: BatchRun, row: BatchRow, sources: tuple[Source, Source] | None = None) -> Loading:
    """Return what is asked of the engine for the results of a pair.

    Args:
        run: the batch.
        row: of a pair that is done.
        sources: the volumes of the scene that it was written from; None reads its files.

    Raises:
        InputError: there is nothing to load.
    """
    if row.state != "done":
        raise InputError(
            _("'{name}' failed: {problem}").format(name=row.name, problem=row.problem)
            if row.state == "failed"
            else _("'{name}' is not registered yet.").format(name=row.name)
        )
    files: Mapping[str, str] = row.files
    if sources is None and not files:
        files = {side: row.figures.get(side) or "" for side in ("fixed", "moving")}
    row = BatchRow(row.name, row.state, row.problem, row.figures, files)
    folder = tempfile.TemporaryDirectory(prefix="morphseek-", ignore_cleanup_errors=True)
    params = {"folder": str(run.folder / row.name), "nifti_form": run.nifti_form(), "output": folder.name}
    if sources is None:
        columns = ("fixed", "moving", "fixed_labels", "moving_labels")
        params |= {name: files[name] for name in columns if name in files and loaded(files[name]) is None}
    return Loading(params, row, run, sources, folder)


def loaded(path: str):
    """Return the volume of the scene that was loaded from a file of a batch; None without one."""
    kinds = ("vtkMRMLScalarVolumeNode", "vtkMRMLLabelMapVolumeNode")
    nodes = [node for kind in kinds for node in slicer.util.getNodesByClass(kind)]
    return next(
        (node for node in nodes if node.GetAttribute(FILE) == path and node.GetParentTransformNode() is None), None
    )


def result_of(run: BatchRun, row: BatchRow) -> RegistrationNodes | None:
    """Return the results of a pair that are in the scene already; None for none, or older ones."""
    for transform in slicer.util.getNodesByClass("vtkMRMLTransformNode"):
        if transform.GetAttribute(PAIR) == str(run.folder / row.name):
            nodes = scene.result_nodes(transform)
            if nodes is not None and nodes.report.get("seconds", {}).get("total") == row.figures.get("seconds"):
                return nodes
    return None


def _add(reference, name: str, path: str, kind: str = "vtkMRMLScalarVolumeNode"):
    """Add a volume of the engine's to the scene, which remembers its file."""
    if reference is None:
        raise InputError(_("The volume of {path} was removed from the scene meanwhile; try again.").format(path=path))
    image = scene.load_image(reference)
    node = slicer.mrmlScene.AddNewNodeByClass(kind, name)
    scene.fill_volume(node, Image(np.array(image.array), image.affine))
    node.SetAttribute(FILE, path)
    return node
