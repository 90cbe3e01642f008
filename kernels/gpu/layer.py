"""Launchers of the kernels for one layer: shapes as in `layer_kernels.py`, any strides in, fresh tensors out."""

import torch
from torch import Tensor

from ..records import Plan, Wanted
from .functions import ACTIVATIONS
from .launch import INTERPRETED, aligned, device_of, known_operands, launch
from .layer_kernels import (
    act_bwd_kernel,
    linear_act_bwd_rows_kernel,
    linear_act_fwd_rows_kernel,
    linear_act_fwd_tiled_kernel,
    sum_slots_kernel,
)


def linear_act_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, plan: Plan) -> Tensor:
    """act(x @ weight.T + bias), (M, N), in the dtype of x; M and N are not 0."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    tile = plan.tile
    kernel = linear_act_fwd_rows_kernel if plan.impl == "rows" else linear_act_fwd_tiled_kernel
    operands = known_operands(x, weight, bias)
    known = operands and (activation, M, N, K, *operands)
    with device_of(x):
        launch(
            kernel,
            (plan.programs,),
            plan,
            known,
            x_ptr=x,
            weight_ptr=weight,
            bias_ptr=bias,
            y_ptr=y,
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
    return y


def linear_act_bwd(
    dy: Tensor, y: Tensor, x: Tensor | None, weight: Tensor | None, activation: str, wanted: Wanted, plan: Plan
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias), None where not wanted. x may be None without dweight, weight without dx.

    "rows": one kernel and, with several programs, one reduction; else a pass for dz and dbias, then library GEMMs.
    """
    need_dx, need_dweight, need_dbias = wanted
    if plan.impl != "rows":
        dz, dbias = act_bwd(dy, y, activation, need_dbias, plan)
        dx = torch.mm(dz, weight) if need_dx and weight is not None else None
        dweight = torch.mm(dz.t(), x) if need_dweight and x is not None else None
        return dx, dweight, dbias
    M, N = y.shape
    K = weight.shape[1] if weight is not None else x.shape[1] if x is not None else 1
    tile = plan.tile
    dx = y.new_empty((M, K)) if need_dx else None
    dweight = y.new_empty((N, K)) if need_dweight else None
    dbias = y.new_empty((N,)) if need_dbias else None
    # One program writes the gradients themselves; several write fp32 slots that are then summed.
    size = (N * K if need_dweight else 0) + (N if need_dbias else 0)
    slots, dweight_slots, dbias_slots = None, dweight, dbias
    if plan.programs > 1 and size:
        slots = torch.empty((plan.programs, size), dtype=torch.float32, device=y.device)
        dweight_slots = slots if need_dweight else None
        dbias_slots = slots[:, size - N :] if need_dbias else None
    operands = known_operands(y, dy, x, weight)
    known = operands and (activation, M, N, K, *operands, wanted)
    with device_of(y):
        launch(
            linear_act_bwd_rows_kernel,
            (plan.programs,),
            plan,
            known,
            dy_ptr=dy,
            y_ptr=y,
            x_ptr=x if need_dweight else None,
            weight_ptr=weight if need_dx else None,
            dx_ptr=dx,
            dweight_ptr=dweight_slots,
            dbias_ptr=dbias_slots,
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
            STAGES=tile.num_stages,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
        if slots is not None:
            sum_slots(slots, *(g for g in (dweight, dbias) if g is not None))
    return dx, dweight, dbias


def act_bwd(dy: Tensor, y: Tensor, activation: str, need_dbias: bool, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """(dz, dbias): dz = dy * act'(y), (M, N), and its column sums, (N,), or None."""
    M, N = y.shape
    tile = plan.tile
    dz = torch.empty((M, N), dtype=y.dtype, device=y.device)
    columns = -(-N // tile.block_n)  # triton.cdiv is typed as device code
    walkers = max(1, plan.programs // columns)
    dbias = torch.empty((N,), dtype=y.dtype, device=y.device) if need_dbias else None
    # Rows that the threads of a program cover at once, 16 bytes each.
    sum_rows = 32 * tile.num_warps * 16 // (y.element_size() * tile.block_n)
    # One program to a column block writes dbias itself; several write fp32 slots that are then summed.
    slots = torch.empty((walkers, N), dtype=torch.float32, device=y.device) if need_dbias and walkers > 1 else None
    operands = known_operands(dy, y)
    known = operands and (activation, M, N, *operands, need_dbias)
    with device_of(y):
        launch(
            act_bwd_kernel,
            (walkers, columns),
            plan,
            known,
            dy_ptr=dy,
            y_ptr=y,
            dz_ptr=dz,
            dbias_ptr=dbias if slots is None else slots,
            M=M,
            N=N,
            stride_dym=dy.stride(0),
            stride_dyn=dy.stride(1),
            ACT_BACKWARD=ACTIVATIONS[activation][1],
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            SUM_ROWS=min(tile.block_m, max(1, sum_rows)),
            num_warps=tile.num_warps,
            enable_fp_fusion=True,
        )
        if slots is not None and dbias is not None:
            sum_slots(slots, dbias)
    return dz, dbias


# A program sums so many slots and columns at a time. Up to ONE_LAUNCH slots a second launch would take longer than the
# rounds that it saves.
SUM_SLOTS, SUM_COLUMNS, SUM_WARPS = 64, 64, 4
ONE_LAUNCH = 8 * SUM_SLOTS


def sum_slots(slots: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Writes the sums of slots (programs, size) into first and then second, in an order that sizes alone decide.

    Many slots are summed in two launches: chunks of them, by as many programs as keep a chip busy, then those sums.
    """
    num_slots, size = slots.shape
    if num_slots > ONE_LAUNCH:
        # The second launch has one round.
        chunk = SUM_SLOTS * -(-num_slots // SUM_SLOTS**2)
        sums = torch.empty((-(-num_slots // chunk), size), dtype=torch.float32, device=slots.device)
        _sum_chunks(slots, chunk, sums, None)
        slots, num_slots = sums, len(sums)
    _sum_chunks(slots, num_slots, first, second)


def _sum_chunks(slots: Tensor, chunk: int, first: Tensor, second: Tensor | None) -> None:
    num_slots, size = slots.shape
    first_size = min(size, first.numel())
    known = None
    if aligned(slots, first, second):
        known = (slots.device, first.dtype, num_slots, chunk, size, first_size, second is None)
    launch(
        sum_slots_kernel,
        (-(-size // SUM_COLUMNS), -(-num_slots // chunk)),
        None,
        known,
        slots_ptr=slots,
        first_ptr=first,
        second_ptr=second,
        num_slots=num_slots,
        chunk=chunk,
        first_size=first_size,
        size=size,
        SLOTS=SUM_SLOTS,
        BLOCK=SUM_COLUMNS,
        num_warps=SUM_WARPS,
        enable_fp_fusion=True,
    )
