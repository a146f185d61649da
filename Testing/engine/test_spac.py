"""SPAC against the official code's tensors, and its soft actor-critic training on small cases."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from cases import TINY, write_dataset
from test_backbones import Whole
from typer.testing import CliRunner

from MorphSeekLib.app.cli import app
from MorphSeekLib.backbones import build_backbone
from MorphSeekLib.backbones.spac import SPAC, Plan, SPACSettings, from_official, settings_of
from MorphSeekLib.data.datasets import load_dataset
from MorphSeekLib.networks import model_file
from MorphSeekLib.networks.official import import_checkpoint
from MorphSeekLib.networks.policy import ModelSettings, PolicySettings, RegistrationModel
from MorphSeekLib.protocol.errors import Cancelled, MorphSeekError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.settings import to_dict
from MorphSeekLib.space import fields
from MorphSeekLib.space.preprocessing import Preprocessing
from MorphSeekLib.training.sac import (
    Critic,
    Learner,
    SACConfig,
    SACRun,
    Transition,
    critic_loss,
    descend,
    log_density,
    planner_loss,
    registration_loss,
    sample,
    stack,
    train_spac,
    update,
)

SMALL = SPACSettings(encoder=(4, 8), decoder=(8, 8, 4), plan=6, size=(8, 12, 8))
CONFIG = SACConfig(
    network=SPACSettings(encoder=(4, 8), decoder=(8, 8, 4), plan=6, size=(16, 20, 16)),
    preprocessing=Preprocessing(spacing=(3.5, 3.5, 3.5), align="none"),
    training=SACRun(
        iterations=4, steps=4, learning_rate=1e-3, explore=1, buffer=6, batch=2, update_every=2, validate_every=2,
        save_every=2,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def official(reference):
    """The fixture, and the images it was computed from."""
    values = reference("spac_64d")
    for name in ("moving", "fixed"):
        image = F.interpolate(values[f"{name}_lowres"], size=(128,) * 3, mode="trilinear", align_corners=True)
        values[name] = (image * 255).round() / 255
    return values


@torch.inference_mode()
def test_planner_and_actor_give_the_official_step(official):
    state = from_official(official["state_dict"])
    settings = settings_of(state, {})
    assert settings == SPACSettings((8, 16, 16, 32, 32), (32, 32, 32, 16, 8, 8), rectified_plan=True)
    network = SPAC(settings)
    network.load_state_dict(state)
    plan = network.planner(network.pair(official["moving"], official["fixed"]))
    torch.testing.assert_close(plan.mean.flatten(1), official["mu"], atol=1e-5, rtol=0)
    torch.testing.assert_close(plan.log_variance.flatten(1), official["logvar"], atol=1e-5, rtol=0)
    torch.testing.assert_close(plan.features[-1], official["top_feature"], atol=1e-5, rtol=0)
    drawn = official["z"].view(1, -1, 1, 1, 1)
    torch.testing.assert_close(log_density(plan, drawn), official["log_prob_z"], atol=1e-3, rtol=0)

    def every_fourth(volume: torch.Tensor) -> torch.Tensor:
        return volume[..., ::4, ::4, ::4]

    flow = network.actor(plan.mean, plan.features)
    torch.testing.assert_close(every_fourth(flow), official["flow_stride4"], atol=2e-4, rtol=0)
    warped = fields.warp(official["moving"], flow)
    torch.testing.assert_close(every_fourth(warped), official["warped_stride4"], atol=1e-4, rtol=0)
    second = network.actor(drawn, plan.features).clamp(-1, 1)
    composed = fields.warp(flow, second) + second  # fields.compose keeps edge values instead of zeros beyond
    torch.testing.assert_close(every_fourth(composed), official["composed_stride4"], atol=2e-4, rtol=0)


def test_the_critic_gives_the_official_value(official):
    settings = settings_of(from_official(official["state_dict"]), {})
    critic = Critic(settings)
    ours = {"conv7.single_conv.0": "out", "fc": "value"} | {f"conv{n}.single_conv.0": f"down.{n - 1}" for n in range(7)}
    names = {k.removeprefix("critic."): v for k, v in official["state_dict"].items() if k.startswith("critic.")}
    critic.load_state_dict(
        {re.sub("|".join(map(re.escape, ours)), lambda m: ours[m[0]], k): v for k, v in names.items()}
    )
    pair = torch.cat([official["fixed"], official["moving"]], dim=1)
    with torch.inference_mode():
        value = critic(pair, official["z"].view(1, -1, 1, 1, 1))
    torch.testing.assert_close(value, official["q"][0], atol=1e-5, rtol=0)
    assert sum(p.numel() for p in critic.parameters()) == official["n_params"]["critic"]


def test_official_weights_import_with_the_settings_they_imply(official, tmp_path):
    torch.save(official["state_dict"], tmp_path / "spac.pt")
    import_checkpoint(tmp_path / "spac.pt", "spac", tmp_path / "spac.safetensors")
    model, card = model_file.load(tmp_path / "spac.safetensors")
    assert card.model.backbone_settings["encoder"] == [8, 16, 16, 32, 32]
    assert card.model.backbone_settings["rectified_plan"]
    ours = from_official(official["state_dict"])
    assert all(torch.equal(value, ours[name]) for name, value in model.backbone.state_dict().items())
    torch.save({k: v for k, v in official["state_dict"].items() if k.startswith("actor")}, tmp_path / "actor.pt")
    with pytest.raises(MorphSeekError, match=r"it lacks planner\.down\.0\.0\.weight"):
        import_checkpoint(tmp_path / "actor.pt", "spac", tmp_path / "none.safetensors")


def test_parameters_of_the_published_width():
    network = SPAC(SPACSettings())
    counts = [sum(p.numel() for p in part.parameters()) for part in (network.planner, network.actor)]
    assert [*counts, sum(p.numel() for p in Critic(SPACSettings()).parameters())] == [1_301_248, 1_051_920, 755_841]


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    network = build_backbone("spac", {"encoder": [2, 3], "decoder": [3, 2, 2], "plan": 3, "size": [4, 8, 4]}).double()
    torch.nn.init.normal_(network.actor.out.weight)
    moving, fixed = torch.rand(2, 1, 1, 8, 8, 4, dtype=torch.float64)

    def loss(moving: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        replaced = {"network.planner.out.weight": out}
        return torch.func.functional_call(Whole(network), replaced, (moving, fixed)).square().mean()

    out = network.planner.out.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(loss, (moving.requires_grad_(), out), atol=1e-6, rtol=1e-3, fast_mode=True)


def test_another_size_means_the_same_motion():
    """A step of a constant on the network's grid, on images twice as large."""
    network = SPAC(SMALL)
    torch.nn.init.zeros_(network.actor.out.weight)
    images = torch.rand(2, 1, 1, 16, 24, 16)
    network.actor.out = torch.nn.Conv3d(4, 3, 3, 1, 1)
    torch.nn.init.zeros_(network.actor.out.weight)
    torch.nn.init.constant_(network.actor.out.bias, 5.0)
    field = network.decode(*network.encode(*images))
    for axis, (n, o) in enumerate(zip((16, 24, 16), SMALL.size, strict=True)):
        expected = torch.full(field.shape[2:], SMALL.max_step * (n - 1) / (o - 1))
        torch.testing.assert_close(field[0, axis], expected)


