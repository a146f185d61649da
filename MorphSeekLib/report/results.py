"""What a registration leaves in a folder: images, transforms, report.json and report.html."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..io.files import output_folder
from ..io.images import read_map, write_image
from ..io.transforms import read_dense, write_transform
from ..networks.model_file import software
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.report import Report
from ..protocol.startup import refuse_overwriting, shown
from ..protocol.version import __version__
from ..registration.result import Registration
from ..space.geometry import DenseTransform, Volume
from .page import RegistrationPictures, TrustPicture, verdict_values, write_figures, write_report

FILES = {
    "warped.nii.gz": "the moving image on the fixed grid, one linear interpolation",
    "transform.h5": "ITK transform, fixed point to moving point, alignment included",
    "inverse.h5": "ITK transform, moving point to fixed point",
    "jacobian.nii.gz": "Jacobian determinant of the transform on the fixed grid, by central differences",
    "folding.nii.gz": "1 where a voxel meets a folded cell of the transform",
    "trust.nii.gz": "mm that the error is estimated to be below in four of five places; 0: nothing is said",
    "trust-colors.nii.gz": "1 likely near, 2 in between, 3 not to be relied on; 0: nothing is said",
    "warped-labels.nii.gz": "the moving labels on the fixed grid, nearest neighbor",
    "report.json": "every figure, with its definition",
    "report.html": "the report to look at",
}
ESTIMATED = ("trust.nii.gz", "trust-colors.nii.gz")
"""Those that an estimated error leaves, the first one where millimeters are known."""
EXPORTS = ("report", "transform", "jacobian")
_REPORT = ("report.html", "report.json")


def write_results(
    folder: Path | str,
    result: Registration,
    fixed: Volume,
    names: dict[str, str],
    job: Job = SILENT,
    keep: Collection[str] | None = None,
) -> Report:
    """Write all files of a registration; they appear together or not at all.

    Args:
        folder: where to; made when missing.
        result: from :func:`MorphSeekLib.registration.pipeline.register`.
        fixed: the fixed image, for the pictures.
        names: "fixed" and "moving": what the report calls the images.
        job: asked between files.
        keep: the files of :data:`FILES` to write; report.json always is; None for all.

    Returns:
        the report as written.

    Raises:
        MorphSeekError: one of the two is a file that a result would replace, the folder cannot be written or the disk
            is full.
    """
    begin = time.perf_counter()
    check_outputs(folder, names.values())
    report = result.report
    for side in ("fixed", "moving"):
        report[side] = {"path": names[side], **report[side]}
    images = {
        "warped.nii.gz": result.warped,
        "jacobian.nii.gz": result.jacobian,
        "folding.nii.gz": result.folding,
        "warped-labels.nii.gz": result.warped_labels,
    }
    trust = result.trust
    if trust is not None:
        images |= {"trust.nii.gz": trust.bound, "trust-colors.nii.gz": trust.colors}
    transforms = {"transform.h5": result.transform, "inverse.h5": result.inverse}
    wanted = set(FILES if keep is None else keep)
    with output_folder(folder, owns=earlier_files(folder), seal="report.json") as part:
        for name, image in images.items():
            if image is not None and name in wanted:
                write_image(image, part / name)
                job.check()
        for name, transform in transforms.items():
            if transform is not None and name in wanted:
                write_transform(transform, part / name)
                job.check()
        report["seconds"]["write"] = round(time.perf_counter() - begin, 3)
        report["seconds"]["total"] = round(sum(v for k, v in report["seconds"].items() if k != "total"), 3)
        report |= {"morphseek": __version__, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "software": software()}
        report["verdict"] = verdict_values(report)
        pages = _REPORT if "report.html" in wanted else ("report.json",)
        report["files"] = sorted({*(file.name for file in part.iterdir()), *pages})
        if "report.html" in wanted:
            write_report(
                part,
                report,
                RegistrationPictures(
                    fixed,
                    result.aligned,
                    result.warped,
                    result.jacobian,
                    result.folding,
                    result.transform,
                    None if trust is None else TrustPicture(trust.colors, trust.section),
                ),
            )
        else:
            write_figures(part, report)
    return report


@dataclass(frozen=True)
class Results:
    """What :func:`write_results` wrote, read back; None for what an option left out."""

    report: dict[str, Any]
    warped: Volume
    jacobian: Volume
    folding: Volume
    transform: DenseTransform
    inverse: DenseTransform | None = None
    warped_labels: Volume | None = None
    trust: Volume | None = None
    trust_colors: Volume | None = None


def read_results(folder: Path | str) -> Results:
    """Read the files of a registration.

    Raises:
        MorphSeekError: there is no registration, a file was not kept, or cannot be read.
    """
    folder = Path(folder)
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MorphSeekError(f"{shown(folder)} holds no registration: its report.json cannot be read.") from error
    needed = ("warped.nii.gz", "transform.h5", "jacobian.nii.gz", "folding.nii.gz")
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise MorphSeekError(
            f"{shown(folder)} has no {missing[0]}; keep warped, transform, jacobian and folding of each pair to look "
            "at it."
        )

    def map_if_there(name: str, dtype: torch.dtype) -> Volume | None:
        return read_map(folder / name, dtype) if (folder / name).is_file() else None

    return Results(
        report,
        read_map(folder / "warped.nii.gz"),
        read_map(folder / "jacobian.nii.gz"),
        read_map(folder / "folding.nii.gz", torch.uint8),
        read_dense(folder / "transform.h5"),
        read_dense(folder / "inverse.h5") if (folder / "inverse.h5").is_file() else None,
        map_if_there("warped-labels.nii.gz", torch.int32),
        map_if_there("trust.nii.gz", torch.float32) if "trust" in report else None,
        map_if_there("trust-colors.nii.gz", torch.uint8) if "trust" in report else None,
    )


def export_results(
    folder: Path | str,
    wanted: Collection[str],
    pictures: RegistrationPictures,
    inverse: DenseTransform | None,
    report: Report,
    job: Job = SILENT,
) -> list[str]:
    """Write some files of a registration that was done before, as :func:`write_results` would have; all or nothing.

    Args:
        folder: where to; made when missing.
        wanted: some of :data:`EXPORTS`.
        pictures: the volumes and the transform.
        inverse: the inverse transform, written beside the transform, or None.
        report: the figures, as :func:`write_results` returns them.
        job: told of every file, and asked before it.

    Returns:
        the names of the files.

    Raises:
        MorphSeekError: unknown or nothing wanted, or the folder cannot be written.
    """
    unknown = sorted(set(wanted) - set(EXPORTS))
    if unknown or not wanted:
        named = f"'{', '.join(unknown)}' cannot be exported" if unknown else "Nothing was chosen to be exported"
        raise MorphSeekError(f"{named}; choose from {', '.join(EXPORTS)}.")
    with output_folder(folder, seal="report.json") as part:
        if "transform" in wanted:
            job.report("write", 0.1, "Writing the transform")
            write_transform(pictures.transform, part / "transform.h5")
            if inverse is not None:
                write_transform(inverse, part / "inverse.h5")
        if "jacobian" in wanted:
            job.report("write", 0.3, "Writing the Jacobian")
            write_image(pictures.jacobian, part / "jacobian.nii.gz")
            write_image(pictures.folding, part / "folding.nii.gz")
        if "report" in wanted:
            job.report("write", 0.6, "Drawing the report")
            written = {*(file.name for file in part.iterdir()), *_REPORT}
            files = sorted(written | earlier_files(folder))
            write_report(part, {**report, "files": files, "verdict": verdict_values(report)}, pictures)
        job.report("write", 0.95, "Moving the files to their place")
        return sorted(path.name for path in part.iterdir())


def earlier_files(folder: Path | str) -> set[str]:
    """Return the files in a folder that an earlier registration wrote there, as its report.json lists them."""
    try:
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        listed = set(report["files"]) if "morphseek" in report else set()
    except (OSError, ValueError, LookupError, TypeError):
        return set()
    return {name for name in FILES if name in listed and (Path(folder) / name).is_file()}


def check_outputs(folder: Path | str, inputs: Iterable[Path | str | None]) -> None:
    """Refuse an output folder in which a result would take the place of something that is read.

    Raises:
        MorphSeekError: one of the inputs (None and missing ones are passed over) has the name of a result there.
    """
    refuse_overwriting((Path(folder) / name for name in FILES), inputs)
