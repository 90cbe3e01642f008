# SPDX-License-Identifier: Apache-2.0
"""Steps of training, compiled: forward, backward and update of the networks that lie side by side in a vector.

One source serves all widths and both tiles: several networks, a few samples of each at a time, or several samples of
one network. Memory is counted in rows, of a vector of all lanes ("tile row") or of one number for each member ("member
row"). A parameter and its gradient are member rows: for each layer and neuron its weights, then its bias. h and dz have
a tile row for each input and each neuron. Places of a tile without a sample are 0 in h and dz, so that they add nothing
to a sum, whatever the parameters are.
"""

import math

from numba import njit

from .cache import cached
from .functions import ACTIVATIONS, activate, clamped, exponential, through
from .memory import add_products, fill, load, load_members, members_of, repeat, samples_of, store
from .mode import FLUSHING, float_mode, set_float_mode
from .optimizers import HYPERPARAMETERS, LANES, NEGLIGIBLE, OPTIMIZERS, ROW, correct, inline, rate_of, update
from .vectors import Tile, muladd, select

__all__ = [
    "ACTIVATIONS",
    "HYPERPARAMETERS",
    "LANES",
    "LOSSES",
    "NEGLIGIBLE",
    "OPTIMIZERS",
    "Tile",
    "loss_of",
    "softmax_loss",
    "train",
]

LOSSES = ("mse", "bce", "bce_logits", "cross_entropy", "smooth_l1")


@inline
def _fetch(tile, data, shared, order, first, used, out, width):
    """Writes inputs or targets of `used` samples into the first tile rows of `out`, and 0 where there is no sample."""
    samples = samples_of(tile)
    for place in range(samples):
        i = first + place
        sample = order[i] if len(order) and place < used else i
        for k in range(width):
            if place >= used:
                value = fill(tile, data, 0.0)
            elif shared:
                value = fill(tile, data, data[sample * width + k])
            else:
                value = load_members(tile, data, sample * width + k)
            store(out, k * samples + place, value)


@inline
def _forward(tile, widths, bias, hidden, output, w, h, partly, there, exact, mode):
    """there: a tile row, 1 where there is a sample; read where the tile is filled `partly`.

    exact: the last layer computes in this mode.
    """
    row, below = 0, 0
    for l in range(len(widths) - 1):
        inputs, outputs = widths[l], widths[l + 1]
        if exact and l + 2 == len(widths):
            set_float_mode(mode)
        kind = hidden if l + 2 < len(widths) else output
        for n in range(outputs):
            z = repeat(tile, load_members(tile, w, row + inputs) if bias else fill(tile, w, 0.0))
            for k in range(inputs):
                z = muladd(repeat(tile, load_members(tile, w, row + k)), load(tile, h, below + k), z)
            y = activate(kind, z)
            if partly:
                y = select(load(tile, there, 0) > 0.0, y, 0.0)
            store(h, below + inputs + n, y)
            row += inputs + bias
        below += inputs
    return row, below


@njit(nogil=True, error_model="numpy")
def _softmax_gradient(tile, outputs, scale, top, h, t, dz, there):
    """As `_output_gradient`, of the cross entropy."""
    greatest = load(tile, h, top)
    for n in range(1, outputs):
        z = load(tile, h, top + n)
        greatest = select(greatest < z, z, greatest)
    total = targets = repeat(tile, fill(tile, h, 0.0))
    for n in range(outputs):
        power = exponential(load(tile, h, top + n) - greatest)
        store(dz, top + n, power)
        total = total + power
        targets = targets + load(tile, t, n)
    share = targets / total
    for n in range(outputs):
        gradient = (load(tile, dz, top + n) * share - load(tile, t, n)) * scale
        store(dz, top + n, select(load(tile, there, 0) > 0.0, gradient, 0.0))


@njit(nogil=True, error_model="numpy")
def _clamped_gradient(tile, output, outputs, beta, scale, top, h, t, dz, there):
    """As `_output_gradient`, of smooth L1."""
    for n in range(outputs):
        p = load(tile, h, top + n)
        gradient = through(output, clamped(p - load(tile, t, n), beta), p) * scale
        store(dz, top + n, select(load(tile, there, 0) > 0.0, gradient, 0.0))


