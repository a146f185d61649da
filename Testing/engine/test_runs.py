"""A run's folder: trained by real processes, stopped, killed, resumed, finished, with its figures before and after."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import write_dataset
from hypothesis import given
from hypothesis import strategies as st

from MorphSeekLib.app.runs import planned_iterations, read_run, run
from MorphSeekLib.networks import model_file
from MorphSeekLib.protocol.errors import Cancelled, MorphSeekError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.options import TrainingOptions
from MorphSeekLib.protocol.run_folder import locked
from MorphSeekLib.protocol.settings import to_dict

MODEL = {"backbone_settings": {"encoder": [8, 8], "decoder": [8], "extra": [8], "norm": "instance", "flow_stride": 2}}
WARMUP = {
    "model": MODEL,
    "preprocessing": {"spacing": [2.5, 2.5, 2.5], "align": "center"},
    "training": {"iterations": 3, "steps": 1, "validate_every": 2},
}
FINETUNE = {
    "policy": {"trajectories": 4, "weight": 0.1},
    "training": {"iterations": 3, "steps": 2, "validate_every": 2, "save_every": 1},
}
COMMAND = [
    sys.executable,
    "-c",
    "import torch; torch.set_num_threads(1); from MorphSeekLib.app.cli import main; main()",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("blobs"), 5)


def make(folder, cases, **changes):
    """A run's folder with its run.json."""
    values = {"name": "Blobs", "dataset": str(cases), "model": "blobs.safetensors", "device": "cpu"}
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(values | {"warmup": WARMUP, "finetune": FINETUNE} | changes))
    return folder


def status(folder):
    return json.loads((folder / "status.json").read_text())


def rows(folder, stage):
    return [json.loads(line) for line in (folder / f"{stage}.safetensors.jsonl").read_text().splitlines()]


