"""See where a computation would make the processor wait for the device, without a device.

Under :class:`HostSyncs` every operator of PyTorch is looked at. These wait for what was queued before: reading a value,
an operator whose result's size depends on values, a copy between devices, and making a tensor of Python's numbers on a
device other than the processor. The device may be "meta", where nothing is computed: there an operator that needs
values fails.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ENGINE = Path(__file__).resolve().parents[2] / "MorphSeekLib"
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "equal", "allclose", "masked_select",
    "unique_dim", "_unique2", "unique_consecutive", "bincount", "repeat_interleave.Tensor", "argwhere",
}  # fmt: skip
"""Operators that wait."""
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_COPIES = {"_to_copy", "copy_", "to"}


@dataclass(frozen=True)
class Wait:
    """An operator that waits, and the line of the engine that called it, "file:function"."""

    operator: str
    place: str


class HostSyncs:
    """Collect what would wait.

    Attributes:
        waits: in their order.
        made_on: by type of device, the places of the engine whose results lie there.
    """

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.made_on: dict[str, set[str]] = {}
        self._modes = _Operators(self), _Functions(self)

    def __enter__(self) -> HostSyncs:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *problem) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*problem)

    def counted(self) -> Counter[Wait]:
        """Return how often each was met."""
        return Counter(self.waits)

    def note(self, operator: str) -> None:
        """Add one that waits."""
        self.waits.append(Wait(operator, place_of_call()))


class _Operators(TorchDispatchMode):
    """Looks at what is computed."""

    def __init__(self, found: HostSyncs) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        operator = _waits(func, args, out)
        if operator:
            self._found.note(operator)
        for device in {leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}:
            self._found.made_on.setdefault(device, set()).add(place_of_call())
        return out


class _Functions(TorchFunctionMode):
    """Looks at tensors that are made from numbers of Python, which no operator shows."""

    def __init__(self, found: HostSyncs) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            data = args[1] if func is Tensor.new_tensor else args[0]
            if not isinstance(data, Tensor) and out.device.type != "cpu":
                self._found.note("tensor from numbers")
        return out


def _waits(func: Any, args: tuple, out: Any) -> str:
    """Return the operator's name if it waits, else an empty text."""
    name = func.overloadpacket.__name__
    if name in WAITING or f"{name}.{func._overloadname}" in WAITING:
        return name
    if name in _INDEXING and any(_is_mask(leaf) for leaf in tree_leaves(args[1])):
        return f"{name} by a mask"
    if name in _COPIES:
        places = {leaf.device for leaf in (*tree_leaves(args), out) if isinstance(leaf, Tensor)}
        if len(places) > 1:
            return f"copy between {' and '.join(sorted(str(place) for place in places))}"
    return ""


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def place_of_call() -> str:
    """Return the innermost function of the engine that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if ENGINE in file.parents:
            return f"{file.relative_to(ENGINE).as_posix()}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def calls_into(*packages: str) -> Iterator[set[str]]:
    """Collect the functions of packages that are called within, "package.function"."""
    found: set[str] = set()

    def on_call(frame, event: str, argument) -> None:
        if event == "call":
            module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        elif event == "c_call":
            module, name = getattr(argument, "__module__", None) or "", getattr(argument, "__name__", "")
            owner = getattr(argument, "__self__", None)
            if owner is not None and not isinstance(owner, type(sys)):
                module = module or type(owner).__module__
        else:
            return
        if module.split(".")[0] in packages:
            found.add(f"{module}.{name}")

    before = sys.getprofile()
    sys.setprofile(on_call)
    try:
        yield found
    finally:
        sys.setprofile(before)
