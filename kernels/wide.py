# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Launch options (num_warps) and loops over tl.range are not in triton's types.
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
the pointer kernel in `linear.py` takes the others. M, N and K need not be whole tiles: TMA reads zeros beyond an edge
and writes nothing there.

The descriptors are made on the host. Device-side ones need `triton.set_allocator`, which is set per thread, and
autograd runs backward in threads of its own. Shape after triton's tutorial 09 (persistent matmul): programs walk
output tiles in groups of rows, so that weights stay in L2, and the epilogue counts tiles for itself, so that the loads
of the next tile need not wait for it.
"""

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import device, linear
from .linear import INTERPRETED, _current, _operand, _sum_slots
from .records import MlpPlan, Plan, WideTile

Tensors = tuple[Tensor, ...]
Maybe = tuple[Tensor | None, ...]


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
    # The interpreter multiplies in fp32, and knows some of the others not even by name.
    precision: tl.constexpr = "ieee" if WIDEN else PRECISION  # pyright: ignore[reportAssignmentType]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(first_k, end_k):
        # Both come straight from shared memory, where a transpose is a stride order.
        if A_ACROSS:
            a = _operand(a_desc.load([k * BLOCK_K, tile_m * BLOCK_M]), PRECISION, WIDEN).T
        else:
            a = _operand(a_desc.load([tile_m * BLOCK_M, k * BLOCK_K]), PRECISION, WIDEN)
        if B_ACROSS:
            b = _operand(b_desc.load([k * BLOCK_K, tile_n * BLOCK_N]), PRECISION, WIDEN)
        else:
            b = _operand(b_desc.load([tile_n * BLOCK_N, k * BLOCK_K]), PRECISION, WIDEN).T
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


def readable(matrix: Tensor) -> bool:
    """Whether TMA can read a matrix as it lies in memory, which must not hold its negative."""
    pitch, step = matrix.stride()
    size = matrix.element_size()
    return (
        not matrix.is_neg()
        and step == 1
        and pitch * size % 16 == 0
        and pitch >= matrix.shape[1]
        and matrix.data_ptr() % 16 == 0
    )


def _tile_arguments(plan: Plan) -> dict:
    """What both products are told of their tile."""
    tile = cast(WideTile, plan.tile)
    return {
        "PRECISION": plan.precision,
        "WIDEN": INTERPRETED,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "SUBTILES": tile.subtiles,
        "FLATTEN": tile.flatten,
        "SPECIALIZE": tile.specialize,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def as_readable(matrix: Tensor) -> Tensor:
    """The matrix, or a copy of it. The plan has seen to it that rows of a copy start at multiples of 16 bytes."""
    return matrix if readable(matrix) else matrix.clone(memory_format=torch.contiguous_format)


def linear_act_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, plan: Plan) -> Tensor:
    """act(x @ weight.T + bias), (M, N), in the dtype of x; no size is 0, and x, weight and rows of y are `readable`."""
    (M, K), N = x.shape, weight.shape[0]
    return _launch(x, weight, bias, (M, N, K), activation, plan, across=False)


def linear_act_wgrad(dz: Tensor, h: Tensor, plan: Plan) -> Tensor:
    """dz.T @ h, (M, N), for fp32 dz (K, M) and h (K, N); dz, h and rows of the result are `readable`, no size is 0."""
    (K, M), N = dz.shape, h.shape[1]
    return _launch(dz, h, None, (M, N, K), "identity", plan, across=True)


def _launch(
    a: Tensor, b: Tensor, bias: Tensor | None, sizes: tuple[int, int, int], activation: str, plan: Plan, across: bool
) -> Tensor:
    M, N, K = sizes
    y = torch.empty((M, N), dtype=a.dtype, device=a.device)
    tile, parts = cast(WideTile, plan.tile), y
    rows = -(-M // tile.block_m) * tile.block_m
    blocks = [[tile.block_m, tile.block_k], [tile.block_n, tile.block_k]]
    if across:
        blocks = [block[::-1] for block in blocks]
    stride_b = 1 if bias is None else bias.stride(0)
    split = plan.splits > 1
    if split:
        parts = torch.empty((plan.splits * rows, N), dtype=torch.float32, device=a.device)
    with _current(a):
        linear_act_fwd_tma_kernel[(plan.programs,)](
            x_desc=TensorDescriptor.from_tensor(a, blocks[0]),
            weight_desc=TensorDescriptor.from_tensor(b, blocks[1]),
            bias_ptr=None if split else bias,
            y_desc=TensorDescriptor.from_tensor(parts, [tile.block_m, tile.block_n // tile.subtiles]),
            M=M,
            N=N,
            K=K,
            stride_b=stride_b,
            ACT=device.ACTIVATIONS["identity" if split else activation][0],
            SPLITS=plan.splits,
            ACROSS=across,
            **_tile_arguments(plan),
            enable_fp_fusion=True,
        )
        if split:
            sum_splits_kernel[(M, -(-N // SUM_BLOCK))](
                parts_ptr=parts,
                bias_ptr=bias,
                y_ptr=y,
                rows=rows,
                N=N,
                stride_b=stride_b,
                ACT=device.ACTIVATIONS[activation][0],
                SPLITS=plan.splits,
                BLOCK=SUM_BLOCK,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return y


SUM_BLOCK = 512


def linear_act_dgrad(
    dz: Tensor, weight: Tensor, h: Tensor, activation: str, need_dbias: bool, plan: Plan
) -> tuple[Tensor, Tensor | None]:
    """(dz', dbias') of the layer below: (dz @ weight) * act'(h), (M, N), and its column sums, (N,), or None.

    dz (M, K) and h (M, N) `readable`, weight (K, N) of any strides, all of one dtype.
    """
    (M, K), N = dz.shape, weight.shape[1]
    tile = cast(WideTile, plan.tile)
    transposed = dz.dtype is torch.float32
    if transposed:
        weight, block = as_readable(weight.t()), [tile.block_n, tile.block_k]
    else:
        weight, block = as_readable(weight), [tile.block_k, tile.block_n]
    below = torch.empty((M, N), dtype=dz.dtype, device=dz.device)
    dbias = torch.empty((N,), dtype=dz.dtype, device=dz.device) if need_dbias else None
    slots = torch.empty((-(-M // tile.block_m), N), dtype=torch.float32, device=dz.device) if need_dbias else None
    piece = [tile.block_m, tile.block_n // tile.subtiles]
    with _current(dz):
        linear_act_dgrad_tma_kernel[(plan.programs,)](
            dz_desc=TensorDescriptor.from_tensor(dz, [tile.block_m, tile.block_k]),
            weight_desc=TensorDescriptor.from_tensor(weight, block),
            h_desc=TensorDescriptor.from_tensor(h, piece),
            dz_below_desc=TensorDescriptor.from_tensor(below, piece),
            dbias_ptr=slots,
            M=M,
            N=N,
            K=K,
            ACT_BACKWARD=device.ACTIVATIONS[activation][1],
            TRANSPOSED=transposed,
            **_tile_arguments(plan),
            enable_fp_fusion=True,
        )
        if slots is not None and dbias is not None:
            _sum_slots(slots, dbias, None)
    return below, dbias


# --- networks of wide layers ---------------------------------------------------------------------------------


def mlp_bwd(
    dy: Tensor,
    x: Tensor | None,
    saved: Maybe,
    weights: Maybe,
    hidden: str,
    output: str,
    wanted: tuple[bool, tuple[bool, ...], tuple[bool, ...]],
    plan: MlpPlan,
) -> tuple[Tensor | None, Maybe, Maybe]:
    """(dx, dweights, dbiases), None where not wanted. saved: the outputs of all layers, y last.

    None will do for what no gradient needs, as for `reference.mlp_bwd`, but for y.
    """
    need_dx, need_dweights, need_dbiases = wanted
    count, hs = len(weights), cast(Tensors, (x, *saved))  # what is read is there
    # Below the first layer of which anything is wanted, no gradient need be known.
    first = next((l for l in range(count) if need_dx or need_dweights[l] or need_dbiases[l]), count)
    dweights: list[Tensor | None] = [None] * count
    dbiases: list[Tensor | None] = [None] * count
    dh: Tensor | None = dy
    dz: Tensor | None = None
    for l in reversed(range(first, count)):
        own, dgrad, weight = plan.layers[l], plan.dgrads[l], cast(Tensor, weights[l])
        act, below = output if l == count - 1 else hidden, l > first
        if dz is None and not (below and dgrad):
            flags = (below or need_dx, need_dweights[l], need_dbiases[l])
            dh, dweights[l], dbiases[l] = linear.linear_act_bwd(
                cast(Tensor, dh), hs[l + 1], hs[l], weight, act, flags, own
            )
            continue
        if dz is None:
            dz, dbiases[l] = linear.act_bwd(cast(Tensor, dh), hs[l + 1], act, need_dbiases[l], own)
        if need_dweights[l]:
            wgrad = plan.wgrads[l]
            dweights[l] = linear_act_wgrad(dz, as_readable(hs[l]), wgrad) if wgrad else torch.mm(dz.t(), hs[l])
        if below and dgrad:
            dz, dbiases[l - 1] = linear_act_dgrad(dz, weight, hs[l], hidden, need_dbiases[l - 1], dgrad)
        else:
            dh, dz = torch.mm(dz, weight) if below or need_dx else None, None
    return dh if need_dx else None, tuple(dweights), tuple(dbiases)
