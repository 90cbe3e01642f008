# SPDX-License-Identifier: Apache-2.0
"""Whole networks as functions of tensors."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...kernels import eligibility, ops, small
from ...kernels.activations import ACTIVATIONS
from ...kernels.calls import Calls
from ...kernels.operands import widths_of
from ...kernels.records import IMPLS
from .checks import broadcast_bias, check_network
from .eager import ERRORS, is_for_torch, product_dtype, torch_network, under_autocast
from .functions import FusedMlpFunction, MlpFunction, node, split_parameters
from .layer import linear_act
from .traced import traced_network

known = Calls()  # networks that kernels run, as functions (x, weights, biases)


def mlp_act(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    activation: str = "sigmoid",
    output_activation: str | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """A whole network: `linear_act` for each weight in turn, differentiable to any order.

    x: (..., K_0), any strides. weights: (N_l, K_l) each, with K_{l+1} = N_l. biases: (N_l,) each, or None for none.
    activation: of the hidden layers; output_activation: of the last one, the same unless told otherwise. Returns
    (..., N) of the last layer, contiguous.

    On a GPU, networks whose widths are at most 128 run as one kernel forward, which leaves only y in memory, and as
    few as registers allow back, which compute the activations once more; on a CPU, networks that are not small run as
    one autograd node. `perceptriton.kernels.explain` says what and why. torch.compile sees one op where kernels take
    the whole network whatever the batch, and a chain of layers elsewhere. dtypes, autocast, impl and errors are those
    of `linear_act`; impl="triton" asks for the whole network in kernels of its own.
    """
    output = activation if output_activation is None else output_activation
    try:
        # The types tell sequences from iterators, which can be gone through but once and are refused.
        key = (activation, output, impl, len(weights), type(weights), type(biases))
        tensors = (x, *weights, *(biases or ()))
        if not torch.compiler.is_compiling() and (call := known.find(key, tensors)):
            return call(x, tuple(weights), None if biases is None else tuple(biases))
        return _decided(x, weights, biases, activation, output, impl, key)
    except ERRORS as error:
        if is_for_torch(error, x, weights, biases, (activation, output), impl):
            return torch_network(x, weights, biases, activation, output)
        check_network(x, weights, biases, (activation, output), impl)
        raise


def _decided(x, weights, biases, activation, output, impl, key) -> Tensor:
    """`mlp_act` by whatever takes the call, which is kept under the key where that pays."""
    if network_takes_torch(x, weights, biases, (activation, output), impl):
        return torch_network(x, weights, biases, activation, output)
    if torch.compiler.is_compiling() and (
        (y := traced_network(x, weights, biases, activation, output, impl)) is not None
    ):
        return y
    given = (x, *weights, *(biases or ()))
    if (found := network_plans(x, weights, biases, impl)) is None:
        return _layers(x, weights, biases, activation, output, impl)
    (x, weights, biases), plans = found
    if plans.forward.impl == "aten":
        return torch_network(x, weights, biases, activation, output)
    if plans.forward.impl == "fused":
        save = () if plans.backward is None else plans.backward.boundaries
        forward = ops.mlp_fwd_call(x, weights, biases, activation, output, plans.forward, save)
        options = (activation, output, forward, plans.backward, len(weights))
        if plans.backward is None:
            call = lambda x, weights, biases: forward(x, weights, biases)[0]  # noqa: E731
            y = call(x, weights, biases)
        else:
            apply = node(FusedMlpFunction)
            call = lambda x, weights, biases: apply(x, options, *weights, *(biases or ()))  # noqa: E731
            y = FusedMlpFunction.apply(x, options, *weights, *(biases or ()))
        # Whether a small call is torch's depends on the stream too, which `Calls` does not compare.
        if not (impl is None and small.is_small(x, widths_of(weights))):
            dtype, autocast = product_dtype(given[0])
            if autocast:
                decide = partial(_decided, activation=activation, output=output, impl=impl, key=key)
                call = under_autocast(call, dtype, decide)
            known.keep(key, given, call)
        return y
    if plans.backward is None:
        return ops.mlp_fwd(x, weights, biases, activation, output, plans.forward)[0]
    arguments = (x, activation, output, plans, len(weights), *weights, *(biases or ()))
    return MlpFunction.apply(*arguments)[0]


def _layers(x, weights, biases, hidden, output, impl) -> Tensor:
    for l, weight in enumerate(weights):
        act = output if l == len(weights) - 1 else hidden
        x = linear_act(x, weight, None if biases is None else biases[l], act, impl=impl)
    return x


def network_takes_torch(x, weights, biases, activations, impl) -> bool:
    """Whether torch's own operations run the network, without a plan. Raises for what does not fit together."""
    if impl not in IMPLS or not all(act in ACTIVATIONS for act in activations):
        raise ValueError
    if torch.compiler.is_compiling():
        return False  # reading sizes here would compile a dynamic batch once for each of its sizes
    if impl is None and torch._C._get_tracing_state() is not None:
        return True  # sizes are tensors
    if (misfit := broadcast_bias(x, weights, biases)) is not None:
        if not isinstance(biases, Sequence) or any(tensor.device != x.device for tensor in (*weights, *biases)):
            raise ValueError
        if impl == "triton":
            refused = eligibility.bias_refusal(f"biases[{misfit}]", biases[misfit], weights[misfit])
            raise NotImplementedError(f'impl="triton": {refused}')
        return True  # torch broadcasts such a bias, kernels do not
    return impl is None and small.network_prefers_torch(x, weights)


def network_plans(x, weights, biases, impl, loss: bool = False):
    """((x, weights, biases) in the dtype of the products, plans), or None where layers run one by one."""
    if torch.compiler.is_compiling():
        return None
    dtype, autocast = product_dtype(x)
    if refused := eligibility.mlp_refusal(x, weights, biases, dtype, autocast, impl):
        if impl == "triton":
            raise NotImplementedError(f'impl="triton": {refused}')
        return None
    tensors = (x, *weights, *(biases or ()))
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if autocast:
        # The casts stand outside the Function, so that autograd differentiates them and gradients keep their dtypes.
        x, *parameters = (tensor.to(dtype) for tensor in tensors)
        weights, biases = split_parameters(parameters, len(weights))
    weights, biases = tuple(weights), None if biases is None else tuple(biases)
    plans = ops.mlp_plans(x, weights, training, loss, impl)
    return None if plans.forward.impl == "layers" else ((x, weights, biases), plans)
