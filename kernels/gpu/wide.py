# SPDX-License-Identifier: Apache-2.0
"""Launchers of the products whose tiles travel by TMA, and the backward pass of a network of wide layers."""

# pyright: reportCallIssue=false
# Launch options are not in triton's types.
from typing import cast

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..records import MlpPlan, NeedsGrad, Plan, WideTile
from .functions import ACTIVATIONS
from .launch import INTERPRETED, OptionalTensors, Tensors, device_of
from .layer import act_bwd, linear_act_bwd, sum_slots
from .wide_kernels import linear_act_dgrad_tma_kernel, linear_act_fwd_tma_kernel, sum_splits_kernel


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
    with device_of(a.device):
        linear_act_fwd_tma_kernel[(plan.programs,)](
            x_desc=TensorDescriptor.from_tensor(a, blocks[0]),
            weight_desc=TensorDescriptor.from_tensor(b, blocks[1]),
            bias_ptr=None if split else bias,
            y_desc=TensorDescriptor.from_tensor(parts, [tile.block_m, tile.block_n // tile.subtiles]),
            M=M,
            N=N,
            K=K,
            stride_b=stride_b,
            ACT=ACTIVATIONS["identity" if split else activation][0],
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
                ACT=ACTIVATIONS[activation][0],
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
    weight = as_readable(weight.t() if transposed else weight)
    block = [tile.block_n, tile.block_k] if transposed else [tile.block_k, tile.block_n]
    below = torch.empty((M, N), dtype=dz.dtype, device=dz.device)
    dbias = torch.empty((N,), dtype=dz.dtype, device=dz.device) if need_dbias else None
    slots = torch.empty((-(-M // tile.block_m), N), dtype=torch.float32, device=dz.device) if need_dbias else None
    piece = [tile.block_m, tile.block_n // tile.subtiles]
    with device_of(dz.device):
        linear_act_dgrad_tma_kernel[(plan.programs,)](
            dz_desc=TensorDescriptor.from_tensor(dz, [tile.block_m, tile.block_k]),
            weight_desc=TensorDescriptor.from_tensor(weight, block),
            h_desc=TensorDescriptor.from_tensor(h, piece),
            dz_below_desc=TensorDescriptor.from_tensor(below, piece),
            dbias_ptr=slots,
            M=M,
            N=N,
            K=K,
            ACT_BACKWARD=ACTIVATIONS[activation][1],
            TRANSPOSED=transposed,
            **_tile_arguments(plan),
            enable_fp_fusion=True,
        )
        if slots is not None and dbias is not None:
            sum_slots(slots, dbias)
    return below, dbias


def mlp_bwd(
    dy: Tensor,
    x: Tensor | None,
    saved: OptionalTensors,
    weights: OptionalTensors,
    hidden: str,
    output: str,
    wanted: NeedsGrad,
    plan: MlpPlan,
) -> tuple[Tensor | None, OptionalTensors, OptionalTensors]:
    """(dx, dweights, dbiases), None where not wanted. saved: the outputs of all layers, y last.

    None will do for what no gradient needs, as for `reference.mlp_bwd`, but for y.
    """
    need_dx, need_dweights, need_dbiases = wanted
    count, hs = len(weights), cast(Tensors, (x, *saved))  # None stands only where nothing reads
    # Layers below the first one whose gradients are wanted need none.
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
            dh, dweights[l], dbiases[l] = linear_act_bwd(cast(Tensor, dh), hs[l + 1], hs[l], weight, act, flags, own)
            continue
        if dz is None:
            dz, dbiases[l] = act_bwd(cast(Tensor, dh), hs[l + 1], act, need_dbiases[l], own)
        if need_dweights[l]:
            wgrad = plan.wgrads[l]
            dweights[l] = linear_act_wgrad(dz, as_readable(hs[l]), wgrad) if wgrad else torch.mm(dz.t(), hs[l])
        if below and dgrad:
            dz, dbiases[l - 1] = linear_act_dgrad(dz, weight, hs[l], hidden, need_dbiases[l - 1], dgrad)
        else:
            dh, dz = torch.mm(dz, weight) if below or need_dx else None, None
    return dh if need_dx else None, tuple(dweights), tuple(dbiases)
