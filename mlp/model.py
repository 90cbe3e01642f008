"""Whole networks."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..kernels import ops
from ..kernels.activations import ACTIVATIONS
from .layers import LAYERS, LinearAct

__all__ = ["MLP"]


@dataclass(frozen=True)
class _Run:
    """What `MLP.forward` needs to skip the calls of its layers, valid as long as `modules` are those of the network."""

    modules: tuple[nn.Module, ...]
    layers: list[tuple[dict, Callable[[Tensor], Tensor]]]  # parameters, activation; [] to call all modules
    attributes: list[dict]  # those of every module: an instance may get a forward of its own
    hooks: list[dict]  # the hooks of every module: alive, so seen as soon as one is registered
    growth: float  # multiply-adds of the largest layer per element of the input


class MLP(nn.Sequential):
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

    def forward(self, input: Tensor) -> Tensor:
        """input (..., sizes[0]) -> (..., sizes[-1])."""
        if torch.compiler.is_compiling():
            return super().forward(input)
        run = self.__dict__.get("_run")
        if run is None or run.modules != tuple(self._modules.values()):
            run = self.__dict__["_run"] = self._plan()
        try:
            if run.layers and input.is_cpu and not any(run.hooks) and not _has_any_global_hook():
                small = ops.small_cpu_products.get(input.dtype) or ops.small_cpu_product(input.dtype)
                if input.numel() * run.growth < small and not any("forward" in own for own in run.attributes):
                    return self._small(run, input)
        except (AttributeError, LookupError, RuntimeError, TypeError):
            pass  # a parametrized layer; or a wrong input, for which the layer has the better message
        return super().forward(input)

    def _small(self, run: _Run, y: Tensor) -> Tensor:
        # Plain torch operations, as the layers themselves would choose here, without the calls of 2 L modules.
        for parameters, activation in run.layers:
            y = activation(F.linear(y, parameters["weight"], parameters["bias"]))
        return y

    def _plan(self) -> _Run:
        modules = tuple(self._modules.values())
        layers = [cast(nn.Linear, module) for module in modules if type(module) is not nn.Identity]
        if not layers or not all(type(layer) in LAYERS.values() for layer in layers):
            return _Run(modules, [], [], [], 0.0)
        macs = max(layer.in_features * layer.out_features for layer in layers)
        return _Run(
            modules,
            [
                (
                    layer._parameters,
                    ACTIVATIONS[layer.activation if isinstance(layer, LinearAct) else "identity"].forward,
                )
                for layer in layers
            ],
            [module.__dict__ for module in modules],
            [
                hooks
                for m in modules
                for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
            ],
            macs / max(layers[0].in_features, 1),
        )

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def __getitem__(self, index):
        # A slice is no longer the network that the constructor describes. Its modules keep their names, as in torch.
        return (
            nn.Sequential(OrderedDict(list(self._modules.items())[index]))
            if isinstance(index, slice)
            else super().__getitem__(index)
        )
