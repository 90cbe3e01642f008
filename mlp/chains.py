# SPDX-License-Identifier: Apache-2.0
"""Chains: linear layers and activations that follow each other, run as one network where nothing looks between."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _len_torch_function_stack  # pyright: ignore[reportAttributeAccessIssue]
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ..kernels import eligibility, small
from ..kernels.eligibility import PLAIN
from .functional import linear_act, mlp_act
from .functional.checks import check_layer
from .functional.eager import ERRORS
from .layers import NAMES


def own_method(kind: type, name: str = "forward") -> Callable | None:
    """The method that the file of a class, or of one behind it, gives it, or None if it has been patched."""
    method = getattr(kind, name)
    written = getattr(method, "__globals__", {}).get("__name__")  # the file
    for owner in kind.__mro__:
        if name in owner.__dict__:
            return method if written == owner.__module__ else None
    return None


# What calls a module; None, which no class has, if somebody had patched it before this file was read.
CALL, CALL_IMPL = own_method(nn.Module, "__call__"), own_method(nn.Module, "_call_impl")

# What layers and activations call, unless somebody has replaced it since.
_LINEAR, _SIGMOID, _TANH, _RELU = F.linear, torch.sigmoid, torch.tanh, F.relu
_FUNCTIONS = {"sigmoid": _SIGMOID, "tanh": _TANH, "relu": _RELU}


def _known(kind: type[nn.Module], name: str) -> tuple[Callable | None, int, bool, Callable | None]:
    module = kind(1, 1, device="meta") if issubclass(kind, nn.Linear) else kind()
    return own_method(kind), len(vars(module)), issubclass(kind, nn.Linear), _FUNCTIONS.get(name)


# Of each class in a chain: its `forward`, since one that is patched must run itself; how many attributes a module has:
# with as many, none hides the `forward` or a parameter; whether it has a product; its activation, if any.
_KINDS = {kind: _known(kind, name) for kind, name in NAMES.items()}


def _runs(kind: type[nn.Module], forward: Callable | None) -> bool:
    """Whether a call of a module of the class is torch's own call of this `forward`."""
    return kind.forward is forward and kind.__call__ is CALL and kind._call_impl is CALL_IMPL


# Attributes of a module that have it run something else.
_RUN_INSTEAD = ("forward", "_call_impl", "_compiled_call_impl")
_HIDING = (*_RUN_INSTEAD, "weight", "bias", "activation")


def runs_only_forward(module: nn.Module) -> bool:
    """Whether a call of the module runs the `forward` of its class and nothing else, torch's global hooks included."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or any([name in own for name in _RUN_INSTEAD])
        or _has_any_global_hook()
    )


def is_patched(kind: type[nn.Module]) -> bool:
    """Whether somebody has patched what a call of a module of the class runs."""
    return None in [own_method(kind, name) for name in ("__call__", "_call_impl", "forward")]


def runs_as_written(module: nn.Module) -> bool:
    """Whether a call of the module runs the `forward` that the file of its class has, and nothing else."""
    return runs_only_forward(module) and not is_patched(type(module))


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module, of a class in `NAMES`, computes what that class does from its parameters."""
    kind, own, parameters = type(module), module.__dict__, module._parameters
    return (
        runs_only_forward(module)
        and _runs(kind, _KINDS[kind][0])
        # An attribute of the instance hides the parameter of that name, or what its class says.
        and not ("weight" in own or "bias" in own or "activation" in own)
        and (not issubclass(kind, nn.Linear) or ("weight" in parameters and "bias" in parameters))
    )


