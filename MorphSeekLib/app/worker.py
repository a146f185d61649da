"""The engine's process for Slicer: JSON-RPC 2.0, one message a line, over stdin and stdout.

    python -m MorphSeekLib.app.worker

Requests: hello, load, info, register, estimate, expect, apply, check, export, results, shutdown. Notifications out:
progress. Notifications in: cancel; forget, after which the images of a registration are kept no longer for "estimate".
Arrays travel as .npy files (never pickled, memory-mapped) with axes (i, j, k) and a 4x4 affine to LPS mm; see
``_volume``. "register" takes ``threads``, how many of the processor's to compute with (all by default). A model is
loaded once and kept. The process ends when its stdin closes, so that it never outlives Slicer; whatever the libraries
print goes to stderr, so that stdout holds the protocol alone.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..protocol.startup import AUTO, NO_MODEL, bundled, check_model_choice, find, wait_passively

if __name__ == "__main__":
    wait_passively()  # before torch is imported
    gc.disable()  # looking for garbage takes a third of the time of importing it

import numpy as np
import torch

from ..backbones import BACKBONES
from ..data.cases import check, find_cases
from ..io.apply import apply_transforms
from ..io.compiled import compile_ahead
from ..io.images import form_notices, label_values, read_image, read_labels, stored_values, usable
from ..io.points import PointPairs, Points, pair_points
from ..measures.folds import certify, folded_voxels
from ..networks.devices import describe_devices, pick_device, use_threads
from ..networks.loading import LoadedModel, load_model
from ..networks.model_file import read_card, software
from ..protocol.errors import Cancelled, MorphSeekError
from ..protocol.job import Event, Job
from ..protocol.messages import (
    Answer,
    ArrayReference,
    ErrorMessage,
    EstimateAnswer,
    Params,
    RegisterAnswer,
    StartReference,
    StateReference,
)
from ..protocol.options import PRESETS, RegistrationOptions
from ..protocol.settings import from_dict, to_dict, to_json
from ..protocol.version import __version__
from ..registration.choice import chosen_model
from ..registration.correction import Correction
from ..registration.expected import Pace, Sizes, expected_seconds, measure, network_pace
from ..registration.landmarks import measure_landmarks
from ..registration.masks import masked
from ..registration.pair import State
from ..registration.pipeline import register
from ..registration.trust_map import Estimation
from ..report.page import RegistrationPictures, TrustPicture
from ..report.results import export_results, read_results
from ..space.geometry import DenseTransform, Grid, Transform, Volume

PROTOCOL = 1
PARSE_ERROR, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS, INTERNAL = -32700, -32600, -32601, -32602, -32603
REFUSED, CANCELLED = -32000, -32800
CANCELLATION: ErrorMessage = {"code": CANCELLED, "message": "cancelled"}


class _InvalidParamsError(Exception):
    """The client's request is malformed: an error of its programmer, not of the user."""


class _GaveWayError(Exception):
    """A request was ended for another one, and is to begin again after it."""


