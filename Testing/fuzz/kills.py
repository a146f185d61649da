"""Kill registrations, the worker and trainings at random moments, and look at what they leave.

    python Testing/fuzz/kills.py [--count 200] [--seed 0] [--only register worker warmup finetune run]

Each kind of work is done once without a kill: that gives its files and how long it takes. Then it is done again and
again over an earlier finished result, killed (SIGKILL) at a moment drawn uniformly over that time, and started once
more, to its end:

- damaged: after the kill, a file under its final name is neither the earlier one nor the new one, whole, or a folder
  mixes two results;
- leftover: after the next start, a file is there that work without a kill does not leave, in its folder or in the
  folder for temporary files;
- differing: after the next start, the files (of a training: weights, card and curves) are not those of work without a
  kill. Durations and dates are not compared.

The last line counts them; the exit code is 1 unless all were kept. The processes are forked from this one, in which the
engine is imported already, so that kills meet the work and not the imports; so this runs on Linux and macOS only. The
volumes are tiny and each process computes with one thread: 200 kills take some ten minutes of processor time.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))

import torch
from cases import blob_grid, blob_image, blob_labels, write_dataset

from MorphSeekLib.app.cli import app
from MorphSeekLib.app.worker import Worker
from MorphSeekLib.io.images import write_image
from MorphSeekLib.networks import model_file
from MorphSeekLib.networks.policy import ModelSettings, RegistrationModel
from MorphSeekLib.protocol.startup import read_header
from MorphSeekLib.report.results import FILES
from MorphSeekLib.space.preprocessing import Preprocessing

PATIENCE = 600.0  # seconds; only ends what hangs
SHAPE = (20, 24, 20)
NETWORK = {"encoder": [4, 4], "decoder": [4], "extra": [4], "norm": "instance", "flow_stride": 2}
WARMUP = {
    "model": {"backbone_settings": NETWORK},
    "preprocessing": {"spacing": [2.5, 2.5, 2.5], "align": "none"},
    "training": {"iterations": 6, "steps": 1, "validate_every": 3, "save_every": 1},
}
FINETUNE = {  # so fast that the best weights are early ones, which a resumed training must not forget
    "policy": {"trajectories": 4, "weight": 0.1},
    "training": {"iterations": 6, "steps": 1, "validate_every": 1, "save_every": 1, "learning_rate": 0.01},
}
VARYING = ("seconds", "date", "sha256")
"""Of a card: when and how fast, and the sum of the file that a training started from, which holds its own seconds."""


def main() -> int:
    """Kill, look, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many kills (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS), help="kinds of work to kill")
    options = parser.parse_args()
    os.environ["MORPHSEEK_PRECISION"] = "float32"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="morphseek-kills-") as scratch:
        place = Path(scratch)
        run_process(lambda: make_inputs(place / "inputs"), place / "log.txt").wait()
        counts = kill_all([KINDS[name](place) for name in options.only], options.count, random.Random(options.seed))
    found = {name: counts[name] for name in ("kept", "damaged", "leftover", "differing")}
    print(", ".join(f"{name} {number}" for name, number in found.items()))
    return 0 if found["kept"] == options.count else 1


def kill_all(kinds: list[Kind], count: int, generator: random.Random) -> Counter[str]:
    """Kill each kind in turn; every problem is printed as it is found."""
    for kind in kinds:
        kind.measure()
        print(f"{kind.name}: {kind.seconds:.2f} s without a kill", flush=True)
    counts: Counter[str] = Counter()
    for number, kind in zip(range(count), itertools.cycle(kinds), strict=False):
        moment = generator.uniform(0, kind.seconds)
        problems = kind.attempt(moment)
        for what, texts in problems.items():
            for text in texts:
                print(f"{what}: {kind.name} {number}, killed after {moment:.3f} s: {text}", flush=True)
            counts[what] += bool(texts)
        counts["kept"] += not any(problems.values())
    print("after the end came:", ", ".join(f"{kind.late} of {kind.name}" for kind in kinds))
    return counts


