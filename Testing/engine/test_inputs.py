"""The command line with files as the world has them: two places in one header, CT, NaN, inputs among the outputs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from cases import blob_grid, blob_image, blob_labels
from test_cli import registering, run
from test_images import edit
from test_nifti import LPS, turned
from test_registration import random_model

from MorphSeekLib.io.images import read_image, read_labels, write_image
from MorphSeekLib.report.results import ESTIMATED, FILES, earlier_files
from MorphSeekLib.space.geometry import Volume


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a model, two labeled images of 16-bit integers in air of -1024, and an initial transform."""
    folder = tmp_path_factory.mktemp("files")
    random_model(folder / "model.safetensors")
    for seed, name in enumerate(("fixed", "moving")):
        labels = blob_labels(seed, blob_grid())
        image = blob_image(labels, seed)
        scaled = 1000 * image.data / image.data.max()
        scaled = torch.where(image.data > 0.1 * image.data.max(), scaled, -1024).round()
        write_image(dataclasses.replace(image, data=scaled, dtype="int16"), folder / f"{name}.nii.gz")
        write_image(labels, folder / f"{name}-labels.nii.gz")
    sitk.WriteTransform(sitk.TranslationTransform(3, (30.0, 0.0, 0.0)), str(folder / "initial.tfm"))
    return folder


@pytest.fixture
def files(made, tmp_path) -> Path:
    """The same, to change."""
    return Path(shutil.copytree(made, tmp_path / "files"))


def stored(path: Path) -> sitk.Image:
    return sitk.ReadImage(str(path))


def test_the_warped_image_has_the_type_and_the_air_of_the_moving_one(files, tmp_path):
    """Half of the fixed grid lies outside of the moving image."""
    out = tmp_path / "out"
    run(*registering(files, out, initial_transform=files / "initial.tfm"))
    report = json.loads((out / "report.json").read_text())
    assert report["warped"]["type"] == "int16"
    assert report["warped"]["outside"] == -1024
    warped, moving = stored(out / "warped.nii.gz"), stored(files / "moving.nii.gz")
    assert warped.GetPixelID() == moving.GetPixelID() == sitk.sitkInt16
    transform = sitk.ReadTransform(str(out / "transform.h5"))
    expected = sitk.Resample(sitk.Cast(moving, sitk.sitkFloat32), warped, transform, sitk.sitkLinear, -1024.0)
    difference = np.abs(sitk.GetArrayFromImage(expected) - sitk.GetArrayFromImage(warped))
    assert np.percentile(difference, 99) <= 1.0, "rounded"
    assert (sitk.GetArrayFromImage(warped) == -1024).mean() > 0.3


def test_a_float_image_is_written_when_it_is_asked_for(files, tmp_path):
    out = tmp_path / "out"
    run(*registering(files, out), "--float")
    assert stored(out / "warped.nii.gz").GetPixelID() == sitk.sitkFloat32
    assert json.loads((out / "report.json").read_text())["warped"]["type"] == "float32"


def disagree(path: Path, codes: tuple[int, int] = (1, 2)) -> np.ndarray:
    """Turn the sform of a file 3 degrees and 2 mm away; returns it, LPS."""
    sform = turned(3, 2) @ read_image(path).grid.affine

    def change(data: bytearray) -> None:
        struct.pack_into("<2h", data, 252, *codes)
        struct.pack_into("<12f", data, 280, *(LPS @ sform)[:3].ravel())

    edit(path, change)
    return sform


@pytest.mark.parametrize("form", [None, "qform", "sform"])
def test_two_places_are_said_in_the_report_and_on_the_terminal(files, tmp_path, form):
    sform = disagree(files / "fixed.nii.gz")
    disagree(files / "fixed-labels.nii.gz")
    qform = read_image(files / "fixed.nii.gz", "qform").grid.affine
    labels = {f"{side}_labels": files / f"{side}-labels.nii.gz" for side in ("fixed", "moving")}
    choice = {} if form is None else {"nifti_form": form}
    output = run(*registering(files, tmp_path / "out", **labels, **choice))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    said = [warning["message"] for warning in report["warnings"] if warning["code"] == "nifti-forms"]
    assert [Path(text.split(" states")[0]).name for text in said] == ["fixed.nii.gz", "fixed-labels.nii.gz"]
    assert "3.0 degrees apart" in said[0]
    assert ("load warped.nii.gz instead" in said[0]) == (form == "sform")
    assert "3.0 degrees apart" in " ".join(output.split())
    assert "3.0 degrees apart" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for name in ("warped", "jacobian", "folding"):
        written = nibabel.load(tmp_path / "out" / f"{name}.nii.gz").header
        assert (int(written["qform_code"]), int(written["sform_code"])) == (1, 2)
        place = sform if form == "sform" else qform
        np.testing.assert_allclose(LPS @ written.get_qform(), place, atol=1e-4)
        np.testing.assert_allclose(LPS @ written.get_sform(), place, atol=1e-4)
    assert not any(warning["code"] == "labels-grid" for warning in report["warnings"]), "the labels went along"


