"""Whole training loops in one launch: every step of a small MLP's training, for one network or for many.

A network has layers l = 0 .. L-1 from K_l = widths[l] to N_l = widths[l + 1] features, h_0 = x:

    z_l = h_l @ weight_l.T + bias_l,  h_{l+1} = act_l(z_l),  y = h_L,  loss = sum or mean of loss(z_{L-1}, y, target)

Two kernels, of one signature but for their tiles:

- lane: one network per lane of a warp. Parameters, gradients and optimizer state are tuples of [BLOCK] tensors, one
  element per network, that never leave the registers; a batch is unrolled, ROWS samples at a time.
- block: one network per program. Weights are [N, K] tiles, padded to powers of two of at least 16; a batch goes
  through them in tiles of BLOCK_M samples. Activations are transposed, [width, samples], so that a sum over samples
  has the gradient of z as its left operand as it is.

Both walk segments of steps. A segment begins with a step whose loss is logged: the loss is computed from a forward pass
of its own, so that the loop over steps has no store in it. What a step does depends on its number alone, never on where
a launch began: cutting a run into launches changes no bit of it. Integers are not specialized for the same reason, and
because each specialization would be compiled anew.

Padding (block): a padded neuron of a sigmoid layer would put out 0.5, and the weights that read it would learn. Outputs
of padded neurons are set to 0, with which all padded gradients are 0. A padded bias of -1e4 would do the same until
weight decay has eaten it up.
"""

# triton's types know neither launch options nor tl.range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportPossiblyUnboundVariable=false
import itertools
import math

import triton
import triton.language as tl
from torch import Tensor

from . import device
from .linear import _current
from .mlp import _bce, _log1p_exp, _padded
from .records import Recipe, TrainPlan

Tensors = tuple[Tensor, ...]

# Arguments that change from launch to launch of one run, or from one number of networks to another.
UNSPECIALIZED = (
    "members",
    "samples",
    "stride_xe",
    "stride_ye",
    "batch_size",
    "batches",
    "batch",
    "taken",
    "steps",
    "offset",
    "period",
)
UNALIGNED = ("order_ptr", "losses_ptr")  # may be rows of longer tensors


# --- losses: the value at one output, and the gradient with respect to z --------------------------------------------


@triton.jit
def bce(z, y, t):
    # From z, where p has lost digits, but cut off where torch's BCELoss is: log 0 counts -100. In torch p is 0 where
    # e^-z overflows, and 1 where 1 + e^-z rounds to 1, from z = 24 ln 2 on.
    log1p = _log1p_exp(z)
    minus_log_p = tl.where(z < -88.72284, 100.0, tl.maximum(-z, 0.0) + log1p)
    minus_log_q = tl.where(z > 16.635532, 100.0, tl.maximum(z, 0.0) + log1p)
    return t * minus_log_p + (1.0 - t) * minus_log_q


@triton.jit
def bce_dz(z, y, t, BACKWARD):
    return y - t


@triton.jit
def bce_logits(z, y, t):
    return _bce(z, t, 1.0)


@triton.jit
def bce_logits_dz(z, y, t, BACKWARD):
    return device.sigmoid(z) - t


@triton.jit
def mse(z, y, t):
    return (y - t) * (y - t)


@triton.jit
def mse_dz(z, y, t, BACKWARD):
    return BACKWARD(2.0 * (y - t), y)


LOSSES = {"bce": (bce, bce_dz), "bce_logits": (bce_logits, bce_logits_dz), "mse": (mse, mse_dz)}


# --- optimizers: the numbers of step t = 1, 2, .., and what it makes of a parameter ----------------------------------
#
# p: the parameter, g: its gradient, m and v: its state, passed through where the optimizer keeps none.
# hyper: (decay, gain) of m, (decay, gain) of v, log(decay) of m and of v, eps. The formulas are those of torch.optim.


@triton.jit
def sgd_numbers(t, lr, hyper):
    return (lr,)


