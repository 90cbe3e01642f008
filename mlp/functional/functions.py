# SPDX-License-Identifier: Apache-2.0
"""The nodes that autograd sees: a layer, a network, a network that ends in a loss."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from ...kernels import eligibility, ops, reference
from ...kernels.calls import Calls
from ...kernels.registration import registered
from .eager import torch_network

network_backwards = Calls()  # of `FusedMlpFunction`, as functions (dy, *what was saved)


def node(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without its search for tensors that a transform has left behind, which `Calls` keeps away."""
    return super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]


class LinearActFunction(torch.autograd.Function):
    """A layer that saves its output, from which the activation's derivative follows. call: what computes it, if
    that is known.

    `forward` takes ctx, which costs a third of what `setup_context` costs. Only torch.func transforms need the latter,
    and `linear_act` keeps them away from here.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, activation, impl, call=None):
        y = call(x, weight, bias) if call else ops.linear_act_fwd(x, weight, bias, activation, impl)
        save_layer(ctx, (x, weight, bias, activation, impl), y)
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        # Compiled autograd traces this.
        backward = linear_act_backward if torch.compiler.is_compiling() else ops.linear_act_bwd
        return *layer_bwd(ctx, dy, backward), None


def linear_act_backward(*arguments):
    """`ops.linear_act_bwd` as the registered op."""
    gradients = registered.linear_act_backward(*arguments)
    wanted = arguments[5]
    return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))


def save_layer(ctx, inputs, output: Tensor) -> None:
    """Keeps what `layer_bwd` needs of a layer, no more than the wanted gradients need."""
    x, weight, _, activation, impl = inputs
    ctx.set_materialize_grads(False)  # where no gradient comes none goes on, and no zeros that an optimizer would take
    need_dx, need_dweight, _ = ctx.needs_input_grad[:3]
    ctx.save_for_backward(
        x if need_dweight else None, weight if need_dx else None, None if activation == "identity" else output
    )
    ctx.activation, ctx.impl = activation, impl


def layer_bwd(ctx, dy: Tensor | None, backward):
    """The gradients of a layer's arguments, where that will do by `backward`, called as `ops.linear_act_bwd` is."""
    if dy is None:
        return (None,) * 5
    x, weight, y = ctx.saved_tensors
    if y is None:
        y = dy  # the derivative of the identity reads nothing but y's shape
    wanted = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled() or eligibility.transformed(dy):
        # With create_graph=True gradients must themselves be differentiable, to any order.
        gradients = reference.linear_act_bwd_differentiable(dy, y, x, weight, ctx.activation, wanted)
    else:
        with _without_autocast(dy.device.type):
            gradients = backward(dy, y, x, weight, ctx.activation, wanted, ctx.impl)
    return *gradients, None, None


class MlpFunction(torch.autograd.Function):
    """A network that saves the outputs of its layers.

    The node returns those of hidden layers beside y, although no caller gets them: gradients of gradients arrive there.
    """

    @staticmethod
    def forward(ctx, x, hidden, output, plans, layers, *parameters):
        weights, biases = split_parameters(parameters, layers)
        ctx.wanted = _needs_grad((ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]), layers)
        ctx.hidden, ctx.output, ctx.plan, ctx.shape, ctx.kind = hidden, output, plans.backward, x.shape, x.device.type
        ctx.set_materialize_grads(False)
        need_dx, need_dweights, _ = ctx.wanted
        first = reference.first_wanted(ctx.wanted)
        save = tuple(l for l in range(1, layers) if l > first or (l == first and need_dweights[l]))
        y, hs = ops.mlp_fwd(x, weights, biases, hidden, output, plans.forward, save)
        ctx.save_for_backward(
            x if need_dweights[0] else None,
            *(weight if l > first or need_dx else None for l, weight in enumerate(weights)),
            *(None,) * (layers - 1 - len(hs)),
            *hs,
            None if output == "identity" else y,
        )
        return y, *hs

    @staticmethod
    def backward(ctx, dy, *dhs):  # pyright: ignore[reportIncompatibleMethodOverride]
        layers = len(ctx.wanted[1])
        # Read once: activation checkpointing gives the tensors away at the first reading.
        x, *tensors = ctx.saved_tensors
        weights, saved = tensors[:layers], tensors[layers:]
        options = (ctx.hidden, ctx.output, ctx.wanted)
        others = any(dh is not None for dh in dhs)
        with _without_autocast(ctx.kind):
            if dy is None or others or torch.is_grad_enabled() or eligibility.transformed(dy):
                # With create_graph=True gradients must themselves be differentiable, to any order.
                upstream = (*(None,) * (layers - 1 - len(dhs)), *dhs, dy)
                dx, dweights, dbiases = reference.mlp_bwd_differentiable(upstream, x, saved, weights, *options)
                dx = None if dx is None else dx.reshape(ctx.shape)
            else:
                dx, dweights, dbiases = ops.mlp_bwd(dy, x, saved, weights, None, *options, ctx.plan)
        return (dx, *(None,) * 4, *dweights, *dbiases)[: len(ctx.needs_input_grad)]


