# SPDX-License-Identifier: Apache-2.0
"""Stacks of networks of which every single parameter is an array over the members."""

from functools import partial

import torch
from torch import Tensor

from .layout import Batch, Call, Layout, Storage


class Arrays(Layout):
    """Every parameter is an array over the members: a layer is (K + 1, N, E), its input (B, K + 1, E).

    Products are sums of elementwise calls, but for that of the first layer if its samples are shared: its members are
    the columns of one matrix, and its input is (B, K + 1).
    """

    axis, outputs_axis, rates_shape = 0, 1, (-1,)

    def samples(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x[0] if self.shared else x.permute(1, 2, 0).contiguous(), y.permute(1, 2, 0).contiguous()

    def storage(self) -> Storage:
        counts = [n * (k + self.bias) for k, n in self.layers]
        whole = self.like.new_zeros(sum(counts), self.members)
        parts = zip(whole.split(counts), self.layers, strict=True)
        return Storage(whole, [whole], [part.view(-1, n, self.members) for part, (_, n) in parts])

    def blocks(self, view: Tensor, inputs: int) -> tuple[Tensor, Tensor | None]:
        return view[:inputs].permute(2, 1, 0), view[inputs].t() if self.bias else None

    def build(self, batch: Batch) -> None:
        new, ones, size = self.like.new_empty, self.like.new_ones, batch.size
        samples = ones(size, self.layers[0][0] + self.bias, *self.x.shape[2:])
        batch.inputs = [samples, *(ones(size, k + self.bias, self.members) for k, _ in self.layers[1:])]
        batch.dz = [new(size, n, self.members) for _, n in self.layers]
        batch.output = new(size, self.layers[-1][1], self.members)
        target = new(size, *self.y.shape[1:])
        (batch.target, batch.weights), batch.summed = self.split(target), (0, 1)
        batch.load = partial(self.load, samples[:, : self.layers[0][0]], target)

        outputs = [*(h[:, :n] for h, (_, n) in zip(batch.inputs[1:], self.layers, strict=False)), batch.output]
        for l, (view, h, out) in enumerate(zip(self.parameters.views, batch.inputs, outputs, strict=True)):
            z, (k, _) = batch.dz[l], self.layers[l]
            if l == 0 and self.shared:
                batch.forward.append(partial(torch.mm, h, view.flatten(1), out=z.view(size, -1)))
            else:
                terms = [(view[i], h[:, i : i + 1]) for i in range(k)]
                batch.forward += _sum_of_products(terms, z, view[k] if self.bias else None)
            batch.activate(self.activations[l], z, out)
        batch.start_backward()
        for l in range(len(self.layers) - 1, 0, -1):
            (k, n), dz, view = self.layers[l], batch.dz[l - 1], self.parameters.views[l]
            terms = [(view[:k, i], batch.dz[l][:, i : i + 1]) for i in range(n)]
            batch.backward += _sum_of_products(terms, dz, None)
            batch.through(self.activations[l - 1], dz, outputs[l - 1])

    def accumulate(self, batch: Batch, storage: Storage, beta: float, alpha: float) -> list[Call]:
        calls: list[Call] = []
        for l, (view, dz, h) in enumerate(zip(storage.views, batch.dz, batch.inputs, strict=True)):
            if l == 0 and self.shared:
                calls.append(partial(view.flatten(1).addmm_, h.t(), dz.flatten(1), beta=beta, alpha=alpha))
                continue
            if beta == 0:
                calls.append(view.zero_)  # a product with 0 would keep NaN
            elif beta != 1:
                calls.append(partial(view.mul_, beta))
            for own, gradient in zip(h, dz, strict=True):
                calls.append(partial(view.addcmul_, own[:, None], gradient[None], value=alpha))
        return calls


def _sum_of_products(terms: list[tuple[Tensor, Tensor]], out: Tensor, bias: Tensor | None) -> list[Call]:
    """Calls for out = sum of a * b over the terms, plus bias."""
    (a, b), *rest = terms
    begin = partial(torch.mul, a, b, out=out) if bias is None else partial(torch.addcmul, bias, a, b, out=out)
    return [begin, *(partial(out.addcmul_, a, b) for a, b in rest)]
