# SPDX-License-Identifier: Apache-2.0
"""Layers as the kernel hub takes them: a `forward` that runs on the parameters of the module whose own it replaces."""

from torch import Tensor, nn

from .functional import linear_act

__all__ = ["LinearReLU", "LinearSigmoid", "LinearTanh"]


class _Layer(nn.Module):
    """What the hub lets a layer have beside its `forward`: no constructor, no other method, no other variable."""

    weight: Tensor
    bias: Tensor | None
    has_backward = True
    can_torch_compile = True


class LinearSigmoid(_Layer):
    """sigmoid(x @ weight.T + bias)."""

    def forward(self, input: Tensor) -> Tensor:
        return linear_act(input, self.weight, self.bias, "sigmoid")


class LinearTanh(_Layer):
    """tanh(x @ weight.T + bias)."""

    def forward(self, input: Tensor) -> Tensor:
        return linear_act(input, self.weight, self.bias, "tanh")


class LinearReLU(_Layer):
    """relu(x @ weight.T + bias)."""

    def forward(self, input: Tensor) -> Tensor:
        return linear_act(input, self.weight, self.bias, "relu")
