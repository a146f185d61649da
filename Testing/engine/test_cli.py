"""The command line as a person types it: real processes, real files, exit codes, and what is left on disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from cases import blob_grid, blob_image, blob_labels, write_dataset
from test_registration import random_model
from typer.testing import CliRunner

from MorphSeekLib.app.cli import LogLines, app
from MorphSeekLib.io.images import write_image
from MorphSeekLib.networks.model_file import sha256
from MorphSeekLib.protocol.job import Event, Job
from MorphSeekLib.report.results import ESTIMATED, FILES
from MorphSeekLib.space.geometry import Grid, Volume


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a model, two labeled images and a data set."""
    folder = tmp_path_factory.mktemp("files")
    random_model(folder / "model.safetensors")
    for seed, name in enumerate(("fixed", "moving")):
        labels = blob_labels(seed, blob_grid())
        write_image(blob_image(labels, seed), folder / f"{name}.nii.gz")
        write_image(labels, folder / f"{name}-labels.nii.gz")
    write_dataset(folder / "data", 2)
    return folder


def run(*arguments: object, code: int = 0) -> str:
    """In this process: much faster, and the same code but for the interpreter's start."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def registering(files: Path, out: Path, **changes: object) -> list:
    options = {"fixed": files / "fixed.nii.gz", "moving": files / "moving.nii.gz", "model": files / "model.safetensors"}
    options |= changes
    fixed, moving = options.pop("fixed"), options.pop("moving")
    more = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    return ["register", fixed, moving, "-o", out, *more]


def test_register_as_a_process(files, tmp_path):
    """With labels: all files, figures on the terminal, progress on stderr."""
    labels = {f"{side}_labels": files / f"{side}-labels.nii.gz" for side in ("fixed", "moving")}
    command = [sys.executable, "-m", "MorphSeekLib.app.cli", *registering(files, tmp_path / "out", **labels)]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(FILES) - set(ESTIMATED)
    assert "Folded cells" in done.stdout
    assert "report.html" in done.stdout
    assert "Step 1 of 2" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["fixed"]["path"].endswith("fixed.nii.gz")
    phases = {
        "read",
        "load",
        "align",
        "prepare",
        "network",
        "fit",
        "unfold",
        "resample",
        "metrics",
        "inverse",
        "write",
        "total",
    }
    assert set(report["seconds"]) == phases
    assert report["dice"]["mean"]["warped"] > 0


def test_a_log_file_gets_a_line_for_each_stage_and_few_for_what_is_counted():
    lines: list[str] = []
    job = Job(LogLines(lines.append, seconds=1000).tell)
    job.report("metrics", 0.4, "Measuring folding")
    job.report("metrics", 0.5, "Inverting the transform")
    for step in range(1, 101):
        job.report("fit", step / 100, f"Fitting this pair, iteration {step} of 100", step, 100)
    assert lines == ["Measuring folding", "Inverting the transform", "Fitting this pair, iteration 1 of 100"]


def test_a_log_file_gets_every_validation_of_a_training():
    lines: list[str] = []
    log = LogLines(lines.append, seconds=1000)
    for step in range(1, 21):
        log.tell(Event("train", 0.0, f"Iteration {step}", step, 20, {"validation/dice": 0.5} if step == 20 else {}))
    assert lines == ["Iteration 1", "Iteration 20: validation/dice 0.5"]


def test_masks_are_told_beside_the_whole_grid(files, tmp_path):
    mask = files / "fixed-labels.nii.gz"
    printed = run(*registering(files, tmp_path / "out", fixed_mask=mask), "--no-inverse")
    inside = int((sitk.GetArrayFromImage(sitk.ReadImage(str(mask))) != 0).sum())
    folding = json.loads((tmp_path / "out" / "report.json").read_text())["folding"]
    folded = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "folding.nii.gz")))
    assert folding["region_voxels"] == folded.sum()
    assert folding["inside"]["voxels"] == inside
    words = " ".join(re.findall(r"[\w,.%/:]+", printed))  # without the table's lines, which may break
    assert f"of {inside:,} /" in words
    assert f"{inside:,} / all" in words


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_other_formats(files, tmp_path, suffix):
    image = sitk.ReadImage(str(files / "fixed.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / f"fixed{suffix}"))
    run(*registering(files, tmp_path / "out", fixed=tmp_path / f"fixed{suffix}"), "--no-inverse")
    assert not (tmp_path / "out" / "inverse.h5").exists()


def test_initial_transform_file(files, tmp_path):
    shift = sitk.TranslationTransform(3, (30.0, 0.0, 0.0))
    sitk.WriteTransform(shift, str(tmp_path / "shift.tfm"))
    run(*registering(files, tmp_path / "out", initial_transform=tmp_path / "shift.tfm", search="off"))
    transform = sitk.ReadTransform(str(tmp_path / "out" / "transform.h5"))
    assert transform.TransformPoint((0.0, 0.0, 0.0))[0] == pytest.approx(30, abs=8)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["align"] == "none"


def test_a_chain_of_initial_transforms_is_applied_in_its_order(files, tmp_path):
    shift = sitk.TranslationTransform(3, (15.0, 0.0, 0.0))
    double = sitk.AffineTransform([2.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0], [0.0, 0.0, 0.0])
    half = sitk.AffineTransform([0.5, 0, 0, 0, 1.0, 0, 0, 0, 1.0], [0.0, 0.0, 0.0])
    for name, transform in (("half", half), ("shift", shift), ("double", double)):
        sitk.WriteTransform(transform, str(tmp_path / f"{name}.tfm"))
    chain = ",".join(str(tmp_path / f"{name}.tfm") for name in ("half", "shift", "double"))
    run(*registering(files, tmp_path / "out", initial_transform=chain, search="off"), "--steps", "1")
    transform = sitk.ReadTransform(str(tmp_path / "out" / "transform.h5"))
    assert transform.TransformPoint((0.0, 0.0, 0.0))[0] == pytest.approx(30, abs=8)  # 7.5 in the other order


def test_info_prints_the_card_as_json_for_programs(files):
    assert json.loads(run("info", files / "model.safetensors", "--json"))["title"] == "random"


def test_info_prints_a_table_that_a_person_reads(files):
    printed = run("info", files / "model.safetensors")
    for row in ("Title .* random", "Working grid .* RAS, 3 x 3 x 3 mm", "Alignment .* none", "Steps .* 2"):
        assert re.search(row, printed), row
    assert f"SHA-256 of the file: {sha256(files / 'model.safetensors')}" in printed
    assert "{" not in printed


def test_evaluate(files, tmp_path):
    run(
        "evaluate",
        files / "data" / "dataset.json",
        "--model",
        files / "model.safetensors",
        "--out",
        tmp_path / "e.json",
    )
    figures = json.loads((tmp_path / "e.json").read_text())
    assert len(figures["pairs"]) == 2
    for name in ("dice", "dice_before", "dice_aligned", "hd95", "njd_percent", "sdlogj", "seconds"):
        assert figures["mean"][name] == pytest.approx(np.mean([row[name] for row in figures["pairs"]]))
    assert set(figures["pairs"][0]["dice_per_label"]) == {"shell", "core", "ball"}
    assert {"dice", "hd95", "njd_percent"} <= set(figures["definitions"])


def test_evaluate_runs_on_the_hippocampus_data(files, shared, tmp_path):
    """Two real pairs of ../shared, with any model."""
    source = shared / "data" / "hippocampus" / "dataset.json"
    if not source.is_file():
        pytest.skip("needs ../shared/data/hippocampus, which is not here")
    values = json.loads(source.read_text())
    values["registration_test"] = values["registration_test"][:2]
    for name in ("images", "labels"):
        os.symlink(source.parent / name, tmp_path / name)
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    run("evaluate", tmp_path / "dataset.json", "--model", files / "model.safetensors", "--out", tmp_path / "e.json")
    assert len(json.loads((tmp_path / "e.json").read_text())["pairs"]) == 2


def test_warmup(files, tmp_path):
    settings = """
    [model.backbone_settings]
    encoder = [4, 4]
    decoder = [4]
    extra = [4]
    flow_stride = 2
    [preprocessing]
    spacing = [4, 4, 4]
    [training]
    iterations = 2
    """
    (tmp_path / "settings.toml").write_text(settings)
    options = ["--config", tmp_path / "settings.toml", "--backbone", "voxelmorph", "--out", tmp_path / "m.safetensors"]
    run("warmup", files / "data" / "dataset.json", *options, "--iterations", "1")
    assert len((tmp_path / "m.safetensors.jsonl").read_text().splitlines()) == 1
    assert json.loads(run("info", tmp_path / "m.safetensors", "--json"))["provenance"]["cases"] == 2


# ------------------------------------------------------------------ bad input: a sentence, exit code 2, nothing written


def image(path: Path, data: np.ndarray, **header) -> Path:
    made = sitk.GetImageFromArray(data, **header)
    sitk.WriteImage(made, str(path))
    return path


def four_dimensional(folder: Path) -> dict:
    return {"fixed": image(folder / "bad.nii.gz", np.random.rand(3, 6, 6, 6).astype("f"), isVector=False)}


def vector(folder: Path) -> dict:
    return {"fixed": image(folder / "bad.nrrd", np.random.rand(6, 6, 6, 3).astype("f"), isVector=True)}


def constant(folder: Path) -> dict:
    return {"moving": image(folder / "bad.nii.gz", np.full((6, 6, 6), 4, "f"))}


def infinite(folder: Path) -> dict:
    data = np.random.rand(6, 6, 6).astype("f")
    data[2, 2, 2] = np.inf
    return {"moving": image(folder / "bad.nrrd", data)}


def one_voxel(folder: Path) -> dict:
    return {"fixed": image(folder / "bad.nii.gz", np.random.rand(1, 6, 6).astype("f"))}


def header(folder: Path, line: str) -> dict:
    """An .mha whose header is edited by hand, as a broken exporter would."""
    image(folder / "bad.mha", np.random.rand(6, 6, 6).astype("f"))
    content = (folder / "bad.mha").read_bytes()
    key = line.split(" = ")[0].encode()
    rows = [line.encode() if row.startswith(key + b" =") else row for row in content.split(b"\n", 12)]
    (folder / "bad.mha").write_bytes(b"\n".join(rows))
    return {"fixed": folder / "bad.mha"}


def truncated(folder: Path) -> dict:
    path = image(folder / "bad.nii.gz", np.random.rand(20, 20, 20).astype("f"))
    path.write_bytes(path.read_bytes()[:2000])
    return {"fixed": path}


def text(folder: Path) -> dict:
    (folder / "bad.nii.gz").write_text("not an image at all")
    return {"fixed": folder / "bad.nii.gz"}


def empty_folder(folder: Path) -> dict:
    (folder / "dicom").mkdir()
    return {"fixed": folder / "dicom"}


def far_away(folder: Path) -> dict:
    grid = blob_grid()
    affine = grid.affine.copy()
    affine[:3, 3] += 900
    labels = blob_labels(0, Grid(grid.shape, affine))
    write_image(blob_image(labels, 0), folder / "far.nii.gz")
    return {"moving": folder / "far.nii.gz", "align": "none"}


def labels_elsewhere(folder: Path) -> dict:
    affine = blob_grid().affine.copy()
    affine[:3, 3] += 900
    grid = Grid((6, 6, 6), affine)
    write_image(Volume(torch.ones(6, 6, 6, dtype=torch.int32), grid), folder / "labels.nii.gz")
    return {"fixed_labels": folder / "labels.nii.gz"}


def labels_with_fractions(folder: Path) -> dict:
    return {"moving_labels": image(folder / "labels.nii.gz", np.random.rand(6, 6, 6).astype("f"))}


def pickled_model(folder: Path) -> dict:
    torch.save({"a": torch.zeros(2)}, folder / "model.pt")
    return {"model": folder / "model.pt"}


BAD = {
    "missing file": (lambda d: {"fixed": d / "gone.nii.gz"}, "does not exist"),
    "text": (text, "bad.nii.gz"),
    "truncated": (truncated, "bad.nii.gz"),
    "folder without DICOM": (empty_folder, "DICOM"),
    "4D": (four_dimensional, "bad.nii.gz"),
    "vector": (vector, "bad.nrrd"),
    "constant": (constant, "is empty"),
    "infinite": (infinite, "bad.nrrd"),
    "one voxel": (one_voxel, "one voxel|1 voxel"),
    "zero spacing": (lambda d: header(d, "ElementSpacing = 1 0 1"), "spacing"),
    "singular direction": (lambda d: header(d, "TransformMatrix = 1 0 0 1 0 0 0 0 1"), "direction"),
    "no overlap": (far_away, "do not overlap"),
    "labels elsewhere": (labels_elsewhere, "labels nothing in its image"),
    "labels with fractions": (labels_with_fractions, "not a label image"),
    "unknown model": (lambda d: {"model": "brain-xr"}, "no model 'brain-xr'"),
    "pickled model": (pickled_model, "pickled"),
    "no CUDA": (lambda d: {"device": "cuda:42"}, "cuda:42"),
    "unknown device": (lambda d: {"device": "tpu"}, "no device 'tpu'"),
    "steps": (lambda d: {"steps": 0}, "choose 1 to"),
    "alignment": (lambda d: {"align": "elastic"}, "no alignment 'elastic'"),
    "initial transform": (lambda d: {"initial_transform": text(d)["fixed"]}, "bad.nii.gz"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(files, tmp_path, name):
    make, words = BAD[name]
    changes = make(tmp_path)
    output = run(*registering(files, tmp_path / "out", **changes), code=2)
    sentence = " ".join(output.split())
    assert re.search(words, sentence), sentence
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists(), "nothing half-written"


def test_output_folder_is_a_file(files, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "is a file" in run(*registering(files, tmp_path / "out"), code=2)
    assert (tmp_path / "out").read_text() == "mine"


def small_disk(folder: Path, kilobytes: int) -> Path:
    """A real file system of that size."""
    folder.mkdir()
    options = f"size={kilobytes}k"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    return folder


def test_disk_full(files, tmp_path):
    disk = small_disk(tmp_path / "disk", 100)
    try:
        output = run(*registering(files, disk / "out"), code=2)
        assert "space" in output or "disk" in output
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_unwritable_folder(files, tmp_path):
    """Read-only even for root: a read-only mount."""
    disk = small_disk(tmp_path / "disk", 500)
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        output = run(*registering(files, disk / "out"), code=2)
        assert "disk" in output
        assert "Traceback" not in output
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_ctrl_c_leaves_nothing(files, tmp_path):
    """Of the longest fit there is: what it said tells that it was not finished."""
    arguments = registering(files, tmp_path / "out", fit="on", fit_iterations="1000/1000/1000")
    command = [sys.executable, "-m", "MorphSeekLib.app.cli", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "Fitting this pair" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=300) == 130  # the limit only ends a hang
    assert "Canceled." in rest
    assert "iteration 3000 of 3000" not in rest
    assert not (tmp_path / "out").exists()


def test_the_options_of_before_still_work_and_are_hidden(files, tmp_path):
    """For one release; see cli.OLD_NAMES."""
    command = registering(files, tmp_path / "out", steps=1)
    done = CliRunner().invoke(app, [str(c) for c in [*command, "--refine", "2", "--refine-by", "mse"]])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["fit"]["similarity"] == "mse"
    assert "--refine and --refine-fine are --fit on now" in done.output
    assert "--refine" not in CliRunner().invoke(app, ["register", "--help"]).output