@triton.jit
def sgd(p, g, m, v, numbers, hyper):
    return p - numbers[0] * g, m, v


@triton.jit
def momentum_numbers(t, lr, hyper):
    # The first step sets the buffer, which is 0 before it, to the gradient itself, undamped.
    return lr, tl.where(t == 1, 1.0, hyper[1])


@triton.jit
def momentum(p, g, m, v, numbers, hyper):
    m = hyper[0] * m + numbers[1] * g
    return p - numbers[0] * m, m, v


@triton.jit
def nesterov(p, g, m, v, numbers, hyper):
    m = hyper[0] * m + numbers[1] * g
    return p - numbers[0] * (g + hyper[0] * m), m, v


@triton.jit
def _one_minus_power(t, log):
    """1 - e^(t log) for log < 0, to fp32 accuracy: near 0 by its series, where 1 - e^u would cancel."""
    # Beyond -100 the power is 0 anyway, and the log of a decay of 0 is -inf.
    u = tl.maximum(t.to(tl.float32) * log, -100.0)
    series = 1.0 + u * (1.0 / 6) * (1.0 + u * (1.0 / 7) * (1.0 + u * (1.0 / 8)))
    series = 1.0 + u * (1.0 / 2) * (1.0 + u * (1.0 / 3) * (1.0 + u * (1.0 / 4) * (1.0 + u * (1.0 / 5) * series)))
    return tl.where(u > -0.5, -u * series, 1.0 - tl.exp2(u * 1.4426950408889634))


@triton.jit
def adam_numbers(t, lr, hyper):
    # From t itself, not from running products: those would depend on where a launch began.
    return lr / _one_minus_power(t, hyper[4]), tl.rsqrt(_one_minus_power(t, hyper[5]))


@triton.jit
def adam(p, g, m, v, numbers, hyper):
    m = hyper[0] * m + hyper[1] * g
    v = hyper[2] * v + hyper[3] * g * g
    return p - numbers[0] * (m / (tl.sqrt(v) * numbers[1] + hyper[6])), m, v


OPTIMIZERS = {
    "sgd": (sgd_numbers, sgd),
    "momentum": (momentum_numbers, momentum),
    "nesterov": (momentum_numbers, nesterov),
    "adam": (adam_numbers, adam),
}


@triton.jit
def _update(params, firsts, seconds, grads, lr, weight_decay, t, hyper, NUMBERS, UPDATE, DECOUPLED):
    """(params, firsts, seconds) after step t; tuples of tensors of any shape, of which grads has the same."""
    numbers = NUMBERS(t, lr, hyper)
    new_params = ()
    new_firsts = ()
    new_seconds = ()
    for i in tl.static_range(len(params)):
        p = params[i]
        g = grads[i]
        if weight_decay is not None:
            if DECOUPLED:
                p = p * (1.0 - lr * weight_decay)
            else:
                g = g + weight_decay * p
        p, m, v = UPDATE(p, g, firsts[i], seconds[i], numbers, hyper)
        new_params = new_params + (p,)
        new_firsts = new_firsts + (m,)
        new_seconds = new_seconds + (v,)
    return new_params, new_firsts, new_seconds


@triton.jit
def _segment_steps(segment, offset, period, steps):
    """The first step of a segment and the first one behind it.

    From the segment's number, never handed from one turn of the loop to the next: triton 3.6.0 and 3.7.1 drop what a
    loop carries if it does nothing but bound a nested loop, and every turn sees the first value (triton PR 9036).
    """
    first = segment * period - offset
    return tl.maximum(first, 0), tl.minimum(first, steps - period) + period


# --- one network per lane -------------------------------------------------------------------------------------------
#
# A network's parameters are one flat tuple: layer l has its weights, row by row, from AT[l] on, then its biases.


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
def _lane_loss(params, x, t, HIDDEN, OUTPUT, LOSS, WIDTHS: tl.constexpr, AT: tl.constexpr, BIAS: tl.constexpr):
    """The loss of one sample, summed over the outputs."""
    LAYERS: tl.constexpr = len(WIDTHS) - 1
    hs, zs = _lane_forward(params, x, HIDDEN, OUTPUT, WIDTHS, AT, BIAS)
    loss = LOSS(zs[0], hs[LAYERS][0], t[0])
    for n in tl.static_range(1, tl.constexpr(WIDTHS[LAYERS])):
        loss += LOSS(zs[n], hs[LAYERS][n], t[n])
    return loss


