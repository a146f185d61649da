"""Register two volumes of the scene: nodes in, worker, nodes out.

    from MorphSeekGui.registration import register
    nodes = register(getNode("fixed"), getNode("moving"))
    getNode("moving").SetAndObserveTransformNodeID(nodes.transform.GetID())

A panel that must not block uses :func:`prepare` and a :class:`Run`, which a timer polls.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import slicer

from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.messages import Answer, ArrayReference, Params, Progress, StateReference
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.report import WarningSection
from MorphSeekLib.protocol.settings import from_dict, to_dict
from MorphSeekLib.protocol.startup import NO_MODEL

from . import scene
from .corrections import ERROR_MM, Corrections, gather
from .engine_client import EngineClient, shared_client
from .models import DEFAULT
from .scene import InputError, RegistrationNodes, _

__all__ = [
    "InputError",
    "Inputs",
    "Job",
    "RegistrationNodes",
    "Request",
    "Run",
    "correct",
    "into_same",
    "prepare",
    "read_inputs",
    "register",
]


@dataclass
class Job:
    """A registration that is ready for the worker, in a private folder that :meth:`discard` removes.

    Attributes:
        params: what the worker's "register" takes.
    """

    params: Params
    fixed: slicer.vtkMRMLScalarVolumeNode
    moving: slicer.vtkMRMLScalarVolumeNode
    moving_to_space: np.ndarray
    labels: scene.Labels | None
    into: scene.Into
    places: list[np.ndarray]  # where the two volumes stand, LPS
    folder: tempfile.TemporaryDirectory
    warnings: list[WarningSection] = field(default_factory=list)  # of the nodes; they go into the report, too
    corrections: Corrections | None = None

    def finish(self, result: Answer) -> RegistrationNodes:
        """Make nodes of the worker's answer; the folder is removed in any case.

        Raises:
            InputError: a volume left the scene meanwhile.
        """
        try:
            for node in (self.fixed, self.moving):
                if not slicer.mrmlScene.IsNodePresent(node):
                    raise InputError(
                        _(
                            "'{node}' was removed from the scene, so its result cannot be stored; load it and register "
                            "again."
                        ).format(node=node.GetName())
                    )
            report = result.get("report") or {}
            if self.warnings:
                report = {**report, "warnings": self.warnings + (report.get("warnings") or [])}
            if np.linalg.det(self.moving_to_space) < 0:  # the transform node contains the mirroring parent
                report = {**report, "mirrored": report.get("mirrored") is not True}
            result = {**result, "report": report}
            state = _read_state(result.get("state"), self.places)
            nodes = scene.create_nodes(
                result, self.fixed, self.moving, self.moving_to_space, self.labels, into=self.into
            )
            nodes.state = state
            if self.corrections is not None:
                self.corrections.keep()
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
        on_picture: called with a row of the report's "steps" and the moving image after that stage, as
            :class:`scene.Image` in world coordinates; only when the job was prepared with ``show_steps``.
    """

    def __init__(
        self,
        job: Job,
        client: EngineClient,
        on_progress: Callable[[Progress], None] = lambda message: None,
        on_picture: Callable[[int, scene.Image], None] = lambda row, image: None,
    ) -> None:
        self.job, self.client = job, client
        self._on_progress, self._on_picture = on_progress, on_picture
        try:
            self.request = client.request("register", job.params, self._hear)
        except BaseException:
            job.discard()
            raise

    def _hear(self, message: Progress) -> None:
        if self.request.cancelled_at is not None:
            return  # what was on its way when Cancel was pressed
        if message["phase"] == "picture":
            self._on_picture(message["step"], scene.load_image(message["warped"]))
        else:
            self._on_progress(message)

    def poll(self) -> bool:
        """Handle what has arrived; return whether it is over."""
        self.client.poll()
        return self.request.done

    def cancel(self) -> None:
        """Ask the engine to stop; :meth:`poll` tells when it has."""
        self.client.cancel(self.request)

    def finish(self) -> RegistrationNodes:
        """Return the nodes, once it is over.

        Raises:
            EngineCancelled, EngineDied, EngineError, InputError: no node was made.
        """
        try:
            return self.job.finish(self.request.value())
        finally:
            self.job.discard()


