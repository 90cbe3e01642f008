# SPDX-License-Identifier: Apache-2.0
"""Launchers of the kernels for one layer: shapes as in `layer_kernels.py`, any strides in, fresh tensors out."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..records import Plan, Tile, Wanted
from .functions import ACTIVATIONS
from .launch import INTERPRETED, Gradients, Launch, aligned, fresh, part_of
from .layer_kernels import (
    act_bwd_kernel,
    linear_act_bwd_rows_kernel,
    linear_act_fwd_rows_kernel,
    linear_act_fwd_tiled_kernel,
    sum_slots_kernel,
)


def linear_act_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, plan: Plan) -> Tensor:
    """act(x @ weight.T + bias), (M, N), in the dtype of x; M and N are not 0."""
    return linear_act_fwd_call(x, weight, bias, activation, plan)(x, weight, bias)


def linear_act_fwd_call(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, plan: Plan
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """`linear_act_fwd` as a function of tensors of the same dtypes, shapes, strides and device as these."""
    (M, K), N = x.shape, weight.shape[0]
    tile, new_y = plan.tile, fresh((M, N), x.dtype, x.device)
    kernel = linear_act_fwd_rows_kernel if plan.impl == "rows" else linear_act_fwd_tiled_kernel
    launch = Launch(
        kernel,
        (plan.programs,),
        x.device,
        ("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"),
        M=M,
        N=N,
        K=K,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_b=1 if bias is None else bias.stride(0),
        ACT=ACTIVATIONS[activation][0],
        PRECISION=plan.precision,
        WIDEN=INTERPRETED,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = new_y()
        launch(aligned(x, weight, bias), x, weight, bias, y)
        return y

    return call


def linear_act_bwd(
    dy: Tensor, y: Tensor, x: Tensor | None, weight: Tensor | None, activation: str, wanted: Wanted, plan: Plan
) -> Gradients:
    """(dx, dweight, dbias), None where not wanted. x may be None without dweight, weight without dx.

    "rows": one kernel and, with several programs, one reduction; else a pass for dz and dbias, then library GEMMs.
    """
    return linear_act_bwd_call(dy, y, x, weight, activation, wanted, plan)(dy, y, x, weight)


def linear_act_bwd_call(
    dy: Tensor, y: Tensor, x: Tensor | None, weight: Tensor | None, activation: str, wanted: Wanted, plan: Plan
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Gradients]:
    """`linear_act_bwd` as a function of tensors of the same dtypes, shapes, strides and device as these."""
    need_dx, need_dweight, need_dbias = wanted
    if plan.impl != "rows":
        dz_pass = act_bwd_call(dy, y, activation, need_dbias, plan)

        def passes(dy: Tensor, y: Tensor, x: Tensor | None, weight: Tensor | None) -> Gradients:
            dz, dbias = dz_pass(dy, y)
            dx = torch.mm(dz, weight) if need_dx and weight is not None else None
            dweight = torch.mm(dz.t(), x) if need_dweight and x is not None else None
            return dx, dweight, dbias

        return passes
    M, N = y.shape
    K = weight.shape[1] if weight is not None else x.shape[1] if x is not None else 1
    dtype, device, tile = y.dtype, y.device, plan.tile
    # One program writes the gradients themselves; several write fp32 slots that are then summed.
    size = (N * K if need_dweight else 0) + (N if need_dbias else 0)
    first = N * K if need_dweight else N
    add_up = sum_slots_call(plan.programs, size, first, device) if plan.programs > 1 and size else None
    new_dx = fresh((M, K), dtype, device) if need_dx else None
    new_dweight = fresh((N, K), dtype, device) if need_dweight else None
    new_dbias = fresh((N,), dtype, device) if need_dbias else None
    new_slots = fresh((plan.programs, size), torch.float32, device)
    launch = Launch(
        linear_act_bwd_rows_kernel,
        (plan.programs,),
        device,
        ("dy_ptr", "y_ptr", "x_ptr", "weight_ptr", "dx_ptr", "dweight_ptr", "dbias_ptr"),
        M=M,
        N=N,
        K=K,
        stride_dym=dy.stride(0),
        stride_dyn=dy.stride(1),
        stride_xm=x.stride(0) if x is not None else 0,
        stride_xk=x.stride(1) if x is not None else 0,
        stride_wn=weight.stride(0) if weight is not None else 0,
        stride_wk=weight.stride(1) if weight is not None else 0,
        stride_slot=size,
        ACT_BACKWARD=ACTIVATIONS[activation][1],
        PRECISION=plan.precision,
        WIDEN=INTERPRETED,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        # Without barriers in the loop, products on FMA units would take more registers than there are.
        SUM_ROWS=1 if dtype == torch.float32 and plan.precision == "ieee" else _sum_rows(tile, dtype),
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )

    def call(dy: Tensor, y: Tensor, x: Tensor | None, weight: Tensor | None) -> Gradients:
        dx, dweight, dbias = new_dx and new_dx(), new_dweight and new_dweight(), new_dbias and new_dbias()
        x, weight = x if need_dweight else None, weight if need_dx else None
        if add_up is None:
            launch(aligned(dy, y, x, weight), dy, y, x, weight, dx, dweight, dbias)
            return dx, dweight, dbias
        slots = new_slots()
        biases = part_of(slots, (plan.programs, N), (size, 1), size - N) if need_dbias else None
        launch(aligned(dy, y, x, weight), dy, y, x, weight, dx, slots if need_dweight else None, biases)
        add_up(slots, *(g for g in (dweight, dbias) if g is not None))
        return dx, dweight, dbias

    return call


def _sum_rows(tile: Tile, dtype: torch.dtype) -> int:
    """Rows of a tile that the threads of a program cover at once, 16 bytes each."""
    return min(tile.block_m, max(1, 32 * tile.num_warps * 16 // (dtype.itemsize * tile.block_n)))


def act_bwd(dy: Tensor, y: Tensor, activation: str, need_dbias: bool, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """(dz, dbias): dz = dy * act'(y), (M, N), and its column sums, (N,), or None."""
    return act_bwd_call(dy, y, activation, need_dbias, plan)(dy, y)


