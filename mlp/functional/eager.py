# SPDX-License-Identifier: Apache-2.0
"""Networks in torch's own operations, and the dtypes and circumstances under which those run."""

from collections.abc import Callable, Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from ...kernels import small
from ...kernels.activations import ACTIVATIONS
from ...kernels.records import IMPLS, NotCompiledError

_UNASKED = torch._C._disabled_torch_function_impl  # of classes that leave all to torch, as nn.Parameter

# Arguments that do not fit together make torch raise one of these; only then is the reason looked for.
ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)


def torch_network(x, weights, biases, hidden, output, head=()) -> Tensor:
    """act(x @ weight.T + bias) for each layer in turn; biases: None for none.

    head: the target, pos_weight and reduction of the cross entropy of what comes out.
    """
    for l, weight in enumerate(weights):
        act = ACTIVATIONS[output if l == len(weights) - 1 else hidden]
        x = act.forward(F.linear(x, weight, None if biases is None else biases[l]))
    return torch_bce(x, *head) if head else x


def torch_bce(z, target, pos_weight, reduction) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, target, pos_weight=pos_weight, reduction=reduction)


def product_dtype(x: Tensor) -> tuple[torch.dtype, bool]:
    """The dtype in which torch would multiply x, and whether that is autocast's."""
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind), True
    return x.dtype, False


def under_autocast(call: Callable, dtype: torch.dtype, decide: Callable) -> Callable:
    """A function (x, weights, biases) that casts to autocast's dtype and calls, or decides anew: that may be another.

    weights and biases: tensors, or tuples of them.
    """

    def cast(given):
        if isinstance(given, Tensor):
            return given.to(dtype)
        return None if given is None else tuple([tensor.to(dtype) for tensor in given])

    def autocast_call(x, weights, biases):
        if torch.get_autocast_dtype(x.device.type) is not dtype:
            return decide(x, weights, biases)
        return call(x.to(dtype), cast(weights), cast(biases))

    return autocast_call


def is_for_torch(error: Exception, x, weights, biases, activations, impl) -> bool:
    """Whether torch's own operations take a call that failed with this error, one of ERRORS.

    They do while torch.fx traces: x is a symbol then, without a shape to plan with or to check. They do for a nested x,
    which has no shape, and for classes that answer some of torch's functions themselves, and may answer no others:
    those of per-sample gradients do not tell a device. They do too while a CUDA graph is captured whose kernels are not
    compiled, if an eager call of this size launches none: whoever has warmed up on the default stream has done all that
    `torch.nn` asks for.
    """
    if impl not in IMPLS or not all(isinstance(act, str) and act in ACTIVATIONS for act in activations):
        return False
    if isinstance(x, torch.fx.Proxy):
        if impl == "triton":
            raise NotImplementedError('impl="triton": torch.fx is tracing') from None
        return True
    if impl != "triton":
        tensors = [tensor for given in (weights, biases) if isinstance(given, Sequence) for tensor in given]
        if any(map(_answers_itself, (x, *tensors))):
            return True
        if getattr(x, "is_nested", False):
            return True
    if not isinstance(error, NotCompiledError) or impl is not None:
        return False
    widths = (x.shape[-1], *(weight.shape[0] for weight in weights))
    return small.is_small(x, widths)


def _answers_itself(operand: object) -> bool:
    """Whether a class of somebody's is asked instead of torch, by the functions that take the operand."""
    answer = getattr(type(operand), "__torch_function__", _UNASKED)
    return answer is not _UNASKED and getattr(answer, "__func__", answer) is not Tensor.__torch_function__.__func__