@dataclass(frozen=True)
class Request:
    """The choices of a registration, without its two volumes.

    Attributes:
        options: the engine's choices.
        model: name of a bundled model, path of a model file, "none", or "auto": by the images.
        device: "auto", "cpu" or "cuda:N".
        threads: how many of the processor's threads to compute with; None takes all.
        initial_transform_node: any transform node under which the moving volume lies (or would lie) roughly right.
        fixed_mask_node, moving_mask_node: segmentations (their visible segments) or label maps; only what they mark of
            their volume counts.
        fixed_ignore_node, moving_ignore_node: the same of what does not count, such as a lesion.
        fixed_labels_node, moving_labels_node: label maps (matched by value) or segmentations (matched by segment
            name); with both, the report tells Dice before and after; the moving ones are warped too.
        fixed_landmarks_node, moving_landmarks_node: points that belong together, by label or else by order; with both,
            the report tells their distance before and after. The registration does not use them.
        show_steps: the worker hands over the warped image after each stage.
        state: of an earlier result with the same volumes and model, from which the stages go on.
        corrections: points by which the state, or without one the transform that they belong to, is corrected instead.
        into: nodes that take the results instead of new ones, by their name in :class:`scene.RegistrationNodes`.
    """

    options: RegistrationOptions = field(default_factory=RegistrationOptions)
    model: str = DEFAULT
    device: str = "auto"
    threads: int | None = None
    initial_transform_node: slicer.vtkMRMLTransformNode | None = None
    fixed_mask_node: slicer.vtkMRMLNode | None = None
    fixed_ignore_node: slicer.vtkMRMLNode | None = None
    moving_mask_node: slicer.vtkMRMLNode | None = None
    moving_ignore_node: slicer.vtkMRMLNode | None = None
    fixed_labels_node: slicer.vtkMRMLNode | None = None
    moving_labels_node: slicer.vtkMRMLNode | None = None
    fixed_landmarks_node: slicer.vtkMRMLNode | None = None
    moving_landmarks_node: slicer.vtkMRMLNode | None = None
    show_steps: bool = False
    state: scene.StepState | None = None
    corrections: Corrections | None = None
    into: scene.Into = field(default_factory=dict)

    @classmethod
    def of(cls, **choices) -> Request:
        """Return the request with some choices, each the name of an attribute here or of the engine's options.

        Raises:
            InputError: a choice that there is not, or a value that the engine would refuse.
        """
        engine = {f.name for f in fields(RegistrationOptions)}
        own = {name: value for name, value in choices.items() if name not in engine}
        unknown = sorted(set(own) - {f.name for f in fields(cls)})
        if unknown:
            known = sorted(engine | {f.name for f in fields(cls)} - {"options"})
            raise InputError(
                _("A registration has no option '{name}'; choose one of {known}.").format(
                    name=unknown[0], known=", ".join(known)
                )
            )
        try:
            options = from_dict(RegistrationOptions, {n: v for n, v in choices.items() if n in engine}, "options")
        except MorphSeekError as refused:
            raise InputError(str(refused)) from refused
        return cls(**({"options": options} | own))


@dataclass
class Inputs:
    """What the nodes of a registration hold.

    Attributes:
        fixed, moving: the images, where they stand in the world; the moving one may hang under its initial transform.
        moving_to_space: (4, 4) RAS, from the moving volume's own coordinates to those of ``moving``.
        labels: of both, numbered alike.
        masks: what is marked, by the names of the worker's parameters.
        points: of both, by the names of the worker's parameters; None where none were given.
        initial: the transform to start from, see :func:`scene.read_transform`.
    """

    fixed: scene.Image
    moving: scene.Image
    moving_to_space: np.ndarray
    labels: tuple[scene.Labels | None, scene.Labels | None]
    masks: dict[str, scene.Image]
    points: dict[str, dict[str, list] | None]
    initial: np.ndarray | scene.Image | None


