# SPDX-License-Identifier: Apache-2.0
"""A run of training steps: what it is made of is chosen by a plan."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from .. import forks
from .. import plan as planning
from ..hyperparameters import COMMON, Hyperparameters
from ..records import TrainConfig, TrainPlan
from .arrays import Arrays
from .layout import Batch
from .matrices import Matrices
from .optimizer import Optimizer


class TorchLoop:
    """A run of training steps, in as many pieces as the caller likes: buffers and graphs are made once."""

    def __init__(
        self,
        config: TrainConfig,
        parameters: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        lr: Tensor | None,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        taken: int,
        plan: TrainPlan,
        own: Hyperparameters = COMMON,
    ) -> None:
        """parameters: w0, b0, w1, b1, ... (w0, w1, ... without biases), weights (E, N, K), biases (E, N). first,
        second: () or like parameters: momentum buffers, Adam's two averages, or RMSprop's average and then its buffers;
        not read if `taken`, the number of steps that they have seen, is 0. lr: (E,), or None where `run` is given the
        rates of its steps. x: (E or 1, samples, widths[0]), y: (E or 1, samples, widths[-1], or twice as many if the
        config is weighted); a leading 1 is shared. All of one dtype, float32 or float64. batch_size: at most `samples`.
        plan: says that this implementation was chosen. own: numbers of members in the place of the config's.
        """
        self.given, self.device = (parameters, first, second), x.device
        self.size = min(batch_size, x.shape[1])
        self.per_epoch = -(-x.shape[1] // self.size)
        self.graph = plan.impl == "graph"
        choice = planning.train_loop(len(parameters[0]), self.size, config, x.shape[0] == 1, x.device.type)
        self.one_thread = choice.one_thread and x.is_cpu
        make = Arrays if choice.layout == "arrays" else partial(Matrices, joint=choice.layout == "joint")
        with self._context():
            self.layout = make(config, parameters, x, y)
            self.optimizer = Optimizer(self.layout, first, second, lr, taken, self.graph, own)
            self.batches: dict[int, Batch] = {}

    def run(
        self,
        order: Tensor | None,
        start: int,
        steps: int,
        log_every: int,
        losses: Tensor,
        rates: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> None:
        """Takes `steps` steps, the first being number `start` of the run; writes parameters, state and losses in place.

        order: None for full batches, or (epochs, samples), the order of the samples in each epoch from that of step
        `start` on. losses: (rows, E), one row per step s in [start, start + steps) with s % log_every == 0, from before
        its update. rates: (steps, E or 1), for an lr of None. factors: the same of the losses, for a reduction "given".
        """
        pieces = None
        if order is not None:
            epochs = itertools.chain.from_iterable(epoch.split(self.size) for epoch in order)
            pieces = itertools.islice(epochs, start % self.per_epoch, None)
        rows = iter(losses)
        with self._context():
            batch = self._batch(self.size)
            if pieces is None and not batch.ran:
                batch.load(None)
            paces = self.optimizer.rates_of(rates), itertools.repeat(None) if factors is None else factors
            for step, rate, factor in zip(range(start, start + steps), *paces, strict=False):
                if pieces is not None:
                    indices = next(pieces)
                    batch = self._batch(len(indices))
                    batch.load(indices)
                self.optimizer.advance(batch, rate)
                if self.layout.factors is not None and factor is not None:
                    self.layout.factors.copy_(factor)
                if self.graph and batch.ran and not batch.captured:
                    batch.capture()
                for call in batch.calls:
                    call()
                batch.ran = True
                if log_every and step % log_every == 0:
                    # The calls have kept the outputs from before the update, of which the loss is due.
                    next(rows).copy_(batch.loss())
            parameters, first, second = self.given
            self.layout.read(self.layout.parameters, parameters)
            self.optimizer.read(first, second)

    @contextmanager
    def _context(self) -> Iterator[None]:
        current = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with torch.inference_mode(), current, _threads(self.one_thread):
            yield

    def _batch(self, size: int) -> "Batch":
        if size not in self.batches:  # the last of an epoch may be smaller
            self.batches[size] = Batch(self.layout, self.optimizer, size)
        return self.batches[size]


_lock = forks.lock()
_running = 0  # loops that have set one thread and not yet finished
_process_threads = 0  # torch's number for new threads before the first of them began


@contextmanager
def _threads(one: bool) -> Iterator[None]:
    """Runs on one thread if `one`, and gives torch its number back."""
    global _running, _process_threads
    if not one:
        yield
        return
    with _lock:
        threads = torch.get_num_threads()
        # Each Python thread has a number of its own, and one that began beside a loop has inherited the loop's 1.
        if not _running:
            _process_threads = threads if threads > 1 else _threads_of_a_new_thread()
        if threads == 1:
            threads = _process_threads
        _running += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            torch.set_num_threads(threads)


def _threads_of_a_new_thread() -> int:
    found: list[int] = []
    asks = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    asks.start()
    asks.join()
    return found[0]
