"""Who works on many pairs: local processes, or the workers of a Dask cluster."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..protocol.errors import Cancelled, MorphSeekError
from ..protocol.job import Job
from ..protocol.settings import to_json
from ..protocol.settings_file import read_values
from .pair_worker import Answer, Request, answer_request, probe

_TRIES = 2  # of a pair whose worker died
_WAIT = 0.2  # seconds between looks at whether the job was cancelled


@dataclass(frozen=True)
class Crew:
    """Who does the work.

    Attributes:
        workers: local processes.
        threads: of each; None for an equal share of the processor.
        client: a dask.distributed.Client, whose workers take the place of local processes.
    """

    workers: int = 1
    threads: int | None = None
    client: Any = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise MorphSeekError(f"{self.workers} workers were asked for; choose 1 or more.")

    def answers(self, requests: Sequence[Request], job: Job) -> Iterator[tuple[Request, Answer]]:
        """Yield the answers as they come; a pair whose worker dies is tried again.

        Raises:
            MorphSeekError: no worker of a cluster can be used.
            Cancelled: the job was; local workers have ended.
        """
        return _local(requests, self, job) if self.client is None else _spread(requests, self.client, job)


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


class _Process:
    """A local worker."""

    def __init__(self, threads: int) -> None:
        command = [sys.executable, "-m", "MorphSeekLib.app.pair_worker", str(threads)]
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


def _local(requests: Sequence[Request], crew: Crew, job: Job) -> Iterator[tuple[Request, Answer]]:
    """Yield answers as local processes give them; a pair whose process dies is tried once more.

    Raises:
        Cancelled: the job was; the processes have ended.
    """
    count = min(crew.workers, len(requests))
    threads = crew.threads or max(1, (os.cpu_count() or 1) // count)
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

    staff = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(count)]
    for thread in staff:
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
        for _ in staff:
            waiting.put(None)
        for process in processes:
            process.end()
        for thread in staff:
            thread.join(10)
        for process in processes:  # one that a thread started meanwhile
            process.end()


def _spread(requests: Sequence[Request], client: Any, job: Job) -> Iterator[tuple[Request, Answer]]:
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
    models, paths = sorted({request["model"] for request in requests}), requests[0]["paths"]
    try:
        while left or pending:
            if job.is_cancelled:
                raise Cancelled
            workers = set(client.scheduler_info(n_workers=-1)["workers"])
            if workers - seen:
                usable |= _usable(client, workers - seen, models, paths, job)
                seen |= workers
            usable &= workers
            if not usable and not (seen - workers):
                raise MorphSeekError("No worker of the cluster can be used; see the sentences above.")
            while left and usable and len(pending) < 2 * len(usable):
                request = left.popleft()
                future = client.submit(answer_request, request, pure=False, workers=sorted(usable))
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


def _usable(client: Any, workers: set[str], models: list[str], paths: list[str], job: Job) -> set[str]:
    """Return the workers that have this version and models and see the files; say which are left out."""
    own = probe(models, [])
    found = client.run(probe, models, paths, workers=sorted(workers), on_error="return")
    usable = set()
    for address, answer in found.items():
        if isinstance(answer, Exception):
            problem = f"it answers {type(answer).__name__}: {answer}; install the same MorphSeek there"
        elif answer["version"] != own["version"]:
            problem = f"it has MorphSeek {answer['version']}, not {own['version']}; install the same version"
        elif other := [model for model in models if answer["models"][model] != own["models"][model]]:
            problem = f"its file of the model {other[0]} is another one; copy the same file there"
        elif answer["missing"]:
            problem = f"it does not see {answer['missing'][0]}; use a folder that all computers share"
        else:
            usable.add(address)
            continue
        job.report("load", 0.0, f"The worker {address} is left out: {problem}.")
    return usable