class FusedMlpFunction(torch.autograd.Function):
    """A network whose backward pass computes hidden activations again: it saves x, the parameters and a few outputs.

    options: both activations, the call that computes it, the plan of the backward pass, the number of layers.
    """

    @staticmethod
    def forward(ctx, x, options, *parameters):
        ctx.set_materialize_grads(False)
        _, _, call, _, layers = ctx.options = options
        y, saved = call(x, *split_parameters(parameters, layers))
        ctx.save_for_backward(x, *parameters, *saved)
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        hidden, output, _, plan, layers = ctx.options
        # Read once: activation checkpointing gives the tensors away at the first reading.
        needs, tensors = ctx.needs_input_grad, ctx.saved_tensors
        # What is found here was kept without autocast, transforms and differentiable gradients, see `Calls`.
        key, given = (id(plan), hidden, output, needs), (dy, *tensors)
        if known := network_backwards.find(key, given):
            return known(*given)
        inputs, saved, wanted = _split(needs, tensors, 2)
        autocast = torch.is_autocast_enabled(dy.device.type)

        def fused(x, weights, biases, needs_grad):
            call = ops.mlp_bwd_call(dy, x, saved, weights, biases, hidden, output, needs_grad, plan)
            if not autocast:  # with it, nothing that is kept would be found
                network_backwards.keep(key, given, _of_node(call, len(inputs), layers), plan)
            return call(dy, x, saved, weights, biases)

        in_torch = partial(torch_network, hidden=hidden, output=output)
        dx, *others = network_bwd(dy, inputs, layers, wanted, fused, in_torch)
        return dx, None, *others


def _of_node(call, count: int, layers: int) -> Callable:
    """What `ops.mlp_bwd_call` returns as a function (dy, *tensors) -> gradients of what `FusedMlpFunction` takes.

    count: of inputs that want gradients or not, which come first among what was saved.
    """
    end = layers + 1

    def backward(dy, *tensors):
        biases = tensors[end:count] or None
        dx, dweights, dbiases = call(dy, tensors[0], tensors[count:], tensors[1:end], biases)
        return (dx, None, *dweights, *dbiases) if biases else (dx, None, *dweights)

    return backward


