"""What a GPU makes of a registration: the same answer as the processor, seconds, memory, and where it is waited for.

    python Testing/benchmarks/gpu.py [--out FILE.md] [--small]

It needs PyTorch and numpy alone and at most five minutes: what is left when these are over is skipped, which is said.
Without a GPU it runs on the processor with small images, which shows only that it works.

- Parity: each stage on the device against the torch form on the processor, from the same input, as the largest
  difference in voxels; at most 0.001 passes. Networks run in float32 without TF32. The search chooses among
  displacements, so that rounding decides where two are equally good: at most 0.1 % of the control points may differ by
  more. Whole fits are compared in float64: in float32 Adam, which divides by the gradient's size, makes of rounding
  where the gradient is small whole steps. How far that goes on the processor alone stands beside the fits in float32.
  Learning: the field after a step of GRPO, and the weights' gradient relative to its largest.
- Stages: a synthetic pair of 160x208x192 voxels of 1 mm. Seconds of the first run, which prepares kernels, and of the
  second; peak memory; and host syncs of a third: operators that wait for the device, as host_syncs.py knows them.
- GRPO: seconds and peak memory of a learning step for J = 2 to 64 trajectories; memory should not grow with J.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from host_syncs import HostSyncs
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout need not be installed

from MorphSeekLib.measures.similarity import mind_ssc
from MorphSeekLib.networks.devices import network_autocast, place
from MorphSeekLib.networks.policy import ModelSettings, RegistrationModel, take_steps
from MorphSeekLib.registration import descent, search
from MorphSeekLib.registration.descent import descend, kernels_used
from MorphSeekLib.registration.judge import Judge
from MorphSeekLib.registration.plans import CORRELATION, FEATURES, Plan
from MorphSeekLib.registration.pyramid import Coarse, Crop, Pyramid
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import Grid, Volume, resample, voxel_displacement
from MorphSeekLib.training.grpo import Learned, Objective, Walk, learn_step
from MorphSeekLib.training.losses import Batch, LossSettings
from MorphSeekLib.training.policies import PolicyGradientSettings
from MorphSeekLib.training.rewards import RewardSettings, State

BUDGET_S = 280.0
TOLERANCE, TIES = 1e-3, 1e-3
HEAD, SMALL = (160, 208, 192), (48, 64, 48)
PARITY, SMALL_PARITY = (64, 80, 64), (32, 40, 32)
LEARNING, SMALL_LEARNING = (160, 192, 160), (32, 32, 32)
COUNTS = (2, 4, 8, 16, 32, 64)
FITS = {"correlation": CORRELATION["best"], "features": FEATURES["best"]}
SHORT = {name: replace(plan, levels=(2, 1, 0), iterations=(10, 10, 10)) for name, plan in FITS.items()}
POLICY = PolicyGradientSettings(
    weight=20.0, place="field", sigma=0.5, credit="local", scale="none", s="1", antithetic=True, advance="mean"
)
"""That of fine-tuning by default."""


@dataclass
class Meter:
    """Measures on a device.

    Attributes:
        device: where the work is done.
        begin: when the benchmark began.
    """

    device: torch.device
    begin: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Whether the time is spent."""
        return time.monotonic() - self.begin > BUDGET_S

    def seconds(self, work: Callable[[], object]) -> float:
        """Do the work; return the seconds that it took, those of the device included."""
        self._wait()
        begin = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - begin

    def peak(self, work: Callable[[], object]) -> float:
        """Do the work; return the peak of memory, MB: the tensors' on a GPU, else the process's so far."""
        if self.device.type != "cuda":
            work()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self._wait()
        return torch.cuda.max_memory_allocated(self.device) / 2**20

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Table:
    """Lines of Markdown, printed as they come and kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str = "") -> None:
        """Add a line."""
        print(line, flush=True)
        self.lines.append(line)

    def head(self, *names: str) -> None:
        """Begin a table."""
        self.say()
        self.row(*names)
        self.row(*["---"] * len(names))

    def row(self, *cells: str) -> None:
        """Add a row."""
        self.say(f"| {' | '.join(cells)} |")


def synthetic_pair(shape: Sequence[int], seed: int = 0) -> tuple[Volume, Volume]:
    """Make two heads of smooth tissue within a dark background, one bent by up to about six voxels."""
    generator = torch.Generator().manual_seed(seed)

    def smooth(cell: int, channels: int = 1) -> Tensor:
        noise = torch.randn(1, channels, *(n // cell + 2 for n in shape), generator=generator)
        return F.interpolate(noise, size=tuple(shape), mode="trilinear", align_corners=True)

    places = torch.meshgrid(*(torch.linspace(-1.15, 1.15, n) for n in shape), indexing="ij")
    inside = torch.sigmoid(20 * (1 - torch.stack(places).square().sum(dim=0).sqrt()))
    tissue = torch.sigmoid(3 * smooth(12) + 1.5 * smooth(5))
    moving = inside * (0.15 + 0.8 * tissue)
    fixed = fields.warp(moving, 2.5 * smooth(32, 3), padding="border")
    grid = Grid(tuple(shape), np.eye(4))
    fixed, moving = (
        (image + 0.005 * torch.randn(image.shape, generator=generator)).clamp(0, 1) for image in (fixed, moving)
    )
    return Volume(fixed[0, 0], grid), Volume(moving[0, 0], grid)


class Prepared:
    """A pair on a device, as the stages of a registration see it."""

    def __init__(self, pair: tuple[Volume, Volume], device: torch.device) -> None:
        self.fixed, self.moving = pair
        self.device = device
        self.crop = Crop.of(self.fixed, device)
        self.pyramid = Pyramid.of(self.crop, self.moving, np.eye(4))
        self.judge = Judge(Coarse.of(self.crop, self.moving, np.eye(4)), "lncc")

    def search(self) -> Tensor:
        """Return the control points that the search finds."""
        level, passes = search.level_for(self.crop.grid.shape)
        fixed, moving, _ = self.pyramid.images(level)
        return search.search(mind_ssc(fixed), mind_ssc(moving), passes)

    def fit(self, plan: Plan, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the control points that a fit ends at."""
        weights = plan.regularization, plan.folding
        levels = [self.pyramid.level(number, plan.similarity, *weights) for number in plan.levels]
        levels = [replace(level, fixed=level.fixed.to(dtype), moving=level.moving.to(dtype)) for level in levels]
        return descend(levels, plan.iterations, None, plan.rate)[-1].control

    def figures(self, control: Tensor) -> list[float]:
        """Return what is said of a stage: similarity, and shares of folds."""
        cells = voxel_displacement(self.pyramid.displacement(control, 0), self.crop.lattice, self.device)
        shares = [
            (j <= 0).float().mean() for j in (fields.least_determinant(cells), fields.jacobian_determinant(cells))
        ]
        return torch.stack([self.judge(None, np.eye(4)), *shares]).tolist()

    def warped(self, control: Tensor) -> Volume:
        """Return the moving image at full resolution."""
        transform = self.pyramid.transform(control, 0)
        return resample(self.moving, self.fixed.grid, transform, device=self.device)


