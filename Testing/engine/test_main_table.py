"""The main table: runs in their order, trained on a budget, stopped, resumed, shared and reported, on tiny data."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from cases import TINY, write_dataset
from comparison.main_table import (
    SETTINGS,
    MainTableSettings,
    main_table,
    run_list,
    settings_of,
    shipped_settings,
)
from comparison.scoring import DEFINITIONS
from comparison.table import latex, markdown, rows_of, write_report
from main_table import main
from safetensors.torch import load_file
from scipy.stats import wilcoxon

from MorphSeekLib.app.settings_file import load
from MorphSeekLib.backbones.voxelmorph import VXM_HUGE, VoxelMorphSettings
from MorphSeekLib.networks.model_file import read_card, sha256
from MorphSeekLib.networks.policy import RegistrationModel
from MorphSeekLib.protocol.errors import Cancelled, MorphSeekError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.settings import from_dict

BLOBS = {
    "title": "A table of blobs",
    "threads": 1,
    "classical": ["none"],
    "tasks": {
        "blobs": {
            "title": "Blobs & balls_1 (50 %)",
            "data": "blobs/dataset.json",
            "centered": True,
            "preprocessing": {"spacing": [4, 4, 4], "align": "center"},
        }
    },
    "networks": {
        "vxm": {
            "title": "VoxelMorph, tiny",
            "arms": ["better", "warm", "soft", "refined"],
            "model": {"backbone": "voxelmorph", "backbone_settings": TINY["voxelmorph"]},
        },
        "spac": {
            "title": "SPAC, tiny",
            "arms": ["spac"],
            "model": {"backbone": "spac", "backbone_settings": TINY["spac"]},
        },
    },
    "arms": {
        "warm": {"title": "warm-up", "minutes": 0.03, "warmup": {"training": {"steps": 1, "save_every": 1000}}},
        "soft": {
            "title": "one step",
            "start": "warm",
            "minutes": 0.03,
            "finetune": {"policy": {"weight": 0.0}, "training": {"steps": 1}},
        },
        "better": {
            "title": "+ policy",
            "start": "warm",
            "baseline": "soft",
            "minutes": 0.05,
            "finetune": {"policy": {"trajectories": 2}, "training": {"steps": 2}},
        },
        "refined": {
            "title": "+ policy, refined",
            "start": "better",
            "baseline": "soft",
            "fit": True,
        },
        "spac": {
            "title": "actor-critic",
            "minutes": 0.1,
            "spac": {"training": {"steps": 2, "explore": 1, "batch": 2, "buffer": 8, "update_every": 1}},
        },
    },
}
NAMES = ["classical/none", "vxm/warm", "vxm/better", "vxm/soft", "vxm/refined", "spac/spac"]
NAMES = [f"blobs/{name}" for name in NAMES]


def blobs(**changes) -> MainTableSettings:
    """The settings above, with dotted names changed: blobs(**{"arms.warm.minutes": 0})."""
    values = copy.deepcopy(BLOBS)
    for name, value in changes.items():
        *path, last = name.split(".")
        table = values
        for part in path:
            table = table[part]
        table[last] = value
    return from_dict(MainTableSettings, values)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root / "blobs")
    return root


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A table with all its runs done: (its folder, the events)."""
    out, events = tmp_path_factory.mktemp("table"), []
    main_table(blobs(), data, out, device="cpu", job=Job(events.append))
    return out, events


def result(out, name):
    return json.loads((out / "runs" / name / "result.json").read_text())


def times(folder) -> dict[str, int]:
    """When each file of the runs was written; locks are opened, but not written, by who only looks."""
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


# ------------------------------------------------------------------ which runs, in which order


def test_starts_come_before_what_starts_from_them():
    runs = run_list(blobs())
    assert [run.name for run in runs] == NAMES
    for number, run in enumerate(runs):
        assert run.start is None or run.start in runs[:number]


