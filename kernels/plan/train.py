# SPDX-License-Identifier: Apache-2.0
"""Whole training loops: one launch by lane or by block, replayed graphs, compiled loops on a CPU, or plain torch."""

import dataclasses
import functools
import math

from ..records import EMPTY, Device, LoopPlan, TrainConfig, TrainPlan
from .chips import cdiv, device_refusal
from .native import TILES, TORCH_BACK_US, beyond, native, returns_us
from .train_gpu import block, graph, lane, ordinary, update_kind


@functools.lru_cache(maxsize=4096)
def train(
    members: int,
    samples: int,
    batch_size: int | None,
    config: TrainConfig,
    dtype: str,
    device: Device,
    impl: str | None = None,
    steps: int | None = None,
    native_seconds: tuple[float, ...] = (),
    missed: float = 0.0,
    native_refusal: str | None = None,
) -> TrainPlan:
    """The plan for training `members` networks of one config on `samples` samples each.

    batch_size: None for all samples. impl: "lane", "block", "graph" or "native" asks for that one; the plan says
    "torch", and why, where it cannot be had. steps: how many, None for many. native_seconds: until compiled loops with
    each of the TILES could begin. missed: seconds that they would have saved other runs. native_refusal: why there are
    none.
    """
    if impl == "native" or (impl is None and device.kind == "cpu" and not device.triton):
        if native_refusal:
            return TrainPlan("torch", native_refusal)
        waits = native_seconds, missed
        return _compiled_loop(members, samples, batch_size, config, dtype, device, impl, steps, *waits)
    capturing = device.kind == "cuda" and 0 not in (members, samples, *config.widths)
    if impl == "graph" and not capturing:
        return TrainPlan("torch", f"{device.kind}: only a CUDA device captures graphs")
    refused = None if impl == "torch" else _kernel_refusal(members, samples, config, dtype, device)
    if impl == "torch" or (refused and (impl in ("lane", "block") or not capturing)):
        return TrainPlan("torch", refused or 'impl="torch"')
    options = _gpu_options(members, samples, batch_size, config, dtype, device, refused)
    if impl is not None:
        return options[impl][1]
    possible = [option for option in options.values() if option[1].impl != "torch"]
    if not possible:
        return TrainPlan("torch", "; ".join(plan.reason for _, plan in options.values()))
    _, plan = min(possible, key=lambda option: option[0])
    if not capturing:
        return plan
    prices = train_prices(members, samples, batch_size, config, dtype, device)
    told = ", ".join(f"{name} {us:.3g}" for name, us in prices.items())
    return dataclasses.replace(plan, reason=f"{plan.reason}; us a step, uncalibrated: {told}")


def train_prices(
    members: int, samples: int, batch_size: int | None, config: TrainConfig, dtype: str, device: Device
) -> dict[str, float]:
    """Microseconds of a step on a GPU by each way there is, and by the ordinary loop; no GPU has confirmed them."""
    refused = _kernel_refusal(members, samples, config, dtype, device)
    options = _gpu_options(members, samples, batch_size, config, dtype, device, refused)
    prices = {name: us for name, (us, plan) in options.items() if plan.impl != "torch"}
    batch = min(batch_size or samples, samples)
    prices["ordinary loop"] = ordinary(members, batch, batch_size is None, config, _bytes(dtype), device)
    return prices


def _compiled_loop(
    members, samples, batch_size, config, dtype, device, impl, steps, native_seconds, missed
) -> TrainPlan:
    """Compiled loops, or "torch" and why: where they are too short to wait for them, or too wide to be ahead."""
    if 0 in (members, samples, *config.widths):
        return TrainPlan("torch", EMPTY)
    batch = min(batch_size or samples, samples)
    us, plan = native(members, batch, config, dtype, device, batch < samples)
    if impl == "native" or plan.impl == "torch":
        return plan
    torch_us = loop_us(members, batch, config, batch < samples, device.vendor)
    if us > torch_us:
        return TrainPlan("torch", f"{torch_us:.3g} us a step, and {us:.3g} by compiled loops")
    wait = native_seconds[TILES.index((plan.rows, plan.networks))] if native_seconds else 0.0
    saved = math.inf if steps is None else steps * (torch_us - us) / 1e6
    if saved + missed < wait:
        reason = f"compiled loops would save {saved:.2g} s, and begin {wait:.2g} s later"
        return TrainPlan("torch", reason, missed=saved)
    return plan


