# SPDX-License-Identifier: Apache-2.0
"""The block kernel: one network per program, its weights in padded tiles. See `train.py`."""
# triton's types know neither launch options nor tl.range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from .train_rules import UNALIGNED, UNSPECIALIZED, own_number, own_numbers, segment_steps, step_number, update


@triton.jit
def _block_offsets(i, WIDTHS: tl.constexpr, PADDED: tl.constexpr, BIAS: tl.constexpr):
    """Offsets of parameter i's elements within it, and which of them there are."""
    l: tl.constexpr = i // 2 if BIAS else i
    offs_n = tl.arange(0, PADDED[l + 1])
    if BIAS and i % 2 == 1:
        return offs_n, offs_n < WIDTHS[l + 1]
    else:  # noqa: RET505, the compiler wants both
        offs_k = tl.arange(0, PADDED[l])
        inside = (offs_n < WIDTHS[l + 1])[:, None] & (offs_k < WIDTHS[l])[None, :]
        return offs_n[:, None] * WIDTHS[l] + offs_k[None, :], inside


@triton.jit
def block_load(ptrs, member, known, SIZES: tl.constexpr, WIDTHS: tl.constexpr, PADDED: tl.constexpr):
    """All parameters of a network; a scalar each where there are none, zeros where they are not known."""
    BIAS: tl.constexpr = len(SIZES) >= len(WIDTHS)
    tensors = ()
    for i in tl.static_range(len(SIZES)):
        if ptrs is not None:
            offs, inside = _block_offsets(i, WIDTHS, PADDED, BIAS)
            inside = tl.where(known, inside, False)
            tensors = tensors + (tl.load(ptrs[i] + member * SIZES[i] + offs, mask=inside, other=0.0),)
        else:
            tensors = tensors + (tl.full((), 0.0, tl.float32),)
    return tensors


@triton.jit
def block_store(ptrs, tensors, member, SIZES: tl.constexpr, WIDTHS: tl.constexpr, PADDED: tl.constexpr):
    BIAS: tl.constexpr = len(SIZES) >= len(WIDTHS)
    for i in tl.static_range(len(SIZES)):
        offs, inside = _block_offsets(i, WIDTHS, PADDED, BIAS)
        tl.store(ptrs[i] + member * SIZES[i] + offs, tensors[i], mask=inside)


