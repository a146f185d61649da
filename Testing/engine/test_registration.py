"""The main job end to end on real files, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from cases import blob_grid, blob_image, blob_labels, follow_forces, steps_only
from rigid_head import rigid_error

from MorphSeekLib.io.images import read_image, read_labels, sitk_from_volume, write_image
from MorphSeekLib.networks import model_file
from MorphSeekLib.networks.devices import describe_devices, memory_advice, network_precision, pick_device
from MorphSeekLib.networks.loading import load_model
from MorphSeekLib.networks.model_file import Card
from MorphSeekLib.networks.policy import ModelSettings, RegistrationModel
from MorphSeekLib.protocol.errors import Cancelled, MorphSeekError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.report import CellsSection, DiceSection, FitSection, FoldingSection, Report
from MorphSeekLib.protocol.startup import MAX_STEPS
from MorphSeekLib.registration.guards import few_values
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.report.results import ESTIMATED, FILES, write_results
from MorphSeekLib.space.fields import jacobian_determinant
from MorphSeekLib.space.geometry import DenseTransform, Grid, Volume, apply_affine, resample, voxel_displacement
from MorphSeekLib.space.preprocessing import Preprocessing, normalize

TILTED = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, -1.0]])  # oblique and left-handed


def random_model(path, output="displacement", **preprocessing):
    """A model whose network is random but for its last layers: they follow the forces, so it helps."""
    torch.manual_seed(0)
    settings = {"encoder": (4, 4), "decoder": (4,), "extra": (8,), "norm": "instance", "flow_stride": 2, "forces": 2}
    model = RegistrationModel(ModelSettings(backbone_settings=settings, output=output))
    follow_forces(model.backbone)
    card = Card(title="random", preprocessing=Preprocessing(**{"spacing": (3.0,) * 3, "align": "none"} | preprocessing))
    model_file.save(path, model, card)
    return load_model(path, "cpu")


def test_negative_labels_are_refused_before_the_work(model, pair):
    fixed, moving, fixed_labels, moving_labels = pair
    events = []
    wrong = Volume(-moving_labels.data, moving_labels.grid)
    with pytest.raises(MorphSeekError, match="has the label -3, and labels must not be negative"):
        register(fixed, moving, model, job=Job(events.append), labels=(fixed_labels, wrong))
    assert events == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model") / "random.safetensors")


@pytest.fixture(scope="module")
def pair():
    """Fixed and moving with labels, on different grids; the fixed one oblique, anisotropic and left-handed."""
    fixed_grid = Grid.from_parts((26, 30, 18), (1.9, 1.7, 2.6), TILTED, (-20.0, -30.0, 20.0))
    shift = fixed_grid.center - blob_grid().center
    moving_grid = Grid.from_parts((24, 28, 20), (2.0, 2.0, 2.5), np.eye(3), blob_grid().origin + shift)
    labels = blob_labels(0, fixed_grid), blob_labels(1, moving_grid)
    return (*(blob_image(v, n) for n, v in enumerate(labels)), *labels)


@pytest.fixture(scope="module")
def result(pair, model):
    fixed, moving, fixed_labels, moving_labels = pair
    return register(fixed, moving, model, steps_only(steps=2), labels=(fixed_labels, moving_labels))


def test_everything_lies_on_the_fixed_grid(pair, result):
    fixed = pair[0]
    for volume in (result.warped, result.aligned, result.jacobian, result.warped_labels):
        assert volume.grid.same_as(fixed.grid)
    assert result.warped_labels.data.dtype == torch.int32


def test_files_agree_with_simpleitk(pair, result, tmp_path):
    """transform.h5 applied by SimpleITK to the moving image is warped.nii.gz; the same for the labels."""
    fixed, moving, _, moving_labels = pair
    report = write_results(tmp_path, result, fixed, {"fixed": "f.nii.gz", "moving": "m.nii.gz"})
    assert {p.name for p in tmp_path.iterdir()} == set(FILES) - set(ESTIMATED)
    transform = sitk.ReadTransform(str(tmp_path / "transform.h5"))
    reference = sitk_from_volume(fixed)
    background = report["warped"]["outside"]
    linear = sitk.Resample(sitk_from_volume(moving), reference, transform, sitk.sitkLinear, background)
    warped = read_image(tmp_path / "warped.nii.gz")
    difference = np.abs(sitk.GetArrayFromImage(linear).transpose(2, 1, 0) - warped.data.numpy())
    assert np.percentile(difference, 99.9) < 1e-3 * float(moving.data.max() - moving.data.min())
    nearest = sitk.Resample(sitk_from_volume(moving_labels), reference, transform, sitk.sitkNearestNeighbor, 0)
    labels = read_labels(tmp_path / "warped-labels.nii.gz")
    assert (sitk.GetArrayFromImage(nearest).transpose(2, 1, 0) == labels.data.numpy()).mean() > 0.9995
    points = apply_affine(
        fixed.grid.affine, np.random.default_rng(0).uniform(0, 1, (50, 3)) * (np.array(fixed.grid.shape) - 1)
    )
    by_file = np.array([transform.TransformPoint(p) for p in points])
    np.testing.assert_allclose(by_file, result.transform.map_points(points), atol=1e-3)
    back = sitk.ReadTransform(str(tmp_path / "inverse.h5"))
    inside = (
        np.abs(apply_affine(np.linalg.inv(moving.grid.affine), by_file) / (np.array(moving.grid.shape) - 1) - 0.5).max(
            1
        )
        < 0.4
    )
    home = np.array([back.TransformPoint(p) for p in by_file[inside]])
    assert np.linalg.norm(home - points[inside], axis=1).mean() < 0.5
    assert report == json.loads((tmp_path / "report.json").read_text())


def test_report_says_what_happened(pair, result):
    fixed = pair[0]
    report = result.report
    jacobian = jacobian_determinant(voxel_displacement(result.transform, fixed.grid))[0, 0]
    torch.testing.assert_close(result.jacobian.data, jacobian, atol=1e-4, rtol=1e-4)
    assert report["folding"]["njd_percent"] == pytest.approx(100 * float((result.jacobian.data <= 0).float().mean()))
    assert [row["step"] for row in report["steps"]] == [0, 1, 2]
    assert set(report["dice"]["labels"]) == {"1", "2", "3"}
    assert set(report["dice"]["mean"]) == {"input", "aligned", "warped"}
    assert report["displacement_mm"]["max"] > report["displacement_mm"]["mean"] > 0
    assert report["inverse"]["residual_mm"]["mean"] < 0.5
    assert report["align"] == "none"
    assert len(report["model"]["sha256"]) == 64


def test_initial_transform_is_contained(pair, model):
    """Starting from a matrix equals registering the image that was moved by it beforehand."""
    fixed, moving, _, _ = pair
    shift = np.eye(4)
    shift[:3, 3] = (5.0, -3.0, 2.0)
    moved = Volume(moving.data, Grid(moving.grid.shape, np.linalg.inv(shift) @ moving.grid.affine))
    one = register(fixed, moving, model, steps_only(inverse=False), start=shift)
    two = register(fixed, moved, model, steps_only(inverse=False))
    torch.testing.assert_close(one.warped.data, two.warped.data, atol=0.05, rtol=0)
    points = apply_affine(fixed.grid.affine, np.array([[5.0, 6, 7], [12, 10, 9]]))
    np.testing.assert_allclose(
        one.transform.map_points(points), apply_affine(shift, two.transform.map_points(points)), atol=1e-3
    )


def test_dense_initial_transform_is_contained(pair, model):
    fixed, moving, _, _ = pair
    nodes = torch.zeros(3, *fixed.grid.shape)
    nodes[0] = 4.0
    matrix = np.eye(4)
    matrix[0, 3] = 4.0
    dense = register(fixed, moving, model, steps_only(inverse=False), start=DenseTransform(nodes, fixed.grid))
    linear = register(fixed, moving, model, steps_only(inverse=False), start=matrix)
    torch.testing.assert_close(dense.transform.displacement, linear.transform.displacement, atol=2e-3, rtol=0)


def test_a_mirroring_initial_transform_is_said_and_folds_are_judged_relative_to_it(pair, model):
    """The mirrored image, brought back by a mirroring matrix, is registered as the image itself."""
    fixed, moving, _, _ = pair
    mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
    mirrored = Volume(moving.data, Grid(moving.grid.shape, mirror @ moving.grid.affine))
    plain = register(fixed, moving, model, steps_only(steps=1, inverse=False)).report
    report = register(fixed, mirrored, model, steps_only(steps=1, inverse=False), start=mirror).report
    assert plain["mirrored"] is False
    assert report["mirrored"] is True
    assert "mirrored" not in [warning["code"] for warning in plain["warnings"]]
    assert "mirrored" in [warning["code"] for warning in report["warnings"]]
    assert plain["displacement_mm"]["max"] > 1
    assert report["displacement_mm"]["max"] == pytest.approx(plain["displacement_mm"]["max"], abs=1e-2)
    assert plain["folding"]["cells"]["no_fold_proven"] is True
    assert report["folding"]["cells"]["no_fold_proven"] is True


def test_alignment_brings_distant_images_together(pair, model):
    fixed, moving, _, _ = pair
    affine = moving.grid.affine.copy()
    affine[:3, 3] += 500
    far = Volume(moving.data, Grid(moving.grid.shape, affine))
    with pytest.raises(MorphSeekError, match="do not overlap"):
        register(fixed, far, model, steps_only(align="none"))
    aligned = register(fixed, far, model, steps_only(align="center", inverse=False))
    center = aligned.transform.map_points(fixed.grid.center[None])[0]
    assert np.linalg.norm(center - far.grid.center) < 20


def test_a_velocity_model_folds_less(pair, tmp_path):
    fixed, moving, _, _ = pair
    runs = {}
    for output in ("displacement", "velocity"):
        strong = random_model(tmp_path / f"{output}.safetensors", output)
        torch.nn.init.normal_(strong.network.backbone.flow.weight, 0, 0.4, generator=torch.Generator().manual_seed(1))
        runs[output] = register(fixed, moving, strong, steps_only(steps=1, inverse=False)).report["steps"][1][
            "njd_percent"
        ]
    assert runs["displacement"] > 1
    assert runs["velocity"] < 0.5 * runs["displacement"]


def test_fixed_spacing_of_none_keeps_the_images_own(pair, tmp_path):
    fixed, moving, _, _ = pair
    own = random_model(tmp_path / "own.safetensors", spacing=None)
    report = register(fixed, moving, own, steps_only(inverse=False)).report
    assert sorted(report["working_grid"]["spacing"]) == pytest.approx(sorted(fixed.grid.spacing.tolist()))


def test_one_more_step_continues_where_the_first_call_stopped(pair, model):
    fixed, moving, fixed_labels, moving_labels = pair
    labels = (fixed_labels, moving_labels)
    three = register(fixed, moving, model, steps_only(steps=3, align="center"), labels=labels)
    two = register(fixed, moving, model, steps_only(steps=2, align="center"))
    more = register(fixed, moving, model, steps_only(steps=1), labels=labels, start=two.state)
    # composing (a o b) o c and a o (b o c) on a grid differs by interpolation only
    moved = three.report["displacement_mm"]["mean"]
    difference = (more.transform.displacement - three.transform.displacement).norm(dim=0).mean()
    assert difference < 0.02 * moved
    assert [f["step"] for f in more.report["steps"]] == [0, 1, 2, 3]
    assert more.report["align"] == "center"
    assert more.report["dice"]["mean"]["aligned"] == three.report["dice"]["mean"]["aligned"], "counted from the start"
    assert more.report["similarity"]["aligned"] == three.report["similarity"]["aligned"]
    with pytest.raises(MorphSeekError, match=f"2 steps were taken already, and {MAX_STEPS} are the most"):
        register(fixed, moving, model, steps_only(steps=MAX_STEPS - 1), start=two.state)


def test_each_step_shows_the_moving_image(pair, model):
    fixed, moving, *_ = pair
    shown = {}
    result = register(fixed, moving, model, steps_only(steps=3), Job(on_picture=shown.__setitem__))
    assert list(shown) == [0, 1, 2, 3]
    assert torch.equal(shown[0].data, result.aligned.data)
    assert torch.equal(shown[3].data, result.warped.data)
    assert not torch.equal(shown[1].data, shown[2].data)


@pytest.fixture
def harmful(tmp_path):
    """A model that drives images apart."""
    model = random_model(tmp_path / "harmful.safetensors")
    with torch.no_grad():
        model.network.backbone.flow.weight.neg_()
    return model


def test_it_stops_when_a_step_no_longer_helps(pair, harmful):
    shown, said = {}, []
    job = Job(lambda e: said.append(e.message), on_picture=shown.__setitem__)
    result = register(*pair[:2], harmful, steps_only(steps=8, stop_early=True), job)
    assert list(shown) == [0, 1]
    assert len(result.report["steps"]) == 2
    assert "Step 1 no longer helps: stopping here" in said


@pytest.mark.parametrize("stop_early", [False, True])
def test_the_answer_is_the_best_of_all_steps_none_included(pair, harmful, stop_early):
    shown = {}
    options = steps_only(steps=2, stop_early=stop_early)
    result = register(*pair[:2], harmful, options, Job(on_picture=shown.__setitem__))
    rows = result.report["steps"]
    assert [row["answer"] for row in rows] == [True] + [False] * (len(rows) - 1), "the table shows every step"
    assert rows[0]["similarity"] > max(row["similarity"] for row in rows[1:])
    assert result.report["similarity"]["warped"] == rows[0]["similarity"]
    assert result.report["displacement_mm"]["max"] == 0
    assert torch.equal(result.warped.data, shown[0].data)
    [warning] = result.report["warnings"]
    assert warning["code"] == "no-step-helped"
    assert "so the answer is the alignment" in warning["message"]


def test_a_further_step_begins_at_the_answer_and_may_not_spoil_it(pair, model, harmful):
    fixed, moving, *_ = pair
    two = register(fixed, moving, model, steps_only(steps=2, inverse=False))
    more = register(fixed, moving, harmful, steps_only(steps=1, inverse=False), start=two.state)
    assert [row["answer"] for row in more.report["steps"]] == [False, False, True, False]
    assert torch.equal(more.transform.displacement, two.transform.displacement)
    assert "the answer is the result after step 2" in more.report["warnings"][0]["message"]


def test_cancel(pair, model):
    fixed, moving, _, _ = pair
    asked = []

    def cancelled():
        asked.append(1)
        return len(asked) > 12

    with pytest.raises(Cancelled):
        register(fixed, moving, model, steps_only(), Job(cancelled=cancelled))
    assert len(asked) == 13, "nothing was begun after it was told to stop"
    # the hooks that ask before every layer are gone: the model still works
    register(fixed, moving, model, steps_only(inverse=False))


def test_progress_is_monotone_and_names_every_step(pair, model):
    events = []
    register(pair[0], pair[1], model, steps_only(steps=3), Job(events.append))
    fractions = [e.fraction for e in events]
    assert fractions == sorted(fractions)
    assert [e.step for e in events if e.phase == "step" and e.step] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"steps": 0}, "choose 1 to"), ({"steps": 99}, "choose 1 to"), ({"align": "elastic"}, "no alignment 'elastic'")],
)
def test_wrong_settings(pair, model, options, words):
    with pytest.raises(MorphSeekError, match=words):
        register(pair[0], pair[1], model, steps_only(**options))


def test_labels_without_a_common_number(pair, model):
    fixed, moving, fixed_labels, moving_labels = pair
    other = Volume(moving_labels.data * 10, moving_labels.grid)
    with pytest.raises(MorphSeekError, match="no label in common"):
        register(fixed, moving, model, labels=(fixed_labels, other))


def test_labels_on_another_grid_are_refused_before_the_work(pair, model):
    fixed, moving, fixed_labels, moving_labels = pair
    for wrong in (0, 1):
        labels = [fixed_labels, moving_labels]
        data, grid = labels[wrong].data[1:], labels[wrong].grid
        labels[wrong] = Volume(data, Grid(tuple(data.shape), grid.affine))
        with pytest.raises(MorphSeekError, match=f"The {('fixed', 'moving')[wrong]} labels lie on another grid"):
            register(fixed, moving, model, labels=tuple(labels))


def test_a_working_grid_beyond_memory_is_refused_by_the_name_of_the_file_before_the_alignment(model, tmp_path):
    volume = Volume(torch.rand(4, 4, 4), Grid((4, 4, 4), np.diag([1000.0, 1000, 1000, 1])))
    write_image(volume, tmp_path / "meters.nii")
    volume, events = read_image(tmp_path / "meters.nii"), []
    with pytest.raises(MorphSeekError, match=r"^The fixed image \(.*meters.nii\) would need .* check its spacing"):
        register(volume, volume, model, steps_only(align="affine"), Job(events.append))
    assert events == []


def test_an_image_too_large_for_any_machine(model):
    grid = Grid((4000, 4000, 4000), np.diag([3.0, 3, 3, 1]))
    empty = torch.zeros(1, 1, 1).expand(4000, 4000, 4000)
    small = Volume(torch.rand(4, 4, 4), Grid((4, 4, 4), np.diag([3.0, 3, 3, 1])))
    huge = Volume.__new__(Volume)
    huge.data, huge.grid = empty, grid
    with pytest.raises(MorphSeekError, match="working grid of"):
        register(huge, small, model, steps_only(align="none"))


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert describe_devices()[-1]["name"] == "cpu"
    assert network_precision(torch.device("cpu")) in (torch.float32, torch.bfloat16)
    with pytest.raises(MorphSeekError, match="no device 'gpu'"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(MorphSeekError, match="no CUDA GPU"):
            pick_device("cuda:0")


def test_out_of_memory_becomes_advice():
    """A real allocation that no machine can make."""
    with (
        pytest.raises(MorphSeekError, match=r"memory does not suffice.*crop or resample"),
        memory_advice(torch.device("cpu")),
    ):
        torch.empty(2**50)
    with pytest.raises(ZeroDivisionError), memory_advice(torch.device("cpu")):
        _ = 1 / 0


def test_bfloat16_changes_the_field_little(pair, model, monkeypatch):
    """The reduced precision that processors with AMX and GPUs use, forced here: geometry stays in float32."""
    from MorphSeekLib.networks import devices
    from MorphSeekLib.registration import result

    fixed, moving, _, _ = pair
    full = register(fixed, moving, model, steps_only(inverse=False))
    monkeypatch.setattr(devices, "network_precision", lambda device: torch.bfloat16)
    monkeypatch.setattr(result, "network_precision", lambda device: torch.bfloat16)
    half = register(fixed, moving, model, steps_only(inverse=False))
    assert half.report["precision"] == "bfloat16"
    difference = (half.transform.displacement - full.transform.displacement).abs()
    assert float(difference.max()) > 0
    assert float(difference.mean()) < 0.05 * float(full.report["displacement_mm"]["max"])


def resized(volume, factor):
    return Volume(volume.data, Grid(volume.grid.shape, np.diag([factor] * 3 + [1.0]) @ volume.grid.affine))


def test_an_object_of_another_world_is_named_and_registered_at_its_own_scale(pair, tmp_path):
    fixed, moving, *_ = pair
    model = random_model(tmp_path / "knows.safetensors", knows=(30.0, 60.0))
    usual = register(fixed, moving, model, steps_only(inverse=False))
    assert usual.report["warnings"] == []
    tiny = register(resized(fixed, 0.01), resized(moving, 0.01), model, steps_only(inverse=False))
    [warning] = tiny.report["warnings"]
    assert warning["code"] == "unknown-size"
    assert "30 to 60 mm" in warning["message"]
    assert "grid was made" in warning["message"]
    assert max(tiny.report["working_grid"]["spacing"]) < 0.1
    assert tiny.report["similarity"]["warped"] > tiny.report["similarity"]["aligned"] + 0.03


def test_an_object_of_a_size_that_was_not_trained_on_is_named(pair, tmp_path):
    model = random_model(tmp_path / "knows.safetensors", knows=(100.0, 110.0))
    report = register(*pair[:2], model, steps_only(inverse=False)).report
    assert [warning["code"] for warning in report["warnings"]] == ["unknown-size"]
    assert report["working_grid"]["spacing"] == [3.0, 3.0, 3.0]


def test_a_mask_is_named_for_there_is_nothing_inside_to_register_by(pair, model):
    fixed, moving = pair[:2]
    mask = Volume(255.0 * (fixed.data > 45), fixed.grid)
    codes = [
        [warning["code"] for warning in register(*images, model, steps_only(steps=1, inverse=False)).report["warnings"]]
        for images in ((fixed, moving), (mask, moving), (moving, mask))
    ]
    assert ["few-values" in c for c in codes] == [False, True, True]


@pytest.mark.parametrize("fill", [-300.0, 80.0, 500.0])
def test_a_mask_is_named_in_a_filled_grid_too(pair, fill):
    """Where the field of view ends, a scanner's fill begins: darker than air, between air and mask, or brighter."""
    image = pair[0].data
    around = (
        torch.linspace(-1, 1, image.shape[0])[:, None, None] ** 2 + torch.linspace(-1, 1, image.shape[1])[:, None] ** 2
    )
    filled = [torch.where(around > 1, fill, data) for data in (255.0 * (image > 45), image)]
    seen = [normalize(data, Preprocessing()) for data in filled]
    assert [[notice.code for notice in few_values(image, "It")] for image in seen] == [["few-values"], []]


