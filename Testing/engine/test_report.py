"""The report: its page and its JSON say the same, its pictures hang the right way round, and nothing odd breaks it."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import torch

from MorphSeekLib.measures import folds, metrics
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.report import page as reports
from MorphSeekLib.space import fields, geometry
from MorphSeekLib.space.geometry import Grid, Volume

CLEAN = {"cells": 8, "folded": 0, "undecided": 0, "folded_outside": 0, "undecided_outside": 0}
CLEAN |= {"folded_percent": 0.0, "no_fold_proven": True}
INSIDE = {"of": "mask", "voxels": 4321, "folded_voxels": 12, "njd_percent": 0.125}
INSIDE |= {"sdlogj": 0.25, "min_jacobian": -0.5, "max_jacobian": 1.5}
ROTATED = np.array([[math.cos(0.4), -math.sin(0.4), 0], [math.sin(0.4), math.cos(0.4), 0], [0, 0, 1]])
GRIDS = {
    "plain": Grid.from_parts((30, 34, 28), (3, 3, 3), np.eye(3), (-40, -50, 10)),
    # left-handed, permuted, anisotropic, 23 degrees off the world's axes
    "oblique": Grid.from_parts((22, 50, 44), (4, 2, 2.2), ROTATED @ geometry.orientation_matrix("SAL"), (60, 50, -30)),
}


def ball(grid: Grid, center_mm: np.ndarray, radius_mm: float) -> torch.Tensor:
    """1 in a ball, fading over some millimeters."""
    points = geometry.apply_affine(grid.affine, np.indices(grid.shape).reshape(3, -1).T)
    distance = np.linalg.norm(points - center_mm, axis=1).reshape(grid.shape)
    return torch.from_numpy(1 / (1 + np.exp((distance - radius_mm) / 1.5))).float()


def example(grid: Grid, push: float) -> reports.RegistrationPictures:
    """A head-like ball with a bright one inside; the deformation swirls in the middle and folds if pushed hard."""
    image = ball(grid, grid.center, 30) + 0.6 * ball(grid, grid.center + np.array([12, -5, 8]), 8)
    bump = ball(grid, grid.center, 6)
    displacement = torch.zeros(1, 3, *grid.shape)
    displacement[0, 1] = push * bump
    transform = geometry.dense_from_voxels(displacement, grid)
    jacobian = fields.jacobian_determinant(displacement)[0, 0]
    folded = folds.folded_voxels(folds.certify(transform, grid).folded, grid, grid) <= 0
    moving = Volume(image, grid)
    return reports.RegistrationPictures(
        fixed=Volume((image * 1000).round().to(torch.int16), grid),
        moving_aligned=moving,
        warped=geometry.resample(moving, grid, transform),
        jacobian=Volume(jacobian, grid),
        folding=Volume(folded.to(torch.uint8), grid),
        transform=transform,
    )


def figures(pictures: reports.RegistrationPictures, **changes) -> dict:
    grid = pictures.fixed.grid
    return {
        "morphseek": "0.1.0",
        "date": "2026-01-02T03:04:05",
        "fixed": {"path": "/data/fixed.nii.gz", "shape": list(grid.shape), "spacing": grid.spacing},
        "moving": {"path": "C:\\scans\\moving.nrrd", "shape": [3, 4, 5], "spacing": [1.0, 1.0, 2.5]},
        "model": {"name": "brain-mr", "sha256": "ab" * 32, "provenance": {"data": "made of label maps"}},
        "device": "cpu",
        "steps": [
            {"step": 1, "similarity": 0.41234567, "mean_displacement_mm": np.float32(2.125), "folded_percent": 0.0},
            {"step": 2, "similarity": 0.5, "mean_displacement_mm": 3.3, "folded_percent": 0.25, "njd_percent": 0.1},
        ],
        "align": "affine",
        "dice": {
            "labels": {2: {"input": 0.1, "aligned": 0.61111, "warped": 0.8}, 17: {"input": 0.2, "aligned": 0.5}},
            "mean": {"input": 0.15, "aligned": 0.555555, "warped": 0.8},
        },
        "folding": dataclasses.asdict(metrics.folding(jacobian=pictures.jacobian.data))
        | {"cells": dataclasses.asdict(folds.certify(pictures.transform, grid).count)}
        | {"region_voxels": 34, "inside": INSIDE},
        "masks": {"fixed": INSIDE["voxels"], "moving": None},
        "displacement_mm": {"mean": 3.21, "p95": 7.9, "max": 14.2},
        "inverse": {"residual_mm": {"mean": 0.01, "p95": 0.05, "max": math.inf}},
        "similarity": {"name": "LNCC 9", "aligned": 0.31, "warped": 0.56},
        "seconds": {"read": 0.25, "network": 1.5, "total": 9.75},
        "software": {"python": "3.11", "torch": torch.__version__},
        **changes,
    }


class Page(HTMLParser):
    """What a browser would find: the numbers, the words, the pictures, the elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.numbers, self.words, self.pictures, self.elements = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append(tag)
        if tag == "data":
            self.numbers.append([attributes["data-path"], attributes["value"], ""])
        elif tag == "img":
            self.pictures.append(attributes["src"])

    def handle_data(self, data):
        self.words.append(data)
        if self.elements and self.elements[-1] == "data" and not self.numbers[-1][2]:
            self.numbers[-1][2] = data


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """(folder, page's text, pictures) of a registration that folds, on an oblique grid."""
    folder = tmp_path_factory.mktemp("report")
    pictures = example(GRIDS["oblique"], push=8)
    path = reports.write_report(folder, figures(pictures), pictures)
    assert path == folder / "report.html"
    return folder, path.read_text("utf-8"), pictures


