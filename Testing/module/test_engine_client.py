"""The engine's process from Slicer's side: what arrives, what is borne, and that nothing is left running."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from MorphSeekGui import engine_client, engine_root
from MorphSeekGui.engine_client import EngineCancelled, EngineClient, EngineDied, EngineError, last_words

WORKER = [sys.executable, str(Path(__file__).with_name("echo_worker.py"))]


@pytest.fixture
def client():
    with EngineClient(command=WORKER) as client:
        yield client


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition) -> None:
    """Wait for a condition; the limit only ends a hang."""
    limit = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < limit, "it did not happen within 300 s"
        time.sleep(0.01)


def test_the_process_starts_with_the_first_request_and_stays(client):
    assert not client.running
    first = client.call("echo", {"a": [1, 2.5, "ü"]})
    assert first["echo"] == {"a": [1, 2.5, "ü"]}
    assert client.call("echo")["pid"] == first["pid"] == client.pid


def test_progress_goes_to_the_request_it_belongs_to(client):
    seen = []
    client.call("progress", on_progress=seen.append)
    assert [p["step"] for p in seen] == [1, 2, 3]


def test_requests_are_polled_without_blocking(client):
    a, b = client.request("echo", {"n": 1}), client.request("echo", {"n": 2})
    wait_until(lambda: client.poll() or (a.done and b.done))
    assert (a.value()["echo"]["n"], b.value()["echo"]["n"]) == (1, 2)


def test_cancel_ends_the_request_and_keeps_the_worker(client, monkeypatch):
    """A request that ends by nothing but its cancellation."""
    monkeypatch.setattr(engine_client, "_CANCEL_PATIENCE", 300)
    before = client.call("echo")["pid"]
    asked = itertools.count()
    with pytest.raises(EngineCancelled):
        client.call("wait", cancelled=lambda: next(asked) >= 3)
    assert client.call("echo")["pid"] == client.pid == before


def test_a_worker_that_ignores_cancel_is_ended_with_its_children(client, monkeypatch):
    monkeypatch.setattr(engine_client, "_CANCEL_PATIENCE", 0.3)
    children = []
    with pytest.raises(EngineCancelled):
        client.call("stubborn", on_progress=lambda p: children.append(p["child"]), cancelled=lambda: bool(children))
    wait_until(lambda: not alive(children[0]))
    assert client.call("echo", {"again": True})["echo"] == {"again": True}


def test_errors_keep_their_sentence_and_the_worker_lives(client):
    with pytest.raises(EngineError, match="The fixed image is empty; choose another one") as caught:
        client.call("fail")
    assert caught.value.code == -32000
    with pytest.raises(EngineError) as caught:
        client.call("crash")
    assert caught.value.details == "Traceback ..."
    assert client.call("echo")["pid"] == client.pid


def test_death_is_told_with_the_last_words_and_the_next_request_starts_anew(client):
    with pytest.raises(EngineDied, match=r"exit code 3.*No module named 'torch'") as caught:
        client.call("die")
    assert "Traceback" in caught.value.details
    assert client.call("echo", {"n": 1})["echo"] == {"n": 1}


def test_a_death_between_two_requests_is_told_to_the_first(client):
    first = client.request("die")
    client._process.wait(300)
    assert client.call("echo", {"n": 2})["echo"] == {"n": 2}
    assert isinstance(first.error, EngineDied)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_a_killed_worker_points_at_memory(client):
    waiting = client.request("echo")
    with pytest.raises(EngineDied, match="memory ran out"):
        client.call("killed")
    assert waiting.value()["echo"] == {}


def test_a_worker_that_goes_mute_is_ended(client):
    with pytest.raises(EngineDied):
        client.call("close_stdout")
    assert not client.running


def test_chatter_on_stderr_does_not_block_and_its_tail_is_kept():
    lines = []
    with EngineClient(command=WORKER, on_log=lines.append) as client:
        client.call("chatter")
        client.close()
        assert lines[-1] == client.log[-1] == "warning number 19999: déjà vu"
        assert len(client.log) <= 60


def test_split_lines_and_garbage_are_borne(client):
    assert client.call("split")["text"] == "ä" * 3000
    assert client.call("garbage", {"ok": 1})["echo"] == {"ok": 1}
    assert "Loading model..." in client.log


def test_close_ends_the_process_and_tells_those_who_wait(client):
    pid = client.call("echo")["pid"]
    client.close()
    wait_until(lambda: not alive(pid))
    client.close()  # twice does no harm
    request = client.request("stubborn")
    client.close(patience=0.3)
    with pytest.raises(EngineDied):
        request.value()
    wait_until(lambda: not alive(client.pid))


def test_a_callback_that_raises_leaves_the_client_usable(client):
    def explode(_progress):
        raise RuntimeError("a bug in a panel")

    with pytest.raises(RuntimeError, match="a bug in a panel"):
        client.call("progress", on_progress=explode)
    assert client.call("echo", {"n": 1})["echo"] == {"n": 1}


def test_whoever_names_no_python_gets_the_engine_that_there_is():
    chosen = engine_client.shared_client("/the/users/python")
    try:
        assert engine_client.shared_client() is chosen
        assert engine_client.shared_client("/the/users/python") is chosen
        assert engine_client.shared_client("") is not chosen
    finally:
        engine_client.close_shared_client()


def test_a_python_that_is_not_there_is_one_sentence():
    with pytest.raises(EngineDied, match=r"could not be started with '/no/such/python'"):
        EngineClient(python="/no/such/python").call("hello")


FATAL = """Python path configuration:
  PYTHONHOME = '/opt/Slicer/lib/Python'
