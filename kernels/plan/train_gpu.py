# SPDX-License-Identifier: Apache-2.0
"""Whole training loops on a GPU: what a step costs by each of the ways there are, in microseconds.

No GPU has confirmed these prices. They decide between ways whose prices differ by factors.
"""

import itertools
from dataclasses import dataclass

from ..peaks import peaks_of
from ..records import Device, TrainConfig, TrainPlan
from .chips import cdiv, next_power_of_2

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
# block per layer and tile of samples. In benches/bench_training.py "xor" by `fit` would set the first, "xor-deep" and
# "forum" the others.
LANE_CYCLES = 9
BLOCK_CYCLES = {16: 600, 32: 1300, 64: 2800}

# Of the block's form with several programs: a launch on the host, "forum" by impl="block" would set it; cycles from its
# start to its end beside the tiles, and per slot, a minimum and per number. Larger batches would set those.
LAUNCH_US, STEP_CYCLES, SLOT_CYCLES, SLOT_NUMBER_CYCLES = 6.3, 3000, 50, 0.065

# Of a small kernel in a captured graph and in a stream, as published for an H100, and of a small product beyond that.
# "xor-deep" and "forum" by impl="graph" and by the eager loop would set them.
NODE_US, KERNEL_US, PRODUCT_US = 1.3, 2.1, 2.5
STACKED_US = 1e-3  # of each small product in a stack; "xor-16384" by impl="graph" would set it
# On the host: of a replay, of a torch call without autograd, and of one in an ordinary loop, its share of autograd and
# of the optimizer included. "xor" by impl="graph", the same in minibatches, and "xor" by the eager loop would set them.
REPLAY_US, CALL_US, ORDINARY_CALL_US = 8.0, 5.0, 7.0

# Elementwise calls over all parameters: of torch's own optimizers, and of those in `loop/` before the descent.
ORDINARY_UPDATE = {"sgd": 1, "momentum": 3, "adam": 8, "adamw": 8, "rmsprop": 5, "rmsprop_momentum": 7}
UPDATE = {"momentum": 2, "adam": 7, "adamw": 7, "rmsprop": 4, "rmsprop_momentum": 6}


def lane(members: int, batch: int, config: TrainConfig, device: Device) -> tuple[float, TrainPlan]:
    """(microseconds of a step of all members, plan), of impl "torch" where lanes cannot do it."""
    parameters = _parameters(config)
    limit = LANE_PARAMETERS[_states(config)]
    if parameters > limit:
        return 0, TrainPlan("torch", f"{parameters} parameters: a lane holds {limit} with this optimizer")
    # Some warps per scheduler hide each other's latency; beyond that they wait for each other.
    waves = max(1.0, members / (LANE_NETWORKS * 8 * device.units))
    reason = f"{parameters} parameters: one network per lane, in registers for the whole loop"
    # A lane takes four samples at a time, two, or one.
    rows = next((rows for rows in (4, 2) if rows * parameters <= LANE_UNROLLED), 1)
    clock = 1e-6 * peaks_of(device).clock
    return LANE_CYCLES * parameters * batch * waves / clock, TrainPlan("lane", reason, rows, LANE_NETWORKS, 1)


def block(members: int, batch: int, config: TrainConfig, device: Device) -> tuple[float, TrainPlan]:
    """(microseconds of a step of all members, plan), of impl "torch" where blocks cannot do it."""
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
    resident = 12 // num_warps * device.units
    reason = "one network per program, on chip for the whole loop"
    clock = 1e-6 * peaks_of(device).clock
    tile, tiles = BLOCK_CYCLES[widest] * layers, cdiv(batch, rows)
    options = [(tile * tiles * max(1.0, members / resident) / clock, 1)]
    if device.kind == "cuda":
        numbers = sum(n * (k + config.bias) for k, n in itertools.pairwise(padded))
        slot = max(SLOT_CYCLES, SLOT_NUMBER_CYCLES * numbers)
        for programs in sorted(
            {2**i for i in range(1, min(tiles, resident).bit_length())} | {min(tiles, device.units)}
        ):
            waves = max(1.0, members * programs / resident)
            cycles = STEP_CYCLES + (tile * cdiv(tiles, programs) + slot * programs) * waves
            options.append((max(LAUNCH_US, KERNEL_US + cycles / clock), programs))
    us, programs = min(options)
    if programs > 1:
        reason = f"{programs} programs per network, each with a part of the batch, and one launch per step"
    return us, TrainPlan("block", reason, rows, 1, num_warps, programs)


