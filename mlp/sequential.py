"""An `nn.Sequential` that runs fused layers which follow each other as one network."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.nn.functional import linear
from torch.nn.modules import module as _modules

from ..kernels import ops
from ..kernels.activations import ACTIVATIONS
from .functional.eager import ERRORS
from .functional.network import mlp_act
from .layers import LAYERS, activation_of

# Where torch.nn.modules.module.register_module_*_hook put hooks that run for every module.
_GLOBAL_HOOKS = (
    _modules._global_forward_hooks,
    _modules._global_forward_pre_hooks,
    _modules._global_backward_hooks,
    _modules._global_backward_pre_hooks,
)


@dataclass(frozen=True, slots=True)
class Chain:
    """Fused layers that follow each other in an `nn.Sequential`, and what it takes to run them as one network."""

    modules: tuple[nn.Module, ...]
    layers: tuple[tuple[dict, Callable[[Tensor], Tensor]], ...]  # (parameters by name, activation) of each layer
    # The dicts of the modules themselves, not copies: they show what is set or registered later.
    attributes: tuple[dict, ...]  # of every module; an instance may get a `forward` of its own
    hooks: tuple[dict, ...]  # of every module, and torch's global ones
    widths: tuple[int, ...]
    activations: tuple[str, str] | None  # hidden, output; None where hidden layers differ

    @classmethod
    def of(cls, modules: tuple[nn.Module, ...]) -> "Chain":
        layers = [cast(nn.Linear, module) for module in modules if not is_identity(module)]
        names = [activation_of(layer) for layer in layers]
        return cls(
            modules,
            tuple((layer._parameters, ACTIVATIONS[name].forward) for layer, name in zip(layers, names, strict=True)),
            tuple(module.__dict__ for module in modules),
            (*_GLOBAL_HOOKS, *(hooks for module in modules for hooks in hooks_of(module))),
            (layers[0].in_features, *(layer.out_features for layer in layers)),
            (names[0], names[-1]) if len(set(names[:-1])) <= 1 else None,
        )

    @property
    def is_plain(self) -> bool:
        """Whether calling the modules would run nothing but the `forward` of their classes."""
        return not any(self.hooks) and not any("forward" in own for own in self.attributes)

    def parameters(self) -> tuple[list[Tensor], list[Tensor] | None] | None:
        """(weights, biases), without biases None; None where only some layers have one, or a layer is parametrized."""
        found = [(own.get("weight"), own.get("bias")) for own, _ in self.layers]
        weights = [weight for weight, _ in found if weight is not None]
        biases = [bias for _, bias in found if bias is not None]
        every = len(weights) == len(self.layers) and len(biases) in (0, len(weights))
        return (weights, biases or None) if every else None

    def run(self, input: Tensor) -> Tensor:
        """What calling the modules in turn computes."""
        # `is_plain` and the layers' choice of torch are written out here, since calls are what a tiny network costs.
        if any(self.hooks):
            return self._one_by_one(input)
        for own in self.attributes:
            if "forward" in own:
                return self._one_by_one(input)
        try:
            if on_cpu := input.is_cpu:
                few = input.numel() < ops.few_elements(self.widths, input.dtype, is_grad_enabled())
            else:
                few = ops.prefers_torch(input, self.widths)
            if few:
                y = input
                for parameters, activation in self.layers:
                    weight = parameters["weight"]
                    if not (weight.is_cpu if on_cpu else weight.device == input.device):
                        raise ValueError  # torch misses a weight on the meta device; the layer has an error for it
                    y = activation(linear(y, weight, parameters["bias"]))
                return y
        except ERRORS:
            # Layers called one by one say what is wrong, run parametrizations, and are seen by a tracer of torch.fx.
            return self._one_by_one(input)
        try:
            if self.activations is not None and (found := self.parameters()) is not None:
                return mlp_act(input, *found, *self.activations)
        except (TypeError, ValueError):
            pass  # the layer that is called next raises it again and names its own arguments
        return self._one_by_one(input)

    def _one_by_one(self, input: Tensor) -> Tensor:
        for module in self.modules:
            input = module(input)
        return input


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """The dicts of the hooks that run when this module is called."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def is_identity(module: nn.Module) -> bool:
    """Whether the module returns its input, as `nn.Identity` and classes derived from it do."""
    return type(module).forward is nn.Identity.forward


def _steps(modules: tuple[nn.Module, ...]) -> list[Chain | nn.Module]:
    """The modules, where layers that follow each other, with any nn.Identity behind them, are one chain."""
    groups: list[list[nn.Module]] = []
    for module in modules:
        follows = bool(groups) and type(groups[-1][0]) in LAYERS.values()
        if follows and (type(module) in LAYERS.values() or is_identity(module)):
            groups[-1].append(module)
        else:
            groups.append([module])
    return [Chain.of(tuple(group)) if len(group) > 1 else group[0] for group in groups]


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that runs fused layers which follow each other as one network.

    What it computes is what calling its modules in turn computes. Hooks, parametrizations and a `forward` of an
    instance's own are noticed at every call; then those layers are called one by one.
    """

    _planned: tuple[tuple[nn.Module, ...], list[Chain | nn.Module]] | None = None  # what `_plan` returned last

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features of the first layer) -> (..., out_features of the last)."""
        if is_compiling():
            return super().forward(input)
        # The comparison in `_plan` is written out here too, which saves a tiny network the call.
        planned = self._planned
        if planned is None or planned[0] != tuple(self._modules.values()):
            planned = self._plan()
        for step in planned[1]:
            input = step.run(input) if isinstance(step, Chain) else step(input)
        return input

    def _plan(self) -> tuple[tuple[nn.Module, ...], list[Chain | nn.Module]]:
        """(the modules, the steps that run in their place), made anew when modules have come or gone."""
        modules = tuple(self._modules.values())
        planned = self._planned
        if planned is None or planned[0] != modules:
            planned = self.__dict__["_planned"] = modules, _steps(cast(tuple[nn.Module, ...], modules))
        return planned

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_planned"}

    def __getitem__(self, index):
        # A slice is no longer the network that the constructor describes. Its modules keep their names, as in torch.
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)