def network_on(device: torch.device) -> RegistrationModel:
    """Make VoxelMorph with random weights whose fields are some voxels long."""
    torch.manual_seed(0)
    network = RegistrationModel(ModelSettings(backbone_settings={"norm": "instance"}))
    torch.nn.init.normal_(network.backbone.flow.weight, 0, 0.1)
    return place(network, device)


def two_steps(network: RegistrationModel, fixed: Tensor, moving: Tensor) -> Tensor:
    """Return the displacement after two steps of a network."""
    with torch.no_grad(), network_autocast(fixed.device):
        return take_steps(network.eval(), lambda total: fields.warp(moving, total), fixed, 2)


def learn(network: RegistrationModel, fixed: Tensor, moving: Tensor, policy: PolicyGradientSettings) -> Learned:
    """Take a learning step on a pair whose labels are levels of intensity; gradients are left at the weights."""
    network.zero_grad(set_to_none=True)
    labels = [(image * 4).to(torch.uint8) for image in (fixed, moving)]
    state = State(fixed, moving, torch.zeros(1, 3, *fixed.shape[2:], device=fixed.device), *labels)
    state.labels = torch.arange(1, 4, device=fixed.device)
    classes = state.labels.view(1, -1, 1, 1, 1)
    shares = [(image == classes).float() for image in labels]
    batch = Batch(fixed, moving, fixed_labels=shares[0], moving_labels=shares[1], structures=state.labels)
    objective = Objective(LossSettings(dice=1.0, folding=1.0), policy, RewardSettings(), 1e-3, 1)
    return learn_step(network, Walk(state, batch, torch.Generator().manual_seed(0)), objective)


