"""What fine-tuning adds on the hippocampus data: arms trained from one warm-up on one budget, tested on the same pairs.

    python Testing/benchmarks/hippocampus.py EXPERIMENT DATASET.json [--runs FOLDER] [--part K/N] [--iterations 300]
        [--out FOLDER]

EXPERIMENT is one of those below: "gain" is the question itself (does GRPO add anything?), "labels" the label-efficiency
curve, all others are ablations of the paper's form. A run that is done is not done again, so the same command resumes;
``--part 1/2`` and ``--part 2/2``, started together, share the runs (a lock each, in RUNS/locks). When no run is missing
any more, the table (EXPERIMENT.md), all figures (EXPERIMENT.json) and the plot (EXPERIMENT.png) go to ``--out``.

Every run is ``finetune`` from the same unsupervised warm-up of the plain VoxelMorph (hippocampus.toml without forces);
its last weights count. Figures are means over the pairs of "registration_test" on the working grid, T steps as trained:
Dice (hard labels, nearest-neighbor warped, mean over labels), HD95 (mm, Learn2Reg's definition), folded cells (share
with a corner determinant <= 0 on the composed field), NJD (share of voxels with a determinant <= 0 by central
differences), SDlogJ. p: Wilcoxon signed-rank over the
pairs, seeds averaged, against the experiment's first arm of the same strength.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import torch
import weakened_skips  # noqa: F401 (registers its backbone)
from comparison.runner import do_all, do_once
from comparison.table import signed_rank

from MorphSeekLib.app.settings_file import load as load_settings
from MorphSeekLib.data.datasets import PairLoader, load_dataset
from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.measures.scores import score_displacement
from MorphSeekLib.networks.devices import network_autocast
from MorphSeekLib.networks.model_file import load, read_card, software
from MorphSeekLib.networks.policy import take_steps
from MorphSeekLib.protocol.job import SILENT, Job
from MorphSeekLib.protocol.settings import from_dict
from MorphSeekLib.space import fields
from MorphSeekLib.training.finetuning import FIELD_POLICY, FinetuneConfig, finetune
from MorphSeekLib.training.policies import PolicyGradientSettings
from MorphSeekLib.training.warmup import TrainingConfig, warmup

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "Resources/Training/hippocampus.toml"
WARM_ITERATIONS = 900
FIGURES = ("dice", "hd95", "folded_percent", "njd_percent", "sdlogj")

Settings = dict[str, Any]
# table.key -> value: the paper's policy (of weight 0 at first), over FinetuneConfig's other defaults
BASE: Settings = {
    **{f"policy.{name}": value for name, value in dataclasses.asdict(PolicyGradientSettings()).items()},
    "reward.weights": {"dice": 1.0, "folding": 1.0},
    "loss.regularization": 1.0,
    "loss.folding": 10.0,
    "loss.dice": 1.0,
    "policy.weight": 0.0,
    "training.learning_rate": 3e-4,
    "training.steps": 3,
    "training.update": "iteration",
}
PAPER: Settings = {"policy.weight": 0.05}
FIELD: Settings = {
    **{f"policy.{name}": value for name, value in dataclasses.asdict(FIELD_POLICY).items()},
    "reward.weights": {"dice": 1.0, "folding": 20.0},
}
"""The default policy and rewards of ``morphseek finetune``."""
UNLIMITED: Settings = FIELD | {"policy.share": math.inf}
"""The same without a limit on the policy's gradient, which diverges with rewards by cells. The committed results that
name the field are of it, but for the one that says policy.share = 1."""
# the strength of regularization
STRENGTHS: dict[str, Settings] = {"strong": {}, "weak": {"loss.regularization": 0.3, "loss.folding": 3.0}}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        settings: over BASE.
        strengths: names in STRENGTHS.
        seeds: of the training, at the first strength; the first of them at the others.
        iterations: in units of the experiment's.
        warm: start from the warm-up; else from fresh weights.
        model: settings of the network over the plain one's; its warm-up is its own. One with ``skip_gains`` is
            :class:`weakened_skips.WeakenedSkips`.
    """

    settings: Settings
    strengths: tuple[str, ...] = ("strong",)
    seeds: tuple[int, ...] = (0,)
    iterations: int = 1
    warm: bool = True
    model: Settings = dataclasses.field(default_factory=dict)


