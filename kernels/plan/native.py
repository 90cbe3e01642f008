# SPDX-License-Identifier: Apache-2.0
"""Compiled loops on a CPU: what they take at a time, what a step of theirs costs, and what it costs to have them."""

from ..records import Device, TrainConfig, TrainPlan
from .chips import cdiv
from .train_gpu import update_kind

# What a vector holds: STACK_ROWS samples of each of NETWORKS networks; FEW_ROWS samples of one, so few because sums
# over what is not there would cost the most; or LANES neurons of one, NEURON_ROWS samples at a time.
LANES = NETWORKS = 16
STACK_ROWS, FEW_ROWS, NEURON_ROWS = 4, 4, 8
TILES = ((NEURON_ROWS, 1), (FEW_ROWS, 1), (STACK_ROWS, NETWORKS))

# Microseconds on one core of a Xeon with AVX-512, fits to 77 shapes from 2-2-1 to 784-512-512-10, of 1 to 8,192
# networks, by four optimizers, most of them good to 25 %. A fit to Zen 4, of fewer terms, had products as dear and
# outputs half as dear again.
# Per tile: for each layer, input, output, and weight (twice where its layer has a gradient to pass on); how many times
# as much more where a tile's numbers are beyond the first cache, and beyond the second. Per number that an update
# reads, and how much more beyond the second cache.
FEW_US = (2e-2, 3.3e-3, 4e-3, 9e-4, 0.24, 0.4, 1.1e-4, 1.2e-4)
STACK_US = (0.0, 7e-3, 1.75e-2, 1.2e-3, 0.72, 3.2, 8.8e-5, 2.9e-4)
# Per layer, per product of a vector of neurons with one number, and how much more where they are beyond the first
# cache; per vector of outputs, and more beyond the second; per vector of parameters, more if their update takes roots,
# and more for each that it has beyond the second cache; and per number that is moved or summed alone.
NEURONS_US = (0.06, 2.3e-4, 6.7e-5, 5e-3, 2.1e-2, 1.55e-3, 3.65e-3, 5.6e-3, 6e-4)
# Bytes; the second is between Zen 4's 1 MB and the Xeon's 2 MB.
FIRST_CACHE, SECOND_CACHE = 48 << 10, 3 << 19
# Per number of a stack that goes back to model and optimizer after a chunk of steps, and comes again: the vectors of
# compiled loops have to be taken apart. And how long `fit` lets a chunk take.
BACK_US, TORCH_BACK_US, CHUNK_US = 3.4e-3, 1.3e-3, 2e5
# Numbers that an optimizer keeps for each parameter.
STATES = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2, "rmsprop": 1, "rmsprop_momentum": 2}

# Seconds until the first step: to import the compiler and read code from disk, or to compile it first.
LOAD_SECONDS = 0.65
COMPILE_SECONDS = 8.0


def native(
    members: int, batch: int, config: TrainConfig, dtype: str, device: Device, fetches: bool = False
) -> tuple[float, TrainPlan]:
    """(microseconds of a step, plan), of impl "torch" where compiled loops cannot do it. fetches: minibatches."""
    if device.kind != "cpu":
        return 0, TrainPlan("torch", f"{device.kind}: compiled loops are for the CPU")
    if dtype not in ("float32", "torch.float64"):
        return 0, TrainPlan("torch", f"{dtype}: compiled loops take float32 and float64")
    few, stack = _block_us(batch, config, FEW_US, FEW_ROWS, 1), _block_us(batch, config, STACK_US, STACK_ROWS, NETWORKS)
    options = (
        (members * _neurons_us(batch, config, fetches), "one network at a time, neurons side by side", NEURON_ROWS, 1),
        (members * few, "one network at a time, samples side by side", FEW_ROWS, 1),
        (cdiv(members, NETWORKS) * stack, "networks side by side", STACK_ROWS, NETWORKS),
    )
    us, reason, rows, networks = min(options)
    us += returns_us(us, members, config, BACK_US)
    return us, TrainPlan("native", f"{reason} in compiled loops", rows, networks)


def returns_us(us: float, members: int, config: TrainConfig, number_us: float) -> float:
    """The share of a step in what a stack's chunk costs besides, if chunks are as long as the first step says."""
    numbers = members * sum(n * (k + config.bias) for k, n in config.layers) * (1 + STATES[update_kind(config)])
    back = number_us * numbers if members > 1 else 0.0
    return back * min(1.0, (us + back) / CHUNK_US)


def beyond(size: float, cache: float) -> float:
    """The share of so many numbers or bytes that a cache does not keep until they are read again."""
    return max(0.0, 1 - cache / size)


def _whole(rows: int) -> int:
    return cdiv(rows, NEURON_ROWS) * NEURON_ROWS


def _neurons_us(batch: int, config: TrainConfig, fetches: bool) -> float:
    layers, kind, vector = config.layers, update_kind(config), 4 * LANES
    products = sum(cdiv(n, LANES) * (_whole(batch) * k + batch * _whole(k)) for k, n in layers)
    products += sum(cdiv(k, LANES) * _whole(batch) * n for k, n in layers[1:])
    outputs = batch * sum(cdiv(n, LANES) for _, n in layers)
    parameters = sum(cdiv(n, LANES) * (k + config.bias) for k, n in layers)
    numbers = parameters * (2 + STATES[kind])  # gradients are one more
    # Weights turned for the layer below, gradients turned back where that leaves less of a vector empty, minibatches
    # copied (inputs where whole tiles of them do not make a sample), and the exponentials of a softmax summed.
    singly = sum(
        n * k * (1 + (_whole(n) * cdiv(k, LANES) < _whole(k + config.bias) * cdiv(n, LANES))) for k, n in layers[1:]
    )
    copied = config.widths[-1] + (config.widths[0] if config.widths[0] % NEURON_ROWS else 0)
    singly += batch * (copied * fetches + 3 * config.widths[-1] * (config.loss == "cross_entropy"))
    counts = (
        len(layers),
        products,
        products * beyond(vector * parameters, FIRST_CACHE),
        outputs,
        outputs * beyond(vector * 2 * outputs, SECOND_CACHE),
        parameters,
        parameters * (kind not in ("sgd", "momentum")),
        numbers * beyond(vector * numbers, SECOND_CACHE),
        singly,
    )
    return sum(price * count for price, count in zip(NEURONS_US, counts, strict=True))


def _block_us(batch: int, config: TrainConfig, prices: tuple[float, ...], rows: int, networks: int) -> float:
    layers, inputs, outputs = config.layers, config.widths[0], sum(config.widths[1:])
    parameters = sum(n * (k + config.bias) for k, n in layers)
    products = parameters + sum(n * k for k, n in layers[1:])
    numbers = networks * parameters * (2 + STATES[update_kind(config)])  # gradients are one more
    *tile, first, second, number, far = prices
    us = sum(price * count for price, count in zip(tile, (len(layers), inputs, outputs, products), strict=True))
    size = 4 * networks * (rows * (inputs + outputs) + 2 * parameters)
    us *= cdiv(batch, rows) * (1 + first * beyond(size, FIRST_CACHE) + second * beyond(size, SECOND_CACHE))
    return us + numbers * (number + far * beyond(4 * numbers, SECOND_CACHE))
