# SPDX-License-Identifier: Apache-2.0
"""The kernels of a network compiled ahead of its first call, into triton's cache, on as many processes as there are.

What a launch would compile is what triton itself makes of the launch: the launchers run on tensors without memory, up
to the compiler, whose place is taken. So the cache has each kernel under the key by which a launch looks for it.
"""

import functools
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction, driver

from .. import plan as planning
from ..records import Device, MlpPlan, Plan
from . import layer, network, wide
from .launch import INTERPRETED, Tensors


@dataclass(frozen=True)
class Order:
    """What to compile: the kernels that a network of these widths takes, with biases, on tensors dense in memory.

    Forward without gradients, and both directions of a step that wants the gradients of all parameters and not that of
    the input. Numbers of rows enter kernels by the plans alone, which tell few from many.
    """

    widths: tuple[int, ...]
    dtype: str
    precision: str  # of fp32 products, as in `records.Plan`
    activation: str
    rows: tuple[int, ...]
    device: Device
    at_hand: bool  # the device is here: what triton puts between Python and the driver is compiled as well


@dataclass(frozen=True)
class Kernel:
    """What triton's cache has now: the kernel's name, the rows that asked first, and how long it took."""

    name: str
    rows: int
    seconds: float


def refusal(device: Device, dtype: str) -> str | None:
    """Why nothing can be compiled for this device, or None."""
    if INTERPRETED:
        return "triton's interpreter (TRITON_INTERPRET=1) takes the place of its compiler in this process"
    return planning.device_refusal(1, 1, 1, dtype, device)


def build(order: Order) -> Iterator[Kernel]:
    """Compiles what the order asks for, or finds that the cache has it, and tells of each kernel as it is done."""
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Fresh processes, since one that CUDA has started in cannot be forked. Whoever interrupts means the whole command.
    quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), **quiet)
    try:
        count = pool.submit(_count, order).result()
        for done in as_completed([pool.submit(_compile, order, number) for number in range(count)]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


# --- in a process that compiles --------------------------------------------------------------------------------------


def _count(order: Order) -> int:
    return len(asked(order))


def _compile(order: Order, number: int) -> Kernel:
    began = time.perf_counter()
    rows, kernel, signature, constants, attributes, options = asked(order)[number]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, _target(order.device), options.__dict__)
    if order.at_hand:
        driver.active.launcher_cls(compiled.src, compiled.metadata)  # pyright: ignore[reportAttributeAccessIssue]
    return Kernel(kernel.__name__, rows, time.perf_counter() - began)


def _target(device: Device) -> GPUTarget:
    return GPUTarget("cuda", device.arch, 32)


class _NoDriver:
    """Of a driver what triton asks before it compiles."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def get_current_device(self) -> str:
        return f"ahead of a device of {self.device.arch}"  # triton keeps what it compiled by this

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return _target(self.device)


@functools.cache
def asked(order: Order) -> list[tuple[int, JITFunction, dict, dict, dict, Any]]:
    """(rows, kernel, signature, constants, attributes, options) of each kernel that launches ask for."""
    found: dict[tuple, tuple] = {}

    def note(kernel, key, signature, device, constants, options, attributes, warmup) -> None:
        found.setdefault((kernel, key), (rows, kernel, signature, constants, attributes, options))

    driver.set_active(_NoDriver(order.device))  # pyright: ignore[reportArgumentType]
    try:
        with mock.patch.object(JITFunction, "_do_compile", note):
            for rows in order.rows:
                _launch(order, rows)
    finally:
        driver.set_active(None)  # pyright: ignore[reportArgumentType] # what is here, once it is asked for
    return list(found.values())


def _launch(order: Order, rows: int) -> None:
    """Launches what the order asks for, at one number of rows."""
    act, dtype = order.activation, getattr(torch, order.dtype)
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    pairs = list(itertools.pairwise(order.widths))
    x, y = empty(rows, order.widths[0]), empty(rows, order.widths[-1])
    weights, biases = tuple(empty(n, k) for k, n in pairs), tuple(empty(n) for _, n in pairs)
    options = (order.dtype, order.precision, order.device)
    shapes = [(rows, k, n, *options, None) for k, n in pairs]
    # Wide products read only rows that start at multiples of 16 bytes.
    forwards = tuple(planning.linear_act_fwd(*shape, None, shape[1] * dtype.itemsize % 16 == 0) for shape in shapes)
    inference, training = (planning.mlp_both(rows, order.widths, *options, t, False, None, None) for t in (False, True))
    backward = cast(MlpPlan, training.backward)
    # What the second one saves is for the backward pass.
    for plan, save in ((inference.forward, ()), (training.forward, backward.boundaries)):
        if plan.impl == "fused":
            _, saved = network.mlp_fwd(x, weights, biases, act, act, plan, save)
        else:
            saved = _layers_fwd(x, weights, biases, act, plan.layers or forwards)
    every = (True,) * len(pairs)
    # The first weight is not kept, as nobody wants the gradient of x: a launch without it is another kernel's.
    wanted = (False, every, every)
    if backward.impl == "fused":
        network.mlp_bwd(y, x, saved, weights, biases, act, act, wanted, backward)
    elif backward.impl == "stack":
        wide.mlp_bwd(y, x, saved, (None, *weights[1:]), act, act, wanted, backward)
    else:
        hs = (x, *saved)
        for l, shape in enumerate(shapes):
            plan = planning.linear_act_bwd(*shape)
            if plan.triton:
                weight = weights[l] if l else None
                layer.linear_act_bwd(hs[l + 1], hs[l + 1], hs[l], weight, act, (l > 0, True, True), plan)


def _layers_fwd(x: Tensor, weights: Tensors, biases: Tensors, activation: str, plans: tuple[Plan, ...]) -> Tensors:
    """The outputs of all layers."""
    outputs = []
    for weight, bias, plan in zip(weights, biases, plans, strict=True):
        implementation = wide if plan.impl == "tma" else layer
        x = (
            implementation.linear_act_fwd(x, weight, bias, activation, plan)
            if plan.triton
            else x.new_empty(x.shape[0], weight.shape[0])
        )
        outputs.append(x)
    return tuple(outputs)
