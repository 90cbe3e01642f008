# SPDX-License-Identifier: Apache-2.0
"""Optimizers: their state, and the calls that update it and the parameters."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..hyperparameters import COMMON, Hyperparameters
from ..records import TrainConfig
from ..trial import undisturbed
from .layout import Batch, Call, Layout, Storage


@functools.cache
@undisturbed
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
            _with_numbers(function, TrainConfig((1, 1)))([w], [g], [m], [v], [], [step], lr=0.5)
            found = torch.stack([w, m, v]).mean(1).tolist()
            if any(not math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found, (0.5, 0.1, 0.001), strict=True)):
                return {}
        return functions
    except Exception:  # a private function may raise anything; without it the step is written out
        return {}


def _with_numbers(function: Callable, config: TrainConfig) -> Callable:
    numbers = {name: getattr(config, name) for name in ("beta1", "beta2", "weight_decay", "eps")}
    return partial(function, amsgrad=False, maximize=False, **numbers)


class Optimizer:
    """The optimizer's state, and the calls that update it and the parameters, by the formulas of torch.optim."""

    def __init__(
        self,
        layout: Layout,
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        lr: Tensor | None,
        taken: int,
        graph: bool,
        own: Hyperparameters,
    ) -> None:
        """As `TorchLoop`. graph: steps are captured, and read from memory what changes from one to the next."""
        one, like = layout.members == 1, layout.like
        self.config = config = _of_one_member(layout.config, own) if one else layout.config
        own = COMMON if one else own
        self.layout, self.taken, self.stateless = layout, taken, not first
        # One network's rate is a number, those of a stack are a tensor.
        self.rate = lr.item() if one and lr is not None else 0.0
        self.rates = self.keep = None
        if not one or (lr is None and (graph or not like.is_cpu)):
            self.rates = like.new_empty(()) if one else like.new_empty(layout.members).view(layout.rates_shape)
            self.keep = torch.empty_like(self.rates) if config.weight_decay else None
            decay = own.of(config, "weight_decay")
            self.decay = decay.to(like).view(layout.rates_shape) if isinstance(decay, Tensor) else decay
            divides = config.optimizer == "rmsprop" and not second
            self.per_rate = [torch.empty_like(self.rates) for _ in range(2 * divides)]
            changing = [self.rates, *self.per_rate, *([] if self.keep is None else [self.keep])]
            self.changing = [_memory(own) for own in changing]
            if lr is not None:
                self._set(*self.rates_of(lr[None]))
        # Gradients are linear in dz of the output, the smallest tensor to scale: scaled there, they can be added to the
        # parameters at once.
        self.dz_rates = self.rates if self.stateless else None
        self.states = [layout.storage() for given in (first, second) if given]
        self.corrections: list[Storage] = []
        if self.stateless:
            return
        for own_state, given in zip(self.states if taken else (), (first, second), strict=False):
            layout.write(own_state, given)
        self.gradients = layout.storage()
        storages = [layout.parameters, self.gradients, *self.states]
        self.wholes = [storage.whole for storage in storages]
        self.weight_decay = self._whole(own.of(config, "weight_decay"))
        self.momentum, self.undamped = self._whole(own.of(config, "momentum")), self._whole(own.undamped(config))
        if config.optimizer == "sgd":
            return
        self.betas = tuple(_on(like.device, own.of(config, name)) for name in ("beta1", "beta2"))
        self.new1, self.beta2, self.new2 = map(self._whole, (1 - self.betas[0], self.betas[1], 1 - self.betas[1]))
        own_squares = config.optimizer == "rmsprop" or isinstance(self.new2, Tensor)
        self.spare = layout.storage() if own_squares else None
        if config.optimizer == "rmsprop":
            return
        # What a step reads that a number cannot tell: each member's own, or in a captured step.
        if any(isinstance(beta, Tensor) for beta in self.betas):
            self.corrections = [layout.storage(), layout.storage()]
        elif graph:
            self.corrections = [Storage(like.new_empty(()), [], []) for _ in range(2)]
        self.step = torch.zeros((), dtype=torch.float32, device=like.device)
        mine = graph or not self.step.is_cpu or self.rates is not None
        fused = None if mine else _fused_adam().get(config.optimizer)
        self.fused = fused and _with_numbers(fused, config)

    def read(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        for own, given in zip(self.states, (first, second), strict=False):
            self.layout.read(own, given)

    def rates_of(self, rates: Tensor | None) -> Iterable[Any]:
        """What `advance` takes, for each step. rates: (steps, E or 1), or None without a schedule."""
        if rates is None:
            return itertools.repeat(None)
        if self.rates is None:
            return rates[:, 0].tolist()
        rates = rates.view(*rates.shape, *self.rates.shape[1:]) if self.rates.dim() else rates[:, 0]
        rows = [rates]
        if self.per_rate:
            # 1 / rate and eps / rate. A rate of 0 divides by infinity, and 0 times infinity is nowhere. Schedulers may
            # pass below 0.
            inverse = 1 / rates.abs().clamp_min(torch.finfo(rates.dtype).tiny).copysign(rates)
            rows += [inverse, torch.where(rates == 0, torch.inf, self.config.eps * inverse)]
        if self.keep is not None:
            rows.append(1 - rates * self.decay)
        return zip(*map(_memory, rows), strict=True)

    def advance(self, batch: Batch, rate: Any) -> None:
        """One more step: what changes with their number, outside of the calls, which a graph freezes."""
        self.taken += 1
        if rate is not None and self.rates is not None:
            self._set(rate)
        elif rate is not None:
            self.rate = rate
            for call in batch.updates:
                call.keywords.update(self._factors(batch))
        if self.corrections:
            for storage, number in zip(self.corrections, self._corrections(), strict=True):
                if isinstance(number, Tensor):
                    self.layout.fill(storage, number)
                else:
                    storage.whole.fill_(number)

    def _set(self, rows: Sequence[Any]) -> None:
        for own, row in zip(self.changing, rows, strict=True):
            own[...] = row

    def _whole(self, number: float | Tensor) -> float | Tensor:
        """Of each member, (E,), what multiplies a whole storage."""
        return self.layout.fill(self.layout.storage(), number) if isinstance(number, Tensor) else number

    def _factors(self, batch: Batch) -> dict[str, float]:
        return {"beta": 1 - self.rate * self.config.weight_decay, "alpha": -self.rate * batch.scale}

    def _corrections(self) -> tuple[float | Tensor, float | Tensor]:
        """lr (m / c1) / (sqrt(v) / c2 + eps) is -factor lr m / (sqrt(v) + floor)."""
        beta1, beta2 = self.betas
        c1, square = 1 - beta1**self.taken, 1 - beta2**self.taken
        c2 = square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)
        return -c2 / c1, self.config.eps * c2

    def calls(self, batch: Batch) -> list[Call]:
        config, layout = self.config, self.layout
        if not self.stateless:
            plain = config.optimizer == "sgd" and not (config.nesterov or config.dampening)
            if plain and not isinstance(self.momentum, Tensor):
                # A buffer of zeros becomes the gradient itself in the first step, as torch has it.
                return [*layout.accumulate(batch, self.states[0], self.momentum, batch.scale), self._plain_momentum]
            update = {"sgd": self._momentum, "rmsprop": self._rmsprop}.get(config.optimizer, self._adam)
            return [*layout.accumulate(batch, self.gradients, 0, batch.scale), update]
        if self.rates is None:
            calls = layout.accumulate(batch, layout.parameters, **self._factors(batch))
            batch.updates = [call for call in calls if isinstance(call, partial)]
            return calls
        decay: list[Call] = []
        if self.keep is not None:
            decay += [partial(part.mul_, self.keep) for part in layout.parameters.parts]
        return decay + layout.accumulate(batch, layout.parameters, 1, -batch.scale)

    def _momentum(self) -> None:
        w, g, m = self.wholes
        if self.config.weight_decay:
            _add(g, w, self.weight_decay)
        if self.taken > 1:
            _add(m.mul_(self.momentum), g, self.undamped)
        else:
            m.copy_(g)
        if self.config.nesterov:
            _add(g, m, self.momentum)
        self._descend(self.gradients if self.config.nesterov else self.states[0])

    def _plain_momentum(self) -> None:
        w, _, m = self.wholes
        if self.config.weight_decay:
            _add(m, w, self.weight_decay)
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
            self.fused([w], [g], [m], [v], [], [self.step], lr=self.rate)
            return
        factor, floor = (own.whole for own in self.corrections) if self.corrections else self._corrections()
        if config.weight_decay and config.optimizer == "adam":
            _add(g, w, self.weight_decay)
        elif config.weight_decay:
            for part in self.layout.parameters.parts:
                part.mul_(1 - self.rate * config.weight_decay if self.keep is None else self.keep)
        m.lerp_(g, self.new1)
        self._average_square(v, g)
        torch.div(m, torch.sqrt(v, out=g).add_(floor), out=g).mul_(factor)
        self._descend(self.gradients, 1)

    def _rmsprop(self) -> None:
        w, g, v, *buffer = self.wholes
        if self.config.weight_decay:
            _add(g, w, self.weight_decay)
        self._average_square(v, g)
        spare = cast(Storage, self.spare)
        root = torch.sqrt(v, out=spare.whole)
        if buffer:
            buffer[0].mul_(self.momentum).addcdiv_(g, root.add_(self.config.eps))
            self._descend(self.states[1])
        elif self.rates is None:
            w.addcdiv_(g, root.add_(self.config.eps), value=-self.rate)
        else:
            inverse, floor = self.per_rate
            for part in spare.parts:
                torch.addcmul(floor, part, inverse, out=part)
            w.addcdiv_(g, root, value=-1)

    def _average_square(self, v: Tensor, g: Tensor) -> None:
        if isinstance(self.new2, Tensor):
            v.mul_(self.beta2).addcmul_(torch.mul(g, self.new2, out=cast(Storage, self.spare).whole), g)
        else:
            v.mul_(self.beta2).addcmul_(g, g, value=self.new2)


def _of_one_member(config: TrainConfig, own: Hyperparameters) -> TrainConfig:
    numbers = {name: number.item() for name, number in vars(own).items() if number is not None}
    return replace(config, **numbers, dampening=config.dampening if numbers.get("momentum", 1) else 0.0)


def _on(device: torch.device, number: float | Tensor) -> float | Tensor:
    return number.to(device) if isinstance(number, Tensor) else number


def _memory(t: Tensor) -> Any:
    """The tensor as numpy has it where it can, which takes a row in a fifth of the time."""
    return t.numpy() if t.is_cpu else t


def _add(a: Tensor, b: Tensor, factor: float | Tensor) -> None:
    """a += factor * b"""
    if isinstance(factor, Tensor):
        a.addcmul_(b, factor)
    else:
        a.add_(b, alpha=factor)
