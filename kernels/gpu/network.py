# SPDX-License-Identifier: Apache-2.0
"""Launchers of whole networks: shapes as in `network_kernels.py`, a launch for each segment of a plan."""

# The types do not say that all parts of a head are there, or none.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false

import itertools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from ..plan import mlp_columns, mlp_slots
from ..records import MlpPlan, MlpTile, NeedsGrad
from .functions import ACTIVATIONS, UNBOUNDED
from .launch import INTERPRETED, Launch, OptionalTensors, Tensors, aligned, fresh, part_of
from .layer import sum_slots_call
from .network_kernels import mlp_bwd_kernel, mlp_fwd_kernel, sum_losses_kernel


def padded(widths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(triton.next_power_of_2(width), 16) for width in widths)


def _widths(weights: Tensors) -> tuple[int, ...]:
    return (weights[0].shape[1], *(weight.shape[0] for weight in weights))


def mlp_fwd(
    x: Tensor,
    weights: Tensors,
    biases: Tensors | None,
    hidden: str,
    output: str,
    plan: MlpPlan,
    save: tuple[int, ...] = (),
    head: tuple[Tensor, Tensor | None, str, torch.dtype] | None = None,
) -> tuple[Tensor, Tensors]:
    """(y, saved): the output (M, N), and the inputs of the layers l in `save`, all in the dtype of x.

    x (M, K), any strides. weights: (N_l, K_l) each, contiguous; biases: (N_l,) each, contiguous, or None. `save` is
    `boundaries` of the plan for the backward pass, or () for none. M is not 0. Saved activations are contiguous, with
    K_l rounded up to a multiple of 16 columns, of which the first K_l count.

    head: as for `ops.mlp_fwd`; y is then not written anywhere, and a reduced loss is a scalar tensor.
    """
    return mlp_fwd_call(x, weights, biases, hidden, output, plan, save, head)(x, weights, biases, head)