def learner_of(run: SACRun, seed: int = 0) -> Learner:
    torch.manual_seed(seed)
    model = ModelSettings("spac", to_dict(SMALL), PolicySettings(mean="linear"))
    return Learner(RegistrationModel(model), run)


def transitions(count: int, reward: float = 1.0, done: float = 1.0) -> list[Transition]:
    generator = torch.Generator().manual_seed(1)
    pairs = torch.rand(2 * count, 1, 2, *SMALL.size, generator=generator).half()
    plans = torch.randn(count, 1, SMALL.plan, 1, 1, 1, generator=generator)
    return [Transition(pairs[2 * n], plans[n], reward, pairs[2 * n + 1], done) for n in range(count)]


def test_the_critics_goal_is_the_soft_bellman_equation():
    run = SACRun(discount=0.9, temperature=0.5)
    learner = learner_of(run)
    batch = stack(transitions(3, reward=2.0, done=0.0), torch.device("cpu"))
    loss = critic_loss(learner, batch, run, torch.Generator().manual_seed(3))
    with torch.no_grad():
        plan = learner.network.backbone.planner(batch.after)
        noise = torch.randn(plan.mean.shape, generator=torch.Generator().manual_seed(3))
        drawn = plan.mean + torch.exp(plan.log_variance / 2) * noise
        covariance = torch.diag_embed(plan.log_variance.exp().flatten(1))
        density = torch.distributions.MultivariateNormal(plan.mean.flatten(1), covariance).log_prob(drawn.flatten(1))
        values = torch.stack([target(batch.after, drawn) for target in learner.targets]).amin(dim=0)
        goal = 2.0 + 0.9 * (values - 0.5 * density)
        expected = sum((critic(batch.before, batch.plan) - goal).square().mean() for critic in learner.critics)
    torch.testing.assert_close(loss.detach(), expected)
    over = critic_loss(learner, batch._replace(done=torch.ones(3)), run)
    alone = sum((critic(batch.before, batch.plan) - 2.0).square().mean() for critic in learner.critics)
    torch.testing.assert_close(over, alone)


