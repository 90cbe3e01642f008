# SPDX-License-Identifier: Apache-2.0
"""Instructions that work on each thread by itself, by the sections of the PTX ISA."""

import numpy as np

from .arithmetic import (
    decoder,
    divided,
    extracted_field,
    flushed,
    fma,
    funnel,
    greatest,
    high_product,
    highest_bit,
    in_fp64,
    inserted_field,
    leading_zeros,
    looked_up,
    permuted_bytes,
    remainder,
    reversed_bits,
    rsqrt,
    shifted_left,
    shifted_right,
    signs,
    u2,
    u4,
    wide_fma,
    wide_product,
)
from .parse import SIZES
from .translate import destination, elementwise, instruction, source

# Formulas by the instruction without its type, with the types of the result and of the operands: t is the instruction's
# own, n is u32, w is twice as wide.
INTEGERS = {
    # Integer Arithmetic Instructions
    "add": (np.add, "t tt"),
    "sub": (np.subtract, "t tt"),
    "mul.lo": (np.multiply, "t tt"),
    "mul.hi": (high_product, "t tt"),
    "mul.wide": (wide_product, "w tt"),
    "mad.lo": (lambda a, b, c: a * b + c, "t ttt"),
    "mad.wide": (lambda a, b, c: wide_product(a, b) + c, "w ttw"),
    "div": (divided, "t tt"),
    "rem": (remainder, "t tt"),
    "abs": (np.abs, "t t"),
    "neg": (np.negative, "t t"),
    "min": (np.minimum, "t tt"),
    "max": (np.maximum, "t tt"),
    "popc": (np.bitwise_count, "n t"),
    "clz": (leading_zeros, "n t"),
    "bfind": (highest_bit, "n t"),
    "brev": (reversed_bits, "t t"),
    "bfe": (extracted_field, "t tnn"),
    "bfi": (inserted_field, "t ttnn"),
    # Logic and Shift Instructions
    "and": (np.bitwise_and, "t tt"),
    "or": (np.bitwise_or, "t tt"),
    "xor": (np.bitwise_xor, "t tt"),
    "not": (np.invert, "t t"),
    "shl": (shifted_left, "t tn"),
    "shr": (shifted_right, "t tn"),
    "shf.l.wrap": (funnel(True, True), "t ttn"),
    "shf.r.wrap": (funnel(False, True), "t ttn"),
    "shf.l.clamp": (funnel(True, False), "t ttn"),
    "shf.r.clamp": (funnel(False, False), "t ttn"),
    # Data Movement and Conversion Instructions
    "prmt": (permuted_bytes, "t ttt"),
}
# Floating-Point Instructions, and those of half precision, whose numbers come as fp32: one operation rounds them as if
# it were in half precision, but for fma, of which HALVES are.
FLOATS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": fma,
    "mad": fma,
    "fma.relu": lambda a, b, c: np.maximum(fma(a, b, c), 0),
    "neg": np.negative,
    "abs": np.abs,
    # Of two numbers, from sm_100 on also of three.
    "min": lambda *a: -greatest(np.fmax, *map(np.negative, a)),
    "max": lambda *a: greatest(np.fmax, *a),
    "min.NaN": lambda *a: -greatest(np.maximum, *map(np.negative, a)),
    "max.NaN": lambda *a: greatest(np.maximum, *a),
    "min.xorsign.abs": lambda a, b: np.copysign(np.fmin(np.abs(a), np.abs(b)), signs(a, b)),
    "min.NaN.xorsign.abs": lambda a, b: np.copysign(np.minimum(np.abs(a), np.abs(b)), signs(a, b)),
    "copysign": lambda a, b: np.copysign(b, a),
    "rcp": in_fp64(np.reciprocal),
    "sqrt": in_fp64(np.sqrt),
    "rsqrt": rsqrt,
    "ex2": in_fp64(np.exp2),
    "lg2": in_fp64(np.log2),
    "tanh": in_fp64(np.tanh),
}
HALVES = {
    "fma": wide_fma,
    "fma.relu": lambda a, b, c: np.maximum(wide_fma(a, b, c), 0),
}
SPECIAL = ("rcp", "sqrt", "rsqrt", "ex2", "lg2", "tanh")
ROUNDING = {"rn", "ftz", "sat", "approx", "full"}  # what the formulas round to nearest, and what is done around them


