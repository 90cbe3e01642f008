# SPDX-License-Identifier: Apache-2.0
"""Numbers of the PTX ISA as arrays of numpy: what types mean, how they round, and functions that numpy lacks.

A register is an array of unsigned integers, or of bools, with an element for each thread or one for all of them.
"""

import numpy as np

from .parse import SIZES

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i4, i8 = np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
BITS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
POISON = u4(0x7FBADBAD)  # a NaN that no instruction computes: in fp32, and by halves in bf16 and fp16
SMALLEST_NORMAL = f4(2.0**-126)
LOW = u8(0xFFFFFFFF)


def bits_of(kind):
    """The dtype of a register of that type."""
    return np.dtype(bool) if kind == "pred" else BITS[SIZES[kind]]


def dtype_of(kind):
    """The dtype of the numbers of that type, but for bf16 and packed ones, which numpy does not know."""
    if kind == "pred" or kind[0] == "b":
        return bits_of(kind)
    return np.dtype({"u": "u", "s": "i", "f": "f"}[kind[0]] + str(SIZES[kind]))


# --- from bits to numbers and back -----------------------------------------------------------------------------------


def from_bf16(bits):
    return (bits.astype(u4) << u4(16)).view(f4)


def to_bf16(x):
    """To the nearest, ties to even."""
    bits = (x if x.dtype == f4 else rounded_to_odd(x)).view(u4)
    rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u2(0x7FFF), rounded.astype(u2))


def to_fp16(x):
    return np.where(np.isnan(x), u2(0x7FFF), x.astype(f2).view(u2))


def rounded_to_odd(x):
    """fp32 of wider numbers whose last bit is 1 if anything was cut off, so that rounding it again is rounding once."""
    near = x.astype(f4)
    inexact, too_far = near != x, np.abs(near) > np.abs(x)
    return np.where(inexact, (near.view(u4) - too_far) | u4(1), near.view(u4)).view(f4)


def cut_off(x, kind):
    """fp32 to 16 bits, towards zero."""
    if kind == "bf16":
        return np.where(np.isnan(x), u2(0x7FFF), (x.view(u4) >> u4(16)).astype(u2))
    near = to_fp16(x)
    return near - (np.abs(near.view(f2)) > np.abs(x))


def to_tf32(x, ties_away):
    bits = x.view(u4)
    half = u4(0x1000) if ties_away else u4(0xFFF) + ((bits >> u4(13)) & u4(1))
    return np.where(np.isfinite(x), (bits + half) & u4(0xFFFFE000), bits)


def decoder(kind):
    """The function from registers of that type to numbers: halves become fp32. None if they are numbers already."""
    if kind == "bf16":
        return from_bf16
    if kind == "f16":
        return lambda bits: bits.view(f2).astype(f4)
    dtype = dtype_of(kind)
    return (lambda bits: bits.view(dtype)) if dtype.kind in "if" else None


def encoder(kind):
    """The function from numbers to registers of that type."""
    if kind in ("bf16", "f16"):
        return to_bf16 if kind == "bf16" else to_fp16
    dtype, bits = dtype_of(kind), bits_of(kind)
    return lambda x: x.astype(dtype, copy=False).view(bits)


def operand_of_product(bits, kind):
    """16-bit or tf32 operands of a tensor core, as fp64. It looks at 19 bits of a tf32 operand."""
    if kind == "tf32":
        return (bits & u4(0xFFFFE000)).view(f4).astype(f8)
    return (from_bf16(bits) if kind == "bf16" else bits.view(f2)).astype(f8)


# --- floating point --------------------------------------------------------------------------------------------------


def flushed(x):
    """Subnormal numbers as zeros of their sign (".ftz")."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(f4(0), x), x) if x.dtype == f4 else x


def wide_fma(a, b, c):
    return a.astype(f8) * b.astype(f8) + c.astype(f8)


def fma(a, b, c):
    """One rounding, but for the rare sums whose fp64 rounding falls on a tie of fp32."""
    return wide_fma(a, b, c).astype(a.dtype)


def greatest(choose, a, b, *others):
    """The maximum by a function of numpy, which takes either zero of two: +0 is greater than -0."""
    zeros = (a == 0) & (b == 0)
    greater = np.where(zeros, a + b, choose(a, b)) if zeros.any() else choose(a, b)
    return greatest(choose, greater, *others) if others else greater


def in_fp64(function):
    """An approximation of the special function unit: more exact than the chip's, which errs by up to 2^-22."""
    return lambda x: function(x.astype(f8)).astype(f4)


def rsqrt(x):
    return np.where(x == 0, np.copysign(f4(np.inf), x), (1.0 / np.sqrt(x.astype(f8))).astype(f4))


def signs(a, b):
    """1 or -1: the sign of the product, of zeros and NaN too."""
    return np.copysign(f4(1), a) * np.copysign(f4(1), b)


