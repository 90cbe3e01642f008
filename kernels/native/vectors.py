"""Vectors of constant length for numba: every operation is one of LLVM's on <n x float> or <n x double>.

Loops over lanes would leave it to the compiler to see that arrays do not overlap, and it gives up on the exponential.
No operation may be reordered, so NaN and inf come out as IEEE has them; products with a sum are fused where the machine
can.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from llvmlite import ir
from numba.core import types
from numba.core.imputils import lower_constant
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import (
    NativeValue,
    intrinsic,
    lower_builtin,
    lower_cast,
    models,
    register_model,
    typeof_impl,
    unbox,
)

__all__ = [
    "Tile",
    "Vector",
    "add_products",
    "fill",
    "load",
    "load_members",
    "members_of",
    "muladd",
    "power",
    "repeat",
    "samples_of",
    "select",
    "spread",
    "spread_next",
    "sqrt",
    "store",
    "store_rows",
]

_instruction = cast("Callable[[Callable], Callable[..., Any]]", intrinsic(prefer_literal=False))

# --- types -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """What the lanes of a vector are: `samples` samples, each of `members` networks, those of one sample together."""

    samples: int
    members: int


class TileType(types.Type):
    """The type of a Tile: its numbers are known to the compiler."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        self.lanes = tile.samples * tile.members
        super().__init__(f"Tile({tile.samples}, {tile.members})")


class Vector(types.Type):
    """`lanes` numbers of one type, or truth values."""

    def __init__(self, scalar: types.Type, lanes: int) -> None:
        self.scalar, self.lanes = scalar, lanes
        super().__init__(f"Vector({scalar}, {lanes})")

    @property
    def llvm(self) -> ir.VectorType:
        kinds = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.boolean: ir.IntType(1)}
        return ir.VectorType(kinds[self.scalar], self.lanes)


@typeof_impl.register(Tile)
def _typeof_tile(value, context):
    return TileType(value)


register_model(TileType)(models.OpaqueModel)


@unbox(TileType)
def _unbox_tile(kind, value, c):
    return NativeValue(c.context.get_dummy_value())


@lower_constant(TileType)
def _constant_tile(context, builder, kind, value):
    return context.get_dummy_value()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.llvm)


@lower_cast(types.Float, Vector)
def _float_to_vector(context, builder, source, target, value):
    return _splat(builder, context.cast(builder, value, source, target.scalar), target)


def _splat(builder, value, kind):
    one = builder.insert_element(ir.Constant(kind.llvm, ir.Undefined), value, ir.IntType(32)(0))
    return _shuffle(builder, one, [0] * kind.lanes)


def _shuffle(builder, value, lanes):
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


# --- arithmetic --------------------------------------------------------------------------------------------


def _vector_among(args):
    """The vector that an operation on vectors, or on a vector and a number, is about; None for anything else."""
    vectors = {kind for kind in args if isinstance(kind, Vector)}
    rest = [kind for kind in args if not isinstance(kind, (Vector, types.Float))]
    return vectors.pop() if len(vectors) == 1 and not rest else None


class _Arithmetic(AbstractTemplate):
    def generic(self, args, kws):
        kind = _vector_among(args)
        return None if kind is None else signature(kind, *[kind] * len(args))


class _Comparison(AbstractTemplate):
    def generic(self, args, kws):
        kind = _vector_among(args)
        return None if kind is None else signature(Vector(types.boolean, kind.lanes), *[kind] * len(args))


