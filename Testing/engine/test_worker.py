"""The worker as a real process, spoken to in JSON lines."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading

import numpy as np
import pytest
import SimpleITK as sitk
from cases import blob_grid, blob_image, blob_labels, steps_only
from test_nifti import two_forms
from test_registration import random_model

from MorphSeekLib.io.images import read_image
from MorphSeekLib.networks.loading import load_model
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space.geometry import Volume


class Client:
    """Sends lines, collects lines."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "MorphSeekLib.app.worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.notes: list[dict] = []
        self.count = 0

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(json.loads(line))

    def write(self, text: str) -> None:
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def send(self, method: str, params: dict | None = None) -> int:
        self.count += 1
        self.write(json.dumps({"jsonrpc": "2.0", "id": self.count, "method": method, "params": params or {}}))
        return self.count

    def answer(self, number: int | None, seconds: float = 300) -> dict:
        while True:
            message = self.lines.get(timeout=seconds)
            assert message["jsonrpc"] == "2.0"
            if "method" in message:
                self.notes.append(message["params"])
            elif message["id"] == number:
                return message

    def call(self, method: str, params: dict | None = None) -> dict:
        return self.answer(self.send(method, params))


@pytest.fixture(scope="module")
def client():
    client = Client()
    yield client
    client.process.stdin.close()
    assert client.process.wait(timeout=300) == 0, "it ends when its input closes"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    random_model(path)
    return str(path)


def reference(volume: Volume, path) -> dict:
    np.save(path, volume.data.numpy())
    return {"path": str(path), "affine": volume.grid.affine.tolist()}


@pytest.fixture
def request_of(tmp_path, model_file):
    """Parameters of a registration of two blobs."""
    labels = [blob_labels(seed, blob_grid()) for seed in (0, 1)]
    params = {
        "model": model_file,
        "device": "cpu",
        "options": {"steps": 2, "align": "none", "search": "off", "fit": "off"},
    }
    for name, volume, seed in (("fixed", labels[0], 0), ("moving", labels[1], 1)):
        params[name] = reference(blob_image(volume, seed), tmp_path / f"{name}.npy")
        params[f"{name}_labels"] = reference(volume, tmp_path / f"{name}_labels.npy")
    (tmp_path / "out").mkdir()
    return params | {"output": str(tmp_path / "out")}


def test_hello(client):
    result = client.call("hello")["result"]
    assert result["protocol"] == 1
    assert result["devices"][-1]["name"] == "cpu"


def test_info_and_load(client, model_file):
    assert client.call("info", {"model": model_file})["result"]["card"]["title"] == "random"
    assert client.call("load", {"model": model_file, "device": "cpu"})["result"]["device"] == "cpu"


def test_the_time_of_each_preset_can_be_asked_for(client, request_of):
    about = {"fixed": {"shape": [40, 40, 40], "affine": request_of["fixed"]["affine"], "shown": [0.8, 0.8, 0.8]}}
    for model in (request_of["model"], "none"):
        seconds = client.call("expect", {"model": model, "device": "cpu", **about})["result"]["seconds"]
        assert 0 < seconds["fast"] <= seconds["best"]
    assert "error" in client.call("expect", {"model": "none", "device": "cpu", "fixed": {"shape": [4, 4, 4]}})


def test_register_gives_what_the_engine_gives(client, request_of, model_file):
    result = client.call("register", request_of)["result"]
    labels = [blob_labels(seed, blob_grid()) for seed in (0, 1)]
    images = [blob_image(volume, seed) for seed, volume in enumerate(labels)]
    expected = register(*images, load_model(model_file, "cpu"), steps_only(steps=2, align="none"))
    for name in ("warped", "jacobian"):
        data = np.load(result[name]["path"], mmap_mode="r")
        np.testing.assert_allclose(data, getattr(expected, name).data.numpy(), atol=1e-3)
        np.testing.assert_allclose(result[name]["affine"], images[0].grid.affine)
    field = np.load(result["displacement"]["path"])
    np.testing.assert_allclose(field, expected.transform.displacement.numpy(), atol=1e-4)
    assert np.load(result["folding"]["path"]).dtype == np.uint8
    assert np.load(result["warped_labels"]["path"]).max() == 3
    assert np.load(result["inverse"]["path"]).shape[0] == 3
    assert set(result["report"]["dice"]["labels"]) == {"1", "2", "3"}
    steps = [n["step"] for n in client.notes if n["phase"] == "step" and n["step"]]
    assert steps[-2:] == [1, 2]


