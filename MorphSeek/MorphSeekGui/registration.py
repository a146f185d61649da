"""Register two volumes of the scene: nodes in, worker, nodes out.

    from MorphSeekGui.registration import register
    nodes = register(getNode("fixed"), getNode("moving"))
    getNode("moving").SetAndObserveTransformNodeID(nodes.transform.GetID())

A panel that must not block uses :func:`prepare` and a :class:`Run`, which a timer polls.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import slicer

from . import scene
from .engine_client import EngineCancelled, EngineClient, EngineError, shared_client
from .messages import sentence
from .scene import InputError, RegistrationNodes, _

__all__ = ["InputError", "Job", "Outcome", "RegistrationNodes", "Run", "prepare", "register", "register_batch"]


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
    into: dict
    places: list  # where the two volumes stand, LPS
    folder: tempfile.TemporaryDirectory
    warnings: list[dict] = field(default_factory=list)  # of the nodes, to go with the engine's into the report

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
            report = result.get("report") or {}
            if self.warnings:
                report = report | {"warnings": self.warnings + (report.get("warnings") or [])}
            if np.linalg.det(self.moving_to_space) < 0:  # the transform node contains the mirroring parent
                report = report | {"mirrored": report.get("mirrored") is not True}
            result = result | {"report": report}
            state = _read_state(result.get("state"), self.places)
            nodes = scene.create_nodes(
                result, self.fixed, self.moving, self.moving_to_space, self.labels, into=self.into
            )
            nodes.state = state
            return nodes
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the folder with the arrays; twice does no harm."""
        self.folder.cleanup()


class Run:
    """A registration under way in the engine. Call :meth:`poll` from a timer until it is true, then :meth:`finish`.

    Args:
        job: from :func:`prepare`.
        client: the engine.
        on_progress: called with each message, a dict (phase, step, steps, fraction, message, metrics).
        on_picture: called with a step's number and the moving image after it, as :class:`scene.Image` in world
            coordinates; only when the job was prepared with ``show_steps``.
    """

    def __init__(
        self,
        job: Job,
        client: EngineClient,
        on_progress: Callable[[dict], None] = lambda message: None,
        on_picture: Callable[[int, scene.Image], None] = lambda step, image: None,
    ) -> None:
        self.job, self.client = job, client
        self._on_progress, self._on_picture = on_progress, on_picture
        try:
            self.request = client.request("register", job.params, self._hear)
        except BaseException:
            job.discard()
            raise

    def _hear(self, message: dict) -> None:
        if self.request.cancelled_at is not None:
            return  # what was on its way when Cancel was pressed
        if message["phase"] == "picture":
            self._on_picture(message["step"], scene.load_image(message["warped"]))
        else:
            self._on_progress(message)

    def poll(self) -> bool:
        """Handle what has arrived; whether it is over."""
        self.client.poll()
        return self.request.done

    def cancel(self) -> None:
        """Ask the engine to give up; :meth:`poll` tells when it has."""
        self.client.cancel(self.request)

    def finish(self) -> RegistrationNodes:
        """The nodes, once it is over.

        Raises:
            EngineCancelled, EngineDied, EngineError, InputError: no node was made.
        """
        try:
            return self.job.finish(self.request.value())
        finally:
            self.job.discard()


def prepare(
    fixed_node,
    moving_node,
    *,
    model: str = "brain-mr",
    steps: int | None = None,
    align: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    initial_transform_node=None,
    fixed_labels_node=None,
    moving_labels_node=None,
    inverse: bool = False,
    stop_early: bool = False,
    refinement: dict | None = None,
    show_steps: bool = False,
    state: dict | None = None,
    into: dict | None = None,
) -> Job:
    """Read the nodes and write what the worker needs; the scene is not touched. Arguments as :func:`register`, and:

    Args:
        show_steps: the worker hands over the warped image after each step.

    Raises:
        InputError: a node cannot be used.
    """
    _check_outputs(into or {}, fixed_node, moving_node, initial_transform_node)
    fixed = scene.read_volume(fixed_node)
    # a moving volume that already hangs under its initial transform is not moved by it a second time
    space = initial_transform_node if _is_ancestor(initial_transform_node, moving_node) else None
    moving = scene.read_volume(moving_node, space)
    moving_to_space = scene.matrix_to_space(moving_node, space)
    fixed_labels, moving_labels = scene.read_label_pair(fixed_labels_node, fixed_node, moving_labels_node, moving_node)
    warnings = [
        {"code": "overlapping-segments", "message": labels.warning}
        for labels in (fixed_labels, moving_labels)
        if labels is not None and labels.warning
    ]
    initial = None if initial_transform_node is None else scene.read_transform(initial_transform_node, fixed)
    places = [fixed.affine, moving.affine]
    if state is not None and not np.allclose(places, state["places"], atol=1e-4):
        raise InputError(_("A volume has moved since the last step; press Register to start anew."))

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
            "fixed": save(fixed, "fixed") | scene.file_of(fixed_node),
            "moving": save(moving, "moving") | scene.file_of(moving_node),
            "fixed_labels": save(labels_on(fixed_labels, fixed), "fixed-labels"),
            "moving_labels": save(labels_on(moving_labels, moving), "moving-labels"),
            "model": model,
            "device": device,
            "threads": threads,
            "options": {
                "steps": steps,
                "align": align,
                "inverse": inverse,
                "stop_early": stop_early,
                "fit": refinement or {},
            },
            "initial": initial,
            "show_steps": show_steps,
            "state": None if state is None else _write_state(state, path),
            "output": str(path / "out"),
        }
        (path / "out").mkdir()
    except BaseException:
        folder.cleanup()
        raise
    return Job(params, fixed_node, moving_node, moving_to_space, moving_labels, into or {}, places, folder, warnings)