def _register(function, template, emit):
    cast(Any, infer_global(function))(type(f"_{function.__name__}", (template,), {}))
    for operands in ((Vector,), (Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        lower_builtin(function, *operands)(lambda context, builder, sig, args: emit(builder, *args))


_register(operator.add, _Arithmetic, ir.IRBuilder.fadd)
_register(operator.sub, _Arithmetic, ir.IRBuilder.fsub)
_register(operator.mul, _Arithmetic, ir.IRBuilder.fmul)
_register(operator.truediv, _Arithmetic, ir.IRBuilder.fdiv)
_register(operator.neg, _Arithmetic, ir.IRBuilder.fneg)
_register(operator.gt, _Comparison, lambda builder, a, b: builder.fcmp_ordered(">", a, b))
_register(operator.lt, _Comparison, lambda builder, a, b: builder.fcmp_ordered("<", a, b))
_register(operator.le, _Comparison, lambda builder, a, b: builder.fcmp_ordered("<=", a, b))


def _call(builder, name, *vectors):
    """LLVM's own function of that name on vectors of one type."""
    kind = vectors[0].type
    element = "f32" if kind.element == ir.FloatType() else "f64"
    arguments = ir.FunctionType(kind, [kind] * len(vectors))
    return builder.call(builder.module.declare_intrinsic(f"{name}.v{kind.count}{element}", (), arguments), vectors)


def _muladd(builder, a, b, c):
    return _call(builder, "llvm.fmuladd", a, b, c)


@_instruction
def muladd(typing, a, b, c):
    """a * b + c, of which the others than the first vector may be numbers."""
    kind = _vector_among((a, b, c))
    return signature(kind, kind, kind, kind), lambda _, builder, sig, args: _muladd(builder, *args)


@_instruction
def sqrt(typing, a):
    return signature(a, a), lambda _, builder, sig, args: _call(builder, "llvm.sqrt", *args)


@_instruction
def select(typing, condition, a, b):
    """a where the condition holds, else b; one of the two may be a number."""
    kind = _vector_among((a, b))
    return signature(kind, condition, kind, kind), lambda _, builder, sig, args: builder.select(*args)


@_instruction
def power(typing, a):
    """2 ** (n - 1) by its bits, from a = n + 1.5 * 2 ** (digits - 1), whose last bits are n."""
    bits, shift, offset = (32, 23, 126) if a.scalar == types.float32 else (64, 52, 1022)

    def emit(context, builder, sig, args):
        integers = ir.VectorType(ir.IntType(bits), a.lanes)
        n = builder.shl(builder.bitcast(args[0], integers), ir.Constant(integers, [shift] * a.lanes))
        return builder.bitcast(builder.add(n, ir.Constant(integers, [offset << shift] * a.lanes)), a.llvm)

    return signature(a, a), emit


# --- memory ------------------------------------------------------------------------------------------------


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


@_instruction
def load(typing, tile, a, i):
    """The vector number i of a, counted in vectors of all lanes."""
    kind, emit = _loading(tile.lanes, a)
    return signature(kind, tile, a, types.int64), emit


@_instruction
def load_members(typing, tile, a, i):
    """The vector number i of a, counted in vectors of one number for each member."""
    kind, emit = _loading(tile.tile.members, a)
    return signature(kind, tile, a, types.int64), emit


@_instruction
def store(typing, a, i, value):
    """Writes the vector number i of a, counted in vectors as long as this one."""

    def emit(context, builder, sig, args):
        pointer = _pointer(context, builder, a, args[0], args[1], value)
        builder.store(args[2], pointer, align=a.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return signature(types.void, a, types.int64, value), emit


@_instruction
def repeat(typing, tile, value):
    """What each member has, for each of its samples."""
    kind = Vector(value.scalar, tile.lanes)

    def emit(context, builder, sig, args):
        return _shuffle(builder, args[1], [lane % value.lanes for lane in range(kind.lanes)])

    return signature(kind, tile, value), emit


@_instruction
def fill(typing, tile, a, value):
    """A vector of numbers like those of a, for each member the same one."""
    kind = Vector(a.dtype, tile.tile.members)
    return signature(kind, tile, a, kind), lambda _, builder, sig, args: args[2]


@_instruction
def spread(typing, tile, a, places, first, i):
    """For each sample s of the tile a[places[first + s] + i], for all of its members."""

    def place(builder, places, first, s):
        return builder.load(builder.gep(places, [builder.add(first, ir.IntType(64)(s))]))

    def emit(context, builder, sig, args):
        _, array, own, first, i = args
        own = context.make_array(places)(context, builder, own).data
        starts = [place(builder, own, first, s) for s in range(tile.tile.samples)]
        return _spread(context, builder, tile, a, array, [builder.add(start, i) for start in starts])

    return signature(Vector(a.dtype, tile.lanes), tile, a, places, types.int64, types.int64), emit


@_instruction
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
    parts = [_splat(builder, builder.load(builder.gep(data, [i])), kind) for i in indices]
    while len(parts) > 1:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [builder.shuffle_vector(a, b, mask) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@_instruction
def store_rows(typing, tile, a, i, stride, value):
    """Writes what the members have, sample by sample, as vectors i, i + stride and so on of a."""
    kind = Vector(a.dtype, tile.tile.members)

    def emit(context, builder, sig, args):
        _, array, first, step, value = args
        for s in range(tile.tile.samples):
            part = _shuffle(builder, value, range(s * kind.lanes, (s + 1) * kind.lanes))
            index = builder.add(first, builder.mul(step, ir.IntType(64)(s)))
            builder.store(part, _pointer(context, builder, a, array, index, kind), align=a.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return signature(types.void, tile, a, types.int64, types.int64, value), emit


@_instruction
def samples_of(typing, tile):
    return signature(types.int64, tile), lambda _, builder, sig, args: ir.IntType(64)(tile.tile.samples)


@_instruction
def members_of(typing, tile):
    return signature(types.int64, tile), lambda _, builder, sig, args: ir.IntType(64)(tile.tile.members)


@_instruction
def add_products(typing, tile, a, i, left, right):
    """Adds to a, for each member, left * right summed over its samples."""
    kind, samples = Vector(a.dtype, tile.tile.members), tile.tile.samples

    def emit(context, builder, sig, args):
        _, array, index, left, right = args
        total = _load(context, builder, a, array, index, kind)
        if kind.lanes > 1:
            for sample in range(samples):
                lanes = range(sample * kind.lanes, (sample + 1) * kind.lanes)
                total = _muladd(builder, _shuffle(builder, left, lanes), _shuffle(builder, right, lanes), total)
        else:
            rest = builder.fmul(left, right)
            while (half := rest.type.count // 2) >= 1:
                low, high = _shuffle(builder, rest, range(half)), _shuffle(builder, rest, range(half, 2 * half))
                rest = builder.fadd(low, high)
            total = builder.fadd(total, rest)
        builder.store(total, _pointer(context, builder, a, array, index, kind), align=a.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return signature(types.void, tile, a, types.int64, left, right), emit
