"""MIND-SSC and forces between descriptors, without gradient, compiled for the CPU by numba; see :mod:`.similarity`.

Every function works on a slab of planes along i, keeps nothing, and releases Python's lock, so that slabs run side by
side.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_FAST = {"contract", "reassoc", "nsz", "arcp"}


@njit(nogil=True, cache=True, fastmath=_FAST)
def _boxed_squares(padded, starts, pairs, reach, p, half, plane):
    """Write of each pair the squared differences in plane p, summed over windows along k and j.

    The edge's squares hold beyond it.
    """
    n_j, n_k = plane.shape[1], plane.shape[2]
    for c in range(len(pairs)):
        one, other = starts[pairs[c, 0]], starts[pairs[c, 1]]
        for q in range(n_j):
            a = padded[p + one[0], q + one[1], one[2] : one[2] + n_k]
            b = padded[p + other[0], q + other[1], other[2] : other[2] + n_k]
            line = half[q]
            for r in range(n_k):
                d = a[r] - b[r]
                line[reach + r] = d * d
            for r in range(reach):
                line[r], line[reach + n_k + r] = line[reach], line[reach + n_k - 1]
        for q in range(n_j):
            out = plane[c, q]
            out[:] = 0
            for step in range(-reach, reach + 1):
                line = half[min(max(q + step, 0), n_j - 1)]
                for shift in range(2 * reach + 1):
                    moved = line[shift : shift + n_k]
                    for r in range(n_k):
                        out[r] += moved[r]


@njit(nogil=True, cache=True, fastmath=_FAST)
def self_similarity(padded, starts, pairs, reach, distance, scale, begin, end):
    """Write how far the patches of each pair are apart, less the least, and the mean of that.

    Args:
        padded: the image, ``starts`` largest entry longer along each axis, its edge's values around it.
        starts: (6, 3), where each neighbor's patch begins in it.
        pairs: (12, 2) of neighbors.
        reach: of the patches, voxels.
        distance: (12, i, j, k), written.
        scale: (i, j, k), written.
    """
    n_i, n_j, n_k = scale.shape
    size = 2 * reach + 1
    ring = np.empty((size, len(pairs), n_j, n_k), np.float32)
    half = np.empty((n_j, n_k + 2 * reach), np.float32)
    whole = np.float32(1 / size**3)
    ready = -1
    for p in range(begin, end):
        for at in range(max(ready + 1, max(p - reach, 0)), min(p + reach, n_i - 1) + 1):
            _boxed_squares(padded, starts, pairs, reach, at, half, ring[at % size])
            ready = at
        for q in range(n_j):
            least, mean = scale[p, q], np.zeros(n_k, np.float32)
            for c in range(len(pairs)):
                out = distance[c, p, q]
                out[:] = 0
                for step in range(-reach, reach + 1):
                    line = ring[min(max(p + step, 0), n_i - 1) % size, c, q]
                    for r in range(n_k):
                        out[r] += line[r]
                for r in range(n_k):
                    out[r] *= whole
                    mean[r] += out[r]
                    least[r] = out[r] if c == 0 else min(least[r], out[r])
            for c in range(len(pairs)):
                out = distance[c, p, q]
                for r in range(n_k):
                    out[r] -= least[r]
            for r in range(n_k):
                least[r] = mean[r] / np.float32(len(pairs)) - least[r]


@njit(nogil=True, cache=True, fastmath=_FAST)
def forces(moving, fixed, out, begin, end):
    """Write sum_c (F_c - M_c) grad M_c, and the sum of squares of grad M and F - M.

    Differences are central, one-sided at the edges.

    Args:
        moving, fixed: (channels, i, j, k).
        out: (4, i, j, k): the force along i, j and k, and the energy; written.
    """
    n_i, n_j, n_k = moving.shape[1:]
    for i in range(begin, end):
        i0, i1 = max(i - 1, 0), min(i + 1, n_i - 1)
        by_i = np.float32(1 / (i1 - i0))
        for j in range(n_j):
            j0, j1 = max(j - 1, 0), min(j + 1, n_j - 1)
            by_j = np.float32(1 / (j1 - j0))
            f_i, f_j, f_k, energy = out[0, i, j], out[1, i, j], out[2, i, j], out[3, i, j]
            f_i[:], f_j[:], f_k[:], energy[:] = 0, 0, 0, 0
            for c in range(moving.shape[0]):
                here, there = moving[c, i, j], fixed[c, i, j]
                down, up, left, right = moving[c, i0, j], moving[c, i1, j], moving[c, i, j0], moving[c, i, j1]
                for k in range(n_k):
                    d = there[k] - here[k]
                    g_i, g_j = (up[k] - down[k]) * by_i, (right[k] - left[k]) * by_j
                    f_i[k] += d * g_i
                    f_j[k] += d * g_j
                    energy[k] += d * d + g_i * g_i + g_j * g_j
                for k in range(1, n_k - 1):
                    g = np.float32(0.5) * (here[k + 1] - here[k - 1])
                    f_k[k] += (there[k] - here[k]) * g
                    energy[k] += g * g
                for k, g in ((0, here[1] - here[0]), (n_k - 1, here[n_k - 1] - here[n_k - 2])):
                    f_k[k] += (there[k] - here[k]) * g
                    energy[k] += g * g
