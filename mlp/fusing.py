# SPDX-License-Identifier: Apache-2.0
"""`fuse_`: Sequentials that exist already run fused, their modules staying what they are."""

import copyreg
import functools
import types
from collections.abc import Iterator
from itertools import dropwhile, islice
from typing import Any

import torch
from torch import nn

from .chains import Chain, chains, runs_only_forward
from .layers import NAMES, LinearAct
from .model import MLP
from .sequential import FusedSequential

__all__ = ["fuse_", "unfuse_"]

COMPILE = 'torch.compile(model, backend="perceptriton")'
LISTS = (nn.ModuleList, nn.ModuleDict)  # which have no forward, unlike subclasses of theirs


def fuse_(model: nn.Module, refused: dict[str, str] | None = None) -> list[str]:
    """Makes every `nn.Sequential` of the model run its Linears fused with the activations behind them, in place.

    A pair is an `nn.Linear` and the `nn.Sigmoid`, `nn.Tanh` or `nn.ReLU` behind it; pairs that follow each other run as
    one network. Returns the qualified names of the Linears in pairs. All that changes is the class of the Sequentials,
    whose `forward` looks for pairs at every call. Their modules stay what they are: optimizers, `state_dict`, hooks,
    modules that are replaced or inserted, slices, copies and tools that look at modules mean what they mean in torch.
    No forward is run. Calling it again changes nothing; `unfuse_` undoes it.

    A subclass of `nn.Sequential` counts if it has the forward and the iteration of that class. What other forwards call
    is fused by `torch.compile(model, backend="perceptriton")`. refused: takes the qualified name of every Linear that
    was left alone, with the reason.

    Raises TypeError if the model is no nn.Module.
    """
    _check(model)
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, FusedSequential) and _is_sequential(module) and (pairs := _in_pairs(name, module)):
            found[module] = fused_class(type(module)), pairs
    # What may raise, as a metaclass of somebody's, does so before the first class is given away.
    if refused is not None:
        refused |= {name: reason for name, reason in linears(model) if reason}
    for module, (kind, _) in found.items():
        module.__class__ = kind
    return [name for _, pairs in found.values() for name in pairs]


def unfuse_(model: nn.Module) -> list[str]:
    """Undoes `fuse_`: every Sequential has its old class again. Returns the qualified names of the Linears in pairs.

    An `MLP` stays as it is. Raises TypeError if the model is no nn.Module, and ValueError if a Sequential has got
    another class since, as `fully_shard` gives it one; the model stays as it is then.
    """
    _check(model)
    fused = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, FusedSequential) and not isinstance(module, MLP)
    ]
    for name, module in fused:
        if type(module) is not fused_class(module._fused_from):
            raise ValueError(f"model{name and '.' + name} has become a {type(module).__name__}: undo that first")
    names: list[str] = []
    for name, module in fused:
        names += _in_pairs(name, module)
        module.__dict__.pop("_fused_plan", None)
        module.__class__ = module._fused_from  # pyright: ignore[reportAttributeAccessIssue]
    return names


