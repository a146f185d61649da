"""Official weights as models: the official output, a card, and a sentence for each file that does not fit."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from cases import steps_only
from test_cli import run
from test_transmorph import UNUSED

from MorphSeekLib.backbones.architectures import ARCHITECTURES
from MorphSeekLib.backbones.lapirn import half_sizes
from MorphSeekLib.networks import model_file
from MorphSeekLib.networks.loading import load_model
from MorphSeekLib.networks.official import import_checkpoint
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import Grid, Volume
from MorphSeekLib.space.preprocessing import Preprocessing

FIXTURES = {
    "corrmlp_reduced": ("corrmlp", {"encoder_width": 4, "decoder_width": 8}),
    "lapirn_diff_real_weights": ("lapirn-diff", {}),
    "lapirn_disp_real_weights": ("lapirn-disp", {}),
    "nice_trans_reduced": ("nice-trans", {"encoder_width": 4, "decoder_width": 8}),
    "transmorph_oasis_tiny": ("transmorph-oasis", {"channels": 6, "heads": (2, 2, 4, 4)}),
    "transmorph_reduced": ("transmorph", {"channels": 12}),
    "transmorph_tiny": ("transmorph-tiny", {}),
    "vxm1_transmorph_repo": ("vxm-1", {}),
    "vxm2_transmorph_repo": ("vxm-2", {}),
    "vxm_dense_official_disp": ("vxm-dense-disp", {}),
    "vxm_dense_official_svf": ("vxm-dense-svf", {}),
    "vxm_huge_reduced_transmorph_repo": ("vxm", {}),
}
"""Fixture -> the architecture, and what in its settings the fixture has smaller.

TransMorph-diff's fixture amplifies rounding; test_transmorph.py compares it."""
AS_IT_IS = Preprocessing(orientation="LPS", intensity="none", align="none", steps=1)


@pytest.fixture
def vxm2(tmp_path):
    """Weights under the official names, and how to write them to a file."""
    torch.manual_seed(0)
    shapes = {
        "downarm": [(2, 16), (16, 32), (32, 32), (32, 32)],
        "uparm": [(32, 32), (64, 32), (64, 32), (48, 32)],
        "extras": [(34, 32), (32, 16), (16, 16)],
    }
    state = {}
    for part, layers in shapes.items():
        for n, (inputs, outputs) in enumerate(layers):
            state[f"unet_model.{part}.{n}.main.weight"] = torch.randn(outputs, inputs, 3, 3, 3) / 20
            state[f"unet_model.{part}.{n}.main.bias"] = torch.randn(outputs) / 20
    state |= {"flow.weight": torch.randn(3, 16, 3, 3, 3), "flow.bias": torch.zeros(3)}
    state["transformer.grid"] = torch.zeros(1, 3, 8, 8, 8)

    def write(content):
        torch.save(content, tmp_path / "official.pt")
        return tmp_path / "official.pt"

    return state, write


def official_flow(name: str, official: dict) -> torch.Tensor:
    """The official field in voxels, channel c along axis c."""
    if name.startswith("lapirn"):  # half sizes, last axis first
        return official["flow"].flip(1) * half_sizes(official["flow"])
    if name == "transmorph-oasis":  # through the official warp, which is off by up to half a voxel
        size = torch.tensor(official["flow"].shape[2:]).view(1, 3, 1, 1, 1)
        positions = fields.identity(official["flow"].shape[2:])
        return (positions + official["flow"]) * size / (size - 1) - 0.5 - positions
    return official["flow"]


@pytest.mark.parametrize("fixture", sorted(FIXTURES))
def test_an_imported_network_registers_as_the_official_one(reference, tmp_path, monkeypatch, fixture):
    official = reference(fixture)
    torch.save(official["state_dict"], tmp_path / "official.pt")
    name, smaller = FIXTURES[fixture]
    settings = dataclasses.replace(ARCHITECTURES[name].settings, **smaller)
    monkeypatch.setitem(ARCHITECTURES, name, dataclasses.replace(ARCHITECTURES[name], settings=settings))
    out = import_checkpoint(tmp_path / "official.pt", name, tmp_path / "m.safetensors", preprocessing=AS_IT_IS)
    model, card = model_file.load(out)
    with torch.no_grad():
        flow = model(official["moving"], official["fixed"])
    expected = official_flow(name, official)
    torch.testing.assert_close(flow, expected, atol=2e-4, rtol=0)
    assert card.parameters["backbone"] == official["n_params"] - UNUSED.get(fixture, 0)
    grid = Grid.from_parts(flow.shape[2:], (1.0, 1.0, 1.0), np.eye(3), (0.0, 0.0, 0.0))
    volumes = [Volume(official[side][0, 0], grid) for side in ("fixed", "moving")]
    shown = {}  # untrained, it moves images apart: what the step did, not the answer
    found = register(*volumes, load_model(out, "cpu"), steps_only(inverse=False), Job(on_picture=shown.__setitem__))
    moved = found.report["steps"][1]["mean_displacement_mm"]
    assert moved == pytest.approx(float(expected.norm(dim=1).mean()), abs=2e-4)
    last = torch.tensor(flow.shape[2:]).view(3, 1, 1, 1) - 1
    at = fields.identity(flow.shape[2:])[0] + expected[0]
    inside = ((at >= 0) & (at <= last)).all(dim=0)  # beyond the image's rim register fills with the background
    torch.testing.assert_close(shown[1].data[inside], official["warped"][0, 0][inside], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": state, "best_dsc": np.float64(0.7), "optimizer": {"lr": 1e-4}},
        lambda state: {"config": {"inshape": (8, 8, 8)}, "model_state": state},
        lambda state: {f"module.{name}": value for name, value in state.items()},
    ],
    ids=["bare", "TransMorph's", "VoxelMorph's", "DataParallel's"],
)
def test_the_usual_wrappers_are_opened(vxm2, tmp_path, wrap):
    state, write = vxm2
    model, card = model_file.load(import_checkpoint(write(wrap(state)), "vxm-2", tmp_path / "m.safetensors"))
    assert torch.equal(model.backbone.down[0][0].weight, state["unet_model.downarm.0.main.weight"])
    assert card.model.policy.mean == "linear"
    assert card.provenance["architecture"] == "vxm-2"
    assert card.provenance["sha256"] == model_file.sha256(tmp_path / "official.pt")
    assert card.license.startswith("unknown")
    assert card.preprocessing.steps == 1


