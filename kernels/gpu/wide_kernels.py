# SPDX-License-Identifier: Apache-2.0
"""Wide layers by persistent products whose tiles travel by TMA, and networks of them.

    forward    y = act(x @ weight.T + bias)                             x (M, K), weight (N, K), bias (N,), y (M, N)
    dgrad      dz' = (dz @ weight) * act'(h), dbias' = its column sums  dz (M, K), weight (K, N), h and dz' (M, N)
    wgrad      dweight = dz.T @ h                                       dz (K, M), h (K, N), dweight (M, N)

dgrad goes from the dz of a layer to that of the layer below, whose output h is: inside a network no pass over dz is
left but that of the last layer. wgrad is the forward kernel without bias and activation, for fp32 split into short
numbers; the library has none. For all, K is the size that is summed over. Tensor cores of sm_90 read 4-byte operands
along K only: for fp32 dgrad reads a transposed copy of the weight, which is small, and wgrad turns its tiles around as
it splits them.

TMA reads a matrix whose rows lie dense and start at multiples of 16 bytes: `readable` says whether an operand is one;
the pointer kernel in `layer_kernels.py` takes the others. M, N and K need not be whole tiles: TMA reads zeros beyond an
edge and writes nothing there.

The descriptors are made on the host. Device-side ones need `triton.set_allocator`, which is set per thread, and
autograd runs backward in threads of its own. Shape after triton's tutorial 09 (persistent matmul): programs walk
output tiles in groups of rows, so that weights stay in L2, and the epilogue counts tiles for itself, so that the loads
of the next tile need not wait for it.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Launch options (num_warps) and loops over tl.range are not in triton's types.
import triton
import triton.language as tl

from .functions import operand


@triton.jit
def _place(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """(row, column) of an output tile: GROUP_M row tiles at a time, columns outermost."""
    group = tile // (GROUP_M * num_n)
    group_m = tl.minimum(num_m - group * GROUP_M, GROUP_M)
    in_group = tile % (GROUP_M * num_n)
    return group * GROUP_M + in_group % group_m, in_group // group_m


@triton.jit
def _product(
    a_desc,  # blocks of [BLOCK_M, BLOCK_K], or [BLOCK_K, BLOCK_M] if A_ACROSS
    b_desc,  # blocks of [BLOCK_N, BLOCK_K], or [BLOCK_K, BLOCK_N] if B_ACROSS
    tile_m,
    tile_n,
    first_k,
    end_k,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    A_ACROSS: tl.constexpr,
    B_ACROSS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The part of one output tile that steps first_k to end_k - 1 contribute, [BLOCK_M, BLOCK_N] in fp32."""
    # The interpreter multiplies in fp32 alone, and rejects the names of some other precisions.
    precision: tl.constexpr = "ieee" if WIDEN else PRECISION  # pyright: ignore[reportAssignmentType]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(first_k, end_k):
        # Both operands come straight from shared memory, where a transpose is only another order of strides.
        if A_ACROSS:
            a = operand(a_desc.load([k * BLOCK_K, tile_m * BLOCK_M]), PRECISION, WIDEN).T
        else:
            a = operand(a_desc.load([tile_m * BLOCK_M, k * BLOCK_K]), PRECISION, WIDEN)
        if B_ACROSS:
            b = operand(b_desc.load([k * BLOCK_K, tile_n * BLOCK_N]), PRECISION, WIDEN)
        else:
            b = operand(b_desc.load([tile_n * BLOCK_N, k * BLOCK_K]), PRECISION, WIDEN).T
        acc = tl.dot(a, b, acc, input_precision=precision)
    return acc