class Worker:
    """Answers one request after another; a reader thread takes in cancellations meanwhile.

    Args:
        source, sink: of the messages.
        compiling: the process that compiles kernels for this one, if there is one.
    """

    def __init__(self, source: TextIO, sink: TextIO, compiling: subprocess.Popen | None = None) -> None:
        self.source, self.sink, self.compiling = source, sink, compiling
        self.inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.cancelled: set[Any] = set()
        self.waiting: dict[Any, str] = {}  # requests that have not begun, and what they ask for
        self.beginning = threading.Lock()
        self.writing = threading.Lock()
        self.models: dict[tuple, LoadedModel] = {}
        self.paces: dict[tuple, Pace] = {}
        self.kept: tuple[str, Estimation] | None = None  # of the last registration, by its output
        self.steps: dict[tuple, float] = {}  # seconds of a network's step, for each voxel
        self.methods: dict[str, Callable[[Any, Params], Mapping[str, object]]] = {
            "hello": self.hello,
            "load": self.load,
            "info": self.info,
            "register": self.register,
            "estimate": self.estimate,
            "expect": self.expect,
            "apply": self.apply,
            "export": self.export,
            "check": self.check,
            "results": self.results,
            "shutdown": lambda number, params: {},
        }

    def serve(self) -> None:
        """Answer requests until "shutdown" or the end of the input."""
        threading.Thread(target=self._read, daemon=True).start()
        while (message := self.inbox.get()) is not None:
            self._answer(message)
            if message["method"] == "shutdown":
                return

    def hello(self, number: Any, params: Params) -> Answer:
        """Return versions, devices, bundled models and backbones."""
        models = [{"name": n, "title": read_card(p).title, "path": str(p)} for n, p in bundled().items()]
        return {
            "version": __version__,
            "protocol": PROTOCOL,
            **{k: v for k, v in software().items() if k != "morphseek"},
            "devices": describe_devices(),
            "models": models,
            "backbones": sorted(name for name, kind in BACKBONES.items() if kind.moves),
        }

    def load(self, number: Any, params: Params) -> Answer:
        """Load a model ahead of the first registration."""
        model = self._model(_get(params, "model", str), _get(params, "device", str, "auto"), ())[0]
        return {} if model is None else {"card": to_dict(model.card), "device": str(model.device)}

    def info(self, number: Any, params: Params) -> Answer:
        """Return a model's card."""
        return {"card": to_dict(read_card(find(_get(params, "model", str))))}

    def register(self, number: Any, params: Params) -> RegisterAnswer:
        """Register a pair, as the module's docstring says, into ``output``, which the client made and will remove."""
        begin = time.perf_counter()
        output = Path(_get(params, "output", str))
        if not output.is_dir():
            raise _InvalidParamsError(f"output: there is no folder {output}")
        options = _options(params)
        self.kept = None
        job = self._job(number)
        job.report("read", 0.0, "Reading the images")
        fixed, moving = (
            usable(_volume(_get(params, name, dict), name, torch.float32), f"The {name} image")
            for name in ("fixed", "moving")
        )
        labels = []
        for name in ("fixed_labels", "moving_labels"):
            reference = _get(params, name, dict, None)
            labels.append(None if reference is None else _volume(reference, name, torch.int32))
        landmarks = _landmarks(params)
        fixed, moving = _masked(fixed, params, "fixed"), _masked(moving, params, "moving")
        start: Transform | State | Correction | None = None
        if (given := _get(params, "initial", dict, None)) is not None:
            start = _transform(given, "initial")
        if (given := _get(params, "state", dict, None)) is not None:
            start = _state(given)
        if (given := _get(params, "corrections", dict, None)) is not None:
            start = _correction(given, start)

        pictures = itertools.count()  # a fitted step comes twice, and the client may still read the first

        def on_picture(step: int, warped: Volume) -> None:
            # its own notification: the picture comes as soon as it can be shown
            shown = {"step": step, "warped": _reference(warped, output / f"picture-{next(pictures)}.npy")}
            self._send({"method": "progress", "params": {"id": number, "phase": "picture", **shown}})

        read = time.perf_counter()
        job.report("load", 0.01, "Loading the model")
        name, device = _get(params, "model", str), _get(params, "device", str, "auto")
        model, where, words = self._model(name, device, (fixed, moving))
        job.report("load", 0.01, words)
        loaded = time.perf_counter()
        job = self._job(number, on_picture if _get(params, "show_steps", bool, False) else None)
        result = register(
            fixed, moving, model, options, job.part(0.01, 0.95),
            labels=(labels[0], labels[1]), start=start, device=where,
        )  # fmt: skip
        if landmarks is not None:
            measure_landmarks(result, landmarks, moving.grid)
        job.report("write", 0.95, "Handing over the results")
        registered, trust = time.perf_counter(), result.trust
        self.kept = None if result.estimation is None else (str(output), result.estimation)
        answer: RegisterAnswer = {
            "warped": _reference(result.warped, output / "warped.npy"),
            "aligned": _reference(result.aligned, output / "aligned.npy"),
            "jacobian": _reference(result.jacobian, output / "jacobian.npy"),
            "folding": _reference(result.folding, output / "folding.npy"),
            "warped_labels": _optional_reference(result.warped_labels, output / "warped_labels.npy"),
            "trust": _optional_reference(None if trust is None else trust.bound, output / "trust.npy"),
            "trust_colors": _optional_reference(None if trust is None else trust.colors, output / "trust_colors.npy"),
            "displacement": _reference(result.transform, output / "displacement.npy"),
            "inverse": _optional_reference(result.inverse, output / "inverse.npy"),
            "state": _write_state(result.state, output),
            "report": result.report,
        }
        end = time.perf_counter()
        seconds = {"read": read - begin, "load": loaded - read, "write": end - registered, "total": end - begin}
        result.report["seconds"] |= {k: round(v, 3) for k, v in seconds.items()}
        answer["report"] = result.report | {
            "morphseek": __version__,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "software": software(),
        }
        return answer

    def estimate(self, number: Any, params: Params) -> EstimateAnswer:
        """Estimate the error of the last registration, which was asked to be able to (``trust`` "later") and whose
        output was the folder ``of``; into ``output``, which the client made and will remove. Cancelled, it can be asked
        again. It gives way to other requests, and begins again after them."""
        begin, output, kept = time.perf_counter(), Path(_get(params, "output", str)), self.kept
        if kept is None or kept[0] != _get(params, "of", str):
            raise MorphSeekError(
                "The engine no longer has the images of this registration; register again to have its error estimated."
            )
        job = self._job(number).until(lambda: any(method != "expect" for method in list(self.waiting.values())))
        try:
            trust = kept[1].run(job)
        except Cancelled:
            if number in self.cancelled:
                raise
            raise _GaveWayError from None
        answer: EstimateAnswer = {
            "trust": _optional_reference(trust.bound, output / "trust.npy"),
            "trust_colors": _reference(trust.colors, output / "trust_colors.npy"),
            "section": trust.section,
            "seconds": round(time.perf_counter() - begin, 3),
        }
        self.kept = None
        return answer

    def apply(self, number: Any, params: Params) -> Answer:
        """Resample a ``volume`` (``labels``: whether it holds labels) onto the ``reference`` grid by the transform of
        an earlier registration, or ``backward``, into the file ``output``."""
        job = self._job(number)
        labels = _get(params, "labels", bool, False)
        reference = _get(params, "reference", dict)
        i, j, k = _get(reference, "shape", list)
        grid = _grid((i, j, k), reference, "reference")
        volume = _volume(_get(params, "volume", dict), "volume", torch.int32 if labels else torch.float32)
        found = apply_transforms(
            volume if labels else usable(volume, "The volume"),
            [_displacement(_get(params, "displacement", dict), "displacement")],
            grid,
            interpolation=_get(params, "interpolation", str, "linear"),
            inverse=_get(params, "backward", bool, False),
            job=job,
        )
        warnings = [vars(notice) for notice in found.notices]
        return {"volume": _reference(found, Path(_get(params, "output", str))), "warnings": warnings}

    def expect(self, number: Any, params: Params) -> Answer:
        """Return the ``seconds`` that a registration will take by each preset. Takes what "register" takes, but of the
        images the ``shape`` and ``affine`` of the fixed one, and the share ``shown`` of each axis that the box around
        what it shows takes. The first time the device is measured, for a second or two."""
        options, fixed, job = _options(params), _get(params, "fixed", dict), self._job(number)
        grid = _grid(tuple(_get(fixed, "shape", list)), fixed, "fixed")
        sizes = Sizes(grid, tuple(_get(fixed, "shown", list)))
        model, device, _ = self._model(_get(params, "model", str), _get(params, "device", str, "auto"), ())
        pace, step = self._pace(device, model, job)
        by_preset = {preset: dataclasses.replace(options, preset=preset) for preset in PRESETS}
        return {"seconds": {k: expected_seconds(pace, sizes, own, model, step) for k, own in by_preset.items()}}

    def _pace(self, device: torch.device, model: LoadedModel | None, job: Job) -> tuple[Pace, float]:
        """Return the pace of a device, and of a network's steps on it; each is measured once."""
        here = (str(device), torch.get_num_threads())
        if here not in self.paces:
            while self.compiling is not None and self.compiling.poll() is None:
                job.check()
                time.sleep(0.1)
            self.paces[here] = measure(device, job)
        if model is None:
            return self.paces[here], 0.0
        key = (*here, model.sha256)
        if key not in self.steps:
            self.steps[key] = network_pace(model, job)
        return self.paces[here], self.steps[key]

    def export(self, number: Any, params: Params) -> Answer:
        """Write files of an earlier registration into a folder of the user's. Takes the references that
        "register" answered with, its ``report``, what is ``wanted`` (results.EXPORTS) and the ``output`` folder."""
        job = self._job(number)
        job.report("read", 0.0, "Reading the results")
        fixed, aligned, warped, jacobian = (
            _volume(_get(params, name, dict), name, torch.float32)
            for name in ("fixed", "aligned", "warped", "jacobian")
        )
        transform, inverse = (
            None if given is None else _displacement(given, name)
            for name in ("displacement", "inverse")
            for given in [_get(params, name, dict, None)]
        )
        if transform is None:
            raise _InvalidParamsError("displacement is missing")
        report, grid = _get(params, "report", dict), fixed.grid
        trust = None
        if (given := _get(params, "trust_colors", dict, None)) is not None and "trust" in report:
            trust = TrustPicture(_volume(given, "trust_colors", torch.uint8), report["trust"])
        folded = certify(transform, grid, report.get("mirrored") is True).folded
        folding = Volume((folded_voxels(folded, transform.grid, grid) <= 0).to(torch.uint8), grid)
        files = export_results(
            _get(params, "output", str),
            _get(params, "wanted", list),
            RegistrationPictures(fixed, aligned, warped, jacobian, folding, transform, trust),
            inverse,
            report,
            job=job,
        )
        return {"files": files}

    def check(self, number: Any, params: Params) -> Answer:
        """Check the cases of a training; see :mod:`MorphSeekLib.data.cases`."""
        report = check(
            find_cases(_get(params, "dataset", str)),
            labels=_get(params, "labels", bool, True),
            job=self._job(number),
        )
        return to_dict(report)

    def results(self, number: Any, params: Params) -> Answer:
        """Hand over what a registration left in a ``folder`` as "register" answers, and with it the images and labels
        of the files ``fixed``, ``moving``, ``fixed_labels`` and ``moving_labels``, where they are named; into
        ``output``, which the client made and will remove."""
        output, job = Path(_get(params, "output", str)), self._job(number)
        form = _get(params, "nifti_form", str, None)
        job.report("read", 0.0, "Reading the results")
        found = read_results(_get(params, "folder", str))
        answer: dict[str, object] = {
            "warped": _reference(found.warped, output / "warped.npy"),
            "jacobian": _reference(found.jacobian, output / "jacobian.npy"),
            "folding": _reference(found.folding, output / "folding.npy"),
            "warped_labels": _optional_reference(found.warped_labels, output / "warped_labels.npy"),
            "trust": _optional_reference(found.trust, output / "trust.npy"),
            "trust_colors": _optional_reference(found.trust_colors, output / "trust_colors.npy"),
            "displacement": _reference(found.transform, output / "displacement.npy"),
            "inverse": _optional_reference(found.inverse, output / "inverse.npy"),
            "report": found.report,
        }
        for name in ("fixed", "moving", "fixed_labels", "moving_labels"):
            if (path := _get(params, name, str, None)) is not None:
                job.report("read", 0.5, "Reading the images")
                read = read_labels if name.endswith("labels") else read_image
                answer[name] = _reference(read(path, form), output / f"{name}.npy")
        return answer

    def _model(
        self, name: str, device: str, images: tuple[Volume, ...]
    ) -> tuple[LoadedModel | None, torch.device, str]:
        """Return the model, its device and a sentence about it; without images "auto" is none."""
        if name in (AUTO, NO_MODEL):
            return chosen_model(name if images else NO_MODEL, images, device, load=self._loaded)
        model = self._loaded(name, device)
        return model, model.device, "Loading the model"

    def _loaded(self, name: str, device: str) -> LoadedModel:
        """Return a model, from memory if its file has not changed; only the last one is kept."""
        path = find(name)
        key = (str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size, device)
        if key not in self.models:
            self.models.clear()
            self.models[key] = load_model(name, device)
        return self.models[key]

    def _read(self) -> None:
        """Queue requests, cancel at once, and end the process at the end of the input; runs in a thread."""
        for line in self.source:
            if not line.strip():
                continue
            try:
                message = json.loads(line)
            except ValueError as error:
                self._send({"id": None, "error": {"code": PARSE_ERROR, "message": f"Not JSON: {error}"}})
                continue
            number = message.get("id") if isinstance(message, dict) else None
            valid = isinstance(message, dict) and isinstance(message.get("method"), str)
            if not valid or not isinstance(message.get("params", {}), dict) or isinstance(number, (dict, list)):
                text = "A request needs a method (text) and params (an object)."
                self._send({"id": None, "error": {"code": INVALID_REQUEST, "message": text}})
            elif message["method"] == "cancel":
                target = message.get("params", {}).get("id")
                if not isinstance(target, (dict, list)):
                    self._cancel(target)
            elif message["method"] == "forget":
                kept = self.kept
                if kept is not None and kept[0] == message.get("params", {}).get("of"):
                    self.kept = None
            elif "id" in message:
                self.waiting[number] = message["method"]
                self.inbox.put(message)
        # nobody reads the answer any more: do not finish what is under way
        self.inbox.put(None)
        os._exit(0)

    def _cancel(self, number: Any) -> None:
        """Cancel a request: one that still waits is answered at once, one under way when it checks next."""
        with self.beginning:
            if self.waiting.pop(number, None) is None:
                self.cancelled.add(number)
                return
        self._send({"id": number, "error": CANCELLATION})

    def _answer(self, message: Mapping[str, Any]) -> None:
        number, method = message["id"], message["method"]
        with self.beginning:
            if self.waiting.pop(number, None) is None:
                return  # cancelled while it waited, and answered
        error: ErrorMessage
        try:
            if method not in self.methods:
                known = ", ".join(self.methods)
                error = {"code": NO_METHOD, "message": f"There is no method '{method}'; there are: {known}."}
            elif number in self.cancelled:
                raise Cancelled
            else:
                self._send({"id": number, "result": self.methods[method](number, message.get("params", {}))})
                return
        except _GaveWayError:
            with self.beginning:
                if number not in self.cancelled:
                    self.waiting[number] = method
                    self.inbox.put(dict(message))
                    return
            error = CANCELLATION
        except Cancelled:
            error = CANCELLATION
        except MorphSeekError as refused:
            error = {"code": REFUSED, "message": str(refused)}
        except _InvalidParamsError as wrong:
            error = {"code": INVALID_PARAMS, "message": str(wrong)}
        except Exception as unexpected:
            error = {
                "code": INTERNAL,
                "message": f"The engine failed ({type(unexpected).__name__}: {unexpected}); please report this.",
                "data": traceback.format_exc(),
            }
        finally:
            self.cancelled.discard(number)
        self._send({"id": number, "error": error})

    def _job(self, number: Any, on_picture: Callable[[int, Volume], None] | None = None) -> Job:
        """Return the job of a request: its events and pictures go to the client, who may cancel it."""

        def tell(event: Event) -> None:
            if number in self.cancelled:
                raise Cancelled
            self._send({"method": "progress", "params": {"id": number, **vars(event)}})

        return Job(tell, lambda: number in self.cancelled, on_picture)

    def _send(self, message: Mapping[str, object]) -> None:
        text = to_json({"jsonrpc": "2.0", **message})
        with self.writing:
            self.sink.write(text + "\n")
            self.sink.flush()


