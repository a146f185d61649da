"""Register many pairs, by local processes or a Dask cluster, into a folder that the same call goes on with."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..protocol import batch as folders
from ..protocol.batch import BatchPair, BatchSettings, Outcome
from ..protocol.errors import Cancelled, InUseError, MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.lock import try_lock
from ..protocol.settings import to_dict, to_json
from ..protocol.settings_file import read_values
from ..protocol.startup import check_output_folder
from ..protocol.version import __version__
from .batch_worker import Answer, Request, as_request, probe, register_request

_TRIES = 2  # of a pair whose worker died
_WAIT = 0.2  # seconds between looks at whether the job was cancelled


@dataclass(frozen=True)
class BatchOptions:
    """Every choice of a batch but its pairs.

    Attributes:
        output: the folder of the batch.
        settings: what all pairs share.
        workers: local processes.
        threads: of each; None for an equal share of the processor.
        device: auto, cpu or cuda:N.
        retry: register those again that failed.
        strict: refuse the batch if any row has a problem.
    """

    output: Path
    settings: BatchSettings = field(default_factory=BatchSettings)
    workers: int = 1
    threads: int | None = None
    device: str = "auto"
    retry: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise MorphSeekError(f"{self.workers} workers were asked for; choose 1 or more.")


def batch(
    pairs: Iterable[Mapping[str, str]], options: BatchOptions, client: Any = None, job: Job = SILENT
) -> list[Outcome]:
    """Register pairs into a folder; the same call goes on where an earlier one was stopped.

    Args:
        pairs: rows with the columns of :data:`MorphSeekLib.protocol.batch.FILES`, name, model, and any option.
        options: all else.
        client: a dask.distributed.Client; None for local processes.
        job: told how many pairs are done.

    Returns:
        what became of each pair, in the order given. One bad pair never stops the others.

    Raises:
        MorphSeekError: nothing could begin: the folder is of other settings or in use, or with ``strict`` a row has a
            problem.
        Cancelled: the same call goes on.
    """
    from ..report.cohort import write_cohort

    planned = folders.plan(pairs, options.settings)
    problems = [f"{pair.name}: {' '.join(pair.problems)}" for pair in planned if pair.problems]
    if not planned:
        raise MorphSeekError("The batch has no pairs; check the table.")
    if problems and options.strict:
        raise MorphSeekError("\n".join([f"{len(problems)} of {len(planned)} rows have problems:", *problems]))
    check_output_folder(options.output)
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with (output / folders.LOCK).open("a+", encoding="utf-8") as lock:
        if not try_lock(lock):
            raise InUseError(f"Another process works on the batch in {output}; wait for it or stop it first.")
        _claim(output, options.settings)
        known = folders.read_outcomes(output)
        left = folders.waiting([p for p in planned if not p.problems], known, output, options.retry)
        bad = {p.name: Outcome(p.name, "failed", "", " ".join(p.problems)) for p in planned if p.problems}
        try:
            if left:
                _run(left, options, client, known, job)
        finally:
            found = [bad.get(pair.name) or known.get(pair.name) for pair in planned]
            write_cohort(output, [outcome for outcome in found if outcome is not None])
    return [outcome for outcome in found if outcome is not None]


@contextmanager
def cluster_client(address: str | None, security: Path | None, scheduler_file: Path | None) -> Iterator[Any]:
    """Yield a client of a Dask cluster; None where none was named.

    Args:
        address: of the scheduler, tls://HOST:PORT, or tcp:// in a private network.
        security: a JSON file with tls_ca_file, tls_client_cert and tls_client_key.
        scheduler_file: what the scheduler wrote with --scheduler-file, in place of an address.

    Raises:
        MorphSeekError: Dask is not installed, or the cluster does not answer.
    """
    if address is None and scheduler_file is None:
        yield None
        return
    try:
        from distributed import Client
        from distributed.security import Security
    except ImportError as error:
        raise MorphSeekError("A cluster needs Dask: pip install 'morphseek[cluster]', or use --workers.") from error
    try:
        secure = None if security is None else Security(require_encryption=True, **read_values(security))
        client = Client(address, scheduler_file=scheduler_file and str(scheduler_file), security=secure, timeout=20)
    except (OSError, ValueError, TypeError, KeyError) as error:
        where = address or scheduler_file
        raise MorphSeekError(f"The cluster {where} cannot be reached ({error}); check its address.") from error
    with client:
        yield client


def _claim(output: Path, settings: BatchSettings) -> None:
    """Write the settings into a fresh folder.

    Raises:
        MorphSeekError: the folder holds a batch of other settings.
    """
    from ..io.files import write_atomically

    path, wanted = output / folders.SETTINGS, to_dict(settings)
    if not path.is_file():
        write_atomically(path, to_json({"morphseek": __version__, **wanted}, indent=1).encode())
        return
    try:
        found = {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k != "morphseek"}
    except (OSError, ValueError, AttributeError) as error:
        raise MorphSeekError(f"{path} cannot be read ({error}); choose another folder.") from error
    if changed := sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)):
        raise MorphSeekError(
            f"{output} holds a batch of other settings ({', '.join(changed)}); choose another folder, or the same "
            "settings."
        )


def _run(left: Sequence[BatchPair], options: BatchOptions, client: Any, known: dict[str, Outcome], job: Job) -> None:
    """Register pairs and write down what becomes of each."""
    output = options.output.resolve()
    keep = [name for kept in options.settings.keep for name in folders.KEPT[kept]]
    keys = {pair.name: pair.key() for pair in left}
    requests = [as_request(pair, options.settings, output, options.device, keep) for pair in left]
    answers = _local(requests, options, job) if client is None else _dask(requests, client, options, job)
    begin, failed = time.monotonic(), 0
    job.report("step", 0.0, f"{len(left)} pairs to register", 0, len(left))
    with (output / folders.ROWS).open("a+b") as rows:
        if rows.tell() and not _ends_whole(output / folders.ROWS):
            rows.write(b"\n")
        for count, (request, answer) in enumerate(answers, 1):
            name, problem = request["name"], answer["problem"]
            outcome = Outcome(name, "failed" if problem else "done", keys[name], problem, answer["figures"])
            rows.write(to_json(dataclasses.asdict(outcome)).encode() + b"\n")
            rows.flush()
            os.fsync(rows.fileno())
            known[name] = outcome
            failed += bool(problem)
            pace = (time.monotonic() - begin) / count
            words = f"{count} of {len(left)} pairs, {failed} failed; {3600 / max(pace, 1e-6):.0f} pairs per hour, "
            minutes = pace * (len(left) - count) / 60
            job.report("step", count / len(left), f"{words}{minutes:.0f} minutes left", count, len(left))


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class _Process:
    """A local worker."""

    def __init__(self, threads: int) -> None:
        command = [sys.executable, "-m", "MorphSeekLib.app.batch_worker", str(threads)]
        package = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is for the parent, which then ends its workers
        )

    def ask(self, request: Request) -> Answer | None:
        """Return the answer; None where the worker died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(to_json(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            answer: Answer = json.loads(line)
        except (OSError, ValueError):
            return None
        return answer

    def end(self) -> None:
        """End the worker within seconds, whatever it does."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _local(requests: Sequence[Request], options: BatchOptions, job: Job) -> Iterator[tuple[Request, Answer]]:
    """Yield answers as local processes give them; a pair whose process dies is tried once more.

    Raises:
        Cancelled: the job was; the processes have ended.
    """
    count = min(options.workers, len(requests))
    threads = options.threads or max(1, (os.cpu_count() or 1) // count)
    waiting: queue.SimpleQueue[tuple[Request, int] | None] = queue.SimpleQueue()
    answers: queue.SimpleQueue[tuple[Request, Answer]] = queue.SimpleQueue()
    for request in requests:
        waiting.put((request, 1))
    over = threading.Event()
    processes: list[_Process] = [_Process(threads) for _ in range(count)]

    def work(index: int) -> None:
        while not over.is_set() and (given := waiting.get()) is not None:
            request, tries = given
            answer = processes[index].ask(request)
            if over.is_set():
                return
            if answer is not None:
                answers.put((request, answer))
                continue
            processes[index].end()
            processes[index] = _Process(threads)
            if tries < _TRIES:
                waiting.put((request, tries + 1))
            else:
                words = (
                    f"The worker ended {tries} times during this pair, perhaps for lack of memory; use fewer workers."
                )
                answers.put((request, {"figures": {}, "problem": words}))

    crew = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(count)]
    for thread in crew:
        thread.start()
    try:
        for _ in requests:
            while True:
                job.check()
                try:
                    yield answers.get(timeout=_WAIT)
                    break
                except queue.Empty:
                    continue
    finally:
        over.set()
        for _ in crew:
            waiting.put(None)
        for process in processes:
            process.end()
        for thread in crew:
            thread.join(10)
        for process in processes:  # one that a thread started meanwhile
            process.end()


def _dask(
    requests: Sequence[Request], client: Any, options: BatchOptions, job: Job
) -> Iterator[tuple[Request, Answer]]:
    """Yield answers as the workers of a Dask cluster give them; Dask tries a pair again whose worker dies.

    Raises:
        MorphSeekError: no worker can be used.
        Cancelled: the job was.
    """
    from distributed import wait

    seen: set[str] = set()
    usable: set[str] = set()
    left: deque[Request] = deque(requests)
    pending: dict[Any, Request] = {}
    paths = [str(options.output.resolve()), requests[0]["files"]["fixed"], requests[0]["files"]["moving"]]
    try:
        while left or pending:
            if job.is_cancelled:
                raise Cancelled
            workers = set(client.scheduler_info(n_workers=-1)["workers"])
            if workers - seen:
                usable |= _usable(client, workers - seen, options.settings.model, paths, job)
                seen |= workers
            usable &= workers
            if not usable and not (seen - workers):
                raise MorphSeekError("No worker of the cluster can be used; see the sentences above.")
            while left and usable and len(pending) < 2 * len(usable):
                request = left.popleft()
                future = client.submit(register_request, request, pure=False, workers=sorted(usable))
                pending[future] = request
            if not pending:
                time.sleep(_WAIT)
                continue
            try:
                done = wait(list(pending), timeout=1.0, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                continue
            for future in done:
                yield pending.pop(future), _answer(future)
    finally:
        for future in pending:
            future.cancel()


def _answer(future: Any) -> Answer:
    """Return what a task gave, or a sentence for why there is nothing."""
    try:
        answer: Answer = future.result()
    except Exception as error:  # KilledWorker, or the cluster is gone
        words = f"No worker could finish this pair ({type(error).__name__}: {error})."
        return {"figures": {}, "problem": words}
    return answer


def _usable(client: Any, workers: set[str], model: str, paths: list[str], job: Job) -> set[str]:
    """Return the workers that have this version and model and see the files; say which are left out."""
    own = probe(model, [])
    found = client.run(probe, model, paths, workers=sorted(workers), on_error="return")
    usable = set()
    for address, answer in found.items():
        if isinstance(answer, Exception):
            problem = f"it answers {type(answer).__name__}: {answer}; install the same MorphSeek there"
        elif answer["version"] != own["version"]:
            problem = f"it has MorphSeek {answer['version']}, not {own['version']}; install the same version"
        elif answer["model"] != own["model"]:
            problem = "its model file is another one; copy the same file there"
        elif answer["missing"]:
            problem = f"it does not see {answer['missing'][0]}; use a folder that all computers share"
        else:
            usable.add(address)
            continue
        job.report("load", 0.0, f"The worker {address} is left out: {problem}.")
    return usable