def gradient_of(network: RegistrationModel) -> Tensor:
    """Return the gradients of all weights, (n,), on the processor."""
    return torch.cat([p.grad.flatten().cpu() for p in network.parameters() if p.grad is not None])


@contextmanager
def torch_alone() -> Iterator[None]:
    """Do without compiled kernels."""
    kept = descent.kernels, search.kernels
    descent.kernels = search.kernels = lambda _: None
    try:
        yield
    finally:
        descent.kernels, search.kernels = kept


class Agreement:
    """Rows of the table of parity.

    Attributes:
        good: whether all that were judged passed.
    """

    def __init__(self, table: Table) -> None:
        self._table, self.good = table, True
        table.head("stage", "largest difference", "above 0.001, %", "result")

    def judge(self, name: str, found: Tensor, expected: Tensor, allowed: float = 0.0) -> None:
        """Add a row that passes where at most a share of the numbers differs."""
        difference = (found.cpu() - expected).abs()
        passes = bool(difference.isfinite().all()) and _beyond(difference) <= allowed
        self.good &= passes
        self._add(name, difference, "passes" if passes else "FAILS")

    def show(self, name: str, found: Tensor, expected: Tensor) -> None:
        """Add a row that is not judged."""
        self._add(name, (found.cpu() - expected).abs(), "not judged")

    def _add(self, name: str, difference: Tensor, result: str) -> None:
        self._table.row(name, f"{float(difference.max()):.2e}", f"{100 * _beyond(difference):.3f}", result)


def _beyond(difference: Tensor) -> float:
    """Return the share of numbers above the tolerance."""
    return float((difference > TOLERANCE).float().mean())


