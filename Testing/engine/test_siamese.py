"""NICE-Trans and CorrMLP against the official codes' tensors, and their parts against what they are defined as."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import TINY

from MorphSeekLib.backbones import build_backbone, corrmlp, nice_trans
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space import fields

FROM_OFFICIAL = {"nice_trans": nice_trans.from_official, "corrmlp": corrmlp.from_official}
both = pytest.mark.parametrize("name", sorted(FROM_OFFICIAL))


def imported(name: str, official: dict, **settings) -> torch.nn.Module:
    """A network with the fixture's weights and widths."""
    widths = {"encoder_width": 4, "decoder_width": 8}
    network = build_backbone(name, {**widths, "official_upsampling": True, **settings})
    network.load_state_dict(FROM_OFFICIAL[name](official["state_dict"]))
    return network.eval()


def awake(name: str, **settings) -> torch.nn.Module:
    """A tiny network in float64 whose every layer matters to the field."""
    torch.manual_seed(0)
    network = build_backbone(name, {**TINY[name], **settings}).double()
    for head in network.flow:
        torch.nn.init.normal_(head.weight, 0.0, 0.1)
    if name == "nice_trans":
        torch.nn.init.normal_(network.affine_head[2].weight, 0.0, 0.3)
    return network


def pair_for(
    network: torch.nn.Module, batch: int = 1, cells: tuple[int, ...] = (1, 1, 2)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moving and fixed, smooth, of so many voxels of the top feature."""
    shape = [network.multiple_of * n for n in cells]
    coarse = torch.rand(2 * batch, 1, *[n // 4 for n in shape], generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse.double(), size=shape, mode="trilinear", align_corners=True).chunk(2)


@both
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_the_network_equals_the_official_one(reference, name, grad):
    official = reference(f"{name}_reduced")
    network = imported(name, official)
    with torch.set_grad_enabled(grad):
        for image in ("fixed", "moving"):
            coarsest = network.image_features(official[image])[-1]
            torch.testing.assert_close(coarsest, official[f"enc_top_{image}"], atol=1e-5, rtol=0)
        skips, top = network.encode(official["moving"], official["fixed"])
        field = network.decode(skips, top)
    torch.testing.assert_close(top, official["top_feature"], atol=1e-5, rtol=0)
    torch.testing.assert_close(field, official["flow"], atol=2e-4, rtol=0)
    torch.testing.assert_close(fields.warp(official["moving"], field), official["warped"], atol=1e-4, rtol=0)
    assert sum(p.numel() for p in network.parameters()) == official["n_params"]


@pytest.mark.parametrize(("name", "count"), [("nice_trans", 883_720), ("corrmlp", 219_912)])
def test_the_encoder_has_the_official_number_of_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in build_backbone(name).pyramid.parameters()) == count


def test_the_affine_part_is_the_official_one(reference):
    official = reference("nice_trans_reduced")
    network = imported("nice_trans", official)
    with torch.no_grad():
        affine = network.affine(official["top_feature"])
    torch.testing.assert_close(affine.flatten(1), official["affine_para"], atol=1e-6, rtol=0)
    moved = fields.warp(official["moving"], nice_trans.affine_field(affine, official["moving"].shape[2:]))
    torch.testing.assert_close(moved, official["affined"], atol=1e-4, rtol=0)


def test_the_field_contains_the_affine_part_whole():
    """Without deformation the field is the affine motion on the full grid; doubled as the official code does, less."""
    for official, whole in ((False, True), (True, False)):
        network = awake("nice_trans", official_upsampling=official)
        for head in network.flow:
            torch.nn.init.zeros_(head.weight)
        with torch.no_grad():
            skips, top = network.encode(*pair_for(network, batch=2, cells=(2, 2, 3)))
            field = network.decode(skips, top)
            affine = nice_trans.affine_field(network.affine(top), field.shape[2:])
        assert float(affine.abs().mean()) > 0.5
        assert torch.allclose(field, affine, atol=1e-9) is whole


@both
def test_fixed_features_may_be_known_and_batches_are_pairs(name):
    network = awake(name)
    moving, fixed = pair_for(network, batch=2)
    with torch.no_grad():
        together = network.decode(*network.encode(moving, fixed))
        known = network.decode(*network.encode_with(moving, network.image_features(fixed)))
        alone = torch.cat(
            [network.decode(*network.encode(m[None], f[None])) for m, f in zip(moving, fixed, strict=True)]
        )
    torch.testing.assert_close(known, together)
    torch.testing.assert_close(alone, together)
    assert float((alone[0] - alone[1]).abs().max()) > 1e-3


@both
def test_gradients_agree_with_finite_differences(name):
    """Along one random direction through all weights and both images at once."""
    network = awake(name)
    values = dict(network.named_parameters()) | dict(zip(("moving", "fixed"), pair_for(network), strict=True))
    values = {key: value.detach().clone().requires_grad_() for key, value in values.items()}
    generator = torch.Generator().manual_seed(2)
    direction = {key: torch.randn(value.shape, generator=generator).to(value) for key, value in values.items()}

    def loss(values: dict) -> torch.Tensor:
        weights = {f"network.{key}": value for key, value in values.items() if key not in ("moving", "fixed")}
        images = values["moving"], values["fixed"]
        return torch.func.functional_call(Whole(network), weights, images).square().mean()

    gradients = torch.autograd.grad(loss(values), list(values.values()))
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients), "every weight has a say"
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction.values(), strict=True))
    with torch.no_grad():
        step = 1e-6
        there, back = (loss({k: v + s * direction[k] for k, v in values.items()}) for s in (step, -step))
    assert float(there - back) / (2 * step) == pytest.approx(slope, rel=1e-3)


class Whole(torch.nn.Module):
    """encode and decode in one call."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return self.network.decode(*self.network.encode(moving, fixed))


@both
def test_recomputing_saves_memory_and_changes_nothing(name):
    kept, gradients = [], []
    for recompute in (False, True):
        network = awake(name, recompute=recompute)
        size = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            field = Whole(network)(*pair_for(network))
        field.square().mean().backward()
        kept.append(size)
        gradients.append([p.grad for p in network.parameters()])
    assert kept[1] < 0.5 * kept[0]
    torch.testing.assert_close(*gradients)


@both
def test_bfloat16_moves_the_field_by_a_fraction_of_a_voxel(reference, name):
    """Warps, correlation sums, the affine part and the field stay in float32; the weights are random."""
    official = reference(f"{name}_reduced")
    network = imported(name, official)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        field = network.decode(*network.encode(official["moving"], official["fixed"]))
    assert field.dtype == torch.float32
    assert float((field - official["flow"]).abs().mean()) < 0.05 * float(official["flow"].abs().mean())


@pytest.mark.parametrize("cached", [1, 2**17], ids=["row by row", "at once"])
def test_correlation_is_its_definition(monkeypatch, cached):
    monkeypatch.setattr(corrmlp, "CACHED", cached)
    a, b = (torch.randn(2, 3, 4, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = corrmlp.with_correlation(a, b)
    padded = F.pad(b, (1,) * 6)
    offsets = [(x, y, z) for x in range(3) for y in range(3) for z in range(3)]
    expected = [(a * padded[:, :, x : x + 4, y : y + 5, z : z + 3]).mean(dim=1) for x, y, z in offsets]
    torch.testing.assert_close(found, torch.cat([a, torch.stack(expected, dim=1), b], dim=1))
    assert torch.autograd.gradcheck(corrmlp.with_correlation, (a, b), fast_mode=True)


@pytest.mark.parametrize("slab", [1, 2**15], ids=["row by row", "at once"])
def test_windows_are_mlps_of_their_own(monkeypatch, slab):
    """Each window alone, padded with zeros, gives the same; a slab is whole windows."""
    monkeypatch.setattr(corrmlp, "SLAB", slab)
    torch.manual_seed(0)
    mlp = corrmlp.GatedMLP(4, 3).double()
    x = torch.randn(2, 7, 6, 4, 4, dtype=torch.float64)
    found = mlp(x)
    assert found.shape == x.shape
    corner = F.pad(x[1:, 6:, 3:6, 3:], (0, 0, 0, 2, 0, 0, 0, 2)).flatten(1, 3)
    kept, gate = F.gelu(mlp.into(mlp.norm(corner))).chunk(2, dim=-1)
    mixed = mlp.gate(mlp.gate_norm(gate).transpose(1, 2)).transpose(1, 2)
    expected = mlp.out(kept * (mixed + 1)).unflatten(1, (3, 3, 3))[:, :1, :, :1]
    torch.testing.assert_close(found[1:, 6:, 3:6, 3:], expected)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("nice_trans", {"head_width": 5}, "head_width is 5; it must divide 32"),
        ("nice_trans", {"window": 1}, "window at least 2"),
        ("corrmlp", {"decoder_width": 6}, "decoder_width is 6; it must be a multiple of 4"),
        ("corrmlp", {"encoder_width": 0}, "encoder_width is 0"),
        ("corrmlp", {"windows": []}, "windows must name at least one size"),
    ],
)
def test_wrong_settings_are_named(name, settings, words):
    with pytest.raises(MorphSeekError, match=words):
        build_backbone(name, settings)


@both
def test_an_image_of_one_cell_is_refused(name):
    network = build_backbone(name, TINY[name])
    with pytest.raises(MorphSeekError, match=f"more than {network.multiple_of} voxels"):
        network.image_features(torch.rand(1, 1, *[network.multiple_of] * 3))
