"""The estimated error: its quantities against direct formulas, where it finds errors, and when it names millimeters."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_masks import FAST, GRID, box, mask, moved, structured
from torch import Tensor
from typer.testing import CliRunner

from MorphSeekLib.app.cli import app
from MorphSeekLib.io.images import read_image, write_image
from MorphSeekLib.protocol.errors import Cancelled
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.verdict import DEFAULT_LIMITS, figures, judge
from MorphSeekLib.registration import plans, trust
from MorphSeekLib.registration.calibrated import DECILES, Kind, calibration, fingerprint, look_of
from MorphSeekLib.registration.masks import masked
from MorphSeekLib.registration.pair import Pair
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.registration.trust_map import trust_of
from MorphSeekLib.report.results import read_results
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import Volume

ON = replace(FAST, search="off", align="none", trust="on")
WEIGHTS = (0.5, 0.4, 0.2)


@pytest.fixture(scope="module")
def disturbed():
    """A registration of a moved image in which a box shows something else, and that box."""
    image = structured()
    warped, _ = moved(image)
    inside = box(0.3, 0.65)
    fixed = Volume(torch.where(inside, structured(5).data, warped.data), GRID)
    return register(fixed, image, options=ON), inside


def test_inconsistency_is_what_is_left_after_going_there_and_back():
    shape = (5, 6, 7)
    there = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    back = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(1))
    lengths = fields.per_axis((1.0, 2.0, 0.5), there)
    found = trust.inconsistency(there, back, lengths)
    at = (2, 3, 4)
    place = [n + float(there[0, axis][at]) / 2 for axis, n in enumerate(at)]  # two voxels lie between control points
    returned = fields.sample(back, torch.tensor(place).view(1, 3, 1, 1, 1), padding="border").flatten()
    left = (there[0][(slice(None), *at)] + returned) * torch.tensor([1.0, 2.0, 0.5])
    assert float(found[at]) == pytest.approx(float(left.norm()), rel=1e-5)


def test_an_inverse_leaves_no_inconsistency():
    points = fields.identity((10, 10, 10))
    there = 0.8 * torch.sin(points / 3)
    back = fields.invert(there / 2) * 2
    found = trust.inconsistency(there, back, torch.ones(1, 3, 1, 1, 1))
    assert float(found[2:-2, 2:-2, 2:-2].max()) < 0.05, "where it was 0.8 and more: linear interpolation"


def test_the_bound_follows_its_formula():
    maps = torch.tensor([0.4, 0.3, 0.1]).view(3, 1, 1, 1)
    scores = trust.score(maps, WEIGHTS)
    by_hand = 0.5 * math.log(0.45) + 0.4 * math.log(0.35) + 0.2 * math.log(0.101)
    assert float(scores) == pytest.approx(by_hand, rel=1e-5)
    assert float(trust.bound(scores, 1.5, 3.0)) == pytest.approx(3 * (math.exp(by_hand + 1.5) - 0.05), rel=1e-5)
    assert float(trust.bound(scores, -20.0, 3.0)) == pytest.approx(3 * 0.02)


def test_a_blur_keeps_constants_and_nothing_of_what_is_unknown():
    known = torch.ones(9, 9, 9, dtype=torch.bool)
    known[:4] = False
    maps = torch.where(known, 2.0, torch.nan).nan_to_num(1e6)[None]
    found = trust.blurred(maps, known)
    assert torch.allclose(found[0][known], torch.tensor(2.0), atol=1e-4)
    one = torch.zeros(1, 23, 23, 23)
    one[0, 11, 11, 11] = 1
    blur = trust.blurred(one, torch.ones(23, 23, 23, dtype=torch.bool))
    assert float(blur[0, 11, 11, 12] / blur[0, 11, 11, 11]) == pytest.approx(math.exp(-0.5 / trust.SIGMA**2), rel=1e-4)


def test_exchanged_images_are_each_other_on_the_same_grid():
    image = structured()
    fixed, _ = moved(image)
    pair = Pair(masked(fixed, mask(box(0.1, 0.9))), image)
    pair.align("none", None)
    pair.prepare()
    swapped = pair.pyramid.swapped()
    for level in (-1, 0, 1):
        (a, b, seen), (c, d, too) = pair.pyramid.images(level), swapped.images(level)
        assert a.shape == c.shape
        assert torch.equal(seen, too)
        if level >= 0:
            assert torch.equal(a, d)
            assert torch.equal(b, c)
    again = swapped.swapped()
    assert torch.allclose(again.moving, pair.pyramid.moving, atol=1e-5)
    counts = pair.pyramid.counts_of_each(0)
    assert counts is not None
    exchanged = swapped.counts_of_each(0)
    assert exchanged is not None
    assert torch.equal(counts[0], exchanged[1])


def test_the_stiffer_fit_is_stiffer_and_stays_on_whole_voxels():
    plan = replace(plans.CORRELATION["best"], levels=(2, 1, 0, -1), iterations=(4, 3, 2, 1))
    (stiff,) = trust.stiffer([plan])
    assert (stiff.levels, stiff.iterations) == ((2, 1, 0), (4, 3, 2))
    assert stiff.regularization == pytest.approx(5 * plan.regularization)


def test_more_error_is_expected_where_the_images_show_something_else(disturbed):
    result, inside = disturbed
    found = result.trust.quantities
    blocks = fields.sample(inside.float()[None, None], _at(found.grid, result))[0, 0] > 0.5
    scores = found.score(WEIGHTS)
    there, elsewhere = scores[blocks & found.known], scores[~blocks & found.known]
    assert float(there.median()) > float(elsewhere.quantile(0.9))
    section = result.report["trust"]
    assert section["regions"], "the box is a region"
    index = np.linalg.inv(GRID.affine) @ [*section["regions"][0]["position"], 1]
    assert inside[tuple(round(float(x)) for x in index[:3])], "its worst place lies in the box"


def test_images_of_no_known_kind_get_colors_and_no_millimeters(disturbed):
    result, _ = disturbed
    section, found = result.report["trust"], result.trust
    assert section["kind"] is None
    assert found.bound is None
    assert (section["error_mm"], section["near_mm"], section["far_mm"]) == (None, None, None)
    assert {region["bound_mm"] for region in section["regions"]} == {None}
    assert set(found.colors.data.unique().tolist()) <= {0, 1, 2, 3}
    assert float(found.colors.data.max()) > 1
    assert figures(result.report)["far_percent"] is None


def test_a_known_kind_gets_millimeters_that_fit_together(disturbed):
    result, _ = disturbed
    pair = Pair(result.aligned, result.warped)
    offsets = tuple(np.linspace(-0.5, 1.5, len(DECILES)).tolist())
    kind = Kind("phantoms", weights=WEIGHTS, offsets={"fast": offsets}, pairs={"fast": 1})
    known = replace(calibration(), kinds={"phantom": kind})
    found = trust_of(pair, result.trust.quantities, known, "phantom", "fast")
    assert found.bound is not None
    section = found.section
    assert (section["near_mm"], section["far_mm"]) == (4.0, 10.0)  # voxels are 2 mm long
    said = found.colors.data > 0
    assert torch.equal(said, found.bound.data > 0)
    assert torch.equal(found.colors.data[said] == 3, found.bound.data[said] > 10)
    assert section["near_percent"] == pytest.approx(100 * float((found.bound.data[said] <= 4).float().mean()))
    error = section["error_mm"]
    assert error is not None
    assert 0 < error["median"] < error["p80"]
    verdict = judge(figures({**result.report, "trust": {**section, "far_percent": 60.0}}), DEFAULT_LIMITS)
    assert "far_percent" in {beyond.key for beyond in verdict.beyond}


def test_nothing_is_said_outside_of_a_mask_nor_changed_by_what_lies_there():
    image = structured()
    fixed, _ = moved(image)
    inside = box(0.2, 0.8)
    other = Volume(torch.where(inside, fixed.data, structured(9).data), GRID)
    found = [register(masked(one, mask(inside)), image, options=ON).trust for one in (fixed, other)]
    assert not found[0].colors.data[~inside].any()
    assert torch.equal(found[0].colors.data, found[1].colors.data)


def test_it_is_off_unless_it_is_asked_for(disturbed):
    assert RegistrationOptions().trust == "off"
    result, _ = disturbed
    fit = sum(result.report["seconds"].get(stage, 0.0) for stage in ("search", "fit"))
    assert fit > 0
    assert "trust" in result.report["seconds"]
    with pytest.raises(ValueError, match="trust"):
        RegistrationOptions(trust="maybe")  # type: ignore[arg-type]


def test_it_can_be_cancelled_while_it_looks_again():
    image = structured()
    fixed, _ = moved(image)
    heard: list[str] = []

    def cancelled() -> bool:
        return any("stiffer" in message for message in heard)

    with pytest.raises(Cancelled):
        register(fixed, image, options=ON, job=Job(lambda event: heard.append(event.message), cancelled))


def test_it_can_be_made_later_and_again_after_it_was_cancelled(disturbed):
    at_once = disturbed[0]
    image, inside = structured(), disturbed[1]
    warped, _ = moved(image)
    fixed = Volume(torch.where(inside, structured(5).data, warped.data), GRID)
    result = register(fixed, image, options=replace(ON, trust="later"))
    assert result.trust is None
    assert "trust" not in result.report
    with pytest.raises(Cancelled):
        result.estimation.run(Job(cancelled=lambda: True))
    assert torch.equal(result.estimation.run().colors.data, at_once.trust.colors.data)


def test_the_calibration_is_of_the_fit_as_it_is():
    assert calibration().fit == fingerprint(), (
        "search or fit have changed: run Testing/benchmarks/trust.py measure, calibrate and evaluate again"
    )
    models = [kind for kind in calibration().kinds.values() if kind.model]
    assert calibration().learned == fingerprint(learned=True) or not any(kind.told for kind in models)
    assert all(len(o) == len(DECILES) for kind in calibration().kinds.values() for o in kind.offsets.values())


def test_another_fit_makes_every_kind_unknown(monkeypatch):
    before = fingerprint(), fingerprint(learned=True)
    monkeypatch.setattr(plans, "LEARNED_VERSION", plans.LEARNED_VERSION + 1)
    assert fingerprint() == before[0], "a fit by intensities is the same"
    assert fingerprint(learned=True) != before[1]
    monkeypatch.setattr(plans, "VERSION", plans.VERSION + 1)
    assert fingerprint() != before[0]


def test_a_kind_fits_only_images_that_look_like_its_own():
    image = structured()
    look = look_of(image)
    ranges = {figure: (value - 0.1, value + 0.1) for figure, value in look.items()}
    kind = Kind(fixed=ranges, moving=ranges)
    assert kind.fits(look, look)
    assert not kind.fits(look, {**look, "voxel_mm": 3.0})
    inverted = look_of(Volume(100 - image.data, GRID))
    assert set(inverted) == set(look)
    assert not Kind(fixed={"missing": (0.0, 1.0)}).fits(look, look)


def test_the_command_writes_the_colors_and_a_page_with_the_warning(tmp_path):
    image = structured()
    fixed, _ = moved(image)
    for name, volume in (("fixed", fixed), ("moving", image)):
        write_image(volume, tmp_path / f"{name}.nii.gz")
    out = tmp_path / "out"
    names = [str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving")]
    arguments = ["register", *names, "-o", str(out), "--model", "none", "--preset", "fast", "--search", "off"]
    result = CliRunner().invoke(app, [*arguments, "--align", "none", "--trust", "on"])
    assert result.exit_code == 0, result.output
    assert "Estimated error" in result.output
    colors = read_image(out / "trust-colors.nii.gz")
    assert colors.grid.same_as(fixed.grid)
    assert not (out / "trust.nii.gz").exists(), "no millimeters are known of such images"
    back = read_results(out)
    assert back.trust is None
    assert torch.equal(back.trust_colors.data, colors.data.to(torch.uint8))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Not a measurement" in page
    assert "Colors only, no millimeters" in page
    later = CliRunner().invoke(app, [*arguments, "--trust", "later"])
    assert "choose on or off" in " ".join(later.output.split())


def _at(grid, result) -> Tensor:
    """Return where the voxels of a grid lie in the fixed image, (1, 3, a, b, c) voxels."""
    index = fields.identity(grid.shape)
    to_fixed = torch.from_numpy(np.linalg.inv(GRID.affine) @ grid.affine).float()
    return torch.einsum("ab,nbijk->naijk", to_fixed[:3, :3], index) + to_fixed[:3, 3].view(1, 3, 1, 1, 1)
