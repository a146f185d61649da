"""The proof's bounds compiled for the CPU by numba: the same as those of :mod:`.folds`, several times as fast.

They keep nothing and release Python's lock. :func:`cheap_bound` works on short rows of cells along k, copied into one
buffer with fixed places, which is what lets the compiler take several cells at once.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_ROW, _STRIDE = 32, 40  # cells of a row, and places of a line of its nodes in the buffer
_SLACK = np.float32(64 * np.finfo(np.float32).eps)  # see :func:`.folds.cheap_bound`


@njit(nogil=True, cache=True, inline="always")
def _edge(nodes, tail, head, rest):
    """Return where an edge between two places of the buffer leads: what moves its ends, and the edge at rest."""
    return (
        nodes[head] - nodes[tail] + rest[0],
        nodes[head + _STRIDE] - nodes[tail + _STRIDE] + rest[1],
        nodes[head + 2 * _STRIDE] - nodes[tail + 2 * _STRIDE] + rest[2],
    )


@njit(nogil=True, cache=True, inline="always")
def _determinant(s, t, r):
    return s[0] * (t[1] * r[2] - t[2] * r[1]) + s[1] * (t[2] * r[0] - t[0] * r[2]) + s[2] * (t[0] * r[1] - t[1] * r[0])


@njit(nogil=True, cache=True, inline="always")
def _square(a):
    return a[0] * a[0] + a[1] * a[1] + a[2] * a[2]


@njit(nogil=True, cache=True, inline="always")
def _squared_distance(a, b):
    return _square((a[0] - b[0], a[1] - b[1], a[2] - b[2]))


@njit(nogil=True, cache=True, inline="always")
def _longest(a, b, c, d):
    """Return the length of the longest of four edges."""
    return np.sqrt(max(max(_square(a), _square(b)), max(_square(c), _square(d))))


@njit(nogil=True, cache=True, inline="always")
def _bend(a, b, c, d):
    """Return the larger of the distances between a and b, and c and d."""
    return np.sqrt(max(_squared_distance(a, b), _squared_distance(c, d)))


@njit(nogil=True, cache=True, fastmath={"contract"})
def cheap_bound(displacement, edges, per_volume, first, bound):
    """Bound the determinant in each cell of a block from below.

    Args:
        displacement: (3, i, j, k) float32 of the whole grid, mm.
        edges: (3, 3) float32; rows: the edges of a cell at rest, mm.
        per_volume: float32, what a determinant is multiplied by to be relative to a cell that keeps its shape.
        first: the i and j of the block's first cell.
        bound: (i, j, k) float32, written.
    """
    edge_s = (edges[0, 0], edges[0, 1], edges[0, 2])
    edge_t = (edges[1, 0], edges[1, 1], edges[1, 2])
    edge_r = (edges[2, 0], edges[2, 1], edges[2, 2])
    at_rest = np.sqrt(max(max(_square(edge_s), _square(edge_t)), _square(edge_r)))
    size = abs(per_volume)
    nodes = np.zeros(12 * _STRIDE, np.float32)
    row = np.zeros(_ROW, np.float32)
    for i in range(bound.shape[0]):
        for j in range(bound.shape[1]):
            for begin in range(0, bound.shape[2], _ROW):
                length = min(_ROW, bound.shape[2] - begin)
                for a in range(2):
                    for b in range(2):
                        for x in range(3):
                            at = (6 * a + 3 * b + x) * _STRIDE
                            for k in range(length + 1):
                                nodes[at + k] = displacement[x, first[0] + i + a, first[1] + j + b, begin + k]
                for k in range(_ROW):
                    p, q, u, v = k, k + 3 * _STRIDE, k + 6 * _STRIDE, k + 9 * _STRIDE  # (a, b): 00, 01, 10, 11
                    s00, s01 = _edge(nodes, p, u, edge_s), _edge(nodes, p + 1, u + 1, edge_s)
                    s10, s11 = _edge(nodes, q, v, edge_s), _edge(nodes, q + 1, v + 1, edge_s)
                    t00, t01 = _edge(nodes, p, q, edge_t), _edge(nodes, p + 1, q + 1, edge_t)
                    t10, t11 = _edge(nodes, u, v, edge_t), _edge(nodes, u + 1, v + 1, edge_t)
                    r00, r01 = _edge(nodes, p, p + 1, edge_r), _edge(nodes, q, q + 1, edge_r)
                    r10, r11 = _edge(nodes, u, u + 1, edge_r), _edge(nodes, v, v + 1, edge_r)
                    least = min(
                        min(
                            min(per_volume * _determinant(s00, t00, r00), per_volume * _determinant(s01, t01, r00)),
                            min(per_volume * _determinant(s10, t00, r01), per_volume * _determinant(s11, t01, r01)),
                        ),
                        min(
                            min(per_volume * _determinant(s00, t10, r10), per_volume * _determinant(s01, t11, r10)),
                            min(per_volume * _determinant(s10, t10, r11), per_volume * _determinant(s11, t11, r11)),
                        ),
                    )
                    s, t, r = _longest(s00, s01, s10, s11), _longest(t00, t01, t10, t11), _longest(r00, r01, r10, r11)
                    ij, ik, jk = _bend(s00, s10, s01, s11), _bend(s00, s01, s10, s11), _bend(t00, t01, t10, t11)
                    bends = s * ij * ik + t * ij * jk + r * ik * jk
                    longest = max(max(s, t), max(r, at_rest))
                    off = np.float32(0.25) * bends + _SLACK * (longest * longest * longest)
                    row[k] = least - size * off
                for k in range(length):
                    bound[i, j, begin + k] = row[k]


@njit(nogil=True, cache=True, inline="always")
def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@njit(nogil=True, cache=True, fastmath={"contract"})
def coefficients(displacement, edges, volume, cells, out):
    """Compute the Bernstein coefficients of the determinant in cells, see :func:`.folds.bernstein`.

    Args:
        displacement: (3, i, j, k) float32, mm.
        edges: (3, 3) float64; rows: the edges of a cell at rest, mm.
        volume: of a cell that keeps its shape, mm^3, with its sign.
        cells: (n, 3), the index of each.
        out: (3, 3, 3, n) float64, written; where a cell is folded at a corner, the least corner determinant throughout,
            since nothing else needs to be known of it.
    """
    nodes = np.empty((2, 2, 2, 3))
    s, t, r = np.empty((2, 2, 3)), np.empty((2, 2, 3)), np.empty((2, 2, 3))
    crosses, found = np.empty((3, 2, 2, 3)), np.empty((3, 3, 3))
    for n in range(len(cells)):
        i, j, k = cells[n]
        for a in range(2):
            for b in range(2):
                for x in range(3):
                    nodes[a, b, 0, x] = displacement[x, i + a, j + b, k]
                    nodes[a, b, 1, x] = displacement[x, i + a, j + b, k + 1]
        for b in range(2):
            for c in range(2):
                for x in range(3):
                    s[b, c, x] = nodes[1, b, c, x] - nodes[0, b, c, x] + edges[0, x]
                    t[b, c, x] = nodes[b, 1, c, x] - nodes[b, 0, c, x] + edges[1, x]
                    r[b, c, x] = nodes[b, c, 1, x] - nodes[b, c, 0, x] + edges[2, x]
        least = np.inf
        for a in range(2):
            for b in range(2):
                for c in range(2):
                    least = min(least, _determinant(s[b, c], t[a, c], r[a, b]) / volume)
        if least <= 0:
            out[:, :, :, n] = least
            continue
        crosses[:] = 0
        for b in range(2):
            for c in range(2):
                for a in range(2):
                    for a2 in range(2):
                        share = 1.0 if a == a2 else 0.5
                        x, y, z = _cross(t[a, c], r[a2, b])
                        crosses[a + a2, b, c, 0] += share * x
                        crosses[a + a2, b, c, 1] += share * y
                        crosses[a + a2, b, c, 2] += share * z
        found[:] = 0
        for b in range(2):
            for b2 in range(2):
                for c in range(2):
                    for c2 in range(2):
                        share = (1.0 if b == b2 else 0.5) * (1.0 if c == c2 else 0.5) / volume
                        for a in range(3):
                            u, v = s[b, c], crosses[a, b2, c2]
                            found[a, b + b2, c + c2] += share * (u[0] * v[0] + u[1] * v[1] + u[2] * v[2])
        out[:, :, :, n] = found