def test_a_number_that_numpy_1_wrote_is_no_hindrance(vxm2, tmp_path):
    """NumPy 2 renamed the function that makes its numbers; published files hold the old name."""
    state, write = vxm2
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(np.float64(0).__reduce__()[0], "__module__", module)
            path = write({"state_dict": state, "best_dsc": np.float64(0.7)})
        assert module.encode() in path.read_bytes()
        import_checkpoint(path, "vxm-2", tmp_path / "m.safetensors")


def test_wrong_weights_get_one_sentence(vxm2, tmp_path):
    state, write = vxm2
    out = tmp_path / "m.safetensors"

    def sentence(content, name="vxm-2") -> str:
        with pytest.raises(MorphSeekError) as caught:
            import_checkpoint(write(content), name, out)
        assert not out.exists()
        return str(caught.value)

    words = sentence(state, "vxm-1")
    assert "vxm-1: down.0.0.weight, down.0.0.bias, down.1.0.weight and" in words
    assert "should be 8 x 2 x 3 x 3 x 3 and so on, not 16 x 2 x 3 x 3 x 3" in words
    assert words.endswith("it fits vxm-2.")
    lacking = {k: v for k, v in state.items() if "extras" not in k}
    assert "it lacks extra.0.0.weight, extra.0.0.bias, extra.1.0.weight and 3 more" in sentence(lacking)
    assert "it has encoder.stem too many" in sentence(state | {"encoder.stem": torch.zeros(2)})
    assert "does not hold the weights of vxm" in sentence({"encoder.stem": torch.zeros(2)}, "vxm")
    assert "NaN or infinite (flow.bias)" in sentence(state | {"flow.bias": torch.full((3,), torch.nan)})
    assert "There is no architecture 'resnet'; choose one of: vxm-1, " in sentence(state, "resnet")
    assert "holds no state dict" in sentence({"epoch": 3})
    assert "holds no state dict" in sentence(torch.zeros(3))
    with pytest.raises(MorphSeekError, match=r"ending .safetensors"):
        import_checkpoint(write(state), "vxm-2", tmp_path / "m.pt")


class Program:
    """What a malicious file does when it is unpickled."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def test_no_file_is_run(vxm2, tmp_path, monkeypatch):
    state, write = vxm2
    monkeypatch.chdir(tmp_path)
    files = [
        write({"state_dict": state, "model": Program()}).read_bytes(),
        pickle.dumps(Program(), 2),
        b"",
        b"no weights",
    ]
    for content in files:
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(MorphSeekError, match="holds more than weights"):
            import_checkpoint(tmp_path / "bad.pt", "vxm-2", tmp_path / "m.safetensors")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(MorphSeekError, match="There is no file"):
        import_checkpoint(tmp_path / "none.pt", "vxm-2", tmp_path / "m.safetensors")


def test_on_the_command_line(vxm2, tmp_path):
    state, write = vxm2
    out = tmp_path / "m.safetensors"
    options = ["--architecture", "vxm-2", "--out", out]
    more = ["--spacing", 2, 2, 3, "--shape", 32, 48, 32, "--intensity", "window", "--low", -100, "--high", 300]
    more += ["--align", "rigid", "--steps", 2, "--license", "MIT", "--title", "Mine"]
    run("import-checkpoint", write(state), *options, *more)
    card = model_file.read_card(out)
    assert card.preprocessing == Preprocessing(
        "RAS", (2.0, 2.0, 3.0), (32, 48, 32), "window", -100.0, 300.0, "rigid", steps=2
    )
    assert (card.title, card.license) == ("Mine", "MIT")
    assert "low must be below high" in run("import-checkpoint", write(state), *options, "--low", 99.9, code=2)
    assert "choose one of" in run("import-checkpoint", write(state), "--architecture", "x", "--out", out, code=2)


def test_every_published_network_can_be_imported():
    for name, architecture in ARCHITECTURES.items():
        assert architecture.from_official({}) == {}, name
