"""Fine-tuning: cards and curves, exact resume, best weights, shared by processes, stopped when it collapses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import socket
import string
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import write_dataset
from safetensors import safe_open

from MorphSeekLib.data.datasets import Pair, PairLoader, load_dataset
from MorphSeekLib.io.images import read_labels
from MorphSeekLib.networks import model_file
from MorphSeekLib.networks.policy import ModelSettings, PolicySettings
from MorphSeekLib.protocol.errors import Cancelled, MorphSeekError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.settings import to_dict
from MorphSeekLib.space.preprocessing import Preprocessing
from MorphSeekLib.training.distributed import World
from MorphSeekLib.training.finetuning import UPDATES, FinetuneConfig, FinetuneRun, finetune, score
from MorphSeekLib.training.losses import LossSettings
from MorphSeekLib.training.policies import PolicyGradientSettings
from MorphSeekLib.training.rewards import RewardSettings
from MorphSeekLib.training.trainer import RunSettings, validate
from MorphSeekLib.training.warmup import TrainingConfig, warmup

MODEL = ModelSettings(
    backbone_settings={"encoder": (8, 8), "decoder": (8,), "extra": (8,), "norm": "instance", "flow_stride": 2}
)
CONFIG = FinetuneConfig(
    loss=LossSettings(regularization=0.5, folding=1.0, dice=1.0),
    policy=PolicyGradientSettings(trajectories=4, weight=0.1),
    training=FinetuneRun(iterations=4, steps=2, validate_every=2, save_every=1, pairs=2, kl_target=1.0),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return load_dataset(write_dataset(tmp_path_factory.mktemp("blobs")))


def warm(dataset, path, model=MODEL):
    run = RunSettings(iterations=2, steps=1, validate_every=2)
    config = TrainingConfig(
        model=model, preprocessing=Preprocessing(spacing=(2.5, 2.5, 2.5), align="none"), training=run
    )
    return warmup(dataset, config, path)


@pytest.fixture(scope="module")
def init(dataset, tmp_path_factory):
    return warm(dataset, tmp_path_factory.mktemp("init") / "warm.safetensors")


def weights(path):
    return model_file.load(path)[0].state_dict()


def same(one, other):
    found = weights(other)
    assert all(torch.equal(value, found[name]) for name, value in weights(one).items())


@pytest.mark.parametrize("place", ["latent", "field"])
def test_a_run_writes_card_curves_and_lines(dataset, init, tmp_path, place):
    policy = dataclasses.replace(CONFIG.policy, place=place, credit="local" if place == "field" else "trajectory")
    config = dataclasses.replace(CONFIG, policy=policy)
    finetune(dataset, config, init, tmp_path / "m.safetensors")
    card = model_file.read_card(tmp_path / "m.safetensors")
    assert card.provenance["stage"] == "GRPO fine-tuning"
    assert card.provenance["settings"]["reward"]["weights"] == {"dice": 1.0, "folding": 20.0}
    assert card.provenance["init"]["stage"] == "warm-up"
    assert card.preprocessing.steps == 2
    assert card.model.policy.s == "sqrt_n"
    rows = [json.loads(line) for line in (tmp_path / "m.safetensors.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    logged = {"reward", "reward_spread", "groups_without_spread", "advantage_rms", "advantage_largest"}
    logged |= {"kl", "kl_weight", "sigma", "gradient_norm"}
    assert logged <= set(rows[0])
    assert "validation/posterior_dice_spread" in rows[1]
    assert rows[1]["kl_weight"] != rows[0]["kl_weight"], "the controller acts"
    assert list((tmp_path / "m.safetensors.log").glob("events.out.tfevents*"))
    assert not (tmp_path / "m.safetensors.state").exists()


def test_a_cancelled_run_resumes_to_the_same_weights(dataset, init, tmp_path):
    finetune(dataset, CONFIG, init, tmp_path / "whole.safetensors")
    seen = []
    with pytest.raises(Cancelled):
        finetune(dataset, CONFIG, init, tmp_path / "cut.safetensors", job=Job(seen.append, lambda: len(seen) > 3))
    finetune(dataset, CONFIG, init, tmp_path / "cut.safetensors")
    same(tmp_path / "whole.safetensors", tmp_path / "cut.safetensors")
    lines = [(tmp_path / f"{name}.safetensors.jsonl").read_text() for name in ("whole", "cut")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("calls", [3, 5, 6], ids=["early", "late", "in the last validation"])
def test_a_run_cancelled_anywhere_resumes_to_the_same_card(dataset, init, tmp_path, calls):
    """With weights that do not move all validations are equal: the first stays the best, over the resuming too."""
    run = dataclasses.replace(CONFIG.training, iterations=3, pairs=1, validate_every=1, learning_rate=0.0)
    config = dataclasses.replace(CONFIG, training=run)
    finetune(dataset, config, init, tmp_path / "whole.safetensors")
    asked = itertools.count(1)  # once an iteration, once its validation pair
    with pytest.raises(Cancelled):
        finetune(dataset, config, init, tmp_path / "cut.safetensors", job=Job(cancelled=lambda: next(asked) == calls))
    finetune(dataset, config, init, tmp_path / "cut.safetensors")
    same(tmp_path / "whole.safetensors", tmp_path / "cut.safetensors")
    cards = [to_dict(model_file.read_card(tmp_path / f"{name}.safetensors")) for name in ("whole", "cut")]
    for card in cards:
        card["provenance"] |= {"seconds": 0, "date": ""}
    assert cards[0] == cards[1]
    assert cards[0]["provenance"]["best_iteration"] == 1


@pytest.mark.parametrize(("update", "updates"), [("step", 6), ("iteration", 3)])
def test_weights_move_after_each_step_or_once_an_iteration(dataset, init, tmp_path, update, updates):
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, update=update))
    seen = []
    with pytest.raises(Cancelled):
        finetune(dataset, config, init, tmp_path / "m.safetensors", job=Job(seen.append, lambda: len(seen) > 3))
    with safe_open(tmp_path / "m.safetensors.state", framework="pt") as state:
        assert json.loads(state.metadata()["standing"])["done"] == 3
        counts = {int(state.get_tensor(name)) for name in state.keys() if name.startswith("adam.step.")}  # noqa: SIM118
    assert counts == {updates}


def test_the_policys_gradient_keeps_to_its_share(dataset, init, tmp_path):
    """With a vanishing share the policy teaches nothing, with a large one it does; its length is in the curves."""
    policy = dataclasses.replace(CONFIG.policy, place="field", credit="local", advance="mean", weight=20.0)
    arms = {
        "none": dataclasses.replace(policy, weight=0.0),
        "silent": dataclasses.replace(policy, share=1e-6),
        "heard": dataclasses.replace(policy, share=1e6),
    }
    run = dataclasses.replace(CONFIG.training, kl_target=None, iterations=2)
    found = {}
    for name, value in arms.items():
        config = dataclasses.replace(CONFIG, policy=value, training=run)
        finetune(dataset, config, init, tmp_path / f"{name}.safetensors")
        found[name] = weights(tmp_path / f"{name}.safetensors")

    def apart(name):
        return sum(float((found[name][k].float() - v.float()).square().sum()) for k, v in found["none"].items()) ** 0.5

    assert apart("silent") < 0.1 * apart("heard")
    rows = [json.loads(line) for line in (tmp_path / "silent.safetensors.jsonl").read_text().splitlines()]
    assert all(row["policy_share"] > 1e-6 for row in rows)
    with pytest.raises(ValueError, match="tau, sigma and share must be above 0"):
        dataclasses.replace(policy, share=0.0)


def test_with_one_step_both_updates_are_one(dataset, init, tmp_path):
    for update in UPDATES:
        run = dataclasses.replace(CONFIG.training, update=update, steps=1, iterations=2)
        finetune(dataset, dataclasses.replace(CONFIG, training=run), init, tmp_path / f"{update}.safetensors")
    same(*(tmp_path / f"{update}.safetensors" for update in UPDATES))
    with pytest.raises(ValueError, match="update is 'epoch'; it must be one of step, iteration"):
        FinetuneRun(update="epoch")


def test_the_last_weights_are_not_kept_when_earlier_ones_were_better(dataset, init, tmp_path):
    """A learning rate that destroys the model: what is written is the best validation, not the end."""
    run = dataclasses.replace(CONFIG.training, learning_rate=0.5, gradient_clip=1e6, validate_every=1, kl_target=None)
    policy = dataclasses.replace(CONFIG.policy, weight=0.0)
    config = dataclasses.replace(CONFIG, training=run, policy=policy)
    finetune(dataset, config, init, tmp_path / "m.safetensors")
    rows = [json.loads(line) for line in (tmp_path / "m.safetensors.jsonl").read_text().splitlines()]
    figures = [{k.removeprefix("validation/"): v for k, v in row.items()} for row in rows]
    scores = [score(f, run.folding_limit) for f in figures]
    card = model_file.read_card(tmp_path / "m.safetensors")
    assert card.provenance["best_iteration"] == scores.index(max(scores)) + 1
    assert card.results["validation"]["dice"] == pytest.approx(figures[scores.index(max(scores))]["dice"])
    assert card.provenance["stage"] == "weakly supervised"


def test_folding_beyond_the_limit_loses_to_less_folding():
    assert score({"dice": 0.7, "folded_percent": 0.1}, 0.3) > score({"dice": 0.9, "folded_percent": 0.4}, 0.3)
    assert score({"dice": 0.9, "folded_percent": 0.4}, 0.3) > score({"dice": 0.9, "folded_percent": 0.5}, 0.3)


def test_label_free_rewards_need_no_labels(dataset, init, tmp_path):
    bare = dataclasses.replace(
        dataset,
        cases={k: [dataclasses.replace(c, label=None) for c in v] for k, v in dataset.cases.items()},
        pairs={},
    )
    config = dataclasses.replace(
        CONFIG, loss=dataclasses.replace(CONFIG.loss, dice=0.0), reward=RewardSettings({"lncc": 1.0, "folding": 1.0})
    )
    finetune(bare, config, init, tmp_path / "m.safetensors")
    assert model_file.read_card(tmp_path / "m.safetensors").results["validation"] == {}
    with pytest.raises(MorphSeekError, match="0 labeled training cases"):
        finetune(bare, CONFIG, init, tmp_path / "n.safetensors")


def with_landmarks(folder, count=4):
    """The blobs with the eight corners of the core's box and its middle as landmarks, and a held-out middle."""
    path = write_dataset(folder, count)
    values = json.loads(path.read_text())
    for row in values["training"]:
        labels = read_labels(folder / row["label"])
        at = (labels.data == 2).nonzero().float()
        low, high = at.min(dim=0).values, at.max(dim=0).values
        corners = [[(low, high)[b][c] for c, b in enumerate(bits)] for bits in itertools.product((0, 1), repeat=3)]
        row["landmarks"] = row["image"].replace(".nii.gz", ".csv")
        np.savetxt(folder / row["landmarks"], np.array(corners), delimiter=",")
    path.write_text(json.dumps(values))
    return load_dataset(path)


