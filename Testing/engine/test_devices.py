"""Inner loops on a device other than the processor: nothing waits for it, and nothing is computed elsewhere.

The device is "meta", on which nothing is computed, so that an operator that needs values fails; what it shares with a
GPU is that it is not the processor. What each iteration may do nevertheless stands in the tests, with its reason.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import SHIPPED, TINY
from host_syncs import HostSyncs, Wait, calls_into
from torch import Tensor

from MorphSeekLib.measures import fast_fields
from MorphSeekLib.measures.similarity import mind_ssc
from MorphSeekLib.networks.policy import ModelSettings, RegistrationModel, take_steps
from MorphSeekLib.registration import search as searching
from MorphSeekLib.registration.descent import TorchStepper, descend
from MorphSeekLib.registration.objective import Level
from MorphSeekLib.registration.search import Pass, search
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import Grid, map_voxels
from MorphSeekLib.training.finetuning import FIELD_POLICY
from MorphSeekLib.training.grpo import Objective, Walk, learn_step
from MorphSeekLib.training.losses import Batch, LossSettings
from MorphSeekLib.training.policies import PolicyGradientSettings
from MorphSeekLib.training.rewards import TERMS, RewardSettings, State

SHAPE = (16, 16, 16)
POLICIES = {"latent": PolicyGradientSettings(), "field": FIELD_POLICY}
REWARDS = dict.fromkeys(TERMS, 0.1)
Work = Callable[[], object]


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """Leave autocast out: it knows neither "meta" nor what the tests are about."""
    monkeypatch.setattr(torch, "autocast", lambda *_arguments, **_options: contextlib.nullcontext())


def images(device: str, channels: int = 1, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    """A fixed and a moving image."""
    fixed, moving = torch.rand(2, 1, channels, *shape, device=device)
    return fixed, moving


def fit_level(device: str, features: float | None, shape: tuple[int, ...] = SHAPE) -> Level:
    """Two images as they are fitted."""
    counted = torch.rand([n // 2 for n in shape], device=device) > 0.2
    return Level(*images(device, 1 if features is None else 5, shape), counted, features)


def iteration(device: str, features: float | None) -> Work:
    """An iteration of the fit."""
    one = fit_level(device, features)
    return TorchStepper(one, torch.zeros(1, 3, *one.points, device=device), 0.1).step


def whole_fit(device: str) -> Work:
    """A fit of two levels by torch."""
    levels = [fit_level(device, None, (8, 8, 8)), fit_level(device, None)]
    return lambda: descend([Level(x.fixed.double(), x.moving.double(), x.counted) for x in levels], [2, 2])


def whole_search(device: str) -> Work:
    """A search of two passes by torch, and the features that it compares."""
    pair = images(device)
    return lambda: search(*(mind_ssc(image) for image in pair), passes=(Pass(4, 1), Pass(2, 1)))


def one_choice(device: str) -> Work:
    """A choice among all displacements."""
    costs = searching.TorchCosts(*images(device, 4), 1, torch.ones(SHAPE, device=device))
    return lambda: costs.best(torch.zeros(1, 3, *SHAPE, device=device), 0.1)


def small_network(name: str = "voxelmorph") -> RegistrationModel:
    """A network of a kind with few channels."""
    return RegistrationModel(ModelSettings(name, TINY[name]))


def network_steps(device: str, name: str) -> Work:
    """Two steps of a network."""
    network = small_network(name).to(device).eval()
    shape = TINY[name].get("size", [2 * network.multiple_of] * 3)
    fixed, moving = images(device, 1, tuple(shape))

    def work() -> None:
        with torch.no_grad():
            take_steps(network, lambda total: fields.warp(moving, total), fixed, 2)

    return work


def learning_step(device: str, policy: PolicyGradientSettings) -> Work:
    """A step of GRPO, gradients included."""
    network = small_network().to(device)
    shape = tuple(2 * network.multiple_of for _ in range(3))
    fixed, moving = images(device, 1, shape)
    labels = torch.zeros(1, 1, *shape, dtype=torch.uint8, device=device)
    points = torch.ones(4, 3, device=device)
    state = State(fixed, moving, torch.zeros(1, 3, *shape, device=device), labels, labels, points, points)
    # found once for each pair, see finetuning.prepare, the distances by SciPy
    state.labels = torch.arange(1, 4, device=device)
    state.fixed_distance = state.moving_distance = torch.rand(3, *shape, device=device)
    shares = torch.rand(1, 3, *shape, device=device)
    batch = Batch(fixed, moving, fixed_labels=shares, moving_labels=shares, structures=state.labels)
    objective = Objective(LossSettings(dice=1.0, folding=1.0), policy, RewardSettings(REWARDS), 1e-3, 1)
    walk = Walk(state, batch, torch.Generator().manual_seed(0))
    return lambda: learn_step(network, walk, objective)


WORKS: dict[str, Callable[[str], Work]] = {
    "correlation": lambda device: iteration(device, None),
    "features": lambda device: iteration(device, 0.3),
    "fit": whole_fit,
    "search": whole_search,
    "choice": one_choice,
    **{name: lambda device, name=name: network_steps(device, name) for name in SHIPPED},
}


@pytest.mark.parametrize("name", WORKS)
def test_nothing_waits_for_the_device_nor_is_computed_elsewhere(name):
    work = WORKS[name]("meta")
    with HostSyncs() as found:
        work()
    assert found.counted() == {}
    assert set(found.made_on) == {"meta"}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_of_grpo_waits_for_its_noise_alone(policy):
    """Which is drawn on the processor, so that a seed gives the same samples on every device."""
    work = learning_step("meta", POLICIES[policy])
    with HostSyncs() as found:
        work()
    assert found.counted() == {Wait("copy between cpu and meta", "networks/policy.py:draw"): 1}
    assert found.made_on["cpu"] == {"networks/policy.py:draw"}


@pytest.mark.parametrize("name", [*WORKS, *POLICIES])
def test_neither_numpy_nor_simpleitk_is_called(name, monkeypatch):
    for module in (searching, fast_fields):
        monkeypatch.setattr(module, "kernels", lambda _: None)  # as on a GPU
    work = learning_step("cpu", POLICIES[name]) if name in POLICIES else WORKS[name]("cpu")
    with calls_into("numpy", "SimpleITK", "scipy") as called:
        work()
    assert called == set()


def test_an_iteration_on_the_processor_reads_no_value():
    for name in ("correlation", "features", "choice"):
        work = WORKS[name]("cpu")
        with HostSyncs() as found:
            work()
        assert found.counted() == {}


def test_the_map_into_the_moving_image_is_made_on_the_device():
    """The matrices of grids and alignment are the processor's; what comes of them is written as numbers."""
    grid = Grid(SHAPE, np.diag([2.0, 2.0, 2.5, 1.0]))
    displacement = torch.zeros(1, 3, *SHAPE, device="meta")
    with HostSyncs() as found:
        map_voxels(displacement, grid, np.eye(4), grid)
    assert found.counted() == {}
    assert set(found.made_on) == {"meta"}


def test_what_waits_is_seen():
    values = torch.rand(4)
    away = torch.rand(4, device="meta")
    for work, operator in (
        (lambda: float(values.sum()), "_local_scalar_dense"),
        (lambda: values[values > 0.5], "index by a mask"),
        (lambda: values.nonzero(), "nonzero"),
        (lambda: torch.equal(values, values), "equal"),
        (lambda: values.to("meta"), "copy between cpu and meta"),
        (lambda: away.new_tensor([1.0, 2.0]), "tensor from numbers"),
    ):
        with HostSyncs() as found:
            work()
        assert operator in [wait.operator for wait in found.waits]


def test_calls_of_numpy_are_seen():
    with calls_into("numpy") as called:
        np.linalg.inv(np.eye(3))
    assert called


def test_the_benchmark_of_gpus_needs_pytorch_and_numpy_alone():
    hidden = ("SimpleITK", "scipy", "pydicom", "h5py", "safetensors", "matplotlib", "jinja2", "typer", "rich", "numba")
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden})); import gpu"
    folder = Path(sys.modules["host_syncs"].__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
