"""How much of a policy gradient is signal: its cosine with the exact gradient of soft Dice, by place and credit.

    python Testing/benchmarks/credit.py DATASET.json CHECKPOINT [--pairs 8] [--trajectories 6 16 64] [--out FILE]

The policy sees hard-Dice rewards alone (nearest-neighbor labels, no gradient); the exact gradient is that of soft Dice
of trilinearly warped one-hot labels with respect to the same tensor: the policy's mean at its place. The cosine is
between the two for one group of J trajectories of one pair, at the state after one step, averaged over the pairs.
"shuffled" gives every trajectory another's rewards: what is left is chance. "zeroed" is the Dice that the checkpoint
loses when that tensor is replaced by zero: how much the place has to say at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

from MorphSeekLib.data.datasets import PairLoader, PreparedPair, load_dataset
from MorphSeekLib.networks.model_file import load, software
from MorphSeekLib.networks.policy import Latent, RegistrationModel
from MorphSeekLib.space import fields
from MorphSeekLib.training.finetuning import FinetuneConfig, prepare
from MorphSeekLib.training.grpo import advantages, policy_loss, sample_group
from MorphSeekLib.training.losses import Batch, soft_dice
from MorphSeekLib.training.policies import Gaussian, PolicyGradientSettings, log_likelihood, make_policy
from MorphSeekLib.training.rewards import RewardSettings, State

BASE = PolicyGradientSettings(antithetic=True, scale="none", s="1", chunk=4)
FIELD = dataclasses.replace(BASE, place="field")
SETTINGS = {
    "latent, one reward (the paper's)": BASE,
    "latent, local credit": dataclasses.replace(BASE, credit="local"),
    "latent, local credit, reach 1": dataclasses.replace(BASE, credit="local", reach=1),
    "latent, local, reach 1, tau 0.3": dataclasses.replace(BASE, credit="local", reach=1, tau=0.3),
    "level 1, local, reach 1": dataclasses.replace(BASE, levels=(1,), credit="local", reach=1, sigma=0.5),
    "level 1, local, reach 1, smooth 2": dataclasses.replace(
        BASE, levels=(1,), credit="local", reach=1, sigma=0.5, smooth=2
    ),
    "levels 0 and 1, local, reach 1": dataclasses.replace(BASE, levels=(0, 1), credit="local", reach=1, sigma=0.5),
    "field 8, one reward": dataclasses.replace(FIELD, cell=8),
    "field 8, local": dataclasses.replace(FIELD, cell=8, credit="local"),
    "field 4, one reward": FIELD,
    "field 4, local": dataclasses.replace(FIELD, credit="local"),
    "field 4, local, sigma 0.5": dataclasses.replace(FIELD, credit="local", sigma=0.5),
    "field 4, local, reach 1": dataclasses.replace(FIELD, credit="local", reach=1),
    "field 4, local, reach 1, sigma 0.5": dataclasses.replace(FIELD, credit="local", reach=1, sigma=0.5),
    "field 2, local, reach 1, smooth 2": dataclasses.replace(FIELD, cell=2, credit="local", reach=1, smooth=2),
}


def gradients(
    model: RegistrationModel,
    state: State,
    batch: Batch,
    settings: PolicyGradientSettings,
    seed: int,
    shuffled: bool = False,
) -> tuple[Tensor, Tensor]:
    """The policy's and the exact descent direction with respect to the policy's mean, flattened."""
    with torch.no_grad():
        latent = model.encode(fields.warp(state.moving, state.total), state.fixed)
        field = model.field(latent, latent.mu)
        total = fields.compose(state.total, model.displacement(field))
        generator = torch.Generator().manual_seed(seed)
        policy = make_policy(model, latent, field, settings)
        group = sample_group(policy, state, total, RewardSettings({"dice": 1.0}), generator)
        if shuffled:
            order = torch.arange(len(group.rewards)).roll(1)
            group = group._replace(rewards=group.rewards[order], cells=[c[order] for c in group.cells])
    parts = [Gaussian(part.mu.clone().requires_grad_(), part.log_sigma) for part in policy.parts]
    policy_loss(advantages(group, settings), log_likelihood(parts, group.samples, settings)).backward()
    learned = torch.cat([part.mu.grad.flatten() for part in parts])
    means = [part.mu.clone().requires_grad_() for part in policy.parts]
    total = fields.compose(state.total, policy.displacements(means))
    (1 - soft_dice(batch.fixed_labels, fields.warp(batch.moving_labels, total))).backward()
    return learned, torch.cat([m.grad.flatten() for m in means])


@torch.no_grad()
def dice_without(model: RegistrationModel, pair: PreparedPair, steps: int, level: int | None) -> float:
    """Hard Dice with the top feature (level 0), a skip (1, 2, ...) or nothing (None) replaced by zero."""
    state, _ = prepare(pair, FinetuneConfig(), torch.device("cpu"))
    for _ in range(steps):
        latent = model.encode(fields.warp(state.moving, state.total), state.fixed)
        z, skips = latent.mu, list(latent.skips)
        if level == 0:
            z = torch.zeros_like(z)
        elif level is not None:
            skips[-level] = torch.zeros_like(skips[-level])
        step = model.displacement(model.field(Latent(latent.mu, latent.log_sigma, skips), z))
        state = state.moved(fields.compose(state.total, step))
    return float(state.dice(state.warped_classes(state.total)).mean())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--trajectories", type=int, nargs="+", default=[6, 16, 64])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, card = load(options.checkpoint)
    model = model.eval().requires_grad_(False)
    loader = PairLoader(card.preprocessing, model.multiple_of, centered=True)
    pairs = [loader(pair) for pair in load_dataset(options.dataset).split("registration_val")[: options.pairs]]
    states = []
    for pair in pairs:
        state, batch = prepare(pair, FinetuneConfig(), torch.device("cpu"))
        with torch.no_grad():
            states.append((state.moved(model(state.moving, state.fixed)), batch))
    levels = {"nothing": None, "the top feature": 0, "skip 1": 1, "skip 2": 2}
    zeroed = {
        name: statistics.fmean(dice_without(model, pair, card.preprocessing.steps, level) for pair in pairs)
        for name, level in levels.items()
    }
    print("Dice with " + ", ".join(f"{name} zeroed {value:.4f}" for name, value in zeroed.items()), flush=True)
    rows = {}
    print(f"{'policy':<38}{'N':>8}" + "".join(f"{f'J={j}':>9}" for j in options.trajectories) + f"{'shuffled':>10}")
    for name, settings in SETTINGS.items():
        row = {}
        for count, shuffled in [(j, False) for j in options.trajectories] + [(options.trajectories[0], True)]:
            found = [
                gradients(model, *states[n], dataclasses.replace(settings, trajectories=count), n, shuffled)
                for n in range(len(states))
            ]
            key = "shuffled" if shuffled else str(count)
            row[key] = statistics.fmean(float(torch.cosine_similarity(*pair, dim=0)) for pair in found)
        rows[name] = row | {"n": found[0][0].numel()}
        print(f"{name:<38}{rows[name]['n']:>8}" + "".join(f"{v:>9.3f}" for v in row.values()), flush=True)
    if options.out:
        content = {"zeroed": zeroed, "cosines": rows, "model": card.title, "pairs": len(pairs), "software": software()}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
