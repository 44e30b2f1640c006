"""Compiled loops of the fast engine: what a fault reaches in an integer network, and no more.

An integer layer is `acc[n, p, q, o] = bias[o] + sum over taps and channels of (x - zero) * w` in
int32 and `y = requantized(acc)`. Sums are exact, in any order, so a layer whose input or weights
change a little is updated from kept accumulators. Only `_requantize` rounds, and does it as
onnxruntime does (MlasRequantizeOutput: float32 product, clamp, round half to even, add the zero
point). The engine checks that on every kept value before it relies on it.

Arrays are C contiguous. x (N, H, W, C) and y (N, P, Q, O) hold codes as bytes: the code of a
signed type is `byte ^ 128`, which is the code plus 128, and its zero point is given 128 higher.

The loops that matter are written so that they become vector code: constant types, no branches.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import njit

from resq_deploy.inject.simd import (
    add_codes,
    differences,
    lowest_bit,
    popcount,
    update_16,
    update_32,
    update_64,
)

Geometry = namedtuple(
    "Geometry",
    "kernel_h kernel_w stride_h stride_w pad_h pad_w pad_h_end pad_w_end dilation_h dilation_w "
    "groups x_flip x_zero y_flip y_zero",
)
"""One layer in integers. `x_flip`, `y_flip`: 128 for signed codes, else 0."""

SINGLE = 4
"""Up to so many of 64 codes are looked up one by one."""


def _compiled(function):
    """Compile when first called; the result is kept on disk where there is a place for it."""
    options = {"boundscheck": False, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that can be written
        return njit(**options)(function)


@njit(inline="always", error_model="numpy")
def _requantize(acc, scale, y_zero, y_flip):
    """The stored byte of an accumulator; `y_zero`, `y_flip` int32."""
    value = np.float32(acc) * scale
    value = max(value, np.float32(-y_zero))
    value = min(value, np.float32(255 - y_zero))
    return np.uint8((np.int32(np.rint(value)) + y_zero) ^ y_flip)


@_compiled
def requantize(acc, scale, y_zero, y_flip, out):
    """`out` (rows, O) bytes from accumulators (rows, O) and scales (O,)."""
    zero, flip = np.int32(y_zero), np.int32(y_flip)
    for row in range(acc.shape[0]):
        for o in range(acc.shape[1]):
            out[row, o] = _requantize(acc[row, o], scale[o], zero, flip)


@njit(inline="always", error_model="numpy")
def _equal(a, b, start, stop):
    """Are the bytes [start, stop) of two vectors equal?"""
    total = np.uint8(0)
    for j in range(start, stop):
        total = np.uint8(total | (a[j] ^ b[j]))
    return total == 0


@_compiled
def differing(golden, images, new, found):
    """found[k] = does row k of bytes `new` (K, bytes) differ from row images[k] of `golden`?"""
    for k in range(images.size):
        a, b = golden[images[k]], new[k]
        same = True
        for start in range(0, a.size, 1024):
            same = same and _equal(a, b, start, min(start + 1024, a.size))
            if not same:
                break
        found[k] = not same


@_compiled
def faulty_weights(images, x, acc, y, scale, g, taps, delta, out, found):
    """Which of `images` change their output when a few weights of one layer change.

    Their input is the golden one. `taps` (F, 4): output channel, input channel in its group, row
    and column in the kernel of each weight, the weights of one output channel next to each other;
    `delta` (F,): new minus old code.
    Fills found[:F] with the numbers of the images that change, out[:F] with their rows of y;
    returns F.
    """
    n_found = 0
    height, width = x.shape[1], x.shape[2]
    in_group, out_group = x.shape[3] // g.groups, acc.shape[3] // g.groups
    rows, columns = acc.shape[1], acc.shape[2]
    zero, flip = np.int32(g.y_zero), np.int32(g.y_flip)
    x_zero, x_flip = np.int32(g.x_zero), np.int32(g.x_flip)
    change = np.zeros((rows, columns), np.int32)
    for n in images:
        copied = False
        first = 0
        while first < delta.size:
            o = taps[first, 0]
            change[:] = 0
            last = first
            while last < delta.size and taps[last, 0] == o:
                channel = o // out_group * in_group + taps[last, 1]
                step = np.int32(delta[last])
                down = taps[last, 2] * g.dilation_h - g.pad_h
                right = taps[last, 3] * g.dilation_w - g.pad_w
                # the columns whose tap lies inside of the image
                start = max(0, (-right + g.stride_w - 1) // g.stride_w)
                stop = min(columns, (width - 1 - right) // g.stride_w + 1)
                for p in range(rows):
                    i = p * g.stride_h + down
                    if 0 <= i < height:
                        for q in range(start, stop):
                            code = np.int32(x[n, i, q * g.stride_w + right, channel]) ^ x_flip
                            change[p, q] += step * (code - x_zero)
                last += 1
            for p in range(rows):
                for q in range(columns):
                    if change[p, q] != 0:
                        sums = np.int32(acc[n, p, q, o] + change[p, q])
                        code = _requantize(sums, scale[o], zero, flip)
                        if code != y[n, p, q, o]:
                            if not copied:
                                copied = True
                                out[n_found] = y[n]
                            out[n_found, p, q, o] = code
            first = last
        if copied:
            found[n_found] = n
            n_found += 1
    return n_found


@_compiled
def _count_different(a, b, size):
    """In how many of `size` bytes at two addresses do they differ (address, address)?"""
    count = 0
    for at in range(0, size - 63, 64):
        count += popcount(differences(a + at, b + at))
    return count


@_compiled
def _changed_codes(before, after, flip, width, channels, key, step, start):
    """List the codes that differ between two images (height * width * channels,).

    Pixel i has the entries start[i] to start[i + 1]: `key`, the place of the code in its row of
    pixels, column * channels + channel; and `step`, new minus old code.
    """
    count = pixel = row_start = 0
    start[0] = 0
    a, b, size = before.ctypes.data, after.ctypes.data, before.size
    row_size = width * channels
    for at in range(0, size, 64):
        if at + 64 <= size:
            mask = differences(a + at, b + at)
        else:
            mask = np.uint64(0)
            for i in range(size - at):
                mask |= np.uint64(before[at + i] != after[at + i]) << np.uint64(i)
        while mask:
            j = at + lowest_bit(mask)
            mask &= mask - np.uint64(1)
            while j >= (pixel + 1) * channels:
                pixel += 1
                start[pixel] = count
            while j >= row_start + row_size:
                row_start += row_size
            key[count] = j - row_start
            step[count] = np.int32(after[j] ^ flip) - np.int32(before[j] ^ flip)
            count += 1
    for i in range(pixel + 1, start.size):
        start[i] = count


@njit(inline="always", error_model="numpy")
def _update(
    sums, y, codes, scale, zero, flip, table, stride, n_out, ranges, n_ranges, keys, steps
):  # fmt: skip
    """Update the sums of one position, n_out of them, and requantize; did a code change?

    All are addresses but the numbers; `simd.update_16` says what of.
    """
    changed, o = np.int64(0), 0
    while o + 64 <= n_out:
        changed |= update_64(
            sums + 4 * o, y + o, codes + o, scale + 4 * o, zero, flip, table + o, stride, ranges,
            n_ranges, keys, steps,
        )  # fmt: skip
        o += 64
    if o + 32 <= n_out:
        changed |= update_32(
            sums + 4 * o, y + o, codes + o, scale + 4 * o, zero, flip, table + o, stride, ranges,
            n_ranges, keys, steps,
        )  # fmt: skip
        o += 32
    if o < n_out:
        changed |= update_16(
            sums + 4 * o, y + o, codes + o, scale + 4 * o, zero, flip, table + o, stride, ranges,
            n_ranges, keys, steps,
        )  # fmt: skip
    return changed != 0


@_compiled
def changed_inputs(
    new, images, x, acc, y, weights, shift, scale, g, taps, delta, limit, out, found, dense
):
    """Output rows of images whose input changed a little, from the kept accumulators.

    `new` (K, H, W, C) are the changed rows of x for the numbers `images`; `weights` and
    `shift` as in `layers.Layer`, with faulty weights changed, which `taps` and `delta` list as in
    `faulty_weights`. Where more than `limit` input codes differ nothing is computed, and the row
    number goes into `dense`. Fills found[:F] with the numbers of images whose output changes,
    out[:F] with their rows, dense[:D] with row numbers of `new`; returns F, D.
    """
    height, width, channels = x.shape[1], x.shape[2], x.shape[3]
    rows, columns, n_out = acc.shape[1], acc.shape[2], acc.shape[3]
    in_group, out_group = channels // g.groups, n_out // g.groups
    x_flip, x_zero = np.uint8(g.x_flip), np.int32(g.x_zero)
    padded = weights.shape[3]
    key = np.empty(x[0].size, np.int32)
    step = np.empty(x[0].size, np.int32)
    start = np.empty(height * width + 1, np.int64)
    ranges = np.empty((g.kernel_h * g.kernel_w, 3), np.int64)
    # Copies of one position, filled up: vectors must not read behind the end of an array, and sums
    # get what does not come from changed inputs.
    sums, before_codes = np.zeros(padded, np.int32), np.zeros(padded, np.uint8)
    codes, factors = np.empty(padded, np.uint8), np.zeros(padded, np.float32)
    shifted = False
    for o in range(n_out):
        factors[o] = scale[o]
        shifted = shifted or shift[o] != 0
    plain = g.groups == 1 and not shifted and delta.size == 0 and padded == n_out
    # Where the columns of the kernel are neighbours, one row of it is one range of entries.
    together = g.kernel_w if g.dilation_w == 1 else 1
    n_found = n_dense = 0
    for k in range(images.size):
        n = images[k]
        before, after = x[n].reshape(-1), new[k].reshape(-1)
        if _count_different(before.ctypes.data, after.ctypes.data, before.size) > limit:
            dense[n_dense] = k
            n_dense += 1
            continue
        _changed_codes(before, after, x_flip, width, channels, key, step, start)
        copied = False
        for p in range(rows):
            for q in range(columns):
                n_ranges = 0
                for a in range(g.kernel_h):
                    i = p * g.stride_h - g.pad_h + a * g.dilation_h
                    if i < 0 or i >= height:
                        continue
                    for b in range(0, g.kernel_w, together):
                        j = q * g.stride_w - g.pad_w + b * g.dilation_w
                        left, right = max(j, 0), min(j + together, width)
                        if left >= right:
                            continue
                        first, last = start[i * width + left], start[i * width + right]
                        if first == last:
                            continue
                        # weights[a, b, c] is row (a * kernel_w + b) * channels + c of the table,
                        # and key = (j + b) * channels + c
                        ranges[n_ranges, 0], ranges[n_ranges, 1] = first, last
                        ranges[n_ranges, 2] = (a * g.kernel_w + b - j) * channels
                        n_ranges += 1
                if n_ranges == 0 and delta.size == 0:
                    continue
                here = (n * rows + p) * columns + q
                source = acc.ctypes.data + 4 * here * n_out
                compared = y.ctypes.data + here * n_out
                if not plain:
                    for o in range(n_out):
                        sums[o], before_codes[o] = acc[n, p, q, o], y[n, p, q, o]
                        codes[o] = 0
                    source, compared = sums.ctypes.data, before_codes.ctypes.data
                    if shifted and g.groups == 1:
                        total = np.int32(0)
                        for r in range(n_ranges):
                            for e in range(ranges[r, 0], ranges[r, 1]):
                                total += step[e]
                        for o in range(n_out):
                            sums[o] += total * shift[o]
                    if g.groups > 1:
                        for r in range(n_ranges):
                            base = ranges[r, 2]
                            for e in range(ranges[r, 0], ranges[r, 1]):
                                row = base + key[e]
                                tap, c = row // channels, row % channels
                                o = c // in_group * out_group
                                a, b = tap // g.kernel_w, tap % g.kernel_w
                                for rest in range(o, o + out_group):
                                    w = np.int32(weights[a, b, c % in_group, rest]) + shift[rest]
                                    sums[rest] += step[e] * w
                        n_ranges = 0
                    for f in range(delta.size):
                        o = taps[f, 0]
                        i = p * g.stride_h - g.pad_h + taps[f, 2] * g.dilation_h
                        j = q * g.stride_w - g.pad_w + taps[f, 3] * g.dilation_w
                        if 0 <= i < height and 0 <= j < width:
                            c = o // out_group * in_group + taps[f, 1]
                            code = np.int32(x[n, i, j, c] ^ x_flip)
                            sums[o] += np.int32(delta[f]) * (code - x_zero)
                changed = _update(
                    source, compared, codes.ctypes.data, factors.ctypes.data, g.y_zero, g.y_flip,
                    weights.ctypes.data, padded, n_out, ranges.ctypes.data, n_ranges,
                    key.ctypes.data, step.ctypes.data,
                )  # fmt: skip
                if not changed:
                    continue
                if not plain:  # filled up places differ for nothing
                    changed = False
                    for o in range(n_out):
                        changed = changed or codes[o] != y[n, p, q, o]
                    if not changed:
                        continue
                if not copied:
                    copied = True
                    out[n_found] = y[n]
                for o in range(n_out):
                    out[n_found, p, q, o] = codes[o]
        if copied:
            found[n_found] = n
            n_found += 1
    return n_found, n_dense


@_compiled
def elementwise(a, new_a, row_a, b, new_b, row_b, table, linear, y, images, out, found):
    """Output rows of an operator that maps pairs of codes to codes, element by element.

    `a`, `b`, `y` (N, bytes) are kept; image images[k] has the row row_a[k] of `new_a` (-1: its kept
    row), and likewise b. `table` (65536,): output byte for 256 * a + b. `linear` (3,) float32: the
    factors of a and b and the constant with which `simd.add_codes` gives that table; NaN where it
    does not. Fills found[:F] and out[:F] as `changed_inputs` does; returns F.
    """
    n_found = 0
    codes = np.empty(64, np.uint8)
    vectors = linear[0] == linear[0]
    size = y.shape[1]
    for k in range(images.size):
        n, i, j = images[k], row_a[k], row_b[k]
        old_a, old_b = a.ctypes.data + n * size, b.ctypes.data + n * size
        now_a = old_a if i < 0 else new_a.ctypes.data + i * size
        now_b = old_b if j < 0 else new_b.ctypes.data + j * size
        copied = False
        for at in range(0, size, 64):
            if at + 64 <= size:
                mask = differences(now_a + at, old_a + at) | differences(now_b + at, old_b + at)
            else:  # the end of a row: look at every byte
                mask = (np.uint64(1) << np.uint64(size - at)) - np.uint64(1)
            if vectors and at + 64 <= size and popcount(mask) > SINGLE:
                changed = add_codes(
                    now_a + at, now_b + at, y.ctypes.data + n * size + at, codes.ctypes.data,
                    linear[0], linear[1], linear[2],
                )  # fmt: skip
                if changed:
                    if not copied:
                        copied = True
                        out[n_found] = y[n]
                    for i_code in range(64):
                        out[n_found, at + i_code] = codes[i_code]
                continue
            while mask:
                place = at + lowest_bit(mask)
                mask &= mask - np.uint64(1)
                one = a[n, place] if i < 0 else new_a[i, place]
                two = b[n, place] if j < 0 else new_b[j, place]
                code = table[(np.int64(one) << 8) | np.int64(two)]
                if code != y[n, place]:
                    if not copied:
                        copied = True
                        out[n_found] = y[n]
                    out[n_found, place] = code
        if copied:
            found[n_found] = n
            n_found += 1
    return n_found


@_compiled
def is_linear(linear, table):
    """Does `simd.add_codes` with these numbers give the table of `elementwise`?"""
    a, b = np.empty(64, np.uint8), np.empty(64, np.uint8)
    codes = np.empty(64, np.uint8)
    for start in range(0, table.size, 64):
        for i in range(64):
            a[i], b[i] = (start + i) >> 8, (start + i) & 255
        if add_codes(
            a.ctypes.data, b.ctypes.data, table.ctypes.data + start, codes.ctypes.data,
            linear[0], linear[1], linear[2],
        ):  # fmt: skip
            return False
    return True
