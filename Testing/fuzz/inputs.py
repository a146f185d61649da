"""Dress a pair of heads in many coats, register each, and judge every answer.

    python Testing/fuzz/inputs.py --count 500 --seed 0 [--jobs 2] [--only INDEX ... --keep FOLDER] [--model MODEL]

A head and the same head moved by a known map are written to files in other orientations, formats, header forms, number
types, ranges, sizes, with fills, outliers, noise, labels of any value, and damages; several of these at once. Each pair
goes through ``morphseek register`` in a worker process; a worker that dies counts as a traceback. What is right, and
what may be refused, is written in verdicts.py and coats.py. Cases depend on the seed and their index alone: ``--only``
runs some of them again, ``--keep`` leaves their files. Without ``--model`` the command chooses, as for its user: for
heads of all sizes here no model. A case takes a few seconds of one core. Prints a line for each case that is neither
right nor refused and ends with the counts; the exit code is 1 unless every case is right or refused.

Needs: pip install -e '.[test,demo]' (nilearn for the head, nibabel and pydicom for the files).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "MORPHSEEK_PRECISION": "float32"}
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout need not be installed

import numpy as np
from coats import COATS, Coat, Pair, write, write_labels
from heads import Heads
from verdicts import Errors, Ran, Stored, Verdict, errors_of, judge

HANG = 600
"""Seconds after which a case counts as hung; only ends a hang, far above any machine's time for a case."""


@dataclass(frozen=True)
class Case:
    """One dressed pair.

    Attributes:
        index: with the seed, all that it depends on.
        coats: what it wears.
        particulars: of each coat, for the reader.
        pair: how it is stored.
    """

    index: int
    coats: list[Coat]
    particulars: list[str]
    pair: Pair

    def __str__(self) -> str:
        worn = zip(self.coats, self.particulars, strict=True)
        return ", ".join(f"{coat.name} ({text})" if text else coat.name for coat, text in worn)


@dataclass(frozen=True)
class Result:
    """A judged case; ``seconds`` of the processor."""

    index: int
    coats: str
    verdict: Verdict
    seconds: float


def draw(seed: int, index: int, heads: Heads) -> Case:
    """Draw a case: every coat in turn, most of them with one to three others."""
    generator = np.random.default_rng([seed, 1, index])
    turn, place = divmod(index, len(COATS))
    order = np.random.default_rng([seed, 2, turn]).permutation(len(COATS))
    chosen = [COATS[order[place]]]
    wanted = 1 + generator.choice(4, p=[0.4, 0.3, 0.2, 0.1])
    if chosen[0].refusal == "must":
        wanted = min(wanted, 2)
    for n in generator.permutation(len(COATS)):
        coat = COATS[n]
        if len(chosen) >= wanted:
            break
        if coat.refusal != "must" and not any(coat.touches & other.touches for other in chosen):
            chosen.append(coat)
    pair = Pair.undressed(heads)
    chosen.sort(key=COATS.index)
    particulars = [coat.wear(generator, pair) for coat in chosen]
    return Case(index, chosen, particulars, pair)


def store(case: Case, seed: int, heads: Heads, folder: Path) -> Stored:
    """Write the files of a case."""
    generator = np.random.default_rng([seed, 3, case.index])
    folder.mkdir(parents=True)
    images = [write(dress, heads, folder, generator) for dress in (case.pair.fixed, case.pair.moving)]
    if case.pair.labels is None:
        return Stored(*images)
    dresses = (case.pair.fixed, case.pair.moving)
    labels = [write_labels(case.pair.labels, d, i, heads, folder) for d, i in zip(dresses, images, strict=True)]
    return Stored(*images, *labels)


def run_register(stored: Stored, output: Path, model: str | None) -> Ran:
    """Call ``morphseek register`` in this process and note the alignment that it found."""
    from typer.testing import CliRunner

    from MorphSeekLib.app import pair_files
    from MorphSeekLib.app.cli import app

    arguments = ["register", stored.fixed.path, stored.moving.path, "-o", output, "--no-inverse"]
    if model is not None:
        arguments += ["--model", model]
    if stored.fixed_labels is not None:
        arguments += ["--fixed-labels", stored.fixed_labels.path, "--moving-labels", stored.moving_labels.path]
    starts = []
    register = pair_files.register

    def noting(*args, **options):
        result = register(*args, **options)
        starts.append(result.state.start)
        return result

    pair_files.register = noting
    try:
        done = CliRunner().invoke(app, [str(a) for a in [*arguments, "--device", "cpu"]])
    finally:
        pair_files.register = register
    error = ""
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        ours = [f for f in traceback.extract_tb(done.exc_info[2]) if "MorphSeekLib" in f.filename]
        place = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(ours[-3:]))
        error = f"{type(done.exception).__name__}: {done.exception} ({place})"
    return Ran(done.exit_code, error, done.stdout, done.stderr, starts[-1] if starts else None, output)