def linears(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """The qualified name of each Linear of the model, and why no fused call takes it after `fuse_`, or None."""
    if isinstance(model, nn.Linear):
        yield "", None if isinstance(model, LinearAct) else f"it stands alone: {COMPILE}"
    for name, module in model.named_modules():
        pairs = _in_pairs(name, module) if isinstance(module, FusedSequential) or _is_sequential(module) else []
        for child, linear in module._modules.items():
            full = f"{name}.{child}".lstrip(".")
            if isinstance(linear, nn.Linear):
                taken = full in pairs or isinstance(linear, LinearAct)
                yield full, None if taken else _reason(model, name, child)
            elif isinstance(linear, torch.jit.ScriptModule) and linear.original_name == "Linear":
                yield full, "it is scripted"


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")


def _is_sequential(module: nn.Module) -> bool:
    """Whether the module calls its children in order, as `nn.Sequential` does and subclasses may."""
    if not isinstance(module, nn.Sequential):
        return False
    kind = type(module)
    return (
        kind.forward in (nn.Sequential.forward, FusedSequential.forward)
        and kind.__iter__ is nn.Sequential.__iter__
        and kind.__call__ in (nn.Module.__call__, FusedSequential.__call__)
        and "forward" not in module.__dict__
    )


def places(module: nn.Module) -> Iterator[tuple[Chain, list[str]]]:
    """Each chain of a Sequential that runs as one, with the names that its layers have as children there."""
    names = iter(module._modules)
    for step in chains(module._modules.values(), seen=True):
        parts = step.modules if isinstance(step, Chain) else [step]
        layers = [
            name for part, name in zip(parts, islice(names, len(parts)), strict=True) if isinstance(part, nn.Linear)
        ]
        if isinstance(step, Chain):
            yield step, layers


def _in_pairs(name: str, module: nn.Module) -> list[str]:
    """The qualified names of the layers of a Sequential that run with their activations."""
    pairs = [pair for chain, layers in places(module) for pair in zip(layers, chain.activations, strict=True)]
    return [f"{name}.{child}".lstrip(".") for child, activation in pairs if activation != "identity"]


def _reason(model: nn.Module, name: str, child: str) -> str:
    """Why the Linear `child` of the module `name` is called as it is."""
    parent = holder = model.get_submodule(name)
    while type(parent) in LISTS and name:
        name = name.rpartition(".")[0]
        parent = model.get_submodule(name)
    if type(holder) in LISTS and (type(parent) in LISTS or _is_sequential(parent)):
        return f"it is in a {type(holder).__name__}, which has no forward: {COMPILE} fuses what calls it"
    if not _is_sequential(parent):
        return f"it belongs to {_kind(parent)}, which has a forward of its own: {COMPILE} fuses what that calls"
    _, *behind = dropwhile(lambda item: item[0] != child, parent._modules.items())
    activation = next((module for _, module in behind if type(module) is not nn.Identity), None)
    for what, module in (("it", parent._modules[child]), ("the activation", activation)):
        if module is None:
            return "no activation follows it"
        if type(module) not in NAMES or isinstance(module, nn.Linear) != (what == "it"):
            return f"it is a {_kind(module)}" if what == "it" else f"a {_kind(module)} follows it"
        if "forward" in module.__dict__:
            return f"{what} has a forward of its own"
        if "_compiled_call_impl" in module.__dict__:
            return f"{what} has been compiled"
        if not runs_only_forward(module):
            return f"{what} has hooks"
    return "its weight is no parameter, or its class was patched"


def _kind(module: nn.Module) -> str:
    """The name of a module's class, of a fused Sequential of the one that it had."""
    kind = type(module)
    if isinstance(module, FusedSequential) and kind is fused_class(module._fused_from):
        kind = module._fused_from
    return kind.__name__


@functools.cache
def fused_class(kind: type[nn.Sequential]) -> type[FusedSequential]:
    """The subclass of a class of `nn.Sequential`s that has the `forward` of `FusedSequential`."""
    if kind is nn.Sequential:
        return FusedSequential
    body = {"_fused_from": kind, "__module__": kind.__module__, "__reduce_ex__": _reduce_ex}
    return types.new_class(f"Fused{kind.__name__}", (FusedSequential, kind), {}, lambda own: own.update(body))


def _reduce_ex(module: FusedSequential, protocol: int) -> str | tuple:
    # No file has a class that was made here, so copies and pickles name the one that it was made of.
    reduced: Any = super(FusedSequential, module).__reduce_ex__(max(protocol, 2))  # older ones name the class itself
    makers: Any = copyreg
    if isinstance(reduced, str) or reduced[0] not in (makers.__newobj__, makers.__newobj_ex__):
        return reduced
    _, *given = reduced[1]
    arguments, options = given if reduced[0] is makers.__newobj_ex__ else (given, {})
    return functools.partial(_new_fused, module._fused_from, *arguments, **options), (), *reduced[2:]


def _new_fused(kind: type[nn.Sequential], *arguments, **options) -> nn.Sequential:
    return kind.__new__(fused_class(kind), *arguments, **options)
