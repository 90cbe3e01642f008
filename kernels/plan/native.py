# SPDX-License-Identifier: Apache-2.0
"""Compiled loops on a CPU: what they take at a time, what a step of theirs costs, and what it costs to have them."""

from ..records import Device, TrainConfig, TrainPlan
from .chips import cdiv

# What a vector holds: STACK_ROWS samples of each of NETWORKS networks; FEW_ROWS samples of one, so few because sums
# over what is not there would cost the most; or LANES neurons of one, NEURON_ROWS samples at a time.
LANES = NETWORKS = 16
STACK_ROWS, FEW_ROWS, NEURON_ROWS = 4, 4, 8
TILES = ((NEURON_ROWS, 1), (FEW_ROWS, 1), (STACK_ROWS, NETWORKS))

# Microseconds on one core of Zen 4, fits to some 30 timings each from 2-2-1 on 4 samples to 784-512-512-10 on 128, good
# to 20 %. Per tile and layer, per tile and neuron, per tile and weight (twice where its layer has a gradient to pass
# on), and per parameter.
FEW_US = (3e-2, 0.0, 1.9e-3, 4e-4)
STACK_US = (2.7e-2, 1.2e-2, 3.5e-3, 2.9e-3)
# Per layer, per product of a vector of neurons with one number, per vector of outputs, and per vector of parameters.
NEURONS_US = (0.19, 3.05e-4, 7.7e-3, 1.25e-3)

# Seconds until the first step: to import the compiler and read code from disk, or to compile it first.
LOAD_SECONDS = 0.65
COMPILE_SECONDS = 8.0


def native(members: int, batch: int, config: TrainConfig, dtype: str, device: Device) -> tuple[float, TrainPlan]:
    """(microseconds of a step, plan), of impl "torch" where compiled loops cannot do it."""
    if device.kind != "cpu":
        return 0, TrainPlan("torch", f"{device.kind}: compiled loops are for the CPU")
    if dtype not in ("float32", "torch.float64"):
        return 0, TrainPlan("torch", f"{dtype}: compiled loops take float32 and float64")
    few, stack = _block_us(cdiv(batch, FEW_ROWS), config, FEW_US), _block_us(cdiv(batch, STACK_ROWS), config, STACK_US)
    options = (
        (members * _neurons_us(batch, config), "one network at a time, neurons side by side", NEURON_ROWS, 1),
        (members * few, "one network at a time, samples side by side", FEW_ROWS, 1),
        (cdiv(members, NETWORKS) * stack, "networks side by side", STACK_ROWS, NETWORKS),
    )
    us, reason, rows, networks = min(options)
    return us, TrainPlan("native", f"{reason} in compiled loops", rows, networks)


def _neurons_us(batch: int, config: TrainConfig) -> float:
    layers = config.layers
    tiles = cdiv(batch, NEURON_ROWS)
    products = sum(
        cdiv(n, LANES) * (tiles * NEURON_ROWS * k + batch * cdiv(k, NEURON_ROWS) * NEURON_ROWS) for k, n in layers
    )
    products += sum(cdiv(k, LANES) * tiles * NEURON_ROWS * n for k, n in layers[1:])
    outputs = batch * sum(cdiv(n, LANES) for _, n in layers)
    parameters = sum(cdiv(n, LANES) * (k + config.bias) for k, n in layers)
    counts = (len(layers), products, outputs, parameters)
    return sum(price * count for price, count in zip(NEURONS_US, counts, strict=True))


def _block_us(tiles: int, config: TrainConfig, prices: tuple[float, ...]) -> float:
    layers = config.layers
    parameters = sum(n * (k + config.bias) for k, n in layers)
    products = parameters + sum(n * k for k, n in layers[1:])
    counts = (tiles * len(layers), tiles * sum(config.widths[1:]), tiles * products, parameters)
    return sum(price * count for price, count in zip(prices, counts, strict=True))
