"""The process of the engine as Slicer sees it: started, asked in lines of JSON, watched, ended.

One JSON-RPC 2.0 message a line, requests to the worker's stdin, answers and progress from its stdout; its stderr is a
free log. Two reader threads only fill a queue: every callback runs in the thread that calls :meth:`EngineClient.poll`
(a timer) or :meth:`EngineClient.call` (a script), so no one needs a lock. Neither slicer nor qt is imported.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from . import engine_root
from .faults import Fault, FaultError

if TYPE_CHECKING:
    from MorphSeekLib.protocol.messages import Answer, ErrorMessage, Params, Progress

CANCELLED = -32800  # the code with which the worker answers a cancelled request
_TAIL = 60  # lines of the worker's log that are kept
_CANCEL_PATIENCE = 10.0  # seconds that a worker may take to give in before it is ended


class EngineError(FaultError):
    """The engine could not do what was asked: a fault of its process, or a sentence that it said itself.

    Attributes:
        code: JSON-RPC code, 0 when the process itself failed.
        details: traceback or the end of the engine's log, for those who want to know more; may be empty.
    """

    def __init__(self, told: Fault | str, code: int = 0, details: str = "", **values: object) -> None:
        super().__init__(told, **values)
        self.code = code
        self.details = details


class EngineDied(EngineError):
    """The process ended, or never started; the next request starts a new one."""


class EngineCancelled(EngineError):
    """The user canceled the request."""


@dataclass(eq=False)
class Request:
    """A request under way: poll the client until ``done``, then take ``result`` or raise ``error``."""

    id: int
    method: str
    on_progress: Callable[[Progress], None] | None = None
    done: bool = False
    result: Answer = field(default_factory=dict)
    error: EngineError | None = None
    cancelled_at: float | None = None

    def value(self) -> Answer:
        """Return the result of a finished request.

        Raises:
            EngineError: what went wrong instead.
        """
        if self.error is not None:
            raise self.error
        return self.result


class EngineClient:
    """One worker process, started with the first request and alive between requests, so that a second registration
    pays for no import and no model load.

    Args:
        python: the Python that runs the engine; by default Slicer's own, or the running one outside Slicer.
        command: the whole command line instead, for tests and for an engine elsewhere (say, through ssh).
        on_log: called with each line that the worker logs, while polling.
        environment: variables that the process gets; by default those of this process.
    """

    def __init__(
        self,
        python: str | os.PathLike | None = None,
        command: Sequence[str] | None = None,
        on_log: Callable[[str], None] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._environment = environment
        self._command = list(command) if command else [str(python or default_python()), "-m", "MorphSeekLib.app.worker"]
        self._on_log = on_log
        self._process: subprocess.Popen | None = None
        self._readers: list[threading.Thread] = []
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._pending: dict[int, Request] = {}
        self._next_id = 1
        self.log: deque[str] = deque(maxlen=_TAIL)

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return bool(self._pending)

    @property
    def pid(self) -> int | None:
        """The process's number, None before the first request."""
        return self._process.pid if self._process else None

    def request(
        self, method: str, params: Params | None = None, on_progress: Callable[[Progress], None] | None = None
    ) -> Request:
        """Ask, without waiting. Call :meth:`poll` (from a timer) until the returned request is done.

        Args:
            method: "hello", "load", "info", "register" or "shutdown".
            params: what the method wants, as JSON can hold it.
            on_progress: called with each progress message of this request, a dict (phase, step, steps, fraction,
                message, metrics).

        Raises:
            EngineDied: the process cannot be started.
        """
        if not self.running:
            self._take_leave()
            self._start()
        request = Request(self._next_id, method, on_progress)
        self._next_id += 1
        self._pending[request.id] = request
        self._send({"jsonrpc": "2.0", "id": request.id, "method": method, "params": params or {}})
        return request

    def cancel(self, request: Request) -> None:
        """Ask the worker to cancel a request; it is done, with :class:`EngineCancelled`, when the worker says so, or
        when its patience is over and the process is ended."""
        if not request.done and request.cancelled_at is None:
            request.cancelled_at = time.monotonic()
            self._send({"jsonrpc": "2.0", "method": "cancel", "params": {"id": request.id}})

    def forget(self, of: str) -> None:
        """Tell a worker that runs to keep the images of the registration into the folder ``of`` no longer."""
        if self.running:
            self._send({"jsonrpc": "2.0", "method": "forget", "params": {"of": of}})

    def call(
        self,
        method: str,
        params: Params | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Answer:
        """Ask and wait for the answer.

        Args:
            method, params, on_progress: as for :meth:`request`.
            cancelled: asked about ten times a second; True cancels. A good place to let the application breathe
                (``slicer.app.processEvents()``).

        Raises:
            EngineCancelled, EngineDied, EngineError: what the names say.
        """
        request = self.request(method, params, on_progress)
        try:
            while not request.done:
                if cancelled is not None and cancelled():
                    self.cancel(request)
                self.poll(wait=0.1)
        except BaseException:  # Ctrl+C, or a callback that raised: do not leave the worker computing for no one
            self.cancel(request)
            request.on_progress = None
            raise
        return request.value()

    def poll(self, wait: float = 0.0) -> None:
        """Handle what has arrived.

        Args:
            wait: seconds to wait for a first message if there is none.
        """
        with contextlib.suppress(queue.Empty):
            source, line = self._inbox.get(timeout=wait) if wait > 0 else self._inbox.get_nowait()
            while True:
                self._handle(source, line)
                source, line = self._inbox.get_nowait()
        now = time.monotonic()
        stuck = [r for r in self._pending.values() if r.cancelled_at and now - r.cancelled_at > _CANCEL_PATIENCE]
        if stuck:
            self._kill()

    def close(self, patience: float = 5.0) -> None:
        """End the process: its stdin is closed, which tells it to leave; after ``patience`` seconds it and its
        children are killed. Requests under way end with :class:`EngineDied`."""
        if self._process is None:
            return
        _close_input(self._process)
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._kill()
        self._take_leave()
        self._fail_pending(Fault.ENGINE_CLOSED)

    def _take_leave(self) -> None:
        """Read the last messages of a process that has ended, and end its requests."""
        if self._process is None:
            return
        for reader in self._readers:
            reader.join(2.0)
        self.poll()
        _close_input(self._process)

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                **process_of_its_own(self._environment),
            )
        except OSError as problem:
            program, reason = self._command[0], problem.strerror or problem
            raise EngineDied(Fault.ENGINE_NOT_STARTED, program=program, reason=reason) from problem
        self.log.clear()
        self._inbox = queue.SimpleQueue()
        self._readers = [
            threading.Thread(target=_read, args=(stream, name, self._inbox), daemon=True)
            for stream, name in ((self._process.stdout, "out"), (self._process.stderr, "log"))
        ]
        for reader in self._readers:
            reader.start()

    def _send(self, message: Mapping[str, object]) -> None:
        line = json.dumps(message).encode() + b"\n"
        if self._process is None or self._process.stdin is None:
            return
        # a worker that is gone shows as the end of its stdout, which poll() reports with its last words
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _handle(self, source: str, line: str | None) -> None:
        if line is None:
            if source == "out":
                self._handle_end()
            return
        message = _parse(line) if source == "out" else None
        if message is None:  # the log, or a library that prints to stdout
            self._keep(line)
            return
        params = message.get("params") or {}
        if message.get("method") == "progress":
            request = self._pending.get(params.get("id", 0))
            if request is not None and request.on_progress is not None:
                request.on_progress(cast("Progress", params))
            return
        request = self._pending.pop(message.get("id", 0), None)
        if request is None:
            return
        if "error" in message:
            request.error = _error(message["error"])
        else:
            request.result = message.get("result") or {}
        request.done = True

    def _handle_end(self) -> None:
        """End the requests of a worker whose stdout has ended."""
        if self._process is None:
            return
        try:
            code = self._process.wait(2.0)
        except subprocess.TimeoutExpired:  # stdout was closed but the process is still running: of no use any more
            self._kill()
            code = self._process.wait()
        self._readers[1].join(2.0)
        with contextlib.suppress(queue.Empty):
            while True:
                _, line = self._inbox.get_nowait()
                if line is not None:
                    self._keep(line)
        reason = last_words(self.log)
        if code in (-9, 137):  # SIGKILL: what Linux does when memory runs out
            self._fail_pending(Fault.ENGINE_KILLED)
        elif reason:
            self._fail_pending(Fault.ENGINE_DIED, exit_code=code, reason=reason)
        else:
            self._fail_pending(Fault.ENGINE_DIED_SILENTLY, exit_code=code)

    def _fail_pending(self, fault: Fault, **values: object) -> None:
        details = "\n".join(self.log)
        for request in self._pending.values():
            if request.cancelled_at is None:
                request.error = EngineDied(fault, 0, details, **values)
            else:
                request.error = EngineCancelled(Fault.CANCELLED, CANCELLED, details)
            request.done = True
        self._pending.clear()

    def _keep(self, line: str) -> None:
        self.log.append(line)
        if self._on_log is not None:
            self._on_log(line)

    def _kill(self) -> None:
        """End the process and its children, without asking."""
        if self._process is None or not self.running:
            return
        if sys.platform == "win32":
            subprocess.run(
                ["taskkill", "/F", "/T", "/PID", str(self._process.pid)],
                capture_output=True,
                check=False,
                creationflags=subprocess.CREATE_NO_WINDOW,
            )
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)


