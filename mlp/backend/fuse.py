# SPDX-License-Identifier: Apache-2.0
"""Registered ops in the place of layers and networks in a captured graph."""

import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from ...kernels import eligibility
from ...kernels.registration import registered
from ..functional.checks import is_real, loss_refusal
from .graph import Layer, arguments_of, chains_of, forget_dropouts, layers_of, misjudges, transforms, value

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
    if held := _beyond(gm, example_inputs):
        return [Found(_place(layer.linear), None, f"the graph holds {held}") for layer in layers_of(gm.graph)]
    forget_dropouts(gm.graph)
    layers, found = layers_of(gm.graph), {}
    for chain in chains_of(gm.graph, layers):
        found |= _fuse_chain(gm, chain, replayed)
        if chain[0].apart:
            why = "; not one network with the layer below, whose tensors or mode a call beside them may change"
            first = found[chain[0].linear]
            found[chain[0].linear] = first._replace(reason=first.reason + why)
    gm.graph.lint()
    gm.recompile()
    return [found[layer.linear] for layer in layers] + [
        one for part in _checkpointed(gm) for one in fuse(part, example_inputs, replayed)
    ]


def _beyond(gm: GraphModule, example_inputs: Sequence[object]) -> str:
    """What in a graph keeps it as it is, "" without any."""
    kinds = {type(tensor) for tensor in example_inputs if isinstance(tensor, Tensor)} - {*eligibility.PLAIN, *KINDS}
    if kinds:
        return f"a {kinds.pop().__name__}, with rules of its own"
    if transforms(gm.graph):
        return "a transform of torch.func"
    return "a dropout with gradients off, of what wants one" if misjudges(gm) else ""


def _checkpointed(gm: GraphModule) -> Iterator[GraphModule]:
    """The parts under activation checkpointing, but for those that keep what operations of their choice give."""
    for node in gm.graph.nodes:
        if node.target is torch.ops.higher_order.tag_activation_checkpoint:
            part = getattr(gm, node.args[0].target)
            if not part.meta.get("_checkpoint_context_fn"):
                yield part


def _fuse_chain(gm: GraphModule, chain: list[Layer], replayed: bool) -> dict[Node, Found]:
    places = {layer.linear: _place(layer.linear) for layer in chain}
    names, loss = [layer.name for layer in chain], chain[-1].loss
    refused = ""
    if len(chain) > 1 or loss:
        save = _boundaries(chain, replayed)
        if not isinstance(save, str):
            _replace(gm, chain, save)
            together = "runs as one with the cross entropy" if loss else f"one of {len(chain)} layers that run as one"
            op, reason = "mlp_bce" if loss else "mlp", f"{together}: {', '.join(names)}"
            return {linear: Found(place, op, reason) for linear, place in places.items()}
        if loss:
            found = _fuse_chain(gm, [*chain[:-1], replace(chain[-1], loss=None)], replayed)
            why = f"; not with the cross entropy behind: {save}"
            return {linear: one._replace(reason=one.reason + why) for linear, one in found.items()}
        refused = f"; no network of {len(chain)} layers: {save}"
    found = {}
    for layer in chain:
        reason = _refusal(layer, replayed)
        if reason is None:
            _replace(gm, [layer], ())
        op, why = None if reason else "linear_act", (reason or layer.name) + refused
        found[layer.linear] = Found(places[layer.linear], op, why)
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
    loss = chain[-1].loss
    save = _kind_refusal(chain) or eligibility.traced_boundaries(
        value(x),
        [*map(value, weights)],
        [*map(value, biases)] or None,
        *_circumstances(chain),
        kinds=KINDS,
        replayed=replayed,
        loss=loss is not None,
    )
    return save if loss is None or isinstance(save, str) else _head_refusal(chain[-1], loss) or save


