"""What can be chosen for a job: one definition for the panel, the worker, the command line and Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from .startup import check_alignment, check_steps

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
