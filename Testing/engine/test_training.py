"""Warm-up: it learns, it resumes exactly, it can be stopped; synthetic pairs; data sets and settings."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from cases import TINY as TINY_SETTINGS
from cases import blob_grid, blob_labels, write_dataset
from safetensors import safe_open
from safetensors.torch import save_file

from MorphSeekLib.app.settings_file import load
from MorphSeekLib.data.datasets import PairLoader, known_sizes, load_dataset
from MorphSeekLib.data.synthesis import LabelMapSource, SynthesisSettings, label_values
from MorphSeekLib.io.images import write_image
from MorphSeekLib.networks import model_file
from MorphSeekLib.networks.policy import Latent, ModelSettings, RegistrationModel
from MorphSeekLib.protocol.errors import Cancelled, MorphSeekError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.settings import from_dict, override, to_dict
from MorphSeekLib.protocol.startup import bundled, find
from MorphSeekLib.space import fields
from MorphSeekLib.space.preprocessing import Preprocessing, normalize
from MorphSeekLib.training.finetuning import FinetuneConfig, finetune
from MorphSeekLib.training.losses import Batch, LossSettings, Step, advance, feature_loss, soft_dice, warmup_loss
from MorphSeekLib.training.run_state import Memory
from MorphSeekLib.training.sac import SACConfig, train_spac
from MorphSeekLib.training.trainer import RunSettings, Task, Trainer, seed_for, set_learning_rate
from MorphSeekLib.training.warmup import TrainingConfig, warmup

TINY = ModelSettings(
    backbone_settings={"encoder": (8, 8), "decoder": (8,), "extra": (8,), "norm": "instance", "flow_stride": 2}
)
CONFIG = TrainingConfig(
    model=TINY,
    preprocessing=Preprocessing(spacing=(2.5, 2.5, 2.5), align="none"),
    loss=LossSettings(regularization=0.5, folding=1.0),
    training=RunSettings(iterations=6, steps=2, validate_every=3, save_every=2),
)
SYNTHETIC = dataclasses.replace(
    CONFIG,
    preprocessing=Preprocessing(spacing=(2.5, 2.5, 2.5), shape=(24, 28, 24), align="none"),
    loss=LossSettings(similarity_weight=0.0, dice=1.0, regularization=0.5),
    synthesis=SynthesisSettings(scored=3, groups=((1, 2),)),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return load_dataset(write_dataset(tmp_path_factory.mktemp("blobs")))


def run(dataset, config, out, **options):
    events = []
    warmup(dataset, config, out, job=Job(events.append), **options)
    return events


def weights(path):
    return model_file.load(path)[0].state_dict()


@pytest.mark.parametrize("config", [CONFIG, SYNTHETIC], ids=["images", "synthetic"])
def test_a_run_writes_a_checkpoint_that_says_what_it_is(dataset, tmp_path, config):
    events = run(dataset, config, tmp_path / "model.safetensors")
    model, card = model_file.load(tmp_path / "model.safetensors")
    assert card.model.backbone_settings == to_dict(config.model)["backbone_settings"]
    assert card.provenance["data"]["name"] == "blobs"
    assert card.provenance["settings"] == to_dict(config)
    assert card.preprocessing.steps == 2
    assert {"dice", "dice_before", "lost_labels", "folded_percent", "njd_percent", "sdlogj"} == set(
        card.results["validation"]
    )
    assert [e.step for e in events if e.phase == "train"] == [1, 2, 3, 4, 5, 6]
    assert events[-1].fraction == 1.0
    assert not (tmp_path / "model.safetensors.state").exists()
    assert list((tmp_path / "model.safetensors.log").glob("events.out.tfevents*"))
    assert isinstance(model, RegistrationModel)


@pytest.mark.parametrize("config", [CONFIG, SYNTHETIC], ids=["images", "synthetic"])
def test_a_cancelled_run_resumes_to_the_same_weights(dataset, tmp_path, config):
    run(dataset, config, tmp_path / "whole.safetensors")
    done = []
    with pytest.raises(Cancelled):
        warmup(dataset, config, tmp_path / "cut.safetensors", job=Job(done.append, lambda: len(done) > 4))
    assert not (tmp_path / "cut.safetensors").exists()
    assert (tmp_path / "cut.safetensors.state").exists()
    events = run(dataset, config, tmp_path / "cut.safetensors")
    assert next(e.step for e in events if e.phase == "train") > 1
    whole, cut = weights(tmp_path / "whole.safetensors"), weights(tmp_path / "cut.safetensors")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def same_card(one, other):
    """Equal in all but when and how long."""
    found = [to_dict(model_file.read_card(path)) for path in (one, other)]
    for card in found:
        card["provenance"] |= {"seconds": 0, "date": ""}
    assert found[0] == found[1]


@pytest.mark.parametrize("calls", [2, 4, 8], ids=["in an iteration", "in a validation", "in the last validation"])
def test_a_run_cancelled_anywhere_resumes_to_the_same_card_and_curves(dataset, tmp_path, calls):
    """It is asked once an iteration and once a validation pair: three iterations, a validation, and again."""
    run(dataset, CONFIG, tmp_path / "whole.safetensors")
    asked = itertools.count(1)
    with pytest.raises(Cancelled):
        warmup(dataset, CONFIG, tmp_path / "cut.safetensors", job=Job(cancelled=lambda: next(asked) == calls))
    assert next(asked) == calls + 1, "nothing was begun after it"
    run(dataset, CONFIG, tmp_path / "cut.safetensors")
    same_card(tmp_path / "whole.safetensors", tmp_path / "cut.safetensors")
    whole, cut = weights(tmp_path / "whole.safetensors"), weights(tmp_path / "cut.safetensors")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    whole, cut = ((tmp_path / f"{name}.safetensors.jsonl").read_text() for name in ("whole", "cut"))
    assert whole == cut


def test_a_killed_process_resumes_to_the_same_weights(dataset, tmp_path):
    """A real process, really killed between two states."""
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, iterations=40, save_every=2))
    (tmp_path / "settings.json").write_text(json.dumps({k: v for k, v in to_dict(config).items() if v is not None}))
    run(dataset, config, tmp_path / "whole.safetensors")
    command = [
        sys.executable,
        "-c",
        "import torch; torch.set_num_threads(1); from MorphSeekLib.app.cli import main; main()",
    ]
    command += ["warmup", str(dataset.path), "--config", str(tmp_path / "settings.json")]
    command += ["--out", str(tmp_path / "cut.safetensors"), "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 300  # only ends a hang
    while not (tmp_path / "cut.safetensors.state").exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut.safetensors").exists(), "it was killed before its end"
    events = run(dataset, config, tmp_path / "cut.safetensors")
    assert next(e.step for e in events if e.phase == "train") > 1
    whole, cut = weights(tmp_path / "whole.safetensors"), weights(tmp_path / "cut.safetensors")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_blocks_dropped_at_random_resume_to_the_same_weights(dataset, tmp_path):
    """Even where something else has drawn random numbers in between."""
    model = ModelSettings("transmorph", TINY_SETTINGS["transmorph"] | {"drop_path": 0.5})
    config = dataclasses.replace(CONFIG, model=model)
    run(dataset, config, tmp_path / "whole.safetensors")
    done = []
    with pytest.raises(Cancelled):
        warmup(dataset, config, tmp_path / "cut.safetensors", job=Job(done.append, lambda: len(done) > 3))
    torch.rand(7)
    run(dataset, config, tmp_path / "cut.safetensors")
    whole, cut = weights(tmp_path / "whole.safetensors"), weights(tmp_path / "cut.safetensors")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    model = dataclasses.replace(model, backbone_settings=TINY_SETTINGS["transmorph"])
    run(dataset, dataclasses.replace(config, model=model), tmp_path / "undropped.safetensors")
    other = weights(tmp_path / "undropped.safetensors")
    assert not all(torch.equal(whole[name], other[name]) for name in whole), "something was dropped"


@dataclasses.dataclass
class Count(Memory):
    """How often the task below was updated, in all processes together."""

    updates: int = 0


class Counting(Task[int]):
    """Trains nothing; its validations are best in the middle."""

    def __init__(self, dataset):
        network = RegistrationModel(TINY)
        super().__init__(dataset, CONFIG, network, CONFIG.preprocessing, torch.device("cpu"))
        self.memory = Count()

    def batch(self, iteration):
        return iteration

    def update(self, iteration, batch):
        assert batch == iteration == self.memory.updates
        self.memory.updates += 1
        with torch.no_grad():
            self.network.head.mu.bias.fill_(self.memory.updates)
        return {"updates": self.memory.updates}

    def validate(self, job):
        return {"dice": {3: 0.9, 6: 0.4}[self.memory.updates]}

    def card(self):
        return model_file.Card(title="Counted", provenance=self.provenance("counting", 0))


def test_a_tasks_memory_and_its_best_weights_survive_a_cancelled_run(dataset, tmp_path):
    seen, events, out = [], [], tmp_path / "m.safetensors"
    with pytest.raises(Cancelled):
        Trainer(Counting(dataset), out, Job(seen.append, lambda: len(seen) > 3)).run()
    Trainer(Counting(dataset), out, Job(events.append)).run()
    assert [e.metrics["updates"] for e in events if e.phase == "train"] == [5, 6]
    model, card = model_file.load(out)
    assert card.provenance["best_iteration"] == 3
    assert card.results["validation"] == {"dice": 0.9}
    assert (model.head.mu.bias == 3).all()


def counting(dataset, scores=None, **run):
    """The task above with other settings of the run; ``scores`` by update, 0.5 where none is given."""
    task = Counting(dataset)
    task.run = dataclasses.replace(task.run, **run)
    task.config = dataclasses.replace(task.config, training=task.run)
    task.validate = lambda job: {"dice": (scores or {}).get(task.memory.updates, 0.5)}
    return task


def average_of(share, updates):
    """What the average of a weight that is 0, 1, 2, ... after each update comes to."""
    average = 0.0
    for done in range(1, updates + 1):
        kept = min(share, (1 + done) / (10 + done))
        average = kept * average + (1 - kept) * done
    return average


def test_averaged_weights_are_kept_and_survive_a_cancelled_run(dataset, tmp_path):
    run = {"average": 0.5, "iterations": 6, "validate_every": 2}
    found = []
    for name, cancelled in (("whole", False), ("resumed", True)):
        out, seen = tmp_path / f"{name}.safetensors", []
        if cancelled:
            job = Job(seen.append, lambda seen=seen: len(seen) > 3)
            with pytest.raises(Cancelled):
                Trainer(counting(dataset, {6: 0.9}, **run), out, job).run()
        Trainer(counting(dataset, {6: 0.9}, **run), out).run()
        model, card = model_file.load(out)
        assert card.provenance["averaged"] == 0.5
        found.append(model.head.mu.bias[0].item())
    assert found[0] == found[1] == pytest.approx(average_of(0.5, 6))


def test_an_average_leaves_the_training_as_it_is(dataset, tmp_path):
    """The last weights are trained on; only what is validated and written is their average."""
    curves = []
    for share in (0.0, 0.9):
        events, averaged = [], override(CONFIG, "training", average=share)
        warmup(dataset, averaged, tmp_path / f"{share}.safetensors", job=Job(events.append))
        curves.append([e.metrics["loss"] for e in events if e.phase == "train"])
    assert curves[0] == curves[1]


def test_validations_that_bring_nothing_end_the_run(dataset, tmp_path):
    task = counting(dataset, {2: 0.9}, iterations=20, validate_every=1, patience=3)
    card = model_file.read_card(Trainer(task, tmp_path / "m.safetensors").run())
    assert task.memory.updates == 5
    assert card.provenance["best_iteration"] == 2


class Clock:
    """Seconds that pass by an update (1) and by a validation (0.5) of a task alone; notes the learning rates."""

    def __init__(self, task):
        self.now, self.rates = 100.0, []
        self._task, self._update, self._validate = task, task.update, task.validate
        task.update, task.validate = self.update, self.validate

    def __call__(self):
        return self.now

    def update(self, iteration, batch):
        self.now += 1
        self.rates.append(set_learning_rate(self._task.optimizer, self._task.run, iteration, self._task.progress))
        return self._update(iteration, batch)

    def validate(self, job):
        self.now += 0.5
        return self._validate(job)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_run_of_minutes_ends_in_time_with_its_rate_at_the_end(dataset, tmp_path, cancelled):
    events, clocks, seconds = [], [], 0.0
    for ends in (True, False) if cancelled else (False,):
        task = counting(dataset, minutes=0.5, iterations=3, save_every=1)
        clocks.append(Clock(task))
        job = Job(events.append, lambda ends=ends: ends and len(events) == 10)
        with pytest.raises(Cancelled) if ends else contextlib.nullcontext():
            Trainer(task, tmp_path / "m.safetensors", job, clocks[-1]).run()
        seconds += clocks[-1].now - 100
    assert 28 <= seconds <= 30
    rates = [rate for clock in clocks for rate in clock.rates]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.05 * rates[0]
    rows = [event for event in events if event.phase == "train"]
    assert rows[-1].step == task.memory.updates == len(rates)
    assert 5 <= sum("validation/dice" in row.metrics for row in rows) <= 11
    assert "validation/dice" in rows[-1].metrics


@pytest.mark.parametrize("values", [{"minutes": 0.0}, {"average": 1.0}, {"patience": 0}])
def test_settings_of_the_end_and_the_average_are_checked(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        RunSettings(**values)


def test_a_state_of_other_settings_is_refused(dataset, tmp_path):
    done = []
    with pytest.raises(Cancelled):
        warmup(dataset, CONFIG, tmp_path / "m.safetensors", job=Job(done.append, lambda: len(done) > 2))
    other = dataclasses.replace(CONFIG, loss=LossSettings(regularization=9.0))
    with pytest.raises(MorphSeekError, match="other settings"):
        warmup(dataset, other, tmp_path / "m.safetensors")


def test_it_learns_on_synthetic_pairs(dataset, source, tmp_path):
    """A minute's training raises the overlap of synthetic pairs that it never saw."""
    config = dataclasses.replace(
        SYNTHETIC,
        model=dataclasses.replace(TINY, backbone_settings=TINY.backbone_settings | {"forces": 2}),
        loss=LossSettings(similarity_weight=0.0, dice=1.0, regularization=0.1),
        training=RunSettings(iterations=60, steps=1, learning_rate=1e-2, validate_every=60),
    )
    run(dataset, config, tmp_path / "m.safetensors")
    model = model_file.load(tmp_path / "m.safetensors")[0].eval()
    before, after = [], []
    for seed in range(10):
        pair = source.pair(torch.Generator().manual_seed(10**6 + seed))
        with torch.inference_mode():
            blocks = torch.nn.functional.avg_pool3d(model(pair.moving, pair.fixed), 2) / 2
        before.append(float(soft_dice(pair.fixed_labels, pair.moving_labels)))
        after.append(float(soft_dice(pair.fixed_labels, fields.warp(pair.moving_labels, blocks))))
    assert sum(after) / 10 > sum(before) / 10 + 0.03


