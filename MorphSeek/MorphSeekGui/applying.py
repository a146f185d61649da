"""Apply a registration to other nodes of the scene: volumes, label maps, segmentations, markups and models.

    from MorphSeekGui.applying import apply
    node = apply(nodes, getNode("Segmentation"))

The engine resamples volumes and label maps, as its command line does; Slicer moves the other kinds, as if they were put
under the transform and hardened. The node that is given stays as it is; what comes is a new one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import slicer
import vtk

from MorphSeekLib.protocol.messages import Answer, Params, Progress

from . import scene
from .engine_client import EngineClient, shared_client
from .scene import InputError, RegistrationNodes, _
from .views import displacement_of

MARKUPS = ("Fiducial", "Line", "Angle", "Curve", "ClosedCurve")  # a plane or a box would not stay one
MOVED_BY_SLICER = (
    *(f"vtkMRMLMarkups{kind}Node" for kind in MARKUPS),
    "vtkMRMLSegmentationNode",
    "vtkMRMLModelNode",
)


@dataclass
class Application:
    """A registration that is ready to be applied to a volume by the worker.

    Attributes:
        params: what the worker's "apply" takes.
        nodes, node: the registration, and the volume.
        backward: from the fixed to the moving volume.
    """

    params: Params
    nodes: RegistrationNodes
    node: slicer.vtkMRMLScalarVolumeNode
    backward: bool
    folder: tempfile.TemporaryDirectory

    def finish(self, answer: Answer):
        """Make the node of the worker's answer; the folder is removed in any case."""
        try:
            image = scene.load_image(answer["volume"])
            with scene.all_or_nothing(slicer.mrmlScene):
                new = _new_node(self.nodes, self.node, self.backward)
                scene.fill_volume(new, image)
                if self.backward:
                    new.SetAndObserveTransformNodeID(self.nodes.moving.GetTransformNodeID())
                display = self.node.GetDisplayNode()
                if new.IsA("vtkMRMLLabelMapVolumeNode"):
                    if display is not None:
                        new.GetDisplayNode().SetAndObserveColorNodeID(display.GetColorNodeID())
                else:
                    scene.copy_window(self.node, new)
                scene.put_into_folder(self.nodes, [new])
            return new
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the arrays; twice does no harm."""
        self.folder.cleanup()


def apply(
    nodes: RegistrationNodes,
    node,
    *,
    backward: bool = False,
    interpolation: str = "linear",
    client: EngineClient | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
):
    """Apply a registration to a node that belongs to its moving volume. Waits for the end.

    Args:
        nodes: from :func:`registration.register`, or :func:`scene.result_nodes` of a transform node.
        node: a scalar or label map volume, a segmentation, markups or a model, which lies with the moving volume.
        backward: ``node`` belongs to the fixed volume, and is brought onto the moving one.
        interpolation: of a volume: "linear", "nearest" or "bspline"; label maps take "nearest".
        client, on_progress, cancelled: as for :func:`registration.register`.

    Returns:
        a new node of the same kind; a volume lies on the fixed volume's grid (backward: on the moving one's).

    Raises:
        InputError: the node cannot be moved.
        EngineCancelled, EngineDied, EngineError: no node was made.
    """
    if not is_volume(node):
        return move(nodes, node, backward)
    job = prepare(nodes, node, backward, interpolation)
    try:
        return job.finish((client or shared_client()).call("apply", job.params, on_progress, cancelled))
    finally:
        job.discard()


def is_volume(node) -> bool:
    """Return whether the engine resamples a node."""
    return isinstance(node, slicer.vtkMRMLVolumeNode)


def prepare(nodes: RegistrationNodes, node, backward: bool = False, interpolation: str = "linear") -> Application:
    """Write what the worker needs to resample a volume; arguments as :func:`apply`.

    Raises:
        InputError: see :func:`apply`.
    """
    labels = isinstance(node, slicer.vtkMRMLLabelMapVolumeNode)
    reference = nodes.moving if backward else nodes.warped
    if reference.GetImageData() is None:
        raise InputError(_("The volume '{node}' is empty; load it again.").format(node=reference.GetName()))
    image = scene.read_volume(node) if backward else scene.Image(scene.voxels(node), _place(nodes, node))
    displacement = displacement_of(nodes.transform)
    folder = tempfile.TemporaryDirectory(prefix="morphseek-", ignore_cleanup_errors=True)
    try:
        path = Path(folder.name)
        grid = {
            "shape": list(reference.GetImageData().GetDimensions()),
            "affine": (scene.FLIP @ scene.ijk_to_ras(reference)).tolist(),
        }
        params = {
            "volume": scene.save_image(image, path / "volume.npy") | scene.file_of(node),
            "labels": labels,
            "displacement": scene.save_image(displacement, path / "displacement.npy"),
            "backward": backward,
            "reference": grid,
            "interpolation": interpolation,
            "output": str(path / "out.npy"),
        }
    except BaseException:
        folder.cleanup()
        raise
    return Application(params, nodes, node, backward, folder)


def move(nodes: RegistrationNodes, node, backward: bool = False):
    """Return a copy of a segmentation, markups or a model, moved by a registration; arguments as :func:`apply`.

    Raises:
        InputError: see :func:`apply`.
    """
    if node is None or not any(node.IsA(kind) for kind in MOVED_BY_SLICER):
        raise InputError(
            _(
                "'{node}' cannot be moved by a registration; choose a volume, a segmentation, a model, or points, "
                "lines or curves."
            ).format(node=scene.name_of(node))
        )
    path = vtk.vtkGeneralTransform()
    path.PostMultiply()
    if backward:
        path.Concatenate(scene.to_vtk(scene.matrix_to_space(node)))
        path.Concatenate(nodes.transform.GetTransformFromParent())
    else:
        path.Concatenate(scene.to_vtk(_to_moving(nodes, node)))
        path.Concatenate(nodes.transform.GetTransformToParent())
    with scene.all_or_nothing(slicer.mrmlScene):
        new = _new_node(nodes, node, backward)
        new.CopyContent(node, True)
        new.SetAndObserveTransformNodeID(None)
        new.CreateDefaultDisplayNodes()
        if node.GetDisplayNode() is not None and new.GetDisplayNode() is not None:
            new.GetDisplayNode().CopyContent(node.GetDisplayNode())
        new.ApplyTransform(path)
        if backward:
            new.SetAndObserveTransformNodeID(nodes.moving.GetTransformNodeID())
        scene.put_into_folder(nodes, [new])
    return new


def _place(nodes: RegistrationNodes, node) -> np.ndarray:
    """Return (4, 4) voxel -> LPS mm in the moving volume's own coordinates."""
    return scene.FLIP @ _to_moving(nodes, node) @ scene.ijk_to_ras(node)


def _to_moving(nodes: RegistrationNodes, node) -> np.ndarray:
    """Return (4, 4) RAS: a node's own coordinates -> those of the moving volume, which the transform leads from.

    Where the moving volume was put under the result, the node counts as lying with it if it is there too, or if it has
    no parent, as the moving volume had before.
    """
    own, moving = node.GetParentTransformNode(), nodes.moving.GetParentTransformNode()
    if moving is nodes.transform and own is None:
        return np.eye(4)
    between = scene.linear_between(own, moving)
    if between is None:
        raise InputError(
            _("A non-linear transform lies between '{node}' and '{volume}'; put both under the same transform.").format(
                node=node.GetName(), volume=nodes.moving.GetName()
            )
        )
    return between


def _new_node(nodes: RegistrationNodes, node, backward: bool):
    """Return a new node of the same kind, named after what it lies on."""
    onto = nodes.moving if backward else nodes.fixed
    plain = {"node": _("{name} on {onto}").format(name=node.GetName(), onto=onto.GetName())}
    name = scene.free_names(slicer.mrmlScene, plain)["node"]
    return slicer.mrmlScene.AddNewNodeByClass(node.GetClassName(), name)