def mlp_fwd_call(
    x: Tensor,
    weights: Tensors,
    biases: Tensors | None,
    hidden: str,
    output: str,
    plan: MlpPlan,
    save: tuple[int, ...] = (),
    head: tuple[Tensor, Tensor | None, str, torch.dtype] | None = None,
) -> Callable[..., tuple[Tensor, Tensors]]:
    """`mlp_fwd` as a function (x, weights, biases, head=None) of tensors that are like these but for their values."""
    M, widths, layers = x.shape[0], _widths(weights), len(weights)
    columns, device = mlp_columns(widths), x.device
    stored = {*save, *plan.boundaries, *(() if head else (layers,))}
    new = [fresh((M, columns[l]), x.dtype, device) if l in stored else None for l in range(1, layers + 1)]
    target, pos_weight, reduction, dtype = head or (None, None, "", None)
    summed = reduction in ("mean", "sum")
    # One program writes the loss itself; several write fp32 sums that are then added up.
    programs = plan.segments[-1].programs if summed else 1
    scale = 1.0 / target.numel() if reduction == "mean" else 1.0
    new_loss = fresh(() if summed else target.shape, dtype, device) if head else None
    new_sums = fresh((programs,), torch.float32, device)
    launches = []
    for segment in plan.segments:
        tile, (first, end) = segment.tile, (segment.first, segment.last)
        strides = x.stride() if first == 0 else (columns[first], 1)
        launch = Launch(
            mlp_fwd_kernel,
            (segment.programs,),
            device,
            ("x_ptr", "weight_ptrs", "bias_ptrs", "out_ptrs", "loss_ptr", "target_ptr", "pos_weight_ptr"),
            M=M,
            stride_xm=strides[0],
            stride_xk=strides[1],
            stride_tm=target.stride(0) if target is not None else 0,
            stride_tn=target.stride(1) if target is not None else 0,
            stride_p=pos_weight.stride(0) if pos_weight is not None else 0,
            scale=scale,
            HIDDEN=ACTIVATIONS[hidden][0],
            OUTPUT=ACTIVATIONS[output if end == layers else hidden][0],
            WIDTHS=widths[first : end + 1],
            PADDED=padded(widths[first : end + 1]),
            COLUMNS=tuple(columns[first : end + 1]),
            UNBOUNDED=hidden in UNBOUNDED,
            SUMMED=summed,
            PRECISION=plan.precision,
            WIDEN=INTERPRETED,
            RESIDENT=tile.resident,
            BLOCK_M=tile.block_m,
            STAGES=tile.num_stages,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
        launches.append((launch, first, end))
    add_up = Launch(
        sum_losses_kernel,
        (1,),
        device,
        ("sums_ptr", "loss_ptr"),
        num_sums=programs,
        BLOCK=triton.next_power_of_2(programs),
        num_warps=4,
        enable_fp_fusion=True,
    )

    def call(x: Tensor, weights: Tensors, biases: Tensors | None, head=None) -> tuple[Tensor, Tensors]:
        out = [make and make() for make in new]
        target, pos_weight, *_ = head or (None, None)
        loss = new_loss and new_loss()
        sums = new_sums() if programs > 1 else loss
        known = aligned(x, *weights, *(biases or ()), target, pos_weight)
        for launch, first, end in launches:
            h = x if first == 0 else out[first - 1]
            s, t, p = (sums, target, pos_weight) if end == layers else (None, None, None)
            launch(known, h, weights[first:end], biases and biases[first:end], tuple(out[first:end]), s, t, p)
        if programs > 1:
            add_up(True, sums, loss)
        return out[-1] if loss is None else loss, tuple([out[l - 1] for l in save])

    return call


def _sum_rows(tile: MlpTile, n: int, on_fma: bool) -> int:
    """How many rows of dz the threads of a program hold at once, with n padded neurons, as triton lays products out.

    Tensor cores give a warp 8 rows, and warps share the longer side of a product, rows or neurons. On FMA units a
    thread has a square of numbers, a warp takes neurons first, and warps share rows.
    """
    if on_fma:
        numbers = tile.block_m * n // (32 * tile.num_warps)  # of a thread
        side = 4 if numbers >= 16 else 2 if numbers >= 4 else 1
        rows = max(32 * side * side // n, side) * tile.num_warps
    else:
        rows = 8 * tile.num_warps if tile.block_m > n else 8
    return min(tile.block_m, rows)


def mlp_bwd(
    dy: Tensor,
    x: Tensor,
    saved: Tensors,
    weights: Tensors,
    biases: Tensors | None,
    hidden: str,
    output: str,
    wanted: NeedsGrad,
    plan: MlpPlan,
    head: tuple[Tensor, Tensor | None, str] | None = None,
) -> tuple[Tensor | None, OptionalTensors, OptionalTensors]:
    """(dx, dweights, dbiases) from dy (M, N) of any strides, None where not wanted.

    saved: what `mlp_fwd` returned for `plan.boundaries`. Shapes and dtypes of the gradients are those of x, weights and
    biases; the parameters' gradients are parts of one tensor, each aligned to 16 bytes. The rest as for `mlp_fwd`.

    head: (target, pos_weight, reduction) makes dy the gradient of the loss: (M, N) of any strides for reduction "none",
    else a tensor of one element, read on the device.
    """
    arguments = (dy, x, saved, weights, biases)
    return mlp_bwd_call(*arguments, hidden, output, wanted, plan, head)(*arguments, head)


def mlp_bwd_call(
    dy: Tensor,
    x: Tensor,
    saved: Tensors,
    weights: Tensors,
    biases: Tensors | None,
    hidden: str,
    output: str,
    wanted: NeedsGrad,
    plan: MlpPlan,
    head: tuple[Tensor, Tensor | None, str] | None = None,
) -> Callable[..., tuple[Tensor | None, OptionalTensors, OptionalTensors]]:
    """`mlp_bwd` as a function (dy, x, saved, weights, biases, head=None) of tensors that are like these."""
    M, widths, count = x.shape[0], _widths(weights), len(weights)
    target, pos_weight, reduction = head or (None, None, "")
    summed = reduction in ("mean", "sum")
    scale = 1.0 / target.numel() if reduction == "mean" else 1.0
    columns, dtype, device = mlp_columns(widths), x.dtype, x.device
    on_fma = dtype == torch.float32 and plan.precision == "ieee"
    at_weights, at_biases, size = mlp_slots(widths, wanted)
    # Layers below the first one whose gradients are wanted need no dz.
    lowest = next((l for l in range(count) if wanted[0] or wanted[1][l] or wanted[2][l]), count)
    # One program writes the gradients themselves; several write fp32 slots that are then summed.
    programs = plan.segments[0].programs
    places = {first: place for place, first in enumerate(plan.boundaries)}
    launches = []
    for segment in reversed(plan.segments):
        if segment.last <= lowest:
            break
        layers, tile, last = slice(segment.first, segment.last), segment.tile, segment.last == count
        h = saved[places[segment.first]] if segment.first else x
        upstream = (0, 0) if last and summed else dy.stride() if last else (columns[segment.last], 1)
        # Offsets begin at the segment's first gradient, so that equal segments share one compiled kernel.
        at = at_weights[layers] + at_biases[layers]
        base = min((a for a in at if a >= 0), default=-1)
        own_widths = padded(widths[segment.first : segment.last + 1])
        launch = Launch(
            mlp_bwd_kernel,
            (programs,),
            device,
            (
                *("dy_ptr", "x_ptr", "weight_ptrs", "bias_ptrs", "dx_ptr"),
                *("slots_ptr", "target_ptr", "pos_weight_ptr", "factor_ptr"),
            ),
            M=M,
            stride_dym=upstream[0],
            stride_dyn=upstream[1],
            stride_xm=h.stride(0),
            stride_xk=h.stride(1),
            stride_slot=size,
            stride_tm=target.stride(0) if last and target is not None else 0,
            stride_tn=target.stride(1) if last and target is not None else 0,
            stride_p=pos_weight.stride(0) if last and pos_weight is not None else 0,
            scale=scale,
            HIDDEN=ACTIVATIONS[hidden][0],
            HIDDEN_BACKWARD=ACTIVATIONS[hidden][1],
            OUTPUT=ACTIVATIONS[output if last else hidden][0],
            OUTPUT_BACKWARD=ACTIVATIONS[output if last else hidden][1],
            WIDTHS=widths[segment.first : segment.last + 1],
            PADDED=own_widths,
            COLUMNS=(columns[segment.first], columns[segment.last]),
            DWEIGHT_AT=tuple(a - base if a >= 0 else -1 for a in at_weights[layers]),
            DBIAS_AT=tuple(a - base if a >= 0 else -1 for a in at_biases[layers]),
            FIRST=max(lowest - segment.first, 0),
            SCALE_DX=segment.first == 0,
            PRECISION=plan.precision,
            ON_FMA=on_fma,
            WIDEN=INTERPRETED,
            BLOCK_M=tile.block_m,
            SUM_ROWS=tuple([_sum_rows(tile, n, on_fma) for n in own_widths[1:]]),
            STAGES=tile.num_stages,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            # Unasked, the assembler takes few enough for one more program, spills, and loads operands one by one.
            maxnreg=255 if on_fma else None,
            enable_fp_fusion=True,
        )
        need_dx = wanted[0] or lowest < segment.first
        new_dx = fresh(h.shape, dtype, device) if need_dx else None
        launches.append((launch, layers, base, new_dx, places.get(segment.first), last))
    add_up = sum_slots_call(programs, size, size, device) if size and programs > 1 else None
    new_flat, new_slots = fresh((size,), dtype, device), fresh((programs, size), torch.float32, device)
    # Of each gradient its shape, its strides and where it begins in the tensor that holds all, -1 if it is not wanted.
    parts = [((n, k), (k, 1), at) for (k, n), at in zip(itertools.pairwise(widths), at_weights, strict=True)]
    parts += [((n,), (1,), at) for n, at in zip(widths[1:], at_biases, strict=True)]

    def call(
        dy: Tensor, x: Tensor, saved: Tensors, weights: Tensors, biases: Tensors | None, head=None
    ) -> tuple[Tensor | None, OptionalTensors, OptionalTensors]:
        target, pos_weight, *_ = head or (None, None)
        flat = new_flat() if size else None
        slots = flat if add_up is None else new_slots()
        known = aligned(dy, x, *saved, *weights, *(biases or ()), target, pos_weight)
        dx, factor = (None, dy) if summed else (dy, None)
        for launch, layers, base, new_dx, place, last in launches:
            upstream, dx = dx, new_dx and new_dx()
            h = x if place is None else saved[place]
            own = slots if base == 0 else None
            if base > 0:
                own = part_of(slots, (programs, size - base), (size, 1), base)
            t, p = (target, pos_weight) if last else (None, None)
            launch(known, upstream, h, weights[layers], biases and biases[layers], dx, own, t, p, factor)
        if add_up is not None:
            add_up(slots, flat)
        # Views are made once all is launched: the launches are what a GPU waits for.
        gradients = [None if at < 0 else part_of(flat, shape, strides, at) for shape, strides, at in parts]
        return dx if wanted[0] else None, gradients[:count], gradients[count:]

    return call
