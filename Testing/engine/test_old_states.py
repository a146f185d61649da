"""Trainings under way that an earlier MorphSeek left (format 2 of their states) go on.

``old_states`` was written with the code of commit 1bdc671, on the blobs of ``cases.write_dataset``: a warm-up that was
cancelled after four of six iterations, its finished model (init.safetensors), and a fine-tuning of that one, likewise.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cases import write_dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from MorphSeekLib.data.datasets import load_dataset
from MorphSeekLib.networks.model_file import read_card
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.settings import from_dict
from MorphSeekLib.training.finetuning import FinetuneConfig, finetune
from MorphSeekLib.training.run_state import Memory, RunState, load_state, save_state
from MorphSeekLib.training.warmup import TrainingConfig, warmup

OLD = Path(__file__).parent / "old_states"


@pytest.fixture
def dataset(tmp_path):
    return load_dataset(write_dataset(tmp_path / "blobs"))


def left_behind(name, dataset, folder, **training):
    """Put an old state where its training's would be; return its settings, and where it stands.

    Settings of the training may differ from those it was written with. A fine-tuning's state names its cases by their
    paths, which are others here.
    """
    with safe_open(OLD / f"{name}.safetensors.state", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "2"
    settings = json.loads(metadata["settings"])
    settings["training"] |= training
    if "cases" in settings:
        settings["cases"] = [str(case.image) for case in dataset.cases["training"]]
    metadata["settings"] = json.dumps(settings, sort_keys=True)
    save_file(load_file(OLD / f"{name}.safetensors.state"), folder / f"{name}.safetensors.state", metadata)
    known = {key: value for key, value in settings.items() if key not in ("init", "cases")}
    return without_none(known), json.loads(metadata["standing"])


def without_none(values):
    """Settings as a file holds them: without what is unset."""
    if not isinstance(values, dict):
        return values
    return {key: without_none(value) for key, value in values.items() if value is not None}


def test_a_warm_up_goes_on(dataset, tmp_path):
    settings, standing = left_behind("warmup", dataset, tmp_path)
    events = []
    out = warmup(dataset, from_dict(TrainingConfig, settings), tmp_path / "warmup.safetensors", job=Job(events.append))
    assert standing["done"] == 4
    assert [e.step for e in events if e.phase == "train"] == [5, 6]
    assert read_card(out).provenance["seconds"] >= int(standing["seconds"])
    assert not (tmp_path / "warmup.safetensors.state").exists()


def test_a_fine_tuning_goes_on_with_its_controller_and_its_best_weights(dataset, tmp_path):
    worse = {"folding_limit": -1.0}  # than what was best are all validations to come
    settings, standing = left_behind("finetune", dataset, tmp_path, **worse)
    shutil.copy(OLD / "init.safetensors", tmp_path)
    stored = load_file(tmp_path / "finetune.safetensors.state")
    config, out, events = from_dict(FinetuneConfig, settings), tmp_path / "finetune.safetensors", []
    finetune(dataset, config, tmp_path / "init.safetensors", out, job=Job(events.append))
    rows = [e for e in events if e.phase == "train"]
    assert [e.step for e in rows] == [5, 6]
    assert rows[0].metrics["kl_weight"] == standing["memory"]["kl_weight"]
    assert read_card(out).provenance["best_iteration"] == standing["memory"]["best/iteration"]
    assert all(torch.equal(value, stored[f"best.{name}"]) for name, value in load_file(out).items())


def test_settings_of_a_state_count_by_todays_names(tmp_path):
    """Also those within others, such as a network's."""
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(network.parameters())
    old = {"licence": "none", "model": {"backbone_settings": {"checkpointing": True}}}
    new = {"license": "none", "model": {"backbone_settings": {"recompute": True}}}
    save_state(tmp_path / "x.state", json.dumps(old, sort_keys=True), RunState(done=3), Memory(), network, optimizer)
    state, _ = load_state(tmp_path / "x.state", json.dumps(new, sort_keys=True), Memory(), network, optimizer)
    assert state.done == 3
