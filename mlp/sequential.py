# SPDX-License-Identifier: Apache-2.0
"""An `nn.Sequential` that pairs linear layers and activations when it is called, and runs those in a row as one."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn
from torch._C import _get_tracing_state, _len_torch_function_stack  # pyright: ignore[reportAttributeAccessIssue]
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ..kernels import eligibility, small
from ..kernels.activations import ACTIVATIONS
from .functional import linear_act, mlp_act
from .functional.checks import check_layer
from .functional.eager import ERRORS, product_dtype
from .layers import NAMES

# What the classes that are planned with were when they were looked at.
_CALL, _FORWARD = nn.Module.__call__, nn.Sequential.forward


def own_forward(kind: type[nn.Module]) -> Callable | None:
    """The `forward` that the file of a class gives it, or None if it has been patched."""
    return kind.forward if getattr(kind.forward, "__globals__", {}).get("__name__") == kind.__module__ else None


def _known(kind: type[nn.Module], name: str) -> tuple[Callable | None, int, bool, Callable | None]:
    module = kind(1, 1, device="meta") if issubclass(kind, nn.Linear) else kind()
    function = {"identity": None, "relu": F.relu}.get(name, ACTIVATIONS[name].forward)  # as the modules call it
    return own_forward(kind), len(vars(module)), issubclass(kind, nn.Linear), function


# Of each class in a chain: its `forward`, since one that is patched must run itself; how many attributes a module has:
# with as many, none hides the `forward` or a parameter; whether it has a product, and its activation.
_KINDS = {kind: _known(kind, name) for kind, name in NAMES.items()}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GUARDED = ("forward", "weight", "bias", *_HOOKS)

# Attributes of a module that have it run something else.
_HIDING = ("forward", "_compiled_call_impl", "weight", "bias", "activation")


def runs_only_forward(module: nn.Module) -> bool:
    """Whether a call of the module runs the `forward` of its class and nothing else, torch's global hooks included."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_compiled_call_impl" in own
        or _has_any_global_hook()
    )


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module, of a class in `NAMES`, computes what that class does from its parameters."""
    kind, own, parameters = type(module), module.__dict__, module._parameters
    return (
        runs_only_forward(module)
        and kind.forward is _KINDS[kind][0]
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
        self.few: int | None = None  # elements that a call knows to be few on a CPU, when one has asked
        # What a call compares of each module, and what it computes.
        self.known = [(module, type(module), *_KINDS[type(module)][1:]) for module in self.modules]

    def parameters(self) -> tuple[list[Tensor], list[Tensor | None]] | None:
        """(weights, biases), or None where calling the modules would run anything but the forwards of their classes."""
        if _has_any_global_hook() or any([kind.forward is not forward for kind, forward in self.forwards]):
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
        if type(input) not in eligibility.PLAIN or nn.Module.__call__ is not _CALL:
            return self._run_any(input)
        if on_cpu := input.is_cpu:
            if self.few is None:
                self.few = small.few_of_any(self.widths)
            count = input.numel()
            few = count < self.few or count < small.few_elements(self.widths, input.dtype, is_grad_enabled())
        else:
            few = small.prefers_torch(input, self.widths)
        for kind, forward in self.forwards:
            few = few and kind.forward is forward
        if not few or _has_any_global_hook():
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
                ):
                    called, y = True, module(y)
                    continue
                if linear:
                    parameters = own["_parameters"]
                    try:
                        weight, bias = parameters["weight"], parameters["bias"]
                    except KeyError:
                        weight = bias = None
                    if (sort := type(weight)) is not nn.Parameter and sort not in eligibility.PLAIN:
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

    def _run_any(self, input: Tensor) -> Tensor:
        # Subclasses, what is no tensor (torch.fx records with symbols) and modes have a say in the functions that are
        # called, a nested tensor has no shape to plan with, and who has patched the call of all modules sees every one.
        if (
            (type(input) not in eligibility.PLAIN and hasattr(type(input), "__torch_function__"))
            or nn.Module.__call__ is not _CALL
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


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` whose forward runs linear layers and activations that follow each other as one network.

    Its modules stay what they are, and what it computes is what calling them in turn computes: at every call they are
    looked at anew, and those with hooks, parametrizations or a `forward` of their own are called one by one.
    """

    # Nothing here has a name that a subclass, an attribute or a child of somebody's may have.
    _fused_from: ClassVar[type[nn.Sequential]] = nn.Sequential  # the class that `fuse_` takes this one for
    _fused_plan: tuple[tuple, list[nn.Module], list[type], list[Chain | nn.Module]] | None = None  # see `steps_of`

    def __init_subclass__(cls, **options) -> None:
        # The class that `fuse_` makes of another is none that a registry of its subclasses should hear of.
        if "_fused_from" not in cls.__dict__:
            super().__init_subclass__(**options)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features of the first layer) -> (..., out_features of the last)."""
        if is_compiling():
            if not eligibility.launchable(input.device, product_dtype(input)[0]):
                return super().forward(input)
            for module in self._modules.values():
                # The compiler guards attributes that are asked for, as it does not what `is_plain` looks for. Others
                # than these classes may compute theirs.
                for name in _GUARDED if type(module) in NAMES else ():
                    getattr(module, name, None)
            for step in chains(self._modules.values(), seen=True):
                input = step.fused(input) if isinstance(step, Chain) else step(input)
            return input
        if _get_tracing_state() is not None:
            return super().forward(input)  # torch.jit records calls of modules
        if self._fused_from.forward is not _FORWARD:
            return super().forward(input)  # patched since
        planned = self._fused_plan
        # The comparison in `steps_of` is written out here too, for it costs a tiny network less than the call.
        if planned is None or planned[0] != tuple(self._modules.values()) or planned[1]:
            steps = steps_of(self)
        else:
            steps = planned[3]
        for step in steps:
            input = step(input)
        return input

    def __prepare_scriptable__(self) -> nn.Sequential:
        # What torch.jit.script compiles, which puts what it makes of the modules into the dict that it finds.
        plain = object.__new__(self._fused_from)
        plain.__dict__.update(self.__dict__, _modules=dict(self._modules))
        plain.__dict__.pop("_fused_plan", None)
        return plain

    def __getstate__(self):
        state = super().__getstate__()  # of a subclass, anything
        return {name: state[name] for name in state if name != "_fused_plan"} if isinstance(state, dict) else state


def steps_of(module: FusedSequential) -> list[Chain | nn.Module]:
    """What runs in the place of the modules, planned anew when one has come, gone or changed its class."""
    planned, modules = module._fused_plan, tuple(module._modules.values())
    # A chain looks at the classes of its modules itself.
    if planned is None or planned[0] != modules or list(map(type, planned[1])) != planned[2]:
        steps = chains(modules)
        alone = [step for step in steps if not isinstance(step, Chain)]
        planned = modules, alone, list(map(type, alone)), steps
        # A module with an equality of its own may equal the one that replaces it.
        if all(type(step).__eq__ is object.__eq__ for step in alone):
            module.__dict__["_fused_plan"] = planned
    return planned[3]
