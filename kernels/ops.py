# SPDX-License-Identifier: Apache-2.0
"""The door to the kernels: flattens leading dimensions, makes plans, runs what was chosen.

Below it nothing is checked again. Layers ask `eligibility` first, which names what keeps a call from the kernels.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import plan as planning
from . import reference
from .calls import Calls
from .devices import device_for, dtype_name, fp32_precision, fp32_split, gpu
from .operands import are_dense, dense, flat_head, flattened, led, stored, widths_of
from .plan import MlpPlans
from .records import EMPTY, MlpPlan, NeedsGrad, Plan, Wanted
from .reference import Gradients, OptionalTensors

# What kernels run, as functions of the tensors that the doors take.
layer_forwards, layer_backwards, network_forwards, network_backwards = (Calls() for _ in range(4))

# "perceptriton", or the name under which a copy of the package was imported: each copy registers ops of its own.
NAMESPACE = "_".join(__name__.split(".")[:-2])


def linear_act_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, impl: str | None) -> Tensor:
    """act(x @ weight.T + bias) for x (..., K), weight (N, K), bias (N,): (..., N), contiguous, in x's dtype."""
    key, tensors = (activation, impl, bias is None), (x, weight) if bias is None else (x, weight, bias)
    if call := layer_forwards.find(key, tensors):
        return call(x, weight, bias)
    if call := linear_act_fwd_call(x, weight, bias, activation, impl):
        layer_forwards.keep(key, tensors, call)
        return call(x, weight, bias)
    x2, plan = _planned_fwd(x, weight, impl)
    return led(_layer_fwd(x2, weight, bias, activation, plan), x.shape)


def linear_act_fwd_call(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, impl: str | None
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """`linear_act_fwd` as a function of tensors like these, or None where it would decide nothing less than that."""
    x2, plan = _planned_fwd(x, weight, impl)
    if plan.impl not in ("rows", "tiled") or x.is_neg() or weight.is_neg() or (bias is not None and bias.is_neg()):
        return None
    call, shape, flat = gpu("layer").linear_act_fwd_call(x2, weight, bias, activation, plan), x.shape, x2.shape
    if x.dim() == 2:
        return call
    return lambda x, weight, bias: led(call(x.reshape(flat), weight, bias), shape)


def _planned_fwd(x: Tensor, weight: Tensor, impl: str | None) -> tuple[Tensor, Plan]:
    """x (M, K), and the plan for it."""
    n, k = weight.shape
    # The number of rows is computed, since torch cannot infer a -1 beside a size of 0.
    x2 = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), k)
    device = device_for(x.device, impl)
    arguments = (x2.shape[0], k, n, dtype_name(x.dtype), fp32_precision(device), device, impl, fp32_split(x.dtype))
    plan = planning.linear_act_fwd(*arguments)
    # Strides are looked at for wide layers alone: for small ones that would cost more time than it can save.
    if plan.impl == "tma" and not (gpu("wide").readable(x2) and gpu("wide").readable(weight)):
        plan = planning.linear_act_fwd(*arguments, False)
    obey(impl, plan)
    return x2, plan


def _layer_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, plan: Plan) -> Tensor:
    if plan.triton:
        x, weight, bias = stored(x), stored(weight), stored(bias)
    implementation = gpu("wide") if plan.impl == "tma" else gpu("layer") if plan.triton else reference
    return implementation.linear_act_fwd(x, weight, bias, activation, plan)


def linear_act_bwd(
    dy: Tensor, y: Tensor, x: Tensor | None, weight: Tensor | None, activation: str, wanted: Wanted, impl: str | None
) -> Gradients:
    """(dx, dweight, dbias) of `linear_act_fwd` from its output y and the gradient dy, (..., N) each.

    A gradient that is not wanted is None. x may be None if dweight is not wanted, weight if dx is not.
    """
    given = (dy, y, x, weight)
    # An identity has no y: dy stands in its place, and one tensor twice would make the call like no other.
    key, differing = (activation, wanted, impl, y is dy, x is None, weight is None), given[y is dy :]
    tensors = [t for t in differing if t is not None]
    if call := layer_backwards.find(key, tensors):
        return call(*given)
    n, k, rows = y.shape[-1], in_features_of(x, weight), math.prod(y.shape[:-1])
    device = device_for(y.device, impl)
    plan = planning.linear_act_bwd(rows, k, n, dtype_name(y.dtype), fp32_precision(device), device, impl)
    flat_dy, flat_y, flat_x = dy, y, x
    if y.dim() != 2:
        flat_dy, flat_y = dy.reshape(rows, n), y.reshape(rows, n)
        flat_x = None if x is None else x.reshape(rows, k)
    if plan.triton and y.is_contiguous() and not any([t.is_neg() for t in tensors]):
        call = gpu("layer").linear_act_bwd_call(flat_dy, flat_y, flat_x, weight, activation, wanted, plan)
        if y.dim() != 2:
            call = _with_leading(call, (*y.shape[:-1], k), rows)
        layer_backwards.keep(key, tensors, call)
        return call(*given)
    implementation = reference
    if plan.triton:
        implementation = gpu("layer")
        flat_dy, flat_y, flat_x, weight = stored(flat_dy), stored(flat_y), stored(flat_x), stored(weight)
    arguments = (flat_dy, flat_y.contiguous(), flat_x, weight, activation, wanted, plan)
    dx, dweight, dbias = implementation.linear_act_bwd(*arguments)
    return dx if dx is None or y.dim() == 2 else dx.view(*y.shape[:-1], k), dweight, dbias


