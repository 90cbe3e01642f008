# SPDX-License-Identifier: Apache-2.0
"""Vectors in arrays and out of them, and what a tile's members and samples have."""

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import signature

from .vectors import Vector, emit_muladd, instruction, shuffle, splat


def _pointer(context, builder, array_type, array, index, kind):
    """To the vector number `index` of an array."""
    data = context.make_array(array_type)(context, builder, array).data
    offset = builder.mul(index, ir.IntType(64)(kind.lanes))
    return builder.bitcast(builder.gep(data, [offset]), kind.llvm.as_pointer())


def _load(context, builder, array_type, array, index, kind):
    pointer = _pointer(context, builder, array_type, array, index, kind)
    return builder.load(pointer, align=array_type.dtype.bitwidth // 8)


def _loading(lanes, a):
    kind = Vector(a.dtype, lanes)

    def emit(context, builder, sig, args):
        return _load(context, builder, a, args[1], args[2], kind)

    return kind, emit


@instruction
def load(typing, tile, a, i):
    """The vector number i of a, counted in vectors of all lanes."""
    kind, emit = _loading(tile.lanes, a)
    return signature(kind, tile, a, types.int64), emit


@instruction
def load_members(typing, tile, a, i):
    """The vector number i of a, counted in vectors of one number for each member."""
    kind, emit = _loading(tile.tile.members, a)
    return signature(kind, tile, a, types.int64), emit


@instruction
def store(typing, a, i, value):
    """Writes the vector number i of a, counted in vectors as long as this one."""

    def emit(context, builder, sig, args):
        pointer = _pointer(context, builder, a, args[0], args[1], value)
        builder.store(args[2], pointer, align=a.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return signature(types.void, a, types.int64, value), emit


@instruction
def repeat(typing, tile, value):
    """What each member has, for each of its samples."""
    kind = Vector(value.scalar, tile.lanes)

    def emit(context, builder, sig, args):
        return shuffle(builder, args[1], [lane % value.lanes for lane in range(kind.lanes)])

    return signature(kind, tile, value), emit


@instruction
def fill(typing, tile, a, value):
    """A vector of numbers like those of a, for each member the same one."""
    kind = Vector(a.dtype, tile.tile.members)
    return signature(kind, tile, a, kind), lambda _, builder, sig, args: args[2]


@instruction
def spread(typing, tile, a, places, first, i):
    """For each sample s of the tile a[places[first + s] + i], for all of its members."""

    def emit(context, builder, sig, args):
        _, array, own, first, i = args
        own = context.make_array(places)(context, builder, own).data
        starts = [
            builder.load(builder.gep(own, [builder.add(first, ir.IntType(64)(s))])) for s in range(tile.tile.samples)
        ]
        return _spread(context, builder, tile, a, array, [builder.add(start, i) for start in starts])

    return signature(Vector(a.dtype, tile.lanes), tile, a, places, types.int64, types.int64), emit


@instruction
def spread_next(typing, tile, a, i):
    """For each sample s of the tile a[i + s], for all of its members."""

    def emit(context, builder, sig, args):
        indices = [builder.add(args[2], ir.IntType(64)(s)) for s in range(tile.tile.samples)]
        return _spread(context, builder, tile, a, args[1], indices)

    return signature(Vector(a.dtype, tile.lanes), tile, a, types.int64), emit


def _spread(context, builder, tile, array_type, array, indices):
    """A number of the array for each sample, for all of its members."""
    kind = Vector(array_type.dtype, tile.tile.members)
    data = context.make_array(array_type)(context, builder, array).data
    parts = [splat(builder, builder.load(builder.gep(data, [i])), kind) for i in indices]
    while len(parts) > 1:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [builder.shuffle_vector(a, b, mask) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@instruction
def store_rows(typing, tile, a, i, stride, value):
    """Writes what the members have, sample by sample, as vectors i, i + stride and so on of a."""
    kind = Vector(a.dtype, tile.tile.members)

    def emit(context, builder, sig, args):
        _, array, first, step, value = args
        for s in range(tile.tile.samples):
            part = shuffle(builder, value, range(s * kind.lanes, (s + 1) * kind.lanes))
            index = builder.add(first, builder.mul(step, ir.IntType(64)(s)))
            builder.store(part, _pointer(context, builder, a, array, index, kind), align=a.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return signature(types.void, tile, a, types.int64, types.int64, value), emit


@instruction
def samples_of(typing, tile):
    return signature(types.int64, tile), lambda _, builder, sig, args: ir.IntType(64)(tile.tile.samples)


@instruction
def members_of(typing, tile):
    return signature(types.int64, tile), lambda _, builder, sig, args: ir.IntType(64)(tile.tile.members)


@instruction
def add_products(typing, tile, a, i, left, right):
    """Adds to a, for each member, left * right summed over its samples."""
    kind, samples = Vector(a.dtype, tile.tile.members), tile.tile.samples

    def emit(context, builder, sig, args):
        _, array, index, left, right = args
        total = _load(context, builder, a, array, index, kind)
        if kind.lanes > 1:
            for sample in range(samples):
                lanes = range(sample * kind.lanes, (sample + 1) * kind.lanes)
                total = emit_muladd(builder, shuffle(builder, left, lanes), shuffle(builder, right, lanes), total)
        else:
            rest = builder.fmul(left, right)
            while (half := rest.type.count // 2) >= 1:
                low, high = shuffle(builder, rest, range(half)), shuffle(builder, rest, range(half, 2 * half))
                rest = builder.fadd(low, high)
            total = builder.fadd(total, rest)
        builder.store(total, _pointer(context, builder, a, array, index, kind), align=a.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return signature(types.void, tile, a, types.int64, left, right), emit
