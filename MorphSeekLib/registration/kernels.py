"""The fit's inner loops compiled for the CPU by numba: the same answer as :mod:`.objective`, six times as fast.

Every function works on a slab of planes along i, keeps nothing, and releases Python's lock, so that slabs run side by
side; what two slabs add to the same plane lies in two arrays. Names are those of :mod:`.objective`: (a, b, c) control
points, (2 a, 2 b, 2 c) voxels. Arguments that several functions share:

- u: (3, a, b, c) control points, voxels.
- images: moving and fixed, (2 a, 2 b, 2 c) each, or with channels (2 a, 2 b, 2 c, channels).
- blocks: ranges (a, b, 2), the first block of each row that counts and the one after the last; and counted (a, b, c)
  uint8, which blocks count.
- slab: the first plane of blocks, and the one after the last.
- gradient: (3, a, b, c), added to, one plane beyond the slab too.

What is inlined costs nothing: a call for each voxel would.
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


@njit(nogil=True, cache=True, inline="always")
def _point(line, i, j, k, r, o):
    """Return where the voxel (i, j, k) is moved: of a line 3/4 of the block r and 1/4 of its neighbor o."""
    near, far = np.float32(0.75), np.float32(0.25)
    x = np.float32(i) + near * line[0, r] + far * line[0, o]
    y = np.float32(j) + near * line[1, r] + far * line[1, o]
    z = np.float32(k) + near * line[2, r] + far * line[2, o]
    return x, y, z


@njit(nogil=True, cache=True, inline="always")
def _cell(at, size):
    """Return of a coordinate the voxel before it, and how far it lies beyond that; the edge's beyond the edge."""
    at = min(max(at, np.float32(0)), np.float32(size - 1))
    before = min(int(at), size - 2)
    return before, at - np.float32(before)


@njit(nogil=True, cache=True, inline="always")
def _within(at, size, value):
    """Return a value where a coordinate lies in the image, else 0: beyond the edge nothing changes along the axis."""
    return value if np.float32(0) <= at <= np.float32(size - 1) else np.float32(0)


@njit(nogil=True, cache=True, inline="always")
def _corners(image, i, j, k):
    """Return the eight voxels (or their channels) of the cell that begins at (i, j, k), k fastest."""
    return (
        image[i, j, k], image[i, j, k + 1], image[i, j + 1, k], image[i, j + 1, k + 1],
        image[i + 1, j, k], image[i + 1, j, k + 1], image[i + 1, j + 1, k], image[i + 1, j + 1, k + 1],
    )  # fmt: skip


@njit(nogil=True, cache=True, inline="always")
def _push(back, r, o, g0, g1, g2):
    """Add a voxel's gradient to a line: the transpose of :func:`_point`."""
    near, far = np.float32(0.75), np.float32(0.25)
    back[0, r] += near * g0
    back[1, r] += near * g1
    back[2, r] += near * g2
    back[0, o] += far * g0
    back[1, o] += far * g1
    back[2, o] += far * g2