@triton.jit
def _lane_backward(
    params, hs, zs, t, scale, HIDDEN_BACKWARD, OUTPUT_BACKWARD, DZ, WIDTHS: tl.constexpr, AT: tl.constexpr
):
    """dz of every layer, the last first: a tuple of [BLOCK] tensors each."""
    LAYERS: tl.constexpr = len(WIDTHS) - 1
    dz = ()
    for n in tl.static_range(tl.constexpr(WIDTHS[LAYERS])):
        y = hs[LAYERS][n]
        dz = dz + (DZ(zs[n], y, t[n], OUTPUT_BACKWARD) * scale,)
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
    lr_ptr,  # (members,)
    x_ptr,  # (members or 1, samples, widths[0])
    y_ptr,  # (members or 1, samples, widths[-1])
    order_ptr,  # (epochs, samples), from the epoch of the first step on; None: in order
    losses_ptr,  # (logged steps, members)
    members,
    samples,
    stride_xe,  # 0: shared by all members
    stride_ye,
    batch_size,
    batches,  # per epoch
    batch,  # of the first step
    scale,  # of a sum over a batch
    last_scale,  # over the last batch of an epoch
    taken,  # steps before this launch, ever
    steps,
    offset,  # steps from the last one that was to be logged to the first one of this launch
    period,  # steps from one that is logged to the next
    weight_decay,  # None: 0
    hyper,
    HIDDEN: tl.constexpr,
    HIDDEN_BACKWARD: tl.constexpr,
    OUTPUT: tl.constexpr,
    OUTPUT_BACKWARD: tl.constexpr,
    LOSS: tl.constexpr,
    DZ: tl.constexpr,
    NUMBERS: tl.constexpr,
    UPDATE: tl.constexpr,
    DECOUPLED: tl.constexpr,  # weight decay acts on the parameters, not on the gradient
    WIDTHS: tl.constexpr,
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
    # Before the first step ever, state is what the optimizer starts from, whatever the buffers hold.
    known = tl.where(taken > 0, mask, False)
    lr = tl.load(lr_ptr + member, mask=mask, other=0.0)
    params = _lane_load(parameter_ptrs, member, mask, SIZES, BLOCK)
    firsts = _lane_load(first_ptrs, member, known, SIZES, BLOCK)
    seconds = _lane_load(second_ptrs, member, known, SIZES, BLOCK)
    xs = ()
    ts = ()
    if RESIDENT:
        # By hand: where there is a store in a loop, triton loads everything in it again and again.
        for r in tl.static_range(ROWS):
            xs = xs + (_lane_row(x_ptr, member, mask, stride_xe, r, WIDTHS[0]),)
            ts = ts + (_lane_row(y_ptr, member, mask, stride_ye, r, WIDTHS[LAYERS]),)
    for segment in range(tl.cdiv(offset + steps, period)):
        if (segment > 0) | (offset == 0):
            loss = tl.zeros((BLOCK,), tl.float32)
            if RESIDENT:
                for r in tl.static_range(ROWS):
                    loss += _lane_loss(params, xs[r], ts[r], HIDDEN, OUTPUT, LOSS, WIDTHS, AT, BIAS)
            else:
                log_first = batch * batch_size
                for log_index in range(log_first, tl.minimum(log_first + batch_size, samples)):
                    log_row = tl.cast(log_index, tl.int64)
                    if order_ptr is not None:
                        log_row = tl.load(order_ptr + log_row).to(tl.int64)
                    log_x = _lane_row(x_ptr, member, mask, stride_xe, log_row, WIDTHS[0])
                    log_t = _lane_row(y_ptr, member, mask, stride_ye, log_row, WIDTHS[LAYERS])
                    loss += _lane_loss(params, log_x, log_t, HIDDEN, OUTPUT, LOSS, WIDTHS, AT, BIAS)
            loss *= tl.where(batch == batches - 1, last_scale, scale)
            logged = (segment - tl.where(offset > 0, 1, 0)).to(tl.int64)
            tl.store(losses_ptr + logged * members + member, loss, mask=mask)
        first_step, last_step = _segment_steps(segment, offset, period, steps)
        for step in range(first_step, last_step):
            batch_scale = tl.where(batch == batches - 1, last_scale, scale)
            grads = ()
            for _ in tl.static_range(len(params)):
                grads = grads + (tl.zeros((BLOCK,), tl.float32),)
            if RESIDENT:
                for r in tl.static_range(ROWS):
                    hs, zs = _lane_forward(params, xs[r], HIDDEN, OUTPUT, WIDTHS, AT, BIAS)
                    dzs = _lane_backward(
                        params, hs, zs, ts[r], batch_scale, HIDDEN_BACKWARD, OUTPUT_BACKWARD, DZ, WIDTHS, AT
                    )
                    grads = _lane_accumulate(grads, hs, dzs, WIDTHS, AT, BIAS)
            else:
                first_row = batch * batch_size
                last_row = tl.minimum(first_row + batch_size, samples) - 1
                for row_start in range(first_row, last_row + 1, ROWS):
                    for r in tl.static_range(ROWS):
                        # Beyond the batch its last sample stands in, with a scale of 0.
                        row = tl.cast(tl.minimum(row_start + r, last_row), tl.int64)
                        row_scale = tl.where(row_start + r <= last_row, batch_scale, 0.0)
                        if order_ptr is not None:
                            row = tl.load(order_ptr + row).to(tl.int64)
                        x = _lane_row(x_ptr, member, mask, stride_xe, row, WIDTHS[0])
                        t = _lane_row(y_ptr, member, mask, stride_ye, row, WIDTHS[LAYERS])
                        hs, zs = _lane_forward(params, x, HIDDEN, OUTPUT, WIDTHS, AT, BIAS)
                        dzs = _lane_backward(
                            params, hs, zs, t, row_scale, HIDDEN_BACKWARD, OUTPUT_BACKWARD, DZ, WIDTHS, AT
                        )
                        grads = _lane_accumulate(grads, hs, dzs, WIDTHS, AT, BIAS)
            params, firsts, seconds = _update(
                params, firsts, seconds, grads, lr, weight_decay, taken + step + 1, hyper, NUMBERS, UPDATE, DECOUPLED
            )
            # The next batch; after the last one, the first of the next epoch.
            if order_ptr is not None:
                order_ptr += tl.where(batch == batches - 1, samples, 0)
            batch = tl.where(batch == batches - 1, 0, batch + 1)
    # 0 to be added, which the compiler cannot know: it would keep the addresses in registers throughout the loop.
    member += tl.minimum(batch, 0)
    _lane_store(parameter_ptrs, params, member, mask, SIZES, STARTS)
    if first_ptrs is not None:
        _lane_store(first_ptrs, firsts, member, mask, SIZES, STARTS)
    if second_ptrs is not None:
        _lane_store(second_ptrs, seconds, member, mask, SIZES, STARTS)