def test_critics_learn_what_a_plan_is_worth():
    run = SACRun(learning_rate=1e-2)
    learner = learner_of(run)
    optimizer = learner.optimizer(run)
    batch = stack([*transitions(4, reward=3.0)[:2], *transitions(4, reward=-3.0)[2:]], torch.device("cpu"))
    values = [update(learner, optimizer, batch, run, with_planner=False)["critic_loss"] for _ in range(30)]
    assert values[-1] < 0.1 * values[0]


def test_targets_follow_slowly():
    run = SACRun(learning_rate=1e-2, follow=0.25)
    learner = learner_of(run)
    before = [p.clone() for p in learner.targets.parameters()]
    update(learner, learner.optimizer(run), stack(transitions(2), torch.device("cpu")), run, with_planner=False)
    after = [0.75 * old + 0.25 * new for old, new in zip(before, learner.critics.parameters(), strict=True)]
    for target, expected in zip(learner.targets.parameters(), after, strict=True):
        torch.testing.assert_close(target, expected.detach())


@pytest.mark.parametrize("with_planner", [False, True])
@pytest.mark.parametrize("planner_registers", [False, True])
def test_each_loss_moves_its_part_alone(with_planner, planner_registers):
    run = SACRun(learning_rate=1e-2, planner_registers=planner_registers)
    learner = learner_of(run)
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    batch = stack(transitions(2), torch.device("cpu"))
    optimizer = learner.optimizer(run)
    for _ in range(2):  # a fresh flow head, near nothing, lets no gradient pass that Adam would not blow up
        update(learner, optimizer, batch, run, with_planner)
    moved = {k for k, v in learner.state_dict().items() if not torch.equal(v, before[k])}
    parts = {k.removeprefix("network.").removeprefix("backbone.").split(".")[0] for k in moved}
    expected = {"critics", "targets", "actor"}
    expected |= {"planner"} if with_planner or planner_registers else set()
    expected |= {"log_temperature"} if with_planner else set()
    assert parts == expected


def test_the_temperature_steers_the_entropy_to_its_target():
    batch = stack(transitions(2), torch.device("cpu"))
    for target, sign in ((-1000.0, -1), (1000.0, 1)):
        run = SACRun(target_entropy=target)
        learner = learner_of(run)
        _, loss = planner_loss(learner, batch, run)
        (slope,) = torch.autograd.grad(loss, [learner.log_temperature])
        assert math.copysign(1, -float(slope)) == sign, "descent raises alpha while the entropy is below its target"


def test_the_planner_prefers_what_the_critics_value():
    """A critic that likes the plan's first number: the planner's mean of it rises."""
    run = SACRun(learning_rate=1e-2, slower=1.0, temperature=1e-6, kl=0.0)
    learner = learner_of(run)
    for critic in learner.critics:
        critic.value.weight.data.zero_()[0, SMALL.plan] = 1.0
    batch = stack(transitions(2), torch.device("cpu"))
    optimizer = learner.optimizer(run)
    planner = learner.network.backbone.planner
    before = planner(batch.before).mean[:, 0].mean().detach()
    for _ in range(10):
        loss, _ = planner_loss(learner, batch, run)
        descend(optimizer, loss, [planner], 1.0)
    assert float(planner(batch.before).mean[:, 0].mean().detach() - before) > 0.1


