"""Whole networks."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from .layers import LAYERS

__all__ = ["MLP"]


class MLP(nn.Sequential):
    """A multilayer perceptron of fused layers.

    sizes: the width of the input, of each hidden layer and of the output, at least two numbers.
    activation, output_activation: "sigmoid", "tanh", "relu" or "identity"; the output takes that of the hidden
    layers unless told otherwise.

    Each fused layer is followed by an `nn.Identity` in the place where the activation would stand, so `state_dict`
    loads strictly into `nn.Sequential(nn.Linear(...), nn.Sigmoid(), ...)` and back.

    Raises ValueError for fewer than two sizes, a size below 0 and an unknown activation.
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
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold an input and an output width, not {list(sizes)}")
        if min(sizes) < 0:
            raise ValueError(f"sizes must not be negative: {list(sizes)}")
        names = [activation] * (len(sizes) - 2) + [activation if output_activation is None else output_activation]
        for name in (activation, *names):
            if name not in LAYERS:
                raise ValueError(f"activation must be one of {', '.join(LAYERS)}, not {name!r}")
        modules: list[nn.Module] = []
        for name, (inputs, outputs) in zip(names, pairwise(sizes), strict=True):
            modules += [LAYERS[name](inputs, outputs, bias, device, dtype), nn.Identity()]
        super().__init__(*modules)

    def __getitem__(self, index):
        # A slice is no longer the network that the constructor describes.
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)