class Worker:
    """What runs in a worker process: one case after another."""

    def __init__(self, folder: Path, seed: int, model: str | None, keep: Path | None) -> None:
        import SimpleITK as sitk
        import torch

        torch.set_num_threads(1)
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        self.folder, self.seed, self.model, self.keep = folder, seed, model, keep
        self.heads = Heads.load(folder)

    def base(self) -> None:
        """Register the undressed pair and leave its errors in the folder."""
        pair = Pair.undressed(self.heads)
        with self._place("base") as place:
            stored = store(Case(0, [], [], pair), self.seed, self.heads, place / "in")
            ran = run_register(stored, place / pair.output, self.model)
            if ran.code != 0:
                raise RuntimeError(f"The undressed pair cannot be registered: {ran.error or ran.stderr}")
            errors = errors_of(ran, stored, self.heads)
        values = {name: value.tolist() for name, value in vars(errors).items()}
        (self.folder / "base.json").write_text(json.dumps(values))

    def case(self, index: int) -> Result:
        """Store, register and judge a case."""
        begin = time.process_time()
        values = json.loads((self.folder / "base.json").read_text())
        base = Errors(**{name: np.array(value) for name, value in values.items()})
        case = draw(self.seed, index, self.heads)
        with self._place(str(index)) as place:
            stored = store(case, self.seed, self.heads, place / "in")
            before = _prints(place / "in")
            ran = run_register(stored, place / case.pair.output, self.model)
            verdict = judge(ran, stored, case.coats, self.heads, base)
            if verdict.outcome in ("right", "refused") and _prints(place / "in") != before:
                verdict = Verdict("wrong", "files of the input changed")
            if self.keep is not None:
                (place / "terminal.txt").write_text(f"{case}\n{verdict}\n\n{ran.stdout}\n{ran.stderr}\n{ran.error}\n")
        return Result(index, str(case), verdict, time.process_time() - begin)

    @contextlib.contextmanager
    def _place(self, name: str) -> Iterator[Path]:
        """A folder for a case; it stays where files are kept."""
        place = (self.keep or self.folder) / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            yield place
        finally:
            if self.keep is None:
                shutil.rmtree(place, ignore_errors=True)


def _work(connection, *arguments) -> None:
    """Answer the questions of :class:`Hand` until it hangs up; a fault of the fuzz itself is sent as text."""
    worker = Worker(*arguments)
    with contextlib.suppress(EOFError):
        while True:
            question = connection.recv()
            try:
                connection.send(worker.base() if question is None else worker.case(question))
            except Exception:
                connection.send(traceback.format_exc())


class Hand:
    """A worker process, started again when it dies."""

    def __init__(self, *arguments) -> None:
        self.arguments = arguments
        self.process = self.connection = None

    def ask(self, question: int | None) -> Result | None:
        """Run a case; or, for None, the undressed pair."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, other = context.Pipe()
            self.process = context.Process(target=_work, args=(other, *self.arguments), daemon=True)
            self.process.start()
            other.close()
        self.connection.send(question)
        try:
            if self.connection.poll(HANG):
                return self._received(question)
            reason = f"no answer after {HANG} s"
            self.process.kill()
        except (EOFError, ConnectionError):
            self.process.join()
            reason = f"the process died (exit code {self.process.exitcode})"
        self.close()
        if question is None:
            raise RuntimeError(f"The undressed pair: {reason}")
        return Result(question, "", Verdict("traceback", reason), 0.0)

    def _received(self, question: int | None) -> Result | None:
        answer = self.connection.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"The fuzz itself failed in case {question}:\n{answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.connection.close()
            self.process.join(10)
            self.process.kill()
            self.process.join()
            self.process = None


def fuzz(
    indices: Sequence[int], seed: int, *, jobs: int = 2, model: str | None = None, keep: Path | None = None
) -> Iterator[Result]:
    """Run cases; yields their results as they finish.

    Args:
        indices: of the cases.
        seed: of the base pair and all cases.
        jobs: how many processes work at once.
        model: name or file; None: the command's default.
        keep: a folder for the files of the cases; None: they are removed.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        heads = Heads.make(seed)
        heads.save(folder)
        arguments = (folder, seed, model, keep)
        hands = [Hand(*arguments) for _ in range(min(jobs, len(indices)))]
        free = list(hands)

        def run(index: int) -> Result:
            hand = free.pop()
            try:
                result = hand.ask(index)
            finally:
                free.append(hand)
            return result if result.coats else dataclasses.replace(result, coats=str(draw(seed, index, heads)))

        pool = ThreadPoolExecutor(len(hands))
        try:
            hands[0].ask(None)
            for future in as_completed([pool.submit(run, index) for index in indices]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            for hand in hands:
                hand.close()


def count(results: Sequence[Result]) -> str:
    """The last line of a fuzz."""
    outcomes = Counter(result.verdict.outcome for result in results)
    names = ("right", "refused", "wrong", "traceback", "half-written")
    return ", ".join(f"{name} {outcomes[name]}" for name in names)


def failed(result: Result) -> bool:
    """Whether a case is neither right nor refused."""
    return result.verdict.outcome not in ("right", "refused")


def _prints(folder: Path) -> dict[str, str]:
    """Check sums of all files in a folder."""
    return {str(p): hashlib.sha1(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="how many cases (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the base pair and all cases (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="how many processes (default 2)")
    parser.add_argument("--only", type=int, nargs="+", metavar="INDEX", help="only these cases")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the files of the cases there")
    parser.add_argument("--model", help="a model's name or file (default: the command's own)")
    parser.add_argument("--verbose", action="store_true", help="print a line for every case")
    options = parser.parse_args()
    results = []
    keep = options.keep.resolve() if options.keep else None
    for result in fuzz(
        options.only or range(options.count), options.seed, jobs=options.jobs, model=options.model, keep=keep
    ):
        results.append(result)
        if failed(result) or options.verbose:
            verdict = result.verdict
            again = f"--seed {options.seed} --only {result.index}"
            reason = " ".join(verdict.reason.split())
            line = f"{verdict.outcome}: {result.coats}: {reason} [{again}; {result.seconds:.1f} s]"
            print(line.encode("utf-8", "backslashreplace").decode(), flush=True)
    print(count(results))
    sys.exit(any(map(failed, results)))


if __name__ == "__main__":
    main()
