"""Networks against the official ones' tensors, and the contract that every backbone keeps."""

from __future__ import annotations

import pytest
import torch
from cases import SHIPPED, TINY

from MorphSeekLib.backbones import Backbone, build_backbone
from MorphSeekLib.backbones.architectures import ARCHITECTURES
from MorphSeekLib.backbones.voxelmorph import VXM1, VXM2, VoxelMorph, VoxelMorphSettings, from_official, structure_force
from MorphSeekLib.networks.policy import GaussianHead, ModelSettings, PolicySettings
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.settings import to_dict

PUBLISHED = {
    "vxm-1": (274_387, 53_760),
    "vxm-2": (301_411, 53_760),
    "vxm-x2": (1_197_251, 107_520),
    "vxm-huge": (63_252_939, 537_600),
    "vxm-dense-svf": (327_331, 53_760),
    "vxm-dense-disp": (327_331, 53_760),
    "transmorph": (46_771_251, 161_280),
    "transmorph-tiny": (244_527, 10_080),
    "transmorph-small": (11_757_195, 80_640),
    "transmorph-large": (108_343_907, 215_040),
    "transmorph-oasis": (46_556_979 - 864, 161_280),
    "transmorph-oasis-large": (107_949_923 - 864, 215_040),
    "transmorph-diff": (46_557_414 - 1299, 161_280),
    "lapirn-disp": (923_748, 376_320),
    "lapirn-diff": (923_748, 376_320),
    "nice-trans": (5_706_508, 430_080),
    "corrmlp": (4_190_834, 1_720_320),
}
"""Parameters of the official networks, counted on the official codes (less their unused weights), and the size of the
top feature, which is the policy's number of dimensions N, of 160x192x224 voxels."""


def test_every_published_network_is_counted():
    assert set(PUBLISHED) == {name for name, architecture in ARCHITECTURES.items() if architecture.infer is None}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_published_network_has_the_official_sizes(name):
    architecture, (parameters, dimensions) = ARCHITECTURES[name], PUBLISHED[name]
    with torch.device("meta"):
        network = build_backbone(architecture.backbone, to_dict(architecture.settings))
        _, top = network.encode(*torch.rand(2, 1, 1, 160, 192, 224))
        head = GaussianHead(network.top_channels, PolicySettings())
    assert network.settings == architecture.settings, "settings survive a model's card"
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert top.numel() == dimensions
    assert sum(p.numel() for p in head.parameters()) < 0.03 * parameters, "the policy's head stays small"


REDUCED_HUGE = VoxelMorphSettings(encoder=(14, 28, 36, 40), decoder=(72, 72, 40, 36), extra=(28, 14, 14))


@pytest.mark.parametrize(
    ("fixture", "settings"),
    [
        ("vxm1_transmorph_repo", VXM1),
        ("vxm2_transmorph_repo", VXM2),
        ("vxm_huge_reduced_transmorph_repo", REDUCED_HUGE),
    ],
    ids=["vxm-1", "vxm-2", "vxm-huge"],
)
def test_voxelmorph_equals_the_official_network(reference, fixture, settings):
    official = reference(fixture)
    network = VoxelMorph(settings)
    network.load_state_dict(from_official(official["state_dict"]))
    skips, top = network.encode(official["moving"], official["fixed"])
    torch.testing.assert_close(top, official["top_feature"], atol=1e-5, rtol=0)
    torch.testing.assert_close(network.decode(skips, top), official["flow"], atol=2e-4, rtol=0)
    assert sum(p.numel() for p in network.parameters()) == official["n_params"]


def test_the_warp_of_official_weights_is_no_weight():
    weight = torch.zeros(1)
    official = {"unet_model.downarm.2.main.weight": weight, "transformer.grid": weight, "flow.bias": weight}
    assert sorted(from_official(official)) == ["down.2.0.weight", "flow.bias"]


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    network = build_backbone("voxelmorph", {"encoder": [2, 3], "decoder": [3, 2], "extra": [2], "norm": "instance"})
    network.double()
    torch.nn.init.normal_(network.flow.weight)
    moving, fixed = torch.rand(2, 1, 1, 4, 8, 4, dtype=torch.float64)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        replaced = torch.func.functional_call(Whole(network), {"network.flow.weight": weight}, (moving, fixed))
        return replaced.square().mean()

    weight = network.flow.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: Whole(network)(m, fixed), moving.requires_grad_(), atol=1e-4, rtol=1e-2)
    assert torch.autograd.gradcheck(loss, weight, atol=1e-4, rtol=1e-2)


