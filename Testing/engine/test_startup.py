"""What happens before torch is imported: names, numbers and paths are refused, and threads are told how to wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK as sitk
import torch
from cases import blob_grid, blob_image, blob_labels
from test_cli import run
from test_registration import random_model

from MorphSeekLib.io.images import write_image
from MorphSeekLib.networks.devices import use_threads
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.startup import (
    bundled,
    check_output_file,
    check_output_folder,
    find,
    read_header,
    wait_passively,
)
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space.geometry import Volume

HEAVY = ("torch", "numpy", "SimpleITK", "scipy", "matplotlib")
COMMANDS = """
import json, sys
from typer.testing import CliRunner
from MorphSeekLib.app.cli import app

found = []
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    found.append([result.exit_code, result.output, [name for name in json.loads(sys.argv[2]) if name in sys.modules]])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with a file that exists, a settings file that is none, and a model without weights."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "there.nii.gz").write_bytes(b"something")
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "dataset.json").write_text("{}")
    (folder / "bad.toml").write_text("no settings")
    (folder / "bad.safetensors").write_bytes(b"no model")
    return folder


def test_what_is_misspelled_is_refused_before_anything_heavy_is_imported(here):
    good, data = str(here / "there.nii.gz"), str(here / "dataset.json")
    pair, out = ["register", good, good, "-o", str(here / "out")], ["--out", str(here / "m.safetensors")]
    wanted = [
        (["register", "gone.nii", good, "-o", "o"], "gone.nii does not exist"),
        (["register", good, "gone.nii", "-o", "o"], "gone.nii does not exist"),
        (["register", good, str(here / "empty.nii.gz"), "-o", "o"], "is an empty file"),
        ([*pair, "--fixed-labels", "gone.nii"], "gone.nii does not exist"),
        ([*pair, "--moving-labels", "gone.nii"], "gone.nii does not exist"),
        ([*pair, "--initial-transform", "gone.tfm"], "gone.tfm does not exist"),
        ([*pair, "--model", "brain-xr"], "no model 'brain-xr'"),
        ([*pair, "--model", str(here / "bad.safetensors")], "damaged or not a .safetensors file"),
        ([*pair, "--device", "tpu"], "no device 'tpu'"),
        ([*pair, "--steps", "21"], "choose 1 to 20"),
        ([*pair, "--align", "elastic"], "no alignment 'elastic'"),
        ([*pair, "--threads", "0"], "choose 1 or more"),
        (["register", good, good, "-o", good], "is a file"),
        (["evaluate", "gone.json", "--model", "brain-mr", "--out", "e.json"], "gone.json does not exist"),
        (["evaluate", data, "--model", "brain-xr", "--out", "e.json"], "no model 'brain-xr'"),
        (["evaluate", data, "--model", "brain-mr", "--out", str(here)], "a folder has this name"),
        (["check", "gone"], "gone does not exist"),
        (["warmup", "gone", *out], "gone does not exist"),
        (["warmup", data, "--out", "model.pt"], "the ending .safetensors"),
        (["warmup", data, *out, "--config", str(here / "bad.toml")], "is not valid TOML"),
        (["warmup", data, *out, "--config", "hippocampos"], "no settings 'hippocampos': give a bundled name (brain-mr"),
        (["finetune", data, *out, "--init", "brain-mr", "--config", "gone.toml"], "no settings 'gone.toml'"),
        (["spac", data, *out, "--config", "gone.json"], "no settings 'gone.json'"),
        (["warmup", data, *out, "--iterations", "0"], "choose 1 or more"),
        (["warmup", data, *out, "--init", "brain-xr"], "no model 'brain-xr'"),
        (["finetune", data, *out, "--init", "brain-xr"], "no model 'brain-xr'"),
        (["finetune", data, *out, "--init", "brain-mr", "--threads", "0"], "choose 1 or more"),
        (["spac", data, *out, "--device", "tpu"], "no device 'tpu'"),
        (["train", str(here)], "is not a training run"),
        (["import-checkpoint", "gone.pt", "--architecture", "vxm-2", *out], "gone.pt does not exist"),
        (["info", "brain-xr"], "no model 'brain-xr'"),
        (["demo", "-o", good], "is a file"),
    ]
    commands = [arguments for arguments, _ in wanted]
    script = [sys.executable, "-c", COMMANDS, json.dumps(commands), json.dumps(HEAVY)]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    for (arguments, words), (code, output, heavy) in zip(wanted, json.loads(done.stdout), strict=True):
        sentence = " ".join(output.split())
        assert (code, heavy) == (2, []), (arguments, sentence, heavy)
        assert words in sentence, arguments
    assert not (here / "out").exists()


def test_the_worker_imports_neither_matplotlib_nor_pydicom_nor_scipy_before_it_needs_them():
    script = "import sys, MorphSeekLib.app.worker; print({'matplotlib', 'pydicom', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_path_to_where_models_lay_before_opens_the_model_of_that_name():
    assert find("/somewhere/Resources/Checkpoints/brain-mr.safetensors") == bundled()["brain-mr"]
    with pytest.raises(MorphSeekError, match="There is no model"):
        find("/somewhere/Resources/Checkpoints/none.safetensors")


