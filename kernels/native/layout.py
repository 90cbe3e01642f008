# SPDX-License-Identifier: Apache-2.0
"""Where compiled loops have their numbers: parameters, samples, and what they work in, block by block."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..records import TrainConfig


class Layout(ABC):
    """Of `members` networks, which are trained in blocks of `networks`, `samples` samples at a time."""

    def __init__(self, config: TrainConfig, members: int, samples: int, networks: int, lanes: int) -> None:
        """lanes: of the vectors that memory is filled up to."""
        self.config, self.members, self.samples, self.networks, self.lanes = config, members, samples, networks, lanes
        self.layers = config.layers
        self.blocks = -(-members // networks)

    @abstractmethod
    def data(self, t: Tensor) -> Tensor:
        """x or y, (E or 1, S, numbers of a sample) -> (blocks or 1, numbers)."""

    @abstractmethod
    def storage(self, layers: Sequence[Tensor]) -> Tensor:
        """Weights with their biases behind them, (E, N, K + 1) or (E, N, K) of each layer -> (blocks, numbers)."""

    @abstractmethod
    def layers_of(self, storage: Tensor) -> Iterator[Tensor]:
        """The layers again, as views of a storage."""

    @abstractmethod
    def memory(self, like: Tensor, size: int) -> tuple[Tensor, ...]:
        """What one thread works in. like: a storage. size: samples of a batch."""

    def side_by_side(self, t: Tensor) -> Tensor:
        """(E, n) -> (blocks, n * networks): the numbers of the networks of a block lie side by side.

        The last block is filled up with copies of the last network.
        """
        missing = self.blocks * self.networks - self.members
        t = torch.cat([t, t[-1:].expand(missing, -1)]) if missing else t
        return t.view(self.blocks, self.networks, -1).transpose(1, 2).flatten(1).contiguous()

    def write(self, tensors: Sequence[Tensor], like: Tensor) -> Tensor:
        """A storage of the tensors, as `NativeLoop` gets them."""
        if not tensors:
            return like.new_empty(self.blocks, 0)
        step = 1 + self.config.bias
        views = [t if t.dim() == 3 else t[..., None] for t in tensors]
        return self.storage([torch.cat(views[l : l + step], 2) for l in range(0, len(views), step)])

    def parts(self, storage: Tensor) -> Iterator[Tensor]:
        """The weight and the bias of each layer, from where a storage holds them: views of it, if it has one block."""
        for layer, (k, _) in zip(self.layers_of(storage), self.layers, strict=False):
            yield layer[..., :k]
            if self.config.bias:
                yield layer[..., k]


class Members(Layout):
    """As `steps` has them: for each layer and neuron its weights, then its bias, of all networks of a block."""

    def data(self, t: Tensor) -> Tensor:
        return t.flatten(1) if len(t) == 1 else self.side_by_side(t.flatten(1))

    def storage(self, layers: Sequence[Tensor]) -> Tensor:
        packed = self.side_by_side(torch.cat([layer.flatten(1) for layer in layers], 1))
        return F.pad(packed, (0, -packed.shape[1] % self.lanes))

    def layers_of(self, storage: Tensor) -> Iterator[Tensor]:
        counts = [n * (k + self.config.bias) for k, n in self.layers]
        used = storage[:, : sum(counts) * self.networks].view(self.blocks, -1, self.networks)
        whole = used.transpose(1, 2).flatten(0, 1)[: self.members]
        for part, (_, n) in zip(whole.split(counts, 1), self.layers, strict=True):
            yield part.view(self.members, n, -1)

    def memory(self, like: Tensor, size: int) -> tuple[Tensor, ...]:
        """Gradients, activations and their gradients, targets, and the places that have a sample."""
        lanes, neurons = self.samples * self.networks, sum(self.config.widths)
        targets = self.config.widths[-1] * (1 + self.config.weighted)
        counts = (like.shape[1], neurons * lanes, neurons * lanes, targets * lanes, lanes)
        return tuple(like.new_empty(count) for count in counts)


class Neurons(Layout):
    """As `neurons` has them: for each layer and input the weights of all neurons, then their biases."""

    def data(self, t: Tensor) -> Tensor:
        return t.flatten(1)

    def storage(self, layers: Sequence[Tensor]) -> Tensor:
        padded = [F.pad(t.mT, (0, -t.shape[1] % self.lanes, 0, -t.shape[2] % self.samples)) for t in layers]
        return torch.cat([t.flatten(1) for t in padded], 1)

    def layers_of(self, storage: Tensor) -> Iterator[Tensor]:
        tall = [k + self.config.bias + -(k + self.config.bias) % self.samples for k, _ in self.layers]
        counts = [rows * (n + -n % self.lanes) for rows, (_, n) in zip(tall, self.layers, strict=True)]
        for part, rows, (k, n) in zip(storage.split(counts, 1), tall, self.layers, strict=True):
            yield part.view(self.blocks, rows, -1)[:, : k + self.config.bias, :n].mT

    def memory(self, like: Tensor, size: int) -> tuple[Tensor, ...]:
        """Gradients, activations and theirs, a layer turned, a batch's inputs and targets, and where samples begin."""
        rows = size + -size % self.samples
        wide = [n + -n % self.lanes for n in self.config.widths]
        tall = [n + -n % self.samples for n in self.config.widths]
        turned = max((n * k for k, n in zip(wide[1:], tall[2:], strict=False)), default=0)
        near = 0 if tall[0] == self.config.widths[0] else rows * tall[0]
        targets = rows * wide[-1] * (1 + self.config.weighted)
        counts = (like.shape[1], rows * sum(wide[1:]), rows * sum(wide[1:]), turned, near, targets)
        places = torch.zeros(len(wide) * rows, dtype=torch.int64, device="cpu")
        return *(like.new_zeros(count) for count in counts), places