def to_integer(x, dtype, rounding):
    """Saturates; NaN becomes 0."""
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](x.astype(f8))
    limits = np.iinfo(dtype)
    high, low = whole >= float(limits.max), whole <= float(limits.min)
    inside = np.where(high | low | np.isnan(whole), 0, whole).astype(dtype)
    return np.where(high, dtype.type(limits.max), np.where(low, dtype.type(limits.min), inside))


# --- integers --------------------------------------------------------------------------------------------------------


def divided(a, b):
    """Towards zero; all bits of what was divided by 0 are 1, as on the chips."""
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a.dtype.type(0), a // np.where(b == 0, b.dtype.type(1), b))
    a, b = np.broadcast_arrays(a, b)
    divisor = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // divisor
    quotient = quotient + ((a % divisor != 0) & ((a < 0) != (divisor < 0))).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(-1), quotient)


def remainder(a, b):
    return a - divided(a, b) * b


def high_product(a, b):
    """The upper half of the product."""
    if a.dtype.itemsize < 8:
        wide = wide_product(a, b)
        return (wide >> wide.dtype.type(8 * a.dtype.itemsize)).astype(a.dtype)
    x, y = a.view(u8), b.view(u8)
    middle = (x >> u8(32)) * (y & LOW) + (((x & LOW) * (y & LOW)) >> u8(32))
    other = (x & LOW) * (y >> u8(32)) + (middle & LOW)
    high = (x >> u8(32)) * (y >> u8(32)) + (middle >> u8(32)) + (other >> u8(32))
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, u8(0)) - np.where(b < 0, x, u8(0))
    return high.view(a.dtype)


def wide_product(a, b):
    wide = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
    return a.astype(wide) * b.astype(wide)


def shifted_left(a, n):
    bits = 8 * a.dtype.itemsize
    return np.where(n >= bits, a.dtype.type(0), a << np.minimum(n, u4(bits - 1)).astype(a.dtype))


def shifted_right(a, n):
    """Numbers with a sign keep it."""
    bits = 8 * a.dtype.itemsize
    by = np.minimum(n, u4(bits - 1)).astype(a.dtype)
    return a >> by if a.dtype.kind == "i" else np.where(n >= bits, a.dtype.type(0), a >> by)


def field_mask(dtype, position, length):
    one, bits = dtype.type(1), 8 * dtype.itemsize
    whole = np.where(length >= bits, ~dtype.type(0), (one << np.minimum(length, u4(bits - 1)).astype(dtype)) - one)
    return shifted_left(whole, position)


def extracted_field(a, position, length):
    position, length = position & u4(255), length & u4(255)
    bits = BITS[a.dtype.itemsize]
    mask = field_mask(bits, u4(0), length)
    value = shifted_right(a.view(bits), position) & mask
    if a.dtype.kind == "u":
        return value
    top = np.minimum(position + length - u4(1), u4(8 * bits.itemsize - 1))
    negative = (length > 0) & (shifted_right(a.view(bits), top) & bits.type(1) != 0)
    return np.where(negative, value | ~mask, value).view(a.dtype)


def inserted_field(a, b, position, length):
    position, length = position & u4(255), length & u4(255)
    mask = field_mask(a.dtype, position, length)
    return (b & ~mask) | (shifted_left(a, position) & mask)


def permuted_bytes(a, b, selector):
    both = (b.astype(u8) << u8(32)) | a.astype(u8)
    out = u4(0)
    for place in range(4):
        chosen = (selector >> u4(4 * place)) & u4(15)
        byte = (both >> (u8(8) * (chosen & u4(7)))).astype(u1)
        sign = np.where(byte >> u1(7), u4(255), u4(0))
        out = out | (np.where(chosen & u4(8), sign, byte.astype(u4)) << u4(8 * place))
    return out


def looked_up(table):
    """The function of three bits that a number of 8 bits tabulates ("lop3")."""

    def lop3(a, b, c):
        out = a & u4(0)
        for row in range(8):
            if table >> row & 1:
                out = out | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return out

    return lop3


def funnel(left, wraps):
    """The upper half of b:a shifted left, or the lower half of it shifted right."""

    def shf(a, b, n):
        n = (n & u4(31) if wraps else np.minimum(n, u4(32))).astype(u8)
        both = (b.astype(u8) << u8(32)) | a.astype(u8)
        return ((both << n) >> u8(32) if left else both >> n).astype(u4)

    return shf


def leading_zeros(a):
    """Of 32 or 64 bits, counted in two halves of which each is exact as fp64."""
    if a.dtype.itemsize == 8:
        high, low = (a >> u8(32)).astype(u4), a.astype(u4)
        return np.where(high != 0, leading_zeros(high), u4(32) + leading_zeros(low))
    return u4(32) - np.frexp(a.astype(f8))[1].astype(u4)


def highest_bit(a):
    """The place of the highest bit that is not the sign's, all bits where there is none."""
    bits = BITS[a.dtype.itemsize]
    return u4(8 * bits.itemsize - 1) - leading_zeros(np.where(a < 0, ~a, a).view(bits))


def reversed_bits(a):
    out = np.zeros_like(a)
    for place in range(32):
        out |= ((a >> u4(place)) & u4(1)) << u4(31 - place)
    return out