class Whole(torch.nn.Module):
    """encode and decode in one call."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return self.network.decode(*self.network.encode(moving, fixed))


@pytest.mark.parametrize("name", SHIPPED)
def test_contract(name):
    keeps_the_contract(build_backbone(name, TINY[name]))


def test_contract_at_half_resolution():
    keeps_the_contract(build_backbone("voxelmorph", {"flow_stride": 2, "decoder": [8] * 3, "extra": [8]}))


def test_contract_with_learned_features():
    keeps_the_contract(build_backbone("voxelmorph", {"forces": 1, "features": 3}))


def keeps_the_contract(network: Backbone) -> None:
    assert type(network.settings) is network.settings_type
    shape = [network.multiple_of, 2 * network.multiple_of, network.multiple_of]
    moving, fixed = torch.rand(2, 1, 1, *shape)
    skips, top = network.encode(moving, fixed)
    assert top.shape[1] == network.top_channels
    field = network.decode(skips, top)
    assert field.shape == (1, 3, *shape)
    assert field.dtype == torch.float32
    assert float(field.detach().abs().max()) < 0.1, "a fresh network starts near the identity"
    assert torch.equal(network.decode(skips, top), field), "no chance in the decoder"
    learned = network.learned(skips)
    assert network.learned_features == (0 if learned is None else learned[0].shape[1])


def test_a_backbone_without_a_decoder_cannot_be_made():
    class Half(Backbone):
        def encode(self, moving, fixed):
            return [moving], fixed

    with pytest.raises(TypeError, match="decode"):
        Half(None)


def test_a_network_that_reads_both_images_together_has_no_features_of_one():
    network = build_backbone("voxelmorph", TINY["voxelmorph"] | {"forces": 1, "features": 2})
    image = torch.rand(1, 1, 8, 8, 8)
    assert network.image_features(image) is None
    with pytest.raises(NotImplementedError, match="VoxelMorph reads both images together"):
        network.encode_with(image, [image])


def test_half_resolution_flow_means_the_same_motion():
    """The flow head's field doubles exactly: a constant of one coarse voxel is (n - 1) / (n / 2 - 1) fine ones."""
    network = VoxelMorph(VoxelMorphSettings(encoder=(4, 4), decoder=(4,), extra=(), flow_stride=2))
    torch.nn.init.zeros_(network.flow.weight)
    torch.nn.init.ones_(network.flow.bias)
    field = network.decode(*network.encode(torch.rand(1, 1, 8, 12, 16), torch.rand(1, 1, 8, 12, 16)))
    for axis, n in enumerate((8, 12, 16)):
        torch.testing.assert_close(field[0, axis], torch.full((8, 12, 16), (n - 1) / (n / 2 - 1)))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("resnet", {}, "no backbone 'resnet'"),
        ("voxelmorph", {"widths": [1]}, "no setting 'widths'"),
        ("voxelmorph", {"norm": "batch"}, "norm is 'batch'"),
        ("voxelmorph", {"flow_stride": 3}, "flow_stride is 3"),
        ("voxelmorph", {"decoder": [1, 2]}, "decoder needs 4 widths"),
        ("voxelmorph", {"encoder": "wide"}, "encoder must be of type"),
    ],
)
def test_wrong_settings_are_named(name, settings, words):
    with pytest.raises(MorphSeekError, match=words):
        build_backbone(name, settings)


def smooth_image(seed: int, shape=(24, 20, 28)) -> torch.Tensor:
    coarse = torch.randn(1, 1, 7, 6, 8, generator=torch.Generator().manual_seed(seed))
    return torch.sigmoid(2 * torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear", align_corners=True))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("contrast", [lambda x: x, lambda x: 1 - x, lambda x: (x - 0.3).abs()])
def test_structure_force_points_to_the_match(axis, contrast):
    """fixed(x) = moving(x + 1): the force must point to +1 along the axis, whatever the contrast of the moving one."""
    image = smooth_image(0)
    fixed = torch.roll(image, -1, dims=2 + axis)
    inner = (..., slice(4, -4), slice(4, -4), slice(4, -4))
    means = structure_force(contrast(image), fixed)[inner].mean(dim=(0, 2, 3, 4))
    assert int(means.argmax()) == axis
    assert float(means[axis]) > 3 * float(means.abs().sum() - means[axis]) / 2


def test_structure_force_of_equal_images_is_nothing():
    image = smooth_image(1)
    assert float(structure_force(image, image).abs().max()) < 1e-6
    assert torch.isfinite(structure_force(torch.zeros(1, 1, 8, 8, 8), torch.rand(1, 1, 8, 8, 8))).all()


def test_forces_are_extra_inputs_alone():
    plain = VoxelMorph(VoxelMorphSettings())
    forced = VoxelMorph(VoxelMorphSettings(forces=2))
    assert forced.down[0][0].in_channels == plain.down[0][0].in_channels + 6
    skips, _ = forced.encode(torch.rand(1, 1, 16, 16, 32), torch.rand(1, 1, 16, 16, 32))
    assert skips[0].shape == (1, 8, 16, 16, 32)


def test_learned_features_move_the_network_and_are_one_for_both_images():
    """Their forces are inputs; the loss reaches the features through them."""
    torch.manual_seed(0)
    network = VoxelMorph(VoxelMorphSettings(forces=1, features=4))
    moving, fixed = torch.rand(2, 1, 1, 16, 16, 32)
    one, other = network.features(torch.cat([moving, fixed])), network.features(torch.cat([fixed, moving]))
    torch.testing.assert_close(one, other.flip(0))
    torch.testing.assert_close(one.sum(dim=1), torch.ones(2, 8, 8, 16))
    skips, top = network.encode(moving, fixed)
    assert skips[0].shape == (1, 2 + 3 + 6 + 2 * 4, 16, 16, 32)
    for found, expected in zip(network.learned(skips), one.chunk(2), strict=True):
        torch.testing.assert_close(found, expected)
    top.sum().backward()
    assert float(network.features.out.weight.grad.abs().max()) > 0
    with pytest.raises(ValueError, match="features need forces"):
        VoxelMorphSettings(features=4)


def test_settings_of_before_are_read_by_their_old_names():
    assert build_backbone("transmorph", {"checkpointing": True}).settings.recompute
    assert ModelSettings("transmorph", {"checkpointing": True}) == ModelSettings("transmorph", {"recompute": True})