@pytest.mark.parametrize(
    ("only", "wanted"),
    [
        ("*/vxm/soft", ["blobs/vxm/warm", "blobs/vxm/soft"]),
        ("blobs/classical", NAMES[:1]),
        ("*/*/s*", ["blobs/vxm/warm", "blobs/vxm/soft", "blobs/spac/spac"]),
        ("*//refined", ["blobs/vxm/warm", "blobs/vxm/better", "blobs/vxm/refined"]),
    ],
)
def test_only_some_bring_their_starts(only, wanted):
    assert [run.name for run in run_list(blobs(), only)] == wanted


def test_what_matches_nothing_is_named():
    with pytest.raises(MorphSeekError, match=r"No run matches 'lungs'; .* tasks blobs, methods classical, vxm, spac"):
        run_list(blobs(), "lungs")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("arms.soft.start", "cold", "arms.soft names 'cold'"),
        ("arms.soft.baseline", "spac", "arms.soft names 'spac'"),
        ("arms.warm.start", "soft", "starts from itself"),
        ("arms.soft.minutes", 0.0, "an arm that trains needs minutes"),
        ("arms.refined.minutes", 1.0, "another must have none"),
        ("arms.refined.start", "", "an arm that fits needs a start"),
        ("arms.soft.fit", True, "one of warmup, finetune, spac, fit"),
        ("arms.soft.finetune.training.steps", "three", "steps must be of type int"),
        ("networks.vxm.arms", ["warm", "cold"], "networks.vxm.arms names 'cold'"),
        ("classical", ["greedy", "demons"], "classical names 'demons'; there are: none, affine, greedy"),
        ("tasks.blobs.layout", "lungs", "layout names 'lungs'"),
        ("tasks.blobs.color", "red", "has no setting 'color'"),
    ],
)
def test_bad_settings_are_one_sentence(name, value, words):
    with pytest.raises(MorphSeekError) as raised:
        blobs(**{name: value})
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------ a table from its beginning to its end


def test_every_run_leaves_its_files(whole):
    out, events = whole
    for name in NAMES:
        found = result(out, name)
        assert len(found["pairs"]) == 2
        assert found["device"] == "cpu"
        assert found["software"]
        assert found["settings"]["seed"] == 0
    for name in ("vxm/warm", "vxm/soft", "vxm/better", "spac/spac"):
        folder = out / "runs/blobs" / name
        training, plan = (json.loads((folder / f"{n}.json").read_text()) for n in ("training", "plan"))
        lines = (folder / "model.safetensors.jsonl").read_text().splitlines()
        assert len(lines) == training["iterations"] == plan["iterations"] >= 10
        assert not (folder / "model.safetensors.state").exists()
        assert result(out, f"blobs/{name}")["training"] == training
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert events[0].message.startswith("1/6 blobs/classical/none: ")
    assert events[-1].message.startswith("6/6 blobs/spac/spac: ")


def test_arms_share_warm_up_and_losses(whole):
    out, _ = whole
    cards = {arm: read_card(out / f"runs/blobs/vxm/{arm}/model.safetensors") for arm in ("warm", "soft", "better")}
    start = sha256(out / "runs/blobs/vxm/warm/model.safetensors")
    assert cards["soft"].provenance["init"]["sha256"] == cards["better"].provenance["init"]["sha256"] == start
    losses = [cards[arm].provenance["settings"]["loss"] for arm in ("soft", "better")]
    assert losses[0] == losses[1]
    assert cards["warm"].preprocessing.spacing == cards["better"].preprocessing.spacing == (4.0, 4.0, 4.0)


def test_pictures_are_of_the_last_run(whole, data):
    """Every network's run has some; those that an earlier run left, of folds that are gone, go."""
    out, _ = whole
    names = {path.name.rsplit("_", 1)[0] for path in (out / "pictures").iterdir()}
    assert names == {name.replace("/", "_") for name in NAMES if "/classical/" not in name}
    stale, other = (out / "pictures" / f"blobs_vxm_{name}_9.png" for name in ("soft", "soft_too"))
    for path in (stale, other):
        path.write_bytes(b"")
    (out / "runs/blobs/vxm/soft/result.json").unlink()
    main_table(blobs(), data, out, only="*/vxm/soft", device="cpu")
    assert not stale.exists()
    assert other.exists()
    assert (out / "pictures/blobs_vxm_soft_1.png").read_bytes().startswith(b"\x89PNG")


