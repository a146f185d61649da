"""Pairs from a BIDS data set, and their results named as BIDS derivatives (https://bids.neuroimaging.io)."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..io.files import write_atomically
from ..protocol.batch import IMAGE_ENDING
from ..protocol.errors import MorphSeekError
from ..protocol.settings import to_json
from ..protocol.startup import check_readable
from ..protocol.version import __version__

NAMES = {
    "warped.nii.gz": "{entities}_space-{space}_desc-warped_{suffix}.nii.gz",
    "warped-labels.nii.gz": "{entities}_space-{space}_desc-warped_dseg.nii.gz",
    "folding.nii.gz": "{entities}_space-{space}_desc-folding_mask.nii.gz",
    "jacobian.nii.gz": "{entities}_space-{space}_desc-jacobian_{suffix}.nii.gz",
    "trust.nii.gz": "{entities}_space-{space}_desc-errorbound_{suffix}.nii.gz",
    "trust-colors.nii.gz": "{entities}_space-{space}_desc-trust_dseg.nii.gz",
    "transform.h5": "{entities}_from-{space}_to-{suffix}_mode-points_xfm.h5",
    "inverse.h5": "{entities}_from-{suffix}_to-{space}_mode-points_xfm.h5",
    "report.json": "{entities}_space-{space}_desc-report_{suffix}.json",
    "report.html": "{entities}_space-{space}_desc-report_{suffix}.html",
}
"""Result -> its name as a derivative."""


def bids_rows(
    root: Path,
    suffix: str,
    fixed: Path | None = None,
    subjects: Collection[str] = (),
    sessions: Collection[str] = (),
) -> list[dict[str, str]]:
    """Return the pairs of a BIDS data set, read with ancpbids; its derivatives are left aside.

    Args:
        root: its folder.
        suffix: such as T1w.
        fixed: what all images are registered to; None: the later sessions of a subject to its first.
        subjects, sessions: only these (without sub- and ses-); empty for all.

    Raises:
        MorphSeekError: ancpbids is not installed, or no pair was found.
    """
    check_readable(root)
    try:
        from ancpbids import BIDSLayout
    except ImportError as error:
        raise MorphSeekError("BIDS data sets need ancpbids: pip install 'morphseek[bids]'.") from error
    wanted: dict[str, Any] = {"scope": "raw", "suffix": suffix, "extension": [".nii", ".nii.gz"]}
    wanted |= {name: list(values) for name, values in (("sub", subjects), ("ses", sessions)) if values}
    found = BIDSLayout(str(root.resolve())).get(**wanted, return_type="filename")
    images: dict[str, list[Path]] = {}
    for path in sorted(Path(str(path)) for path in found):
        images.setdefault(_entities(path).get("sub", ""), []).append(path)
    rows = []
    for own in images.values():
        first = fixed or own[0]
        for path in own if fixed else own[1:]:
            if fixed is None and _entities(path).get("ses") == _entities(first).get("ses"):
                continue  # another run of the first session
            rows.append({"fixed": str(first), "moving": str(path), "name": IMAGE_ENDING.sub("", path.name)})
    if not rows:
        words = "with a second session" if fixed is None else "that matches"
        raise MorphSeekError(f"{root} holds no image sub-*_{suffix}.nii.gz {words}; check --suffix and the filters.")
    return rows


def _entities(path: Path) -> dict[str, str]:
    """Return the entities of a BIDS name, such as {"sub": "01", "ses": "a"}."""
    from ancpbids.utils import parse_bids_name

    found: dict[str, str] = (parse_bids_name(path.name) or {}).get("entities", {})
    return found


def name_derivatives(folder: Path, root: Path, pairs: Mapping[str, Mapping[str, str]]) -> None:
    """Give the results of pairs their names as BIDS derivatives, in folder/derivatives.

    They are other names of the same files (hard links) where the file system has such, else copies.

    Args:
        folder: of the batch, with the results of each pair in folder/NAME.
        root: the BIDS data set.
        pairs: name -> the paths of its "fixed" and "moving" image.

    Raises:
        MorphSeekError: the folder cannot be written.
    """
    derivatives, root = folder / "derivatives", root.resolve()
    about: dict[str, Any] = {
        "Name": "MorphSeek registrations",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "MorphSeek", "Version": __version__}],
        "SourceDatasets": [{"URL": root.as_uri()}],
        "DatasetLinks": {"raw": root.as_uri()},
    }
    _replace(derivatives / "dataset_description.json", about)
    for name, files in pairs.items():
        fixed, moving = (Path(files[side]).resolve() for side in ("fixed", "moving"))
        entities, _, suffix = IMAGE_ENDING.sub("", moving.name).rpartition("_")
        words = {"entities": entities, "suffix": suffix, "space": _space(fixed)}
        place = derivatives / moving.parent.relative_to(root)
        for result, pattern in NAMES.items():
            other = place / pattern.format(**words)
            if (folder / name / result).is_file():
                _link(folder / name / result, other)
        if (folder / name / "warped.nii.gz").is_file():
            sources = {"Sources": [f"bids:raw:{moving.relative_to(root).as_posix()}"], "SpatialReference": str(fixed)}
            _replace(place / (IMAGE_ENDING.sub("", NAMES["warped.nii.gz"]).format(**words) + ".json"), sources)


def _space(fixed: Path) -> str:
    """Return the label of the space of a fixed image: its template or session, else the letters and digits of its
    name."""
    entities = _entities(fixed)
    if "sub" in entities and "ses" in entities:
        return f"ses{entities['ses']}"
    return entities.get("tpl") or re.sub("[^A-Za-z0-9]", "", IMAGE_ENDING.sub("", fixed.name))


def _link(path: Path, other: Path) -> None:
    """Give a file another name, in place of what had that name."""
    try:
        if other.exists() and other.samefile(path):
            return
        other.parent.mkdir(parents=True, exist_ok=True)
        other.unlink(missing_ok=True)
        try:
            os.link(path, other)
        except OSError:  # a file system without hard links
            shutil.copy2(path, other)
    except OSError as error:
        raise MorphSeekError(f"{other} cannot be written ({error.strerror}); free some space.") from error


def _replace(path: Path, values: dict[str, Any]) -> None:
    """Write JSON where it is not there yet."""
    text = to_json(values, indent=1)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text.encode())
