"""Register the files of one pair and write the results: what `morphseek register` does, and a batch for each row."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ..io.images import check_labels, read_image, read_labels
from ..io.points import PointPairs, pair_points, read_points
from ..io.transforms import read_transform
from ..networks.devices import pick_device
from ..networks.loading import LoadedModel, load_model
from ..protocol.batch import input_paths
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.report import Report
from ..protocol.settings_file import RegistrationSettings
from ..protocol.startup import shown, transform_paths
from ..registration.choice import chosen_model
from ..registration.landmarks import measure_landmarks
from ..registration.masks import masked
from ..registration.pipeline import register
from ..registration.result import Registration
from ..report.results import check_outputs, write_results
from ..space.geometry import Volume, covering_grid


class PairFiles:
    """Read the files of a pair.

    Args:
        files: by their names in :data:`MorphSeekLib.protocol.batch.FILES`.
        nifti_form: which form places NIfTI files that have both.
        as_float: warp the moving image to float; to its own type by default.
    """

    def __init__(self, files: Mapping[str, str], nifti_form: str | None = None, as_float: bool = False) -> None:
        self._files = {name: Path(path) for name, path in files.items()}
        self._form, self._as_float = nifti_form, as_float
        self.starts = transform_paths(files.get("initial_transform"))
        self.names = {"fixed": shown(files["fixed"]), "moving": shown(files["moving"])}
        self.inputs = input_paths(files)

    def images(self) -> tuple[Volume, Volume]:
        """Return the fixed and the moving image."""
        fixed, moving = (read_image(self._files[name], self._form) for name in ("fixed", "moving"))
        if self._as_float:
            moving.dtype = "float32"
        return fixed, moving

    def labels(self, images: tuple[Volume, Volume]) -> tuple[Volume | None, Volume | None]:
        """Return the label maps; None where none was given."""
        return self._labels("fixed_labels", images[0]), self._labels("moving_labels", images[1])

    def _labels(self, name: str, image: Volume) -> Volume | None:
        path = self._files.get(name)
        return None if path is None else check_labels(read_labels(path, self._form), image, path.name)

    def landmarks(self, images: tuple[Volume, Volume]) -> PointPairs | None:
        """Return the landmarks of both images, where they were given.

        Raises:
            MorphSeekError: they cannot be read or paired, or only one image has some.
        """
        paths = [self._files.get(name) for name in ("fixed_landmarks", "moving_landmarks")]
        if paths == [None, None]:
            return None
        if paths[0] is None or paths[1] is None:
            raise MorphSeekError("Landmarks come in pairs: give both --fixed-landmarks and --moving-landmarks.")
        fixed, moving = read_points(paths[0], images[0].grid), read_points(paths[1], images[1].grid)
        return pair_points(fixed, moving, (shown(paths[0]), shown(paths[1])))

    def masked(self, images: tuple[Volume, Volume]) -> tuple[Volume, Volume]:
        """Return the images with what counts of them and what does not."""
        return (
            masked(images[0], self._mask("fixed_mask"), self._mask("ignore"), "fixed"),
            masked(images[1], self._mask("moving_mask"), self._mask("ignore_moving"), "moving"),
        )

    def _mask(self, name: str) -> Volume | None:
        path = self._files.get(name)
        return None if path is None else read_labels(path, self._form)


@dataclass(frozen=True)
class Around:
    """What surrounds a registration.

    Attributes:
        load: gives a model for a name and a device.
        turn: a context in which the device computes, while files are read and written outside of it.
        tell: takes the sentence that says which model was chosen and why.
    """

    load: Callable[[str, str], LoadedModel] = load_model
    turn: Callable[[torch.device], AbstractContextManager[object]] = nullcontext
    tell: Callable[[str], object] = lambda words: None


ALONE = Around()
"""A registration that shares neither model nor device."""


def register_files(
    pair: PairFiles,
    settings: RegistrationSettings,
    output: Path,
    device: str = "auto",
    job: Job = SILENT,
    keep: Collection[str] | None = None,
    around: Around = ALONE,
) -> tuple[Report, Registration, Volume]:
    """Register a pair of files and write its results.

    Args:
        pair: the files.
        settings: the model and the options.
        output: the folder to write to.
        device: auto, cpu or cuda:N.
        job: told how far it is.
        keep: names of files to write; None for all.
        around: where the model comes from, and who else computes.

    Returns:
        the report, the registration, and the fixed image.

    Raises:
        MorphSeekError: a file that cannot be read, or what :func:`MorphSeekLib.register` refuses.
        Cancelled: the job was cancelled.
    """
    begin = time.perf_counter()
    pick_device(device)
    check_outputs(output, pair.inputs)
    job.report("read", 0.0, "Reading the images")
    images = pair.images()
    labels, landmarks = pair.labels(images), pair.landmarks(images)
    images = pair.masked(images)
    start = read_transform(pair.starts, covering_grid(images[0].grid)) if pair.starts else None
    read = time.perf_counter()
    job.report("load", 0.01, "Loading the model")
    model, where, words = chosen_model(settings.model, images, device, job, around.load)
    around.tell(words)
    loaded = time.perf_counter()
    progress = job.part(0.01, 0.95)
    with around.turn(where):
        result = register(*images, model, settings.options, progress, labels=labels, start=start, device=where)
    if landmarks is not None:
        measure_landmarks(result, landmarks, images[1].grid)
    result.report["seconds"] |= {"read": round(read - begin, 3), "load": round(loaded - read, 3)}
    job.report("write", 0.95, "Writing the results")
    report = write_results(output, result, images[0], pair.names, job, keep)
    return report, result, images[0]
