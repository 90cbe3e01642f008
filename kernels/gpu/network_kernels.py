# SPDX-License-Identifier: Apache-2.0
"""A whole narrow MLP in one kernel, forward and backward, with an optional binary cross-entropy head.

Layer l = 0 .. L-1 takes K_l = widths[l] to N_l = widths[l + 1] features, every width at most 128:

    h_0 = x,  z_l = h_l @ weight_l.T + bias_l,  h_{l+1} = act_l(z_l),  y = h_L

x (M, widths[0]) may have any strides. Weights (N_l, K_l) and biases (N_l,) are contiguous and have the dtype of x;
biases are all there or all None. Sums and activations are fp32; h_l is rounded to that dtype before the next product,
as it is between layers that run one by one. Activations stay in registers; only what is asked for is written.

Padding: every width is rounded up to a power of two of at least 16. A padded neuron of a sigmoid layer puts out 0.5,
but the weights that read it are padded with 0, so it reaches nothing; going back, its dz is 0 for the same reason.

The backward kernel works on transposed activations, [width, rows], so that tensor cores never take as a left operand
the transpose of what itself came from a product, which was reported to go wrong on Hopper (`layer_kernels.py`).
"""

# triton's types know neither launch options nor tl.range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false
import triton
import triton.language as tl

