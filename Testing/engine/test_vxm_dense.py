"""VoxelMorph's own U-Net against the official code's tensors, and its integration at half resolution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_backbones import Whole

from MorphSeekLib.backbones.vxm_dense import (
    DISPLACEMENT,
    OFFICIAL_SVF,
    SVF,
    VxmDense,
    VxmDenseSettings,
    from_official,
    settings_of,
)
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space import fields

SMALL_NETWORK = VxmDenseSettings(encoder=(2, 3), decoder=(3, 2), extra=(2,), squarings=2)


@pytest.mark.parametrize(
    ("fixture", "settings"),
    [("vxm_dense_official_disp", DISPLACEMENT), ("vxm_dense_official_svf", OFFICIAL_SVF)],
    ids=["displacement", "velocity"],
)
@torch.no_grad()
def test_equals_the_official_network(reference, fixture, settings):
    official = reference(fixture)
    network = VxmDense(settings)
    network.load_state_dict(from_official(official["state_dict"]))
    skips, top = network.encode(official["moving"], official["fixed"])
    displacement = network.decode(skips, top)
    torch.testing.assert_close(top, official["top_feature"], atol=1e-5, rtol=0)
    torch.testing.assert_close(displacement, official["flow"], atol=2e-4, rtol=0)
    torch.testing.assert_close(fields.warp(official["moving"], displacement), official["warped"], atol=1e-4, rtol=0)
    assert sum(p.numel() for p in network.parameters()) == official["n_params"] == 327_331


def test_gradients_agree_with_finite_differences():
    """Of the moving image and of every weight at once, along random directions, through the integration."""
    torch.manual_seed(0)
    network = VxmDense(SMALL_NETWORK).double()
    torch.nn.init.normal_(network.flow.weight)
    moving, fixed = torch.rand(2, 1, 1, 4, 8, 4, dtype=torch.float64)
    whole = Whole(network)
    names = [name for name, _ in whole.named_parameters()]

    def field(moving: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(whole, dict(zip(names, weights, strict=True)), (moving, fixed))

    inputs = [moving, *(p.detach().clone() for p in network.parameters())]
    assert torch.autograd.gradcheck(
        field, [tensor.requires_grad_() for tensor in inputs], atol=1e-4, rtol=1e-2, fast_mode=True
    )


def test_latents_are_decoded_on_expanded_skips():
    torch.manual_seed(0)
    network = VxmDense(SMALL_NETWORK)
    torch.nn.init.normal_(network.flow.weight)
    with torch.no_grad():
        skips, top = network.encode(*torch.rand(2, 1, 1, 12, 8, 16))
        latents = top + torch.randn(3, *top.shape[1:])
        together = network.decode([s.expand(3, -1, -1, -1, -1) for s in skips], latents)
        alone = [network.decode(skips, latent[None]) for latent in latents]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert float((alone[0] - alone[1]).abs().max()) > 1e-4, "the top feature has a say"


def test_reduced_precision_keeps_the_field_in_float32(reference):
    """In the memory layout that it is used with; the flow's deviation is 2.5 voxels."""
    official = reference("vxm_dense_official_svf")
    network = VxmDense(OFFICIAL_SVF)
    network.load_state_dict(from_official(official["state_dict"]))
    network.to(memory_format=torch.channels_last_3d)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        flow = network.decode(*network.encode(official["moving"], official["fixed"]))
    assert flow.dtype == torch.float32
    assert float((flow - official["flow"]).abs().mean()) < 0.1


def test_integration_at_half_resolution_means_the_same_motion():
    """A contraction is one function on both grids; the official factors contract the coarser one too fast."""
    shape = (16, 32, 16)
    center = (torch.tensor(shape).view(1, 3, 1, 1, 1) - 1) / 2
    velocity = -0.3 * (fields.identity(shape) - center)
    expected = fields.integrate(velocity, 7)

    def error(settings: VxmDenseSettings) -> float:
        network = VxmDense(settings)
        torch.nn.init.zeros_(network.flow.weight)
        network.flow.register_forward_hook(lambda *_: velocity)
        with torch.no_grad():
            return float((network.decode(*network.encode(*torch.rand(2, 1, 1, *shape))) - expected).abs().max())

    assert error(SVF) < 1e-4
    assert error(replace(SVF, velocity_stride=1)) < 1e-6
    assert error(OFFICIAL_SVF) > 0.01


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("squarings", [0, 5])
def test_settings_are_read_from_an_official_file(squarings, stride):
    wanted = VxmDenseSettings((4, 6, 8), (8, 6, 4), (5, 3), squarings, stride, official_defects=True)
    arguments = {"inshape": [32, 32, 48], "int_steps": squarings, "int_downsize": stride}
    found = settings_of(VxmDense(wanted).state_dict(), arguments)
    assert found == (wanted if squarings else replace(wanted, velocity_stride=2))
    assert settings_of(VxmDense(SVF).state_dict(), {}) == settings_of({}, {}) == OFFICIAL_SVF
    with pytest.raises(MorphSeekError, match="1/4 of the resolution"):
        settings_of({}, {"int_downsize": 4})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"decoder": (32, 32)}, "decoder needs 4 widths"),
        ({"encoder": (), "decoder": ()}, "at least one encoder level"),
        ({"extra": (0,)}, "width must be at least 1"),
        ({"squarings": -1}, "squarings is -1"),
        ({"velocity_stride": 4}, "velocity_stride is 4"),
    ],
)
def test_wrong_settings_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        VxmDenseSettings(**wrong)