@pytest.mark.parametrize("kind", ["model", "recipe"])
def test_a_bundled_name_is_found_before_a_file_and_a_path_is_found_as_it_is(kind, tmp_path, monkeypatch):
    name, file = next(iter(bundled(kind).items()))
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    assert find(name, kind) == file
    Path("mine").touch()
    assert find("mine", kind) == Path("mine")
    with pytest.raises(MorphSeekError, match=rf"There (is|are) no \w+ 'gone': give a bundled name \({name}"):
        find("gone", kind)


@pytest.mark.parametrize("command", [["MorphSeekLib.app.cli", "info", "brain-mr"], ["MorphSeekLib.app.worker"]])
@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
def test_threads_wait_passively_unless_the_user_says_otherwise(command, given, policy):
    """The OpenMP library itself says, as it is loaded, what it was told."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")}
    environment |= {"OMP_DISPLAY_ENV": "true"} | given
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, input="", capture_output=True, text=True, check=True
    )
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("this build of torch has no OpenMP library that shows its settings")
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("passive", "0")),
        ({"OMP_WAIT_POLICY": "active"}, ("active", None)),
        ({"KMP_BLOCKTIME": "7"}, ("passive", "7")),
    ],
)
def test_what_the_user_sets_of_the_waiting_stays(monkeypatch, given, expected):
    names = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is given back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    wait_passively()
    assert tuple(map(os.environ.get, names)) == expected


@pytest.fixture
def all_threads():
    yield
    use_threads()


def test_threads_are_pytorchs_and_simpleitks_and_can_be_given_back(all_threads):
    before = torch.get_num_threads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    use_threads(3)
    assert (torch.get_num_threads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()) == (3, 3)
    use_threads()
    assert (torch.get_num_threads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()) == before
    with pytest.raises(MorphSeekError, match="0 threads were asked for"):
        use_threads(0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """Two images and a model in a folder whose name looks like markup."""
    folder = tmp_path_factory.mktemp("pair") / "scans[bold]1:smile:"
    folder.mkdir()
    random_model(folder / "model.safetensors")
    for seed, name in enumerate(("fixed", "moving")):
        write_image(blob_image(blob_labels(seed, blob_grid()), seed), folder / f"{name}.nii.gz")
    return folder


def test_the_command_line_takes_threads(pair, tmp_path, all_threads):
    files = [pair / "fixed.nii.gz", pair / "moving.nii.gz", "--model", pair / "model.safetensors"]
    run("register", *files, "--steps", 1, "--threads", 2, "-o", tmp_path / "out")
    assert torch.get_num_threads() == 2


def test_paths_in_square_brackets_are_printed_whole(pair):
    files = [pair / "fixed.nii.gz", pair / "moving.nii.gz", "--model", pair / "model.safetensors"]
    assert str(pair / "out" / "report.html") in run("register", *files, "--steps", 1, "-o", pair / "out")
    assert str(pair / "gone.nii") in run("register", pair / "gone.nii", *files[1:], "-o", pair / "out", code=2)
    assert str(pair / "model.safetensors") in run("info", pair / "model.safetensors")


def test_labels_without_one_in_common_are_refused_before_the_alignment(tmp_path):
    model = random_model(tmp_path / "model.safetensors")
    labels = [blob_labels(seed, blob_grid()) for seed in (0, 1)]
    images = [blob_image(volume, seed) for seed, volume in enumerate(labels)]
    labels[1] = Volume(torch.where(labels[1].data > 0, labels[1].data + 10, 0).int(), labels[1].grid)
    events = []
    with pytest.raises(MorphSeekError, match="no label in common"):
        register(*images, model, job=Job(events.append), labels=(labels[0], labels[1]))
    assert events == []


def test_a_place_that_cannot_be_written_to_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "file").write_text("mine")
    for check, name in ((check_output_file, "file/model.safetensors"), (check_output_folder, "file/out")):
        with pytest.raises(MorphSeekError, match="cannot be written"):
            check(tmp_path / name)
    check_output_file(tmp_path / "new" / "model.safetensors")
    check_output_folder(tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_header_without_its_weights_is_refused(tmp_path):
    random_model(tmp_path / "model.safetensors")
    assert read_header(tmp_path / "model.safetensors")["title"] == "random"
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    with pytest.raises(MorphSeekError, match=f"has {len(whole) - 1} bytes instead of {len(whole)}"):
        read_header(tmp_path / "cut.safetensors")


def test_a_name_that_is_not_utf8_is_printed_in_a_sentence(tmp_path):
    command = [
        sys.executable,
        "-m",
        "MorphSeekLib.app.cli",
        "register",
        b"sc\xe4n.nii",
        "b.nii",
        "-o",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sc\\udce4n.nii does not exist; check the name." in done.stderr
