"""What can be chosen for a job: one definition for the panel, the worker, the command line and Python."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from .run_folder import Stage
from .startup import check_alignment, check_iterations, check_steps

Similarity = Literal["lncc", "mse", "mind"]
"""What compares two images: local correlation, squared differences, or MIND-SSC features (two modalities)."""
Preset = Literal["fast", "best"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
Switch = Literal["auto", "on", "off"]
Estimate = Literal["on", "off", "later"]
SIMILARITIES: tuple[str, ...] = get_args(Similarity)
MAX_ITERATIONS = 1000
MOST_LEVELS = 4


@dataclass(frozen=True)
class RegistrationOptions:
    """Every choice of one registration but the images and the model.

    Attributes:
        steps: steps T of the network; None for what the model was trained with.
        align: "none", "center", "rigid" or "affine" before all else; "auto" for what the model's card says, or without
            a model, and with one that only finds labels in either image, for the one after which the images are most
            alike; and for "none" where an initial transform is given.
        stop_early: save time: take no further step after one that raises the similarity by less than 0.002.
        inverse: also compute the inverse transform.
        preset: "best", or "fast" for about a third of the time.
        search: whether large motion is searched for before the network's steps; "auto": where the images are still
            unlike after the alignment (:data:`MorphSeekLib.registration.judge.FAR`), unless the model's card says no.
        fit: whether the pair is fitted after the steps, without labels; "auto": unless the model's card says that its
            steps are better without. "off" also leaves folds as the steps made them.
        similarity: what fit and judge compare by; "auto": "lncc". The search always compares MIND-SSC features.
        fit_iterations: iterations of the fit on each level, coarse to fine; None: by the preset.
        trust: whether the error is estimated at each place, for at most twice the time of search, steps and fit;
            "later": when the result is asked for it, which keeps what that takes in memory until then.

    Raises:
        MorphSeekError: a number of steps or an alignment that there is not.
        ValueError: another choice that there is not.
    """

    steps: int | None = None
    align: str = "auto"
    stop_early: bool = False
    inverse: bool = True
    preset: Preset = "best"
    search: Switch = "auto"
    fit: Switch = "auto"
    similarity: Literal["auto", Similarity] = "auto"
    fit_iterations: tuple[int, ...] | None = None
    trust: Estimate = "off"

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_steps(self.steps)
        if self.align != "auto":
            check_alignment(self.align)
        choices: dict[str, tuple[str, ...]] = {
            "preset": PRESETS,
            "search": get_args(Switch),
            "fit": get_args(Switch),
            "similarity": ("auto", *SIMILARITIES),
            "trust": get_args(Estimate),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is '{getattr(self, name)}'; it must be one of {', '.join(known)}")
        counts = self.fit_iterations
        if counts is not None and not 1 <= len(counts) <= MOST_LEVELS:
            raise ValueError(f"fit_iterations has {len(counts)} numbers; give 1 to {MOST_LEVELS}, coarse to fine")
        if counts is not None and not all(0 <= count <= MAX_ITERATIONS for count in counts):
            raise ValueError(f"fit_iterations is {'/'.join(map(str, counts))}; each must be 0 to {MAX_ITERATIONS}")


@dataclass(frozen=True)
class TrainingOptions:
    """Every choice of a training run; run.json holds it (:mod:`MorphSeekLib.protocol.run_folder`).

    Paths are relative to the run's folder.

    Attributes:
        name: the model's, for its card.
        dataset: dataset.json or a folder, see :func:`MorphSeekLib.data.cases.find_cases`.
        model: the file of the finished model (.safetensors).
        init: bundled name or file of the model to start from, whose network and working grid are kept; None: from
            scratch.
        stages: "features" (a network learns the labels, for a fit to compare), or "warmup" (without labels), "finetune"
            (with labels), or both; and "final" (after the figures on held-out cases, the training goes on with all
            cases). None of them: what suits, by :meth:`suited`.
        backbone: the network; from scratch only.
        spacing: of the working grid, in mm; from scratch only. None: what suits the cases, by `morphseek check`.
        minutes: how long the whole run may take, about, shared as :data:`MorphSeekLib.protocol.run_folder.SHARES` says;
            None: ``iterations``.
        iterations: of each stage, where ``minutes`` is None.
        steps: steps T of the network in training.
        learning_rate: of the fine-tuning; the warm-up's is three times as high.
        seed: of everything random.
        similarity: of the losses of both stages.
        smoothness, finetune_smoothness: weight of the diffusion regularizer in the warm-up and in the fine-tuning.
        folding: weight of the folding penalty, in both stages.
        dice: weight of the soft Dice loss of the fine-tuning.
        features: weight of the loss that makes the network's learned features those of the labels; a model without
            such features gets them. No effect on a network that cannot learn any.
        augmentation: strength of the random deformations and contrasts of the fine-tuning's images; 0 for none.
        policy: weight of the policy's loss (GRPO) of the fine-tuning; 0 samples nothing.
        trajectories: deformations that are sampled and compared in each step of the fine-tuning.
        reward_dice, reward_folding: weights of the reward's terms.
        kl_target: the KL to N(0, I) that the policy is steered to; None keeps the weight of the KL.
        device: auto, cpu or cuda:N.
        leave_out: names of cases not to use.

    Raises:
        ValueError: choices that go together with no training.
        MorphSeekError: a number of steps or of iterations that there is not.
    """

    name: str
    dataset: str
    model: str
    init: str | None = None
    stages: tuple[Stage, ...] = ()
    backbone: str = "voxelmorph"
    spacing: float | None = None
    minutes: float | None = 60.0
    iterations: int = 800
    steps: int = 3
    learning_rate: float = 3e-4
    seed: int = 0
    similarity: Similarity = "lncc"
    smoothness: float = 1.0
    finetune_smoothness: float = 1.0
    folding: float = 10.0
    dice: float = 1.0
    features: float = 1.0
    augmentation: float = 0.6
    policy: float = 20.0
    trajectories: int = 6
    reward_dice: float = 1.0
    reward_folding: float = 20.0
    kl_target: float | None = None
    device: str = "auto"
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "features" in self.stages and {"warmup", "finetune"} & set(self.stages):
            raise ValueError(
                "a run trains features, or a network by a warmup and a finetune stage; choose one of these"
            )
        if set(self.stages) == {"warmup", "final"}:
            raise ValueError("the final stage goes on with features or a finetune stage; choose one of these too")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError("minutes must be above 0")
        if self.spacing is not None and not self.spacing > 0:
            raise ValueError("spacing must be above 0 mm")
        if not self.model.endswith(".safetensors"):
            raise ValueError("model must end with .safetensors")
        check_steps(self.steps)
        check_iterations(self.iterations)

    def suited(self, labeled: bool) -> TrainingOptions:
        """Return the options with the stages that suit, where they name none.

        Without labels that is the warm-up, from a model the fine-tuning, and else features, which came to more Dice and
        smoother fields than a network in the same minutes (Docs/results.md).
        """
        named = [stage for stage in self.stages if stage != "final"]
        if labeled and named:
            return self
        usual: Stage = "warmup" if not labeled else "features" if self.init is None else "finetune"
        last: tuple[Stage, ...] = ("final",) if labeled and "final" in self.stages else ()
        return replace(self, stages=(usual, *last))
