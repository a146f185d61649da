"""What a training computes on every voxel of a field, compiled for the CPU by numba; :mod:`.fast_fields` calls it.

Every function works on a slab of planes along i, keeps nothing, and releases Python's lock, so that slabs run side by
side. Names that several functions share:

- grid: three arrays (i, j, k), where each voxel goes along k, j and i as grid_sample takes it: -1 to 1 between the
  outer faces of the image. Coordinates are rounded as torch rounds them, so that a voxel that lies on a border between
  two cells is in the same one.
- begin, end: the first plane of the slab, and the one after the last.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_ONE, _HALF = np.float32(1), np.float32(0.5)


@njit(nogil=True, cache=True, inline="always")
def _place(at, size):
    """Return a coordinate in voxels, of one from -1 to 1."""
    return ((at + _ONE) * np.float32(size) - _ONE) * _HALF


@njit(nogil=True, cache=True, inline="always")
def _clipped(at, size):
    """Return a coordinate in voxels that keeps to the image, and whether it had to be moved."""
    if at <= np.float32(0):
        return at * np.float32(0), True
    if at >= np.float32(size - 1):
        return at * np.float32(0) + np.float32(size - 1), True
    return at, False


@njit(nogil=True, cache=True)
def _fill_corners(classes, i, j, k, labels):
    """Write the classes of the cell that begins at (i, j, k), k fastest, 0 outside; return whether all are equal."""
    n_i, n_j, n_k = classes.shape
    if i >= 0 and j >= 0 and k >= 0 and i + 1 < n_i and j + 1 < n_j and k + 1 < n_k:
        labels[0], labels[1] = classes[i, j, k], classes[i, j, k + 1]
        labels[2], labels[3] = classes[i, j + 1, k], classes[i, j + 1, k + 1]
        labels[4], labels[5] = classes[i + 1, j, k], classes[i + 1, j, k + 1]
        labels[6], labels[7] = classes[i + 1, j + 1, k], classes[i + 1, j + 1, k + 1]
    else:
        for n in range(8):
            a, b, c = i + (n >> 2), j + ((n >> 1) & 1), k + (n & 1)
            inside = 0 <= a < n_i and 0 <= b < n_j and 0 <= c < n_k
            labels[n] = classes[a, b, c] if inside else 0
    equal = True
    for n in range(1, 8):
        equal &= labels[n] == labels[0]
    return equal


@njit(nogil=True, cache=True, inline="always")
def _fill_weights(x, y, z, weights):
    """Write the weights of a cell's corners at shares (x, y, z) along i, j and k."""
    for n in range(8):
        a = x if n & 4 else _ONE - x
        b = y if n & 2 else _ONE - y
        weights[n] = a * b * (z if n & 1 else _ONE - z)


@njit(nogil=True, cache=True)
def label_sums(grid, fixed, moving, together, squares, begin, end):
    """Add to each class's sum of its share in the warped map where the fixed one has it, and of the share's square.

    Args:
        fixed, moving: (i, j, k) classes, 0 for none.
        together, squares: (classes + 1,) float64, added to.
    """
    n_i, n_j, n_k = moving.shape
    labels = np.empty(8, np.int64)
    weights = np.empty(8, grid[0].dtype)
    for i in range(begin, end):
        for j in range(fixed.shape[1]):
            for k in range(fixed.shape[2]):
                z, y, x = _place(grid[0][i, j, k], n_k), _place(grid[1][i, j, k], n_j), _place(grid[2][i, j, k], n_i)
                i0, j0, k0 = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
                here = fixed[i, j, k]
                if _fill_corners(moving, i0, j0, k0, labels):
                    squares[labels[0]] += 1
                    if labels[0] == here:
                        together[here] += 1
                    continue
                _fill_weights(x - np.float32(i0), y - np.float32(j0), z - np.float32(k0), weights)
                for n in range(8):
                    label, share, seen = labels[n], weights[n], False
                    if label == 0:
                        continue
                    for m in range(n):
                        seen |= labels[m] == label
                    if seen:
                        continue
                    for m in range(n + 1, 8):
                        if labels[m] == label:
                            share += weights[m]
                    squares[label] += share * share
                    if label == here:
                        together[here] += share