def register(
    fixed_node,
    moving_node,
    *,
    model: str = "brain-mr",
    steps: int | None = None,
    align: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    initial_transform_node=None,
    fixed_labels_node=None,
    moving_labels_node=None,
    inverse: bool = False,
    stop_early: bool = False,
    refinement: dict | None = None,
    state: dict | None = None,
    into: dict | None = None,
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
        threads: how many of the processor's threads to compute with; None takes all.
        initial_transform_node: any transform node under which the moving volume lies (or would lie) roughly right.
        fixed_labels_node, moving_labels_node: label maps (matched by value) or segmentations (matched by segment
            name); with both, the report tells Dice before and after; the moving ones are warped too.
        inverse: also compute the inverse transform.
        stop_early: stop at a step that no longer brings the images closer.
        refinement: fits this pair without labels after the steps, which is slower and more exact: "iterations" on the
            model's grid, "fine_iterations" on the image's own, "similarity" ("lncc", or "mind" for two modalities) and
            the engine's other RefinementSettings; None for none.
        state: of an earlier result with the same volumes and model: ``steps`` more are taken from there.
        into: nodes that take the results instead of new ones, by their name in :class:`scene.RegistrationNodes`.
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
        threads=threads,
        initial_transform_node=initial_transform_node,
        fixed_labels_node=fixed_labels_node,
        moving_labels_node=moving_labels_node,
        inverse=inverse,
        stop_early=stop_early,
        refinement=refinement,
        state=state,
        into=into,
    )
    try:
        result = (client or shared_client()).call("register", job.params, on_progress, cancelled)
        return job.finish(result)
    finally:
        job.discard()


@dataclass
class Outcome:
    """What became of one pair of a batch: its nodes, or the reason why there are none."""

    pair: dict
    nodes: RegistrationNodes | None = None
    error: str = ""


def register_batch(
    pairs: Iterable[dict],
    *,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    cancelled: Callable[[], bool] | None = None,
    **options,
) -> list[Outcome]:
    """Register one pair after another. A pair that fails does not stop the others.

    Args:
        pairs: the arguments of :func:`register` that differ, "fixed_node" and "moving_node" at least.
        on_outcome: called after each pair.
        cancelled: True ends the batch; the pairs that were not reached have no outcome.
        options: the arguments of :func:`register` that all pairs share.
    """
    outcomes = []
    for pair in pairs:
        if cancelled is not None and cancelled():
            break
        try:
            outcome = Outcome(pair, register(**{**options, **pair}, cancelled=cancelled))
        except EngineCancelled:
            break
        except (InputError, EngineError) as problem:
            outcome = Outcome(pair, error=sentence(problem))
        outcomes.append(outcome)
        on_outcome(outcome)
    return outcomes


def _check_outputs(into: dict, fixed_node, moving_node, initial_transform_node) -> None:
    """Refuse to write a result over what it is computed from."""
    for node in into.values():
        if node is None:
            continue
        used = node in (fixed_node, moving_node, initial_transform_node)
        used = used or _is_ancestor(node, fixed_node) or _is_ancestor(node, moving_node)
        if used:
            raise InputError(
                _(
                    "'{node}' is an input of this registration and cannot take its result too; choose another output."
                ).format(node=node.GetName())
            )


def _read_state(state: dict | None, places: list) -> dict | None:
    """The worker's state with its arrays in memory: the folder they lie in will go."""
    if state is None:
        return None
    start = dict(state["start"])
    if "displacement" in start:
        image = scene.load_image(start["displacement"])
        start["displacement"] = scene.Image(np.array(image.array), image.affine)
    total = np.load(state["total"], allow_pickle=False)
    return {"start": start, "align": state["align"], "figures": state["figures"], "total": total, "places": places}


def _write_state(state: dict, folder: Path) -> dict:
    """The state as the worker takes it, its arrays in the folder."""
    start = dict(state["start"])
    if "displacement" in start:
        start["displacement"] = scene.save_image(start["displacement"], folder / "start.npy")
    np.save(folder / "total.npy", state["total"])
    return {"start": start, "align": state["align"], "figures": state["figures"], "total": str(folder / "total.npy")}


def _is_ancestor(transform_node, node) -> bool:
    parent = node.GetParentTransformNode() if node is not None else None
    while parent is not None and parent is not transform_node:
        parent = parent.GetParentTransformNode()
    return parent is not None