BOTH = ("strong", "weak")
FIRST = {"soft Dice": Arm({})}
EXPERIMENTS: dict[str, dict[str, Arm]] = {
    "gain": {
        "soft Dice, T = 3": Arm({}, BOTH, (0, 1, 2)),
        "warm-up only": Arm({"loss.dice": 0.0}, BOTH),
        "soft Dice, T = 1": Arm({"training.steps": 1}, BOTH, iterations=3),
        "+ GRPO, latent (paper)": Arm(PAPER, BOTH),
        "+ GRPO, field (default policy)": Arm(FIELD, BOTH, (0, 1, 2)),
        "+ GRPO, field, gradient not limited (diverges)": Arm(UNLIMITED, BOTH, (0, 1, 2)),
    },
    # the same question with the losses' own balance moved towards Dice and against folds
    "balance": {
        "soft Dice 3, fold penalty 100": Arm({"loss.dice": 3.0, "loss.folding": 100.0}),
        "soft Dice 3": Arm({"loss.dice": 3.0}),
        "soft Dice 3, fold penalty 100, + GRPO, field": Arm(FIELD | {"loss.dice": 3.0, "loss.folding": 100.0}),
    },
    "labels": {
        f"{name}, {cases} cases": Arm(settings | {"training.labels": cases})
        for name, settings in (("soft Dice", {}), ("+ GRPO, field", FIELD))
        for cases in (15, 38, 75, 150)
    },
    # rewards that no differentiable loss here expresses
    "rewards": {
        "soft Dice": Arm({}, seeds=(0, 1, 2)),
        "+ surface tail (HD95)": Arm(FIELD | {"reward.weights": {"surface_tail": 0.3, "folding": 20.0}}, seeds=(0, 1)),
        "+ folding count alone": Arm(FIELD | {"reward.weights": {"folding": 20.0}}),
        "rewards alone, no soft Dice": Arm(FIELD | {"loss.dice": 0.0}),
        "LNCC gain alone, no labels": Arm(FIELD | {"loss.dice": 0.0, "reward.weights": {"lncc": 1.0, "folding": 1.0}}),
    },
    "places": FIRST
    | {
        "latent (paper)": Arm(PAPER),
        "latent, local credit": Arm(PAPER | {"policy.credit": "local", "policy.reach": 1}),
        "level 1": Arm(PAPER | {"policy.levels": (1,), "policy.credit": "local", "policy.reach": 1}),
        "levels 0 and 1": Arm(PAPER | {"policy.levels": (0, 1), "policy.credit": "local", "policy.reach": 1}),
        "field, every 8": Arm(FIELD | {"policy.cell": 8}),
        "field, every 4": Arm(FIELD),
        "field, every 4, one reward": Arm(FIELD | {"policy.credit": "trajectory"}),
    },
    # how much the top feature decides, where the two coarse skips are dropped
    "skips": FIRST
    | {"latent (paper)": Arm(PAPER)}
    | {
        f"{name}, coarse skips dropped": Arm(settings, model={"skip_gains": (0.0, 0.0)})
        for name, settings in (("soft Dice", {}), ("latent", PAPER))
    },
    "trajectories": FIRST
    | {
        f"J = {j}, T = {t}": Arm(PAPER | {"policy.trajectories": j, "training.steps": t})
        for j, t in ((2, 1), (6, 1), (2, 3), (6, 3), (16, 3))
    },
    "likelihood": FIRST
    | {f"s = {name}": Arm(PAPER | {"policy.s": s}) for name, s in (("1", "1"), ("root N", "sqrt_n"), ("N", "2304"))},
    "temperature": FIRST | {f"tau = {tau}": Arm(PAPER | {"policy.tau": tau}) for tau in (0.3, 1.0, 2.0)},
    "warmup": {"with warm-up": Arm(PAPER), "without": Arm(PAPER, warm=False)},
    "kl": {"with KL": Arm(PAPER), "without": Arm(PAPER | {"loss.kl": 0.0})},
    "similarity": {"with similarity": Arm(PAPER), "without": Arm(PAPER | {"loss.similarity_weight": 0.0})},
}


def settings_of(arm: Arm, strength: str, iterations: int, seed: int) -> Settings:
    """All that a run's settings say over the defaults; its best weights are its last."""
    iterations *= arm.iterations
    run = {"training.iterations": iterations, "training.validate_every": iterations, "training.save_every": 50}
    run |= {"training.seed": seed, "training.folding_limit": 100.0}
    return BASE | STRENGTHS[strength] | arm.settings | run


def config_of(settings: Settings) -> FinetuneConfig:
    """The same as ``finetune`` takes it."""
    tables: dict[str, dict] = {}
    for key, value in settings.items():
        table, name = key.split(".")
        tables.setdefault(table, {})[name] = value
    return from_dict(FinetuneConfig, tables)


