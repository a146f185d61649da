"""GRPO's pieces against closed forms, plain loops and finite differences."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import blob_grid, blob_image, blob_labels
from hypothesis import given, settings
from hypothesis import strategies as st

from MorphSeekLib.networks.policy import ModelSettings, RegistrationModel, draw
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space import fields
from MorphSeekLib.training.grpo import (
    Group,
    advantages,
    next_kl_weight,
    policy_loss,
    sample_group,
    sum_over_cells,
    widen,
)
from MorphSeekLib.training.policies import (
    Gaussian,
    LimitedPush,
    PolicyGradientSettings,
    log_likelihood,
    log_likelihood_map,
    make_policy,
    upsample,
)
from MorphSeekLib.training.rewards import RewardSettings, State, reward_map

GRID = blob_grid((16, 16, 16))
REWARD = RewardSettings({"dice": 1.0, "folding": 1.0})


def model() -> RegistrationModel:
    torch.manual_seed(0)
    network = RegistrationModel(
        ModelSettings(backbone_settings={"encoder": (8, 8), "decoder": (8, 8), "extra": (8,), "norm": "instance"})
    )
    torch.nn.init.normal_(network.backbone.flow.weight, 0, 0.1)
    return network


@pytest.fixture(scope="module")
def pair():
    labels = [blob_labels(seed, GRID) for seed in (0, 1)]
    images = [blob_image(volume, seed).data[None, None] / 255 for seed, volume in enumerate(labels)]
    return State(*images, torch.zeros(1, 3, *GRID.shape), *(volume.data[None, None] for volume in labels))


def group(rewards: torch.Tensor, cells: torch.Tensor | None = None, mean: float = 0.0) -> Group:
    cells = rewards.view(-1, 1, 1, 1, 1) if cells is None else cells
    empty = torch.zeros(())
    return Group([empty], rewards, [cells], empty, torch.tensor(mean), [torch.full_like(cells[:1], mean)])


def encoded(network: RegistrationModel, moving: torch.Tensor, fixed: torch.Tensor):
    """The latent of a pair, and what its mean decodes to."""
    latent = network.encode(moving, fixed)
    return latent, network.field(latent, latent.mu)


def moved(network: RegistrationModel, field: torch.Tensor, pair: State) -> torch.Tensor:
    """The accumulated displacement after the mean's step."""
    return fields.compose(pair.total, network.displacement(field.detach()))


def loss_of(policy, scored: Group) -> torch.Tensor:
    """L_policy of a group."""
    return policy_loss(advantages(scored, policy.settings), policy.log_likelihood(scored.samples))


def test_advantages_are_the_papers():
    rewards = torch.tensor([0.1, 0.4, -0.2, 0.3])
    found = advantages(group(rewards), PolicyGradientSettings(trajectories=4))[0].flatten()
    mean = 0.15
    deviation = math.sqrt(sum((float(r) - mean) ** 2 for r in rewards) / 3)
    expected = torch.tensor([(float(r) - mean) / (deviation + 1e-4) for r in rewards])
    torch.testing.assert_close(found, expected)


def test_a_group_without_spread_teaches_nothing():
    [found] = advantages(group(torch.full((6,), 0.3)), PolicyGradientSettings())
    assert float(found.abs().max()) < 1e-3, "rounding alone"


def test_baselines():
    rewards = torch.tensor([0.1, 0.4, -0.2])
    plain = PolicyGradientSettings(trajectories=3, scale="none")
    others = dataclasses.replace(plain, baseline="leave_one_out")
    expected = torch.tensor([0.1 - (0.4 - 0.2) / 2, 0.4 - (0.1 - 0.2) / 2, -0.2 - (0.1 + 0.4) / 2])
    torch.testing.assert_close(advantages(group(rewards), others)[0].flatten(), expected)
    rollout = dataclasses.replace(plain, baseline="mean_rollout")
    torch.testing.assert_close(advantages(group(rewards, mean=0.2), rollout)[0].flatten(), rewards - 0.2)


def test_local_advantages_compare_each_cell_with_itself():
    cells = torch.zeros(2, 1, 1, 1, 2)
    cells[:, 0, 0, 0, 0] = torch.tensor([1.0, 3.0])
    cells[:, 0, 0, 0, 1] = 7.0
    local = PolicyGradientSettings(trajectories=2, credit="local")
    [found] = advantages(group(torch.zeros(2), cells), local)
    assert found[:, 0, 0, 0, 1].tolist() == [0.0, 0.0], "nothing differs in this cell"
    assert float(found[1, 0, 0, 0, 0]) == pytest.approx(-float(found[0, 0, 0, 0, 0]))
    assert float(found[1].max()) > 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), tau=st.floats(0.3, 2.0))
