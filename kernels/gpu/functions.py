# SPDX-License-Identifier: Apache-2.0
"""Device functions that the kernels share: each activation as a pair (y from z, dz from dy and y), and operands."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(z):
    # rsqrt(1 + 2^(-z log2 e))^2 is 1 / (1 + e^-z) in five instructions (tl.sigmoid takes twelve): no division.
    # It is 0 at -inf and 1 at inf. z log2 e is rounded, so the relative error grows with -z: see docs/precision.md.
    r = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
    return r * r


@triton.jit
def sigmoid_backward(dy, y):
    return dy * (y * (1.0 - y))


@triton.jit
def tanh(z):
    # The quotient (1 - e) / (1 + e) with e = e^-2|z| never overflows; below |z| = 0.125 it would cancel, and the
    # odd Taylor polynomial to z^9 has a relative error under 2^-24 there.
    a = tl.abs(z)
    e = tl.exp2(a * -2.8853900817779268)
    large = (1.0 - e) / (1.0 + e)
    s = z * z
    small = a * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    t = tl.where(a < 0.125, small, large)
    return tl.where(z < 0, -t, t)


@triton.jit
def tanh_backward(dy, y):
    return dy * (1.0 - y * y)


@triton.jit
def relu(z):
    # tl.maximum drops NaN on a GPU; torch keeps it.
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def relu_backward(dy, y):
    # As in torch, NaN passes the gradient on, and of an infinite one nothing is left where y is 0.
    return tl.where(y <= 0, 0.0, dy)


@triton.jit
def identity(z):
    return z


@triton.jit
def identity_backward(dy, y):
    return dy


@triton.jit
def round_tf32(a):
    """The nearest number of TF32, which has 10 bits of fraction; of two equally near ones the larger in magnitude.

    Tensor cores cut the other 13 bits off, and no triton rounds them for "tf32"; torch's library does, and its products
    are two to three times as exact (PTX ISA, cvt.rna.tf32.f32).
    """
    bits = (a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    # The sum would turn NaN into a number.
    return tl.where(a == a, bits.to(tl.float32, bitcast=True), a)


@triton.jit
def rounded(a, PRECISION: tl.constexpr):
    return round_tf32(a) if PRECISION == "tf32" and a.dtype == tl.float32 else a


@triton.jit
def operand(a, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    r = rounded(a, PRECISION)
    return r.to(tl.float32) if WIDEN else r


ACTIVATIONS = {
    "sigmoid": (sigmoid, sigmoid_backward),
    "tanh": (tanh, tanh_backward),
    "relu": (relu, relu_backward),
    "identity": (identity, identity_backward),
}

UNBOUNDED = ("relu", "identity")


@triton.jit
def stride_of_weight(stride, zero, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """The stride along the inputs of a weight that a program loads once, as the right operand of its products.

    zero: an integer that is 0, which the compiler does not know. Products on FMA units read their operands from shared
    memory in the order in which they were loaded. In that of a row of a weight, threads that take neighbouring outputs
    meet in the same bank, and reading takes four to five times as long; a stride of which nothing is known gives the
    order of a column, whose loads ask for a sector per element, seven of eight times one that the cache has by then.
    """
    return stride + zero if PRECISION == "ieee" and dtype == tl.float32 else stride
