"""TransMorph and its variants against the official codes' tensors, and the parts that one image size cannot show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_backbones import Whole

from MorphSeekLib.backbones import transmorph
from MorphSeekLib.backbones.transmorph import SwinBlock, TransMorph, TransMorphSettings, WindowAttention
from MorphSeekLib.space import fields

SMALL_NETWORK = TransMorphSettings(channels=4, depths=(2, 2), heads=(1, 2), window=(2, 3, 2), drop_path=0.0)
OFFICIAL = {
    "transmorph_tiny": transmorph.TINY,
    "transmorph_reduced": replace(transmorph.BASE, channels=12),
    "transmorph_oasis_tiny": replace(transmorph.TINY, flow_stride=2, official_defects=True),
    "transmorph_diff_reduced": replace(transmorph.DIFFEOMORPHIC, channels=8),
}
UNUSED = {"transmorph_oasis_tiny": 2 * 16 * 27, "transmorph_diff_reduced": 16 * 3 * 27 + 3}
"""Weights of the official networks that take no part in registering a pair; ours lack them."""


def imported(official: dict, settings: TransMorphSettings) -> TransMorph:
    network = TransMorph(settings).eval()
    load = transmorph.from_official_diff if settings.squarings else transmorph.from_official
    network.load_state_dict(load(official["state_dict"]))
    return network


@pytest.mark.parametrize("fixture", sorted(OFFICIAL))
@torch.no_grad()
def test_equals_the_official_network(reference, fixture):
    official, settings = reference(fixture), OFFICIAL[fixture]
    network = imported(official, settings)
    skips, top = network.encode(official["moving"], official["fixed"])
    displacement = network.decode(skips, top)
    if "top_feature" in official:
        torch.testing.assert_close(top, official["top_feature"], atol=1e-5, rtol=0)
    warped = fields.warp(official["moving"], displacement)
    shape = displacement.shape[2:]
    size = torch.tensor(shape, dtype=torch.float32).view(1, 3, 1, 1, 1)
    if fixture == "transmorph_diff_reduced":
        # the fixture's field folds, and seven undivided squarings enlarge its float32 rounding to 0.007 voxels
        # (against the official algorithm in float64); where it does not fold it agrees as the others do
        off = (displacement - official["disp_unit"] * (size - 1) / 2).abs()
        assert float(off.mean()) < 1e-4
        assert float(off.flatten().quantile(0.99)) < 5e-4
        assert float(off.max()) < 0.05
        torch.testing.assert_close(warped, official["warped"], atol=2e-3, rtol=0)
        assert float((warped - official["warped"]).abs().mean()) < 1e-5
    else:
        torch.testing.assert_close(warped, official["warped"], atol=1e-4, rtol=0)
        flow = displacement
        if settings.official_defects:  # what the official network returns, before its warp displaces it
            positions = fields.identity(shape)
            flow = (positions + displacement + 0.5) * (size - 1) / size - positions
        torch.testing.assert_close(flow, official["flow"], atol=2e-4, rtol=0)
    count = sum(p.numel() for p in network.parameters())
    assert count + UNUSED.get(fixture, 0) == official["n_params"]


@pytest.mark.parametrize(
    ("settings", "count", "encoder"),
    [
        (transmorph.TINY, 244_527, 144_462),
        (transmorph.SMALL, 11_757_195, 6_441_864),
        (transmorph.BASE, 46_771_251, 25_581_216),
        (transmorph.LARGE, 108_343_907, 70_695_536),
        (transmorph.OASIS, 46_556_979 - UNUSED["transmorph_oasis_tiny"], 25_581_216),
        (transmorph.OASIS_LARGE, 107_949_923 - UNUSED["transmorph_oasis_tiny"], 70_695_536),
        (transmorph.DIFFEOMORPHIC, 46_557_414 - UNUSED["transmorph_diff_reduced"], 25_581_216),
    ],
    ids=["tiny", "small", "base", "large", "oasis", "oasis-large", "diff"],
)
def test_published_sizes_have_the_official_number_of_parameters(settings, count, encoder):
    with torch.device("meta"):
        network = TransMorph(settings)
    decoder = ("up.", "at_half.", "at_full.", "flow.")
    assert sum(p.numel() for p in network.parameters()) == count
    assert sum(p.numel() for name, p in network.named_parameters() if not name.startswith(decoder)) == encoder


def reference_attention(attention: WindowAttention, x: torch.Tensor) -> torch.Tensor:
    """Window attention token by token: every pair of tokens of the padded grid, as the paper defines it."""
    size, window, shift = x.shape[1:4], torch.tensor(attention.window), torch.tensor(attention.shift)
    padded = [-(-n // w) * w for n, w in zip(size, attention.window, strict=True)]
    full = x.new_zeros(*padded, x.shape[-1])
    full[: size[0], : size[1], : size[2]] = x[0]
    at = fields.identity(padded).long().flatten(2)[0].T
    rolled = (at - shift) % torch.tensor(padded)
    cell, place, wrapped = rolled // window, rolled % window, at < shift
    together = (cell[:, None] == cell[None]).all(-1)
    same_side = (wrapped[:, None] == wrapped[None]).all(-1)
    steps = place[:, None] - place[None] + window - 1
    number = (steps[..., 0] * (2 * window[1] - 1) + steps[..., 1]) * (2 * window[2] - 1) + steps[..., 2]
    bias = attention.bias[number.clamp(0, len(attention.bias) - 1)].permute(2, 0, 1)
    bias = (bias - 100.0 * ~same_side).masked_fill(~together, -torch.inf)
    q, k, v = attention.qkv(full.reshape(len(at), -1)).view(len(at), 3, attention.heads, -1).permute(1, 2, 0, 3)
    out = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + bias, dim=-1) @ v
    out = attention.proj(out.transpose(0, 1).reshape(*padded, -1))
    return out[None, : size[0], : size[1], : size[2]]


@pytest.mark.parametrize("size", [(4, 6, 6), (5, 7, 4), (1, 2, 2), (2, 3, 9)])
@pytest.mark.parametrize("shifted", [False, True])
@torch.no_grad()
def test_attention_of_any_grid_is_that_of_every_pair_of_tokens(size, shifted):
    """Whole windows, padded ones, a grid smaller than a window; and images of a batch do not see each other."""
    torch.manual_seed(0)
    attention = WindowAttention(6, 2, (2, 3, 3), shifted)
    attention.bias.normal_()
    x = torch.randn(2, *size, 6)
    expected = torch.cat([reference_attention(attention, image) for image in x.split(1)])
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)


def test_gradients_agree_with_finite_differences():
    """Of the moving image and of every weight at once, along random directions; some windows are padded."""
    torch.manual_seed(0)
    network = TransMorph(replace(SMALL_NETWORK, flow_stride=2, squarings=2)).double()
    torch.nn.init.normal_(network.flow.weight)
    moving, fixed = torch.rand(2, 1, 1, 8, 16, 8, dtype=torch.float64)
    whole = Whole(network)
    names = [name for name, _ in whole.named_parameters()]

    def field(moving: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(whole, dict(zip(names, weights, strict=True)), (moving, fixed))

    inputs = [moving, *(p.detach().clone() for p in network.parameters())]
    assert torch.autograd.gradcheck(
        field, [tensor.requires_grad_() for tensor in inputs], atol=1e-4, rtol=1e-2, fast_mode=True
    )


def test_each_image_of_a_batch_is_registered_as_if_alone():
    torch.manual_seed(0)
    network = TransMorph(SMALL_NETWORK).eval()
    torch.nn.init.normal_(network.flow.weight)
    moving, fixed = torch.rand(2, 2, 1, 16, 8, 24)
    with torch.no_grad():
        together = network.decode(*network.encode(moving, fixed))
        alone = [network.decode(*network.encode(m, f)) for m, f in zip(moving.split(1), fixed.split(1), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_latents_are_decoded_on_expanded_skips():
    torch.manual_seed(0)
    network = TransMorph(SMALL_NETWORK)
    torch.nn.init.normal_(network.flow.weight)
    with torch.no_grad():
        skips, top = network.encode(*torch.rand(2, 1, 1, 16, 8, 8))
        latents = top + torch.randn(3, *top.shape[1:])
        together = network.decode([s.expand(3, -1, -1, -1, -1) for s in skips], latents)
        alone = [network.decode(skips, latent[None]) for latent in latents]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert float((alone[0] - alone[1]).abs().max()) > 1e-3, "the top feature has a say"


def test_reduced_precision_keeps_the_field_in_float32(reference):
    """In the memory layout that it is used with; the flow's deviation is 2.5 voxels."""
    official = reference("transmorph_reduced")
    network = imported(official, OFFICIAL["transmorph_reduced"]).to(memory_format=torch.channels_last_3d)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        flow = network.decode(*network.encode(official["moving"], official["fixed"]))
    assert flow.dtype == torch.float32
    assert float((flow - official["flow"]).abs().mean()) < 0.1