def test_nan_outside_the_field_of_view_registers_with_a_notice(files, tmp_path):
    moving = read_image(files / "moving.nii.gz")
    moving.data[:3] = float("nan")
    write_image(Volume(moving.data, moving.grid), files / "moving.nii.gz")
    run(*registering(files, tmp_path / "out"))
    (warning,) = json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]
    assert warning["code"] == "nan"
    assert f"{3 * moving.grid.shape[1] * moving.grid.shape[2]} voxels" in warning["message"]
    assert np.isfinite(sitk.GetArrayFromImage(stored(tmp_path / "out" / "warped.nii.gz"))).all()


@pytest.mark.parametrize("value", [-7, 2**31])
def test_labels_that_do_not_fit_are_refused_before_the_work(files, tmp_path, value):
    array = sitk.GetArrayFromImage(stored(files / "moving-labels.nii.gz")).astype(np.float64)
    array[array == 2] = value
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(stored(files / "moving-labels.nii.gz"))
    sitk.WriteImage(image, str(files / "moving-labels.nii.gz"))
    output = run(*registering(files, tmp_path / "out", moving_labels=files / "moving-labels.nii.gz"), code=2)
    assert f"moving-labels.nii.gz has the label {value}" in " ".join(output.split())
    assert not (tmp_path / "out").exists()


def test_negative_labels_are_a_problem_for_check_as_well(files, tmp_path):
    for folder, name in (("images", "moving.nii.gz"), ("labels", "moving-labels.nii.gz")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        shutil.copy(files / name, tmp_path / "data" / folder / "moving.nii.gz")
    labels = read_labels(files / "moving-labels.nii.gz")
    write_image(Volume(-labels.data, labels.grid), tmp_path / "data" / "labels" / "moving.nii.gz")
    out = tmp_path / "check.json"
    run("check", tmp_path / "data", "--out", out, code=2)
    (case,) = json.loads(out.read_text())["cases"]
    assert "must not be negative" in case["problems"][0]


@pytest.mark.parametrize("role", ["fixed", "moving", "fixed_labels", "moving_labels", "initial_transform"])
def test_an_input_is_not_overwritten_by_a_result(files, tmp_path, role):
    out = tmp_path / "out"
    out.mkdir()
    inputs = {f"{side}_labels": files / f"{side}-labels.nii.gz" for side in ("fixed", "moving")}
    inputs |= {"fixed": files / "fixed.nii.gz", "moving": files / "moving.nii.gz"}
    inputs |= {"initial_transform": files / "initial.tfm"}
    name = {"fixed_labels": "warped-labels.nii.gz", "initial_transform": "transform.h5"}.get(role, "warped.nii.gz")
    if role == "initial_transform":
        sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, 0.0, 0.0)), str(out / name))
    else:
        shutil.copy(inputs[role], out / name)
    before = (out / name).read_bytes()
    output = run(*registering(files, out, **inputs | {role: out / name}), code=2)
    assert f"{name} is an input and would be overwritten" in " ".join(output.split()).replace("- ", "-")
    assert (out / name).read_bytes() == before
    assert os.listdir(out) == [name]


def test_only_what_an_earlier_report_lists_is_removed(files, tmp_path):
    out, usual = tmp_path / "out", set(FILES) - set(ESTIMATED)
    out.mkdir()
    (out / "warped-labels.nii.gz").write_text("of somebody else")
    (out / "report.json").write_text(json.dumps({"files": ["warped-labels.nii.gz"]}))  # nor is this report ours
    run(*registering(files, out))
    assert (out / "warped-labels.nii.gz").read_text() == "of somebody else"
    report = json.loads((out / "report.json").read_text())
    assert set(report["files"]) == usual - {"warped-labels.nii.gz"}

    other = tmp_path / "other"
    run(*registering(files, other, moving_labels=files / "moving-labels.nii.gz"))
    assert earlier_files(other) == usual
    run(*registering(files, other), "--no-inverse")
    assert {path.name for path in other.iterdir()} == usual - {"warped-labels.nii.gz", "inverse.h5"}


