"""What points that belong together say of a registration: the target registration error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..io.chain import inverse_points, itk_transform, links_of
from ..io.points import PointPairs
from ..measures.metrics import target_registration_error
from ..protocol.job import Notice
from ..protocol.report import LandmarkSection
from ..space.geometry import DenseTransform, Grid, Transform, apply_affine
from .result import Registration

DEFINITION = (
    "|T(fixed point) - moving point| in mm: as given (T moves nothing), after the alignment, after the registration"
)


def measure_landmarks(result: Registration, pairs: PointPairs, moving: Grid) -> None:
    """Add the target registration error of landmarks to a registration's report, per point and its mean.

    The points had no part in the registration.

    Args:
        result: its report gets "landmarks", and warnings about points outside of their image.
        pairs: from :func:`MorphSeekLib.io.points.pair_points`.
        moving: the moving image's grid.
    """
    stages: dict[str, Transform] = {"input": np.eye(4), "aligned": result.state.start, "warped": result.transform}
    errors = {name: target_registration_error(_map_of(t), pairs.fixed, pairs.moving) for name, t in stages.items()}
    back, found = inverse_points(links_of(itk_transform(result.transform)), pairs.moving)
    points: list[LandmarkSection] = [
        {
            "label": label,
            "fixed": pairs.fixed[n].tolist(),
            "moving": pairs.moving[n].tolist(),
            "moving_in_fixed": back[n].tolist() if found[n] else None,
            "input": float(errors["input"][n]),
            "aligned": float(errors["aligned"][n]),
            "warped": float(errors["warped"][n]),
        }
        for n, label in enumerate(pairs.labels)
    ]
    means = {name: float(values.mean()) for name, values in errors.items()}
    result.report["landmarks"] = {"points": points, "mean": means, "definition": DEFINITION}
    for name, grid, own in (("fixed", result.warped.grid, pairs.fixed), ("moving", moving, pairs.moving)):
        if outside := [label for label, out in zip(pairs.labels, _outside(own, grid), strict=True) if out]:
            named = ", ".join(outside[:5]) + (", ..." if len(outside) > 5 else "")
            text = (
                f"{len(outside)} of {len(own)} landmarks lie outside of the {name} image ({named}); check their "
                "coordinate system (LPS or RAS)."
            )
            result.report["warnings"].append(vars(Notice("landmarks-outside", text)))  # type: ignore[arg-type]


def _map_of(transform: Transform) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that maps (n, 3) points."""
    if isinstance(transform, DenseTransform):
        return transform.map_points
    return lambda points: apply_affine(transform, points)


def _outside(points: np.ndarray, grid: Grid) -> np.ndarray:
    """Return (n,) which points lie outside of an image's box."""
    index = apply_affine(np.linalg.inv(grid.affine), points)
    return np.any((index < -0.5) | (index > np.array(grid.shape) - 0.5), axis=1)