# ------------------------------------------------------------------------------------------------------- the processes


class Process:
    """A forked process; ``wait`` returns whether it ended well, False too when it had to be killed."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log

    def wait(self, kill_after: float | None = None) -> bool:
        """Until it ends, or kill it after some seconds.

        Raises:
            RuntimeError: it failed, or hung, without having been killed.
        """
        deadline = time.monotonic() + (PATIENCE if kill_after is None else kill_after)
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() >= deadline:
                status = self.kill()
                if kill_after is not None:
                    return False
                break
            time.sleep(0.001)
        if status:
            raise RuntimeError(f"A process that nobody killed ended with {status}:\n{self.log.read_text()[-3000:]}")
        return True

    def kill(self) -> int:
        """End it at once; its status."""
        os.kill(self.pid, signal.SIGKILL)
        return os.waitpid(self.pid, 0)[1]


def run_process(work: Callable[[], Any], log: Path) -> Process:
    """Start ``work`` in a process of its own, which writes what it prints to a file."""
    pid = os.fork()
    if pid:
        return Process(pid, log)
    code = 1
    try:
        with open(log, "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        tempfile.tempdir = str(temporary_files(log.parent))
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def temporary_files(place: Path) -> Path:
    """The folder for the temporary files of the processes of a place."""
    folder = place / "tmp"
    folder.mkdir(exist_ok=True)
    return folder


# ---------------------------------------------------------------------------------------------------- what is killed


class Kind:
    """A kind of work over an earlier result in a folder.

    Attributes:
        name: for the log.
        place: the scratch folder, with the inputs.
        seconds: how long it takes without a kill.
        files: what work without a kill leaves: path below the folder -> its content, as :meth:`content` sees it.
        theirs: names that it leaves among the temporary files, such as torch's caches.
        late: how many kills came after its end.
    """

    name = ""

    def __init__(self, place: Path) -> None:
        self.place, self.inputs = place, place / "inputs"
        self.earlier = place / f"{self.name}-earlier"
        self.seconds, self.late = 0.0, 0
        self.files: dict[str, Any] = {}
        self.theirs: list[str] = []

    def lay_out(self, folder: Path) -> None:
        """Make the earlier finished result; nothing by default."""
        folder.mkdir(exist_ok=True)

    def start(self, folder: Path) -> Process:
        """Begin the work."""
        raise NotImplementedError

    def finish(self, process: Process, folder: Path, kill_after: float | None) -> bool:
        """Let it work to its end, or kill it; whether it came to its end."""
        return process.wait(kill_after)

    def content(self, path: Path) -> Any:
        """What of a finished file must be the same again; raises where the file is not whole."""
        return digest(path)

    def damage(self, folder: Path) -> list[str]:
        """What is wrong, after a kill, with the files under their final names."""
        raise NotImplementedError

    def measure(self) -> None:
        """Work once without a kill, and remember what it leaves and how long it took."""
        self.lay_out(self.earlier)
        folder = self.place / f"{self.name}-whole"
        shutil.copytree(self.earlier, folder)
        begin = time.monotonic()
        self.finish(self.start(folder), folder, None)
        self.seconds = time.monotonic() - begin
        self.files = self.contents(folder)
        self.theirs = [path.name for path in temporary_files(self.place).iterdir()]
        shutil.rmtree(temporary_files(self.place))

    def attempt(self, moment: float) -> dict[str, list[str]]:
        """Work, kill, look, start again; the problems found."""
        folder = self.place / f"{self.name}-killed"
        shutil.copytree(self.earlier, folder)
        self.late += self.finish(self.start(folder), folder, moment)
        problems = {"damaged": self.damage(folder)}
        self.finish(self.start(folder), folder, None)
        left = self.contents(folder)
        strangers = [path for path in left if path not in self.files]
        temporary = [path.name for path in temporary_files(self.place).iterdir() if path.name not in self.theirs]
        strangers += [f"{name} among the temporary files" for name in temporary]
        problems["leftover"] = strangers
        problems["differing"] = [path for path, content in self.files.items() if left.get(path) != content]
        shutil.rmtree(folder)
        shutil.rmtree(temporary_files(self.place))
        return problems

    def contents(self, folder: Path) -> dict[str, Any]:
        """Every file below a folder, with its content; TensorBoard's logs, whose names hold the time, as one."""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        found = {}
        for path in files:
            name = path.relative_to(folder).as_posix()
            if "tfevents" in name:
                found[f"{path.parent.relative_to(folder)}/curves"] = None
            else:
                found[name] = self.content(path)
        return found


