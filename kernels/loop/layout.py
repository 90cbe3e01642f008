# SPDX-License-Identifier: Apache-2.0
"""Where the numbers of a network lie, and the buffers and calls of a step on a batch of one size."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS, Activation
from ..hyperparameters import loss_scale
from ..records import TrainConfig

if TYPE_CHECKING:
    from .optimizer import Optimizer

Call = Callable[[], object]


@dataclass(frozen=True)
class Storage:
    """Something for every parameter: the parameters themselves, their gradients, an optimizer's state."""

    whole: Tensor  # that elementwise calls take
    parts: list[Tensor]  # of it, each of which a rate per member can multiply
    views: list[Tensor]  # one per layer, its weight and bias side by side


class Layout(ABC):
    """Where the numbers of a network, or of a stack of them, lie, and which calls compute with them."""

    axis: int  # of x and y that counts samples
    outputs_axis: int  # of an output that counts neurons
    rates_shape: tuple[int, ...]  # in which a rate per member multiplies parts and dz member by member

    def __init__(self, config: TrainConfig, parameters: Sequence[Tensor], x: Tensor, y: Tensor) -> None:
        self.config = config
        self.bias = int(config.bias)
        self.layers = config.layers  # (inputs, outputs)
        self.activations = [ACTIVATIONS[config.hidden]] * (len(self.layers) - 1) + [ACTIVATIONS[config.output]]
        self.like = parameters[0]
        self.members = self.like.shape[0]
        self.shared = x.shape[0] == 1
        self.x, self.y = self.samples(x, y)
        self.parameters = self.storage()
        self.write(self.parameters, parameters)
        # The factors of a step's losses, (E,), in memory, where a captured step finds them.
        self.factors = self.like.new_ones(self.members) if config.reduction == "given" else None

    @abstractmethod
    def samples(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """All samples, as batches are taken from them."""

    @abstractmethod
    def storage(self) -> Storage:
        """A new storage of zeros."""

    @abstractmethod
    def blocks(self, view: Tensor, inputs: int) -> tuple[Tensor, Tensor | None]:
        """The weight (E, N, K) and the bias (E, N) in a layer's view."""

    @abstractmethod
    def build(self, batch: "Batch") -> None:
        """Makes the batch's buffers and its calls, as far as the gradients at each layer's output."""

    @abstractmethod
    def accumulate(self, batch: "Batch", storage: Storage, beta: float, alpha: float) -> list[Call]:
        """Calls for storage = beta * storage + alpha * (dz times input, summed over the batch)."""

    def load(self, inputs: Tensor, target: Tensor, indices: Tensor | None) -> None:
        """Copies the samples with these indices, or all of them."""
        if indices is None:
            inputs.copy_(self.x)
            target.copy_(self.y)
        else:
            torch.index_select(self.x, self.axis, indices, out=inputs)
            if target.is_contiguous():
                torch.index_select(self.y, self.axis, indices, out=target)
            else:
                target.copy_(self.y.index_select(self.axis, indices))

    def split(self, target: Tensor) -> "tuple[Tensor, Tensor | None]":
        """A batch's targets, and their weights."""
        if not self.config.weighted:
            return target, None
        targets, weights = target.chunk(2, self.outputs_axis)
        return targets, weights

    def fill(self, storage: Storage, numbers: Tensor) -> Tensor:
        """The storage's whole, with the number of its member, (E,), for every parameter."""
        for part in storage.parts:
            part.copy_(numbers.view(self.rates_shape))
        return storage.whole

    def write(self, storage: Storage, tensors: Sequence[Tensor]) -> None:
        for own, given in zip(self._blocks(storage), tensors, strict=True):
            own.copy_(given)

    def read(self, storage: Storage, tensors: Sequence[Tensor]) -> None:
        for own, given in zip(self._blocks(storage), tensors, strict=True):
            given.copy_(own)

    def _blocks(self, storage: Storage) -> Iterator[Tensor]:
        for view, (inputs, _) in zip(storage.views, self.layers, strict=True):
            weight, bias = self.blocks(view, inputs)
            yield weight
            if bias is not None:
                yield bias


_streams = threading.local()
_one_capture = threading.Lock()  # at a time: to begin one waits for the device, which no other capture bears


def _capture_stream(device: torch.device) -> "torch.cuda.Stream":
    """A stream of this thread on this device. torch's own for captures is one for all, on the device that was first."""
    own: dict = _streams.__dict__.setdefault("by_device", {})
    if device not in own:
        own[device] = torch.cuda.Stream(device)
    return own[device]


class Batch:
    """The buffers and calls of a step on a batch of one size."""

    inputs: list[Tensor]  # of each layer, with its ones
    dz: list[Tensor]  # of each layer, but for the factor `scale`
    output: Tensor  # of the last layer
    target: Tensor  # broadcasts to it
    weights: Tensor | None  # of the targets
    summed: tuple[int, int]  # its dimensions but that of the members
    load: Callable[[Tensor | None], None]  # fetches the samples with these indices, or all
    updates: Sequence[partial] = ()  # calls with factors that change with the rate of a step
    whole_inputs: Tensor  # of a joint layout: those of all layers in one matrix
    whole_dz: Tensor

    def __init__(self, layout: Layout, optimizer: "Optimizer", size: int) -> None:
        self.config, self.size, self.dz_rates = layout.config, size, optimizer.dz_rates
        self.mean, self.factors = loss_scale(self.config, size), layout.factors
        if self.factors is not None:
            self.factors = self.factors.view(layout.rates_shape if layout.members > 1 else ())
        self.outputs_axis = layout.outputs_axis
        self.scale = self.mean * (2 if self.config.loss == "mse" else 1)
        self.forward: list[Call] = []
        self.backward: list[Call] = []
        layout.build(self)
        self.backward += optimizer.calls(self)
        self.calls = self.forward + self.backward
        self.ran = self.captured = False

    def capture(self) -> None:
        """Puts one replay of a CUDA graph in the place of all calls of a step.

        They have run before: libraries set themselves up on their first call, which a capture does not bear. Capturing
        runs nothing.
        """
        graph = torch.cuda.CUDAGraph()
        options = {"stream": _capture_stream(self.output.device), "capture_error_mode": "thread_local"}
        with _one_capture, torch.cuda.graph(graph, **options):
            for call in self.calls:
                call()
        self.calls = [graph.replay]
        self.captured = True

    def activate(self, activation: Activation, z: Tensor, out: Tensor) -> None:
        if z is not out or activation.name != "identity":
            self.forward.append(partial(activation.forward_into, z, out))

    def start_backward(self) -> None:
        p, t, dz = self.output, self.target, self.dz[-1]
        if self.config.loss == "bce_logits":
            self.backward += [partial(torch.sigmoid, p, out=dz), partial(torch.sub, dz, t, out=dz)]
        elif self.config.loss == "cross_entropy":
            targets = t.sum(self.outputs_axis, keepdim=True)
            self.backward += [
                partial(torch.softmax, p, self.outputs_axis, out=dz),
                partial(torch.sum, t, self.outputs_axis, keepdim=True, out=targets),
                partial(dz.mul_, targets),  # 1 for probabilities, but torch takes any
                partial(torch.sub, dz, t, out=dz),
            ]
        else:
            self.backward.append(partial(torch.sub, p, t, out=dz))
        if self.config.loss == "smooth_l1" and self.config.beta:
            self.backward += [partial(dz.div_, self.config.beta), partial(dz.clamp_, -1, 1)]
        elif self.config.loss == "smooth_l1":
            self.backward.append(partial(torch.sign, dz, out=dz))
        if self.config.loss in ("mse", "smooth_l1"):
            self.through(ACTIVATIONS[self.config.output], dz, p)
        factors = (self.weights, self.factors, self.dz_rates)
        self.backward += [partial(dz.mul_, factor) for factor in factors if factor is not None]

    def through(self, activation: Activation, dz: Tensor, h: Tensor) -> None:
        """dh in the place of dz becomes dz."""
        if activation.name != "identity":
            self.backward.append(partial(activation.backward_into, dz, h, dz))

    def loss(self) -> Tensor:
        """(E,)"""
        p, t = self.output, self.target
        if self.config.loss == "mse":
            values = (p - t).square_()
        elif self.config.loss == "bce":
            # torch's function raises at NaN, which a loop has to log; so the formula is written out.
            values = -(t * p.log().clamp_min_(-100) + (1 - t) * torch.log1p(-p).clamp_min_(-100))
        elif self.config.loss == "cross_entropy":
            values = torch.log_softmax(p, self.outputs_axis).mul_(t).neg_()
        elif self.config.loss == "smooth_l1":
            values = F.smooth_l1_loss(p, t.expand_as(p), reduction="none", beta=self.config.beta)
        else:
            values = F.binary_cross_entropy_with_logits(p, t.expand_as(p), reduction="none")
        if self.weights is not None:
            values.mul_(self.weights)
        total = values.sum(self.summed).mul_(self.mean)
        return total if self.factors is None else total * self.factors.flatten()
