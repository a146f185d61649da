"""What a batch says of a template: the mean of the images that were warped onto it, and how their volumes differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..io.files import output_folder
from ..io.images import read_map, write_image
from ..protocol.batch import Outcome
from ..protocol.errors import MorphSeekError
from ..protocol.job import Job
from ..protocol.settings import to_json
from ..protocol.version import __version__
from ..space.geometry import Grid, Volume

MAPS = {
    "mean.nii.gz": "mean of the warped images, each as it is",
    "log-jacobian-mean.nii.gz": "mean of log J of the deformable part: the volume of a place in the moving image over "
    "that in the template, beyond what the alignment scales",
    "log-jacobian-std.nii.gz": "standard deviation of the same over pairs (n - 1); 0 where fewer than two count",
    "log-jacobian-whole-mean.nii.gz": "mean of log J of the whole transform, alignment included",
    "log-jacobian-whole-std.nii.gz": "standard deviation of the same",
    "folded.nii.gz": "how many pairs are left out at a voxel of the maps of log J, as their transform folds there (J "
    "<= 0 by central differences, or the voxel meets a folded cell)",
}
_DONE = "template.json"


class _Moments:
    """Count, mean and standard deviation of images, voxel by voxel, one image at a time (Welford 1962)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = np.zeros(shape, np.int32)
        self.mean = np.zeros(shape)
        self._squares = np.zeros(shape)

    def add(self, values: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Take an image, where it counts."""
        where = np.ones(values.shape, bool) if counts is None else counts
        self.count += where
        away = np.where(where, values - self.mean, 0.0)
        self.mean += away / np.maximum(self.count, 1)
        self._squares += away * np.where(where, values - self.mean, 0.0)

    def deviation(self) -> np.ndarray:
        """Return the standard deviation (n - 1); 0 where fewer than two images count."""
        return np.sqrt(self._squares / np.maximum(self.count - 1, 1)) * (self.count > 1)


def write_template(folder: Path, outcomes: Sequence[Outcome], job: Job) -> str:
    """Write the maps of :data:`MAPS` into folder/template, where all pairs have the same fixed image.

    Pairs whose alignment is no affine map (an initial transform that bends) count in the maps of the whole alone.

    Args:
        folder: of the batch.
        outcomes: of its pairs.
        job: told of each pair, and asked before it.

    Returns:
        a sentence that says what was written or why nothing was; empty where the maps are those of these pairs.

    Raises:
        MorphSeekError: a result cannot be read or the folder not written.
        Cancelled: the job was.
    """
    done = [outcome for outcome in outcomes if outcome.state == "done"]
    if len(done) < 2 or len({outcome.figures.get("fixed") for outcome in done}) > 1:
        return ""
    mark = hashlib.sha256(to_json([[outcome.name, outcome.key] for outcome in done]).encode()).hexdigest()
    if _mark(folder / "template" / _DONE) == mark:
        return ""
    missing = [
        f"{outcome.name}/{name}"
        for outcome in done
        for name in ("warped.nii.gz", "jacobian.nii.gz", "folding.nii.gz")
        if not (folder / outcome.name / name).is_file()
    ]
    if missing:
        return (
            f"No maps of the template: {missing[0]} was not kept; for these maps keep warped, jacobian and folding of "
            "each pair."
        )
    _write(folder, [outcome.name for outcome in done], mark, job)
    return f"Wrote the maps of the template: {folder / 'template'}"


def _mark(path: Path) -> str:
    """Return of which pairs the maps are that are there."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["of"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _write(folder: Path, names: Sequence[str], mark: str, job: Job) -> None:
    """Read the results of each pair once, and write the maps."""
    grid: Grid | None = None
    linear = 0
    for number, name in enumerate(names):
        job.check()
        job.report("write", number / len(names), f"Maps of the template: pair {number + 1} of {len(names)}")
        warped = read_map(folder / name / "warped.nii.gz")
        if grid is None:
            grid = warped.grid
            image, deformable, whole = (_Moments(grid.shape) for _ in range(3))
        if warped.grid.shape != grid.shape:
            raise MorphSeekError(
                f"{folder / name} has another grid than the other pairs; remove its folder, run again."
            )
        image.add(warped.data.double().numpy())
        determinant = json.loads((folder / name / "report.json").read_text(encoding="utf-8")).get(
            "alignment_determinant"
        )
        jacobian = read_map(folder / name / "jacobian.nii.gz").data.double().numpy()
        if determinant is not None and determinant < 0:  # mirrored on purpose, which is no fold
            jacobian = -jacobian
        counts = (jacobian > 0) & (read_map(folder / name / "folding.nii.gz").data.numpy() == 0)
        log = np.log(np.where(counts, jacobian, 1.0))
        whole.add(log, counts)
        if determinant is not None:
            deformable.add(log - np.log(abs(determinant)), counts)
            linear += 1
    assert grid is not None  # there are names
    volumes = {
        "mean.nii.gz": image.mean,
        "log-jacobian-mean.nii.gz": deformable.mean,
        "log-jacobian-std.nii.gz": deformable.deviation(),
        "log-jacobian-whole-mean.nii.gz": whole.mean,
        "log-jacobian-whole-std.nii.gz": whole.deviation(),
    }
    folded = torch.from_numpy(len(names) - whole.count)
    about = {
        "of": mark,
        "pairs": len(names),
        "pairs_of_the_deformable_part": linear,
        "files": MAPS,
        "morphseek": __version__,
    }
    with output_folder(folder / "template", owns=[*MAPS, _DONE], seal=_DONE) as part:
        for name, values in volumes.items():
            write_image(Volume(torch.from_numpy(values.astype(np.float32)), grid), part / name)
        write_image(Volume(folded, grid), part / "folded.nii.gz")
        (part / _DONE).write_text(to_json(about, indent=1), encoding="utf-8")
