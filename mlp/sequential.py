"""An `nn.Sequential` that pairs linear layers and activations when it is called, and runs those in a row as one."""

import copyreg
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, fx, is_grad_enabled, nn
from torch._C import _get_tracing_state  # pyright: ignore[reportAttributeAccessIssue]
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ..kernels import eligibility, ops
from ..kernels.activations import ACTIVATIONS
from .functional import linear_act, mlp_act
from .functional.eager import ERRORS, product_dtype
from .layers import LAYERS, MODULES, activation_of

# The `forward` of each class that a chain stands for. One that was patched since must run itself.
_FORWARDS = {kind: kind.forward for kind in (*LAYERS, *MODULES.values())}
_NAMES = {kind: name for name, kind in MODULES.items()}
# How many attributes a module of each class has if nobody has set another: then none hides its `forward` or parameters.
_SIZES = {kind: len(kind(1, 1, device="meta").__dict__) for kind in LAYERS} | {
    kind: len(kind().__dict__) for kind in _NAMES
}


def runs_only_forward(module: nn.Module) -> bool:
    """Whether a call of the module runs the `forward` of its class and nothing else, but for torch's global hooks."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_compiled_call_impl" in own
    )


def _is_hidden(own: dict) -> bool:
    """Whether a linear layer of these attributes computes from something else than its parameters."""
    parameters = own["_parameters"]
    # An attribute of the instance hides the parameter of that name.
    return "weight" in own or "bias" in own or "weight" not in parameters or "bias" not in parameters


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module, of a class in `_FORWARDS`, computes what that class does from its parameters."""
    kind = type(module)
    unpatched = runs_only_forward(module) and kind.forward is _FORWARDS[kind]
    return unpatched and (kind in _NAMES or not _is_hidden(module.__dict__))


