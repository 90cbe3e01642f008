"""Layers as the kernel hub takes them: a `forward` that runs on the parameters of the module whose own it replaces."""

from torch import Tensor, nn

from .functional import linear_act

__all__ = ["LinearReLU", "LinearSigmoid", "LinearTanh"]

# The hub refuses layers with a constructor, a method or a variable beyond these: the activation is written out.


class LinearSigmoid(nn.Module):
    """sigmoid(x @ weight.T + bias)."""

    weight: Tensor
    bias: Tensor | None
    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return linear_act(input, self.weight, self.bias, "sigmoid")


class LinearTanh(nn.Module):
    """tanh(x @ weight.T + bias)."""

    weight: Tensor
    bias: Tensor | None
    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return linear_act(input, self.weight, self.bias, "tanh")


class LinearReLU(nn.Module):
    """relu(x @ weight.T + bias)."""

    weight: Tensor
    bias: Tensor | None
    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return linear_act(input, self.weight, self.bias, "relu")