@njit(nogil=True, cache=True, fastmath=_FAST)
def warp_blocks(u, images, blocks, warped, sums, slab):
    """Warp the moving image and sum W, W^2 and F W over blocks, then over five blocks along k and j.

    Args:
        warped: (2 a, 2 b, 2 c), written.
        sums: (a, 3, b, c), written.
    """
    moving, fixed = images
    ranges, counted = blocks
    n_i, n_j, n_k = moving.shape
    b, c = u.shape[2], u.shape[3]
    line = np.empty((3, c), np.float32)
    plane = np.zeros((3, b, c), np.float32)
    half = np.zeros((b, c), np.float32)
    for p in range(slab[0], slab[1]):
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
                            x, y, z = _point(line, i, j, k, r, min(max(r + 2 * dk - 1, 0), c - 1))
                            (i0, dx), (j0, dy), (k0, dz) = _cell(x, n_i), _cell(y, n_j), _cell(z, n_k)
                            m000, m001, m010, m011, m100, m101, m110, m111 = _corners(moving, i0, j0, k0)
                            v00, v01 = m000 + dz * (m001 - m000), m010 + dz * (m011 - m010)
                            v10, v11 = m100 + dz * (m101 - m100), m110 + dz * (m111 - m110)
                            v0, v1 = v00 + dy * (v01 - v00), v10 + dy * (v11 - v10)
                            w = v0 + dx * (v1 - v0)
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
def correlate(sums, fixed_sum, fixed_variance, shares, epsilon, weights, slab):
    """Return the sum of C^2 / (U V + epsilon) over blocks of a slab, and write the weights of its slope.

    Args:
        sums: (a, 3, b, c), from :func:`warp_blocks`.
        fixed_sum, fixed_variance, shares: (a, b, c), S_F, U and 1 / n of whole windows; of those whose share is 0
            nothing counts.
        weights: (a, 3, b, c), a, b and c summed over windows along k and j, written.
    """
    b, c = sums.shape[2], sums.shape[3]
    total = 0.0
    moved = np.empty((3, b, c), np.float32)
    slopes = np.empty((3, b, c), np.float32)
    half = np.empty((b, c), np.float32)
    for p in range(slab[0], slab[1]):
        for x in range(3):
            _box_along(sums, p, x, moved[x])
        for q in range(b):
            row = np.float32(0)
            for r in range(c):
                s_f, u = fixed_sum[p, q, r], fixed_variance[p, q, r]
                s_w, share = moved[0, q, r], shares[p, q, r]
                v = max(moved[1, q, r] - s_w * s_w * share, np.float32(0))
                cross = moved[2, q, r] - s_f * s_w * share
                s = cross / (u * v + epsilon) if share > 0 else np.float32(0)
                row += cross * s
                by_cross = 2 * s
                by_variance = by_cross * s * u
                slopes[0, q, r] = by_cross
                slopes[1, q, r] = by_variance
                slopes[2, q, r] = (by_cross * s_f - by_variance * s_w) * share
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
def pull(u, images, blocks, warped, weights, gradient, slab):
    """Add the slope of minus the correlation to the control points.

    Args:
        warped: from :func:`warp_blocks`.
        weights: (a, 3, b, c), from :func:`correlate`.
    """
    moving, fixed = images
    ranges, counted = blocks
    n_i, n_j, n_k = moving.shape
    b, c = u.shape[2], u.shape[3]
    line = np.empty((3, c), np.float32)
    back = np.empty((3, c), np.float32)
    w3 = np.empty((3, b, c), np.float32)
    for p in range(slab[0], slab[1]):
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
                            x, y, z = _point(line, i, j, k, r, o)
                            (i0, dx), (j0, dy), (k0, dz) = _cell(x, n_i), _cell(y, n_j), _cell(z, n_k)
                            m000, m001, m010, m011, m100, m101, m110, m111 = _corners(moving, i0, j0, k0)
                            v00, v01 = m000 + dz * (m001 - m000), m010 + dz * (m011 - m010)
                            v10, v11 = m100 + dz * (m101 - m100), m110 + dz * (m111 - m110)
                            v0, v1 = v00 + dy * (v01 - v00), v10 + dy * (v11 - v10)
                            h0 = (m001 - m000) + dy * ((m011 - m010) - (m001 - m000))
                            h1 = (m101 - m100) + dy * ((m111 - m110) - (m101 - m100))
                            g0 = _within(x, n_i, slope) * (v1 - v0)
                            g1 = _within(y, n_j, slope) * ((v01 - v00) + dx * ((v11 - v10) - (v01 - v00)))
                            g2 = _within(z, n_k, slope) * (h0 + dx * (h1 - h0))
                            _push(back, r, o, g0, g1, g2)
                    _spread(back, gradient, p, q, di, dj, first, last)


