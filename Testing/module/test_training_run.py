"""A training run's process as Slicer keeps it: real engine, real folders; stopped, killed, let go, found again."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import write_dataset
from MorphSeekGui.folder_process import RunError
from MorphSeekGui.training_run import TrainingRun, create_run, find_runs

from MorphSeekLib.app.train import train
from MorphSeekLib.data.datasets import load_dataset
from MorphSeekLib.protocol.options import TrainingOptions
from MorphSeekLib.protocol.settings import from_dict
from MorphSeekLib.training.warmup import TrainingConfig, warmup

WARM = {
    "model": {"backbone_settings": {"encoder": [8, 8], "decoder": [8], "extra": [8], "flow_stride": 2}},
    "preprocessing": {"spacing": [2.5, 2.5, 2.5], "align": "none"},
    "training": {"iterations": 1, "steps": 1},
}
ENDLESS = {"training": {"iterations": 100_000, "validate_every": 50_000, "save_every": 2}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(data set, tiny model)."""
    folder = tmp_path_factory.mktemp("files")
    dataset = write_dataset(folder / "data", 5)
    return dataset, warmup(load_dataset(dataset), from_dict(TrainingConfig, WARM), folder / "init.safetensors")


@pytest.fixture
def make(files, tmp_path):
    """Makes runs; whatever still runs at the end is killed."""
    made = []

    def make(finetune=ENDLESS, **changes):
        values = {"name": "My organ", "dataset": str(files[0]), "init": str(files[1]), "model": "m.safetensors"}
        values |= changes
        run = create_run(tmp_path / "runs", from_dict(TrainingOptions, values))
        values |= {"device": "cpu", "finetune": finetune}  # the settings of a stage, as MorphSeek 0.1.0 wrote them
        (run.folder / "run.json").write_text(json.dumps(values))
        made.append(run)
        return run

    yield make
    for run in made:
        run.kill()


def until(condition):
    """Wait for a condition; the limit only ends a hang."""
    limit = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < limit, "it did not happen within 300 s"
        time.sleep(0.02)


def training(run, rows=1):
    return lambda: len(run.curves("finetune")) >= rows


def test_a_run_to_its_end(make):
    run = make({"training": {"iterations": 2}})
    assert run.folder.name.endswith("-My-organ")
    assert run.status().state == "new"
    run.start()
    assert run.status().alive
    until(run.is_running)
    with pytest.raises(RunError, match="running already"):
        run.start()
    until(lambda: not run.status().alive)
    status = run.status()
    assert (status.state, status.fraction) == ("done", 1.0), status.message
    assert run._process.wait(300) == 0
    assert status.held_out["mean"]["dice"] > 0
    assert status.model == str(run.folder / "m.safetensors")
    assert [row["iteration"] for row in run.curves("finetune")] == [1, 2]
    assert {"loss", "reward", "reward_spread", "kl"} <= set(run.curves("finetune")[0])


def test_stopped_and_resumed(make):
    run = make()
    run.start()
    until(training(run, 3))
    run.stop()
    assert run.status().state in ("stopping", "stopped")
    until(lambda: not run.status().alive)
    assert run.status().state == "stopped"
    assert run.status().resumable
    done = len(run.curves("finetune"))
    run.start()
    until(training(run, done + 2))
    assert [row["iteration"] for row in run.curves("finetune")] == list(range(1, len(run.curves("finetune")) + 1))


def test_killed_at_once(make):
    run = make()
    run.start()
    until(training(run, 5))
    run.kill()
    assert not run.is_running()
    status = TrainingRun(run.folder).status()
    assert status.state == "interrupted"
    assert status.resumable


def test_the_lock_and_not_the_number_says_what_runs(make):
    """A number that was given to another process meanwhile: nothing is running, and nobody is killed."""
    run = make()
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        (run.folder / "lock").write_text(json.dumps({"pid": stranger.pid, "host": "here"}))
        (run.folder / "status.json").write_text(json.dumps({"state": "running", "fraction": 0.4}))
        assert run.status().state == "interrupted"
        run.kill()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


