"""A whole narrow MLP in one kernel, forward and backward, with an optional binary cross-entropy head.

Layer l = 0 .. L-1 takes K_l = widths[l] to N_l = widths[l + 1] features, every width at most 128:

    h_0 = x,  z_l = h_l @ weight_l.T + bias_l,  h_{l+1} = act_l(z_l),  y = h_L

x (M, widths[0]) may have any strides. Weights (N_l, K_l) and biases (N_l,) are contiguous and have the dtype of x;
biases are all there or all None. Sums and activations are fp32; h_l is rounded to that dtype before the next product,
as it is between layers that run one by one. Activations stay in registers; only what is asked for is written.

Padding: every width is rounded up to a power of two of at least 16. A padded neuron of a sigmoid layer puts out 0.5,
but the weights that read it are padded with 0, so it reaches nothing; going back, its dz is 0 for the same reason.

The backward kernel works on transposed activations, [width, rows], so that no product takes as its left operand the
transpose of something that itself came from a product, which was reported to go wrong on Hopper: see `linear.py`.
"""

# triton's types know neither launch options nor tl.range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .linear import INTERPRETED, _current, _sum_slots, aligned, launch
from .plan import mlp_columns
from .records import MlpPlan

Tensors = tuple[Tensor, ...]
Maybe = tuple[Tensor | None, ...]