class Chain:
    """Modules in a row that are a network: layers, of which hidden ones have one activation, and what stands between.

    Only which modules they are is kept: every call looks at their hooks and parameters anew.
    """

    def __init__(self, layers: list[tuple[nn.Linear, list[nn.Module], str]]) -> None:
        """layers: each with the modules behind it, of which at most one is no identity, and its activation."""
        self.layers = [layer for layer, _, _ in layers]
        self.activations = [name for _, _, name in layers]
        self.modules = [module for layer, behind, _ in layers for module in (layer, *behind)]
        self.forwards = [(kind, _KINDS[kind][0]) for kind in dict.fromkeys(map(type, self.modules))]
        self.widths = (self.layers[0].in_features, *(layer.out_features for layer in self.layers))
        self.few = -1  # elements below which a call on a CPU is known to be small, once one has asked
        # What a call compares of each module, and what it computes.
        self.known = [(module, type(module), *_KINDS[type(module)][1:]) for module in self.modules]

    def parameters(self) -> tuple[list[Tensor], list[Tensor | None]] | None:
        """(weights, biases), or None where calling the modules would run anything but the forwards of their classes."""
        if _has_any_global_hook() or not all([_runs(kind, forward) for kind, forward in self.forwards]):
            return None
        # `is_plain`, written out, for calls are what a small network costs on a GPU.
        counts = not is_compiling()  # torch 2.11's compiler does not count attributes
        for module, kind, size, _, _ in self.known:
            own = module.__dict__
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or type(module) is not kind
                or (not (counts and len(own) == size) and any([name in own for name in _HIDING]))
            ):
                return None
        found = [layer._parameters for layer in self.layers]
        if not all(["weight" in own and "bias" in own for own in found]):
            return None
        return [cast(Tensor, own["weight"]) for own in found], [own["bias"] for own in found]

    def __call__(self, input: Tensor) -> Tensor:
        """What calling the modules in turn computes."""
        if type(input) not in PLAIN or _has_any_global_hook():
            return self._run_any(input)
        return self.run_plain(input)

    def run_plain(self, input: Tensor) -> Tensor:
        """The same of a plain tensor, where no hooks see all modules."""
        on_cpu = input.is_cpu
        if (
            not ((on_cpu and input.numel() < self.few) or self._prefers_torch(input))
            or torch.sigmoid is not _SIGMOID
            or torch.tanh is not _TANH
            or F.relu is not _RELU
        ):
            return self._run_any(input)
        for kind, forward in self.forwards:
            if kind.forward is not forward or kind.__call__ is not CALL or kind._call_impl is not CALL_IMPL:
                return self._run_any(input)
        # Written out, as `is_plain` and a layer have it, since calls are what a tiny network costs.
        called, y = False, input
        weight: Any
        try:
            for module, kind, size, linear, activation in self.known:
                own = module.__dict__
                if (
                    own["_forward_hooks"]
                    or own["_forward_pre_hooks"]
                    or own["_backward_hooks"]
                    or own["_backward_pre_hooks"]
                    or len(own) != size
                    or type(module) is not kind
                    or (called and not linear)  # what a hook has kept is written over by a ReLU in place
                ):
                    called, y = True, module(y)
                    continue
                if linear:
                    parameters = own["_parameters"]
                    try:
                        weight, bias = parameters["weight"], parameters["bias"]
                    except KeyError:
                        weight = bias = None
                    if type(weight) is not nn.Parameter and type(weight) not in PLAIN:
                        called, y = True, module(y)  # which says what is missing, if anything is
                        continue
                    # torch misses a weight on the meta device; the layer has an error for it. A hook may have moved y.
                    if not (on_cpu and weight.is_cpu) and weight.device != y.device:
                        raise ValueError(f"weight is on {weight.device}, but x on {y.device}")
                    y = F.linear(y, weight, bias)
                if activation is not None:
                    y = activation(y)
            return y
        except ERRORS:
            if not called and not input.is_nested:
                self._check(input)
            raise  # what does fit has raised something else, which is not tried again

    def _prefers_torch(self, input: Tensor) -> bool:
        if self.few < 0:
            self.few = small.few_of_any(self.widths)
        return small.prefers_torch(input, self.widths)

    def _run_any(self, input: Tensor) -> Tensor:
        # Subclasses, what is no tensor (torch.fx records with symbols), modes and who has replaced some have a say in
        # the functions that are called, and a nested tensor has no shape to plan with.
        if (
            (type(input) not in PLAIN and hasattr(type(input), "__torch_function__"))
            or (F.linear, torch.sigmoid, torch.tanh, F.relu) != (_LINEAR, _SIGMOID, _TANH, _RELU)
            or (_len_torch_function_stack() and eligibility.functions_are_watched())
            or getattr(input, "is_nested", False)
        ):
            return run(self.modules, input)
        return self.fused(input)

    def _check(self, x: Tensor) -> None:
        """Raises the error that names what does not fit together, if anything does not."""
        for layer, name in zip(self.layers, self.activations, strict=True) if self.parameters() else ():
            check_layer(x, layer.weight, layer.bias, name, None)
            x = x.new_empty(0, layer.weight.shape[0])

    def fused(self, x: Tensor) -> Tensor:
        """The same by the functions of the package, as a whole if all layers have a bias or none has."""
        if (found := self.parameters()) is None:
            return run(chains(self.modules, seen=True), x)
        weights, biases = found
        given = [bias for bias in biases if bias is not None]
        if len(weights) > 1 and len(given) in (0, len(weights)):
            try:
                return mlp_act(x, weights, given or None, self.activations[0], self.activations[-1])
            except (TypeError, ValueError):
                if weights[-1].dim() == 1 and biases[-1] is None:
                    return run(self.modules, x)  # torch has a product with a vector
                self._check(x)  # the layer's error names its own arguments
                raise
        for weight, bias, activation in zip(weights, biases, self.activations, strict=True):
            x = linear_act(x, weight, bias, activation)
        return x


def run(steps: Iterable[Chain | nn.Module], input: Tensor) -> Tensor:
    """What the steps compute in turn."""
    for step in steps:
        input = step(input)
    return input


def chains(modules: Iterable[nn.Module | None], seen: bool = False) -> list[Chain | nn.Module]:
    """The modules in order, where those in a row that are a network, and more than one module, are one chain.

    seen: what would run something besides the forwards of their classes is in no chain.
    """
    groups: list[nn.Module | list[tuple[nn.Linear, list[nn.Module], str]]] = []
    for module in cast("Iterable[nn.Module]", modules):  # a None fails when it is called, as in torch
        layers = groups[-1] if groups and isinstance(groups[-1], list) else []
        name = NAMES.get(type(module))
        if name is None or (seen and not is_plain(module)):
            groups.append(module)
        elif isinstance(module, nn.Linear):
            if not layers or layers[-1][2] != layers[0][2]:
                groups.append(layers := [])
            layers.append((module, [], name))
        elif layers and "identity" in (name, layers[-1][2]):
            layer, behind, before = layers.pop()
            layers.append((layer, [*behind, module], name if before == "identity" else before))
        else:
            groups.append(module)
    return [
        group if not isinstance(group, list) else Chain(group) if len(group) > 1 or group[0][1] else group[0][0]
        for group in groups
    ]
