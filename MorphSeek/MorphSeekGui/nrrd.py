"""Volumes as compressed NRRD files (https://teem.sourceforge.net/nrrd/format.html), written piece by piece.

A panel must not stand still while it writes: MRML's storage node compresses a whole volume in one call, for seconds.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .scene import Image

_PIECE = 2_000_000  # bytes of voxels; compressed in some hundredths of a second
_LEVEL = 1  # of zlib, the fastest
_GZIP = 31  # zlib's window bits for a gzip header and trailer


def write_nrrd(image: Image, path: Path) -> Iterator[int]:
    """Write a volume, or a displacement field (3, i, j, k); yields the bytes of each piece that is written.

    Raises:
        OSError: the file cannot be written.
    """
    voxels = np.ascontiguousarray(image.array.T).data.cast("B")  # components run fastest, then i
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
    with open(path, "wb") as file:
        file.write(_header(image).encode("ascii"))
        for begin in range(0, len(voxels), _PIECE):
            piece = voxels[begin : begin + _PIECE]
            file.write(packer.compress(piece))
            yield len(piece)
        file.write(packer.flush())


def _header(image: Image) -> str:
    columns = [_vector(image.affine[:3, axis]) for axis in range(3)]
    field = image.array.ndim == 4
    kind = image.array.dtype
    floats, integers = {4: "float", 8: "double"}, {"i": "int", "u": "uint", "b": "uint"}
    name = floats[kind.itemsize] if kind.kind == "f" else f"{integers[kind.kind]}{8 * kind.itemsize}"
    order = sys.byteorder if kind.byteorder in "=|" else {"<": "little", ">": "big"}[kind.byteorder]
    lines = (
        "NRRD0004",
        f"type: {name}",
        f"dimension: {image.array.ndim}",
        "space: left-posterior-superior",
        f"sizes: {' '.join(map(str, image.array.shape))}",
        f"space directions: {' '.join((['none'] if field else []) + columns)}",
        f"kinds: {'vector ' if field else ''}domain domain domain",
        f"endian: {order}",
        "encoding: gzip",
        f"space origin: {_vector(image.affine[:3, 3])}",
    )
    return "\n".join(lines) + "\n\n"


def _vector(values: np.ndarray) -> str:
    return f"({','.join(repr(float(value)) for value in values)})"
