"""Rewards of a deformation, from hard labels and without gradient (Docs/method.md, section C.2).

Every term is a map over the fixed grid whose sum over the voxels is the term's value, so that one and the same reward
can credit a whole trajectory (the sum) or each neighborhood (sums over cells). A run's reward is the weighted sum of
the terms that its settings name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measures.fast_fields import credit, least_determinant, nearest_classes
from ..measures.metrics import landmark_errors
from ..measures.similarity import lncc_map, mind_ssc
from ..space import fields


@dataclass
class State:
    """A pair before a step: what the gain of a candidate is measured against.

    Attributes:
        fixed, moving: (1, 1, i, j, k) images.
        total: (1, 3, i, j, k), the displacement accumulated so far, voxels.
        fixed_labels, moving_labels: (1, 1, i, j, k) integers, or None.
        fixed_points, moving_points: (n, 3) landmarks in voxels of the working grid, or None.
        spacing: mm per voxel along i, j, k.
    """

    fixed: Tensor
    moving: Tensor
    total: Tensor
    fixed_labels: Tensor | None = None
    moving_labels: Tensor | None = None
    fixed_points: Tensor | None = None
    moving_points: Tensor | None = None
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def moved(self, total: Tensor) -> State:
        """Return the same pair after another step; what does not depend on the step is not computed again."""
        state = copy.copy(self)
        state.total = total
        state.__dict__.pop("dice_before", None)
        return state

    @property
    def both_labels(self) -> tuple[Tensor, Tensor]:
        """The fixed and the moving labels; ValueError where one is missing."""
        if self.fixed_labels is None or self.moving_labels is None:
            raise ValueError("The reward needs labels on both images.")
        return self.fixed_labels, self.moving_labels

    @cached_property
    def labels(self) -> Tensor:
        """(K,) the labels that both images hold, background left out."""
        return common_labels(*self.both_labels)

    @cached_property
    def fixed_classes(self) -> Tensor:
        """(1, 1, i, j, k) long: the fixed labels as 1..K in the order of ``labels``, everything else 0."""
        return _classes(self.both_labels[0], self.labels)

    @cached_property
    def moving_classes(self) -> Tensor:
        """(1, 1, i, j, k) float, for nearest-neighbor warping."""
        return _classes(self.both_labels[1], self.labels).float()

    @cached_property
    def class_maps(self) -> tuple[Tensor, Tensor]:
        """(1, 1, i, j, k) int32 each: the fixed and the moving labels as ``fixed_classes`` has them."""
        return self.fixed_classes.int(), self.moving_classes.int()

    def warped_classes(self, total: Tensor) -> Tensor:
        """Return (J, 1, i, j, k) long: the moving classes under candidate fields."""
        return fields.warp(self.moving_classes, total, "nearest").round().long()

    def dice(self, warped: Tensor) -> Tensor:
        """Return (J, K) hard Dice of warped classes."""
        together, fixed, other = _counts(self.fixed_classes, warped, len(self.labels))
        return 2 * together / (fixed + other).clamp(min=1)

    def overlap(self, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (J, 1, i, j, k) the warped classes, (J, K) voxels of each that agree, and (J, K) all of them."""
        fixed, moving = self.class_maps
        found = nearest_classes(moving, total, fixed, len(self.labels))
        if found is not None:
            return found
        warped = self.warped_classes(total)
        together, _, counts = _counts(self.fixed_classes, warped, len(self.labels))
        return warped, together, counts

    @cached_property
    def fixed_counts(self) -> Tensor:
        """(1, K) voxels of each fixed structure."""
        return _histogram(self.fixed_classes, len(self.labels))

    @cached_property
    def dice_before(self) -> Tensor:
        """(1, K)."""
        _, together, counts = self.overlap(self.total)
        return 2 * together / (self.fixed_counts + counts).clamp(min=1)

    @cached_property
    def fixed_distance(self) -> Tensor:
        """(K, i, j, k) mm from each voxel to the surface of each fixed structure."""
        return _surface_distance(self.fixed_classes, len(self.labels), self.spacing)

    @cached_property
    def moving_distance(self) -> Tensor:
        """(K, i, j, k) mm from each voxel to the surface of each moving structure."""
        return _surface_distance(self.moving_classes.long(), len(self.labels), self.spacing)


def common_labels(fixed: Tensor, moving: Tensor) -> Tensor:
    """Return (K,) the labels that both images hold, background left out, ascending."""
    found = torch.unique(fixed)
    found = found[torch.isin(found, torch.unique(moving))]
    return found[found > 0]