def _with_leading(flat_bwd: Callable[..., Gradients], shape: tuple[int, ...], rows: int) -> Callable[..., Gradients]:
    """The backward pass of a layer on so many rows for tensors with leading dimensions, those of dx's shape."""

    def call(dy: Tensor, y: Tensor, x: Tensor | None, weight: Tensor | None) -> Gradients:
        dy, y = dy.reshape(rows, dy.shape[-1]), y.reshape(rows, y.shape[-1])
        dx, dweight, dbias = flat_bwd(dy, y, None if x is None else x.reshape(rows, shape[-1]), weight)
        return None if dx is None else dx.view(shape), dweight, dbias

    return call


def in_features_of(x: Tensor | None, weight: Tensor | None) -> int:
    # Without x and weight only dbias is wanted, and its cost does not depend on in_features.
    return weight.shape[1] if weight is not None else x.shape[-1] if x is not None else 1


def obey(impl: str | None, plan: Plan | MlpPlan) -> None:
    if impl == "triton" and not plan.triton and plan.reason != EMPTY:
        raise NotImplementedError(f'impl="triton": {plan.reason}')


def mlp_plans(
    x: Tensor, weights: Sequence[Tensor], training: bool, loss: bool = False, impl: str | None = None
) -> MlpPlans:
    """The plans for a network of these weights on x (..., K). training: gradients are wanted. loss: of a BCE head.

    Raises NotImplementedError where impl="triton" cannot be obeyed.
    """
    rows = x.shape[0] if x.dim() == 2 else math.prod(x.shape[:-1])
    device = device_for(x.device, impl)
    arguments = (rows, widths_of(weights), dtype_name(x.dtype), fp32_precision(device), device)
    plans = planning.mlp_both(*arguments, training, loss, impl, fp32_split(x.dtype))
    obey(impl, plans.forward)
    return plans


def _stacked_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, plan: Plan) -> Tensor:
    """A layer of a stack, planned by shapes alone: operands that TMA cannot read as they lie are copied."""
    if plan.impl == "tma":
        x, weight = map(gpu("wide").as_readable, (x, weight))
    return _layer_fwd(x, weight, bias, activation, plan)


