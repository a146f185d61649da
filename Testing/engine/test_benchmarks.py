"""The benchmark of fine-tuning: every arm's settings are valid, and a run is known by its settings."""

from __future__ import annotations

import dataclasses
import json
import math

import hippocampus
import pytest
import torch

from MorphSeekLib.backbones import build_backbone
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.settings import to_dict
from MorphSeekLib.training.finetuning import FinetuneConfig


@pytest.fixture(scope="module")
def benchmark():
    return hippocampus


def test_every_arm_is_a_run_of_its_own(benchmark):
    for arms in benchmark.EXPERIMENTS.values():
        found = set()
        for arm in arms.values():
            for strength in arm.strengths:
                settings = benchmark.settings_of(arm, strength, 300, 0)
                assert benchmark.config_of(settings).training.iterations == 300 * arm.iterations
                found.add(benchmark.name_of(arm, settings))
        assert len(found) == sum(len(arm.strengths) for arm in arms.values())


def test_the_report_names_who_is_better_and_how_surely(benchmark, tmp_path):
    """Two arms, two seeds: means, and Wilcoxon over the pairs with seeds averaged."""

    def run(shift):
        pairs = [
            {"dice": 0.7 + 0.001 * n + shift, "hd95": 2.0, "folded_percent": 0.2, "njd_percent": 0.1, "sdlogj": 0.5}
            for n in range(12)
        ]
        return {"pairs": pairs, "seconds": 10.0}

    first, other = list(benchmark.EXPERIMENTS["kl"])
    results = {(first, "strong"): [run(0.0), run(0.0)], (other, "strong"): [run(0.01), run(0.03)]}
    benchmark.report("kl", results, tmp_path, 300)
    table = json.loads((tmp_path / "kl.json").read_text())["arms"]
    assert table[1]["mean"]["dice"] - table[0]["mean"]["dice"] == pytest.approx(0.02)
    assert table[1]["by_seed"]["dice"][1] - table[1]["by_seed"]["dice"][0] == pytest.approx(0.02)
    assert table[1]["p"]["dice"] == pytest.approx(2 / 2**12)
    assert table[1]["p"]["njd_percent"] == 1.0
    assert "0.7255" in (tmp_path / "kl.md").read_text(encoding="utf-8")
    assert (tmp_path / "kl.png").stat().st_size > 5000


def test_the_field_arm_is_the_default_of_fine_tuning(benchmark):
    default, config = FinetuneConfig(), benchmark.config_of(benchmark.FIELD)
    assert (config.policy, config.reward) == (default.policy, default.reward)
    gain = benchmark.EXPERIMENTS["gain"]
    assert gain["+ GRPO, field (default policy)"].settings == benchmark.FIELD
    unlimited = gain["+ GRPO, field, gradient not limited (diverges)"]
    assert benchmark.config_of(unlimited.settings).policy.share == math.inf


def test_settings_round_trip(benchmark):
    settings = benchmark.settings_of(benchmark.Arm(benchmark.FIELD), "weak", 300, 1)
    found = to_dict(benchmark.config_of(settings))
    assert (found["policy"]["place"], found["loss"]["folding"], found["training"]["seed"]) == ("field", 3.0, 1)


# ------------------------------------------------------------------ runs: done once, shared, resumed

FIGURES = {"dice": 0.7, "hd95": 2.0, "folded_percent": 0.2, "njd_percent": 0.1, "sdlogj": 0.5}


@pytest.fixture
def trained(monkeypatch):
    """Trainings and tests that only write down that they were called."""
    calls = []

    def training(dataset, config, *paths):
        calls.append(paths[-1].name)
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_bytes(b"")
        return paths[-1]

    card = type("Card", (), {"provenance": {"seconds": 10.0}})
    monkeypatch.setattr(hippocampus, "load_dataset", lambda path: path)
    monkeypatch.setattr(hippocampus, "warmup", training)
    monkeypatch.setattr(hippocampus, "finetune", training)
    monkeypatch.setattr(hippocampus, "read_card", lambda path: card)
    monkeypatch.setattr(hippocampus, "test", lambda dataset, model, zeroed: [FIGURES] * 12)
    return calls


def study(tmp_path, experiment, *more):
    hippocampus.main([experiment, "dataset.json", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path), *more])


def test_two_parts_do_every_run_once_and_the_last_reports(trained, tmp_path):
    study(tmp_path, "kl", "--part", "2/2")
    assert not (tmp_path / "kl.md").exists()
    study(tmp_path, "kl", "--part", "1/2")
    assert len(trained) == len(set(trained)) == 3
    assert trained[0] == "warm.safetensors"
    assert (tmp_path / "kl.md").is_file()
    study(tmp_path, "kl")
    assert len(trained) == 3


def test_a_result_keeps_its_name_and_its_keys(trained, tmp_path):
    study(tmp_path, "kl")
    run = hippocampus.run_list("kl", 300)[0]
    found = json.loads((tmp_path / "runs" / f"{run.name}.json").read_text())
    assert list(found) == ["name", "strength", "seed", "settings", "seconds", "pairs"]
    assert run.name.startswith("warm-")
    assert found["settings"] == json.loads(json.dumps(dataclasses.asdict(hippocampus.config_of(run.settings))))


def test_each_start_is_made_by_whoever_needs_it_first(trained, tmp_path):
    """The second part of "warmup" needs fresh weights that the first does not."""
    study(tmp_path, "warmup", "--part", "2/2")
    assert trained[0] == "fresh.safetensors"


def test_a_result_of_before_gets_the_dice_at_zero_without_a_training(trained, tmp_path):
    study(tmp_path, "skips")
    trained.clear()
    file = next((tmp_path / "runs").glob("warm-*.json"))
    found = json.loads(file.read_text())
    del found["dice_zeroed"]
    file.write_text(json.dumps(found))
    study(tmp_path, "skips")
    assert trained == []
    assert json.loads(file.read_text())["dice_zeroed"] == pytest.approx(0.7)


def test_a_dropped_skip_leaves_its_say_to_the_top_feature():
    torch.manual_seed(0)
    settings = {"encoder": [4, 6, 8], "decoder": [8, 6, 4], "extra": [4]}
    whole = build_backbone("voxelmorph", settings)
    torch.nn.init.normal_(whole.flow.weight)
    for gains, ruled in (((), (True, True)), ((0.0,), (False, True)), ((0.0, 0.5), (False, True))):
        network = build_backbone("voxelmorph_weakened_skips", settings | {"skip_gains": gains})
        network.load_state_dict(whole.state_dict())
        skips, top = network.encode(*torch.rand(2, 1, 1, 16, 16, 16))
        skips = [skip.detach().requires_grad_() for skip in skips]
        network.decode(skips, top.detach()).square().sum().backward()
        felt = tuple(bool((skips[-1 - n].grad != 0).any()) for n in (0, 1))
        assert felt == ruled
    with pytest.raises(MorphSeekError, match="3 factors, but 2 skips can be weakened"):
        build_backbone("voxelmorph_weakened_skips", settings | {"skip_gains": (0.0, 0.0, 0.0)})