def test_likelihood_is_the_normal_density(seed, tau):
    generator = torch.Generator().manual_seed(seed)
    mu, log_sigma = torch.randn(2, 1, 3, 2, 2, 2, generator=generator, dtype=torch.float64)
    policy = Gaussian(mu, log_sigma)
    samples = torch.randn(4, 3, 2, 2, 2, generator=generator, dtype=torch.float64)
    found = log_likelihood_map(policy, samples, tau, s=math.sqrt(24)).flatten(1).sum(dim=1)
    density = torch.distributions.Normal(mu, tau * log_sigma.exp())
    expected = density.log_prob(samples).flatten(1).sum(dim=1) / math.sqrt(24)
    torch.testing.assert_close(found, expected)


def test_sqrt_n_keeps_the_likelihoods_spread_at_any_size():
    spreads = []
    for n in (2, 6, 12):
        policy = Gaussian(torch.zeros(1, 4, n, n, n), torch.zeros(1, 4, n, n, n))
        samples = draw(*policy, 1.0, 64, generator=torch.Generator().manual_seed(0))
        values = log_likelihood_map(policy, samples, 1.0, math.sqrt(4 * n**3)).flatten(1).sum(dim=1)
        spreads.append(float(values.std()))
    # the sum of N (epsilon^2 - 1) / 2 has the standard deviation sqrt(N / 2)
    assert all(0.5 < spread < 0.95 for spread in spreads), spreads


def test_policy_gradient_is_the_closed_form():
    torch.manual_seed(0)
    mu = torch.randn(1, 2, 2, 2, 2, requires_grad=True)
    log_sigma = torch.full((1, 2, 2, 2, 2), -0.5)
    options = PolicyGradientSettings(trajectories=3, tau=0.8)
    policy = Gaussian(mu, log_sigma)
    samples, rewards = draw(*policy, options.tau, 3), torch.tensor([0.1, 0.5, 0.2])
    [weights] = advantages(group(rewards), options)
    policy_loss([weights], log_likelihood([policy], [samples], options)).backward()
    variance = (0.8 * math.exp(-0.5)) ** 2
    expected = -(weights * (samples - mu.detach()) / variance / math.sqrt(16)).mean(dim=0, keepdim=True)
    torch.testing.assert_close(mu.grad, expected)


@pytest.mark.parametrize("credit", ["trajectory", "local"])
def test_policy_gradient_points_uphill(credit):
    """Reward -sum (z - 1)^2 per cell: over many samples the gradient of L_policy is that of the expected reward."""
    mu = torch.zeros(1, 1, 2, 2, 2, requires_grad=True)
    options = PolicyGradientSettings(trajectories=4096, tau=0.5, credit=credit, scale="none", s="1")
    policy = Gaussian(mu, torch.zeros_like(mu))
    samples = draw(*policy, options.tau, options.trajectories, generator=torch.Generator().manual_seed(0))
    cells = -(samples - 1).square()
    advantage = advantages(group(cells.flatten(1).sum(dim=1), cells), options)
    policy_loss(advantage, log_likelihood([policy], [samples], options)).backward()
    tolerance = 0.5 if credit == "trajectory" else 0.2
    torch.testing.assert_close(mu.grad, torch.full_like(mu, -2.0), atol=tolerance, rtol=0)


def test_antithetic_noise_has_mean_zero():
    policy = Gaussian(torch.ones(1, 2, 3, 3, 3), torch.zeros(1, 2, 3, 3, 3))
    samples = draw(*policy, 1.0, 8, antithetic=True)
    torch.testing.assert_close(samples.mean(dim=0, keepdim=True), policy.mu)


PLACES = [
    {"place": "latent"},
    {"place": "latent", "levels": (0, 1)},
    {"place": "latent", "levels": (1,)},
    {"place": "field"},
]