def test_refining_trains_nothing(whole):
    out, _ = whole
    assert {p.name for p in (out / "runs/blobs/vxm/refined").iterdir()} == {"lock", "result.json"}
    refined, start = result(out, "blobs/vxm/refined"), result(out, "blobs/vxm/better")
    assert refined["training"] == start["training"]
    assert refined["pairs"][0]["dice"] != start["pairs"][0]["dice"]


def test_spac_is_made_for_the_tasks_grid(whole):
    out, _ = whole
    card = read_card(out / "runs/blobs/spac/spac/model.safetensors")
    assert card.model.backbone_settings["size"] == [16, 16, 16]
    assert card.provenance["stage"] == "soft actor-critic"


def test_the_report_says_it_all(whole):
    out, _ = whole
    assert {p.name for p in out.iterdir()} >= {"table.md", "table.tex", "labels.md", "results.json", "blobs.png"}
    table = (out / "table.md").read_text(encoding="utf-8")
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(NAMES)
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "as many cells in every line"
    assert "## Blobs & balls_1 (50 %): 2 pairs" in table
    assert all(text in table for text in DEFINITIONS.values())
    facts = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)  # no NaN: strict JSON
    assert list(facts["runs"]) == NAMES
    assert len(facts["runs"]["blobs/vxm/soft"]["pairs"]) == 2
    labels = (out / "labels.md").read_text(encoding="utf-8")
    assert [line.split(" ")[1] for line in labels.splitlines() if line.startswith("| ")] == [
        "label", "shell", "core", "ball"
    ]  # fmt: skip
    assert (out / "blobs.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_does_nothing(whole, data):
    out, _ = whole
    before = times(out / "runs")
    main_table(blobs(), data, out, device="cpu")
    assert times(out / "runs") == before


def test_a_title_may_change_other_settings_may_not(whole, data):
    """Refused by a sentence, and nothing is lost."""
    out, _ = whole
    before = times(out)
    for changes in ({"seed": 1}, {"tasks.blobs.preprocessing.spacing": [3, 3, 3]}, {"arms.warm.minutes": 0.02}):
        with pytest.raises(MorphSeekError, match=r"holds a run of other settings .*give another --out"):
            main_table(blobs(**changes), data, out, device="cpu")
    assert times(out) == before
    main_table(blobs(**{"arms.soft.title": "weakly supervised"}), data, out, device="cpu")
    assert times(out / "runs") == {k: v for k, v in before.items() if "/runs/" in k}
    assert "weakly supervised" in (out / "table.md").read_text(encoding="utf-8")


def test_a_checkpoint_is_measured_as_it_is(whole, data, tmp_path):
    out, _ = whole
    model = out / "runs/blobs/vxm/soft/model.safetensors"
    settings = blobs(
        classical=[],
        pairs=1,
        networks={"given": {"title": "given", "arms": ["given"]}},
        arms={"given": {"title": "as it is", "checkpoint": str(model)}},
    )
    main_table(settings, data, tmp_path / "out", device="cpu")
    found = result(tmp_path / "out", "blobs/given/given")
    assert found["training"] == {"checkpoint": str(model), "sha256": sha256(model)}
    assert [row["dice"] for row in found["pairs"]] == [result(out, "blobs/vxm/soft")["pairs"][0]["dice"]]


def test_too_few_minutes_are_refused(data, tmp_path):
    with pytest.raises(MorphSeekError, match="are too short for blobs/vxm/warm: 10 iterations take"):
        main_table(blobs(**{"arms.warm.minutes": 1e-6}), data, tmp_path, only="*/vxm/warm", device="cpu")


# ------------------------------------------------------------------ stopped, resumed, shared


def test_a_stopped_run_goes_on_where_it_stood(data, tmp_path):
    """It ends with the planned iterations, and with the weights of a run that was not stopped."""
    settings, only, run = blobs(), "*/vxm/warm", "runs/blobs/vxm/warm"
    stop = []

    def watch(event):
        if event.phase == "train" and event.metrics and event.step == 7 and "Iteration" in event.message:
            stop.append(event)

    with pytest.raises(Cancelled):
        main_table(settings, data, tmp_path / "a", only=only, device="cpu", job=Job(watch, lambda: stop))
    stopped = tmp_path / "a" / run
    assert (stopped / "model.safetensors.state").is_file()
    assert not (stopped / "result.json").exists()
    with pytest.raises(MorphSeekError, match="holds a run of other settings"):
        main_table(blobs(seed=1), data, tmp_path / "a", only=only, device="cpu")
    (tmp_path / "b" / run).mkdir(parents=True)
    shutil.copy(stopped / "plan.json", tmp_path / "b" / run)
    for out in (tmp_path / "a", tmp_path / "b"):
        main_table(settings, data, out, only=only, device="cpu")
    planned = json.loads((stopped / "plan.json").read_text())["iterations"]
    steps = [json.loads(line)["iteration"] for line in (stopped / "model.safetensors.jsonl").read_text().splitlines()]
    assert steps == list(range(1, planned + 1))
    weights = [load_file(out / run / "model.safetensors") for out in (tmp_path / "a", tmp_path / "b")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "main_table.py"


def test_two_processes_share_the_runs(data, tmp_path, monkeypatch):
    """One as a person types it, and this one, on one OUT: every run is done once, and both end with the report."""
    network = BLOBS["networks"]["vxm"] | {"arms": ["warm"]}
    values = BLOBS | {"networks": {"a": network, "b": network}}
    config, out, events = tmp_path / "settings.json", tmp_path / "out", []
    config.write_text(json.dumps(values))
    options = ["--data", data, "--out", out, "--config", config, "--device", "cpu"]
    command = [sys.executable, str(SCRIPT), "main-table", *map(str, options)]
    monkeypatch.setattr("comparison.runner.time.sleep", lambda _, pause=time.sleep: pause(0.02))
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        while not (out / "runs/blobs/a/warm/lock").is_file() and other.poll() is None:
            time.sleep(0.01)
        main_table(load(MainTableSettings, config), data, out, device="cpu", job=Job(events.append))
        said, complained = other.communicate()
    assert other.returncode == 0, complained
    assert "table.md" in said
    runs = ["blobs/classical/none", "blobs/a/warm", "blobs/b/warm"]
    assert [row.run.name for row in rows_of(load(MainTableSettings, config), out)] == runs
    assert list(json.loads((out / "results.json").read_text())["runs"]) == runs
    for name in runs[1:]:
        lines = (out / "runs" / name / "model.safetensors.jsonl").read_text().splitlines()
        assert len(lines) == result(out, name)["training"]["iterations"]
        here = any(f"{name}: Iteration" in event.message for event in events)
        assert here != (f"{name}: Measuring" in complained), "trained by one of the two"


def test_the_command_line_refuses_in_a_sentence(data, tmp_path, capsys):
    options = ["main-table", "--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for more, words in (
        (["--only", "lungs"], "No run matches 'lungs'"),
        (["--config", str(tmp_path / "no.toml")], "cannot be read"),
    ):
        with pytest.raises(typer.Exit) as ended:
            main([*options, *more])
        assert ended.value.exit_code == 2
        assert words in capsys.readouterr().err.replace("\n", "")
    found = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "hippocampus/dataset.json" in found.stderr.replace("\n", "")


# ------------------------------------------------------------------ figures of the report, by hand

PAIRS = [{"fixed": f"f{n}", "moving": f"m{n}", "dice_per_label": {"shell": 0.7}} for n in range(12)]


def row(pair, n, **figures):
    known = {"dice": 0.7 + 0.01 * n, "hd95": 2.0, "njd_percent": 0.5 + 0.1 * n, "sdlogj": 0.3}
    known |= {"seconds": 2.0, "cpu_seconds": 1.0, "peak_gb": 0.5}
    return pair | known | {name: value(known[name]) for name, value in figures.items()}


def written(out, settings, **runs):
    """Results as runs write them: arm=(figures of a row, what they are changed by)."""
    for run in run_list(settings):
        if run.arm in runs:
            training = {"iterations": 100, "minutes": 2.5, "parameters": {"backbone": 1000, "policy_head": 23}}
            pairs = [row(pair, n, **runs[run.arm]) for n, pair in enumerate(PAIRS)]
            content = {"settings": settings_of(settings, run), "pairs": pairs, "training": training, "device": "cpu"}
            (out / "runs" / run.name).mkdir(parents=True)
            (out / "runs" / run.name / "result.json").write_text(json.dumps(content))
    return {r.run.arm: r for r in rows_of(settings, out)}


def test_gain_folding_and_p_are_as_by_hand(tmp_path):
    settings = blobs(classical=["none", "greedy"])
    more, less = {"dice": lambda d: d + 0.025}, {"njd_percent": lambda f: 0.4 * f}
    rows = written(tmp_path, settings, warm={}, soft={}, better=more | less, refined=less, greedy=more)
    better, refined = rows["better"], rows["refined"]
    assert (better.gain, better.less_folding) == (pytest.approx(0.025), pytest.approx(0.6))
    assert better.p == pytest.approx({"dice": 2 / 2**12, "njd_percent": 2 / 2**12}), "all of 12 differ one way"
    assert refined.p["dice"] == 1.0
    assert refined.gain == 0.0
    assert (rows["soft"].gain, rows["soft"].less_folding, rows["soft"].p) == (None, None, {})
    assert better.mean["dice"] == pytest.approx(0.7 + 0.055 + 0.025)
    assert better.std["dice"] == pytest.approx(0.01 * (143 / 12) ** 0.5)

    table = markdown(settings, list(rows.values()))
    line = next(line for line in table.splitlines() if line.startswith("| VoxelMorph, tiny | + policy |"))
    cells = [cell.strip() for cell in line.split("|")]
    measured = {"0.7800 ± 0.035", "2.00", "0.4200", "1.00", "0.50"}
    assert measured | {"100, 2.5", "1,023", "+2.50", "60 %", "0.00049, 0.00049"} <= set(cells)
    assert "VoxelMorph, tiny, + policy: +2.5 Dice points, 60 % less folding: reached" in table
    assert "VoxelMorph, tiny, + policy, refined: +0.0 Dice points, 60 % less folding: missed" in table
    assert "'one step' for '+ policy'" in table


def test_p_is_wilcoxons_over_the_same_pairs(tmp_path):
    settings = blobs(classical=["none"])
    changes = iter([0.01, -0.002, 0.03, 0.004, -0.015, 0.02, 0.006, 0.007, -0.001, 0.008, 0.011, 0.012] * 2)
    rows = written(tmp_path, settings, soft={}, better={"dice": lambda d: d + next(changes)})
    there, here = ([r["dice"] for r in rows[arm].result["pairs"]] for arm in ("soft", "better"))
    assert rows["better"].p["dice"] == pytest.approx(wilcoxon(here, there).pvalue)
    assert 0.001 < rows["better"].p["dice"] < 0.2
    path = tmp_path / "runs/blobs/vxm/better/result.json"
    values = json.loads(path.read_text())
    values["pairs"].reverse()
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="not of the same pairs"):
        rows_of(settings, tmp_path)


def test_where_nothing_folded_nothing_is_gone(tmp_path):
    settings = blobs(classical=[])
    none = {"njd_percent": lambda f: 0.0}
    rows = written(tmp_path, settings, soft=none, better=none | {"dice": lambda d: d + 0.03})
    assert rows["better"].less_folding is None
    assert "+3.0 Dice points, no folds to lose: reached" in markdown(settings, list(rows.values()))


def test_what_could_not_be_measured_is_left_empty(tmp_path):
    """A memory peak that the system does not tell, a distance of labels that were all lost."""
    settings = blobs(classical=[])
    nothing = {"peak_gb": lambda gb: None, "hd95": lambda mm: float("nan")}
    written(tmp_path, settings, soft=nothing, better=nothing)
    write_report(settings, tmp_path)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    line = next(line for line in table.splitlines() if "| one step |" in line)
    assert "nan" not in line
    assert line.count("|  |") + line.count("| |") >= 1
    facts = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert facts["runs"]["blobs/vxm/soft"]["mean"]["hd95"] is None


def test_latex_is_sound(tmp_path):
    rows = written(tmp_path, blobs(classical=["none"]), none={}, soft={}, better={})
    text = latex(list(rows.values()))
    assert r"Blobs \& balls\_1 (50 \%)" in text
    depth = 0
    for before, sign in zip(" " + text, text, strict=False):
        depth += {"{": 1, "}": -1}.get(sign, 0) if before != "\\" else 0
        assert depth >= 0
    assert depth == 0
    assert text.count("$") == 2 * len(rows)
    body = [line for line in text.splitlines() if line.startswith((" & ", "VoxelMorph"))]
    assert len(body) == len(rows)
    for line in body:
        assert line.replace(r"\&", "").count("&") == 5, "six columns"
        assert line.endswith(r"\\")
    assert r"$75.50 \pm 3.45$" in text


# ------------------------------------------------------------------ the settings that are shipped

PAPER_SIZES = {
    "voxelmorph": 63_252_939,
    "transmorph": 46_771_251,
    "nice-trans": 5_706_508,
    "corrmlp": 4_190_834,
    "lapirn": 923_748,
}


@pytest.mark.parametrize("path", sorted(SETTINGS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_settings_load_and_their_networks_can_be_built(path):
    settings = load(MainTableSettings, path)
    runs = run_list(settings)
    assert len({run.name for run in runs}) == len(runs) > 0
    for network in settings.networks.values():
        with torch.device("meta"):
            RegistrationModel(network.model)


def test_the_claims_have_the_main_tables_arms_and_more_minutes():
    table, claims = shipped_settings("main-table"), shipped_settings("claims")
    assert len(run_list(claims)) == 4 * (1 + 2 * 6)
    assert {name: arm.minutes for name, arm in claims.arms.items()} == {
        "warm-up": 40.0,
        "soft-dice": 40.0,
        "early": 20.0,
        "soft-dice-3": 20.0,
        "morphseek": 20.0,
        "paper": 40.0,
    }
    for name, arm in claims.arms.items():
        assert dataclasses.replace(arm, minutes=table.arms[name].minutes) == table.arms[name]
    assert claims.networks["transmorph"].model == table.networks["transmorph"].model


@pytest.mark.parametrize("name", ["oasis", "lits", "abdomen-mrct"])
def test_the_papers_sizes_and_settings(name):
    """Adam 1e-4, batch 1, T = 3, J = 6, networks as published; the same losses for all arms of a network."""
    settings = shipped_settings(name)
    assert list(settings.networks) == [*PAPER_SIZES, "spac"]
    for network, parameters in PAPER_SIZES.items():
        with torch.device("meta"):
            assert RegistrationModel(settings.networks[network].model).parameter_counts()["backbone"] == parameters
    widths = settings.networks["voxelmorph"].model.backbone_settings
    assert from_dict(VoxelMorphSettings, widths) == VXM_HUGE
    arms = settings.arms
    trained = [config for arm in arms.values() for config in (arm.warmup, arm.finetune) if config is not None]
    assert {config.training.learning_rate for config in trained} == {1e-4}
    assert len({dataclasses.replace(config.loss, dice=1.0) for config in trained}) == 1
    for arm in ("morphseek", "paper"):
        found = arms[arm].finetune
        assert (found.training.steps, found.policy.trajectories, found.training.pairs) == (3, 6, 1)
    assert (arms["paper"].finetune.policy.place, arms["paper"].finetune.policy.s) == ("latent", "sqrt_n")
    assert settings.threads == 0
    assert [task.layout for task in settings.tasks.values()] == [name]
    assert arms["spac"].minutes == arms["warm-up"].minutes + arms["soft-dice"].minutes
