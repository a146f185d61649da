"""Where the network runs, and in which precision.

Grids, composition, similarities and Jacobians stay in float32 everywhere; only the network's convolutions are cast, and
only where that was measured to gain: bfloat16 on processors with instructions for it, AMX (five times faster, Dice
equal to 0.0002) or AVX-512 BF16, half precision on CUDA. MORPHSEEK_PRECISION=float32 in the environment forbids it.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

import torch
from torch import nn

from ..backbones.memory import channels_last
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.lock import try_lock
from ..protocol.startup import check_device, check_threads

if TYPE_CHECKING:
    from typing_extensions import NotRequired  # Python 3.10 has none

_ALL_THREADS = torch.get_num_threads()
_LOOK = 0.02  # seconds between looks at whether a GPU is free

Model = TypeVar("Model", bound=nn.Module)


def pick_device(name: str = "auto") -> torch.device:
    """Return a torch device from "auto" (the first CUDA device, else the CPU), "cpu" or "cuda:N".

    Raises:
        MorphSeekError: an unknown name, or CUDA asked for where there is none.
    """
    check_device(name)
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    number = name.partition(":")[2]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise MorphSeekError(
            f"The device {name} was asked for, but PyTorch sees no CUDA GPU here; use --device cpu, or install a CUDA "
            "build of PyTorch and a driver that fits."
        )
    if int(number or 0) >= count:
        raise MorphSeekError(f"The device {name} was asked for, but the last GPU here is cuda:{count - 1}.")
    return torch.device("cuda", int(number or 0))


def use_threads(count: int | None = None) -> None:
    """Set the number of the processor's threads to compute with, in PyTorch and in SimpleITK.

    Args:
        count: 1 or more; None for as many as there were at the start, which is all unless the environment says less.

    Raises:
        MorphSeekError: a count below one.
    """
    from ..io.images import use_simpleitk_threads  # the rest of this module needs PyTorch alone

    if count is not None:
        check_threads(count)
    torch.set_num_threads(count or _ALL_THREADS)
    use_simpleitk_threads(count)


@contextmanager
def gpu_turn(device: torch.device, job: Job = SILENT) -> Iterator[None]:
    """Wait until none of this user's processes on this computer that also ask has its turn on a GPU, then take it.

    Args:
        device: of the processor there is no turn to wait for.
        job: asked while waiting.

    Raises:
        Cancelled: the job was.
    """
    if device.type != "cuda":
        yield
        return
    card = torch.cuda.get_device_properties(device)
    user = os.getuid() if os.name == "posix" else os.environ.get("USERNAME", "")
    name = f"morphseek-{user}-{getattr(card, 'uuid', device.index)}.lock"  # cuda:0 may be another card elsewhere
    file = os.open(Path(tempfile.gettempdir()) / name, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    with os.fdopen(file, "r+b") as lock:
        while not try_lock(lock):
            job.check()
            time.sleep(_LOOK)
        yield


class DeviceEntry(TypedDict):
    """A device, as the panel lists it; the free memory, bytes, of GPUs only."""

    name: str
    label: str
    free_bytes: NotRequired[int]


def describe_devices() -> list[DeviceEntry]:
    """Return every device: the GPUs in their order, then the processor."""
    devices: list[DeviceEntry] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, _ = torch.cuda.mem_get_info(index)
        devices.append({"name": f"cuda:{index}", "label": torch.cuda.get_device_name(index), "free_bytes": free})
    return [*devices, {"name": "cpu", "label": f"CPU ({torch.get_num_threads()} threads)"}]


def network_precision(device: torch.device) -> torch.dtype:
    """Return the type that convolutions run in on a device."""
    if os.environ.get("MORPHSEEK_PRECISION") == "float32":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu" and _has_bfloat16():
        return torch.bfloat16
    return torch.float32


def place(model: Model, device: torch.device) -> Model:
    """Move a network to a device, in the memory layout its convolutions are fastest in there."""
    model = model.to(device)
    return model if network_precision(device) == torch.float32 else channels_last(model)


def network_autocast(device: torch.device) -> torch.autocast:
    """Return the context to call the network in."""
    dtype = network_precision(device)
    low = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if low else torch.bfloat16, enabled=low)


def training_autocast(device: torch.device, coarsest: int | None = None) -> torch.autocast:
    """Return the context to train the network in: bfloat16 where :func:`network_autocast` has it, never float16.

    bfloat16 has the exponents of float32, so that gradients need no scaling; float16 would.

    Args:
        coarsest: voxels of the coarsest feature along the first axis. On a processor, features of exactly two there are
            trained in float32: torch 2.13's bfloat16 gradient of a 3x3x3 convolution then reads memory that nothing was
            written to, and is NaN or noise. (A feature of one voxel is followed by one of two.)
    """
    safe = network_precision(device) == torch.bfloat16
    if device.type == "cpu" and coarsest is not None and coarsest <= 2:
        safe = False
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=safe)


@contextmanager
def memory_advice(device: torch.device) -> Iterator[None]:
    """Turn an allocation that failed into a sentence with advice.

    Raises:
        MorphSeekError: the GPU's or the computer's memory did not suffice.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        failed = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
        if not failed:
            raise
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            advice = "close other programs that use the GPU, or use --device cpu"
        else:
            advice = "close other programs, or crop or resample the fixed image to coarser voxels"
        where = f"The memory of {device}" if device.type == "cuda" else "The computer's memory"
        raise MorphSeekError(f"{where} does not suffice for this pair; {advice}.") from error


@lru_cache
def _has_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 itself; emulated, it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