def long_run(folder, dataset, init):
    """More iterations than any test waits for."""
    training = FINETUNE["training"] | {"iterations": 100_000, "validate_every": 50_000}
    return make(folder, dataset, init=str(init), warmup=None, finetune=FINETUNE | {"training": training})


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A run from scratch to its end; its folder and events."""
    folder, events = make(tmp_path_factory.mktemp("runs") / "whole", dataset), []
    run(folder, Job(events.append))
    return folder, events


def test_a_run_ends_with_a_checkpoint_and_figures(whole):
    folder, events = whole
    card = model_file.read_card(folder / "blobs.safetensors")
    assert card.title == "Blobs"
    assert card.provenance["stage"] == "GRPO fine-tuning"
    assert card.provenance["cases"] == 3, "the cases of the held-out pairs were not trained on"
    with_fit = card.results["with_fit"]
    assert card.fit == (with_fit["dice_fitted"] > with_fit["dice_steps"])
    assert with_fit["pairs"] >= 1
    assert json.loads((folder / "validation-steps.json").read_text())["mean"]["dice"] == with_fit["dice_steps"]
    held_out = card.results["held_out"]
    assert held_out["pairs"] == 2
    assert set(held_out["start"]) == {"dice", "hd95", "folded_percent", "njd_percent", "sdlogj"}
    assert set(held_out["mean"]) == set(held_out["start"]) | {"dice_aligned"}
    assert 0 < held_out["mean"]["dice_aligned"] < 1
    written = json.loads((folder / "result.json").read_text())
    assert held_out["mean"]["dice"] == written["mean"]["dice"]
    assert {k: status(folder)[k] for k in ("state", "fraction")} == {"state": "done", "fraction": 1.0}
    assert status(folder)["held_out"] == held_out
    assert status(folder)["model"] == str(folder / "blobs.safetensors")
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions), "the bar never goes back"
    assert fractions[-1] == 1.0
    assert [row["iteration"] for row in rows(folder, "warmup")] == [1, 2, 3]
    assert "validation/folded_percent" in rows(folder, "finetune")[1]


def test_a_finished_run_does_nothing_anew(whole):
    folder, _ = whole
    before = (folder / "finetune.safetensors").stat().st_mtime_ns
    events = []
    run(folder, Job(events.append))
    assert (folder / "finetune.safetensors").stat().st_mtime_ns == before
    assert not [event for event in events if event.phase == "train"]


def test_warmup_from_a_checkpoint_takes_its_model(whole, dataset, tmp_path):
    init = whole[0] / "warmup.safetensors"
    other = WARMUP | {"model": {}, "preprocessing": {}}
    folder = make(tmp_path / "run", dataset, init=str(init), warmup=other, finetune=None)
    run(folder)
    card = model_file.read_card(folder / "blobs.safetensors")
    assert card.model == model_file.read_card(init).model
    assert card.preprocessing.spacing == (2.5, 2.5, 2.5)
    assert {"start", "mean"} < set(card.results["held_out"])


def test_a_stopped_run_resumes_to_the_same_weights(whole, dataset, tmp_path):
    folder = make(tmp_path / "cut", dataset)

    def stop_in_finetuning(event):
        if event.phase == "train" and (folder / "finetune.safetensors.jsonl").exists():
            (folder / "stop").touch()

    with pytest.raises(Cancelled):
        run(folder, Job(stop_in_finetuning))
    assert status(folder)["state"] == "stopped"
    assert not (folder / "blobs.safetensors").exists()
    run(folder)
    assert not (folder / "stop").exists()
    one, two = (model_file.load(f / "blobs.safetensors")[0].state_dict() for f in (whole[0], folder))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_minutes_become_iterations_once(dataset, whole, tmp_path):
    """Of a week, on any machine: stopped as soon as the plan is written. What it says then counts, unmeasured."""
    init = whole[0] / "warmup.safetensors"
    folder = make(tmp_path / "run", dataset, init=str(init), warmup=None, minutes=10_000)
    plan = folder / "finetune.json"
    with pytest.raises(Cancelled):
        run(folder, job=Job(cancelled=plan.is_file))
    planned = json.loads(plan.read_text())
    assert planned["training"]["iterations"] >= 10
    (folder / "finetune.safetensors.state").unlink()  # it is of the week's settings
    planned["training"] |= {"iterations": 3, "validate_every": 2}
    plan.write_text(json.dumps(planned))
    events = []
    run(folder, Job(events.append))
    assert [row["iteration"] for row in rows(folder, "finetune")] == [1, 2, 3]
    assert not any("Measuring how long" in event.message for event in events)


@given(st.floats(0.01, 1e4), st.floats(1e-4, 100), st.floats(0, 1000))
def test_a_plan_keeps_to_its_minutes_and_validates(minutes, iteration, validation):
    """One to ten validations, in a fifth of the time where one fits in, and as many iterations as the rest allows."""
    if 10 * iteration + 10 * validation > 60 * minutes:  # perhaps too few
        minutes *= (10 * iteration + 10 * validation) / (60 * minutes) + 1
    iterations, validate_every = planned_iterations(minutes, iteration, validation)
    validations = math.ceil(iterations / validate_every)
    assert 1 <= validations <= 10
    assert iterations >= 10
    assert iterations * iteration + validations * validation <= 60 * minutes * 1.000001
    assert (iterations + 1) * iteration + 10 * validation > 60 * minutes * 0.999999


def test_minutes_that_are_too_few_are_refused(dataset, whole, tmp_path):
    short = make(tmp_path / "short", dataset, init=str(whole[0] / "warmup.safetensors"), warmup=None, minutes=1e-9)
    with pytest.raises(MorphSeekError, match="minutes are too short"):
        run(short)
    assert status(short)["state"] == "failed"
    assert "too short" in status(short)["message"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"warmup": None, "finetune": None}, "neither a warmup nor a finetune"),
        ({"model": "a.pt"}, "must end with .safetensors"),
        ({"minutes": 0}, "minutes must be above 0"),
        ({"speed": 1}, "no setting 'speed'"),
        ({"init": "brain-xr"}, "no model 'brain-xr'"),
        ({"dataset": "gone"}, "no file or folder"),
        ({"leave_out": ["image_2.nii.gz", "image_3.nii.gz"]}, "leaves 1 usable training cases"),
    ],
)
def test_bad_settings_are_one_sentence(dataset, tmp_path, changes, words):
    folder = make(tmp_path / "run", dataset, **changes)
    with pytest.raises(MorphSeekError, match=words):
        run(folder)
    assert status(folder)["state"] == "failed"
    assert words in status(folder)["message"]


OLD_RUNS = (
    Path(__file__).parent / "old_runs"
)  # run.json as the panel of MorphSeek 0.1.0 wrote it, before TrainingOptions
CHOICES = {
    "defaults": {},
    "chosen": {
        "init": "hippocampus-mr",
        "stages": ["finetune"],
        "minutes": None,
        "iterations": 120,
        "steps": 2,
        "learning_rate": 1e-3,
        "seed": 5,
        "similarity": "mind",
        "finetune_smoothness": 0.5,
        "policy": 0.25,
        "trajectories": 4,
        "kl_target": 0.7,
        "device": "cuda:0",
    },
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_runs_choices_come_to_the_settings_that_the_panel_wrote_before(name, tmp_path):
    """An old run.json still opens, and the same choices come to the same settings today."""
    options, configs = read_run(OLD_RUNS / f"{name}.json")
    chosen = {"name": "Liver CT", "dataset": "cases", "model": "models/Liver-CT.safetensors", "leave_out": ["case 7"]}
    before = {"stages": ["warmup", "finetune"], "features": 0.0, "augmentation": 0.0}  # it did both, and had no others
    (tmp_path / "run.json").write_text(json.dumps(chosen | before | CHOICES[name]))
    today, same = read_run(tmp_path / "run.json")
    assert same == configs
    for what in ("name", "dataset", "model", "init", "stages", "minutes", "device", "leave_out"):
        assert getattr(today, what) == getattr(options, what), what


def test_a_run_of_choices_trains(dataset, tmp_path):
    (tmp_path / "run").mkdir()
    options = TrainingOptions(
        "Blobs",
        str(dataset),
        "blobs.safetensors",
        stages=("finetune",),
        minutes=None,
        iterations=2,
        spacing=2.5,
        steps=1,
        device="cpu",
    )
    (tmp_path / "run" / "run.json").write_text(json.dumps(to_dict(options)))
    run(tmp_path / "run")
    card = model_file.read_card(tmp_path / "run" / "blobs.safetensors")
    assert (card.title, card.model.backbone_settings["forces"]) == ("Blobs", 3)


def test_no_run_in_a_folder(tmp_path):
    with pytest.raises(MorphSeekError, match="is not a training run"):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_never_train_in_one_folder(dataset, tmp_path):
    folder = make(tmp_path / "run", dataset)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from pathlib import Path\n"
         "from MorphSeekLib.protocol.run_folder import locked\n"
         "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)", str(folder)],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == b"held\n"
        assert json.loads((folder / "lock").read_text())["pid"] == holder.pid
        with pytest.raises(MorphSeekError, match="Another process is training"):
            run(folder)
        assert not (folder / "status.json").exists(), "the other's status is not touched"
    finally:
        holder.kill()
        holder.wait()
    with locked(folder):  # free as soon as its holder is gone, whatever way it went
        assert json.loads((folder / "lock").read_text())["pid"] == os.getpid()


def start(folder, *options, **more):
    return subprocess.Popen([*COMMAND, "train", str(folder), *options], stderr=subprocess.DEVNULL, **more)


def wait_for_training(folder, process, lines=2):
    log = folder / "finetune.safetensors.jsonl"
    limit = time.monotonic() + 300  # only ends a hang
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_processes_stop_as_asked_and_resume(dataset, whole, tmp_path):
    """Three processes, one after the other, on one run: ended by the file, by SIGTERM, and by the parent's death."""
    folder = long_run(tmp_path / "run", dataset, whole[0] / "warmup.safetensors")
    process = start(folder)
    wait_for_training(folder, process)
    (folder / "stop").touch()
    assert process.wait(300) == 130
    first = len(rows(folder, "finetune"))
    assert status(folder)["state"] == "stopped"

    process = start(folder)
    wait_for_training(folder, process, first + 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 130
    second = len(rows(folder, "finetune"))
    assert second > first

    (folder / "keep").touch()
    process = start(folder, "--while-open", stdin=subprocess.PIPE)
    process.stdin.close()
    wait_for_training(folder, process, second + 3)  # goes on alone, as it was asked to
    (folder / "keep").unlink()
    assert process.wait(300) == 130
    assert [row["iteration"] for row in rows(folder, "finetune")] == list(range(1, len(rows(folder, "finetune")) + 1))