def _close_input(process: subprocess.Popen) -> None:
    """Close a process's standard input, which tells it to leave."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def default_python() -> str:
    """Return the Python for the engine: PythonSlicer inside Slicer, where sys.executable may be the application."""
    if Path(sys.executable).stem.lower().startswith("python"):
        return sys.executable
    name = "PythonSlicer.exe" if os.name == "nt" else "PythonSlicer"
    here = Path(sys.executable).resolve().parent
    for folder in (here, here / "bin", here.parent / "bin"):
        if (folder / name).is_file():
            return str(folder / name)
    return shutil.which("PythonSlicer") or sys.executable


class ProcessArguments(TypedDict, total=False):
    """Arguments of subprocess.Popen."""

    env: dict[str, str]
    creationflags: int
    start_new_session: bool


def process_of_its_own(environment: Mapping[str, str] | None = None) -> ProcessArguments:
    """Return the arguments of subprocess.Popen for a process of the engine.

    It finds MorphSeekLib, and has a group of its own: the whole tree can be ended (Slicer's PythonSlicer is a launcher
    with a child), and neither Slicer's end nor a Ctrl+C in its terminal reaches it.

    Args:
        environment: the variables it gets; by default those of this process. Slicer's launcher has set PYTHONHOME,
            PYTHONPATH and LD_LIBRARY_PATH there, with which no Python but Slicer's own can run.
    """
    environment = dict(os.environ if environment is None else environment)
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    root = engine_root()
    if root is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    if sys.platform == "win32":
        flags = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
        return {"env": environment, "creationflags": flags}
    return {"env": environment, "start_new_session": True}


# what Python, its fault handler and its libraries write after the reason
_AFTERWORDS = re.compile(
    r"\s|<no Python frame>|(Current thread|Thread) 0x|Extension modules:|Python runtime state:|\S+:\d+: \w*Warning:"
)
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(: .+)?$")


def last_words(log: Iterable[str]) -> str:
    """Return the line of a process's log that says why it ended; "" when the log is empty.

    That is seldom the last one: Python writes its state after a fatal error, an exception's text may have many lines,
    and libraries warn while they are unloaded.
    """
    lines = [line.rstrip() for line in log if line.strip()]
    fatal = next((n for n, line in enumerate(lines) if line.startswith("Fatal Python error: ")), None)
    if fatal is not None:
        causes = (line for line in lines[fatal + 1 :] if not _AFTERWORDS.match(line) and _EXCEPTION.match(line))
        return "; ".join([lines[fatal], *list(causes)[:1]])
    trace = max((n for n, line in enumerate(lines) if line.startswith("Traceback (most recent")), default=None)
    if trace is not None:
        raised = next((line for line in lines[trace + 1 :] if not line[0].isspace()), None)
        if raised is not None:
            return raised
    told = (line.strip() for line in reversed(lines) if not _AFTERWORDS.match(line))
    return next(told, lines[-1].strip() if lines else "")


_shared: EngineClient | None = None
_shared_python = ""


def shared_client(
    python: str | os.PathLike | None = None, environment: Callable[[], Mapping[str, str] | None] = lambda: None
) -> EngineClient:
    """Return the one engine of this application, which ends with it.

    Args:
        python: the Python that runs it, empty for Slicer's own; another one than before ends the engine and starts a
            new one. None takes the engine that there is, or Slicer's own Python for a new one.
        environment: returns the variables for that Python, see :func:`process_of_its_own`; asked for a new engine.
    """
    global _shared, _shared_python
    if _shared is None or (python is not None and str(python) != _shared_python):
        close_shared_client()
        _shared, _shared_python = EngineClient(python or None, environment=environment()), str(python or "")
    return _shared


def close_shared_client() -> None:
    """End the engine of the application; the next call of :func:`shared_client` starts a new one."""
    global _shared
    if _shared is not None:
        _shared.close()
        _shared = None


atexit.register(close_shared_client)


def _read(stream, name: str, inbox: queue.SimpleQueue) -> None:
    with stream:
        for line in stream:
            inbox.put((name, line.decode("utf-8", "replace").rstrip("\r\n")))
    inbox.put((name, None))


def _parse(line: str) -> Mapping[str, Any] | None:
    """Return the JSON-RPC message of a line; None if it is something else."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and message.get("jsonrpc") == "2.0" else None


def _error(error: ErrorMessage) -> EngineError:
    code, text, data = error.get("code", 0), str(error.get("message", "")), error.get("data")
    details = data if isinstance(data, str) else json.dumps(data) if data else ""
    if code == CANCELLED:
        return EngineCancelled(Fault.CANCELLED, code, details)
    return EngineError(text or Fault.ENGINE_SAID_NOTHING, code, details)
