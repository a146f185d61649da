"""Check NIfTI headers by the standards of NIfTI-1 and NIfTI-2 (https://nifti.nimh.nih.gov).

ITK reads the voxels, those of a NIfTI-2 file through a NIfTI-1 copy. This module finds what ITK ignores: a file that is
shorter than its header says, NaN (which becomes zero), and a qform and an sform that do not agree.
"""

from __future__ import annotations

import gzip
import math
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..protocol.errors import MorphSeekError
from ..protocol.startup import shown
from .files import library_name, linked

FORMS = ("qform", "sform")
_FLOATS = {16: "f4", 64: "f8"}
_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MM = {1: 1000.0, 3: 0.001}  # by the header's unit of length: meters, micrometers
_BLOCK = 1 << 22
_LEVEL, _GZIP = 1, 31  # of zlib: fast; with the header of a .gz file
_LENGTH, _LENGTH_2 = 352, 544  # of a header of either version, with what announces extensions
_MAGIC_2 = b"n+2\0\r\n\x1a\n"


@dataclass(frozen=True)
class Header:
    """The fields of a NIfTI header that are used here.

    Attributes:
        version: of the standard, 1 or 2.
        order: "<" or ">", of its bytes.
        shape: voxels along each axis.
        datatype, bits: of a voxel.
        offset: where the voxels begin.
        pixdim: mm along the first three axes, in the header's own unit.
        codes: of the qform and of the sform; 0 says that there is none.
        qform, sform: (4, 4), voxel index -> LPS mm.
    """

    version: int
    order: str
    shape: tuple[int, ...]
    datatype: int
    bits: int
    offset: int
    pixdim: tuple[float, ...]
    codes: tuple[int, int]
    qform: np.ndarray
    sform: np.ndarray

    @property
    def size(self) -> int:
        """How many bytes the voxels take."""
        return math.prod(self.shape) * self.bits // 8

    def form(self, name: str) -> np.ndarray:
        """Return the (4, 4) matrix of "qform" or "sform"."""
        return self.qform if name == "qform" else self.sform

    @property
    def sheared(self) -> bool:
        """Whether the axes of the sform are not at right angles."""
        return is_sheared(self.sform)


@dataclass(frozen=True)
class Disagreement:
    """How far apart the two forms of a header place the image.

    Attributes:
        mm: between the two places of the corner that differs most.
        degrees: between the directions of the axes.
        mirrored: one form is the mirror image of the other.
    """

    mm: float
    degrees: float
    mirrored: bool

    def __str__(self) -> str:
        return f"{self.mm:.1f} mm and {self.degrees:.1f} degrees apart" + (" and mirrored" if self.mirrored else "")


