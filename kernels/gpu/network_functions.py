# SPDX-License-Identifier: Apache-2.0
"""Device functions of whole networks: padded layers, products and sums over rows, the cross entropy from logits."""

# triton's types know neither launch options nor tl.range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false
import triton
import triton.language as tl

from .functions import sigmoid


@triton.jit
def load_block(ptr, offs_r, offs_c, stride_r, stride_c, mask_r, mask_c):
    return tl.load(
        ptr + offs_r[:, None] * stride_r + offs_c[None, :] * stride_c,
        mask=mask_r[:, None] & mask_c[None, :],
        other=0.0,
    )


@triton.jit
def neurons(N: tl.constexpr, BLOCK_N: tl.constexpr):
    # A neuron that only pads the layer repeats the last one. With weights of 0 it would make NaN of an infinite input,
    # and the next layer's 0 * NaN would carry that into every result; what is finite where the layer is, 0 takes out.
    offs_n = tl.arange(0, BLOCK_N)
    return tl.minimum(offs_n, N - 1) if N < BLOCK_N else offs_n


@triton.jit
def clear_padding(h, N: tl.constexpr, BLOCK_N: tl.constexpr):
    # An unbounded activation may put out infinity, which a weight of 0 turns into NaN. Only the forward kernel clears
    # it: the backward kernel has no register to spare, and may leave more NaN than torch where a network overflows.
    if N < BLOCK_N:
        h = tl.where((tl.arange(0, BLOCK_N) < N)[None, :], h, 0.0)
    return h


@triton.jit
def load_weight(ptr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_n = neurons(N, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    return tl.load(ptr + offs_n[:, None] * K + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0)


@triton.jit
def load_weight_t(ptr, one, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    # one: the stride along the inputs, which the compiler knows or not, see `stride_of_weight`.
    offs_n = neurons(N, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    return tl.load(ptr + offs_n[None, :] * K + offs_k[:, None] * one, mask=(offs_k < K)[:, None], other=0.0)


@triton.jit
def load_bias(ptr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.load(ptr + neurons(N, BLOCK_N)).to(tl.float32)


@triton.jit
def clear_gap(ptr, SIZE: tl.constexpr):
    # The gap up to the next gradient is summed like everything else, so it must not hold what was in memory.
    GAP: tl.constexpr = -SIZE % 8
    if GAP > 0:
        offs = tl.arange(0, 8)
        tl.store(ptr + SIZE + offs, tl.zeros((8,), ptr.dtype.element_ty), mask=offs < GAP)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, ON_FMA: tl.constexpr):
    """a @ b, added to acc where that is not None.

    FMA units read both operands from shared memory, as they were stored: of the right one the threads of a warp take a
    column each, which meet in the banks where columns lie in one piece; of the left one they share a few rows. As the
    right operand h would lie well for z and badly for dweight, eight to sixteen columns in a bank. So that it is a left
    one in both, these units compute the transpose, b.T @ a.T.
    """
    if ON_FMA:
        a, b = tl.trans(b), tl.trans(a)
        if acc is not None:
            acc = tl.trans(acc)
    c = tl.dot(a, b, acc, input_precision=PRECISION)
    return tl.trans(c) if ON_FMA else c


@triton.jit
def sum_rows(dz, ROWS: tl.constexpr):
    """dz [N, BLOCK_M] summed to [N, ROWS / 2]: neighbours, and what lies ROWS apart.

    These lie in one thread's registers; for sums over all rows warps would meet, at three barriers.
    """
    parts = tl.reshape(dz, (dz.shape[0], dz.shape[1] // ROWS, ROWS // 2, 2))
    return tl.sum(tl.sum(parts, axis=3), axis=1)


@triton.jit
def log1p_exp(z):
    """log(1 + e^-|z|), to fp32 accuracy."""
    e = tl.exp2(tl.abs(z) * -1.4426950408889634)
    u = 1.0 + e
    # The sum 1 + e has lost exactly e - (u - 1), which changes the log by that times 1 / (1 + e), or about 1 - e.
    return tl.log(u) + (e - (u - 1.0)) * (1.0 - e)


@triton.jit
def bce_with_logits(z, t, pos_weight):
    """-(pos_weight t log p + (1 - t) log(1 - p)) with p = sigmoid(z), from z, without cancellation at either end."""
    log1p = log1p_exp(z)
    return tl.where(z >= 0, 1.0 - t, -pos_weight * t) * z + (1.0 + (pos_weight - 1.0) * t) * log1p


@triton.jit
def bce_with_logits_dz(z, t, pos_weight):
    return sigmoid(z) * (1.0 + (pos_weight - 1.0) * t) - pos_weight * t
