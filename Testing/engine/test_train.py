"""`morphseek train CASES --out MODEL`: any folder of cases, any labels, one budget, resumable, one set of defaults."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import blob_grid, blob_image, blob_labels
from typer.testing import CliRunner

import MorphSeekLib
from MorphSeekLib import TrainingOptions, load_model, read_image, register
from MorphSeekLib.app.cli import app
from MorphSeekLib.app.runs import read_run, smoothest_of_the_best
from MorphSeekLib.io.images import write_image
from MorphSeekLib.networks import model_file
from MorphSeekLib.protocol.errors import Cancelled, MorphSeekError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.run_folder import SHARES, STAGES, parts
from MorphSeekLib.protocol.startup import bundled
from MorphSeekLib.space.geometry import Volume

SHORT: dict = {"minutes": None, "iterations": 2, "steps": 1, "trajectories": 2, "device": "cpu"}
LONG: dict = {**SHORT, "iterations": 100_000, "backbone": "vxm_dense", "stages": ["finetune"]}
VALUES = {1: 1002, 2: 2035, 3: 2035}


def write_folder(folder: Path, count: int = 6, labeled: bool = True) -> Path:
    """Cases of a folder without dataset.json, whose labels are 1002 and 2035."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for seed in range(count):
        labels = blob_labels(seed, blob_grid())
        write_image(blob_image(labels, seed), folder / "images" / f"{seed}.nii.gz")
        if labeled:
            data = labels.data.clone()
            for value, large in VALUES.items():
                data[labels.data == value] = large
            write_image(Volume(data, labels.grid), folder / "labels" / f"{seed}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("cases") / "cases")


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    """The bundled brain-mr on a working grid as small as the cases, which a test can wait for."""
    path = tmp_path_factory.mktemp("brain") / "brain-mr.safetensors"
    shutil.copy(bundled()["brain-mr"], path)
    card = model_file.read_card(path)
    small = dataclasses.replace(card.preprocessing, shape=None, spacing=(3.0, 3.0, 3.0), align="center")
    model_file.rewrite_card(path, dataclasses.replace(card, preprocessing=small))
    return path


@pytest.fixture(scope="module")
def trained(cases, brain, tmp_path_factory):
    """A training of these cases from brain-mr to its end, with a last stage on all cases; the model and the output."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "options.json").write_text(json.dumps(SHORT))
    out = folder / "blobs.safetensors"
    done = train(cases, "--out", out, "--init", brain, "--options", folder / "options.json", "--final")
    assert done.exit_code == 0, done.output
    return out, done.output


def train(*words: object):
    return CliRunner().invoke(app, ["train", *map(str, words)], terminal_width=200)


def folder_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}-training")


def test_a_model_learns_labels_of_any_value_from_a_folder(trained):
    card = model_file.read_card(trained[0])
    assert card.labels == {1002: 1, 2035: 2}
    assert card.model.backbone_settings["features"] == 3
    assert card.title == "blobs"


def test_one_of_six_cases_is_held_out_and_all_are_trained_on_in_the_end(trained):
    stages = [model_file.read_card(folder_of(trained[0]) / f"{stage}.safetensors") for stage in ("finetune", "final")]
    assert [card.provenance["cases"] for card in stages] == [5, 6]
    held_out = model_file.read_card(trained[0]).results["held_out"]
    assert held_out["pairs"] == 2
    assert "before the last stage" in held_out["definitions"]["pairs"]
    assert "with_fit" in model_file.read_card(trained[0]).results


def test_the_command_prints_the_figures_before_and_after(trained):
    assert "2 held-out pairs" in trained[1]
    assert "dice" in trained[1]


def test_the_model_registers(trained, cases):
    images = [read_image(cases / "images" / f"{n}.nii.gz") for n in (0, 1)]
    found = register(*images, load_model(str(trained[0]), "cpu"), MorphSeekLib.RegistrationOptions(fit="off"))
    assert found.report["folding"]["cells"]["cells"] > 0


def test_a_finished_training_is_not_done_again(trained, cases, brain):
    out = trained[0]
    before = (folder_of(out) / "final.safetensors").stat().st_mtime_ns
    options = out.parent / "options.json"
    assert train(cases, "--out", out, "--init", brain, "--options", options, "--final").exit_code == 0
    assert train(folder_of(out)).exit_code == 0
    assert (folder_of(out) / "final.safetensors").stat().st_mtime_ns == before


def test_other_options_for_the_same_model_are_refused(trained, cases):
    done = train(cases, "--out", trained[0], "--minutes", 7)
    assert done.exit_code == 2
    assert "was begun with init" in done.output
    done = train(folder_of(trained[0]), "--minutes", 7)
    assert done.exit_code == 2
    assert "--minutes cannot be changed" in done.output


def test_defaults_are_the_same_for_command_and_python(cases, tmp_path, monkeypatch):
    """What the command writes into run.json, without any option, are the defaults of TrainingOptions."""
    monkeypatch.chdir(tmp_path)
    stop = folder_of(tmp_path / "organ.safetensors") / "stop"
    out = tmp_path / "organ.safetensors"
    process = start(cases, out)
    wait_for(folder_of(out) / "run.json", process)
    process.send_signal(signal.SIGINT)
    process.wait(300)
    options, _ = read_run(folder_of(out) / "run.json")
    named = TrainingOptions("organ", str(cases), str(out)).suited(labeled=True)
    assert options == dataclasses.replace(named, spacing=2.0), "the check suggests the spacing"
    assert not stop.exists()


def test_ctrl_c_leaves_a_folder_that_goes_on(cases, tmp_path):
    (tmp_path / "options.json").write_text(json.dumps(LONG))
    out = tmp_path / "organ.safetensors"
    process = start(cases, out, "--options", tmp_path / "options.json")
    curves = folder_of(out) / "finetune.safetensors.jsonl"
    wait_for(curves, process)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=300)
    assert process.returncode == 130
    assert f"To go on: morphseek train {folder_of(out)}" in words.decode().replace("\n", " ")
    assert not out.exists()
    done = len(curves.read_text().splitlines())
    events = []

    def stop_soon():
        return sum(event.phase == "train" for event in events) > 2

    with pytest.raises(Cancelled):
        MorphSeekLib.train(
            TrainingOptions("organ", str(cases), str(out), **LONG | {"stages": ("finetune",)}),
            Job(events.append, stop_soon),
        )
    assert len(curves.read_text().splitlines()) > done
    assert any(event.message.startswith("Fine-tuning: Iteration") for event in events)


def test_from_scratch_features_are_learned_and_compared_by_the_fit(cases, tmp_path):
    options = TrainingOptions("organ", str(cases), str(tmp_path / "organ.safetensors"), stages=("final",), **SHORT)
    out = MorphSeekLib.train(options)
    card = model_file.read_card(out)
    assert card.model.backbone == "segmenter"
    assert card.labels == {1002: 1, 2035: 2}
    assert card.results["held_out"]["pairs"] == 2
    found = card.results["with_fit"]
    names = ("features", "searched_features", "both", "searched_both", "intensities")
    ways = {name: found[f"dice_{name}"] for name in names}
    figures = {name: json.loads((folder_of(out) / f"validation-{name}.json").read_text())["mean"] for name in names}
    best = smoothest_of_the_best(ways, {name: row["sdlogj"] for name, row in figures.items()})
    assert card.compare == best.removeprefix("searched_")
    stages = [model_file.read_card(folder_of(out) / f"{stage}.safetensors") for stage in ("features", "final")]
    assert [stage.provenance["cases"] for stage in stages] == [5, 6]
    images = [read_image(cases / "images" / f"{n}.nii.gz") for n in (0, 1)]
    assert register(*images, load_model(str(out), "cpu")).report["folding"]["cells"]["no_fold_proven"]


def test_of_answers_that_are_as_good_the_smoothest_is_delivered():
    dice = {"features": 0.8545, "both": 0.8557, "intensities": 0.81}
    assert smoothest_of_the_best(dice, {"features": 0.22, "both": 0.33, "intensities": 0.1}) == "features"
    assert smoothest_of_the_best(dice | {"both": 0.858}, {"features": 0.22, "both": 0.33, "intensities": 0.1}) == "both"
    assert smoothest_of_the_best({"steps": 0.0, "fitted": 0.0}, {"steps": 0.4, "fitted": 0.3}) == "fitted"


def test_cases_without_labels_are_warmed_up_on(tmp_path):
    cases = write_folder(tmp_path / "cases", 3, labeled=False)
    out = MorphSeekLib.train(TrainingOptions("organ", str(cases), str(tmp_path / "organ.safetensors"), **SHORT))
    card = model_file.read_card(out)
    assert card.provenance["stage"] == "warm-up"
    assert card.labels == {}


def test_what_cannot_be_trained_is_refused_before_a_folder_is_made(cases, tmp_path):
    out = tmp_path / "organ.safetensors"
    few = write_folder(tmp_path / "few", 2)
    (folder_of(tmp_path / "taken.safetensors")).mkdir()
    (folder_of(tmp_path / "taken.safetensors") / "notes.txt").touch()
    for words, expected in (
        ((few, "--out", out), "leaves 2 usable training cases"),
        ((cases,), "name a new model by --out"),
        ((cases, "--out", tmp_path / "organ.pt"), "must end with .safetensors"),
        ((cases, "--out", out, "--init", "brain-xr"), "no model 'brain-xr'"),
        ((cases, "--out", out, "--minutes", 0), "minutes must be above 0"),
        ((tmp_path / "gone", "--out", out), "does not exist"),
        ((cases, "--out", tmp_path / "taken.safetensors"), "is there already"),
    ):
        done = CliRunner().invoke(app, ["train", *map(str, words)], terminal_width=200)
        assert done.exit_code == 2, words
        assert expected in " ".join(done.output.split())
        assert not folder_of(out).exists()


def test_the_minutes_are_shared_among_the_parts_of_a_run():
    assert tuple(name for name in SHARES if name in STAGES) == STAGES
    for stages in (("warmup",), ("finetune",), ("warmup", "finetune"), ("finetune", "final")):
        found = parts(stages, measured=True)
        spans = list(found.values())
        assert [name for name in found if name != "evaluate"] == list(stages)
        assert (spans[0][0], spans[-1][1]) == (0.0, 1.0)
        assert [end for _, end in spans[:-1]] == [begin for begin, _ in spans[1:]]
    assert parts(("finetune", "final"), measured=True)["final"][1] == 1.0
    assert list(parts(("finetune",), measured=False).values()) == [(0.0, 1.0)]


def test_a_budget_is_kept_by_the_whole_training(cases, tmp_path):
    """Of a long one, on any machine: stopped once the plan of its first stage is written."""
    options = TrainingOptions("organ", str(cases), str(tmp_path / "organ.safetensors"), steps=1, trajectories=2)
    options = dataclasses.replace(options, minutes=10_000.0, policy=0.0, device="cpu", stages=("finetune", "final"))
    plan = folder_of(tmp_path / "organ.safetensors") / "finetune.json"
    events = []
    with pytest.raises(Cancelled):
        MorphSeekLib.train(options, Job(events.append, lambda: plan.is_file() and len(events) > 20))
    seconds = [event.message for event in events if "to the end of the training" in event.message]
    assert seconds, "the time left of all is told"
    assert json.loads(plan.read_text())["training"]["iterations"] > 100


def start(cases: Path, out: Path, *words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "MorphSeekLib.app.cli", "train", cases, "--out", out, "--threads", "1", *words]
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, env=os.environ | {"COLUMNS": "200"})


def wait_for(file: Path, process: subprocess.Popen) -> None:
    limit = time.monotonic() + 300  # only ends a hang
    while not file.exists() or not file.read_text().strip():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_bad_option_file_is_one_sentence(cases, tmp_path):
    (tmp_path / "options.toml").write_text("speed = 2\n")
    done = train(cases, "--out", tmp_path / "a.safetensors", "--options", tmp_path / "options.toml")
    assert done.exit_code == 2
    assert "no setting 'speed'" in done.output
    with pytest.raises(MorphSeekError, match="does not exist"):
        MorphSeekLib.train(TrainingOptions("a", str(tmp_path / "none"), str(tmp_path / "a.safetensors")))
