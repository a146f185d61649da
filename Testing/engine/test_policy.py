"""The Gaussian head, its likelihood and divergence against closed forms, and refinement in steps."""

from __future__ import annotations

import math

import pytest
import torch

from MorphSeekLib import fields
from MorphSeekLib.policy import (
    Latent,
    ModelSettings,
    PolicySettings,
    RegistrationModel,
    kl_to_standard_normal,
    log_likelihood,
    refine,
    sample_latent,
)

SMALL = {"encoder": (4, 6), "decoder": (6, 4), "extra": (4,)}


def random_latent(batch: int = 1, dtype=torch.float64) -> Latent:
    generator = torch.Generator().manual_seed(1)
    mu, log_sigma = torch.randn(2, batch, 3, 2, 3, 2, generator=generator, dtype=dtype)
    return Latent(mu, 0.3 * log_sigma - 1, None)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
def test_log_likelihood_is_the_normal_density_over_s(tau):
    """With s = 1 the sum of log densities that torch.distributions gives; with another s, that over s."""
    latent = random_latent(2)
    z = sample_latent(latent, tau, torch.Generator().manual_seed(2))
    density = torch.distributions.Normal(latent.mu, tau * latent.log_sigma.exp()).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(log_likelihood(latent, z, tau, 1.0), density)
    n = latent.mu[0].numel()
    torch.testing.assert_close(log_likelihood(latent, z, tau, math.sqrt(n)), density / math.sqrt(n))


def test_ldvn_keeps_the_spread_of_order_one_whatever_n():
    """The log-likelihood of samples varies by sqrt(N / 2) without normalisation, by 1 / sqrt(2) with s = sqrt(N)."""
    for n in (64, 4096):
        latent = Latent(torch.zeros(1, n, 1, 1, 1), torch.zeros(1, n, 1, 1, 1), None)
        z = torch.randn(2000, n, 1, 1, 1, generator=torch.Generator().manual_seed(0))
        spread = log_likelihood(latent, z, 1.0, PolicySettings().normalizer(n)).std()
        assert abs(float(spread) - math.sqrt(0.5)) < 0.05


def test_log_likelihood_gradient_is_the_score():
    """d log pi / d mu = (z - mu) / (tau sigma)^2 / s; z is detached."""
    latent = random_latent()
    mu = latent.mu.clone().requires_grad_()
    z = sample_latent(Latent(mu, latent.log_sigma, None), 0.7, torch.Generator().manual_seed(3))
    log_likelihood(Latent(mu, latent.log_sigma, None), z, 0.7, 5.0).sum().backward()
    expected = (z.detach() - latent.mu) / (0.7 * latent.log_sigma.exp()).square() / 5.0
    torch.testing.assert_close(mu.grad, expected)


def test_log_likelihood_needs_a_temperature():
    latent = random_latent()
    with pytest.raises(ValueError, match="above 0"):
        log_likelihood(latent, latent.mu, 0.0, 1.0)


def test_kl_is_the_closed_form_per_dimension():
    latent = random_latent()
    policy = torch.distributions.Normal(latent.mu, latent.log_sigma.exp())
    prior = torch.distributions.Normal(torch.zeros_like(latent.mu), torch.ones_like(latent.mu))
    torch.testing.assert_close(kl_to_standard_normal(latent), torch.distributions.kl_divergence(policy, prior).mean())


def test_sampling_has_the_stated_moments():
    latent = Latent(torch.full((1, 1, 50, 50, 50), 2.0), torch.full((1, 1, 50, 50, 50), math.log(0.5)), None)
    z = sample_latent(latent, 0.4, torch.Generator().manual_seed(4))
    assert abs(float(z.mean()) - 2.0) < 0.01
    assert abs(float(z.std()) - 0.2) < 0.005
    assert sample_latent(latent, 0.0) is latent.mu


def test_head_keeps_its_bounds_and_is_small():
    model = RegistrationModel(ModelSettings())
    head = sum(p.numel() for p in model.head.parameters())
    assert head < 0.03 * sum(p.numel() for p in model.backbone.parameters())
    with torch.no_grad():
        mu, log_sigma = model.head(1e4 * torch.randn(1, 32, 2, 2, 2))
    settings = model.settings.policy
    assert float(mu.abs().max()) <= settings.lambda_scale
    assert settings.log_sigma_min <= float(log_sigma.min())
    assert float(log_sigma.max()) <= settings.log_sigma_max


def test_output_may_be_read_as_a_velocity():
    torch.manual_seed(0)
    displacement = RegistrationModel(ModelSettings(backbone_settings=SMALL))
    torch.nn.init.normal_(displacement.backbone.flow.weight, 0, 0.3)
    velocity = RegistrationModel(ModelSettings(backbone_settings=SMALL, output="velocity"))
    velocity.load_state_dict(displacement.state_dict())
    moving, fixed = torch.rand(2, 1, 1, 16, 16, 16)
    with torch.no_grad():
        field = displacement(moving, fixed)
        torch.testing.assert_close(velocity(moving, fixed), fields.integrate(field, 7))
        assert float(fields.jacobian_determinant(velocity(moving, fixed)).min()) > float(
            fields.jacobian_determinant(field).min()
        )


class Shift(torch.nn.Module):
    """Stands where a model does: always moves by the same amount."""

    def forward(self, moving, fixed):
        return torch.full((1, 3, *fixed.shape[2:]), 0.5)


def test_refine_composes_steps_and_warps_the_original_once():
    seen = []
    image = torch.rand(1, 1, 8, 8, 8)

    def moving_at(total):
        seen.append(total)
        return fields.warp(image, total)

    total = refine(Shift(), moving_at, image, 3)
    torch.testing.assert_close(total, torch.full((1, 3, 8, 8, 8), 1.5))
    assert [float(t.mean()) for t in seen] == pytest.approx([0.0, 0.5, 1.0])


def test_refine_stops_when_told():
    image = torch.rand(1, 1, 8, 8, 8)
    steps = []

    def on_step(step, total, warped):
        steps.append(step)
        return step == 2

    total = refine(Shift(), lambda u: fields.warp(image, u), image, 5, on_step)
    assert steps == [1, 2]
    torch.testing.assert_close(total, torch.full((1, 3, 8, 8, 8), 1.0))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="below"):
        PolicySettings(log_sigma_min=1.0, log_sigma_max=0.0)
    with pytest.raises(ValueError, match="positive"):
        PolicySettings(s="-1")
    with pytest.raises(ValueError, match="must be one of"):
        ModelSettings(output="flow")
