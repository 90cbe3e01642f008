# SPDX-License-Identifier: Apache-2.0
"""What a step of training does: losses, optimizers, the update of a parameter, and where segments begin and end.

A loss is a function of one output and of what it needs beside that: sums over all outputs of its sample, or its own
number. z, t and `inside` of these sums are tuples of a lane's outputs and None, or tiles with a sample in each column
and which of their elements there are.
"""

# triton's types know neither launch options nor tl.range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from .functions import sigmoid
from .network_functions import bce_with_logits, log1p_exp

# Arguments that change from launch to launch of one run, or from one number of networks to another.
UNSPECIALIZED = (
    "members",
    "samples",
    "stride_xe",
    "stride_ye",
    "stride_ls",
    "stride_le",
    "stride_fs",
    "stride_fe",
    "batch_size",
    "batches",
    "batch",
    "taken",
    "steps",
    "offset",
    "period",
)
UNALIGNED = ("order_ptr", "losses_ptr")  # may be rows of longer tensors


@triton.jit
def no_sums(z, t, inside, beta):
    return ()


@triton.jit
def its_number(z, t, inside, beta):
    return (beta,)


@triton.jit
def bce(z, y, t, sums):
    # The loss is computed from z, since p has lost digits, but cut off where torch's BCELoss is: log 0 counts -100. In
    # torch p is 0 where e^-z overflows, and 1 where 1 + e^-z rounds to 1, from z = 24 ln 2 on.
    log1p = log1p_exp(z)
    minus_log_p = tl.where(z < -88.72284, 100.0, tl.maximum(-z, 0.0) + log1p)
    minus_log_q = tl.where(z > 16.635532, 100.0, tl.maximum(z, 0.0) + log1p)
    return t * minus_log_p + (1.0 - t) * minus_log_q


@triton.jit
def bce_dz(z, y, t, sums, BACKWARD):
    return y - t


@triton.jit
def bce_logits(z, y, t, sums):
    return bce_with_logits(z, t, 1.0)


@triton.jit
def bce_logits_dz(z, y, t, sums, BACKWARD):
    return sigmoid(z) - t


@triton.jit
def mse(z, y, t, sums):
    return (y - t) * (y - t)


@triton.jit
def mse_dz(z, y, t, sums, BACKWARD):
    return BACKWARD(2.0 * (y - t), y)


@triton.jit
def smooth_l1(z, y, t, sums):
    distance = tl.abs(y - t)
    return tl.where(distance < sums[0], distance * distance / (2.0 * sums[0]), distance - 0.5 * sums[0])


@triton.jit
def smooth_l1_dz(z, y, t, sums, BACKWARD):
    # Comparisons, because tl.clamp drops NaN.
    part = (y - t) / sums[0]
    return BACKWARD(tl.where(part > 1.0, 1.0, tl.where(part < -1.0, -1.0, part)), y)


@triton.jit
def l1(z, y, t, sums):
    return tl.abs(y - t)


@triton.jit
def l1_dz(z, y, t, sums, BACKWARD):
    # 0 of NaN, as torch has it.
    return BACKWARD(tl.where(y > t, 1.0, tl.where(y < t, -1.0, 0.0)), y)


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax_sums(z, t, inside, beta):
    """The greatest logit of a sample, log sum e^(z - that), and the sum of its targets."""
    if inside is None:
        top = z[0]
        targets = t[0]
        for n in tl.static_range(1, len(z)):
            top = tl.maximum(top, z[n])
            targets += t[n]
        total = tl.exp2((z[0] - top) * LOG2_E)
        for n in tl.static_range(1, len(z)):
            total += tl.exp2((z[n] - top) * LOG2_E)
        return top, tl.log(total), targets
    else:  # noqa: RET505, the compiler wants both
        # Finite, so that a column without a sample has sums too.
        logits = tl.where(inside, z, -1e38)
        top = tl.max(logits, axis=0)[None, :]
        total = tl.sum(tl.exp2((logits - top) * LOG2_E), axis=0)[None, :]
        return top, tl.log(total), tl.sum(t, axis=0)[None, :]


@triton.jit
def cross_entropy(z, y, t, sums):
    # Not z - (top + log): in that sum the log of a sample that is classified well has no digits left.
    return t * (sums[1] - (z - sums[0]))