@njit(nogil=True, cache=True, inline="always")
def _differ(moving, cell, fixed, x, y, z, residual):
    """Return the squared difference of features at a point of a cell, and half its slope along each axis.

    Args:
        corners: eight, (channels,) each.
        fixed: (channels,).
        x, y, z: within the cell, from 0 to 1.
        residual: (channels,), written.
    """
    i, j, k = cell
    m000, m001, m010, m011 = moving[i, j, k], moving[i, j, k + 1], moving[i, j + 1, k], moving[i, j + 1, k + 1]
    i += 1
    m100, m101, m110, m111 = moving[i, j, k], moving[i, j, k + 1], moving[i, j + 1, k], moving[i, j + 1, k + 1]
    one, zero = np.float32(1), np.float32(0)
    x1, y1, z1 = one - x, one - y, one - z
    w000, w001, w010, w011 = x1 * y1 * z1, x1 * y1 * z, x1 * y * z1, x1 * y * z
    w100, w101, w110, w111 = x * y1 * z1, x * y1 * z, x * y * z1, x * y * z
    squares = zero
    for n in range(len(residual)):
        d = (
            w000 * m000[n] + w001 * m001[n] + w010 * m010[n] + w011 * m011[n]
            + w100 * m100[n] + w101 * m101[n] + w110 * m110[n] + w111 * m111[n]
        ) - fixed[n]  # fmt: skip
        residual[n] = d
        squares += d * d
    d000 = d001 = d010 = d011 = d100 = d101 = d110 = d111 = zero
    for n in range(len(residual)):
        d = residual[n]
        d000 += d * m000[n]
        d001 += d * m001[n]
        d010 += d * m010[n]
        d011 += d * m011[n]
        d100 += d * m100[n]
        d101 += d * m101[n]
        d110 += d * m110[n]
        d111 += d * m111[n]
    by_x = y1 * (z1 * (d100 - d000) + z * (d101 - d001)) + y * (z1 * (d110 - d010) + z * (d111 - d011))
    by_y = x1 * (z1 * (d010 - d000) + z * (d011 - d001)) + x * (z1 * (d110 - d100) + z * (d111 - d101))
    by_z = x1 * (y1 * (d001 - d000) + y * (d011 - d010)) + x * (y1 * (d101 - d100) + y * (d111 - d110))
    return squares, by_x, by_y, by_z


@njit(nogil=True, cache=True, fastmath=_FAST)
def pull_features(u, images, blocks, weight, gradient, slab):
    """Return weight times the sum of squared differences of features, and add its slope to the control points."""
    moving, fixed = images
    ranges, counted = blocks
    n_i, n_j, n_k, channels = moving.shape
    c = u.shape[3]
    line = np.empty((3, c), np.float32)
    back = np.empty((3, c), np.float32)
    residual = np.empty(channels, np.float32)
    twice = 2 * weight
    total = 0.0
    for p in range(slab[0], slab[1]):
        for q in range(u.shape[2]):
            low, high = ranges[p, q, 0], ranges[p, q, 1]
            if low >= high:
                continue
            first, last = max(low - 1, 0), min(high + 1, c)
            row = np.float32(0)
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
                            x, y, z = _point(line, i, j, k, r, o)
                            (i0, dx), (j0, dy), (k0, dz) = _cell(x, n_i), _cell(y, n_j), _cell(z, n_k)
                            squares, by_x, by_y, by_z = _differ(
                                moving, (i0, j0, k0), fixed[i, j, k], dx, dy, dz, residual
                            )
                            row += squares
                            g0 = _within(x, n_i, twice) * by_x
                            g1 = _within(y, n_j, twice) * by_y
                            g2 = _within(z, n_k, twice) * by_z
                            _push(back, r, o, g0, g1, g2)
                    _spread(back, gradient, p, q, di, dj, first, last)
            total += row
    return weight * total


@njit(nogil=True, cache=True, fastmath=_FAST)
def regularize(u, diffusion, folding, wanted, gradient, slab):
    """Return the regularizers' share of a slab, and add their slope to the control points.

    Args:
        diffusion: times the sum of squared differences of neighbors.
        folding: times the sum of relu(wanted - det) over cells.
    """
    a, b, c = u.shape[1], u.shape[2], u.shape[3]
    half, one = np.float32(0.5), np.float32(1)
    twice = 2 * diffusion
    total = 0.0
    for p in range(slab[0], slab[1]):
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
def adam(u, state, rate, decays, step, slab):
    """Take a step of Adam, and set the gradient to zero.

    Args:
        state: (4, 3, a, b, c): the gradient in two parts, and its first and second moment.
        rate: voxels.
        decays: of the two moments.
        step: from 1.
    """
    fade, fade2 = np.float32(1 - decays[0] ** step), np.float32(1 - decays[1] ** step)
    decay, decay2, rate = np.float32(decays[0]), np.float32(decays[1]), np.float32(rate)
    even, odd, first, second = state[0], state[1], state[2], state[3]
    one, tiny = np.float32(1), np.float32(1e-8)
    for x in range(3):
        for p in range(slab[0], slab[1]):
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