def test_warmup_loss_is_its_terms(dataset):
    """The weighted sum of Docs/method.md, section B, on a real pair."""
    from MorphSeekLib.measures.regularizers import diffusion
    from MorphSeekLib.measures.similarity import lncc
    from MorphSeekLib.networks.policy import kl_to_standard_normal

    torch.manual_seed(0)
    model = RegistrationModel(TINY)
    torch.nn.init.normal_(model.backbone.flow.weight, 0, 0.2)
    pair = PairLoader(CONFIG.preprocessing, 4, True)(dataset.split("registration_val")[0])
    outer = 0.3 * torch.randn(1, 3, *pair.grid.shape)
    weights = LossSettings(regularization=0.7, kl=0.01, folding=0.0)
    batch = Batch(pair.fixed, pair.moving)
    step = advance(model, batch, outer)
    loss, terms = warmup_loss(step, batch, weights)
    latent = model.encode(fields.warp(pair.moving, outer), pair.fixed)
    expected_total = fields.compose(outer, model.backbone.decode(latent.skips, latent.mu))
    torch.testing.assert_close(step.total, expected_total, atol=1e-4, rtol=1e-4)  # kernels round otherwise
    similarity = lncc(pair.fixed, fields.warp(pair.moving, expected_total))
    expected = similarity + 0.7 * diffusion(expected_total) + 0.01 * kl_to_standard_normal(latent)
    torch.testing.assert_close(loss, expected)
    assert set(terms) == {"kl", "diffusion", "similarity"}


