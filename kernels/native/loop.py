# SPDX-License-Identifier: Apache-2.0
"""A run of training steps in compiled code: what lies where, and which thread trains what."""

import contextlib
import ctypes
import functools
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .. import forks
from .. import plan as planning
from ..hyperparameters import COMMON, Hyperparameters
from ..records import TrainConfig, TrainPlan
from . import ready
from .layout import Members, Neurons

PIECES = 4  # of work, for each thread

_lock = forks.lock()


@contextlib.contextmanager
def _compiler() -> Iterator[tuple[Any, Any]]:
    """The modules of compiled functions, which compile while this lasts. The first call imports numba."""
    try:
        from numba.core import config
    except Exception as error:  # also a library of numba's that does not load, or a numpy that it does not know
        raise ImportError(f"numba cannot be imported: {error}") from error

    # Who debugs functions of his own without the compiler still has ours, which are nothing without it.
    settings = cast(Any, config)
    with _lock:
        disabled, settings.DISABLE_JIT = settings.DISABLE_JIT, 0
        try:
            from . import neurons, steps

            yield steps, neurons
        finally:
            settings.DISABLE_JIT = disabled


@functools.cache
def _places() -> list[set[int]]:
    """The CPUs that OpenMP binds threads of torch to, if its settings (OMP_PROC_BIND, OMP_PLACES) say so."""
    runtime, places = ctypes.CDLL(None), list[set[int]]()
    with contextlib.suppress(AttributeError):  # torch was built without OpenMP, or keeps it to itself
        for place in range(runtime.omp_get_num_places()):
            ids = (ctypes.c_int * runtime.omp_get_place_num_procs(place))()
            runtime.omp_get_place_proc_ids(place, ids)
            places.append(set(ids))
    return places


def _leave_place() -> None:
    """Lets this thread run on all places, if the one that began it was where OpenMP binds the first: that is inherited.

    One that its user has bound elsewhere since stays there.
    """
    if hasattr(os, "sched_setaffinity") and (places := _places()) and os.sched_getaffinity(0) == places[0]:
        with contextlib.suppress(OSError):  # a container may have taken CPUs away since
            os.sched_setaffinity(0, set().union(*places))