def test_what_covers_a_few_voxels_of_the_working_grid_is_named(pair, tmp_path):
    model = random_model(tmp_path / "model.safetensors", shape=(16, 16, 16))
    report = register(resized(pair[0], 0.01), resized(pair[1], 0.01), model, steps_only(inverse=False)).report
    assert "small-foreground" in [warning["code"] for warning in report["warnings"]]


@pytest.mark.parametrize(("thickness", "judged"), [(3.0, True), (0.5, False)])
def test_a_stretch_of_thin_slices_is_judged_or_said_not_to_be(thickness, judged):
    image = blob_image(blob_labels(0, blob_grid((64, 64, 64), (2.0, 2.0, 2.0))), 0)
    slices = resample(image, blob_grid((64, 64, 4), (2.0, 2.0, thickness)))
    options = RegistrationOptions(align="none", search="off", fit="off", inverse=False)
    report = register(image, slices, None, options).report
    assert report["similarity"]["aligned"] == pytest.approx(1.0 if judged else 0.0, abs=0.1)
    assert ("not-judged" in {warning["code"] for warning in report["warnings"]}) != judged


def test_an_alignment_that_lowers_similarity_or_dice_is_said(pair, model):
    """Onto a part of itself: the centers differ, though the images lie right."""
    fixed, _, labels, _ = pair
    data = fixed.data.clone()
    data[:, :, 12:] = 0
    cut = Volume(data, fixed.grid)
    report = register(fixed, cut, model, steps_only(align="center"), labels=(labels, labels)).report
    said = [w["message"] for w in report["warnings"] if w["code"] == "alignment-lowers"]
    assert any("(center) lowered the mean Dice from 1.000" in text for text in said)


