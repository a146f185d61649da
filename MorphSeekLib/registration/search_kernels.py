"""The search's inner loops compiled for the CPU by numba: the answer of :mod:`.search`, several times as fast.

All displacements of a cell lie side by side in memory, so that each loop runs over them at full width. Every function
works on a slab of planes or rows, keeps nothing, and releases Python's lock; slabs write to different places, so that
their number does not change the answer.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_FAST = {"contract", "nsz", "nnan"}
LANES = 16  # displacements that are compared at once


@njit(nogil=True, cache=True, fastmath=_FAST)
def compare(fixed, moving, counts, reach, costs, begin, end):
    """Write the sums of squared differences at every displacement, times how much a cell counts, blurred along j and k.

    Args:
        fixed: (a, b, c, channels).
        moving: (a + 2 reach, c, channels, (b + 2 reach) (2 reach + 1) + LANES), with edge values around it: along the
            last axis the cells' rows, of each the neighbors along k, then numbers that do not count.
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
def least_costs(costs, least, begin, end):
    """Write each cell's least cost, (a, b, c), of costs (a, b, c, displacements)."""
    _, b, c, count = costs.shape
    for p in range(begin, end):
        for q in range(b):
            for r in range(c):
                here = costs[p, q, r]
                value = here[0]
                for d in range(count):
                    value = min(value, here[d])
                least[p, q, r] = value


@njit(nogil=True, cache=True, inline="always")
def _within(mean, radius, reach):
    """Return the first displacement along an axis that is at most so far from the mean, and the one after the last."""
    low = max(int(np.ceil(mean - radius)), -reach)
    high = min(int(np.floor(mean + radius)), reach)
    return min(low, reach), max(high, -reach) + 1


@njit(nogil=True, cache=True, fastmath=_FAST)
def choose(costs, least, mean, nearness, reach, found, begin, end):
    """Write each cell's best displacement: the least cost + nearness |displacement - mean|^2, the first of equals.

    One that is so far from the mean that even with the cell's least cost it were worse than that nearest to the mean is
    not looked at.

    Args:
        costs: (a, b, c, (2 reach + 1)^3).
        least: (a, b, c), from :func:`least_costs`.
        mean: (3, a, b, c) cells.
        nearness: weight.
        reach: cells along each axis.
        found: (3, a, b, c) cells, written.
        begin, end: planes of cells.
    """
    b, c = costs.shape[1:3]
    side = 2 * reach + 1
    slack = np.float32(1e-3)  # for rounding
    total = np.empty(side, np.float32)
    squares = np.empty(side, np.float32)
    for p in range(begin, end):
        for q in range(b):
            for r in range(c):
                here = costs[p, q, r]
                u, v, w = mean[0, p, q, r], mean[1, p, q, r], mean[2, p, q, r]
                x0, x1, y0, y1, z0, z1 = -reach, reach + 1, -reach, reach + 1, -reach, reach + 1
                if nearness > 0:
                    x, y, z = int(np.round(u)), int(np.round(v)), int(np.round(w))
                    middle = here[((x + reach) * side + y + reach) * side + z + reach]
                    near = (x - u) ** 2 + (y - v) ** 2 + (z - w) ** 2
                    radius = np.sqrt(near + (middle - least[p, q, r]) / nearness) + slack
                    (x0, x1), (y0, y1) = _within(u, radius, reach), _within(v, radius, reach)
                    z0, z1 = _within(w, radius, reach)
                for z in range(z0, z1):
                    squares[z - z0] = (z - w) ** 2
                best, width = np.float32(np.inf), z1 - z0
                bx, by, bz = x0, y0, z0
                for x in range(x0, x1):
                    for y in range(y0, y1):
                        first = ((x + reach) * side + y + reach) * side + z0 + reach
                        far = (x - u) ** 2 + (y - v) ** 2
                        lowest = np.float32(np.inf)
                        for n in range(width):
                            total[n] = here[first + n] + nearness * (far + squares[n])
                            lowest = min(lowest, total[n])
                        if lowest < best:
                            best, n = lowest, 0
                            while total[n] > lowest:
                                n += 1
                            bx, by, bz = x, y, z0 + n
                found[0, p, q, r], found[1, p, q, r], found[2, p, q, r] = bx, by, bz