@njit(nogil=True, error_model="numpy")
def _weigh(tile, outputs, weighted, factors, step, block, top, t, dz, there):
    """Multiplies gradients by the weights of their targets, and by the factors of the step if it has some."""
    for n in range(outputs):
        gradient = load(tile, dz, top + n)
        if weighted:
            gradient = gradient * load(tile, t, outputs + n)
        if len(factors):
            own = factors[step]
            factor = fill(tile, own, own[0]) if len(own) == 1 else load_members(tile, own, block)
            gradient = gradient * repeat(tile, factor)
        store(dz, top + n, select(load(tile, there, 0) > 0.0, gradient, 0.0))


@inline
def _output_gradient(tile, loss, beta, output, outputs, scale, top, h, t, dz, partly, there):
    if loss == 3:
        _softmax_gradient(tile, outputs, scale, top, h, t, dz, there)
    if loss == 4:
        _clamped_gradient(tile, output, outputs, beta, scale, top, h, t, dz, there)
    link = 1 if loss == 2 else 0  # logits are compared as what a sigmoid makes of them
    for n in range(0 if loss >= 3 else outputs):
        p = load(tile, h, top + n)
        gradient = activate(link, p) - load(tile, t, n)
        if loss == 0:
            gradient = through(output, gradient, p)
        gradient = gradient * scale
        if partly:
            gradient = select(load(tile, there, 0) > 0.0, gradient, 0.0)
        store(dz, top + n, gradient)


@inline
def _backward(tile, widths, bias, hidden, w, h, dz, g, row, above, partly, there):
    """Adds to the gradients. row, above: the member row behind the last parameter, the tile row of the first output."""
    for l in range(len(widths) - 2, -1, -1):
        inputs, outputs = widths[l], widths[l + 1]
        each = inputs + bias
        row -= outputs * each
        below = above - inputs
        for n in range(outputs):
            own = load(tile, dz, above + n)
            for k in range(inputs):
                add_products(tile, g, row + n * each + k, own, load(tile, h, below + k))
            if bias:
                add_products(tile, g, row + n * each + inputs, own, repeat(tile, fill(tile, g, 1.0)))
        if l > 0:
            for k in range(inputs):
                dy = repeat(tile, fill(tile, w, 0.0))
                for n in range(outputs):
                    weight = repeat(tile, load_members(tile, w, row + n * each + k))
                    dy = muladd(weight, load(tile, dz, above + n), dy)
                gradient = through(hidden, dy, load(tile, h, below + k))
                if partly:
                    gradient = select(load(tile, there, 0) > 0.0, gradient, 0.0)
                store(dz, below + k, gradient)
        above = below


@inline
def _plus_losses(tile, loss, beta, weighted, outputs, share, top, h, t, used, losses, logged):
    """Adds `share` of the losses of the samples to member row `logged`, in fp64."""
    members, lanes = members_of(tile), members_of(tile) * samples_of(tile)
    for lane in range(used * members if loss == 3 else 0):
        value = softmax_loss(h, top * lanes + lane, t, lane, lanes, outputs)
        losses[logged * members + lane % members] += share * value
    for n in range(0 if loss == 3 else outputs):
        for lane in range(used * members):
            value = loss_of(loss, beta, float(h[(top + n) * lanes + lane]), float(t[n * lanes + lane]))
            if weighted:
                value *= t[(outputs + n) * lanes + lane]
            losses[logged * members + lane % members] += share * value


@inline
def loss_of(loss, beta, p, target):
    if loss == 4:
        distance = abs(p - target)
        return distance * distance / (2.0 * beta) if distance < beta else distance - 0.5 * beta
    if loss == 0:
        return (p - target) * (p - target)
    if loss == 1:
        log, log1 = math.log(p), math.log1p(-p)
        log, log1 = -100.0 if log < -100 else log, -100.0 if log1 < -100 else log1
        return -(target * log + (1 - target) * log1)
    return (1 - target) * p + math.log1p(math.exp(-abs(p))) + (0.0 if p > 0 else -p)


@njit(nogil=True, error_model="numpy")
def softmax_loss(h, at, t, to, stride, outputs):
    """The cross entropy of a sample, whose logits and targets begin at h[at] and t[to]."""
    greatest = float(h[at])
    for n in range(1, outputs):
        greatest = max(greatest, float(h[at + n * stride]))
    total = 0.0
    for n in range(outputs):
        total += math.exp(float(h[at + n * stride]) - greatest)
    log, loss = math.log(total), 0.0
    for n in range(outputs):
        loss += float(t[to + n * stride]) * (log - (float(h[at + n * stride]) - greatest))
    return loss


