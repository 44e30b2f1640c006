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

from resq_deploy.compiled import compiled
from resq_deploy.inject.simd import (
    add_codes,
    differences,
    load_byte,
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


@njit(inline="always", error_model="numpy")
def _requantize(acc, scale, y_zero, y_flip):
    """The stored byte of an accumulator; `y_zero`, `y_flip` int32."""
    value = np.float32(acc) * scale
    value = max(value, np.float32(-y_zero))
    value = min(value, np.float32(255 - y_zero))
    return np.uint8((np.int32(np.rint(value)) + y_zero) ^ y_flip)


@compiled()
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


@compiled()
def differing(golden, images, new, rows, found):
    """Keep the rows of bytes `new` (K, bytes) that differ from the rows `images` of `golden`.

    They go into rows[:F], the numbers of their images into found[:F]; returns F.
    """
    n_found = 0
    for k in range(images.size):
        a, b = golden[images[k]], new[k]
        same = True
        for start in range(0, a.size, 1024):
            same = same and _equal(a, b, start, min(start + 1024, a.size))
            if not same:
                break
        if not same:
            found[n_found] = images[k]
            rows[n_found] = b
            n_found += 1
    return n_found


@compiled()
def faulty_weights(
    images, begin, x, acc, y, scale, g, taps, delta, n_found, count, found, first, places, codes
):  # fmt: skip
    """What changes in the output of a layer when a few of its weights change.

    `images` are those that are looked at; their input is the golden one. `taps` (F, 4): output
    channel, input channel in its group, row and column in the kernel of each weight, in ascending
    order of the output channel; `delta` (F,): new minus old code.

    Changes are listed as by all kernels: found[i] is an image that changes, places[first[i]:
    first[i + 1]] are the places in its output, ascending, and codes[...] its new codes there. A
    call begins at images[begin], behind `n_found` listed images and `count` entries, and returns
    where it ended and these two: before the last image when the lists are too full for the next.
    """
    height, width = x.shape[1], x.shape[2]
    n_out = acc.shape[3]
    in_group, out_group = x.shape[3] // g.groups, n_out // g.groups
    rows, columns = acc.shape[1], acc.shape[2]
    zero, flip = np.int32(g.y_zero), np.int32(g.y_flip)
    x_zero, x_flip = np.int32(g.x_zero), np.int32(g.x_flip)
    for k in range(begin, images.size):
        n = images[k]
        before = count
        if count + rows * columns * delta.size > places.size:
            return k, n_found, count
        for p in range(rows):
            for q in range(columns):
                change = np.int32(0)
                for f in range(delta.size):
                    o = taps[f, 0]
                    i = p * g.stride_h - g.pad_h + taps[f, 2] * g.dilation_h
                    j = q * g.stride_w - g.pad_w + taps[f, 3] * g.dilation_w
                    if 0 <= i < height and 0 <= j < width:
                        c = o // out_group * in_group + taps[f, 1] if g.groups > 1 else taps[f, 1]
                        code = np.int32(x[n, i, j, c]) ^ x_flip
                        change += np.int32(delta[f]) * (code - x_zero)
                    if change != 0 and (f + 1 == delta.size or taps[f + 1, 0] != o):
                        sums = np.int32(acc[n, p, q, o] + change)
                        code = _requantize(sums, scale[o], zero, flip)
                        places[count] = (p * columns + q) * n_out + o
                        codes[count] = code
                        count += code != y[n, p, q, o]
                        change = np.int32(0)
        if count > before:
            found[n_found], first[n_found] = n, before
            n_found += 1
            first[n_found] = count
    return images.size, n_found, count


@compiled()
def faulty_channel(
    images, begin, x, acc, o, n_out, scale, g, taps, delta, n_found, count, found, first, places,
    codes,
):  # fmt: skip
    """`faulty_weights` for weights of one output channel, from copies that lie channel by channel.

    x (C, N, H, W) holds bytes, `acc` (N, P, Q) the accumulators of the output channel `o` of
    `n_out`, `scale` is that of the channel. What a position needs of a layer with channels last
    lies in as many cache lines as there are arrays; here sixteen positions and more share one.
    """
    height, width = x.shape[2], x.shape[3]
    rows, columns = acc.shape[1], acc.shape[2]
    zero, flip = np.int32(g.y_zero), np.int32(g.y_flip)
    x_zero, x_flip = np.int32(g.x_zero), np.uint8(g.x_flip)
    first_channel = o // (n_out // g.groups) * (x.shape[0] // g.groups)
    change = np.empty((rows, columns), np.int32)
    after, different = np.empty(rows * columns, np.uint8), np.empty(rows * columns, np.uint8)
    for k in range(begin, images.size):
        n = images[k]
        if count + rows * columns > places.size:
            return k, n_found, count
        change[:] = 0
        for f in range(delta.size):
            plane = x[first_channel + taps[f, 1], n]
            step = np.int32(delta[f])
            top = taps[f, 2] * g.dilation_h - g.pad_h
            left = taps[f, 3] * g.dilation_w - g.pad_w
            start = max(0, (g.stride_w - 1 - left) // g.stride_w)
            stop = min(columns, (width - 1 - left) // g.stride_w + 1)
            for p in range(rows):
                i = p * g.stride_h + top
                if i < 0 or i >= height:
                    continue
                if g.stride_w == 1:  # the same, as vector code
                    for q in range(start, stop):
                        change[p, q] += step * (np.int32(plane[i, q + left] ^ x_flip) - x_zero)
                else:
                    for q in range(start, stop):
                        j = q * g.stride_w + left
                        change[p, q] += step * (np.int32(plane[i, j] ^ x_flip) - x_zero)
        sums, more = acc[n].reshape(-1), change.reshape(-1)
        any_different = np.uint8(0)
        for r in range(sums.size):
            after[r] = _requantize(np.int32(sums[r] + more[r]), scale, zero, flip)
            different[r] = after[r] ^ _requantize(sums[r], scale, zero, flip)
            any_different = np.uint8(any_different | different[r])
        if any_different != 0:
            found[n_found], first[n_found] = n, count
            for r in range(sums.size):
                places[count] = r * n_out + o
                codes[count] = after[r]
                count += different[r] != 0
            n_found += 1
            first[n_found] = count
    return images.size, n_found, count


@compiled()
def _count_different(a, b, size):
    """In how many of `size` bytes at two addresses do they differ (address, address)?"""
    count = 0
    for at in range(0, size - 63, 64):
        count += popcount(differences(a + at, b + at))
    return count


@compiled()
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
    while o < n_out:
        changed |= update_16(
            sums + 4 * o, y + o, codes + o, scale + 4 * o, zero, flip, table + o, stride, ranges,
            n_ranges, keys, steps,
        )  # fmt: skip
        o += 16
    return changed != 0


@compiled()
def _listed(places, codes, before, flip, width, channels, key, step, start):
    """`_changed_codes` from a list of changes instead of an image."""
    pixel = row_start = 0
    start[0] = 0
    row_size = width * channels
    for count in range(places.size):
        j = np.int64(places[count])
        while j >= (pixel + 1) * channels:
            pixel += 1
            start[pixel] = count
        while j >= row_start + row_size:
            row_start += row_size
        key[count] = j - row_start
        step[count] = np.int32(codes[count] ^ flip) - np.int32(before[j] ^ flip)
    for i in range(pixel + 1, start.size):
        start[i] = places.size


@compiled()
def changed_inputs(
    images, begin, in_first, in_places, in_codes, new, x, acc, y, weights, shift, scale, g, taps,
    delta, limit, n_dense, dense, n_found, count, found, first, places, codes,
):  # fmt: skip
    """What changes in the output of a layer whose input changed a little.

    `images`: the first of them have their changes listed (`in_first`, `in_places`, `in_codes`, as
    `faulty_weights` lists them), the others have whole rows `new` (K, H, W, C). `weights` and
    `shift` as in `layers.Layer`, faulty weights changed, which `taps` and `delta` say as in
    `faulty_weights`. Images with more than `limit` changed codes are not computed; their positions
    in `images` go into `dense`, of which `n_dense` are used. Lists changes as `faulty_weights`;
    returns where it ended, and n_dense, n_found and count.
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
    after_codes, factors = np.empty(padded, np.uint8), np.zeros(padded, np.float32)
    shifted = False
    for o in range(n_out):
        factors[o] = scale[o]
        shifted = shifted or shift[o] != 0
    plain = g.groups == 1 and not shifted and delta.size == 0 and padded == n_out
    # Where the columns of the kernel are neighbours, one row of it is one range of entries.
    together = g.kernel_w if g.dilation_w == 1 else 1
    n_lists = in_first.size - 1
    for k in range(begin, images.size):
        n = images[k]
        if count + acc[n].size > places.size:
            return k, n_dense, n_found, count
        before = x[n].reshape(-1)
        if k < n_lists:
            from_, to = in_first[k], in_first[k + 1]
            if to - from_ > limit:
                dense[n_dense] = k
                n_dense += 1
                continue
            _listed(in_places[from_:to], in_codes[from_:to], before, x_flip, width, channels, key,
                    step, start)  # fmt: skip
        else:
            after = new[k - n_lists].reshape(-1)
            if _count_different(before.ctypes.data, after.ctypes.data, before.size) > limit:
                dense[n_dense] = k
                n_dense += 1
                continue
            _changed_codes(before, after, x_flip, width, channels, key, step, start)
        entries = count
        for p in range(rows):
            leftmost, rightmost = columns, -1
            if delta.size > 0:
                leftmost, rightmost = 0, columns - 1
            for a in range(g.kernel_h):  # which positions of this row are reached at all?
                i = p * g.stride_h - g.pad_h + a * g.dilation_h
                if i < 0 or i >= height:
                    continue
                low, high = start[i * width], start[(i + 1) * width]
                if low == high:
                    continue
                left = key[low] // channels + g.pad_w - (g.kernel_w - 1) * g.dilation_w
                right = key[high - 1] // channels + g.pad_w
                leftmost = min(leftmost, (left + g.stride_w - 1) // g.stride_w)
                rightmost = max(rightmost, right // g.stride_w)
            for q in range(max(leftmost, 0), min(rightmost, columns - 1) + 1):
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
                        low, high = start[i * width + left], start[i * width + right]
                        if low == high:
                            continue
                        # weights[a, b, c] is row (a * kernel_w + b) * channels + c of the table,
                        # and key = (j + b) * channels + c
                        ranges[n_ranges, 0], ranges[n_ranges, 1] = low, high
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
                        after_codes[o] = 0
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
                    source, compared, after_codes.ctypes.data, factors.ctypes.data, g.y_zero,
                    g.y_flip, weights.ctypes.data, padded, n_out, ranges.ctypes.data, n_ranges,
                    key.ctypes.data, step.ctypes.data,
                )  # fmt: skip
                if not changed:
                    continue
                place = (p * columns + q) * n_out
                at = 0
                while at + 64 <= n_out:
                    mask = differences(
                        after_codes.ctypes.data + at, y.ctypes.data + here * n_out + at
                    )
                    while mask:
                        o = at + lowest_bit(mask)
                        mask &= mask - np.uint64(1)
                        places[count], codes[count] = place + o, after_codes[o]
                        count += 1
                    at += 64
                for o in range(at, n_out):  # written always, kept only where it differs
                    places[count], codes[count] = place + o, after_codes[o]
                    count += after_codes[o] != y[n, p, q, o]
        if count > entries:
            found[n_found], first[n_found] = n, entries
            n_found += 1
            first[n_found] = count
    return images.size, n_dense, n_found, count


@compiled()
def materialize(kept, images, at, n_listed, first, places, codes, rows, out):
    """Whole rows `out` (K, bytes) of a value: the kept ones, with the changes listed or as rows.

    at[k] is where image images[k] stands among the changed ones, of which the first `n_listed` have
    lists and the others `rows`; -1: it is not changed.
    """
    for k in range(images.size):
        if at[k] >= n_listed:
            out[k] = rows[at[k] - n_listed]
            continue
        out[k] = kept[images[k]]
        if at[k] >= 0:
            for e in range(first[at[k]], first[at[k] + 1]):
                out[k, places[e]] = codes[e]


@compiled()
def elementwise_lists(
    images, begin, a, row_a, first_a, places_a, codes_a, b, row_b, first_b, places_b, codes_b,
    table, y, n_found, count, found, first, places, codes,
):  # fmt: skip
    """What changes in the output of an operator that maps pairs of codes to codes.

    `a`, `b`, `y` (N, bytes) are kept; the changes of image images[k] in a are the list number
    row_a[k] (-1: none), and likewise in b. `table` (65536,): output byte for 256 * a + b. Lists and
    returns as `faulty_weights`.
    """
    for k in range(begin, images.size):
        n = images[k]
        i = end_a = j = end_b = 0
        if row_a[k] >= 0:
            i, end_a = first_a[row_a[k]], first_a[row_a[k] + 1]
        if row_b[k] >= 0:
            j, end_b = first_b[row_b[k]], first_b[row_b[k] + 1]
        entries = count
        if count + end_a - i + end_b - j > places.size:
            return k, n_found, count
        while i < end_a or j < end_b:
            place_a = np.int64(places_a[i]) if i < end_a else np.int64(2**62)
            place_b = np.int64(places_b[j]) if j < end_b else np.int64(2**62)
            place = min(place_a, place_b)
            one, two = a[n, place], b[n, place]
            if place_a == place:
                one = codes_a[i]
                i += 1
            if place_b == place:
                two = codes_b[j]
                j += 1
            code = table[(np.int64(one) << 8) | np.int64(two)]
            places[count], codes[count] = place, code
            count += code != y[n, place]
        if count > entries:
            found[n_found], first[n_found] = n, entries
            n_found += 1
            first[n_found] = count
    return images.size, n_found, count


@njit(inline="always", error_model="numpy")
def _row(kept, n, at, n_listed, first, places, codes, rows, scratch):
    """Address of the bytes of one image of a value (`materialize`)."""
    size = kept.shape[1]
    if at >= n_listed:
        return rows.ctypes.data + (at - n_listed) * size
    if at < 0:
        return kept.ctypes.data + n * size
    scratch[:] = kept[n]
    for e in range(first[at], first[at + 1]):
        scratch[places[e]] = codes[e]
    return scratch.ctypes.data


@compiled()
def elementwise_rows(
    images, a, at_a, listed_a, first_a, places_a, codes_a, rows_a, b, at_b, listed_b, first_b,
    places_b, codes_b, rows_b, table, linear, y, out, found,
):  # fmt: skip
    """The output rows of images of which an operand is a whole new row.

    The operands are given as `materialize` takes them. `linear` (3,) float32: the factors of a and
    b and the constant with which `simd.add_codes` gives the table; NaN where it does not. Fills
    found[:F] and out[:F]; returns F.
    """
    n_found = 0
    size = y.shape[1]
    vectors = linear[0] == linear[0]
    scratch_a, scratch_b = np.empty(size, np.uint8), np.empty(size, np.uint8)
    for k in range(images.size):
        n = images[k]
        one = _row(a, n, at_a[k], listed_a, first_a, places_a, codes_a, rows_a, scratch_a)
        two = _row(b, n, at_b[k], listed_b, first_b, places_b, codes_b, rows_b, scratch_b)
        at, changed = 0, False
        if vectors:
            while at + 64 <= size:
                mask = add_codes(
                    one + at, two + at, y.ctypes.data + n * size + at,
                    out.ctypes.data + n_found * size + at, linear[0], linear[1], linear[2],
                )  # fmt: skip
                changed = changed or mask != 0
                at += 64
        for place in range(at, size):
            code = table[(np.int64(load_byte(one + place)) << 8) | np.int64(load_byte(two + place))]
            out[n_found, place] = code
            changed = changed or code != y[n, place]
        if changed:
            found[n_found] = n
            n_found += 1
    return n_found


@compiled()
def changed_channels(
    images, begin, x, first, places, codes, channels, last_axis, seen, numbers, which, planes
):
    """Gather the channels that listed changes touch, each as the plane that it has become.

    x (N, bytes) kept, with `channels` along the last axis or the first one. Plane m becomes
    planes[m] (pixels,): channel which[m] of the image at numbers[m] in `images`. `seen` (channels,)
    is scratch. Begins at images[begin]; returns where it ended, before an image whose channels do
    not fit any more, and the number of planes.
    """
    pixels = x.shape[1] // channels
    count = 0
    seen[:] = -1
    for k in range(begin, images.size):
        if count + min(channels, first[k + 1] - first[k]) > planes.shape[0]:
            return k, count
        start = count
        for e in range(first[k], first[k + 1]):
            place = np.int64(places[e])
            c = place % channels if last_axis else place // pixels
            pixel = place // channels if last_axis else place % pixels
            if seen[c] < start:
                seen[c] = count
                numbers[count], which[count] = k, c
                for i in range(pixels):
                    at = i * channels + c if last_axis else c * pixels + i
                    planes[count, i] = x[images[k], at]
                count += 1
            planes[seen[c], pixel] = codes[e]
    return images.size, count


@compiled()
def list_channels(images, numbers, which, new, y, n_found, count, found, first, places, codes):
    """List the planes whose output changed: one byte `new` (M,) for each, at place which[m] of y.

    As `faulty_weights`; places of one image come in the order of the planes.
    """
    m = 0
    while m < numbers.size:
        k, entries = numbers[m], count
        while m < numbers.size and numbers[m] == k:
            if new[m] != y[images[k], which[m]]:
                # keep the places of an image ascending
                at = count
                while at > entries and places[at - 1] > which[m]:
                    places[at], codes[at] = places[at - 1], codes[at - 1]
                    at -= 1
                places[at], codes[at] = which[m], new[m]
                count += 1
            m += 1
        if count > entries:
            found[n_found], first[n_found] = images[k], entries
            n_found += 1
            first[n_found] = count
    return n_found, count


@compiled()
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
