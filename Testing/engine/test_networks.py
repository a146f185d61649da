"""Every backbone under the policy: batches of latents, T steps, any image size, warm-up, fine-tuning, register."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from cases import SHIPPED, TINY, blob_grid, blob_image, blob_labels, steps_only, write_dataset

from MorphSeekLib.data.datasets import load_dataset
from MorphSeekLib.networks import model_file
from MorphSeekLib.networks.loading import load_model
from MorphSeekLib.networks.model_file import Card
from MorphSeekLib.networks.policy import ModelSettings, PolicySettings, RegistrationModel, take_steps
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space import fields
from MorphSeekLib.space.background import quiet_background
from MorphSeekLib.space.geometry import Volume
from MorphSeekLib.space.preprocessing import Preprocessing, working_grid
from MorphSeekLib.training.finetuning import FinetuneConfig, FinetuneRun, finetune
from MorphSeekLib.training.grpo import sample_group
from MorphSeekLib.training.losses import LossSettings
from MorphSeekLib.training.policies import POLICIES, PolicyGradientSettings, make_policy
from MorphSeekLib.training.rewards import RewardSettings, State
from MorphSeekLib.training.trainer import RunSettings
from MorphSeekLib.training.warmup import TrainingConfig, warmup

every_backbone = pytest.mark.parametrize("name", SHIPPED)


def model_of(name: str, **policy: str) -> RegistrationModel:
    """A tiny network whose field is of the order of voxels, so that every layer matters."""
    torch.manual_seed(0)
    model = RegistrationModel(ModelSettings(name, TINY[name], PolicySettings(**policy))).eval()
    heads = [p for p in model.backbone.parameters() if 0 < float(p.detach().std()) < 1e-4]
    assert heads, "flow heads start near nothing"
    pair = pair_of(model)
    with torch.no_grad():
        while float(model(*pair).abs().mean()) < 0.5:
            for weight in heads:
                weight.mul_(3)
    return model


def pair_of(model: RegistrationModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Moving and fixed, (1, 1, i, j, k), smooth, with different sizes along the axes."""
    shape = [model.multiple_of, 2 * model.multiple_of, model.multiple_of]
    coarse = torch.rand(2, 1, *[n // 4 for n in shape], generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True).split(1)


def test_every_backbone_has_small_settings():
    assert sorted(TINY) == SHIPPED


@every_backbone
def test_a_linear_mean_is_the_network_without_a_policy(name):
    model = model_of(name, mean="linear")
    moving, fixed = pair_of(model)
    with torch.no_grad():
        alone = model.backbone.decode(*model.backbone.encode(moving, fixed))
        assert torch.equal(model(moving, fixed), alone)
    assert float(alone.abs().mean()) > 1e-3


@every_backbone
def test_many_latents_are_decoded_as_one_would_be(name):
    """What GRPO needs of a decoder: a batch of latents on the same skips, no chance, and the policy's say in it."""
    model = model_of(name).train()
    moving, fixed = pair_of(model)
    settings = PolicyGradientSettings(trajectories=3)
    with torch.no_grad():
        latent = model.encode(moving, fixed)
        field = model.field(latent, latent.mu)
        samples = latent.mu + torch.randn(3, *latent.mu.shape[1:])
        together = make_policy(model, latent, field, settings).displacements([samples])
        single = torch.cat([model.displacement(model.field(latent, z[None])) for z in samples])
    torch.testing.assert_close(together, single, atol=1e-4, rtol=1e-4)
    assert float((single[0] - single[1]).abs().max()) > 1e-6


@every_backbone
@pytest.mark.parametrize("place", POLICIES)
def test_a_group_is_sampled_and_scored_at_both_places(name, place):
    model = model_of(name)
    moving, fixed = pair_of(model)
    labels = (fixed > 0.5).int(), (moving > 0.5).int()
    state = State(fixed, moving, torch.zeros(1, 3, *fixed.shape[2:]), *labels)
    settings = PolicyGradientSettings(trajectories=3, tau=5.0, place=place)
    with torch.no_grad():
        latent = model.encode(moving, fixed)
        field = model.field(latent, latent.mu)
        total = model.displacement(field)
        policy = make_policy(model, latent, field, settings)
        group = sample_group(policy, state, total, RewardSettings({"dice": 1.0}))
    assert group.rewards.shape == (3,)
    assert float(group.rewards.std()) > 0
    assert group.best.shape == state.total.shape


@every_backbone
def test_t_steps_encode_the_fixed_image_once_where_the_network_is_siamese(name, monkeypatch):
    model = model_of(name)
    moving, fixed = pair_of(model)
    calls = []
    of_image = model.backbone.image_features
    monkeypatch.setattr(model.backbone, "image_features", lambda image: calls.append(image) or of_image(image))
    with torch.no_grad():
        siamese = of_image(fixed) is not None
        total = take_steps(model, lambda u: fields.warp(moving, u), fixed, 3)
        if siamese:
            assert len(calls) == 1 + 3
            assert sum(torch.equal(image, fixed) for image in calls) == 1
        again = torch.zeros_like(total)
        for _ in range(3):
            again = fields.compose(again, model(fields.warp(moving, again), fixed))
    # a batch of two images is rounded otherwise than one image; random weights and steps make more of it
    torch.testing.assert_close(total, again, atol=5e-3, rtol=1e-3)


@every_backbone
def test_an_image_of_any_size_is_padded_and_cropped_back(name, tmp_path):
    """register on sizes that the network does not take is the network on images with a rim of zeros, less the rim."""
    model = model_of(name)
    preprocessing = Preprocessing(orientation="LPS", intensity="none", align="none", steps=1)
    model_file.save(tmp_path / "m.safetensors", model, Card(preprocessing=preprocessing))
    grid = blob_grid((14, model.multiple_of + 2, 18), (1.0, 1.0, 1.0))
    fixed, moving = (
        Volume(blob_image(blob_labels(seed, grid), seed).data.clamp(min=0) / 250, grid) for seed in range(2)
    )
    shown = {}  # untrained, it moves images apart: what the step did, not the answer
    written = tmp_path / "m.safetensors"
    register(
        fixed,
        moving,
        load_model(written, "cpu"),
        steps_only(inverse=False),
        Job(on_picture=shown.__setitem__),
    )
    shape = working_grid(grid, preprocessing, model.multiple_of).shape
    assert all(n % model.multiple_of == 0 for n in shape)
    rims = [(wide - n) // 2 for wide, n in zip(shape, grid.shape, strict=True)]
    padding = [rim for rim in reversed(rims) for _ in range(2)]
    with torch.no_grad():
        whole = model(*(F.pad(quiet_background(volume.data)[None, None], padding) for volume in (moving, fixed)))
    inner = whole[(..., *(slice(rim, rim + n) for rim, n in zip(rims, grid.shape, strict=True)))]
    at = fields.identity(grid.shape) + inner
    inside = ((at >= 0) & (at <= torch.tensor(grid.shape).view(1, 3, 1, 1, 1) - 1)).all(dim=1)[0]
    expected = fields.sample(moving.data[None, None], at)[0, 0]
    torch.testing.assert_close(shown[1].data[inside], expected[inside], atol=5e-3, rtol=0)
    assert shown[1].grid.same_as(grid)


@every_backbone
def test_the_smallest_image_works(name):
    """One cell of the coarsest feature is nothing to normalize over; the working grid has two."""
    model = model_of(name)
    shape = working_grid(blob_grid((3, 4, 3)), Preprocessing(), model.multiple_of).shape
    assert math.prod(shape) == 2 * model.multiple_of**3
    with torch.no_grad():
        assert torch.isfinite(model(torch.rand(1, 1, *shape), torch.rand(1, 1, *shape))).all()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return load_dataset(write_dataset(tmp_path_factory.mktemp("blobs"), 3))


@every_backbone
def test_warm_up_and_fine_tuning_move_every_part(name, dataset, tmp_path):
    """Two iterations each; then a pair is registered with what came out, and fitted a little."""
    run = RunSettings(iterations=2, steps=1, validate_every=2)
    preprocessing = Preprocessing(spacing=(4.0, 4.0, 4.0), align="none")
    config = TrainingConfig(model=ModelSettings(name, TINY[name]), preprocessing=preprocessing, training=run)
    files = [warmup(dataset, config, tmp_path / "warm.safetensors")]
    for place in ("latent", "field"):
        policy = PolicyGradientSettings(trajectories=2, place=place)
        tune = FinetuneConfig(
            loss=LossSettings(dice=1.0),
            policy=policy,
            training=FinetuneRun(iterations=2, steps=2, validate_every=2),
        )
        files.append(finetune(dataset, tune, files[0], tmp_path / f"{place}.safetensors"))
    states = [model_file.load(path)[0].state_dict() for path in files]
    for tuned in states[1:]:
        still = [key for key, value in tuned.items() if torch.equal(value, states[0][key])]
        assert not [key for key in still if key.endswith("weight")], "each weight is reached by some loss"
        assert all(torch.isfinite(value).all() for value in tuned.values())
    fixed, moving = (blob_image(blob_labels(seed, blob_grid()), seed) for seed in range(2))
    loaded = load_model(files[-1], "cpu")
    report = register(fixed, moving, loaded, steps_only(inverse=False, fit="on", fit_iterations=(2, 2))).report
    assert [row["step"] for row in report["steps"]] == [0, 1, 2, 2]
    assert [len(level["objective"]) for level in report["fit"]["levels"]] == [2, 2]
    assert report["displacement_mm"]["max"] > 0
    assert dataclasses.asdict(loaded.card)["parameters"]["policy_head"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"forces": 2, "norm": "instance", "flow_stride": 2},
        {"forces": 1, "flow_stride": 1},
        {"forces": 0, "flow_stride": 1},
        {"forces": 0, "flow_stride": 2},
        {"forces": 1, "flow_stride": 1, "extra": []},
    ],
    ids=str,
)
def test_a_network_that_gets_features_moves_images_as_before(settings):
    decoder = [8, 8] if settings["flow_stride"] == 1 else [8]
    settings = {"encoder": [8, 8], "decoder": decoder, "extra": [8]} | settings
    torch.manual_seed(0)
    model = RegistrationModel(ModelSettings(backbone_settings=settings)).eval()
    torch.nn.init.normal_(model.backbone.flow.weight, 0, 0.1)
    grown = model.with_features(4)
    pair = torch.rand(2, 1, 1, 16, 16, 16)
    with torch.no_grad():
        assert grown.backbone.learned_features == 4
        assert torch.allclose(model(*pair), grown(*pair), atol=1e-6)
    assert RegistrationModel(grown.settings).load_state_dict(grown.state_dict())
    assert grown.with_features(3) is grown


def test_known_features_stay_when_others_come():
    torch.manual_seed(0)
    settings = {"encoder": [8, 8], "decoder": [8], "extra": [8], "flow_stride": 2, "forces": 1, "features": 3}
    model = RegistrationModel(ModelSettings(backbone_settings=settings)).eval()
    torch.nn.init.normal_(model.backbone.flow.weight, 0, 0.1)
    grown = model.with_features(5)
    pair = torch.rand(2, 1, 1, 16, 16, 16)
    with torch.no_grad():
        before, after = (net.backbone.learned(net.encode(*pair).skips)[1] for net in (model, grown))
        assert torch.allclose(before, after[:, :3], atol=0.03)
        assert torch.allclose(model(*pair), grown(*pair), atol=0.05)


def test_a_network_that_reads_no_features_has_none_to_get():
    settings = {"encoder": [8, 8], "decoder": [8], "extra": [8], "norm": "instance", "flow_stride": 2}
    assert RegistrationModel(ModelSettings(backbone_settings=settings)).with_features(3) is None
    assert RegistrationModel(ModelSettings("lapirn", {"width": 8, "blocks": 1})).with_features(3) is None