def test_steps_are_shown_and_one_more_can_be_asked_for(client, request_of):
    client.notes.clear()
    first = client.call("register", request_of | ONE_STEP | {"show_steps": True})["result"]
    pictures = [n for n in client.notes if n["phase"] == "picture"]
    assert [p["step"] for p in pictures] == [0, 1]
    np.testing.assert_array_equal(np.load(pictures[1]["warped"]["path"]), np.load(first["warped"]["path"]))
    again = client.call("register", request_of | ONE_STEP | {"state": first["state"]})["result"]
    assert [f["step"] for f in again["report"]["steps"]] == [0, 1, 2]
    straight = client.call("register", request_of)["result"]
    warped, expected = np.load(again["warped"]["path"]), np.load(straight["warped"]["path"])
    assert np.abs(warped - expected).mean() < 0.02 * expected.std()
    error = client.call("register", request_of | {"state": {"total": "nowhere.npy", "figures": [], "align": "none"}})
    assert error["error"]["code"] == -32602


def test_the_error_of_the_last_registration_is_estimated_later(client, request_of, tmp_path):
    options = {"align": "none", "search": "off", "fit": "on", "fit_iterations": [4], "trust": "later"}
    (tmp_path / "later").mkdir()
    asked = {"of": request_of["output"], "output": str(tmp_path / "later")}
    result = client.call("register", request_of | {"model": "none", "options": options})["result"]
    assert (result["trust"], result["trust_colors"]) == (None, None)
    number = client.send("estimate", asked)
    client.write(json.dumps({"jsonrpc": "2.0", "method": "cancel", "params": {"id": number}}))
    assert client.answer(number)["error"]["code"] == -32800
    assert "register again" in client.call("estimate", asked | {"of": "another"})["error"]["message"]
    client.notes.clear()
    found = client.call("estimate", asked)["result"]
    assert {note["id"] for note in client.notes} == {client.count}, "its progress is its own"
    assert found["trust"] is None, "no millimeters are known of such images"
    assert np.load(found["trust_colors"]["path"]).shape == tuple(result["report"]["fixed"]["shape"])
    assert found["section"]["kind"] is None
    assert "register again" in client.call("estimate", asked)["error"]["message"], "the images are kept no longer"


def test_images_that_are_to_be_forgotten_are_estimated_no_more(client, request_of, tmp_path):
    options = {"align": "none", "search": "off", "fit": "on", "fit_iterations": [4], "trust": "later"}
    (tmp_path / "later").mkdir()
    asked = {"of": request_of["output"], "output": str(tmp_path / "later")}
    registered = request_of | {"model": "none", "options": options}
    for of, kept in (("another", True), (request_of["output"], False)):
        client.call("register", registered)
        client.write(json.dumps({"jsonrpc": "2.0", "method": "forget", "params": {"of": of}}))
        answer = client.call("estimate", asked)
        assert ("result" in answer) is kept
    assert "register again" in answer["error"]["message"]


def test_an_estimate_gives_way_to_other_requests(client, request_of, tmp_path):
    options = {"align": "none", "search": "off", "fit": "on", "fit_iterations": [4], "trust": "later"}
    client.call("register", request_of | {"model": "none", "options": options})
    (tmp_path / "later").mkdir()
    estimate = client.send("estimate", {"of": request_of["output"], "output": str(tmp_path / "later")})
    hello = client.send("hello")
    answers = []
    while len(answers) < 2:
        message = client.lines.get(timeout=300)
        if "method" not in message:
            answers.append(message)
    assert [answer["id"] for answer in answers] == [hello, estimate]
    assert "section" in answers[1]["result"]