def _kernel_refusal(members, samples, config, dtype, device) -> str | None:
    """Why no kernel can be the whole loop, or None."""
    if 0 in (members, samples, *config.widths):
        return EMPTY
    if device.kind == "cpu" and not device.triton:
        return "no kernels for the CPU"
    if dtype != "float32":
        return f"{dtype}: whole loops take float32"
    if reason := device_refusal(1, 1, 1, dtype, device):
        return reason
    if config.optimizer != "sgd" and config.eps < 1e-30:
        return f"eps {config.eps}: padded parameters would divide 0 by 0"
    return None


def _gpu_options(members, samples, batch_size, config, dtype, device, refused) -> dict[str, tuple[float, TrainPlan]]:
    """(microseconds of a step, plan) of each way, the plan of impl "torch" with the reason where it cannot be had."""
    batch = min(batch_size or samples, samples)
    options: dict[str, tuple[float, TrainPlan]] = {}
    if not refused:
        options = {"lane": lane(members, batch, config, device), "block": block(members, batch, config, device)}
    if device.kind == "cuda":
        us, _ = graph(members, batch, batch_size is None, config, _bytes(dtype), device)
        reasons = [plan.reason for _, plan in options.values() if plan.impl == "torch"]
        reasons = [refused] if refused else reasons if len(reasons) == len(options) else []
        reason = "; ".join([*reasons, "a step is one replay of a captured graph"])
        options["graph"] = us, TrainPlan("graph", reason)
    return options


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 8


# Microseconds on one core, read off layouts that were timed against each other: 2-2-1, 2-10-10-10-1, 4-8-1 and others
# to 32-64-5, with 2 to 8,192 members. They decide between two layouts, so only their ratios count.
CALL_US = 1.5  # of torch, whatever it computes
ARRAY_MAC_US = 2.5e-4  # per multiply-add of an elementwise call over members
SMALL_PRODUCT_MAC_US = 2e-3  # per multiply-add of a stack of products that torch computes itself
SMALL_PRODUCT_MACS = 400  # from here on the BLAS does, at a price per product and another per multiply-add
PRODUCT_US, PRODUCT_MAC_US = 0.25, 4e-5
# Elementwise, beside the products.
UPDATE_CALLS = {"sgd": 0, "momentum": 3, "adam": 7, "adamw": 7, "rmsprop": 5, "rmsprop_momentum": 7}
FETCH_CALLS = 12  # of a minibatch, in calls

# What decides between torch and compiled loops, on the core and by the shapes of `native.py`; of one network between
# the times on one thread and on two.
LAYER_US, OUTPUT_US = 3.7, 7.5e-4  # of a layer of one network: its calls, and per output
# Per multiply-add of a large product in vectors of 512 bits, which Intel's CPUs are taken to have; and in shorter ones,
# of 256 bits, that MKL uses on AMD, timed on Zen 4.
MAC_US, SHORT_MAC_US = 1.3e-5, 3e-5
# Likewise in a stack, of which compiled loops make use of several threads too, and how much more an output is beyond
# the cache.
STACK_MAC_US, STACK_OUTPUT_US, FAR_OUTPUT_US = 1.65e-5, 3e-4, 1.3e-3
SOFTMAX_US = 2e-3  # more per output of the last layer for a cross entropy
FETCH_US = 6e-4  # per number of a minibatch, and per target that a member reads where it lies
CACHED_NUMBERS, OUT_OF_CACHE = 1 << 19, 2  # from where on elementwise calls over members wait for memory, and how long
# Per number that products and updates read or write, and how much more beyond the cache.
NUMBER_US, FAR_NUMBER_US = 4.5e-5, 1.3e-4
# For each parameter a step keeps so many numbers, itself included, and reads or writes so many; a root counts for
# several.
KEPT = {"sgd": 1, "momentum": 2, "adam": 4, "adamw": 4, "rmsprop": 4, "rmsprop_momentum": 5}
TOUCHED = {"sgd": 4, "momentum": 7, "adam": 25, "adamw": 25, "rmsprop": 25, "rmsprop_momentum": 29}
FUSED_CALLS, FUSED_TOUCHED = 2, 12  # of Adam's step of one network, in which torch does all of it in one pass

# Multiply-adds of the one product of a joint update, those that nobody needs included, to which it costs less than
# several.
JOINT_MACS = 1 << 16
# Below these sizes a second thread waits longer for the first than it works, far longer where cores are shared.
THREADED_MACS = 1 << 21  # of one product
THREADED_US = 30  # of a product on two threads, which halve the rest
THREADED_UPDATE = 0.65  # of what an update costs beside such products, be it on one thread or on two
THREADED_ELEMENTS = 1 << 17  # of one elementwise call