class Registering(Kind):
    """``morphseek register`` into a folder that holds an earlier result, of another moving image."""

    name = "register"

    def lay_out(self, folder: Path) -> None:
        self._start(folder, "earlier").wait()
        self.old = self.contents(folder)

    def start(self, folder: Path) -> Process:
        return self._start(folder, "moving")

    def _start(self, folder: Path, moving: str) -> Process:
        arguments = ["register", self.inputs / "fixed.nii.gz", self.inputs / f"{moving}.nii.gz", "--device", "cpu"]
        arguments += ["--model", self.inputs / "model.safetensors", "--align", "none", "--steps", 1, "-o", folder]
        arguments += ["--fixed-labels", self.inputs / "fixed-labels.nii.gz"]
        arguments += ["--moving-labels", self.inputs / f"{moving}-labels.nii.gz"]
        return run_process(lambda: app([str(a) for a in arguments]), self.place / "log.txt")

    def content(self, path: Path) -> Any:
        return report_content(path) if path.stem == "report" else digest(path)

    def damage(self, folder: Path) -> list[str]:
        return mixed(self, folder, self.old)


class Exporting(Kind):
    """The worker, registering two arrays and exporting the result into a folder that holds an earlier one."""

    name = "worker"

    def lay_out(self, folder: Path) -> None:
        folder.mkdir()
        self.moving = "earlier"
        self.finish(self.start(folder), folder, None)
        self.moving = "moving"
        self.old = self.contents(folder)

    def start(self, folder: Path) -> Process:
        here, there = os.pipe(), os.pipe()  # to the worker, and from it
        process = run_process(lambda: self._serve(here, there), self.place / "log.txt")
        os.close(here[0])
        os.close(there[1])
        self.to, self.out = here[1], there[0]
        return process

    @staticmethod
    def _serve(here: tuple[int, int], there: tuple[int, int]) -> None:
        os.close(here[1])
        os.close(there[0])
        with os.fdopen(here[0], encoding="utf-8") as source, os.fdopen(there[1], "w", encoding="utf-8") as sink:
            Worker(source, sink).serve()

    def finish(self, process: Process, folder: Path, kill_after: float | None) -> bool:
        """Be its client: register, then export what came."""
        deadline = time.monotonic() + (PATIENCE if kill_after is None else kill_after)
        arrays = self.place / "arrays"
        arrays.mkdir()
        request = self._request(arrays)
        try:
            result = self._call(1, "register", request, deadline)
            if result is not None:
                names = ("aligned", "warped", "jacobian", "displacement", "inverse", "report")
                export = {name: result[name] for name in names} | {"fixed": request["fixed"], "output": str(folder)}
                for side, name in (("fixed", "fixed"), ("moving", self.moving)):
                    export["report"][side] = {"path": f"{name}.nii.gz", **export["report"][side]}
                export["wanted"] = ["transform", "jacobian", "report"]
                result = self._call(2, "export", export, deadline)
            if result is None and kill_after is None:
                raise RuntimeError("The worker did not answer.")
            process.kill()
            return result is not None
        finally:
            os.close(self.to)
            os.close(self.out)
            shutil.rmtree(arrays)  # the client's own folder

    def _request(self, arrays: Path) -> dict[str, Any]:
        affine = blob_grid(SHAPE).affine.tolist()
        sides = {
            side: {"path": str(self.inputs / f"{name}.npy"), "affine": affine}
            for side, name in (("fixed", "fixed"), ("moving", self.moving))
        }
        model = str(self.inputs / "model.safetensors")
        settings = {"model": model, "device": "cpu", "options": {"align": "none", "steps": 1}, "threads": 1}
        return settings | sides | {"output": str(arrays)}

    def _call(self, number: int, method: str, params: dict, deadline: float) -> dict | None:
        """The answer's result, or None when the time is over first."""
        message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
        os.write(self.to, json.dumps(message).encode() + b"\n")
        received = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.out, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                if not selector.select(left):
                    continue
                received += os.read(self.out, 1 << 16)
                *lines, received = received.split(b"\n")
                for answer in map(json.loads, lines):
                    if answer.get("id") == number:
                        return answer["result"]
        return None

    def content(self, path: Path) -> Any:
        return report_content(path) if path.stem == "report" else digest(path)

    def damage(self, folder: Path) -> list[str]:
        return mixed(self, folder, self.old)