def act_bwd_call(
    dy: Tensor, y: Tensor, activation: str, need_dbias: bool, plan: Plan
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:
    """`act_bwd` as a function of tensors of the same dtypes, shapes, strides and device as these."""
    M, N = y.shape
    dtype, device, tile = y.dtype, y.device, plan.tile
    columns = -(-N // tile.block_n)  # triton.cdiv is typed as device code
    walkers = max(1, plan.programs // columns)
    # One program to a column block writes dbias itself; several write fp32 slots that are then summed.
    add_up = sum_slots_call(walkers, N, N, device) if need_dbias and walkers > 1 else None
    new_dz, new_dbias = fresh((M, N), dtype, device), fresh((N,), dtype, device)
    new_slots = fresh((walkers, N), torch.float32, device)
    launch = Launch(
        act_bwd_kernel,
        (walkers, columns),
        device,
        ("dy_ptr", "y_ptr", "dz_ptr", "dbias_ptr"),
        M=M,
        N=N,
        stride_dym=dy.stride(0),
        stride_dyn=dy.stride(1),
        ACT_BACKWARD=ACTIVATIONS[activation][1],
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        SUM_ROWS=_sum_rows(tile, dtype),
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )

    def call(dy: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        dz, dbias = new_dz(), new_dbias() if need_dbias else None
        slots = dbias if add_up is None else new_slots()
        launch(aligned(dy, y), dy, y, dz, slots)
        if add_up is not None:
            add_up(slots, dbias)
        return dz, dbias

    return call


# A program sums so many slots and columns at a time. Up to ONE_LAUNCH slots a second launch would take longer than the
# rounds that it saves.
SUM_SLOTS, SUM_COLUMNS, SUM_WARPS = 64, 64, 4
ONE_LAUNCH = 8 * SUM_SLOTS


def sum_slots(slots: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Writes the sums of slots (programs, size) into first and then second, in an order that sizes alone decide.

    Many slots are summed in two launches: chunks of them, by as many programs as keep a chip busy, then those sums.
    """
    num_slots, size = slots.shape
    sum_slots_call(num_slots, size, first.numel(), slots.device)(slots, first, second)


def sum_slots_call(num_slots: int, size: int, first_size: int, device: torch.device) -> Callable[..., None]:
    """`sum_slots` as a function of slots (num_slots, size), of a first tensor of that size, and of a second one."""
    if num_slots <= ONE_LAUNCH:
        return _sum_chunks(num_slots, num_slots, size, first_size, device)
    # The second launch has one round.
    chunk = SUM_SLOTS * -(-num_slots // SUM_SLOTS**2)
    chunks = -(-num_slots // chunk)
    new_sums = fresh((chunks, size), torch.float32, device)
    into_sums = _sum_chunks(num_slots, chunk, size, size, device)
    add_up = _sum_chunks(chunks, chunks, size, first_size, device)

    def call(slots: Tensor, first: Tensor, second: Tensor | None = None) -> None:
        sums = new_sums()
        into_sums(slots, sums)
        add_up(sums, first, second)

    return call


def _sum_chunks(num_slots: int, chunk: int, size: int, first_size: int, device: torch.device) -> Callable[..., None]:
    launch = Launch(
        sum_slots_kernel,
        (-(-size // SUM_COLUMNS), -(-num_slots // chunk)),
        device,
        ("slots_ptr", "first_ptr", "second_ptr"),
        num_slots=num_slots,
        chunk=chunk,
        first_size=first_size,
        size=size,
        SLOTS=SUM_SLOTS,
        BLOCK=SUM_COLUMNS,
        num_warps=SUM_WARPS,
        enable_fp_fusion=True,
    )

    def call(slots: Tensor, first: Tensor, second: Tensor | None = None) -> None:
        launch(aligned(slots, first, second), slots, first, second)

    return call
