"""Vector operations that loops over single numbers do not compile to.

Plain LLVM vectors, not the instructions of one processor: LLVM splits them where registers are
shorter. Arguments are addresses (`array.ctypes.data`), and nothing checks bounds.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
LANES = 16
"""int32 numbers of one vector."""

INTS, FLOATS, BYTES = (ir.VectorType(kind, LANES) for kind in (I32, ir.FloatType(), I8))


def _load(builder, address, kind, offset=0):
    pointer = builder.inttoptr(builder.add(address, ir.Constant(I64, offset)), kind.as_pointer())
    return builder.load(pointer, align=1)


@intrinsic
def differences(typingctx, a, b):
    """Which of 64 bytes at two addresses differ: bit i is byte i."""

    def codegen(context, builder, signature, args):
        kind = ir.VectorType(I8, 64)
        one, two = (_load(builder, address, kind) for address in args)
        return builder.bitcast(builder.icmp_unsigned("!=", one, two), I64)

    return types.uint64(types.int64, types.int64), codegen


@intrinsic
def load_byte(typingctx, address):
    """The byte at an address."""

    def codegen(context, builder, signature, args):
        return _load(builder, args[0], I8)

    return types.uint8(types.int64), codegen


@intrinsic
def lowest_bit(typingctx, mask):
    """Number of the lowest set bit of a mask that is not 0."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(I1, 1))

    return types.int64(types.uint64), codegen


@intrinsic
def popcount(typingctx, mask):
    """Number of set bits."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.uint64), codegen


def _pairs(builder, one, two, start):
    """<32 x i16>: 16 numbers of two vectors from `start` on, taking turns."""
    n = one.type.count
    order = [i for at in range(start, start + LANES) for i in (at, n + at)]
    return builder.shuffle_vector(one, two, ir.Constant(ir.VectorType(I32, 2 * LANES), order))


def _dot_pairs(builder, a, b):
    """<16 x i32>: a[2i] * b[2i] + a[2i + 1] * b[2i + 1], which x86 does in one instruction."""
    wide = ir.VectorType(I32, 2 * LANES)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (
        builder.shuffle_vector(
            product,
            ir.Constant(wide, ir.Undefined),
            ir.Constant(ir.VectorType(I32, LANES), list(range(first, 2 * LANES, 2))),
        )
        for first in (0, 1)
    )
    return builder.add(even, odd)


def _splat(builder, number, kind):
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, number, I32(0))
    mask = ir.Constant(ir.VectorType(I32, kind.count), None)
    return builder.shuffle_vector(first, undefined, mask)


def _rint(builder, value):
    name = f"llvm.rint.v{LANES}f32"
    kind = ir.FunctionType(FLOATS, [FLOATS])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [value])


def _clamp(builder, value, low, high):
    value = builder.select(builder.fcmp_ordered(">", value, low), value, low)
    return builder.select(builder.fcmp_ordered("<", value, high), value, high)


def _store(builder, value, address, offset):
    place = builder.add(address, ir.Constant(I64, offset))
    builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=1)


def _changes(builder, code, before, offset):
    """i64: bit i is set where byte i of `code` differs from the one at `before` + offset."""
    different = builder.icmp_unsigned("!=", code, _load(builder, before, BYTES, offset))
    return builder.zext(builder.bitcast(different, I16), I64)


def _update(vectors):
    """An operation on `vectors` * LANES output codes; see `update_16` below."""

    @intrinsic
    def update(typingctx, sums, y, codes, scale, zero, flip, table, stride, ranges, n, keys, steps):
        def codegen(context, builder, signature, args):
            sums, y, codes, scale, zero, flip, table, stride, ranges, n, keys, steps = args
            nothing, one, four = (ir.Constant(I64, i) for i in (0, 1, 4))
            entry = builder.block
            initial = [_load(builder, sums, INTS, 4 * LANES * v) for v in range(vectors)]
            outer, inner, next_range, after = (
                builder.append_basic_block(name) for name in ("range", "rows", "next", "done")
            )
            builder.cbranch(builder.icmp_signed(">", n, nothing), outer, after)

            builder.position_at_end(outer)
            r = builder.phi(I64)
            outer_totals = [builder.phi(INTS) for _ in range(vectors)]
            place = builder.add(ranges, builder.mul(r, ir.Constant(I64, 24)))
            first, last, base = (_load(builder, place, I64, 8 * i) for i in range(3))
            start_of_table = builder.add(table, builder.mul(base, stride))
            builder.branch(inner)

            builder.position_at_end(inner)
            e = builder.phi(I64)
            totals = [builder.phi(INTS) for _ in range(vectors)]
            second = builder.add(e, one)
            paired = builder.icmp_signed("<", second, last)
            # without a second entry the first stands in for it, with the step 0
            offsets = [builder.mul(i, four) for i in (e, builder.select(paired, second, e))]
            rows = []
            for at in offsets:
                row = builder.sext(_load(builder, builder.add(keys, at), I32), I64)
                rows.append(builder.add(start_of_table, builder.mul(row, stride)))
            s0, s1 = (_load(builder, builder.add(steps, at), I32) for at in offsets)
            s1 = builder.select(paired, s1, ir.Constant(I32, 0))
            both = builder.or_(
                builder.and_(s0, ir.Constant(I32, 0xFFFF)), builder.shl(s1, ir.Constant(I32, 16))
            )
            pair = builder.bitcast(_splat(builder, both, INTS), ir.VectorType(I16, 2 * LANES))
            width = min(vectors, 2) * LANES
            updated = []
            for v in range(0, vectors, width // LANES):
                w0, w1 = (
                    builder.sext(
                        _load(builder, row, ir.VectorType(I8, width), LANES * v),
                        ir.VectorType(I16, width),
                    )
                    for row in rows
                )
                for at in range(0, width, LANES):
                    products = _dot_pairs(builder, _pairs(builder, w0, w1, at), pair)
                    updated.append(builder.add(totals[v + at // LANES], products))
            following = builder.add(e, ir.Constant(I64, 2))
            builder.cbranch(builder.icmp_signed("<", following, last), inner, next_range)
            e.add_incoming(first, outer)
            e.add_incoming(following, inner)
            for v, total in enumerate(totals):
                total.add_incoming(outer_totals[v], outer)
                total.add_incoming(updated[v], inner)

            builder.position_at_end(next_range)
            following_range = builder.add(r, one)
            builder.cbranch(builder.icmp_signed("<", following_range, n), outer, after)
            r.add_incoming(nothing, entry)
            r.add_incoming(following_range, next_range)
            for v, total in enumerate(outer_totals):
                total.add_incoming(initial[v], entry)
                total.add_incoming(updated[v], next_range)

            builder.position_at_end(after)
            finals = [builder.phi(INTS) for _ in range(vectors)]
            for v, final in enumerate(finals):
                final.add_incoming(initial[v], entry)
                final.add_incoming(updated[v], next_range)
            zeros = _splat(builder, builder.trunc(zero, I32), INTS)
            low = builder.sitofp(builder.neg(zeros), FLOATS)
            high = builder.sitofp(builder.sub(ir.Constant(INTS, [255] * LANES), zeros), FLOATS)
            flips = _splat(builder, builder.trunc(flip, I32), INTS)
            changed = nothing
            for v, final in enumerate(finals):
                factor = _load(builder, scale, FLOATS, 4 * LANES * v)
                value = builder.fmul(builder.sitofp(final, FLOATS), factor)
                whole = builder.fptosi(_rint(builder, _clamp(builder, value, low, high)), INTS)
                code = builder.trunc(builder.xor(builder.add(whole, zeros), flips), BYTES)
                _store(builder, code, codes, LANES * v)
                changed = builder.or_(changed, _changes(builder, code, y, LANES * v))
            return changed

        return types.int64(*[types.int64] * 12), codegen

    return update


update_64, update_32, update_16 = _update(4), _update(2), _update(1)
"""Update 16 sums, requantize them and compare: is the result not 0, some code differs.