def test_landmark_rewards_bring_landmarks_together(init, tmp_path):
    """Rewards of landmarks alone, no label and no image loss: the error falls, and it rises when the reward is negated.

    Over all pairs: a network as small as this one cannot serve each of them.
    """
    marked = with_landmarks(tmp_path / "marked")
    config = FinetuneConfig(
        loss=LossSettings(similarity_weight=0.0, regularization=0.02, kl=0.0),
        policy=PolicyGradientSettings(
            trajectories=16, place="field", cell=4, credit="local", reach=1, antithetic=True, advance="mean", share=1e6
        ),
        reward=RewardSettings({"landmarks": 1.0}),
        training=FinetuneRun(iterations=40, steps=1, validate_every=40, learning_rate=1e-3),
    )

    def error(path):
        model, card = model_file.load(path)
        loader = PairLoader(card.preprocessing, model.multiple_of, True)
        pairs = [Pair(*sides) for sides in itertools.permutations(marked.cases["training"], 2)]
        return validate(model, [lambda p=p: loader(p) for p in pairs], 1, torch.device("cpu"))["tre_mm"]

    finetune(marked, config, init, tmp_path / "m.safetensors")
    assert error(tmp_path / "m.safetensors") < 0.985 * error(init)  # 0.95 to 0.98 of it with the seeds 0 to 2
    against = dataclasses.replace(config, reward=RewardSettings({"landmarks": -1.0}))
    finetune(marked, against, init, tmp_path / "against.safetensors")
    assert error(tmp_path / "against.safetensors") > 1.1 * error(init)
    bare = load_dataset(write_dataset(tmp_path / "bare"))
    with pytest.raises(MorphSeekError, match=r"needs landmarks of every training case, but image_0.nii.gz has none"):
        finetune(bare, config, init, tmp_path / "n.safetensors")


