# SPDX-License-Identifier: Apache-2.0
"""Data Movement and Conversion Instructions that work on registers: mov, cvt, cvta, and hints of no effect."""

import numpy as np

from .arithmetic import (
    bits_of,
    cut_off,
    dtype_of,
    encoder,
    f4,
    f8,
    to_integer,
    to_tf32,
    u4,
    u8,
)
from .instructions import is_float
from .parse import SIZES
from .translate import PARAMETER_BASE, constant_of, destination, elementwise, instruction, source, vector


@instruction("mov", form=r"mov\.\w+")
def mov(program, own):
    to, given = own.operands
    if own.type == "pred":
        return elementwise(program, own, lambda x: x, [(given, "pred")], to)
    whole = f"b{8 * SIZES[own.type]}"
    if not isinstance(to, list) and not isinstance(given, list):
        return elementwise(program, own, lambda x: x, [(given, whole)], to)
    parts = max(len(vector(to)), len(vector(given)))
    width = 8 * SIZES[own.type] // parts
    part, bits = f"b{width}", bits_of(whole)
    if isinstance(to, list):
        read = source(program, given, whole)
        writes = [destination(program, name, part) for name in to]

        def apart(batch, mask):
            value = read(batch)
            for place, write in enumerate(writes):
                write(batch, value >> bits.type(width * place), mask)

        return apart
    reads = [source(program, name, part) for name in given]
    write = destination(program, to, whole)

    def together(batch, mask):
        value = bits.type(0)
        for place, read in enumerate(reads):
            value = value | (read(batch).astype(bits) << bits.type(width * place))
        write(batch, value, mask)

    return together


@instruction("cvt")
def cvt(program, own):
    *modifiers, to, given = own.parts[1:]
    result, *operands = own.operands
    if set(modifiers) - {"rn", "rz", "rna", "rni", "rzi", "rmi", "rpi", "ftz", "sat", "relu"}:
        raise own.unknown()
    relu = (lambda x: np.maximum(x, 0)) if "relu" in modifiers else lambda x: x
    if to.endswith("x2"):  # the first operand becomes the high half
        high, low = (source(program, name, "f32") for name in operands)
        encode, write = _encoder(to[:-2], modifiers, own), destination(program, result, "b32")

        def pack(batch, mask):
            halves = [encode(relu(read(batch))).astype(u4) for read in (low, high)]
            write(batch, halves[0] | (halves[1] << u4(16)), mask)

        return pack
    if to == "tf32":
        ties_away = "rna" in modifiers
        return elementwise(program, own, lambda x: to_tf32(x, ties_away), [(operands[0], "f32")], result, "b32")
    rounding = next((own for own in modifiers if own in ("rni", "rzi", "rmi", "rpi")), None)
    if is_float(given) and not is_float(to):
        formula = lambda x: to_integer(x, dtype_of(to), rounding)  # noqa: E731
    elif is_float(to) and rounding:
        formula = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
    elif is_float(to) and "rz" in modifiers:
        encode, kind = _encoder(to, modifiers, own), f"b{8 * SIZES[to]}"
        return elementwise(program, own, encode, [(operands[0], given)], result, kind)
    elif is_float(to) or "sat" not in modifiers:
        formula = relu if is_float(to) else lambda x: x
    else:
        raise own.unknown()
    if to in ("bf16", "f16"):  # whole numbers as numbers of 64 bits or more, of which the encoder makes halves
        kind = np.dtype(np.longdouble if not is_float(given) else f8 if given == "f64" else f4)
    else:
        kind = dtype_of(to)
    return elementwise(program, own, lambda x: formula(x).astype(kind, copy=False), [(operands[0], given)], result, to)


def _encoder(kind, modifiers, own):
    """fp32 to 16 bits."""
    if "rz" not in modifiers:
        return encoder(kind)
    if kind not in ("bf16", "f16"):
        raise own.unknown()
    return lambda x: cut_off(x, kind)


@instruction("cvta", form=r"cvta(\.to)?\.(global|shared(::cta)?|param)\.u(32|64)")
def cvta(program, own):
    """Generic, global and shared addresses are the same numbers here. Those of parameters may come with 32 bits."""
    result, given = own.operands
    formula = (lambda x: x | u8(PARAMETER_BASE)) if own.has("param") else lambda x: x
    return elementwise(program, own, formula, [(given, f"b{8 * SIZES[own.type]}")], result)


@instruction("createpolicy", form=r"createpolicy\.fractional\.L2::evict_\w+\.b64")
def createpolicy(program, own):
    write, none = destination(program, own.operands[0], "b64"), constant_of(program, "0", "b64")
    return lambda batch, mask: write(batch, none, mask)


@instruction("prefetch", "prefetchu", "membar", "setmaxnreg", "griddepcontrol", "nanosleep")
def hint(program, own):
    """Of no effect on what is computed."""
    return lambda batch, mask: None
