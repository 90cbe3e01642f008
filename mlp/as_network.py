# SPDX-License-Identifier: Apache-2.0
"""Which modules are plain networks of linear layers and activations: those that can be trained without autograd."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from ..kernels.reference import shares_nothing
from .chains import Chain, chains, is_patched, runs_only_forward
from .layers import NAMES
from .model import MLP
from .sequential import FusedSequential


class Refused(Exception):
    """Why a model is no plain network, or cannot be trained without autograd, in words."""


@dataclass(frozen=True)
class Network:
    """A network, or a stack of them, with one activation for all hidden layers."""

    widths: tuple[int, ...]  # of the input and of every layer's output
    hidden: str
    output: str
    bias: bool
    parameters: tuple[nn.Parameter, ...]  # w0, b0, w1, b1, ...
    members: int | None = None  # of a stack, whose parameters have a leading dimension; None for one network


def as_network(model: nn.Module) -> Network:
    """The network that an `MLP` or an `nn.Sequential` is. Raises Refused where it is none."""
    if not isinstance(model, nn.Sequential) or type(model) not in (MLP, FusedSequential, nn.Sequential):
        raise Refused(f"{type(model).__name__} is neither an MLP nor an nn.Sequential")
    modules = list(model.named_modules())
    if found := next((name or "the model" for name, module in modules if not runs_only_forward(module)), None):
        raise Refused(f"{found} has hooks or a forward of its own")
    kinds = {nn.Sequential, *[type(module) for _, module in modules]}
    if found := next(filter(is_patched, kinds), None):
        raise Refused(f"somebody has patched {found.__name__}")
    if not len(model):
        raise Refused("the model has no layers")
    # An identity behind the last module changes nothing, and makes a layer that stands alone a chain.
    steps = chains([*model, nn.Identity()], seen=True)
    if others := [step for step in steps if not isinstance(step, Chain)]:
        # A Linear that is left over is so because of its neighbour.
        found = next((step for step in others if type(step) not in NAMES), others[0])
        raise Refused(f"{type(found).__name__} is not part of a chain of linear layers and activations")
    chain, *others = cast("list[Chain]", steps)
    if others:
        names = [name for step in (chain, *others) for name in step.activations]
        raise Refused(f"hidden layers have different activations: {', '.join(names)}")
    layers = chain.layers
    if any((layer.bias is None) != (layers[0].bias is None) for layer in layers):
        raise Refused("some layers have a bias and some have none")
    if any(below.out_features != above.in_features for below, above in pairwise(layers)):
        raise Refused("the widths of its layers do not fit")
    if any(set(layer._parameters) != {"weight", "bias"} for layer in layers):
        raise Refused("a layer has parameters of other names")
    parameters = tuple(cast(nn.Parameter, p) for layer in layers for p in (layer.weight, layer.bias) if p is not None)
    hidden, output = chain.activations[0], chain.activations[-1]
    return Network(chain.widths, hidden, output, layers[0].bias is not None, parameters)


def check_trainable(network: Network) -> None:
    """Raises Refused where the network's parameters cannot be trained as plain tensors."""
    for p in network.parameters:
        if type(p) is not nn.Parameter:
            raise Refused(f"a parameter is a {type(p).__name__}, with rules of its own")
        if not p.requires_grad:
            raise Refused("a parameter is frozen")
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise Refused("a parameter has hooks")
        if hasattr(p, "_in_backward_optimizers"):
            raise Refused("a parameter has an optimizer that steps in the backward pass")
    first = network.parameters[0]
    if any(p.dtype != first.dtype or p.device != first.device for p in network.parameters):
        raise Refused("parameters differ in dtype or device")
    if first.device.type not in ("cpu", "cuda"):
        raise Refused(f"parameters are on {first.device}")
    stack = () if network.members is None else (network.members,)
    shapes = [(*stack, *shape) for k, n in pairwise(network.widths) for shape in [(n, k), (n,)][: 1 + network.bias]]
    if [tuple(p.shape) for p in network.parameters] != shapes:
        # torch broadcasts a bias of one element.
        raise Refused("a parameter has not the shape that its layer says")
    if min(network.widths) == 0:
        raise Refused("a layer has no inputs or no outputs")
    if len({id(p) for p in network.parameters}) < len(network.parameters):
        raise Refused("parameters are tied")
    if share_memory(network.parameters):
        raise Refused("parameters share memory")


def share_memory(parameters: Sequence[Tensor]) -> bool:
    """Whether any two elements, of one parameter or of two, lie at the same address. No parameter is empty."""
    spans = sorted(map(_span, parameters))
    if all(map(shares_nothing, parameters)) and all(end <= start for (_, end), (start, _) in pairwise(spans)):
        return False
    # Parameters whose spans overlap, as those of two columns of a matrix do, need not have an element in common.
    addresses = torch.cat([_addresses(p) for p in parameters])
    return len(addresses.unique()) < len(addresses)


def lie_apart(a: Tensor, b: Tensor) -> bool:
    """Whether one lies in memory before the other as a whole. Neither is empty."""
    (first, end), (other, other_end) = _span(a), _span(b)
    return end <= other or other_end <= first


def _span(p: Tensor) -> tuple[int, int]:
    """The addresses of the first byte of its elements and of the byte behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
    return p.data_ptr(), p.data_ptr() + (last + 1) * p.element_size()


def _addresses(p: Tensor) -> Tensor:
    """(p.numel(),), int64: the address of each element."""
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, stride in zip(p.shape, p.stride(), strict=True):
        offsets = offsets[..., None] + stride * torch.arange(size, device="cpu")
    return p.data_ptr() + p.element_size() * offsets.flatten()