Fatal Python error: init_fs_encoding: failed to get the Python codec of the filesystem encoding
Python runtime state: core initialized
ModuleNotFoundError: No module named 'encodings'

Current thread 0x00007f7f7e61fb80 (most recent call first):
  <no Python frame>
"""
SEGMENTATION = """Loading
Fatal Python error: Segmentation fault

Current thread 0x00007f0a (most recent call first):
  File "/x/worker.py", line 12 in register
Extension modules: numpy._core, torch._C (total: 41)
"""
RAISED = """Traceback (most recent call last):
  File "worker.py", line 1, in <module>
    import torch
torch.AcceleratorError: CUDA error: no kernel image is available
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.

"""
WARNED = """bash: line 1: PythonSlicer: cannot execute
/usr/lib/python3.12/multiprocessing/resource_tracker.py:224: UserWarning: resource_tracker: leaked semaphores
  warnings.warn('resource_tracker')
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            FATAL,
            "Fatal Python error: init_fs_encoding: failed to get the Python codec of the filesystem encoding; "
            "ModuleNotFoundError: No module named 'encodings'",
        ),
        (SEGMENTATION, "Fatal Python error: Segmentation fault"),
        (RAISED, "torch.AcceleratorError: CUDA error: no kernel image is available"),
        (WARNED, "bash: line 1: PythonSlicer: cannot execute"),
        ("", ""),
    ],
)
def test_of_a_log_the_line_with_the_reason_is_quoted(log, reason):
    assert last_words(log.splitlines()) == reason


def test_a_python_that_cannot_begin_says_why(tmp_path):
    environment = os.environ | {"PYTHONHOME": str(tmp_path)}
    with pytest.raises(EngineDied, match=r"exit code 1\).*init_fs_encoding.*No module named 'encodings'"):
        EngineClient(python=sys.executable, environment=environment).call("hello")


def test_it_imports_neither_slicer_nor_torch():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import MorphSeekGui.engine_client; "
        "sys.exit(bool({'slicer', 'vtk', 'qt', 'torch', 'MorphSeekLib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(Path(engine_client.__file__).parents[1])]).returncode == 0


def test_the_engine_is_found_beside_the_module():
    assert (engine_root() / "MorphSeekLib" / "space" / "geometry.py").is_file()
    assert Path(engine_client.default_python()).name.lower().startswith("python")
