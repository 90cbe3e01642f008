# SPDX-License-Identifier: Apache-2.0
"""The learning rates that `fit` is given in the place of the optimizer's own."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..as_network import Refused
from ..ensemble import Ensemble

Rates = Tensor | Callable[[int], float | Tensor]


class Schedule:
    """A rate for each step: of all members, or of each."""

    def __init__(self, given: Rates, members: int) -> None:
        """given: (steps, 1), (steps, members) or a function of the step."""
        self.given, self.members = given, members
        self.first, self.values = 0, []  # what the function returned for the steps asked for last: it is asked but once

    def undo(self) -> None:
        """Takes back what `rows` has changed last, for steps that were not taken."""

    def rows(self, start: int, steps: int) -> Tensor:
        """(steps, 1 or members), on any device. Raises what a function deserves for what it returns."""
        if isinstance(self.given, Tensor):
            return self.given.detach()[start : start + steps]
        known = self.values[start - self.first :] if start >= self.first else []
        # No map, which would take a StopIteration of the function for the end of the steps.
        self.first, self.values = start, known + [self.given(step) for step in range(start + len(known), start + steps)]
        values = self.values[:steps]
        if set(map(type, values)) == {float}:  # all at once: a step may take less time than to look at its rate
            rows = torch.tensor(values, dtype=torch.float64, device="cpu")[:, None]
        else:
            # Where a GPU has them, one by one would wait for it as often.
            device = next((v.device for v in values if isinstance(v, Tensor) and v.is_cuda), torch.device("cpu"))
            own = [self._row(step, value, device) for step, value in enumerate(values, start)]
            rows = torch.stack(own if all(len(row) == 1 for row in own) else [row.expand(self.members) for row in own])
        if not bool((rows >= 0).all()):
            step = int((rows >= 0).all(1).logical_not().nonzero()[0])
            raise ValueError(f"lr must not be negative, but lr({start + step}) is {rows[step].squeeze().tolist()}")
        return rows

    def _row(self, step: int, value: object, device: torch.device) -> Tensor:
        """(1,) or (members,), fp64."""
        if isinstance(value, Real) and not isinstance(value, bool):
            return torch.tensor([float(value)], dtype=torch.float64, device=device)
        if not isinstance(value, Tensor):
            raise TypeError(f"lr({step}) must return a float or a tensor, not {type(value).__name__}")
        if value.shape not in ((), (1,), (self.members,)):
            raise ValueError(f"lr({step}) returned a tensor {tuple(value.shape)}, neither () nor ({self.members},)")
        return value.detach().to(device, torch.float64).view(-1)


class Scheduled(Schedule):
    """The rates that a scheduler of torch will have given the steps, which it has taken itself by then."""

    def __init__(self, scheduler: LRScheduler, every: int) -> None:
        """every: after each so many steps the scheduler takes one."""
        self.scheduler, self.every = scheduler, every

    def check(self) -> None:
        """Raises Refused where its rates cannot be drawn ahead of the steps."""
        if _momentum_cycles(self.scheduler):
            raise Refused(f"a {type(self.scheduler).__name__} may change more than rates")
        try:
            copy.deepcopy(self.scheduler.state_dict())
        except Exception as error:  # of a function's attributes, which may raise anything
            raise Refused(f"the {type(self.scheduler).__name__} cannot be copied: {error}") from None

    def rows(self, start: int, steps: int) -> Tensor:
        optimizer = self.scheduler.optimizer
        (group,) = optimizer.param_groups
        self.before = copy.deepcopy((self.scheduler.state_dict(), group["lr"]))
        rates = []
        # The scheduler's first step warns where the optimizer has taken none, which it will have done in a moment.
        optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]
        try:
            for step in range(start + 1, start + steps + 1):
                rates.append(float(group["lr"]))
                if step % self.every == 0:
                    self.scheduler.step()
        except BaseException:
            self.undo()
            raise
        return torch.tensor(rates, dtype=torch.float64, device="cpu")[:, None]

    def undo(self) -> None:
        state, rate = self.before
        self.scheduler.load_state_dict(state)
        (group,) = self.scheduler.optimizer.param_groups
        if isinstance(rate, Tensor):  # which schedulers write over, and others may hold
            group["lr"].copy_(rate)
        else:
            group["lr"] = rate


def _momentum_cycles(scheduler: LRScheduler) -> bool:
    """Whether it changes more than rates, or is not one of torch's, of which that is known."""
    parts = getattr(scheduler, "_schedulers", [])
    foreign = type(scheduler).__module__ != LRScheduler.__module__
    return foreign or bool(getattr(scheduler, "cycle_momentum", False)) or any(map(_momentum_cycles, parts))


def check_rates(lr: object, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    if any("lr" not in group for group in optimizer.param_groups):
        raise ValueError(f"lr is for an optimizer with a rate, and a {type(optimizer).__name__} has none")
    if not isinstance(lr, Tensor):
        return
    if isinstance(model, Ensemble):
        members = len(model)
        if tuple(lr.shape) not in ((members,), (steps, 1), (steps, members)):
            forms = f"({members},), a rate for each member, nor a schedule, ({steps}, 1) or ({steps}, {members})"
            raise ValueError(f"lr {tuple(lr.shape)} is neither {forms}")
    elif lr.shape != (steps, 1):
        kind = type(model).__name__
        raise ValueError(f"lr {tuple(lr.shape)} is not a schedule ({steps}, 1), which is what it may be for a {kind}")
    if not lr.is_floating_point():
        raise TypeError(f"lr must be a floating point tensor, not {lr.dtype}")
    if not bool((lr >= 0).all()):
        raise ValueError(f"lr must not be negative, but its least is {lr.min().item()}")


def check_scheduler(scheduler: object, interval: str, optimizer: torch.optim.Optimizer, lr: object) -> None:
    if interval not in ("epoch", "step"):
        raise ValueError(f'scheduler_interval must be "epoch" or "step", not {interval!r}')
    if scheduler is None:
        return
    if lr is not None:
        raise ValueError("lr and scheduler both say what the rate of a step is: give one of them")
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        kind = type(scheduler).__name__
        raise TypeError(f"scheduler must be an LRScheduler that steps without looking at a loss, not {kind}")
    if scheduler.optimizer is not optimizer:
        raise ValueError(f"scheduler is not this {type(optimizer).__name__}'s, but another optimizer's")


def share_of(lr: Rates | None, members: slice, count: int) -> Rates | None:
    """What holds for these of `count` members."""
    if lr is None or (isinstance(lr, Tensor) and lr.shape[-1] != count):
        return lr
    if isinstance(lr, Tensor):
        return lr[..., members]

    def share(step: int) -> float | Tensor:
        rate = lr(step)
        return rate[members] if isinstance(rate, Tensor) and rate.shape == (count,) else rate

    return share


@contextmanager
def own_rates_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Gives the optimizer back the rates that it had."""
    kept = [(group, group["lr"]) for group in optimizer.param_groups]
    try:
        yield
    finally:
        for group, rate in kept:
            group["lr"] = rate