def test_reduced_precision_changes_the_gradient_little(dataset, monkeypatch):
    """bfloat16, forced here: the network alone is cast, losses and the field's algebra stay in float32."""
    pair = PairLoader(CONFIG.preprocessing, 4, True)(dataset.split("registration_val")[0])
    batch, gradients = Batch(pair.fixed, pair.moving), []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("MorphSeekLib.networks.devices.network_precision", lambda device, dtype=dtype: dtype)
        torch.manual_seed(0)
        model = RegistrationModel(TINY)
        torch.nn.init.normal_(model.backbone.flow.weight, 0, 0.05)
        step = advance(model, batch, torch.zeros(1, 3, *pair.grid.shape))
        assert step.total.dtype == step.latent.mu.dtype == torch.float32
        warmup_loss(step, batch, CONFIG.loss)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert not torch.equal(*gradients)
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.95


def test_two_voxels_at_the_top_are_trained_in_full_precision(monkeypatch):
    """A processor's bfloat16 gradient there is of memory that nothing was written to."""
    monkeypatch.setattr("MorphSeekLib.networks.devices.network_precision", lambda device: torch.bfloat16)
    model = RegistrationModel(TINY)
    torch.nn.init.normal_(model.backbone.flow.weight, 0, 0.05)
    for cells, exact in ((2, True), (3, False)):
        images = torch.rand(2, 1, 1, cells * model.multiple_of, 16, 16)
        latent = advance(model, Batch(*images), torch.zeros(1, 3, *images.shape[3:])).latent
        precise = model.encode(images[1], images[0])
        assert torch.equal(latent.mu, precise.mu) == exact


