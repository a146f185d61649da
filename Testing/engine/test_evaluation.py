"""Evaluation over a data set: lost labels by their one definition, and rows that survive whatever ends the call."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import blob_grid, blob_image, blob_labels, steps_only, write_dataset
from test_registration import random_model
from typer.testing import CliRunner

from MorphSeekLib.app.cli import app
from MorphSeekLib.app.crew import Crew
from MorphSeekLib.app.evaluate import by_crew
from MorphSeekLib.data.datasets import Case, Pair, PairLoader, load_dataset
from MorphSeekLib.evaluation.evaluate import evaluate
from MorphSeekLib.io.images import write_image
from MorphSeekLib.measures.scores import WORKING, definitions
from MorphSeekLib.protocol.errors import Cancelled, MorphSeekError
from MorphSeekLib.protocol.job import SILENT, Job
from MorphSeekLib.space.geometry import Grid, Volume
from MorphSeekLib.training.trainer import VALIDATION_FIGURES, validate

NARROW = Grid.from_parts((24, 28, 20), (2.0, 2.0, 2.5), np.eye(3), (0, 0, 0))
WIDE = Grid.from_parts((60, 28, 20), (2.0, 2.0, 2.5), np.eye(3), (0, 0, 0))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model") / "random.safetensors")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return load_dataset(write_dataset(tmp_path_factory.mktemp("blobs"), 3))


@pytest.fixture
def losing(tmp_path):
    """A data set of one pair whose label 2 no registration can bring onto the fixed grid, and of one that keeps all."""
    fixed, moving = blob_labels(0, NARROW), Volume(torch.zeros(WIDE.shape, dtype=torch.int32), WIDE)
    moving.data[:24] = (blob_labels(1, NARROW).data == 1).int()
    moving.data[50:54, 5:9, 5:9] = 2
    rows = []
    for name, labels in (("fixed", fixed), ("moving", moving)):
        rows.append({"image": f"{name}.nii.gz", "label": f"{name}-label.nii.gz"})
        write_image(blob_image(labels, 0), tmp_path / rows[-1]["image"])
        write_image(labels, tmp_path / rows[-1]["label"])
    pairs = [{"fixed": "fixed.nii.gz", "moving": side} for side in ("fixed.nii.gz", "moving.nii.gz")]
    values = {"labels": {"1": "shell", "2": "core", "3": "ball"}, "training": rows, "registration_test": pairs}
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    return load_dataset(tmp_path / "dataset.json")


def strictly(path: Path) -> dict:
    """JSON as every program reads it: NaN and Infinity are errors."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_lost_label_has_dice_0_and_no_distance_and_is_named(losing, model, tmp_path):
    evaluate(losing, "registration_test", model, tmp_path / "e.json")
    written = strictly(tmp_path / "e.json")
    kept, lost = written["pairs"]
    assert (kept["lost_labels"], lost["lost_labels"]) == ([], ["core"])
    assert lost["dice_per_label"]["core"] == 0.0
    assert lost["dice"] == pytest.approx(lost["dice_per_label"]["shell"] / 2)
    assert 0 < lost["hd95"] < 50
    assert written["lost_labels"] == {"core": 1}
    assert written["mean"]["hd95"] == pytest.approx((kept["hd95"] + lost["hd95"]) / 2)


def test_a_distance_that_no_label_has_is_null_and_left_out_of_the_mean(losing, model, tmp_path):
    alone = dataclasses.replace(losing, evaluated=(2,))
    evaluate(alone, "registration_test", model, tmp_path / "e.json")
    written = strictly(tmp_path / "e.json")
    assert written["pairs"][1]["hd95"] is None
    assert written["mean"]["hd95"] == written["pairs"][0]["hd95"]
    only = dataclasses.replace(alone, pairs={"test": alone.pairs["registration_test"][1:]})
    found = evaluate(only, "test", model, tmp_path / "e.json")
    assert (found["mean"]["hd95"], found["std"]["hd95"], found["mean"]["dice"]) == (None, None, 0.0)


def test_the_command_says_which_labels_were_lost(losing, model, tmp_path):
    arguments = ["evaluate", str(losing.path), "--model", model.name, "--out", str(tmp_path / "e.json")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "Labels that warping lost (Dice 0, no HD95): core in 1 pairs." in " ".join(done.output.split())


def test_the_lost_label_of_the_shared_case_is_evaluated(shared, model, tmp_path):
    path = shared / "cases" / "lost_label" / "dataset.json"
    if not path.is_file():
        pytest.skip("needs ../shared/cases/lost_label, which is not here")
    found = evaluate(load_dataset(path), "registration_test", model, tmp_path / "e.json", steps_only())
    assert found["lost_labels"]
    assert strictly(tmp_path / "e.json")["mean"]["dice"] == pytest.approx(found["mean"]["dice"])


def test_validation_counts_a_lost_label_as_dice_0(dataset, model):
    """The training's figures, on the working grid, by the same definition."""
    loader = PairLoader(model.card.preprocessing, model.network.multiple_of, centered=False)
    pairs = [lambda pair=pair: loader(pair) for pair in dataset.pairs["registration_test"]]
    found = validate(model.network, pairs, 1, model.device)
    assert found["lost_labels"] == 0.0
    assert found["dice"] > 0.3
    away = copy.deepcopy(model.network)
    torch.nn.init.constant_(away.backbone.flow.bias, 100.0)  # voxels: nothing is left in the image
    found = validate(away, pairs, 1, model.device)
    assert (found["dice"], found["lost_labels"]) == (0.0, 3.0)


def test_training_evaluation_and_table_take_their_definitions_from_one_table(dataset, model, tmp_path):
    written = evaluate(dataset, "registration_test", model, tmp_path / "e.json")["definitions"]
    validated = definitions(WORKING, VALIDATION_FIGURES)
    assert "the fixed image's grid" in written["njd_percent"]
    assert validated["njd_percent"] == written["njd_percent"].replace("the fixed image's grid", "the working grid")
    assert validated["sdlogj"] == written["sdlogj"]


# ------------------------------------------------------------------ rows that stay


def stopped_after(count, dataset, model, out):
    """Evaluate, cancelled when ``count`` pairs are done."""
    seen = []
    with pytest.raises(Cancelled):
        evaluate(
            dataset,
            "registration_test",
            model,
            out,
            job=Job(lambda event: seen.append(event.step), lambda: seen[-1:] == [count]),
        )


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line)["row"] for line in (out.parent / f"{out.name}.rows.jsonl").read_text().splitlines()[1:]]