@njit(nogil=True, cache=True)
def label_slopes(grid, fixed, moving, by_together, by_squares, slope, begin, end):
    """Write the derivative of a sum of :func:`label_sums`, each times a number, with respect to the displacement.

    Args:
        by_together, by_squares: (classes + 1,) the numbers, 0 first.
        slope: (3, i, j, k), along i, j and k; written.
    """
    n_i, n_j, n_k = moving.shape
    labels = np.empty(8, np.int64)
    weights = np.empty(8, grid[0].dtype)
    for i in range(begin, end):
        for j in range(fixed.shape[1]):
            for k in range(fixed.shape[2]):
                z, y, x = _place(grid[0][i, j, k], n_k), _place(grid[1][i, j, k], n_j), _place(grid[2][i, j, k], n_i)
                i0, j0, k0 = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
                if _fill_corners(moving, i0, j0, k0, labels):
                    slope[0, i, j, k] = slope[1, i, j, k] = slope[2, i, j, k] = 0
                    continue
                here = fixed[i, j, k]
                x, y, z = x - np.float32(i0), y - np.float32(j0), z - np.float32(k0)
                _fill_weights(x, y, z, weights)
                by_i = by_j = by_k = grid[0][i, j, k] * np.float32(0)
                for n in range(8):
                    label = labels[n]
                    if label == 0:
                        continue
                    share = weights[0] * np.float32(0)
                    for m in range(8):
                        if labels[m] == label:
                            share += weights[m]
                    value = np.float32(2) * by_squares[label] * share
                    if label == here:
                        value += by_together[label]
                    a = x if n & 4 else _ONE - x
                    b = y if n & 2 else _ONE - y
                    c = z if n & 1 else _ONE - z
                    by_i += value * b * c if n & 4 else -value * b * c
                    by_j += value * a * c if n & 2 else -value * a * c
                    by_k += value * a * b if n & 1 else -value * a * b
                slope[0, i, j, k], slope[1, i, j, k], slope[2, i, j, k] = by_i, by_j, by_k


@njit(nogil=True, cache=True, inline="always")
def _cell(at, size, border):
    """Return of a coordinate the voxel before it, the share beyond it, and whether the value changes along it."""
    moves = True
    if border:
        at, clipped = _clipped(at, size)
        moves = not clipped
    before = int(np.floor(at))
    return before, at - np.float32(before), moves


@njit(nogil=True, cache=True, inline="always")
def _value(image, c, i, j, k):
    """Return a voxel of a channel, 0 outside."""
    if 0 <= i < image.shape[1] and 0 <= j < image.shape[2] and 0 <= k < image.shape[3]:
        return image[c, i, j, k]
    return image[0, 0, 0, 0] * np.float32(0)


@njit(nogil=True, cache=True, inline="always")
def _corners(image, c, i, j, k):
    """Return the eight voxels of a channel in the cell that begins at (i, j, k), k fastest, 0 outside."""
    if i >= 0 and j >= 0 and k >= 0 and i + 1 < image.shape[1] and j + 1 < image.shape[2] and k + 1 < image.shape[3]:
        return (
            image[c, i, j, k], image[c, i, j, k + 1], image[c, i, j + 1, k], image[c, i, j + 1, k + 1],
            image[c, i + 1, j, k], image[c, i + 1, j, k + 1], image[c, i + 1, j + 1, k], image[c, i + 1, j + 1, k + 1],
        )  # fmt: skip
    return (
        _value(image, c, i, j, k), _value(image, c, i, j, k + 1),
        _value(image, c, i, j + 1, k), _value(image, c, i, j + 1, k + 1),
        _value(image, c, i + 1, j, k), _value(image, c, i + 1, j, k + 1),
        _value(image, c, i + 1, j + 1, k), _value(image, c, i + 1, j + 1, k + 1),
    )  # fmt: skip


@njit(nogil=True, cache=True, fastmath={"contract"})
def _mixed(corners, x, y, z):
    """Return the value at shares (x, y, z) of a cell along i, j and k."""
    v000, v001, v010, v011, v100, v101, v110, v111 = corners
    o = _ONE - z
    v00, v01, v10, v11 = v000 * o + v001 * z, v010 * o + v011 * z, v100 * o + v101 * z, v110 * o + v111 * z
    return (v00 * (_ONE - y) + v01 * y) * (_ONE - x) + (v10 * (_ONE - y) + v11 * y) * x


