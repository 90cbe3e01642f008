"""Registered ops in the place of layers and networks in a captured graph."""

import operator
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from ...kernels import eligibility
from ...kernels.registration import registered
from .graph import Layer, chains_of, forget_dropouts, layers_of, transforms, value

KINDS = (FakeTensor,)  # what stands for plain tensors and parameters in a captured graph


class Found(NamedTuple):
    """A call of a linear layer in a captured graph, and what became of it."""

    place: str  # the module that was called, and the line that called it
    op: str | None  # the name of the registered op that runs it; None: it stays as it is
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.op or 'plain'}, {self.reason}"


def fuse(gm: GraphModule, example_inputs: Sequence[object], replayed: bool = False) -> list[Found]:
    """Puts registered ops in the place of what they compute, and says what became of each linear layer.

    replayed: CUDA graphs will run it, which ask nothing of the host.
    """
    forget_dropouts(gm.graph)
    layers = layers_of(gm.graph)
    kinds = {type(tensor) for tensor in example_inputs if isinstance(tensor, Tensor)} - {*eligibility.PLAIN, *KINDS}
    if transforms(gm.graph) or kinds:
        own = f"a {kinds.pop().__name__}, with rules of its own" if kinds else "a transform of torch.func"
        return [Found(_place(layer.linear), None, f"the graph holds {own}") for layer in layers]
    found = {}
    for chain in chains_of(gm.graph, layers):
        found |= _fuse_chain(gm, chain, replayed)
    gm.graph.lint()
    gm.recompile()
    return [found[layer] for layer in layers] + [
        one for part in _checkpointed(gm) for one in fuse(part, example_inputs, replayed)
    ]


def _checkpointed(gm: GraphModule) -> Iterator[GraphModule]:
    """The parts under activation checkpointing, but for those that keep what operations of their choice give."""
    for node in gm.graph.nodes:
        if node.target is torch.ops.higher_order.tag_activation_checkpoint:
            part = getattr(gm, node.args[0].target)
            if not part.meta.get("_checkpoint_context_fn"):
                yield part


def _fuse_chain(gm: GraphModule, chain: list[Layer], replayed: bool) -> dict[Layer, Found]:
    places = {layer: _place(layer.linear) for layer in chain}
    names = [layer.name for layer in chain]
    refused = ""
    if len(chain) > 1:
        save = _boundaries(chain, replayed)
        if not isinstance(save, str):
            _replace(gm, chain, save)
            reason = f"one of {len(chain)} layers that run as one: {', '.join(names)}"
            return {layer: Found(places[layer], "mlp", reason) for layer in chain}
        refused = f"; no network of {len(chain)} layers: {save}"
    found = {}
    for layer in chain:
        reason = _refusal(layer, replayed)
        if reason is None:
            _replace(gm, [layer], ())
        found[layer] = Found(places[layer], None if reason else "linear_act", (reason or layer.name) + refused)
    return found


def _refusal(layer: Layer, replayed: bool) -> str | None:
    """Why a layer stays as it is, or None."""
    if layer.activation is None:
        return "no sigmoid, tanh or relu alone takes its output"
    x, weight, bias = layer.operands
    if value(weight).dim() != 2:
        return "its weight is no matrix"  # torch takes a vector
    tensors = value(x), value(weight), None if bias is None else value(bias)
    return _kind_refusal([layer]) or eligibility.traced_refusal(
        *tensors, *_circumstances([layer]), kinds=KINDS, replayed=replayed
    )


def _boundaries(chain: list[Layer], replayed: bool) -> tuple[int, ...] | str:
    """What a network of these layers saves, or why it is none."""
    x, weights, biases = _operands(chain)
    return _kind_refusal(chain) or eligibility.traced_boundaries(
        value(x),
        [*map(value, weights)],
        [*map(value, biases)] or None,
        *_circumstances(chain),
        kinds=KINDS,
        replayed=replayed,
    )


def _operands(chain: list[Layer]) -> tuple[Node, list[Node], list[Node]]:
    """x, weights and biases of a network."""
    xs, weights, biases = zip(*(layer.operands for layer in chain), strict=True)
    return xs[0], [*weights], [bias for bias in biases if bias is not None]


def _kind_refusal(chain: list[Layer]) -> str | None:
    nodes = {node for layer in chain for node in (*layer.operands, layer.linear, layer.y) if node is not None}
    kinds = sorted({type(value(node)).__name__ for node in nodes if type(value(node)) not in KINDS})
    if kinds:
        return f"a {kinds[0]} has rules of its own"
    if len({value(node).dtype for layer in chain for node in (layer.linear, layer.y)}) > 1:
        return "its dtype changes on the way"
    return None


def _circumstances(chain: list[Layer]) -> tuple[torch.dtype, bool, bool]:
    """(the dtype of the products, whether autocast casts operands to it, whether gradients are wanted)."""
    dtype = value(chain[0].linear).dtype
    casts = any(value(node).dtype != dtype for layer in chain for node in layer.operands if node is not None)
    return dtype, casts, any(value(layer.linear).requires_grad for layer in chain)


def _replace(gm: GraphModule, chain: list[Layer], save: tuple[int, ...]) -> None:
    """One op in the place of the chain, called where its last layer was."""
    last, dtype = chain[-1], value(chain[0].linear).dtype
    made: list[Node] = []

    def cast(node: Node | None) -> Node | None:
        # As autocast would; the op itself it does not know.
        if node is None or value(node).dtype == dtype:
            return node
        made.append(gm.graph.call_method("to", (node, dtype)))
        return made[-1]

    with gm.graph.inserting_before(last.linear):
        if len(chain) == 1:
            arguments = (*map(cast, last.operands), last.name, None)
            made.append(gm.graph.call_function(registered.linear_act.default, arguments))
        else:
            x, *parameters = _operands(chain)
            arguments = (cast(x), *([*map(cast, of)] for of in parameters), chain[0].name, last.name, [*save], None)
            made.append(gm.graph.call_function(registered.mlp.default, arguments))
            made.append(gm.graph.call_function(operator.getitem, (made[-1], 0)))
    for node in made:
        node.meta = {name: of for name, of in last.y.meta.items() if name != "example_value"}
    made[-1].meta["example_value"] = value(last.y)
    last.y.replace_all_uses_with(made[-1])
    for layer in reversed(chain):
        for node in (layer.activation, layer.linear):
            if node is not None:
                gm.graph.erase_node(node)


def _place(node: Node) -> str:
    """The module whose forward calls this, and the line."""
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    # As in "L['self'].policy.0" of a model, "G['model'].policy.0" of a function.
    module = re.sub(r"^\w\['(\w+)'\]", r"\1", paths[-1]).removeprefix("self.") if paths else ""
    lines = re.findall(r'File "(?:.*/)?([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    line = ":".join(lines[-1]) if lines else ""
    return f"{module} ({line})" if module and line else module or line or node.name
