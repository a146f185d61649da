"""The lock of an open file, which the system frees when its holder ends, however it ends."""

from __future__ import annotations

import os
from typing import IO

if os.name == "nt":
    import msvcrt
else:
    import fcntl


def try_lock(file: IO, shared: bool = False) -> bool:
    """Take the lock of an open file if no other process holds it; closing the file frees it.

    Args:
        file: open for reading and writing.
        shared: several may hold it so at once, to ask without disturbing each other. Windows knows no shared lock.
    """
    try:
        if os.name == "nt":
            file.seek(1 << 20)  # beyond the text: on Windows nobody else can read what is locked
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
