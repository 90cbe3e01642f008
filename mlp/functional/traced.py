# SPDX-License-Identifier: Apache-2.0
"""What torch.compile traces: registered ops with autograd formulas, where they win, and else plain operations."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import eligibility
from ...kernels.activations import ACTIVATIONS
from ...kernels.plan import mlp_slots
from ...kernels.records import IMPLS
from ...kernels.registration import library, registered
from .checks import check_layer
from .eager import product_dtype, torch_network
from .functions import layer_bwd, linear_act_backward, network_bwd, save_layer, split_parameters

# --- autograd formulas -------------------------------------------------------------------------------------


def _save_mlp(ctx, inputs, output):
    x, weights, biases, ctx.hidden, ctx.output, ctx.save, ctx.impl, *head = inputs
    ctx.layers, ctx.head = len(weights), head[2:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *weights, *biases, *head[:2], *output[1])


def _mlp_bwd(ctx, dy, _):
    need_dx, need_dweights, need_dbiases, *_ = ctx.needs_input_grad
    # torch takes an empty list for one of tensors, and wants a list back.
    options = (None, None, None if ctx.save else [], None, *(None,) * 2 * len(ctx.head))
    if dy is None:
        return None, [None] * len(need_dweights), [None] * len(need_dbiases), *options
    wanted = (need_dx, *need_dweights, *need_dbiases)
    tensors, first = ctx.saved_tensors, len(wanted) + len(ctx.head)  # of a loss, as many tensors as options
    inputs, head, saved = tensors[: len(wanted)], (*tensors[len(wanted) : first], *ctx.head), tensors[first:]
    backward = registered.mlp_bce_backward if head else registered.mlp_backward

    def fused(x, weights, biases, needs_grad):
        options = (ctx.hidden, ctx.output, ctx.save, wanted, ctx.impl)
        dx, flat = backward(dy, x, weights, biases or (), saved, *options, *head)
        *starts, _ = mlp_slots((x.shape[-1], *(weight.shape[0] for weight in weights)), needs_grad)
        dweights, dbiases = (
            [None if at < 0 else flat[at : at + of.numel()].view(of.shape) for at, of in zip(ats, tensors, strict=True)]
            for ats, tensors in zip(starts, (weights, biases or (None,) * ctx.layers), strict=True)
        )
        return dx if need_dx else None, dweights, dbiases

    in_torch = partial(torch_network, hidden=ctx.hidden, output=ctx.output, head=head[:3])
    dx, *others = network_bwd(dy, inputs, ctx.layers, wanted, fused, in_torch)
    return dx, others[: ctx.layers], others[ctx.layers :], *options


torch.library.register_autograd(
    registered.linear_act,
    partial(layer_bwd, backward=linear_act_backward),
    setup_context=save_layer,
    lib=library,
)
for _op in (registered.mlp, registered.mlp_bce):
    torch.library.register_autograd(_op, _mlp_bwd, setup_context=_save_mlp, lib=library)


# --- what is traced ----------------------------------------------------------------------------------------

# Nothing here reads a number of rows that is not known, so that a dynamic batch compiles once. On the CPU and under
# export plain operations are traced: the compiler fuses them, and an exported graph must need no op of this package.


def traced_layer(x, weight, bias, activation, impl) -> Tensor:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not _all_tensors(tensors) or activation not in ACTIVATIONS or impl not in IMPLS:
        check_layer(x, weight, bias, activation, impl)
    dtype, autocast = product_dtype(x)
    if refused := eligibility.traced_refusal(x, weight, bias, dtype, autocast, _training(tensors), impl):
        if impl == "triton":
            raise NotImplementedError(f'impl="triton": {refused}')
        return ACTIVATIONS[activation].forward(F.linear(x, weight, bias))
    if autocast:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return registered.linear_act(x, weight, bias, activation, impl)


def traced_network(x, weights, biases, hidden, output, impl, *head) -> Tensor | None:
    """The whole network as one op, or None where its layers are traced one by one.

    head: the target, pos_weight, reduction and dtype of the cross entropy that it ends in.
    """
    tensors = (x, *weights, *(biases or ()))
    if not _all_tensors(tensors) or len(biases or weights) != len(weights):
        return None
    dtype, autocast = product_dtype(x)
    circumstances = (dtype, autocast, _training(tensors), impl)
    save = eligibility.traced_boundaries(x, weights, biases, *circumstances, loss=len(head) > 0)
    if isinstance(save, str):
        return None
    if autocast:
        x, *tensors = (tensor.to(dtype) for tensor in tensors)
        weights, biases = split_parameters(tensors, len(weights))
    op = registered.mlp_bce if head else registered.mlp
    return op(x, [*weights], [*(biases or ())], hidden, output, [*save], impl, *head)[0]


def _all_tensors(tensors) -> bool:
    return all(isinstance(tensor, Tensor) for tensor in tensors)


def _training(tensors) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
