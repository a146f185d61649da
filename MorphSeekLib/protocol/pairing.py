"""Which points of two lists belong together; the engine and the module pair theirs alike."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import MorphSeekError


def paired(fixed: Sequence[str], moving: Sequence[str], names: tuple[str, str]) -> tuple[list[int], list[str]]:
    """Pair the points of two lists: by their labels where all have one, else by their order.

    Two lists that share no label at all (as Slicer names points after their list) are paired by order, too.

    Args:
        fixed, moving: the labels, "" for a point without.
        names: what to call the two lists in a refusal (their files).

    Returns:
        for each fixed point which of the moving ones belongs to it, and what to call the pair.

    Raises:
        MorphSeekError: unequal counts, a label that occurs twice, or one that only one side has.
    """
    if len(fixed) != len(moving):
        raise MorphSeekError(
            f"{names[0]} and {names[1]} hold {len(fixed)} and {len(moving)} points, and landmarks "
            "come in pairs; remove those without a partner."
        )
    sides = set(fixed), set(moving)
    if "" in sides[0] | sides[1] or not sides[0] & sides[1]:
        both = enumerate(zip(fixed, moving, strict=True), 1)
        return list(range(len(fixed))), [own or other or str(number) for number, (own, other) in both]
    for name, labels, own in zip(names, (fixed, moving), sides, strict=True):
        if len(own) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise MorphSeekError(f"{name} names two points '{twice}'; rename one.")
    if alone := sorted(sides[0] ^ sides[1]):
        raise MorphSeekError(
            f"Only {names[alone[0] in sides[1]]} has a point named '{alone[0]}'; give both points of a pair the same "
            "label, or remove all labels to pair them by their order."
        )
    return [moving.index(label) for label in fixed], list(fixed)
