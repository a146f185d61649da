"""A few cases of the fuzz of inputs."""

from __future__ import annotations

import pytest

pytest.importorskip("nilearn", reason="the head of the fuzz comes with nilearn: pip install -e '.[demo]'")
pytest.importorskip("pydicom", reason="the fuzz writes DICOM files by pydicom")

from inputs import count, failed, fuzz


def test_eight_dressed_pairs_are_right_or_refused():
    results = list(fuzz(range(8), seed=0, jobs=1))
    failures = [f"{r.verdict.outcome}: case {r.index}, {r.coats}: {r.verdict.reason}" for r in results if failed(r)]
    assert not failures, "\n".join([count(results), *failures])
