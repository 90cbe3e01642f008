# SPDX-License-Identifier: Apache-2.0
"""Linear layers in a graph that Dynamo has captured, the chains that they form, and what forbids to join them."""

import inspect
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from ...kernels.activations import ACTIVATIONS
from ..functional.checks import REDUCTIONS

# As functions and as methods, which may write over their input.
NAMES = {name + in_place: name for name in ACTIVATIONS if name != "identity" for in_place in ("", "_")}
NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size)
FUNCTIONS = {getattr(home, name): NAMES[name] for home in (torch, F, Tensor) for name in NAMES if hasattr(home, name)}
# The cross entropy from logits, with the names of its arguments in their order.
LOSSES: dict[Any, tuple[str, ...]] = {
    F.binary_cross_entropy_with_logits: tuple(inspect.signature(F.binary_cross_entropy_with_logits).parameters),
    torch.binary_cross_entropy_with_logits: ("input", "target", "weight", "pos_weight", "reduction"),
}
DROPOUTS: dict[Any, tuple[str, ...]] = {
    F.dropout: ("input", "p", "training"),
    torch.dropout: ("input", "p", "train"),
}
ARGUMENTS = {F.linear: ("input", "weight", "bias"), **DROPOUTS, **LOSSES}


@dataclass(frozen=True, eq=False)
class Layer:
    """A call of `F.linear`, and the call of an activation or of a loss that alone takes its output."""

    linear: Node
    activation: Node | None
    name: str  # of the activation, "identity" without one
    loss: Node | None = None  # the binary cross entropy, of which a layer without activation gives the logit
    apart: bool = False  # from the layer below, by what else the graph calls

    @property
    def y(self) -> Node:
        return self.loss or self.activation or self.linear

    @property
    def operands(self) -> tuple[Node, Node, Node | None]:
        """x, weight and bias, which change where what gave them is replaced."""
        given = arguments_of(self.linear)
        return given["input"], given["weight"], given.get("bias")

    @property
    def head(self) -> tuple[Node, Node | None, str, torch.dtype] | None:
        """The loss's target, pos_weight, reduction and dtype, or None without a loss."""
        if self.loss is None:
            return None
        # Without a reduction the function takes the mean. torch's builtin of that name takes none, as its shape tells.
        default = "none" if value(self.loss).dim() else "mean"
        given = {"reduction": default, "pos_weight": None} | arguments_of(self.loss)
        reduction = given["reduction"]
        reduction = REDUCTIONS[reduction] if isinstance(reduction, int) else reduction
        return given["target"], given["pos_weight"], reduction, value(self.loss).dtype


def arguments_of(call: Node) -> dict[str, Any]:
    """The arguments of a call of one of `ARGUMENTS` by name."""
    return dict(zip(ARGUMENTS[call.target], call.args, strict=False)) | call.kwargs


def value(node: Node) -> Any:
    """The fake tensor or number that stands for what a node gives, None where Dynamo knows none."""
    return node.meta.get("example_value")


def forget_dropouts(graph: Graph) -> None:
    """Removes the calls of dropout that return their input, as all do in evaluation."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is F.dropout:
            given = arguments_of(node)
            if given.get("training", True) is False:
                node.replace_all_uses_with(given["input"])
                graph.erase_node(node)


def misjudges(gm: GraphModule) -> bool:
    """Whether Dynamo may be wrong on which values of the graph want gradients.

    Where gradients are off, a dropout that does nothing gives its very input, which may want one; Dynamo says no.
    """
    parts = [part.graph for part in gm.modules() if isinstance(part, GraphModule)]
    calls = [node for graph in parts for node in graph.nodes if node.op == "call_function" and node.target in DROPOUTS]
    return any(_wants(call) != _wants(arguments_of(call)["input"]) for call in calls)


def _wants(node: Node) -> bool:
    return getattr(value(node), "requires_grad", False)


def layers_of(graph: Graph) -> list[Layer]:
    """The layers in the order of their calls."""
    effects = Effects(graph)
    layers = []
    for linear in graph.nodes:
        if linear.op == "call_function" and linear.target is F.linear:
            activation, name = _activation(linear, effects.order)
            if activation is not None and effects.change_the_mode(linear, activation):
                activation, name = None, "identity"
            layer = Layer(linear, activation, name, None if activation else _loss(linear))
            # A layer and its loss are called where the loss was.
            layers.append(replace(layer, loss=None) if layer.loss and effects.interfere([layer]) else layer)
    return layers


def _loss(linear: Node) -> Node | None:
    """The cross entropy that alone takes a linear layer's output, and only as the logits of an equal shape."""
    loss, *others = linear.users or [None]
    if loss is None or others or loss.op != "call_function" or loss.target not in LOSSES:
        return None
    given = arguments_of(loss)
    alone = given.pop("input") is linear and linear not in given.values()
    return loss if alone and value(given["target"]).shape == value(linear).shape else None


def _activation(linear: Node, order: dict[Node, int]) -> tuple[Node | None, str]:
    """The activation that takes a linear layer's output from everybody else, and its name."""
    first, *others = sorted(linear.users, key=order.__getitem__) or [None]
    if first is None:
        return None, "identity"
    calls: dict[Any, str] = {"call_function": FUNCTIONS, "call_method": NAMES}.get(first.op, {})
    name = calls.get(first.target)
    input, *flags = *first.args, *first.kwargs.values()
    if name is None or input is not linear or not all(isinstance(flag, bool) for flag in flags):
        return None, "identity"
    if others and not _in_place(first):
        return None, "identity"
    # Who reads an input that has been written over reads the output.
    linear.replace_all_uses_with(first, delete_user_cb=lambda user: user is not first)
    return first, name


