"""LapIRN with its real OASIS weights against the official code's tensors."""

from __future__ import annotations

import pytest
import torch

from MorphSeekLib.backbones import build_backbone
from MorphSeekLib.backbones.lapirn import (
    DIFFEOMORPHIC,
    DISPLACEMENT,
    LapIRN,
    LapIRNSettings,
    Level,
    from_official,
    half_sizes,
)
from MorphSeekLib.measures.metrics import folding
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space import fields

TINY = {"width": 4, "blocks": 1}


def imported(official: dict, settings: LapIRNSettings) -> LapIRN:
    network = LapIRN(settings)
    network.load_state_dict(from_official(official["state_dict"]))
    return network.eval()


@pytest.mark.parametrize(("variant", "settings"), [("disp", DISPLACEMENT), ("diff", DIFFEOMORPHIC)])
def test_real_weights_give_the_official_field(reference, variant, settings):
    official = reference(f"lapirn_{variant}_real_weights")
    network = imported(official, settings)
    with torch.inference_mode():
        skips, top = network.encode(official["moving"], official["fixed"])
        field = network.decode(skips, top)
    torch.testing.assert_close(top, official["top_feature"], atol=1e-5, rtol=0)
    in_half_sizes = (field / half_sizes(field)).flip(1)
    torch.testing.assert_close(in_half_sizes, official["flow"], atol=1e-6, rtol=0)
    warped = fields.warp(official["moving"], field, padding="border")
    torch.testing.assert_close(warped, official["warped"], atol=1e-4, rtol=0)
    assert sum(p.numel() for p in network.parameters()) == official["n_params"] == 923_748


def test_bfloat16_moves_the_field_by_a_fraction_of_a_voxel(reference):
    """Convolutions alone are cast: warps and the field stay in float32."""
    official = reference("lapirn_disp_real_weights")
    network = imported(official, DISPLACEMENT)
    with torch.inference_mode():
        exact = network.decode(*network.encode(official["moving"], official["fixed"]))
        with torch.autocast("cpu", torch.bfloat16):
            field = network.decode(*network.encode(official["moving"], official["fixed"]))
    assert field.dtype == torch.float32
    assert float((field - exact).abs().mean()) < 0.03
    assert float((field - exact).abs().max()) < 0.3


def test_up_and_join_are_one_convolution():
    """The level's shortcut is its definition, at the borders too."""
    torch.manual_seed(0)
    level = Level(2, LapIRNSettings(**TINY)).double()
    torch.nn.init.normal_(level.out.weight)
    deep, feature = torch.randn(1, 4, 2, 3, 4, dtype=torch.float64), torch.randn(1, 4, 4, 6, 8, dtype=torch.float64)
    joined = torch.nn.functional.leaky_relu(level.join(torch.cat([level.up(deep), feature], dim=1)), 0.2)
    plain = torch.nn.functional.softsign(level.out(joined)) * 0.4
    torch.testing.assert_close(level.flow(deep, feature), plain, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("diffeomorphic", [False, True])
def test_samples_decode_as_they_would_alone(diffeomorphic):
    """Skips expanded to three latents, as the policy's trajectories need it."""
    torch.manual_seed(0)
    network = build_backbone("lapirn", TINY | {"diffeomorphic": diffeomorphic})
    for level in network.levels:
        torch.nn.init.normal_(level.out.weight, 0.0, 0.1)
    skips, top = network.encode(*torch.rand(2, 1, 1, 16, 8, 24))
    tops = top + torch.randn(3, *top.shape[1:])
    together = network.decode([s.expand(3, *s.shape[1:]) for s in skips], tops)
    assert together.shape == (3, 3, 16, 8, 24)
    alone = torch.cat([network.decode(skips, one[None]) for one in tops])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(together, network.decode([s.expand(3, *s.shape[1:]) for s in skips], tops))
    assert float((together[0] - together[1]).detach().abs().max()) > 1e-3, "the top feature has a say"


def test_diffeomorphic_steps_do_not_fold():
    """The same strong field folds as a displacement and does not as a velocity."""
    torch.manual_seed(0)
    pair = torch.rand(2, 1, 1, 32, 32, 32)
    folds = []
    for diffeomorphic in (False, True):
        network = build_backbone("lapirn", TINY | {"diffeomorphic": diffeomorphic})
        coarse = torch.nn.functional.interpolate(
            torch.randn(1, 3, 6, 6, 6, generator=torch.Generator().manual_seed(1)), size=(32, 32, 32), mode="trilinear"
        )
        folds.append(folding(network.displacement(0.25 * coarse).detach()).njd_percent)
        assert torch.isfinite(network.decode(*network.encode(*pair))).all()
    assert folds[0] > 1.0
    assert folds[1] < 0.2 * folds[0]


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    network = build_backbone("lapirn", {"width": 2, "blocks": 1, "diffeomorphic": True, "squarings": 2}).double()
    for level in network.levels:
        torch.nn.init.normal_(level.out.weight, 0.0, 0.1)
    moving, fixed = torch.rand(2, 1, 1, 8, 8, 8, dtype=torch.float64)

    def loss(moving: torch.Tensor, up: torch.Tensor, join: torch.Tensor) -> torch.Tensor:
        names = ("levels.2.up.weight", "levels.2.join.weight")
        replaced = dict(zip((f"network.{n}" for n in names), (up, join), strict=True))
        return torch.func.functional_call(Whole(network), replaced, (moving, fixed)).square().mean()

    weights = [getattr(network.levels[2], name).weight.detach().requires_grad_() for name in ("up", "join")]
    assert torch.autograd.gradcheck(loss, (moving.requires_grad_(), *weights), atol=1e-6, rtol=1e-3, fast_mode=True)


class Whole(torch.nn.Module):
    """encode and decode in one call."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return self.network.decode(*self.network.encode(moving, fixed))


@pytest.mark.parametrize(
    ("settings", "words"), [({"range_flow": 0.0}, "range_flow is 0.0"), ({"blocks": 0}, "must be at least 1")]
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(MorphSeekError, match=words):
        build_backbone("lapirn", settings)


def test_keys_of_no_known_part_are_reported(reference):
    state = reference("lapirn_disp_real_weights")["state_dict"]
    with pytest.raises(RuntimeError, match=r"levels\.2\.head\.weight"):
        LapIRN(DISPLACEMENT).load_state_dict(from_official(state | {"head.weight": torch.zeros(1)}))
