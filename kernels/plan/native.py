"""Compiled loops on a CPU: what they take at a time, what a step of theirs costs, and what it costs to have them."""

import itertools

from ..records import Device, TrainConfig, TrainPlan
from .chips import cdiv

# Samples and networks of a vector. One network has few samples in each vector where its batch is small, for sums over
# what is not there would cost the most.
NETWORKS = 16
STACK_ROWS = 4
FEW_ROWS, NEURON_ROWS = 4, 8
TILES = ((NEURON_ROWS, 1), (FEW_ROWS, 1), (STACK_ROWS, NETWORKS))

# Microseconds on one core of Zen 4, a fit to 30 timings from 2-2-1 on 4 samples to 64 networks 32-64-5 on 256, good to
# 20 %: per tile and layer, per tile and neuron, per tile and weight (twice where its layer has a gradient to pass on),
# and per parameter. They are compared with those of the plain torch loop in `train.py`.
ALONE_US = (3e-2, 0.0, 1.9e-3, 4e-4)
STACK_US = (2.7e-2, 1.2e-2, 3.5e-3, 2.9e-3)

# Seconds until the first step: to import the compiler and read code from disk, or to compile it first. Twice those
# measured, because a run that waits in vain is worse than one that goes on as it is.
LOAD_SECONDS = 1.2
COMPILE_SECONDS = 8.0


def native(members: int, batch: int, config: TrainConfig, dtype: str, device: Device) -> tuple[float, TrainPlan]:
    """(microseconds of a step, plan), of impl "torch" where compiled loops cannot do it."""
    if device.kind != "cpu":
        return 0, TrainPlan("torch", f"{device.kind}: compiled loops are for the CPU")
    if dtype not in ("float32", "torch.float64"):
        return 0, TrainPlan("torch", f"{dtype}: compiled loops take float32 and float64")
    alone = FEW_ROWS if batch <= FEW_ROWS else ALONE_ROWS
    plans = {
        "one network at a time, samples side by side in compiled loops": (alone, 1, ALONE_US),
        "networks side by side in compiled loops": (STACK_ROWS, NETWORKS, STACK_US),
    }
    options = []
    for reason, (rows, networks, prices) in plans.items():
        us = cdiv(members, networks) * _block_us(cdiv(batch, rows), config, prices)
        options.append((us, TrainPlan("native", reason, rows, networks)))
    return min(options, key=lambda option: option[0])


def _block_us(tiles: int, config: TrainConfig, prices: tuple[float, ...]) -> float:
    layers = list(itertools.pairwise(config.widths))
    parameters = sum(n * (k + config.bias) for k, n in layers)
    products = parameters + sum(n * k for k, n in layers[1:])
    counts = (tiles * len(layers), tiles * sum(config.widths[1:]), tiles * products, parameters)
    return sum(price * count for price, count in zip(prices, counts, strict=True))
