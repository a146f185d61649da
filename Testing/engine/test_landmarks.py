"""The target registration error of landmarks, from command line, Python and worker."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cases import blob_grid, blob_image, blob_labels, steps_only
from test_cli import files, registering, run  # noqa: F401 - a fixture
from test_worker import client, model_file, request_of  # noqa: F401 - fixtures

from MorphSeekLib import PointPairs, measure_landmarks, register
from MorphSeekLib.space.geometry import apply_affine

INDEX = np.array([[8.0, 9.0, 7.0], [12.0, 14.0, 10.0], [15.0, 20.0, 12.0]])


@pytest.fixture(scope="module")
def result():
    images = [blob_image(blob_labels(seed, blob_grid()), seed) for seed in (0, 1)]
    return register(*images, None, steps_only(align="center", inverse=False))


def test_the_error_is_that_of_the_transform(result):
    fixed = apply_affine(blob_grid().affine, INDEX)
    moving = result.transform.map_points(fixed) + np.array([0.0, 3.0, 4.0])
    measure_landmarks(result, PointPairs(fixed, moving, ("a", "b", "c")), blob_grid())
    found = result.report["landmarks"]
    assert [point["warped"] for point in found["points"]] == pytest.approx([5, 5, 5])
    assert found["mean"]["warped"] == pytest.approx(5)
    assert found["points"][1]["input"] == pytest.approx(np.linalg.norm(fixed[1] - moving[1]))
    aligned = apply_affine(result.state.start, fixed)
    assert found["points"][2]["aligned"] == pytest.approx(np.linalg.norm(aligned[2] - moving[2]))
    back = np.array([point["moving_in_fixed"] for point in found["points"]])
    np.testing.assert_allclose(result.transform.map_points(back), moving, atol=1e-3)
    json.dumps(found)


def test_landmarks_outside_of_their_image_are_said(result):
    fixed = apply_affine(blob_grid().affine, INDEX)
    measure_landmarks(result, PointPairs(fixed * (-1, -1, 1) + 60, fixed, ("a", "b", "c")), blob_grid())
    told = [warning["message"] for warning in result.report["warnings"] if warning["code"] == "landmarks-outside"]
    assert len(told) == 1
    assert "3 of 3 landmarks lie outside of the fixed image (a, b, c); check their coordinate system" in told[0]


def test_the_command_line_prints_and_writes_them(files, tmp_path):  # noqa: F811
    rows = "\n".join(f"p{n},{','.join(map(str, row))}" for n, row in enumerate(INDEX.tolist()))
    for side in ("fixed", "moving"):
        (tmp_path / f"{side}.csv").write_text(f"label,i,j,k\n{rows}\n")
    options = {f"{side}_landmarks": tmp_path / f"{side}.csv" for side in ("fixed", "moving")}
    out = run(*registering(files, tmp_path / "out", **options, fit="off", search="off"))
    assert "Landmark error" in out
    assert "p2" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())["landmarks"]
    assert report["mean"]["input"] == pytest.approx(0, abs=1e-3)
    assert [point["label"] for point in report["points"]] == ["p0", "p1", "p2"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Landmarks: error in mm" in page
    alone = run(*registering(files, tmp_path / "no", fixed_landmarks=tmp_path / "fixed.csv"), code=2)
    assert "give both --fixed-landmarks and --moving-landmarks" in " ".join(alone.split())


def test_the_worker_measures_them(client, request_of):  # noqa: F811
    fixed = apply_affine(blob_grid().affine, INDEX)
    sides = {
        f"{side}_landmarks": {"labels": ["a", "b", "c"], "positions": fixed.tolist()} for side in ("fixed", "moving")
    }
    report = client.call("register", request_of | sides)["result"]["report"]
    assert report["landmarks"]["mean"]["input"] == 0
    error = client.call("register", request_of | {"fixed_landmarks": sides["fixed_landmarks"]})["error"]
    assert "choose points of both volumes" in error["message"]
