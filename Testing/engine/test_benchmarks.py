"""The benchmark of fine-tuning: every arm's settings are valid, and a run is known by its settings."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from MorphSeekLib.protocol.settings import to_dict

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("hippocampus", ROOT / "Testing/benchmarks/hippocampus.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


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


def test_settings_round_trip(benchmark):
    settings = benchmark.settings_of(benchmark.Arm(benchmark.FIELD), "weak", 300, 1)
    found = to_dict(benchmark.config_of(settings))
    assert (found["policy"]["place"], found["loss"]["folding"], found["training"]["seed"]) == ("field", 3.0, 1)