def _head_refusal(layer: Layer, loss: Node) -> str | None:
    """Why the loss behind a layer stays as it is, or None."""
    given = arguments_of(loss)
    if any(given.get(name) is not None for name in ("weight", "size_average", "reduce")):
        return "it weighs elements, or says in an old way how to sum them"
    target, weights = value(given["target"]), given.get("pos_weight")
    pos_weight = None if weights is None else value(weights)
    if not (target.is_floating_point() and (pos_weight is None or is_real(pos_weight))):
        return "its target or pos_weight is not real"
    return loss_refusal(value(layer.operands[0]), target, pos_weight, value(layer.linear).shape[-1], KINDS)


def _operands(chain: list[Layer]) -> tuple[Node, list[Node], list[Node]]:
    """x, weights and biases of a network."""
    xs, weights, biases = zip(*(layer.operands for layer in chain), strict=True)
    return xs[0], [*weights], [bias for bias in biases if bias is not None]


def _kind_refusal(chain: list[Layer]) -> str | None:
    outputs = [node for layer in chain for node in (layer.linear, layer.activation) if node is not None]
    nodes = [*outputs, *(node for layer in chain for node in layer.operands if node is not None)]
    kinds = sorted({type(value(node)).__name__ for node in nodes if type(value(node)) not in KINDS})
    if kinds:
        return f"a {kinds[0]} has rules of its own"
    if len({value(node).dtype for node in outputs}) > 1:
        return "its dtype changes on the way"
    return None


def _circumstances(chain: list[Layer]) -> tuple[torch.dtype, bool, bool]:
    """(the dtype of the products, whether autocast casts operands to it, whether gradients are wanted)."""
    dtype = value(chain[0].linear).dtype
    casts = any(value(node).dtype != dtype for layer in chain for node in layer.operands if node is not None)
    return dtype, casts, any(value(layer.linear).requires_grad for layer in chain)


def _replace(gm: GraphModule, chain: list[Layer], save: tuple[int, ...]) -> None:
    """One op in the place of the chain, called where its last layer, or the loss behind that one, was."""
    last, dtype = chain[-1], value(chain[0].linear).dtype
    head = last.head or ()
    made: list[Node] = []

    def cast(node: Node | None) -> Node | None:
        # As autocast would; the op itself it does not know.
        if node is None or value(node).dtype == dtype:
            return node
        made.append(gm.graph.call_method("to", (node, dtype)))
        return made[-1]

    with gm.graph.inserting_before(last.loss or last.linear):
        if len(chain) == 1 and not head:
            arguments = (*map(cast, last.operands), last.name, None)
            made.append(gm.graph.call_function(registered.linear_act, arguments))
        else:
            x, *parameters = _operands(chain)
            operands = (cast(x), *([*map(cast, of)] for of in parameters))
            op = registered.mlp_bce if head else registered.mlp
            arguments = (*operands, chain[0].name, last.name, [*save], None, *head)
            made.append(gm.graph.call_function(op, arguments))
            made.append(gm.graph.call_function(operator.getitem, (made[-1], 0)))
    for node in made:
        node.meta = {name: of for name, of in last.y.meta.items() if name != "example_value"}
    made[-1].meta["example_value"] = value(last.y)
    last.y.replace_all_uses_with(made[-1])
    for layer in reversed(chain):
        for node in (layer.loss, layer.activation, layer.linear):
            if node is not None:
                gm.graph.erase_node(node)


def _place(node: Node) -> str:
    """The module whose forward calls this, and the line."""
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    trace = node.meta.get("stack_trace") or ""
    # Paths are like "L['self'].policy.0" of a model, "G['model'].policy.0" of a function. A forward may give its model
    # another name than self, and Dynamo calls a module that has no code but torch's, as nn.Sequential, "fn".
    own = r"\w+" if re.match(r'\s*File ".*", line \d+, in forward\n', trace) else "self|fn"
    module = re.sub(rf"^L\['({own})'\]\.", "", paths[-1]) if paths else ""
    module = re.sub(r"^\w\['(\w+)'\]", r"\1", module)
    lines = re.findall(r'File "(?:.*/)?([^"]+)", line (\d+)', trace)
    line = ":".join(lines[-1]) if lines else ""
    return f"{module} ({line})" if module and line else module or line or node.name