# what Slicer does, as a process of its own that can end
SLICER = """
import sys
sys.path.insert(0, sys.argv[1])
from MorphSeekGui.training_run import TrainingRun
run = TrainingRun(sys.argv[2])
run.start(keep=sys.argv[3] == "keep", python=sys.executable)
print("started", flush=True)
sys.stdin.read()
if sys.argv[4] == "quit":
    run.release()
else:
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("keep", "end"), [("keep", "quit"), ("keep", "crash"), ("drop", "quit"), ("drop", "crash")])
def test_slicer_ends(make, keep, end):
    """Asked to, a training survives Slicer's end and crash, and is found again; else it stops, and can be resumed."""
    run = make()
    module = str(Path(__file__).parents[2] / "MorphSeek")  # wherever the checkout lies, whatever it is called
    slicer = subprocess.Popen(
        [sys.executable, "-c", SLICER, module, str(run.folder), keep, end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert slicer.stdout.readline() == b"started\n"
    until(training(run, 2))
    slicer.communicate()
    if keep == "drop":
        until(lambda: not run.is_running())
        assert run.status().state == "stopped"
        return
    done = len(run.curves("finetune"))
    (found,) = find_runs(run.folder.parent)
    until(training(found, done + 3))
    assert found.status().state == "running"
    assert found.kept
    found.stop()
    until(lambda: found.status().state == "stopped")


def test_what_cannot_start_says_why(make, tmp_path):
    run = make()
    with pytest.raises(RunError, match="could not be started with"):
        run.start(command=[str(tmp_path / "no-python")])
    run.start(command=[sys.executable, "-c", "import no_such_library"])
    until(lambda: not run.status().alive)
    assert run.status().state == "failed"
    assert "No module named 'no_such_library'" in run.status().last_words
    fatal = "import sys; sys.stderr.write('Traceback (most recent call last):\\nOSError: no space\\n  of yesterday')"
    run.start(command=[sys.executable, "-c", fatal])
    until(lambda: not run.status().alive)
    run.start(command=[sys.executable, "-c", "import sys; sys.exit('a word of its own')"])
    until(lambda: not run.status().alive)
    assert run.status().last_words == "a word of its own", "what an earlier process wrote is not its reason"
    run = make(init="brain-xr")
    run.start()
    until(lambda: not run.status().alive)
    assert run.status().state == "failed"
    assert "There is no model 'brain-xr'" in run.status().message


def test_half_a_line_waits_for_its_other_half(make):
    run = make()
    path = run.folder / "finetune.safetensors.jsonl"
    path.write_text('{"iteration": 1, "loss": 2.0}\n{"iteration": 2, "lo')
    assert len(run.curves("finetune")) == 1
    path.write_text('{"iteration": 1, "loss": 2.0}\n{"iteration": 2, "loss": 1.0}\n')
    assert [row["loss"] for row in run.curves("finetune")] == [2.0, 1.0]
    path.write_text('{"iteration": 1, "loss": 2.0}\n')  # resumed from an earlier state
    assert [row["loss"] for row in run.curves("finetune")] == [2.0]


def test_folders_get_names_of_their_own(make, tmp_path):
    first, second = make(name="Liver / CT"), make(name="Liver / CT")
    assert first.folder.name.endswith("-Liver-CT")
    assert second.folder.name.endswith("-Liver-CT-2")
    assert [run.folder for run in find_runs(tmp_path / "runs")] == [second.folder, first.folder]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="cannot be written"):
        create_run(tmp_path / "file", TrainingOptions("a", "cases", "a.safetensors"))


def test_a_training_of_the_command_is_seen_as_one_of_the_panel(files, tmp_path):
    options = TrainingOptions("Organ", str(files[0]), str(tmp_path / "organ.safetensors"), steps=1, trajectories=2)
    model = train(dataclasses.replace(options, minutes=None, iterations=2, device="cpu"))
    [run] = find_runs(tmp_path / "trainings", tmp_path)
    status = run.status()
    assert (run.name, status.state, status.model) == ("Organ", "done", str(model))
    assert [row["iteration"] for row in run.curves("features")] == [1, 2]
    assert status.held_out["pairs"] > 0