def name_of(arm: Arm, settings: Settings | None = None) -> str:
    """Of the run's files, or without settings of the checkpoint that it starts from; the same in every process."""
    name = "warm" if arm.warm else "fresh"
    for part in (arm.model, settings):
        if part:
            name += "-" + hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]
    return name


@torch.inference_mode()
def test(dataset: Path, checkpoint: Path, *, zeroed: bool) -> list[dict[str, float]]:
    """A row a test pair; ``zeroed``: with zero in the place of the policy's latent."""
    model, card = load(checkpoint)
    model.eval()
    if zeroed:
        for layer in (model.head.mu.weight, model.head.mu.bias):
            layer.zero_()
    loader = PairLoader(card.preprocessing, model.multiple_of, centered=True)
    rows = []
    for pair in load_dataset(dataset).split("registration_test"):
        prepared = loader(pair)
        with network_autocast(torch.device("cpu")):
            total = take_steps(
                model, lambda u, p=prepared: fields.warp(p.moving, u), prepared.fixed, card.preprocessing.steps
            )
        row = score_displacement(total, prepared.grid.spacing.tolist(), prepared.labels, distances=True)
        rows.append(row.to_json(FIGURES))
    return rows


def report(name: str, results: dict[tuple[str, str], list[dict]], out: Path, iterations: int) -> None:
    """Table, figures and plot; ``results``: (arm, strength) -> a result a seed."""
    first = next(iter(EXPERIMENTS[name]))
    lines = [
        f"# {name}: {iterations} iterations from one warm-up, 60 test pairs\n",
        "| arm | strength | seeds | Dice | HD95 mm | folded cells % | NJD % | SDlogJ | training s "
        "| p (Dice, folded, NJD) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    if name == "skips":
        lines[1:] = [lines[1] + " Dice at z = 0 |", lines[2] + "---|"]
    figure, axes = pyplot.subplots(figsize=(7, 5))
    table = []
    for (arm, strength), found in results.items():
        per_pair = {k: _seeds_averaged(found, k) for k in found[0]["pairs"][0]}
        mean = {k: statistics.fmean(v) for k, v in per_pair.items()}
        tests = {}
        if arm != first:
            other = results[first, strength] if (first, strength) in results else results[first, "strong"]
            for k in ("dice", "folded_percent", "njd_percent", "hd95"):
                tests[k] = signed_rank(per_pair[k], _seeds_averaged(other, k))
        seconds = statistics.fmean(r["seconds"] for r in found)
        by_seed = {k: [statistics.fmean(row[k] for row in r["pairs"]) for r in found] for k in mean}
        deviation = f" ± {statistics.stdev(by_seed['dice']):.4f}" if len(found) > 1 else ""
        p = ", ".join(f"{tests[k]:.2g}" for k in ("dice", "folded_percent", "njd_percent")) if tests else ""
        lines.append(
            f"| {arm} | {strength} | {len(found)} | {mean['dice']:.4f}{deviation} | {mean['hd95']:.3f} "
            f"| {mean['folded_percent']:.4f} | {mean['njd_percent']:.4f} | {mean['sdlogj']:.3f} | {seconds:.0f} | {p} |"
            + (f" {found[0]['dice_zeroed']:.4f} |" if name == "skips" else "")
        )
        table.append({"arm": arm, "strength": strength, "mean": mean, "by_seed": by_seed, "p": tests, "runs": found})
        axes.plot(
            mean["folded_percent"], mean["dice"], "o" if strength == "strong" else "^", label=f"{arm} ({strength})"
        )
    axes.set_xlabel("folded cells, %")
    axes.set_ylabel("Dice")
    axes.set_title("60 test pairs; better is up and to the left")
    axes.legend(fontsize=7)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"{name}.png", dpi=110, bbox_inches="tight")
    (out / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {"iterations": iterations, "base": BASE, "arms": table, "software": software()}
    (out / f"{name}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
    print("\n".join(lines))


def _seeds_averaged(results: list[dict], figure: str) -> list[float]:
    """A value a pair."""
    return [
        statistics.fmean(values) for values in zip(*([row[figure] for row in r["pairs"]] for r in results), strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Run:
    """A training of an arm, or, without settings, the warm-up (or fresh weights) that arms start from."""

    arm: Arm
    title: str = ""
    strength: str = ""
    seed: int = 0
    settings: Settings | None = None
    start: Run | None = None

    @property
    def name(self) -> str:
        """Return its files' name, by its settings: experiments that share a run train it once."""
        return name_of(self.arm, self.settings)


def run_list(experiment: str, iterations: int) -> list[Run]:
    """Return the trainings of an experiment, in their order."""
    return [
        Run(arm, title, strength, seed, settings_of(arm, strength, iterations, seed), Run(arm))
        for title, arm in EXPERIMENTS[experiment].items()
        for strength in arm.strengths
        for seed in arm.seeds[: None if strength == arm.strengths[0] else 1]
    ]


@dataclasses.dataclass(frozen=True)
class Study:
    """The runs of a folder; ``zeroed``: their results also say the Dice with zero in place of the policy's latent."""

    dataset: Path
    folder: Path
    zeroed: bool = False

    def result(self, run: Run) -> dict[str, Any] | None:
        """Return a training's result; None where it is not done."""
        file = self.folder / f"{run.name}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def is_done(self, run: Run) -> bool:
        """Return whether nothing is left to do for a run."""
        if run.settings is None:
            return self._model(run).is_file()
        result = self.result(run)
        return result is not None and (not self.zeroed or "dice_zeroed" in result)

    def do(self, run: Run, job: Job = SILENT) -> None:
        """Do a run unless it is done.

        Raises:
            InUseError: another process is at work on it.
        """
        work = self._warm_up if run.settings is None else self._train
        do_once(self.folder / "locks" / run.name, lambda: self.is_done(run), lambda: work(run))

    def _model(self, run: Run) -> Path:
        return self.folder / f"{run.name}.safetensors"

    def _warm_up(self, run: Run) -> None:
        config = load_settings(TrainingConfig, RECIPE)
        backbone = "voxelmorph_weakened_skips" if "skip_gains" in run.arm.model else config.model.backbone
        own = dict(config.model.backbone_settings) | {"forces": 0, "features": 0} | run.arm.model
        config = dataclasses.replace(
            config,
            training=dataclasses.replace(config.training, iterations=WARM_ITERATIONS if run.arm.warm else 1),
            loss=dataclasses.replace(config.loss, regularization=1.0),
            model=dataclasses.replace(config.model, backbone=backbone, backbone_settings=own),
        )
        print(f"training {self._model(run).name}", flush=True)
        warmup(load_dataset(self.dataset), config, self._model(run))

    def _train(self, run: Run) -> None:
        result = self.result(run)
        if result is None:
            print(f"{run.title}, {run.strength}, seed {run.seed}", flush=True)
            config = config_of(run.settings)
            model = finetune(load_dataset(self.dataset), config, self._model(run.start), self._model(run))
            seconds = read_card(model).provenance["seconds"]
            rows = test(self.dataset, model, zeroed=False)
            result = {"name": run.title, "strength": run.strength, "seed": run.seed}
            result |= {"settings": dataclasses.asdict(config), "seconds": seconds, "pairs": rows}
            self._write(run, result)
            print({k: round(statistics.fmean(r[k] for r in rows), 4) for k in rows[0]}, f"{seconds:.0f} s", flush=True)
        if self.zeroed:
            rows = test(self.dataset, self._model(run), zeroed=True)
            self._write(run, result | {"dice_zeroed": statistics.fmean(row["dice"] for row in rows)})

    def _write(self, run: Run, result: dict[str, Any]) -> None:
        write_atomically(self.folder / f"{run.name}.json", (json.dumps(result) + "\n").encode())


def with_starts(runs: list[Run]) -> list[Run]:
    """Return the runs with what they start from, each once, before the first that needs it."""
    found: list[Run] = []
    for run in runs:
        found += [part for part in (run.start, run) if part not in found]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing; report when nothing is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=sorted(EXPERIMENTS))
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/hippocampus"))
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--out", type=Path, default=ROOT / "Testing/benchmarks/results")
    options = parser.parse_args(arguments)
    part, parts = (int(n) for n in options.part.split("/"))
    torch.set_num_threads(max(1, torch.get_num_threads() // parts))
    study = Study(options.dataset, options.runs, zeroed=options.experiment == "skips")
    runs = run_list(options.experiment, options.iterations)
    do_all(with_starts([run for run in runs[part - 1 :: parts] if not study.is_done(run)]), study.do, SILENT)
    results: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        if study.is_done(run):
            results.setdefault((run.title, run.strength), []).append(study.result(run))
    if sum(map(len, results.values())) == len(runs):
        report(options.experiment, results, options.out, options.iterations)


if __name__ == "__main__":
    main()
