"""The demo: its known deformation is what it claims to be, and the bundled model undoes most of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from MorphSeekLib.app import demo
from MorphSeekLib.protocol.job import SILENT
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


def test_the_demo_without_colin27_reports_the_true_error(tmp_path, monkeypatch):
    """The whole command's work, on the pair that needs no Debian package."""
    monkeypatch.setattr(demo, "COLIN27", tmp_path / "not installed")
    report, sentences = demo.run_demo(tmp_path / "out", "cpu", SILENT)
    before, after = (float(word) for word in sentences[-1].split() if word.replace(".", "").isdigit())
    assert after < 0.5 * before, sentences
    assert report["folding"]["njd_percent"] < 0.5
    assert json.loads((tmp_path / "out" / "report.json").read_text())["align"] == "affine"
    assert (tmp_path / "out" / "report.html").is_file()