class Training(Kind):
    """A training over an earlier finished model of the same name; started again, it resumes."""

    command: tuple[str, ...] = ()
    settings: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    def lay_out(self, folder: Path) -> None:
        folder.mkdir()
        shutil.copy(self.inputs / "model.safetensors", folder)
        self.old = model_content(folder / "model.safetensors")

    def start(self, folder: Path) -> Process:
        path = self.place / f"{self.name}.json"
        path.write_text(json.dumps(self.settings))
        options = ["--config", path, "--out", folder / "model.safetensors", "--device", "cpu"]
        arguments = [self.name, self.inputs / "data" / "dataset.json", *self.more(), *options]
        return run_process(lambda: app([str(a) for a in arguments]), self.place / "log.txt")

    def more(self) -> list[Any]:
        """Further arguments."""
        return []

    def content(self, path: Path) -> Any:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text().splitlines()]
        return model_content(path) if path.suffix == ".safetensors" else digest(path)

    def damage(self, folder: Path) -> list[str]:
        known = self.old, self.files["model.safetensors"]
        problems = []
        for path in finished(folder):
            try:
                if path.suffix == ".safetensors" and model_content(path) not in known:
                    problems.append(f"{path.name} is neither the earlier model nor the new one")
                elif path.suffix == ".state":
                    tensors_content(path)
            except Exception as error:
                problems.append(f"{path.name} is not whole ({error})")
        return problems


class WarmingUp(Training):
    """``morphseek warmup``."""

    name, settings = "warmup", WARMUP


class FineTuning(Training):
    """``morphseek finetune``."""

    name, settings = "finetune", FINETUNE

    def more(self) -> list[Any]:
        return ["--init", self.inputs / "model.safetensors"]


class Running(Training):
    """``morphseek train``: a run's folder, through warm-up, fine-tuning and the figures before and after."""

    name = "run"

    def lay_out(self, folder: Path) -> None:
        folder.mkdir()
        values = {"name": "Blobs", "dataset": str(self.inputs / "data" / "dataset.json"), "device": "cpu"}
        values |= {"model": "blobs.safetensors", "warmup": WARMUP, "finetune": FINETUNE}
        (folder / "run.json").write_text(json.dumps(values))

    def start(self, folder: Path) -> Process:
        return run_process(lambda: app(["train", str(folder)]), self.place / "log.txt")

    def content(self, path: Path) -> Any:
        if path.name in ("lock", "status.json", "start.json", "result.json") or path.name.startswith("validation-"):
            return None  # they hold durations, and the folder's name
        return super().content(path)

    def damage(self, folder: Path) -> list[str]:
        problems = []
        for path in finished(folder):
            try:
                if path.suffix == ".json":
                    json.loads(path.read_text())
                elif path.suffix == ".safetensors" and unchosen(model_content(path)) != unchosen(self.files[path.name]):
                    problems.append(f"{path.name} is not the model of a run without a kill")
                elif path.suffix == ".state":
                    tensors_content(path)
            except Exception as error:
                problems.append(f"{path.name} is not whole ({error})")
        return problems