from .functions import operand, rounded, stride_of_weight
from .network_functions import (
    bce_with_logits,
    bce_with_logits_dz,
    clear_gap,
    clear_padding,
    load_bias,
    load_block,
    load_weight,
    load_weight_t,
    product,
    sum_rows,
)


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
    one = stride_of_weight(1, tl.minimum(M, 0), DTYPE, PRECISION)
    for l in tl.static_range(LAYERS):
        if RESIDENT:
            wt = load_weight_t(weight_ptrs[l], one, WIDTHS[l + 1], WIDTHS[l], PADDED[l + 1], PADDED[l])
            weights = weights + (operand(wt.to(DTYPE), PRECISION, WIDEN),)
        if bias_ptrs is not None:
            biases = biases + (load_bias(bias_ptrs[l], WIDTHS[l + 1], PADDED[l + 1]),)
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
        h = load_block(x_ptr, offs_m, offs_k.to(tl.int64), stride_xm, stride_xk, mask_m, mask_k)
        h = operand(h.to(DTYPE), PRECISION, WIDEN)  # [BLOCK_M, PADDED[0]]
        for l in tl.static_range(LAYERS):
            if RESIDENT:
                z = tl.dot(h, weights[l], input_precision=PRECISION)  # [BLOCK_M, PADDED[l + 1]]
            else:
                wt = load_weight_t(weight_ptrs[l], 1, WIDTHS[l + 1], WIDTHS[l], PADDED[l + 1], PADDED[l])
                z = tl.dot(h, operand(wt.to(DTYPE), PRECISION, WIDEN), input_precision=PRECISION)
            if bias_ptrs is not None:
                z += biases[l][None, :]
            if l + 1 < LAYERS:
                h = HIDDEN(z)
            elif out_ptrs[l] is not None:
                h = OUTPUT(z)
            if UNBOUNDED and (l + 1 < LAYERS or COLUMNS[l + 1] > WIDTHS[l + 1]):
                h = clear_padding(h, WIDTHS[l + 1], PADDED[l + 1])
            h = h.to(DTYPE)
            if out_ptrs[l] is not None:
                offs_n = tl.arange(0, PADDED[l + 1])
                tl.store(
                    out_ptrs[l] + start * COLUMNS[l + 1] + (rows[:, None] * COLUMNS[l + 1] + offs_n[None, :]),
                    h,
                    mask=mask_m[:, None] & (offs_n < COLUMNS[l + 1])[None, :],
                )
            h = operand(h.to(DTYPE), PRECISION, WIDEN)
        if loss_ptr is not None:
            mask_mt = mask_m[:, None] & mask_t[None, :]
            t = load_block(target_ptr, offs_m, offs_t.to(tl.int64), stride_tm, stride_tn, mask_m, mask_t)
            loss = bce_with_logits(z, t.to(tl.float32), pos_weight)
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
    ON_FMA: tl.constexpr,  # products run on FMA units, not on tensor cores
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SUM_ROWS: tl.constexpr,  # one per layer, see `sum_rows`
    STAGES: tl.constexpr,
):
    """Each program walks row tiles: forward from x again, then dz back through the layers, all in registers.

    Sums over rows stay in registers, in the order of the rows, and each program writes them to a slot of its own.
    Multiplying by `factor` only at the end keeps the chain of dz near 1 whatever the size of the batch, where fp16
    would underflow.
    """
    LAYERS: tl.constexpr = len(weight_ptrs)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    one = stride_of_weight(1, tl.minimum(M, 0), DTYPE, PRECISION)
    weights = ()
    weights_back = ()
    biases = ()
    # The sums begin with the last layer, in the order in which the backward loop visits the layers.
    dweights = ()
    dbiases = ()
    for l in tl.static_range(LAYERS):
        w = load_weight(weight_ptrs[l], WIDTHS[l + 1], WIDTHS[l], PADDED[l + 1], PADDED[l])
        weights_back = weights_back + (operand(w.to(DTYPE), PRECISION, WIDEN),)
        if ON_FMA:
            # Both ways a weight is what `product` reads column by column, so there are two, each in its order.
            w = tl.trans(load_weight_t(weight_ptrs[l], one, WIDTHS[l + 1], WIDTHS[l], PADDED[l + 1], PADDED[l]))
        weights = weights + (operand(w.to(DTYPE), PRECISION, WIDEN),)
        if bias_ptrs is not None:
            biases = biases + (load_bias(bias_ptrs[l], WIDTHS[l + 1], PADDED[l + 1]),)
    for l in tl.static_range(LAYERS - 1, -1, -1):
        # A scalar stands for what is not wanted.
        if DWEIGHT_AT[l] >= 0:
            dweights = dweights + (tl.zeros((tl.constexpr(PADDED[l + 1]), tl.constexpr(PADDED[l])), tl.float32),)
        else:
            dweights = dweights + (tl.full((), 0.0, tl.float32),)
        if DBIAS_AT[l] >= 0:
            dbiases = dbiases + (tl.zeros((tl.constexpr(PADDED[l + 1]), tl.constexpr(SUM_ROWS[l] // 2)), tl.float32),)
        else:
            dbiases = dbiases + (tl.full((), 0.0, tl.float32),)
    offs_k = tl.arange(0, PADDED[0])
    mask_k = offs_k < COLUMNS[0]
    offs_n = tl.arange(0, PADDED[LAYERS])
    mask_n = offs_n < COLUMNS[1]
    factor = 1.0 if factor_ptr is None else tl.load(factor_ptr).to(tl.float32) * scale
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
        xt = load_block(x_ptr, offs_k.to(tl.int64), offs_m, stride_xk, stride_xm, mask_k, mask_m)
        # Loaded now, it is there when the last layer is; loaded after z, it would bring dz from z's layout into its.
        if dy_ptr is not None:
            dy = load_block(dy_ptr, offs_n.to(tl.int64), offs_m, stride_dyn, stride_dym, mask_n, mask_m).to(tl.float32)
        # Activations are rounded as in memory. TF32 rounds operands further, which derivatives must not see.
        hs = (operand(xt.to(DTYPE), "ieee", WIDEN),)  # [PADDED[l], BLOCK_M] each
        for l in tl.static_range(LAYERS):
            z = product(weights[l], rounded(hs[l], PRECISION), None, PRECISION, ON_FMA)  # [PADDED[l + 1], BLOCK_M]
            if bias_ptrs is not None:
                z += biases[l][:, None]
            if l + 1 < LAYERS:
                hs = hs + (operand(HIDDEN(z).to(DTYPE), "ieee", WIDEN),)
        mask_nm = mask_n[:, None] & mask_m[None, :]
        if target_ptr is not None:
            t = load_block(target_ptr, offs_n.to(tl.int64), offs_m, stride_tn, stride_tm, mask_n, mask_m)
            dz = tl.where(mask_nm, bce_with_logits_dz(z, t.to(tl.float32), pos_weight), 0.0)
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
                db += sum_rows(dz, SUM_ROWS[l])
            if l >= FIRST:
                dzr = operand(dz.to(DTYPE), PRECISION, WIDEN)  # [PADDED[l + 1], BLOCK_M]
                if DWEIGHT_AT[l] >= 0:
                    dw = product(dzr, tl.trans(rounded(hs[l], PRECISION)), dw, PRECISION, ON_FMA)
                if l > FIRST or dx_ptr is not None:
                    dz = product(tl.trans(weights_back[l]), dzr, None, PRECISION, ON_FMA)  # dh, [PADDED[l], BLOCK_M]
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
                clear_gap(slot + DWEIGHT_AT[l], WIDTHS[l + 1] * WIDTHS[l])
            if DBIAS_AT[l] >= 0:
                tl.store(
                    slot + DBIAS_AT[l] + out,
                    (tl.sum(dbiases[LAYERS - 1 - l], axis=1) * factor).to(slots_ptr.dtype.element_ty),
                    mask=out < WIDTHS[l + 1],
                )
                clear_gap(slot + DBIAS_AT[l], WIDTHS[l + 1])


@triton.jit(do_not_specialize=["num_sums"])
def sum_losses_kernel(sums_ptr, loss_ptr, num_sums, BLOCK: tl.constexpr):
    """loss = sums[0] + sums[1] + ..., in a fixed order."""
    offs = tl.arange(0, BLOCK)
    loss = tl.sum(tl.load(sums_ptr + offs, mask=offs < num_sums, other=0.0), axis=0)
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
