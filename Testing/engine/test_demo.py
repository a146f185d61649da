"""The demo's known deformations are what they claim to be; test_wheel.py has the whole command."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from MorphSeekLib.app import demo
from MorphSeekLib.app.phantom import abdomen, abdomen_grid
from MorphSeekLib.space.geometry import apply_affine, resample

WINDOWS = {
    "air": (-2000, -900),
    "lung": (-900, -700),
    "fat": (-150, -50),
    "soft tissue": (0, 150),
    "bone": (220, 900),
}


def test_the_phantom_has_the_densities_of_an_abdomen():
    values = abdomen(abdomen_grid(6.0), "ct").data
    shares = [float(((low < values) & (values < high)).float().mean()) for low, high in WINDOWS.values()]
    assert all(least < share for share, least in zip(shares, (0.2, 0.02, 0.2, 0.1, 0.01), strict=True)), shares


def test_the_phantom_shows_the_same_organs_in_both_contrasts():
    """Air is dark and fat apart from muscle in either; fat is dark in CT and bright in MRI."""
    grid = abdomen_grid(6.0)
    ct, mr = (abdomen(grid, contrast).data for contrast in ("ct", "mr"))
    air, fat, soft = (
        (low < ct) & (ct < high) for low, high in (WINDOWS["air"], WINDOWS["fat"], WINDOWS["soft tissue"])
    )
    assert float(mr[air].median()) < 30 < float(mr[soft].median()) < 0.7 * float(mr[fat].median())


def test_the_deformed_phantom_is_the_phantom_seen_through_the_map():
    pair = demo.abdomen_pair(6.0)
    again = resample(pair.moving, pair.fixed.grid, pair.truth.inverse(pair.fixed.grid))
    still = abdomen(pair.fixed.grid, "mr")
    center = (slice(10, -10), slice(10, -10), slice(10, -10))
    assert float(torch.corrcoef(torch.stack([again.data[center].flatten(), still.data[center].flatten()]))[0, 1]) > 0.9


def test_the_known_deformation_leads_back_to_the_original():
    pytest.importorskip("nilearn", reason="the demo's template comes with nilearn: pip install -e '.[demo]'")
    original = demo.template()
    changed, to_original = demo.deformed(original)
    again = resample(original, changed.grid, to_original)
    inside = (again.data > 0.3 * again.data.max()) & (changed.data > 0)
    # another contrast, but a monotonous one: the order of intensities is turned round exactly
    order = torch.corrcoef(torch.stack([again.data[inside], changed.data[inside]]))[0, 1]
    assert float(order) < -0.9
    points = apply_affine(original.grid.affine, torch.nonzero(original.data > 0)[::4999].double().numpy())
    distance = np.linalg.norm(to_original.map_points(points) - points, axis=1)
    assert 3.0 < distance.mean() < 20.0