def test_a_registration_is_corrected_by_points_and_masked(client, request_of):
    first = client.call("register", request_of | ONE_STEP)["result"]
    place = first["report"]["fixed"]
    grid = np.array(request_of["fixed"]["affine"])
    at = (grid[:3, :3] @ (np.array(place["shape"]) / 2) + grid[:3, 3]).tolist()
    points = {"labels": ["A"], "fixed": [at], "moving": [at], "errors": [0.5]}
    error = client.call("register", request_of | {"corrections": points})["error"]
    assert "there is no state to correct" in error["message"]
    second = client.call("register", request_of | {"state": first["state"], "corrections": points})["result"]
    row = second["report"]["corrections"]["points"][0]
    assert (row["label"], row["error_mm"]) == ("A", 0.5)
    assert row["after"] < max(0.5, row["before"])
    assert second["report"]["steps"][-1]["stage"] == "correct"
    masked = client.call("register", request_of | ONE_STEP | {"fixed_mask": request_of["fixed_labels"]})["result"]
    assert masked["report"]["masks"]["fixed"] > 0
    assert masked["report"]["folding"]["inside"]["of"] == "mask"


def export_of(request, answer, folder, **changes):
    """Parameters of an export of what a registration answered."""
    names = ("aligned", "warped", "jacobian", "displacement", "inverse", "report")
    sides = {side: {"path": f"{side} node", **answer["report"][side]} for side in ("fixed", "moving")}
    return {
        **{name: answer[name] for name in names},
        "fixed": request["fixed"],
        "report": answer["report"] | sides,
        "wanted": ["report", "transform", "jacobian"],
        "output": str(folder),
    } | changes


def test_export_writes_what_the_command_line_writes(client, request_of, tmp_path):
    answer = client.call("register", request_of)["result"]
    output = tmp_path / "exported"
    files = client.call("export", export_of(request_of, answer, output))["result"]["files"]
    expected = ["folding.nii.gz", "inverse.h5", "jacobian.nii.gz", "report.html", "report.json", "transform.h5"]
    assert files == expected == sorted(path.name for path in output.iterdir())
    jacobian = read_image(output / "jacobian.nii.gz")
    np.testing.assert_allclose(jacobian.data, np.load(answer["jacobian"]["path"]), atol=1e-6)
    transform = sitk.ReadTransform(str(output / "transform.h5"))
    displacement, affine = np.load(answer["displacement"]["path"]), np.array(answer["displacement"]["affine"])
    point = (affine @ [5, 6, 7, 1])[:3]
    np.testing.assert_allclose(transform.TransformPoint(point), point + displacement[:, 5, 6, 7], atol=1e-3)
    assert json.loads((output / "report.json").read_text())["folding"] == answer["report"]["folding"]
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 2
    assert "moving node registered onto fixed node" in page


def test_export_writes_only_what_is_wanted_and_keeps_what_is_there(client, request_of, tmp_path):
    answer = client.call("register", request_of)["result"]
    (tmp_path / "warped.nii.gz").write_text("of someone else")
    params = export_of(request_of, answer, tmp_path, wanted=["transform"], inverse=None)
    assert client.call("export", params)["result"]["files"] == ["transform.h5"]
    assert (tmp_path / "warped.nii.gz").read_text() == "of someone else"
    assert not (tmp_path / "report.html").exists()


def test_export_refuses_in_a_sentence(client, request_of, tmp_path):
    answer = client.call("register", request_of)["result"]
    (tmp_path / "file").write_text("")
    for changes, words in (
        ({"wanted": ["poster"]}, "'poster' cannot be exported"),
        ({"wanted": []}, "choose from report, transform, jacobian"),
        ({"output": str(tmp_path / "file")}, "file"),
    ):
        error = client.call("export", export_of(request_of, answer, tmp_path / "new", **changes))["error"]
        assert error["code"] == -32000
        assert words in error["message"]
    assert not (tmp_path / "new").exists()
    assert client.call("export", export_of(request_of, answer, tmp_path, warped=None))["error"]["code"] == -32602


def test_slicers_axis_order_needs_no_copy(client, request_of, tmp_path):
    """A Fortran-ordered file, which is what (k, j, i) arrays transposed become."""
    array = np.load(request_of["fixed"]["path"])
    np.save(tmp_path / "fortran.npy", np.asfortranarray(array))
    first = client.call("register", request_of)["result"]
    warped = np.load(first["warped"]["path"]).copy()
    request_of["fixed"]["path"] = str(tmp_path / "fortran.npy")
    second = client.call("register", request_of)["result"]
    np.testing.assert_array_equal(np.load(second["warped"]["path"]), warped)


