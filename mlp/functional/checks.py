# SPDX-License-Identifier: Apache-2.0
"""Errors at the door: what does not fit together, with the name of the argument and both values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import eligibility
from ...kernels.activations import ACTIVATIONS
from ...kernels.records import IMPLS
from .eager import product_dtype

REDUCTIONS = ("none", "mean", "sum")


def check_layer(x, weight, bias, activation, impl) -> None:
    """Raises the error that says what is wrong with the arguments of `linear_act`, if anything is."""
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, not {type(tensor).__name__}") from None
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}") from None
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, not {impl!r}") from None
    try:
        eligibility.check_operands(x, weight, bias, product_dtype(x)[1])
    except ValueError as error:
        raise error from None
    # torch broadcasts one value or one row to every number of rows; another bias would fit some batches by chance. It
    # adds no bias of shape (1, 1) to the product of a vector.
    broadcast = {(), (1,), (1, 1), (1, weight.shape[0])} - ({(1, 1)} if x.dim() == 1 else set())
    if (
        bias is not None
        and tuple(bias.shape) not in broadcast
        and (reason := eligibility.bias_refusal("bias", bias, weight))
    ):
        raise ValueError(reason) from None
    if impl != "triton" and not (x.is_floating_point() and x.dtype.itemsize > 1):
        raise ValueError(f"x is {x.dtype}, for which torch has no product or no {activation}") from None


def check_network(x, weights, biases, activations, impl) -> None:
    """Raises the error that says what is wrong with the arguments of `mlp_act`, if anything is."""
    for name, tensors in (("weights", weights), ("biases", () if biases is None else biases)):
        if not isinstance(tensors, Sequence):
            raise TypeError(f"{name} must be a sequence of Tensors, not {type(tensors).__name__}") from None
    if not weights:
        raise ValueError("weights must hold at least one Tensor, not 0") from None
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"biases holds {len(biases)} Tensors, but weights {len(weights)}") from None
    for l, weight in enumerate(weights):
        if biases is not None and biases[l] is None:
            raise TypeError(f"biases[{l}] must be a Tensor, not NoneType: all layers have a bias or none has") from None
        inputs = x
        if l > 0 and isinstance(weight, Tensor) and weight.dim() == 2:
            if weight.shape[1] != weights[l - 1].shape[0]:
                raise ValueError(
                    f"weights[{l}] {tuple(weight.shape)} does not take the out_features of weights[{l - 1}] "
                    f"{tuple(weights[l - 1].shape)}"
                ) from None
            inputs = x.new_empty(*[0] * (x.dim() > 1), weight.shape[1])
        try:
            act = activations[-1] if l == len(weights) - 1 else activations[0]
            check_layer(inputs, weight, None if biases is None else biases[l], act, impl)
        except (TypeError, ValueError) as error:
            message = str(error).replace("weight", f"weights[{l}]").replace("bias", f"biases[{l}]")
            raise type(error)(message) from None


def check_loss(x, weights, target, pos_weight, reduction) -> None:
    """Raises the error that says what is wrong with the arguments of the loss, if anything is."""
    tensors = {"target": target} | ({} if pos_weight is None else {"pos_weight": pos_weight})
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, not {type(tensor).__name__}") from None
        integers = " or of integers" if name == "pos_weight" else ""
        if not (is_real(tensor) if integers else tensor.is_floating_point()):
            raise ValueError(f"{name} must be floating{integers}, not {tensor.dtype}") from None
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            raise ValueError(f"{name} is {tensor.dtype}, for which torch has no loss") from None
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x on {x.device}") from None
    if pos_weight is not None and pos_weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("pos_weight wants a gradient, but the loss has none for it") from None
    shape = (*x.shape[:-1], weights[-1].shape[0])
    if target.shape != shape:
        raise ValueError(f"target {tuple(target.shape)} has not the shape of the output {shape}") from None
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}") from None
    if pos_weight is not None:
        try:
            fits = torch.broadcast_shapes(pos_weight.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"pos_weight {tuple(pos_weight.shape)} does not fit the output {shape}") from None


def is_real(tensor: Tensor) -> bool:
    """Whether the tensor holds floating numbers or integers."""
    return not (tensor.is_complex() or tensor.dtype is torch.bool)


def broadcast_bias(x, weights, biases) -> int | None:
    """The index of the last layer whose bias is not (out_features,), or None where x, weights and biases all fit.

    Raises a ValueError without a message where anything else does not fit; `check_network` then raises one with it.
    """
    found = None
    if not weights or (biases is not None and len(biases) != len(weights)):
        raise ValueError
    features = x.shape[-1]
    for l, weight in enumerate(weights):
        n, k = weight.shape
        if k != features:
            raise ValueError
        if biases is not None and biases[l].shape != (n,):
            found = l
        features = n
    return found


def loss_refusal(x, target, pos_weight, n: int, kinds: tuple[type, ...] = eligibility.PLAIN) -> str | None:
    """Why the kernels do not take this loss, or None. kinds: the types of tensors that are plain ones."""
    for name, tensor in (("target", target), ("pos_weight", pos_weight)):
        if tensor is None:
            continue
        if type(tensor) not in kinds:
            return f"{name} is a {type(tensor).__name__}, a subclass of Tensor with rules of its own"
        if tensor.requires_grad:
            return f"{name} wants a gradient"
        if tensor.dtype is torch.float64 or tensor.device != x.device:
            return f"{name} is {tensor.dtype} on {tensor.device}, and x on {x.device}"
    if pos_weight is not None and pos_weight.shape not in ((), (1,), (n,)):
        return f"pos_weight {tuple(pos_weight.shape)} is not ({n},)"
    return None