@triton.jit
def cross_entropy_dz(z, y, t, sums, BACKWARD):
    return tl.exp2(((z - sums[0]) - sums[1]) * LOG2_E) * sums[2] - t


# What a loss needs beside an output, the loss of the output, and its gradient at z.
LOSSES = {
    "bce": (no_sums, bce, bce_dz),
    "bce_logits": (no_sums, bce_logits, bce_logits_dz),
    "mse": (no_sums, mse, mse_dz),
    "smooth_l1": (its_number, smooth_l1, smooth_l1_dz),
    "l1": (no_sums, l1, l1_dz),  # smooth_l1 with a beta of 0
    "cross_entropy": (softmax_sums, cross_entropy, cross_entropy_dz),
}


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
    # The power is 0 from an exponent of -100 on, and the log of a decay of 0 is -inf.
    u = tl.maximum(t.to(tl.float32) * log, -100.0)
    series = 1.0 + u * (1.0 / 6) * (1.0 + u * (1.0 / 7) * (1.0 + u * (1.0 / 8)))
    series = 1.0 + u * (1.0 / 2) * (1.0 + u * (1.0 / 3) * (1.0 + u * (1.0 / 4) * (1.0 + u * (1.0 / 5) * series)))
    return tl.where(u > -0.5, -u * series, 1.0 - tl.exp2(u * 1.4426950408889634))


@triton.jit
def adam_numbers(t, lr, hyper):
    # The powers are computed from t itself: running products would depend on where a launch began.
    return lr / _one_minus_power(t, hyper[4]), tl.rsqrt(_one_minus_power(t, hyper[5]))


@triton.jit
def adam(p, g, m, v, numbers, hyper):
    m = hyper[0] * m + hyper[1] * g
    v = hyper[2] * v + hyper[3] * g * g
    return p - numbers[0] * (m / (tl.sqrt(v) * numbers[1] + hyper[6])), m, v


@triton.jit
def rmsprop(p, g, m, v, numbers, hyper):
    m = hyper[0] * m + hyper[1] * g * g
    return p - numbers[0] * (g / (tl.sqrt(m) + hyper[2])), m, v


@triton.jit
def rmsprop_momentum(p, g, m, v, numbers, hyper):
    m = hyper[0] * m + hyper[1] * g * g
    v = hyper[3] * v + g / (tl.sqrt(m) + hyper[2])
    return p - numbers[0] * v, m, v


OPTIMIZERS = {
    "sgd": (sgd_numbers, sgd),
    "momentum": (momentum_numbers, momentum),
    "nesterov": (momentum_numbers, nesterov),
    "adam": (adam_numbers, adam),
    "rmsprop": (sgd_numbers, rmsprop),
    "rmsprop_momentum": (sgd_numbers, rmsprop_momentum),
}


@triton.jit
def own_number(number, member):
    """A number that all members have, or, of a pointer to (members,), the member's own."""
    if isinstance(number, float):  # what a number in a tuple is to the interpreter
        return number
    elif number.dtype.is_ptr():  # noqa: RET505, the compiler wants all three
        return tl.load(number + member)
    else:
        return number


@triton.jit
def own_numbers(numbers, member):
    own = ()
    for i in tl.static_range(len(numbers)):
        own = own + (own_number(numbers[i], member),)
    return own


@triton.jit
def step_number(number, ptr, stride_s, stride_e, step, member):
    """A number of a step of the launch: this one, unless each step has its own."""
    if stride_s is None:
        return number
    else:  # noqa: RET505, the compiler wants both
        return tl.load(ptr + tl.cast(step, tl.int64) * stride_s + member * stride_e)


@triton.jit
def update(params, firsts, seconds, grads, lr, weight_decay, t, hyper, NUMBERS, UPDATE, DECOUPLED):
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
def segment_steps(segment, offset, period, steps):
    """The first step of a segment and the first one behind it.

    From the segment's number, never handed from one turn of the loop to the next: triton 3.6.0 and 3.7.1 drop what a
    loop carries if it does nothing but bound a nested loop, and every turn sees the first value (triton PR 9036).
    """
    first = segment * period - offset
    return tl.maximum(first, 0), tl.minimum(first, steps - period) + period
