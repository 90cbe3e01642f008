# SPDX-License-Identifier: Apache-2.0
"""Training one task several ways at once: in turns, with a clock."""

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..ensemble import Ensemble
from ..training import History, fit
from ..training.pacing import PATIENCE_SECONDS, Bar, synchronize

NN, FUSED, HAND = "nn.Linear + nn.Sigmoid", "fused layers", "by hand"

# Steps that a loop takes before it is another's turn. On a busy machine the ratio of two loops' times wandered by 10%
# with turns of 500, by 2% with turns of 100.
TURN = 100
FIT_CALLS = 4  # all steps each, spread over the turns of the loops; the first may have to compile or load something


def check_steps(steps: int) -> None:
    """Raises ValueError for steps below 1."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")


@dataclass(frozen=True)
class Task:
    """What all contenders train: the same samples, loss and optimizer, for the same number of steps, at least 1."""

    x: Tensor  # (samples, inputs)
    y: Tensor  # (samples, outputs)
    criterion: nn.Module
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    steps: int
    log_every: int
    batch_size: int | None = None  # samples per step; None: all of them
    order_seed: int = 0  # of the order of the samples

    def __post_init__(self) -> None:
        check_steps(self.steps)

    @property
    def logged(self) -> range:
        """The steps at which the loss is logged, before their update."""
        return range(0, self.steps, self.log_every)

    def order(self) -> torch.Generator:
        """A new generator, from which the order of the samples is drawn."""
        return torch.Generator().manual_seed(self.order_seed)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The samples of each step, drawn as `fit` draws them: one permutation per epoch."""
        order = self.order()
        while self.batch_size is not None:
            for batch in torch.randperm(len(self.x), generator=order, device="cpu").split(self.batch_size):
                yield self.x[batch], self.y[batch]
        while True:
            yield self.x, self.y


@dataclass(frozen=True)
class Run:
    """What one contender made of a task."""

    name: str
    path: str  # "loop", or what ran under fit: `History.path`
    model: nn.Module  # trained
    losses: list[float]  # at the logged steps
    seconds: float  # all steps once, the first one's compilation included where there is one
    us_per_step: float  # microseconds, of an Ensemble per member; median over turns, or calls but for the first
    ratio: float  # the first contender's time per step over this one's; of loops the median over turns


