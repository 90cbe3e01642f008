# SPDX-License-Identifier: Apache-2.0
"""Whole networks."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from typing import TypeGuard

import torch
from torch import Tensor, nn

from .chains import Chain
from .functional.loss import mlp_sigmoid_bce
from .layers import MODULES
from .sequential import FusedSequential, steps_of


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an int, or one of numpy's."""
    return isinstance(value, Integral) and not isinstance(value, bool)


class MLP(FusedSequential):
    """A multilayer perceptron: an `nn.Sequential` of `nn.Linear` and activation modules that runs them fused.

    sizes: the width of the input, of each hidden layer and of the output, at least two integers.
    activation, output_activation: "sigmoid", "tanh", "relu" or "identity" (an `nn.Identity`); the output takes that of
    the hidden layers unless told otherwise. bias, device, dtype: those of every `nn.Linear`.

    The modules are those of torch, and so are `state_dict`, initialization, hooks and surgery; a slice is an
    `nn.Sequential`. What follows each other is paired at every call.

    Raises TypeError for sizes that are no sequence of integers, ValueError for fewer than two of them, for one below 0
    and for an unknown activation.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "sigmoid",
        output_activation: str | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(sizes, Sequence) or not all(map(is_whole, sizes)):
            raise TypeError(f"sizes must be a sequence of ints, not {sizes!r}")
        widths = [int(size) for size in sizes]
        if len(widths) < 2:
            raise ValueError(f"sizes must hold an input and an output width, not {widths}")
        if min(widths) < 0:
            raise ValueError(f"sizes must not be negative: {widths}")
        if output_activation is None:
            output_activation = activation
        for argument, name in (("activation", activation), ("output_activation", output_activation)):
            if not isinstance(name, str) or name not in MODULES:
                raise ValueError(f"{argument} must be one of {', '.join(MODULES)}, not {name!r}")
        names = [activation] * (len(widths) - 2) + [output_activation]
        modules: list[nn.Module] = []
        for name, (inputs, outputs) in zip(names, pairwise(widths), strict=True):
            modules += [nn.Linear(inputs, outputs, bias, device, dtype), MODULES[name]()]
        super().__init__(*modules)

    def __getitem__(self, index):
        # A slice is no longer the network that the constructor describes. Its modules keep their names, as in torch.
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def bce_loss(
        self, input: Tensor, target: Tensor, *, pos_weight: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        """The binary cross entropy of the network's output against target, from the logits of its last layer.

        input (..., sizes[0]), target (..., sizes[-1]). The output activation must be the sigmoid. Equals
        `nn.BCEWithLogitsLoss` of the logits; see `mlp_sigmoid_bce`. Raises NotImplementedError where the loss cannot
        be had in one piece: with another output activation, or with hooks or parametrizations on the layers.
        """
        steps = steps_of(self)
        chain = steps[0] if len(steps) == 1 and isinstance(steps[0], Chain) else None
        weights, biases = (chain and chain.parameters()) or ((), ())
        given = [bias for bias in biases if bias is not None]
        if chain is None or not weights or chain.activations[-1] != "sigmoid" or len(given) not in (0, len(weights)):
            raise NotImplementedError(f"bce_loss needs plain layers, the last one with a sigmoid: {self}")
        options = {"pos_weight": pos_weight, "reduction": reduction}
        return mlp_sigmoid_bce(input, weights, given or None, target, chain.activations[0], **options)
