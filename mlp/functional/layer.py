# SPDX-License-Identifier: Apache-2.0
"""One layer as a function of tensors."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch._C import _get_tracing_state  # pyright: ignore[reportAttributeAccessIssue]

from ...kernels import eligibility, ops, small
from ...kernels.activations import ACTIVATIONS
from ...kernels.calls import Calls
from ...kernels.records import IMPLS
from .checks import check_layer
from .eager import ERRORS, is_for_torch, product_dtype, torch_network, under_autocast
from .functions import LinearActFunction, node
from .traced import traced_layer

known = Calls()  # layers that kernels run, as functions (x, weight, bias)


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "sigmoid", *, impl: str | None = None
) -> Tensor:
    """act(x @ weight.T + bias), differentiable to any order.

    x: (..., in_features), any strides. weight: (out_features, in_features). bias: (out_features,) or None.
    activation: "sigmoid", "tanh", "relu" or "identity". Returns (..., out_features), contiguous.

    float32, bfloat16 and float16 run fused; under autocast the result has autocast's dtype, as that of `F.linear`
    has. Everything else that torch can multiply (float64, a bias to broadcast, tensor subclasses, torch.func
    transforms, forward-mode duals, dispatch modes, export) runs as `F.linear` and the activation, compiled or not.

    impl: None chooses by shape (`perceptriton.kernels.explain` says what and why); "triton" and "torch" are obeyed,
    or refused with NotImplementedError and the reason. CPU tensors reach triton only under its interpreter.

    The backward pass uses the saved output, as torch does: sigmoid' = y (1 - y), tanh' = 1 - y^2. In bfloat16 and
    float16, y rounds to 1 from z = 6.2 and z = 8.3 on, and the gradient is 0 from there.

    Raises ValueError for shapes, dtypes and devices that do not fit and for an unknown activation or impl, TypeError
    for arguments that are no tensors; the message names the argument and both values.
    """
    if torch.compiler.is_compiling():
        return traced_layer(x, weight, bias, activation, impl)
    try:
        if impl is None and _get_tracing_state() is not None:
            # Under torch.jit sizes are tensors: a choice by them would warn, and would hold for the next sizes too.
            return ACTIVATIONS[activation].forward(F.linear(x, weight, bias))
        # The devices are compared because torch's product takes a weight on the meta device and reads foreign memory.
        if impl is None and x.is_cpu and weight.is_cpu and type(x) in eligibility.PLAIN:
            n, k = weight.shape
            if x.numel() < small.few_elements((k, n), x.dtype, is_grad_enabled()):
                return ACTIVATIONS[activation].forward(F.linear(x, weight, bias))
        if call := known.find((activation, impl, bias is None), (x, weight) if bias is None else (x, weight, bias)):
            return call(x, weight, bias)
        if impl is None and not x.is_cpu and weight.device == x.device:
            n, k = weight.shape
            if small.prefers_torch(x, (k, n)):
                return ACTIVATIONS[activation].forward(F.linear(x, weight, bias))
        return _planned(x, weight, bias, activation, impl)
    except ERRORS as error:
        if _is_vector(x, weight, bias, impl) or is_for_torch(error, x, (weight,), (bias,), (activation,), impl):
            return torch_network(x, (weight,), None if bias is None else (bias,), activation, activation)
        check_layer(x, weight, bias, activation, impl)
        raise


def _is_vector(x, weight, bias, impl) -> bool:
    """Whether the weight is a vector, with which torch has a product without a bias."""
    tensors = isinstance(x, Tensor) and isinstance(weight, Tensor) and bias is None
    return tensors and impl != "triton" and weight.dim() == 1 and x.shape[-1:] == weight.shape


def linear_sigmoid(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """sigmoid(x @ weight.T + bias), differentiable to any order: `linear_act` with the activation "sigmoid".

    x: (..., in_features), any strides. weight: (out_features, in_features). bias: (out_features,) or None. impl: None
    chooses by shape, "triton" and "torch" are obeyed or refused. Returns (..., out_features), contiguous. dtypes,
    autocast and errors are those of `linear_act`.
    """
    return linear_act(x, weight, bias, "sigmoid", impl=impl)


def _planned(x, weight, bias, activation, impl):
    if activation not in ACTIVATIONS or impl not in IMPLS:
        raise ValueError
    dtype, autocast = product_dtype(x)
    if refused := eligibility.layer_refusal(x, weight, bias, dtype, autocast, impl):
        if impl == "triton":
            check_layer(x, weight, bias, activation, impl)
            raise NotImplementedError(f'impl="triton": {refused}')
        if weight.device != x.device:
            raise ValueError
        return ACTIVATIONS[activation].forward(F.linear(x, weight, bias))
    given = (x, weight) if bias is None else (x, weight, bias)
    if autocast:
        # The casts stand outside the Function, so that autograd differentiates them and gradients keep their dtypes.
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    wants_grad = is_grad_enabled() and any([t.requires_grad for t in (x, weight, bias) if t is not None])
    if wants_grad and impl is None and x.is_cpu and small.trains_plainly(x, weight):
        # The activation overwrites z: autograd keeps only y, and a new large tensor costs more than the sigmoid. Of
        # other than matrices z is a view, through which autograd would have to go a long way.
        act = ACTIVATIONS[activation]
        return (act.forward_ if x.dim() == 2 else act.forward)(F.linear(x, weight, bias))
    call = ops.linear_act_fwd_call(x, weight, bias, activation, impl)
    if wants_grad:
        y = LinearActFunction.apply(x, weight, bias, activation, impl, call)
    else:
        y = call(x, weight, bias) if call else ops.linear_act_fwd(x, weight, bias, activation, impl)
    # Whether a small call is torch's depends on the stream too, which `Calls` does not compare.
    if call and not (impl is None and small.is_small(x, (weight.shape[1], weight.shape[0]))):
        if wants_grad:
            apply, options = node(LinearActFunction), (activation, impl, call)
            call = lambda x, weight, bias: apply(x, weight, bias, *options)  # noqa: E731
        if autocast:
            call = under_autocast(call, dtype, partial(_planned, activation=activation, impl=impl))
        known.keep((activation, impl, bias is None), given, call)
    return y
