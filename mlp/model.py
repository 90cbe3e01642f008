"""Whole networks."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ..kernels import ops
from ..kernels.activations import ACTIVATIONS
from .functional import mlp_act, mlp_sigmoid_bce
from .layers import LAYERS, LinearAct

__all__ = ["MLP"]


@dataclass(frozen=True)
class _Run:
    """What a network needs to run without the calls of its layers, valid as long as `modules` are those it has."""

    modules: tuple[nn.Module, ...]
    layers: list[tuple[dict, Callable[[Tensor], Tensor]]]  # parameters, activation; [] to call all modules
    attributes: list[dict]  # those of every module: an instance may get a forward of its own
    hooks: list[dict]  # the hooks of every module: alive, so seen as soon as one is registered
    growth: float  # multiply-adds of the largest layer per element of the input
    activations: tuple[str, str] | None  # hidden, output; None where hidden layers differ

    @property
    def free(self) -> bool:
        """Whether nobody would miss the calls of the modules."""
        # map and any in C: a network of four tiny layers runs in 30 us.
        overridden = any(map(dict.__contains__, self.attributes, repeat("forward")))
        return not overridden and not any(self.hooks) and not _has_any_global_hook()

    def parameters(self) -> tuple[list[Tensor], list[Tensor] | None] | None:
        """(weights, biases), without biases None; None where only some layers have one, or a layer is parametrized."""
        weights = [weight for own, _ in self.layers if (weight := own.get("weight")) is not None]
        biases = [bias for own, _ in self.layers if (bias := own.get("bias")) is not None]
        every = len(weights) == len(self.layers) and len(biases) in (0, len(weights))
        return (weights, biases or None) if every else None


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
        if is_compiling():
            return super().forward(input)
        run = self._run()
        if not (run.layers and run.free):
            return super().forward(input)
        try:
            if input.is_cpu:
                small = ops.small_cpu_products.get(input.dtype) or ops.small_cpu_product(input.dtype)
                if input.numel() * run.growth < small:
                    return self._small(run, input)
        except (AttributeError, LookupError, RuntimeError, TypeError):
            return super().forward(input)  # a parametrized layer; or a wrong input: the layer has the better message
        if run.activations is None or (parameters := run.parameters()) is None:
            return super().forward(input)
        try:
            return mlp_act(input, *parameters, *run.activations)
        except (TypeError, ValueError):
            return super().forward(input)  # a wrong input once more

    def bce_loss(
        self, input: Tensor, target: Tensor, *, pos_weight: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        """The binary cross entropy of the network's output against target, from the logits of its last layer.

        input (..., sizes[0]), target (..., sizes[-1]). The output activation must be the sigmoid. Equals
        `nn.BCEWithLogitsLoss` of the logits; see `mlp_sigmoid_bce`. Raises NotImplementedError where the loss cannot
        be had in one piece: with another output activation, or with hooks or parametrizations on the layers.
        """
        run = self._run()
        parameters = run.parameters() if run.layers and run.free else None
        if run.activations is None or run.activations[1] != "sigmoid" or parameters is None:
            raise NotImplementedError(f"bce_loss needs plain layers, the last one with a sigmoid: {self}")
        weights, biases = parameters
        options = {"pos_weight": pos_weight, "reduction": reduction}
        return mlp_sigmoid_bce(input, weights, biases, target, run.activations[0], **options)

    def _run(self) -> _Run:
        run = self.__dict__.get("_planned")
        if run is None or run.modules != tuple(self._modules.values()):
            run = self.__dict__["_planned"] = self._plan()
        return run

    def _small(self, run: _Run, y: Tensor) -> Tensor:
        # Plain torch operations, as the layers themselves would choose here, without the calls of 2 L modules.
        for parameters, activation in run.layers:
            y = activation(F.linear(y, parameters["weight"], parameters["bias"]))
        return y

    def _plan(self) -> _Run:
        modules = tuple(self._modules.values())
        layers = [cast(nn.Linear, module) for module in modules if type(module) is not nn.Identity]
        if not layers or not all(type(layer) in LAYERS.values() for layer in layers):
            return _Run(modules, [], [], [], 0.0, None)
        names = [layer.activation if isinstance(layer, LinearAct) else "identity" for layer in layers]
        macs = max(layer.in_features * layer.out_features for layer in layers)
        return _Run(
            modules,
            [(layer._parameters, ACTIVATIONS[name].forward) for layer, name in zip(layers, names, strict=True)],
            [module.__dict__ for module in modules],
            [
                hooks
                for m in modules
                for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
            ],
            macs / max(layers[0].in_features, 1),
            (names[0], names[-1]) if len(set(names[:-1])) <= 1 else None,
        )

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_planned"}

    def __getitem__(self, index):
        # A slice is no longer the network that the constructor describes. Its modules keep their names, as in torch.
        return (
            nn.Sequential(OrderedDict(list(self._modules.items())[index]))
            if isinstance(index, slice)
            else super().__getitem__(index)
        )
