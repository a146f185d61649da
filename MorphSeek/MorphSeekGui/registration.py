"""Register two volumes of the scene: nodes in, worker, nodes out.

    from MorphSeekGui.registration import register
    nodes = register(getNode("fixed"), getNode("moving"))
    getNode("moving").SetAndObserveTransformNodeID(nodes.transform.GetID())

A panel that must not block takes the three parts of :func:`register` one by one: :func:`prepare`, a request to its
client that a timer polls, :meth:`Job.finish`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import slicer

from . import scene
from .engine_client import EngineClient, shared_client
from .scene import InputError, RegistrationNodes, _

__all__ = ["InputError", "Job", "RegistrationNodes", "prepare", "register"]


@dataclass
class Job:
    """A registration that is ready for the worker, in a private folder that :meth:`discard` removes.

    Attributes:
        params: what the worker's "register" takes.
    """

    params: dict
    fixed: slicer.vtkMRMLScalarVolumeNode
    moving: slicer.vtkMRMLScalarVolumeNode
    moving_to_space: np.ndarray
    labels: scene.Labels | None
    folder: tempfile.TemporaryDirectory

    def finish(self, result: dict) -> RegistrationNodes:
        """Nodes from the worker's answer; the folder is removed in any case.

        Raises:
            InputError: a volume left the scene meanwhile.
        """
        try:
            for node in (self.fixed, self.moving):
                if not slicer.mrmlScene.IsNodePresent(node):
                    raise InputError(
                        _(
                            "'{node}' has left the scene, so its result has no place; load it and register again."
                        ).format(node=node.GetName())
                    )
            return scene.create_nodes(result, self.fixed, self.moving, self.moving_to_space, self.labels)
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the folder with the arrays; twice does no harm."""
        self.folder.cleanup()


def prepare(
    fixed_node,
    moving_node,
    *,
    model: str = "brain-mr",
    steps: int | None = None,
    align: str | None = None,
    device: str = "auto",
    initial_transform_node=None,
    fixed_labels_node=None,
    moving_labels_node=None,
    inverse: bool = False,
) -> Job:
    """Read the nodes and write what the worker needs; the scene is not touched. Arguments as :func:`register`.

    Raises:
        InputError: a node cannot be used.
    """
    fixed = scene.read_volume(fixed_node)
    # a moving volume that already hangs under its initial transform is not moved by it a second time
    space = initial_transform_node if _is_ancestor(initial_transform_node, moving_node) else None
    moving = scene.read_volume(moving_node, space)
    moving_to_space = scene.matrix_to_space(moving_node, space)
    fixed_labels, moving_labels = scene.read_label_pair(fixed_labels_node, fixed_node, moving_labels_node, moving_node)
    initial = None if initial_transform_node is None else scene.read_transform(initial_transform_node, fixed)

    folder = tempfile.TemporaryDirectory(prefix="morphseek-", ignore_cleanup_errors=True)
    try:
        path = Path(folder.name)

        def save(image: scene.Image | None, name: str) -> dict | None:
            return None if image is None else scene.save_image(image, path / f"{name}.npy")

        def labels_on(labels: scene.Labels | None, image: scene.Image) -> scene.Image | None:
            return None if labels is None else scene.Image(labels.array, image.affine)

        if isinstance(initial, np.ndarray):
            initial = {"matrix": initial.tolist()}
        elif initial is not None:
            initial = {"displacement": save(initial, "initial")}
        params = {
            "fixed": save(fixed, "fixed"),
            "moving": save(moving, "moving"),
            "fixed_labels": save(labels_on(fixed_labels, fixed), "fixed-labels"),
            "moving_labels": save(labels_on(moving_labels, moving), "moving-labels"),
            "model": model,
            "device": device,
            "steps": steps,
            "align": align,
            "initial": initial,
            "inverse": inverse,
            "output": str(path / "out"),
        }
        (path / "out").mkdir()
    except BaseException:
        folder.cleanup()
        raise
    return Job(params, fixed_node, moving_node, moving_to_space, moving_labels, folder)


def register(
    fixed_node,
    moving_node,
    *,
    model: str = "brain-mr",
    steps: int | None = None,
    align: str | None = None,
    device: str = "auto",
    initial_transform_node=None,
    fixed_labels_node=None,
    moving_labels_node=None,
    inverse: bool = False,
    client: EngineClient | None = None,
    on_progress: Callable[[dict], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> RegistrationNodes:
    """Register the moving volume to the fixed one. Waits for the end; see the module's text for a panel's way.

    Args:
        fixed_node, moving_node: scalar volumes of the scene, where they stand in the world (linear parent transforms
            count, non-linear ones are refused).
        model: name of a bundled checkpoint or path of one.
        steps: refinement steps; None takes the model's.
        align: "none", "center", "rigid" or "affine" before the network; None takes the model's.
        device: "auto", "cpu" or "cuda:N".
        initial_transform_node: any transform node under which the moving volume lies (or would lie) roughly right.
        fixed_labels_node, moving_labels_node: label maps (matched by value) or segmentations (matched by segment
            name); with both, the report tells Dice before and after; the moving ones are warped too.
        inverse: also compute the inverse transform.
        client: the engine to use; None uses the application's own, which stays alive for the next registration.
        on_progress: called with dicts (phase, step, steps, fraction, message, metrics).
        cancelled: asked ten times a second; True cancels.

    Raises:
        InputError: a node cannot be used; nothing was started.
        EngineCancelled, EngineDied, EngineError: no node was made.
    """
    job = prepare(
        fixed_node,
        moving_node,
        model=model,
        steps=steps,
        align=align,
        device=device,
        initial_transform_node=initial_transform_node,
        fixed_labels_node=fixed_labels_node,
        moving_labels_node=moving_labels_node,
        inverse=inverse,
    )
    try:
        result = (client or shared_client()).call("register", job.params, on_progress, cancelled)
        return job.finish(result)
    finally:
        job.discard()


def _is_ancestor(transform_node, node) -> bool:
    parent = node.GetParentTransformNode() if node is not None else None
    while parent is not None and parent is not transform_node:
        parent = parent.GetParentTransformNode()
    return parent is not None