def test_the_table_of_steps_says_which_one_is_the_answer(tmp_path):
    pictures = example(GRIDS["oblique"], push=8)
    steps = [{"step": n, "similarity": 0.5, "answer": n == 1} for n in range(3)]
    text = reports.write_report(tmp_path, figures(pictures, steps=steps), pictures).read_text("utf-8")
    assert [word for word in Page(text).words if "the answer" in word] == ["1 ◀ the answer"]


def test_corrections_are_listed_with_their_distance_before_and_after(tmp_path):
    pictures = example(GRIDS["plain"], push=1)
    point = {"label": "left <horn>", "fixed": [0, 0, 0], "moving": [3, 4, 0], "error_mm": 1.0}
    corrections = {"points": [point | {"before": 5.0, "after": 0.25}], "definition": "in mm"}
    text = reports.write_report(tmp_path, figures(pictures, corrections=corrections), pictures).read_text("utf-8")
    page = Page(text)
    assert "left <horn>" in page.words
    shown = {path: number for path, _, number in page.numbers if path.startswith("corrections")}
    assert shown == {
        "corrections.points.0.before": "5.00",
        "corrections.points.0.after": "0.25",
        "corrections.points.0.error_mm": "1.00",
    }


def test_folding_inside_the_mask_or_the_tissue_stands_beside_that_of_the_whole_image(folded):
    folder, text, _ = folded
    page = Page(text)
    assert "Inside the mask" in page.words
    shown = {path: number for path, _, number in page.numbers}
    found = {name: shown[f"folding.inside.{name}"] for name in INSIDE if name != "of"}
    assert found == {"voxels": "4,321", "folded_voxels": "12", "njd_percent": "0.1250"} | {
        "sdlogj": "0.250",
        "min_jacobian": "-0.500",
        "max_jacobian": "1.500",
    }
    assert shown["masks.fixed"] == "4,321"
    assert "masks.moving" not in shown
    report = json.loads((folder / "report.json").read_text("utf-8"))
    report["masks"]["fixed"], report["folding"]["inside"]["of"] = None, "tissue"
    assert "Inside the tissue" in Page(reports.render_page(report, [])).words
    del report["folding"]["inside"], report["masks"]  # of an earlier version
    assert "Inside the" not in reports.render_page(report, [])


