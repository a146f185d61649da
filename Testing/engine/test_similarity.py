"""Similarities: the official codes' values and gradients, precision, robustness, and the algebra they must obey."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from MorphSeekLib.measures import similarity
from MorphSeekLib.measures.similarity import MIND, SIMILARITIES, lncc, mind_ssc, mse, multiresolution_lncc

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "lncc.py"


def images(size=(12, 14, 13), batch=1, channels=1, seed=0, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Two images in [0, 1] that resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    fixed, noise = torch.rand(2, batch, channels, *size, generator=generator, dtype=dtype)
    return fixed, 0.6 * fixed + 0.4 * noise


def with_gradient(loss, fixed: Tensor, warped: Tensor, *settings) -> tuple[Tensor, Tensor]:
    warped = warped.detach().clone().requires_grad_()
    value = loss(fixed, warped, *settings)
    value.backward()
    return value.detach(), warped.grad


def dense_lncc(fixed: Tensor, warped: Tensor, window: int = 9) -> Tensor:
    """The definition, in float64."""
    f, w, n = fixed.double(), warped.double(), window**3

    def box(x):
        return F.avg_pool3d(F.pad(x, [window // 2] * 6), window, stride=1) * n

    cross = box(f * w) - box(f) * box(w) / n
    variances = (box(f * f) - box(f) ** 2 / n) * (box(w * w) - box(w) ** 2 / n)
    return -(cross**2 / (variances + 1e-5)).mean()


def assert_equals_definition(fixed: Tensor, warped: Tensor, window: int = 9, tolerance: float = 1e-5):
    value, gradient = with_gradient(lncc, fixed, warped, window)
    expected, expected_gradient = with_gradient(dense_lncc, fixed, warped, window)
    assert value.dtype == gradient.dtype == torch.float32
    assert abs(value - expected) < 1e-6
    assert (gradient - expected_gradient).abs().max() < tolerance * expected_gradient.abs().max()


@pytest.mark.parametrize(
    ("loss", "key", "rounding"),
    [
        # `rounding` is the fixture's own: the official gradients are that far (of their largest element) from float64
        (lncc, "tm_ncc_vxm_win9", 5e-5),
        (lncc, "nice_ncc_win9", 5e-5),
        (lambda f, w: lncc(f, w, window=3), "lapirn_ncc_win3", 3e-4),
        (lambda f, w: lncc(f, w, window=7), "lapirn_ncc_win7", 2e-4),
        (multiresolution_lncc, "lapirn_multires_ncc_win7_scale3", 2e-4),
        (MIND(), "tm_mind_loss_r2_d2", 2e-6),
        (mse, "mse", 1e-6),
    ],
)
def test_equals_the_official_code(reference, loss, key, rounding):
    fixture = reference("loss_similarity")
    value, gradient = with_gradient(loss, fixture["I"], fixture["J"])
    torch.testing.assert_close(value, fixture[f"{key}_value"], rtol=1e-5, atol=0)
    expected = fixture[f"{key}_grad_wrt_J"]
    assert (gradient - expected).abs().max() < rounding * expected.abs().max()


@pytest.mark.parametrize("window", [3, 7, 9])
def test_lncc_is_nearer_the_definition_than_the_official_float32(reference, window):
    fixture = reference("loss_similarity")
    assert_equals_definition(fixture["I"], fixture["J"], window)


@pytest.mark.parametrize("radius", [1, 2])
def test_mind_equals_the_official_descriptor(reference, radius):
    fixture = reference("mind_ssc")
    descriptor = mind_ssc(fixture["I"], radius=radius, dilation=2)
    torch.testing.assert_close(descriptor, fixture[f"mind_I_r{radius}_d2"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("size", [(12, 14, 13), (140, 5, 7), (5, 70, 6), (6, 4, 129), (1, 3, 20)])
def test_lncc_on_long_and_short_axes(size):
    """Axes beyond 64 voxels are summed in runs; axes shorter than the window see all of themselves."""
    assert_equals_definition(*images(size))


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_lncc_keeps_its_precision_on_an_offset(offset):
    # rounded to what float32 holds there, so that the definition is given the very same intensities
    fixed, warped = (image + offset for image in images((20, 20, 20)))
    assert_equals_definition(fixed, warped, tolerance=1e-4)
    assert_equals_definition(fixed, images((20, 20, 20))[1], tolerance=1e-4)


def test_an_offset_changes_nothing_inside():
    fixed, warped = images((20, 20, 20))
    fixed, warped = ((1024 * image).round() / 1024 for image in (fixed, warped))  # exact in float32 with the offset
    inner = (slice(None), slice(None), *[slice(8, 12)] * 3)  # whose gradient comes from cubes wholly inside
    plain, offset = (with_gradient(lncc, fixed + o, warped + o)[1][inner] for o in (0, 1000))
    assert (plain - offset).abs().max() < 1e-4 * plain.abs().max()


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("background", [0.0, 0.3, 1000.0])
def test_lncc_of_flat_regions(background, scale):
    """No rounding noise is taken for variance: where official codes can divide by it, nothing must explode."""
    fixed, warped = images((32, 20, 20))
    fixed[:, :, :22] = background
    warped[:, :, :26] = background
    value, gradient = with_gradient(lncc, scale * fixed, scale * warped)
    assert -1 <= value <= 0
    assert torch.isfinite(gradient).all()
    flat = gradient[:, :, 8:14, 8:-8, 8:-8]  # seen only by cubes that touch neither border nor texture
    assert (flat == 0).all()


def test_lncc_of_constant_images():
    fixed, warped = images()
    for constant in (0.0, 1.0, 1e6):
        flat = torch.full_like(fixed, constant)
        value, gradient = with_gradient(lncc, flat, warped)
        assert -1 <= value <= 0
        assert torch.isfinite(gradient).all()
    assert lncc(torch.zeros_like(fixed), warped) == 0


@given(
    size=st.tuples(*[st.integers(2, 12)] * 3),
    window=st.sampled_from([3, 5, 9]),
    contrast=st.sampled_from([1e-4, 1.0, 1e4]),
    offset=st.sampled_from([0.0, 1.0, -300.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_lncc_lies_between_minus_one_and_zero_and_is_symmetric(size, window, contrast, offset, seed):
    fixed, warped = (contrast * image + offset for image in images(size, seed=seed))
    value = lncc(fixed, warped, window)
    assert -1 - 1e-4 <= value <= 0
    torch.testing.assert_close(lncc(warped, fixed, window), value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lncc(fixed, -warped, window), value, rtol=1e-5, atol=1e-6)  # blind to the sign
    for permuted in ((0, 1, 3, 4, 2), (0, 1, 4, 3, 2)):
        turned = lncc(fixed.permute(permuted), warped.permute(permuted), window)
        torch.testing.assert_close(turned, value, rtol=1e-3, atol=1e-4)


@given(st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=15, deadline=None)
def test_identical_up_to_contrast_is_best(gain, offset):
    fixed, _ = images()
    assert lncc(fixed, gain * fixed, epsilon=1e-9) < -0.9999
    torch.testing.assert_close(mind_ssc(gain * fixed + offset), mind_ssc(fixed), rtol=1e-3, atol=1e-4)
    assert MIND()(fixed, -gain * fixed + offset) < 1e-7


@pytest.mark.parametrize(
    ("loss", "size"),
    [
        (lambda f, w: lncc(f, w, window=3), (5, 4, 6)),
        (lambda f, w: lncc(f, w + 20, window=5, epsilon=1e-2), (5, 4, 6)),
        (lambda f, w: multiresolution_lncc(f, w, window=5, scales=2), (6, 6, 5)),
        (mse, (4, 3, 5)),
        (MIND(radius=1, dilation=1), (5, 4, 4)),
    ],
)
def test_gradient_against_finite_differences(loss, size):
    fixed, warped = images(size, batch=2, dtype=torch.float64)
    fixed.requires_grad_()
    assert torch.autograd.gradcheck(loss, (fixed, warped.requires_grad_()), fast_mode=True)
    assert torch.autograd.gradcheck(loss, (fixed.detach(), warped), fast_mode=True)
    assert torch.autograd.gradcheck(loss, (fixed, warped.detach()), fast_mode=True)


def test_every_element_of_the_lncc_gradient():
    fixed, warped = images((3, 4, 3), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f, w: lncc(f, w, 3), (fixed.requires_grad_(), warped.requires_grad_()))


@pytest.mark.parametrize("name", SIMILARITIES)
def test_registry(name):
    loss = SIMILARITIES[name]
    fixed, warped = images(batch=2)
    assert loss(fixed, fixed) < loss(fixed, warped)
    assert loss(fixed, warped).shape == ()
    each = [loss(f[None], w[None]) for f, w in zip(fixed, warped, strict=True)]
    torch.testing.assert_close(loss(fixed, warped), sum(each) / 2, rtol=1e-5, atol=1e-7)  # samples are independent
    features = [loss.prepare(image) for image in (fixed, warped)]
    assert all(of.shape[2:] == fixed.shape[2:] for of in features), "features can be warped as the image is"
    assert torch.equal(loss.compare(*features), loss(fixed, warped))


@pytest.mark.parametrize("name", SIMILARITIES)
def test_float32_whatever_autocast_says(name):
    loss = SIMILARITIES[name]
    fixed, warped = images()
    expected, expected_gradient = with_gradient(loss, fixed, warped)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = with_gradient(loss, fixed, warped)
        assert loss(fixed.bfloat16(), warped).dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_memory_layout_does_not_matter(name):
    fixed, warped = images(batch=2, channels=1)
    expected = with_gradient(SIMILARITIES[name], fixed, warped)
    turned = [image.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2) for image in (fixed, warped)]
    channels_last = [image.to(memory_format=torch.channels_last_3d) for image in (fixed, warped)]
    one_of_two = [torch.cat((image, image), dim=1)[:, :1] for image in (fixed, warped)]
    for pair in (turned, channels_last, one_of_two):
        torch.testing.assert_close(with_gradient(SIMILARITIES[name], *pair), expected)


def test_lncc_of_channels_is_their_mean():
    fixed, warped = images(channels=3)
    each = [lncc(fixed[:, c, None], warped[:, c, None]) for c in range(3)]
    torch.testing.assert_close(lncc(fixed, warped), sum(each) / 3)
    channels_last = (image.to(memory_format=torch.channels_last_3d) for image in (fixed, warped))
    torch.testing.assert_close(with_gradient(lncc, *channels_last), with_gradient(lncc, fixed, warped))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_matmul_precision_does_not_reach_the_sums(monkeypatch, precision):
    fixed, warped = images()
    expected = with_gradient(lncc, fixed, warped)
    products = []
    monkeypatch.setattr(similarity.torch, "mm", lambda *a, mm=torch.mm, **k: products.append(a[0].dtype) or mm(*a, **k))
    torch.set_float32_matmul_precision(precision)
    try:
        torch.testing.assert_close(with_gradient(lncc, fixed, warped), expected, rtol=1e-5, atol=1e-8)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(products) == {torch.float64}


def test_inference_first_then_training():
    """The bands are cached: made in inference mode they must still serve autograd."""
    similarity._band.cache_clear()
    fixed, warped = images()
    with torch.inference_mode():
        values = [lncc(fixed, warped), MIND()(fixed, warped)]
    for loss, value in zip((lncc, MIND()), values, strict=True):
        torch.testing.assert_close(with_gradient(loss, fixed, warped)[0], value)
    warped.requires_grad_()
    with torch.no_grad():
        assert not lncc(fixed, warped).requires_grad


def test_mind_of_a_constant_image():
    flat = torch.full((1, 1, 8, 8, 8), 0.5)
    assert (mind_ssc(flat) == 1).all()
    _, gradient = with_gradient(MIND(), images((8, 8, 8))[0], flat)
    assert torch.isfinite(gradient).all()


def test_bad_input():
    fixed, warped = images()
    for loss in SIMILARITIES.values():
        with pytest.raises(ValueError, match="two images of one shape"):
            loss(fixed, warped[:, :, :-1])
    with pytest.raises(ValueError, match="odd number"):
        lncc(fixed, warped, window=8)
    with pytest.raises(ValueError, match="odd number"):
        multiresolution_lncc(fixed, warped, window=3, scales=3)
    with pytest.raises(ValueError, match=r"\(batch, 1, i, j, k\)"):
        mind_ssc(torch.rand(1, 2, 8, 8, 8))


def test_benchmark_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "monai.losses", None)  # as if MONAI were not installed; its import takes seconds
    out = tmp_path / "lncc.json"
    small = ["--size", "10", "12", "11", "--repetitions", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), *small])
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    assert "MorphSeek" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 8
    for row in rows.values():  # all ways are the same function
        assert row["value_error"] < 1e-5
        assert row["gradient_error"] < 1e-3
