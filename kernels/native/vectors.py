# SPDX-License-Identifier: Apache-2.0
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

instruction = cast("Callable[[Callable], Callable[..., Any]]", intrinsic(prefer_literal=False))

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
    return splat(builder, context.cast(builder, value, source, target.scalar), target)


def splat(builder, value, kind):
    one = builder.insert_element(ir.Constant(kind.llvm, ir.Undefined), value, ir.IntType(32)(0))
    return shuffle(builder, one, [0] * kind.lanes)


def shuffle(builder, value, lanes):
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


def emit_muladd(builder, a, b, c):
    return _call(builder, "llvm.fmuladd", a, b, c)


@instruction
def muladd(typing, a, b, c):
    """a * b + c, of which the others than the first vector may be numbers."""
    kind = _vector_among((a, b, c))
    return signature(kind, kind, kind, kind), lambda _, builder, sig, args: emit_muladd(builder, *args)


@instruction
def sqrt(typing, a):
    return signature(a, a), lambda _, builder, sig, args: _call(builder, "llvm.sqrt", *args)


@instruction
def select(typing, condition, a, b):
    """a where the condition holds, else b; one of the two may be a number."""
    kind = _vector_among((a, b))
    return signature(kind, condition, kind, kind), lambda _, builder, sig, args: builder.select(*args)


@instruction
def power(typing, a):
    """2 ** (n - 1) by its bits, from a = n + 1.5 * 2 ** (digits - 1), whose last bits are n."""
    bits, shift, offset = (32, 23, 126) if a.scalar == types.float32 else (64, 52, 1022)

    def emit(context, builder, sig, args):
        integers = ir.VectorType(ir.IntType(bits), a.lanes)
        n = builder.shl(builder.bitcast(args[0], integers), ir.Constant(integers, [shift] * a.lanes))
        return builder.bitcast(builder.add(n, ir.Constant(integers, [offset << shift] * a.lanes)), a.llvm)

    return signature(a, a), emit
