"""Chunks of steps, the order of the samples, interrupts and progress."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_SECONDS = 0.2  # of training, after which progress is shown and an interrupt takes effect
PATIENCE_SECONDS = 2.0  # of training, after which a terminal shows a bar even without progress=True


def chunks(steps: int) -> Iterator[tuple[int, int]]:
    """(first step, number of steps) of chunks that take about CHUNK_SECONDS, going by the time the last one took."""
    start, count = 0, 1
    while start < steps:
        count = min(count, steps - start)
        began = time.perf_counter()
        yield start, count
        start += count
        # The first step takes longer than others, so the next chunk may be too short, but not too long.
        count = max(1, int(count * CHUNK_SECONDS / max(time.perf_counter() - began, 1e-6)))


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was launched, so that progress and interrupts count finished steps."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def logged_steps(start: int, steps: int, log_every: int) -> range:
    """Those of the steps, the first being number `start`, whose loss is logged."""
    return range(-(-start // log_every) * log_every, start + steps, log_every) if log_every else range(0)


class SampleOrder:
    """The order of the samples: one permutation per epoch, drawn when its first batch comes up."""

    def __init__(self, samples: int, batch_size: int, generator: torch.Generator | None) -> None:
        self.samples, self.batch, self.generator = samples, min(batch_size, samples), generator
        self.per_epoch = -(-samples // self.batch)
        self.epoch = -1  # of self.row, the last one drawn
        self.row: Tensor

    def rows(self, start: int, steps: int) -> Tensor:
        """(epochs, samples), int32: the order of the samples in each epoch that these steps touch."""
        first, last = start // self.per_epoch, (start + steps - 1) // self.per_epoch
        rows = []
        for epoch in range(first, last + 1):
            if epoch > self.epoch:
                self.row = torch.randperm(self.samples, generator=self.generator, device="cpu")
                self.epoch = epoch
            rows.append(self.row)
        return torch.stack(rows).to(torch.int32)

    def batches(self, start: int, steps: int) -> Iterator[Tensor]:
        for step in range(start, start + steps):
            # One step at a time: a model that draws random numbers too must find the generator in the same state
            # whatever the size of a chunk.
            row = self.rows(step, 1)[0]
            begin = step % self.per_epoch * self.batch
            yield row[begin : begin + self.batch]


class Interrupts:
    """Holds a KeyboardInterrupt back until a chunk has finished. A second one comes through at once."""

    def __init__(self) -> None:
        self.pending = self.installed = False

    def __enter__(self) -> "Interrupts":
        # Only the main thread may set a handler, and one that is not Python's own is the caller's, which stays.
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self.installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self.installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, *_: object) -> None:
        self.raise_pending()
        self.pending = True

    def raise_pending(self) -> None:
        if self.pending:
            raise KeyboardInterrupt


class Bar:
    """A progress bar on stderr if that is a terminal, at once where it is wanted and after PATIENCE_SECONDS if not."""

    def __init__(self, steps: int, wanted: bool, began: float) -> None:
        self.steps, self.wanted, self.began = steps, wanted, began
        self.bar: Any = None
        self.useful = sys.stderr is not None and sys.stderr.isatty()

    def show(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif self.useful and (self.wanted or time.perf_counter() - self.began > PATIENCE_SECONDS):
            try:
                from tqdm import tqdm
            except ImportError:
                self.useful = False
                return
            self.bar = tqdm(total=self.steps, initial=done, unit="step", leave=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