@dataclass(frozen=True)
class Chain:
    """Modules in a row that are a network, and how to run them as one.

    Only which modules they are is kept: every call reads their hooks and parameters anew.
    """

    modules: tuple[nn.Module, ...]  # linear layers, activations, identities
    layers: tuple[nn.Linear, ...]
    activations: tuple[str, ...]  # behind each layer; those of hidden layers are the same
    widths: tuple[int, ...]
    # Of each module: itself, its class, how many attributes that has, whether it is a layer, what it applies.
    parts: tuple[tuple[nn.Module, type, int, bool, Callable | None], ...]
    kinds: tuple[tuple[type[nn.Module], Callable], ...]  # the classes of the modules with their `forward`

    @classmethod
    def of(cls, modules: tuple[nn.Module, ...], layers: tuple[nn.Linear, ...], activations: tuple[str, ...]) -> "Chain":
        parts = []
        for module in modules:
            kind = type(module)
            name = activation_of(module) if isinstance(module, nn.Linear) else _NAMES[kind]
            function = None if name == "identity" else ACTIVATIONS[name].forward
            parts.append((module, kind, _SIZES[kind], isinstance(module, nn.Linear), function))
        widths = (layers[0].in_features, *(layer.out_features for layer in layers))
        kinds = tuple((kind, _FORWARDS[kind]) for kind in dict.fromkeys(map(type, modules)))
        return cls(modules, layers, activations, widths, tuple(parts), kinds)

    def parameters(self) -> tuple[list[Tensor], list[Tensor | None]] | None:
        """(weights, biases), or None where calling the modules would run anything but the forwards of their classes."""
        if _has_any_global_hook() or not all(type(m) is kind and _is_plain(m) for m, kind, *_ in self.parts):
            return None
        found = [layer._parameters for layer in self.layers]
        return [cast(Tensor, own["weight"]) for own in found], [own["bias"] for own in found]

    def run(self, input: Tensor) -> Tensor:
        """What calling the modules in turn computes."""
        called = False
        try:
            if on_cpu := input.is_cpu:
                few = input.numel() < ops.few_elements(self.widths, input.dtype, is_grad_enabled())
            else:
                few = ops.prefers_torch(input, self.widths)
            for kind, forward in self.kinds:
                few = few and kind.forward is forward
            if few and not _has_any_global_hook():
                # Written out, as `_is_plain` and a layer have it: calls are what a tiny network costs.
                y = input
                for module, kind, size, is_layer, activation in self.parts:
                    own = module.__dict__
                    parameters = own["_parameters"]
                    if (
                        own["_forward_hooks"]
                        or own["_forward_pre_hooks"]
                        or own["_backward_hooks"]
                        or own["_backward_pre_hooks"]
                        or type(module) is not kind
                        or (len(own) != size and not _is_plain(module))
                        or (is_layer and ("weight" not in parameters or "bias" not in parameters))
                    ):
                        called = True
                        y = module(y)
                        continue
                    if is_layer:
                        weight = parameters["weight"]
                        # torch misses a weight on the meta device; the layer has an error for it.
                        if not (weight.is_cpu if on_cpu else weight.device == y.device):
                            raise ValueError
                        y = F.linear(y, weight, parameters["bias"])
                    if activation is not None:
                        y = activation(y)
                return y
        except ERRORS:
            if called:  # what a hook has seen or raised is not tried again
                raise
        return self._dispatch(input)

    def _dispatch(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return run(self.modules, input)  # torch.fx records calls of modules
        if (found := self.parameters()) is not None:
            return self.fused(input, *found)
        return run(chains(self.modules, seen=True), input)

    def fused(self, x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
        """The network by the functions of the package, as a whole if all layers have a bias or none has."""
        given = [bias for bias in biases if bias is not None]
        if len(weights) > 1 and len(given) in (0, len(weights)):
            try:
                return mlp_act(x, weights, given or None, self.activations[0], self.activations[-1])
            except (TypeError, ValueError):
                pass  # the layer that is called next raises it again and names its own arguments
        for weight, bias, activation in zip(weights, biases, self.activations, strict=True):
            x = linear_act(x, weight, bias, activation)
        return x


def run(steps: Iterable[Chain | nn.Module], input: Tensor) -> Tensor:
    """What the steps compute in turn."""
    for step in steps:
        input = step.run(input) if isinstance(step, Chain) else step(input)
    return input


def chains(modules: Iterable[nn.Module], seen: bool = False) -> list[Chain | nn.Module]:
    """The modules in order, where those in a row that are a network, and more than one module, are one chain.

    seen: what would run something besides the forwards of their classes is in no chain.
    """
    groups: list[tuple[list[nn.Module], list[nn.Linear], list[str]]] = []
    hooked = seen and _has_any_global_hook()
    for module in modules:
        kind = type(module)
        own, layers, names = groups[-1] if groups else ([], [], [])
        plain = kind in _FORWARDS and not (seen and (hooked or not _is_plain(module)))
        if plain and kind in LAYERS:
            # Hidden layers of a network have one activation.
            if not layers or names[-1] != names[0]:
                own, layers, names = [], [], []
                groups.append((own, layers, names))
            layers.append(cast(nn.Linear, module))
            names.append(activation_of(layers[-1]))
        elif plain and layers and (names[-1] == "identity" or kind is nn.Identity):
            names[-1] = _NAMES[kind] if names[-1] == "identity" else names[-1]
        else:
            groups.append(([module], [], []))
            continue
        own.append(module)
    return [
        Chain.of(tuple(own), tuple(layers), tuple(names)) if layers and len(own) > 1 else own[0]
        for own, layers, names in groups
    ]


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` whose forward runs linear layers and activations that follow each other as one network.

    Its modules stay what they are, and what it computes is what calling them in turn computes: at every call they are
    looked at anew, and those with hooks, parametrizations or a `forward` of their own are called one by one.
    """

    unfused: ClassVar[type[nn.Sequential]] = nn.Sequential  # the class that `fuse_` takes this one for
    _planned: tuple[tuple, list[nn.Module], list[type], list[Chain | nn.Module]] | None = None  # see `steps`

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features of the first layer) -> (..., out_features of the last)."""
        if is_compiling():
            return self._traced(input)
        if _get_tracing_state() is not None:
            return super().forward(input)  # torch.jit records calls of modules
        planned = self._planned
        # The comparison in `steps` is written out here too, for it costs a tiny network less than the call.
        if planned is None or planned[0] != tuple(self._modules.values()) or planned[1]:
            steps = self.steps()
        else:
            steps = planned[3]
        for step in steps:
            input = step.run(input) if isinstance(step, Chain) else step(input)
        return input

    def steps(self) -> list[Chain | nn.Module]:
        """What runs in the place of the modules, planned anew when one has come, gone or changed its class."""
        planned = self._planned
        modules = tuple(self._modules.values())
        # A chain looks at the classes of its modules itself.
        if planned is None or planned[0] != modules or list(map(type, planned[1])) != planned[2]:
            steps = chains(modules)
            alone = [step for step in steps if not isinstance(step, Chain)]
            planned = self.__dict__["_planned"] = modules, alone, list(map(type, alone)), steps
        return planned[3]

    def _traced(self, input: Tensor) -> Tensor:
        if not eligibility.launchable(input.device, product_dtype(input)[0]):
            return super().forward(input)
        for step in chains(self._modules.values(), seen=True):
            if isinstance(step, Chain):
                input = step.fused(input, *cast("tuple[list, list]", step.parameters()))
            else:
                input = step(input)
        return input

    def __prepare_scriptable__(self) -> nn.Sequential:
        return nn.Sequential(OrderedDict(self._modules))  # torch.jit.script compiles that of the class

    def __getstate__(self) -> dict:
        return {name: value for name, value in super().__getstate__().items() if name != "_planned"}


@functools.cache
def fused_class(kind: type[nn.Sequential]) -> type[FusedSequential]:
    """The class of `nn.Sequential`s that are of this one but for the `forward`, which is that of `FusedSequential`."""
    if kind is nn.Sequential:
        return FusedSequential
    body = {"unfused": kind, "__module__": kind.__module__, "__reduce_ex__": _reduce_ex}
    return types.new_class(f"Fused{kind.__name__}", (FusedSequential, kind), {}, lambda own: own.update(body))


def _reduce_ex(module: FusedSequential, protocol: int) -> str | tuple:
    # No module holds a class that was made here, so copies and pickles name the one that it was made of.
    reduced = super(FusedSequential, module).__reduce_ex__(protocol)
    if isinstance(reduced, str) or reduced[0] is not copyreg.__newobj__:  # pyright: ignore[reportAttributeAccessIssue]
        return reduced
    return _new_fused, (module.unfused, *reduced[1][1:]), *reduced[2:]


def _new_fused(kind: type[nn.Sequential], *arguments) -> nn.Sequential:
    return kind.__new__(fused_class(kind), *arguments)