def dice_gain(state: State, total: Tensor) -> Tensor:
    """Return the gain in mean hard Dice: Dice(S_f, S_m o Phi_t) - Dice(S_f, S_m o Phi_(t-1)).

    For one label with D the Dice before, A the fixed and B the candidate's warped structure,
    D' - D = (2|A and B| - D (|A| + |B|)) / (|A| + |B|) = sum_x [2 A B - D (A + B)](x) / (|A| + |B|):
    the bracket is the map, so its sum is the gain exactly, not to first order.

    Args:
        total: (J, 3, i, j, k) candidate fields, voxels.

    Returns:
        (J, 1, i, j, k).
    """
    warped, _, in_warped = state.overlap(total)
    share = 1 / (state.fixed_counts + in_warped).clamp(min=1) / max(len(state.labels), 1)  # (J, K)
    fixed = state.class_maps[0] if warped.dtype == torch.int32 else state.fixed_classes
    return credit(fixed, warped, F.pad(2 * share, (1, 0)), F.pad(share * state.dice_before, (1, 0)))


def folding(state: State, total: Tensor) -> Tensor:
    """Return minus the share of cells that fold at a corner, counted on the composed field."""
    return -_on_cells((least_determinant(total) <= 0).float())


def folding_magnitude(state: State, total: Tensor) -> Tensor:
    """Return minus the mean of relu(-least corner determinant) over cells: how deep the folds are, not how many."""
    return -_on_cells(torch.relu(-least_determinant(total)))


def _on_cells(values: Tensor) -> Tensor:
    """Return the share that each cell (J, 1, i - 1, j - 1, k - 1) has in their mean, at its voxel of least index."""
    return F.pad(values / values[0].numel(), (0, 1) * 3)


def landmarks(state: State, total: Tensor) -> Tensor:
    """Return the gain in mean target registration error, mm; each landmark's gain is at its fixed voxel."""
    if state.fixed_points is None or state.moving_points is None:
        raise ValueError("The reward 'landmarks' needs landmarks on both images.")
    where = state.fixed_points, state.moving_points, state.spacing
    gain = (landmark_errors(state.total, *where) - landmark_errors(total, *where)) / len(state.fixed_points)
    shape = total.shape[2:]
    places = state.fixed_points.round().long().unbind(1)
    i, j, k = (place.clamp(0, n - 1) for place, n in zip(places, shape, strict=True))
    flat = (i * shape[1] + j) * shape[2] + k
    out = torch.zeros(len(total), total[0, 0].numel(), device=total.device)
    return out.index_add_(1, flat, gain).view(-1, 1, *shape)


def lncc_gain(state: State, total: Tensor) -> Tensor:
    """Return the gain in LNCC (window 9), label-free."""
    fixed = state.fixed.expand(len(total), -1, -1, -1, -1)
    after = lncc_map(fixed, fields.warp(state.moving, total))
    before = lncc_map(state.fixed, fields.warp(state.moving, state.total))
    return (after - before) / before.numel()


def mind_gain(state: State, total: Tensor) -> Tensor:
    """Return the decrease of the mean squared difference of MIND-SSC descriptors: label-free, for any contrasts."""
    fixed = mind_ssc(state.fixed)
    before = (mind_ssc(fields.warp(state.moving, state.total)) - fixed).square().mean(dim=1, keepdim=True)
    after = [
        (mind_ssc(fields.warp(state.moving, u[None])) - fixed).square().mean(dim=1, keepdim=True) for u in total
    ]  # one at a time: descriptors are twelve times an image
    return (before - torch.cat(after)) / before.numel()


def surface_tail(state: State, total: Tensor, quantile: float = 0.5) -> Tensor:
    """Return the gain in the upper half of the surface distances, mm: what HD95 measures, credited where it arises.

    Mean over surface elements of relu(d - q), q the ``quantile`` of d before the step, per label, averaged over labels
    and both directions: d of a warped hard label's surface voxel to the fixed surface, and of a fixed surface voxel,
    mapped, to the moving surface.
    """
    before = state.total
    parts = torch.zeros(len(total), 1, *total.shape[2:], device=total.device)
    fixed_surfaces = _surfaces(state.fixed_classes, len(state.labels))
    moving_distance = state.moving_distance[None]
    back_before = fields.warp(moving_distance, before, padding="border")
    back = [fields.warp(moving_distance, u[None], padding="border") for u in total]
    surface_before = _surfaces(state.warped_classes(before), len(state.labels))
    surface_after = _surfaces(state.warped_classes(total), len(state.labels))
    weight = 1 / (2 * max(len(state.labels), 1))
    for n in range(len(state.labels)):
        distance, on_fixed = state.fixed_distance[n], fixed_surfaces[0, n]
        there = (surface_before[0, n].any() & on_fixed.any()) * weight
        beyond = torch.relu(distance - quantile_among(distance, surface_before[0, n], quantile))
        base = (beyond * surface_before[0, n]).sum() / surface_before[0, n].sum().clamp(min=1) / distance.numel()
        on = surface_after[:, n : n + 1].float()
        excess = beyond * on / on.sum(dim=(2, 3, 4), keepdim=True).clamp(min=1)
        parts += there * (base - excess)
        limit = quantile_among(back_before[0, n], on_fixed, quantile)
        share = on_fixed.float() / on_fixed.sum().clamp(min=1)
        was = torch.relu(back_before[0, n] - limit)
        now = torch.cat([torch.relu(b[:, n : n + 1] - limit) for b in back])
        parts += there * share * (was - now)
    return parts


