"""The fit's inner loops compiled for the CPU by numba: the same answer as :mod:`.objective`, six times as fast.

numba is optional, see :mod:`.compiled`. Every function works on a slab of planes along i, keeps nothing, and releases
Python's lock, so that slabs run side by side; what two slabs add to the same plane lies in two arrays. Names are those
of :mod:`.objective`: (a, b, c) control points, (2 a, 2 b, 2 c) voxels.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_FAST = {"contract", "reassoc", "nsz", "arcp"}


@njit(nogil=True, cache=True, inline="always")
def _line(u, p, q, di, dj, begin, end, line):
    """Interpolate a line of control points for the voxels at (2 p + di, 2 q + dj)."""
    p2 = min(max(p + 2 * di - 1, 0), u.shape[1] - 1)
    q2 = min(max(q + 2 * dj - 1, 0), u.shape[2] - 1)
    for x in range(3):
        for r in range(begin, end):
            line[x, r] = (
                np.float32(0.5625) * u[x, p, q, r]
                + np.float32(0.1875) * (u[x, p2, q, r] + u[x, p, q2, r])
                + np.float32(0.0625) * u[x, p2, q2, r]
            )


@njit(nogil=True, cache=True, fastmath=_FAST)
def warp_blocks(u, moving, fixed, ranges, counted, warped, sums, begin, end):
    """Warp the moving image and sum W, W^2 and F W over blocks, then over five blocks along k and j.

    Args:
        u: (3, a, b, c) control points, voxels.
        moving, fixed: (2 a, 2 b, 2 c).
        ranges: (a, b, 2) the first block of each row that counts, and the one after the last.
        counted: (a, b, c) uint8, which blocks count.
        warped: (2 a, 2 b, 2 c), written.
        sums: (a, 3, b, c), written.
        begin, end: planes of blocks.
    """
    n_i, n_j, n_k = moving.shape
    b, c = u.shape[2], u.shape[3]
    line = np.empty((3, c), np.float32)
    plane = np.zeros((3, b, c), np.float32)
    half = np.zeros((b, c), np.float32)
    top = np.float32(n_i - 1), np.float32(n_j - 1), np.float32(n_k - 1)
    for p in range(begin, end):
        plane[:] = 0
        for q in range(b):
            low, high = ranges[p, q, 0], ranges[p, q, 1]
            if low >= high:
                continue
            for di in range(2):
                for dj in range(2):
                    _line(u, p, q, di, dj, max(low - 1, 0), min(high + 1, c), line)
                    i, j = 2 * p + di, 2 * q + dj
                    for r in range(low, high):
                        if not counted[p, q, r]:
                            continue
                        for dk in range(2):
                            k = 2 * r + dk
                            o = min(max(r + 2 * dk - 1, 0), c - 1)
                            x = np.float32(i) + np.float32(0.75) * line[0, r] + np.float32(0.25) * line[0, o]
                            y = np.float32(j) + np.float32(0.75) * line[1, r] + np.float32(0.25) * line[1, o]
                            z = np.float32(k) + np.float32(0.75) * line[2, r] + np.float32(0.25) * line[2, o]
                            x = min(max(x, np.float32(0)), top[0])
                            y = min(max(y, np.float32(0)), top[1])
                            z = min(max(z, np.float32(0)), top[2])
                            i0 = min(int(x), n_i - 2)
                            j0 = min(int(y), n_j - 2)
                            k0 = min(int(z), n_k - 2)
                            x -= np.float32(i0)
                            y -= np.float32(j0)
                            z -= np.float32(k0)
                            m = moving[i0, j0, k0]
                            v00 = m + z * (moving[i0, j0, k0 + 1] - m)
                            m = moving[i0, j0 + 1, k0]
                            v01 = m + z * (moving[i0, j0 + 1, k0 + 1] - m)
                            m = moving[i0 + 1, j0, k0]
                            v10 = m + z * (moving[i0 + 1, j0, k0 + 1] - m)
                            m = moving[i0 + 1, j0 + 1, k0]
                            v11 = m + z * (moving[i0 + 1, j0 + 1, k0 + 1] - m)
                            v0 = v00 + y * (v01 - v00)
                            v1 = v10 + y * (v11 - v10)
                            w = v0 + x * (v1 - v0)
                            warped[i, j, k] = w
                            plane[0, q, r] += w
                            plane[1, q, r] += w * w
                            plane[2, q, r] += w * fixed[i, j, k]
        for x in range(3):
            _box_plane(plane[x], half, sums[p, x])


@njit(nogil=True, cache=True, fastmath=_FAST)
def _box_plane(plane, half, out):
    """Sum over five by five blocks of a plane (b, c)."""
    b, c = plane.shape
    for q in range(b):
        for r in range(c):
            half[q, r] = plane[q, r]
        for step in range(1, 3):
            for r in range(c - step):
                half[q, r] += plane[q, r + step]
            for r in range(step, c):
                half[q, r] += plane[q, r - step]
    for q in range(b):
        for r in range(c):
            out[q, r] = half[q, r]
        for step in range(-2, 3):
            if step != 0 and 0 <= q + step < b:
                for r in range(c):
                    out[q, r] += half[q + step, r]


@njit(nogil=True, cache=True, fastmath=_FAST)
def _box_along(maps, p, x, out):
    """Sum five planes (b, c) of maps (a, x, b, c) around p."""
    out[:] = 0
    for at in range(max(p - 2, 0), min(p + 3, maps.shape[0])):
        for q in range(out.shape[0]):
            for r in range(out.shape[1]):
                out[q, r] += maps[at, x, q, r]


@njit(nogil=True, cache=True, fastmath=_FAST)
def correlate(sums, fixed_sum, fixed_variance, epsilon, weights, begin, end):
    """Return the sum of C^2 / (U V + epsilon) over blocks of a slab, and write the weights of its slope.

    Args:
        sums: (a, 3, b, c), from :func:`warp_blocks`.
        fixed_sum, fixed_variance: (a, b, c), S_F and U, over whole windows.
        weights: (a, 3, b, c), a, b and c summed over windows along k and j, written.
    """
    b, c = sums.shape[2], sums.shape[3]
    n = np.float32(1000)
    total = 0.0
    moved = np.empty((3, b, c), np.float32)
    slopes = np.empty((3, b, c), np.float32)
    half = np.empty((b, c), np.float32)
    for p in range(begin, end):
        for x in range(3):
            _box_along(sums, p, x, moved[x])
        for q in range(b):
            row = np.float32(0)
            for r in range(c):
                s_f, u = fixed_sum[p, q, r], fixed_variance[p, q, r]
                s_w = moved[0, q, r]
                v = max(moved[1, q, r] - s_w * s_w / n, np.float32(0))
                cross = moved[2, q, r] - s_f * s_w / n
                s = cross / (u * v + epsilon)
                row += cross * s
                by_cross = 2 * s
                by_variance = by_cross * s * u
                slopes[0, q, r] = by_cross
                slopes[1, q, r] = by_variance
                slopes[2, q, r] = (by_cross * s_f - by_variance * s_w) / n
            total += row
        for x in range(3):
            _box_plane(slopes[x], half, weights[p, x])
    return total


@njit(nogil=True, cache=True, inline="always")
def _spread(line, out, p, q, di, dj, begin, end):
    """Add a line of gradients at (2 p + di, 2 q + dj) to the control points: the transpose of :func:`_line`."""
    p2 = min(max(p + 2 * di - 1, 0), out.shape[1] - 1)
    q2 = min(max(q + 2 * dj - 1, 0), out.shape[2] - 1)
    for x in range(3):
        for r in range(begin, end):
            g = line[x, r]
            out[x, p, q, r] += np.float32(0.5625) * g
            out[x, p2, q, r] += np.float32(0.1875) * g
            out[x, p, q2, r] += np.float32(0.1875) * g
            out[x, p2, q2, r] += np.float32(0.0625) * g


@njit(nogil=True, cache=True, fastmath=_FAST)
def pull(u, moving, fixed, ranges, counted, warped, weights, gradient, begin, end):
    """Add the slope of minus the correlation to the control points of a slab and of a plane on either side.

    Args:
        weights: (a, 3, b, c), from :func:`correlate`.
        gradient: (3, a, b, c), added to.
    """
    n_i, n_j, n_k = moving.shape
    b, c = u.shape[2], u.shape[3]
    line = np.empty((3, c), np.float32)
    back = np.empty((3, c), np.float32)
    w3 = np.empty((3, b, c), np.float32)
    top = np.float32(n_i - 1), np.float32(n_j - 1), np.float32(n_k - 1)
    zero = np.float32(0)
    for p in range(begin, end):
        for x in range(3):
            _box_along(weights, p, x, w3[x])
        for q in range(b):
            low, high = ranges[p, q, 0], ranges[p, q, 1]
            if low >= high:
                continue
            first, last = max(low - 1, 0), min(high + 1, c)
            for di in range(2):
                for dj in range(2):
                    _line(u, p, q, di, dj, first, last, line)
                    back[:, first:last] = 0
                    i, j = 2 * p + di, 2 * q + dj
                    for r in range(low, high):
                        if not counted[p, q, r]:
                            continue
                        for dk in range(2):
                            k = 2 * r + dk
                            o = min(max(r + 2 * dk - 1, 0), c - 1)
                            slope = w3[2, q, r] + warped[i, j, k] * w3[1, q, r] - fixed[i, j, k] * w3[0, q, r]
                            x = np.float32(i) + np.float32(0.75) * line[0, r] + np.float32(0.25) * line[0, o]
                            y = np.float32(j) + np.float32(0.75) * line[1, r] + np.float32(0.25) * line[1, o]
                            z = np.float32(k) + np.float32(0.75) * line[2, r] + np.float32(0.25) * line[2, o]
                            along_x = slope if zero <= x <= top[0] else zero
                            along_y = slope if zero <= y <= top[1] else zero
                            along_z = slope if zero <= z <= top[2] else zero
                            x = min(max(x, zero), top[0])
                            y = min(max(y, zero), top[1])
                            z = min(max(z, zero), top[2])
                            i0 = min(int(x), n_i - 2)
                            j0 = min(int(y), n_j - 2)
                            k0 = min(int(z), n_k - 2)
                            x -= np.float32(i0)
                            y -= np.float32(j0)
                            z -= np.float32(k0)
                            m000, m001 = moving[i0, j0, k0], moving[i0, j0, k0 + 1]
                            m010, m011 = moving[i0, j0 + 1, k0], moving[i0, j0 + 1, k0 + 1]
                            m100, m101 = moving[i0 + 1, j0, k0], moving[i0 + 1, j0, k0 + 1]
                            m110, m111 = moving[i0 + 1, j0 + 1, k0], moving[i0 + 1, j0 + 1, k0 + 1]
                            v00, v01 = m000 + z * (m001 - m000), m010 + z * (m011 - m010)
                            v10, v11 = m100 + z * (m101 - m100), m110 + z * (m111 - m110)
                            v0, v1 = v00 + y * (v01 - v00), v10 + y * (v11 - v10)
                            h0 = (m001 - m000) + y * ((m011 - m010) - (m001 - m000))
                            h1 = (m101 - m100) + y * ((m111 - m110) - (m101 - m100))
                            g0 = along_x * (v1 - v0)
                            g1 = along_y * ((v01 - v00) + x * ((v11 - v10) - (v01 - v00)))
                            g2 = along_z * (h0 + x * (h1 - h0))
                            back[0, r] += np.float32(0.75) * g0
                            back[1, r] += np.float32(0.75) * g1
                            back[2, r] += np.float32(0.75) * g2
                            back[0, o] += np.float32(0.25) * g0
                            back[1, o] += np.float32(0.25) * g1
                            back[2, o] += np.float32(0.25) * g2
                    _spread(back, gradient, p, q, di, dj, first, last)


@njit(nogil=True, cache=True, fastmath=_FAST)
def pull_features(u, moving, fixed, ranges, counted, gradient, weight, begin, end):
    """Return weight times the sum of squared differences of features, and add its slope to the control points.

    Args:
        moving, fixed: (2 a, 2 b, 2 c, channels).
        gradient: (3, a, b, c), added to.
    """
    n_i, n_j, n_k, channels = moving.shape
    c = u.shape[3]
    line = np.empty((3, c), np.float32)
    back = np.empty((3, c), np.float32)
    residual = np.empty(channels, np.float32)
    top = np.float32(n_i - 1), np.float32(n_j - 1), np.float32(n_k - 1)
    zero, one = np.float32(0), np.float32(1)
    total = 0.0
    for p in range(begin, end):
        for q in range(u.shape[2]):
            low, high = ranges[p, q, 0], ranges[p, q, 1]
            if low >= high:
                continue
            first, last = max(low - 1, 0), min(high + 1, c)
            row = zero
            for di in range(2):
                for dj in range(2):
                    _line(u, p, q, di, dj, first, last, line)
                    back[:, first:last] = 0
                    i, j = 2 * p + di, 2 * q + dj
                    for r in range(low, high):
                        if not counted[p, q, r]:
                            continue
                        for dk in range(2):
                            k = 2 * r + dk
                            o = min(max(r + 2 * dk - 1, 0), c - 1)
                            x = np.float32(i) + np.float32(0.75) * line[0, r] + np.float32(0.25) * line[0, o]
                            y = np.float32(j) + np.float32(0.75) * line[1, r] + np.float32(0.25) * line[1, o]
                            z = np.float32(k) + np.float32(0.75) * line[2, r] + np.float32(0.25) * line[2, o]
                            along_x = weight if zero <= x <= top[0] else zero
                            along_y = weight if zero <= y <= top[1] else zero
                            along_z = weight if zero <= z <= top[2] else zero
                            x = min(max(x, zero), top[0])
                            y = min(max(y, zero), top[1])
                            z = min(max(z, zero), top[2])
                            i0 = min(int(x), n_i - 2)
                            j0 = min(int(y), n_j - 2)
                            k0 = min(int(z), n_k - 2)
                            x -= np.float32(i0)
                            y -= np.float32(j0)
                            z -= np.float32(k0)
                            x1, y1, z1 = one - x, one - y, one - z
                            w000, w001, w010, w011 = x1 * y1 * z1, x1 * y1 * z, x1 * y * z1, x1 * y * z
                            w100, w101, w110, w111 = x * y1 * z1, x * y1 * z, x * y * z1, x * y * z
                            m000, m001 = moving[i0, j0, k0], moving[i0, j0, k0 + 1]
                            m010, m011 = moving[i0, j0 + 1, k0], moving[i0, j0 + 1, k0 + 1]
                            m100, m101 = moving[i0 + 1, j0, k0], moving[i0 + 1, j0, k0 + 1]
                            m110, m111 = moving[i0 + 1, j0 + 1, k0], moving[i0 + 1, j0 + 1, k0 + 1]
                            f = fixed[i, j, k]
                            squares = zero
                            for n in range(channels):
                                d = (
                                    w000 * m000[n] + w001 * m001[n] + w010 * m010[n] + w011 * m011[n]
                                    + w100 * m100[n] + w101 * m101[n] + w110 * m110[n] + w111 * m111[n]
                                ) - f[n]  # fmt: skip
                                residual[n] = d
                                squares += d * d
                            row += squares
                            d000 = d001 = d010 = d011 = d100 = d101 = d110 = d111 = zero
                            for n in range(channels):
                                d = residual[n]
                                d000 += d * m000[n]
                                d001 += d * m001[n]
                                d010 += d * m010[n]
                                d011 += d * m011[n]
                                d100 += d * m100[n]
                                d101 += d * m101[n]
                                d110 += d * m110[n]
                                d111 += d * m111[n]
                            x2 = y1 * (z1 * (d100 - d000) + z * (d101 - d001)) + y * (
                                z1 * (d110 - d010) + z * (d111 - d011)
                            )
                            y2 = x1 * (z1 * (d010 - d000) + z * (d011 - d001)) + x * (
                                z1 * (d110 - d100) + z * (d111 - d101)
                            )
                            z2 = x1 * (y1 * (d001 - d000) + y * (d011 - d010)) + x * (
                                y1 * (d101 - d100) + y * (d111 - d110)
                            )
                            g0, g1, g2 = 2 * along_x * x2, 2 * along_y * y2, 2 * along_z * z2
                            back[0, r] += np.float32(0.75) * g0
                            back[1, r] += np.float32(0.75) * g1
                            back[2, r] += np.float32(0.75) * g2
                            back[0, o] += np.float32(0.25) * g0
                            back[1, o] += np.float32(0.25) * g1
                            back[2, o] += np.float32(0.25) * g2
                    _spread(back, gradient, p, q, di, dj, first, last)
            total += row
    return weight * total


@njit(nogil=True, cache=True, fastmath=_FAST)
def regularize(u, diffusion, folding, wanted, gradient, begin, end):
    """Return the regularizers' share of a slab, and add their slope to the control points.

    Args:
        diffusion: times the sum of squared differences of neighbors.
        folding: times the sum of relu(wanted - det) over cells.
        gradient: (3, a, b, c), added to, one plane beyond the slab too.
    """
    a, b, c = u.shape[1], u.shape[2], u.shape[3]
    half, one = np.float32(0.5), np.float32(1)
    twice = 2 * diffusion
    total = 0.0
    for p in range(begin, end):
        for q in range(b):
            row = np.float32(0)
            for x in range(3):
                for r in range(c):
                    here = u[x, p, q, r]
                    pulled = np.float32(0)
                    if p + 1 < a:
                        d = here - u[x, p + 1, q, r]
                        pulled += d
                        row += d * d
                    if p > 0:
                        pulled += here - u[x, p - 1, q, r]
                    if q + 1 < b:
                        d = here - u[x, p, q + 1, r]
                        pulled += d
                        row += d * d
                    if q > 0:
                        pulled += here - u[x, p, q - 1, r]
                    if r + 1 < c:
                        d = here - u[x, p, q, r + 1]
                        pulled += d
                        row += d * d
                    if r > 0:
                        pulled += here - u[x, p, q, r - 1]
                    gradient[x, p, q, r] += twice * pulled
            total += diffusion * row
            if p + 1 == a or q + 1 == b:
                continue
            for r in range(c - 1):
                s0 = one + half * (u[0, p + 1, q, r] - u[0, p, q, r])
                s1 = half * (u[1, p + 1, q, r] - u[1, p, q, r])
                s2 = half * (u[2, p + 1, q, r] - u[2, p, q, r])
                t0 = half * (u[0, p, q + 1, r] - u[0, p, q, r])
                t1 = one + half * (u[1, p, q + 1, r] - u[1, p, q, r])
                t2 = half * (u[2, p, q + 1, r] - u[2, p, q, r])
                r0 = half * (u[0, p, q, r + 1] - u[0, p, q, r])
                r1 = half * (u[1, p, q, r + 1] - u[1, p, q, r])
                r2 = one + half * (u[2, p, q, r + 1] - u[2, p, q, r])
                s = (t1 * r2 - t2 * r1, t2 * r0 - t0 * r2, t0 * r1 - t1 * r0)
                lacking = wanted - (s0 * s[0] + s1 * s[1] + s2 * s[2])
                if lacking > 0:
                    total += folding * lacking
                    t = (r1 * s2 - r2 * s1, r2 * s0 - r0 * s2, r0 * s1 - r1 * s0)
                    w = (s1 * t2 - s2 * t1, s2 * t0 - s0 * t2, s0 * t1 - s1 * t0)
                    push = half * folding
                    for x in range(3):
                        gradient[x, p + 1, q, r] -= push * s[x]
                        gradient[x, p, q + 1, r] -= push * t[x]
                        gradient[x, p, q, r + 1] -= push * w[x]
                        gradient[x, p, q, r] += push * (s[x] + t[x] + w[x])
    return total


@njit(nogil=True, cache=True, fastmath=_FAST)
def adam(u, even, odd, first, second, rate, decay, decay2, step, begin, end):
    """Take a step of Adam on a slab, of a gradient in two parts, and set these to zero."""
    fade, fade2 = np.float32(1 - decay**step), np.float32(1 - decay2**step)
    decay, decay2, rate = np.float32(decay), np.float32(decay2), np.float32(rate)
    one, tiny = np.float32(1), np.float32(1e-8)
    for x in range(3):
        for p in range(begin, end):
            for q in range(u.shape[2]):
                for r in range(u.shape[3]):
                    g = even[x, p, q, r] + odd[x, p, q, r]
                    even[x, p, q, r] = 0
                    odd[x, p, q, r] = 0
                    m = decay * first[x, p, q, r] + (one - decay) * g
                    v = decay2 * second[x, p, q, r] + (one - decay2) * g * g
                    first[x, p, q, r] = m
                    second[x, p, q, r] = v
                    u[x, p, q, r] -= rate * (m / fade) / (np.sqrt(v / fade2) + tiny)