KINDS = {kind.name: kind for kind in (Registering, Exporting, WarmingUp, FineTuning, Running)}


# -------------------------------------------------------------------------------------------------- what is looked at


def digest(path: Path) -> str:
    """Of all bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def report_content(path: Path) -> str:
    """Which moving image a whole report is of."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return Path(json.loads(text)["moving"]["path"]).name
    if not text.rstrip().endswith("</html>"):
        raise ValueError("it has no end")
    return next(name for name in ("earlier.nii.gz", "moving.nii.gz") if name in text)


def tensors_content(path: Path) -> tuple[str, str]:
    """Digests of where the tensors of a whole .safetensors file are and of their bytes, without its metadata."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    if max(tensor["data_offsets"][1] for tensor in header.values()) != len(content) - begin:
        raise ValueError("its weights are cut")
    return json.dumps(header, sort_keys=True), hashlib.sha256(content[begin:]).hexdigest()


def model_content(path: Path) -> tuple[Any, tuple[str, str]]:
    """Card and weights of a whole model file."""
    return without(read_header(path), VARYING), tensors_content(path)


def unchosen(content: tuple[Any, tuple[str, str]]) -> tuple[Any, tuple[str, str]]:
    """The content of a model file before it is written on its card whether a fit helps, which is done last."""
    card, weights = content
    return without(card, ("fit", "with_fit")), weights


def without(value: Any, keys: tuple[str, ...]) -> Any:
    """The same structure without some keys, at any depth."""
    if isinstance(value, dict):
        return {k: without(v, keys) for k, v in value.items() if k not in keys}
    return [without(v, keys) for v in value] if isinstance(value, list) else value


def finished(folder: Path) -> list[Path]:
    """The files under their final names."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]


def mixed(kind: Kind, folder: Path, old: dict[str, Any]) -> list[str]:
    """What is wrong with a folder that should hold the earlier result or the new one, all of it."""
    problems, found = [], {}
    for path in finished(folder):
        if path.name in FILES:
            try:
                found[path.name] = kind.content(path)
            except Exception as error:
                problems.append(f"{path.name} is not whole ({error})")
    if not problems and found not in (old, kind.files):
        of = {
            name: {old.get(name): "earlier", kind.files.get(name): "new"}.get(c, "broken") for name, c in found.items()
        }
        problems.append(f"the folder holds {of or 'nothing'}, which is neither the earlier result nor the new one")
    return problems


def make_inputs(folder: Path) -> None:
    """Three labeled images, as files and as arrays, a data set and a model whose network moves things a little."""
    import numpy as np

    folder.mkdir()
    for seed, name in enumerate(("fixed", "moving", "earlier")):
        labels = blob_labels(seed, blob_grid(SHAPE))
        image = blob_image(labels, seed)
        write_image(image, folder / f"{name}.nii.gz")
        write_image(labels, folder / f"{name}-labels.nii.gz")
        np.save(folder / f"{name}.npy", image.data.numpy())
    write_dataset(folder / "data", 5, blob_grid(SHAPE))
    torch.manual_seed(0)
    model = RegistrationModel(ModelSettings(backbone_settings=NETWORK))
    torch.nn.init.normal_(model.backbone.flow.weight, 0, 0.02)
    preprocessing = Preprocessing(spacing=(2.5,) * 3, align="none", steps=1)
    model_file.save(folder / "model.safetensors", model, model_file.Card("random", preprocessing=preprocessing))


if __name__ == "__main__":
    sys.exit(main())