def is_nifti(path: Path) -> bool:
    """Return whether a file's name is that of a NIfTI file."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def is_sheared(affine: np.ndarray) -> bool:
    """Return whether the axes of a (4, 4) matrix are not at right angles."""
    directions = affine[:3, :3] / np.maximum(np.linalg.norm(affine[:3, :3], axis=0), 1e-30)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() > 1e-3)


def read_header(path: Path) -> Header | None:
    """Read the header of a file; None when it is something else.

    Raises:
        EOFError, gzip.BadGzipFile, zlib.error: the file is too short, or wrongly compressed.
    """
    with _opened(path) as file:
        return _parse(file.read(_LENGTH_2))


def scan(path: Path) -> tuple[Header | None, int, int]:
    """Read a whole file: its header (None: it is something else), and how many voxels are NaN and how many infinite.

    Raises:
        EOFError, gzip.BadGzipFile, zlib.error: the file is shorter than its header says, or wrongly compressed.
    """
    nan = infinite = 0
    with _opened(path) as file:
        header = _parse(file.read(_LENGTH_2))
        if header is None:
            return None, 0, 0
        file.seek(header.offset)
        kind = _FLOATS.get(header.datatype)
        left = header.size
        while left > 0:
            wanted = min(left, _BLOCK)
            block = file.read(wanted)
            if len(block) < wanted:
                raise EOFError
            left -= wanted
            if kind is not None:
                values = np.frombuffer(block, header.order + kind)
                nan += int(np.isnan(values).sum())
                infinite += int(np.isinf(values).sum())
        while isinstance(file, gzip.GzipFile) and file.read(_BLOCK):  # as far as the checksum
            pass
    return header, nan, infinite


def nan_voxels(path: Path, header: Header) -> np.ndarray:
    """Return (i, j, k), true where a voxel of the first volume of a file of floats is NaN."""
    shape = (*header.shape, 1, 1)[:3]
    kind = np.dtype(header.order + _FLOATS[header.datatype])
    with _opened(path) as file:
        file.seek(header.offset)
        values = np.frombuffer(file.read(math.prod(shape) * kind.itemsize), kind)
    return np.isnan(values).reshape(shape, order="F")


def disagreement(header: Header) -> Disagreement | None:
    """Compare the two forms; return None if one is absent or both are the same within a tenth of a voxel."""
    if min(header.codes) <= 0:
        return None
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in (*header.shape, 1, 1)[:3]], [1])).reshape(4, -1)
    apart = float(np.linalg.norm(((header.qform - header.sform) @ corners)[:3], axis=0).max())
    if apart <= 0.1 * min(np.linalg.norm(header.qform[:3, :3], axis=0)):
        return None
    turn = nearest_rotation(header.qform[:3, :3]).T @ nearest_rotation(header.sform[:3, :3])
    mirrored = bool(np.linalg.det(turn) < 0)
    cosine = (np.trace(-turn if mirrored else turn) - 1) / 2
    return Disagreement(apart, float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))), mirrored)


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """Return the (3, 3) matrix of right-angled directions (a mirror, where they are mirrored) nearest to a matrix's."""
    left, _, right = np.linalg.svd(matrix / np.maximum(np.linalg.norm(matrix, axis=0), 1e-30))
    return left @ right


def set_codes(path: Path, codes: tuple[int, int]) -> None:
    """Change the form codes of a NIfTI file that is not compressed."""
    with open(path, "r+b") as file:
        header = _parse(file.read(_LENGTH_2))
        if header is None:
            raise ValueError(f"{path} is not a NIfTI file")
        file.seek(252)
        file.write(struct.pack(header.order + "2h", *codes))


def is_complete(path: Path) -> bool:
    """Return whether a NIfTI file that is not compressed is as long as its header says."""
    try:
        header = read_header(path)
    except EOFError:
        return False
    return header is not None and path.stat().st_size >= header.offset + header.size


def compress(source: Path, target: Path) -> None:
    """Write a gzip of a NIfTI file that is not compressed; the same bytes for the same content.

    The digits of floating-point voxels do not repeat: looking for repetitions longer than a run of one byte takes three
    times as long and makes the file no smaller.
    """
    header = read_header(source)
    is_float = header is not None and header.datatype in _FLOATS
    strategy = zlib.Z_RLE if is_float else zlib.Z_DEFAULT_STRATEGY
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP, strategy=strategy)
    with open(source, "rb") as file, open(target, "wb") as sink:
        while block := file.read(_BLOCK):
            sink.write(packer.compress(block))
        sink.write(packer.flush())


@contextmanager
def openable(path: Path, without_forms: bool = False) -> Iterator[str]:
    """Yield a name under which ITK can open a NIfTI file.

    ITK goes by the ending, which it takes in lower case only, and reads NIfTI-1 alone.

    Args:
        without_forms: a copy with nothing but the size of its voxels, for a file whose place ITK refuses.
    """
    ending = ".nii.gz" if _is_packed(path) else ".nii"
    header = read_header(path)
    if without_forms or (header is not None and header.version == 2):
        with tempfile.TemporaryDirectory(prefix="morphseek-") as folder:
            copy = Path(folder) / "image.nii"
            with _opened(path) as file, open(copy, "wb") as sink:
                if header is not None and header.version == 2:
                    sink.write(_as_version_1(file.read(_LENGTH_2), header.order))
                    file.seek(header.offset)
                shutil.copyfileobj(file, sink, _BLOCK)
            if without_forms:
                set_codes(copy, (0, 0))
            yield library_name(copy)
    elif path.name.endswith(ending):
        yield library_name(path)
    else:
        with linked(path, ending) as name:
            yield name


