# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Launch options (num_warps) and loops over tl.range are not in triton's types.
"""y = act(x @ weight.T + bias) for wide layers: a persistent product whose tiles travel by TMA, with its launcher.

Shapes: x (M, K), weight (N, K), bias (N,), y (M, N). TMA reads a matrix whose rows lie dense and start at multiples of
16 bytes: `readable` says whether an operand is one; the pointer kernel in `linear.py` takes the others. M, N and K need
not be whole tiles: TMA reads zeros beyond an edge and writes nothing there.

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

from . import device
from .linear import INTERPRETED, _current, _operand
from .plan import Plan, WideTile


@triton.jit
def _place(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """(row, column) of an output tile: GROUP_M row tiles at a time, columns outermost."""
    group = tile // (GROUP_M * num_n)
    group_m = tl.minimum(num_m - group * GROUP_M, GROUP_M)
    in_group = tile % (GROUP_M * num_n)
    return group * GROUP_M + in_group % group_m, in_group // group_m


@triton.jit
def _finish(z, bias_ptr, stride_b, y_desc, first_m, first_n, N, ACT: tl.constexpr):
    """Bias, activation and store of one piece of an output tile."""
    if bias_ptr is not None:
        offs_n = first_n + tl.arange(0, z.shape[1]).to(tl.int64)
        z += tl.load(bias_ptr + offs_n * stride_b, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y_desc.store([first_m, first_n], ACT(z).to(y_desc.dtype))


@triton.jit
def linear_act_fwd_tma_kernel(
    x_desc,  # blocks of [BLOCK_M, BLOCK_K]
    weight_desc,  # blocks of [BLOCK_N, BLOCK_K]
    bias_ptr,  # None without a bias
    y_desc,  # blocks of [BLOCK_M, BLOCK_N // SUBTILES]
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
    SUBTILES: tl.constexpr,  # 1 or 2: pieces in which a tile is finished; its columns in halves take less shared memory
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
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(num_k):
            x = x_desc.load([tile_m * BLOCK_M, k * BLOCK_K])
            w = weight_desc.load([tile_n * BLOCK_N, k * BLOCK_K])
            # Both come straight from shared memory, where a transpose is a stride order.
            # The interpreter multiplies in fp32, and knows some of the others not even by name.
            precision: tl.constexpr = "ieee" if WIDEN else PRECISION
            acc = tl.dot(_operand(x, WIDEN), _operand(w, WIDEN).T, acc, input_precision=precision)
        finished += tl.num_programs(0)
        tile_m, tile_n = _place(finished, num_m, num_n, GROUP_M)
        first_m = tile_m * BLOCK_M
        first_n = tile_n * BLOCK_N
        if SUBTILES == 1:
            _finish(acc, bias_ptr, stride_b, y_desc, first_m, first_n, N, ACT)
        else:
            left, right = tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
            _finish(left, bias_ptr, stride_b, y_desc, first_m, first_n, N, ACT)
            _finish(right, bias_ptr, stride_b, y_desc, first_m, first_n + BLOCK_N // 2, N, ACT)


def readable(matrix: Tensor) -> bool:
    """Whether TMA can read a matrix as it lies in memory."""
    pitch, step = matrix.stride()
    size = matrix.element_size()
    return step == 1 and pitch * size % 16 == 0 and pitch >= matrix.shape[1] and matrix.data_ptr() % 16 == 0


def linear_act_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, plan: Plan) -> Tensor:
    """act(x @ weight.T + bias), (M, N), in the dtype of x; no size is 0, and x, weight and rows of y are `readable`."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    tile = cast(WideTile, plan.tile)
    with _current(x):
        linear_act_fwd_tma_kernel[(plan.programs,)](
            x_desc=TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
            weight_desc=TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
            bias_ptr=bias,
            y_desc=TensorDescriptor.from_tensor(y, [tile.block_m, tile.block_n // tile.subtiles]),
            M=M,
            N=N,
            K=K,
            stride_b=1 if bias is None else bias.stride(0),
            ACT=device.ACTIVATIONS[activation][0],
            PRECISION=plan.precision,
            WIDEN=INTERPRETED,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=tile.group_m,
            SUBTILES=tile.subtiles,
            FLATTEN=tile.flatten,
            SPECIALIZE=tile.specialize,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
    return y
