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
from .functional.network import mlp_act
from .layers import LAYERS, LinearAct

# What torch.nn.modules.module.register_module_*_hook fill.
_GLOBAL_HOOKS = (
    _modules._global_forward_hooks,
    _modules._global_forward_pre_hooks,
    _modules._global_backward_hooks,
    _modules._global_backward_pre_hooks,
)


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring layers of an `nn.Sequential`, and what it takes to run them without calling them one by one."""

    modules: tuple[nn.Module, ...]
    layers: tuple[tuple[dict, Callable[[Tensor], Tensor]], ...]  # parameters, activation
    attributes: tuple[dict, ...]  # those of every module: an instance may get a forward of its own
    hooks: tuple[dict, ...]  # those of every module and torch's global ones: alive, so seen once one is registered
    widths: tuple[int, ...]
    activations: tuple[str, str] | None  # hidden, output; None where hidden layers differ

    @classmethod
    def of(cls, modules: tuple[nn.Module, ...]) -> "Run":
        layers = [cast(nn.Linear, module) for module in modules if not does_nothing(module)]
        names = [layer.activation if isinstance(layer, LinearAct) else "identity" for layer in layers]
        return cls(
            modules,
            tuple((layer._parameters, ACTIVATIONS[name].forward) for layer, name in zip(layers, names, strict=True)),
            tuple(module.__dict__ for module in modules),
            _GLOBAL_HOOKS
            + tuple(
                hooks
                for m in modules
                for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
            ),
            (layers[0].in_features, *(layer.out_features for layer in layers)),
            (names[0], names[-1]) if len(set(names[:-1])) <= 1 else None,
        )

    @property
    def free(self) -> bool:
        """Whether nobody would miss the calls of the modules."""
        return not any(self.hooks) and not any("forward" in own for own in self.attributes)

    def parameters(self) -> tuple[list[Tensor], list[Tensor] | None] | None:
        """(weights, biases), without biases None; None where only some layers have one, or a layer is parametrized."""
        found = [(own.get("weight"), own.get("bias")) for own, _ in self.layers]
        weights = [weight for weight, _ in found if weight is not None]
        biases = [bias for _, bias in found if bias is not None]
        every = len(weights) == len(self.layers) and len(biases) in (0, len(weights))
        return (weights, biases or None) if every else None

    def run(self, input: Tensor) -> Tensor:
        # This is `free` without the calls: a network of four tiny layers runs in 30 us.
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
                # Plain torch operations, as the layers themselves would choose here.
                for parameters, activation in self.layers:
                    weight = parameters["weight"]
                    if not (weight.is_cpu if on_cpu else weight.device == input.device):
                        return self._one_by_one(input)  # which says so; torch may not
                    y = activation(linear(y, weight, parameters["bias"]))
                return y
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            # A parametrized layer; a symbol of torch.fx; or a wrong input: layers have the better message.
            return self._one_by_one(input)
        if self.activations is None or (found := self.parameters()) is None:
            return self._one_by_one(input)
        try:
            return mlp_act(input, *found, *self.activations)
        except (TypeError, ValueError):
            return self._one_by_one(input)  # a wrong input once more

    def _one_by_one(self, input: Tensor) -> Tensor:
        for module in self.modules:
            input = module(input)
        return input


def does_nothing(module: nn.Module) -> bool:
    return type(module).forward is nn.Identity.forward


def _steps(modules: tuple[nn.Module, ...]) -> list[Run | nn.Module]:
    """The modules, with layers that follow each other taken together."""
    runs: list[list[nn.Module]] = []
    for module in modules:
        layer = type(module) in LAYERS.values()
        inside = bool(runs) and type(runs[-1][0]) in LAYERS.values()
        if inside and (layer or does_nothing(module)):
            runs[-1].append(module)
        else:
            runs.append([module])
    return [Run.of(tuple(run)) if len(run) > 1 else run[0] for run in runs]


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that runs fused layers which follow each other as one network.

    What it computes is what calling its modules in turn computes. Hooks, parametrizations and a `forward` of an
    instance's own are noticed at every call; then those layers are called one by one.
    """

    _planned: tuple[tuple[nn.Module, ...], list[Run | nn.Module]] | None = None  # an instance's own hides it

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features of the first layer) -> (..., out_features of the last)."""
        if is_compiling():
            return super().forward(input)
        # `_plan` without the call, as in `Run.run`.
        planned = self._planned
        if planned is None or planned[0] != tuple(self._modules.values()):
            planned = self._plan()
        for step in planned[1]:
            input = step.run(input) if isinstance(step, Run) else step(input)
        return input

    def _plan(self) -> tuple[tuple[nn.Module, ...], list[Run | nn.Module]]:
        """(the modules, what takes their place), made anew when modules have come or gone."""
        modules = tuple(self._modules.values())
        planned = self._planned
        if planned is None or planned[0] != modules:
            planned = self.__dict__["_planned"] = modules, _steps(cast(tuple[nn.Module, ...], modules))
        return planned

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_planned"}

    def __getitem__(self, index):
        # A slice is no longer the network that the constructor describes. Its modules keep their names, as in torch.
        return (
            nn.Sequential(OrderedDict(list(self._modules.items())[index]))
            if isinstance(index, slice)
            else super().__getitem__(index)
        )