ONE_STEP = {"options": {"steps": 1, "align": "none", "search": "off", "fit": "off"}}
LONGEST = {"fit": "on", "fit_iterations": [1000, 1000, 1000, 1000]}
"""A fit of minutes."""


def test_cancel_ends_the_job_and_the_worker_lives(client, request_of):
    number = client.send("register", request_of | {"options": LONGEST})
    while client.lines.get(timeout=300).get("params", {}).get("phase") != "fit":  # the limit only ends a hang
        pass
    client.write(json.dumps({"jsonrpc": "2.0", "method": "cancel", "params": {"id": number}}))
    client.notes.clear()
    answer = client.answer(number)
    assert answer["error"]["code"] == -32800
    assert {note["phase"] for note in client.notes} <= {"fit"}, "the fit was not finished"
    assert "result" in client.call("hello")


def test_a_request_that_waits_is_cancelled_at_once(client, request_of):
    """The one under way goes on: a panel that asks no more must not end another panel's registration."""
    running = client.send("register", request_of | {"options": LONGEST})
    while client.lines.get(timeout=300).get("params", {}).get("phase") != "fit":  # the limit only ends a hang
        pass
    waiting = client.send("hello")
    client.write(json.dumps({"jsonrpc": "2.0", "method": "cancel", "params": {"id": waiting}}))
    assert client.answer(waiting)["error"]["code"] == -32800
    assert client.lines.get(timeout=300)["params"]["id"] == running
    client.write(json.dumps({"jsonrpc": "2.0", "method": "cancel", "params": {"id": running}}))
    assert client.answer(running)["error"]["code"] == -32800
    assert "result" in client.call("hello")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("this is not JSON", -32700),
        ("[1, 2, 3]", -32600),
        ('{"jsonrpc": "2.0", "id": 7}', -32600),
        ('{"jsonrpc": "2.0", "id": 7, "method": "register", "params": [1]}', -32600),
    ],
)
def test_malformed_lines(client, line, code):
    client.write(line)
    assert client.answer(None)["error"]["code"] == code
    assert "result" in client.call("hello")


def test_unknown_method(client):
    assert client.call("fly")["error"]["code"] == -32601


def spoil_infinite(params):
    array = np.load(params["fixed"]["path"])
    array[0, 0, 0] = np.inf
    np.save(params["fixed"]["path"], array)


def spoil_constant(params):
    np.save(params["moving"]["path"], np.full((8, 8, 8), 3.0))


def spoil_flat(params):
    np.save(params["moving"]["path"], np.random.rand(8, 8, 1))


def spoil_labels(params):
    params["fixed_labels"] = {**params["fixed_labels"], "affine": np.diag([9.0, 1, 1, 1]).tolist()}


def spoil_label_values(value):
    def spoil(params):
        array = np.load(params["moving_labels"]["path"]).astype(type(value))
        array[0, 0, 0] = value
        np.save(params["moving_labels"]["path"], array)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda p: p.update(model="nothing"), -32000, "no model 'nothing'"),
        (lambda p: p.update(device="cuda:99"), -32000, "cuda:99"),
        (lambda p: p.update(options={"steps": 0}), -32000, "choose 1 to"),
        (spoil_infinite, -32000, "fixed image"),
        (spoil_constant, -32000, "moving image is empty"),
        (spoil_flat, -32000, "one voxel"),
        (spoil_labels, -32000, "another grid"),
        (spoil_label_values(-3), -32000, "has the label -3, and labels must not be negative"),
        (spoil_label_values(2**40), -32000, "has the label 1099511627776, and labels must not be larger than"),
        (spoil_label_values(1.5), -32000, "some of its values are not whole numbers"),
        (lambda p: p.pop("fixed"), -32602, "fixed is missing"),
        (lambda p: p.update(options={"steps": "two"}), -32000, "options.steps must be of type int"),
        (lambda p: p["fixed"].update(path="/nowhere.npy"), -32602, "not a readable .npy"),
        (lambda p: p["fixed"].update(affine=[[1, 2], [3, 4]]), -32602, "4x4"),
        (lambda p: p.update(output="/nowhere/at/all"), -32602, "there is no folder"),
    ],
)
def test_bad_requests_are_refused_and_survived(client, request_of, spoil, code, words):
    spoil(request_of)
    error = client.call("register", request_of)["error"]
    assert error["code"] == code
    assert words in error["message"]
    assert "result" in client.call("hello")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"model": "nothing"}, "no model 'nothing'"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"options": {"steps": 0}}, "choose 1 to"),
        ({"options": {"align": "elastic"}}, "no alignment 'elastic'"),
        ({"options": {"similarity": "touch"}}, "options.similarity is 'touch'; choose one of auto, lncc"),
        ({"threads": 0}, "0 threads were asked for"),
    ],
)
def test_settings_are_refused_before_an_array_is_read(client, request_of, setting, words):
    request_of["fixed"]["path"] = "/nowhere.npy"
    client.notes.clear()
    error = client.call("register", request_of | setting)["error"]
    assert words in error["message"]
    assert client.notes == []


