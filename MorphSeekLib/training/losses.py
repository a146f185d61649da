"""The losses of one step (Docs/method.md, section B): similarity, regularizers, KL, soft Dice, learned features."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measures.fast_fields import compose, label_sums, warp
from ..measures.regularizers import diffusion, folding_penalty
from ..measures.similarity import SIMILARITIES
from ..networks.devices import training_autocast
from ..networks.policy import Latent, RegistrationModel, kl_to_standard_normal
from ..space import fields


@dataclass(frozen=True)
class LossSettings:
    """Weights of the warm-up loss, all per step.

    Attributes:
        similarity: "lncc", "mse" or "mind".
        similarity_weight: 0 for synthetic pairs whose contrasts differ.
        regularization: lambda_reg of the diffusion regularizer, on the accumulated displacement in voxels.
        folding: weight of the differentiable folding penalty mean(relu(0.05 - det J)).
        kl: beta, of the mean KL to N(0, I).
        dice: weight of 1 - soft Dice; needs labels (synthetic pairs have them).
        features: weight of :func:`feature_loss`, which makes a backbone's learned features those of the labels;
            fine-tuning only.
    """

    similarity: str = "lncc"
    similarity_weight: float = 1.0
    regularization: float = 1.0
    folding: float = 0.0
    kl: float = 1e-3
    dice: float = 0.0
    features: float = 0.0

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"similarity is '{self.similarity}'; it must be one of {', '.join(SIMILARITIES)}")


@dataclass
class Batch:
    """What an iteration trains on.

    Attributes:
        fixed, moving: (1, 1, i, j, k), what the network sees.
        fixed_target, moving_target: (1, 1, i, j, k), what their similarity is measured on; None: the images themselves.
        fixed_labels, moving_labels: shares (1, structures, i/b, j/b, k/b) of structures in blocks of b voxels, or None.
        fixed_classes, moving_classes: what stands in their place where every voxel has one structure: (1, 1, i, j, k)
            integers, 1, 2, ... in the order of ``structures``, 0 for none; or None.
        structures: (structures,) their label values; None for synthetic pairs.
    """

    fixed: Tensor
    moving: Tensor
    fixed_target: Tensor | None = None
    moving_target: Tensor | None = None
    fixed_labels: Tensor | None = None
    moving_labels: Tensor | None = None
    fixed_classes: Tensor | None = None
    moving_classes: Tensor | None = None
    structures: Tensor | None = None

    @property
    def targets(self) -> tuple[Tensor, Tensor]:
        """What the similarity of the fixed and the moving image is measured on."""
        if self.fixed_target is None or self.moving_target is None:
            return self.fixed, self.moving
        return self.fixed_target, self.moving_target

    @property
    def shares(self) -> tuple[Tensor, Tensor]:
        """The shares of the structures in the fixed and the moving image; ValueError without labels."""
        if self.fixed_labels is not None and self.moving_labels is not None:
            return self.fixed_labels, self.moving_labels
        if self.fixed_classes is None or self.moving_classes is None or self.structures is None:
            raise ValueError("The batch has no labels.")
        classes = torch.arange(1, len(self.structures) + 1, device=self.fixed.device).view(1, -1, 1, 1, 1)
        return (self.fixed_classes == classes).float(), (self.moving_classes == classes).float()


def soft_dice(fixed: Tensor, warped: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Average 2 sum(ab) / (sum(a^2) + sum(b^2)) over structures; (batch, structures, i, j, k) shares -> scalar."""
    together = (fixed * warped).sum(dim=(2, 3, 4))
    apart = fixed.square().sum(dim=(2, 3, 4)) + warped.square().sum(dim=(2, 3, 4))
    return ((2 * together + epsilon) / (apart + epsilon)).mean()


def label_dice(
    fixed: Tensor, moving: Tensor, structures: Tensor, displacement: Tensor, epsilon: float = 1e-5
) -> Tensor:
    """Return :func:`soft_dice` of two maps of classes, the moving one warped once for all structures.

    Args:
        fixed, moving: (1, 1, i, j, k) integers, 1, 2, ... in the order of ``structures``, 0 for none.
        structures: (structures,) label values.
        displacement: (1, 3, i, j, k), voxels.
    """
    count = len(structures)
    together, squares = label_sums(fixed, moving, count, displacement)
    own = together.new_zeros(count + 1).index_add_(0, fixed.flatten(), together.new_ones(()).expand(fixed.numel()))
    return ((2 * together + epsilon) / (own[1:] + squares + epsilon)).mean()


