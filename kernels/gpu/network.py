"""Launchers of whole networks: shapes as in `network_kernels.py`, a launch for each segment of a plan."""

# The types do not say that all parts of a head are there, or none.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false

import torch
import triton
from torch import Tensor

from ..plan import mlp_columns, mlp_slots
from ..records import MlpPlan, NeedsGrad
from .functions import ACTIVATIONS, UNBOUNDED
from .launch import INTERPRETED, OptionalTensors, Tensors, aligned, device_of, launch
from .layer import sum_slots
from .network_kernels import mlp_bwd_kernel, mlp_fwd_kernel, sum_losses_kernel


def padded(widths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(triton.next_power_of_2(width), 16) for width in widths)


def _widths(weights: Tensors) -> tuple[int, ...]:
    return (weights[0].shape[1], *(weight.shape[0] for weight in weights))


def _head_known(head) -> tuple:
    """What the choice of a compiled kernel depends on in (target, pos_weight, reduction, ..)."""
    if head is None:
        return ()
    target, pos_weight, *others = head
    weighted = pos_weight is not None and (pos_weight.dtype, pos_weight.stride())
    return target.dtype, target.stride(), weighted, *others


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
    M, widths = x.shape[0], _widths(weights)
    columns = mlp_columns(widths)
    out: list = [None] * len(weights)
    for l in {*save, *plan.boundaries, *(() if head else (len(weights),))}:
        out[l - 1] = torch.empty((M, columns[l]), dtype=x.dtype, device=x.device)
    target, pos_weight, reduction, dtype = head or (None, None, "", None)
    stride_tm, stride_tn = (0, 0) if target is None else target.stride()
    scale = 1.0 / target.numel() if reduction == "mean" else 1.0
    loss = sums = None
    if head:
        summed = reduction != "none"
        loss = torch.empty(() if summed else target.shape, dtype=dtype, device=x.device)
        # One program writes the loss itself; several write fp32 sums that are then added up.
        programs = plan.segments[-1].programs
        sums = loss
        if summed and programs > 1:
            sums = torch.empty((programs,), dtype=torch.float32, device=x.device)
    common = None
    if aligned(x, *weights, *(biases or ()), target, pos_weight):
        common = (x.device, x.dtype, hidden, output, widths, M, x.stride(), biases is None, save, *_head_known(head))
    with device_of(x):
        for segment in plan.segments:
            known = common and (segment.first, *common)
            layers, tile = slice(segment.first, segment.last), segment.tile
            last = segment.last == len(weights)
            h = x if segment.first == 0 else out[segment.first - 1]
            launch(
                mlp_fwd_kernel,
                (segment.programs,),
                plan,
                known,
                x_ptr=h,
                weight_ptrs=tuple(weights[layers]),
                bias_ptrs=None if biases is None else tuple(biases[layers]),
                out_ptrs=tuple(out[layers]),
                loss_ptr=sums if last else None,
                target_ptr=target if last else None,
                pos_weight_ptr=pos_weight if last else None,
                M=M,
                stride_xm=h.stride(0),
                stride_xk=h.stride(1),
                stride_tm=stride_tm,
                stride_tn=stride_tn,
                stride_p=pos_weight.stride(0) if pos_weight is not None else 0,
                scale=scale,
                HIDDEN=ACTIVATIONS[hidden][0],
                OUTPUT=ACTIVATIONS[output if last else hidden][0],
                WIDTHS=widths[segment.first : segment.last + 1],
                PADDED=padded(widths[segment.first : segment.last + 1]),
                COLUMNS=tuple(columns[segment.first : segment.last + 1]),
                UNBOUNDED=hidden in UNBOUNDED,
                SUMMED=reduction in ("mean", "sum"),
                PRECISION=plan.precision,
                WIDEN=INTERPRETED,
                RESIDENT=tile.resident,
                BLOCK_M=tile.block_m,
                STAGES=tile.num_stages,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                enable_fp_fusion=True,
            )
        if sums is not loss:
            known = (x.device, dtype, sums.shape[0])
            launch(
                sum_losses_kernel,
                (1,),
                None,
                known,
                sums_ptr=sums,
                loss_ptr=loss,
                num_sums=sums.shape[0],
                BLOCK=triton.next_power_of_2(sums.shape[0]),
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out[-1] if loss is None else loss, tuple(out[l - 1] for l in save)


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
    biases; the parameters' gradients are views of one tensor, each aligned to 16 bytes. The rest as for `mlp_fwd`.

    head: (target, pos_weight, reduction) makes dy the gradient of the loss: (M, N) of any strides for reduction "none",
    else a tensor of one element, read on the device.
    """
    M, widths = x.shape[0], _widths(weights)
    target, pos_weight, reduction = head or (None, None, "")
    stride_tm, stride_tn = (0, 0) if target is None else target.stride()
    dy, factor = (None, dy) if reduction in ("mean", "sum") else (dy, None)
    scale = 1.0 / target.numel() if reduction == "mean" else 1.0
    columns = mlp_columns(widths)
    at_weights, at_biases, size = mlp_slots(widths, wanted)
    inputs = dict(zip(plan.boundaries, saved, strict=True)) | {0: x}
    # Layers below the first one whose gradients are wanted need no dz.
    first = next((l for l in range(len(weights)) if wanted[0] or wanted[1][l] or wanted[2][l]), len(weights))
    # One program writes the gradients themselves; several write fp32 slots that are then summed.
    programs = plan.segments[0].programs
    flat = slots = x.new_empty((size,)) if size else None
    if size and programs > 1:
        slots = torch.empty((programs, size), dtype=torch.float32, device=x.device)
    dx = common = None
    if aligned(dy, factor, x, *saved, *weights, *(biases or ()), target, pos_weight):
        upstream = [None if g is None else (g.dtype, g.stride()) for g in (dy, factor)]
        strides = (x.stride(), *(h.stride() for h in saved))
        common = (x.device, x.dtype, hidden, output, widths, M, strides, *upstream, biases is None, wanted)
        common += _head_known(head)
    with device_of(x):
        for segment in reversed(plan.segments):
            if segment.last <= first:
                break
            known = common and (segment.first, *common)
            layers, tile = slice(segment.first, segment.last), segment.tile
            h = inputs[segment.first]
            dx = x.new_empty(h.shape) if wanted[0] or first < segment.first else None
            # Offsets begin at the segment's first gradient, so that equal segments share one compiled kernel.
            at = at_weights[layers] + at_biases[layers]
            base = min((a for a in at if a >= 0), default=-1)
            last = segment.last == len(weights)
            launch(
                mlp_bwd_kernel,
                (programs,),
                plan,
                known,
                dy_ptr=dy,
                x_ptr=h,
                weight_ptrs=tuple(weights[layers]),
                bias_ptrs=None if biases is None else tuple(biases[layers]),
                dx_ptr=dx,
                slots_ptr=None if base < 0 else slots[..., base:] if base else slots,
                target_ptr=target if last else None,
                pos_weight_ptr=pos_weight if last else None,
                factor_ptr=factor,
                M=M,
                stride_dym=dy.stride(0) if dy is not None else 0,
                stride_dyn=dy.stride(1) if dy is not None else 0,
                stride_xm=h.stride(0),
                stride_xk=h.stride(1),
                stride_slot=size,
                stride_tm=stride_tm if last else 0,
                stride_tn=stride_tn if last else 0,
                stride_p=pos_weight.stride(0) if last and pos_weight is not None else 0,
                scale=scale,
                HIDDEN=ACTIVATIONS[hidden][0],
                HIDDEN_BACKWARD=ACTIVATIONS[hidden][1],
                OUTPUT=ACTIVATIONS[output if last else hidden][0],
                OUTPUT_BACKWARD=ACTIVATIONS[output if last else hidden][1],
                WIDTHS=widths[segment.first : segment.last + 1],
                PADDED=padded(widths[segment.first : segment.last + 1]),
                COLUMNS=(columns[segment.first], columns[segment.last]),
                DWEIGHT_AT=tuple(a - base if a >= 0 else -1 for a in at_weights[layers]),
                DBIAS_AT=tuple(a - base if a >= 0 else -1 for a in at_biases[layers]),
                FIRST=max(first - segment.first, 0),
                SCALE_DX=segment.first == 0,
                PRECISION=plan.precision,
                WIDEN=INTERPRETED,
                BLOCK_M=tile.block_m,
                STAGES=tile.num_stages,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                enable_fp_fusion=True,
            )
            dy = dx
        if size and programs > 1:
            sum_slots(slots, flat, None)
    # Views are made once all is launched: the launches are what a GPU waits for.
    dweights = tuple(
        None if a < 0 else flat[a : a + w.numel()].view(w.shape) for a, w in zip(at_weights, weights, strict=True)
    )
    dbiases = tuple(None if a < 0 else flat[a : a + w.shape[0]] for a, w in zip(at_biases, weights, strict=True))
    return dx if wanted[0] else None, dweights, dbiases
