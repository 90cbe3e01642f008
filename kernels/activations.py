# SPDX-License-Identifier: Apache-2.0
"""The activations: one record each, in plain torch.

Every derivative here is a function of the *output* y, never of the pre-activation z, so a layer saves one
tensor: sigmoid' = y (1 - y), tanh' = 1 - y^2, relu' = [y > 0 or NaN], identity' = 1. The same are written for the
compilers in `gpu/functions.py` and `native/functions.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    name: str
    forward: Callable[[Tensor], Tensor]  # z -> y
    forward_: Callable[[Tensor], Tensor]  # z -> y, written over z
    forward_into: Callable[[Tensor, Tensor], Tensor]  # (z, y) -> y, written into y, which may be z
    backward: Callable[[Tensor, Tensor], Tensor]  # (dy, y) -> dz, in one pass, differentiable to any order
    backward_into: Callable[[Tensor, Tensor, Tensor], Tensor]  # (dy, y, dz) -> dz, written into dz, which may be dy
    post_op: str  # the name of oneDNN's fused post-operation; "none" where it is missing or wrong


ACTIVATIONS: dict[str, Activation] = {
    record.name: record
    for record in (
        Activation(
            "sigmoid",
            torch.sigmoid,
            torch.sigmoid_,
            lambda z, y: torch.sigmoid(z, out=y),
            _aten.sigmoid_backward.default,
            lambda dy, y, dz: _aten.sigmoid_backward.grad_input(dy, y, grad_input=dz),
            "sigmoid",
        ),
        Activation(
            "tanh",
            torch.tanh,
            torch.tanh_,
            lambda z, y: torch.tanh(z, out=y),
            _aten.tanh_backward.default,
            lambda dy, y, dz: _aten.tanh_backward.grad_input(dy, y, grad_input=dz),
            "tanh",
        ),
        Activation(
            "relu",
            torch.relu,
            torch.relu_,
            lambda z, y: torch.clamp_min(z, 0, out=y),
            lambda dy, y: _aten.threshold_backward.default(dy, y, 0),
            lambda dy, y, dz: _aten.threshold_backward.grad_input(dy, y, 0, grad_input=dz),
            "none",  # oneDNN's relu turns NaN into 0
        ),
        Activation(
            "identity",
            lambda z: z,
            lambda z: z,
            lambda z, y: y if y is z else y.copy_(z),
            lambda dy, y: dy,
            lambda dy, y, dz: dz if dz is dy else dz.copy_(dy),
            "none",
        ),
    )
}