@pytest.mark.parametrize("place", PLACES)
def test_chunks_change_nothing(pair, place):
    network = model()
    latent, field = encoded(network, pair.moving, pair.fixed)
    total, found = moved(network, field, pair), []
    for chunk in (1, 4):
        options = PolicyGradientSettings(trajectories=4, chunk=chunk, **place)
        seeded = torch.Generator().manual_seed(3)
        found.append(sample_group(make_policy(network, latent, field, options), pair, total, REWARD, seeded))
    torch.testing.assert_close(found[0].rewards, found[1].rewards)
    torch.testing.assert_close(found[0].best, found[1].best)
    for cells in found[0].cells:
        torch.testing.assert_close(cells.flatten(1).sum(dim=1), found[0].rewards, atol=1e-5, rtol=1e-4)
    assert not found[0].rewards.requires_grad
    assert not any(value.requires_grad for value in [*found[0].samples, *found[0].cells])


def test_rewards_are_those_of_the_composed_fields(pair):
    """One decode at a time, composed with the state by hand."""
    network = model()
    before = State(pair.fixed, pair.moving, pair.total + 0.7, pair.fixed_labels, pair.moving_labels)
    latent, field = encoded(network, fields.warp(pair.moving, before.total), pair.fixed)
    options = PolicyGradientSettings(trajectories=4)
    after, seeded = moved(network, field, before), torch.Generator().manual_seed(1)
    scored = sample_group(make_policy(network, latent, field, options), before, after, REWARD, seeded)
    with torch.no_grad():
        for sample, reward in zip(scored.samples[0], scored.rewards, strict=True):
            total = fields.compose(before.total, network.displacement(network.field(latent, sample[None])))
            assert float(reward_map(before, total, REWARD).sum()) == pytest.approx(float(reward), abs=1e-5)
    best = reward_map(before, scored.best, REWARD).sum()
    assert float(best) == pytest.approx(float(scored.rewards.max()), abs=1e-5)


def test_latent_policy_gradient_reaches_encoder_and_heads_only(pair):
    network = model()
    latent, field = encoded(network, pair.moving, pair.fixed)
    options = PolicyGradientSettings(trajectories=4)
    policy = make_policy(network, latent, field, options)
    scored = sample_group(policy, pair, moved(network, field, pair), REWARD)
    loss_of(policy, scored).backward()
    reached = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert reached == {n for n, _ in network.named_parameters() if n.startswith(("backbone.down", "head"))}


def test_a_policy_on_finer_features_reaches_the_encoder_only(pair):
    network = model()
    latent, field = encoded(network, pair.moving, pair.fixed)
    options = PolicyGradientSettings(trajectories=4, levels=(1,), credit="local", reach=1)
    policy = make_policy(network, latent, field, options)
    scored = sample_group(policy, pair, moved(network, field, pair), REWARD)
    assert scored.samples[0].shape == (4, *latent.skips[-1].shape[1:])
    loss_of(policy, scored).backward()
    reached = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert reached == {n for n, _ in network.named_parameters() if n.startswith("backbone.down.0")}


