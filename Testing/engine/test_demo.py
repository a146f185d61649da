"""The demo's known deformation is what it claims to be; test_wheel.py has the whole command."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from MorphSeekLib.app import demo
from MorphSeekLib.space.geometry import apply_affine, resample

pytest.importorskip("nilearn", reason="the demo's template comes with nilearn: pip install -e '.[demo]'")


def test_the_known_deformation_leads_back_to_the_original():
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