def read_inputs(fixed_node, moving_node, request: Request, numbers: dict[str, int] | None = None) -> Inputs:
    """Read the nodes of a registration; the scene is not touched.

    Args:
        fixed_node, moving_node: the volumes.
        request: with the other nodes.
        numbers: as for :func:`scene.read_label_pair`.

    Raises:
        InputError: a node cannot be used.
    """
    initial_node = request.initial_transform_node
    fixed = scene.read_volume(fixed_node)
    # a moving volume that already hangs under its initial transform is not moved by it a second time
    space = initial_node if _is_ancestor(initial_node, moving_node) else None
    moving = scene.read_volume(moving_node, space)
    labels = (request.fixed_labels_node, fixed_node, request.moving_labels_node, moving_node)
    return Inputs(
        fixed,
        moving,
        scene.matrix_to_space(moving_node, space),
        scene.read_label_pair(*labels, numbers),
        _read_masks(request, (fixed_node, moving_node), (fixed, moving)),
        {
            "fixed_landmarks": scene.read_points(request.fixed_landmarks_node),
            "moving_landmarks": scene.read_points(request.moving_landmarks_node, space),
        },
        None if initial_node is None else scene.read_transform(initial_node, fixed),
    )


def prepare(fixed_node, moving_node, request: Request) -> Job:
    """Read the nodes and write what the worker needs; the scene is not touched.

    Raises:
        InputError: a node cannot be used.
    """
    _check_outputs(request.into, fixed_node, moving_node, request.initial_transform_node)
    inputs = read_inputs(fixed_node, moving_node, request)
    warnings = [
        {"code": "overlapping-segments", "message": one.warning}
        for one in inputs.labels
        if one is not None and one.warning
    ]
    corrections = request.corrections
    if corrections is not None and request.state is None:
        inputs.initial = corrections.start(inputs.moving_to_space)
    places = [inputs.fixed.affine, inputs.moving.affine]
    if request.state is not None and not np.allclose(places, request.state["places"], atol=1e-4):
        raise InputError(_("A volume has moved since the last registration; press Register to start again."))

    folder = tempfile.TemporaryDirectory(prefix="morphseek-", ignore_cleanup_errors=True)
    try:
        params = _write(Path(folder.name), request, inputs)
        params["corrections"] = None if corrections is None else corrections.sent(inputs.moving_to_space)
        params["fixed"] |= scene.file_of(fixed_node)
        params["moving"] |= scene.file_of(moving_node)
    except BaseException:
        folder.cleanup()
        raise
    return Job(
        params,
        fixed_node,
        moving_node,
        inputs.moving_to_space,
        inputs.labels[1],
        request.into,
        places,
        folder,
        warnings,
        corrections,
    )


def _write(path: Path, request: Request, inputs: Inputs) -> dict[str, object]:
    """Write the arrays into a folder; return the parameters of the worker's "register"."""

    def save(image: scene.Image | None, name: str) -> ArrayReference | None:
        return None if image is None else scene.save_image(image, path / f"{name}.npy")

    def labels_on(own: scene.Labels | None, image: scene.Image) -> scene.Image | None:
        return None if own is None else scene.Image(own.array, image.affine)

    initial = inputs.initial
    if isinstance(initial, np.ndarray):
        start = {"matrix": initial.tolist()}
    else:
        start = None if initial is None else {"displacement": save(initial, "initial")}
    (path / "out").mkdir()
    return {
        "fixed": save(inputs.fixed, "fixed"),
        "moving": save(inputs.moving, "moving"),
        "fixed_labels": save(labels_on(inputs.labels[0], inputs.fixed), "fixed-labels"),
        "moving_labels": save(labels_on(inputs.labels[1], inputs.moving), "moving-labels"),
        "model": request.model,
        "device": request.device,
        "threads": request.threads,
        "options": to_dict(request.options),
        "initial": start,
        "show_steps": request.show_steps,
        "state": None if request.state is None else _write_state(request.state, path),
        "output": str(path / "out"),
        **{name: save(image, name) for name, image in inputs.masks.items()},
        **inputs.points,
    }