def mlp_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    hidden: str,
    output: str,
    plan: MlpPlan,
    save: tuple[int, ...] = (),
    head: tuple[Tensor, Tensor | None, str, torch.dtype] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, saved): y (..., N), and what `mlp_bwd` needs beside the arguments if `save` is its plan's boundaries.

    x (..., K), weights (N_l, K_l) each, biases (N_l,) each or None, of any strides. hidden, output: activations.

    head: (target, pos_weight, reduction, dtype) gives, by a fused plan and in the place of y, the binary cross entropy
    from the logits of the last layer, an identity, in `dtype`. target (..., N), of any strides and floating dtype.
    pos_weight: (), (1,) or (N,), floating or integers, or None. reduction: "none", "mean", "sum".
    """
    if plan.impl != "fused":
        layer_fwd = _stacked_fwd if plan.impl == "stack" else reference.linear_act_fwd
        y, saved = reference.mlp_fwd(flattened(x), weights, biases, hidden, output, plan, save, layer_fwd)
        return led(y, x.shape), saved
    weights, biases = tuple(weights), None if biases is None else tuple(biases)
    target, pos_weight, *options = head or (None, None)
    key = (id(plan), biases is None, hidden, output, save, target is None, pos_weight is None, *options)
    tensors = [t for t in (x, *weights, *(biases or ()), target, pos_weight) if t is not None]
    if (call := network_forwards.find(key, tensors)) is None:
        call = mlp_fwd_call(x, weights, biases, hidden, output, plan, save, head)
        network_forwards.keep(key, tensors, call, plan)
    return call(x, weights, biases, head)


def mlp_fwd_call(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...] | None,
    hidden: str,
    output: str,
    plan: MlpPlan,
    save: tuple[int, ...] = (),
    head: tuple[Tensor, Tensor | None, str, torch.dtype] | None = None,
) -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
    """`mlp_fwd` by a fused plan as a function (x, weights, biases, head=None) of tensors like these."""
    flat_x, parameters = flattened(x), dense(weights, biases)
    flat_fwd = gpu("network").mlp_fwd_call(flat_x, *parameters, hidden, output, plan, save, flat_head(head))
    if flat_x is x and are_dense(parameters, weights, biases) and head is None:
        return flat_fwd

    def call(x, weights, biases, head=None):
        y, saved = flat_fwd(flattened(x), *dense(weights, biases), flat_head(head))
        return led(y, x.shape) if y.dim() else y, saved

    return call


def mlp_bwd(
    dy: Tensor,
    x: Tensor | None,
    saved: OptionalTensors,
    weights: OptionalTensors,
    biases: Sequence[Tensor] | None,
    hidden: str,
    output: str,
    wanted: NeedsGrad,
    plan: MlpPlan,
    head: tuple[Tensor, Tensor | None, str] | None = None,
) -> tuple[Tensor | None, OptionalTensors, OptionalTensors]:
    """(dx, dweights, dbiases) of `mlp_fwd` from dy (..., N) of any strides. What is not wanted is None.

    saved: what a "fused" plan has at its boundaries, and then x and all parameters too; of other plans the outputs of
    all layers, y (..., N) last, where None will do for what `reference.mlp_bwd` does not need. head: the target,
    pos_weight and reduction of the loss, of which dy is then the gradient.
    """
    if plan.impl == "fused":
        weights, biases = tuple(weights), None if biases is None else tuple(biases)
        decided = (hidden, output, wanted, plan, head)
        call = mlp_bwd_call(dy, x, saved, weights, biases, *decided)  # pyright: ignore[reportArgumentType]
        return call(dy, x, saved, weights, biases, head)
    options = (hidden, output, wanted, plan)
    flat_dy, flat_x = flattened(dy) if dy.dim() else stored(dy), None if x is None else flattened(x)
    *hs, y = saved
    flat_y = None if y is None else flattened(y)
    if plan.impl == "stack":
        # An identity has no y, but the kernels read the shape of one.
        hs = (*hs, flat_dy.contiguous() if flat_y is None else flat_y)
        dx, dweights, dbiases = gpu("wide").mlp_bwd(flat_dy, flat_x, hs, tuple(map(stored, weights)), *options)
    else:
        dx, dweights, dbiases = reference.mlp_bwd(flat_dy, flat_x, (*hs, flat_y), weights, *options)
    return None if dx is None else dx.view(*(dy if x is None else x).shape[:-1], dx.shape[1]), dweights, dbiases


def mlp_bwd_call(
    dy: Tensor,
    x: Tensor,
    saved: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...] | None,
    hidden: str,
    output: str,
    wanted: NeedsGrad,
    plan: MlpPlan,
    head: tuple[Tensor, Tensor | None, str] | None = None,
) -> Callable[..., tuple[Tensor | None, OptionalTensors, OptionalTensors]]:
    """`mlp_bwd` by a fused plan as a function (dy, x, saved, weights, biases, head=None) of tensors like these."""
    target, pos_weight, *options = head or (None, None)
    key = (id(plan), biases is None, hidden, output, wanted, target is None, pos_weight is None, *options)
    tensors = [t for t in (dy, x, *saved, *weights, *(biases or ()), target, pos_weight) if t is not None]
    if call := network_backwards.find(key, tensors):
        return call

    def flat(dy, x, saved, weights, biases, head):
        return flattened(dy) if dy.dim() else stored(dy), flattened(x), saved, *dense(weights, biases), flat_head(head)

    shape, arguments = x.shape, flat(dy, x, saved, weights, biases, head)
    as_they_are = head is None and arguments[0] is dy and arguments[1] is x
    flat_bwd = gpu("network").mlp_bwd_call(*arguments[:-1], hidden, output, wanted, plan, arguments[-1])

    def reshaped(dy, x, saved, weights, biases, head=None):
        dx, *others = flat_bwd(*flat(dy, x, saved, weights, biases, head))
        return None if dx is None else dx.view(shape), *others

    call = flat_bwd if as_they_are and are_dense(arguments[3:5], weights, biases) else reshaped
    network_backwards.keep(key, tensors, call, plan)
    return call
