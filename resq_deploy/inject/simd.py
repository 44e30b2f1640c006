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


def _add_rows(vectors):
    """An operation on `vectors` * LANES numbers; see `add_rows_16` below."""

    @intrinsic
    def add_rows(typingctx, sums, table, stride, rows, factors, count):
        def codegen(context, builder, signature, args):
            sums, table, stride, rows, factors, count = args
            wide, narrow = ir.VectorType(I32, LANES), ir.VectorType(I16, LANES)
            before = builder.block
            initial = [_load(builder, sums, wide, 4 * LANES * v) for v in range(vectors)]
            loop = builder.append_basic_block("rows")
            after = builder.append_basic_block("done")
            zero = ir.Constant(I64, 0)
            builder.cbranch(builder.icmp_signed(">", count, zero), loop, after)

            builder.position_at_end(loop)
            e = builder.phi(I64)
            totals = [builder.phi(wide) for _ in range(vectors)]
            offset = builder.mul(e, ir.Constant(I64, 4))
            row = builder.sext(_load(builder, builder.add(rows, offset), I32), I64)
            factor = _load(builder, builder.add(factors, offset), I32)
            lane = builder.insert_element(ir.Constant(wide, ir.Undefined), factor, I32(0))
            splat = builder.shuffle_vector(
                lane, ir.Constant(wide, ir.Undefined), ir.Constant(ir.VectorType(I32, LANES), None)
            )
            start = builder.add(table, builder.mul(row, stride))
            sums_now = [
                builder.add(
                    total,
                    builder.mul(
                        splat, builder.sext(_load(builder, start, narrow, 2 * LANES * v), wide)
                    ),
                )
                for v, total in enumerate(totals)
            ]
            following = builder.add(e, ir.Constant(I64, 1))
            builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
            e.add_incoming(zero, before)
            e.add_incoming(following, loop)
            for v, total in enumerate(totals):
                total.add_incoming(initial[v], before)
                total.add_incoming(sums_now[v], loop)

            builder.position_at_end(after)
            for v in range(vectors):
                final = builder.phi(wide)
                final.add_incoming(initial[v], before)
                final.add_incoming(sums_now[v], loop)
                initial[v] = final
            for v in range(vectors):
                place = builder.add(sums, ir.Constant(I64, 4 * LANES * v))
                builder.store(initial[v], builder.inttoptr(place, wide.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return add_rows


add_rows_64, add_rows_32, add_rows_16 = _add_rows(4), _add_rows(2), _add_rows(1)
"""(sums, table, stride, rows, factors, count): sums[0:16] += factors[e] * table[rows[e]][0:16].

int32 `sums`, `rows` and `factors`, int16 `table` with rows `stride` bytes apart; e < count.
"""


@intrinsic
def requantize_16(typingctx, sums, scale, zero, flip, before, codes):
    """Bytes `codes` of LANES int32 `sums` with float32 `scale`; which differ from `before`?

    The same arithmetic as `kernels._requantize`; `zero` and `flip` are numbers, bit i of the
    result is byte i.
    """

    def codegen(context, builder, signature, args):
        sums, scale, zero, flip, before, codes = args
        floats, ints = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(I32, LANES)
        bytes_ = ir.VectorType(I8, LANES)

        def splat(number):
            undefined = ir.Constant(ints, ir.Undefined)
            first = builder.insert_element(undefined, builder.trunc(number, I32), I32(0))
            return builder.shuffle_vector(first, undefined, ir.Constant(ints, None))

        zeros = splat(zero)
        low = builder.sitofp(builder.neg(zeros), floats)
        high = builder.sitofp(builder.sub(ir.Constant(ints, [255] * LANES), zeros), floats)
        value = builder.fmul(
            builder.sitofp(_load(builder, sums, ints), floats), _load(builder, scale, floats)
        )
        value = builder.select(builder.fcmp_ordered(">", value, low), value, low)
        value = builder.select(builder.fcmp_ordered("<", value, high), value, high)
        rint = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(floats, [floats]), f"llvm.rint.v{LANES}f32"
        )
        whole = builder.fptosi(builder.call(rint, [value]), ints)
        code = builder.trunc(builder.xor(builder.add(whole, zeros), splat(flip)), bytes_)
        builder.store(code, builder.inttoptr(codes, bytes_.as_pointer()), align=1)
        different = builder.icmp_unsigned("!=", code, _load(builder, before, bytes_))
        return builder.zext(builder.bitcast(different, I16), I64)

    return types.int64(*[types.int64] * 6), codegen
