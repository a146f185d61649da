"""What a CT scan shows beside the body is found, and follows no registration."""

from dataclasses import replace

import numpy as np
import torch

from MorphSeekLib.io.images import read_image
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.registration.body import beside_body, without
from MorphSeekLib.registration.masks import masked
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space.geometry import Grid, Volume

SHAPE, SPACING = (72, 60, 24), (5.0, 5.0, 5.0)


def scan(table: float | None = None, arms: tuple[float, ...] = (), gas: bool = True, middle: float = 0.0) -> Volume:
    """A body, in Hounsfield units: fat around tissue with a spine, and gas inside; LPS mm around its middle.

    Args:
        table: mm from the back to a plate; None: none.
        arms: of each, mm from the left flank to its middle.
        gas: whether there is some.
        middle: mm to the left.
    """
    axes = [s * (torch.arange(n) - (n - 1) / 2) for n, s in zip(SHAPE, SPACING, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    x = x - middle
    data = torch.full(SHAPE, -1000.0)
    data[torch.hypot(x / 110, y / 75) < 1] = -90.0
    data[torch.hypot(x / 95, y / 60) < 1] = 50.0
    data[torch.hypot(x, y - 40) < 16] = 400.0
    data[torch.hypot(torch.hypot(x + 45, y + 10), z) < 28] = 120.0
    if gas:
        data[torch.hypot(x - 30, y + 30) < 18] = -1000.0
    for away in arms:
        data[torch.hypot(x - 110 - away, y) < 30] = 40.0
    if table is not None:
        data[(y > 75 + table) & (y < 75 + table + 15)] = 0.0
    return Volume(data, Grid.from_parts(SHAPE, np.array(SPACING), np.eye(3), -np.array(SPACING) * SHAPE / 2))


def test_table_and_arms_are_found_and_nothing_else():
    body = scan()
    for other in (scan(table=20), scan(arms=(45,)), scan(table=10, arms=(45, -265))):
        left_out = beside_body(other)
        assert left_out is not None
        assert torch.equal(without(other, left_out).data, body.data)
    assert beside_body(body) is None
    assert without(body, None) is body


def test_what_touches_the_body_by_a_narrow_neck_is_found_too():
    body, touching = scan(), scan(table=-2)  # the back is round, the plate flat
    left_out = beside_body(touching)
    assert left_out is not None
    plate = touching.data != body.data
    assert float(left_out[plate].float().mean()) > 0.75
    assert float(left_out[body.data > -500].float().mean()) < 0.005


def test_a_limb_that_is_wide_where_it_hangs_and_a_second_leg_are_body():
    assert beside_body(scan(arms=(10,))) is None
    legs = scan(gas=False)
    x, y = (5.0 * torch.arange(n) for n in SHAPE[:2])
    first, second = (torch.hypot(x[:, None, None] - middle, y[None, :, None] - 150) for middle in (110, 250))
    legs = replace(legs, data=torch.where((first < 55) | (second < 50), 40.0, -1000.0).expand(SHAPE).contiguous())
    assert beside_body(legs) is None


def test_fingers_stay():
    hand = scan(table=20, arms=(45,))
    small = Volume(hand.data, Grid.from_parts(SHAPE, np.array(SPACING) * 0.8, np.eye(3), np.zeros(3)))
    assert beside_body(hand) is not None
    assert beside_body(small) is None


def test_nothing_is_beside_in_air_alone():
    assert beside_body(replace(scan(), data=torch.full(SHAPE, -1000.0))) is None


def test_a_registration_does_not_follow_the_table():
    """Two tables lie 50 mm apart, the bodies 10 mm: the answer is that of the bodies, and the report says so."""
    quick = RegistrationOptions(preset="fast", inverse=False)
    fixed, moving = scan(table=8), scan(table=58, arms=(50,), middle=10)
    found = register(fixed, moving, None, quick)
    beside = found.report["beside_body"]
    assert beside["moving"] > beside["fixed"] > 100
    alone = register(scan(), scan(middle=10), None, quick)
    assert alone.report["beside_body"] == {"fixed": None, "moving": None}
    torch.testing.assert_close(found.state.total, alone.state.total, rtol=0, atol=0.02)
    marked = masked(fixed, Volume((fixed.data > -500).to(torch.uint8), fixed.grid))
    assert register(marked, moving, None, quick).report["beside_body"] == {"fixed": None, "moving": None}


def test_the_table_of_a_real_scan_is_found(shared):
    image = read_image(shared / "data" / "ct_abdomen" / "example_ct.nii.gz")
    left_out = beside_body(image)
    assert left_out is not None
    index = left_out.nonzero().double().numpy()
    posterior = (index @ image.grid.affine[:3, :3].T + image.grid.origin)[:, 1]
    tissue = (image.data > -500).nonzero().double().numpy() @ image.grid.affine[:3, :3].T + image.grid.origin
    assert np.quantile(posterior, 0.2) > np.quantile(tissue[:, 1], 0.9), "only what lies behind the back"
    assert 5_000 < int(left_out.sum()) < 60_000
