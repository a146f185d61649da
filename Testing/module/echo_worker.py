"""A tiny process that speaks the worker's protocol and misbehaves on demand: the faults that engine_client must bear.

Methods: echo, progress, wait (until cancelled), stubborn (ignores cancel), fail, crash, sleep_child, chatter, split,
garbage, die, killed, close_stdout.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time


def send(message: dict) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def main() -> None:
    inbox: queue.Queue = queue.Queue()
    cancelled: set[int] = set()

    def read() -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if message["method"] == "cancel":
                cancelled.add(message["params"]["id"])
            else:
                inbox.put(message)
        inbox.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (message := inbox.get()) is not None:
        answer(message["id"], message["method"], message["params"], cancelled)


def answer(number: int, method: str, params: dict, cancelled: set[int]) -> None:
    result = {"echo": params, "pid": os.getpid()}
    if method == "progress":
        for step in (1, 2, 3):
            fraction = step / 3
            send({"method": "progress", "params": {"id": number, "step": step, "steps": 3, "fraction": fraction}})
        send({"method": "progress", "params": {"id": 99999, "fraction": 1.0}})  # of no one
    elif method == "wait":
        while number not in cancelled:
            time.sleep(0.01)
        send({"id": number, "error": {"code": -32800, "message": "cancelled"}})
        return
    elif method == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        send({"method": "progress", "params": {"id": number, "child": child.pid}})
        time.sleep(600)
    elif method == "fail":
        send({"id": number, "error": {"code": -32000, "message": "The fixed image is empty; choose another one."}})
        return
    elif method == "crash":
        send({"id": number, "error": {"code": -32603, "message": "internal error", "data": "Traceback ..."}})
        return
    elif method == "chatter":
        sys.stderr.write("".join(f"warning number {n}: déjà vu\n" for n in range(20000)))
        sys.stderr.flush()
    elif method == "split":
        text = json.dumps({"jsonrpc": "2.0", "id": number, "result": {"text": "ä" * 3000}}, ensure_ascii=False)
        data = text.encode() + b"\n"
        for begin in range(0, len(data), 1001):  # odd on purpose: cuts two-byte letters apart
            sys.stdout.buffer.write(data[begin : begin + 1001])
            sys.stdout.buffer.flush()
            time.sleep(0.005)
        return
    elif method == "garbage":
        sys.stdout.buffer.write(
            b'Loading model...\n\n[1, 2]\n{"half": \n\xff\xfe\x00\n{"jsonrpc": "2.0", "id": 4711}\n'
        )
        sys.stdout.flush()
    elif method == "die":
        sys.stderr.write("Traceback (most recent call last):\n  ...\nModuleNotFoundError: No module named 'torch'\n")
        sys.stderr.flush()
        os._exit(3)
    elif method == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif method == "close_stdout":
        os.close(1)
        time.sleep(600)
    send({"id": number, "result": result})


if __name__ == "__main__":
    main()
