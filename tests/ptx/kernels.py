# SPDX-License-Identifier: Apache-2.0
"""Kernels that the tests of the emulator compile. Each does something that the project's own kernels do too."""

import triton
import triton.language as tl


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """c = a @ b, in fp32."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        a_at = a_ptr + m[:, None] * stride_am + k[None, :] * stride_ak
        b_at = b_ptr + k[:, None] * stride_bk + n[None, :] * stride_bn
        a = tl.load(a_at, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_at, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        c = tl.dot(a, b, c, input_precision=PRECISION)
    tl.store(c_ptr + m[:, None] * N + n[None, :], c, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def tma_matmul_kernel(
    a_desc, b_desc, c_desc, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """c = a @ b.T, whose tiles travel by TMA."""
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        c = tl.dot(a_desc.load([m, k]), b_desc.load([n, k]).T, c)
    c_desc.store([m, n], c.to(c_desc.dtype))


@triton.jit
def chained_kernel(
    a_ptr, b_ptr, c_ptr, out_ptr, T: tl.constexpr, R: tl.constexpr, N: tl.constexpr, ORDER: tl.constexpr
):  # fmt: skip
    """(a @ b) @ c, or a product's transpose as the left operand of the next, or both on the right."""
    t, r, n = tl.arange(0, T), tl.arange(0, R), tl.arange(0, N)
    a = tl.load(a_ptr + t[:, None] * R + r[None, :])  # [T, R]
    b = tl.load(b_ptr + r[:, None] * T + t[None, :])  # [R, T]
    c = tl.load(c_ptr + t[:, None] * N + n[None, :])  # [T, N]
    h = tl.dot(a, b, input_precision="ieee").to(a.dtype)
    if ORDER == "left":
        out = tl.dot(h, c, input_precision="ieee")
    elif ORDER == "transposed":
        out = tl.dot(tl.trans(h), c, input_precision="ieee")
    else:
        out = tl.trans(tl.dot(tl.trans(c), h, input_precision="ieee"))
    tl.store(out_ptr + t[:, None] * N + n[None, :], out)


@triton.jit
def softmax_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    row, n = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + n, mask=n < N, other=-float("inf")).to(tl.float32)
    power = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + row * N + n, (power / tl.sum(power, axis=0)).to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def layouts_kernel(
    x_ptr, transposed_ptr, columns_ptr, rows_ptr, largest_ptr, where_ptr, running_ptr, M: tl.constexpr, N: tl.constexpr
):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(transposed_ptr + n[:, None] * M + m[None, :], tl.trans(x))
    tl.store(columns_ptr + n, tl.sum(x, axis=0))
    tl.store(rows_ptr + m, tl.sum(x, axis=1))
    tl.store(largest_ptr + n, tl.max(x, axis=0))
    tl.store(where_ptr + m, tl.argmax(x, axis=1))
    tl.store(running_ptr + m[:, None] * N + n[None, :], tl.cumsum(x, axis=1))


@triton.jit
def integers_kernel(a_ptr, b_ptr, x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b, x = tl.load(a_ptr + at), tl.load(b_ptr + at), tl.load(x_ptr + at)
    tl.store(out_ptr + at, a // b)
    tl.store(out_ptr + BLOCK + at, a % b)
    tl.store(out_ptr + 2 * BLOCK + at, (a << 3) ^ (a >> 2))
    tl.store(out_ptr + 3 * BLOCK + at, tl.minimum(a, b) * tl.maximum(a, b))
    tl.store(out_ptr + 4 * BLOCK + at, x.to(tl.int32))
    tl.store(out_ptr + 5 * BLOCK + at, (a.to(tl.int64) * b.to(tl.int64) >> 5).to(tl.int32))
    tl.store(out_ptr + 6 * BLOCK + at, a.to(tl.int8).to(tl.int32))
    tl.store(out_ptr + 7 * BLOCK + at, tl.umulhi(a.to(tl.uint32), b.to(tl.uint32)).to(tl.int32))
    tl.store(out_ptr + 8 * BLOCK + at, (a.to(tl.uint32, bitcast=True) >> 3).to(tl.int32, bitcast=True))
    tl.store(out_ptr + 9 * BLOCK + at, a.to(tl.float32).to(tl.int32, bitcast=True))


@triton.jit
def elementwise_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = tl.num_programs(0) * BLOCK
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    x, y = a.to(tl.float32), b.to(tl.float32)
    tl.store(out_ptr + at, a + b)
    tl.store(out_ptr + size + at, a * b)
    tl.store(out_ptr + 2 * size + at, (x / y).to(a.dtype))
    tl.store(out_ptr + 3 * size + at, tl.where(x > y, tl.exp(x), tl.log(tl.abs(y) + 1)).to(a.dtype))
    tl.store(out_ptr + 4 * size + at, (tl.sqrt(tl.abs(x)) + tl.rsqrt(tl.abs(y) + 1)).to(a.dtype))
    tl.store(out_ptr + 5 * size + at, tl.maximum(a, b) - tl.minimum(a, b))
    tl.store(out_ptr + 6 * size + at, tl.clamp(x, -0.5, 0.5).to(a.dtype))


@triton.jit
def rounds_kernel(out_ptr, rounds_ptr, BLOCK: tl.constexpr):
    """Programs that take different numbers of rounds, with a reduction over all of their threads in each."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((), tl.int32)
    for i in range(tl.load(rounds_ptr + tl.program_id(0))):
        total += tl.sum(at * i, axis=0)
    tl.store(out_ptr + tl.program_id(0), total)


@triton.jit(do_not_specialize=["steps", "period"])
def carried_bounds_kernel(out_ptr, steps, period):
    """Counts 0 .. steps - 1 in segments, where each hands the bounds of the inner loop to the next."""
    count = 0
    total = 0
    first = 0
    last = tl.minimum(period, steps)
    for _ in range(tl.cdiv(steps, period)):
        for step in range(first, last):
            count += 1
            total += step
        first = last
        last = tl.minimum(last + period, steps)
    tl.store(out_ptr, count)
    tl.store(out_ptr + 1, total)


@triton.jit
def copy_kernel(x_ptr, y_ptr, read, write, BLOCK: tl.constexpr):
    """y[i] = x[i]: `read` and `write` elements of them."""
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < read, other=0), mask=at < write)
