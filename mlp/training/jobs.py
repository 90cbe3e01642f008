"""Chunks of steps: in a loop without autograd, or in an ordinary one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import train
from ...kernels.records import TrainConfig, TrainPlan
from ..as_network import Network
from ..ensemble import Ensemble
from .pacing import SampleOrder, logged_steps, runs_apart, synchronize
from .rates import Schedule, own_rates_kept
from .state import State


class FastJob:
    """Steps on copies of the parameters and of the optimizer's state, written back after every chunk."""

    def __init__(self, network: Network, config: TrainConfig, state: State, x, y, lr, batch_size, steps, impl) -> None:
        """lr: (E,) or a Schedule. Raises NotImplementedError with the reason where the loop asked for cannot run."""
        self.network, self.config, self.state, self.x, self.y, self.lr = network, config, state, x, y, lr
        self.columns, self.samples, self.impl = network.members or 1, x.shape[-2], impl
        self.loop: Any = None
        p = network.parameters[0]
        self.plan = train.plan_train(self.columns, self.samples, batch_size, config, p.dtype, p.device, impl, steps)
        self.path = self.plan.impl

    @property
    def setup_seconds(self) -> float:
        return getattr(self.loop, "setup_seconds", 0.0)

    def _set_up(self, batch: int) -> Any:
        self.parameters, self.first, self.second = map(self._copies, (self.network.parameters, *self.state.tensors()))
        # A view like z.conj().imag keeps the negative of its values in memory, which is what a kernel reads.
        x, y = (t.resolve_neg().contiguous() for t in (self.x, self.y))
        lr = None if isinstance(self.lr, Schedule) else self.lr.resolve_neg().contiguous()
        x, y = (t if t.dim() == 3 else t[None] for t in (x, y))
        arguments = (self.config, self.parameters, self.first, self.second, lr, x, y, batch, self.state.taken)
        try:
            return train.training_loop(self.plan)(*arguments, self.plan, self.state.own)
        except ImportError as error:  # of numba
            if self.impl is not None:
                raise NotImplementedError(f"impl={self.impl!r}: {error}") from error
            self.plan = TrainPlan("torch", str(error))
            self.path = self.plan.impl
            return train.training_loop(self.plan)(*arguments, self.plan, self.state.own)

    def _copies(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        copies = (t.detach().clone(memory_format=torch.contiguous_format) for t in tensors)
        return tuple(copy if self.network.members else copy[None] for copy in copies)

    def run(self, start: int, steps: int, order: SampleOrder | None, log_every: int) -> Tensor:
        p = self.network.parameters[0]
        if self.loop is None:
            self.loop = self._set_up(self.samples if order is None else order.batch)
        losses = p.new_empty(len(logged_steps(start, steps, log_every)), self.columns)
        rows = None if order is None else order.rows(start, steps).to(p.device)
        rates = self.lr.rows(start, steps).resolve_neg().to(p) if isinstance(self.lr, Schedule) else None
        self.loop.run(rows, start, steps, log_every, losses, rates)
        if order is not None and runs_apart(p.device):
            order.draw_ahead(steps)
        synchronize(p.device)
        with torch.no_grad():
            for own, copy in zip(self.network.parameters, self.parameters, strict=True):
                own.copy_(copy.view(own.shape))
            self.state.write(steps, self.first, self.second)
        return losses


class GeneralJob:
    """An ordinary loop: for each step a forward pass, a backward pass and a step of the optimizer."""

    path = "general"
    setup_seconds = 0.0

    def __init__(self, model: nn.Module, x, y, criterion, optimizer, schedule: Schedule | None) -> None:
        self.model, self.x, self.y, self.criterion, self.optimizer = model, x, y, criterion, optimizer
        self.schedule = schedule
        many = isinstance(model, Ensemble)
        self.columns, self.samples = (len(model), x.shape[-2]) if many else (1, x.shape[0])

    def run(self, start: int, steps: int, order: SampleOrder | None, log_every: int) -> Tensor:
        if self.schedule is None:
            return self._run(start, steps, order, log_every, [None] * steps)
        rows = self.schedule.rows(start, steps)
        if rows.shape[1] > 1:
            raise NotImplementedError("lr of each member needs a loop without autograd")
        with own_rates_kept(self.optimizer):
            return self._run(start, steps, order, log_every, rows[:, 0].tolist())

    def _run(self, start: int, steps: int, order, log_every: int, rates: Sequence[float | None]) -> Tensor:
        batches = None if order is None else order.batches(start, steps)
        losses = []
        for step, rate in zip(range(start, start + steps), rates, strict=True):
            indices = None if batches is None else next(batches)
            x, y = (data if indices is None else self._take(data, indices) for data in (self.x, self.y))
            logged = None
            for group in () if rate is None else self.optimizer.param_groups:
                group["lr"] = rate

            def closure(x=x, y=y):
                nonlocal logged
                self.optimizer.zero_grad()
                values = self._losses(x, y)
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
            if log_every and step % log_every == 0 and logged is not None:
                losses.append(logged)
        synchronize(self.x.device)
        return torch.stack(losses) if losses else torch.empty(0, self.columns, device="cpu")

    def _take(self, data: Tensor, indices: Tensor) -> Tensor:
        dimension = 1 if isinstance(self.model, Ensemble) and data.dim() == 3 else 0
        return data.index_select(dimension, indices.to(data.device))

    def _losses(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of each network, (1,) or, of an Ensemble, (E,)."""
        output = self.model(x)
        if not isinstance(self.model, Ensemble):
            return self._loss(output, y).reshape(1)
        targets = y if y.dim() == 3 else y.expand(len(output), *y.shape)
        return torch.stack([self._loss(p, t).reshape(()) for p, t in zip(output, targets, strict=True)])

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        loss = self.criterion(output, target)
        if not isinstance(loss, Tensor):
            raise TypeError(f"criterion must return a tensor with one number, not a {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"criterion must return a tensor with one number, not one of shape {tuple(loss.shape)}")
        return loss


Job = FastJob | GeneralJob