@dataclass
class Work:
    """What a step asks of the device."""

    calls: int = 0  # elementwise
    products: int = 0
    numbers: int = 0  # read and written
    macs: int = 0
    stacked: int = 0  # products inside those that are stacks

    def call(self, numbers: int, count: int = 1) -> None:
        self.calls, self.numbers = self.calls + count, self.numbers + count * numbers

    def product(self, m: int, k: int, n: int, stack: int = 1) -> None:
        self.products, self.macs = self.products + 1, self.macs + stack * m * k * n
        self.numbers += stack * (m * k + k * n + m * n)
        self.stacked += stack if stack > 1 else 0

    def us(self, size: int, device: Device, kernel_us: float = NODE_US) -> float:
        """size: bytes of a number."""
        peaks = peaks_of(device)
        kernels = kernel_us * (self.calls + self.products) + PRODUCT_US * self.products + STACKED_US * self.stacked
        return kernels + 1e6 * (size * self.numbers / peaks.bandwidth + 2 * self.macs / peaks.ieee)


def matrices(members: int, batch: int, config: TrainConfig, shared: bool, joint: bool = False) -> Work:
    """A captured step where layers are matrices, or stacks of them. shared: all members see the same samples."""
    work, layers = Work(), config.layers
    stacked, bias = members > 1, int(config.bias)
    stacks = [1 if shared and l == 0 else members for l in range(len(layers))]
    for l, (stack, (k, n)) in enumerate(zip(stacks, layers, strict=True)):
        work.product(members // stack * n, k + bias, batch, stack)
        last = l == len(layers) - 1
        if (config.output if last else config.hidden) != "identity" or (stacked and not last):
            work.call(2 * members * batch * n)
    _from_loss(work, members, batch, config)
    for k, n in layers[1:]:
        work.product(k, n, batch, members)
        if config.hidden != "identity":
            work.call(3 * members * batch * k)
    if joint:
        work.product(sum(n for _, n in layers), batch, sum(k + bias for k, _ in layers))
    else:
        for stack, (k, n) in zip(stacks, layers, strict=True):
            work.product(members // stack * n, batch, k + bias, stack)
    # A joint matrix is updated as a whole, with what is off its diagonal.
    whole = sum(n for _, n in layers) * sum(k + bias for k, _ in layers)
    _update(work, whole if joint else members * _parameters(config), members, config, len(layers) if stacked else 1)
    return work


def arrays(members: int, batch: int, config: TrainConfig, shared: bool) -> Work:
    """A captured step where every single parameter is an array over the members."""
    work, layers, bias = Work(), config.layers, int(config.bias)
    for l, (k, n) in enumerate(layers):
        if shared and l == 0:
            work.product(batch, k + bias, n * members)
        else:
            work.call(members * (2 * batch * n + batch + n), k)
        work.call(2 * members * batch * n)
    _from_loss(work, members, batch, config)
    for k, n in layers[1:]:
        work.call(members * (2 * batch * k + batch + k), n)
        if config.hidden != "identity":
            work.call(3 * members * batch * k)
    for l, (k, n) in enumerate(layers):
        if shared and l == 0:
            work.product(k + bias, batch, n * members)
        else:
            if _states(config):  # the storage is scaled first, or set to 0
                work.call(2 * members * n * (k + bias))
            work.call(members * (2 * n * (k + bias) + n + k + bias), batch)
    _update(work, members * _parameters(config), members, config, 1)
    return work


def graph(
    members: int, batch: int, full: bool, config: TrainConfig, size: int, device: Device, shared: bool = True
) -> tuple[float, str]:
    """(microseconds of a step of all members, layout in `loop/`) by replays of a captured graph.

    full: all samples are one batch. size: bytes of a number. shared: all members see the same samples.
    """
    options = {"matrices": matrices(members, batch, config, shared)}
    if members > 1:
        options["arrays"] = arrays(members, batch, config, shared)
    else:
        options["joint"] = matrices(members, batch, config, shared, joint=True)
    fetched = _fetch(batch, full, config).us(size, device, KERNEL_US)
    # Numbers that change from step to step are written before a replay, and samples fetched.
    calls = (0 if full else 2) + (2 if config.optimizer in ("adam", "adamw") else 0)
    us, layout = min((work.us(size, device), name) for name, work in options.items())
    return max(us + fetched, REPLAY_US + CALL_US * calls), layout


def ordinary(members: int, batch: int, full: bool, config: TrainConfig, size: int, device: Device) -> float:
    """Microseconds of a step of all members by the loop that everyone writes: torch's modules, autograd, optimizer."""
    work = ordinary_work(members, batch, full, config)
    return max(work.us(size, device, KERNEL_US), ORDINARY_CALL_US * (work.calls + work.products))


def ordinary_work(members: int, batch: int, full: bool, config: TrainConfig) -> Work:
    """What such a step asks of the device; of an ensemble at best, by stacks of products and one loss for all."""
    work, layers = _fetch(batch, full, config), config.layers
    for l, (k, n) in enumerate(layers):
        stack = 1 if l == 0 else members  # the first layers of all members are one product
        outputs = members * batch * n
        work.product(members // stack * n, k + config.bias, batch, stack)
        work.product(members // stack * n, batch, k, stack)
        if config.bias:
            work.call(outputs)
        if l > 0:
            work.product(k, n, batch, members)
        if (config.hidden if l < len(layers) - 1 else config.output) != "identity":
            work.call(2 * outputs)
            work.call(3 * outputs)
    outputs = members * batch * config.widths[-1]
    work.call(2 * outputs)  # the loss
    work.call(members)
    if config.loss == "bce_logits":
        work.call(2 * outputs, 3)
    work.call(3 * outputs)
    kind = update_kind(config)
    work.call(3 * members * _parameters(config), ORDINARY_UPDATE[kind] + config.nesterov + (config.weight_decay > 0))
    return work


def _parameters(config: TrainConfig) -> int:
    return sum(n * (k + config.bias) for k, n in config.layers)


def _states(config: TrainConfig) -> int:
    """Tensors of state that the optimizer keeps for each parameter."""
    return {"sgd": 0, "rmsprop": 1}.get(config.optimizer, 2) + (config.momentum > 0)


def _fetch(batch: int, full: bool, config: TrainConfig) -> Work:
    """Samples and targets of a batch, copied from among all."""
    work = Work()
    for width in () if full else (config.widths[0], config.widths[-1]):
        work.call(2 * batch * width)
    return work


def _from_loss(work: Work, members: int, batch: int, config: TrainConfig) -> None:
    """dz of the last layer in a captured step."""
    outputs = members * batch * config.widths[-1]
    if config.loss == "bce_logits":
        work.call(2 * outputs)
    work.call(3 * outputs)
    if config.loss == "mse" and config.output != "identity":
        work.call(3 * outputs)
    if members > 1 and not _states(config):
        work.call(2 * outputs)  # a rate for each member


def update_kind(config: TrainConfig) -> str:
    return {"sgd": "momentum", "rmsprop": "rmsprop_momentum"}[config.optimizer] if config.momentum else config.optimizer


def _update(work: Work, parameters: int, members: int, config: TrainConfig, parts: int) -> None:
    """The optimizer's elementwise calls in a captured step, by rates of their own over `parts` tensors."""
    kind, states, decays = update_kind(config), _states(config), config.weight_decay > 0
    plain = kind == "momentum" and not config.nesterov and not config.dampening
    if states:
        calls = (0 if plain else UPDATE[kind]) + config.nesterov + (decays and kind != "adamw")
        work.call(3 * parameters, calls)
        work.call(3 * parameters // parts, parts)
    if decays and (kind == "adamw" or (members > 1 and not states)):
        work.call(2 * parameters // parts, parts)
