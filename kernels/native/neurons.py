# SPDX-License-Identifier: Apache-2.0
"""Steps of training of one network, compiled: the neurons of a layer lie side by side, several samples at a time.

Where a network has as many neurons as a vector has lanes, this computes each product as a library would, without its
calls. Memory is counted in vectors of one number for each of a tile's members, which are neurons here. A layer of N
neurons has `columns` of them, the last filled up with neurons that nobody reads. A layer's parameters are a row for
each input and one for the bias, filled up to whole tiles of rows. Its outputs, and the gradients there, are a row for
each sample.
"""

from numba import njit

from .cache import cached
from .functions import activate, clamped, exponential, through
from .memory import fill, load_members, members_of, repeat, samples_of, spread, spread_next, store, store_rows
from .mode import FLUSHING, float_mode, set_float_mode
from .optimizers import correct, inline, rate_of, update
from .steps import loss_of, softmax_loss
from .vectors import muladd


@inline
def _columns(tile, neurons):
    return (neurons + members_of(tile) - 1) // members_of(tile)


@inline
def _rows(tile, inputs, bias):
    """Of a layer's parameters."""
    return (inputs + bias + samples_of(tile) - 1) // samples_of(tile) * samples_of(tile)


@njit(nogil=True, error_model="numpy")
def _product(tile, a, places, first, count, inputs, w, at, columns, bias, out, to):
    """Rows of out = a @ w, plus the bias in the row of w behind its inputs.

    Row s of a begins at a[places[first + s]], those of w and out at their vectors `at` and `to`.
    """
    samples = samples_of(tile)
    for s in range(0, count, samples):
        for c in range(columns):
            z = repeat(tile, load_members(tile, w, at + inputs * columns + c) if bias else fill(tile, w, 0.0))
            for i in range(inputs):
                own = repeat(tile, load_members(tile, w, at + i * columns + c))
                z = muladd(spread(tile, a, places, first + s, i), own, z)
            store_rows(tile, out, to + s * columns + c, columns, z)


@njit(nogil=True, error_model="numpy")
def _sums(tile, a, places, first, count, inputs, dz, at, columns, bias, g, to):
    """Rows of g = a.T @ dz and, behind them, the sum of dz. What fills up the last tile of rows is rubbish."""
    samples = samples_of(tile)
    for c in range(columns):
        for i in range(0, inputs, samples):
            total = repeat(tile, fill(tile, g, 0.0))
            for s in range(count):
                own = repeat(tile, load_members(tile, dz, at + s * columns + c))
                total = muladd(spread_next(tile, a, places[first + s] + i), own, total)
            store_rows(tile, g, to + i * columns + c, columns, total)
        if bias:
            total = fill(tile, g, 0.0)
            for s in range(count):
                total = total + load_members(tile, dz, at + s * columns + c)
            store(g, to + inputs * columns + c, total)


@inline
def _forward(tile, widths, bias, hidden, output, count, x, w, h, places, rows, exact, mode):
    """The vectors where, in h, the last outputs begin and, in w, all parameters end. exact: see `steps`."""
    at = to = above = 0
    for l in range(len(widths) - 1):
        inputs, columns = widths[l], _columns(tile, widths[l + 1])
        above = to
        if exact and l + 2 == len(widths):
            set_float_mode(mode)
        if l == 0:
            _product(tile, x, places, 0, count, inputs, w, at, columns, bias, h, to)
        else:
            _product(tile, h, places, l * rows, count, inputs, w, at, columns, bias, h, to)
        kind = hidden if l + 2 < len(widths) else output
        for i in range(count * columns):
            store(h, to + i, activate(kind, load_members(tile, h, to + i)))
        at += _rows(tile, inputs, bias) * columns
        to += rows * columns
    return above, at


@inline
def _backward(tile, widths, bias, hidden, count, x, w, h, dz, g, turned, places, rows, at, above):
    """Writes the gradients. at, above: what `_forward` returns."""
    for l in range(len(widths) - 2, -1, -1):
        inputs, outputs = widths[l], widths[l + 1]
        columns = _columns(tile, outputs)
        at -= _rows(tile, inputs, bias) * columns
        if l == 0:
            _sums(tile, x, places, 0, count, inputs, dz, above, columns, bias, g, at)
        else:
            wide = _columns(tile, inputs)
            below = above - rows * wide
            if _rows(tile, outputs, 0) * wide < _rows(tile, inputs, 0) * columns:
                # Of few neurons most of a vector would be filling: the sums with inputs side by side, then turned.
                _sums(tile, dz, places, (l + 1) * rows, count, outputs, h, below, wide, 0, turned, 0)
                for n in range(outputs):
                    for k in range(inputs):
                        g[(at + k * columns) * members_of(tile) + n] = turned[n * wide * members_of(tile) + k]
                _sums(tile, h, places, l * rows, count, 0, dz, above, columns, bias, g, at + inputs * columns)
            else:
                _sums(tile, h, places, l * rows, count, inputs, dz, above, columns, bias, g, at)
            for n in range(outputs):
                for k in range(inputs):
                    turned[n * wide * members_of(tile) + k] = w[(at + k * columns) * members_of(tile) + n]
            _product(tile, dz, places, (l + 1) * rows, count, outputs, turned, 0, wide, 0, dz, below)
            for i in range(count * wide):
                store(
                    dz, below + i, through(hidden, load_members(tile, dz, below + i), load_members(tile, h, below + i))
                )
            above = below