def test_soft_dice_of_hard_labels_is_dice():
    a = (torch.rand(1, 2, 6, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    b = (torch.rand(1, 2, 6, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    expected = sum(2 * float((a[0, c] * b[0, c]).sum()) / float(a[0, c].sum() + b[0, c].sum()) for c in (0, 1)) / 2
    assert float(soft_dice(a, b)) == pytest.approx(expected, abs=1e-4)


def test_feature_loss_is_cross_entropy_and_dice_of_the_named_labels():
    """Two structures of values 3 and 1 in five features; the features that no structure names are background."""
    generator = torch.Generator().manual_seed(0)
    learned = torch.softmax(torch.randn(1, 5, 3, 4, 2, generator=generator, dtype=torch.float64), dim=1)
    shares = torch.softmax(torch.randn(1, 3, 3, 4, 2, generator=generator, dtype=torch.float64), dim=1)[:, :2]
    found = feature_loss(learned.float(), shares.float(), torch.tensor([3, 1]))
    entropy, dice = 0.0, []
    for x in range(24):
        p, q = learned[0].flatten(1)[:, x], shares[0].flatten(1)[:, x]
        rest = float(p[0] + p[2] + p[4])
        entropy -= float((1 - q.sum()) * math.log(rest) + q[0] * p[3].log() + q[1] * p[1].log()) / 24
    for structure, feature in ((0, 3), (1, 1)):
        p, q = learned[0, feature], shares[0, structure]
        dice.append(float(2 * (p * q).sum() / ((p * p).sum() + (q * q).sum())))
    assert float(found) == pytest.approx(entropy + 1 - sum(dice) / 2, abs=2e-4)


def test_coarse_labels_score_the_same_motion():
    """Shares in blocks of 2 voxels, warped by the block's mean displacement, follow a shift exactly."""
    fine = torch.zeros(1, 1, 16, 16, 16)
    fine[:, :, 4:10, 4:10, 4:10] = 1
    moved = torch.roll(fine, 2, 2)  # fixed = moving shifted by +2, so u = -2
    total = torch.zeros(1, 3, 16, 16, 16)
    total[:, 0] = -2

    pool = torch.nn.functional.avg_pool3d
    batch = Batch(moved, fine, fixed_labels=pool(moved, 2), moving_labels=pool(fine, 2))
    settings = LossSettings(similarity_weight=0.0, dice=1.0, regularization=0.0, kl=0.0)
    still = Latent(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1), None)
    _, terms = warmup_loss(Step(still, total, total, 0 * total), batch, settings)
    assert float(terms["soft_dice"]) == pytest.approx(1.0, abs=1e-4)


def test_a_loss_that_is_no_number_stops_the_run(dataset, tmp_path):
    config = dataclasses.replace(CONFIG, loss=LossSettings(regularization=float("inf")))
    with pytest.raises(MorphSeekError, match="not a number at iteration 1"):
        warmup(dataset, config, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_a_model_that_becomes_useless_in_the_last_step_is_not_written(dataset, tmp_path):
    training = dataclasses.replace(CONFIG.training, iterations=1, learning_rate=3e37)
    with pytest.raises(MorphSeekError, match="The training has become unstable"):
        warmup(dataset, dataclasses.replace(CONFIG, training=training), tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()
    assert not (tmp_path / "m.safetensors.state").exists()


def test_a_card_tells_what_its_warm_up_began_with_and_what_that_began_with(dataset, tmp_path):
    first, second, third = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "third"))
    config = from_dict(TrainingConfig, to_dict(CONFIG))  # as a file has it
    warmup(dataset, dataclasses.replace(config, title="first"), first)
    warmup(dataset, config, second, init=first)
    warmup(dataset, config, third, init=second)
    parent = model_file.read_card(third).provenance["init"]
    assert parent["sha256"] == model_file.sha256(second)
    assert parent["init"]["sha256"] == model_file.sha256(first)
    assert parent["init"]["settings"]["title"] == "first"


def test_a_start_with_weights_that_are_no_numbers_is_refused(dataset, tmp_path):
    run(dataset, CONFIG, tmp_path / "start.safetensors")
    with safe_open(tmp_path / "start.safetensors", framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        card = file.metadata()
    state["head.mu.bias"].fill_(float("inf"))
    save_file(state, tmp_path / "start.safetensors", card)
    with pytest.raises(MorphSeekError, match=r"start.safetensors cannot be used .* 'head.mu.bias'"):
        warmup(dataset, CONFIG, tmp_path / "m.safetensors", init=tmp_path / "start.safetensors")


@pytest.mark.parametrize("train", ["warmup", "finetune", "spac"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(dataset, tmp_path, train):
    (tmp_path / "file").write_text("mine")
    out, events = tmp_path / "file" / "m.safetensors", []
    begin = {
        "warmup": lambda: warmup(dataset, CONFIG, out, job=Job(events.append)),
        "finetune": lambda: finetune(dataset, FinetuneConfig(), tmp_path / "no", out, job=Job(events.append)),
        "spac": lambda: train_spac(dataset, SACConfig(), out, job=Job(events.append)),
    }
    with pytest.raises(MorphSeekError, match=r"m.safetensors cannot be written"):
        begin[train]()
    assert events == []


def test_streams_of_neighboring_seeds_share_no_number():
    """Torch's generator takes 32 bits of a seed, so those are compared."""
    streams = {
        (seed, stream): {seed_for(seed, stream, iteration) % 2**32 for iteration in range(500)}
        for seed in range(4)
        for stream in ("pairs", "policy", "layers")
    }
    assert all(len(numbers) == 500 for numbers in streams.values())
    assert len(set.union(*streams.values())) == 500 * len(streams)
    assert seed_for(-1, "pairs", 0) != seed_for(1, "pairs", 0), "any whole number is a seed"


@pytest.fixture(scope="module")
def source(dataset):
    paths = [case.label for case in dataset.cases["training"]]
    return LabelMapSource(paths, SYNTHETIC.preprocessing, SYNTHETIC.synthesis)


def test_synthetic_pairs_are_pure_functions_of_the_seed(source):
    one, two = (source.pair(torch.Generator().manual_seed(5)) for _ in range(2))
    other = source.pair(torch.Generator().manual_seed(6))
    assert torch.equal(one.fixed, two.fixed)
    assert torch.equal(one.moving_labels, two.moving_labels)
    assert not torch.equal(one.fixed, other.fixed)


def test_synthetic_pairs_have_the_promised_shapes_and_ranges(source):
    for seed in range(6):
        pair = source.pair(torch.Generator().manual_seed(seed))
        assert pair.fixed.shape == pair.moving.shape == (1, 1, 24, 28, 24)
        assert pair.fixed_labels.shape == (1, 3, 12, 14, 12)
        for image in (pair.fixed, pair.moving):
            assert float(image.min()) == 0.0
            assert float(image.max()) <= 1.0
            assert float(image.std()) > 0.01
        assert float(pair.fixed_labels.sum(dim=1).max()) <= 1.001, "structures do not overlap"
        overlap = soft_dice(pair.fixed_labels, pair.moving_labels)
        assert 0.2 < float(overlap) < 0.99, "crudely aligned, not registered"


def test_labels_follow_the_image(source):
    """Within one image the scored structures lie where its contrast says: undeformed and noise-free, they coincide."""
    quiet = dataclasses.replace(
        SYNTHETIC.synthesis,
        noise=0.0, bias=0.0, blur=0.0, thick=0.0, strip=0.0, deformation=3.0,
    )  # fmt: skip
    source.settings, before = quiet, source.settings
    try:
        g = torch.Generator().manual_seed(1)
        contrast = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.zeros(4)
        points = source._points(g)
        image, clean = source._image(0, contrast, contrast, False, points, g)
        shares = source._shares(0, torch.tensor([2]), points)
        for seen in (image, clean):
            coarse = torch.nn.functional.avg_pool3d(seen, 2)
            assert float(torch.corrcoef(torch.stack([coarse.flatten(), shares.flatten()]))[0, 1]) > 0.95
    finally:
        source.settings = before


def test_labels_of_one_image_lie_where_its_structures_do(source, monkeypatch):
    quiet = dataclasses.replace(
        SYNTHETIC.synthesis,
        noise=0.0, bias=0.0, blur=0.0, thick=0.0, strip=0.0, deformation=3.0,
    )  # fmt: skip
    monkeypatch.setattr(source, "settings", quiet)
    contrast = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.zeros(4)
    monkeypatch.setattr(source, "_contrast", lambda *_, **__: contrast)
    found = []
    for seed in range(4):
        monkeypatch.setattr(source, "settings", dataclasses.replace(quiet, mirror=seed % 2))
        image, values = source.labeled(torch.Generator().manual_seed(seed))
        assert image.shape == values.shape == (1, 1, 24, 28, 24)
        assert set(values.unique().tolist()) <= set(source.values.tolist())
        bright = (values == source.values[3]).float()
        shifts = [(0, 2), *((shift, axis) for axis in (2, 3, 4) for shift in (-1, 1))]
        moved = [torch.stack([image.roll(*shift).flatten(), bright.flatten()]) for shift in shifts]
        found.append(torch.stack([torch.corrcoef(pair)[0, 1] for pair in moved]))
    monkeypatch.setattr(source, "settings", dataclasses.replace(quiet, mirror=1))
    straight, turned = (source.labeled(torch.Generator().manual_seed(seed))[1] for seed in (0, 0))
    assert torch.equal(straight, turned)
    box = slice(4, 20), slice(0, 16), slice(8, 24)
    part, values = source.labeled(torch.Generator().manual_seed(0), box)
    assert part.shape == (1, 1, 16, 16, 16)
    assert torch.equal(values, straight[(slice(None), slice(None), *box)])
    right, *around = torch.stack(found).mean(dim=0)
    assert right > max(around) + 0.1
    assert max(abs(one - other) for one, other in zip(around[::2], around[1::2], strict=True)) < 0.1, "half a voxel off"


def test_synthesis_needs_two_label_maps(dataset):
    with pytest.raises(MorphSeekError, match="at least two"):
        LabelMapSource([dataset.cases["training"][0].label], SYNTHETIC.preprocessing, SYNTHETIC.synthesis)


def test_a_folder_of_label_maps_is_a_data_set(tmp_path):
    for seed in range(2):
        write_image(blob_labels(seed, blob_grid()), tmp_path / f"case_{seed}.nii.gz")
    (tmp_path / "notes.txt").write_text("not an image")
    assert len(load_dataset(tmp_path).split("training", "cases")) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", "must be a JSON object"),
        ('{"training": [{"image": "gone.nii.gz"}]}', "names gone.nii.gz, which is not there"),
    ],
)
def test_malformed_data_sets(tmp_path, text, words):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(MorphSeekError, match=words):
        load_dataset(tmp_path / "dataset.json")


def test_missing_data_set_and_split(tmp_path, dataset):
    with pytest.raises(MorphSeekError, match="cannot be read"):
        load_dataset(tmp_path / "dataset.json")
    with pytest.raises(MorphSeekError, match="it has: registration_test, registration_val"):
        dataset.split("registration_train")


def test_pairs_are_centered_when_asked(dataset):
    pair = dataset.split("registration_val")[0]
    prepared = PairLoader(CONFIG.preprocessing, 4, True)(pair)
    assert prepared.fixed.shape == prepared.moving.shape == prepared.fixed_labels.shape
    assert all(n % 4 == 0 for n in prepared.grid.shape)
    assert set(prepared.fixed_labels.unique().tolist()) == {0, 1, 2, 3}


def test_normalization():
    data = torch.cat([torch.zeros(50), torch.linspace(100, 200, 101)])
    percentile = normalize(data, Preprocessing(low=0.0, high=100.0))
    assert float(percentile[50]) == 0.0
    assert float(percentile[-1]) == 1.0
    assert float(normalize(data, Preprocessing(intensity="window", low=100.0, high=300.0))[-1]) == 0.5
    assert torch.equal(normalize(data, Preprocessing(intensity="none")), data)
    assert torch.isfinite(normalize(torch.ones(10), Preprocessing())).all()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trainings": {}}, "no setting 'trainings'"),
        ({"training": {"iterations": "many"}}, "training.iterations must be of type int"),
        ({"training": {"iterations": True}}, "must be of type int"),
        ({"training": 3}, "must be a table"),
        ({"loss": {"similarity": "psnr"}}, "similarity is 'psnr'"),
        ({"preprocessing": {"spacing": [1, 2]}}, "needs 3 values"),
    ],
)
def test_settings_are_checked(values, words):
    with pytest.raises(MorphSeekError, match=words):
        from_dict(TrainingConfig, values)


def test_settings_files(tmp_path):
    (tmp_path / "a.toml").write_text("[training]\niterations = 7\n[preprocessing]\nspacing = [1, 2, 3.5]\n")
    config = load(TrainingConfig, tmp_path / "a.toml")
    assert config.training.iterations == 7
    assert config.preprocessing.spacing == (1.0, 2.0, 3.5)
    assert from_dict(TrainingConfig, {k: v for k, v in to_dict(config).items() if v is not None}) == config
    (tmp_path / "b.toml").write_text("[training\n")
    with pytest.raises(MorphSeekError, match="not valid TOML"):
        load(TrainingConfig, tmp_path / "b.toml")
    with pytest.raises(MorphSeekError, match="cannot be read"):
        load(TrainingConfig, tmp_path / "c.toml")


def test_recipes_are_valid():
    recipes = bundled("recipe").values()
    assert recipes
    for recipe in recipes:
        kind = FinetuneConfig if "finetune" in recipe.name else SACConfig if "spac" in recipe.name else TrainingConfig
        assert load(kind, recipe).title


def test_training_runs_on_the_device_asked_for(dataset, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    run(dataset, CONFIG, tmp_path / "m.safetensors", device="cuda")


def test_a_partial_table_leaves_the_other_defaults():
    """[policy] with one key changes that key alone, not the rest back to the table's own defaults."""
    from MorphSeekLib.training.finetuning import FIELD_POLICY, FinetuneConfig

    found = from_dict(FinetuneConfig, {"policy": {"trajectories": 8}, "loss": {"dice": 2.0}})
    assert found.policy == dataclasses.replace(FIELD_POLICY, trajectories=8)
    assert found.loss == dataclasses.replace(FinetuneConfig().loss, dice=2.0)
    paper = load(FinetuneConfig, find("finetune-paper", "recipe")).policy
    assert (paper.place, paper.credit, paper.s, paper.advance) == ("latent", "trajectory", "sqrt_n", "greedy")


def test_a_label_that_lies_between_every_second_voxel_is_not_lost():
    labels = torch.zeros(8, 8, 8, dtype=torch.int32)
    labels[1, 3, 5], labels[7, 7, 7] = -4, 9
    assert label_values(labels) == [-4, 0, 9]


def test_a_training_writes_the_sizes_it_has_seen_onto_the_card(tmp_path):
    dataset = load_dataset(write_dataset(tmp_path / "data"))
    cases = dataset.split("training", "cases")
    low, high = known_sizes(cases)
    assert 20 < low <= high < 60
    assert known_sizes(cases, anatomy=(3,))[0] < low, "the ball alone is shown, too"