def test_blocks_are_skipped_in_training_alone():
    """Half of the pairs keep their tokens, the others are changed twice as much: on average nothing differs."""
    torch.manual_seed(0)
    block = SwinBlock(4, 1, (2, 2, 2), shifted=False, drop=0.5)
    torch.nn.init.zeros_(block.mlp[2].weight)
    torch.nn.init.zeros_(block.mlp[2].bias)  # so that the attention's change is all there is
    x = torch.randn(1, 2, 2, 2, 4).expand(200, -1, -1, -1, -1)
    with torch.no_grad():
        change = (block.eval()(x) - x)[0]
        changes = block.train()(x) - x
    skipped = changes.flatten(1).abs().amax(dim=1) == 0
    assert 70 < int(skipped.sum()) < 130
    torch.testing.assert_close(changes[~skipped], (2 * change).expand(int((~skipped).sum()), -1, -1, -1, -1))


@pytest.mark.parametrize("squarings", [0, 7])
def test_half_resolution_flow_means_the_same_motion(squarings):
    """Unlike the official variants': a contraction by a tenth of the half grid is one by a tenth of the full one."""
    network = TransMorph(replace(SMALL_NETWORK, flow_stride=2, squarings=squarings)).eval()
    shape = (16, 24, 32)

    class Contraction(torch.nn.Module):
        weight = torch.zeros(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -0.1 * centered(x.shape[2:])

    network.flow = Contraction()
    with torch.no_grad():
        displacement = network.decode(*network.encode(*torch.rand(2, 1, 1, *shape)))
    factor = -0.1 if squarings == 0 else (1 - 0.1 / 2**squarings) ** 2**squarings - 1
    torch.testing.assert_close(displacement, factor * centered(shape), atol=1e-4, rtol=1e-4)


def centered(shape) -> torch.Tensor:
    """Voxel coordinates from the middle of the grid."""
    return fields.identity(shape) - (torch.tensor(shape).view(1, 3, 1, 1, 1) - 1) / 2


def test_only_what_registers_is_imported():
    weight = torch.zeros(1)
    common = {
        "transformer.layers.2.blocks.1.attn.relative_position_index": weight,
        "transformer.layers.2.blocks.1.attn.relative_position_bias_table": weight,
        "spatial_trans.grid": weight,
        "c2.0.weight": weight,
        "stem.weight": weight,  # kept, so that the import can name it
    }
    names = {"stem.weight", "stages.2.1.attention.bias"}
    oasis = transmorph.from_official(common | {"up3.conv1.0.weight": weight})
    assert set(oasis) == names | {"up.3.0.0.weight"}
    full = transmorph.from_official(common | {"up4.conv1.0.weight": weight})
    assert set(full) == names | {"up.4.0.0.weight", "at_full.0.weight"}


def test_the_two_half_resolution_variants_are_told_apart_by_their_heads():
    weight = torch.zeros(1)
    oasis, diff = {"reg_head.0.bias": weight}, {"flow_mean.bias": weight, "flow_sigma.bias": weight}
    assert set(transmorph.from_official(oasis)) == set(transmorph.from_official_diff(diff)) == {"flow.bias"}
    assert "flow.bias" not in transmorph.from_official(diff)
    assert "flow.bias" not in transmorph.from_official_diff(oasis)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"channels": 5}, "channels is 5; it must be even"),
        ({"depths": (2, 2, 4)}, "one value for each stage"),
        ({"heads": (4, 4, 8, 7)}, "7 heads do not divide the 768 channels"),
        ({"window": (5, 6, 1)}, "window must be at least 2"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"flow_stride": 4}, "flow_stride is 4"),
        ({"squarings": -1}, "squarings is -1"),
        ({"official_defects": True}, "set flow_stride to 2"),
    ],
)
def test_wrong_settings_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        TransMorphSettings(**wrong)


def test_recomputing_saves_memory_and_changes_nothing():
    """With blocks that are dropped at random: the second time, the same ones are dropped."""
    settings = replace(SMALL_NETWORK, channels=8, depths=(4, 4), drop_path=0.5)
    plain = TransMorph(settings)
    thrifty = TransMorph(replace(settings, recompute=True))
    thrifty.load_state_dict(plain.state_dict())
    pair = torch.rand(2, 1, 1, 32, 24, 24)
    kept, gradients = [], []
    for network in (plain, thrifty):
        size = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += tensor.nbytes
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            skips, top = network.encode(*pair)
            field = network.decode(skips, top)
        (1e5 * field).square().mean().backward()
        kept.append(size)
        gradients.append([p.grad for p in network.parameters()])
    assert kept[1] < 0.5 * kept[0]
    torch.testing.assert_close(*gradients)
