"""Compiled kernels for copies of the package: numba keeps them by the path of the source, and compiling takes 30 s."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import get_args

import MorphSeekLib
from MorphSeekLib.io.compiled import Kernels, cache_folder


def lend_kernels(package: Path) -> None:
    """Let a copy of MorphSeekLib use what was compiled for the checkout.

    It compiles them itself where its sources are others, or where numba keeps them in another way.
    """
    if importlib.util.find_spec("numba") is None:
        return
    from numba.core.caching import UserProvidedCacheLocator

    original = Path(MorphSeekLib.__file__).parent
    for name in get_args(Kernels):
        source, copy = (root.joinpath(*name.split(".")).with_suffix(".py") for root in (original, package))
        if source.read_bytes() != copy.read_bytes():
            continue
        shutil.copystat(source, copy)  # numba knows a source by its path, size and date
        compiled, wanted = (
            cache_folder() / UserProvidedCacheLocator.get_suitable_cache_subpath(str(path)) for path in (source, copy)
        )
        for file in compiled.glob(f"{source.stem}.*"):
            wanted.mkdir(mode=0o700, exist_ok=True)
            shutil.copy(file, wanted)