class MlpBceFunction(torch.autograd.Function):
    """A network and its binary cross entropy, which saves what `FusedMlpFunction` saves, target and pos_weight."""

    @staticmethod
    def forward(ctx, x, target, pos_weight, reduction, dtype, hidden, plans, layers, *parameters):
        ctx.set_materialize_grads(False)
        ctx.reduction, ctx.hidden, ctx.plan, ctx.layers = reduction, hidden, plans.backward, layers
        weights, biases = split_parameters(parameters, layers)
        options = (hidden, "identity", plans.forward, plans.backward.boundaries, (target, pos_weight, reduction, dtype))
        loss, saved = ops.mlp_fwd(x, weights, biases, *options)
        ctx.save_for_backward(x, *parameters, target, pos_weight, *saved)
        return loss

    @staticmethod
    def backward(ctx, dloss):  # pyright: ignore[reportIncompatibleMethodOverride]
        if dloss is None:
            return (None,) * len(ctx.needs_input_grad)
        # Read once, as above.
        inputs, (target, pos_weight, *saved), wanted = _split(ctx.needs_input_grad, ctx.saved_tensors, 8)
        head = (target, pos_weight, ctx.reduction)

        def fused(x, weights, biases, needs_grad):
            options = (ctx.hidden, "identity", needs_grad, ctx.plan, head)
            return ops.mlp_bwd(dloss, x, tuple(saved), weights, biases, *options)

        in_torch = partial(torch_network, hidden=ctx.hidden, output="identity", head=head)
        dx, *others = network_bwd(dloss, inputs, ctx.layers, wanted, fused, in_torch)
        return dx, *(None,) * 7, *others


def network_bwd(upstream: Tensor, inputs: Sequence[Tensor], layers: int, wanted: tuple[bool, ...], fused, in_torch):
    """The gradients of a network's inputs, by `fused` or, where they must be differentiable, through `in_torch`.

    inputs: x, weights, biases, and whether each one's gradient is wanted. fused(x, weights, biases, needs_grad) ->
    (dx, dweights, dbiases); in_torch(x, weights, biases) -> what `upstream` is the gradient of.
    """
    if torch.is_autocast_enabled(upstream.device.type):
        with torch.autocast(upstream.device.type, enabled=False):
            return network_bwd(upstream, inputs, layers, wanted, fused, in_torch)
    if torch.is_grad_enabled() or eligibility.transformed(upstream):
        return _differentiable_bwd(in_torch, layers, inputs, wanted, upstream)
    weights, biases = inputs[1 : layers + 1], inputs[layers + 1 :] or None
    dx, dweights, dbiases = fused(inputs[0], weights, biases, _needs_grad(wanted, layers))
    return (dx, *dweights, *dbiases)[: len(inputs)]


def _without_autocast(kind: str) -> contextlib.AbstractContextManager:
    """The products keep the dtype of the forward pass even if backward() runs under autocast."""
    # Where autocast is off already, the context manager would cost as much as a kernel's launch.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def split_parameters(parameters: Sequence[Tensor], layers: int) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
    """(weights, biases) from the weights of all layers followed by the biases; biases are None where there are none."""
    return parameters[:layers], parameters[layers:] or None


def _split(needs: tuple[bool, ...], tensors: tuple[Tensor, ...], first: int):
    """([x, *parameters], what was saved after them, which of them want gradients); first: the index of a parameter."""
    wanted = (needs[0], *needs[first:])
    return tensors[: len(wanted)], tensors[len(wanted) :], wanted


def _needs_grad(wanted: tuple[bool, ...], layers: int) -> reference.NeedsGrad:
    return wanted[0], wanted[1 : 1 + layers], wanted[1 + layers :] or (False,) * layers


def _differentiable_bwd(in_torch, layers: int, inputs, wanted: Sequence[bool], upstream: Tensor):
    """Gradients that can themselves be differentiated, to any order: those of torch's own operations."""
    if peek_interpreter_stack() is not None:
        # Under a transform of torch.func operations on tensors from outside are not recorded.
        pull = torch.func.vjp(lambda x, *parameters: in_torch(x, *split_parameters(parameters, layers)), *inputs)[1]
        return [gradient if want else None for gradient, want in zip(pull(upstream), wanted, strict=True)]
    create_graph = torch.is_grad_enabled()  # off in a batched backward pass, which nobody differentiates again
    with torch.enable_grad():
        # Aliases, so that an input that depends on another, or is given twice, gets the gradient of its own place only.
        x, *parameters = aliases = [tensor.view_as(tensor) for tensor in inputs]
        chosen = [alias for alias, want in zip(aliases, wanted, strict=True) if want]
        output = in_torch(x, *split_parameters(parameters, layers))
        gradients = iter(torch.autograd.grad(output, chosen, upstream, create_graph=create_graph))
    return [next(gradients) if want else None for want in wanted]