def test_weights_that_give_nan_are_refused(pair, tmp_path):
    broken = random_model(tmp_path / "broken.safetensors")
    with torch.no_grad():
        broken.network.backbone.flow.weight[0] = torch.nan
    with pytest.raises(MorphSeekError, match="Step 1 gave numbers that are not finite"):
        register(*pair[:2], broken)


def test_an_image_without_contrast_is_refused(pair, tmp_path):
    model = random_model(tmp_path / "window.safetensors", intensity="window", low=1000.0, high=2000.0)
    with pytest.raises(MorphSeekError, match=r"The fixed image has intensities from .* from 1000 to 2000 only"):
        register(*pair[:2], model)


def test_masks_are_registered(pair, model):
    """Two values alone: both percentiles are the same."""
    masks = [Volume((v.data > 50).float(), v.grid) for v in pair[:2]]
    report = register(*masks, model, steps_only(inverse=False)).report
    assert report["similarity"]["warped"] > report["similarity"]["aligned"] > 0.5


def test_the_same_head_moved_rigidly_stays_where_the_alignment_put_it(shared):
    """[same_mov]: the network alone would move it by 1.8 mm on the average."""
    error, codes, _ = rigid_error(shared, "brain-mr", steps_only(steps=1, inverse=False))
    assert error < 0.3
    assert codes[0] == "no-step-helped"


@pytest.mark.parametrize("model", ["none", "auto", "brain-mr"])
def test_a_fit_leaves_the_same_head_in_place_too(shared, model):
    """[same_mov], by the defaults, with and without a model."""
    assert rigid_error(shared, model, steps_only(search="auto", fit="auto", inverse=False))[0] < 0.3


def test_the_report_holds_what_its_type_says(pair, model):
    fitted = steps_only(steps=1, fit="on", fit_iterations=(1, 1))
    report = register(*pair[:2], model, fitted, labels=pair[2:]).report
    assert report["schema"] == 3
    for name, section in (
        (None, Report),
        ("folding", FoldingSection),
        ("dice", DiceSection),
        ("fit", FitSection),
    ):
        held = report if name is None else report[name]
        late = (
            {"verdict", "morphseek", "date", "software", "files", "landmarks", "corrections", "trust"}
            if name is None
            else set()
        )
        assert set(held) == set(section.__annotations__) - late, name
    assert set(report["folding"]["cells"]) == set(CellsSection.__annotations__)