def is_float(kind):
    return kind[0] == "f" or kind.startswith("bf")


@instruction(*{key.split(".")[0] for key in (*INTEGERS, *FLOATS)})
def arithmetic(program, own):
    result, *operands = own.operands
    kind = own.type
    if is_float(kind):
        # Mixed Precision Instructions: the result and the last operand are fp32, which holds the others.
        mixed = own.parts[0] in ("add", "sub", "fma") and own.parts[-2] == "f32"
        key = ".".join(part for part in own.parts[: -1 - mixed] if part not in ROUNDING)
        if mixed:
            sources = [*((name, kind) for name in operands[:-1]), (operands[-1], "f32")]
            return elementwise(program, own, FLOATS[key], sources, result, "f32")
        if key in SPECIAL and kind != "f32":
            raise own.unknown()
        formula = FLOATS[key] if kind in ("f32", "f64", "f32x2") else HALVES.get(key, FLOATS[key])
        return elementwise(program, own, formula, [(name, kind) for name in operands], result)
    if kind[0] == "b" and own.parts[0] == "shr":
        kind = f"u{kind[1:]}"
    formula, types = INTEGERS[".".join(own.parts[:-1])]
    meant = {"t": kind, "n": "u32", "w": kind if kind == "pred" else f"{kind[0]}{16 * SIZES[kind]}"}
    to, given = types.split()
    sources = [(name, meant[letter]) for name, letter in zip(operands, given, strict=True)]
    return elementwise(program, own, formula, sources, result, meant[to])


@instruction("lop3", form=r"lop3\.b32")
def lop3(program, own):
    result, *operands, table = own.operands
    return elementwise(program, own, looked_up(int(table, 0)), [(name, "b32") for name in operands], result)


# --- Comparison and Selection Instructions, and those of half precision ----------------------------------------------

COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(name, floating):
    """Of floats: an unordered one (with a "u") is true of NaN, "ne" is not."""
    if not floating:
        return COMPARISONS[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)]
    unordered = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
    if name == "nan":
        return unordered
    if name == "num":
        return lambda a, b: ~unordered(a, b)
    if name == "ne":
        return lambda a, b: (a != b) & ~unordered(a, b)
    if name in COMPARISONS:
        return COMPARISONS[name]
    compare = COMPARISONS[name.removesuffix("u")]
    return lambda a, b: compare(a, b) | unordered(a, b)


@instruction("setp")
def setp(program, own):
    results, a, b, *other = own.operands
    kind, compare = own.type, comparison(own.parts[1], is_float(own.type))
    if set(own.parts[2:-1]) - {"ftz"} - ({own.parts[2]} if other else set()):
        raise own.unknown()
    combine, third = (COMBINATIONS[own.parts[2]], source(program, other[0], "pred")) if other else (None, None)
    packed = decoder(kind[:-2]) if kind.endswith("x2") else None
    reads = [source(program, name, "b32" if packed else kind) for name in (a, b)]
    writes = [destination(program, name, "pred") for name in results.split("|")]
    flush = flushed if own.has("ftz") else lambda x: x

    def run(batch, mask):
        x, y = (flush(read(batch)) for read in reads)
        if packed:  # a predicate for each half, the low one first
            found = [compare(*(packed((bits >> u4(shift)).astype(u2)) for bits in (x, y))) for shift in (0, 16)]
        else:
            found = [compare(x, y)]
            found.append(~found[0])
        if combine:
            condition = third(batch)
            found = [combine(each, condition) for each in found]
        for write, each in zip(writes, found, strict=False):
            write(batch, each, mask)

    return run


@instruction("selp", form=r"selp\.\w+")
def selp(program, own):
    result, a, b, predicate = own.operands
    kind = f"b{8 * SIZES[own.type]}"
    sources = [(predicate, "pred"), (a, kind), (b, kind)]
    return elementwise(program, own, np.where, sources, result, kind)
