# SPDX-License-Identifier: Apache-2.0
"""Denormal numbers, those too small for all of their digits, as 0: a core takes a hundred times as long for one.

They are what momenta become where gradients stay 0, as those of a relu that never fires do, and what decay and the
slopes of saturated layers make. A thread says in a word of its own how its core computes.
"""

import platform

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import signature

from .vectors import instruction

_MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}.get(kind := platform.machine().lower(), kind)

# The bits of the word that have results flushed and operands taken for 0: two of MXCSR, one of FPCR.
FLUSHING = {"x86_64": 1 << 15 | 1 << 6, "aarch64": 1 << 24}.get(_MACHINE, 0)

_WORD, _POINTER = ir.IntType(64), ir.IntType(8).as_pointer()


def _call(builder, name, result, *arguments):
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(builder.module.declare_intrinsic(name, (), kind), arguments)


@instruction
def float_mode(typing):
    """The word of this thread, or 0 on a machine that is not known here."""

    def emit(context, builder, sig, args):
        if _MACHINE == "x86_64":
            place = cgutils.alloca_once(builder, ir.IntType(32))
            _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), builder.bitcast(place, _POINTER))
            return builder.zext(builder.load(place), _WORD)
        return _call(builder, "llvm.aarch64.get.fpcr", _WORD) if _MACHINE == "aarch64" else _WORD(0)

    return signature(types.int64), emit


@instruction
def set_float_mode(typing, word):
    def emit(context, builder, sig, args):
        if _MACHINE == "x86_64":
            place = cgutils.alloca_once(builder, ir.IntType(32))
            builder.store(builder.trunc(args[0], ir.IntType(32)), place)
            _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), builder.bitcast(place, _POINTER))
        elif _MACHINE == "aarch64":
            _call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), args[0])
        return context.get_dummy_value()

    return signature(types.void, types.int64), emit
