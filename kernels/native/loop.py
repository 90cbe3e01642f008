"""A run of training steps in compiled code: what lies where, and which thread trains what."""

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .. import plan as planning
from ..records import TrainConfig, TrainPlan
from .ready import loaded

__all__ = ["NativeLoop", "compile_all"]

PIECES = 4  # of work, for each thread

_lock = threading.Lock()


@contextmanager
def _compiler() -> Iterator[Any]:
    """The module of compiled functions, which compiles while this lasts. The first call imports numba."""
    from numba.core import config

    # Who debugs functions of his own without the compiler still has ours, which are nothing without it.
    settings: Any = cast(Any, config)
    with _lock:
        disabled, settings.DISABLE_JIT = settings.DISABLE_JIT, 0
        try:
            from . import steps

            yield steps
        finally:
            settings.DISABLE_JIT = disabled


class NativeLoop:
    """A run of training steps, in as many pieces as the caller likes.

    The networks are dealt out in blocks of `plan.networks`, of which the last is filled up with copies of the last
    network. One thread trains a block from the first to the last step of a piece, so the number of threads changes no
    bit. Threads live as long as one call of `run`: there are none that a fork could lose.
    """

    def __init__(
        self,
        config: TrainConfig,
        parameters: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        lr: Tensor,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        taken: int,
        plan: TrainPlan,
    ) -> None:
        """The arguments are those of `TorchLoop`. `setup_seconds`: compiling, or reading from disk."""
        began = time.perf_counter()
        with _compiler() as self.steps:
            steps = self.steps
            self.config, self.given, self.taken = config, (parameters, first, second), taken
            self.tile = steps.Tile(plan.rows, plan.networks)
            self.networks, self.members, self.samples = plan.networks, lr.shape[0], x.shape[1]
            self.size = min(batch_size, x.shape[1])
            with torch.no_grad():
                self._lay_out(lr, x, y)
            self.run(None, 0, 0, 0, lr.new_empty(0, self.members))
            loaded.add((lr.dtype, plan.rows, plan.networks))
        self.setup_seconds = time.perf_counter() - began

    def run(self, order: Tensor | None, start: int, steps: int, log_every: int, losses: Tensor) -> None:
        """As `TorchLoop.run`."""
        samples = np.empty(0, np.int32) if order is None else order.flatten().numpy()
        logged = torch.zeros(self.blocks, len(losses) * self.networks, dtype=torch.float64)
        pace = (samples, self.size, start, steps, log_every)
        own = [t.numpy() for t in (self.hyper, *self.storages, self.powers, logged)]
        kinds = (*self.kinds, int(not self.taken))

        def work(blocks: tuple[int, int]) -> None:
            self.steps.train(self.tile, blocks, self.widths, kinds, *self.data, *pace, *own, self._memory())

        threads = min(torch.get_num_threads(), self.blocks)
        # Several pieces for each thread: one that another program holds up leaves pieces to the others.
        each = -(-self.blocks // (PIECES * threads))
        pieces = [(begin, min(begin + each, self.blocks)) for begin in range(0, self.blocks, each)]
        if threads > 1 and steps:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(work, pieces):
                    pass
        else:
            work((0, self.blocks))
        self.taken += steps
        with torch.no_grad():
            rows = logged.view(self.blocks, len(losses), self.networks).transpose(0, 1)
            losses.copy_(rows.flatten(1)[:, : self.members])
            for storage, tensors in zip(self.storages, self.given, strict=True):
                self._read(storage, tensors)

    def _lay_out(self, lr: Tensor, x: Tensor, y: Tensor) -> None:
        config, steps = self.config, self.steps
        self.layers = list(itertools.pairwise(config.widths))
        self.blocks = -(-self.members // self.networks)
        self.widths = np.array(config.widths, np.int64)
        w, *state = (self._storage(tensors, lr) for tensors in self.given)
        if not self.taken:
            for storage in state:
                storage.zero_()
        self.storages = [w, *state]
        data = (t.flatten(1) if len(t) == 1 else self._side_by_side(t.flatten(1)) for t in (x, y))
        self.data = [t.numpy() for t in data]
        numbers = {
            "lr": lr,
            "weight_decay": config.weight_decay,
            "momentum": config.momentum,
            "undamped": 1 - config.dampening,
            "new1": 1 - config.beta1,
            "beta2": config.beta2,
            "new2": 1 - config.beta2,
            "eps": config.eps,
        }
        rows = [torch.as_tensor(numbers[name], dtype=lr.dtype).expand(self.members) for name in steps.HYPERPARAMETERS]
        # One network's numbers stand in all lanes of an update.
        hyper = self._side_by_side(torch.stack(rows, 1)).view(self.blocks, len(rows), self.networks)
        self.hyper = hyper.expand(-1, -1, steps.ROW.members).flatten(1).contiguous()
        betas = torch.tensor([config.beta1, config.beta2], dtype=torch.float64)
        self.powers = torch.cat([betas, betas**self.taken]).repeat(self.blocks, 1)
        optimizer = config.optimizer
        if optimizer == "sgd":
            optimizer = "nesterov" if config.nesterov else "momentum" if config.momentum else "plain"
        self.kinds = (
            steps.ACTIVATIONS.index(config.hidden),
            steps.ACTIVATIONS.index(config.output),
            steps.LOSSES.index(config.loss),
            steps.OPTIMIZERS.index(optimizer),
            *map(int, (config.bias, config.reduction == "mean", config.weight_decay != 0)),
            self.samples,
        )

    def _side_by_side(self, t: Tensor) -> Tensor:
        """(E, n) -> (blocks, n * networks): the numbers of the networks of a block lie side by side."""
        missing = self.blocks * self.networks - self.members
        t = torch.cat([t, t[-1:].expand(missing, -1)]) if missing else t
        return t.view(self.blocks, self.networks, -1).transpose(1, 2).flatten(1).contiguous()

    def _storage(self, tensors: Sequence[Tensor], like: Tensor) -> Tensor:
        """(blocks, numbers): for each neuron its weights, then its bias; filled up to whole vectors with 0."""
        if not tensors:
            return like.new_zeros(self.blocks, 0)
        views = [t.view(self.members, n, -1) for t, (_, n) in zip(tensors, self._layers_of_tensors(), strict=True)]
        step = 1 + self.config.bias
        layers = [torch.cat(views[l : l + step], 2).flatten(1) for l in range(0, len(views), step)]
        packed = self._side_by_side(torch.cat(layers, 1))
        storage = like.new_zeros(self.blocks, -(-packed.shape[1] // self.steps.ROW.members) * self.steps.ROW.members)
        storage[:, : packed.shape[1]] = packed
        return storage

    def _read(self, storage: Tensor, tensors: Sequence[Tensor]) -> None:
        """Writes what a storage holds into the tensors."""
        counts = [n * (k + self.config.bias) for k, n in self.layers]
        used = storage[:, : sum(counts) * self.networks].view(self.blocks, -1, self.networks)
        whole = used.transpose(1, 2).flatten(0, 1)[: self.members]
        targets = iter(tensors)
        for part, (k, n) in zip(whole.split(counts, 1) if tensors else (), self.layers, strict=False):
            layer = part.view(self.members, n, -1)
            next(targets).copy_(layer[:, :, :k])
            if self.config.bias:
                next(targets).copy_(layer[:, :, k])

    def _layers_of_tensors(self) -> Iterator[tuple[int, int]]:
        """(inputs, outputs) of the layer that each given tensor belongs to."""
        return itertools.chain.from_iterable(itertools.repeat(layer, 1 + self.config.bias) for layer in self.layers)

    def _memory(self) -> tuple[Any, ...]:
        """Gradients, activations and their gradients, targets, and the places that have a sample, of one block."""
        lanes, neurons = self.tile.samples * self.tile.members, sum(self.config.widths)
        counts = (self.storages[0].shape[1], neurons * lanes, neurons * lanes, self.config.widths[-1] * lanes, lanes)
        return tuple(self.storages[0].new_empty(count).numpy() for count in counts)


def compile_all() -> Iterator[tuple[str, float]]:
    """Compiles each kind of steps, or reads it from disk: (what it is, the seconds that it took)."""
    for dtype, (rows, networks) in itertools.product((torch.float32, torch.float64), planning.TILES):
        parameters, lr, x, y = (torch.zeros(shape, dtype=dtype) for shape in ((1, 1, 1), (1,), (1, 1, 1), (1, 1, 1)))
        config, plan = TrainConfig((1, 1), bias=False), TrainPlan("native", "compiled ahead", rows, networks)
        loop = NativeLoop(config, [parameters], [], [], lr, x, y, 1, 0, plan)
        yield f"{str(dtype).removeprefix('torch.')}, {rows} samples of {networks} networks", loop.setup_seconds
