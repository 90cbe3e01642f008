# SPDX-License-Identifier: Apache-2.0
"""The binary cross entropy of layers and networks that end in a sigmoid."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import ops
from .checks import REDUCTIONS, check_loss, check_network, is_real, loss_refusal
from .eager import ERRORS, is_for_torch, product_dtype, torch_bce, torch_network
from .functions import MlpBceFunction
from .network import mlp_act, network_plans, network_takes_torch
from .traced import traced_network


def linear_sigmoid_bce(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """The binary cross entropy of sigmoid(x @ weight.T + bias) against target, from the logit z.

    x: (..., in_features). weight: (out_features, in_features). bias: (out_features,) or None. target:
    (..., out_features), floating, values in [0, 1]. pos_weight: (out_features,) or None. reduction: "mean" and "sum"
    give a scalar, "none" (..., out_features). impl: None chooses by shape, "triton" and "torch" are obeyed or refused.
    See `mlp_sigmoid_bce`, of which this is the case of one layer.
    """
    biases = None if bias is None else (bias,)
    options = {"pos_weight": pos_weight, "reduction": reduction, "impl": impl}
    try:
        return mlp_sigmoid_bce(x, (weight,), biases, target, **options)
    except (TypeError, ValueError) as error:
        message = str(error).replace("weights[0]", "weight").replace("biases[0]", "bias")
        if message == str(error):
            raise
        raise type(error)(message) from None


def mlp_sigmoid_bce(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    target: Tensor,
    activation: str = "sigmoid",
    *,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """The binary cross entropy of a network that ends in a sigmoid, differentiable to any order.

    With z the output of the last layer before its sigmoid, p = sigmoid(z), and w = pos_weight or 1:

        loss = -(w t log p + (1 - t) log(1 - p)) = (1 - t) z + (1 + (w - 1) t) log(1 + e^-z)

    x: (..., K_0), any strides. weights: (N_l, K_l) each, with K_{l+1} = N_l. biases: (N_l,) each, or None for none.
    target: (..., N), floating; soft targets in [0, 1] are fine. activation: of the hidden layers. pos_weight: (N,),
    floating or integers, or None. reduction: "mean" over all elements, "sum", or "none" for the shape of target.
    impl: None chooses by shape, "triton" and "torch" are obeyed or refused. dtypes and errors are those of `mlp_act`.

    It equals `torch.nn.BCEWithLogitsLoss` of the logits, the dtype of the result included: that of target, fp32 under
    autocast, where `torch.nn.BCELoss` refuses to run on a GPU. `nn.Sigmoid` followed by `nn.BCELoss` differs from both
    where p comes near 1: in fp32 it loses digits as z grows (1 % of the loss at z = 12), its gradient
    (p - t) / (p (1 - p)) * p (1 - p) vanishes from z = 17 on, and it cuts log p off at -100. Here the gradient is p - t
    everywhere.

    On a GPU a network of one segment takes two launches for loss and gradients when one program covers the batch;
    predictions are never written to memory. Gradients reach x and the parameters; where target wants one too, the
    network runs as `mlp_act` and torch's loss, as it does on a CPU. pos_weight may want none: torch has none for it.
    torch.compile sees one op where kernels take the network and its loss whatever the batch.
    """
    try:
        n = weights[-1].shape[0]
        if (
            reduction not in REDUCTIONS
            or not target.is_floating_point()
            or target.shape != (*x.shape[:-1], n)
            or not (pos_weight is None or is_real(pos_weight))
        ):
            raise ValueError
        if network_takes_torch(x, weights, biases, (activation,), impl):
            return torch_network(x, weights, biases, activation, "identity", (target, pos_weight, reduction))
        refused = loss_refusal(x, target, pos_weight, n)
        if refused and impl == "triton":
            raise NotImplementedError(f'impl="triton": {refused}')
        head = (target, pos_weight, reduction, torch.float32 if product_dtype(x)[1] else target.dtype)
        if torch.compiler.is_compiling() and not refused:
            loss = traced_network(x, weights, biases, activation, "identity", impl, *head)
            if loss is not None:
                return loss
        found = None if refused else network_plans(x, weights, biases, impl, loss=True)
        if found is None or not found[1].forward.triton:
            z = mlp_act(x, weights, biases, activation, "identity", impl=impl)
            return torch_bce(z, target, pos_weight, reduction)
        (x, weights, biases), plans = found
        if plans.backward is None:
            return ops.mlp_fwd(x, weights, biases, activation, "identity", plans.forward, head=head)[0]
        parameters = (*weights, *(biases or ()))
        return MlpBceFunction.apply(x, *head, activation, plans, len(weights), *parameters)
    except ERRORS as error:
        if is_for_torch(error, x, weights, biases, (activation,), impl):
            return torch_network(x, weights, biases, activation, "identity", (target, pos_weight, reduction))
        check_network(x, weights, biases, (activation, "identity"), impl)
        check_loss(x, weights, target, pos_weight, reduction)
        raise