def test_several_levels_are_one_policy(pair):
    """Its likelihood is the product of the parts' densities, over the root of all their dimensions."""
    network = model()
    latent, field = encoded(network, pair.moving, pair.fixed)
    options = PolicyGradientSettings(trajectories=2, levels=(0, 1), scale="none")
    policy = make_policy(network, latent, field, options)
    scored = sample_group(policy, pair, moved(network, field, pair), REWARD)
    density = sum(
        torch.distributions.Normal(part.mu, part.log_sigma.exp()).log_prob(samples).flatten(1).sum(dim=1)
        for part, samples in zip(policy.parts, scored.samples, strict=True)
    )
    n = sum(part.mu.numel() for part in policy.parts)
    weights = scored.rewards - scored.rewards.mean()
    expected = -(weights * density).mean() / math.sqrt(n)
    torch.testing.assert_close(loss_of(policy, scored), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(MorphSeekError, match="asks for level 2; this backbone has 0 to 1"):
        make_policy(network, latent, field, dataclasses.replace(options, levels=(2,)))


def test_a_velocity_policy_acts_on_the_velocity(pair):
    """Samples of the field's control points are integrated, so that every trajectory is diffeomorphic."""
    network = model()
    network.settings = dataclasses.replace(network.settings, output="velocity")
    latent, field = encoded(network, pair.moving, pair.fixed)
    options = PolicyGradientSettings(trajectories=2, place="field", cell=4)
    policy = make_policy(network, latent, field, options)
    mean = policy.parts[0].mu
    samples = [mean + torch.randn(2, *mean.shape[1:], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        steps = policy.displacements(samples)
        for sample, step in zip(samples[0], steps, strict=True):
            velocity = field + upsample(sample[None] - mean, field.shape[2:])
            torch.testing.assert_close(step[None], fields.integrate(velocity, 7))


def test_smooth_noise_is_one_value_a_block():
    part = Gaussian(torch.zeros(1, 2, 5, 4, 4), torch.zeros(1, 2, 5, 4, 4))
    samples = draw(*part, 1.0, 400, smooth=2, generator=torch.Generator().manual_seed(0))
    assert samples.shape == (400, 2, 5, 4, 4)
    assert torch.equal(samples[:, :, :4:2, ::2, ::2], samples[:, :, 1:4:2, 1::2, 1::2])
    assert not torch.equal(samples[:, :, 3], samples[:, :, 4])
    assert float(samples.std()) == pytest.approx(1, abs=0.05)


def test_reach_adds_the_neighbors():
    cells = torch.zeros(1, 1, 5, 5, 5)
    cells[0, 0, 2, 2, 2] = 3.0
    found = widen(cells, 1)
    assert torch.equal(found[0, 0, 1:4, 1:4, 1:4], torch.full((3, 3, 3), 3.0))
    assert float(found.sum()) == 27 * 3
    assert torch.equal(widen(cells, 0), cells)


def test_field_policy_gradient_reaches_everything_that_makes_the_step(pair):
    network = model()
    latent, field = encoded(network, pair.moving, pair.fixed)
    options = PolicyGradientSettings(trajectories=4, place="field", credit="local")
    policy = make_policy(network, latent, field, options)
    scored = sample_group(policy, pair, moved(network, field, pair), REWARD)
    loss_of(policy, scored).backward()
    missed = {n for n, p in network.named_parameters() if p.grad is None}
    assert missed == {"head.log_sigma.weight", "head.log_sigma.bias"}


@pytest.mark.parametrize(("share", "length"), [(0.5, 0.5), (10.0, 4.0)])
def test_a_push_is_no_longer_than_its_share_of_the_gradient(share, length):
    gradient, push = torch.zeros(2), torch.zeros(2)
    gradient[0], push[1] = 3.0, 12.0
    limited = LimitedPush(push, share)
    torch.testing.assert_close(limited(gradient), torch.tensor([3.0, 3 * length]))
    assert float(limited.ratio) == pytest.approx(4.0)


def test_the_latent_policy_descends_the_weighted_sum(pair):
    network = model()
    latent, field = encoded(network, pair.moving, pair.fixed)
    options = PolicyGradientSettings(trajectories=4, weight=0.3)
    policy = make_policy(network, latent, field, options)
    scored = sample_group(policy, pair, moved(network, field, pair), REWARD)
    losses, gain = field.square().mean(), loss_of(policy, scored)
    parameters = [p for p in network.parameters() if p is not network.backbone.flow.bias]
    expected = torch.autograd.grad((losses + 0.3 * gain) / 2, parameters, retain_graph=True)
    descended, ratio = policy.backward(losses, gain, 2)
    assert ratio is None
    torch.testing.assert_close(descended, (losses + 0.3 * gain).detach())
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_kl_controller_holds_its_target():
    """beta grows above the target, falls below it, and settles a system whose KL answers to it."""
    assert next_kl_weight(0.1, kl=2.0, target=1.0) > 0.1
    assert next_kl_weight(0.1, kl=0.5, target=1.0) < 0.1
    weight = 1e-3
    for _ in range(400):
        weight = next_kl_weight(weight, kl=1 / (1 + 10 * weight), target=0.25)
    assert 1 / (1 + 10 * weight) == pytest.approx(0.25, rel=0.02)


@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(*[st.integers(4, 9)] * 3), grid=st.tuples(*[st.integers(1, 4)] * 3))
def test_sums_over_cells_keep_the_total(shape, grid):
    maps = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(0))
    cells = sum_over_cells(maps, grid)
    assert cells.shape == (2, 1, *grid)
    torch.testing.assert_close(cells.flatten(1).sum(dim=1), maps.flatten(1).sum(dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"place": "somewhere"}, "place is 'somewhere'; it must be one of latent, field"),
        ({"trajectories": 1}, "at least 2"),
        ({"trajectories": 5, "antithetic": True}, "even number"),
        ({"tau": 0.0}, "above 0"),
        ({"s": "-1"}, "positive number"),
        ({"levels": ()}, "at least one level"),
        ({"levels": (1, 1)}, "each once"),
    ],
)
def test_settings_are_checked(values, words):
    with pytest.raises(ValueError, match=words):
        PolicyGradientSettings(**values)