def test_a_cancelled_evaluation_keeps_its_rows_and_goes_on_from_them(dataset, model, tmp_path):
    out = tmp_path / "e.json"
    stopped_after(1, dataset, model, out)
    assert not out.exists(), "only a whole result has this name"
    [row] = rows_of(out)
    found = evaluate(dataset, "registration_test", model, out)
    assert found["pairs"][0]["seconds"] == row["seconds"], "the first pair was not registered again"
    assert len(found["pairs"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.json"]
    whole = evaluate(dataset, "registration_test", model, tmp_path / "whole.json")
    assert found["mean"] | {"seconds": 0} == whole["mean"] | {"seconds": 0}


def test_rows_of_other_settings_or_changed_files_are_not_taken(tmp_path, model):
    path = write_dataset(tmp_path / "data", 3)
    out = tmp_path / "e.json"
    stopped_after(1, load_dataset(path), model, out)
    [row] = rows_of(out)
    label = path.parent / "label_0.nii.gz"
    write_image(blob_labels(7, blob_grid()), label)
    assert evaluate(load_dataset(path), "registration_test", model, out)["pairs"][0]["dice"] != row["dice"]
    stopped_after(1, load_dataset(path), model, out)
    found = evaluate(load_dataset(path), "registration_test", model, out, steps_only(steps=1))
    assert found["steps"] == 1
    assert found["pairs"][0]["dice"] != row["dice"]


def test_half_a_row_of_a_killed_process_is_left_out(dataset, model, tmp_path):
    out = tmp_path / "e.json"
    stopped_after(1, dataset, model, out)
    with (tmp_path / "e.json.rows.jsonl").open("a") as file:
        file.write(
            '{"files": [["a',
        )
    assert len(evaluate(dataset, "registration_test", model, out)["pairs"]) == 2


def test_workers_give_the_same_figures(dataset, model, tmp_path):
    here = evaluate(dataset, "registration_test", model, tmp_path / "here.json", steps_only())
    work = by_crew(Crew(workers=2, threads=1), dataset, "registration_test", model.name, steps_only(), "cpu", SILENT)
    there = evaluate(dataset, "registration_test", model, tmp_path / "there.json", steps_only(), work=work)
    for one, other in zip(here["pairs"], there["pairs"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_a_pair_that_fails_does_not_stop_the_others(tmp_path, model):
    path = write_dataset(tmp_path / "data", 3)
    first = path.parent / load_dataset(path).pairs["registration_test"][0].moving.file.name
    first.write_bytes(b"no image")
    out = tmp_path / "e.json"
    with pytest.raises(MorphSeekError, match=rf"^[12] of 2 pairs failed.*\n.*{first.name}"):
        evaluate(load_dataset(path), "registration_test", model, out, steps_only())
    assert not out.exists()


# ------------------------------------------------------------------ refused before the work


def test_an_output_that_cannot_be_written_is_refused_before_the_work(dataset, model, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out, words in (
        (tmp_path, "a folder has this name"),
        (tmp_path / "file" / "e.json", "cannot be written"),
        (dataset.path, "is an input and would be overwritten"),
    ):
        events = []
        with pytest.raises(MorphSeekError, match=words):
            evaluate(dataset, "registration_test", model, out, job=Job(events.append))
        assert events == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "not even a folder is left"


def test_a_pair_without_an_entry_for_its_labels_is_named_before_the_work(dataset, model, tmp_path):
    pair = dataset.pairs["registration_test"][0]
    bare = dataclasses.replace(dataset, pairs={"test": [pair, Pair(pair.fixed, Case(pair.moving.image))]})
    events = []
    with pytest.raises(MorphSeekError, match=r"image_1.nii.gz, the moving one of pair 2 .*no entry for a label map"):
        evaluate(bare, "test", model, tmp_path / "e.json", job=Job(events.append))
    assert events == []


def test_a_pair_without_a_label_to_judge_is_named(dataset, model, tmp_path):
    none = dataclasses.replace(dataset, evaluated=(9,))
    words = r"label_0.nii.gz and label_1.nii.gz have no label in common among those to evaluate \(9\)"
    with pytest.raises(MorphSeekError, match=words):
        evaluate(none, "registration_test", model, tmp_path / "e.json")


def test_two_labels_of_one_name_keep_their_own_figures(dataset, model, tmp_path):
    same = dataclasses.replace(dataset, labels={1: "kidney", 2: "kidney", 3: "ball"})
    found = evaluate(same, "registration_test", model, tmp_path / "e.json")
    assert set(found["pairs"][0]["dice_per_label"]) == {"kidney (1)", "kidney (2)", "ball"}