def test_numbers_on_the_page_are_those_of_the_json(folded):
    folder, text, _ = folded
    report = json.loads((folder / "report.json").read_text("utf-8"))
    numbers = Page(text).numbers
    assert {path.split(".")[0] for path, _, _ in numbers} >= {"dice", "folding", "steps", "displacement_mm", "seconds"}
    for path, full, shown in numbers:
        value = report
        for key in path.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
        assert float(full) == value
        digits = len(shown.partition(".")[2])
        assert abs(float(shown.replace(",", "")) - value) <= 0.5001 * 10**-digits


def test_json_is_strict(folded):
    folder, _, _ = folded

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    report = json.loads((folder / "report.json").read_text("utf-8"), parse_constant=refuse)
    assert report["inverse"]["residual_mm"]["max"] is None
    assert report["dice"]["labels"]["2"]["aligned"] == 0.61111
    assert report["steps"][0]["mean_displacement_mm"] == 2.125
    assert report["fixed"]["spacing"] == pytest.approx([4, 2, 2.2])


def test_the_page_stands_alone(folded):
    _, text, _ = folded
    page = Page(text)
    assert not set(page.elements) & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import", text)
    assert len(page.pictures) == 3
    for source in page.pictures:
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(content)))
        assert picture.shape[1] == 1860
        assert picture[..., :3].std() > 0.02
    words = " ".join(page.words)
    for phrase in ("Not for diagnosis", "central differences", "made of label maps", "moving.nrrd registered onto"):
        assert phrase in words


def test_names_cannot_inject():
    pictures = example(GRIDS["plain"], 0.5)
    evil = "<script>alert(1)</script>\"'><img src=x>.nii"
    report = figures(pictures, fixed={"path": evil}, device=evil, model={"title": evil, evil: evil}, date=evil)
    report["similarity"]["name"] = report["folding"]["definition"] = evil
    report["dice"]["labels"] = {evil: {"aligned": 0.5}}
    page = Page(reports.render_page(report, []))
    assert not {"script", "img"} & set(page.elements)
    assert "<script>alert(1)" in " ".join(page.words)  # shown, not run


def test_without_folding_labels_or_anything_else(tmp_path):
    pictures = example(GRIDS["plain"], 0.5)
    report = figures(pictures, dice=None, inverse=None, steps=[])
    text = reports.write_report(tmp_path, report, pictures).read_text("utf-8")
    assert len(Page(text).pictures) == 2
    assert "No fold: proven" in text
    assert "judge the match by eye" in text
    assert "Overlap by label" not in text
    assert "Not for diagnosis" in reports.render_page({"fixed": {}, "moving": {}}, [])


def test_the_verdict_is_that_of_the_panel():
    """Overall, of folds, and a line for each figure beyond its limits, by the default limits of the panel."""
    good = {"dice": {"mean": {"aligned": 0.5, "warped": 0.8}}, "folding": {"cells": CLEAN}}
    assert reports.said(good) == [
        ("green", "Green: every figure is within its limits."),
        ("green", "No fold: proven."),
    ]
    worse = good | {"dice": {"mean": {"aligned": 0.8, "warped": 0.75}}}
    assert reports.said(worse)[0] == ("red", "Red: do not use it without knowing why.")
    assert reports.said(worse)[2:] == [("red", "Overlap gained over the alignment: -0.050 is below -0.02.")]
    assert reports.said({"folding": {"cells": CLEAN}})[-1][1].endswith("judge the match by eye.")
    assert reports.said({})[0] == ("none", "Nothing was measured that could be judged.")
    assert reports.verdict_values(worse) == {
        "color": "red",
        "folds": "proven",
        "beyond": [{"key": "dice_change", "value": pytest.approx(-0.05), "color": "red", "limit": -0.02}],
    }


