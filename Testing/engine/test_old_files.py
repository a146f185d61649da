"""Settings, a finished training and reports that the code of commit 78e58be wrote (Testing/old_files/README.txt).

Their meaning is compared with what that commit read from them, not with today's own reading.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from cases import write_dataset
from safetensors.torch import load_file
from typer.testing import CliRunner

from MorphSeekLib.app.cli import app
from MorphSeekLib.app.runs import read_run, run
from MorphSeekLib.app.settings_file import load
from MorphSeekLib.networks.loading import load_model
from MorphSeekLib.networks.model_file import read_card
from MorphSeekLib.networks.policy import RegistrationModel
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.settings import to_dict
from MorphSeekLib.protocol.verdict import DEFAULT_LIMITS, figures, folds, judge, shown
from MorphSeekLib.report.page import render_page
from MorphSeekLib.report.results import earlier_files
from MorphSeekLib.training.finetuning import FinetuneConfig
from MorphSeekLib.training.sac import SACConfig
from MorphSeekLib.training.warmup import TrainingConfig

OLD = Path(__file__).resolve().parents[1] / "old_files"
KINDS = {"warmup": TrainingConfig, "finetune": FinetuneConfig, "spac": SACConfig}
RENAMED = {"licence": "license", "checkpointing": "recompute"}
RECIPES = json.loads((OLD / "recipes" / "meant.json").read_text())
LICENSE = "CC0: made by a program"


def old_json(name):
    """A JSON file of before."""
    return json.loads((OLD / name).read_text(encoding="utf-8"))


def today(values):
    """Settings of before under the names of today, written out here and not taken from the code."""
    if isinstance(values, dict):
        return {RENAMED.get(name, name): today(value) for name, value in values.items()}
    return values


def shared_part(settings, old):
    """What settings of today hold under the names of old ones: settings that came later are left out."""
    if isinstance(old, dict) and isinstance(settings, dict):
        return {name: shared_part(settings.get(name, "missing"), value) for name, value in old.items()}
    return settings


def assert_same_meaning(settings, old):
    """Fail where a setting of before is missing or has another value."""
    old = today(old)
    assert shared_part(to_dict(settings), old) == old


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("suffix", ["toml", "json"])
@pytest.mark.parametrize("name", KINDS)
def test_settings_keep_every_value(name, suffix):
    """No setting in these files is at its default, so one that is not read is seen."""
    assert_same_meaning(load(KINDS[name], OLD / "settings" / f"{name}.{suffix}"), old_json(f"settings/{name}.json"))


def test_a_network_is_built_as_its_old_settings_say():
    network = RegistrationModel(load(TrainingConfig, OLD / "settings" / "warmup.toml").model).backbone
    assert network.settings.recompute is True
    assert (network.settings.channels, network.settings.depths, network.settings.squarings) == (8, (2, 4), 3)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_keep_every_value(name):
    meant = RECIPES[name]
    kind = next(kind for kind in KINDS.values() if kind.__name__ == meant["kind"])
    assert_same_meaning(load(kind, OLD / "recipes" / name), meant["settings"])


# ------------------------------------------------------------------------------------------------- a finished training


@pytest.fixture
def folder(tmp_path):
    """The run of before, copied, with its cases where this computer has them."""
    shutil.copytree(OLD / "run", tmp_path / "run")
    values = old_json("run/run.json") | {"dataset": str(write_dataset(tmp_path / "blobs", 5))}
    (tmp_path / "run" / "run.json").write_text(json.dumps(values))
    return tmp_path / "run"


def test_a_runs_choices_are_read(folder):
    options, configs = read_run(folder / "run.json")
    assert (options.name, options.model, options.device, options.init) == (
        "Blobs of before", "blobs.safetensors", "cpu", None
    )  # fmt: skip
    for stage in ("warmup", "finetune"):  # as they were used; only a budget in minutes changes them
        assert_same_meaning(configs[stage], old_json(f"run/{stage}.json"))
        assert load(KINDS[stage], folder / f"{stage}.json") == configs[stage]
        assert configs[stage].license == LICENSE


def test_a_finished_run_stays_finished(folder):
    """The same command trains nothing, and writes the same model and figures."""
    events, before = [], old_json("run/status.json")
    model = run(folder, Job(events.append))
    status = json.loads((folder / "status.json").read_text())
    assert not [event for event in events if event.phase == "train"]
    assert status["state"] == "done"
    for name in ("pairs", "mean", "start"):
        assert status["held_out"][name] == before["held_out"][name]
    old, new = load_file(OLD / "run" / "blobs.safetensors"), load_file(model)
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_run_goes_on_from_its_warm_up(folder):
    for path in folder.iterdir():
        if path.name.startswith(("finetune.safetensors", "result", "blobs", "status")):
            path.unlink()
    events = []
    card = read_card(run(folder, Job(events.append)))
    assert [event.step for event in events if event.phase == "train"] == [1, 2, 3, 4]
    assert (card.title, card.license) == ("Blobs of before", LICENSE)
    start = old_json("run/status.json")["held_out"]["start"]
    assert card.results["held_out"]["start"] == start, "read from start.json, not measured again"


def test_a_model_says_of_itself_what_it_said():
    path = OLD / "run" / "blobs.safetensors"
    card, before = read_card(path), old_json("run/status.json")["held_out"]
    assert (card.title, card.license) == ("Blobs of before", LICENSE)
    assert card.model.backbone_settings["flow_stride"] == 2
    assert (card.preprocessing.spacing, card.preprocessing.align, card.preprocessing.steps) == (
        (2.5, 2.5, 2.5), "center", 2
    )  # fmt: skip
    assert (card.provenance["stage"], card.provenance["cases"]) == ("GRPO fine-tuning", 3)
    assert card.results["held_out"] == before
    printed = CliRunner().invoke(app, ["info", str(path)], catch_exceptions=False).output
    assert LICENSE in printed
    assert f"registered {before['mean']['dice']:.3f}" in " ".join(printed.replace("│", " ").split())


def test_a_models_network_has_the_weights_of_its_file():
    path = OLD / "run" / "blobs.safetensors"
    state, stored = load_model(str(path)).network.state_dict(), load_file(path)
    assert sorted(state) == sorted(stored)
    assert all(torch.equal(state[name], stored[name]) for name in stored)


# ------------------------------------------------------------------------------------------------------------ reports

JUDGED = old_json("reports/judged.json")


@pytest.mark.parametrize("name", JUDGED)
def test_a_report_is_judged_as_before(name):
    report, judged = old_json(f"reports/{name}.json"), JUDGED[name]
    found = folds(report)
    verdict = judge(figures(report), DEFAULT_LIMITS, found)
    assert "schema" not in report
    had = figures(report)
    since = ("folded_voxels", "near_percent", "far_percent")
    assert [had.pop(name) for name in since] == [None] * len(since)
    gained = had.pop("similarity_change")  # a figure since then, of numbers that were there
    assert gained == report["similarity"]["warped"] - report["similarity"]["aligned"]
    assert had == judged["figures"]
    assert {key: shown(key, value) for key, value in had.items()} == judged["texts"]
    colors = {key: color for key, color in verdict.colors.items() if key != "similarity_change"}
    assert (found.sentence, verdict.color, colors) == (judged["folds"], judged["color"], judged["colors"])
    assert [beyond.sentence() for beyond in verdict.beyond] == judged["reasons"]


def values_on(page, report):
    """What a page shows, by the path of each number in the report; they must be the report's own."""
    found = {}
    for path, text in re.findall('data-path="([^"]+)" value="([^"]+)"', page):
        value = report
        for key in path.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
        found[path] = value, float(text)
    return found


@pytest.mark.parametrize("name", JUDGED)
def test_a_report_is_shown_with_its_numbers(name):
    report = old_json(f"reports/{name}.json")
    page = render_page(report, [])
    found = values_on(page, report)
    assert all(value == shown for value, shown in found.values())
    assert {"folding.njd_percent", "folding.cells.folded_percent", "similarity.warped", "seconds.total"} <= set(found)
    assert ("dice.mean.warped" in found) == (report.get("dice") is not None)
    assert JUDGED[name]["folds"] in page
    assert LICENSE in page
    assert all(notice["message"] in page for notice in report["warnings"])


def test_the_files_of_an_earlier_result_are_known(tmp_path):
    """They are replaced by the next registration into the folder, and a file of the user's is not."""
    shutil.copy(OLD / "reports" / "full.json", tmp_path / "report.json")
    listed = set(old_json("reports/full.json")["files"])
    for name in listed - {"report.json"} | {"mine.nii.gz"}:
        (tmp_path / name).touch()
    assert earlier_files(tmp_path) == listed