@triton.jit
def _operand(a, DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    # Rounded as an operand, and widened again for the interpreter, whose 16-bit dot is wrong.
    r = device.operand(a.to(DTYPE), PRECISION)
    return r.to(tl.float32) if WIDEN else r


@triton.jit
def _load_block(ptr, offs_r, offs_c, stride_r, stride_c, mask_r, mask_c):
    return tl.load(
        ptr + offs_r[:, None] * stride_r + offs_c[None, :] * stride_c,
        mask=mask_r[:, None] & mask_c[None, :],
        other=0.0,
    )


@triton.jit
def _neurons(N: tl.constexpr, BLOCK_N: tl.constexpr):
    # A neuron that only pads the layer repeats the last one. With weights of 0 it would make NaN of an infinite input,
    # and the next layer's 0 * NaN would carry that into every result; what is finite where the layer is, 0 takes out.
    offs_n = tl.arange(0, BLOCK_N)
    return tl.minimum(offs_n, N - 1) if N < BLOCK_N else offs_n


@triton.jit
def _clear_padding(h, N: tl.constexpr, BLOCK_N: tl.constexpr):
    # 0 does not take out an infinite output, of which unbounded activations are capable. Forward only: the backward
    # kernel has no register to spare, and may leave more NaN in the gradients of a network that overflows than torch.
    if N < BLOCK_N:
        h = tl.where((tl.arange(0, BLOCK_N) < N)[None, :], h, 0.0)
    return h


@triton.jit
def _load_weight(ptr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_n = _neurons(N, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    return tl.load(ptr + offs_n[:, None] * K + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0)


@triton.jit
def _load_weight_t(ptr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_n = _neurons(N, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    return tl.load(ptr + offs_n[None, :] * K + offs_k[:, None], mask=(offs_k < K)[:, None], other=0.0)


@triton.jit
def _load_bias(ptr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.load(ptr + _neurons(N, BLOCK_N)).to(tl.float32)


@triton.jit
def _log1p_exp(z):
    """log(1 + e^-|z|), to fp32 accuracy."""
    e = tl.exp2(tl.abs(z) * -1.4426950408889634)
    u = 1.0 + e
    # What the sum 1 + e lost is e - (u - 1), exactly, and it counts 1 / (1 + e), near enough 1 - e.
    return tl.log(u) + (e - (u - 1.0)) * (1.0 - e)


@triton.jit
def _bce(z, t, pos_weight):
    """-(pos_weight t log p + (1 - t) log(1 - p)) with p = sigmoid(z), from z, without cancellation at either end."""
    log1p = _log1p_exp(z)
    return tl.where(z >= 0, 1.0 - t, -pos_weight * t) * z + (1.0 + (pos_weight - 1.0) * t) * log1p


@triton.jit
def _bce_dz(z, t, pos_weight):
    return device.sigmoid(z) * (1.0 + (pos_weight - 1.0) * t) - pos_weight * t


@triton.jit(do_not_specialize=["M"])
def mlp_fwd_kernel(
    x_ptr,
    weight_ptrs,  # one per layer
    bias_ptrs,  # one per layer, or None without biases
    out_ptrs,  # one per layer: where its output goes, (M, COLUMNS[l + 1]); None: nowhere
    loss_ptr,  # None without a loss; else one fp32 sum per program, one value if there is one program, or (M, N)
    target_ptr,  # (M, N); None without a loss
    pos_weight_ptr,  # (N,); None: 1
    M,
    stride_xm,
    stride_xk,
    stride_tm,
    stride_tn,
    stride_p,
    scale,  # of a summed loss
    HIDDEN: tl.constexpr,
    OUTPUT: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,  # of x and of every output in memory
    UNBOUNDED: tl.constexpr,  # HIDDEN is
    SUMMED: tl.constexpr,  # the loss is summed
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    RESIDENT: tl.constexpr,  # weights are loaded once and kept; else once per row tile
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program walks row tiles; a tile goes through all layers in registers."""
    LAYERS: tl.constexpr = len(weight_ptrs)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    weights = ()
    biases = ()
    for l in tl.static_range(LAYERS):
        if RESIDENT:
            weights = weights + (
                _operand(
                    _load_weight_t(weight_ptrs[l], WIDTHS[l + 1], WIDTHS[l], PADDED[l + 1], PADDED[l]),
                    DTYPE,
                    PRECISION,
                    WIDEN,
                ),
            )
        if bias_ptrs is not None:
            biases = biases + (_load_bias(bias_ptrs[l], WIDTHS[l + 1], PADDED[l + 1]),)
    offs_k = tl.arange(0, PADDED[0])
    mask_k = offs_k < COLUMNS[0]
    if loss_ptr is not None:
        offs_t = tl.arange(0, PADDED[LAYERS])
        mask_t = offs_t < WIDTHS[LAYERS]
        pos_weight = 1.0
        if pos_weight_ptr is not None:
            pos_weight = tl.load(pos_weight_ptr + offs_t.to(tl.int64) * stride_p, mask=mask_t, other=1.0).to(
                tl.float32
            )[None, :]
        if SUMMED:
            sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
    rows = tl.arange(0, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        start = tl.cast(tile, tl.int64) * BLOCK_M
        offs_m = start + rows
        mask_m = offs_m < M
        h = _operand(
            _load_block(x_ptr, offs_m, offs_k.to(tl.int64), stride_xm, stride_xk, mask_m, mask_k),
            DTYPE,
            PRECISION,
            WIDEN,
        )  # [BLOCK_M, PADDED[0]]
        for l in tl.static_range(LAYERS):
            if RESIDENT:
                z = tl.dot(h, weights[l], input_precision=PRECISION)  # [BLOCK_M, PADDED[l + 1]]
            else:
                wt = _load_weight_t(weight_ptrs[l], WIDTHS[l + 1], WIDTHS[l], PADDED[l + 1], PADDED[l])
                z = tl.dot(h, _operand(wt, DTYPE, PRECISION, WIDEN), input_precision=PRECISION)
            if bias_ptrs is not None:
                z += biases[l][None, :]
            if l + 1 < LAYERS:
                h = HIDDEN(z)
            elif out_ptrs[l] is not None:
                h = OUTPUT(z)
            if UNBOUNDED and (l + 1 < LAYERS or COLUMNS[l + 1] > WIDTHS[l + 1]):
                h = _clear_padding(h, WIDTHS[l + 1], PADDED[l + 1])
            h = h.to(DTYPE)
            if out_ptrs[l] is not None:
                offs_n = tl.arange(0, PADDED[l + 1])
                tl.store(
                    out_ptrs[l] + start * COLUMNS[l + 1] + (rows[:, None] * COLUMNS[l + 1] + offs_n[None, :]),
                    h,
                    mask=mask_m[:, None] & (offs_n < COLUMNS[l + 1])[None, :],
                )
            h = _operand(h, DTYPE, PRECISION, WIDEN)
        if loss_ptr is not None:
            mask_mt = mask_m[:, None] & mask_t[None, :]
            t = _load_block(target_ptr, offs_m, offs_t.to(tl.int64), stride_tm, stride_tn, mask_m, mask_t)
            loss = _bce(z, t.to(tl.float32), pos_weight)
            if SUMMED:
                sums += tl.sum(tl.where(mask_mt, loss, 0.0), axis=1)
            else:
                tl.store(
                    loss_ptr + start * WIDTHS[LAYERS] + (rows[:, None] * WIDTHS[LAYERS] + offs_t[None, :]),
                    loss.to(loss_ptr.dtype.element_ty),
                    mask=mask_mt,
                )
    if loss_ptr is not None and SUMMED:
        tl.store(loss_ptr + tl.program_id(0), (tl.sum(sums, axis=0) * scale).to(loss_ptr.dtype.element_ty))


@triton.jit
def _clear_gap(ptr, SIZE: tl.constexpr):
    # Between this gradient and the next: it is summed with all others, and must not be whatever was in memory.
    GAP: tl.constexpr = -SIZE % 8
    if GAP > 0:
        offs = tl.arange(0, 8)
        tl.store(ptr + SIZE + offs, tl.zeros((8,), ptr.dtype.element_ty), mask=offs < GAP)


@triton.jit(do_not_specialize=["M"])
def mlp_bwd_kernel(
    dy_ptr,  # (M, COLUMNS[1]); None: 1, of a loss only
    x_ptr,  # (M, COLUMNS[0])
    weight_ptrs,  # one per layer
    bias_ptrs,  # one per layer, or None without biases
    dx_ptr,  # (M, COLUMNS[0]); None: not wanted
    slots_ptr,  # one slot of gradients per program; None: no parameter's gradient is wanted
    target_ptr,  # (M, N): the head is the binary cross entropy; None: it is OUTPUT
    pos_weight_ptr,  # (N,); None: 1
    factor_ptr,  # (): what all gradients are multiplied by, together with `scale`; None: 1, whatever `scale`
    M,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xk,
    stride_slot,
    stride_tm,
    stride_tn,
    stride_p,
    scale,
    HIDDEN: tl.constexpr,
    HIDDEN_BACKWARD: tl.constexpr,
    OUTPUT: tl.constexpr,
    OUTPUT_BACKWARD: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,  # of x and dx, and of dy, in memory
    DWEIGHT_AT: tl.constexpr,  # one per layer: where in a slot its dweight begins; -1: not wanted
    DBIAS_AT: tl.constexpr,  # likewise
    FIRST: tl.constexpr,  # the first layer of which anything is wanted
    SCALE_DX: tl.constexpr,  # dx is multiplied too, not only the gradients of parameters
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program walks row tiles: forward from x again, then dz back through the layers, all in registers.

    Sums over rows stay in registers, in the order of the rows, and each program writes them to a slot of its own.
    Multiplying by `factor` only at the end keeps the chain of dz near 1 whatever the size of the batch, where fp16
    would underflow.
    """
    LAYERS: tl.constexpr = len(weight_ptrs)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    weights = ()
    biases = ()
    # Last layer first, as the backward loop rebuilds them.
    dweights = ()
    dbiases = ()
    for l in tl.static_range(LAYERS):
        w = _load_weight(weight_ptrs[l], WIDTHS[l + 1], WIDTHS[l], PADDED[l + 1], PADDED[l])
        weights = weights + (_operand(w, DTYPE, PRECISION, WIDEN),)
        if bias_ptrs is not None:
            biases = biases + (_load_bias(bias_ptrs[l], WIDTHS[l + 1], PADDED[l + 1]),)
    for l in tl.static_range(LAYERS - 1, -1, -1):
        # A scalar stands for what is not wanted.
        if DWEIGHT_AT[l] >= 0:
            dweights = dweights + (tl.zeros((tl.constexpr(PADDED[l + 1]), tl.constexpr(PADDED[l])), tl.float32),)
        else:
            dweights = dweights + (tl.full((), 0.0, tl.float32),)
        if DBIAS_AT[l] >= 0:
            dbiases = dbiases + (tl.zeros((tl.constexpr(PADDED[l + 1]),), tl.float32),)
        else:
            dbiases = dbiases + (tl.full((), 0.0, tl.float32),)
    offs_k = tl.arange(0, PADDED[0])
    mask_k = offs_k < COLUMNS[0]
    offs_n = tl.arange(0, PADDED[LAYERS])
    mask_n = offs_n < COLUMNS[1]
    factor = 1.0
    if factor_ptr is not None:
        factor = tl.load(factor_ptr).to(tl.float32) * scale
    pos_weight = 1.0
    if pos_weight_ptr is not None:
        pos_weight = tl.load(pos_weight_ptr + offs_n.to(tl.int64) * stride_p, mask=mask_n, other=1.0).to(tl.float32)[
            :, None
        ]
    rows = tl.arange(0, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        start = tl.cast(tile, tl.int64) * BLOCK_M
        offs_m = start + rows
        mask_m = offs_m < M
        xt = _load_block(x_ptr, offs_k.to(tl.int64), offs_m, stride_xk, stride_xm, mask_k, mask_m)
        # As they would be in memory. Operands of TF32 are rounded further, which derivatives must not see.
        hs = (_operand(xt, DTYPE, "ieee", WIDEN),)  # [PADDED[l], BLOCK_M] each
        for l in tl.static_range(LAYERS):
            z = tl.dot(
                weights[l], device.operand(hs[l], PRECISION), input_precision=PRECISION
            )  # [PADDED[l + 1], BLOCK_M]
            if bias_ptrs is not None:
                z += biases[l][:, None]
            if l + 1 < LAYERS:
                hs = hs + (_operand(HIDDEN(z), DTYPE, "ieee", WIDEN),)
        mask_nm = mask_n[:, None] & mask_m[None, :]
        if dy_ptr is not None:
            dy = _load_block(dy_ptr, offs_n.to(tl.int64), offs_m, stride_dyn, stride_dym, mask_n, mask_m)
            dy = dy.to(tl.float32)
        if target_ptr is not None:
            t = _load_block(target_ptr, offs_n.to(tl.int64), offs_m, stride_tn, stride_tm, mask_n, mask_m)
            dz = tl.where(mask_nm, _bce_dz(z, t.to(tl.float32), pos_weight), 0.0)
            if dy_ptr is not None:
                dz = dz * dy
        else:
            dz = OUTPUT_BACKWARD(dy, OUTPUT(z))
        new_dweights = ()
        new_dbiases = ()
        for l in tl.static_range(LAYERS - 1, -1, -1):
            dw = dweights[LAYERS - 1 - l]
            db = dbiases[LAYERS - 1 - l]
            if DBIAS_AT[l] >= 0:
                db += tl.sum(dz, axis=1)
            if l >= FIRST:
                dzr = _operand(dz, DTYPE, PRECISION, WIDEN)  # [PADDED[l + 1], BLOCK_M]
                if DWEIGHT_AT[l] >= 0:
                    ht = tl.trans(device.operand(hs[l], PRECISION))
                    dw = tl.dot(dzr, ht, dw, input_precision=PRECISION)
                if l > FIRST or dx_ptr is not None:
                    dz = tl.dot(tl.trans(weights[l]), dzr, input_precision=PRECISION)  # dh, [PADDED[l], BLOCK_M]
                    if l > 0:
                        dz = HIDDEN_BACKWARD(dz, hs[l].to(tl.float32))
            new_dweights = new_dweights + (dw,)
            new_dbiases = new_dbiases + (db,)
        dweights = new_dweights
        dbiases = new_dbiases
        if dx_ptr is not None:
            if SCALE_DX:
                dz = dz * factor
            tl.store(
                dx_ptr + start * COLUMNS[0] + (rows[None, :] * COLUMNS[0] + offs_k[:, None]),
                dz.to(dx_ptr.dtype.element_ty),
                mask=mask_k[:, None] & mask_m[None, :],
            )
    if slots_ptr is not None:
        slot = slots_ptr + tl.program_id(0).to(tl.int64) * stride_slot
        for l in tl.static_range(LAYERS):
            out = tl.arange(0, PADDED[l + 1])
            into = tl.arange(0, PADDED[l])
            if DWEIGHT_AT[l] >= 0:
                tl.store(
                    slot + DWEIGHT_AT[l] + out[:, None] * WIDTHS[l] + into[None, :],
                    (dweights[LAYERS - 1 - l] * factor).to(slots_ptr.dtype.element_ty),
                    mask=(out < WIDTHS[l + 1])[:, None] & (into < WIDTHS[l])[None, :],
                )
                _clear_gap(slot + DWEIGHT_AT[l], WIDTHS[l + 1] * WIDTHS[l])
            if DBIAS_AT[l] >= 0:
                tl.store(
                    slot + DBIAS_AT[l] + out,
                    (dbiases[LAYERS - 1 - l] * factor).to(slots_ptr.dtype.element_ty),
                    mask=out < WIDTHS[l + 1],
                )
                _clear_gap(slot + DBIAS_AT[l], WIDTHS[l + 1])


@triton.jit(do_not_specialize=["num_sums"])
def sum_losses_kernel(sums_ptr, loss_ptr, num_sums, BLOCK: tl.constexpr):
    """loss = sums[0] + sums[1] + ..., in a fixed order."""
    offs = tl.arange(0, BLOCK)
    loss = tl.sum(tl.load(sums_ptr + offs, mask=offs < num_sums, other=0.0), axis=0)
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))


def _padded(widths: tuple[int, ...]) -> tuple[int, ...]:
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
) -> tuple[Tensor, Tensors]:
    """(y, saved): the output (M, N), and the inputs of the layers l in `save`, all in the dtype of x.

    x (M, K), any strides. weights: (N_l, K_l) each, contiguous; biases: (N_l,) each, contiguous, or None. `save` is
    `boundaries` of the plan for the backward pass, or () for none. M is not 0. Saved activations are contiguous, with
    K_l rounded up to a multiple of 16 columns, of which the first K_l count.
    """
    out, _ = _mlp_fwd(x, weights, biases, hidden, output, plan, save)
    return out[-1], tuple(out[l - 1] for l in save)


def mlp_bce_fwd(
    x: Tensor,
    weights: Tensors,
    biases: Tensors | None,
    hidden: str,
    target: Tensor,
    pos_weight: Tensor | None,
    reduction: str,
    dtype: torch.dtype,
    plan: MlpPlan,
    save: tuple[int, ...] = (),
) -> tuple[Tensor, Tensors]:
    """(loss, saved): the binary cross entropy of sigmoid(z), from the logits z of the last layer, in `dtype`.

    target (M, N), any strides and floating dtype. pos_weight (N,) of any stride and floating dtype, or None.
    reduction: "none" gives (M, N), "mean" and "sum" a scalar tensor. The rest as for `mlp_fwd`. Predictions are not
    written anywhere.
    """
    out, loss = _mlp_fwd(x, weights, biases, hidden, "identity", plan, save, (target, pos_weight, reduction, dtype))
    return loss, tuple(out[l - 1] for l in save)


def _head_known(head) -> tuple:
    """What the choice of a compiled kernel depends on in (target, pos_weight, reduction, ..)."""
    if head is None:
        return ()
    target, pos_weight, *others = head
    weighted = pos_weight is not None and (pos_weight.dtype, pos_weight.stride())
    return target.dtype, target.stride(), weighted, *others


def _mlp_fwd(x, weights, biases, hidden, output, plan, save, head=None):
    """The outputs of all layers, None where not stored, and the loss, None without a head."""
    M, widths = x.shape[0], _widths(weights)
    columns = mlp_columns(widths)
    out: list = [None] * len(weights)
    for l in {*save, *plan.boundaries, *(() if head else (len(weights),))}:
        out[l - 1] = torch.empty((M, columns[l]), dtype=x.dtype, device=x.device)
    target, pos_weight, reduction, dtype = head or (None, None, "", None)
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
    with _current(x):
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
                stride_tm=target.stride(0) if target is not None else 0,
                stride_tn=target.stride(1) if target is not None else 0,
                stride_p=pos_weight.stride(0) if pos_weight is not None else 0,
                scale=scale,
                HIDDEN=device.ACTIVATIONS[hidden][0],
                OUTPUT=device.ACTIVATIONS[output if last else hidden][0],
                WIDTHS=widths[segment.first : segment.last + 1],
                PADDED=_padded(widths[segment.first : segment.last + 1]),
                COLUMNS=tuple(columns[segment.first : segment.last + 1]),
                UNBOUNDED=hidden in device.UNBOUNDED,
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
    return out, loss


def mlp_bwd(
    dy: Tensor,
    x: Tensor,
    saved: Tensors,
    weights: Tensors,
    biases: Tensors | None,
    hidden: str,
    output: str,
    wanted: tuple[bool, tuple[bool, ...], tuple[bool, ...]],
    plan: MlpPlan,
) -> tuple[Tensor | None, Maybe, Maybe]:
    """(dx, dweights, dbiases) from dy (M, N) of any strides, None where not wanted.

    saved: what `mlp_fwd` returned for `plan.boundaries`. wanted: dx, then one flag per weight and
    one per bias. Shapes and dtypes of the gradients are those of x, weights and biases; the parameters' gradients are
    views of one tensor, each aligned to 16 bytes. The rest as for `mlp_fwd`.
    """
    return _mlp_bwd(dy, x, saved, weights, biases, hidden, output, wanted, plan)


def mlp_bce_bwd(
    dloss: Tensor,
    x: Tensor,
    saved: Tensors,
    weights: Tensors,
    biases: Tensors | None,
    hidden: str,
    target: Tensor,
    pos_weight: Tensor | None,
    reduction: str,
    wanted: tuple[bool, tuple[bool, ...], tuple[bool, ...]],
    plan: MlpPlan,
) -> tuple[Tensor | None, Maybe, Maybe]:
    """(dx, dweights, dbiases) of the loss of `mlp_bce_fwd`.

    dloss: (M, N) of any strides for reduction "none", else a tensor of one element, read on the device. The rest as
    for `mlp_bce_fwd` and `mlp_bwd`.
    """
    head = (target, pos_weight, reduction)
    return _mlp_bwd(dloss, x, saved, weights, biases, hidden, "identity", wanted, plan, head)


def _slots(widths, wanted):
    """Where each wanted gradient begins in a slot, -1 for the others, and the slot's size. 8 elements align all."""
    _, weights, biases = wanted
    at_weights, at_biases, size = [], [], 0
    for l, (k, n) in enumerate(itertools.pairwise(widths)):
        at_weights.append(size if weights[l] else -1)
        size += -(-n * k // 8) * 8 if weights[l] else 0
        at_biases.append(size if biases[l] else -1)
        size += -(-n // 8) * 8 if biases[l] else 0
    return at_weights, at_biases, size


def _mlp_bwd(dy, x, saved, weights, biases, hidden, output, wanted, plan, head=None):
    M, widths = x.shape[0], _widths(weights)
    need_dx = wanted[0]
    target, pos_weight, reduction = head or (None, None, "")
    factor, scale = None, 1.0
    if reduction in ("mean", "sum"):
        dy, factor = None, dy
        scale = 1.0 / target.numel() if reduction == "mean" else 1.0
    columns = mlp_columns(widths)
    at_weights, at_biases, size = _slots(widths, wanted)
    inputs = dict(zip(plan.boundaries, saved, strict=True)) | {0: x}
    # Below the first layer of which anything is wanted, dz need not be known.
    first = next((l for l in range(len(weights)) if need_dx or wanted[1][l] or wanted[2][l]), len(weights))
    # One program writes the gradients themselves; several write fp32 slots that are then summed.
    programs = plan.segments[0].programs
    flat = x.new_empty((size,)) if size else None
    slots = flat
    if size and programs > 1:
        slots = torch.empty((programs, size), dtype=torch.float32, device=x.device)
    dx = None
    common = None
    if aligned(dy, factor, x, *saved, *weights, *(biases or ()), target, pos_weight):
        upstream = [None if g is None else (g.dtype, g.stride()) for g in (dy, factor)]
        strides = (x.stride(), *(h.stride() for h in saved))
        common = (x.device, x.dtype, hidden, output, widths, M, strides, *upstream, biases is None, wanted)
        common += _head_known(head)
    with _current(x):
        for segment in reversed(plan.segments):
            if segment.last <= first:
                break
            known = common and (segment.first, *common)
            layers, tile = slice(segment.first, segment.last), segment.tile
            h = inputs[segment.first]
            dx = x.new_empty(h.shape) if need_dx or first < segment.first else None
            # Offsets count from the first one of the segment, so that equal segments share one compiled kernel.
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
                stride_tm=target.stride(0) if last and head else 0,
                stride_tn=target.stride(1) if last and head else 0,
                stride_p=pos_weight.stride(0) if last and pos_weight is not None else 0,
                scale=scale,
                HIDDEN=device.ACTIVATIONS[hidden][0],
                HIDDEN_BACKWARD=device.ACTIVATIONS[hidden][1],
                OUTPUT=device.ACTIVATIONS[output if last else hidden][0],
                OUTPUT_BACKWARD=device.ACTIVATIONS[output if last else hidden][1],
                WIDTHS=widths[segment.first : segment.last + 1],
                PADDED=_padded(widths[segment.first : segment.last + 1]),
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
            _sum_slots(slots, flat, None)
    # Views are made once all is launched: the launches are what a GPU waits for.
    dweights = tuple(
        None if a < 0 else flat[a : a + w.numel()].view(w.shape) for a, w in zip(at_weights, weights, strict=True)
    )
    dbiases = tuple(None if a < 0 else flat[a : a + w.shape[0]] for a, w in zip(at_biases, weights, strict=True))
    return dx if need_dx else None, dweights, dbiases