def _get(params: Params, name: str, kind: type, *default: Any) -> Any:
    """Return a parameter of the right type; null counts as absent."""
    value = params.get(name)
    if value is None:
        if not default:
            raise _InvalidParamsError(f"{name} is missing")
        return default[0]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _InvalidParamsError(f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
    return value


def _masked(image: Volume, params: Params, side: str) -> Volume:
    """Return an image with what counts of it, "fixed_mask", and what does not, "fixed_ignore"; or "moving_..."."""
    names = (f"{side}_mask", f"{side}_ignore")
    given = [(name, _get(params, name, dict, None)) for name in names]
    inside, ignore = (None if one is None else _volume(one, name, torch.int32) for name, one in given)
    return masked(image, inside, ignore, side)


def _options(params: Params) -> RegistrationOptions:
    """Return the choices of a "register" request, checked before its arrays are read; its threads are used from here
    on.

    Raises:
        MorphSeekError: a model, device or option that cannot be.
    """
    check_model_choice(_get(params, "model", str))
    pick_device(_get(params, "device", str, "auto"))
    use_threads(_get(params, "threads", int, None))
    return from_dict(RegistrationOptions, _get(params, "options", dict, {}), "options")


def _landmarks(params: Params) -> PointPairs | None:
    """Read the landmarks of both images, each {"labels": [text], "positions": [[x, y, z]]} in LPS mm.

    Raises:
        MorphSeekError: they cannot be paired, or only one image has some.
    """
    sides = [_get(params, f"{name}_landmarks", dict, None) for name in ("fixed", "moving")]
    if sides[0] is None and sides[1] is None:
        return None
    if sides[0] is None or sides[1] is None:
        raise MorphSeekError("Landmarks come in pairs: choose points of both volumes.")
    fixed, moving = (
        Points(np.array(_get(side, "positions", list), dtype=np.float64), tuple(_get(side, "labels", list)))
        for side in sides
    )
    return pair_points(fixed, moving, ("The fixed landmarks", "the moving ones"))


def _correction(given: Params, start: Transform | State | Correction | None) -> Correction:
    """Read {"labels": [text], "fixed": [[x, y, z]], "moving": [[x, y, z]], "errors": [mm]}, LPS mm: what is corrected
    of the "state" or the "initial" transform."""
    if start is None or isinstance(start, Correction):
        raise _InvalidParamsError("corrections: there is no state to correct")
    fixed, moving = (np.array(_get(given, name, list), dtype=np.float64).reshape(-1, 3) for name in ("fixed", "moving"))
    points = PointPairs(fixed, moving, tuple(_get(given, "labels", list)))
    return Correction(start, points, np.array(_get(given, "errors", list), dtype=np.float64))


def _array(reference: Params, name: str, axes: int) -> np.ndarray:
    path = _get(reference, "path", str)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _InvalidParamsError(f"{name}: {path} is not a readable .npy file ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim != axes or array.dtype.kind not in "biuf":
        raise _InvalidParamsError(f"{name}: {path} must hold real numbers in {axes} axes")
    return array


def _affine(reference: Params, name: str, key: str = "affine") -> np.ndarray:
    try:
        affine = np.array(reference[key], dtype=np.float64)
        if affine.shape == (4, 4) and np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 0:
            return affine
    except (KeyError, TypeError, ValueError):
        pass
    raise _InvalidParamsError(f"{name}: {key} must be an invertible 4x4 matrix")


def _grid(shape: tuple[int, ...], reference: Params, name: str) -> Grid:
    try:
        i, j, k = shape
        return Grid((i, j, k), _affine(reference, name))
    except ValueError as error:
        raise _InvalidParamsError(f"{name}: {error}") from error


def _volume(reference: Params, name: str, dtype: torch.dtype) -> Volume:
    """Read a volume from {"path": .npy (i, j, k), "affine": 4x4 voxel -> LPS mm, "file": what the client read it
    from}."""
    array = _array(reference, name, 3)
    if min(array.shape) < 2:
        words = name.replace("_", " ")
        raise MorphSeekError(
            f"The {words} image has an axis of one voxel; give a volume of two or more slices each way."
        )
    grid = _grid(array.shape, reference, name)
    if not dtype.is_floating_point:
        values = torch.from_numpy(np.array(array, dtype=np.float64))
        return Volume(label_values(values, f"The segmentation ({name.replace('_', ' ')})"), grid)
    own = np.ascontiguousarray(array, dtype=torch.empty(0, dtype=dtype).numpy().dtype)
    own = own if own.flags.writeable else own.copy()
    file = _get(reference, "file", str, None)
    kind = array.dtype.name if array.dtype.kind in "iu" else "float32"
    return Volume(torch.from_numpy(own), grid, () if file is None else form_notices(file), kind)


def _transform(reference: Params, name: str) -> Transform:
    """Read {"matrix": 4x4} or {"displacement": {"path": .npy, "affine": 4x4}}, LPS mm, fixed -> moving."""
    if "matrix" in reference:
        return _affine(reference, name, "matrix")
    return _displacement(_get(reference, "displacement", dict), name)


def _displacement(reference: Params, name: str) -> DenseTransform:
    """Read a transform from {"path": .npy (3, i, j, k), "affine": 4x4}, LPS mm."""
    array = _array(reference, name, 4)
    if array.shape[0] != 3 or not np.isfinite(array).all():
        raise _InvalidParamsError(f"{name}: the displacement must be (3, i, j, k) finite numbers")
    return DenseTransform(torch.from_numpy(np.array(array, dtype=np.float32)), _grid(array.shape[1:], reference, name))


def _state(given: Params) -> State:
    """Read the "state" of an earlier answer."""
    total = _array({"path": _get(given, "total", str)}, "state", 4)
    figures = _get(given, "figures", list)
    if total.shape[0] != 3 or not figures:
        raise _InvalidParamsError("state: it is not one that an earlier registration gave")
    values = torch.from_numpy(np.array(total, dtype=np.float32))[None]
    start = _transform(_get(given, "start", dict), "state")
    return State(start, _get(given, "align", str), values, figures)


def _write_state(state: State, output: Path) -> StateReference:
    """Write what a later request needs to continue from here; return its figures."""
    if isinstance(state.start, np.ndarray):
        start: StartReference = {"matrix": state.start.tolist()}
    else:
        start = {"displacement": _reference(state.start, output / "start.npy")}
    _save(state.total[0].numpy(), output / "total.npy")
    return {"start": start, "align": state.align, "total": str(output / "total.npy"), "figures": state.figures}


def _reference(result: Volume | DenseTransform, path: Path) -> ArrayReference:
    """Write a result and return where it is."""
    _save(stored_values(result) if isinstance(result, Volume) else result.displacement.numpy(), path)
    return {"path": str(path), "affine": result.grid.affine.tolist(), "shape": list(result.grid.shape)}


def _optional_reference(result: Volume | DenseTransform | None, path: Path) -> ArrayReference | None:
    """Do :func:`_reference` where there is a result."""
    return None if result is None else _reference(result, path)


def _save(data: np.ndarray, path: Path) -> None:
    try:
        np.save(path, data, allow_pickle=False)
    except OSError as error:
        raise MorphSeekError(
            f"The results cannot be written to {path.parent} ({error.strerror}); free some disk space."
        ) from error


def main() -> None:
    """Serve on stdin and stdout."""
    gc.freeze()
    gc.enable()
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library's print goes to the log
    sys.stdout = sys.stderr
    source = os.fdopen(os.dup(0), encoding="utf-8", errors="replace")
    Worker(source, sink, compile_ahead()).serve()


if __name__ == "__main__":
    main()