def check(path: Path, nan: bool) -> tuple[Header | None, int]:
    """Refuse a file that ITK would repair without a warning.

    Args:
        nan: whether voxels may be NaN.

    Returns:
        its header, None when it is something else or has fewer than three axes; and how many voxels are NaN.

    Raises:
        MorphSeekError: it is damaged, has voxels that are not finite, or no place in space.
    """
    try:
        header, missing, infinite = scan(path)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise MorphSeekError(
            f"{shown(path)} is damaged or incomplete and cannot be read; copy or export it again."
        ) from None
    if header is None or len(header.shape) < 3:
        return None, 0
    if infinite or (missing and not nan):
        raise MorphSeekError(not_finite(path, infinite + (0 if nan else missing)))
    if not all(math.isfinite(s) and s > 0 for s in header.pixdim):
        raise MorphSeekError(no_spacing(path, header.pixdim))
    _check_sform(path, header)
    return header, missing


def _check_sform(path: Path, header: Header) -> None:
    """Refuse a header whose sform places the voxels nowhere, or says another size than pixdim and is all there is."""
    if header.codes[1] <= 0:
        return
    if not np.isfinite(header.sform).all():
        raise MorphSeekError(singular(path))
    if header.codes[0] > 0:  # ITK, and so Slicer, fall back on it
        return
    norms = np.linalg.norm(header.sform[:3, :3], axis=0)
    if not abs(np.linalg.det(header.sform[:3, :3])) > 1e-6 * np.prod(norms):
        raise MorphSeekError(singular(path))
    # ITK takes the size from pixdim, other programs from the matrix; a sheared matrix gets ITK's own refusal
    stated = np.linalg.norm(header.qform[:3, :3], axis=0)
    if not header.sheared and np.abs(norms / stated - 1).max() > 0.01:
        raise MorphSeekError(
            f"{shown(path)} states two voxel sizes in its header ({by(stated)} mm as pixdim, {by(norms)} mm as sform); "
            "make them agree and save it again."
        )


def not_finite(path: str | os.PathLike, count: int) -> str:
    """Return the sentence for voxels that are not numbers."""
    return (
        f"{shown(path)} has {count} voxels that are NaN or infinite; replace them (with the background's value, for "
        "instance) and save it again."
    )


def no_spacing(path: str | os.PathLike, spacing: tuple[float, ...]) -> str:
    """Return the sentence for voxels without a size."""
    return (
        f"{shown(path)} says that its voxels measure {by(spacing)} mm; every size must be above zero: repair the "
        "header (for instance with Slicer's Volumes module) and save it again."
    )


def singular(path: str | os.PathLike) -> str:
    """Return the sentence for voxels without a place."""
    return (
        f"{shown(path)} has a singular direction matrix in its header, so its voxels have no place in space; repair "
        "the header (for instance with Slicer's Volumes module) and save it again."
    )


def by(numbers: np.ndarray | tuple[float, ...]) -> str:
    """Return "1 x 2 x 3"."""
    return " x ".join(f"{float(n):g}" for n in numbers)


