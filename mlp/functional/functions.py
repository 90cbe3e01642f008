"""The nodes that autograd sees: a layer, a network, a network that ends in a loss."""

import contextlib
from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor

from ...kernels import eligibility, ops, reference
from .eager import torch_bce, torch_network


class LinearActFunction(torch.autograd.Function):
    # The ctx style costs a third of what setup_context costs; torch.func transforms never come here.

    @staticmethod
    def forward(ctx, x, weight, bias, activation, impl):
        y = ops.linear_act_fwd(x, weight, bias, activation, impl)
        need_dx, need_dweight, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            x if need_dweight else None, weight if need_dx else None, None if activation == "identity" else y
        )
        ctx.activation, ctx.impl = activation, impl
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, y = ctx.saved_tensors
        if y is None:
            y = dy  # identity: its derivative asks for a shape only
        wanted = ctx.needs_input_grad[:3]
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or eligibility.batched(dy)):
            # create_graph: gradients that can themselves be differentiated, exact to any order.
            gradients = reference.linear_act_bwd_differentiable(dy, y, x, weight, ctx.activation, wanted)
        elif torch.is_autocast_enabled(dy.device.type):
            # The products keep the dtype of the forward pass even if backward() runs under autocast.
            with torch.autocast(dy.device.type, enabled=False):
                gradients = ops.linear_act_bwd(dy, y, x, weight, ctx.activation, wanted, ctx.impl)
        else:
            gradients = ops.linear_act_bwd(dy, y, x, weight, ctx.activation, wanted, ctx.impl)
        return *gradients, None, None


class MlpFunction(torch.autograd.Function):
    """A network that keeps the outputs of its layers.

    Those of hidden layers are outputs of the node too, for gradients of gradients to come back through; none goes out.
    """

    @staticmethod
    def forward(ctx, x, hidden, output, plans, layers, *parameters):
        weights, biases = split_parameters(parameters, layers)
        ctx.wanted = _flags((ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]), layers)
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
        # Read once: under activation checkpointing a second look finds nothing.
        x, *tensors = ctx.saved_tensors
        weights, saved = tensors[:layers], tensors[layers:]
        options = (ctx.hidden, ctx.output, ctx.wanted)
        others = any(dh is not None for dh in dhs)
        with _without_autocast(ctx.kind):
            if dy is None or others or torch.is_grad_enabled() or eligibility.batched(dy):
                # create_graph: gradients that can themselves be differentiated, exact to any order.
                upstream = (*(None,) * (layers - 1 - len(dhs)), *dhs, dy)
                dx, dweights, dbiases = reference.mlp_bwd_differentiable(upstream, x, saved, weights, *options)
                dx = None if dx is None else dx.reshape(ctx.shape)
            else:
                dx, dweights, dbiases = ops.mlp_bwd(dy, x, saved, weights, None, *options, ctx.plan)
        return (dx, *(None,) * 4, *dweights, *dbiases)[: len(ctx.needs_input_grad)]


class FusedMlpFunction(torch.autograd.Function):
    """A network in kernels that compute the activations once more on the way back: for that they need every input."""

    @staticmethod
    def forward(ctx, x, hidden, output, plans, layers, *parameters):
        ctx.hidden, ctx.output, ctx.plan, ctx.layers = hidden, output, plans.backward, layers
        weights, biases = split_parameters(parameters, layers)
        y, saved = ops.mlp_fwd(x, weights, biases, hidden, output, plans.forward, plans.backward.boundaries)
        ctx.save_for_backward(x, *parameters, *saved)
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, saved, wanted = _saved(ctx, 5)
        x, *parameters = inputs
        weights, biases = split_parameters(parameters, ctx.layers)
        with _without_autocast(dy.device.type):
            if torch.is_grad_enabled() or eligibility.batched(dy):

                def network(x, *parameters):
                    return torch_network(x, *split_parameters(parameters, ctx.layers), ctx.hidden, ctx.output)

                gradients = _double(network, inputs, wanted, dy)
            else:
                flags = _flags(wanted, ctx.layers)
                of = ops.mlp_bwd(dy, x, saved, weights, biases, ctx.hidden, ctx.output, flags, ctx.plan)
                gradients = (of[0], *of[1], *of[2])[: len(inputs)]
        return gradients[0], *(None,) * 4, *gradients[1:]


class MlpBceFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, pos_weight, reduction, dtype, hidden, plans, layers, *parameters):
        ctx.reduction, ctx.hidden, ctx.plan, ctx.layers = reduction, hidden, plans.backward, layers
        weights, biases = split_parameters(parameters, layers)
        head = (target, pos_weight, reduction, dtype)
        loss, saved = ops.mlp_bce_fwd(x, weights, biases, hidden, *head, plans.forward, plans.backward.boundaries)
        ctx.save_for_backward(x, *parameters, target, pos_weight, *saved)
        return loss

    @staticmethod
    def backward(ctx, dloss):  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, (target, pos_weight, *rest), wanted = _saved(ctx, 8)
        saved = tuple(rest)
        x, *parameters = inputs
        weights, biases = split_parameters(parameters, ctx.layers)
        head = (target, pos_weight, ctx.reduction)
        with _without_autocast(dloss.device.type):
            if torch.is_grad_enabled() or eligibility.batched(dloss):

                def loss(x, *parameters):
                    z = torch_network(x, *split_parameters(parameters, ctx.layers), ctx.hidden, "identity")
                    return torch_bce(z, *head)

                gradients = _double(loss, inputs, wanted, dloss)
            else:
                flags = _flags(wanted, ctx.layers)
                of = ops.mlp_bce_bwd(dloss, x, saved, weights, biases, ctx.hidden, *head, flags, ctx.plan)
                gradients = (of[0], *of[1], *of[2])[: len(inputs)]
        return gradients[0], *(None,) * 7, *gradients[1:]


def _without_autocast(kind: str) -> contextlib.AbstractContextManager:
    """The products keep the dtype of the forward pass even if backward() runs under autocast."""
    # To turn off what is off would cost as much as a launch.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def split_parameters(parameters: Sequence[Tensor], layers: int) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
    """(weights, biases) of so many layers; no biases: None."""
    return parameters[:layers], parameters[layers:] or None


def _saved(ctx, others: int):
    """(x and the parameters, what was saved after them, which of them want gradients): `others` stand between."""
    wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[others:])
    # Read once: under activation checkpointing a second look finds nothing.
    tensors = ctx.saved_tensors
    return tensors[: len(wanted)], tensors[len(wanted) :], wanted


def _flags(wanted: tuple[bool, ...], layers: int) -> reference.NeedsGrad:
    return wanted[0], wanted[1 : 1 + layers], wanted[1 + layers :] or (False,) * layers


def _double(function, inputs: Sequence[Tensor], wanted: Sequence[bool], upstream: Tensor) -> list[Tensor | None]:
    """Gradients that can themselves be differentiated, exact to any order: those of torch's own operations."""
    create_graph = torch.is_grad_enabled()  # off in a batched backward pass, which nobody differentiates again
    with torch.enable_grad():
        # Aliases, so that an input that depends on another, or is given twice, gets the gradient of its own place only.
        aliases = [tensor.view_as(tensor) for tensor in inputs]
        chosen = [alias for alias, want in zip(aliases, wanted, strict=True) if want]
        gradients = iter(torch.autograd.grad(function(*aliases), chosen, upstream, create_graph=create_graph))
    return [next(gradients) if want else None for want in wanted]