class Loop:
    """An ordinary training loop that can be run piece by piece, with a clock."""

    path = "loop"
    members = 1

    def __init__(self, name: str, model: nn.Module, task: Task) -> None:
        self.name, self.model, self.task = name, model, task
        self.optimizer = task.optimizer(model.parameters())
        self.losses: list[float] = []
        self.batches = task.batches()
        self.clock = _Clock(task.x.device)

    def warm_up(self) -> None:
        """Takes a step and takes it back: what torch loads and compiles for it counts as seconds, not as a step's."""
        before = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        with self.clock.of(0, 1):
            self.step()
        self.model.load_state_dict(before[0])
        self.optimizer.load_state_dict(before[1])
        self.batches = self.task.batches()

    def take(self, turn: int, turns: int, steps: range) -> None:
        """Takes these steps."""
        with self.clock.of(turn, len(steps)):
            for step in steps:
                loss = self.step()
                if step % self.task.log_every == 0:
                    self.losses.append(loss.item())

    def step(self) -> Tensor:
        """One step; the loss before it, ()."""
        x, y = next(self.batches)
        self.optimizer.zero_grad()
        loss = self.task.criterion(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class FitCalls:
    """Calls of `fit`, each training a fresh copy of the model for all steps, at a few of the turns.

    Each call takes all steps: in calls of 100 steps the checks of `fit` would take most of the time. On a CPU all take
    compiled loops, where there are any: their steady speed is to be shown, and beside it how long the first call took.

    lr: that of `fit`, for an Ensemble. column: the member whose losses are shown, for an Ensemble.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        impl: str | None = None,
        *,
        name: str = "fit",
        calls: int = FIT_CALLS,
        lr: Tensor | None = None,
        column: int | None = None,
    ) -> None:
        self.name, self.initial, self.task, self.impl, self.calls = name, model, task, impl, calls
        self.lr, self.column, self.members = lr, column, len(model) if isinstance(model, Ensemble) else 1
        self.clock = _Clock(task.x.device)
        if impl is None and task.x.is_cpu:
            self.impl = "native"
            with suppress(NotImplementedError):
                self.model, self.history = self._fit(0)
                return
        self.impl = impl
        self.model, self.history = self._fit(0)

    @property
    def path(self) -> str:
        return self.history.path

    def _fit(self, steps: int, turn: int | None = None) -> tuple[nn.Module, History]:
        model, task = copy.deepcopy(self.initial), self.task
        options = {"steps": steps, "log_every": task.log_every, "lr": self.lr, "impl": self.impl}
        options |= {"batch_size": task.batch_size, "generator": task.order()}
        options |= {"criterion": task.criterion, "optimizer": task.optimizer(model.parameters())}
        with nullcontext() if turn is None else self.clock.of(turn, steps):
            history = fit(model, task.x, task.y, **options)
        return model, history

    def take(self, turn: int, turns: int, steps: range) -> None:
        """Trains from the start for all steps, if this is one of its turns: none at the ends, where loops warm up."""
        own = {(2 * call + 1) * turns // (2 * self.calls) for call in range(self.calls)}
        if turn in own:
            if len(own) == 1:
                # No second call will tell how long the steps alone take: a short one compiles and loads for this one.
                self._fit(1, turn)
            self.model, self.history = self._fit(self.task.steps, turn)

    @property
    def losses(self) -> list[float]:
        losses = self.history.loss
        return (losses if self.column is None else losses[:, self.column]).tolist()


def fit_contenders(model: nn.Module, task: Task, calls: int = FIT_CALLS) -> list[FitCalls]:
    """`fit` with its own choice of implementation and, on a GPU, with each other one that takes this task."""
    found = [FitCalls(model, task, calls=calls)]
    for impl in ("lane", "block", "graph") if task.x.is_cuda else ():
        with suppress(NotImplementedError):
            other = FitCalls(model, task, impl, name=f"fit, {impl}", calls=calls)
            if other.path != found[0].path:
                found.append(other)
    return found


def race(task: Task, contenders: Sequence[Loop | FitCalls], progress: bool) -> tuple[Run, ...]:
    """Trains them all, in turns, so that whatever slows the machine slows all of them.

    progress: a bar on stderr, with the time that is left, if that is a terminal, tqdm is installed and it takes longer
    than two seconds.
    """
    # Turns are equally long, since the time of a short last one would be noise.
    turns = max(1, task.steps // TURN)
    bounds = (i * task.steps // turns for i in range(turns + 1))
    loops = [c for c in contenders if isinstance(c, Loop)]
    calls = [c for c in contenders if isinstance(c, FitCalls)]
    for loop in loops if turns < 3 else ():  # a median of three turns does not see what is slow in the first
        loop.warm_up()
    with closing(Bar(task.steps, wanted=False, began=time.perf_counter())) as bar:
        for turn, (start, stop) in enumerate(pairwise(bounds)):
            # Loops go first by turns, so that a steady drift favours none. A loop that follows a call of `fit` runs a
            # little slower; the calls are few and come last in their turns, so the medians do not show it.
            for contender in [*(loops if turn % 2 == 0 else reversed(loops)), *calls]:
                contender.take(turn, turns, range(start, stop))
            if progress:
                # The first turn tells how long all of them will take; a bar says how long they have still to go.
                bar.wanted = bar.wanted or (time.perf_counter() - bar.began) * turns > PATIENCE_SECONDS * (turn + 1)
                bar.show(stop)
    base = contenders[0].clock.us
    runs = []
    for c in contenders:
        us = {turn: value / c.members for turn, value in c.clock.us.items()}
        steady = list(us.values())[isinstance(c, FitCalls) and len(us) > 1 :]
        us_per_step = statistics.median(steady)
        if isinstance(c, Loop):
            seconds = sum(c.clock.seconds)
            ratio = statistics.median(base[turn] / value for turn, value in us.items())
        else:
            seconds = c.clock.seconds[0] if len(us) > 1 else sum(c.clock.seconds)
            # A call takes all steps, so it is compared with the median turn and not with the one it fell into.
            ratio = statistics.median(base.values()) / us_per_step
        runs.append(Run(c.name, c.path, c.model, c.losses, seconds, us_per_step, ratio))
    return tuple(runs)


class _Clock:
    """Measures how long pieces of work take, on a GPU until its queue is empty."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.us: dict[int, float] = {}  # microseconds per step, by turn

    @contextmanager
    def of(self, turn: int, steps: int) -> Iterator[None]:
        synchronize(self.device)
        began = time.perf_counter()
        yield
        synchronize(self.device)
        seconds = time.perf_counter() - began
        self.seconds.append(seconds)
        self.us[turn] = 1e6 * seconds / steps
