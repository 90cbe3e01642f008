"""Whole training loops: one launch by lane or by block, replayed graphs, compiled loops on a CPU, or plain torch."""

import functools
import itertools
import math

from ..records import EMPTY, Device, LoopPlan, TrainConfig, TrainPlan
from .chips import cdiv, device_refusal, next_power_of_2
from .native import TILES, native

# The most parameters of a network that one lane trains, by the tensors of state that the optimizer keeps for each.
# Registers would take some more; the compiler's time, which grows faster than the code that is unrolled, would not.
LANE_PARAMETERS = (49, 33, 17)
LANE_UNROLLED = 68  # parameters times samples
LANE_NETWORKS = 32

# The longest network that one program trains without a spill, by its widest layer and by the tensors of state: layers
# of that width, of which one from k to n counts as the geometric mean of the two.
BLOCK_LAYERS = {16: (8, 8, 6), 32: (4, 4, 3), 64: (1.25, 1.25, 1.21)}
BLOCK_ADAM_WEIGHTS = 3072  # padded: a single 64 x 64 layer spills on sm_80 with triton 3.6

# Cycles of one network's step, read off the schedules of the compiled loops: of a lane per parameter and sample, of a
# block per layer and tile of samples. Not yet measured.
LANE_CYCLES = 9
BLOCK_CYCLES = {16: 600, 32: 1300, 64: 2800}


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
    native_refusal: str | None = None,
) -> TrainPlan:
    """The plan for training `members` networks of one config on `samples` samples each.

    batch_size: None for all samples. impl: "lane", "block", "graph" or "native" asks for that one; the plan says
    "torch", and why, where it cannot be had. steps: how many, None for many. native_seconds: until compiled loops with
    each of the TILES could begin. native_refusal: why there are none.
    """
    if impl == "native" or (impl is None and device.kind == "cpu" and not device.triton):
        if native_refusal:
            return TrainPlan("torch", native_refusal)
        return _compiled_loop(members, samples, batch_size, config, dtype, device, impl, steps, native_seconds)
    capturing = device.kind == "cuda" and 0 not in (members, samples, *config.widths)
    if impl == "graph" and not capturing:
        return TrainPlan("torch", f"{device.kind}: only a CUDA device captures graphs")
    plan = _kernel_loop(members, samples, batch_size, config, dtype, device, impl)
    if capturing and impl in (None, "graph") and plan.impl == "torch":
        return TrainPlan("graph", f"{plan.reason}; a step is one replay of a captured graph")
    return plan


def _compiled_loop(members, samples, batch_size, config, dtype, device, impl, steps, native_seconds) -> TrainPlan:
    """Compiled loops, or "torch" and why: where they are too short to wait for them, or too wide to be ahead."""
    if 0 in (members, samples, *config.widths):
        return TrainPlan("torch", EMPTY)
    batch = min(batch_size or samples, samples)
    us, plan = native(members, batch, config, dtype, device)
    if impl == "native" or plan.impl == "torch":
        return plan
    torch_us = loop_us(members, batch, config)
    if us > torch_us:
        return TrainPlan("torch", f"{torch_us:.3g} us a step, and {us:.3g} by compiled loops")
    wait = native_seconds[TILES.index((plan.rows, plan.networks))] if native_seconds else 0.0
    saved = math.inf if steps is None else steps * (torch_us - us) / 1e6
    if saved < wait:
        return TrainPlan("torch", f"compiled loops would save {saved:.2g} s, and begin {wait:.2g} s later")
    return plan


def _kernel_loop(members, samples, batch_size, config, dtype, device, impl) -> TrainPlan:
    """The cheapest kernel for the whole loop, or "torch" and why."""
    refused = None
    if impl == "graph":
        refused = 'impl="graph"'
    elif 0 in (members, samples, *config.widths):
        refused = EMPTY
    elif device.kind == "cpu" and not device.triton:
        refused = "no kernels for the CPU"
    elif dtype != "float32":
        refused = f"{dtype}: whole loops take float32"
    elif reason := device_refusal(1, 1, 1, dtype, device):
        refused = reason
    elif config.optimizer != "sgd" and config.eps < 1e-30:
        refused = f"eps {config.eps}: padded parameters would divide 0 by 0"
    elif impl == "torch":
        refused = 'impl="torch"'
    if refused:
        return TrainPlan("torch", refused)
    batch = min(batch_size or samples, samples)
    options = {"lane": _lane(members, batch, config, device), "block": _block(members, batch, config, device)}
    if impl in options:
        options = {impl: options[impl]}
    plans = [option for option in options.values() if option[1].impl != "torch"]
    if not plans:
        return TrainPlan("torch", "; ".join(plan.reason for _, plan in options.values()))
    return min(plans, key=lambda option: option[0])[1]


def _states(config: TrainConfig) -> int:
    """Tensors of state that the optimizer keeps for each parameter."""
    return 2 if config.optimizer != "sgd" else 1 if config.momentum else 0