@njit(nogil=True, cache=True)
def warp(grid, image, border, out, begin, end):
    """Write the image (channels, i, j, k) at the grid's places; beyond it 0, or its edge's values at a border."""
    for i in range(begin, end):
        for j in range(out.shape[2]):
            for k in range(out.shape[3]):
                k0, z, _ = _cell(_place(grid[0][i, j, k], image.shape[3]), image.shape[3], border)
                j0, y, _ = _cell(_place(grid[1][i, j, k], image.shape[2]), image.shape[2], border)
                i0, x, _ = _cell(_place(grid[2][i, j, k], image.shape[1]), image.shape[1], border)
                for c in range(image.shape[0]):
                    out[c, i, j, k] = _mixed(_corners(image, c, i0, j0, k0), x, y, z)


@njit(nogil=True, cache=True, fastmath={"contract"})
def warp_slopes(grid, image, border, outer, slope, begin, end):
    """Write the derivative of a warped image, times ``outer`` (channels, i, j, k), by the displacement (3, i, j, k)."""
    for i in range(begin, end):
        for j in range(outer.shape[2]):
            for k in range(outer.shape[3]):
                k0, z, along_k = _cell(_place(grid[0][i, j, k], image.shape[3]), image.shape[3], border)
                j0, y, along_j = _cell(_place(grid[1][i, j, k], image.shape[2]), image.shape[2], border)
                i0, x, along_i = _cell(_place(grid[2][i, j, k], image.shape[1]), image.shape[1], border)
                by_i = by_j = by_k = x * np.float32(0)
                for c in range(image.shape[0]):
                    v000, v001, v010, v011, v100, v101, v110, v111 = _corners(image, c, i0, j0, k0)
                    g = outer[c, i, j, k]
                    o = _ONE - z
                    v00, v01 = v000 * o + v001 * z, v010 * o + v011 * z
                    v10, v11 = v100 * o + v101 * z, v110 * o + v111 * z
                    by_i += g * ((v10 - v00) * (_ONE - y) + (v11 - v01) * y)
                    by_j += g * ((v01 - v00) * (_ONE - x) + (v11 - v10) * x)
                    near = (v001 - v000) * (_ONE - y) + (v011 - v010) * y
                    far = (v101 - v100) * (_ONE - y) + (v111 - v110) * y
                    by_k += g * (near * (_ONE - x) + far * x)
                slope[0, i, j, k] = by_i if along_i else by_i * np.float32(0)
                slope[1, i, j, k] = by_j if along_j else by_j * np.float32(0)
                slope[2, i, j, k] = by_k if along_k else by_k * np.float32(0)


@njit(nogil=True, cache=True)
def nearest_classes(grid, classes, fixed, warped, together, counts, begin, end):
    """Write the class at the voxel nearest to each place, 0 outside, and count classes.

    Args:
        classes, fixed: (i, j, k), of the moving and the fixed map.
        warped: (i, j, k), written.
        together, counts: (classes + 1,) int64, added to: where both have a class, and where the warped map has it.
    """
    n_i, n_j, n_k = classes.shape
    for i in range(begin, end):
        for j in range(fixed.shape[1]):
            for k in range(fixed.shape[2]):
                c = int(np.rint(_place(grid[0][i, j, k], n_k)))
                b = int(np.rint(_place(grid[1][i, j, k], n_j)))
                a = int(np.rint(_place(grid[2][i, j, k], n_i)))
                label = classes[a, b, c] if 0 <= a < n_i and 0 <= b < n_j and 0 <= c < n_k else 0
                warped[i, j, k] = label
                counts[label] += 1
                if label == fixed[i, j, k]:
                    together[label] += 1


@njit(nogil=True, cache=True)
def credit(fixed, warped, both, apart, out, begin, end):
    """Write ``both`` of a class where the two maps agree on it, minus ``apart`` of each one's class."""
    for i in range(begin, end):
        for j in range(fixed.shape[1]):
            for k in range(fixed.shape[2]):
                f, w = fixed[i, j, k], warped[i, j, k]
                out[i, j, k] = (both[f] if f == w else np.float32(0)) - apart[f] - apart[w]


@njit(nogil=True, cache=True, inline="always")
def _determinant(s, t, r):
    return s[0] * (t[1] * r[2] - t[2] * r[1]) + s[1] * (t[2] * r[0] - t[0] * r[2]) + s[2] * (t[0] * r[1] - t[1] * r[0])