@cached
@njit(nogil=True, error_model="numpy")
def train(tile, blocks, widths, kinds, data, pace, own, memory):
    """Takes `steps` steps, the first being number `start` of the run, of the blocks from blocks[0] to blocks[1].

    widths: int64. kinds: the numbers of what is trained, as `loop` has them. order: int32, samples by their numbers
    from the epoch of step `start` on, or nothing for full batches. memory: to work in, see `loop`.

    A block is the members of one tile. The first dimension of all else counts blocks, or is 1 where all have the same.
    inputs, targets: of each sample, those of all members or, in member rows, of each its own; behind targets that are
    weighted, their weights. rates: for each step, or for all, see `rate_of`. factors: of the losses, for each step or
    none, as rates are. hypers: in rows of ROW, the HYPERPARAMETERS. parameters, firsts, seconds: member rows, and
    what the optimizer keeps for them, padded to rows of ROW. powers: fp64, beta1 and beta2, and both to the power of
    the steps that the state has seen, which are updated; each once, or for each lane of ROW. losses: fp64, member rows
    of zeros, one for each step that is logged.
    """
    hidden, output, loss, optimizer, bias, mean, decays, weighted, flushes, samples, beta, factor, new = kinds
    (inputs, targets), (order, size, start, steps, log_every) = data, pace
    rates, factors, hypers, parameters, firsts, seconds, powers, losses = own
    lanes, outputs = samples_of(tile), widths[-1]
    columns, weighs = outputs * (1 + weighted), bool(weighted or len(factors))
    g, h, dz, t, there = memory
    given = float_mode()
    mode = given | FLUSHING if flushes else given
    set_float_mode(mode)
    for block in range(blocks[0], blocks[1]):
        x, y = inputs[block % len(inputs)], targets[block % len(targets)]
        w, m, v = parameters[block], firsts[block], seconds[block]
        begin, epoch, logged = start % -(-samples // size) * size, 0, 0
        fetched = partly = False
        for step in range(start, start + steps):
            count = min(size, samples - begin)
            share = factor / (count * (1 if loss == 3 else outputs)) if mean else factor
            scale = 2.0 * share if loss == 0 else share
            logs = log_every > 0 and step % log_every == 0
            # The logarithm of a denormal output is a number, and that of 0 is not.
            exact = logs and loss == 1
            # Long before it is needed: rates of many steps and networks come from far away.
            lr = rate_of(rates[(step - start) % len(rates)], block, len(parameters))
            for i in range(len(w) // LANES):
                store(g, i, fill(ROW, g, 0.0))
            for first in range(0, count, lanes):
                used = min(count - first, lanes)
                if not fetched:
                    partly = used < lanes
                    for place in range(lanes):
                        store(there, place, fill(tile, there, 1.0 if place < used else 0.0))
                    _fetch(tile, x, len(x) == samples * widths[0], order, epoch + begin + first, used, h, widths[0])
                    _fetch(tile, y, len(y) == samples * columns, order, epoch + begin + first, used, t, columns)
                    fetched = not len(order) and count <= lanes
                row, top = _forward(tile, widths, bias, hidden, output, w, h, partly, there, exact, given)
                if logs:
                    _plus_losses(tile, loss, beta, weighted, outputs, share, top, h, t, used, losses[block], logged)
                if exact:
                    set_float_mode(mode)
                _output_gradient(tile, loss, beta, output, outputs, scale, top, h, t, dz, partly, there)
                if weighs:
                    _weigh(tile, outputs, weighted, factors, step - start, block, top, t, dz, there)
                _backward(tile, widths, bias, hidden, w, h, dz, g, row, top, partly, there)
            for member in range(members_of(tile) if logs and len(factors) else 0):
                own = block * members_of(tile) + member if factors.shape[1] > 1 else 0
                losses[block, logged * members_of(tile) + member] *= factors[step - start, own]
            logged += logs
            begin += count
            if begin >= samples:
                begin = 0
                epoch += samples if len(order) else 0
            correct(optimizer, powers[block], hypers[block])
            update(optimizer, decays, new and step == start, lr, hypers[block], w, g, m, v)
    set_float_mode(given)