def _lane(members: int, batch: int, config: TrainConfig, device: Device) -> tuple[float, TrainPlan]:
    """(cycles of all members' steps, plan), of impl "torch" where lanes cannot do it."""
    parameters = sum(n * (k + config.bias) for k, n in itertools.pairwise(config.widths))
    limit = LANE_PARAMETERS[_states(config)]
    if parameters > limit:
        return 0, TrainPlan("torch", f"{parameters} parameters: a lane holds {limit} with this optimizer")
    # Some warps per scheduler hide each other's latency; beyond that they wait for each other.
    waves = max(1.0, members / (LANE_NETWORKS * 8 * device.units))
    reason = f"{parameters} parameters: one network per lane, in registers for the whole loop"
    # A lane takes four samples at a time, two, or one.
    rows = next((rows for rows in (4, 2) if rows * parameters <= LANE_UNROLLED), 1)
    plan = TrainPlan("lane", reason, rows, LANE_NETWORKS, 1)
    return LANE_CYCLES * parameters * batch * waves, plan


def _block(members: int, batch: int, config: TrainConfig, device: Device) -> tuple[float, TrainPlan]:
    """(cycles of all members' steps, plan), of impl "torch" where blocks cannot do it."""
    padded = [max(next_power_of_2(width), 16) for width in config.widths]
    widest = max(padded)
    if widest not in BLOCK_LAYERS:
        return 0, TrainPlan("torch", f"a width of {max(config.widths)}: blocks take {max(BLOCK_LAYERS)}")
    layers = sum((k * n) ** 0.5 for k, n in itertools.pairwise(padded)) / widest
    heavy = _states(config) == 2 and sum(k * n for k, n in itertools.pairwise(padded)) > BLOCK_ADAM_WEIGHTS
    if heavy or layers > BLOCK_LAYERS[widest][_states(config)]:
        return 0, TrainPlan("torch", f"{'-'.join(map(str, config.widths))} with this optimizer spills in a block")
    # The widest layers leave registers for 16 samples only.
    rows = 16 if batch <= 16 or widest == 64 else 32
    num_warps = 4 if widest == rows == 16 else 8
    waves = max(1.0, members / (12 // num_warps * device.units))
    reason = "one network per program, on chip for the whole loop"
    plan = TrainPlan("block", reason, rows, 1, num_warps)
    return BLOCK_CYCLES[widest] * layers * cdiv(batch, rows) * waves, plan


# Microseconds on one core, read off layouts that were timed against each other: 2-2-1, 2-10-10-10-1, 4-8-1 and others
# to 32-64-5, with 2 to 8,192 members. They decide between two layouts, so only their ratios count.
CALL_US = 1.5  # of torch, whatever it computes
# Of a layer of one network: its calls, per multiply-add of a product, and per output.
LAYER_US, LAYER_MAC_US, OUTPUT_US = 4.7, 3e-5, 8e-4
ARRAY_MAC_US = 2.5e-4  # per multiply-add of an elementwise call over members
SMALL_PRODUCT_MAC_US = 2e-3  # per multiply-add of a stack of products that torch computes itself
SMALL_PRODUCT_MACS = 400  # from here on the BLAS does, at a price per product and another per multiply-add
PRODUCT_US, PRODUCT_MAC_US = 0.25, 4e-5
UPDATE_CALLS = {"sgd": 0, "momentum": 3, "adam": 7, "adamw": 7}  # elementwise, beside the products

# Multiply-adds of the one product of a joint update, those that nobody needs included, to which it costs less than
# several.
JOINT_MACS = 1 << 16
# Below these sizes a second thread waits longer for the first than it works, far longer where cores are shared.
THREADED_MACS = 1 << 21  # of one product
THREADED_US, THREADED_MAC_US = 30, 1.3e-5  # of a product on two threads, and per multiply-add of it
THREADED_ELEMENTS = 1 << 17  # of one elementwise call


@functools.lru_cache(maxsize=1024)
def train_loop(members: int, batch: int, config: TrainConfig, shared: bool) -> LoopPlan:
    """The plan for the plain torch loop on batches of `batch` samples. shared: all members see the same ones."""
    layers = list(itertools.pairwise(config.widths))
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


def loop_us(members: int, batch: int, config: TrainConfig) -> float:
    """About the time of a step of the plain torch loop, if the members see the same samples."""
    layers = list(itertools.pairwise(config.widths))
    macs = [batch * n * k for k, n in layers]
    if members == 1:
        products = [THREADED_US + THREADED_MAC_US * mac if mac >= THREADED_MACS else LAYER_MAC_US * mac for mac in macs]
        outputs = OUTPUT_US * batch * sum(n for _, n in layers)
        return LAYER_US * len(layers) + 2 * sum(products) + sum(products[1:]) + outputs
    first = 3 * CALL_US + 3 * PRODUCT_MAC_US * members * macs[0]
    return first + min(_stack_us(members, batch, config, layers[1:]))


def _stack_us(members: int, batch: int, config: TrainConfig, layers: list[tuple[int, int]]) -> tuple[float, float]:
    """Of arrays and of matrices: what these layers of all members cost in a step. It has three products of one size."""
    update = UPDATE_CALLS["momentum" if config.momentum else config.optimizer]
    arrays = CALL_US * (update + sum(2 + k + n + batch for k, n in layers))
    arrays += members * ARRAY_MAC_US * sum(3 * batch * n * k for k, n in layers)
    matrices = CALL_US * (update * (len(config.widths) - 1) + 5 * len(layers))
    matrices += members * sum(3 * _stacked_product_us(batch * n * k) for k, n in layers)
    return arrays, matrices


def _stacked_product_us(macs: int) -> float:
    return SMALL_PRODUCT_MAC_US * macs if macs < SMALL_PRODUCT_MACS else PRODUCT_US + PRODUCT_MAC_US * macs