def test_registration_loss_gradient_reaches_the_plan():
    run = SACRun()
    learner = learner_of(run)
    torch.nn.init.normal_(learner.network.backbone.actor.out.weight)
    loss = registration_loss(learner, stack(transitions(2), torch.device("cpu")), run)
    (gradient,) = torch.autograd.grad(loss, [learner.network.backbone.planner.out.weight])
    assert float(gradient.abs().max()) > 0


def test_samples_have_the_planners_spread():
    plan = Plan(torch.full((4000, 2, 1, 1, 1), 2.0), torch.full((4000, 2, 1, 1, 1), math.log(0.25)), [])
    drawn = sample(plan, torch.Generator().manual_seed(0))
    assert float(drawn.mean()) == pytest.approx(2.0, abs=0.03)
    assert float(drawn.std()) == pytest.approx(0.5, abs=0.02)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return load_dataset(write_dataset(tmp_path_factory.mktemp("blobs"), 3))


@pytest.mark.parametrize("reward", ["dice", "lncc"])
def test_a_run_writes_a_checkpoint_that_registers(dataset, tmp_path, reward):
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, reward=reward))
    events = []
    train_spac(dataset, config, tmp_path / "spac.safetensors", job=Job(events.append))
    rows = [e.metrics for e in events if e.phase == "train"]
    assert len(rows) == 4
    assert all({"reward", "score", "score_before", "temperature"} <= set(row) for row in rows)
    assert "critic_loss" not in rows[0], "the first episode explores"
    assert {"critic_loss", "planner_loss", "registration_loss"} <= set(rows[2])
    for row in rows:
        assert row["reward"] == pytest.approx(100 * (row["score"] - row["score_before"]), abs=1e-3)
    model, card = model_file.load(tmp_path / "spac.safetensors")
    assert card.model.backbone == "spac"
    assert card.preprocessing.steps == 4
    assert card.provenance["settings"] == to_dict(config)
    assert not (tmp_path / "spac.safetensors.state").exists()
    assert torch.equal(model.head.mu.weight[:, :, 0, 0, 0], torch.eye(6)), "the plan's mean passes as it is"
    arguments = ["evaluate", str(dataset.path), "--model", str(tmp_path / "spac.safetensors"), "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "figures.json")])
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["steps"] == 4
    assert 0 < figures["mean"]["dice"] < 1


def test_a_cancelled_run_goes_on_where_it_stood(dataset, tmp_path):
    done, out = [], tmp_path / "spac.safetensors"
    with pytest.raises(Cancelled):
        train_spac(dataset, CONFIG, out, job=Job(done.append, lambda: len(done) > 3))
    assert out.with_name("spac.safetensors.state").exists()
    events = []
    train_spac(dataset, CONFIG, out, job=Job(events.append))
    rows = [e for e in events if e.phase == "train"]
    assert rows[0].step > 1
    assert "critic_loss" not in rows[0].metrics, "the buffer is filled anew first"
    assert rows[-1].step == 4
    assert out.exists()


def test_the_command_trains(dataset, tmp_path):
    settings = {k: v for k, v in to_dict(CONFIG).items() if v}
    settings["training"] = {k: v for k, v in settings["training"].items() if v is not None}
    settings["preprocessing"] = {k: v for k, v in settings["preprocessing"].items() if v is not None}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    arguments = ["spac", str(dataset.path), "--config", str(tmp_path / "settings.json"), "--device", "cpu"]
    arguments += ["--out", str(tmp_path / "m.safetensors"), "--labels", "2", "--iterations", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "m.safetensors.jsonl").read_text().splitlines()) == 1
    assert model_file.read_card(tmp_path / "m.safetensors").provenance["cases"] == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": [20, 16, 16]}, "must be multiples of 8"),
        ({"decoder": [4]}, "decoder needs 4 widths"),
        ({"max_step": 0.0}, "must be above 0"),
    ],
)
def test_wrong_network_settings_are_named(settings, words):
    with pytest.raises(MorphSeekError, match=words):
        build_backbone("spac", TINY["spac"] | settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"reward": "mse"}, "reward is 'mse'"), ({"buffer": 2}, "buffer at least batch"), ({"slower": 0.0}, "above 0")],
)
def test_wrong_run_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        SACRun(**settings)


def test_too_few_labeled_cases_are_named(dataset, tmp_path):
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, labels=1))
    with pytest.raises(MorphSeekError, match="offers 1 labeled training cases"):
        train_spac(dataset, config, tmp_path / "m.safetensors")