@functools.lru_cache(maxsize=1024)
def train_loop(members: int, batch: int, config: TrainConfig, shared: bool, kind: str = "cpu") -> LoopPlan:
    """The plan for the plain torch loop on batches of `batch` samples. shared: all members see the same ones. kind: of
    device.
    """
    if kind == "cuda":
        us, layout = graph(members, batch, True, config, 4, Device("cuda", 90), shared)
        return LoopPlan(layout, False, f"{us:.3g} us a step in a captured graph, uncalibrated")
    layers = config.layers
    macs = [batch * n * k for k, n in layers]
    together = members * macs[0] if shared else 0  # the first layers of all members are one product
    one_thread = max(together, *macs) < THREADED_MACS and members * batch * max(config.widths[1:]) < THREADED_ELEMENTS
    if members == 1:
        joint = batch * sum(n for _, n in layers) * sum(k + 1 for k, _ in layers)
        if joint <= JOINT_MACS:
            return LoopPlan("joint", one_thread, "one small network: a product for all updates")
        return LoopPlan("matrices", one_thread, "one network: a product for each layer")
    arrays, matrices = _stack_us(members, batch, config, layers[1:] if shared else layers)
    if arrays < matrices:
        return LoopPlan("arrays", one_thread, "many members, whose products cost more one by one than their elements")
    return LoopPlan("matrices", one_thread, "few members or wide layers: stacks of products")


def loop_us(members: int, batch: int, config: TrainConfig, fetches: bool, vendor: str = "") -> float:
    """About the time of a step of the plain torch loop, if the members see the same samples. fetches: minibatches.
    vendor: of the CPU.
    """
    layers, kind = config.layers, update_kind(config)
    fused = members == 1 and kind in ("adam", "adamw")
    mac_us, lanes = (MAC_US, 16) if vendor.startswith("Intel") else (SHORT_MAC_US, 8)
    # A BLAS fills its vectors with samples, and those of dweight with inputs.
    rows = cdiv(batch, lanes) * lanes
    forward, dweight = [rows * n * k for k, n in layers], [batch * n * cdiv(k, lanes) * lanes for k, n in layers]
    parameters = members * sum((k + config.bias) * n for k, n in layers)
    far = FAR_NUMBER_US * beyond(KEPT[kind] * parameters, CACHED_NUMBERS)
    us = (NUMBER_US + far) * parameters * (FUSED_TOUCHED if fused else TOUCHED[kind])
    data = fetches * (CALL_US * FETCH_CALLS + FETCH_US * batch * (config.widths[0] + members * config.widths[-1]))
    data += SOFTMAX_US * members * batch * config.widths[-1] * (config.loss == "cross_entropy")
    outputs = members * batch * sum(n for _, n in layers)
    if members == 1:
        us *= THREADED_UPDATE if batch * max(n * k for k, n in layers) >= THREADED_MACS else 1
        products = [min(mac_us * mac, THREADED_US + mac_us * mac / 2) for mac in (*forward, *forward[1:], *dweight)]
        calls = CALL_US * (FUSED_CALLS if fused else UPDATE_CALLS[kind]) + LAYER_US * len(layers)
        return us + data + calls + sum(products) + OUTPUT_US * outputs
    # The first layers of all members are one product, and have no gradient to pass on.
    us += data + 3 * CALL_US + mac_us * members * (forward[0] + dweight[0])
    # Beside the outputs there are their gradients and targets.
    us += (STACK_OUTPUT_US + FAR_OUTPUT_US * beyond(3 * outputs, CACHED_NUMBERS)) * outputs
    arrays, matrices = _stack_us(members, batch, config, layers[1:], STACK_MAC_US * mac_us / MAC_US * rows / batch)
    numbers = parameters + 2 * members * batch * sum(config.widths)
    us += min(arrays * (OUT_OF_CACHE if numbers > CACHED_NUMBERS else 1), matrices)
    return us + returns_us(us, members, config, TORCH_BACK_US)


def _stack_us(
    members: int, batch: int, config: TrainConfig, layers: list[tuple[int, int]], mac_us: float = PRODUCT_MAC_US
) -> tuple[float, float]:
    """Of arrays and of matrices: what these layers of all members cost in a step. It has three products of one size."""
    update = UPDATE_CALLS[update_kind(config)]
    arrays = CALL_US * (update + sum(2 + k + n + batch for k, n in layers))
    arrays += members * ARRAY_MAC_US * sum(3 * batch * n * k for k, n in layers)
    matrices = CALL_US * (update * (len(config.widths) - 1) + 5 * len(layers))
    matrices += members * sum(3 * _stacked_product_us(batch * n * k, mac_us) for k, n in layers)
    return arrays, matrices


def _stacked_product_us(macs: int, mac_us: float) -> float:
    return SMALL_PRODUCT_MAC_US * macs if macs < SMALL_PRODUCT_MACS else PRODUCT_US + mac_us * macs