@triton.jit
def _finish(z, bias_ptr, stride_b, y_desc, first_m, first_n, N, ACT: tl.constexpr):
    """Bias, activation and store of one piece of an output tile."""
    if bias_ptr is not None:
        offs_n = first_n + tl.arange(0, z.shape[1]).to(tl.int64)
        z += tl.load(bias_ptr + offs_n * stride_b, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y_desc.store([first_m, first_n], ACT(z).to(y_desc.dtype))


@triton.jit(do_not_specialize=["M", "K"])
def linear_act_fwd_tma_kernel(
    x_desc,  # blocks of [BLOCK_M, BLOCK_K], or [BLOCK_K, BLOCK_M] if ACROSS
    weight_desc,  # blocks of [BLOCK_N, BLOCK_K], or [BLOCK_K, BLOCK_N] if ACROSS
    bias_ptr,  # None without a bias
    y_desc,  # blocks of [BLOCK_M, BLOCK_N // SUBTILES]; with SPLITS, that many matrices of whole tiles on each other
    M,
    N,
    K,
    stride_b,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,  # parts of K that are summed apart, by different programs
    ACROSS: tl.constexpr,  # both operands lie with K outermost
    SUBTILES: tl.constexpr,  # 1 or 2: pieces in which a tile is finished; its columns in halves take less shared memory
    FLATTEN: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    num_k = tl.cdiv(K, BLOCK_K)
    steps = tl.cdiv(num_k, SPLITS)
    finished = tl.program_id(0) - tl.num_programs(0)
    for tile in tl.range(
        tl.program_id(0), num_m * num_n * SPLITS, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE
    ):
        first_k = 0
        end_k = num_k
        place = tile
        if SPLITS > 1:
            first_k = tile // (num_m * num_n) * steps
            end_k = tl.minimum(first_k + steps, num_k)
            place = tile % (num_m * num_n)
        tile_m, tile_n = _place(place, num_m, num_n, GROUP_M)
        operands = (x_desc, weight_desc, tile_m, tile_n, first_k, end_k)
        acc = _product(*operands, PRECISION, WIDEN, ACROSS, ACROSS, BLOCK_M, BLOCK_N, BLOCK_K)
        finished += tl.num_programs(0)
        done = finished
        first_row = 0
        if SPLITS > 1:
            done = finished % (num_m * num_n)
            first_row = finished // (num_m * num_n) * num_m * BLOCK_M
        tile_m, tile_n = _place(done, num_m, num_n, GROUP_M)
        first_m = first_row + tile_m * BLOCK_M
        first_n = tile_n * BLOCK_N
        if SUBTILES == 1:
            _finish(acc, bias_ptr, stride_b, y_desc, first_m, first_n, N, ACT)
        else:
            left, right = tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
            _finish(left, bias_ptr, stride_b, y_desc, first_m, first_n, N, ACT)
            _finish(right, bias_ptr, stride_b, y_desc, first_m, first_n + BLOCK_N // 2, N, ACT)


@triton.jit(do_not_specialize=["rows"])
def sum_splits_kernel(
    parts_ptr,  # (SPLITS, rows, N) fp32, of which the first M rows count
    bias_ptr,  # None without a bias
    y_ptr,  # (M, N)
    rows,
    N,
    stride_b,
    ACT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = act(parts[0] + parts[1] + .. + bias), in this order; one program for BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_n < N
    z = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLITS):
        offset = (part * tl.cast(rows, tl.int64) + row) * N
        z += tl.load(parts_ptr + offset + offs_n, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_n.to(tl.int64) * stride_b, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + offs_n, ACT(z).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish_dgrad(dh, h_desc, dz_desc, dbias_ptr, tile_m, first_m, first_n, N, ACT_BACKWARD: tl.constexpr):
    """dz and its column sums, of one piece of an output tile. Rows beyond M are 0: TMA has read zeros there."""
    dz = ACT_BACKWARD(dh, h_desc.load([first_m, first_n]).to(tl.float32))
    dz_desc.store([first_m, first_n], dz.to(dz_desc.dtype))
    if dbias_ptr is not None:
        offs_n = first_n + tl.arange(0, dz.shape[1])
        tl.store(dbias_ptr + tile_m.to(tl.int64) * N + offs_n, tl.sum(dz, axis=0), mask=offs_n < N)


@triton.jit(do_not_specialize=["M", "K"])
def linear_act_dgrad_tma_kernel(
    dz_desc,  # blocks of [BLOCK_M, BLOCK_K]
    weight_desc,  # blocks of [BLOCK_K, BLOCK_N], or [BLOCK_N, BLOCK_K] if TRANSPOSED
    h_desc,  # blocks of [BLOCK_M, BLOCK_N // SUBTILES]
    dz_below_desc,  # likewise
    dbias_ptr,  # (row tiles, N) fp32, column sums of each; None: not wanted
    M,
    N,
    K,
    ACT_BACKWARD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    num_k = tl.cdiv(K, BLOCK_K)
    finished = tl.program_id(0) - tl.num_programs(0)
    for tile in tl.range(
        tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE
    ):
        tile_m, tile_n = _place(tile, num_m, num_n, GROUP_M)
        operands = (dz_desc, weight_desc, tile_m, tile_n, 0, num_k)
        acc = _product(*operands, PRECISION, WIDEN, False, not TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K)
        finished += tl.num_programs(0)
        tile_m, tile_n = _place(finished, num_m, num_n, GROUP_M)
        first_m = tile_m * BLOCK_M
        first_n = tile_n * BLOCK_N
        if SUBTILES == 1:
            _finish_dgrad(acc, h_desc, dz_below_desc, dbias_ptr, tile_m, first_m, first_n, N, ACT_BACKWARD)
        else:
            half: tl.constexpr = BLOCK_N // 2  # pyright: ignore[reportAssignmentType]
            left, right = tl.split(acc.reshape(BLOCK_M, 2, half).permute(0, 2, 1))
            _finish_dgrad(left, h_desc, dz_below_desc, dbias_ptr, tile_m, first_m, first_n, N, ACT_BACKWARD)
            _finish_dgrad(right, h_desc, dz_below_desc, dbias_ptr, tile_m, first_m, first_n + half, N, ACT_BACKWARD)