def _in_place(call: Node) -> bool:
    name = call.target if isinstance(call.target, str) else getattr(call.target, "__name__", "")
    return name.endswith("_") or True in (*call.args, *call.kwargs.values())


def chains_of(graph: Graph, layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers in runs that may be one network: each one's output goes to the next alone, with one hidden activation.

    A network is called where its last layer was.
    """
    effects = Effects(graph)
    following = {layer.operands[0]: layer for layer in layers}
    chains, taken, apart = [], set(), set()
    for layer in layers:
        if layer.linear in taken:
            continue
        chain = [replace(layer, apart=layer.linear in apart)]
        while (above := following.get(chain[-1].y)) is not None and _joins(chain, above):
            if effects.interfere([*chain, above]):
                apart.add(above.linear)
                break
            chain.append(above)
        taken |= {one.linear for one in chain}
        chains.append(chain)
    return chains


def _joins(chain: list[Layer], above: Layer) -> bool:
    below = chain[-1]
    return (
        [*below.y.users] == [above.linear]
        and below.y not in above.operands[1:]
        and {layer.name for layer in chain} == {chain[0].name} != {"identity"}
        and (below.operands[2] is None) == (above.operands[2] is None)
    )


class Effects:
    """What the calls of a graph do beside giving a value."""

    def __init__(self, graph: Graph) -> None:
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        calls = [node for node in graph.nodes if node.op.startswith("call")]
        # What gives nothing changes a mode, as those of gradients and autocast, or a tensor, or only looks.
        self.nothing = [self.order[node] for node in calls if value(node) is None and not _only_checks(node)]
        self.writes = {node: {*map(_storage, node.all_input_nodes)} for node in calls if _writes(node)}

    def change_the_mode(self, first: Node, last: Node) -> bool:
        """Whether calls between the two may run in another mode."""
        return any(self.order[first] < index < self.order[last] for index in self.nothing)

    def interfere(self, chain: Sequence[Layer]) -> bool:
        """Whether others may write to what the chain reads, or change a mode in its midst.

        Where gradients are wanted a network reads its operands again: nothing may write to them later either.
        """
        first, last = chain[0].linear, chain[-1].y
        own = {node for layer in chain for node in (layer.linear, layer.activation, layer.loss)}
        storages = {_storage(node) for layer in chain for node in layer.operands if node is not None}
        trained = any(value(layer.linear).requires_grad for layer in chain)
        return (
            self.change_the_mode(first, last)
            or None in storages
            or any(
                node not in own
                and self.order[first] < self.order[node]
                and (trained or self.order[node] < self.order[last])
                and not written.isdisjoint({None, *storages})
                for node, written in self.writes.items()
            )
        )


def _only_checks(node: Node) -> bool:
    module, name = (getattr(node.target, of, None) or "" for of in ("__module__", "__name__"))
    return module.partition(".")[0] == "torch" and name.startswith(("_check", "_assert"))


def _storage(node: Node) -> int | None:
    """What nodes have in common that share memory, 0 for numbers; None where that is not known."""
    tensor = value(node)
    if not isinstance(tensor, Tensor):
        return 0 if isinstance(tensor, NUMBERS) else None
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # subclasses, sparse tensors
        return None


def _writes(node: Node) -> bool:
    """Whether a call may write to one of its arguments."""
    target = node.target
    if isinstance(target, str):
        return node.op != "call_method" or target.endswith("_") or target.startswith("__i")
    if isinstance(target, OpOverload):
        return target._schema.is_mutable or _is_silent(target._opname)
    module, name = getattr(target, "__module__", None) or "", getattr(target, "__name__", "")
    if not isinstance(target, (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)):
        return True  # ops of others, and operators that run a graph of their own
    if module == "_operator":
        return name.startswith("i") or name in ("setitem", "delitem")
    plain = module.partition(".")[0] in ("torch", "math", "builtins", "")
    known = getattr(getattr(torch.ops.aten, name, None), "default", None)
    told = name.endswith("_") or (known is not None and known._schema.is_mutable)
    return not plain or told or _is_silent(name) or _is_told_to_write(node)


def _is_silent(name: str) -> bool:
    """Whether what has this name writes where no schema says so: statistics of norms, rows of an embedding."""
    return "batch_norm" in name or "instance_norm" in name or name.startswith("embedding")


def _is_told_to_write(node: Node) -> bool:
    """Whether a call has an output, or what counts as true for `inplace`, by name or by place."""
    given: dict[str, Any] = dict(node.kwargs)
    # What is written in C takes its output by name alone, and nothing `inplace`.
    if isinstance(node.target, types.FunctionType):
        try:
            given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
        except (TypeError, ValueError):
            return True
    nested = next((value for value in given.values() if isinstance(value, dict)), {})  # behind **kwargs
    return any((given | nested).get(name) not in (None, False, 0) for name in ("out", "inplace"))


def transforms(graph: Graph) -> bool:
    """Whether a part of the graph runs under a transform of torch.func, or with dual numbers."""
    return any(map(_transforms, graph.nodes))


def _transforms(node: Node) -> bool:
    if not isinstance(node.target, (types.FunctionType, types.BuiltinFunctionType)):
        return False
    module, name = getattr(node.target, "__module__", None) or "", node.target.__name__
    dual = "dual" in name and module.partition(".")[0] in ("torch", "")  # what is built in has no module
    return dual or module.startswith(("torch._functorch", "torch._C._functorch"))
