"""What the doctor tells of an installation, and what it must not tell of its user."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cli import run

from MorphSeekLib.app import doctor
from MorphSeekLib.app.doctor import Redaction, Told, as_json, as_text, examine
from MorphSeekLib.protocol.startup import bundled, sha256

PATIENTS = ("Erika", "Mustermann", "Müller", "O'Brien", "Smith", "John", "19700101", "4711815")
LINES = (
    "Reading /data/Erika Mustermann/scan 1.nii.gz",
    "Erika Mustermann.nii.gz is damaged or not an image (it has no header); copy it again.",
    "ValueError: John Smith T1.nrrd has 4 axes",
    "MorphSeekLib.protocol.errors.MorphSeekError: The case 'O'Brien' has no label; give one.",
    'KeyError: "Smith John"',
    "FileNotFoundError: [Errno 2] No such file or directory: 'C:\\\\Users\\\\Erika\\\\Bilder\\\\Müller.dcm'",
    r"C:\Users\Erika Mustermann\Bilder\Müller.dcm cannot be read",
    r"\\server\Müller\scan.mha: no access",
    "~/Erika/dataset.json: case Müller.mha and Smith.mha are the same",
    "data/Smith/John does not exist; check the name.",
    "Patient MUSTERMANN^ERIKA, born 19700101, number 4711815",
    "The model '/home/Erika/own.safetensors' and Slicer's 'Müller' do not fit; use Slicer's own",
    '  File "/home/John/project/Smith/run.py", line 3, in main',
    "image=/data/Smith,moving=/data/John",
    "/data/T1 (Smith)/scan.nii.gz is damaged",
    "The folder /data/Smith, John Paul: Erika/T1.nrrd and /data/Smith/O'Brien.nii cannot be read (No space left)",
    "Looking at [Smith.nii, John.nii]",
)
KEPT = (
    "ModuleNotFoundError: No module named 'torch.nn'",
    "Fatal Python error: init_fs_encoding: failed to get the Python codec of the filesystem encoding",
    "The device cuda:42 was asked for, but PyTorch sees no CUDA GPU here",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "There is no alignment 'elastic'; choose one of none, center, rigid, affine.".replace("elastic", "affine"),
    "Iteration 50: loss 0.1234, reward 0.02",
)


@pytest.mark.parametrize("line", LINES)
def test_a_line_loses_the_names_of_patients_and_files(line):
    told = Redaction()(line)
    assert [name for name in PATIENTS if name.lower() in told.lower()] == []


@pytest.mark.parametrize("line", KEPT)
def test_a_line_keeps_what_says_why(line):
    assert Redaction()(line) == line


def test_the_place_in_the_programs_is_kept():
    line = f'  File "{Path(doctor.__file__).with_name("worker.py")}", line 12, in register'
    assert Redaction()(line) == '  File "<MorphSeekLib>/worker.py", line 12, in register'
    line = f'  File "{torch.__file__}", line 9, in <module>'
    assert Redaction()(line) == '  File "<site-packages>/torch/__init__.py", line 9, in <module>'


def test_names_that_the_caller_knows_are_taken_out_wherever_they_stand():
    redact = Redaction(["MR Erika / 2", "Smith"])
    told = redact("step 2 of MR Erika / 2, then smith; case 001-MR-Erika---2")
    assert redact("in /home/smith/scans/x.nii, done") == "in <path>, done"
    assert told == "step 2 of <name>, then <name>; case 001-<name>"


@pytest.fixture
def home(tmp_path):
    """A home folder with a model and a training that are named after patients."""
    home = tmp_path / "home" / "Erika"
    models, run = home / "MorphSeek" / "Models", home / "MorphSeek" / "Trainings" / "2026-11-26-Mustermann"
    models.mkdir(parents=True)
    run.mkdir(parents=True)
    (models / "Mustermann.safetensors").write_bytes(next(iter(bundled().values())).read_bytes())
    (models / "Smith.safetensors").write_bytes(b"no model")
    (run / "log.txt").write_text("\n".join(LINES), encoding="utf-8")
    return home


def test_the_findings_hold_no_name(home):
    told = Told(
        about={"sentence": LINES[0], "Slicer": "5.12.3"},
        log=list(LINES),
        names=["Anna Schmidt"],
        folders={"models": str(home / "MorphSeek" / "Models")},
    )
    for found in (examine(told, home), examine(home=home)):
        for text in (as_text(found), as_json(found)):
            assert [name for name in (*PATIENTS, "Schmidt", str(home)) if name.lower() in text.lower()] == []
        assert len(found.log) == len(LINES), "nothing is left out, only taken out"


def test_the_findings_say_what_matters(home):
    found = examine(home=home)
    assert found.packages["torch"] == torch.__version__
    assert found.engine == "it can be imported"
    assert found.devices[-1].name == "cpu"
    assert found.threads["threads of PyTorch"] == str(torch.get_num_threads())
    assert found.memory["total"] > 1e8
    assert {folder.place for folder in found.folders} >= {"~/MorphSeek/Models", "~/MorphSeek/Trainings"}
    assert all(folder.writable and folder.free > 0 for folder in found.folders)
    sums = {model.name: model.sha256 for model in found.models}
    assert {name: sums[name] for name in bundled()} == {name: sha256(path) for name, path in bundled().items()}
    broken = next(model for model in found.models if model.name == "own model 2")
    assert "damaged" in broken.problem
    assert json.loads(as_json(found))["morphseek"] == found.morphseek
    assert f"brain-mr: {bundled()['brain-mr'].stat().st_size / 1e6:.1f} MB, SHA-256 {sums['brain-mr']}" in as_text(
        found
    )


def test_a_folder_that_cannot_be_written_is_said(home):
    taken = home / "a file"
    taken.touch()
    found = examine(Told(folders={"models": str(taken)}), home)
    assert not found.folders[-1].writable
    assert "models, chosen by the user: CANNOT BE WRITTEN" in as_text(found)


def test_the_examination_goes_on_without_torch(home):
    """As a process: with a torch that cannot be imported, it says so, and with what."""
    broken = home / "broken"
    (broken / "torch").mkdir(parents=True)
    (broken / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.12 is missing')")
    code = (
        f"import sys; sys.path.insert(0, {str(broken)!r}); from MorphSeekLib.app.doctor import main; main(['--told'])"
    )
    told = json.dumps({"about": {"Slicer": "5.12.3"}, "log": ["the last words"]})
    done = subprocess.run([sys.executable, "-c", code], input=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "engine: it cannot be imported (ImportError: libcudart.so.12 is missing)" in done.stdout
    assert "Slicer: 5.12.3" in done.stdout
    assert "the last words" in done.stdout


def test_the_command_prints_text_or_json():
    text = run("doctor")
    assert text.startswith("MorphSeek ")
    assert "Packages\n" in text
    assert json.loads(run("doctor", "--json"))["packages"]["torch"] == torch.__version__