def _read_masks(request: Request, volumes: tuple, images: tuple[scene.Image, scene.Image]) -> dict[str, scene.Image]:
    """Return what masks mark, by the names of the worker's parameters.

    Args:
        request: with the nodes of the masks.
        volumes: the fixed and the moving volume node.
        images: where their voxels stand.

    Raises:
        InputError: a mask cannot be used.
    """
    nodes = {
        "fixed_mask": (request.fixed_mask_node, 0),
        "fixed_ignore": (request.fixed_ignore_node, 0),
        "moving_mask": (request.moving_mask_node, 1),
        "moving_ignore": (request.moving_ignore_node, 1),
    }
    return {
        name: scene.Image(scene.read_mask(node, volumes[n]), images[n].affine)
        for name, (node, n) in nodes.items()
        if node is not None
    }


def register(
    fixed_node,
    moving_node,
    *,
    client: EngineClient | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    **choices,
) -> RegistrationNodes:
    """Register the moving volume to the fixed one. Waits for the end; see the module's text for a panel's way.

    Args:
        fixed_node, moving_node: scalar volumes of the scene, where they stand in the world (linear parent transforms
            count, non-linear ones are refused).
        client: the engine to use; None uses the application's own, which stays alive for the next registration.
        on_progress: called with dicts (phase, step, steps, fraction, message, metrics).
        cancelled: asked ten times a second; True cancels.
        choices: by name, see :class:`Request` and the engine's RegistrationOptions: model, device, steps, align,
            stop_early, inverse, preset, search, fit, similarity, fit_iterations, trust, state, into, ...

    Raises:
        InputError: a node or a choice cannot be used; nothing was started.
        EngineCancelled, EngineDied, EngineError: no node was made.
    """
    job = prepare(fixed_node, moving_node, Request.of(**choices))
    try:
        result = (client or shared_client()).call("register", job.params, on_progress, cancelled)
        return job.finish(result)
    finally:
        job.discard()


def correct(
    nodes: RegistrationNodes,
    fixed_points=None,
    moving_points=None,
    *,
    error_mm: float = ERROR_MM,
    **choices,
) -> RegistrationNodes:
    """Correct a registration by points, and wait for the end; its nodes take the result.

    Args:
        nodes: of the registration, as :func:`register` returned them or :func:`scene.result_nodes` found them.
        fixed_points, moving_points: markups that belong together, each in the space of its volume; None for both
            takes only the lines that were drawn for this registration, see :mod:`corrections`.
        error_mm: how far off a point may be, one standard deviation.
        choices: as for :func:`register`. Name the model that the registration was made with to go on from its state;
            else no model is used, and a registration by a model is corrected as a transform, aligned by itself.

    Raises:
        InputError: nothing to correct by, or a node cannot be used.
        EngineCancelled, EngineDied, EngineError: the nodes are as they were.
    """
    points = gather(nodes, fixed_points, moving_points, error_mm)
    same = "model" in choices or nodes.report.get("model") is None
    own = {"model": NO_MODEL, "state": nodes.state if same else None, "into": into_same(nodes), "corrections": points}
    return register(nodes.fixed, nodes.moving, **(own | choices))


def into_same(nodes: RegistrationNodes) -> scene.Into:
    """Return the nodes of a registration as those that take the result of another."""
    names = ("warped", "transform", "jacobian", "folding", "inverse", "aligned", "warped_labels")
    return {name: getattr(nodes, name) for name in names}


def _check_outputs(into: scene.Into, fixed_node, moving_node, initial_transform_node) -> None:
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


def _read_state(state: StateReference | None, places: list[np.ndarray]) -> scene.StepState | None:
    """Return the worker's state with its arrays in memory: the folder they lie in will go."""
    if state is None:
        return None
    start = dict(state["start"])
    if "displacement" in start:
        image = scene.load_image(start["displacement"])
        start["displacement"] = scene.Image(np.array(image.array), image.affine)
    total = np.load(state["total"], allow_pickle=False)
    return {"start": start, "align": state["align"], "figures": state["figures"], "total": total, "places": places}


def _write_state(state: scene.StepState, folder: Path) -> StateReference:
    """Return the state as the worker takes it, its arrays in the folder."""
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