def feature_loss(learned: Tensor, shares: Tensor, structures: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Return cross-entropy + (1 - soft Dice) of class-like features against the shares of structures.

    Args:
        learned: (batch, features, i, j, k), sum 1; feature c stands for label c, all that no structure claims for the
            background.
        shares: (batch, structures, i, j, k) of the structures in each voxel.
        structures: (structures,) label values.
    """
    found = learned.float().index_select(1, structures)
    rest, nothing = (1 - t.sum(dim=1, keepdim=True) for t in (found, shares))
    entropy = -(nothing * (rest + epsilon).log() + (shares * (found + epsilon).log()).sum(dim=1, keepdim=True)).mean()
    return entropy + 1 - soft_dice(shares, found)


class Step(NamedTuple):
    """One step on the graph.

    Attributes:
        latent: the encoder's Gaussian.
        field: what its mean decodes to.
        total: the new accumulated displacement; ``outer`` the one before (detached).
        learned: features of the moved and the fixed image, where the backbone learns some.
    """

    latent: Latent
    field: Tensor
    total: Tensor
    outer: Tensor
    learned: tuple[Tensor, Tensor] | None = None


def advance(model: RegistrationModel, batch: Batch, outer: Tensor) -> Step:
    """Encode the pair as it stands after ``outer`` (1, 3, i, j, k; detached), decode the mean, compose."""
    moved = warp(batch.moving, outer)
    with training_autocast(outer.device, outer.shape[2] // model.multiple_of):
        latent = model.encode(moved, batch.fixed)
        field = model.field(latent, latent.mu).float().contiguous()
    total = compose(outer, model.displacement(field))
    return Step(latent, field, total, outer, model.backbone.learned(latent.skips))


def warmup_loss(
    step: Step, batch: Batch, weights: LossSettings, kl_weight: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return L_warm of one step (Docs/method.md, section B), with soft Dice where labels and a weight are given.

    Args:
        kl_weight: beta, where a controller rules it; else ``weights.kl``.

    Returns:
        the loss, and the terms by name (detached, still on the device).
    """
    total = step.total
    terms = {"kl": kl_to_standard_normal(step.latent), "diffusion": diffusion(total)}
    loss = (weights.kl if kl_weight is None else kl_weight) * terms["kl"] + weights.regularization * terms["diffusion"]
    if weights.similarity_weight > 0:
        target, source = batch.targets
        terms["similarity"] = SIMILARITIES[weights.similarity](target, warp(source, total))
        loss = loss + weights.similarity_weight * terms["similarity"]
    if weights.folding > 0:
        terms["folding_penalty"] = folding_penalty(total)
        loss = loss + weights.folding * terms["folding_penalty"]
    if weights.dice > 0 and (overlap := _overlap(batch, total)) is not None:
        terms["soft_dice"] = overlap
        loss = loss + weights.dice * (1 - overlap)
    if weights.features > 0 and step.learned is not None and batch.structures is not None:
        fixed_shares, moving_shares = batch.shares
        moved, known = (
            feature_loss(found, F.avg_pool3d(share, share.shape[2] // found.shape[2]), batch.structures)
            for found, share in zip(step.learned, (fields.warp(moving_shares, step.outer), fixed_shares), strict=True)
        )
        terms["features"] = moved + known
        loss = loss + weights.features * terms["features"]
    return loss, {name: value.detach() for name, value in terms.items()}


def _overlap(batch: Batch, total: Tensor) -> Tensor | None:
    """Return the soft Dice of the fixed and the warped moving labels; None without labels."""
    if batch.fixed_classes is not None and batch.moving_classes is not None and batch.structures is not None:
        return label_dice(batch.fixed_classes, batch.moving_classes, batch.structures, total)
    if batch.fixed_labels is None or batch.moving_labels is None:
        return None
    # labels may come in blocks of voxels: the block's mean displacement, in blocks
    block = total.shape[2] // batch.fixed_labels.shape[2]
    coarse = F.avg_pool3d(total, block) / block if block > 1 else total
    return soft_dice(batch.fixed_labels, fields.warp(batch.moving_labels, coarse))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on a device, without waiting for the copies."""
    moved = {
        f.name: value.to(device, non_blocking=True)
        for f in dataclasses.fields(Batch)
        if (value := getattr(batch, f.name)) is not None
    }
    return Batch(**moved)