def quantile_among(values: Tensor, among: Tensor, quantile: float) -> Tensor:
    """Return a quantile of the values where a mask is set, a scalar; infinity where it is set nowhere.

    Elsewhere than on the processor nothing waits for the device, see :func:`quantile_by_order`.
    """
    if values.device.type != "cpu":
        return quantile_by_order(values, among, quantile)
    chosen = values[among]
    return torch.quantile(chosen, quantile) if len(chosen) else values.new_full((), torch.inf)


def quantile_by_order(values: Tensor, among: Tensor, quantile: float) -> Tensor:
    """Return the same as :func:`quantile_among`, by sorting all values.

    It takes longer than picking those that count, but how many these are only the device knows.
    """
    ordered = values.masked_fill(~among, torch.inf).flatten().sort().values
    place = (quantile * (among.sum() - 1)).clamp(min=0)
    low, high = (ordered.gather(0, at.long().view(1)) for at in (place.floor(), place.ceil()))
    return torch.where(low == high, low, torch.lerp(low, high, (place - place.floor()).to(low)))[0]


TERMS: dict[str, Callable[[State, Tensor], Tensor]] = {
    "dice": dice_gain,
    "folding": folding,
    "folding_magnitude": folding_magnitude,
    "landmarks": landmarks,
    "lncc": lncc_gain,
    "mind": mind_gain,
    "surface_tail": surface_tail,
}
"""The terms by the names that settings use."""

NEEDS_LABELS = ("dice", "surface_tail")


@dataclass(frozen=True)
class RewardSettings:
    """A weighted sum of terms.

    Attributes:
        weights: name in :data:`TERMS` -> weight. Dice and folding are shares (0..1), distances mm.
    """

    weights: dict[str, float] = field(default_factory=lambda: {"dice": 1.0, "folding": 1.0})

    def __post_init__(self) -> None:
        unknown = [name for name in self.weights if name not in TERMS]
        if unknown:
            raise ValueError(f"there is no reward '{unknown[0]}'; known rewards: {', '.join(TERMS)}")
        if not any(self.weights.values()):
            raise ValueError("all rewards have weight 0; give at least one")

    @property
    def needs_labels(self) -> bool:
        """Whether a term cannot do without labels."""
        return any(self.weights.get(name) for name in NEEDS_LABELS)


@torch.no_grad()
def reward_map(state: State, total: Tensor, settings: RewardSettings) -> Tensor:
    """Return the weighted sum of the terms, (J, 1, i, j, k); its sum over the voxels is each trajectory's reward."""
    return reduce(add, (weight * TERMS[name](state, total) for name, weight in settings.weights.items() if weight))


def _classes(labels: Tensor, wanted: Tensor) -> Tensor:
    """Renumber the wanted labels (ascending) as 1..K and all others as 0."""
    if len(wanted) == 0:
        return torch.zeros_like(labels, dtype=torch.long)
    at = torch.searchsorted(wanted, labels).clamp(max=len(wanted) - 1)
    return torch.where(wanted[at] == labels, at + 1, 0)


def _counts(fixed: Tensor, warped: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count voxels of each class: in both (J, K), in the fixed image (1, K), in the warped one (J, K)."""
    return _histogram(warped * (fixed == warped), count), _histogram(fixed, count), _histogram(warped, count)


def _histogram(classes: Tensor, count: int) -> Tensor:
    """Return (J, K) voxels of each class, of maps (J, 1, i, j, k)."""
    offset = torch.arange(len(classes), device=classes.device).view(-1, 1, 1, 1, 1) * (count + 1)
    each = (classes + offset).flatten()
    # bincount would look for the largest class, and wait for it
    counts = each.new_zeros(len(classes) * (count + 1)).index_add_(0, each, each.new_ones(()).expand(len(each)))
    return counts.view(len(classes), count + 1)[:, 1:].float()


def _surfaces(classes: Tensor, count: int) -> Tensor:
    """Return (J, K, i, j, k) bool: voxels of each class with a face neighbor outside it."""
    masks = torch.stack([classes[:, 0] == n + 1 for n in range(count)], dim=1).float()
    inside = masks
    for kernel, padding in (((3, 1, 1), (1, 0, 0)), ((1, 3, 1), (0, 1, 0)), ((1, 1, 3), (0, 0, 1))):
        inside = torch.minimum(inside, -F.max_pool3d(-masks, kernel, 1, padding))
    return (masks > 0) & (inside == 0)


def _surface_distance(classes: Tensor, count: int, spacing: tuple[float, float, float]) -> Tensor:
    from scipy import ndimage  # no other reward needs it

    surfaces = _surfaces(classes, count)[0].cpu().numpy()
    maps = [ndimage.distance_transform_edt(~s, sampling=spacing) for s in surfaces]
    return torch.stack([torch.from_numpy(m).float() for m in maps]).to(classes.device)
