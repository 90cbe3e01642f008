# SPDX-License-Identifier: Apache-2.0
"""The ops that torch.compile calls, registered with torch.library. Autograd hears of them in `mlp`."""

import itertools
import math
import types
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, reference
from .activations import ACTIVATIONS
from .eligibility import bias_refusal, check_alike, check_operands
from .operands import widths_of
from .ops import NAMESPACE, in_features_of, linear_act_bwd, linear_act_fwd
from .plan import mlp_columns, mlp_slots

# The overload of every op. Inductor keeps programs on disk by the names of ops, not by what they were made of: fakes,
# autograd formulas, `mlp_slots`. With those the name changes, or an old program would run with what is new.
OVERLOAD = "v1"
library = torch.library.Library(NAMESPACE, "DEF")
library.define(f"linear_act.{OVERLOAD}(Tensor x, Tensor weight, Tensor? bias, str activation, str? impl) -> Tensor")
library.define(
    f"linear_act_backward.{OVERLOAD}(Tensor dy, Tensor y, Tensor? x, Tensor? weight, str activation, bool[3] wanted,"
    " str? impl) -> (Tensor, Tensor, Tensor)"
)


def _register(op: str, own: Callable, batched: Callable, fake: Callable) -> None:
    op = f"{op}.{OVERLOAD}"
    library.impl(op, own, "CompositeExplicitAutograd")
    # torch.vmap would call an op without a rule once for each member: torch has rules for plain operations.
    for key in ("FuncTorchBatched", "Batched"):  # "Batched" is torch.autograd.grad(..., is_grads_batched=True)
        library.impl(op, batched, key)
    torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=library)


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


def _batched_linear_act(x, weight, bias, activation, impl):
    return ACTIVATIONS[activation].forward(F.linear(x, weight, bias))


def _batched_linear_act_backward(dy, y, x, weight, activation, wanted, impl):
    return _tensors(y, reference.linear_act_bwd_differentiable(dy, y, x, weight, activation, tuple(wanted)))