# --- one network per program ----------------------------------------------------------------------------------------
#
# A network's parameters are the tuple (weight 0, bias 0, weight 1, ..) of [N, K] and [N] tensors, padded with zeros.


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
def _block_load(ptrs, member, known, SIZES: tl.constexpr, WIDTHS: tl.constexpr, PADDED: tl.constexpr):
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
def _block_store(ptrs, tensors, member, SIZES: tl.constexpr, WIDTHS: tl.constexpr, PADDED: tl.constexpr):
    BIAS: tl.constexpr = len(SIZES) >= len(WIDTHS)
    for i in tl.static_range(len(SIZES)):
        offs, inside = _block_offsets(i, WIDTHS, PADDED, BIAS)
        tl.store(ptrs[i] + member * SIZES[i] + offs, tensors[i], mask=inside)


@triton.jit
def _block_rows(ptr, order_ptr, start, end, WIDTH: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Samples start to end - 1 of the order as [WIDE, BLOCK_M], with zeros around them."""
    index = start + tl.arange(0, BLOCK_M)
    offs = tl.arange(0, WIDE)
    row = index.to(tl.int64)
    if order_ptr is not None:
        row = tl.load(order_ptr + index, mask=index < end, other=0).to(tl.int64)
    inside = (offs < WIDTH)[:, None] & (index < end)[None, :]
    return tl.load(ptr + row[None, :] * WIDTH + offs[:, None], mask=inside, other=0.0), inside


@triton.jit
def _block_forward(params, x, HIDDEN, OUTPUT, WIDTHS: tl.constexpr, PADDED: tl.constexpr, BIAS: tl.constexpr):
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
def _block_loss(
    params, x, t, inside, HIDDEN, OUTPUT, LOSS, WIDTHS: tl.constexpr, PADDED: tl.constexpr, BIAS: tl.constexpr
):
    """The loss of a tile of samples, summed."""
    hs, z = _block_forward(params, x, HIDDEN, OUTPUT, WIDTHS, PADDED, BIAS)
    return tl.sum(tl.where(inside, LOSS(z, hs[len(WIDTHS) - 1], t), 0.0))


@triton.jit
def _block_backward(
    params, hs, z, t, inside, scale, HIDDEN_BACKWARD, OUTPUT_BACKWARD, DZ, LAYERS: tl.constexpr, BIAS: tl.constexpr
):
    """dz of every layer, the last first, [PADDED[l + 1], BLOCK_M] each."""
    EACH: tl.constexpr = 2 if BIAS else 1
    y = hs[LAYERS]
    dz = tl.where(inside, DZ(z, y, t, OUTPUT_BACKWARD) * scale, 0.0)
    dzs = (dz,)
    for l in tl.static_range(LAYERS - 1, 0, -1):
        dh = tl.dot(tl.trans(params[EACH * l]), dzs[LAYERS - 1 - l], input_precision="ieee")
        dzs = dzs + (HIDDEN_BACKWARD(dh, hs[l]),)
    return dzs


@triton.jit
def _block_accumulate(grads, hs, dzs, LAYERS: tl.constexpr, BIAS: tl.constexpr):
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
    x_ptr,
    y_ptr,
    order_ptr,
    losses_ptr,
    members,
    samples,
    stride_xe,
    stride_ye,
    batch_size,
    batches,
    batch,
    scale,
    last_scale,
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
    LOSS: tl.constexpr,
    DZ: tl.constexpr,
    NUMBERS: tl.constexpr,
    UPDATE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    WIDTHS: tl.constexpr,
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
    lr = tl.load(lr_ptr + member)
    params = _block_load(parameter_ptrs, member, True, SIZES, WIDTHS, PADDED)
    firsts = _block_load(first_ptrs, member, taken > 0, SIZES, WIDTHS, PADDED)
    seconds = _block_load(second_ptrs, member, taken > 0, SIZES, WIDTHS, PADDED)
    if RESIDENT:
        all_x, _ = _block_rows(x_ptr, None, 0, samples, WIDTHS[0], PADDED[0], BLOCK_M)
        all_t, all_inside = _block_rows(y_ptr, None, 0, samples, WIDTHS[LAYERS], PADDED[LAYERS], BLOCK_M)
    for segment in range(tl.cdiv(offset + steps, period)):
        if (segment > 0) | (offset == 0):
            loss = tl.full((), 0.0, tl.float32)
            if RESIDENT:
                loss += _block_loss(params, all_x, all_t, all_inside, HIDDEN, OUTPUT, LOSS, WIDTHS, PADDED, BIAS)
            else:
                log_first = batch * batch_size
                log_end = tl.minimum(log_first + batch_size, samples)
                for log_start in tl.range(log_first, log_end, BLOCK_M, num_stages=1):
                    log_x, _ = _block_rows(x_ptr, order_ptr, log_start, log_end, WIDTHS[0], PADDED[0], BLOCK_M)
                    log_t, log_inside = _block_rows(
                        y_ptr, order_ptr, log_start, log_end, WIDTHS[LAYERS], PADDED[LAYERS], BLOCK_M
                    )
                    loss += _block_loss(params, log_x, log_t, log_inside, HIDDEN, OUTPUT, LOSS, WIDTHS, PADDED, BIAS)
            loss *= tl.where(batch == batches - 1, last_scale, scale)
            logged = (segment - tl.where(offset > 0, 1, 0)).to(tl.int64)
            tl.store(losses_ptr + logged * members + member, loss)
        first_step, last_step = _segment_steps(segment, offset, period, steps)
        for step in tl.range(first_step, last_step, num_stages=1):
            batch_scale = tl.where(batch == batches - 1, last_scale, scale)
            grads = ()
            for i in tl.static_range(len(params)):
                grads = grads + (tl.zeros(params[i].shape, tl.float32),)
            if RESIDENT:
                hs, z = _block_forward(params, all_x, HIDDEN, OUTPUT, WIDTHS, PADDED, BIAS)
                dzs = _block_backward(
                    params, hs, z, all_t, all_inside, batch_scale, HIDDEN_BACKWARD, OUTPUT_BACKWARD, DZ, LAYERS, BIAS
                )
                grads = _block_accumulate(grads, hs, dzs, LAYERS, BIAS)
            else:
                first_row = batch * batch_size
                end_row = tl.minimum(first_row + batch_size, samples)
                for row_start in tl.range(first_row, end_row, BLOCK_M, num_stages=1):
                    x, _ = _block_rows(x_ptr, order_ptr, row_start, end_row, WIDTHS[0], PADDED[0], BLOCK_M)
                    t, inside = _block_rows(
                        y_ptr, order_ptr, row_start, end_row, WIDTHS[LAYERS], PADDED[LAYERS], BLOCK_M
                    )
                    hs, z = _block_forward(params, x, HIDDEN, OUTPUT, WIDTHS, PADDED, BIAS)
                    dzs = _block_backward(
                        params, hs, z, t, inside, batch_scale, HIDDEN_BACKWARD, OUTPUT_BACKWARD, DZ, LAYERS, BIAS
                    )
                    grads = _block_accumulate(grads, hs, dzs, LAYERS, BIAS)
            params, firsts, seconds = _update(
                params, firsts, seconds, grads, lr, weight_decay, taken + step + 1, hyper, NUMBERS, UPDATE, DECOUPLED
            )
            # The next batch; after the last one, the first of the next epoch.
            if order_ptr is not None:
                order_ptr += tl.where(batch == batches - 1, samples, 0)
            batch = tl.where(batch == batches - 1, 0, batch + 1)
    # 0 to be added, which the compiler cannot know: it would keep the addresses in registers throughout the loop.
    member += tl.minimum(batch, 0)
    _block_store(parameter_ptrs, params, member, SIZES, WIDTHS, PADDED)
    if first_ptrs is not None:
        _block_store(first_ptrs, firsts, member, SIZES, WIDTHS, PADDED)
    if second_ptrs is not None:
        _block_store(second_ptrs, seconds, member, SIZES, WIDTHS, PADDED)


# --- the launcher ---------------------------------------------------------------------------------------------------


class Loop:
    """A run of training steps in launches. The arguments are those of `loop.Loop`, in float32 and contiguous."""

    def __init__(
        self,
        recipe: Recipe,
        parameters: Tensors,
        first: Tensors,
        second: Tensors,
        lr: Tensor,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        taken: int,
        plan: TrainPlan,
    ) -> None:
        self.taken, self.plan = taken, plan
        widths, members, self.samples = recipe.widths, lr.shape[0], x.shape[1]
        batch_size = min(batch_size, self.samples)
        self.batches = -(-self.samples // batch_size)
        last = self.samples - (self.batches - 1) * batch_size
        divide = recipe.reduction == "mean"
        if recipe.optimizer in ("adam", "adamw"):
            optimizer = "adam"
            beta1, beta2 = recipe.beta1, recipe.beta2
            logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
            hyper = (beta1, 1 - beta1, beta2, 1 - beta2, *logs, recipe.eps)
        else:
            optimizer = "sgd" if recipe.momentum == 0 else "nesterov" if recipe.nesterov else "momentum"
            hyper = (recipe.momentum, 1 - recipe.dampening)
        sizes = tuple(p[0].numel() for p in parameters)
        if plan.impl == "lane":
            self.kernel, self.grid = train_lane_kernel, (triton.cdiv(members, plan.networks),)
            starts = tuple(itertools.accumulate(sizes, initial=0))[:-1]
            at = starts[:: len(parameters) // (len(widths) - 1)]
            tile = {"STARTS": starts, "AT": at, "BLOCK": plan.networks}
        else:
            self.kernel, self.grid = train_block_kernel, (members,)
            tile = {"PADDED": _padded(widths), "BLOCK_M": plan.rows}
        # What no launch changes.
        self.arguments = {
            "parameter_ptrs": tuple(parameters),
            "first_ptrs": tuple(first) or None,
            "second_ptrs": tuple(second) or None,
            "lr_ptr": lr,
            "x_ptr": x,
            "y_ptr": y,
            "members": members,
            "samples": self.samples,
            "stride_xe": x.stride(0) if x.shape[0] > 1 else 0,
            "stride_ye": y.stride(0) if y.shape[0] > 1 else 0,
            "batch_size": batch_size,
            "batches": self.batches,
            "scale": 1.0 / (batch_size * widths[-1]) if divide else 1.0,
            "last_scale": 1.0 / (last * widths[-1]) if divide else 1.0,
            "weight_decay": recipe.weight_decay or None,
            "hyper": hyper,
            "HIDDEN": device.ACTIVATIONS[recipe.hidden][0],
            "HIDDEN_BACKWARD": device.ACTIVATIONS[recipe.hidden][1],
            "OUTPUT": device.ACTIVATIONS[recipe.output][0],
            "OUTPUT_BACKWARD": device.ACTIVATIONS[recipe.output][1],
            "LOSS": LOSSES[recipe.loss][0],
            "DZ": LOSSES[recipe.loss][1],
            "NUMBERS": OPTIMIZERS[optimizer][0],
            "UPDATE": OPTIMIZERS[optimizer][1],
            "DECOUPLED": recipe.optimizer == "adamw",
            "WIDTHS": widths,
            "SIZES": sizes,
            **tile,
            "num_warps": plan.num_warps,
            "num_stages": 1,
            # Said, or the assembler spills a few values in order to stay at 64, 96 or 128.
            "maxnreg": 255,
        }

    def run(self, order: Tensor | None, start: int, steps: int, log_every: int, losses: Tensor) -> None:
        """As `loop.Loop.run`; order is int32, losses float32."""
        if steps == 0:
            return
        # Without a log, one segment that began a step before the launch, where its loss would be due. The kernel is the
        # one that logs: results have the same bits.
        offset = start % log_every if log_every else 1
        resident = order is None and self.batches == 1 and self.samples <= self.plan.rows
        rows = {"ROWS": self.samples if resident else self.plan.rows} if self.plan.impl == "lane" else {}
        with _current(losses):
            self.kernel[self.grid](
                order_ptr=order,
                losses_ptr=losses,
                batch=start % self.batches,
                taken=self.taken,
                steps=steps,
                offset=offset,
                # A period longer than the launch would overflow for nothing.
                period=min(log_every or offset + steps, offset + steps),
                RESIDENT=resident,
                **rows,
                **self.arguments,
                enable_fp_fusion=True,
            )
        self.taken += steps