@pytest.mark.parametrize(
    ("change", "color", "words"),
    [
        ({}, "green", "No fold: proven"),
        ({"folded": 3, "folded_percent": 37.5}, "red", "3 of 8 cells fold (37.5 %)."),
        ({"undecided": 2}, "amber", "2 of 8 cells are undecided"),
        ({"folded_outside": 1}, "green", "1 cells beyond its edge fold or are undecided"),
    ],
)
def test_only_what_is_proven_is_called_free_of_folds(change, color, words):
    found, sentence = reports.said({"folding": {"cells": CLEAN | change}})[1]
    assert found == color
    assert words in sentence


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("plane", reports.PLANES, ids=lambda plane: plane.name)
def test_pictures_hang_as_their_letters_say(name, plane):
    directions = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    grid = GRIDS[name]
    pictures = example(grid, 0.5)
    for letter, edge in zip(plane.letters, ((0, -1), (0, 1), (-1, 0), (1, 0)), strict=True):
        shift = 12.0 * np.array(directions[letter])
        pictures.fixed = Volume(ball(grid, grid.center, 25) + 4 * ball(grid, grid.center + shift, 6), grid)
        scene = reports._Scene(pictures)
        pixels = scene.slice_grid(plane, grid.center)
        bright = np.argwhere(np.nan_to_num(reports._cut(pictures.fixed, pixels)) > 3)
        middle = geometry.apply_affine(np.linalg.inv(pixels.affine), grid.center[None])[0, [1, 0]]
        # twelve millimeters towards the edge that bears the letter, in either direction by the same scale
        np.testing.assert_allclose((bright.mean(axis=0) - middle) * scene.pixel, 12.0 * np.array(edge), atol=0.6)
    assert plane.letters in {"RLAP", "RLSI", "APSI"}  # radiological convention


def test_a_ball_stays_round_on_an_anisotropic_grid():
    pictures = example(GRIDS["oblique"], 0.5)
    scene = reports._Scene(pictures)
    for plane in reports.PLANES:
        cut = np.nan_to_num(reports._cut(pictures.fixed, scene.slice_grid(plane, GRIDS["oblique"].center))) > 500
        extents = cut.any(axis=0).sum(), cut.any(axis=1).sum()
        assert extents[0] == pytest.approx(60 / scene.pixel, abs=2)
        assert extents[1] == pytest.approx(extents[0], abs=2)


def test_the_fold_shown_is_the_one_in_the_foreground(folded):
    _, _, pictures = folded
    grid = pictures.fixed.grid
    folding = pictures.folding.data.clone()
    in_head = int(folding.sum())
    folding[:12, :12, :12] = 1  # a larger one, in air
    scene = reports._Scene(dataclasses.replace(pictures, folding=Volume(folding, grid)))
    fold = scene.worst_fold()
    assert np.linalg.norm(fold.center - grid.center) < 12
    assert (fold.voxels, fold.in_foreground) == (in_head + 12**3, in_head)
    index = np.round(geometry.apply_affine(np.linalg.inv(grid.affine), fold.center[None])[0]).astype(int)
    assert int(folding[tuple(index)]) == 1


def test_one_folded_voxel_is_red_in_every_picture_of_it():
    pictures = example(GRIDS["plain"], 0.5)
    pictures.folding.data[15, 17, 14] = 1
    sheets = reports.draw_sheets(pictures)
    picture = matplotlib.image.imread(io.BytesIO(sheets[2].png))[..., :3]
    red = (np.abs(picture - [1, 32 / 255, 32 / 255]) < 0.02).all(axis=-1)
    half = picture.shape[1] // 2
    rows = np.array_split(red[:, half:], 3)
    assert all(row.sum() > 20 for row in rows)
    assert red[:, :half].sum() == 0


@pytest.mark.parametrize("shape", [(2, 2, 2), (40, 3, 2), (600, 4, 4)])
def test_odd_volumes_are_drawn(shape):
    grid = Grid.from_parts(shape, (1, 0.5, 7), np.eye(3), (0, 0, 0))
    pictures = example(grid, 0.0)
    pictures.warped = Volume(torch.zeros(shape), grid)  # nothing overlaps
    pictures.moving_aligned = pictures.warped
    assert len(reports.draw_sheets(pictures)) == 2
    pictures.fixed = Volume(torch.full(shape, 7, dtype=torch.int32), grid)
    assert len(reports.draw_sheets(pictures)) == 2


def test_what_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "draw_sheets", lambda pictures: [])  # only the writing matters here
    (tmp_path / "report.html").mkdir()
    with pytest.raises(MorphSeekError, match="cannot be written"):
        reports.write_report(tmp_path, {"fixed": {}, "moving": {}}, example(GRIDS["plain"], 0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