def _fake_linear_act(x, weight, bias, activation, impl):
    _check_forward(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linear_act_backward(dy, y, x, weight, activation, wanted, impl):
    _check_backward(dy, y, x, weight, wanted)
    k, n = in_features_of(x, weight), y.shape[-1]
    shapes = ((*y.shape[:-1], k), (n, k), (n,))
    return tuple(y.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


_register("linear_act", _linear_act, _batched_linear_act, _fake_linear_act)
_register("linear_act_backward", _linear_act_backward, _batched_linear_act_backward, _fake_linear_act_backward)

# --- whole networks ----------------------------------------------------------------------------------------

# biases: one for each weight, or none. save: the layers whose inputs the backward pass reads, as `boundaries` of its
# plan says; they come back beside y as a fused network stores them. wanted: for x, every weight and every bias. The
# gradients are dx, and one tensor for all parameters' as `mlp_slots` says, since an op must not return views of it.
#
# `mlp_bce` gives, in the place of y, the binary cross entropy of y as the logit of target, in dtype; output is then
# "identity", and dy the gradient of the loss. Both ops are the same functions, which take what a loss adds as `head`.
for _name, _head in (("mlp", ""), ("mlp_bce", ", Tensor target, Tensor? pos_weight, str reduction, ScalarType dtype")):
    library.define(
        f"{_name}.{OVERLOAD}(Tensor x, Tensor[] weights, Tensor[] biases, str hidden, str output, int[] save,"
        f" str? impl{_head}) -> (Tensor, Tensor[])"
    )
    library.define(
        f"{_name}_backward.{OVERLOAD}(Tensor dy, Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] saved,"
        f" str hidden, str output, int[] save, bool[] wanted, str? impl{_head}) -> (Tensor, Tensor)"
    )


def _check_network(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], output: str, head: tuple) -> None:
    if not weights or len(biases) not in (0, len(weights)):
        raise ValueError(f"weights holds {len(weights)} Tensors, and biases {len(biases)}")
    features = x.shape[-1] if x.dim() else None
    for l, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != features:
            below = f"weights[{l - 1}] {tuple(weights[l - 1].shape)}" if l else f"x {tuple(x.shape)}"
            raise ValueError(f"weights[{l}] {tuple(weight.shape)} does not take the features of {below}")
        bias = biases[l] if biases else None
        if reason := bias_refusal(f"biases[{l}]", bias, weight):
            raise ValueError(reason)
        check_alike("x", x, **{f"weights[{l}]": weight, f"biases[{l}]": bias})
        features = weight.shape[0]
    if head:
        target, shape = head[0], (*x.shape[:-1], features)
        if target.shape != shape or target.device != x.device:
            found = f"{tuple(target.shape)} on {target.device}"
            raise ValueError(f"target {found} has not the shape and device of the output {shape} on {x.device}")
        if output != "identity":
            raise ValueError(f"output is {output!r}, but the loss takes a logit")


def _mlp(x, weights, biases, hidden, output, save, impl, *head):
    _check_network(x, weights, biases, output, head)
    plan = ops.mlp_plans(x, weights, bool(save), bool(head), impl=impl).forward
    if plan.impl != "fused":
        return _plain_mlp(x, weights, biases, hidden, output, save, impl, *head)
    y, saved = ops.mlp_fwd(x, weights, biases or None, hidden, output, plan, tuple(save), head or None)
    return y, list(saved)


def _mlp_backward(dy, x, weights, biases, saved, hidden, output, save, wanted, impl, *head):
    _check_network(x, weights, biases, output, head)
    plan = ops.mlp_plans(x, weights, True, bool(head), impl=impl).backward
    if plan is None or plan.impl != "fused" or plan.boundaries != tuple(save):
        # Without rows, or where products of fp32 are to be computed in another way than when the program was compiled.
        return _plain_mlp_backward(dy, x, weights, biases, saved, hidden, output, save, wanted, impl, *head)
    needs_grad, operands = as_needs_grad(wanted, len(weights)), (x, saved, weights, biases or None)
    dx, *parameters = ops.mlp_bwd(dy, *operands, hidden, output, needs_grad, plan, head[:3] or None)
    size = mlp_slots(widths_of(weights), needs_grad)[-1]
    view = next((gradient for gradients in parameters for gradient in gradients if gradient is not None), None)
    flat = x.new_empty(0) if view is None else view.as_strided((size,), (1,), 0)
    return x.new_empty(0) if dx is None else dx, flat


def as_needs_grad(wanted: Sequence[bool], layers: int) -> reference.NeedsGrad:
    """From one list for x, all weights and all biases, which may be missing."""
    return wanted[0], tuple(wanted[1 : layers + 1]), tuple(wanted[layers + 1 :]) or (False,) * layers


def _outputs(x, weights, biases, hidden, output) -> list[Tensor]:
    """Those of all layers, by plain operations."""
    outputs = []
    for l, weight in enumerate(weights):
        act = ACTIVATIONS[output if l == len(weights) - 1 else hidden]
        x = act.forward(F.linear(x, weight, biases[l] if biases else None))
        outputs.append(x)
    return outputs


def _plain_mlp(x, weights, biases, hidden, output, save, impl, *head):
    hs = _outputs(x, weights, biases, hidden, output)
    shapes = _saved_shapes(x, weights, save)
    saved = [F.pad(hs[l - 1], (0, columns - hs[l - 1].shape[-1])) for l, (_, columns) in zip(save, shapes, strict=True)]
    y = _plain_bce(hs[-1], *head) if head else hs[-1]
    return y, [h.reshape(shape) for h, shape in zip(saved, shapes, strict=True)]


def _plain_bce(z, target, pos_weight, reduction, dtype):
    z = z.to(torch.promote_types(z.dtype, dtype))  # as autocast would, which knows no op of ours
    loss = F.binary_cross_entropy_with_logits(z, target.to(z.dtype), pos_weight=pos_weight, reduction=reduction)
    return loss.to(dtype).contiguous()  # torch's has the target's strides


def _plain_bce_backward(dloss, z, target, pos_weight, reduction, dtype):
    p = z.to(torch.promote_types(z.dtype, dtype)).sigmoid()
    dz = p - target if pos_weight is None else p * (1 + (pos_weight - 1) * target) - pos_weight * target
    return (dloss * dz / (target.numel() if reduction == "mean" else 1)).to(z.dtype)


def _plain_mlp_backward(dy, x, weights, biases, saved, hidden, output, save, wanted, impl, *head):
    outputs = _outputs(x, weights, biases, hidden, output)
    if head:
        dy = _plain_bce_backward(dy, outputs[-1], *head)
    upstream = (*(None,) * (len(weights) - 1), dy)
    options = (hidden, output, as_needs_grad(wanted, len(weights)))
    dx, *parameters = reference.mlp_bwd_differentiable(upstream, x, outputs, weights, *options)
    pieces = []
    for gradient in itertools.chain.from_iterable(zip(*parameters, strict=True)):
        if gradient is not None:
            flat = gradient.reshape(gradient.numel())
            pieces += [flat, flat.new_zeros(-gradient.numel() % 8)]
    return x.new_empty(0) if dx is None else dx.reshape(x.shape), torch.cat(pieces) if pieces else x.new_empty(0)


def _saved_shapes(x: Tensor, weights: Sequence[Tensor], save: Sequence[int]) -> list[tuple[int, int]]:
    columns = mlp_columns(widths_of(weights))
    return [(math.prod(x.shape[:-1]), columns[l]) for l in save]


def _fake_mlp(x, weights, biases, hidden, output, save, impl, *head):
    _check_network(x, weights, biases, output, head)
    shape = () if head and head[2] != "none" else (*x.shape[:-1], weights[-1].shape[0])
    y = x.new_empty(shape, dtype=head[3] if head else x.dtype)
    return y, [x.new_empty(shape) for shape in _saved_shapes(x, weights, save)]


def _fake_mlp_backward(dy, x, weights, biases, saved, hidden, output, save, wanted, impl, *head):
    _check_network(x, weights, biases, output, head)
    size = mlp_slots(widths_of(weights), as_needs_grad(wanted, len(weights)))[-1]
    return x.new_empty(x.shape if wanted[0] else 0), x.new_empty(size)


for _name in ("mlp", "mlp_bce"):
    _register(_name, _mlp, _plain_mlp, _fake_mlp)
    _register(f"{_name}_backward", _mlp_backward, _plain_mlp_backward, _fake_mlp_backward)

_OPS = (op + end for op in ("linear_act", "mlp", "mlp_bce") for end in ("", "_backward"))
registered = types.SimpleNamespace(**{op: getattr(getattr(getattr(torch.ops, NAMESPACE), op), OVERLOAD) for op in _OPS})
