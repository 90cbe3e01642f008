# SPDX-License-Identifier: Apache-2.0
"""The lane kernel: one network per lane of a warp, all of it in registers. See `train.py`."""

# triton's types know neither launch options nor tl.range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from .train_rules import UNALIGNED, UNSPECIALIZED, own_number, own_numbers, segment_steps, step_number, update


@triton.jit
def _lane_load(ptrs, member, mask, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    """All elements of all tensors (members, SIZES[i]) as one flat tuple; a scalar each where there are no tensors."""
    flat = ()
    for i in tl.static_range(len(SIZES)):
        for j in tl.static_range(tl.constexpr(SIZES[i])):
            if ptrs is not None:
                flat = flat + (tl.load(ptrs[i] + member * SIZES[i] + j, mask=mask, other=0.0),)
            else:
                flat = flat + (tl.full((), 0.0, tl.float32),)
    return flat


@triton.jit
def _lane_store(ptrs, flat, member, mask, SIZES: tl.constexpr, STARTS: tl.constexpr):
    for i in tl.static_range(len(SIZES)):
        for j in tl.static_range(tl.constexpr(SIZES[i])):
            tl.store(ptrs[i] + member * SIZES[i] + j, flat[STARTS[i] + j], mask=mask)


@triton.jit
def _lane_row(ptr, member, mask, stride_e, row, WIDTH: tl.constexpr):
    """One sample of every network, as a tuple."""
    values = ()
    for k in tl.static_range(WIDTH):
        values = values + (tl.load(ptr + member * stride_e + row * WIDTH + k, mask=mask, other=0.0),)
    return values


@triton.jit
def _lane_forward(params, x, HIDDEN, OUTPUT, WIDTHS: tl.constexpr, AT: tl.constexpr, BIAS: tl.constexpr):
    """((h_0, .., h_{L-1}, y), z of the last layer): a tuple of [BLOCK] tensors each."""
    LAYERS: tl.constexpr = len(WIDTHS) - 1
    hs = (x,)
    for l in tl.static_range(LAYERS):
        zs = ()
        h = ()
        for n in tl.static_range(tl.constexpr(WIDTHS[l + 1])):
            z = params[AT[l] + n * WIDTHS[l]] * hs[l][0]
            if BIAS:
                z += params[AT[l] + WIDTHS[l + 1] * WIDTHS[l] + n]
            for k in tl.static_range(1, tl.constexpr(WIDTHS[l])):
                z += params[AT[l] + n * WIDTHS[l] + k] * hs[l][k]
            zs = zs + (z,)
            h = h + (HIDDEN(z) if l + 1 < LAYERS else OUTPUT(z),)
        hs = hs + (h,)
    return hs, zs


@triton.jit
def _lane_loss(
    params, x, t, beta, HIDDEN, OUTPUT, SUMS, LOSS, WIDTHS: tl.constexpr, AT: tl.constexpr, BIAS: tl.constexpr
):
    """The loss of one sample, summed over the outputs. t: the targets and, if there are any, their weights."""
    LAYERS: tl.constexpr = len(WIDTHS) - 1
    OUTPUTS: tl.constexpr = WIDTHS[LAYERS]
    hs, zs = _lane_forward(params, x, HIDDEN, OUTPUT, WIDTHS, AT, BIAS)
    sums = SUMS(zs, t, None, beta)
    loss = LOSS(zs[0], hs[LAYERS][0], t[0], sums)
    if len(t) > OUTPUTS:
        loss *= t[OUTPUTS]
    for n in tl.static_range(1, OUTPUTS):
        own = LOSS(zs[n], hs[LAYERS][n], t[n], sums)
        loss += own * t[OUTPUTS + n] if len(t) > OUTPUTS else own
    return loss


@triton.jit
def _lane_backward(
    params, hs, zs, t, beta, scale, HIDDEN_BACKWARD, OUTPUT_BACKWARD, SUMS, DZ, WIDTHS: tl.constexpr, AT: tl.constexpr
):
    """dz of every layer, the last first: a tuple of [BLOCK] tensors each. t: as `_lane_loss`."""
    LAYERS: tl.constexpr = len(WIDTHS) - 1
    OUTPUTS: tl.constexpr = WIDTHS[LAYERS]
    sums = SUMS(zs, t, None, beta)
    dz = ()
    for n in tl.static_range(OUTPUTS):
        y = hs[LAYERS][n]
        own = DZ(zs[n], y, t[n], sums, OUTPUT_BACKWARD) * scale
        dz = dz + (own * t[OUTPUTS + n] if len(t) > OUTPUTS else own,)
    dzs = (dz,)
    for l in tl.static_range(LAYERS - 1, 0, -1):
        dz = ()
        for k in tl.static_range(tl.constexpr(WIDTHS[l])):
            dh = params[AT[l] + k] * dzs[LAYERS - 1 - l][0]
            for n in tl.static_range(1, tl.constexpr(WIDTHS[l + 1])):
                dh += params[AT[l] + n * WIDTHS[l] + k] * dzs[LAYERS - 1 - l][n]
            dz = dz + (HIDDEN_BACKWARD(dh, hs[l][k]),)
        dzs = dzs + (dz,)
    return dzs


@triton.jit
def _lane_accumulate(grads, hs, dzs, WIDTHS: tl.constexpr, AT: tl.constexpr, BIAS: tl.constexpr):
    """grads plus the gradients of one sample."""
    LAYERS: tl.constexpr = len(WIDTHS) - 1
    sums = ()
    for l in tl.static_range(LAYERS):
        for n in tl.static_range(tl.constexpr(WIDTHS[l + 1])):
            for k in tl.static_range(tl.constexpr(WIDTHS[l])):
                sums = sums + (grads[AT[l] + n * WIDTHS[l] + k] + dzs[LAYERS - 1 - l][n] * hs[l][k],)
        if BIAS:
            for n in tl.static_range(tl.constexpr(WIDTHS[l + 1])):
                sums = sums + (grads[AT[l] + WIDTHS[l + 1] * WIDTHS[l] + n] + dzs[LAYERS - 1 - l][n],)
    return sums


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def train_lane_kernel(
    parameter_ptrs,  # w0, b0, w1, b1, .. or w0, w1, ..: (members, N_l, K_l) and (members, N_l)
    first_ptrs,  # of the same shapes; None: the optimizer keeps no such state
    second_ptrs,
    lr_ptr,  # (members,), or a schedule, (steps of this launch, members)
    factors_ptr,  # of the losses, as a schedule, each in the place of scale; not read where stride_fs is None
    x_ptr,  # (members or 1, samples, widths[0])
    y_ptr,  # (members or 1, samples, TARGETS)
    order_ptr,  # (epochs, samples), from the epoch of the first step on; None: in order
    losses_ptr,  # (logged steps, members)
    members,
    samples,
    stride_xe,  # 0: shared by all members
    stride_ye,
    stride_ls,  # None: one rate for all steps
    stride_le,  # 0: shared by all members; None where stride_ls is
    stride_fs,
    stride_fe,
    batch_size,
    batches,  # per epoch
    batch,  # of the first step
    scale,  # of a sum over a batch
    last_scale,  # over the last batch of an epoch
    beta,  # the loss's own number; None where it has none
    taken,  # steps before this launch, ever
    steps,
    offset,  # steps from the last one that was to be logged to the first one of this launch
    period,  # steps from one that is logged to the next
    weight_decay,  # None: 0; a number, or a pointer to (members,)
    hyper,  # a tuple of the same
    HIDDEN: tl.constexpr,
    HIDDEN_BACKWARD: tl.constexpr,
    OUTPUT: tl.constexpr,
    OUTPUT_BACKWARD: tl.constexpr,
    SUMS: tl.constexpr,
    LOSS: tl.constexpr,
    DZ: tl.constexpr,
    NUMBERS: tl.constexpr,
    UPDATE: tl.constexpr,
    DECOUPLED: tl.constexpr,  # weight decay acts on the parameters, not on the gradient
    WIDTHS: tl.constexpr,
    TARGETS: tl.constexpr,  # columns of y: of the targets, or of targets and, behind them, their weights
    SIZES: tl.constexpr,  # elements of each parameter
    STARTS: tl.constexpr,  # where each begins in the flat tuple
    AT: tl.constexpr,  # where each layer begins
    ROWS: tl.constexpr,  # samples that are unrolled
    RESIDENT: tl.constexpr,  # all samples are, and stay in registers
    BLOCK: tl.constexpr,
):
    """Each program trains BLOCK networks."""
    LAYERS: tl.constexpr = len(WIDTHS) - 1
    BIAS: tl.constexpr = len(SIZES) > LAYERS
    member = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = member < members
    # Before the first step of all, the state is what the optimizer starts from, and the buffers are not read.
    known = tl.where(taken > 0, mask, False)
    # Lanes without a network have the numbers of the last one.
    own = tl.minimum(member, members - 1)
    decay = None if weight_decay is None else own_number(weight_decay, own)
    own_hyper = own_numbers(hyper, own)
    lr = tl.load(lr_ptr + member, mask=mask, other=0.0) if stride_ls is None else None
    params = _lane_load(parameter_ptrs, member, mask, SIZES, BLOCK)
    firsts = _lane_load(first_ptrs, member, known, SIZES, BLOCK)
    seconds = _lane_load(second_ptrs, member, known, SIZES, BLOCK)
    xs = ()
    ts = ()
    if RESIDENT:
        # The first tile is loaded by hand, because triton repeats every load in a loop that holds a store.
        for r in tl.static_range(ROWS):
            xs = xs + (_lane_row(x_ptr, member, mask, stride_xe, r, WIDTHS[0]),)
            ts = ts + (_lane_row(y_ptr, member, mask, stride_ye, r, TARGETS),)
    for segment in range(tl.cdiv(offset + steps, period)):
        if (segment > 0) | (offset == 0):
            loss = tl.zeros((BLOCK,), tl.float32)
            if RESIDENT:
                for r in tl.static_range(ROWS):
                    loss += _lane_loss(params, xs[r], ts[r], beta, HIDDEN, OUTPUT, SUMS, LOSS, WIDTHS, AT, BIAS)
            else:
                log_first = batch * batch_size
                for log_index in range(log_first, tl.minimum(log_first + batch_size, samples)):
                    log_row = tl.cast(log_index, tl.int64)
                    if order_ptr is not None:
                        log_row = tl.load(order_ptr + log_row).to(tl.int64)
                    log_x = _lane_row(x_ptr, member, mask, stride_xe, log_row, WIDTHS[0])
                    log_t = _lane_row(y_ptr, member, mask, stride_ye, log_row, TARGETS)
                    loss += _lane_loss(params, log_x, log_t, beta, HIDDEN, OUTPUT, SUMS, LOSS, WIDTHS, AT, BIAS)
            log_step, _log_last = segment_steps(segment, offset, period, steps)
            log_scale = tl.where(batch == batches - 1, last_scale, scale)
            loss *= step_number(log_scale, factors_ptr, stride_fs, stride_fe, log_step, own)
            logged = (segment - tl.where(offset > 0, 1, 0)).to(tl.int64)
            tl.store(losses_ptr + logged * members + member, loss, mask=mask)
        first_step, last_step = segment_steps(segment, offset, period, steps)
        for step in range(first_step, last_step):
            rate = step_number(lr, lr_ptr, stride_ls, stride_le, step, own)
            batch_scale = tl.where(batch == batches - 1, last_scale, scale)
            batch_scale = step_number(batch_scale, factors_ptr, stride_fs, stride_fe, step, own)
            grads = ()
            for _ in tl.static_range(len(params)):
                grads = grads + (tl.zeros((BLOCK,), tl.float32),)
            if RESIDENT:
                for r in tl.static_range(ROWS):
                    hs, zs = _lane_forward(params, xs[r], HIDDEN, OUTPUT, WIDTHS, AT, BIAS)
                    dzs = _lane_backward(
                        params, hs, zs, ts[r], beta, batch_scale, HIDDEN_BACKWARD, OUTPUT_BACKWARD, SUMS, DZ, WIDTHS, AT
                    )
                    grads = _lane_accumulate(grads, hs, dzs, WIDTHS, AT, BIAS)
            else:
                first_row = batch * batch_size
                last_row = tl.minimum(first_row + batch_size, samples) - 1
                for row_start in range(first_row, last_row + 1, ROWS):
                    for r in tl.static_range(ROWS):
                        # Beyond the end of the batch its last sample is taken again, with a scale of 0.
                        row = tl.cast(tl.minimum(row_start + r, last_row), tl.int64)
                        row_scale = tl.where(row_start + r <= last_row, batch_scale, 0.0)
                        if order_ptr is not None:
                            row = tl.load(order_ptr + row).to(tl.int64)
                        x = _lane_row(x_ptr, member, mask, stride_xe, row, WIDTHS[0])
                        t = _lane_row(y_ptr, member, mask, stride_ye, row, TARGETS)
                        hs, zs = _lane_forward(params, x, HIDDEN, OUTPUT, WIDTHS, AT, BIAS)
                        dzs = _lane_backward(
                            params, hs, zs, t, beta, row_scale, HIDDEN_BACKWARD, OUTPUT_BACKWARD, SUMS, DZ, WIDTHS, AT
                        )
                        grads = _lane_accumulate(grads, hs, dzs, WIDTHS, AT, BIAS)
            params, firsts, seconds = update(
                params, firsts, seconds, grads, rate, decay, taken + step + 1, own_hyper, NUMBERS, UPDATE, DECOUPLED
            )
            # The batch of the next step is the following one, or the first of the next epoch.
            if order_ptr is not None:
                order_ptr += tl.where(batch == batches - 1, samples, 0)
            batch = tl.where(batch == batches - 1, 0, batch + 1)
    # The compiler cannot know that this is 0. If it did, it would keep the addresses in registers throughout the loop.
    member += tl.minimum(batch, 0)
    _lane_store(parameter_ptrs, params, member, mask, SIZES, STARTS)
    if first_ptrs is not None:
        _lane_store(first_ptrs, firsts, member, mask, SIZES, STARTS)
    if second_ptrs is not None:
        _lane_store(second_ptrs, seconds, member, mask, SIZES, STARTS)