def parity(table: Table, meter: Meter, shape: Sequence[int]) -> bool:
    """Compare every stage with the torch form on the processor; return whether all agree."""
    os.environ["MORPHSEEK_PRECISION"] = "float32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    pair = synthetic_pair(shape)
    one, other = (Prepared(pair, device) for device in (meter.device, torch.device("cpu")))
    table.say()
    table.say(f"## Parity, {' x '.join(map(str, shape))} voxels")
    rows = Agreement(table)
    with torch_alone():
        expected = other.search()
    rows.judge("search", one.search(), expected, TIES)
    for name, plan in SHORT.items():
        with torch_alone():
            exact, rounded = (other.fit(plan, dtype) for dtype in (torch.float64, torch.float32))
        rows.judge(f"fit by {name}, float64", one.fit(plan, torch.float64), exact)
        rows.show(f"fit by {name}, float32", one.fit(plan).double(), exact)
        rows.show(f"fit by {name}, float32 by torch on the processor", rounded.double(), exact)
    at = torch.zeros(1, 3, *(n // 2 for n in one.crop.grid.shape))
    rows.judge("figures", *(torch.tensor(p.figures(at.to(p.device))) for p in (one, other)))
    networks = [network_on(p.device) for p in (one, other)]
    images = [(p.crop.image, p.pyramid.moving) for p in (one, other)]
    rows.judge("network, two steps", *(two_steps(n, *i) for n, i in zip(networks, images, strict=True)))
    rows.judge("learning, field", *(learn(n, *i, POLICY).total for n, i in zip(networks, images, strict=True)))
    gradients = [gradient_of(network) for network in networks]
    largest = gradients[1].abs().max()
    rows.judge("learning, gradient", gradients[0] / largest, gradients[1] / largest)
    del os.environ["MORPHSEEK_PRECISION"]
    return rows.good


def stages(table: Table, meter: Meter, shape: Sequence[int], fits: dict[str, Plan]) -> None:
    """Measure the stages of a registration of a 1 mm head."""
    pair = synthetic_pair(shape)
    prepared = Prepared(pair, meter.device)
    network = network_on(meter.device)
    images = prepared.crop.image, prepared.pyramid.moving
    at = torch.zeros(1, 3, *(n // 2 for n in prepared.crop.grid.shape), device=meter.device)
    works: dict[str, Callable[[], object]] = {
        "prepare": lambda: Prepared(pair, meter.device),
        "search": prepared.search,
        **{f"fit by {name}": lambda plan=plan: prepared.fit(plan) for name, plan in fits.items()},
        "network, two steps": lambda: two_steps(network, *images),
        "figures": lambda: prepared.figures(at),
        "warp": lambda: prepared.warped(at),
    }
    table.say()
    table.say(f"## Stages, {' x '.join(map(str, shape))} voxels (fit and search by {kernels_used(meter.device)})")
    table.head("stage", "seconds, first run", "second run", "peak memory, MB", "host syncs", "of these, where")
    for name, work in works.items():
        if meter.over:
            table.row(name, *["skipped"] * 5)
            continue
        first, second = meter.seconds(work), meter.seconds(work)
        with HostSyncs() as found:
            peak = meter.peak(work)
        places = [f"{wait.place} ({wait.operator}) {count}" for wait, count in found.counted().most_common(3)]
        where = "; ".join(places) or "-"
        table.row(name, f"{first:.3f}", f"{second:.3f}", f"{peak:.0f}", str(len(found.waits)), where)


def learning(table: Table, meter: Meter, shape: Sequence[int]) -> None:
    """Measure a learning step for several numbers of trajectories."""
    fixed, moving = (volume.data[None, None].to(meter.device) for volume in synthetic_pair(shape))
    network = network_on(meter.device)
    table.say()
    table.say(f"## Learning by GRPO, one step, {' x '.join(map(str, shape))} voxels")
    table.head("J", "seconds", "peak memory, MB", "host syncs")
    for count in COUNTS:
        if meter.over:
            table.row(str(count), *["skipped"] * 3)
            continue
        policy = replace(POLICY, trajectories=count)
        if count == COUNTS[0]:
            learn(network, fixed, moving, policy)
        seconds = meter.seconds(lambda policy=policy: learn(network, fixed, moving, policy))
        with HostSyncs() as found:
            peak = meter.peak(lambda policy=policy: learn(network, fixed, moving, policy))
        table.row(str(count), f"{seconds:.3f}", f"{peak:.0f}", str(len(found.waits)))


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    parser.add_argument("--small", action="store_true", help="small images on a GPU too")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    table, meter = Table(), Meter(torch.device("cuda:0" if gpu else "cpu"))
    where = torch.cuda.get_device_name(0) if gpu else f"no GPU: the processor, {torch.get_num_threads()} threads"
    table.say(f"{where}; PyTorch {torch.__version__}, Python {sys.version.split()[0]}")
    small = options.small or not gpu
    if not gpu:
        table.say("Nothing here says anything about a GPU; it shows that the script works.")
    good = parity(table, meter, SMALL_PARITY if small else PARITY)
    stages(table, meter, *((SMALL, SHORT) if small else (HEAD, FITS)))
    learning(table, meter, SMALL_LEARNING if small else LEARNING)
    table.say()
    table.say(f"{time.monotonic() - meter.begin:.0f} s in all.")
    if options.out:
        options.out.write_text("\n".join([*table.lines, ""]), encoding="utf-8")
    if not good:
        raise SystemExit("A stage does not agree with the processor.")


if __name__ == "__main__":
    main()
