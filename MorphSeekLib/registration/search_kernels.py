"""The search's inner loops compiled for the CPU by numba: the answer of :mod:`.search`, several times as fast.

All displacements of a cell lie side by side in memory, so that each loop runs over them at full width. Every function
works on a slab of planes or rows, keeps nothing, and releases Python's lock; slabs write to different places, so that
their number does not change the answer.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_FAST = {"contract", "nsz", "nnan"}
LANES = 8  # displacements that are compared at once


@njit(nogil=True, cache=True, fastmath=_FAST)
def compare(fixed, moving, counts, reach, costs, begin, end):
    """Write the sums of squared differences at every displacement, times how much a cell counts, blurred along j and k.

    Args:
        fixed: (a, b, c, channels).
        moving: (a + 2 reach, c, channels, (b + 2 reach) (2 reach + 1) + 8), with edge values around it: along the last
            axis the cells' rows, of each the neighbors along k, then eight numbers that do not count.
        counts: (a, b, c).
        reach: cells along each axis.
        costs: (a, b, c, (2 reach + 1)^3), written.
        begin, end: planes of cells.
    """
    _, b, c, channels = fixed.shape
    side = 2 * reach + 1
    area = side * side
    odd = channels % 4
    spare = np.empty((max(b, c), area * side), np.float32)
    line = np.zeros(area * side + LANES, np.float32)
    for p in range(begin, end):
        for r in range(c):
            for q in range(b):
                first = q * side
                cell, out = fixed[p, q, r], costs[p, q, r]
                for x in range(side):
                    near, to = moving[p + x, r], x * area
                    # whole lanes: what goes beyond the area is written over by the next one
                    for d in range(to, to + area + LANES - 1):
                        line[d] = 0
                    for n in range(odd):
                        f = cell[n]
                        for start in range(0, area, LANES):
                            for lane in range(LANES):
                                e = near[n, first + start + lane] - f
                                line[to + start + lane] += e * e
                    for n in range(odd, channels, 4):
                        f0, f1, f2, f3 = cell[n], cell[n + 1], cell[n + 2], cell[n + 3]
                        for start in range(0, area, LANES):
                            for lane in range(LANES):
                                d = first + start + lane
                                e0, e1 = near[n, d] - f0, near[n + 1, d] - f1
                                e2, e3 = near[n + 2, d] - f2, near[n + 3, d] - f3
                                line[to + start + lane] += (e0 * e0 + e1 * e1) + (e2 * e2 + e3 * e3)
                for d in range(area * side):
                    out[d] = line[d] * counts[p, q, r]
            _blur(costs[p, :, r], spare)
        for q in range(b):
            _blur(costs[p, q], spare)


@njit(nogil=True, cache=True)
def blur_planes(costs, begin, end):
    """Blur costs (a, b, c, displacements) along i, in place, for rows from ``begin`` to before ``end`` along j."""
    spare = np.empty((costs.shape[0], costs.shape[3]), np.float32)
    for q in range(begin, end):
        for r in range(costs.shape[2]):
            _blur(costs[:, q, r], spare)


@njit(nogil=True, cache=True, fastmath=_FAST)
def _blur(line, spare):
    """Blur a line (n, displacements) by [1 2 3 2 1] / 9 in place; beyond the ends their values hold."""
    n, count = line.shape
    last = n - 1
    w1, w2, w3 = np.float32(1 / 9), np.float32(2 / 9), np.float32(3 / 9)
    for i in range(n):
        here, copy = line[i], spare[i]
        for d in range(count):
            copy[d] = here[d]
    for i in range(n):
        v, w, x = spare[max(i - 2, 0)], spare[max(i - 1, 0)], spare[i]
        y, z = spare[min(i + 1, last)], spare[min(i + 2, last)]
        out = line[i]
        for d in range(count):
            out[d] = w1 * (v[d] + z[d]) + w2 * (w[d] + y[d]) + w3 * x[d]


@njit(nogil=True, cache=True, fastmath=_FAST)
def choose(costs, mean, nearness, reach, found, begin, end):
    """Write each cell's best displacement: the least cost + nearness |displacement - mean|^2, the first of equals.

    Args:
        costs: (a, b, c, (2 reach + 1)^3).
        mean: (3, a, b, c) cells.
        nearness: weight.
        reach: cells along each axis.
        found: (3, a, b, c) cells, written.
        begin, end: planes of cells.
    """
    b, c, count = costs.shape[1:]
    side = 2 * reach + 1
    moves = np.empty((4, count), np.float32)
    for d in range(count):
        moves[0, d] = d // (side * side) - reach
        moves[1, d] = d // side % side - reach
        moves[2, d] = d % side - reach
        moves[3, d] = moves[0, d] ** 2 + moves[1, d] ** 2 + moves[2, d] ** 2
    m0, m1, m2, squares = moves[0], moves[1], moves[2], moves[3]
    total = np.empty(count, np.float32)
    two = np.float32(-2)
    for p in range(begin, end):
        for q in range(b):
            for r in range(c):
                here = costs[p, q, r]
                u, v, w = two * mean[0, p, q, r], two * mean[1, p, q, r], two * mean[2, p, q, r]
                for d in range(count):
                    total[d] = here[d] + nearness * (squares[d] + u * m0[d] + v * m1[d] + w * m2[d])
                least = total[0]
                for d in range(count):
                    least = min(least, total[d])
                best = 0
                while total[best] > least:
                    best += 1
                found[0, p, q, r] = m0[best]
                found[1, p, q, r] = m1[best]
                found[2, p, q, r] = m2[best]
