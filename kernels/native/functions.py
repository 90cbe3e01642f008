# SPDX-License-Identifier: Apache-2.0
"""Activations on vectors, forward and backward, by their numbers: indices into ACTIVATIONS."""

from collections.abc import Callable
from typing import Any, cast

from numba import njit, types
from numba.extending import overload

from .vectors import muladd, power, select

ACTIVATIONS = ("identity", "sigmoid", "tanh", "relu")

# Part of the function that calls it: a vector that crosses a call is written to memory.
inline = cast("Callable[[Callable], Callable[..., Any]]", njit(forceinline=True))


def _exp(z) -> Any:
    """(h, q) with e ** z = 2 h (1 + q) and h a power of 2, for z between -86 and 89 or, in fp64, -707 and 710."""


@overload(_exp, jit_options={"forceinline": True})
def _exp_of(z):
    # z / log(2) is n + r, and 2 ** r - 1 a polynomial: q, with errors of 1.2e-8 or, in fp64, 2e-17 of itself. Near 0 it
    # keeps all of its digits, as 2 ** r does not. Its terms are taken two at a time, which do not wait for each other.
    # log2(e) comes in two parts, 1.5 * 2 ** (digits - 1) cuts off what lies behind the point, and half of 2 ** n stays
    # finite longer.
    if z.scalar == types.float32:

        def single(z):
            rounded = muladd(z, 1.4426950216293335, 12582912.0)
            n = rounded - 12582912.0
            r = muladd(z, 1.92596299e-8, muladd(z, 1.4426950216293335, -n))
            square = r * r
            q = muladd(r, 1.54531629e-4, 1.33908634e-3)
            q = muladd(square, q, muladd(r, 9.61808256e-3, 5.55035711e-2))
            q = muladd(square, q, muladd(r, 2.40226508e-1, 6.93147188e-1)) * r
            return power(rounded), q

        return single

    def double(z):
        rounded = muladd(z, 1.4426950408889634, 6755399441055744.0)
        n = rounded - 6755399441055744.0
        r = muladd(z, 2.0355273740931032e-17, muladd(z, 1.4426950408889634, -n))
        square = r * r
        q = muladd(square, 4.45496059818651839e-10, muladd(r, 7.0725859492692237e-9, 1.01780624458457735e-7))
        q = muladd(square, q, muladd(r, 1.32154425879216897e-6, 1.52527338298361184e-5))
        q = muladd(square, q, muladd(r, 1.54035304417360502e-4, 1.33335581464169353e-3))
        q = muladd(square, q, muladd(r, 9.61812910760688853e-3, 5.55041086648215943e-2))
        q = muladd(square, q, muladd(r, 2.40226506959100982e-1, 6.93147180559945309e-1)) * r
        return power(rounded), q

    return double


def _sigmoid_limits(z) -> Any:
    """Beyond the first, 1 + e ** z is 1 for a z of this type; beyond the second, e ** z is inf."""


@overload(_sigmoid_limits, inline="always")
def _sigmoid_limits_of(z):
    limits = (-86.5, 89.0) if z.scalar == types.float32 else (-707.0, 710.0)
    return lambda z: limits


@inline
def activate(kind, z):
    """z -> y"""
    if kind == 0:
        return z
    if kind == 3:
        return select(z < 0.0, 0.0, z)
    low, high = _sigmoid_limits(z)
    exponent = -z
    if kind == 2:
        low, high, exponent = -40.0, 40.0, z + z
    # A comparison with NaN is false: NaN stays.
    exponent = select(high < exponent, high, exponent)
    exponent = select(exponent < low, low, exponent)
    half, q = _exp(exponent)
    if kind == 2:
        shifted = muladd(half, q, half - 0.5)  # (e ** 2z - 1) / 2
        return shifted / (1.0 + shifted)
    return 1.0 / muladd(muladd(half, q, half), 2.0, 1.0)


@inline
def exponential(z):
    """e ** z for z up to 0, and 1 beyond; 0 where no normal number is as small."""
    low, _ = _sigmoid_limits(z)
    exponent = select(z > 0.0, 0.0, z)
    exponent = select(exponent < low, low, exponent)
    half, q = _exp(exponent)
    return select(z < low, 0.0, muladd(half, q, half) * 2.0)


@inline
def through(kind, dy, y):
    """(dy, y) -> dz. As torch has them, dz of relu is 0 where y is, whatever dy, and dy where y is NaN."""
    if kind == 1:
        return dy * (1.0 - y) * y
    if kind == 2:
        return dy * (1.0 - y * y)
    if kind == 3:
        return select(y <= 0.0, 0.0, dy)
    return dy


@inline
def clamped(difference, beta):
    """The slope of smooth L1. beta: where its square ends; 0 for L1, whose slope torch has as 0 at NaN."""
    if beta > 0.0:
        part = difference / beta
        return select(part > 1.0, 1.0, select(part < -1.0, -1.0, part))
    sign = select(difference > 0.0, 1.0, select(difference <= 0.0, difference, 0.0))
    return select(difference < 0.0, -1.0, sign)
