"""The ops that torch.compile calls, registered with torch.library."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .activations import ACTIVATIONS
from .eligibility import bias_refusal, check_alike, check_operands
from .ops import NAMESPACE, in_features_of, linear_act_bwd, linear_act_fwd

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("linear_act(Tensor x, Tensor weight, Tensor? bias, str activation, str? impl) -> Tensor")
_library.define(
    "linear_act_backward(Tensor dy, Tensor y, Tensor? x, Tensor? weight, str activation, bool[3] wanted, str? impl)"
    " -> (Tensor, Tensor, Tensor)"
)


def _check_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_operands(x, weight, bias)
    if reason := bias_refusal("bias", bias, weight):
        raise ValueError(reason)


def _check_backward(dy: Tensor, y: Tensor, x: Tensor | None, weight: Tensor | None, wanted: Sequence[bool]) -> None:
    if dy.shape != y.shape:
        raise ValueError(f"dy {tuple(dy.shape)} has not the shape of y {tuple(y.shape)}")
    for name, tensor, want in (("weight", weight, wanted[0]), ("x", x, wanted[1])):
        if want and tensor is None:
            raise ValueError(f"{name} is None, but wanted {list(wanted)}")
    if weight is not None and (weight.dim() != 2 or weight.shape[0] != y.shape[-1]):
        raise ValueError(f"weight {tuple(weight.shape)} does not give the features of y {tuple(y.shape)}")
    if x is not None and x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"x {tuple(x.shape)} has not the rows of y {tuple(y.shape)}")
    check_alike("y", y, dy=dy, x=x, weight=weight)
    if x is not None and weight is not None:
        check_operands(x, weight)


def _linear_act(x, weight, bias, activation, impl):
    _check_forward(x, weight, bias)
    return linear_act_fwd(x, weight, bias, activation, impl)


def _linear_act_backward(dy, y, x, weight, activation, wanted, impl):
    _check_backward(dy, y, x, weight, wanted)
    return _tensors(y, linear_act_bwd(dy, y, x, weight, activation, tuple(wanted), impl))


def _tensors(y: Tensor, gradients: reference.Gradients) -> tuple[Tensor, ...]:
    # A registered op returns tensors: an empty one stands for a gradient that nobody wants.
    return tuple(y.new_empty(0) if g is None else g for g in gradients)


_library.impl("linear_act", _linear_act, "CompositeExplicitAutograd")
_library.impl("linear_act_backward", _linear_act_backward, "CompositeExplicitAutograd")


def _batched_linear_act(x, weight, bias, activation, impl):
    return ACTIVATIONS[activation].forward(torch.nn.functional.linear(x, weight, bias))


def _batched_linear_act_backward(dy, y, x, weight, activation, wanted, impl):
    return _tensors(y, reference.linear_act_bwd_differentiable(dy, y, x, weight, activation, tuple(wanted)))


# torch.vmap would call an op without a rule once for each member: torch has rules for plain operations.
for _key in ("FuncTorchBatched", "Batched"):  # "Batched" is torch.autograd.grad(..., is_grads_batched=True)
    _library.impl("linear_act", _batched_linear_act, _key)
    _library.impl("linear_act_backward", _batched_linear_act_backward, _key)


@torch.library.register_fake(f"{NAMESPACE}::linear_act", lib=_library)
def _(x, weight, bias, activation, impl):
    _check_forward(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake(f"{NAMESPACE}::linear_act_backward", lib=_library)
def _(dy, y, x, weight, activation, wanted, impl):
    _check_backward(dy, y, x, weight, wanted)
    k, n = in_features_of(x, weight), y.shape[-1]
    shapes = ((*y.shape[:-1], k), (n, k), (n,))
    return tuple(y.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))