@triton.jit
def block_rows(
    ptr, order_ptr, start, end, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """WIDTH of COLUMNS columns of samples start to end - 1 of the order as [WIDE, BLOCK_M], with zeros around them."""
    index = start + tl.arange(0, BLOCK_M)
    offs = tl.arange(0, WIDE)
    row = index.to(tl.int64)
    if order_ptr is not None:
        row = tl.load(order_ptr + index, mask=index < end, other=0).to(tl.int64)
    inside = (offs < WIDTH)[:, None] & (index < end)[None, :]
    return tl.load(ptr + row[None, :] * COLUMNS + offs[:, None], mask=inside, other=0.0), inside


@triton.jit
def block_targets(
    ptr, order_ptr, start, end, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """((targets,) or (targets, their weights), which of them there are)."""
    t, inside = block_rows(ptr, order_ptr, start, end, WIDTH, COLUMNS, WIDE, BLOCK_M)
    if COLUMNS == WIDTH:
        return (t,), inside
    else:  # noqa: RET505, the compiler wants both
        weights, _ = block_rows(ptr + WIDTH, order_ptr, start, end, WIDTH, COLUMNS, WIDE, BLOCK_M)
        return (t, weights), inside


@triton.jit
def block_forward(params, x, HIDDEN, OUTPUT, WIDTHS: tl.constexpr, PADDED: tl.constexpr, BIAS: tl.constexpr):
    """((h_0, .., h_{L-1}, y), z of the last layer), [PADDED[l], BLOCK_M] each."""
    LAYERS: tl.constexpr = len(WIDTHS) - 1
    EACH: tl.constexpr = 2 if BIAS else 1
    hs = (x,)
    for l in tl.static_range(LAYERS):
        z = tl.dot(params[EACH * l], hs[l], input_precision="ieee")
        if BIAS:
            z += params[EACH * l + 1][:, None]
        if l + 1 < LAYERS:
            h = HIDDEN(z)
            if WIDTHS[l + 1] < PADDED[l + 1]:
                h = tl.where((tl.arange(0, PADDED[l + 1]) < WIDTHS[l + 1])[:, None], h, 0.0)
            hs = hs + (h,)
        else:
            hs = hs + (OUTPUT(z),)
    return hs, z


@triton.jit
def block_losses(z, y, t, inside, beta, SUMS, LOSS):
    """The loss of a tile of samples, summed. t: what `block_targets` returns."""
    losses = LOSS(z, y, t[0], SUMS(z, t[0], inside, beta))
    if len(t) > 1:
        losses *= t[1]
    return tl.sum(tl.where(inside, losses, 0.0))


@triton.jit
def _block_loss(
    params,
    x,
    t,
    inside,
    beta,
    HIDDEN,
    OUTPUT,
    SUMS,
    LOSS,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    BIAS: tl.constexpr,
):
    hs, z = block_forward(params, x, HIDDEN, OUTPUT, WIDTHS, PADDED, BIAS)
    return block_losses(z, hs[len(WIDTHS) - 1], t, inside, beta, SUMS, LOSS)


@triton.jit
def block_backward(
    params, hs, z, t, inside, beta, scale, HIDDEN_BACKWARD, OUTPUT_BACKWARD, SUMS, DZ, BIAS: tl.constexpr
):
    """dz of every layer, the last first, [PADDED[l + 1], BLOCK_M] each. t: what `block_targets` returns."""
    LAYERS: tl.constexpr = len(hs) - 1
    EACH: tl.constexpr = 2 if BIAS else 1
    y = hs[LAYERS]
    dz = DZ(z, y, t[0], SUMS(z, t[0], inside, beta), OUTPUT_BACKWARD) * scale
    if len(t) > 1:
        dz *= t[1]
    dzs = (tl.where(inside, dz, 0.0),)
    for l in tl.static_range(LAYERS - 1, 0, -1):
        dh = tl.dot(tl.trans(params[EACH * l]), dzs[LAYERS - 1 - l], input_precision="ieee")
        dzs = dzs + (HIDDEN_BACKWARD(dh, hs[l]),)
    return dzs


@triton.jit
def block_accumulate(grads, hs, dzs, LAYERS: tl.constexpr, BIAS: tl.constexpr):
    """grads plus the gradients of a tile of samples."""
    EACH: tl.constexpr = 2 if BIAS else 1
    sums = ()
    for l in tl.static_range(LAYERS):
        dz = dzs[LAYERS - 1 - l]
        sums = sums + (tl.dot(dz, tl.trans(hs[l]), grads[EACH * l], input_precision="ieee"),)
        if BIAS:
            sums = sums + (grads[EACH * l + 1] + tl.sum(dz, axis=1),)
    return sums


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def train_block_kernel(
    parameter_ptrs,  # all arguments as for train_lane_kernel, but for the last lines
    first_ptrs,
    second_ptrs,
    lr_ptr,
    factors_ptr,
    x_ptr,
    y_ptr,
    order_ptr,
    losses_ptr,
    members,
    samples,
    stride_xe,
    stride_ye,
    stride_ls,
    stride_le,
    stride_fs,
    stride_fe,
    batch_size,
    batches,
    batch,
    scale,
    last_scale,
    beta,
    taken,
    steps,
    offset,
    period,
    weight_decay,
    hyper,
    HIDDEN: tl.constexpr,
    HIDDEN_BACKWARD: tl.constexpr,
    OUTPUT: tl.constexpr,
    OUTPUT_BACKWARD: tl.constexpr,
    SUMS: tl.constexpr,
    LOSS: tl.constexpr,
    DZ: tl.constexpr,
    NUMBERS: tl.constexpr,
    UPDATE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    WIDTHS: tl.constexpr,
    TARGETS: tl.constexpr,
    SIZES: tl.constexpr,
    PADDED: tl.constexpr,
    RESIDENT: tl.constexpr,  # all samples are one tile, and stay on chip
    BLOCK_M: tl.constexpr,
):
    """Each program trains one network."""
    LAYERS: tl.constexpr = len(WIDTHS) - 1
    BIAS: tl.constexpr = len(SIZES) > LAYERS
    member = tl.program_id(0).to(tl.int64)
    x_ptr += member * stride_xe
    y_ptr += member * stride_ye
    decay = None if weight_decay is None else own_number(weight_decay, member)
    own_hyper = own_numbers(hyper, member)
    lr = tl.load(lr_ptr + member) if stride_ls is None else None
    params = block_load(parameter_ptrs, member, True, SIZES, WIDTHS, PADDED)
    firsts = block_load(first_ptrs, member, taken > 0, SIZES, WIDTHS, PADDED)
    seconds = block_load(second_ptrs, member, taken > 0, SIZES, WIDTHS, PADDED)
    if RESIDENT:
        all_x, _ = block_rows(x_ptr, None, 0, samples, WIDTHS[0], WIDTHS[0], PADDED[0], BLOCK_M)
        all_t, all_inside = block_targets(y_ptr, None, 0, samples, WIDTHS[LAYERS], TARGETS, PADDED[LAYERS], BLOCK_M)
    for segment in range(tl.cdiv(offset + steps, period)):
        if (segment > 0) | (offset == 0):
            loss = tl.full((), 0.0, tl.float32)
            if RESIDENT:
                loss += _block_loss(
                    params, all_x, all_t, all_inside, beta, HIDDEN, OUTPUT, SUMS, LOSS, WIDTHS, PADDED, BIAS
                )
            else:
                log_first = batch * batch_size
                log_end = tl.minimum(log_first + batch_size, samples)
                for log_start in tl.range(log_first, log_end, BLOCK_M, num_stages=1):
                    log_x, _ = block_rows(
                        x_ptr, order_ptr, log_start, log_end, WIDTHS[0], WIDTHS[0], PADDED[0], BLOCK_M
                    )
                    log_t, log_inside = block_targets(
                        y_ptr, order_ptr, log_start, log_end, WIDTHS[LAYERS], TARGETS, PADDED[LAYERS], BLOCK_M
                    )
                    loss += _block_loss(
                        params, log_x, log_t, log_inside, beta, HIDDEN, OUTPUT, SUMS, LOSS, WIDTHS, PADDED, BIAS
                    )
            log_step, _log_last = segment_steps(segment, offset, period, steps)
            log_scale = tl.where(batch == batches - 1, last_scale, scale)
            loss *= step_number(log_scale, factors_ptr, stride_fs, stride_fe, log_step, member)
            logged = (segment - tl.where(offset > 0, 1, 0)).to(tl.int64)
            tl.store(losses_ptr + logged * members + member, loss)
        first_step, last_step = segment_steps(segment, offset, period, steps)
        for step in tl.range(first_step, last_step, num_stages=1):
            rate = step_number(lr, lr_ptr, stride_ls, stride_le, step, member)
            batch_scale = tl.where(batch == batches - 1, last_scale, scale)
            batch_scale = step_number(batch_scale, factors_ptr, stride_fs, stride_fe, step, member)
            grads = ()
            for i in tl.static_range(len(params)):
                grads = grads + (tl.zeros(params[i].shape, tl.float32),)
            if RESIDENT:
                hs, z = block_forward(params, all_x, HIDDEN, OUTPUT, WIDTHS, PADDED, BIAS)
                dzs = block_backward(
                    params,
                    hs,
                    z,
                    all_t,
                    all_inside,
                    beta,
                    batch_scale,
                    HIDDEN_BACKWARD,
                    OUTPUT_BACKWARD,
                    SUMS,
                    DZ,
                    BIAS,
                )
                grads = block_accumulate(grads, hs, dzs, LAYERS, BIAS)
            else:
                first_row = batch * batch_size
                end_row = tl.minimum(first_row + batch_size, samples)
                for row_start in tl.range(first_row, end_row, BLOCK_M, num_stages=1):
                    x, _ = block_rows(x_ptr, order_ptr, row_start, end_row, WIDTHS[0], WIDTHS[0], PADDED[0], BLOCK_M)
                    t, inside = block_targets(
                        y_ptr, order_ptr, row_start, end_row, WIDTHS[LAYERS], TARGETS, PADDED[LAYERS], BLOCK_M
                    )
                    hs, z = block_forward(params, x, HIDDEN, OUTPUT, WIDTHS, PADDED, BIAS)
                    dzs = block_backward(
                        params, hs, z, t, inside, beta, batch_scale, HIDDEN_BACKWARD, OUTPUT_BACKWARD, SUMS, DZ, BIAS
                    )
                    grads = block_accumulate(grads, hs, dzs, LAYERS, BIAS)
            params, firsts, seconds = update(
                params, firsts, seconds, grads, rate, decay, taken + step + 1, own_hyper, NUMBERS, UPDATE, DECOUPLED
            )
            # The batch of the next step is the following one, or the first of the next epoch.
            if order_ptr is not None:
                order_ptr += tl.where(batch == batches - 1, samples, 0)
            batch = tl.where(batch == batches - 1, 0, batch + 1)
    # The compiler cannot know that this is 0. If it did, it would keep the addresses in registers throughout the loop.
    member += tl.minimum(batch, 0)
    block_store(parameter_ptrs, params, member, SIZES, WIDTHS, PADDED)
    if first_ptrs is not None:
        block_store(first_ptrs, firsts, member, SIZES, WIDTHS, PADDED)
    if second_ptrs is not None:
        block_store(second_ptrs, seconds, member, SIZES, WIDTHS, PADDED)