def _is_packed(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _opened(path: Path):
    """Open a file for its content, compressed or not, whatever its name."""
    return gzip.open(path) if _is_packed(path) else open(path, "rb")


def _parse(raw: bytes) -> Header | None:
    """Return a header from a file's first bytes; None when they are no NIfTI header."""
    if len(raw) < _LENGTH:
        raise EOFError
    length = {struct.unpack_from(order + "i", raw)[0]: order for order in "<>"}
    if 348 in length:
        return _header(1, raw, length[348], struct.unpack_from(length[348] + "f", raw, 108)[0])
    if 540 in length and raw[4:12] == _MAGIC_2:
        order = length[540]
        return _header(2, _as_version_1(raw, order), order, struct.unpack_from(order + "q", raw, 168)[0])
    return None


def _header(version: int, raw: bytes, order: str, offset: float) -> Header:
    """Return what a header of NIfTI-1 says, of a file of some version whose voxels begin at ``offset``."""
    dim = struct.unpack_from(order + "8h", raw, 40)
    shape = dim[1 : dim[0] + 1]
    datatype, bits = struct.unpack_from(order + "2h", raw, 70)
    pixdim = struct.unpack_from(order + "8f", raw, 76)
    if not 1 <= dim[0] <= 7 or min(shape) < 1 or not 0 <= offset < 2**31:
        raise EOFError
    mm = np.diag([*[_MM.get(raw[123] & 7, 1.0)] * 3, 1.0])
    rows = np.reshape(struct.unpack_from(order + "12f", raw, 280), (3, 4))
    return Header(
        version,
        order,
        shape,
        datatype,
        bits,
        int(offset),
        pixdim[1:4],
        struct.unpack_from(order + "2h", raw, 252),
        _TO_LPS @ mm @ _from_quaternion(struct.unpack_from(order + "6f", raw, 256), pixdim),
        _TO_LPS @ mm @ np.vstack([rows, [0, 0, 0, 1]]),
    )


def _as_version_1(raw: bytes, order: str) -> bytes:
    """Return a NIfTI-2 header as one of NIfTI-1, 352 bytes: what places and scales the voxels, which follow it at once.

    Raises:
        EOFError: it is too short, or an axis is longer than NIfTI-1 can say. Numbers beyond single precision become
            infinite, for the caller to refuse where they matter.
    """
    if len(raw) < _LENGTH_2:
        raise EOFError

    def field(format: str, at: int) -> tuple:
        return struct.unpack_from(order + format, raw, at)

    def single(format: str, at: int) -> list[float]:
        with np.errstate(over="ignore"):
            return np.asarray(field(format, at)).astype(np.float32).tolist()

    dim, codes, units = field("8q", 16), field("2i", 344), field("i", 500)[0]
    if not all(-(2**15) <= n < 2**15 for n in (*dim, *codes)):
        raise EOFError
    out = bytearray(_LENGTH)
    for format, at, values in (
        ("i", 0, (348,)),
        ("8h", 40, dim),
        ("h", 68, (min(max(field("i", 504)[0], 0), 2**15 - 1),)),  # the intent: a vector, a label
        ("2h", 70, field("2h", 12)),
        ("8f", 76, single("8d", 104)),
        ("f", 108, (float(_LENGTH),)),
        ("2f", 112, single("2d", 176)),
        ("B", 123, (units & 255,)),
        ("2h", 252, codes),
        ("6f", 256, single("6d", 352)),
        ("12f", 280, single("12d", 400)),
        ("4s", 344, (b"n+1\0",)),
    ):
        struct.pack_into(order + format, out, at, *values)
    return bytes(out)


def _from_quaternion(values: tuple[float, ...], pixdim: tuple[float, ...]) -> np.ndarray:
    """Return (4, 4) RAS of the qform's b, c, d and offset, and of pixdim (its first number is the handedness)."""
    b, c, d = values[:3]
    rest = 1 - (b * b + c * c + d * d)
    if rest < 1e-7:  # half a turn: a is 0, and rounding must not make the axes longer
        length = math.sqrt(b * b + c * c + d * d) or 1.0
        a, b, c, d = 0.0, b / length, c / length, d / length
    else:
        a = math.sqrt(rest)
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
    ]
    matrix[:3, :3] *= np.array(pixdim[1:4]) * (1, 1, -1 if pixdim[0] < 0 else 1)
    matrix[:3, 3] = values[3:]
    return matrix
