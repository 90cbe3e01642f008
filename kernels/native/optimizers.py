# SPDX-License-Identifier: Apache-2.0
"""Optimizers, compiled: the update of parameters, sixteen at a time, by the numbers of a step.

An update takes a row of numbers, one of each member of a block of LANES networks, or sixteen of one network.
"""

import math
from collections.abc import Callable
from typing import Any, cast

from numba import njit

from .memory import fill, load, store
from .vectors import Tile, muladd, sqrt

OPTIMIZERS = ("plain", "momentum", "nesterov", "adam", "adamw", "rmsprop", "rmsprop_momentum")
# Rows of what a step reads. 1 - dampening and others are rounded as a whole: 1 - 0.999 has no digits to lose. The last
# two are Adam's corrections, of the rate and of eps, which `correct` writes; to RMSprop they are 1.
HYPERPARAMETERS = ("weight_decay", "momentum", "undamped", "new1", "beta2", "new2", "eps", "factor", "root")
# Part of the function that calls it already in numba's own form: compiled once, and not alone first.
inline = cast("Callable[[Callable], Callable[..., Any]]", njit(inline="always"))
NEGLIGIBLE = 1e-30  # a power of beta1 or beta2 that has become so small would be slow to multiply, and is 0 next
LANES = 16  # of an update
ROW = Tile(1, LANES)  # what an update takes at a time: a number of each member, or sixteen of one network


@inline
def rate_of(rates, block, blocks):
    """What `update` takes of a step's rates, which are one for all, one for each block, or LANES for each block."""
    if len(rates) == LANES * blocks:
        return load(ROW, rates, block)
    return fill(ROW, rates, rates[block if len(rates) == blocks else 0])


@inline
def correct(optimizer, powers, hyper):
    """Adam's corrections, (factor, root) of `update`, for the next step that the state sees."""
    if 3 <= optimizer < 5:
        betas = len(powers) // 4  # one of each for all lanes, or for each
        for i in range(betas):
            power1, power2 = powers[2 * betas + i], powers[3 * betas + i]
            power1 = power1 * powers[i] if power1 > NEGLIGIBLE else 0.0
            power2 = power2 * powers[betas + i] if power2 > NEGLIGIBLE else 0.0
            powers[2 * betas + i], powers[3 * betas + i] = power1, power2
            root = math.sqrt(1 - power2)
            if betas == 1:
                store(hyper, 7, fill(ROW, hyper, root / (1 - power1)))
                store(hyper, 8, fill(ROW, hyper, root))
            else:
                hyper[7 * LANES + i], hyper[8 * LANES + i] = root / (1 - power1), root


@inline
def update(optimizer, decays, new, lr, hyper, w, g, m, v):
    """new: the state has seen no step."""
    decay, momentum, undamped = load(ROW, hyper, 0), load(ROW, hyper, 1), load(ROW, hyper, 2)
    new1, beta2, new2 = load(ROW, hyper, 3), load(ROW, hyper, 4), load(ROW, hyper, 5)
    floor = load(ROW, hyper, 6) * load(ROW, hyper, 8)
    rate, keep = lr * load(ROW, hyper, 7), 1.0 - lr * decay
    for i in range(len(w) // LANES):
        parameter, gradient = load(ROW, w, i), load(ROW, g, i)
        if decays and optimizer == 4:
            parameter = parameter * keep
        elif decays:
            gradient = muladd(parameter, decay, gradient)
        if optimizer == 0:
            parameter = parameter - lr * gradient
        elif optimizer < 3:
            average = gradient if new else muladd(momentum, load(ROW, m, i), undamped * gradient)
            store(m, i, average)
            step = muladd(momentum, average, gradient) if optimizer == 2 else average
            parameter = parameter - lr * step
        elif optimizer >= 5:
            square = muladd(beta2, load(ROW, m, i), new2 * gradient * gradient)
            store(m, i, square)
            step = gradient / (sqrt(square) + floor)
            if optimizer == 6:
                step = muladd(momentum, load(ROW, v, i), step)
                store(v, i, step)
            parameter = parameter - lr * step
        else:
            average = load(ROW, m, i)
            average = muladd(gradient - average, new1, average)
            square = muladd(beta2, load(ROW, v, i), new2 * gradient * gradient)  # as torch: a square alone may be inf
            store(m, i, average)
            store(v, i, square)
            parameter = parameter - rate * (average / (sqrt(square) + floor))
        store(w, i, parameter)
