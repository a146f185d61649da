"""The Gaussian head, its samples and divergence against closed forms, and refinement in steps."""

from __future__ import annotations

import math

import pytest
import torch

from MorphSeekLib.backbones import Backbone
from MorphSeekLib.networks.policy import (
    GaussianHead,
    Latent,
    ModelSettings,
    PolicySettings,
    RegistrationModel,
    draw,
    kl_to_standard_normal,
    take_steps,
)
from MorphSeekLib.space import fields

SMALL = {"encoder": (4, 6), "decoder": (6, 4), "extra": (4,)}


def random_latent(batch: int = 1, dtype=torch.float64) -> Latent:
    generator = torch.Generator().manual_seed(1)
    mu, log_sigma = torch.randn(2, batch, 3, 2, 3, 2, generator=generator, dtype=dtype)
    return Latent(mu, 0.3 * log_sigma - 1, None)


def test_kl_is_the_closed_form_per_dimension():
    latent = random_latent()
    policy = torch.distributions.Normal(latent.mu, latent.log_sigma.exp())
    prior = torch.distributions.Normal(torch.zeros_like(latent.mu), torch.ones_like(latent.mu))
    torch.testing.assert_close(kl_to_standard_normal(latent), torch.distributions.kl_divergence(policy, prior).mean())


def test_sampling_has_the_stated_moments():
    mu, log_sigma = torch.full((1, 1, 30, 30, 30), 2.0), torch.full((1, 1, 30, 30, 30), math.log(0.5))
    z = draw(mu, log_sigma, 0.4, 5, generator=torch.Generator().manual_seed(4))
    assert z.shape == (5, 1, 30, 30, 30)
    assert abs(float(z.mean()) - 2.0) < 0.01
    assert abs(float(z.std()) - 0.2) < 0.005


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


def test_a_linear_mean_begins_as_the_feature_itself():
    """Weights that were trained without a policy give the same field with the head between encoder and decoder."""
    torch.manual_seed(0)
    model = RegistrationModel(ModelSettings(backbone_settings=SMALL, policy=PolicySettings(mean="linear")))
    torch.nn.init.normal_(model.backbone.flow.weight, 0, 0.3)
    moving, fixed = torch.rand(2, 1, 1, 16, 16, 16)
    skips, top = model.backbone.encode(moving, fixed)
    latent = model.encode(moving, fixed)
    assert torch.equal(latent.mu, top)
    assert torch.equal(model(moving, fixed), model.backbone.decode(skips, top))
    latent.mu.sum().backward()
    assert float(model.head.mu.weight.grad.abs().max()) > 0, "the head learns from there"
    far = 100 * top.detach()
    assert torch.equal(model.head(far)[0], far), "no bound"


def test_refine_encodes_the_fixed_image_of_a_siamese_network_once():
    class Siamese(Backbone):
        """Two streams that count what they are asked for."""

        def __init__(self):
            super().__init__(None)
            self.seen = []

        def image_features(self, image):
            self.seen.append(image)
            return [image]

        def encode(self, moving, fixed):
            return self.encode_with(moving, self.image_features(fixed))

        def encode_with(self, moving, fixed_features):
            top = self.image_features(moving)[0] - fixed_features[0]
            return [top], torch.nn.functional.avg_pool3d(top, 4)

        def decode(self, skips, top):
            return top.mean() + skips[0].expand(-1, 3, -1, -1, -1)

    model = RegistrationModel(ModelSettings(backbone_settings=SMALL))
    model.backbone = Siamese()
    model.head = GaussianHead(1, model.settings.policy)
    fixed, moving = torch.rand(2, 1, 1, 8, 8, 8)
    with torch.no_grad():
        total = take_steps(model, lambda u: fields.warp(moving, u), fixed, 3)
        assert len(model.backbone.seen) == 1 + 3
        assert sum(torch.equal(image, fixed) for image in model.backbone.seen) == 1
        again = torch.zeros_like(total)
        for _ in range(3):
            again = fields.compose(again, model(fields.warp(moving, again), fixed))
    torch.testing.assert_close(total, again)


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

    def features(self, fixed):
        return None

    def forward(self, moving, fixed, fixed_features):
        return torch.full((1, 3, *fixed.shape[2:]), 0.5)


def test_refine_composes_steps_and_warps_the_original_once():
    seen = []
    image = torch.rand(1, 1, 8, 8, 8)

    def moving_at(total):
        seen.append(total)
        return fields.warp(image, total)

    total = take_steps(Shift(), moving_at, image, 3)
    torch.testing.assert_close(total, torch.full((1, 3, 8, 8, 8), 1.5))
    assert [float(t.mean()) for t in seen] == pytest.approx([0.0, 0.5, 1.0])


def test_refine_stops_when_told():
    image = torch.rand(1, 1, 8, 8, 8)
    steps = []

    def on_step(step, total, warped):
        steps.append(step)
        return step == 2

    total = take_steps(Shift(), lambda u: fields.warp(image, u), image, 5, on_step)
    assert steps == [1, 2]
    torch.testing.assert_close(total, torch.full((1, 3, 8, 8, 8), 1.0))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="mean is 'identity'"):
        PolicySettings(mean="identity")
    with pytest.raises(ValueError, match="below"):
        PolicySettings(log_sigma_min=1.0, log_sigma_max=0.0)
    with pytest.raises(ValueError, match="positive"):
        PolicySettings(s="-1")
    with pytest.raises(ValueError, match="'sqrt_n' or a positive number"):
        PolicySettings(s="root")
    with pytest.raises(ValueError, match="must be one of"):
        ModelSettings(output="flow")