class NativeLoop:
    """A run of training steps, in as many pieces as the caller likes.

    The networks are dealt out in blocks of `plan.networks`, of which the last is filled up with copies of the last
    network. One thread trains a block from the first to the last step of a piece, so the number of threads changes no
    bit. Threads live as long as one call of `run`: there are none that a fork could lose.
    """

    def __init__(self, config, parameters, first, second, lr, x, y, batch_size, taken, plan, own=COMMON) -> None:
        """The arguments are those of `TorchLoop`. `setup_seconds`: compiling, or reading from disk."""
        began, kind = time.perf_counter(), (parameters[0].dtype, plan.rows, plan.networks)
        if kind not in ready.loaded:
            ready.missed = 0.0  # whether or not there is a compiler
        with _compiler() as (steps, neurons):
            self.given, self.taken, self.size = (parameters, first, second), taken, min(batch_size, x.shape[1])
            if plan.rows == planning.NEURON_ROWS:
                # More would not find room in the registers.
                lanes = steps.LANES if "AVX512" in torch.backends.cpu.get_cpu_capability() else steps.LANES // 2
                self.train, self.tile, layout = neurons.train, steps.Tile(plan.rows, lanes), Neurons
            else:
                lanes = steps.LANES
                self.train, self.tile, layout = steps.train, steps.Tile(plan.rows, plan.networks), Members
            members, like = len(parameters[0]), parameters[0]
            self.layout = layout(config, members, plan.rows, plan.networks, lanes)
            with torch.no_grad():
                self._lay_out(steps, config, own, x, y)
            # Without a schedule those of every step.
            self.rates = self._of_steps(like.new_zeros(1, 1) if lr is None else lr[None])
            self.memory: tuple[np.ndarray, ...] | None = None  # of the thread that trains alone
            if kind not in ready.loaded:
                self.run(None, 0, 0, 0, like.new_empty(0, members))  # which compiles
                ready.loaded.add(kind)
        self.setup_seconds = time.perf_counter() - began

    def run(self, order, start, steps, log_every, losses, rates=None, factors=None) -> None:
        """As `TorchLoop.run`."""
        samples = np.empty(0, np.int32) if order is None else order.flatten().numpy()
        layout, blocks = self.layout, self.layout.blocks
        logged = torch.zeros(blocks, len(losses) * layout.networks, dtype=torch.float64, device="cpu")
        pace = (samples, self.size, start, steps, log_every)
        own = (
            self.rates if rates is None else self._of_steps(rates),
            self._of_steps(self.given[0][0].new_empty(0, 1) if factors is None else factors),
            *(t.numpy() for t in (self.hyper, *self.storages, self.powers, logged)),
        )
        kinds = (*self.kinds, int(not self.taken))

        def work(piece: tuple[int, int], memory: tuple | None = None) -> None:
            memory = memory or self._memory()
            self.train(self.tile, piece, self.widths, kinds, self.data, pace, own, memory)

        threads = min(torch.get_num_threads(), blocks)
        # Several pieces for each thread: one that another program holds up leaves pieces to the others.
        each = -(-blocks // (PIECES * threads))
        pieces = [(begin, min(begin + each, blocks)) for begin in range(0, blocks, each)]
        if threads > 1 and steps:
            with ThreadPoolExecutor(threads, initializer=_leave_place) as pool:
                for _ in pool.map(work, pieces):
                    pass
        else:
            self.memory = self.memory or self._memory()  # short runs would take as long to make it
            work((0, blocks), self.memory)
        self.taken += steps
        with torch.no_grad():
            rows = logged.view(blocks, len(losses), layout.networks).transpose(0, 1)
            losses.copy_(rows.flatten(1)[:, : layout.members])
            torch._foreach_copy_(self.targets, self.sources or self._parts())  # pyright: ignore[reportPrivateImportUsage]

    def _memory(self) -> tuple[np.ndarray, ...]:
        return tuple(t.numpy() for t in self.layout.memory(self.storages[0], self.size))

    def _parts(self) -> list[Tensor]:
        """What the storages hold of each tensor that is given."""
        pairs = zip(self.storages, self.given, strict=True)
        return [part for storage, tensors in pairs if tensors for part in self.layout.parts(storage)]

    def _of_steps(self, numbers: Tensor) -> np.ndarray:
        """(steps, E or 1), filled up to whole blocks as they are."""
        missing = self.layout.blocks * self.layout.networks - self.layout.members
        if missing and numbers.shape[1] > 1:
            numbers = torch.cat([numbers, numbers[:, -1:].expand(-1, missing)], 1)
        return numbers.contiguous().numpy()

    def _lay_out(self, steps: Any, config: TrainConfig, own: Hyperparameters, x: Tensor, y: Tensor) -> None:
        layout, like = self.layout, self.given[0][0]
        self.widths = np.array(config.widths, np.int64)
        w, *state = (layout.write(tensors, like) for tensors in self.given)
        if not self.taken:
            for storage in state:
                storage.zero_()
        self.storages = [w, *state]
        self.targets = [t for tensors in self.given for t in tensors]
        self.sources = self._parts() if layout.blocks == 1 else []
        self.data = tuple(layout.data(t).numpy() for t in (x, y))
        betas = [own.of(config, name) for name in ("beta1", "beta2")]
        numbers = {
            "weight_decay": own.of(config, "weight_decay"),
            "momentum": own.of(config, "momentum"),
            "undamped": own.undamped(config),
            "new1": 1 - betas[0],
            "beta2": betas[1],
            "new2": 1 - betas[1],
            "eps": config.eps,
            "factor": 1,
            "root": 1,
        }
        self.hyper = self._in_lanes(steps.LANES, [numbers[name] for name in steps.HYPERPARAMETERS], like.dtype)
        seen = self.taken if config.optimizer in ("adam", "adamw") else 0  # others correct nothing
        powers = [*betas, *(_powers(beta, seen, steps.NEGLIGIBLE) for beta in betas)]
        lanes = steps.LANES if any(isinstance(beta, Tensor) for beta in betas) else 1
        self.powers = self._in_lanes(lanes, powers, torch.float64)
        optimizer = config.optimizer
        if optimizer == "sgd":
            # Without momentum there is no state, whatever nesterov says.
            optimizer = "plain" if not config.momentum else "nesterov" if config.nesterov else "momentum"
        elif optimizer == "rmsprop" and config.momentum:
            optimizer = "rmsprop_momentum"
        self.kinds = (
            steps.ACTIVATIONS.index(config.hidden),
            steps.ACTIVATIONS.index(config.output),
            steps.LOSSES.index(config.loss),
            steps.OPTIMIZERS.index(optimizer),
            *map(int, (config.bias, config.reduction == "mean", config.weight_decay != 0, config.weighted)),
            int(_flushes(config, own, like.dtype)),
            x.shape[1],
            config.beta,
            config.factor,
        )

    def _in_lanes(self, lanes: int, rows: Sequence[float | Tensor], dtype: torch.dtype) -> Tensor:
        """Numbers of all members, or (E,) of each, as rows of lanes: one network's number stands in all of them."""
        layout = self.layout
        if not any(isinstance(row, Tensor) for row in rows):
            return torch.tensor(rows, dtype=dtype, device="cpu").repeat_interleave(lanes).repeat(layout.blocks, 1)
        rows = [torch.as_tensor(row, dtype=dtype, device="cpu").expand(layout.members) for row in rows]
        numbers = layout.side_by_side(torch.stack(rows, 1)).view(layout.blocks, len(rows), layout.networks)
        return numbers.expand(-1, -1, lanes).flatten(1).contiguous()


def _flushes(config: TrainConfig, own: Hyperparameters, dtype: torch.dtype) -> bool:
    """Whether denormal numbers are 0: not where they are squares of gradients, beside an eps that may be as small."""
    if config.optimizer == "sgd":
        return True
    numbers, beta2 = torch.finfo(dtype), own.of(config, "beta2")
    slowest = float(beta2.max()) if isinstance(beta2, Tensor) else beta2
    # A square that is flushed is less than `tiny`. Adam's eps is multiplied by its correction, the least at first.
    return config.eps * (1 - slowest) ** 0.5 * numbers.eps > numbers.tiny**0.5


def _powers(betas: float | Tensor, taken: int, negligible: float) -> float | Tensor:
    """betas ** taken as `optimizers.correct` multiplies them up step by step, to the bit: a run may begin anywhere."""
    if not isinstance(betas, Tensor):
        return _power(betas, taken, negligible)
    values, places = betas.unique(return_inverse=True)
    return values.new_tensor([_power(beta, taken, negligible) for beta in values.tolist()])[places]


def _power(beta: float, taken: int, negligible: float) -> float:
    power = 1.0
    while taken and power > negligible:
        factors = np.full(min(taken, 1 << 16), beta)
        factors[0] *= power
        *_, before, power = (1.0, *np.multiply.accumulate(factors)[-2:].tolist())
        taken -= len(factors)
        if before <= negligible:
            return 0.0
    return 0.0 if taken else power


def compile_all() -> Iterator[tuple[str, float]]:
    """Compiles each kind of steps, or reads it from disk: (what it is, the seconds that it took)."""
    for dtype, (rows, networks) in itertools.product((torch.float32, torch.float64), planning.TILES):
        parameters, lr, x, y = (torch.zeros(shape, dtype=dtype) for shape in ((1, 1, 1), (1,), (1, 1, 1), (1, 1, 1)))
        config, plan = TrainConfig((1, 1), bias=False), TrainPlan("native", "compiled ahead", rows, networks)
        loop = NativeLoop(config, [parameters], [], [], lr, x, y, 1, 0, plan)
        yield f"{str(dtype).removeprefix('torch.')}, {rows} samples of {networks} networks", loop.setup_seconds
