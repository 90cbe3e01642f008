# SPDX-License-Identifier: Apache-2.0
"""y = act(x @ weight.T + bias) and its backward in Triton: the kernels and their launchers.

Shapes: x (M, K), weight (N, K), bias (N,), y and dy (M, N). Any strides in; fresh contiguous tensors out. All
arithmetic is fp32; 16-bit operands enter the tensor cores as they are, except in the interpreter, whose 16-bit
dot is wrong, where they are widened right after the load.

The contraction over the batch is written `dot(trans(x), dz)` with x straight from memory. The other order,
`dot(trans(dz), x)`, transposes a register tensor that came from a dot once kernels chain layers. On Hopper that was
reported to compute wrong numbers with triton 3.4 to 3.7.1 (flash-linear-attention #640, #826, #988). The PTX of 3.6.0
and 3.7.1 is right; the assembler in their wheels may overwrite registers that such a product has still to read, which
CUDA 13.3 mended (triton-lang/triton #11781). Compile-only tests look for both in every kernel.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Launch options (num_warps) and loops over tl.range are not in triton's types.
import triton
import triton.language as tl

from .functions import operand, rounded, stride_of_weight


@triton.jit(do_not_specialize=["M"])
def linear_act_fwd_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,  # None without a bias
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # >= N
    BLOCK_K: tl.constexpr,  # >= K
    STAGES: tl.constexpr,
):
    """Narrow layers: the whole weight stays on chip and each program walks row tiles."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_k = offs_k < K
    # The weight is loaded as its transpose: a stride order, not a copy.
    stride_wk = stride_of_weight(stride_wk, tl.minimum(M, 0), weight_ptr.dtype.element_ty, PRECISION)
    wt = tl.load(
        weight_ptr + offs_k.to(tl.int64)[:, None] * stride_wk + offs_n.to(tl.int64)[None, :] * stride_wn,
        mask=mask_k[:, None] & mask_n[None, :],
        other=0.0,
    )  # [BLOCK_K, BLOCK_N]
    wt = operand(wt, PRECISION, WIDEN)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n.to(tl.int64) * stride_b, mask=mask_n, other=0.0).to(tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        offs_m = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk,
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        z = tl.dot(operand(x, PRECISION, WIDEN), wt, input_precision=PRECISION)
        if bias_ptr is not None:
            z += bias[None, :]
        tl.store(
            y_ptr + offs_m[:, None] * N + offs_n[None, :],
            ACT(z).to(y_ptr.dtype.element_ty),
            mask=mask_m[:, None] & mask_n[None, :],
        )


@triton.jit(do_not_specialize=["M"])
def linear_act_fwd_tiled_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,  # None without a bias
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Any shape: one output tile per program, a loop over K, groups of 8 row tiles so that weights stay in L2."""
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (8 * num_n)
    group_m = tl.minimum(num_m - group * 8, 8)
    in_group = tl.program_id(0) % (8 * num_n)
    tile_m = group * 8 + in_group % group_m
    tile_n = in_group // group_m

    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    wt_ptrs = weight_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    # 64-bit steps: BLOCK_K * stride alone may pass 2^31 for a transposed operand.
    step_x = tl.full((), BLOCK_K, tl.int64) * stride_xk
    step_w = tl.full((), BLOCK_K, tl.int64) * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        wt = tl.load(wt_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(operand(x, PRECISION, WIDEN), operand(wt, PRECISION, WIDEN), acc, input_precision=PRECISION)
        x_ptrs += step_x
        wt_ptrs += step_w
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n * stride_b, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + offs_m[:, None] * N + offs_n[None, :],
        ACT(acc).to(y_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["dbias_ptr"])
def linear_act_bwd_rows_kernel(
    dy_ptr,
    y_ptr,
    x_ptr,  # None without dweight
    weight_ptr,  # None without dx
    dx_ptr,  # None: not wanted
    dweight_ptr,  # None: not wanted; else one slot per program
    dbias_ptr,  # None: not wanted; else one slot per program
    M,
    N,
    K,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_slot,  # elements between the slots of two programs
    ACT_BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # >= N
    BLOCK_K: tl.constexpr,  # >= K
    SUM_ROWS: tl.constexpr,  # BLOCK_M is a multiple of it
    STAGES: tl.constexpr,
):
    """Narrow layers: dx, dweight and dbias from one read of dy, y and x.

    Every program sums its row tiles in registers, in the order of the rows, and writes its sums to a slot of
    its own; no atomics, so the same input gives the same bits.
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_k = offs_k < K
    if dx_ptr is not None:
        w = tl.load(
            weight_ptr + offs_n.to(tl.int64)[:, None] * stride_wn + offs_k.to(tl.int64)[None, :] * stride_wk,
            mask=mask_n[:, None] & mask_k[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        w = operand(w, PRECISION, WIDEN)
    if dweight_ptr is not None:
        dwt = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    if dbias_ptr is not None:
        db = tl.zeros((SUM_ROWS, BLOCK_N), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        offs_m = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask_mn = mask_m[:, None] & mask_n[None, :]
        dy = tl.load(
            dy_ptr + offs_m[:, None] * stride_dym + offs_n.to(tl.int64)[None, :] * stride_dyn, mask=mask_mn, other=0.0
        ).to(tl.float32)
        y = tl.load(y_ptr + offs_m[:, None] * N + offs_n[None, :], mask=mask_mn, other=0.0).to(tl.float32)
        dz = ACT_BACKWARD(dy, y)  # [BLOCK_M, BLOCK_N]
        # The sum over one number changes nothing, but ends what triton would compute again for each of the products,
        # from dy and y in the layout of an operand, whose loads meet in the banks of shared memory.
        dz = tl.sum(dz[:, :, None], axis=2)
        if dbias_ptr is not None:
            # Rows that are SUM_ROWS apart lie in one thread's registers, so that threads meet only after the loop.
            db += tl.sum(tl.reshape(dz, (BLOCK_M // SUM_ROWS, SUM_ROWS, BLOCK_N)), axis=0)
        dz = rounded(dz if WIDEN else dz.to(y_ptr.dtype.element_ty), PRECISION)
        if dweight_ptr is not None:
            x = tl.load(
                x_ptr + offs_m[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk,
                mask=mask_m[:, None] & mask_k[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_K]
            dwt = tl.dot(tl.trans(operand(x, PRECISION, WIDEN)), dz, dwt, input_precision=PRECISION)
        if dx_ptr is not None:
            dx = tl.dot(dz, w, input_precision=PRECISION)  # [BLOCK_M, BLOCK_K]
            tl.store(
                dx_ptr + offs_m[:, None] * K + offs_k[None, :],
                dx.to(dx_ptr.dtype.element_ty),
                mask=mask_m[:, None] & mask_k[None, :],
            )
    slot = tl.program_id(0).to(tl.int64) * stride_slot
    if dweight_ptr is not None:
        # Stored as (N, K), the layout of the parameter.
        tl.store(
            dweight_ptr + slot + offs_n[None, :] * K + offs_k[:, None],
            dwt.to(dweight_ptr.dtype.element_ty),
            mask=mask_k[:, None] & mask_n[None, :],
        )
    if dbias_ptr is not None:
        tl.store(dbias_ptr + slot + offs_n, tl.sum(db, axis=0).to(dbias_ptr.dtype.element_ty), mask=mask_n)


@triton.jit(do_not_specialize=["M"])
def act_bwd_kernel(
    dy_ptr,
    y_ptr,
    dz_ptr,
    dbias_ptr,  # None: not wanted; else a slot of N per row of programs
    M,
    N,
    stride_dym,
    stride_dyn,
    ACT_BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUM_ROWS: tl.constexpr,  # BLOCK_M is a multiple of it
):
    """Wide layers: dz = dy * act'(y) and its column sums in one pass; each program walks row tiles of its columns."""
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if dbias_ptr is not None:
        db = tl.zeros((SUM_ROWS, BLOCK_N), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        offs_m = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn, mask=mask, other=0.0)
        y = tl.load(y_ptr + offs_m[:, None] * N + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        dz = ACT_BACKWARD(dy.to(tl.float32), y)
        tl.store(dz_ptr + offs_m[:, None] * N + offs_n[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            db += tl.sum(tl.reshape(dz, (BLOCK_M // SUM_ROWS, SUM_ROWS, BLOCK_N)), axis=0)  # as above
    if dbias_ptr is not None:
        slot = tl.program_id(0).to(tl.int64) * N
        tl.store(dbias_ptr + slot + offs_n, tl.sum(db, axis=0).to(dbias_ptr.dtype.element_ty), mask=mask_n)


@triton.jit(do_not_specialize=["num_slots", "chunk", "first_size"])
def sum_slots_kernel(
    slots_ptr,
    first_ptr,  # a row of `size` for each chunk, or the first tensor alone
    second_ptr,  # None: the slots hold the first tensor only
    num_slots,
    chunk,  # a multiple of SLOTS, or there is one chunk
    first_size,
    size,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[c, i] = slots[c * chunk, i] + ... + slots[(c + 1) * chunk - 1, i], as far as there are slots.

    In an order that depends on sizes alone. The first `first_size` sums of a row go to the first tensor.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    # Running sums side by side, whose loads wait for memory together.
    acc = tl.zeros((SLOTS, BLOCK), dtype=tl.float32)
    begin = tl.program_id(1).to(tl.int64) * chunk
    for slot in range(begin, tl.minimum(begin + chunk, num_slots), SLOTS):
        rows = tl.cast(slot, tl.int64) + tl.arange(0, SLOTS)
        acc += tl.load(
            slots_ptr + rows[:, None] * size + offs[None, :],
            mask=(rows < num_slots)[:, None] & mask[None, :],
            other=0.0,
        )
    total = tl.sum(acc, axis=0)
    out = tl.program_id(1).to(tl.int64) * size + offs
    tl.store(first_ptr + out, total.to(first_ptr.dtype.element_ty), mask=mask & (offs < first_size))
    if second_ptr is not None:
        tl.store(
            second_ptr + offs - first_size, total.to(second_ptr.dtype.element_ty), mask=mask & (offs >= first_size)
        )
