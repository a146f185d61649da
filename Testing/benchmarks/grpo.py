"""GRPO's memory and time against the number J of trajectories, beside the form that keeps every decode on the graph.

    python Testing/benchmarks/grpo.py [--size 64] [--rounds 3] [--out FILE]

One iteration (T = 3 steps, place "latent", VoxelMorph of the hippocampus recipe, labels of three structures, random
images) runs in a process of its own for each row, so that peak memory (resident set) is its own. "flat" is
MorphSeekLib.training.grpo: samples decoded and scored without a graph, one decode differentiated. "graph" decodes all J
samples in one differentiable batch, scores them, and lets L_policy pass through the same graph. Both compute the same
policy gradient (checked here on a small case before anything is timed). Targets: flat's peak at J = 64 at most 1.15
times that at J = 2; at J = 6 flat at least twice as fast as graph.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from MorphSeekLib.networks.devices import training_autocast
from MorphSeekLib.networks.policy import ModelSettings, RegistrationModel, draw
from MorphSeekLib.space import fields
from MorphSeekLib.training.finetuning import FinetuneConfig
from MorphSeekLib.training.grpo import Group, advantages, policy_loss, sample_group
from MorphSeekLib.training.losses import Batch, advance, warmup_loss
from MorphSeekLib.training.policies import PolicyGradientSettings, expand_latent, make_policy
from MorphSeekLib.training.rewards import State, reward_map

MODEL = {"encoder": [16, 32, 64, 64], "decoder": [64, 64, 32], "extra": [32, 16], "norm": "instance", "flow_stride": 2}
CONFIG = FinetuneConfig()


def setting(size: int, j: int) -> tuple[RegistrationModel, State, Batch, PolicyGradientSettings]:
    """A model, a random labeled pair, and J trajectories."""
    torch.manual_seed(0)
    model = RegistrationModel(ModelSettings(backbone_settings=MODEL))
    torch.nn.init.normal_(model.backbone.flow.weight, 0, 0.02)
    fixed, moving = torch.rand(2, 1, 1, size, size, size)
    labels = torch.zeros(1, 1, size, size, size, dtype=torch.int32)
    for n in range(3):
        labels[:, :, size // 4 + n * size // 8 :, size // 4 : -size // 4, size // 4 : -size // 4] = n + 1
    state = State(fixed, moving, torch.zeros(1, 3, size, size, size), labels, torch.roll(labels, 2, 3))
    shares = [(c == torch.arange(1, 4).view(1, 3, 1, 1, 1)).float() for c in (labels, torch.roll(labels, 2, 3))]
    return model, state, Batch(fixed, moving, None, None, *shares), PolicyGradientSettings(trajectories=j)


def flat(model: RegistrationModel, state: State, batch: Batch, policy: PolicyGradientSettings, steps: int) -> None:
    """The iteration as fine-tuning does it."""
    for _ in range(steps):
        step = advance(model, batch, state.total)
        loss, _ = warmup_loss(step, batch, CONFIG.loss)
        generator = torch.Generator().manual_seed(0)
        acting = make_policy(model, step.latent, step.field, policy)
        group = sample_group(acting, state, step.total, CONFIG.reward, generator)
        (loss + policy_loss(advantages(group, policy), acting.log_likelihood(group.samples))).backward()
        state = state.moved(group.best)


def graph(model: RegistrationModel, state: State, batch: Batch, policy: PolicyGradientSettings, steps: int) -> None:
    """The same with all decodes on the graph."""
    for _ in range(steps):
        step = advance(model, batch, state.total)
        loss, _ = warmup_loss(step, batch, CONFIG.loss)
        acting = make_policy(model, step.latent, step.field, policy)
        generator = torch.Generator().manual_seed(0)
        samples = draw(*acting.parts[0], policy.tau, policy.trajectories, generator=generator).requires_grad_()
        with training_autocast(samples.device):
            field = model.field(expand_latent(step.latent, len(samples)), samples)
        steps_j = model.displacement(field.float())
        totals = fields.compose(state.total, steps_j)
        maps = reward_map(state, totals, CONFIG.reward)
        rewards = maps.flatten(1).sum(dim=1)
        best = totals[rewards.argmax()][None].detach()
        group = Group([samples], rewards, [maps], best, rewards.mean(), [maps[:1]])
        # the decodes take part in the backward pass, with weight zero
        gain = policy_loss(advantages(group, policy), acting.log_likelihood(group.samples))
        (loss + gain + 0 * totals.mean()).backward()
        state = state.moved(group.best)


KINDS = {"flat": flat, "graph": graph}


def child(kind: str, size: int, j: int, rounds: int) -> dict[str, float]:
    """Median seconds of an iteration."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, state, batch, policy = setting(size, j)
    seconds = []
    for _ in range(rounds + 1):
        model.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        KINDS[kind](model, state, batch, policy, 3)
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds[1:])}


def same_gradient() -> float:
    """Largest difference of the two forms' gradients, relative to the largest gradient."""
    gradients = []
    for kind in KINDS.values():
        model, state, batch, policy = setting(32, 4)
        kind(model, state, batch, policy, 2)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max())


def measure(kind: str, size: int, j: int, rounds: int) -> dict[str, float]:
    """A row, in a process of its own."""
    command = [sys.executable, __file__, "--child", kind, str(size), str(j), str(rounds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={"OMP_NUM_THREADS": "2"} | os.environ, text=True)
    line = process.stdout.read().strip().splitlines()[-1]
    _, _, usage = os.wait4(process.pid, 0)
    return json.loads(line) | {"peak_gb": usage.ru_maxrss / 2**20}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    difference = same_gradient()
    print(f"gradients of the two forms differ by {difference:.1e} of the largest")
    rows = {
        f"{kind}, J = {j}": measure(kind, options.size, j, options.rounds)
        for kind, j in [("flat", 2), ("flat", 6), ("flat", 64), ("graph", 2), ("graph", 6), ("graph", 16)]
    }
    for name, row in rows.items():
        print(f"{name:<14}{row['seconds']:8.2f} s{row['peak_gb']:8.2f} GB")
    ratios = {
        "flat_peak_64_over_2": rows["flat, J = 64"]["peak_gb"] / rows["flat, J = 2"]["peak_gb"],
        "graph_over_flat_seconds_6": rows["graph, J = 6"]["seconds"] / rows["flat, J = 6"]["seconds"],
    }
    print(", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))
    if options.out:
        content = {"size": options.size, "rows": rows, "ratios": ratios, "gradient_difference": difference}
        options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], *map(int, sys.argv[3:]))))
    else:
        main()
