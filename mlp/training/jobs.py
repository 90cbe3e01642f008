# SPDX-License-Identifier: Apache-2.0
"""Chunks of steps: in a loop without autograd, or in an ordinary one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import train
from ...kernels.records import TrainConfig, TrainPlan
from ..as_network import Network
from ..ensemble import Ensemble
from .criteria import Means, has_own_targets
from .measures import losses_of
from .pacing import SampleOrder, logged_steps, runs_apart, synchronize
from .rates import Schedule, Scheduled, own_rates_kept
from .state import State, write_members


class FastJob:
    """Steps on copies of the parameters and of the optimizer's state, written back after every chunk."""

    def __init__(
        self,
        network: Network,
        config: TrainConfig,
        state: State,
        x: Tensor,
        y: Tensor,
        means: Means | None,
        lr: Tensor | Schedule,
        batch_size: int | None,
        steps: int,
        impl: str | None,
    ) -> None:
        """means: for a reduction "given". lr: (E,) or a Schedule. Raises NotImplementedError with the reason where the
        loop asked for cannot run."""
        self.network, self.config, self.state, self.x, self.y, self.lr = network, config, state, x, y, lr
        self.means, self.columns, self.samples, self.impl = means, network.members or 1, x.shape[-2], impl
        self.batch_size, self.setup_seconds = batch_size, 0.0
        self.taken = 0  # steps of the run
        self.rows: list[Tensor] = []  # (n, members) each, of their losses
        self.done = torch.zeros(self.columns, dtype=torch.bool, device="cpu")
        self.members: Tensor | None = None  # that train; None: all
        self._choose(self.columns, steps)

    def freeze(self, done: Tensor) -> None:
        """Trains on without the members that are done, (E,)."""
        if not torch.equal(done, self.done):
            self.done, self.members = done, done.logical_not().nonzero().squeeze(1).to(self.x.device)
            # What would be chosen now may depend on what else this process has run, but results must not.
            self.impl, reason = self.path, self.reason
            self._choose(len(self.members), None)
            self.reason = reason

    def _choose(self, networks: int, steps: int | None) -> None:
        p, self.loop = self.network.parameters[0], None
        data = (networks, self.samples, self.batch_size)
        self.plan = train.plan_train(*data, self.config, p.dtype, p.device, self.impl, steps)
        self.path, self.reason = self.plan.impl, self.plan.reason

    def _own(self, t: Tensor, dimension: int = 0) -> Tensor:
        """Of the members that train, from what each member has."""
        return t if self.members is None else t.index_select(dimension, self.members)

    def _of_members(self, rows: Tensor) -> Tensor:
        """Of (steps, 1 or E) as much as holds for the members that train."""
        return self._own(rows, 1) if rows.shape[1] > 1 else rows

    def _set_up(self, batch: int) -> Any:
        self.parameters, self.first, self.second = map(self._copies, (self.network.parameters, *self.state.tensors()))
        # A view like z.conj().imag keeps the negative of its values in memory, which is what a kernel reads.
        x, y = (self._own(t) if t.dim() == 3 else t[None] for t in (self.x, self.y))
        x, y = (t.resolve_neg().contiguous() for t in (x, y))
        lr = None if isinstance(self.lr, Schedule) else self._own(self.lr).resolve_neg().contiguous()
        own = self.state.own if self.members is None else self.state.own.part(self.members.cpu())
        arguments = (self.config, self.parameters, self.first, self.second, lr, x, y, batch, self.state.taken)
        try:
            loop: Any = train.training_loop(self.plan)(*arguments, self.plan, own)
        except ImportError as error:  # of numba
            if self.impl is not None:
                raise NotImplementedError(f"impl={self.impl!r}: {error}") from error
            self.plan = TrainPlan("torch", str(error))
            self.path, self.reason = self.plan.impl, self.plan.reason
            loop = train.training_loop(self.plan)(*arguments, self.plan, own)
        self.setup_seconds += getattr(loop, "setup_seconds", 0.0)
        return loop

    def _copies(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        copies = (self._own(t.detach()).clone(memory_format=torch.contiguous_format) for t in tensors)
        return tuple(copy if self.network.members else copy[None] for copy in copies)

    def run(
        self,
        start: int,
        steps: int,
        order: SampleOrder | None,
        log_every: int,
        review: Callable[[int, Tensor], int] | None = None,
    ) -> None:
        """Takes that many steps, or, where it raises anything, none.

        review: what `Watch.review` makes of the losses: how many of the steps are to be taken.
        """
        p = self.network.parameters[0]
        if self.loop is None:
            self.loop = self._set_up(self.samples if order is None else order.batch)
        logged, schedule = logged_steps(start, steps, log_every), self.lr if isinstance(self.lr, Schedule) else None
        losses = p.new_empty(len(logged), len(self.parameters[0]))
        rows = None if order is None else order.rows(start, steps).to(p.device)
        factors = void = None
        if self.means is not None and order is not None and rows is not None:
            factors, void = (self._of_members(t) for t in self.means.of(order, rows, start, steps))
            factors = factors.to(p)
        rates = None if schedule is None else self._of_members(schedule.rows(start, steps).resolve_neg().to(p))
        try:
            self.loop.run(rows, start, steps, log_every, losses, rates, factors)
            if order is not None and runs_apart(p.device):
                order.draw_ahead(steps)
            synchronize(p.device)
            if void is not None and logged:
                losses.masked_fill_(void[logged.start - start :: log_every], torch.nan)
            losses = losses.cpu()
            kept = steps if review is None else review(steps, losses)
        except BaseException:
            if schedule is not None:
                schedule.undo()
            raise
        if kept < steps:
            # The model has the parameters from before, and the same steps are the same to the bit.
            self.loop = None
            if schedule is not None:
                schedule.undo()
            if order is not None:
                order.rewind(start)
            self.run(start, kept, order, log_every)
            return
        with torch.no_grad():
            for own, copy in zip(self.network.parameters, self.parameters, strict=True):
                write_members(own, copy, self.members)
            self.state.write(steps, self.first, self.second, self.members)
        self.taken = start + steps
        if self.members is not None:  # the others log no more
            training, losses = losses, losses.new_full((len(losses), self.columns), torch.nan)
            losses[:, self.members.cpu()] = training
        self.rows.append(losses)


class GeneralJob:
    """An ordinary loop: for each step a forward pass, a backward pass and a step of the optimizer."""

    path = "general"
    setup_seconds = 0.0

    def __init__(self, model: nn.Module, x, y, criterion, optimizer, schedule: Schedule | None, reason: str) -> None:
        self.model, self.x, self.y, self.criterion, self.optimizer = model, x, y, criterion, optimizer
        self.schedule, self.reason = schedule, reason
        self.taken = 0
        self.rows: list[Tensor] = []
        self.frozen: list[tuple[Tensor, Tensor]] = []  # what members that are done have, and copies of it
        many = isinstance(model, Ensemble)
        self.columns, self.samples = (len(model), x.shape[-2]) if many else (1, x.shape[0])
        self.done = torch.zeros(self.columns, dtype=torch.bool, device=x.device)
        self.own_x, self.own_y = many and x.dim() == 3, many and has_own_targets(criterion, model, x, y)

    def random(self) -> list[Tensor]:
        """The states of the generators that a model may draw from, as Dropout does."""
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.x.device)] if self.x.is_cuda else states

    def set_random(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.x.is_cuda:
            torch.cuda.set_rng_state(states[1], self.x.device)

    def freeze(self, done: Tensor) -> None:
        """Trains on, but gives the members that are done, (E,), back what they have now."""
        done = done.to(self.done.device)
        if torch.equal(done, self.done):
            return
        self.done = done
        states = [t for entry in self.optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        stacked = [t for t in (*self.model.parameters(), *states) if t.dim() and len(t) == self.columns]
        self.frozen = [(t, t.detach().clone()) for t in stacked]

    def run(self, start: int, steps: int, order: SampleOrder | None, log_every: int) -> None:
        """Takes that many steps, or, where it raises anything, those that it counts."""
        if self.schedule is None or isinstance(self.schedule, Scheduled):
            self._run(start, steps, order, log_every, [None] * steps)
            return
        rows = self.schedule.rows(start, steps)
        if rows.shape[1] > 1:
            raise NotImplementedError("lr of each member needs a loop without autograd")
        with own_rates_kept(self.optimizer):
            self._run(start, steps, order, log_every, rows[:, 0].tolist())

    def _run(self, start: int, steps: int, order, log_every: int, rates: Sequence[float | None]) -> None:
        batches = [None] * steps if order is None else order.batches(start, steps, self.x.device)
        for step, rate, indices in zip(range(start, start + steps), rates, batches, strict=True):
            x, y = self.x, self.y
            if indices is not None:
                x, y = x.index_select(int(self.own_x), indices), y.index_select(int(self.own_y), indices)
            logged = None
            for group in () if rate is None else self.optimizer.param_groups:
                group["lr"] = rate

            def closure(x=x, y=y):
                nonlocal logged
                self.optimizer.zero_grad()
                values = losses_of(self.model, self.criterion, self.model(x), y, self.own_y)
                logged = values.detach() if logged is None else logged
                loss = values.sum()
                loss.backward()
                return loss

            with torch.enable_grad():
                if isinstance(self.optimizer, torch.optim.LBFGS):  # it evaluates the loss several times in a step
                    self.optimizer.step(closure)  # pyright: ignore[reportArgumentType]
                else:
                    closure()
                    self.optimizer.step()
            if isinstance(self.schedule, Scheduled) and (step + 1) % self.schedule.every == 0:
                self.schedule.scheduler.step()
            with torch.no_grad():
                for own, kept in self.frozen:
                    own[self.done] = kept[self.done]
            self.taken = step + 1
            if log_every and step % log_every == 0 and logged is not None:
                self.rows.append(logged.masked_fill(self.done, torch.nan)[None])
        synchronize(self.x.device)


Job = FastJob | GeneralJob