def test_a_report_that_lists_files_elsewhere_removes_none(tmp_path):
    (tmp_path / "mine.txt").touch()
    (tmp_path / "out").mkdir()
    listed = ["../mine.txt", "other.txt", "warped.nii.gz", 3]
    (tmp_path / "out" / "report.json").write_text(json.dumps({"morphseek": "1", "files": listed}))
    (tmp_path / "out" / "other.txt").touch()
    (tmp_path / "out" / "warped.nii.gz").touch()
    assert earlier_files(tmp_path / "out") == {"warped.nii.gz"}


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="needs file names that are bytes")
def test_a_name_that_is_not_utf8_is_refused_in_a_sentence(files, tmp_path):
    bad = files / os.fsdecode(b"caf\xe9.nii.gz")
    shutil.copy(files / "moving.nii.gz", bad)
    output = run(*registering(files, tmp_path / "out", moving=bad), code=2)
    assert "is not valid UTF-8" in " ".join(output.split())
    output = run(*registering(files, tmp_path / os.fsdecode(b"out\xe9")), code=2)
    assert "is not valid UTF-8" in " ".join(output.split())
    assert os.listdir(tmp_path) == ["files"]


def test_a_name_that_the_locale_cannot_print_registers(files, tmp_path):
    """In the C locale, as in many containers and batch jobs."""
    moving = files / "caf\u00e9.nii.gz"
    shutil.copy(files / "moving.nii.gz", moving)
    command = [sys.executable, "-m", "MorphSeekLib.app.cli", *registering(files, tmp_path / "\u00e9", moving=moving)]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([os.fsencode(str(c)) for c in command], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "\u00e9" / "report.json").read_text(encoding="utf-8"))
    assert report["moving"]["path"] == str(moving)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["evaluate", "DATA", "--model", "MODEL", "--out", "DATA"], "dataset.json is an input"),
        (["evaluate", "DATA", "--model", "MODEL", "--out", "MODEL"], "model.safetensors is an input"),
        (["check", "DATA", "--out", "DATA"], "dataset.json is an input"),
        (["warmup", "DATA", "--init", "MODEL", "--out", "MODEL"], "model.safetensors is an input"),
        (["finetune", "DATA", "--init", "MODEL", "--out", "MODEL"], "model.safetensors is an input"),
        (["import-checkpoint", "MODEL", "--architecture", "vxm-2", "--out", "MODEL"], "model.safetensors is an input"),
    ],
)
def test_no_command_writes_over_what_it_reads(files, tmp_path, command, words):
    data = files / "dataset.json"
    data.write_text(json.dumps({"name": "x", "training": [{"image": "fixed.nii.gz"}]}))
    before = data.read_bytes(), (files / "model.safetensors").read_bytes()
    paths = {"DATA": data, "MODEL": files / "model.safetensors"}
    assert words in " ".join(run(*(paths.get(word, word) for word in command), code=2).split())
    assert (data.read_bytes(), (files / "model.safetensors").read_bytes()) == before


def test_upper_case_endings_are_cases(files, tmp_path):
    for folder, source in (("images", "fixed.nii.gz"), ("labels", "fixed-labels.nii.gz")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        shutil.copy(files / source, tmp_path / "data" / folder / "CASE.NII.GZ")
    out = tmp_path / "check.json"
    run("check", tmp_path / "data", "--out", out, code=2)
    (case,) = json.loads(out.read_text())["cases"]
    assert case["name"] == "images/CASE.NII.GZ"
    assert case["problems"] == []
    assert case["labels"] == [1, 2, 3]


def test_a_sheared_image_registers_on_its_right_angled_grid_when_asked_to(files, tmp_path):
    sheared = np.array([[2, 0.4, 0, 0], [0, 2, 0, 0], [0, 0, 2.5, 0], [0, 0, 0, 1.0]])
    volume = read_image(files / "moving.nii.gz")
    sheared[:3, 3] = volume.grid.origin
    two_forms_of(files / "moving.nii.gz", sheared)
    assert "--nifti-form sform" in " ".join(run(*registering(files, tmp_path / "out"), code=2).split())
    run(*registering(files, tmp_path / "out", nifti_form="sform", align="center"))
    codes = [w["code"] for w in json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]]
    assert codes[:2] == ["nifti-forms", "resampled-shear"]


def two_forms_of(path: Path, sform: np.ndarray) -> None:
    """Leave a file with this sform (LPS) alone."""

    def change(data: bytearray) -> None:
        struct.pack_into("<2h", data, 252, 0, 1)
        struct.pack_into("<12f", data, 280, *(LPS @ sform)[:3].ravel())

    edit(path, change)
