"""Whole networks."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .functional.loss import mlp_sigmoid_bce
from .layers import LAYERS
from .sequential import Chain, FusedSequential


class MLP(FusedSequential):
    """A multilayer perceptron of fused layers.

    sizes: the width of the input, of each hidden layer and of the output, at least two numbers.
    activation, output_activation: "sigmoid", "tanh", "relu" or "identity"; the output takes that of the hidden
    layers unless told otherwise.

    Each fused layer is followed by an `nn.Identity` in the place where the activation would stand, so `state_dict`
    loads strictly into `nn.Sequential(nn.Linear(...), nn.Sigmoid(), ...)` and back.

    Raises TypeError for sizes that are no sequence of ints, ValueError for fewer than two of them, for one below 0 and
    for an unknown activation.
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
        if not isinstance(sizes, Sequence) or not all(isinstance(size, int) for size in sizes):
            raise TypeError(f"sizes must be a sequence of ints, not {sizes!r}")
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold an input and an output width, not {list(sizes)}")
        if min(sizes) < 0:
            raise ValueError(f"sizes must not be negative: {list(sizes)}")
        if output_activation is None:
            output_activation = activation
        for argument, name in (("activation", activation), ("output_activation", output_activation)):
            if name not in LAYERS:
                raise ValueError(f"{argument} must be one of {', '.join(LAYERS)}, not {name!r}")
        names = [activation] * (len(sizes) - 2) + [output_activation]
        modules: list[nn.Module] = []
        for name, (inputs, outputs) in zip(names, pairwise(sizes), strict=True):
            modules += [LAYERS[name](inputs, outputs, bias, device, dtype), nn.Identity()]
        super().__init__(*modules)

    def bce_loss(
        self, input: Tensor, target: Tensor, *, pos_weight: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        """The binary cross entropy of the network's output against target, from the logits of its last layer.

        input (..., sizes[0]), target (..., sizes[-1]). The output activation must be the sigmoid. Equals
        `nn.BCEWithLogitsLoss` of the logits; see `mlp_sigmoid_bce`. Raises NotImplementedError where the loss cannot
        be had in one piece: with another output activation, or with hooks or parametrizations on the layers.
        """
        steps = self._plan()[1]
        chain = steps[0] if len(steps) == 1 and isinstance(steps[0], Chain) else None
        found = chain.parameters() if chain is not None and chain.is_plain else None
        if chain is None or found is None or chain.activations is None or chain.activations[1] != "sigmoid":
            raise NotImplementedError(f"bce_loss needs plain layers, the last one with a sigmoid: {self}")
        options = {"pos_weight": pos_weight, "reduction": reduction}
        return mlp_sigmoid_bce(input, *found, target, chain.activations[0], **options)