def test_labels_limits_the_cases(dataset, init, tmp_path):
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, labels=3))
    finetune(dataset, config, init, tmp_path / "m.safetensors")
    assert model_file.read_card(tmp_path / "m.safetensors").provenance["cases"] == 3


def test_a_policy_at_its_floor_stops_the_run(dataset, tmp_path):
    floored = dataclasses.replace(MODEL, policy=PolicySettings(log_sigma_min=-1.0, log_sigma_max=1.0))
    init = warm(dataset, tmp_path / "warm.safetensors", floored)  # the head starts at log sigma = -2
    with pytest.raises(MorphSeekError, match="sigma is at its floor"):
        finetune(dataset, CONFIG, init, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_two_processes_do_what_one_does(dataset, init, tmp_path):
    """The same global batch, shared by two real CPU processes, started by the command of the SLURM script."""
    pytest.importorskip("lightning_fabric", reason="several processes need Lightning Fabric")
    page = (Path(__file__).resolve().parents[2] / "Resources" / "Docs" / "cluster.md").read_text()
    command = re.search(r"^srun bash -c 'exec (torchrun .*)'$", page, re.MULTILINE)[1]
    (tmp_path / "settings.json").write_text(json.dumps(plain(CONFIG)))
    values = {"NODES": "1", "PROCESSES": "2", "DEVICE": "cpu", "FIRST": "localhost:0", "OMP_NUM_THREADS": "1"}
    values |= {"CASES": str(dataset.path), "INIT": str(init), "SETTINGS": str(tmp_path / "settings.json")}
    values |= {"MODEL": str(tmp_path / "two.safetensors")}
    words = string.Template(command).substitute(values).split()
    words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    ended = subprocess.run(
        words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    finetune(dataset, CONFIG, init, tmp_path / "one.safetensors")
    # biases before InstanceNorm have no gradient but rounding, which Adam blows up: what the models do is compared
    pair = PairLoader(Preprocessing(spacing=(2.5, 2.5, 2.5)), 4, True)(dataset.split("registration_val")[0])
    with torch.inference_mode():
        one, two = (
            model_file.load(tmp_path / f"{name}.safetensors")[0].eval()(pair.moving, pair.fixed)
            for name in ("one", "two")
        )
        start = model_file.load(init)[0].eval()(pair.moving, pair.fixed)
    moved = float((one - start).abs().max())
    assert float((one - two).abs().max()) < 0.01 * moved


def two_processes(dataset, init, config, out):
    """Two real CPU processes that share a training, under torchrun's variables."""
    (out.parent / "settings.json").write_text(json.dumps(plain(config)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "MorphSeekLib.app.cli", "finetune", str(dataset.path), "--init", str(init)]
    command += ["--config", str(out.parent / "settings.json"), "--device", "cpu", "--out", str(out)]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    return [
        subprocess.Popen(
            command, env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]


def ended(processes):
    """(exit code, last words) of each; what waits for the other for ever is ended after 300 s, which is an error."""
    try:
        return [(process.wait(300), process.stderr.read()[-2000:]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def endless(config=CONFIG):
    """More iterations than any test waits for."""
    return dataclasses.replace(
        config, training=dataclasses.replace(config.training, iterations=10**6, validate_every=10**6)
    )


def test_processes_stop_together_when_one_is_asked_to(dataset, init, tmp_path):
    """Ctrl-C reaches the second process alone: neither waits for the other, and the run can be resumed."""
    pytest.importorskip("lightning_fabric", reason="several processes need Lightning Fabric")
    processes = two_processes(dataset, init, endless(), tmp_path / "two.safetensors")
    lines = tmp_path / "two.safetensors.jsonl"
    wait_until(lambda: lines.is_file() and len(lines.read_text().splitlines()) >= 2, processes)
    processes[1].send_signal(signal.SIGINT)
    assert [code for code, _ in ended(processes)] == [130, 130]
    with safe_open(tmp_path / "two.safetensors.state", framework="pt") as state:
        assert json.loads(state.metadata()["standing"])["done"] == len(lines.read_text().splitlines())


def test_a_process_that_cannot_go_on_is_named_by_the_other(dataset, init, tmp_path):
    """A case that only the second process cannot read, in a training whose processes read different pairs."""
    pytest.importorskip("lightning_fabric", reason="several processes need Lightning Fabric")
    data = load_dataset(write_dataset(tmp_path / "data", 12))
    (tmp_path / "data" / "image_11.nii.gz").write_bytes(b"no image")
    codes, words = zip(*ended(two_processes(data, init, endless(), tmp_path / "two.safetensors")), strict=True)
    assert codes == (2, 2), words
    assert any("because process" in text and "of 2 could not go on" in text for text in words)
    assert all("image_11.nii.gz" in text for text in words)


def test_a_training_that_ends_closes_its_connection():
    """Else the interpreter's end aborts about one process in ten."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    with pytest.raises(Cancelled), World(SimpleNamespace(global_rank=0, world_size=1)):
        raise Cancelled
    assert not distributed.is_initialized()


def wait_until(condition, processes):
    """Wait while all live; the limit only ends a hang."""
    limit = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < limit, "it did not happen within 300 s"
        assert all(process.poll() is None for process in processes), "it ended too early"
        time.sleep(0.02)


def test_a_killed_process_resumes_to_the_same_weights(dataset, init, tmp_path):
    """A real process, really killed; --iterations counts for the settings' own."""
    run = dataclasses.replace(CONFIG.training, iterations=20, pairs=1, validate_every=20)
    config = dataclasses.replace(CONFIG, training=run)
    longer = dataclasses.replace(config, training=dataclasses.replace(run, iterations=30))
    (tmp_path / "settings.json").write_text(json.dumps(plain(longer)))
    command = "import torch; torch.set_num_threads(1); from MorphSeekLib.app.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "finetune", str(dataset.path), "--init", str(init), "--device", "cpu",
         "--config", str(tmp_path / "settings.json"), "--iterations", "20", "--out", str(tmp_path / "cut.safetensors")],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until((tmp_path / "cut.safetensors.state").exists, [process])
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut.safetensors").exists(), "it was killed before its end"
    finetune(dataset, config, init, tmp_path / "cut.safetensors")
    finetune(dataset, config, init, tmp_path / "whole.safetensors")
    same(tmp_path / "whole.safetensors", tmp_path / "cut.safetensors")


def plain(config):
    """Settings as a file holds them: without what is unset."""
    return {
        name: {k: v for k, v in table.items() if v is not None} if isinstance(table, dict) else table
        for name, table in to_dict(config).items()
    }


def test_learned_features_become_the_labels(dataset, init, tmp_path):
    model = dataclasses.replace(MODEL, backbone_settings=MODEL.backbone_settings | {"forces": 1, "features": 4})
    start = warm(dataset, tmp_path / "warm.safetensors", model)
    run = dataclasses.replace(CONFIG.training, iterations=40, validate_every=40, learning_rate=3e-3, pairs=1)
    config = dataclasses.replace(
        CONFIG,
        loss=dataclasses.replace(CONFIG.loss, features=1.0),
        policy=dataclasses.replace(CONFIG.policy, weight=0.0),
        training=run,
    )
    finetune(dataset, config, start, tmp_path / "m.safetensors")
    lines = [json.loads(line) for line in (tmp_path / "m.safetensors.jsonl").read_text().splitlines()]
    assert lines[-1]["features"] < 0.7 * lines[0]["features"]
    assert model_file.read_card(tmp_path / "m.safetensors").labels == {1: 1, 2: 2, 3: 3}
    with pytest.raises(MorphSeekError, match="cannot learn features"):
        finetune(dataset, config, init, tmp_path / "n.safetensors")


def test_a_model_gets_the_features_that_the_labels_need(dataset, tmp_path):
    """None at first; then one more than it has, where the known ones keep their channels."""
    model = dataclasses.replace(MODEL, backbone_settings=MODEL.backbone_settings | {"forces": 1})
    start = warm(dataset, tmp_path / "warm.safetensors", model)
    config = dataclasses.replace(
        CONFIG,
        loss=dataclasses.replace(CONFIG.loss, features=1.0),
        policy=dataclasses.replace(CONFIG.policy, weight=0.0),
        training=dataclasses.replace(CONFIG.training, iterations=1, pairs=1),
    )
    cases = [dataclasses.replace(case, merged=((1, 1002), (2, 2035), (3, 0))) for case in dataset.cases["training"]]
    large = dataclasses.replace(dataset, cases={"training": cases}, pairs={}, labels={})
    first = finetune(large, config, start, tmp_path / "first.safetensors")
    card = model_file.read_card(first)
    assert (card.labels, card.model.backbone_settings["features"]) == ({1002: 1, 2035: 2}, 3)
    cases = [dataclasses.replace(case, merged=((1, 1002), (2, 2035))) for case in dataset.cases["training"]]
    more = dataclasses.replace(large, cases={"training": cases})
    card = model_file.read_card(finetune(more, config, first, tmp_path / "second.safetensors"))
    assert (card.labels, card.model.backbone_settings["features"]) == ({1002: 1, 2035: 2, 3: 3}, 4)
