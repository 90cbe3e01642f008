"""Optimizers: their state, and the calls that update it and the parameters."""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..records import TrainConfig
from .layout import Batch, Call, Layout, Storage


@functools.cache
def _fused_adam() -> dict[str, Callable]:
    """torch's own Adam and AdamW steps in one call each, or {} where this torch has none that work on a CPU.

    The functions are private, so they are tried once, on the first step from w = 1 with a gradient of 1.
    """
    try:
        names = {"adam": "_fused_adam_", "adamw": "_fused_adamw_"}
        functions = {optimizer: getattr(torch, name) for optimizer, name in names.items()}
        for function in functions.values():
            w, g, m, v = (torch.full((3,), value, device="cpu", dtype=torch.float32) for value in (1, 1, 0, 0))
            step = torch.ones((), device="cpu", dtype=torch.float32)
            _with_numbers(function, TrainConfig((1, 1)), 0.5)([w], [g], [m], [v], [], [step])
            found = torch.stack([w, m, v]).mean(1).tolist()
            if any(not math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found, (0.5, 0.1, 0.001), strict=True)):
                return {}
        return functions
    except Exception:  # a private function may raise anything; without it the step is written out
        return {}


def _with_numbers(function: Callable, config: TrainConfig, lr: float) -> Callable:
    numbers = {name: getattr(config, name) for name in ("beta1", "beta2", "weight_decay", "eps")}
    return partial(function, lr=lr, amsgrad=False, maximize=False, **numbers)


class Optimizer:
    """The optimizer's state, and the calls that update it and the parameters, by the formulas of torch.optim."""

    def __init__(
        self, layout: Layout, first: Sequence[Tensor], second: Sequence[Tensor], lr: Tensor, taken: int, graph: bool
    ) -> None:
        self.config, self.layout, self.taken, self.graph = layout.config, layout, taken, graph
        self.stateless = not first
        # One network's rate is a number, those of a stack are a tensor.
        self.rate = lr.item() if layout.members == 1 else 0.0
        self.rates = lr.view(layout.rates_shape) if layout.members > 1 else None
        self.keep = 1 - (self.rate if self.rates is None else self.rates) * self.config.weight_decay
        # Gradients are linear in dz of the output, the smallest tensor to scale: scaled there, they can be added to the
        # parameters at once.
        self.dz_rates = self.rates if self.stateless else None
        self.states = [layout.storage() for given in (first, second) if given]
        if self.stateless:
            return
        for own, given in zip(self.states if taken else (), (first, second), strict=False):
            layout.write(own, given)
        self.gradients = layout.storage()
        storages = [layout.parameters, self.gradients, *self.states]
        self.wholes = [storage.whole for storage in storages]
        if second:
            self.step = torch.zeros((), dtype=torch.float32, device=lr.device)
            # A captured step reads here what changes from step to step.
            self.factor, self.floor = lr.new_empty(()), lr.new_empty(())
            mine = graph or not self.step.is_cpu or self.rates is not None
            fused = None if mine else _fused_adam().get(self.config.optimizer)
            self.fused = fused and _with_numbers(fused, self.config, self.rate)

    def read(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        for own, given in zip(self.states, (first, second), strict=False):
            self.layout.read(own, given)

    def advance(self) -> None:
        """One more step: what changes with their number, outside of the calls, which a graph freezes."""
        self.taken += 1
        if self.graph and self.config.optimizer != "sgd":
            factor, floor = self._corrections()
            self.factor.fill_(factor)
            self.floor.fill_(floor)

    def _corrections(self) -> tuple[float, float]:
        """lr (m / c1) / (sqrt(v) / c2 + eps) is -factor lr m / (sqrt(v) + floor)."""
        config = self.config
        c1, c2 = 1 - config.beta1**self.taken, math.sqrt(1 - config.beta2**self.taken)
        return -c2 / c1, config.eps * c2

    def calls(self, batch: Batch) -> list[Call]:
        config, layout = self.config, self.layout
        if not self.stateless and config.optimizer == "sgd" and not config.nesterov and not config.dampening:
            # A buffer of zeros becomes the gradient itself in the first step, as torch has it.
            return [*layout.accumulate(batch, self.states[0], config.momentum, batch.scale), self._plain_momentum]
        if not self.stateless:
            update = self._momentum if config.optimizer == "sgd" else self._adam
            return [*layout.accumulate(batch, self.gradients, 0, batch.scale), update]
        if self.rates is None:
            beta, alpha = 1 - self.rate * config.weight_decay, -self.rate * batch.scale
            return layout.accumulate(batch, layout.parameters, beta, alpha)
        decayed = layout.parameters.parts if config.weight_decay else ()
        decay: list[Call] = [partial(part.mul_, self.keep) for part in decayed]
        return decay + layout.accumulate(batch, layout.parameters, 1, -batch.scale)

    def _momentum(self) -> None:
        config = self.config
        w, g, m = self.wholes
        if config.weight_decay:
            g.add_(w, alpha=config.weight_decay)
        if self.taken > 1:
            m.mul_(config.momentum).add_(g, alpha=1 - config.dampening)
        else:
            m.copy_(g)
        if config.nesterov:
            g.add_(m, alpha=config.momentum)
        self._descend(self.gradients if config.nesterov else self.states[0])

    def _plain_momentum(self) -> None:
        w, _, m = self.wholes
        if self.config.weight_decay:
            m.add_(w, alpha=self.config.weight_decay)
        self._descend(self.states[0])

    def _descend(self, directions: Storage, sign: int = -1) -> None:
        for w, direction in zip(self.layout.parameters.parts, directions.parts, strict=True):
            if self.rates is None:
                w.add_(direction, alpha=sign * self.rate)
            else:
                w.addcmul_(direction, self.rates, value=sign)

    def _adam(self) -> None:
        config = self.config
        w, g, m, v = self.wholes
        if self.fused is not None:
            self.step.fill_(self.taken)
            self.fused([w], [g], [m], [v], [], [self.step])
            return
        factor, floor = (self.factor, self.floor) if self.graph else self._corrections()
        if config.weight_decay and config.optimizer == "adam":
            g.add_(w, alpha=config.weight_decay)
        elif config.weight_decay:
            for part in self.layout.parameters.parts:
                part.mul_(self.keep)
        m.lerp_(g, 1 - config.beta1)
        v.mul_(config.beta2).addcmul_(g, g, value=1 - config.beta2)
        torch.div(m, torch.sqrt(v, out=g).add_(floor), out=g).mul_(factor)
        self._descend(self.gradients, 1)