def test_threads_count_for_the_request_that_names_them(client, request_of):
    def threads():
        return client.call("hello")["result"]["devices"][-1]["label"]

    client.call("register", request_of)
    before = threads()
    client.call("register", request_of | {"threads": 3})
    assert threads() == "CPU (3 threads)"
    client.call("register", request_of)
    assert threads() == before


def test_a_pickled_array_is_never_run(client, request_of, tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    request_of["fixed"]["path"] = str(tmp_path / "pickled.npy")
    assert client.call("register", request_of)["error"]["code"] == -32602


def test_it_ends_at_once_when_its_input_closes_in_the_middle(request_of):
    client = Client()
    client.send("register", request_of | {"options": LONGEST})
    client.lines.get(timeout=300)
    client.process.stdin.close()
    assert client.process.wait(timeout=300) == 0


def test_shutdown():
    client = Client()
    assert client.call("shutdown")["result"] == {}
    assert client.process.wait(timeout=300) == 0


def test_nan_in_an_array_is_background_and_said(client, request_of):
    array = np.load(request_of["moving"]["path"])
    array[:2] = np.nan
    np.save(request_of["moving"]["path"], array)
    result = client.call("register", request_of)["result"]
    (warning,) = result["report"]["warnings"]
    assert warning["code"] == "nan"
    assert warning["message"].startswith(f"The moving image has {2 * array[0].size} voxels")
    assert np.isfinite(np.load(result["warped"]["path"])).all()


@pytest.mark.parametrize("kind", ["int16", "uint16", "float64"])
def test_the_warped_array_has_the_number_type_of_the_moving_one(client, request_of, kind):
    array = np.load(request_of["moving"]["path"])
    np.save(request_of["moving"]["path"], (1000 * array / array.max()).astype(kind))
    result = client.call("register", request_of | {"show_steps": True})["result"]
    wanted = "float32" if kind == "float64" else kind
    assert {np.load(result[name]["path"]).dtype.name for name in ("warped", "aligned")} == {wanted}
    assert result["report"]["warped"]["type"] == wanted


@pytest.mark.parametrize("value", [-7, 2**31])
def test_labels_that_do_not_fit_are_refused(client, request_of, value):
    array = np.load(request_of["moving_labels"]["path"]).astype(np.int64)
    array[array == 2] = value
    np.save(request_of["moving_labels"]["path"], array)
    error = client.call("register", request_of)["error"]
    assert error["code"] == -32000
    assert f"(moving labels) has the label {value}" in error["message"]


def test_the_file_of_a_volume_is_looked_at(client, request_of, tmp_path):
    """Slicer has read it by ITK; the report says that it states two places."""
    two_forms(tmp_path / "x.nii.gz", (1, 2))
    request_of["fixed"]["file"] = str(tmp_path / "x.nii.gz")
    request_of["moving"]["file"] = str(tmp_path / "gone.nii.gz")
    (warning,) = client.call("register", request_of)["result"]["report"]["warnings"]
    assert warning["code"] == "nifti-forms"
    assert "x.nii.gz states two places" in warning["message"]
