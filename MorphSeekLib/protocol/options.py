"""What can be chosen for a job: one definition for the panel, the worker, the command line and Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from .run_folder import STAGES, Stage
from .startup import check_alignment, check_iterations, check_steps

FitSimilarity = Literal["lncc", "mse", "mind"]
FitPreset = Literal["no", "model", "image"]
FIT_SIMILARITIES: tuple[str, ...] = get_args(FitSimilarity)
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class FitOptions:
    """How the field of the pair at hand is fitted after the network's steps, without labels.

    Attributes:
        iterations: on the network's grid.
        fine_iterations: then on the fixed image's own grid (:func:`MorphSeekLib.space.preprocessing.fine_grid`); an
            iteration there costs as many times more as it has voxels. Without any of both nothing is fitted.
        latent_share: share of the iterations spent on the policy's latent z, before the field.
        similarity: "lncc" or "mse" for images of the same modality, "mind" across modalities.
        regularization: weight of the diffusion regularizer, in voxels.
        folding: weight of :func:`MorphSeekLib.measures.regularizers.folding_penalty`.
        latent_rate, field_rate: Adam's steps, in units of z and in voxels.
        stride, fine_stride: voxels between the control points of the field's correction, on either grid.
        unfold: the most iterations of :func:`MorphSeekLib.measures.folds.unfold` that follow.
    """

    iterations: int = 0
    fine_iterations: int = 0
    latent_share: float = 0.2
    similarity: FitSimilarity = "lncc"
    regularization: float = 1.0
    folding: float = 100.0
    latent_rate: float = 0.05
    field_rate: float = 0.25
    stride: int = 4
    fine_stride: int = 2
    unfold: int = 300

    def __post_init__(self) -> None:
        if self.similarity not in FIT_SIMILARITIES:
            raise ValueError(f"similarity is '{self.similarity}'; it must be one of {', '.join(FIT_SIMILARITIES)}")
        for name in ("iterations", "fine_iterations", "unfold"):
            if not 0 <= getattr(self, name) <= MAX_ITERATIONS:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 to {MAX_ITERATIONS}")
        if not 0 <= self.latent_share <= 1:
            raise ValueError("latent_share must be between 0 and 1")
        if min(self.stride, self.fine_stride) < 1:
            raise ValueError("stride and fine_stride must be at least 1")

    @classmethod
    def preset(cls, name: FitPreset, similarity: FitSimilarity = "lncc") -> FitOptions:
        """Return one of the fits that were measured in the main table (Testing/benchmarks/results/main-table).

        Args:
            name: "no"; "model", on the model's grid; "image", then on the image's own grid too.
            similarity: see the attribute.
        """
        iterations, fine = {"no": (0, 0), "model": (60, 0), "image": (60, 20)}[name]
        return cls(iterations, fine, similarity=similarity)

    @property
    def total(self) -> int:
        """How many iterations are asked for, on both grids."""
        return self.iterations + self.fine_iterations


@dataclass(frozen=True)
class RegistrationOptions:
    """Every choice of one registration but the images and the model.

    Attributes:
        steps: steps T of the network; None for what the model was trained with.
        align: "none", "center", "rigid" or "affine" before the network; None for the model's own, or "none" where an
            initial transform is given.
        stop_early: save time: take no further step after one that raises the similarity by less than 0.002.
        inverse: also compute the inverse transform.
        fit: how the pair is fitted after the steps.

    Raises:
        MorphSeekError: a number of steps or an alignment that there is not.
    """

    steps: int | None = None
    align: str | None = None
    stop_early: bool = False
    inverse: bool = True
    fit: FitOptions = field(default_factory=FitOptions)

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_steps(self.steps)
        if self.align is not None:
            check_alignment(self.align)


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
        stages: "warmup", "finetune" or both.
        backbone: the network; from scratch only.
        spacing: of the working grid, in mm; from scratch only.
        minutes: how long each stage may take, about; None: ``iterations``.
        iterations: of each stage, where ``minutes`` is None.
        steps: steps T of the network in training.
        learning_rate: of the fine-tuning; the warm-up's is three times as high.
        seed: of everything random.
        similarity: as for :class:`FitOptions`, in both stages.
        smoothness, finetune_smoothness: weight of the diffusion regularizer in the warm-up and in the fine-tuning.
        folding: weight of the folding penalty, in both stages.
        dice: weight of the soft Dice loss of the fine-tuning.
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
    stages: tuple[Stage, ...] = STAGES
    backbone: str = "voxelmorph"
    spacing: float = 1.5
    minutes: float | None = 60.0
    iterations: int = 800
    steps: int = 3
    learning_rate: float = 3e-4
    seed: int = 0
    similarity: FitSimilarity = "lncc"
    smoothness: float = 1.0
    finetune_smoothness: float = 1.0
    folding: float = 10.0
    dice: float = 1.0
    policy: float = 20.0
    trajectories: int = 6
    reward_dice: float = 1.0
    reward_folding: float = 20.0
    kl_target: float | None = None
    device: str = "auto"
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("there is neither a warmup nor a finetune stage")
        if self.init is None and "warmup" not in self.stages:
            raise ValueError("fine-tuning needs a model to start from (init) or a warmup stage before it")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError("minutes must be above 0")
        if not self.model.endswith(".safetensors"):
            raise ValueError("model must end with .safetensors")
        check_steps(self.steps)
        check_iterations(self.iterations)