@njit(nogil=True, cache=True)
def _rows(u, i, j, rows):
    """Copy where the four lines of nodes around a row of cells go, from the first corner: (a, b, 3) lines of nodes."""
    for a in range(2):
        for b in range(2):
            for x in range(3):
                line = rows[6 * a + 3 * b + x]
                move = np.float32(a if x == 0 else (b if x == 1 else 0))
                source = u[x, i + a, j + b]
                for k in range(len(source)):
                    line[k] = source[k] + move


@njit(nogil=True, cache=True)
def least_determinants(u, out, begin, end):
    """Write the least corner determinant of each cell; planes of cells.

    Args:
        u: (3, i, j, k) displacement.
        out: (i - 1, j - 1, k - 1).
    """
    rows = np.empty((12, u.shape[3]), u.dtype)
    for i in range(begin, end):
        for j in range(out.shape[1]):
            _rows(u, i, j, rows)
            a0, a1, a2, b0, b1, b2 = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
            c0, c1, c2, d0, d1, d2 = rows[6], rows[7], rows[8], rows[9], rows[10], rows[11]
            line = out[i, j]
            for k in range(out.shape[2]):
                m = k + 1
                e0, e1, e2, f0, f1, f2 = a0[m], a1[m], a2[m] + _ONE, b0[m], b1[m], b2[m] + _ONE
                g0, g1, g2, h0, h1, h2 = c0[m], c1[m], c2[m] + _ONE, d0[m], d1[m], d2[m] + _ONE
                s00, s01 = (c0[k] - a0[k], c1[k] - a1[k], c2[k] - a2[k]), (g0 - e0, g1 - e1, g2 - e2)
                s10, s11 = (d0[k] - b0[k], d1[k] - b1[k], d2[k] - b2[k]), (h0 - f0, h1 - f1, h2 - f2)
                t00, t01 = (b0[k] - a0[k], b1[k] - a1[k], b2[k] - a2[k]), (f0 - e0, f1 - e1, f2 - e2)
                t10, t11 = (d0[k] - c0[k], d1[k] - c1[k], d2[k] - c2[k]), (h0 - g0, h1 - g1, h2 - g2)
                r00, r01 = (e0 - a0[k], e1 - a1[k], e2 - a2[k]), (f0 - b0[k], f1 - b1[k], f2 - b2[k])
                r10, r11 = (g0 - c0[k], g1 - c1[k], g2 - c2[k]), (h0 - d0[k], h1 - d1[k], h2 - d2[k])
                low = min(min(_determinant(s00, t00, r00), _determinant(s01, t01, r00)),
                          min(_determinant(s10, t00, r01), _determinant(s11, t01, r01)))  # fmt: skip
                high = min(min(_determinant(s00, t10, r10), _determinant(s01, t11, r10)),
                           min(_determinant(s10, t10, r11), _determinant(s11, t11, r11)))  # fmt: skip
                line[k] = min(low, high)


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def diffusion(u, slope, weights, begin, end):
    """Return the sums of squared forward differences along i, j and k over planes, and write their slope.

    Args:
        u: (channels, i, j, k).
        slope: as u; half the derivative of the sum, each axis times its weight. Written.
        weights: (3,), as u.
    """
    n_i, n_j, n_k = u.shape[1:]
    along_i = along_j = along_k = 0.0
    for x in range(u.shape[0]):
        for i in range(begin, end):
            for j in range(n_j):
                here, out = u[x, i, j], slope[x, i, j]
                down, up = u[x, max(i - 1, 0), j], u[x, min(i + 1, n_i - 1), j]
                left, right = u[x, i, max(j - 1, 0)], u[x, i, min(j + 1, n_j - 1)]
                row_i = row_j = row_k = np.float32(0)
                for k in range(n_k):
                    di, dj = up[k] - here[k], right[k] - here[k]
                    row_i += di * di
                    row_j += dj * dj
                    out[k] = weights[0] * ((here[k] - down[k]) - di) + weights[1] * ((here[k] - left[k]) - dj)
                for k in range(n_k - 1):
                    dk = here[k + 1] - here[k]
                    row_k += dk * dk
                    out[k] -= weights[2] * dk
                for k in range(1, n_k):
                    out[k] += weights[2] * (here[k] - here[k - 1])
                along_i += row_i
                along_j += row_j
                along_k += row_k
    return along_i, along_j, along_k