@njit(nogil=True, error_model="numpy")
def _softmax_gradient(tile, neurons, scale, row, target, h, t, dz):
    """The gradient of the cross entropy of a sample, whose outputs and targets begin at vectors of h and of t."""
    members, columns = members_of(tile), _columns(tile, neurons)
    greatest, total, targets = h[row * members], 0.0, 0.0
    for n in range(1, neurons):
        greatest = max(greatest, h[row * members + n])
    for c in range(columns):
        store(dz, row + c, exponential(load_members(tile, h, row + c) - fill(tile, h, greatest)))
    for n in range(neurons):
        total += float(dz[row * members + n])
        targets += float(t[target * members + n])
    for c in range(columns):
        softmax = load_members(tile, dz, row + c) * fill(tile, h, targets / total)
        store(dz, row + c, (softmax - load_members(tile, t, target + c)) * fill(tile, h, scale))


@cached
@njit(nogil=True, error_model="numpy")
def train(tile, blocks, widths, kinds, data, pace, own, memory):
    """As `steps.train`, where a block is one network and a tile's members are its neurons.

    Inputs are read a whole tile of numbers at a time. Where a sample's are none, each batch is copied with filling.
    """
    hidden, output, loss, optimizer, bias, mean, decays, weighted, flushes, samples, beta, factor, new = kinds
    (inputs, targets), (order, size, start, steps, log_every) = data, pace
    rates, factors, hypers, parameters, firsts, seconds, powers, losses = own
    g, h, dz, turned, near, t, places = memory
    rows, features, neurons = len(places) // len(widths), widths[0], widths[-1]
    columns, stride = _columns(tile, neurons), _rows(tile, features, 0)
    to = 0
    for l in range(1, len(widths)):
        wide = _columns(tile, widths[l])
        for s in range(rows):
            places[l * rows + s] = (to + s * wide) * members_of(tile)
        to += rows * wide
    given = float_mode()
    mode = given | FLUSHING if flushes else given
    set_float_mode(mode)
    for block in range(blocks[0], blocks[1]):
        x, y = inputs[block % len(inputs)], targets[block % len(targets)]
        w, m, v = parameters[block], firsts[block], seconds[block]
        source = x if stride == features else near
        begin, epoch, logged, fetched = start % -(-samples // size) * size, 0, 0, False
        for step in range(start, start + steps):
            count = min(size, samples - begin)
            share = factor / (count * (1 if loss == 3 else neurons)) if mean else factor
            if len(factors):
                share *= factors[step - start, block if factors.shape[1] > 1 else 0]
            scale = 2.0 * share if loss == 0 else share
            if not fetched:
                for s in range(_rows(tile, count, 0)):
                    # Rows without a sample are computed like the last one, and read by nobody.
                    i = epoch + begin + min(s, count - 1)
                    sample = order[i] if len(order) else i
                    places[s] = sample * features if stride == features else s * stride
                    for k in range(0 if stride == features else features):
                        near[s * stride + k] = x[sample * features + k]
                    for half in range(1 + weighted):
                        for n in range(neurons):
                            i = (half * rows + s) * columns * members_of(tile) + n
                            t[i] = y[(sample * (1 + weighted) + half) * neurons + n]
                fetched = not len(order)
            logs = log_every > 0 and step % log_every == 0
            exact = logs and loss == 1  # see `steps.train`
            above, at = _forward(tile, widths, bias, hidden, output, count, source, w, h, places, rows, exact, given)
            if logs:
                total = 0.0
                for s in range(count):
                    p, target = (above + s * columns) * members_of(tile), s * columns * members_of(tile)
                    if loss == 3:
                        total += softmax_loss(h, p, t, target, 1, neurons)
                    for n in range(0 if loss == 3 else neurons):
                        value = loss_of(loss, beta, float(h[p + n]), float(t[target + n]))
                        total += value * t[rows * columns * members_of(tile) + target + n] if weighted else value
                losses[block, logged] += share * total
                logged += 1
            if exact:
                set_float_mode(mode)
            for s in range(count if loss == 3 else 0):
                _softmax_gradient(tile, neurons, scale, above + s * columns, s * columns, h, t, dz)
            link = 1 if loss == 2 else 0
            for s in range(0 if loss == 3 else count):
                for c in range(columns):
                    p = load_members(tile, h, above + s * columns + c)
                    gradient = activate(link, p) - load_members(tile, t, s * columns + c)
                    if loss == 4:
                        gradient = clamped(gradient, beta)
                    if loss == 0 or loss == 4:
                        gradient = through(output, gradient, p)
                    store(dz, above + s * columns + c, gradient * fill(tile, w, scale))
            for i in range(count * columns if weighted else 0):
                weight = load_members(tile, t, rows * columns + i)
                store(dz, above + i, load_members(tile, dz, above + i) * weight)
            _backward(tile, widths, bias, hidden, count, source, w, h, dz, g, turned, places, rows, at, above)
            begin += count
            if begin >= samples:
                begin = 0
                epoch += samples if len(order) else 0
            correct(optimizer, powers[block], hypers[block])
            lr = rate_of(rates[(step - start) % len(rates)], block, len(parameters))
            update(optimizer, decays, new and step == start, lr, hypers[block], w, g, m, v)
    set_float_mode(given)
