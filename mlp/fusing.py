"""Fused layers in the place of Linear + activation, in models that exist already."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch.fx
from torch import nn

from .layers import FUSED
from .sequential import FusedSequential, hooks_of

__all__ = ["fuse_", "unfuse_"]

CLASS_BEFORE = "_class_before_fuse"  # the attribute in which a module remembers its class
ACTIVATIONS = tuple(FUSED)


class Applied(nn.Identity):
    """In the place of an activation that the layer before it has applied."""

    def extra_repr(self) -> str:
        return self.__dict__[CLASS_BEFORE].__name__


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    # Fused layers add no state to that of nn.Linear, so the same object goes on in optimizers and references to it.
    module.__dict__[CLASS_BEFORE] = type(module)
    module.__class__ = kind  # pyright: ignore[reportAttributeAccessIssue]


def fuse_(model: nn.Module, refused: dict[str, str] | None = None) -> list[str]:
    """Fuses every `nn.Linear` with the `nn.Sigmoid`, `nn.Tanh` or `nn.ReLU` that follows it, in place.

    Returns the qualified names of the Linears that became `LinearSigmoid`, `LinearTanh` or `LinearReLU`. The modules
    stay the same objects with the same parameters, so optimizers, `state_dict` and references go on working; the
    activations do nothing any more. An `nn.Sequential` runs such layers that follow each other as one network.
    Calling it again changes nothing. `unfuse_` undoes it.

    A pair is found in an `nn.Sequential`, or in a module whose forward `torch.fx` can trace, where the Linear is used
    once, its output goes to the activation alone and the activation is used once. What is called from a forward as a
    function (`torch.sigmoid`) stays as it is. refused: takes the qualified names of Linears that are followed by an
    activation and were left alone, with the reason: hooks on either of them, parametrizations, a module of another
    class or with a forward of its own, a Linear or an activation that is used elsewhere. An `nn.Sequential` is taken
    to be called as a whole.

    Raises TypeError if the model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    replaced: list[str] = []
    for name, module in model.named_modules():
        here: list[str] = []
        for first, second in _pairs(module):
            linear, activation = (module.get_submodule(child) for child in (first, second))
            full = f"{name}.{first}" if name else first
            if (reason := _pair_refusal(linear, activation, uses)) is None:
                here.append(full)
                _set_class(linear, FUSED[type(activation)])
                _set_class(activation, Applied)
            elif refused is not None:
                refused[full] = reason
        if here and type(module) is nn.Sequential:
            _set_class(module, FusedSequential)
        replaced += here
    return replaced


def unfuse_(model: nn.Module) -> list[str]:
    """Undoes `fuse_`: every module has its old class again. Returns the qualified names of the Linears.

    An `MLP` or a layer that was built fused stays as it is. Raises TypeError if the model is no nn.Module, and
    ValueError if a module has got another class since, as `parametrize` and `fully_shard` give it one; the model stays
    as it is then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        if CLASS_BEFORE in module.__dict__ and type(module) not in (*FUSED.values(), Applied, FusedSequential):
            raise ValueError(f"model{name and '.' + name} has become a {type(module).__name__}: undo that first")
    restored: list[str] = []
    for name, module in model.named_modules():
        if kind := module.__dict__.pop(CLASS_BEFORE, None):
            module.__dict__.pop("_planned", None)
            module.__class__ = kind
            if kind is nn.Linear:
                restored.append(name)
    return restored


# --- where layers follow each other ------------------------------------------------------------------------


def _pairs(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The names, below this module, of each linear layer and the activation right behind it."""
    sequential = type(module).forward in (nn.Sequential.forward, FusedSequential.forward)
    # A list, so that tracing ends before the first pair is fused.
    for first, second in list(pairwise(module._modules) if sequential else _traced(module)):
        linear, activation = (module.get_submodule(name) for name in (first, second))
        if isinstance(linear, nn.Linear) and isinstance(activation, ACTIVATIONS):
            yield first, second


class _Tracer(torch.fx.Tracer):
    """Traces one forward; the modules that it calls stay calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _traced(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Calls of which the second is the only user of the first, each module being called once."""
    children = [child for child in module._modules.values() if child is not None]
    if not any(isinstance(child, ACTIVATIONS) for child in _with_containers_opened(children)):
        return
    try:
        graph = _Tracer().trace(module)
    except Exception:  # a forward that cannot be traced may raise anything, and is left alone
        return
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(id(module.get_submodule(str(node.target))) for node in calls)
    # A module whose parameters the forward reads itself is used twice.
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node in calls:
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_module" or users[0].args != (node,) or users[0].kwargs:
            continue
        first, second = str(node.target), str(users[0].target)
        once = all(times[id(module.get_submodule(name))] == 1 for name in (first, second))
        if once and not {first, second} & read:
            yield first, second


def _with_containers_opened(modules: list[nn.Module]) -> Iterator[nn.Module]:
    """The modules that a forward may call: these and, where one is a container, its entries."""
    for module in modules:
        yield module
        # The containers of a GraphModule are bare Modules.
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or type(module) is nn.Module:
            yield from _with_containers_opened([child for child in module._modules.values() if child is not None])


# --- what must stay as it is -------------------------------------------------------------------------------


def _pair_refusal(linear: nn.Module, activation: nn.Module, uses: Counter) -> str | None:
    """Why this pair cannot be fused, or None."""
    for what, module, kinds in (("it", linear, (nn.Linear,)), ("the activation", activation, ACTIVATIONS)):
        if type(module) not in kinds:
            return f"{what} is a {type(module).__name__}"
        if any(hooks_of(module)):
            return f"{what} has hooks"
        if "forward" in module.__dict__:
            return f"{what} has a forward of its own"
        if uses[id(module)] > 1:
            return f"{what} is used elsewhere too"
    return None