(sums, y, codes, scale, zero, flip, table, stride, ranges, n, keys, steps): to int32 `sums` comes
steps[e] * table[base + keys[e]][0:16] for every e of the `n` > 0 `ranges` (first, last, base), with
int8 `table`, rows `stride` bytes apart, and int32 `steps` that fit into 16 bits. The bytes that
`kernels._requantize` makes of that with float32 `scale` go into `codes` and are compared with `y`.
`sums` itself stays as it is. Ranges are not empty.
"""


@intrinsic
def add_codes(typingctx, a, b, y, codes, factor_a, factor_b, constant):
    """Bytes saturated(rint(factor_a * a + (factor_b * b + constant))) of 64 bytes `a` and `b`.

    Both sums are rounded once (fused). They go into `codes`; bit i of the result says that byte i
    differs from `y`.
    """

    def codegen(context, builder, signature, args):
        a, b, y, codes, factor_a, factor_b, constant = args
        kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
        by_a, by_b, plus = (_splat(builder, f, FLOATS) for f in (factor_a, factor_b, constant))
        low, high = (ir.Constant(FLOATS, [f] * LANES) for f in (0.0, 255.0))
        changed = ir.Constant(I64, 0)
        for at in range(0, 64, LANES):
            one, two = (
                builder.uitofp(builder.zext(_load(builder, address, BYTES, at), INTS), FLOATS)
                for address in (a, b)
            )
            value = builder.call(fma, [one, by_a, builder.call(fma, [two, by_b, plus])])
            whole = builder.fptosi(_rint(builder, _clamp(builder, value, low, high)), INTS)
            code = builder.trunc(whole, BYTES)
            _store(builder, code, codes, at)
            mask = _changes(builder, code, y, at)
            changed = builder.or_(changed, builder.shl(mask, ir.Constant(I64, at)))
        return changed

    return types.uint64(*[types.int64] * 4, *[types.float32] * 3), codegen
