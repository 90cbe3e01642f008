# SPDX-License-Identifier: Apache-2.0
"""Networks whose layers are matrices, or stacks of them."""

import itertools
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..records import TrainConfig
from .layout import Batch, Call, Layout, Storage

# Targets that lie as samples do, one per row, are read column by column. From this many numbers on that takes longer
# than to copy them first; it always does where one copy serves all steps.
SLOW_TO_CROSS = 1 << 17


class Matrices(Layout):
    """A layer is a matrix (N, K + 1), or a stack of them; its input is (K + 1, B), with ones in the last row.

    joint: one network only, with all layers on the diagonal of one matrix. One product then updates them all; what it
    leaves off the diagonal is never read.
    """

    axis, outputs_axis, rates_shape = -2, -2, (-1, 1, 1)

    def __init__(self, config: TrainConfig, parameters: Sequence[Tensor], x: Tensor, y: Tensor, joint: bool) -> None:
        self.joint = joint
        super().__init__(config, parameters, x, y)

    def samples(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.stack = () if self.members == 1 else (self.members,)
        self.rows = [n for _, n in self.layers]
        self.columns = [k + self.bias for k, _ in self.layers]
        return x[0] if self.shared else x, y[0] if y.shape[0] == 1 else y

    def storage(self) -> Storage:
        sizes = list(zip(self.rows, self.columns, strict=True))
        if self.joint:
            whole = self.like.new_zeros(sum(self.rows), sum(self.columns))
            corners = zip(itertools.accumulate(self.rows), itertools.accumulate(self.columns), strict=True)
            blocks = [whole[i - n : i, j - k : j] for (i, j), (n, k) in zip(corners, sizes, strict=True)]
            return Storage(whole, [whole], blocks)
        counts = [self.members * n * k for n, k in sizes]
        whole = self.like.new_zeros(sum(counts))
        parts = zip(whole.split(counts), sizes, strict=True)
        views = [part.view(*self.stack, n, k) for part, (n, k) in parts]
        return Storage(whole, views if self.stack else [whole], views)

    def blocks(self, view: Tensor, inputs: int) -> tuple[Tensor, Tensor | None]:
        view = view if self.stack else view[None]
        return view[..., :inputs], view[..., inputs] if self.bias else None

    def build(self, batch: Batch) -> None:
        new, ones, size = self.like.new_empty, self.like.new_ones, batch.size
        if self.joint:
            batch.whole_inputs, batch.whole_dz = ones(sum(self.columns), size), new(sum(self.rows), size)
            batch.inputs, batch.dz = list(batch.whole_inputs.split(self.columns)), list(batch.whole_dz.split(self.rows))
        else:
            # The first layer's input is laid out as the samples are, one per row.
            samples = ones(*self.x.shape[:-2], size, self.columns[0])
            batch.inputs = [samples.mT, *(ones(*self.stack, k, size) for k in self.columns[1:])]
            batch.dz = [new(*self.stack, n, size) for n in self.rows]
        batch.output = new(*self.stack, self.rows[-1], size)
        *stack, samples_of_y, columns = self.y.shape
        crossed = size == samples_of_y or size * columns > SLOW_TO_CROSS
        rows = new(*stack, columns, size).mT if crossed else new(*stack, size, columns)
        (batch.target, batch.weights), batch.summed = self.split(rows.mT), (-2, -1)
        batch.load = partial(self.load, batch.inputs[0][..., : self.layers[0][0], :].mT, rows)

        outputs = [*(h[..., :n, :] for h, n in zip(batch.inputs[1:], self.rows, strict=False)), batch.output]
        for l, (weight, h, out) in enumerate(zip(self.parameters.views, batch.inputs, outputs, strict=True)):
            # A stack of products is written into dense memory, and an input beside its ones is not dense.
            z = batch.dz[l] if self.stack and l < len(outputs) - 1 else out
            if self._as_one(l):
                batch.forward.append(partial(torch.mm, weight.flatten(0, 1), h, out=z.view(-1, size)))
            else:
                batch.forward.append(partial(torch.bmm if self.stack else torch.mm, weight, h, out=z))
            batch.activate(self.activations[l], z, out)
        batch.start_backward()
        for l in range(len(self.layers) - 1, 0, -1):
            dz, weight = batch.dz[l - 1], self.parameters.views[l][..., : self.layers[l][0]]
            batch.backward.append(partial(torch.bmm if self.stack else torch.mm, weight.mT, batch.dz[l], out=dz))
            batch.through(self.activations[l - 1], dz, outputs[l - 1])

    def _as_one(self, l: int) -> bool:
        """Whether the members' first layers are the rows of one matrix: they see the same samples."""
        return bool(self.stack) and self.shared and l == 0

    def accumulate(self, batch: Batch, storage: Storage, beta: float, alpha: float) -> list[Call]:
        if self.joint:
            (whole,) = storage.parts
            return [partial(whole.addmm_, batch.whole_dz, batch.whole_inputs.mT, beta=beta, alpha=alpha)]
        calls: list[Call] = []
        for l, (view, dz, h) in enumerate(zip(storage.views, batch.dz, batch.inputs, strict=True)):
            if self._as_one(l):
                calls.append(partial(view.flatten(0, 1).addmm_, dz.flatten(0, 1), h.mT, beta=beta, alpha=alpha))
            else:
                add = view.baddbmm_ if self.stack else view.addmm_
                calls.append(partial(add, dz, h.mT, beta=beta, alpha=alpha))
        return calls
