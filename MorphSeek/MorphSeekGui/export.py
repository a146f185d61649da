"""A registration's report, transform and Jacobian as files, written by the engine as its command line writes them.

    from MorphSeekGui.export import export
    folder = export(nodes, "/home/me/results")

Every export gets a folder of its own inside the one that was chosen, so that it never overwrites anything. A panel that
must not block takes the parts of :func:`export` one by one: :func:`prepare`, a request to its client, discard.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from MorphSeekLib.protocol.messages import Params, Progress

from . import scene
from .engine_client import EngineClient, shared_client
from .scene import InputError, RegistrationNodes, _
from .views import displacement_of

# as the engine calls them
EXPORTS = ("report", "transform", "jacobian")


@dataclass
class Export:
    """An export that is ready for the worker, its arrays in a private folder that :meth:`discard` removes.

    Attributes:
        params: what the worker's "export" takes.
        output: the folder that will hold the files.
    """

    params: Params
    output: Path
    folder: tempfile.TemporaryDirectory

    def discard(self) -> None:
        """Remove the arrays; twice does no harm."""
        self.folder.cleanup()


def prepare(nodes: RegistrationNodes, parent: str | os.PathLike, wanted: Collection[str] = EXPORTS) -> Export:
    """Write what the worker needs; arguments as :func:`export`.

    Raises:
        InputError: nothing is wanted, there is no such folder or it is not writable, or a needed node is missing.
    """
    if not wanted:
        raise InputError(_("Choose what to export: report, transform or Jacobian."))
    parent = Path(parent)
    if not str(parent).strip() or not parent.is_dir() or not parent.is_absolute():
        raise InputError(_("Choose a folder that exists; '{folder}' does not.").format(folder=parent))
    if not os.access(parent, os.W_OK):
        raise InputError(_("The folder '{folder}' cannot be written to; choose another one.").format(folder=parent))
    if nodes.aligned is None and "report" in wanted:
        raise InputError(
            _("The report needs the volume before the deformation, which is not in the scene; register again.")
        )
    images = {name: scene.read_volume(getattr(nodes, name)) for name in ("fixed", "warped", "jacobian")}
    # without a report the aligned volume is not looked at
    images["aligned"] = scene.read_volume(nodes.aligned) if nodes.aligned is not None else images["warped"]
    images["displacement"] = displacement_of(nodes.transform)
    if nodes.inverse is not None and "transform" in wanted:
        images["inverse"] = displacement_of(nodes.inverse)
    if nodes.trust_colors is not None and "report" in wanted:
        images["trust_colors"] = scene.read_volume(nodes.trust_colors)
    output = _free_name(parent, nodes.transform.GetName())
    folder = tempfile.TemporaryDirectory(prefix="morphseek-", ignore_cleanup_errors=True)
    try:
        references = {n: scene.save_image(image, Path(folder.name) / f"{n}.npy") for n, image in images.items()}
    except BaseException as problem:
        folder.cleanup()
        if isinstance(problem, OSError):
            raise InputError(
                _("The results cannot be written for the engine ({reason}); free some disk space.").format(
                    reason=problem.strerror
                )
            ) from problem
        raise
    sides = {
        side: {"path": getattr(nodes, side).GetName(), **(nodes.report.get(side) or {})} for side in ("fixed", "moving")
    }
    params = references | {"report": {**nodes.report, **sides}, "wanted": list(wanted), "output": str(output)}
    return Export(params, output, folder)


def export(
    nodes: RegistrationNodes,
    folder: str | os.PathLike,
    wanted: Collection[str] = EXPORTS,
    *,
    client: EngineClient | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Path:
    """Write a registration's files. Waits for the end.

    Args:
        nodes: from :func:`registration.register`, or :func:`scene.result_nodes` of a transform node.
        folder: an existing folder; a new one inside it, named after the transform node, takes the files.
        wanted: of "report" (report.html with pictures, report.json), "transform" (transform.h5: fixed point in the
            world -> moving point in the volume's own coordinates; inverse.h5 if there is one) and "jacobian"
            (jacobian.nii.gz, folding.nii.gz).
        client, on_progress, cancelled: as for :func:`registration.register`.

    Returns:
        the new folder.

    Raises:
        InputError: see :func:`prepare`.
        EngineCancelled, EngineDied, EngineError: no file was written.
    """
    job = prepare(nodes, folder, wanted)
    try:
        (client or shared_client()).call("export", job.params, on_progress, cancelled)
        return job.output
    finally:
        job.discard()


def _free_name(parent: Path, name: str) -> Path:
    """Return a name inside ``parent`` that nothing has yet, from a node's name without what file systems dislike."""
    stem = re.sub(r'[\x00-\x1f<>:"/\\|?*]+', "_", name).strip(" .")[:80] or "registration"
    tried, number = parent / stem, 2
    while tried.exists():
        tried, number = parent / f"{stem} {number}", number + 1
    return tried
