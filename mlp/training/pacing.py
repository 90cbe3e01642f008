# SPDX-License-Identifier: Apache-2.0
"""Chunks of steps, the order of the samples, interrupts and progress."""

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK_SECONDS = 0.2  # of training, after which progress is shown and an interrupt takes effect
PATIENCE_SECONDS = 2.0  # of training, after which a terminal shows a bar even without progress=True


def chunks(
    start: int, steps: int, every: int = 0, most: Callable[[int, float], int] | None = None
) -> Iterator[tuple[int, int]]:
    """(first step, number of steps) of chunks that take about CHUNK_SECONDS, going by the time the last one took.

    every: after each so many steps a chunk ends; 0: wherever it likes. most: of the first step, and of the seconds that
    a step takes, how many there may be.
    """
    count, seconds = 1, CHUNK_SECONDS
    while start < steps:
        limit = most(start, seconds) if most else steps
        count = min(count, steps - start, every - start % every if every else steps, limit)
        began = time.perf_counter()
        yield start, count
        start += count
        # The first step takes longer than others, so the next chunk may be too short, but not too long.
        seconds = max(time.perf_counter() - began, 1e-6) / count
        count = max(1, int(CHUNK_SECONDS / seconds))


def runs_apart(device: torch.device) -> bool:
    """Whether the device computes what was launched while Python goes on."""
    return device.type == "cuda"


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was launched, so that progress and interrupts count finished steps.

    On this stream: to wait for the whole device would break what another thread captures.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def logged_steps(start: int, steps: int, log_every: int) -> range:
    """Those of the steps, the first being number `start`, whose loss is logged."""
    return range(-(-start // log_every) * log_every, start + steps, log_every) if log_every else range(0)


class SampleOrder:
    """The order of the samples: one permutation per epoch, drawn when its first batch comes up, or ahead of that.

    Once it is closed, the generator is as after the draws for the epochs that were asked for.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        steps: int,
        generator: torch.Generator | None,
        taken: int = 0,
        states: Sequence[Tensor] = (),
    ) -> None:
        """taken, states: steps of the run that were taken before, and what `states` was then."""
        self.samples, self.batch, self.generator = samples, min(batch_size, samples), generator
        self.per_epoch = -(-samples // self.batch)
        self.epochs = -(-steps // self.per_epoch)
        self.epoch = -1  # of self.row, the last one asked for
        self.row: Tensor
        self.ahead = torch.empty(0, samples, dtype=torch.int32, device="cpu")  # of the epochs after that
        # States of the generator, each with the last epoch that was drawn by then: from these all others follow. A
        # chunk leaves four, and one that is cut off is undone by those of the chunk before.
        self.marks: deque[tuple[int, Tensor]] = deque(maxlen=9)
        if states:
            self._go(taken, *states)
        self._mark(self.epoch)

    def rewind(self, taken: int) -> None:
        """As it was after so many steps, of those that have come up since `rows` was called before the last time."""
        epoch = self._epoch_after(taken)
        self._go(taken, self._state_after(max(epoch - 1, -1)), self._state_after(epoch))

    def _go(self, taken: int, before: Tensor, now: Tensor) -> None:
        """before, now: the generator's states, as `states` has them."""
        self.epoch, self.ahead = self._epoch_after(taken), self.ahead[:0]
        self._random.set_state(before)
        self._mark(max(self.epoch - 1, -1))
        if taken % self.per_epoch:
            self.row = self.ahead.new_empty(self.samples)
            self._draw((self.row,))
        self._random.set_state(now)
        self._mark(self.epoch)

    def states(self, taken: int) -> tuple[Tensor, Tensor]:
        """The generator's states after `taken` steps: before the order of their epoch was drawn, and then."""
        epoch = self._epoch_after(taken)
        settled = epoch == self.epoch and not len(self.ahead)
        now = self._random.get_state() if settled else self._state_after(epoch)
        return self._state_after(epoch - 1) if epoch >= 0 else now, now

    def rows(self, start: int, steps: int) -> Tensor:
        """(epochs, samples), int32: the order of the samples in each epoch that these steps touch."""
        first, last = start // self.per_epoch, (start + steps - 1) // self.per_epoch
        rows = self.ahead.new_empty(last + 1 - first, self.samples)
        known = int(first == self.epoch)
        if known:
            rows[0] = self.row
        drawn = self.ahead[: len(rows) - known]
        self.ahead = self.ahead[len(drawn) :]
        rows[known : known + len(drawn)] = drawn
        self._draw_epochs(first + known + len(drawn), rows[known + len(drawn) :])
        self.row, self.epoch = rows[-1], last
        return rows

    def batches(self, start: int, steps: int, device: torch.device) -> Iterator[Tensor]:
        """The indices of each step's samples, copied to the device once an epoch: a copy makes Python wait for it."""
        placed, at = self.ahead, -1
        for step in range(start, start + steps):
            # One step at a time: a model that draws random numbers too must find the generator in the same state
            # whatever the size of a chunk.
            if step // self.per_epoch != self.epoch:
                self._mark(self.epoch)
                self.row, self.epoch = self.ahead.new_empty(self.samples), step // self.per_epoch
                self._draw((self.row,))
            if at != self.epoch:
                placed, at = self.row.to(device), self.epoch
            begin = step % self.per_epoch * self.batch
            yield placed[begin : begin + self.batch]

    def draw_ahead(self, steps: int) -> None:
        """Draws what that many more steps will ask for, if nothing else draws from the generator until they do."""
        count = min(-(-steps // self.per_epoch), self.epochs - 1 - self.epoch)
        if count > 0 and not len(self.ahead):
            self.ahead = self.ahead.new_empty(count, self.samples)
            self._draw_epochs(self.epoch + 1, self.ahead)

    def close(self) -> None:
        if len(self.ahead):
            self._random.set_state(self._state_after(self.epoch))
            self.ahead = self.ahead[:0]

    def _epoch_after(self, taken: int) -> int:
        """The epoch of the last of so many steps, -1 before the first."""
        return (taken - 1) // self.per_epoch

    def _mark(self, epoch: int) -> None:
        self.marks.append((epoch, self._random.get_state()))

    def _state_after(self, epoch: int) -> Tensor:
        """The generator's state when the order of that epoch had been drawn, by drawing again what lies between."""
        mark, state = next(mark for mark in reversed(self.marks) if mark[0] <= epoch)
        again = torch.Generator().set_state(state)
        for _ in range(epoch - mark):
            torch.randperm(self.samples, generator=again, device="cpu", dtype=self.ahead.dtype)
        return again.get_state()

    @property
    def _random(self) -> torch.Generator:
        return torch.default_generator if self.generator is None else self.generator

    def _draw_epochs(self, first: int, rows: Tensor) -> None:
        """Draws the orders of epochs from number `first` on. The last one's beginning is what a History asks for."""
        for epoch, part in ((first, rows[:-1]), (first + len(rows) - 1, rows[-1:])):
            if len(part):
                self._mark(epoch - 1)
                self._draw(part)

    def _draw(self, rows: Iterable[Tensor]) -> None:
        for row in rows:
            # The numbers do not depend on the dtype, in which they need not be converted, nor copied.
            torch.randperm(self.samples, generator=self.generator, device="cpu", dtype=row.dtype, out=row)


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
        if self.installed and signal.getsignal(signal.SIGINT) == self._handle:  # else a checkpoint has set another
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
