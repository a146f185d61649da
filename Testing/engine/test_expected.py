"""What is said of the time of a registration before it is done."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_registration import random_model

from MorphSeekLib.networks.loading import load_model
from MorphSeekLib.protocol.errors import Cancelled
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.registration.expected import Pace, Sizes, expected_seconds, measure, network_pace
from MorphSeekLib.space.geometry import Grid

PACE = Pace(start=1.0, voxel=1e-6, compared=1e-7, iterated=1e-7)
HEAD = Sizes(Grid((160, 192, 160), np.eye(4)), (0.8, 0.9, 0.8))
BODY = replace(HEAD, shown=(1.0, 1.0, 1.0))


def test_a_device_is_measured_by_real_registrations():
    pace = measure(torch.device("cpu"))
    assert min(pace.start, pace.compared, pace.iterated) > 0
    assert pace.voxel >= 0


def test_a_measurement_can_be_cancelled():
    with pytest.raises(Cancelled):
        measure(torch.device("cpu"), Job(cancelled=lambda: True))


def test_what_is_left_out_takes_no_time():
    best, fast = (expected_seconds(PACE, HEAD, RegistrationOptions(preset=preset)) for preset in ("best", "fast"))
    none = expected_seconds(PACE, HEAD, RegistrationOptions(fit="off"))
    searched = expected_seconds(PACE, HEAD, RegistrationOptions(fit="off", search="on"))
    assert PACE.start < none < fast < best
    assert searched > none


def test_an_image_that_its_object_fills_is_searched():
    without = RegistrationOptions(fit="off", search="off")
    options = RegistrationOptions(fit="off")
    assert expected_seconds(PACE, HEAD, options) == expected_seconds(PACE, HEAD, without)
    assert expected_seconds(PACE, BODY, options) > expected_seconds(PACE, BODY, without)


def test_each_step_of_a_network_takes_as_long(tmp_path):
    random_model(tmp_path / "model.safetensors")
    model = load_model(tmp_path / "model.safetensors", "cpu")
    assert network_pace(model) > 0
    one, two, three = (
        expected_seconds(PACE, HEAD, RegistrationOptions(steps=steps), model, 1e-6) for steps in (1, 2, 3)
    )
    assert three - two == pytest.approx(two - one)
    assert two > one
